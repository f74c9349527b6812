//! Each file in `tests/scenarios`, through a whole server with a clock of the test's own: channels are webhooks that the API
//! made, and lead to a receiver here; what happens comes as HTTP requests, and what is told arrives signed. It must end as the
//! file says, as it does in a backtest.
//!
//! The test looks after the fleet itself, by the functions that a server calls (see `support::driven`): a beat, a sweep and
//! the sending of messages, in this order, at each :00, :15, :30 and :45. Instants at which nothing can happen are passed over:
//! nothing was reported or changed since the last sweep, which went through; no deadline has come (`next_look`); there are no routes
//! that may tell by the clock; and no message is due. `server` stops and starts the whole server on the same database. `database` cuts the
//! server off from PostgreSQL, so that it refuses reports by itself; on SQLite, where nothing is away without damage, reports
//! are kept from it, and the next beat says that some were refused.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use pisync::{
    backtest::{
        self, Expected, Scenario,
        scenario::{
            Action, DatabaseStep, IncidentEntry, Instant, MessageEntry, MessageItem, Request,
            ServerStep, StateEntry, Step,
        },
    },
    store::{NotificationQuery, NotificationState, Target},
};
use pisync_core::Timestamp;
use reqwest::Method;
use serde_json::{Map, Value, json};

use crate::{
    ingest::until_ready,
    scenarios::scenarios,
    support::{
        driven::{DrivenServer, TICK, WebhookReceiver},
        http::send,
        postgres::{PostgresServer, connect},
        receiver::{Received, Receiver, Reply},
        store::TestDatabase,
    },
};

/// How many tests share the scenarios.
const SHARES: usize = 3;

/// How many devices report at the same moment.
const AT_ONCE: usize = 16;

/// How many devices are looked up one by one. More are taken from the list.
const LOOKED_UP: usize = 5;

/// A scenario while it runs.
struct Run {
    /// `None` while the server is stopped.
    driven: Option<DrivenServer>,
    /// The database while the server is stopped.
    database: Option<TestDatabase>,
    receiver: Receiver,
    channels: Vec<WebhookReceiver>,
    /// How many messages were taken in.
    taken: usize,
    ids: BTreeSet<String>,
    is_away: bool,
    has_refused: bool,
    /// The last change of a state that was seen.
    last_change: i64,
    came: Expected,
}

impl Run {
    async fn start(scenario: &Scenario, database: TestDatabase) -> Self {
        let start = scenario.start.0;
        let driven = DrivenServer::start(start, database, |_| {}).await;
        let receiver = Receiver::start(|_| Reply::status("200 OK")).await;
        // No request makes devices known that are on no roster.
        for (group, devices) in &scenario.groups {
            let devices: Vec<_> =
                devices.iter().map(|device| (device.clone(), Some(group.clone()))).collect();
            driven.store.register_devices(&devices, start).await.unwrap();
        }
        for change in &scenario.setup {
            request(&driven, change).await;
        }
        let mut channels = Vec::new();
        for name in &scenario.channels {
            channels.push(driven.webhook(name, &receiver).await);
        }
        driven.beat(true, false).await;
        Self {
            driven: Some(driven),
            database: None,
            receiver,
            channels,
            taken: 0,
            ids: BTreeSet::new(),
            is_away: false,
            has_refused: false,
            last_change: 0,
            came: Expected::default(),
        }
    }

    fn driven(&self) -> &DrivenServer {
        self.driven.as_ref().expect("a running server")
    }

    /// Runs it to its end, and gives what came of it, and the database.
    async fn run(mut self, scenario: &Scenario) -> (Expected, TestDatabase) {
        let steps = in_order(scenario);
        let mut steps = steps.into_iter().peekable();
        let (start, end) = (scenario.start.0, scenario.end.0);
        // The last instant that was passed over, and the next one at which something can happen by itself.
        let (mut passed, mut next) = (None, start);
        let mut has_news = true;
        let mut now = instant_at_or_after(start);
        while now <= end {
            while let Some((at, step)) = steps.next_if(|(at, _)| *at <= now) {
                if matches!(step.action, Action::Server(_) | Action::Database(_)) {
                    self.live_until(passed.take()).await;
                }
                self.step(at, step).await;
                has_news = true;
            }
            let can_work = self.driven.is_some() && !self.is_away;
            if can_work && (has_news || next <= now) {
                self.live_until(passed.take()).await;
                next = self.tick(now).await;
                has_news = false;
            } else if can_work {
                passed = Some(now);
            }
            // Nothing happens before the next step, and before what comes by itself.
            let step = steps.peek().map_or(Timestamp::MAX, |(at, _)| *at);
            let following = now.saturating_add_milliseconds(TICK);
            let wanted = if can_work { step.min(next) } else { step };
            let then = instant_at_or_after(wanted.max(following).min(end)).max(following);
            if can_work && then > following {
                passed = Some(then.saturating_add_milliseconds(-TICK));
            }
            now = then;
        }
        let driven = self.driven.take().expect("a scenario ends with a running server");
        self.compare_incidents(&driven).await;
        (self.came, driven.stop().await)
    }

    /// Gives the signs of life that were left out.
    async fn live_until(&self, passed: Option<Timestamp>) {
        if let (Some(passed), Some(driven)) = (passed, &self.driven) {
            driven.store.pass_over(passed).await.unwrap();
        }
    }

    async fn step(&mut self, at: Timestamp, step: &Step) {
        if let Some(driven) = &self.driven {
            driven.clock.set(at);
        }
        match &step.action {
            Action::Report(report) => {
                let of = |device: &String| {
                    let mut fields = report.event.clone();
                    fields.insert("device_id".to_owned(), device.as_str().into());
                    event(fields, at)
                };
                self.report(report.device_ids.iter().map(of).collect()).await;
            }
            Action::Batch(batch) => {
                self.batch(batch.iter().map(|fields| event(fields.clone(), at)).collect()).await;
            }
            Action::Start(start) if self.can_store() => {
                self.start_run(&Value::Object(start.clone())).await;
            }
            Action::Request(change) if self.can_store() => request(self.driven(), change).await,
            Action::Start(_) | Action::Request(_) => {}
            Action::Server(ServerStep::Stop) => {
                if let Some(driven) = self.driven.take() {
                    self.database = Some(driven.stop().await);
                }
            }
            Action::Server(ServerStep::Start) => {
                if let Some(database) = self.database.take() {
                    let driven = DrivenServer::start(at, database, |_| {}).await;
                    driven.beat(true, false).await;
                    self.driven = Some(driven);
                }
            }
            Action::Database(DatabaseStep::Away) => self.cut_off(true).await,
            Action::Database(DatabaseStep::Back) => self.cut_off(false).await,
        }
    }

    fn can_store(&self) -> bool {
        self.driven.is_some() && !self.is_away
    }

    /// Takes the database away from the server, or gives it back.
    async fn cut_off(&mut self, is_away: bool) {
        let driven = self.driven();
        if let Target::Postgres(target) = &driven.database.target {
            let name = target.config.get_dbname().unwrap();
            let client = connect(&PostgresServer::shared().config("postgres")).await;
            let allow = format!("alter database {name} with allow_connections {}", !is_away);
            client.batch_execute(&allow).await.unwrap();
            if is_away {
                let end = format!(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
                );
                client.batch_execute(&end).await.unwrap();
            } else {
                until_ready(driven, 200).await;
            }
        }
        self.is_away = is_away;
    }

    /// Devices report, each by a request of its own.
    async fn report(&mut self, events: Vec<Value>) {
        let Some(driven) = &self.driven else { return };
        if self.is_away && matches!(driven.database.target, Target::Sqlite(_)) {
            self.has_refused = true;
            return;
        }
        let expected = if self.is_away { 503 } else { 201 };
        let report = |event: Value| async move {
            let answer = driven.server.report(&event).await;
            assert_eq!(answer.status, expected, "{event}: {}", answer.text());
        };
        stream::iter(events).for_each_concurrent(AT_ONCE, report).await;
        self.has_refused |= self.is_away;
    }

    /// One request reports events of earlier times.
    async fn batch(&mut self, events: Vec<Value>) {
        let Some(driven) = &self.driven else { return };
        if self.is_away {
            self.has_refused = true;
            return;
        }
        let answer = driven.post("/api/sync-events", &Value::from(events.clone())).await.data(200);
        assert_eq!(answer["accepted"], events.len(), "{answer}");
    }

    /// A run begins. It is stored within a second.
    async fn start_run(&self, start: &Value) {
        let driven = self.driven();
        driven.post("/api/sync-start", start).await.data(202);
        let path = format!("/api/device/{}", start["device_id"].as_str().unwrap());
        let began = std::time::Instant::now();
        loop {
            let shown = driven.get(&path).await.data(200);
            let jobs = shown["jobs"].as_array().unwrap();
            let is_there = |job: &Value| {
                job["job"] == start["job"] && job["run_started"] == driven.clock.now().to_string()
            };
            if jobs.iter().any(is_there) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{start} was not stored: {shown}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// An instant: a beat, a sweep, and the sending of messages. Answers when something happens next by itself.
    async fn tick(&mut self, now: Timestamp) -> Timestamp {
        let has_refused = std::mem::take(&mut self.has_refused);
        let driven = self.driven.as_ref().expect("a running server");
        driven.clock.set(now);
        let swept = driven.tick(has_refused).await;
        self.came.incidents.extend(swept.events.iter().map(|event| IncidentEntry {
            at: Instant(now),
            what: event.what.as_str().to_owned(),
            scope: event.scope.as_str().to_owned(),
            subject: event.subject.clone(),
            kind: event.kind.as_str().to_owned(),
            since: Some(Instant(event.since)),
            resolution: event.resolution.map(|why| why.as_str().to_owned()),
            members: Some(event.members),
        }));
        if swept.changes > 0 {
            let states = states(driven, &mut self.last_change).await;
            compare_states(driven, &states).await;
            self.came.states.extend(states);
        }
        let received = self.receiver.received();
        for received in &received[self.taken..] {
            let id = received.header("webhook-id").to_owned();
            assert!(self.ids.insert(id), "an id came twice at {now}");
            self.came.messages.push(message(&self.channels, received, now));
        }
        self.taken = received.len();
        if !driven.store.routes().await.unwrap().routes.is_empty() {
            return now.saturating_add_milliseconds(TICK);
        }
        let look = driven.store.next_look().await.unwrap().unwrap_or(Timestamp::MAX);
        let pending = NotificationQuery {
            channel: None,
            state: Some(NotificationState::Pending),
            before: None,
            limit: 1_000,
        };
        let pending = driven.store.notifications(&pending).await.unwrap();
        let due = pending.notifications.iter().map(|notification| notification.due_at);
        // Never the same instant again.
        due.fold(look, Timestamp::min).max(now.saturating_add_milliseconds(1))
    }

    /// What the API tells of incidents must be what the sweeps said.
    async fn compare_incidents(&self, driven: &DrivenServer) {
        let mut told: Vec<String> = Vec::new();
        for state in ["open", "resolved"] {
            let mut path = format!("/api/incidents?state={state}&limit=1000");
            loop {
                let page = driven.get(&path).await.data(200);
                for incident in page["incidents"].as_array().unwrap() {
                    let detail = driven.get(&format!("/api/incident/{}", incident["id"])).await;
                    let detail = detail.data(200);
                    let words = ["opened", "reopened", "flapping", "resolved"];
                    let entries = detail["timeline"].as_array().unwrap().iter();
                    let entries =
                        entries.filter(|entry| words.iter().any(|word| entry["what"] == *word));
                    told.extend(entries.map(|entry| {
                        let resolution = entry["details"]["resolution"].as_str().unwrap_or("-");
                        let of = |field: &str| incident[field].as_str().unwrap().to_owned();
                        let (at, what) =
                            (entry["at"].as_str().unwrap(), entry["what"].as_str().unwrap());
                        format!(
                            "{at} {} {} {} {what} {resolution}",
                            of("scope"),
                            of("subject"),
                            of("kind")
                        )
                    }));
                }
                let Some(cursor) = page["pagination"]["next_cursor"].as_str() else { break };
                path = format!("/api/incidents?state={state}&limit=1000&cursor={cursor}");
            }
        }
        let swept = self.came.incidents.iter().map(|entry| {
            let IncidentEntry { at, what, scope, subject, kind, resolution, .. } = entry;
            let resolution = resolution.as_deref().filter(|_| what == "resolved").unwrap_or("-");
            format!("{} {scope} {subject} {kind} {what} {resolution}", at.0)
        });
        let mut swept: Vec<String> = swept.collect();
        told.sort();
        swept.sort();
        assert_eq!(told, swept);
    }
}

/// The first instant of a sweep that is not before `at`.
fn instant_at_or_after(at: Timestamp) -> Timestamp {
    let at = at.as_millisecond();
    Timestamp::from_millisecond(at + (TICK - at.rem_euclid(TICK)) % TICK).unwrap_or(Timestamp::MAX)
}

/// All steps with their repetitions, in the order in which they happen.
fn in_order(scenario: &Scenario) -> Vec<(Timestamp, &Step)> {
    let mut all = Vec::new();
    for step in &scenario.steps {
        let every = step.repeat.map_or(i64::MAX, |repeat| i64::from(repeat.every_seconds) * 1000);
        let until = step.repeat.map_or(step.at.0, |repeat| repeat.until.0.min(scenario.end.0));
        let mut at = step.at.0;
        while at <= until {
            all.push((at, step));
            at = at.saturating_add_milliseconds(every);
        }
    }
    // The sort keeps the file's order of equal instants.
    all.sort_by_key(|(at, _)| *at);
    all
}

/// An event of which only what matters is given.
fn event(mut fields: Map<String, Value>, at: Timestamp) -> Value {
    let usual = json!({"timestamp": at, "total_files_synced": 1, "total_errors": 0});
    for (name, value) in usual.as_object().unwrap() {
        fields.entry(name).or_insert_with(|| value.clone());
    }
    Value::Object(fields)
}

/// Sends a request that the server must accept.
async fn request(driven: &DrivenServer, change: &Request) {
    let Request { method, path, body } = change;
    let mut request = driven.request(Method::from_bytes(method.as_bytes()).unwrap(), path);
    if let Some(body) = body {
        request = request.json(body);
    }
    let answer = send(request).await;
    assert!((200..300).contains(&answer.status), "{method} {path}: {}", answer.text());
}

/// The changes of states since the last one that was seen. The first evaluation of a device is none.
async fn states(driven: &DrivenServer, last_change: &mut i64) -> Vec<StateEntry> {
    let (mut before, mut newest, mut found) = (None, *last_change, Vec::new());
    loop {
        let page = driven.store.state_changes(before, 1_000).await.unwrap();
        let new: Vec<_> = page.into_iter().filter(|change| change.id > *last_change).collect();
        let Some(last) = new.last() else { break };
        before = Some(last.id);
        newest = newest.max(new[0].id);
        let changes = new.into_iter().filter(|change| change.from.is_some());
        found.extend(changes.map(|change| StateEntry {
            at: Instant(change.at),
            device_id: Some(change.device_id),
            device_ids: Vec::new(),
            state: change.to,
        }));
    }
    *last_change = newest;
    found
}

/// The API must tell the states that the sweep has found.
async fn compare_states(driven: &DrivenServer, states: &[StateEntry]) {
    let device = |entry: &StateEntry| entry.device_id.clone().unwrap();
    if states.len() <= LOOKED_UP {
        for entry in states {
            let path = format!("/api/device/{}", device(entry));
            assert_eq!(driven.get(&path).await.data(200)["status"], entry.state, "{entry:?}");
        }
        return;
    }
    let mut shown = BTreeSet::new();
    let mut path = "/api/devices?limit=1000".to_owned();
    loop {
        let page = driven.get(&path).await.data(200);
        for device in page["devices"].as_array().unwrap() {
            shown.insert(format!("{} {}", device["device_id"], device["status"]));
        }
        let Some(cursor) = page["pagination"]["next_cursor"].as_str() else { break };
        path = format!("/api/devices?limit=1000&cursor={cursor}");
    }
    for entry in states {
        let expected =
            format!("{} {}", Value::from(device(entry)), Value::from(entry.state.as_str()));
        assert!(shown.contains(&expected), "the API does not show {expected}");
    }
}

/// A message as a scenario has it, once its signature is verified.
fn message(channels: &[WebhookReceiver], received: &Received, now: Timestamp) -> MessageEntry {
    // All channels lead to one receiver, at an address of their own.
    let name = received.line.rsplit('/').next().unwrap();
    let channel = channels.iter().find(|channel| channel.name == name).expect("a known channel");
    let body = channel.verify(received, now);
    assert_eq!(body["type"], "fleet.incidents");
    let incidents = body["data"]["incidents"].as_array().unwrap();
    assert_eq!(body["data"]["incidents_total"], incidents.len(), "some incidents were left out");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let items = incidents.iter().map(|incident| MessageItem {
        event: text(&incident["event"]),
        scope: text(&incident["scope"]),
        subject: text(&incident["subject"]),
        kind: text(&incident["kind"]),
    });
    MessageEntry { at: Instant(now), channel: channel.name.clone(), items: items.collect() }
}

fn read(file: &Path) -> Scenario {
    Scenario::read(&fs::read(file).unwrap()).unwrap()
}

async fn database(is_postgres: bool) -> TestDatabase {
    if is_postgres { TestDatabase::postgres().await } else { TestDatabase::sqlite() }
}

/// Runs every third scenario, and tells all differences at once.
async fn run(share: usize, is_postgres: bool) {
    let mut differences = Vec::new();
    for file in scenarios().into_iter().skip(share).step_by(SHARES) {
        let scenario = read(&file);
        let run = Run::start(&scenario, database(is_postgres).await).await;
        let (came, database) = run.run(&scenario).await;
        database.remove().await;
        let of_this = scenario.expect.differences(&came).into_iter();
        differences.extend(of_this.map(|difference| format!("{}: {difference}", scenario.id)));
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

/// No file has a database that goes away. This one does: what was refused meanwhile excuses whoever would have reported, once.
async fn the_database_goes_away(is_postgres: bool) {
    let scenario = Scenario::from_value(json!({
        "id": "away", "title": "What was refused is no silence.",
        "start": "2026-03-02T08:59:00Z", "end": "2026-03-02T12:00:00Z",
        "channels": ["W"],
        "steps": [
            {"at": "2026-03-02T09:00:00Z", "report": {"device_ids": ["a", "b"]}},
            {"at": "2026-03-02T09:50:00Z", "database": "away"},
            {"at": "2026-03-02T10:00:00Z", "report": {"device_ids": ["a"]}},
            {"at": "2026-03-02T10:20:00Z", "database": "back"},
            {"at": "2026-03-02T11:00:00Z", "report": {"device_ids": ["a"]}}
        ],
        "expect": {
            "states": [{"at": "2026-03-02T11:50:00Z", "device_id": "b", "state": "silent"}],
            "incidents": [{
                "at": "2026-03-02T11:50:00Z", "what": "opened", "scope": "device", "subject": "b",
                "kind": "silent", "since": "2026-03-02T11:50:00Z",
            }],
            "messages": [{
                "at": "2026-03-02T11:51:00Z", "channel": "W",
                "items": [{"event": "opened", "scope": "device", "subject": "b", "kind": "silent"}],
            }],
        },
    }))
    .unwrap();
    assert_came(&scenario, is_postgres).await;
}

/// No file has routes. Reminders come at instants at which no deadline has a sweep look at anything.
async fn people_are_reminded(is_postgres: bool) {
    let message = |at: &str, event: &str| {
        json!({
            "at": at, "channel": "W",
            "items": [{"event": event, "scope": "device", "subject": "d", "kind": "failing"}],
        })
    };
    let failed = |second: u32| json!({"device_id": "d", "timestamp": format!("2026-03-02T09:00:0{second}Z"), "total_errors": 1});
    let scenario = Scenario::from_value(json!({
        "id": "reminded", "title": "Whoever was told of a failure is reminded of it.",
        "start": "2026-03-02T08:59:00Z", "end": "2026-03-02T12:00:00Z",
        "setup": [{"method": "PATCH", "path": "/api/fleet", "body": {"policy": {"expect": "nothing"}}}],
        "channels": ["W"],
        "steps": [
            // The version is that which the channel has made.
            {"at": "2026-03-02T08:59:00Z", "request": {"method": "PUT", "path": "/api/routes", "body": {
                "version": 1, "routes": [{"match": {}, "channels": [1], "remind_seconds": 3600}],
            }}},
            {"at": "2026-03-02T09:00:05Z", "batch": [failed(1), failed(2), failed(3)]},
        ],
        "expect": {
            "incidents": [{
                "at": "2026-03-02T09:00:15Z", "what": "opened", "scope": "device", "subject": "d",
                "kind": "failing", "since": "2026-03-02T09:00:01Z",
            }],
            "messages": [
                message("2026-03-02T09:01:15Z", "opened"),
                message("2026-03-02T10:01:15Z", "reminder"),
                message("2026-03-02T11:01:15Z", "reminder"),
            ],
        },
    }))
    .unwrap();
    assert_came(&scenario, is_postgres).await;
}

/// A scenario must end as it says, through a server and through a backtest.
async fn assert_came(scenario: &Scenario, is_postgres: bool) {
    let run = Run::start(scenario, database(is_postgres).await).await;
    let (came, used) = run.run(scenario).await;
    assert_eq!(scenario.expect.differences(&came), Vec::<String>::new());
    used.remove().await;
    let other = database(is_postgres).await;
    other.migrate().await;
    let store: Arc<_> = pisync::store::open(&other.target).await.unwrap();
    let came = backtest::run(scenario, &store, |_| {}).await.unwrap();
    assert_eq!(scenario.expect.differences(&came), Vec::<String>::new(), "in a backtest");
    store.close().await.unwrap();
    drop(store);
    other.remove().await;
}

macro_rules! on_both {
    ($($name:ident: $body:ident($($argument:literal)?)),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$body($($argument,)? false).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$body($($argument,)? true).await;
                }
            )+
        }
    };
}

on_both!(
    the_first_share: run(0),
    the_second_share: run(1),
    the_third_share: run(2),
    the_database_goes_away: the_database_goes_away(),
    people_are_reminded: people_are_reminded(),
);
