//! What events add up to: of a job, of a device, of the fleet; and who fails repeatedly.

use pisync::store::{Count, Device, FailureQuery, FailureStreak, Figures, Freshness, Page};
use pisync_core::{Mbps, SyncEvent};

use crate::support::{
    events::{at, device_id, failure, job_name, now, of_job, success, write, write_at},
    store::TestStore,
};

every_writer!(
    a_device_and_its_jobs,
    streaks_are_reported_with_the_batch,
    a_failure_that_was_answered_before_is_no_streak,
    new_devices_are_reported_once,
    repeated_failures_of_all_time,
    repeated_failures_in_a_row,
    repeated_failures_by_the_page,
    an_empty_fleet,
    the_fleet_adds_up,
    active_devices_are_those_received_from,
    recent_devices_are_the_latest_ten,
);

fn with_speed(hundredths: i64, event: SyncEvent) -> SyncEvent {
    SyncEvent { internet_speed: Mbps::from_hundredths(hundredths), ..event }
}

fn ids(devices: &[Device]) -> Vec<&str> {
    devices.iter().map(|device| device.device_id.as_str()).collect()
}

async fn a_device_and_its_jobs(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = vec![
        with_speed(1000, of_job("rsync", success("pi", at(-50)))),
        of_job("rsync", failure("pi", at(-40))),
        of_job("backup", success("pi", at(-45))),
    ];
    write_at(&mut *writer, at(-30), events).await;
    let events = vec![
        with_speed(0, of_job("rsync", failure("pi", at(-20)))),
        success("pi", at(-100)),
        SyncEvent { total_errors: 7, ..failure("pi", at(-15)) },
    ];
    write_at(&mut *writer, at(-10), events).await;

    let found = fixture.store.device(&device_id("pi")).await.unwrap().unwrap();
    let rsync = Figures {
        total_syncs: 3,
        failed_syncs: 2,
        total_files_synced: 1,
        total_errors: 2,
        speed_sum: 1000,
        speed_count: 2,
        first_sync: Some(at(-50)),
        last_sync: Some(at(-20)),
        last_success: Some(at(-50)),
        last_failure: Some(at(-20)),
        consecutive_failures: 2,
        last_seen: Some(at(-10)),
    };
    let backup = Figures {
        total_syncs: 1,
        total_files_synced: 1,
        first_sync: Some(at(-45)),
        last_sync: Some(at(-45)),
        last_success: Some(at(-45)),
        last_seen: Some(at(-30)),
        ..Figures::default()
    };
    let without_name = Figures {
        total_syncs: 2,
        failed_syncs: 1,
        total_files_synced: 1,
        total_errors: 7,
        first_sync: Some(at(-100)),
        last_sync: Some(at(-15)),
        last_success: Some(at(-100)),
        last_failure: Some(at(-15)),
        consecutive_failures: 1,
        last_seen: Some(at(-10)),
        ..Figures::default()
    };
    assert_eq!(
        found.jobs,
        [
            (None, without_name),
            (Some("backup".to_owned()), backup),
            (Some("rsync".to_owned()), rsync)
        ]
    );
    let sums = Figures {
        total_syncs: 6,
        failed_syncs: 3,
        total_files_synced: 3,
        total_errors: 9,
        speed_sum: 1000,
        speed_count: 2,
        first_sync: Some(at(-100)),
        last_sync: Some(at(-15)),
        last_success: Some(at(-45)),
        last_failure: Some(at(-15)),
        consecutive_failures: 2,
        last_seen: Some(at(-10)),
    };
    assert_eq!(found.device.figures, sums);
    assert_eq!(found.device.created_at, at(-30));
}

async fn streaks_are_reported_with_the_batch(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let streak = |device: &str, job: Option<&str>, before, after| FailureStreak {
        device_id: device_id(device),
        job: job.map(job_name),
        before,
        after,
    };
    let written = write(
        &mut *writer,
        vec![
            failure("b", at(1)),
            failure("b", at(2)),
            of_job("x", failure("a", at(1))),
            success("a", at(1)),
        ],
    )
    .await;
    assert_eq!(written.streaks, [streak("a", Some("x"), 0, 1), streak("b", None, 0, 2)]);
    // Another job's failures, and a device's that is getting on well, are not told.
    let written = write(&mut *writer, vec![failure("b", at(3)), success("a", at(2))]).await;
    assert_eq!(written.streaks, [streak("b", None, 2, 3)]);
    let written = write(&mut *writer, vec![success("b", at(4)), success("c", at(4))]).await;
    assert_eq!(written.streaks, []);
    let written = write(&mut *writer, vec![failure("b", at(5))]).await;
    assert_eq!(written.streaks, [streak("b", None, 0, 1)]);
}

async fn a_failure_that_was_answered_before_is_no_streak(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write(&mut *writer, vec![success("pi", at(10))]).await;
    for late in [at(9), at(10).saturating_add_milliseconds(-1)] {
        let written = write(&mut *writer, vec![failure("pi", late)]).await;
        assert_eq!(written.streaks, [], "{late}");
    }
    // Nor where a part of the batch makes the store count again.
    let written = write(&mut *writer, vec![failure("pi", at(8)), failure("pi", at(7))]).await;
    assert_eq!(written.streaks, []);
    let written = write(&mut *writer, vec![failure("pi", at(8)), failure("pi", at(11))]).await;
    assert_eq!(written.streaks.len(), 1);
    assert_eq!(written.streaks[0].after, 1);
}

async fn new_devices_are_reported_once(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = vec![success("b", at(0)), success("a", at(0)), success("b", at(1))];
    let written = write(&mut *writer, events).await;
    let mut new_devices = written.new_devices;
    new_devices.sort();
    assert_eq!(new_devices, [device_id("a"), device_id("b")]);
    let written = write(&mut *writer, vec![success("a", at(2)), success("c", at(2))]).await;
    assert_eq!(written.new_devices, [device_id("c")]);
    // Nor is it new to another writer, nor long afterwards.
    let written = write(&mut *fixture.writer(), vec![success("a", at(3))]).await;
    assert_eq!(written.new_devices, []);
    let written = write_at(&mut *writer, at(3600), vec![success("a", at(4))]).await;
    assert_eq!(written.new_devices, []);
}

/// Devices with so many failures, then so many more after a success: `f3-s-f1`.
async fn fill_with_failures(fixture: &TestStore) {
    let mut events = Vec::new();
    for (device, before, after) in
        [("f0-f0", 0, 0), ("f3-f1", 3, 1), ("f0-f4", 0, 4), ("f1-f3", 1, 3), ("f5-f0", 5, 0)]
    {
        events.extend((0..before).map(|second| failure(device, at(second))));
        events.push(success(device, at(10)));
        events.extend((0..after).map(|second| failure(device, at(20 + second))));
    }
    // Four failures, but never more than two in a row of one job.
    for second in 0..2 {
        events.push(of_job("x", failure("jobs", at(30 + second))));
        events.push(of_job("y", failure("jobs", at(40 + second))));
    }
    write(&mut *fixture.writer(), events).await;
}

async fn failing(
    fixture: &TestStore,
    threshold: u32,
    consecutive: bool,
    limit: Option<u32>,
    offset: u64,
) -> Page<Device> {
    let query = FailureQuery { threshold, consecutive, window: None, limit, offset, after: None };
    fixture.store.repeated_failures(&query).await.unwrap()
}

async fn repeated_failures_of_all_time(fixture: &TestStore) {
    fill_with_failures(fixture).await;
    // Among equals, whose latest failure is latest; then by id.
    let found = failing(fixture, 4, false, None, 0).await;
    assert_eq!(ids(&found.items), ["f5-f0", "jobs", "f0-f4", "f1-f3", "f3-f1"]);
    assert_eq!(found.total, Count::Exactly(5));
    assert_eq!(found.items[0].figures.failed_syncs, 5);
    assert_eq!(found.items[0].figures.consecutive_failures, 0);
    let found = failing(fixture, 5, false, None, 0).await;
    assert_eq!(ids(&found.items), ["f5-f0"]);
    assert_eq!(found.total, Count::Exactly(1));
    let found = failing(fixture, 6, false, None, 0).await;
    assert_eq!((found.items.len(), found.total), (0, Count::Exactly(0)));
    assert_eq!(failing(fixture, 0, false, None, 0).await.total, Count::Exactly(6));
    assert_eq!(failing(fixture, u32::MAX, false, None, 0).await.total, Count::Exactly(0));
}

async fn repeated_failures_in_a_row(fixture: &TestStore) {
    fill_with_failures(fixture).await;
    let found = failing(fixture, 1, true, None, 0).await;
    assert_eq!(ids(&found.items), ["f0-f4", "f1-f3", "jobs", "f3-f1"]);
    assert_eq!(found.total, Count::Exactly(4));
    let found = failing(fixture, 3, true, None, 0).await;
    assert_eq!(ids(&found.items), ["f0-f4", "f1-f3"]);
    assert_eq!(found.total, Count::Exactly(2));
    // Those that never failed come after those that once did.
    let found = failing(fixture, 0, true, None, 0).await;
    assert_eq!(ids(&found.items), ["f0-f4", "f1-f3", "jobs", "f3-f1", "f5-f0", "f0-f0"]);
}

async fn repeated_failures_by_the_page(fixture: &TestStore) {
    let events = ["d", "b", "a", "c", "e"].map(|device| failure(device, at(0)));
    write(&mut *fixture.writer(), events.to_vec()).await;
    for (limit, offset, expected) in [
        (None, 0, vec!["a", "b", "c", "d", "e"]),
        (None, 3, vec!["d", "e"]),
        (Some(2), 0, vec!["a", "b"]),
        (Some(2), 2, vec!["c", "d"]),
        (Some(2), 4, vec!["e"]),
        (Some(2), 6, vec![]),
    ] {
        for consecutive in [false, true] {
            let page = failing(fixture, 1, consecutive, limit, offset).await;
            assert_eq!(ids(&page.items), expected, "{limit:?} after {offset}");
            assert_eq!(page.total, Count::Exactly(5));
        }
    }
}

async fn an_empty_fleet(fixture: &TestStore) {
    let stats = fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap();
    assert_eq!((stats.total_devices, stats.active_devices), (0, 0));
    assert_eq!(stats.figures, Figures::default());
    assert!(stats.recent_devices.is_empty());
    assert_eq!(failing(fixture, 1, false, None, 0).await.total, Count::Exactly(0));
}

async fn the_fleet_adds_up(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = vec![
        with_speed(250, success("a", at(0))),
        of_job("x", SyncEvent { total_errors: 3, ..failure("a", at(1)) }),
        with_speed(50, SyncEvent { total_files_synced: 20, ..success("b", at(2)) }),
    ];
    write(&mut *writer, events).await;
    write(&mut *writer, vec![failure("b", at(3))]).await;
    let stats = fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap();
    assert_eq!((stats.total_devices, stats.active_devices), (2, 2));
    assert_eq!(
        stats.figures,
        Figures {
            total_syncs: 4,
            failed_syncs: 2,
            total_files_synced: 21,
            total_errors: 4,
            speed_sum: 300,
            speed_count: 2,
            // The times and the streak are nobody's.
            first_sync: stats.figures.first_sync,
            last_sync: stats.figures.last_sync,
            last_success: stats.figures.last_success,
            last_failure: stats.figures.last_failure,
            consecutive_failures: stats.figures.consecutive_failures,
            last_seen: stats.figures.last_seen,
        }
    );
    assert_eq!(ids(&stats.recent_devices), ["b", "a"]);
    assert_eq!(stats.recent_devices[1].figures.total_syncs, 2);
    assert_eq!(stats.recent_devices[1].figures.total_errors, 3);
}

async fn active_devices_are_those_received_from(fixture: &TestStore) {
    let mut writer = fixture.writer();
    // By the server's clock, whatever the device's says.
    write_at(&mut *writer, at(-100), vec![success("early", at(500))]).await;
    write_at(&mut *writer, at(-50), vec![success("late", at(-500))]).await;
    let events = vec![of_job("x", success("late", at(-400))), success("last", at(0))];
    write_at(&mut *writer, at(-10), events).await;
    for (since, expected) in [
        (at(-101), 3),
        (at(-100), 3),
        (at(-100).saturating_add_milliseconds(1), 2),
        (at(-50), 2),
        (at(-10), 2),
        (at(-9), 0),
    ] {
        let stats = fixture.store.fleet_stats(since, 10, Freshness::Everything).await.unwrap();
        assert_eq!((stats.total_devices, stats.active_devices), (3, expected), "{since}");
    }
}

async fn recent_devices_are_the_latest_ten(fixture: &TestStore) {
    let mut writer = fixture.writer();
    // Five share one date and ten another, so that the tenth place falls among equals; and they
    // register in another order than that of their ids.
    for number in (0..15).rev() {
        let date = at(if number < 5 { 100 } else { 50 });
        write(&mut *writer, vec![success(&format!("pi-{number:02}"), date)]).await;
    }
    // An older sync of another job does not count, nor does when it was received.
    write_at(&mut *writer, at(60), vec![of_job("x", success("pi-14", at(-100)))]).await;
    let stats = fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap();
    let expected: Vec<String> = (0..10).map(|number| format!("pi-{number:02}")).collect();
    assert_eq!(ids(&stats.recent_devices), expected);
    assert_eq!(stats.total_devices, 15);
    write(&mut *writer, vec![of_job("x", success("pi-14", at(101)))]).await;
    let stats = fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap();
    assert_eq!(stats.recent_devices[0].device_id, "pi-14");
    assert_eq!(stats.recent_devices[0].figures.total_syncs, 3);
    assert_eq!(stats.recent_devices.len(), 10);
}
