//! Sweeps: what they find does not depend on the order in which reports came, on who sweeps beside, or on where one ended in
//! the middle; and the numbers of devices by state always add up.

use std::{collections::BTreeMap, sync::Arc};

use pisync::{
    fleet::sweep::sweep,
    store::{self, Beat, DeviceChange, IncidentChange, OutageCause, Store},
};
use pisync_core::{SyncEvent, Timestamp};

use crate::support::{
    events::{at, device_id, failure, group_name, somebody, success, write_at},
    store::TestStore,
};

both_stores!(
    any_order_of_arrival_ends_in_the_same_state,
    numbers_of_devices_by_state_add_up,
    sweeps_at_once_make_no_incident_twice,
    a_sweep_that_ended_in_the_middle_is_gone_on_with,
    a_server_that_was_away_excuses_what_it_could_not_hear,
    a_clock_that_is_behind_sweeps_nothing,
);

const HOUR: i64 = 3_600;

/// A generator of numbers that is the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

async fn sweep_at(store: &dyn Store, now: Timestamp) {
    let swept = sweep(store, now).await.unwrap();
    assert!(swept.is_complete);
}

/// The kept state and problems of each device.
async fn states(fixture: &TestStore) -> BTreeMap<String, String> {
    let device = if fixture.is_postgres() {
        "device_id"
    } else {
        "(select device_id from devices where id = device_health.device)"
    };
    let select = format!("select {device} || '|' || state || '|' || problems from device_health");
    let rows = fixture.database.texts(&select).await;
    rows.into_iter()
        .map(|row| {
            let (device, rest) = row.split_once('|').unwrap();
            (device.to_owned(), rest.to_owned())
        })
        .collect()
}

/// Of each pair, one device sends its reports in the order of their dates and all at once, the other in any order, in several
/// batches, with a sweep after each. In the end nothing tells them apart.
async fn any_order_of_arrival_ends_in_the_same_state(fixture: &TestStore) {
    const PAIRS: u64 = 30;
    const BATCHES: u64 = 4;
    let mut numbers = Numbers(18);
    let mut in_order: Vec<SyncEvent> = Vec::new();
    let mut batches: Vec<Vec<SyncEvent>> = vec![Vec::new(); usize::try_from(BATCHES).unwrap()];
    let mut last: Vec<SyncEvent> = Vec::new();
    for pair in 0..PAIRS {
        let (ordered, scattered) = (format!("ordered-{pair}"), format!("scattered-{pair}"));
        let events: Vec<(i64, bool)> = (0..=numbers.below(8))
            .map(|index| {
                let index = i64::try_from(index).unwrap();
                (index * HOUR - 12 * HOUR, numbers.below(2) == 0)
            })
            .collect();
        let event = |device: &str, (second, has_failed): (i64, bool)| {
            if has_failed { failure(device, at(second)) } else { success(device, at(second)) }
        };
        in_order.extend(events.iter().map(|of| event(&ordered, *of)));
        for of in &events {
            batches[usize::try_from(numbers.below(BATCHES)).unwrap()].push(event(&scattered, *of));
        }
        // Both are heard for the last time at the same moment, by a report of long ago.
        let oldest = (-20 * HOUR, numbers.below(2) == 0);
        last.push(event(&ordered, oldest));
        last.push(event(&scattered, oldest));
    }
    let mut writer = fixture.writer();
    for (index, batch) in batches.into_iter().enumerate() {
        let received = at(i64::try_from(index).unwrap() * 60);
        if !batch.is_empty() {
            write_at(&mut *writer, received, batch).await;
        }
        sweep_at(&*fixture.store, received).await;
    }
    write_at(&mut *writer, at(300), in_order).await;
    write_at(&mut *writer, at(300), last).await;
    for now in [at(315), at(300 + 2 * HOUR)] {
        sweep_at(&*fixture.store, now).await;
        let states = states(fixture).await;
        for pair in 0..PAIRS {
            let (ordered, scattered) =
                (&states[&format!("ordered-{pair}")], &states[&format!("scattered-{pair}")]);
            assert_eq!(ordered, scattered, "pair {pair} at {now}");
        }
    }
    let found: Vec<_> = states(fixture).await.into_values().collect();
    assert!(found.iter().all(|state| state.starts_with("silent|")), "{found:?}");
}

/// The numbers by group and state are those of the devices, whatever has become of them.
async fn numbers_of_devices_by_state_add_up(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let devices: Vec<String> = (0..12).map(|number| format!("d{number}")).collect();
    let events: Vec<_> = devices.iter().map(|device| success(device, at(0))).collect();
    write_at(&mut *writer, at(0), events).await;
    sweep_at(&*fixture.store, at(15)).await;
    for (index, device) in devices.iter().enumerate().take(8) {
        let group = Some(Some(group_name(if index % 2 == 0 { "even" } else { "odd" })));
        let change = DeviceChange { group, ..DeviceChange::default() };
        fixture.store.update_device(&device_id(device), &change, &somebody()).await.unwrap();
    }
    sweep_at(&*fixture.store, at(30)).await;
    let failures: Vec<_> = devices.iter().take(3).map(|device| failure(device, at(60))).collect();
    write_at(&mut *writer, at(60), failures).await;
    sweep_at(&*fixture.store, at(75)).await;
    for device in ["d0", "d5", "d11"] {
        fixture.store.delete_device(&device_id(device), &somebody()).await.unwrap();
    }
    sweep_at(&*fixture.store, at(90)).await;
    let count = "select coalesce(sum(devices), 0) from group_states";
    assert_eq!(fixture.database.number(&format!("({count})")).await, 9);
    let wrong = fixture
        .database
        .number(
            r#"(select count(*)
                  from group_states kept
                 where devices <> (select count(*) from device_health health
                                    where health."group" = kept."group" and health.state = kept.state))"#,
        )
        .await;
    assert_eq!(wrong, 0);
    // Everybody becomes silent.
    sweep_at(&*fixture.store, at(2 * HOUR)).await;
    let silent = r#"(select coalesce(sum(devices), 0) from group_states where state = 'silent')"#;
    assert_eq!(fixture.database.number(silent).await, 9);
    // The most of the hour are noted by group, and stay when the devices are well again.
    let again = devices.iter().filter(|device| !["d0", "d5", "d11"].contains(&device.as_str()));
    let events: Vec<_> = again.map(|device| success(device, at(2 * HOUR + 60))).collect();
    write_at(&mut *writer, at(2 * HOUR + 60), events).await;
    sweep_at(&*fixture.store, at(2 * HOUR + 75)).await;
    for table in ["group_hours", "group_days"] {
        let most = format!("(select coalesce(sum(most_silent), 0) from {table})");
        assert_eq!(fixture.database.number(&most).await, 9, "{table}");
        let most = format!("(select coalesce(sum(most_degraded), 0) from {table})");
        assert!(fixture.database.number(&most).await >= 3, "{table}");
    }
}

/// Two servers sweep at the same moments. Each incident is opened once.
async fn sweeps_at_once_make_no_incident_twice(fixture: &TestStore) {
    const DEVICES: i64 = 40;
    let other = if fixture.is_postgres() {
        store::open(fixture.target()).await.unwrap()
    } else {
        Arc::clone(&fixture.store)
    };
    let mut writer = fixture.writer();
    // A tenth are silent at a time, so that there are device incidents and one of the group.
    for device in 0..DEVICES {
        let event = success(&format!("d{device:02}"), at(device / 4 * 600));
        write_at(&mut *writer, at(device / 4 * 600), vec![event]).await;
    }
    let mut opened = 0;
    for step in 0..40_i64 {
        let now = at(step * 300);
        let (first, second) = tokio::join!(sweep(&*fixture.store, now), sweep(&*other, now));
        for swept in [first.unwrap(), second.unwrap()] {
            opened +=
                swept.events.iter().filter(|event| event.what == IncidentChange::Opened).count();
        }
    }
    sweep_at(&*fixture.store, at(40 * 300)).await;
    let incidents = fixture.database.number("(select count(*) from incidents)").await;
    assert_eq!(i64::try_from(opened).unwrap(), incidents);
    assert_eq!(fixture.database.number("(select count(*) from device_health)").await, DEVICES);
    let silent = "(select count(*) from device_health where state = 'silent')";
    assert_eq!(fixture.database.number(silent).await, DEVICES);
    let left = "(select count(*) from unreconciled_devices)";
    assert_eq!(fixture.database.number(left).await, 0);
    if fixture.is_postgres() {
        other.close().await.unwrap();
    }
}

/// A server dies between finding states and making incidents. The next sweep makes them.
async fn a_sweep_that_ended_in_the_middle_is_gone_on_with(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write_at(&mut *writer, at(0), vec![success("a", at(0)), success("b", at(0))]).await;
    sweep_at(&*fixture.store, at(15)).await;
    let now = at(2 * HOUR);
    let settings = Arc::new(fixture.store.fleet_settings().await.unwrap());
    let found = fixture.store.contradicted_devices(now).await.unwrap();
    assert_eq!(found, ["a", "b"]);
    fixture.store.evaluate_devices(&found, &settings, now).await.unwrap().unwrap();
    assert_eq!(fixture.database.number("(select count(*) from incidents)").await, 0);
    let swept = sweep(&*fixture.store, now.saturating_add_milliseconds(15_000)).await.unwrap();
    assert_eq!(swept.evaluated, 0);
    assert_eq!(swept.events.len(), 2);
    let swept = sweep(&*fixture.store, now.saturating_add_milliseconds(30_000)).await.unwrap();
    assert_eq!((swept.evaluated, swept.events.len()), (0, 0));
}

async fn a_server_that_was_away_excuses_what_it_could_not_hear(fixture: &TestStore) {
    let beat = |second: i64, is_first: bool| Beat {
        at: at(second),
        is_first,
        has_refused: false,
        node: "a".to_owned(),
    };
    let mut writer = fixture.writer();
    write_at(&mut *writer, at(0), vec![success("a", at(0))]).await;
    assert_eq!(fixture.store.beat(&beat(1, false)).await.unwrap(), None);
    sweep_at(&*fixture.store, at(15)).await;
    fixture.store.note_stop(at(3_000)).await.unwrap();
    // It is started again in the hour in which the device was to report.
    fixture.store.pass_over(at(2_990)).await.unwrap();
    let outage = fixture.store.beat(&beat(4_000, true)).await.unwrap().unwrap();
    assert_eq!(
        (outage.from, outage.until, outage.cause),
        (at(3_000), at(4_000), OutageCause::Stopped)
    );
    // An interval and a grace after the outage.
    let due = 4_000 + 5_400;
    sweep_at(&*fixture.store, at(due - 15)).await;
    assert!(states(fixture).await["a"].starts_with("ok|"));
    sweep_at(&*fixture.store, at(due)).await;
    assert!(states(fixture).await["a"].starts_with("silent|"));
}

async fn a_clock_that_is_behind_sweeps_nothing(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write_at(&mut *writer, at(0), vec![success("a", at(0))]).await;
    sweep_at(&*fixture.store, at(60)).await;
    let behind = sweep(&*fixture.store, at(50)).await.unwrap();
    assert!(!behind.is_complete);
    // A little is nothing: servers' clocks are never quite the same.
    sweep_at(&*fixture.store, at(56)).await;
}
