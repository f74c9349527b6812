//! Events that a server received before, elsewhere or long ago: they keep their receive times.

use std::sync::Arc;

use pisync::store::{Batch, Freshness, HistoryQuery, Retention, Window};
use pisync_core::{EventId, SyncEvent, Timestamp};

use crate::support::{
    events::{at, device_id, failure, now, of_job, success, write, write_at},
    store::{TestStore, assert_right, differences},
};

both_stores!(
    events_keep_their_receive_times,
    a_device_is_as_old_as_its_first_event,
    a_duplicate_is_told_with_its_own_receive_time,
    what_is_older_than_is_kept_counts_and_goes,
);

const DAY: i64 = 24 * 60 * 60;

/// Events that are stored now, each with the time at which it was received.
fn received(events: Vec<(Timestamp, SyncEvent)>) -> Arc<Batch> {
    let (received_at, events) = events.into_iter().unzip();
    Arc::new(Batch { received_at, ..Batch::new(now(), events) })
}

async fn events_keep_their_receive_times(fixture: &TestStore) {
    // Of four months, the latest not last.
    let days = [-100, -70, -1, -40];
    let events = days.map(|day| (at(day * DAY), failure("pi", at(day * DAY - 5))));
    fixture.writer().write(&received(events.to_vec())).await.unwrap();
    let other = of_job("nightly", success("pi", at(-50 * DAY)));
    fixture.writer().write(&received(vec![(at(-49 * DAY), other)])).await.unwrap();

    let query = HistoryQuery::newest(device_id("pi"), 10);
    let history = fixture.store.sync_history(&query).await.unwrap().unwrap();
    let times: Vec<_> = history.events.iter().map(|event| event.created_at).collect();
    assert_eq!(times, [-1, -40, -49, -70, -100].map(|day| at(day * DAY)));
    assert!(history.events.iter().all(|event| event.updated_at == event.created_at));
    assert_eq!(history.figures.last_seen, Some(at(-DAY)));
    assert_eq!(history.figures.consecutive_failures, 4);
    let stats = fixture.store.fleet_stats(at(-2 * DAY), 10, Freshness::Everything).await.unwrap();
    assert_eq!(stats.active_devices, 1);
    assert_eq!(
        fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap().active_devices,
        0
    );
    assert_right(&differences(&*fixture.store, false).await);
}

async fn a_device_is_as_old_as_its_first_event(fixture: &TestStore) {
    let created_at =
        async || fixture.store.device(&device_id("pi")).await.unwrap().unwrap().device.created_at;
    let mut writer = fixture.writer();
    for (day, expected) in [(-10, -10), (-30, -30), (-20, -30)] {
        let event = success("pi", at(day * DAY));
        writer.write(&received(vec![(at(day * DAY), event)])).await.unwrap();
        assert_eq!(created_at().await, at(expected * DAY));
    }
    // What arrives now makes nobody younger.
    write(&mut *writer, vec![success("pi", at(0))]).await;
    assert_eq!(created_at().await, at(-30 * DAY));
    let device = fixture.store.device(&device_id("pi")).await.unwrap().unwrap().device;
    assert_eq!(device.figures.last_seen, Some(now()));
}

async fn a_duplicate_is_told_with_its_own_receive_time(fixture: &TestStore) {
    let event = SyncEvent { event_id: EventId::new("run-1").ok(), ..success("pi", at(-40 * DAY)) };
    let mut writer = fixture.writer();
    let first = received(vec![(at(-39 * DAY), event.clone()), (at(-38 * DAY), event.clone())]);
    let written = writer.write(&first).await.unwrap();
    // The same id twice within the batch, and once more in a later one.
    let again = writer.write(&received(vec![(at(-DAY), event)])).await.unwrap();
    for written in [&written, &again] {
        assert_eq!(written.duplicates.len(), 1);
        let first = written.duplicates[0].first.as_ref().unwrap();
        assert_eq!(first.created_at, at(-39 * DAY));
    }
    assert_right(&differences(&*fixture.store, false).await);
}

async fn what_is_older_than_is_kept_counts_and_goes(fixture: &TestStore) {
    let retention = Retention::new(40, 300).unwrap();
    let aggregate_and_drop = async || {
        while fixture.store.aggregate_events(at(3600)).await.unwrap() {}
        for minutes in [0, 10] {
            let now = at(minutes * 60);
            while fixture.store.drop_old_events(now, &retention).await.unwrap() {}
        }
    };
    let history = async || {
        let query = HistoryQuery::newest(device_id("pi"), 10);
        fixture.store.sync_history(&query).await.unwrap().unwrap()
    };
    let mut writer = fixture.writer();
    write_at(&mut *writer, at(-100 * DAY), vec![failure("pi", at(-100 * DAY))]).await;
    write(&mut *writer, vec![failure("pi", at(0))]).await;
    aggregate_and_drop().await;
    assert!(history().await.raw_since.is_some());

    let old = [success("pi", at(-95 * DAY)), failure("pi", at(-94 * DAY))];
    let old = old.map(|event| (event.timestamp, event));
    fixture.writer().write(&received(old.to_vec())).await.unwrap();
    let window = Window::last_days(at(-90 * DAY), 30);
    for rows in [3, if fixture.is_postgres() { 1 } else { 3 }] {
        let found = history().await;
        assert_eq!((found.figures.total_syncs, found.figures.failed_syncs), (4, 3));
        // What went before them is unknown by now: they change no streak.
        assert_eq!(found.figures.consecutive_failures, 2);
        assert_eq!(fixture.store.window_figures(&window).await.unwrap().total_syncs, 3);
        assert_eq!(found.events.len(), rows);
        aggregate_and_drop().await;
    }
}
