//! Devices are deleted in steps, between which others read and report, and which survive a crash in between.

use std::time::{Duration, Instant};

use pisync::store::{self, DeletionStep, DeviceChange, HistoryQuery, Window};
use pisync_core::{EventId, SyncEvent};
use serde_json::json;

use crate::support::{
    events::{
        at, batch_at, device_id, failure, later, now, of_job, somebody, success, write, write_at,
    },
    server::TestServer,
    store::{Fixture, TestDatabase, TestStore, assert_right, differences},
};

every_writer!(
    a_long_history_goes_in_steps,
    an_interrupted_deletion_goes_on,
    what_is_reported_meanwhile_stays,
    one_job_a_run_goes_in_steps,
);

const EVENTS: usize = 40_000;

fn called(event_id: &str, event: SyncEvent) -> SyncEvent {
    SyncEvent { event_id: Some(EventId::new(event_id).unwrap()), ..event }
}

/// A device with a long history, half of it with event ids, most of it aggregated; and another one.
async fn fill(fixture: &TestStore) {
    let mut writer = fixture.writer();
    for batch in 0..EVENTS / 2_000 {
        let event = |number: usize| {
            let number = batch * 2_000 + number;
            let timestamp = at(-i64::try_from(number).unwrap() * 60);
            let event = of_job(["a", "b"][number % 2], failure("going", timestamp));
            if number.is_multiple_of(2) { called(&number.to_string(), event) } else { event }
        };
        let mut events: Vec<_> = (0..2_000).map(event).collect();
        events.push(success("staying", at(-60)));
        write_at(&mut *writer, at(-1_000), events).await;
    }
    while fixture.store.aggregate_events(at(0)).await.unwrap() {}
    let last = vec![success("going", at(-1)), failure("staying", at(-1))];
    write_at(&mut *writer, at(-1), last).await;
}

/// What the windows count is what is stored, whatever is half gone.
async fn assert_windows(fixture: &TestStore) {
    let stored = fixture.database.number("(select count(*) from sync_events)").await;
    let window = Window::last_days(at(0), 365);
    assert_eq!(fixture.store.window_figures(&window).await.unwrap().total_syncs, stored);
}

async fn a_long_history_goes_in_steps(fixture: &TestStore) {
    fill(fixture).await;
    let going = device_id("going");
    assert!(fixture.store.begin_deletion(&going, &somebody()).await.unwrap());
    // Whoever asks again is told the same.
    assert!(fixture.store.begin_deletion(&going, &somebody()).await.unwrap());
    let (mut steps, mut longest, mut before) = (0, Duration::ZERO, 0);
    let deleted = loop {
        let began = Instant::now();
        let step = fixture.store.delete_some(&going).await.unwrap();
        longest = longest.max(began.elapsed());
        match step {
            DeletionStep::More(deleted) => {
                assert!(deleted >= before);
                before = deleted;
            }
            DeletionStep::Done(deleted) => break deleted,
            DeletionStep::None => panic!("it has ended without an end"),
        }
        steps += 1;
        // Others are as they were, and may change meanwhile; the device is there to the end.
        let other = fixture.store.device(&device_id("staying")).await.unwrap().unwrap();
        assert_eq!(other.device.figures.total_syncs, i64::try_from(EVENTS / 2_000).unwrap() + 1);
        assert!(fixture.store.device(&going).await.unwrap().is_some());
        if steps % 4 == 1 {
            assert_windows(fixture).await;
        }
    };
    assert_eq!(deleted, EVENTS as u64 + 1);
    assert!(steps >= 4, "{steps} steps");
    // In one go, all of it is a matter of a second and more.
    assert!(longest < Duration::from_millis(700), "{longest:?}");
    assert_eq!(fixture.store.delete_some(&going).await.unwrap(), DeletionStep::None);
    assert!(fixture.store.device(&going).await.unwrap().is_none());
    assert_eq!(fixture.database.number("(select count(*) from event_keys)").await, 0);
    assert_windows(fixture).await;
    assert_right(&differences(&*fixture.store, false).await);
    let audit = fixture.store.audit(None, 10).await.unwrap();
    assert_eq!(audit.len(), 1);
    assert_eq!((audit[0].action.as_str(), audit[0].at), ("device.delete", now()));
    assert_eq!(audit[0].details, json!({"deleted_events": deleted}));
}

async fn an_interrupted_deletion_goes_on(fixture: &TestStore) {
    fill(fixture).await;
    let going = device_id("going");
    assert!(fixture.store.begin_deletion(&going, &somebody()).await.unwrap());
    for _ in 0..2 {
        fixture.store.delete_some(&going).await.unwrap();
    }
    // Another process finds what is left to do.
    let again = store::open(fixture.target()).await.unwrap();
    let under_way = again.deletions().await.unwrap();
    assert_eq!(under_way.len(), 1);
    assert!(under_way[0].0 == going && under_way[0].1 > 0, "{under_way:?}");
    // Its figures are those of events that are half gone, which is as it should be.
    for repair in [false, true] {
        let page = again.verify(None, later(), repair).await.unwrap();
        assert_eq!((page.devices, page.being_deleted), (1, 1));
        assert_right(&page.differences);
        assert_eq!((page.days, again.verify_hours().await.unwrap()), (vec![], vec![]));
    }
    assert_eq!(again.finish_deletion(&going).await.unwrap(), EVENTS as u64 + 1);
    assert!(again.deletions().await.unwrap().is_empty());
    assert!(again.device(&going).await.unwrap().is_none());
    assert_right(&differences(&*again, false).await);
    assert_eq!(again.audit(None, 10).await.unwrap().len(), 1);
}

async fn what_is_reported_meanwhile_stays(fixture: &TestStore) {
    fill(fixture).await;
    let going = device_id("going");
    let change = DeviceChange { name: Some(Some("Library".into())), ..DeviceChange::default() };
    fixture.store.update_device(&going, &change, &somebody()).await.unwrap();
    assert!(fixture.store.begin_deletion(&going, &somebody()).await.unwrap());
    fixture.store.delete_some(&going).await.unwrap();
    let mut writer = fixture.writer();
    let new = vec![
        success("going", at(40)),
        called("new", failure("going", at(50))),
        of_job("a", failure("going", at(60))),
    ];
    write_at(&mut *writer, at(100), new).await;
    // Some of what stays is aggregated, some is not.
    while fixture.store.aggregate_events(at(200)).await.unwrap() {}
    write_at(&mut *writer, at(300), vec![failure("going", at(70))]).await;
    assert_eq!(fixture.store.finish_deletion(&going).await.unwrap(), EVENTS as u64 + 1);

    let found = fixture.store.device(&going).await.unwrap().unwrap();
    assert_eq!((found.device.name, found.device.created_at), (None, at(100)));
    let jobs: Vec<_> = found
        .jobs
        .iter()
        .map(|(job, figures)| (job.as_deref(), figures.total_syncs, figures.consecutive_failures))
        .collect();
    assert_eq!(jobs, [(None, 3, 2), (Some("a"), 1, 1)]);
    let query = HistoryQuery::newest(going, 10);
    let history = fixture.store.sync_history(&query).await.unwrap().unwrap();
    assert_eq!((history.events.len(), history.total_events), (4, 4));
    assert_windows(fixture).await;
    assert_right(&differences(&*fixture.store, false).await);
    let again =
        write_at(&mut *writer, at(400), vec![called("new", failure("going", at(50)))]).await;
    assert_eq!(again.duplicates.len(), 1);
}

async fn one_job_a_run_goes_in_steps(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let event = |number: i64| of_job(&format!("run {number}"), failure("pi", at(-number)));
    for batch in 0..3 {
        write(&mut *writer, (batch * 1_000..(batch + 1) * 1_000).map(event).collect()).await;
    }
    let deleted = fixture.store.delete_device(&device_id("pi"), &somebody()).await.unwrap();
    assert_eq!(deleted, Some(3_000));
    assert_eq!(fixture.database.number("(select count(*) from device_jobs)").await, 0);
}

/// A server that was killed in the middle of it goes on when it starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_server_goes_on() {
    for database in [TestDatabase::sqlite(), TestDatabase::postgres().await] {
        let fixture = TestStore::prepare(database).await;
        fill(&fixture).await;
        assert!(fixture.store.begin_deletion(&device_id("going"), &somebody()).await.unwrap());
        fixture.store.delete_some(&device_id("going")).await.unwrap();
        fixture.store.close().await.unwrap();
        let server = TestServer::start(fixture.into_database()).await;
        let began = Instant::now();
        while server.get("/api/device/going").await.status != 404 {
            assert!(began.elapsed() < Duration::from_secs(30), "nobody goes on with it");
        }
        let audit = server.get("/api/audit").await.data(200);
        assert_eq!(audit["entries"][0]["details"]["deleted_events"], EVENTS + 1, "{audit}");
        server.stop().await;
    }
}

/// Ingest and reads go on while a device is deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_report_meanwhile() {
    for database in [TestDatabase::sqlite(), TestDatabase::postgres().await] {
        let fixture = TestStore::prepare(database).await;
        fill(&fixture).await;
        let server = TestServer::start(fixture.into_database()).await;
        let mut deleting = Box::pin(server.delete("/api/device/going"));
        let (mut reports, mut longest) = (0, Duration::ZERO);
        let deleted = loop {
            let began = Instant::now();
            let others = async {
                server.store(&crate::support::http::event("staying")).await;
                server.get("/api/device/staying").await.data(200);
            };
            tokio::select! {
                answer = &mut deleting => break answer,
                () = others => (),
            }
            longest = longest.max(began.elapsed());
            reports += 1;
        };
        drop(deleting);
        assert_eq!(deleted.data(200)["deleted_events"], EVENTS + 1);
        assert!(reports >= 4, "{reports} reports");
        assert!(longest < Duration::from_secs(2), "{longest:?}");
        server.stop().await;
    }
}

/// Reads that wait keep neither signs of life nor short reads from a connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_histories_leave_room_for_others() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let pi = device_id("pi");
    fixture.writer().write(&batch_at(now(), vec![success("pi", at(0))])).await.unwrap();
    let pisync::store::Target::Postgres(target) = fixture.target() else { unreachable!() };
    let mut client = crate::support::postgres::connect(&target.config).await;
    // Histories wait for this; a device's figures do not.
    let lock = client.transaction().await.unwrap();
    lock.batch_execute("lock table sync_events in access exclusive mode").await.unwrap();
    let mut histories = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let (store, query) = (fixture.store.clone(), HistoryQuery::newest(pi.clone(), 10));
        histories.spawn(async move { store.sync_history(&query).await.map(drop) });
    }
    let waiting = "(select count(*) from pg_locks
                     where not granted and database = (select oid from pg_database
                                                        where datname = current_database()))";
    while fixture.database.number(waiting).await < 5 {}
    let began = Instant::now();
    fixture.store.ping().await.unwrap();
    assert!(fixture.store.device(&pi).await.unwrap().is_some());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    lock.rollback().await.unwrap();
    for history in histories.join_all().await {
        history.unwrap();
    }
}
