//! Events with an id of the device's own: stored once, however often and on whichever way they come.

use std::collections::BTreeSet;

use pisync::store::{self, Written};
use pisync_core::{EventId, SyncEvent};
use tokio::task::JoinSet;

use super::streaks::figures_of;
use crate::support::{
    events::{
        at, batch_at, device_id, failure, of_job, recount, sent, somebody, success, write, write_at,
    },
    store::{Fixture, TestDatabase, TestStore},
};

every_writer!(
    a_repeated_event_changes_nothing,
    repeats_within_a_batch,
    ids_are_the_devices_own,
    what_is_no_longer_kept,
    a_deleted_device_starts_anew,
    old_ids_are_forgotten,
    copies_that_arrive_at_the_same_moment,
);

fn called(event_id: &str, event: SyncEvent) -> SyncEvent {
    SyncEvent { event_id: Some(EventId::new(event_id).unwrap()), ..event }
}

/// The positions of duplicates, and the ids of what they repeat as the store tells it.
fn duplicates(written: &Written) -> Vec<(usize, i64, Option<i64>)> {
    let told = |first: &Option<store::StoredEvent>| first.as_ref().map(|event| event.id);
    written
        .duplicates
        .iter()
        .map(|one| (one.position, written.ids[one.position], told(&one.first)))
        .collect()
}

async fn total_syncs(fixture: &TestStore, device: &str) -> i64 {
    let device = fixture.store.device(&device_id(device)).await.unwrap();
    device.map_or(0, |found| found.device.figures.total_syncs)
}

async fn a_repeated_event_changes_nothing(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let first = called("a", of_job("nightly", failure("pi", at(-60))));
    let written = write(&mut *writer, vec![first.clone(), success("pi", at(-90))]).await;
    assert_eq!(duplicates(&written), []);
    let before = figures_of(&*fixture.store, &device_id("pi")).await;

    // Alone, among others, long after, and when the device has changed its mind about the rest.
    let changed = called("a", SyncEvent { total_files_synced: 9, ..success("pi", at(0)) });
    for repeat in [first.clone(), changed] {
        for received in [at(0), at(80 * 86_400)] {
            let again = write_at(&mut *writer, received, vec![repeat.clone()]).await;
            let id = written.ids[0];
            assert_eq!(duplicates(&again), [(0, id, Some(id))]);
            let told = again.duplicates[0].first.as_ref().unwrap();
            assert_eq!((told.timestamp, told.total_errors), (at(-60), 1));
            assert_eq!(
                (told.job.as_deref(), told.event_id.as_deref()),
                (Some("nightly"), Some("a"))
            );
            assert_eq!(told.created_at, at(0));
            assert!(again.streaks.is_empty() && again.new_devices.is_empty(), "{again:?}");
            assert_eq!(figures_of(&*fixture.store, &device_id("pi")).await, before);
        }
    }
    let mixed = vec![success("pi", at(1)), first, success("other", at(2))];
    let again = write(&mut *writer, mixed).await;
    assert_eq!(duplicates(&again), [(1, written.ids[0], Some(written.ids[0]))]);
    assert_eq!(again.new_devices, [device_id("other")]);
    assert_eq!(again.ids.iter().collect::<BTreeSet<_>>().len(), 3);
    assert_eq!((total_syncs(fixture, "pi").await, total_syncs(fixture, "other").await), (3, 1));
}

async fn repeats_within_a_batch(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let batch = vec![
        called("a", failure("pi", at(1))),
        called("b", failure("pi", at(2))),
        called("a", failure("pi", at(1))),
        called("a", success("pi", at(3))),
    ];
    let written = write(&mut *writer, batch.clone()).await;
    let first = written.ids[0];
    assert_eq!(duplicates(&written), [(2, first, Some(first)), (3, first, Some(first))]);
    let streaks: Vec<_> = written.streaks.iter().map(|streak| streak.after).collect();
    assert_eq!(streaks, [2]);
    // Once more: now all of them are.
    let again = write(&mut *writer, batch).await;
    let positions: Vec<_> = again.duplicates.iter().map(|one| one.position).collect();
    assert_eq!(positions, [0, 1, 2, 3]);
    assert_eq!(again.ids, [first, written.ids[1], first, first]);
    assert_eq!(total_syncs(fixture, "pi").await, 2);
}

async fn ids_are_the_devices_own(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let batch = || ["a", "b", "A"].map(|device| called("1", success(device, at(0)))).to_vec();
    assert_eq!(duplicates(&write(&mut *writer, batch()).await), []);
    let mut other_ids = batch();
    other_ids[1] = called("2", success("b", at(0)));
    let written = write(&mut *writer, other_ids).await;
    let positions: Vec<_> = written.duplicates.iter().map(|one| one.position).collect();
    assert_eq!(positions, [0, 2]);
    assert_eq!(total_syncs(fixture, "b").await, 2);
    // Without an id every event is a new one.
    let alike = vec![success("b", at(0)), success("b", at(0))];
    assert_eq!(duplicates(&write(&mut *writer, alike).await), []);
}

async fn what_is_no_longer_kept(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = vec![called("a", success("pi", at(0))), called("b", success("pi", at(1)))];
    let written = write(&mut *writer, events.clone()).await;
    fixture.database.execute("delete from sync_events").await;
    let again = write(&mut *writer, events).await;
    assert_eq!(duplicates(&again), [(0, written.ids[0], None), (1, written.ids[1], None)]);
    assert_eq!(total_syncs(fixture, "pi").await, 2);
}

async fn a_deleted_device_starts_anew(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = vec![called("a", success("pi", at(0))), called("a", success("other", at(0)))];
    write(&mut *writer, events.clone()).await;
    assert_eq!(fixture.store.delete_device(&device_id("pi"), &somebody()).await.unwrap(), Some(1));
    let written = write(&mut *writer, events).await;
    let positions: Vec<_> = written.duplicates.iter().map(|one| one.position).collect();
    assert_eq!(positions, [1]);
    assert_eq!(written.new_devices, [device_id("pi")]);
    assert_eq!(total_syncs(fixture, "pi").await, 1);
}

async fn old_ids_are_forgotten(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let event = |id: usize| called(&id.to_string(), success("pi", at(0)));
    write_at(&mut *writer, at(-100), (0..6_000).map(event).collect()).await;
    write_at(&mut *writer, at(-50), vec![event(6_000)]).await;
    let mut steps = 1;
    while fixture.store.forget_event_ids(at(-50)).await.unwrap() {
        steps += 1;
    }
    assert!(steps > 1, "all at once");
    let written = write(&mut *writer, vec![event(0), event(5_999), event(6_000)]).await;
    let positions: Vec<_> = written.duplicates.iter().map(|one| one.position).collect();
    assert_eq!(positions, [2]);
    assert_eq!(total_syncs(fixture, "pi").await, 6_003);
}

/// Through several writers, as several servers have them on PostgreSQL; those of one SQLite file take
/// turns.
async fn copies_that_arrive_at_the_same_moment(fixture: &TestStore) {
    let mut writers = JoinSet::new();
    for number in 0..4_usize {
        let mut writer = fixture.writer();
        writers.spawn(async move {
            let mut ids = Vec::new();
            for round in 0..40_usize {
                // Each writer begins elsewhere, so that they meet in the middle.
                let mut events: Vec<_> = (0..6)
                    .map(|event| {
                        let device = format!("pi-{}", (event + number) % 3);
                        let timestamp = at(i64::try_from(round).unwrap());
                        called(&format!("{round}-{}", event / 3), failure(&device, timestamp))
                    })
                    .collect();
                events.push(success("unnamed", at(0)));
                let keys: Vec<_> = events
                    .iter()
                    .map(|event| (event.device_id.clone(), event.event_id.clone()))
                    .collect();
                let written = writer.write(&batch_at(at(0), events)).await.unwrap();
                ids.extend(keys.into_iter().zip(written.ids).filter(|((_, key), _)| key.is_some()));
            }
            ids
        });
    }
    // Every copy is answered the one id.
    let answers: BTreeSet<_> = writers
        .join_all()
        .await
        .concat()
        .into_iter()
        .map(|((device, event), id)| (device, event.map(|event| event.to_string()), id))
        .collect();
    assert_eq!(answers.len(), 3 * 2 * 40);
    for device in ["pi-0", "pi-1", "pi-2"] {
        assert_eq!(total_syncs(fixture, device).await, 2 * 40);
    }
    assert_eq!(total_syncs(fixture, "unnamed").await, 4 * 40);
}

/// Two servers on one PostgreSQL get the same batches, again and again, as when a load balancer's
/// answers are lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_store_each_event_once() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let batches: Vec<Vec<SyncEvent>> = (0..30)
        .map(|batch| {
            (0..8)
                .map(|event| {
                    let timestamp = at((batch * 7 + event * 13) % 50);
                    let device = format!("pi-{}", event % 5);
                    let event_id = format!("{batch}-{event}");
                    match event % 3 {
                        0 => called(&event_id, success(&device, timestamp)),
                        _ => called(&event_id, failure(&device, timestamp)),
                    }
                })
                .collect()
        })
        .collect();
    let mut nodes = JoinSet::new();
    for node in 0..2 {
        let store = store::open(fixture.target()).await.unwrap();
        let mut batches = batches.clone();
        if node == 1 {
            batches.rotate_left(3);
        }
        nodes.spawn(async move {
            let mut writer = store.event_writer();
            let mut all = Vec::new();
            for batch in batches.iter().chain(&batches) {
                let written = writer.write(&batch_at(at(0), batch.clone())).await.unwrap();
                all.extend(sent(at(0), batch, &written));
            }
            all.truncate(all.len() / 2);
            all
        });
    }
    // Both are told the same ids.
    let all = nodes.join_all().await.remove(0);
    for (device_id, jobs) in recount(&all) {
        assert_eq!(figures_of(&*fixture.store, &device_id).await.0, jobs, "{device_id}");
    }
}
