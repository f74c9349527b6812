//! Old events go, once they are aggregated; what they added up to stays.

use std::{sync::Arc, time::Instant};

use pisync::store::{
    Batch, FailureQuery, Freshness, HistoryQuery, Retention, Store, StoreError, SyncHistory,
    Target, Window,
};
use pisync_core::Timestamp;

use crate::support::{
    events::{at, batch_at, device_id, failure, later, now, somebody, success, write, write_at},
    postgres::connect,
    store::{Fixture, TestDatabase, TestStore},
};

every_writer!(
    old_events_go_and_their_figures_stay,
    only_what_is_aggregated_goes,
    late_events_of_what_is_gone_change_no_streak,
    a_deleted_device_takes_what_is_gone_along,
);

const DAY: i64 = 24 * 60 * 60;

/// So many days ago, at noon; 24 are in the month before.
fn days_ago(days: i64) -> Timestamp {
    at(-days * DAY)
}

pub(crate) fn retention(days: u32) -> Retention {
    Retention::new(days, 300).unwrap()
}

pub(crate) async fn aggregate(store: &dyn Store) {
    while store.aggregate_events(at(3600)).await.unwrap() {}
}

/// Drops all that may go, also what must be announced first.
pub(crate) async fn expire(store: &dyn Store, retention: &Retention) {
    for minutes in [0, 10] {
        while store.drop_old_events(at(minutes * 60), retention).await.unwrap() {}
    }
}

async fn history(fixture: &TestStore, device: &str) -> SyncHistory {
    let query = HistoryQuery::newest(device_id(device), 1000);
    fixture.store.sync_history(&query).await.unwrap().unwrap()
}

async fn old_events_go_and_their_figures_stay(fixture: &TestStore) {
    let mut writer = fixture.writer();
    for days in [100, 70, 69, 25, 1, 0] {
        // Dates that are late by a day: what counts is when an event was received.
        let events = vec![failure("pi", days_ago(days + 1)), success("other", days_ago(days))];
        write_at(&mut *writer, days_ago(days), events).await;
    }
    aggregate(&*fixture.store).await;
    let before = history(fixture, "pi").await;
    assert_eq!((before.raw_since, before.events.len()), (None, 6));
    let windows = [Window::last_24_hours(now()), Window::last_days(now(), 30)];
    let mut figures = Vec::new();
    for window in &windows {
        figures.push(fixture.store.window_figures(window).await.unwrap());
    }

    // Nothing is that old.
    expire(&*fixture.store, &retention(4000)).await;
    assert_eq!(history(fixture, "pi").await.raw_since, None);
    for (days, left) in [(80, 5), (40, 3), (2, 2)] {
        expire(&*fixture.store, &retention(days)).await;
        let after = history(fixture, "pi").await;
        assert_eq!(after.figures, before.figures);
        assert_eq!((after.events.len(), after.total_events), (left, left as u64), "{days} days");
        let since = after.raw_since.unwrap();
        assert!(after.events.iter().all(|event| event.created_at >= since), "{since}");
        assert!(since <= days_ago(days.into()), "{since}");
        for (window, expected) in windows.iter().zip(&figures) {
            assert_eq!(fixture.store.window_figures(window).await.unwrap(), *expected);
        }
    }
    let stats = fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap();
    assert_eq!((stats.figures.total_syncs, stats.figures.failed_syncs), (12, 6));
    // What is left cannot say that the figures are too large, only that they are too small; and nothing
    // is repaired by it.
    assert_eq!(fixture.store.verify(None, later(), true).await.unwrap().differences, []);
    let too_small = "update device_jobs set total_syncs = 1 where total_syncs = 6";
    fixture.database.execute(too_small).await;
    let verified = fixture.store.verify(None, later(), true).await.unwrap();
    assert_eq!((verified.differences.len(), verified.raw_since.is_some()), (2, true));
    let pi = fixture.store.device(&device_id("pi")).await.unwrap().unwrap().device;
    assert_eq!(pi.figures.total_syncs, 1);
    let query = FailureQuery {
        threshold: 1,
        consecutive: false,
        window: Some(windows[1]),
        limit: None,
        offset: 0,
        after: None,
    };
    let failing = fixture.store.repeated_failures(&query).await.unwrap();
    assert_eq!(failing.items[0].figures.failed_syncs, 3, "one of them is gone");
    // By its dates a page counts what is there, and a job that is gone has nothing.
    let query =
        HistoryQuery { from: Some(days_ago(50)), ..HistoryQuery::newest(device_id("pi"), 1) };
    let page = fixture.store.sync_history(&query).await.unwrap().unwrap();
    assert_eq!((page.total_events, page.next.is_some()), (2, true));
}

async fn only_what_is_aggregated_goes(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write_at(&mut *writer, days_ago(70), vec![success("pi", days_ago(70))]).await;
    write(&mut *writer, vec![success("pi", at(0))]).await;
    expire(&*fixture.store, &retention(2)).await;
    assert_eq!(history(fixture, "pi").await.events.len(), 2);
    aggregate(&*fixture.store).await;
    expire(&*fixture.store, &retention(2)).await;
    assert_eq!(history(fixture, "pi").await.events.len(), 1);
    let month = fixture.store.window_figures(&Window::last_days(days_ago(60), 30)).await.unwrap();
    assert_eq!(month.total_syncs, 1);
}

async fn late_events_of_what_is_gone_change_no_streak(fixture: &TestStore) {
    let mut writer = fixture.writer();
    for days in [70, 60, 50, 1] {
        write_at(&mut *writer, days_ago(days), vec![failure("pi", days_ago(days))]).await;
    }
    aggregate(&*fixture.store).await;
    expire(&*fixture.store, &retention(2)).await;
    assert_eq!(history(fixture, "pi").await.events.len(), 1);
    // The writer that was there before knows of it, and so does a new one.
    for (number, mut writer) in [writer, fixture.writer()].into_iter().enumerate() {
        let streak = 4 + i64::try_from(number).unwrap();
        let late = vec![success("pi", days_ago(55)), failure("pi", days_ago(52))];
        let received = at(900);
        let written = writer.write(&batch_at(received, late)).await.unwrap();
        assert_eq!(written.streaks, []);
        let figures = history(fixture, "pi").await.figures;
        assert_eq!(figures.consecutive_failures, streak);
        assert_eq!(figures.last_success, Some(days_ago(55)));
        // Old and new together: the new one counts.
        let mixed = vec![success("pi", days_ago(56)), failure("pi", at(number as i64))];
        writer.write(&batch_at(received, mixed)).await.unwrap();
        assert_eq!(history(fixture, "pi").await.figures.consecutive_failures, streak + 1);
    }
    // What is still kept is counted again, as ever.
    let mut writer = fixture.writer();
    writer.write(&batch_at(at(900), vec![success("pi", at(0))])).await.unwrap();
    let figures = history(fixture, "pi").await.figures;
    assert_eq!((figures.consecutive_failures, figures.total_syncs), (1, 4 + 8 + 1));
}

async fn a_deleted_device_takes_what_is_gone_along(fixture: &TestStore) {
    let mut writer = fixture.writer();
    for days in [28, 25, 1, 0] {
        let events = vec![
            failure("going", days_ago(days)),
            success("going", days_ago(days).saturating_add_milliseconds(-7_200_000)),
            failure("staying", days_ago(days)),
        ];
        write_at(&mut *writer, days_ago(days), events).await;
    }
    aggregate(&*fixture.store).await;
    expire(&*fixture.store, &retention(2)).await;
    // Not aggregated yet.
    let events = vec![failure("going", at(-1)), failure("staying", at(-1))];
    write_at(&mut *writer, at(7200), events).await;
    assert_eq!(history(fixture, "going").await.events.len(), 5);
    fixture.store.delete_device(&device_id("going"), &somebody()).await.unwrap();
    for (window, expected) in [
        (Window::last_24_hours(now()), 2),
        (Window::last_days(now(), 7), 3),
        (Window::last_days(now(), 30), 5),
        (Window::last_days(days_ago(26), 7), 1),
    ] {
        let figures = fixture.store.window_figures(&window).await.unwrap();
        assert_eq!((figures.total_syncs, figures.failed_syncs), (expected, expected));
        assert_eq!((figures.total_errors, figures.total_files_synced), (expected, 0));
    }
}

/// Each step is short, and the file becomes smaller in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_drops_in_small_steps_and_gives_pages_back() {
    let fixture = TestStore::prepare(TestDatabase::sqlite()).await;
    let Target::Sqlite(path) = fixture.target() else { unreachable!() };
    let mut writer = fixture.writer();
    for batch in 0..40 {
        let events = (0..1000)
            .map(|event| success(&format!("pi-{}", event % 200), at(batch * 1000 + event)));
        writer.write(&batch_at(days_ago(30), events.collect())).await.unwrap();
    }
    aggregate(&*fixture.store).await;
    let pages = || -> i64 {
        let connection = rusqlite::Connection::open(path).unwrap();
        connection.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap()
    };
    let before = pages();
    let (mut steps, mut longest) = (0, std::time::Duration::ZERO);
    loop {
        let started = Instant::now();
        let more = fixture.store.drop_old_events(now(), &retention(2)).await.unwrap();
        longest = longest.max(started.elapsed());
        steps += 1;
        if !more {
            break;
        }
    }
    // Not a bound to hold to on a machine that does other things besides.
    println!("{steps} steps, the longest of {longest:?}");
    assert!(steps > 5);
    assert!(pages() < before / 2, "{} of {before} pages are left", pages());
    assert_eq!(history(&fixture, "pi-7").await.events.len(), 0);
}

/// On SQLite events go in the order of their ids; PostgreSQL's months do not wait for each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_clock_that_was_ahead_received_keeps_nothing_back() {
    let fixture = TestStore::prepare(TestDatabase::sqlite()).await;
    let mut writer = fixture.writer();
    for received in [days_ago(100), days_ago(-365), days_ago(99), days_ago(1)] {
        write_at(&mut *writer, received, vec![success("pi", days_ago(100))]).await;
    }
    aggregate(&*fixture.store).await;
    expire(&*fixture.store, &retention(40)).await;
    let history = history(&fixture, "pi").await;
    assert_eq!((history.events.len(), history.figures.total_syncs), (1, 4));
    assert_eq!(history.raw_since, Some(days_ago(99).saturating_add_milliseconds(1)));
    fixture.into_database().remove().await;
}

/// A long read keeps a month from being dropped, but neither events from coming in nor the next attempt
/// from finishing what the first began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_read_delays_the_drop_and_nothing_else() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let Target::Postgres(target) = fixture.target() else { unreachable!() };
    let mut writer = fixture.writer();
    write_at(&mut *writer, days_ago(70), vec![success("pi", days_ago(70))]).await;
    write(&mut *writer, vec![success("pi", at(0))]).await;
    aggregate(&*fixture.store).await;
    assert!(!fixture.store.drop_old_events(at(0), &retention(2)).await.unwrap(), "announced");
    assert!(!fixture.store.drop_old_events(at(60), &retention(2)).await.unwrap(), "too soon");
    let reader = connect(&target.config).await;
    reader.batch_execute("begin; select from sync_events").await.unwrap();
    for _ in 0..2 {
        let refused = fixture.store.drop_old_events(at(600), &retention(2)).await;
        assert!(matches!(refused, Err(StoreError::Transient(_))), "{refused:?}");
        let started = Instant::now();
        write(&mut *writer, vec![success("pi", at(1))]).await;
        println!("stored within {:?}", started.elapsed());
    }
    reader.batch_execute("rollback").await.unwrap();
    assert!(fixture.store.drop_old_events(at(600), &retention(2)).await.unwrap());
    assert!(!fixture.database.tables().await.contains(&"sync_events_2026_09".to_owned()));
    assert_eq!(history(&fixture, "pi").await.events.len(), 3);
    // Nothing else is past.
    assert!(!fixture.store.drop_old_events(at(600), &retention(2)).await.unwrap());
}

/// A server may be killed while it drops a month. What is imported into that month must find a place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_find_a_place_in_a_month_that_was_being_dropped() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let Target::Postgres(target) = fixture.target() else { unreachable!() };
    let mut writer = fixture.writer();
    write_at(&mut *writer, days_ago(70), vec![success("pi", days_ago(70))]).await;
    aggregate(&*fixture.store).await;
    let drop_it = async || fixture.store.drop_old_events(at(600), &retention(2)).await;
    assert!(!fixture.store.drop_old_events(at(0), &retention(2)).await.unwrap(), "announced");
    let import = async |device: &str| {
        let events = vec![success(device, days_ago(70))];
        let batch = Batch { received_at: vec![days_ago(70)], ..Batch::new(at(600), events) };
        fixture.writer().write(&Arc::new(batch)).await
    };

    // Interrupted while it is being detached.
    let reader = connect(&target.config).await;
    reader.batch_execute("begin; select from sync_events").await.unwrap();
    let refused = drop_it().await;
    assert!(matches!(refused, Err(StoreError::Transient(_))), "{refused:?}");
    let refused = import("early").await;
    assert!(matches!(refused, Err(StoreError::Transient(_))), "{refused:?}");
    reader.batch_execute("rollback").await.unwrap();
    import("early").await.unwrap();
    assert_eq!(history(&fixture, "early").await.events.len(), 1);

    // Between that and the end, by one that is still there, and has its lock.
    const EXPIRY_LOCK: i64 = 0x7069_7379_6e63_0004;
    let detach = "alter table sync_events detach partition sync_events_2026_09";
    reader.batch_execute(detach).await.unwrap();
    reader.execute("select pg_advisory_lock($1)", &[&EXPIRY_LOCK]).await.unwrap();
    let (refused, ()) = tokio::join!(import("late"), async {
        reader.batch_execute("drop table sync_events_2026_09").await.unwrap();
        reader.execute("select pg_advisory_unlock($1)", &[&EXPIRY_LOCK]).await.unwrap();
    });
    refused.unwrap();
    assert_eq!(history(&fixture, "late").await.events.len(), 1);
    assert_eq!(history(&fixture, "early").await.events.len(), 0);

    assert!(drop_it().await.unwrap());
    for device in ["pi", "early", "late"] {
        let history = history(&fixture, device).await;
        assert_eq!((history.events.len(), history.figures.total_syncs), (0, 1), "{device}");
    }
}
