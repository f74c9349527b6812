//! Servers that are killed, or stand still, while they send: nothing is lost, what comes twice has the same id and the same
//! bytes, and whoever was told that it opened is told that it ended. Servers are processes, and time is real.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use pisync::{
    clock::Clock,
    fleet::sweep::sweep,
    notify::{
        courier::SystemCourier,
        dispatch::dispatch_once,
        secrets::{Secrets, SecretsKey},
        sender::{Sender, SenderSettings},
    },
    random::Randomness,
    store::{self, Store},
};
use pisync_core::Timestamp;
use serde_json::{Value, json};
use standardwebhooks::Webhook;

use crate::{
    notifications::{id, told},
    support::{
        http::{Client, failure, success, with},
        program::{Installed, Serving},
        receiver::{Gate, Received, Receiver, Reply},
        store::{Fixture, TestDatabase, on_postgres},
    },
    sweep_kills::{left, wait_until_nothing_is_left},
};

both_stores!(
    a_server_that_is_killed_while_it_sends_loses_nothing,
    incidents_and_what_is_told_of_them_are_stored_together,
);

/// How often a server is killed while it sends, unless `PISYNC_KILL_ROUNDS` says it. See CONTRIBUTING.md.
const ROUNDS: usize = 20;

/// A dead server's lease ends after 25 s, and the others look every second.
const TAKEN_OVER: Duration = Duration::from_secs(30);

/// When the only server starts again, it does not wait for the end of the lease of the one before.
const STARTED_AGAIN: Duration = Duration::from_secs(20);

/// What must happen at last may take longer on a machine that is busy, and where a dead server's lease must end before.
const PATIENCE: Duration = Duration::from_secs(90);

/// What has come to an end stays so for this long.
const QUIET: Duration = Duration::from_secs(3);

/// The key of servers that share a database.
const SECRETS_KEY: &str = "0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f";

fn present() -> Timestamp {
    Clock::system().now()
}

/// A program that may send to this machine.
pub(crate) struct Sending(Installed);

impl Fixture for Sending {
    async fn prepare(database: TestDatabase) -> Self {
        let Installed { program, database } = Installed::prepare(database).await;
        let program = program.with("NOTIFY_ALLOW", "127.0.0.0/8");
        let program = match database.file() {
            Some(_) => program,
            None => program.with("SECRETS_KEY", SECRETS_KEY),
        };
        Self(Installed { program, database })
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

impl Deref for Sending {
    type Target = Installed;

    fn deref(&self) -> &Installed {
        &self.0
    }
}

/// A channel that gets what its routes lead to.
pub(crate) async fn webhook(client: &Client, name: &str, url: &str) -> Value {
    let body = json!({"name": name, "kind": "webhook", "url": url, "default": false});
    client.post("/api/channels", &body).await.data(201)
}

/// The incidents of `groups`, or all, are told at once by these channels.
pub(crate) fn route(groups: &[String], channels: &[&Value]) -> Value {
    let channels: Vec<&Value> = channels.iter().map(|channel| &channel["id"]).collect();
    json!({
        "match": {"groups": groups}, "channels": channels, "wait_seconds": 0, "interval_seconds": 0,
    })
}

pub(crate) async fn set_routes(client: &Client, routes: &[Value]) {
    let version = client.get("/api/routes").await.data(200)["version"].take();
    client.put("/api/routes", &json!({"version": version, "routes": routes})).await.data(200);
}

/// What is reported at once.
#[derive(Default)]
pub(crate) struct Reports {
    roster: Vec<Value>,
    events: Vec<Value>,
}

impl Reports {
    /// Devices of a group, which are named after it or `name`: the first ones fail three times, the others are well.
    pub(crate) fn devices(&mut self, group: &str, name: &str, devices: usize, failing: usize) {
        for number in 0..devices {
            let device = format!("{name}-{number}");
            self.roster.push(json!({"device_id": device, "group": group}));
            if number < failing {
                self.events.extend((0..3).map(|run| {
                    let event = failure(&device, present());
                    with(event, &json!({"event_id": format!("{device}-{run}")}))
                }));
            } else {
                self.is_well(&device);
            }
        }
    }

    pub(crate) fn is_well(&mut self, device: &str) {
        self.events.push(success(device, present()));
    }

    pub(crate) async fn send(self, client: &Client) {
        if !self.roster.is_empty() {
            client.put("/api/devices", &Value::Array(self.roster)).await.data(200);
        }
        if !self.events.is_empty() {
            client.post("/api/sync-events", &Value::Array(self.events)).await.json(200);
        }
    }
}

async fn wait_until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < until, "it has not happened: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn count(database: &TestDatabase, rows: &str) -> i64 {
    database.number(&format!("(select count(*) from {rows})")).await
}

/// What was told by which messages, in the order in which each came first: event and incident, to whom, and where all the copies
/// of the message stand in what was received.
fn told_by(received: &[Received]) -> BTreeMap<(String, i64), BTreeMap<&str, Vec<usize>>> {
    let mut told_by: BTreeMap<_, BTreeMap<_, Vec<usize>>> = BTreeMap::new();
    for (place, message) in received.iter().enumerate() {
        let body = message.json();
        for incident in body["data"]["incidents"].as_array().unwrap() {
            let event = incident["event"].as_str().unwrap().to_owned();
            let of_incident = told_by.entry((event, incident["id"].as_i64().unwrap())).or_default();
            of_incident.entry(id(message)).or_default().push(place);
        }
    }
    told_by
}

/// What comes twice has the same id and the same bytes; nothing is told under two ids; and no end is told before its beginning.
fn assert_told_once(received: &[Received]) {
    let mut bodies: BTreeMap<(&str, &str), &[u8]> = BTreeMap::new();
    for message in received {
        // Each channel has messages of its own.
        let body = bodies.entry((message.line.as_str(), id(message))).or_insert(&message.body);
        assert_eq!(*body, message.body, "{}", id(message));
    }
    let told_by = told_by(received);
    for ((event, incident), messages) in &told_by {
        assert_eq!(messages.len(), 1, "{event} of {incident} is in several messages");
        if event == "resolved" {
            let opened = &told_by.get(&("opened".to_owned(), *incident));
            let opened = opened.unwrap_or_else(|| panic!("only the end of {incident} was told"));
            let last = opened.values().flatten().max();
            let first = messages.values().flatten().min();
            assert!(last < first, "the beginning of {incident} came after its end");
        }
    }
}

/// The process that holds the lease of a channel.
async fn holder(database: &TestDatabase, channel: &Value) -> Option<u32> {
    let lease = format!("select lease from channels where id = {channel} and lease is not null");
    let lease = database.texts(&lease).await.pop()?;
    lease.split_once('(')?.1.split_once(')')?.0.parse().ok()
}

/// A message that is held back when it comes: who is told of, and the gate.
type Held = Arc<Mutex<BTreeMap<String, Gate>>>;

/// What `a_server_that_is_killed_while_it_sends_loses_nothing` works with.
struct Kills<'a> {
    sending: &'a Sending,
    receiver: Receiver,
    held: Held,
    channels: Vec<Value>,
    /// One on SQLite, two on PostgreSQL.
    servers: Vec<Serving>,
}

/// How many devices a group has, and how many of them fail: too few for an incident of the group.
const DEVICES: usize = 6;
const FAILING: usize = 2;

impl Kills<'_> {
    /// Groups and channels are used again after so many rounds, when everything about the round before is over.
    const CHANNELS: usize = 40;

    fn channel(&self, round: usize) -> &Value {
        &self.channels[round % Self::CHANNELS]
    }

    fn group(round: usize) -> String {
        format!("g-{}", round % Self::CHANNELS)
    }

    /// The devices of a round report for the first time, and those of some rounds ago are well again. Answers what holds back the
    /// answer to the message about the round.
    async fn report(&self, round: usize) -> Gate {
        let mut reports = Reports::default();
        reports.devices(&Self::group(round), &format!("r{round}"), DEVICES, FAILING);
        if let Some(ended) = round.checked_sub(3) {
            Self::end(&mut reports, ended);
        }
        let gate = Gate::closed();
        self.held.lock().unwrap().insert(format!("r{round}-0"), gate.clone());
        reports.send(&self.servers[0].client).await;
        gate
    }

    fn end(reports: &mut Reports, round: usize) {
        for number in 0..FAILING {
            reports.is_well(&format!("r{round}-{number}"));
        }
    }

    /// The message about a round, once it has arrived.
    async fn opened(&self, round: usize) -> Received {
        let expected = ("opened".to_owned(), format!("r{round}-0"));
        let find = || {
            let mut received = self.receiver.received().into_iter();
            received.find(|message| told(message).contains(&expected))
        };
        wait_until("the message arrives", async || find().is_some()).await;
        find().unwrap()
    }

    /// Kills the server that has sent to a channel, between what it sent and its note of it. Another one starts, and sweeps at once.
    /// Answers whether the server was in the middle of it.
    async fn kill(&mut self, round: usize, gate: &Gate) -> bool {
        let holder = holder(&self.sending.database, &self.channel(round)["id"]).await;
        let place = self.servers.iter().position(|server| Some(server.process()) == holder);
        let killed = self.servers.remove(place.unwrap_or(0));
        if round % 2 == 1 {
            // It may get the answer, and note it, before it dies.
            gate.open();
            tokio::time::sleep(Duration::from_millis(round as u64 / 2 % 5)).await;
        }
        killed.signal("KILL");
        killed.wait();
        self.servers.push(self.sending.program.serve(&[]));
        place.is_some()
    }
}

/// In each round a group fails, a server sends the message about it to a channel of that round's own, and is killed while the
/// receiver holds the answer back, or at the moment at which it answers. Then the next round begins, with another server in its
/// place. So twenty leases of dead servers are waited for at the same time, each of them for its full time, rather than one after
/// the other. On SQLite there is nobody else to wait for.
async fn a_server_that_is_killed_while_it_sends_loses_nothing(sending: &Sending) {
    let rounds = std::env::var("PISYNC_KILL_ROUNDS")
        .map_or(ROUNDS, |rounds| rounds.parse().expect("PISYNC_KILL_ROUNDS"));
    let Installed { program, database } = &**sending;
    program.run(&["db", "setup"]).success();
    let held = Held::default();
    let gates = Arc::clone(&held);
    let receiver = Receiver::start(move |request| {
        let mut opened = told(request).into_iter().filter(|(event, _)| event == "opened");
        // Only the first time.
        let mut gates = gates.lock().unwrap();
        let gate = opened.find_map(|(_, subject)| gates.remove(&subject));
        let answer = Reply::status("204 No Content");
        gate.map_or(answer.clone(), |gate| Reply::Behind(gate, Box::new(answer)))
    })
    .await;
    let mut kills =
        Kills { sending, receiver, held, channels: Vec::new(), servers: vec![program.serve(&[])] };
    let client = kills.servers[0].client.clone();
    let mut routes = Vec::new();
    for number in 0..(rounds + 1).min(Kills::CHANNELS) {
        let url = kills.receiver.url(&format!("/{number}"));
        let channel = webhook(&client, &format!("w-{number}"), &url).await;
        routes.push(route(&[Kills::group(number)], &[&channel]));
        kills.channels.push(channel);
    }
    set_routes(&client, &routes).await;
    let mut gate = kills.report(0).await;
    if database.file().is_some() {
        kills.servers.remove(0).stop();
    }
    kills.servers.push(program.serve(&[]));

    // Rounds in which the server died for certain before it could note anything: the message, and when.
    let (mut killed, mut middles) = (Vec::new(), 0);
    for round in 0..rounds {
        let message = kills.opened(round).await;
        let next = kills.report(round + 1).await;
        let was_sending = kills.kill(round, &gate).await;
        gate = next;
        middles += usize::from(was_sending);
        if was_sending && round % 2 == 0 {
            killed.push((id(&message).to_owned(), Instant::now()));
        }
    }
    assert!(middles * 4 >= rounds * 3, "{middles} of {rounds} kills came while a server sent");

    // Everybody is well at last. Whoever starts sweeps.
    gate.open();
    kills.opened(rounds).await;
    let mut reports = Reports::default();
    for round in rounds.saturating_sub(3)..=rounds {
        Kills::end(&mut reports, round);
    }
    reports.send(&kills.servers[0].client).await;
    kills.servers.remove(0).stop();
    kills.servers.push(program.serve(&[]));
    let incidents = i64::try_from((rounds + 1) * FAILING).unwrap();
    wait_until("everything has ended", async || {
        count(database, "incidents where resolved_at is not null").await == incidents
    })
    .await;
    wait_until("everything was told", async || {
        count(database, "notifications where state = 'pending'").await == 0
    })
    .await;
    let received = kills.receiver.received();
    tokio::time::sleep(QUIET).await;
    assert_eq!(kills.receiver.received().len(), received.len(), "something came once more");

    assert_told_once(&received);
    let told_by = told_by(&received);
    let told: BTreeSet<_> = told_by.keys().cloned().collect();
    let ids = database.texts("select cast(id as text) from incidents").await;
    let ids = ids.iter().map(|id| id.parse::<i64>().unwrap());
    let expected: BTreeSet<_> =
        ids.flat_map(|id| ["opened", "resolved"].map(|event| (event.to_owned(), id))).collect();
    assert_eq!(told, expected);
    for (message, at) in &killed {
        let copies: Vec<_> = received.iter().filter(|copy| id(copy) == message).collect();
        assert!(copies.len() >= 2, "{message} did not come again");
        let limit = if sending.is_postgres() { TAKEN_OVER } else { STARTED_AGAIN };
        let after = copies[1].at.saturating_duration_since(*at);
        assert!(after < limit, "{message} came again after {after:?}");
    }
    // A signature counts for five minutes.
    let recent = received.iter().filter(|message| message.at.elapsed() < Duration::from_secs(240));
    for message in recent {
        let number: usize = message.line.rsplit_once('/').unwrap().1.parse().unwrap();
        let secret = kills.channels[number]["signing_secret"].as_str().unwrap();
        Webhook::new(secret).unwrap().verify(&message.body, &message.headers).unwrap();
    }
    let items = count(database, "notification_items").await;
    assert_eq!(items, 2 * incidents);
    assert_eq!(count(database, "notifications where state <> 'sent'").await, 0);
    let messages: BTreeSet<_> = received.iter().map(id).collect();
    eprintln!(
        "{rounds} kills, {middles} of them while a server sent: {incidents} incidents in {} messages, {} doubles",
        messages.len(),
        received.len() - messages.len()
    );
    for server in kills.servers {
        server.stop();
    }
}

/// Groups that come in each round, and the devices of each. Of every other round's groups few fail: those have incidents of
/// devices, the others of groups.
const GROUPS: usize = 10;
const MANY: usize = 10;
const FEW: usize = 3;

fn group_of(round: usize, group: usize) -> String {
    format!("r{round}-g{group}")
}

/// The incidents and what is told of them contradict each other nowhere.
async fn assert_consistent(database: &TestDatabase) {
    const BEGUN: &str = "
        exists (select 1 from notification_items t join notifications n on n.id = t.notification
                 where t.incident = i.id and t.what <> 'resolved' and n.state <> 'dropped')
    ";
    const TOLD: &str = "
        exists (select 1 from notification_items t join notifications n on n.id = t.notification
                 where t.incident = i.id and t.what <> 'resolved' and n.frozen_at is not null)
    ";
    const ENDED: &str = "
        exists (select 1 from notification_items t where t.incident = i.id and t.what = 'resolved')
    ";
    for (what, rows) in [
        (
            "incidents that nobody is told of",
            format!("incidents i where resolved_at is null and not {BEGUN}"),
        ),
        (
            "incidents whose end nobody is told of who was told of them",
            format!("incidents i where resolution <> 'merged' and {TOLD} and not {ENDED}"),
        ),
        (
            "incidents of which only the end is told",
            format!("incidents i where {ENDED} and not {TOLD}"),
        ),
        (
            "incidents that ended before anybody was told, and are told",
            format!("incidents i where resolved_at is not null and {BEGUN} and not {TOLD}"),
        ),
        (
            "incidents that another took over, and whose end is told",
            format!("incidents i where resolution = 'merged' and {ENDED}"),
        ),
        (
            "things that are told twice",
            "(select 1 from notification_items group by incident, what having count(*) > 1) twice"
                .to_owned(),
        ),
    ] {
        assert_eq!(count(database, &rows).await, 0, "{what}");
    }
}

/// As in `sweep_kills`, servers are killed in the middle of sweeps, with incidents that open and end. Whatever was stored of an
/// incident, its message was stored with it.
async fn incidents_and_what_is_told_of_them_are_stored_together(sending: &Sending) {
    const KILLS: usize = 10;
    let Installed { program, database } = &**sending;
    program.run(&["db", "setup"]).success();
    let receiver = Receiver::start(|_| Reply::status("204 No Content")).await;
    let mut beside = Some(program.serve(&[]));
    let client = beside.as_ref().unwrap().client.clone();
    let channel = webhook(&client, "ops", &receiver.url("/hook")).await;
    set_routes(&client, &[route(&[], &[&channel])]).await;
    let mut delay = Duration::from_millis(100);
    let mut middles = 0;
    for round in 0..KILLS {
        let serving = beside.take().unwrap_or_else(|| program.serve(&[]));
        let mut reports = Reports::default();
        for group in 0..GROUPS {
            let name = group_of(round, group);
            let failing = if round % 2 == 0 { FEW } else { MANY };
            reports.devices(&name, &name, MANY, failing);
            // Half of all devices are well, so that the fleet is.
            reports.devices(&format!("fine-{round}"), &format!("fine-{name}"), MANY, 0);
            if let Some(ended) = round.checked_sub(2) {
                for number in 0..MANY {
                    reports.is_well(&format!("{}-{number}", group_of(ended, group)));
                }
            }
        }
        reports.send(&serving.client).await;
        if sending.is_postgres() {
            beside = Some(serving);
        } else {
            serving.signal("KILL");
            serving.wait();
        }
        let before = left(database).await;
        let doomed = program.serve(&[]);
        tokio::time::sleep(delay).await;
        doomed.signal("KILL");
        doomed.wait();
        let after = left(database).await;
        middles += usize::from((1..before).contains(&after));
        delay = if after == 0 { delay.mul_f64(0.7) } else { delay.mul_f64(1.2) };
    }
    assert!(middles >= 1, "no kill came in the middle of a sweep");
    let serving = program.serve(&[]);
    wait_until_nothing_is_left(database).await;
    assert_consistent(database).await;
    let open = count(database, "incidents where resolved_at is null").await;
    assert!(open >= i64::try_from(GROUPS * FEW).unwrap(), "{open}");

    let mut reports = Reports::default();
    for round in KILLS - 2..KILLS {
        for group in 0..GROUPS {
            for number in 0..MANY {
                reports.is_well(&format!("{}-{number}", group_of(round, group)));
            }
        }
    }
    reports.send(&serving.client).await;
    serving.stop();
    let serving = program.serve(&[]);
    wait_until("everything has ended and was told", async || {
        count(database, "incidents where resolved_at is null").await == 0
            && count(database, "notifications where state = 'pending'").await == 0
    })
    .await;
    assert_consistent(database).await;
    let received = receiver.received();
    assert_told_once(&received);
    let told: BTreeSet<_> = told_by(&received)
        .into_keys()
        .map(|(event, incident)| format!("{incident} {event}"))
        .collect();
    let items = "select cast(incident as text) || ' ' || what from notification_items";
    let items: BTreeSet<_> = database.texts(items).await.into_iter().collect();
    assert_eq!(told, items);
    for server in beside.into_iter().chain([serving]) {
        server.stop();
    }
}

/// A server stands still while it sends, for longer than its lease. The other one sends in its place, and what the first one makes
/// of its attempt when it wakes up counts no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stood_still_while_it_sent_harms_nothing() {
    on_postgres(async |sending: &Sending| {
        let Installed { program, database } = &**sending;
        program.run(&["db", "setup"]).success();
        let gate = Gate::closed();
        let is_first = AtomicBool::new(true);
        let first = gate.clone();
        let receiver = Receiver::start(move |_| {
            let answer = Reply::status("204 No Content");
            if is_first.swap(false, Ordering::SeqCst) {
                Reply::Behind(first.clone(), Box::new(answer))
            } else {
                answer
            }
        })
        .await;
        let servers = [program.serve(&[]), program.serve(&[])];
        let client = servers[0].client.clone();
        let channel = webhook(&client, "ops", &receiver.url("/hook")).await;
        set_routes(&client, &[route(&[], &[&channel])]).await;
        let mut reports = Reports::default();
        reports.devices("school", "pi", DEVICES, 1);
        reports.send(&client).await;
        let store = store::open(&database.target).await.unwrap();
        sweep_until(&*store, database, 1).await;

        wait_until("the message arrives", async || !receiver.received().is_empty()).await;
        let holder = holder(database, &channel["id"]).await.unwrap();
        let [one, two] = servers;
        let (still, other) = if one.process() == holder { (one, two) } else { (two, one) };
        assert_eq!(still.process(), holder);
        still.signal("STOP");
        let stopped = Instant::now();
        // Its answer is there when it wakes up.
        gate.open();
        wait_until("the other one sends it", async || receiver.received().len() >= 2).await;
        assert!(stopped.elapsed() < TAKEN_OVER, "after {:?}", stopped.elapsed());
        // It goes on to send while the first one stands still.
        let mut reports = Reports::default();
        reports.devices("school-2", "pi-2", DEVICES, 1);
        reports.send(&other.client).await;
        sweep_until(&*store, database, 2).await;
        wait_until("the other one sends more", async || receiver.received().len() >= 3).await;

        still.signal("CONT");
        let mut reports = Reports::default();
        reports.is_well("pi-0");
        reports.is_well("pi-2-0");
        reports.send(&still.client).await;
        sweep_until(&*store, database, 0).await;
        wait_until("everything was told", async || {
            count(database, "notifications where state <> 'sent'").await == 0
                && count(database, "notifications").await == 4
        })
        .await;
        tokio::time::sleep(QUIET).await;
        let received = receiver.received();
        assert_eq!(received.len(), 5, "one of them twice");
        assert_eq!(id(&received[0]), id(&received[1]));
        assert_told_once(&received);
        // Nothing of its attempt was noted.
        assert_eq!(count(database, "notifications where attempts <> 1").await, 0);
        assert_eq!(
            count(database, "channels where failures > 0 or last_error is not null").await,
            0
        );
        store.close().await.unwrap();
        still.stop();
        other.stop();
    })
    .await;
}

/// Sweeps until so many incidents are open.
async fn sweep_until(store: &dyn Store, database: &TestDatabase, open: i64) {
    wait_until("the sweep", async || {
        sweep(store, present()).await.unwrap();
        count(database, "incidents where resolved_at is null").await == open
    })
    .await;
}

/// Two servers, and beside them two that look for messages all the time, send to the same channels.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_send_at_once_send_each_message_once_and_in_order() {
    const CHANNELS: usize = 3;
    const WAVES: usize = 5;
    const GROUPS: usize = 10;
    /// That of webhooks is 200 ms. What arrives on a busy machine is noticed late.
    const SPACING: Duration = Duration::from_millis(100);
    on_postgres(async |sending: &Sending| {
        let Installed { program, database } = &**sending;
        program.run(&["db", "setup"]).success();
        let servers = [program.serve(&[]), program.serve(&[])];
        let client = servers[0].client.clone();
        let (mut receivers, mut channels) = (Vec::new(), Vec::new());
        for number in 0..CHANNELS {
            let receiver = Receiver::start(|_| Reply::status("204 No Content")).await;
            let url = receiver.url("/hook");
            channels.push(webhook(&client, &format!("w-{number}"), &url).await);
            receivers.push(receiver);
        }
        set_routes(&client, &[route(&[], &channels.iter().collect::<Vec<_>>())]).await;
        let store = store::open(&database.target).await.unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let dispatchers: Vec<_> = (0..2)
            .map(|number| {
                let (store, is_over) = (Arc::clone(&store), Arc::clone(&is_over));
                let courier = courier(&database.target);
                tokio::spawn(async move {
                    while !is_over.load(Ordering::SeqCst) {
                        let name = format!("beside-{number}");
                        dispatch_once(&*store, &courier, &Clock::system(), &name).await.unwrap();
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                })
            })
            .collect();
        let mut open = 0;
        for wave in 0..WAVES {
            let mut reports = Reports::default();
            for group in 0..GROUPS {
                let name = group_of(wave, group);
                reports.devices(&name, &name, DEVICES, FAILING);
                open += FAILING;
            }
            reports.send(&client).await;
            sweep_until(&*store, database, i64::try_from(open).unwrap()).await;
        }
        // Some of those that end were told of by then, and some were not.
        wait_until("half of the groups were told of", async || {
            receivers[0].received().len() >= WAVES * GROUPS / 2
        })
        .await;
        let mut reports = Reports::default();
        for wave in [0, WAVES - 1] {
            for group in 0..GROUPS {
                for number in 0..FAILING {
                    reports.is_well(&format!("{}-{number}", group_of(wave, group)));
                }
                open -= FAILING;
            }
        }
        reports.send(&client).await;
        sweep_until(&*store, database, i64::try_from(open).unwrap()).await;
        wait_until("everything was told", async || {
            count(database, "notifications where state = 'pending'").await == 0
        })
        .await;
        is_over.store(true, Ordering::SeqCst);
        for dispatcher in dispatchers {
            dispatcher.await.unwrap();
        }
        for (receiver, channel) in receivers.iter().zip(&channels) {
            let received = receiver.received();
            assert_told_once(&received);
            let events: Vec<_> = received.iter().flat_map(told).collect();
            let number = |word: &str| events.iter().filter(|(event, _)| event == word).count();
            // What ended before its message was made is not told.
            assert_eq!(number("opened") - number("resolved"), open);
            assert!(number("resolved") >= GROUPS * FAILING);
            assert!(number("opened") < WAVES * GROUPS * FAILING);
            let made = format!(
                "select cast(id as text) from notifications
                  where channel = {} and state = 'sent' order by frozen_at, id",
                channel["id"]
            );
            let made = database.texts(&made).await;
            let came = received.iter().map(|message| id(message).rsplit_once('_').unwrap().1);
            assert_eq!(came.collect::<Vec<_>>(), made, "in order, and none twice");
            for pair in received.windows(2) {
                let apart = pair[1].at - pair[0].at;
                assert!(apart >= SPACING, "{apart:?} after {}", id(&pair[0]));
            }
        }
        assert_eq!(count(database, "notifications where attempts > 1").await, 0);
        let deadlocks =
            "(select deadlocks from pg_stat_database where datname = current_database())";
        assert_eq!(database.number(deadlocks).await, 0);
        for server in servers {
            server.stop();
        }
        store.close().await.unwrap();
    })
    .await;
}

/// What sends for a server of the test's own process.
fn courier(target: &store::Target) -> SystemCourier {
    let allowed = vec!["127.0.0.0/8".parse().unwrap()];
    let key = SecretsKey::parse(SECRETS_KEY).unwrap();
    SystemCourier {
        sender: Sender::new(SenderSettings { allowed, ..SenderSettings::default() }).unwrap(),
        secrets: Secrets::of(target, Some(key), Randomness::system()),
        base_url: None,
        clock: Clock::system(),
    }
}
