//! What reads see of acknowledged events: everything, or what was acknowledged up to two seconds ago. The second kind never
//! waits for ingest.

use std::{sync::Arc, time::Duration};

use pisync::store::{EventWriter, Freshness, Store};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use crate::support::{
    events::{at, now, success, write},
    store::{TestStore, on_sqlite},
};

both_stores!(an_acknowledged_event_is_soon_seen_by_who_lags);

/// How often a test reads.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A server's writer of events.
async fn ingest_writer(store: &dyn Store) -> Box<dyn EventWriter> {
    let (tell, _) = mpsc::unbounded_channel();
    store.ingest_writer(tell).await.unwrap()
}

/// How many events a read sees.
async fn events(store: &dyn Store, freshness: Freshness) -> i64 {
    store.fleet_stats(now(), 0, freshness).await.unwrap().figures.total_syncs
}

/// Asserts that lagging reads see `count` events within the time that they may lag. Nobody reads anything else meanwhile.
async fn assert_soon_seen(store: &dyn Store, count: i64) {
    let seen = timeout(Freshness::LARGEST_LAG, async {
        while events(store, Freshness::Lagging).await < count {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    });
    assert!(seen.await.is_ok(), "{count} events are not seen in time");
    assert_eq!(events(store, Freshness::Lagging).await, count);
}

async fn an_acknowledged_event_is_soon_seen_by_who_lags(fixture: &TestStore) {
    let mut writer = ingest_writer(&*fixture.store).await;
    for count in 1..=3 {
        write(&mut *writer, vec![success("pi", at(count))]).await;
        if fixture.is_postgres() {
            assert_eq!(events(&*fixture.store, Freshness::Lagging).await, count);
        }
        assert_soon_seen(&*fixture.store, count).await;
    }
    write(&mut *writer, vec![success("pi", at(4))]).await;
    assert_eq!(events(&*fixture.store, Freshness::Everything).await, 4);
    assert_eq!(events(&*fixture.store, Freshness::Lagging).await, 4);
}

/// Only on SQLite are events acknowledged before they are in the tables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lags_never_waits_for_the_journal() {
    on_sqlite(async |fixture: &TestStore| {
        let mut writer = ingest_writer(&*fixture.store).await;
        write(&mut *writer, vec![success("pi", at(1))]).await;
        assert_eq!(events(&*fixture.store, Freshness::Everything).await, 1);
        // The server cannot apply its journal now.
        let other = rusqlite::Connection::open(fixture.database.file().unwrap()).unwrap();
        other.execute_batch("begin immediate").unwrap();
        write(&mut *writer, vec![success("pi", at(2))]).await;
        let store = Arc::clone(&fixture.store);
        let mut exact = tokio::spawn(async move { events(&*store, Freshness::Everything).await });
        for _ in 0..20 {
            assert_eq!(events(&*fixture.store, Freshness::Lagging).await, 1);
        }
        assert!(timeout(POLL_INTERVAL, &mut exact).await.is_err(), "it did not wait");
        other.execute_batch("rollback").unwrap();
        assert_eq!(exact.await.unwrap(), 2);
        assert_eq!(events(&*fixture.store, Freshness::Lagging).await, 2);
    })
    .await;
}

/// There are always more calls for the writer than its queue takes. Ingest's are among them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_writer_applies_the_journal_in_time() {
    on_sqlite(async |fixture: &TestStore| {
        let mut writer = ingest_writer(&*fixture.store).await;
        let mut calls = JoinSet::new();
        for _ in 0..200 {
            let store = Arc::clone(&fixture.store);
            calls.spawn(async move {
                loop {
                    store.forget_event_ids(at(-1)).await.unwrap();
                }
            });
        }
        for count in 1..=3 {
            write(&mut *writer, vec![success("pi", at(count))]).await;
            assert_soon_seen(&*fixture.store, count).await;
        }
        write(&mut *writer, vec![success("pi", at(4))]).await;
        let exact = timeout(Freshness::LARGEST_LAG, events(&*fixture.store, Freshness::Everything));
        assert_eq!(exact.await.unwrap(), 4);
        calls.shutdown().await;
    })
    .await;
}
