//! Reports under load and under bad luck: what was answered 201 is stored, once, and adds up.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use pisync::store::{self, Target};
use pisync_core::{Arrival, ReceivedEvent, SyncEvent};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{
    events::{at, now, recount, sum},
    http::{Answer, Client, column, event, failure, success, try_send, with},
    postgres::{PostgresServer, Stop},
    server::TestServer,
    store::{TestDatabase, assert_right, differences},
};

both_stores!(
    everything_that_came_at_once_adds_up,
    one_refused_event_costs_the_others_nothing,
    what_was_acknowledged_before_the_end_is_stored,
);

/// As many clients as report at once.
const CONNECTIONS: usize = 50;

/// Reports all of it on so many connections and gives each answer, by its place in the list.
pub(crate) async fn report_all(client: &Client, events: Vec<Value>) -> Vec<Answer> {
    let events = Arc::new(events);
    let next = Arc::new(AtomicUsize::new(0));
    let mut senders = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (client, events, next) = (client.clone(), Arc::clone(&events), Arc::clone(&next));
        senders.spawn(async move {
            let mut answers = Vec::new();
            loop {
                let place = next.fetch_add(1, Ordering::Relaxed);
                let Some(event) = events.get(place) else { return answers };
                answers.push((place, client.report(event).await));
            }
        });
    }
    let answers: BTreeMap<_, _> = senders.join_all().await.into_iter().flatten().collect();
    assert_eq!(answers.len(), events.len());
    answers.into_values().collect()
}

/// The ids of a device's stored events.
pub(crate) async fn stored_ids(server: &Client, device: &str) -> BTreeSet<i64> {
    let mut ids = BTreeSet::new();
    loop {
        let path = format!("/api/device/{device}/sync-history?limit=1000&offset={}", ids.len());
        let data = server.get(&path).await.data(200);
        let page = column(&data["sync_history"], "id");
        ids.extend(page.iter().map(|id| id.as_i64().unwrap()));
        if page.len() < 1000 {
            let counted = &data["pagination"]["total_events"];
            assert_eq!((counted, &data["stats"]["total_syncs"]), (&json!(ids.len()), counted));
            return ids;
        }
    }
}

/// Successes and failures of few devices and few instants, so that events of one batch meet in every way.
pub(crate) fn mixed_events() -> Vec<Value> {
    (0..500)
        .map(|number| {
            let job = ["nightly", "hourly"].get(usize::try_from(number % 3).unwrap());
            let fields = json!({
                "device_id": format!("pi-{}", number % 7), "timestamp": at(-(number * 37 % 101)),
                "total_files_synced": number, "total_errors": i64::from(number % 5 < 3) * number,
                "internet_speed": (number % 2 == 0).then_some(number),
                "job": job,
            });
            with(event("pi"), &fields)
        })
        .collect()
}

async fn everything_that_came_at_once_adds_up(server: &TestServer) {
    let events = mixed_events();
    let answers = report_all(server, events.clone()).await;
    let data: Vec<_> = answers.iter().map(|answer| answer.data(201)).collect();
    let ids: BTreeSet<_> = data.iter().map(|data| data["id"].as_i64().unwrap()).collect();
    assert_eq!(ids.len(), events.len());
    for (event, data) in events.iter().zip(&data) {
        assert_eq!(event["total_files_synced"], data["total_files_synced"], "answers got mixed up");
    }

    let parse = |event: &Value| {
        let arrival = Arrival { received: now(), latest: now() };
        SyncEvent::from_json(event.to_string().as_bytes(), arrival).unwrap()
    };
    let id = |data: &Value| data["id"].as_i64().unwrap();
    let sent: Vec<_> =
        events.iter().zip(&data).map(|(event, data)| (id(data), now(), parse(event))).collect();
    for (device_id, jobs) in recount(&sent) {
        let found = server.get(&format!("/api/device/{device_id}")).await.data(200);
        let expected = sum(jobs.values());
        let expected = json!({
            "total_syncs": expected.total_syncs,
            "failed_syncs": expected.failed_syncs,
            "total_files_synced": expected.total_files_synced,
            "total_errors": expected.total_errors,
            "avg_internet_speed": expected.avg_internet_speed(),
            "first_sync": expected.first_sync,
            "last_sync": expected.last_sync,
            "last_success": expected.last_success,
            "consecutive_failures": expected.consecutive_failures,
        });
        assert_eq!(with(found.clone(), &expected), found, "{device_id}");
        let names: Vec<_> = jobs.keys().cloned().map(Value::from).collect();
        assert_eq!(column(&found["jobs"], "job"), names);
        let streaks: Vec<_> = jobs.values().map(|job| json!(job.consecutive_failures)).collect();
        assert_eq!(column(&found["jobs"], "consecutive_failures"), streaks, "{device_id}");
        let stored = stored_ids(server, device_id.as_str()).await;
        assert!(stored.is_subset(&ids));
    }
    assert_eq!(server.get("/api/stats").await.data(200)["total_sync_events"], 500);
}

/// What the tables refuse although it is right: a user's own rule, or a mistake of ours.
async fn one_refused_event_costs_the_others_nothing(server: &TestServer) {
    let refuse = if server.is_postgres() {
        "create function no_666() returns trigger language plpgsql as $$
         begin
             if new.total_errors = 666 then raise exception 'refused'; end if;
             if new.total_errors = 667 then return null; end if;
             return new;
         end $$;
         create trigger no_666 before insert on sync_events for each row execute function no_666()"
    } else {
        "create trigger no_666 before insert on sync_events when new.total_errors = 666
         begin select raise(abort, 'refused'); end;
         create trigger no_667 before insert on sync_events when new.total_errors = 667
         begin select raise(ignore); end"
    };
    server.database.execute(refuse).await;
    let mut events: Vec<_> = (0..200).map(|second| success("pi", at(-second))).collect();
    events[100] = with(failure("pi", at(0)), &json!({"total_errors": 666, "job": "nightly"}));
    // Dropped without an error.
    events[50] = with(failure("pi", at(0)), &json!({"total_errors": 667, "event_id": "dropped"}));
    // A device that would be made for it alone.
    events[150] = with(failure("only-refused", at(0)), &json!({"total_errors": 666}));
    let answers = report_all(server, events).await;
    let mut ids = BTreeSet::new();
    for (place, answer) in answers.iter().enumerate() {
        if ![50, 100, 150].contains(&place) {
            assert!(ids.insert(answer.data(201)["id"].as_i64().unwrap()));
        } else if server.is_postgres() {
            // Whatever is wrong inside is for the log.
            assert_eq!(answer.error(500), "Internal server error");
        } else {
            // It was in the journal before the tables were asked.
            answer.data(201);
        }
    }
    assert_eq!(stored_ids(server, "pi").await, ids);
    server.get("/api/device/only-refused").await.error(404);
    let stats = server.get("/api/stats").await.data(200);
    assert_eq!((&stats["total_sync_events"], &stats["total_errors"]), (&json!(197), &json!(0)));
    match server.database.file() {
        None => {
            let metrics = server.get("/metrics").await;
            let refused = "\npisync_sync_events_refused_total{reason=\"failed\"} 3\n";
            assert!(metrics.text().contains(refused), "{}", metrics.text());
        }
        Some(file) => {
            // What was acknowledged is not lost.
            let kept = std::fs::read(file.with_extension("db.refused.ndjson")).unwrap();
            let mut lines = kept.split_inclusive(|byte| *byte == b'\n').map(|line| {
                let arrival = Arrival { received: now(), latest: now() };
                ReceivedEvent::from_json(line, arrival).unwrap()
            });
            let nightly = lines.find(|kept| kept.event.job.is_some()).unwrap();
            assert_eq!((nightly.event.device_id.as_str(), nightly.event.total_errors), ("pi", 666));
            assert_eq!(nightly.created_at, Some(now()));
            assert_eq!(kept.iter().filter(|byte| **byte == b'\n').count(), 3);
        }
    }
}

/// Clients that report without a pause until they are stopped, or nobody answers.
pub(crate) struct Reporters {
    acknowledged: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    tasks: JoinSet<Vec<i64>>,
}

impl Reporters {
    pub(crate) fn start(client: &Client) -> Self {
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let stopped = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for _ in 0..16 {
            let client = client.clone();
            let (acknowledged, stopped) = (Arc::clone(&acknowledged), Arc::clone(&stopped));
            tasks.spawn(async move {
                let mut ids = Vec::new();
                while !stopped.load(Ordering::SeqCst) {
                    let request = client.request(Method::POST, "/api/sync-event");
                    let Ok(answer) = try_send(request.json(&event("pi"))).await else { break };
                    if answer.status == 201 {
                        ids.push(answer.data(201)["id"].as_i64().unwrap());
                        acknowledged.fetch_add(1, Ordering::SeqCst);
                    } else {
                        assert_unavailable(&answer);
                        // The answer says to come back later.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                ids
            });
        }
        Self { acknowledged, stopped, tasks }
    }

    /// Waits until so many more reports are acknowledged.
    pub(crate) async fn wait_for(&self, more: usize) {
        let enough = self.acknowledged.load(Ordering::SeqCst) + more;
        until(async || self.acknowledged.load(Ordering::SeqCst) >= enough).await;
    }

    /// Lets them end and gives the ids that were acknowledged.
    pub(crate) async fn stop(self) -> BTreeSet<i64> {
        self.stopped.store(true, Ordering::SeqCst);
        let ids = self.tasks.join_all().await.concat();
        let distinct: BTreeSet<_> = ids.iter().copied().collect();
        assert_eq!(distinct.len(), ids.len());
        distinct
    }
}

/// Asks again and again until it is so.
pub(crate) async fn until(condition: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < Duration::from_secs(60), "it does not come to pass");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) async fn until_ready(server: &Client, status: u16) {
    until(async || server.get("/health/ready").await.status == status).await;
}

pub(crate) fn assert_unavailable(answer: &Answer) {
    let error = "The database is temporarily unavailable, please try again later";
    assert_eq!(answer.error(503), error);
    assert_eq!(answer.header("retry-after"), "5");
}

async fn what_was_acknowledged_before_the_end_is_stored(database: &TestDatabase) {
    for _ in 0..3 {
        let server = TestServer::start(TestDatabase::elsewhere(database.target.clone())).await;
        let before =
            server.get("/api/stats").await.data(200)["total_sync_events"].as_i64().unwrap();
        let reporters = Reporters::start(&server);
        reporters.wait_for(100).await;
        let (task, _) = server.begin_stop();
        task.await.unwrap().unwrap();
        let acknowledged = reporters.stop().await;
        assert!(acknowledged.len() >= 100);

        let again = TestServer::start(TestDatabase::elsewhere(database.target.clone())).await;
        let stored = stored_ids(&again, "pi").await;
        assert!(acknowledged.is_subset(&stored));
        // Who is answered 201 is answered after the commit; a few may have lost their answer.
        let unanswered = i64::try_from(stored.len() - acknowledged.len()).unwrap() - before;
        assert!((0..=16).contains(&unanswered), "{unanswered}");
        again.stop().await;
    }
}

/// A server on a PostgreSQL of its own.
pub(crate) async fn on_its_own() -> (PostgresServer, TestServer) {
    let postgres = PostgresServer::dedicated();
    let target = Target::Postgres(Box::new(postgres.create_database("pisync").await));
    let server = TestServer::start(TestDatabase::elsewhere(target)).await;
    (postgres, server)
}

/// The answer, and how long it took.
pub(crate) async fn timed(answer: impl Future<Output = Answer>) -> (Answer, Duration) {
    let started = Instant::now();
    (answer.await, started.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_postgresql_is_away() {
    let (postgres, server) = on_its_own().await;
    let mut acknowledged = BTreeSet::new();
    for how in [Stop::Orderly, Stop::Immediate] {
        acknowledged.insert(server.store(&event("pi")).await["id"].as_i64().unwrap());
        postgres.stop(how);
        let (first, took) = timed(server.report(&event("pi"))).await;
        assert_unavailable(&first);
        assert!(took < Duration::from_secs(3), "{took:?}");
        for _ in 0..5 {
            let (next, took) = timed(server.report(&event("pi"))).await;
            assert_unavailable(&next);
            assert!(took < Duration::from_secs(1), "{took:?}");
        }
        // What is wrong with a report can be told all the same.
        server.report(&json!({})).await.details();
        for path in ["/api/stats", "/api/devices", "/api/device/pi", "/api/device/pi/sync-history"]
        {
            let (answer, took) = timed(server.get(path)).await;
            assert_unavailable(&answer);
            assert!(took < Duration::from_secs(3), "{took:?}");
        }
        assert_unavailable(&server.delete("/api/device/pi").await);
        let ready = server.get("/health/ready").await.json(503);
        assert_eq!(ready["status"], "UNAVAILABLE");
        for path in ["/health", "/health/live"] {
            assert_eq!(server.get(path).await.json(200)["status"], "OK");
        }
        // Measurements matter most now.
        assert!(server.get("/metrics").await.text().contains("reason=\"unavailable\"} "));

        postgres.start();
        until_ready(&server, 200).await;
        acknowledged.insert(server.store(&event("pi")).await["id"].as_i64().unwrap());
        assert_eq!(stored_ids(&server, "pi").await, acknowledged);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_goes_away_under_load_and_comes_back() {
    let (postgres, server) = on_its_own().await;
    let reporters = Reporters::start(&server);
    for how in [Stop::Immediate, Stop::Orderly] {
        reporters.wait_for(50).await;
        postgres.stop(how);
        until_ready(&server, 503).await;
        postgres.start();
        reporters.wait_for(50).await;
        until_ready(&server, 200).await;
    }
    let acknowledged = reporters.stop().await;
    let stored = stored_ids(&server, "pi").await;
    // Nothing that was answered 503 was refused in truth and stored all the same, but for a commit
    // whose outcome could not be learnt in time; here it could.
    assert_eq!(stored, acknowledged);
    let store = store::open(&server.database.target).await.unwrap();
    assert_right(&differences(&*store, false).await);
    server.stop().await;
}
