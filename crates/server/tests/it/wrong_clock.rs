//! What a wrong clock of the server can do: it may not refuse for good, delete, or hide what comes later.

use std::sync::Arc;

use pisync::{
    clock::Clock,
    import::{Import, Source},
    maintenance::Maintenance,
    store::{HistoryQuery, Retention, Target},
};
use pisync_core::{EventId, SyncEvent, Timestamp};
use serde_json::json;

use crate::{
    store_contract::streaks::figures_of,
    support::{
        events::{at, device_id, failure, now, success, write, write_at},
        http::event,
        program::{Program, url},
        server::{TestClock, TestServer},
        store::{Fixture, TestDatabase, TestStore},
    },
};

both_stores!(
    reports_are_put_off_until_the_clock_is_set,
    a_server_starts_with_a_clock_that_is_not_set,
    an_import_waits_until_the_clock_is_set,
    a_jump_deletes_nothing_until_devices_bear_it_out,
    a_jump_is_doubted_again_at_each_start,
    a_clock_that_is_not_set_changes_nothing,
    a_success_from_the_future_hides_nothing,
    a_failure_from_the_future_counts_in_no_streak,
    a_clock_that_is_behind_takes_no_date_for_wrong,
);

const DAY: i64 = 24 * 60 * 60;
const YEAR: i64 = 365 * DAY;

/// Where a clock begins that was never set.
fn never_set() -> Timestamp {
    Timestamp::from_millisecond(0).unwrap()
}

async fn reports_are_put_off_until_the_clock_is_set(server: &TestServer) {
    server.clock.set(never_set());
    let mut unsynced = event("pi");
    unsynced["clock"] = json!("unsynced");
    for (path, body) in [
        ("/api/sync-event", event("pi")),
        ("/api/sync-event", unsynced),
        ("/api/sync-events", json!([event("pi"), event("other")])),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.header("retry-after"), "60");
        let error = answer.error(503);
        assert!(error.contains("clock is not set"), "{error}");
    }
    server.get("/health/ready").await.json(503);
    server.get("/health/live").await.json(200);
    assert_eq!(server.get("/api/stats").await.data(200)["total_devices"], 0);
    server.clock.set(now());
    server.get("/health/ready").await.json(200);
    server.store(&event("pi")).await;
    assert_eq!(server.get("/api/stats").await.data(200)["total_sync_events"], 1);
}

/// A server that was started before its clock was set.
struct TooEarly(TestServer);

impl Fixture for TooEarly {
    async fn prepare(database: TestDatabase) -> Self {
        Self(TestServer::start_at(never_set(), database, |_| {}).await)
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

async fn a_server_starts_with_a_clock_that_is_not_set(TooEarly(server): &TooEarly) {
    server.get("/health/ready").await.json(503);
    server.post("/api/sync-event", &event("pi")).await.error(503);
    server.clock.set(now());
    server.store(&event("pi")).await;
}

async fn an_import_waits_until_the_clock_is_set(fixture: &TestStore) {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("events.ndjson");
    std::fs::write(&input, format!("{}\n", event("pi"))).unwrap();
    let clock = TestClock::at(never_set());
    let import = || Import {
        source: Source::File(input.clone()),
        format: None,
        rejected: folder.path().join("rejected"),
        again: false,
        max_clock_skew_seconds: 300,
        id: [7; 32],
    };
    let store = &*fixture.store;
    let refused = import().run(store, &clock.clock(), || false, |_| ()).await.unwrap_err();
    assert!(refused.to_string().contains("clock says 1970-01-01"), "{refused}");
    assert!(store.imports().await.unwrap().is_empty());
    clock.set(now());
    let status = import().run(store, &clock.clock(), || false, |_| ()).await.unwrap();
    assert_eq!((status.stored, status.rejected), (1, 0));
}

/// What keeps an import from being begun is said once. PostgreSQL's clock is made to show another time here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_a_clock_keeps_from_beginning_says_so_once() {
    let database = TestDatabase::postgres().await;
    database.migrate().await;
    let Target::Postgres(target) = &database.target else { unreachable!() };
    let name = target.config.get_dbname().unwrap();
    let behind = format!(
        "create function clock_timestamp() returns timestamptz language sql as
         $$ select pg_catalog.clock_timestamp() - interval '3 hours' $$;
         alter database {name} set search_path = public, pg_catalog"
    );
    database.execute(&behind).await;
    let line = event("pi").to_string() + "\n";
    let program = Program::new()
        .with_file("events.ndjson", &line)
        .with("DATABASE_URL", url(&database.target));
    let refused = program.run(&["import", "events.ndjson"]);
    let said = refused.failure();
    assert!(said.contains("and PostgreSQL's "), "{said}");
    assert!(said.ends_with("set the one that is wrong, or events are dated wrong"), "{said}");
    database.remove().await;
}

/// Maintenance of a server that has just been started, which keeps events for 40 days and ids for 30.
fn started(fixture: &TestStore, clock: &TestClock) -> Maintenance {
    let store = Arc::clone(&fixture.store);
    Maintenance::new(store, clock.clock(), Retention::new(40, 300), 30)
}

fn called(event_id: &str, event: SyncEvent) -> SyncEvent {
    SyncEvent { event_id: EventId::new(event_id).ok(), ..event }
}

async fn events_kept(fixture: &TestStore) -> usize {
    let query = HistoryQuery::newest(device_id("pi"), 100);
    fixture.store.sync_history(&query).await.unwrap().unwrap().events.len()
}

/// How many event ids are remembered.
async fn ids_kept(fixture: &TestStore) -> i64 {
    fixture.database.number("(select count(*) from event_keys)").await
}

/// Runs it, and what it waits for, twice: PostgreSQL announces a deletion minutes before.
async fn maintain(fixture: &TestStore, clock: &TestClock, maintenance: &mut Maintenance) {
    for _ in 0..3 {
        while fixture.store.aggregate_events(clock.now()).await.unwrap() {}
        maintenance.run().await.unwrap();
        clock.set(clock.now().saturating_add_milliseconds(10 * 60 * 1000));
    }
}

async fn a_jump_deletes_nothing_until_devices_bear_it_out(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let clock = TestClock::at(now());
    write(&mut *writer, vec![called("first", success("pi", at(0)))]).await;
    maintain(fixture, &clock, &mut started(fixture, &clock)).await;

    clock.set(at(YEAR));
    let mut maintenance = started(fixture, &clock);
    maintenance.prepare().await.unwrap();
    maintain(fixture, &clock, &mut maintenance).await;
    assert_eq!((events_kept(fixture).await, ids_kept(fixture).await), (1, 1));
    if fixture.is_postgres() {
        let ahead =
            "(select count(*) from pg_class where relname like 'sync\\_events\\_2027\\_1%')";
        assert_eq!(fixture.database.number(ahead).await, 0, "partitions made by a wrong clock");
    }
    // Devices that know the time disagree with a clock that is wrong, and those that don't say nothing.
    let received = clock.now();
    let reports = ["a", "b", "c"].map(|device| success(device, at(100)));
    write_at(&mut *writer, received, reports.to_vec()).await;
    let reports = ["d", "e", "f", "g"].map(|device| success(device, received));
    write_at(&mut *writer, received, reports.to_vec()).await;
    maintain(fixture, &clock, &mut maintenance).await;
    assert_eq!((events_kept(fixture).await, ids_kept(fixture).await), (1, 1));

    // They bear one out that is right.
    let received = clock.now();
    let dated = received.saturating_add_milliseconds(-500);
    let reports = ["a", "b", "c", "d", "e"].map(|device| success(device, dated));
    write_at(&mut *writer, received, reports.to_vec()).await;
    maintain(fixture, &clock, &mut maintenance).await;
    assert_eq!((events_kept(fixture).await, ids_kept(fixture).await), (0, 0));
}

async fn a_jump_is_doubted_again_at_each_start(fixture: &TestStore) {
    write(&mut *fixture.writer(), vec![called("first", success("pi", at(0)))]).await;
    let clock = TestClock::at(at(YEAR));
    for start in 0..3 {
        let mut maintenance = started(fixture, &clock);
        maintenance.prepare().await.unwrap();
        // What is stored meanwhile is no proof.
        let event = success("pi", clock.now());
        write_at(&mut *fixture.writer(), clock.now(), vec![event]).await;
        maintain(fixture, &clock, &mut maintenance).await;
        assert_eq!((events_kept(fixture).await, ids_kept(fixture).await), (start + 2, 1));
    }
    // Once it is set right, all goes on.
    clock.set(at(50 * DAY));
    let dated = |device: &str| success(device, at(50 * DAY - 1));
    write_at(&mut *fixture.writer(), clock.now(), vec![dated("a"), dated("b")]).await;
    maintain(fixture, &clock, &mut started(fixture, &clock)).await;
    assert_eq!(ids_kept(fixture).await, 0);
}

async fn a_clock_that_is_not_set_changes_nothing(fixture: &TestStore) {
    write(&mut *fixture.writer(), vec![called("first", success("pi", at(0)))]).await;
    let clock = TestClock::at(never_set());
    let mut maintenance = started(fixture, &clock);
    maintenance.prepare().await.unwrap();
    maintain(fixture, &clock, &mut maintenance).await;
    assert_eq!((events_kept(fixture).await, ids_kept(fixture).await), (1, 1));
    assert_eq!(fixture.database.number("(select count(*) from trusted_time)").await, 0);
    if fixture.is_postgres() {
        let past = "(select count(*) from pg_class where relname like 'sync\\_events\\_19%')";
        assert_eq!(fixture.database.number(past).await, 0);
    }
}

async fn streak(fixture: &TestStore) -> i64 {
    figures_of(&*fixture.store, &device_id("pi")).await.1.consecutive_failures
}

/// What maintenance does once the clock stands at `second`.
async fn maintain_at(fixture: &TestStore, second: i64) {
    let clock = TestClock::at(at(second));
    started(fixture, &clock).run().await.unwrap();
}

async fn assert_counted(fixture: &TestStore) {
    let differing = fixture.store.verify(None, at(100), false).await.unwrap().differences;
    assert_eq!(differing, []);
}

async fn a_success_from_the_future_hides_nothing(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write(&mut *writer, vec![success("pi", at(-10)), failure("pi", at(-5))]).await;
    maintain_at(fixture, 0).await;
    // The clock was ahead for a while.
    write_at(&mut *writer, at(YEAR), vec![success("pi", at(YEAR))]).await;
    write(&mut *writer, vec![failure("pi", at(1)), failure("pi", at(2))]).await;
    assert_eq!(streak(fixture).await, 0, "nobody knows yet");

    maintain_at(fixture, 3).await;
    assert_counted(fixture).await;
    let (_, figures) = figures_of(&*fixture.store, &device_id("pi")).await;
    assert_eq!(figures.consecutive_failures, 3);
    assert_eq!((figures.last_success, figures.last_sync), (Some(at(-10)), Some(at(2))));
    assert_eq!((figures.last_seen, figures.total_syncs), (Some(now()), 5));
    // From now on streaks follow the rule.
    for (event, expected) in [
        (failure("pi", at(4)), 4),
        (success("pi", at(1)), 2),
        (success("pi", at(5)), 0),
        (failure("pi", at(5)), 1),
        (failure("pi", at(4)), 1),
        (failure("pi", at(6)), 2),
    ] {
        write(&mut *writer, vec![event]).await;
        assert_eq!(streak(fixture).await, expected);
        assert_counted(fixture).await;
    }
    maintain_at(fixture, 7).await;
    assert_eq!(streak(fixture).await, 2);
}

async fn a_failure_from_the_future_counts_in_no_streak(fixture: &TestStore) {
    let mut writer = fixture.writer();
    maintain_at(fixture, 0).await;
    let future = [failure("pi", at(YEAR)), failure("other", at(YEAR))];
    write_at(&mut *writer, at(YEAR), future.to_vec()).await;
    write(&mut *writer, vec![failure("pi", at(1)), success("pi", at(2))]).await;
    maintain_at(fixture, 3).await;
    assert_eq!(streak(fixture).await, 0);
    assert_counted(fixture).await;
    // What makes the store count again does not find it either.
    write(&mut *writer, vec![failure("pi", at(2))]).await;
    assert_eq!(streak(fixture).await, 1);
    write(&mut *writer, vec![failure("pi", at(1)), failure("pi", at(4))]).await;
    assert_eq!(streak(fixture).await, 2);
    assert_counted(fixture).await;
}

async fn a_clock_that_is_behind_takes_no_date_for_wrong(fixture: &TestStore) {
    let events = vec![failure("pi", at(-30 * DAY)), success("pi", at(-1)), failure("pi", at(0))];
    write(&mut *fixture.writer(), events).await;
    maintain_at(fixture, 0).await;
    let before = figures_of(&*fixture.store, &device_id("pi")).await;
    maintain_at(fixture, -20 * DAY).await;
    assert_eq!(figures_of(&*fixture.store, &device_id("pi")).await, before);
}

/// PostgreSQL's own clock is the real one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_has_a_say() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let real = fixture.store.database_time().await.unwrap().unwrap();
    let event = called("first", success("pi", real));
    write_at(&mut *fixture.writer(), real, vec![event]).await;
    let ahead = real.saturating_add_milliseconds(YEAR * 1000);
    let clock = Clock::new(move || ahead).real();
    let store = Arc::clone(&fixture.store);
    let mut maintenance = Maintenance::new(store, clock, Retention::new(40, 300), 30);
    maintenance.run().await.unwrap();
    assert_eq!(ids_kept(&fixture).await, 1);
    let believed = "(select count(*) from trusted_time where until < now() + interval '1 hour')";
    assert_eq!(fixture.database.number(believed).await, 1);
    fixture.into_database().remove().await;
}
