//! Lanes: who may send to a channel and when, a receiver that is away for a day, and channels that hang. `notification_kills` has
//! what happens when servers die.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pisync::{
    fleet::sweep::sweep,
    notify::dispatch::{Courier, OpenChannel, dispatch_once},
    store::{
        Attempt, ChannelCreation, FrozenText, Lane, MessageFacts, MessageText, NewChannel,
        NewConfig, OutgoingMessage, Store, Target,
    },
};
use pisync_core::Timestamp;
use serde_json::{Value, json};

use crate::{
    notification_kills::{Reports, Sending, route, set_routes, webhook},
    notifications::{Telling, WAIT, arrived, id, poll, told},
    support::{
        events::{at, failure as failed, somebody, write_at},
        http::{failure, success},
        postgres::connect,
        program::Installed,
        receiver::{Received, Receiver, Reply},
        server::TestClock,
        store::{TestStore, on_postgres},
    },
};

both_stores!(
    a_receiver_that_is_away_for_a_day_gets_everything_in_bundles,
    a_server_that_stood_still_takes_its_lease_anew_before_it_sends,
    a_channel_that_waits_is_given_to_nobody_before,
    what_was_sent_is_noted_however_late,
    what_a_killed_server_held_is_given_back_where_there_is_one_server,
    channels_that_hang_delay_nobody,
);

/// Groups, and the devices of each that are always well.
const GROUPS: usize = 8;
const WELL: usize = 30;

/// A day has so many half hours.
const HALVES: usize = 48;

/// In each of them, so many devices fail. The last of them stays so, and the others are well again an hour later.
const FAILING: usize = 6;
const HOUR: usize = 2;

fn group_of(half: usize) -> String {
    format!("school-{}", half % GROUPS)
}

fn device(half: usize, number: usize) -> String {
    format!("pi-{half:02}-{number}")
}

/// A fleet of which nobody is ever silent.
async fn register(fixture: &Telling) {
    let patient = json!({"policy": {
        "expect": {"every_seconds": 30 * 86_400}, "first_report_seconds": 30 * 86_400,
    }});
    fixture.patch("/api/fleet", &patient).await.data(200);
    let (mut roster, mut events) = (Vec::new(), Vec::new());
    for half in 0..HALVES {
        for number in 0..FAILING {
            let device = device(half, number);
            roster.push(json!({"device_id": device, "group": group_of(half)}));
        }
    }
    for number in 0..GROUPS * WELL {
        let device = format!("well-{number}");
        roster.push(json!({"device_id": device, "group": group_of(number)}));
        events.push(success(&device, fixture.clock.now()));
    }
    fixture.put("/api/devices", &Value::Array(roster)).await.data(200);
    fixture.post("/api/sync-events", &Value::Array(events)).await.json(200);
}

/// The incidents that a half hour opens and ends.
async fn half_hour_begins(fixture: &Telling, half: usize) {
    let now = fixture.clock.now();
    let ago = |seconds: i64| now.saturating_add_milliseconds(-seconds * 1000);
    let mut events = Vec::new();
    for number in 0..FAILING {
        events.extend((1..=3).rev().map(|second| failure(&device(half, number), ago(second))));
    }
    if let Some(ended) = half.checked_sub(HOUR) {
        events.extend((0..FAILING - 1).map(|number| success(&device(ended, number), now)));
    }
    fixture.post("/api/sync-events", &Value::Array(events)).await.json(200);
    // A read waits until what was reported can be read.
    fixture.get(&format!("/api/device/{}", device(half, 0))).await.data(200);
    let open = half + 1 + (FAILING - 1) * HOUR.min(half + 1);
    let open = i64::try_from(open).unwrap();
    poll(async || {
        sweep(&*fixture.store, fixture.clock.now()).await.unwrap();
        let found =
            "(select count(*) from incidents where resolved_at is null and scope <> 'channel')";
        (fixture.database.number(found).await == open).then_some(())
    })
    .await;
}

/// The messages of a channel that wait, in the order in which they are due.
async fn waiting(fixture: &Telling, channel: &Value) -> Vec<String> {
    let path = format!("/api/notifications?channel={channel}&state=pending");
    let found = fixture.get(&path).await.data(200)["notifications"].take();
    let mut found: Vec<_> = found
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["due_at"].to_string(), one["id"].as_i64(), one["message_id"].clone()))
        .collect();
    found.sort_by(|left, right| (&left.0, left.1).cmp(&(&right.0, right.1)));
    found.into_iter().map(|(.., message)| message.as_str().unwrap().to_owned()).collect()
}

/// Nearly 300 incidents open while it is away, and most of them end. It gets one message for each group, and the one that was on
/// its way when it went.
async fn a_receiver_that_is_away_for_a_day_gets_everything_in_bundles(fixture: &Telling) {
    let is_away = Arc::new(AtomicBool::new(true));
    let attempts = AtomicUsize::new(0);
    let away = Arc::clone(&is_away);
    let receiver = Receiver::start(move |_| {
        let attempt = attempts.fetch_add(1, Ordering::SeqCst);
        match away.load(Ordering::SeqCst) {
            true if attempt.is_multiple_of(2) => Reply::status("503 Service Unavailable"),
            true => Reply::Close,
            false => Reply::status("204 No Content"),
        }
    })
    .await;
    let beside = Receiver::start(|_| Reply::status("204 No Content")).await;
    let channel = fixture.webhook("ops", &receiver).await["id"].clone();
    fixture.webhook("beside", &beside).await;
    register(fixture).await;
    for half in 0..HALVES {
        half_hour_begins(fixture, half).await;
        if half == 0 {
            fixture.pass(WAIT);
            arrived(&receiver, 1).await;
            fixture.pass(30 * 60 - WAIT);
        } else {
            fixture.pass(30 * 60);
        }
        // Later attempts are further apart.
        if half < 4 {
            arrived(&receiver, half + 2).await;
        }
    }
    let tried = receiver.received();
    let waiting = waiting(fixture, &channel).await;
    assert!(tried.iter().all(|one| id(one) == waiting[0] && one.body == tried[0].body));
    // Others are told of the channel itself.
    poll(async || {
        let events = beside.received().iter().flat_map(told).collect::<Vec<_>>();
        events.contains(&("opened".to_owned(), "ops".to_owned())).then_some(())
    })
    .await;

    is_away.store(false, Ordering::SeqCst);
    // The longest pause between two attempts.
    fixture.pass(10 * 3_600);
    poll(async || {
        let shown = fixture.get(&format!("/api/channel/{channel}")).await.data(200);
        (shown["waiting"] == 0 && shown["state"] == "ok").then_some(())
    })
    .await;
    let received = receiver.received();
    let mut came: Vec<&str> = received.iter().map(id).collect();
    came.dedup();
    assert_eq!(came, waiting, "in order, and none twice");
    assert_eq!(came.len(), 1 + GROUPS, "one for each group, and the first one");
    let messages: Vec<&Received> = came
        .iter()
        .map(|message| received.iter().find(|one| id(one) == *message).unwrap())
        .collect();
    assert_eq!(groups(&messages[1..]).len(), GROUPS);

    let events: Vec<_> = messages.iter().flat_map(|message| told(message)).collect();
    let expected: BTreeSet<_> = (0..HALVES)
        .flat_map(|half| (0..FAILING).map(move |number| (half, number)))
        .flat_map(|(half, number)| {
            let is_open = number == FAILING - 1 || half >= HALVES - HOUR;
            let was_told = half == 0;
            let opened = (is_open || was_told).then(|| ("opened".to_owned(), device(half, number)));
            let ended =
                (!is_open && was_told).then(|| ("resolved".to_owned(), device(half, number)));
            opened.into_iter().chain(ended)
        })
        .collect();
    assert_eq!(events.len(), expected.len(), "something was told twice");
    assert_eq!(events.into_iter().collect::<BTreeSet<_>>(), expected);
    // That the channel works again is told where it was told that it did not, and nowhere else.
    poll(async || {
        sweep(&*fixture.store, fixture.clock.now()).await.unwrap();
        let failing =
            "(select count(*) from incidents where resolved_at is null and scope = 'channel')";
        (fixture.database.number(failing).await == 0).then_some(())
    })
    .await;
    fixture.pass(WAIT);
    poll(async || {
        let events = beside.received().iter().flat_map(told).collect::<Vec<_>>();
        events.contains(&("resolved".to_owned(), "ops".to_owned())).then_some(())
    })
    .await;
    assert_eq!(receiver.received().len(), received.len());
}

fn groups(messages: &[&Received]) -> BTreeSet<String> {
    messages.iter().map(|message| message.json()["data"]["group"].to_string()).collect()
}

/// A courier that notes what it is handed. Making a text and sending it take some of the test's time.
#[derive(Clone)]
struct Slow {
    clock: TestClock,
    text_takes: i64,
    sending_takes: i64,
    outcome: Attempt,
    /// Another server tries to send when this one has nearly sent.
    beside: Option<Arc<dyn Store>>,
    sent: Arc<Mutex<Vec<OutgoingMessage>>>,
}

impl Slow {
    fn new(clock: &TestClock, outcome: Attempt) -> Self {
        let sent = Arc::default();
        Self { clock: clock.clone(), text_takes: 0, sending_takes: 0, outcome, beside: None, sent }
    }

    fn pass(&self, seconds: i64) {
        self.clock.set(self.clock.now().saturating_add_milliseconds(seconds * 1000));
    }

    fn sent(&self) -> usize {
        self.sent.lock().unwrap().len()
    }
}

impl Courier for Slow {
    fn open(&self, _: &Lane) -> Result<Box<dyn OpenChannel>, String> {
        Ok(Box::new(self.clone()))
    }
}

#[async_trait]
impl OpenChannel for Slow {
    fn text(&self) -> Arc<dyn MessageText> {
        Arc::new(self.clone())
    }

    async fn deliver(&self, message: &OutgoingMessage) -> Attempt {
        self.sent.lock().unwrap().push(message.clone());
        self.pass(self.sending_takes);
        if let Some(store) = &self.beside {
            let other = Self { beside: None, ..self.clone() };
            dispatch_once(&**store, &other, &self.clock.clock(), "b").await.unwrap();
        }
        self.outcome.clone()
    }
}

impl MessageText for Slow {
    fn text(&self, _: &MessageFacts) -> FrozenText {
        self.pass(self.text_takes);
        FrozenText { content_type: "text/plain".to_owned(), body: b"text".to_vec(), plain: None }
    }
}

const DELIVERED: Attempt = Attempt::Delivered(Duration::ZERO);

/// A channel, and an incident of which it is told 75 s after the tests' present.
async fn prepared(fixture: &TestStore) -> i64 {
    let channel = NewChannel {
        name: "ops".to_owned(),
        kind: "webhook".to_owned(),
        config: NewConfig { public: json!({}), secrets: None },
        is_enabled: true,
        is_default: Some(true),
        template: None,
    };
    let created = fixture.store.create_channel(&channel, &somebody()).await.unwrap();
    let ChannelCreation::Created(id) = created else { panic!("{created:?}") };
    let failures = (1..=5).map(|second| failed("pi", at(second))).collect();
    write_at(&mut *fixture.writer(), at(10), failures).await;
    assert_eq!(sweep(&*fixture.store, at(15)).await.unwrap().events.len(), 1);
    id
}

const DUE: i64 = 75;

async fn next(store: &dyn Store, lane: &Lane, now: Timestamp) -> Option<OutgoingMessage> {
    let settings = Arc::new(store.fleet_settings().await.unwrap());
    let text: Arc<dyn MessageText> = Arc::new(Slow::new(&TestClock::at(now), DELIVERED));
    store.next_message(lane, &settings, &text, now).await.unwrap()
}

async fn a_server_that_stood_still_takes_its_lease_anew_before_it_sends(fixture: &TestStore) {
    let store = &*fixture.store;
    prepared(fixture).await;
    let clock = TestClock::at(at(DUE));
    let slow = Slow {
        text_takes: 30,
        sending_takes: 20,
        beside: Some(Arc::clone(&fixture.store)),
        ..Slow::new(&clock, DELIVERED)
    };
    dispatch_once(store, &slow, &clock.clock(), "a").await.unwrap();
    assert_eq!(slow.sent(), 1, "another server sent it, too");
    assert_eq!(clock.now(), at(DUE + 50));
    let sent = "(select count(*) from notifications where state = 'sent' and attempts = 1)";
    assert_eq!(fixture.database.number(sent).await, 1);
}

/// Another server may have found the channel to be due before the pause began.
async fn a_channel_that_waits_is_given_to_nobody_before(fixture: &TestStore) {
    let store = &*fixture.store;
    let channel = prepared(fixture).await;
    let clock = TestClock::at(at(DUE));
    let lease = async |holder: &str, second: i64| {
        let lane = store.lease_channel(channel, holder, at(second)).await.unwrap();
        if let Some(lane) = &lane {
            store.release_channel(lane).await.unwrap();
        }
        lane.is_some()
    };
    // It does not work, and is tried again after five seconds.
    let outcome = Attempt::ChannelFailed { error: "no".to_owned(), retry_after: None, spread: 1.0 };
    let failing = Slow::new(&clock, outcome);
    dispatch_once(store, &failing, &clock.clock(), "a").await.unwrap();
    assert_eq!(failing.sent(), 1);
    assert!(!lease("b", DUE + 4).await && !lease("a", DUE + 4).await);
    assert!(lease("b", DUE + 5).await);
    // It works, and wants to be left alone for five seconds. Who has it, and has waited, goes on.
    clock.set(at(DUE + 5));
    let spaced = Slow::new(&clock, Attempt::Delivered(Duration::from_secs(5)));
    dispatch_once(store, &spaced, &clock.clock(), "b").await.unwrap();
    assert_eq!(spaced.sent(), 1);
    assert!(!lease("a", DUE + 9).await);
    let lane = store.lease_channel(channel, "a", at(DUE + 10)).await.unwrap().unwrap();
    assert_eq!(lane.leased_until, at(DUE + 35));
    assert!(!lease("b", DUE + 34).await);
    assert!(store.lease_channel(channel, "a", at(DUE + 34)).await.unwrap().is_some());
    assert!(!lease("b", DUE + 58).await && lease("b", DUE + 59).await);
}

/// As long as nobody else had the channel, and also when it was disabled meanwhile: the receiver has the message.
async fn what_was_sent_is_noted_however_late(fixture: &TestStore) {
    let store = &*fixture.store;
    let channel = prepared(fixture).await;
    let lane = store.lease_channel(channel, "a", at(DUE)).await.unwrap().unwrap();
    let message = next(store, &lane, at(DUE)).await.unwrap();
    let is_enabled = if fixture.is_postgres() { "false" } else { "0" };
    fixture.database.execute(&format!("update channels set is_enabled = {is_enabled}")).await;
    let noted = store.end_attempt(&lane, &message, &DELIVERED, at(DUE + 600)).await.unwrap();
    assert!(noted);
    let sent = "(select count(*) from notifications where state = 'sent')";
    assert_eq!(fixture.database.number(sent).await, 1);
    // Nothing more is sent by a lease that has ended.
    assert_eq!(next(store, &lane, at(DUE + 600)).await, None);
}

async fn what_a_killed_server_held_is_given_back_where_there_is_one_server(fixture: &TestStore) {
    let store = &*fixture.store;
    let channel = prepared(fixture).await;
    assert!(store.lease_channel(channel, "a", at(DUE)).await.unwrap().is_some());
    assert!(store.due_channels(at(DUE + 1)).await.unwrap().is_empty());
    store.forget_leases().await.unwrap();
    let expected = if fixture.is_postgres() { Vec::new() } else { vec![channel] };
    assert_eq!(store.due_channels(at(DUE + 1)).await.unwrap(), expected);
}

/// A sweep changes incidents and then locks their messages. Whoever sends locks a message first. Neither waits for the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sends_does_not_wait_for_a_sweep_that_waits_for_it() {
    on_postgres(async |fixture: &TestStore| {
        let store = &*fixture.store;
        let channel = prepared(fixture).await;
        let Target::Postgres(target) = fixture.target() else { panic!() };
        let sweeping = connect(&target.config).await;
        // It adds a message for another group: the channel is not its own for that.
        let add = format!(
            "begin;
             insert into notifications (channel, kind, \"group\", state, created_at, due_at)
             values ({channel}, 'incidents', 'other', 'pending', now(), now() + interval '9 years')"
        );
        sweeping.batch_execute(&add).await.unwrap();
        let lane = store.lease_channel(channel, "a", at(DUE)).await.unwrap().unwrap();
        assert!(next(store, &lane, at(DUE)).await.is_some());
        let lane = store.lease_channel(channel, "a", at(DUE + 1)).await.unwrap().unwrap();
        sweeping.batch_execute("rollback").await.unwrap();

        // Back to where its text was not made.
        let thaw = "update notifications set frozen_at = null, content_type = null, body = null";
        fixture.database.execute(thaw).await;
        sweeping.batch_execute("begin; update incidents set summary = summary").await.unwrap();
        let started = Instant::now();
        assert_eq!(next(store, &lane, at(DUE + 1)).await, None);
        assert!(started.elapsed() < Duration::from_secs(5));
        // What it had locked is free again, once it has rolled back.
        let lock = "set local lock_timeout = '5s'; select from notifications for update";
        sweeping.batch_execute(lock).await.unwrap();
        sweeping.batch_execute("rollback").await.unwrap();
        assert!(next(store, &lane, at(DUE + 1)).await.is_some());
    })
    .await;
}

/// Of 200 channels, 199 hang in one way or another. The last one is told as if it were alone, and what the others answer is not
/// kept.
async fn channels_that_hang_delay_nobody(sending: &Sending) {
    const CHANNELS: usize = 200;
    /// Looking each second, and preparing 200 messages with a program that is not optimized.
    const SOON: Duration = Duration::from_secs(12);
    const GROWTH: usize = 64 << 20;
    let Installed { program, .. } = &**sending;
    program.run(&["db", "setup"]).success();
    let hanging = Receiver::start(|request| match request.line.as_str() {
        "POST /0" => Reply::Stall,
        "POST /1" => Reply::Drip("HTTP/1.1 204 No Content\r\nx-slow: "),
        "POST /2" => Reply::StallWithin("503 Service Unavailable"),
        _ => Reply::Endless("503 Service Unavailable"),
    })
    .await;
    let receiver = Receiver::start(|_| Reply::status("204 No Content")).await;
    let serving = program.serve(&[]);
    let client = &serving.client;
    let mut channels = Vec::new();
    for number in 1..CHANNELS {
        let url = hanging.url(&format!("/{}", number % 4));
        channels.push(webhook(client, &format!("hangs-{number}"), &url).await);
    }
    channels.push(webhook(client, "works", &receiver.url("/hook")).await);
    set_routes(client, &[route(&[], &channels.iter().collect::<Vec<_>>())]).await;
    let before = serving.memory();
    let mut reports = Reports::default();
    reports.devices("school", "pi", 6, 2);
    reports.send(client).await;
    // They do not keep the server from its other work, either: whoever wants to read finds a connection.
    let mut most = 0;
    poll(async || {
        let metrics = client.get("/metrics").await;
        let waiting = metrics
            .text()
            .lines()
            .find_map(|line| line.strip_prefix("pisync_database_connections{state=\"waiting\"} "));
        most = most.max(waiting.unwrap().parse::<usize>().unwrap());
        (!receiver.received().is_empty()).then_some(())
    })
    .await;
    assert!(most < 10, "{most} waited for a connection");
    let first = hanging.received()[0].at;
    let after = receiver.only().at.saturating_duration_since(first);
    assert!(after < SOON, "it was told {after:?} after the first one");
    poll(async || (hanging.received().len() >= CHANNELS - 1).then_some(())).await;
    let growth = serving.memory().saturating_sub(before);
    assert!(growth < GROWTH, "{growth} bytes");
    poll(async || {
        let waiting = client.get("/api/notifications?state=pending&limit=1").await.data(200);
        (waiting["pagination"]["total"] == CHANNELS - 1).then_some(())
    })
    .await;
    serving.stop();
}
