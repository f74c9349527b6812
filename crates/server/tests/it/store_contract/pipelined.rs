//! Batches that ingest sends off one behind the other: stored as if each had been waited for.

use pisync::store::{self, EventWriter, Target, Written};
use pisync_core::{EventId, SyncEvent};
use tokio::sync::mpsc::unbounded_channel;

use super::{faults::Behind, streaks::figures_of};
use crate::support::{
    events::{
        at, batch_at, device_id, failure, now, recount, send_all, sent, success, write, write_at,
    },
    postgres::connect,
    proxy::Fault,
    store::{TestStore, assert_right, differences},
};

both_stores!(
    one_behind_the_other,
    a_repeated_event_behind_its_first,
    nothing_was_prepared_yet,
    what_the_database_refuses_does_not_hold_up_the_next,
);

async fn ingest_writer(fixture: &TestStore) -> Box<dyn EventWriter> {
    // Nobody listens, which is the writer's to bear.
    let (tell, _) = unbounded_channel();
    fixture.store.ingest_writer(tell).await.unwrap()
}

fn named(event_id: &str, event: SyncEvent) -> SyncEvent {
    SyncEvent { event_id: Some(EventId::new(event_id).unwrap()), ..event }
}

async fn total_syncs(fixture: &TestStore, device: &str) -> i64 {
    let device = fixture.store.device(&device_id(device)).await.unwrap();
    device.map_or(0, |found| found.device.figures.total_syncs)
}

async fn one_behind_the_other(fixture: &TestStore) {
    let mut writer = ingest_writer(fixture).await;
    let first = [success("pi", at(-10))];
    let written = write(&mut *writer, first.to_vec()).await;
    let mut all = sent(now(), &first, &written);
    let batches = [
        batch_at(now(), vec![failure("pi", at(0)), success("new", at(1)), failure("pi", at(2))]),
        batch_at(now(), vec![failure("pi", at(3)), named("a", success("new", at(4)))]),
    ];
    assert!(writer.send(&batches[0]) && writer.send(&batches[1]));
    let first = writer.sent().await.unwrap();
    let second = writer.sent().await.unwrap();
    assert!(writer.sent().await.is_none());
    all.extend(sent(now(), &batches[0].events, &first));
    all.extend(sent(now(), &batches[1].events, &second));
    let ids = [first.ids, second.ids].concat();
    assert_eq!(ids.len(), 5);
    assert!(ids.is_sorted_by(|left, right| left < right), "{ids:?}");

    for (device, jobs) in recount(&all) {
        assert_eq!(figures_of(&*fixture.store, &device).await.0, jobs);
    }
    // A success in between ends the streak, whichever batch it comes with.
    let late = [
        batch_at(now(), vec![success("pi", at(1))]),
        batch_at(now(), vec![failure("pi", at(5)), success("pi", at(4))]),
        batch_at(now(), vec![failure("pi", at(6))]),
    ];
    for (batch, written) in late.iter().zip(send_all(&mut *writer, &late).await) {
        all.extend(sent(now(), &batch.events, &written));
    }
    for (device, jobs) in recount(&all) {
        assert_eq!(figures_of(&*fixture.store, &device).await.0, jobs);
    }
    writer.finish().await.unwrap();
    assert_right(&differences(&*fixture.store, false).await);
}

async fn a_repeated_event_behind_its_first(fixture: &TestStore) {
    let mut writer = ingest_writer(fixture).await;
    write(&mut *writer, vec![success("pi", at(-10))]).await;
    let first = batch_at(now(), vec![named("a", failure("pi", at(0))), success("pi", at(1))]);
    let again = batch_at(now(), vec![success("other", at(2)), named("a", failure("pi", at(0)))]);
    let written = send_all(&mut *writer, &[first, again]).await;
    let positions = |written: &Written| -> Vec<usize> {
        written.duplicates.iter().map(|duplicate| duplicate.position).collect()
    };
    assert_eq!((positions(&written[0]), positions(&written[1])), (vec![], vec![1]));
    assert_eq!(written[1].ids[1], written[0].ids[0]);
    assert_eq!((total_syncs(fixture, "pi").await, total_syncs(fixture, "other").await), (3, 1));
}

/// A writer's first batch, the first of another month, and one that takes more ids than there are.
async fn nothing_was_prepared_yet(fixture: &TestStore) {
    let mut writer = ingest_writer(fixture).await;
    let month = 31 * 86_400;
    let many = (0..5_000).map(|second| success("many", at(month - second))).collect();
    let batches = [
        batch_at(now(), vec![success("pi", at(0))]),
        batch_at(at(month), vec![success("pi", at(month))]),
        batch_at(at(month), many),
        batch_at(at(month), vec![success("pi", at(month))]),
    ];
    for batch in &batches {
        // Whether it can be pipelined or not.
        send_all(&mut *writer, std::slice::from_ref(batch)).await;
    }
    assert_eq!((total_syncs(fixture, "pi").await, total_syncs(fixture, "many").await), (3, 5_000));
    // Ids that a batch in flight brings are there for those behind it.
    let last = at(month + 1);
    for round in 0..12 {
        let events = |round: i64| (0..500).map(move |n| success("pi", at(month - round * 500 - n)));
        let batches = [0, 1].map(|half| batch_at(last, events(2 * round + half).collect()));
        send_all(&mut *writer, &batches).await;
    }
    assert_eq!(total_syncs(fixture, "pi").await, 12_003);
}

async fn what_the_database_refuses_does_not_hold_up_the_next(fixture: &TestStore) {
    let mut writer = ingest_writer(fixture).await;
    write(&mut *writer, vec![success("pi", at(-10))]).await;
    // SQLite's tables are asked later, and what they refuse is kept in a file; see `ingest_journal`.
    if !fixture.is_postgres() {
        return;
    }
    let refuse = "alter table sync_events add constraint no_666 check (total_errors <> 666)";
    fixture.database.execute(refuse).await;
    let poison = SyncEvent { total_errors: 666, ..failure("pi", at(1)) };
    let bad = batch_at(now(), vec![success("pi", at(0)), poison]);
    let good = batch_at(now(), vec![success("pi", at(2))]);
    assert!(writer.send(&bad) && writer.send(&good));
    assert!(writer.sent().await.is_none());
    assert!(writer.sent().await.is_some());
    let error = writer.write(&bad).await.unwrap_err();
    assert!(matches!(error, store::StoreError::Rejected(_)), "{error:?}");
    assert_eq!(total_syncs(fixture, "pi").await, 2);
}

/// A connection that breaks with two batches on it: each is stored once, whatever the server still does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_were_on_a_connection_that_breaks() {
    for fault in [Fault::LoseCommit, Fault::LoseAnswer, Fault::Strand] {
        let Behind { fixture, proxy, mut writer } = Behind::a_proxy().await;
        let Target::Postgres(target) = fixture.target() else { unreachable!() };
        let mut holder = connect(&target.config).await;
        let lock = holder.transaction().await.unwrap();
        if fault == Fault::Strand {
            // The first waits for this, and the second behind it.
            let hold = "select from device_jobs where device_id = 'pi' for update";
            lock.execute(hold, &[]).await.unwrap();
        }
        proxy.set(fault);
        let batches = [
            batch_at(now(), vec![failure("pi", at(0)), success("other", at(1))]),
            batch_at(now(), vec![failure("pi", at(2)), success("other", at(3))]),
        ];
        assert!(writer.send(&batches[0]));
        // It may have heard by now.
        let is_second_sent = writer.send(&batches[1]);
        assert!(is_second_sent || fault != Fault::Strand);
        for _ in 0..=usize::from(is_second_sent) {
            assert!(writer.sent().await.is_none(), "{fault:?}");
        }
        assert_eq!(proxy.fault(), Fault::None, "{fault:?} has not happened");

        let release = async {
            // The writer waits behind this, too, by then.
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            lock.rollback().await.unwrap();
        };
        let write_both = async {
            for batch in &batches {
                assert_eq!(writer.write(batch).await.unwrap().ids.len(), 2, "{fault:?}");
            }
        };
        tokio::join!(release, write_both);
        write_at(&mut *writer, now(), vec![success("other", at(4))]).await;
        let stored = (total_syncs(&fixture, "pi").await, total_syncs(&fixture, "other").await);
        assert_eq!(stored, (3, 4), "{fault:?}");
        assert_right(&differences(&*fixture.store, false).await);
    }
}
