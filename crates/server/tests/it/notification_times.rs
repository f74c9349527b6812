//! When people are told, through a whole server with a clock of the test's own (see `support::driven`): digests at local times,
//! reminders, quiet times, channels that do not work, and the heartbeat.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use pisync::{notify::Hidden, store::Target};
use pisync_core::Timestamp;
use serde_json::{Value, json};

use crate::{
    ingest::until_ready,
    support::{
        driven::{DrivenServer, TICK, WebhookReceiver},
        http::{success, with},
        log,
        postgres::{PostgresServer, connect},
        program::Program,
        receiver::{Receiver, Reply},
        store::TestDatabase,
    },
};

both_stores!(
    digests_come_at_local_times,
    a_digest_is_an_hour_late_at_most,
    reminders_come_after_a_day_unless_somebody_knows,
    quiet_times_hold_back_all_but_ends,
    reminders_wait_for_the_end_of_a_quiet_time,
    what_is_not_quiet_does_not_wait_with_what_is,
    a_window_that_changes_lets_its_messages_go,
    a_channel_that_fails_is_told_by_the_others,
    the_heartbeat_stops_with_sweeps_and_with_ingest,
);

/// A message is due after this time, in seconds.
const WAIT: i64 = 60;

/// After this time another one about the same group is.
const INTERVAL: i64 = 300;

const DAY: i64 = 24 * 60 * 60;

/// A real second or two may take longer on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

fn at(text: &str) -> Timestamp {
    Timestamp::parse_iso8601(text).unwrap()
}

async fn receiver() -> Receiver {
    Receiver::start(|_| Reply::status("204 No Content")).await
}

/// Nothing is expected of anybody, so that nobody becomes silent.
async fn expect_nothing(driven: &DrivenServer) {
    driven.patch("/api/fleet", &json!({"policy": {"expect": "nothing"}})).await.data(200);
}

/// Messages that have arrived, from the `taken`th on: for each incident what has happened, to whom, and the problem.
struct Inbox {
    receiver: Receiver,
    webhook: WebhookReceiver,
    taken: usize,
}

impl Inbox {
    async fn new(driven: &DrivenServer, name: &str) -> Self {
        let receiver = receiver().await;
        let webhook = driven.webhook(name, &receiver).await;
        Self { receiver, webhook, taken: 0 }
    }

    /// The bodies that have come since the last time, all of them at the present instant.
    fn bodies(&mut self, driven: &DrivenServer) -> Vec<Value> {
        let received = self.receiver.received();
        let new = received[self.taken..].iter();
        let bodies =
            new.map(|received| self.webhook.verify(received, driven.clock.now())).collect();
        self.taken = received.len();
        bodies
    }

    /// What was told since the last time, in one order.
    fn told(&mut self, driven: &DrivenServer) -> Vec<String> {
        let mut told = Vec::new();
        for body in self.bodies(driven) {
            for incident in body["data"]["incidents"].as_array().unwrap() {
                let [event, subject, kind] =
                    ["event", "subject", "kind"].map(|field| incident[field].as_str().unwrap());
                told.push(format!("{event} {subject} {kind}"));
            }
        }
        told.sort();
        told
    }
}

/// Berlin's clocks go from 2 to 3 o'clock on 29 March, and from 3 back to 2 on 25 October.
async fn digests_come_at_local_times(driven: &DrivenServer) {
    expect_nothing(driven).await;
    let mut inbox = Inbox::new(driven, "daily").await;
    driven
        .route(&json!([{
            "match": {"severity_at_least": "critical"}, "channels": [inbox.webhook.id],
            "digest": {"at": "02:30", "timezone": "Europe/Berlin"},
        }, {
            "match": {}, "channels": [],
        }]))
        .await;
    driven.fails("a").await;
    driven.is_well("b").await;
    driven.is_well("c").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    let mut days = Vec::new();
    for (before, time) in [
        ("2026-03-28T01:29:45Z", "2026-03-28T01:30:00Z"),
        // Half past two does not exist: half past three.
        ("2026-03-29T01:29:45Z", "2026-03-29T01:30:00Z"),
        ("2026-03-30T00:29:45Z", "2026-03-30T00:30:00Z"),
        ("2026-10-24T00:29:45Z", "2026-10-24T00:30:00Z"),
        // Half past two comes twice, and the digest once.
        ("2026-10-25T00:29:45Z", "2026-10-25T00:30:00Z"),
        ("2026-10-26T01:29:45Z", "2026-10-26T01:30:00Z"),
    ] {
        driven.pass_to(at(before)).await;
        assert_eq!(inbox.bodies(driven), Vec::<Value>::new(), "{before}");
        driven.pass_to(at(time)).await;
        let bodies = inbox.bodies(driven);
        assert_eq!(bodies.len(), 1, "{time}");
        days.extend(bodies);
        for later in [15, 30, 3_600] {
            driven.pass(later).await;
            assert_eq!(inbox.bodies(driven), Vec::<Value>::new(), "{later} s after {time}");
        }
    }
    let first = &days[0];
    assert_eq!(first["type"], "fleet.digest");
    let devices =
        json!({"paused": 0, "never": 0, "silent": 0, "failing": 1, "degraded": 0, "ok": 2});
    assert_eq!(first["data"]["devices"], devices);
    let text = first["data"]["text"].as_str().unwrap();
    assert!(text.starts_with("PiSync: 1 open incident\n3 devices: 2 ok, 1 failing\n"), "{text}");
    let incidents = first["data"]["incidents"].as_array().unwrap();
    let told: Vec<_> = incidents.iter().map(|one| (&one["event"], &one["subject"])).collect();
    assert_eq!(told, [(&json!("reminder"), &json!("a"))]);
    // They are no reminders in the sense of an incident's timeline: whom nobody was told of stays so.
    let id = driven.incident("a", "failing").await;
    let timeline = driven.get(&format!("/api/incident/{id}")).await.data(200)["timeline"].take();
    assert!(!timeline.to_string().contains("told"), "{timeline}");
}

async fn a_digest_is_an_hour_late_at_most(driven: &DrivenServer) {
    let mut inbox = Inbox::new(driven, "daily").await;
    // The server's clock stands at noon.
    let digest = json!({"at": "11:00", "days": ["fri", "sat"], "timezone": "UTC"});
    driven.route(&json!([{"match": {}, "channels": [inbox.webhook.id], "digest": digest}])).await;
    driven.pass(0).await;
    assert_eq!(inbox.bodies(driven).len(), 0);
    driven.pass_to(at("2026-03-28T11:59:45Z")).await;
    let body = inbox.bodies(driven).remove(0);
    assert_eq!(body["data"]["text"], "PiSync: no open incident\nno device has been evaluated yet");
    // No Sunday.
    driven.pass_to(at("2026-03-29T11:00:00Z")).await;
    assert_eq!(inbox.bodies(driven).len(), 0);
}

async fn reminders_come_after_a_day_unless_somebody_knows(driven: &DrivenServer) {
    expect_nothing(driven).await;
    let mut inbox = Inbox::new(driven, "ops").await;
    driven
        .route(&json!([{"match": {}, "channels": [inbox.webhook.id], "remind_seconds": DAY}]))
        .await;
    driven.is_well("b").await;
    let hourly = json!({"policy": {"expect": {"every_seconds": 3600}}});
    driven.patch("/api/device/b", &hourly).await.data(200);
    driven.pass(15).await;
    driven.fails("a").await;
    driven.fails("b").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["opened a failing", "opened b failing"]);
    let told = driven.clock.now();
    driven.pass(5_400).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["opened b silent"]);
    let silence_told = driven.clock.now();

    let seconds = |from: Timestamp, seconds: i64| from.saturating_add_milliseconds(seconds * 1000);
    driven.pass_to(seconds(told, DAY - 15)).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    // While a device is silent, its failures say nothing more.
    driven.pass_to(seconds(told, DAY)).await;
    assert_eq!(inbox.told(driven), ["reminder a failing"]);
    driven.pass_to(seconds(silence_told, DAY)).await;
    assert_eq!(inbox.told(driven), ["reminder b silent"]);
    // Once it is heard and still fails, that is told again.
    driven.fails("b").await;
    driven.pass(15).await;
    let (mut all, mut rounds) = (inbox.told(driven), 0);
    while all.len() < 2 && rounds < 40 {
        driven.pass(15).await;
        all.extend(inbox.told(driven));
        rounds += 1;
    }
    all.sort();
    assert_eq!(all, ["reminder b failing", "resolved b silent"]);

    // While somebody looks after it, nobody is reminded.
    driven.patch("/api/device/b", &json!({"paused": true})).await.data(200);
    driven.pass(15).await;
    driven.pass(INTERVAL).await;
    assert_eq!(inbox.told(driven), ["resolved b failing"]);
    let id = driven.incident("a", "failing").await;
    let path = format!("/api/incident/{id}/acknowledge");
    driven.post(&path, &json!({"note": "on my way"})).await.data(200);
    driven.pass_to(seconds(told, 2 * DAY + 15)).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    driven.delete(&path).await.data(200);
    driven.pass(15).await;
    assert_eq!(inbox.told(driven), ["reminder a failing"]);
    // The end is told to whoever was told of the beginning.
    driven.is_well("a").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["resolved a failing"]);
}

/// Makes a window in which people want to hear nothing, and gives its number.
async fn quiet(driven: &DrivenServer, scope: &Value, from: Timestamp, until: Timestamp) -> i64 {
    let window = json!({
        "name": "quiet", "effect": "quiet", "timezone": "UTC", "from": from, "until": until,
    });
    let made = driven.post("/api/windows", &with(window, scope)).await.data(201);
    made["id"].as_i64().unwrap()
}

async fn quiet_times_hold_back_all_but_ends(driven: &DrivenServer) {
    expect_nothing(driven).await;
    let mut inbox = Inbox::new(driven, "program").await;
    let people = receiver().await;
    let slack =
        json!({"name": "people", "kind": "slack", "url": people.url("/s"), "default": true});
    driven.post("/api/channels", &slack).await.data(201);
    let texts = || -> Vec<String> {
        let text = |body: Value| body["text"].as_str().unwrap().to_owned();
        people.received().iter().map(|received| text(received.json())).collect()
    };
    driven.fails("before").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["opened before failing"]);
    assert_eq!(texts().len(), 1);

    let end = at("2026-03-27T20:00:00Z");
    quiet(driven, &json!({"scope": "fleet"}), at("2026-03-27T13:00:00Z"), end).await;
    driven.pass_to(at("2026-03-27T14:00:00Z")).await;
    driven.fails("lasting").await;
    driven.fails("short").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    driven.is_well("short").await;
    driven.pass(15).await;
    driven.pass(INTERVAL).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    // The end of what was told before does not wait for what must.
    driven.is_well("before").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["resolved before failing"]);
    // People want to sleep all the same.
    assert_eq!(texts().len(), 1);
    driven.pass_to(end.saturating_add_milliseconds(-TICK)).await;
    assert_eq!((inbox.told(driven).len(), texts().len()), (0, 1));
    driven.pass_to(end).await;
    assert_eq!(inbox.told(driven), ["opened lasting failing"]);
    let [_, night] = &texts()[..] else { panic!("{:?}", texts()) };
    assert!(
        night.contains("lasting: failing") && night.contains("before: no longer failing"),
        "{night}"
    );
    assert!(!night.contains("short"), "{night}");
}

async fn reminders_wait_for_the_end_of_a_quiet_time(driven: &DrivenServer) {
    expect_nothing(driven).await;
    let mut inbox = Inbox::new(driven, "ops").await;
    driven
        .route(&json!([{"match": {}, "channels": [inbox.webhook.id], "remind_seconds": DAY}]))
        .await;
    driven.fails("known").await;
    driven.fails("unknown").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven).len(), 2);
    let (from, end) = (at("2026-03-28T11:00:00Z"), at("2026-03-28T20:00:00Z"));
    quiet(driven, &json!({"scope": "fleet"}), from, end).await;
    driven.pass(DAY).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    // Somebody takes one of them on before people are reminded.
    let id = driven.incident("known", "failing").await;
    driven.post(&format!("/api/incident/{id}/acknowledge"), &json!({})).await.data(200);
    driven.pass_to(end.saturating_add_milliseconds(-TICK)).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    driven.pass_to(end).await;
    assert_eq!(inbox.told(driven), ["reminder unknown failing"]);
    // The incident's timeline says the same.
    let timeline = driven.get(&format!("/api/incident/{id}")).await.data(200)["timeline"].take();
    assert_eq!(timeline.to_string().matches("\"told\"").count(), 1, "{timeline}");
}

async fn what_is_not_quiet_does_not_wait_with_what_is(driven: &DrivenServer) {
    expect_nothing(driven).await;
    let mut inbox = Inbox::new(driven, "ops").await;
    driven.is_well("quiet").await;
    let (from, end) = (at("2026-03-27T12:00:00Z"), at("2026-05-27T12:00:00Z"));
    quiet(driven, &json!({"scope": "device", "key": "quiet"}), from, end).await;
    driven.pass(15).await;
    driven.fails("quiet").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    driven.fails("loud").await;
    driven.pass(15).await;
    driven.pass(WAIT - 15).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    driven.pass(15).await;
    assert_eq!(inbox.told(driven), ["opened loud failing"]);
    // Again while the other one waits in a message of its own.
    driven.is_well("loud").await;
    driven.pass(15).await;
    driven.pass(INTERVAL).await;
    assert_eq!(inbox.told(driven), ["resolved loud failing"]);
    driven.pass_to(end).await;
    assert_eq!(inbox.told(driven), ["opened quiet failing"]);
}

async fn a_window_that_changes_lets_its_messages_go(driven: &DrivenServer) {
    expect_nothing(driven).await;
    let mut inbox = Inbox::new(driven, "ops").await;
    let (from, end) = (at("2026-03-27T12:00:00Z"), at("2026-05-27T12:00:00Z"));
    let id = quiet(driven, &json!({"scope": "fleet"}), from, end).await;
    driven.pass(15).await;
    driven.fails("a").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    // It ends sooner, and messages wait for that.
    let sooner = at("2026-03-27T15:00:00Z");
    let shorter = json!({
        "name": "quiet", "scope": "fleet", "effect": "quiet", "timezone": "UTC", "from": from,
        "until": sooner,
    });
    driven.put(&format!("/api/window/{id}"), &shorter).await.data(200);
    driven.pass(WAIT).await;
    driven.pass_to(sooner.saturating_add_milliseconds(-TICK)).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    driven.pass_to(sooner).await;
    assert_eq!(inbox.told(driven), ["opened a failing"]);
    // It goes altogether.
    let id = quiet(driven, &json!({"scope": "fleet"}), sooner, end).await;
    driven.fails("b").await;
    driven.pass(15).await;
    driven.pass(INTERVAL).await;
    assert_eq!(inbox.told(driven), [""; 0]);
    driven.delete(&format!("/api/window/{id}")).await.data(200);
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["opened b failing"]);
}

async fn a_channel_that_fails_is_told_by_the_others(driven: &DrivenServer) {
    expect_nothing(driven).await;
    let works = Arc::new(AtomicBool::new(false));
    let answers = Arc::clone(&works);
    let broken = Receiver::start(move |_| {
        let works = answers.load(Ordering::SeqCst);
        Reply::status(if works { "200 OK" } else { "500 Internal Server Error" })
    })
    .await;
    driven.webhook("broken", &broken).await;
    let mut inbox = Inbox::new(driven, "other").await;
    driven.fails("a").await;
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["opened a failing"]);
    let failed_at = driven.clock.now();
    assert_eq!(broken.received().len(), 1);

    let hour = failed_at.saturating_add_milliseconds(3_600_000);
    while driven.clock.now() < hour {
        assert_eq!(inbox.told(driven), [""; 0]);
        driven.pass(15).await;
    }
    driven.pass(WAIT).await;
    let body = inbox.bodies(driven).remove(0);
    let told = &body["data"]["incidents"][0];
    assert_eq!(
        (&told["event"], &told["scope"], &told["subject"], &told["severity"]),
        (&json!("opened"), &json!("channel"), &json!("broken"), &json!("critical"))
    );
    assert_eq!(told["since"], failed_at.to_string());
    let open = driven.get("/api/incidents?scope=channel").await.data(200);
    assert_eq!(open["incidents"].as_array().unwrap().len(), 1, "{open}");

    // It is tried again within some hours, and then everybody knows.
    works.store(true, Ordering::SeqCst);
    let tried = broken.received().len();
    assert!((4..=7).contains(&tried), "{tried}");
    let mut minutes = 0;
    while broken.received().len() == tried {
        driven.pass(60).await;
        minutes += 1;
        assert!(minutes < 180, "it was not tried again");
    }
    assert_eq!(inbox.told(driven), [""; 0]);
    driven.pass(15).await;
    driven.pass(WAIT).await;
    assert_eq!(inbox.told(driven), ["resolved broken failing"]);
    driven.pass(INTERVAL).await;
    // It has what was for it, once, and nothing about itself.
    let received = broken.received();
    let subject =
        |body: Value| body["data"]["incidents"][0]["subject"].as_str().unwrap().to_owned();
    let subjects: Vec<_> = received.iter().map(|received| subject(received.json())).collect();
    assert_eq!(subjects, vec!["a"; tried + 1]);
}

/// The warnings that there was no heartbeat after this sweep.
fn warnings(swept_at: Timestamp) -> usize {
    let lines = log::lines_with(&swept_at.to_string());
    lines.iter().filter(|line| line.contains("no heartbeat")).count()
}

async fn poll(mut condition: impl AsyncFnMut() -> bool, what: &str) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < PATIENCE, "{what} has not happened");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Has ingest of a server fail, or work again. What holds the database meanwhile is given.
async fn stop_ingest(server: &DrivenServer) -> Option<rusqlite::Connection> {
    match &server.database.target {
        // Another program holds the lock, so that what is reported cannot be applied. Everything can still be read.
        Target::Sqlite(path) => {
            let lock = rusqlite::Connection::open(path).unwrap();
            lock.execute_batch("begin immediate").unwrap();
            Some(lock)
        }
        Target::Postgres(target) => {
            let name = target.config.get_dbname().unwrap();
            let client = connect(&PostgresServer::shared().config("postgres")).await;
            let close = format!("alter database {name} with allow_connections false");
            client.batch_execute(&close).await.unwrap();
            let end = format!(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
            );
            client.batch_execute(&end).await.unwrap();
            None
        }
    }
}

async fn resume_ingest(server: &DrivenServer, lock: Option<rusqlite::Connection>) {
    drop(lock);
    if let Target::Postgres(target) = &server.database.target {
        let name = target.config.get_dbname().unwrap();
        let client = connect(&PostgresServer::shared().config("postgres")).await;
        let open = format!("alter database {name} with allow_connections true");
        client.batch_execute(&open).await.unwrap();
    }
    until_ready(server, 200).await;
}

/// It is posted once a minute while the last sweep is 2 minutes old at most, and ingest works.
async fn the_heartbeat_stops_with_sweeps_and_with_ingest(database: &TestDatabase) {
    log::listen();
    let watcher = receiver().await;
    let url = watcher.url("/beat").parse().unwrap();
    // A time of its own, by which its lines in the log are found.
    let start =
        at(if database.file().is_some() { "2026-04-01T08:00:07Z" } else { "2026-04-02T08:00:07Z" });
    let database = TestDatabase::elsewhere(database.target.clone());
    let driven = DrivenServer::start(start, database, |settings| {
        settings.heartbeat_url = Some(Hidden::new(url));
    })
    .await;
    let count = || watcher.received().len();
    let passes = |seconds: i64| {
        driven.clock.set(driven.clock.now().saturating_add_milliseconds(seconds * 1000));
    };
    driven.beat(true, false).await;
    driven.tick(false).await;
    poll(async || count() == 1, "the first heartbeat").await;
    assert_eq!(watcher.only().line, "POST /beat");
    for age in [60, 120] {
        passes(60);
        poll(async || count() == age / 60 + 1, "a heartbeat").await;
    }
    // Nobody sweeps any more.
    passes(60);
    poll(async || warnings(start) == 1, "a warning").await;
    assert_eq!(count(), 3);
    driven.pass(60).await;
    poll(async || count() == 4, "a heartbeat after the next sweep").await;

    // Nothing can be stored any more, although the last sweep is young.
    let swept_at = driven.clock.now();
    let lock = stop_ingest(&driven).await;
    let refused = async || driven.report(&success("pi", driven.clock.now())).await.status == 503;
    poll(refused, "a refusal").await;
    passes(60);
    let is_missing = |line: &String| line.contains("can_store=false") && !line.contains("swept_at");
    let warned = async || match lock {
        Some(_) => warnings(swept_at) == 1,
        // PostgreSQL does not answer, so that nobody knows when the last sweep was.
        None => log::lines_with("no heartbeat").iter().any(is_missing),
    };
    poll(warned, "another warning").await;
    assert_eq!(count(), 4);
    resume_ingest(&driven, lock).await;
    driven.pass(60).await;
    poll(async || count() == 5, "a heartbeat once all is well").await;
    driven.stop().await;
}

/// A server that starts has not swept yet, which is no reason to warn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_starts_warns_of_nothing() {
    let watcher = receiver().await;
    let program = Program::new()
        .with("PORT", 0)
        .with("NOTIFY_ALLOW", "127.0.0.0/8")
        .with("HEARTBEAT_URL", watcher.url("/beat"));
    let serving = program.serve(&[]);
    poll(async || !watcher.received().is_empty(), "the first heartbeat").await;
    serving.stop();
    let log = program.log("combined.log");
    assert!(
        !log.iter().any(|line| line["message"].as_str().unwrap().contains("heartbeat")),
        "{log:#?}"
    );
}
