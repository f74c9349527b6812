//! Messages on their way: through a whole server to receivers that work, fail, refuse or do not answer, and past a dispatcher
//! that dies in the middle. Nothing is lost, and what comes twice has the same id and the same bytes.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pisync::{
    fleet::sweep::sweep,
    notify::{
        dispatch::{Courier, OpenChannel, dispatch_once},
        secrets::SecretsKey,
    },
    store::{
        self, Attempt, ChannelCreation, FrozenText, Lane, MessageFacts, MessageText, NewChannel,
        NewConfig, OutgoingMessage, Store,
    },
};
use reqwest::Method;
use serde_json::{Value, json};
use standardwebhooks::Webhook;
use tokio::{runtime::Handle, sync::Notify};

use crate::support::{
    events::{at, failure as failed, somebody, write_at},
    http::{failure, send, success},
    receiver::{Received, Receiver, Reply, now},
    server::{TestClock, TestServer},
    store::{Fixture, TestDatabase, TestStore},
};

/// What happens within a second may take longer on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// After this time a message is due, in seconds.
pub(crate) const WAIT: i64 = 61;

/// After this time another message about the same group is due.
const INTERVAL: i64 = 301;

/// A server that may send to this machine, and a store beside it, by which a test sweeps when it likes.
pub(crate) struct Telling {
    server: TestServer,
    pub(crate) store: Arc<dyn Store>,
}

impl std::ops::Deref for Telling {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.server
    }
}

impl Fixture for Telling {
    async fn prepare(database: TestDatabase) -> Self {
        let key = database.file().is_none().then(|| SecretsKey::parse(&"0f".repeat(32)).unwrap());
        // Receivers compare the time of a signature with the present.
        let server = TestServer::start_at(now(), database, |settings| {
            settings.secrets_key = key;
            settings.sender.allowed = vec!["127.0.0.0/8".parse().unwrap()];
        })
        .await;
        server.get("/health/ready").await.json(200);
        let store = store::open(&server.database.target).await.unwrap();
        Self { server, store }
    }

    fn into_database(self) -> TestDatabase {
        let close = async {
            self.store.close().await.unwrap();
            self.server.stop().await
        };
        tokio::task::block_in_place(|| Handle::current().block_on(close))
    }
}

impl Telling {
    pub(crate) fn pass(&self, seconds: i64) {
        self.clock.set(self.clock.now().saturating_add_milliseconds(seconds * 1000));
    }

    pub(crate) async fn webhook(&self, name: &str, receiver: &Receiver) -> Value {
        let body = json!({
            "name": name, "kind": "webhook", "url": receiver.url("/hook"), "default": true,
        });
        self.post("/api/channels", &body).await.data(201)
    }

    /// Sweeps until a device has so many open incidents.
    async fn sweep_until(&self, device: &str, open: usize) {
        let path = format!("/api/incidents?device_id={device}");
        poll(async || {
            sweep(&*self.store, self.clock.now()).await.unwrap();
            let found = self.get(&path).await.data(200);
            (found["incidents"].as_array().unwrap().len() == open).then_some(())
        })
        .await;
    }

    async fn has_failed(&self, device: &str) {
        for second in (1..=5).rev() {
            let at = self.clock.now().saturating_add_milliseconds(-second * 1000);
            self.server.store(&failure(device, at)).await;
        }
        self.sweep_until(device, 1).await;
    }

    async fn is_well(&self, device: &str) {
        self.server.store(&success(device, self.clock.now())).await;
        self.sweep_until(device, 0).await;
    }

    /// The notifications, newest first.
    async fn notifications(&self) -> Value {
        self.get("/api/notifications").await.data(200)["notifications"].take()
    }

    /// The newest notification, once it is in this state.
    async fn newest(&self, state: &str) -> Value {
        poll(async || {
            let newest = self.notifications().await[0].take();
            (newest["state"] == state).then_some(newest)
        })
        .await
    }
}

pub(crate) async fn poll<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < until, "it has not happened");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a receiver has, once there are so many.
pub(crate) async fn arrived(receiver: &Receiver, count: usize) -> Vec<Received> {
    poll(async || Some(receiver.received()).filter(|received| received.len() >= count)).await
}

/// A receiver that answers with a status that the test may change.
async fn changeable() -> (Receiver, Arc<AtomicU16>) {
    let status = Arc::new(AtomicU16::new(204));
    let answered = Arc::clone(&status);
    let receiver = Receiver::start(move |_| {
        Reply::status(match answered.load(Ordering::SeqCst) {
            204 => "204 No Content",
            400 => "400 Bad Request",
            410 => "410 Gone",
            _ => "500 Internal Server Error",
        })
    })
    .await;
    (receiver, status)
}

pub(crate) fn id(received: &Received) -> &str {
    received.header("webhook-id")
}

/// The incidents that a message tells: what has happened, and to whom.
pub(crate) fn told(received: &Received) -> Vec<(String, String)> {
    let incidents = received.json()["data"]["incidents"].take();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let incidents = incidents.as_array().unwrap().iter();
    incidents.map(|incident| (text(&incident["event"]), text(&incident["subject"]))).collect()
}

fn words(event: &str, subject: &str) -> Vec<(String, String)> {
    vec![(event.to_owned(), subject.to_owned())]
}

async fn a_failing_device_is_told_and_its_end(fixture: &Telling) {
    let (receiver, _) = changeable().await;
    let channel = fixture.webhook("ops", &receiver).await;
    let webhook = Webhook::new(channel["signing_secret"].as_str().unwrap()).unwrap();
    fixture.has_failed("pi").await;
    assert_eq!(fixture.newest("pending").await["attempts"], 0);
    fixture.pass(WAIT);
    let opened = arrived(&receiver, 1).await.remove(0);
    webhook.verify(&opened.body, &opened.headers).unwrap();
    assert_eq!(opened.json()["type"], "fleet.incidents");
    assert_eq!(told(&opened), words("opened", "pi"));
    assert_eq!(opened.json()["data"]["incidents"][0]["kind"], "failing");
    let sent = fixture.newest("sent").await;
    assert_eq!((&sent["attempts"], &sent["last_error"]), (&json!(1), &Value::Null));
    assert_eq!(sent["message_id"], id(&opened));
    assert_eq!(sent["channel"], json!({"id": channel["id"], "name": "ops"}));
    let incident = sent["items"][0]["incident"].as_i64().unwrap();
    assert_eq!(sent["items"], json!([{"incident": incident, "event": "opened"}]));

    // Its end does not wait for five minutes, because all is well again.
    fixture.is_well("pi").await;
    fixture.pass(WAIT);
    let ended = arrived(&receiver, 2).await.remove(1);
    webhook.verify(&ended.body, &ended.headers).unwrap();
    assert_eq!(told(&ended), words("resolved", "pi"));
    let of_incident = &ended.json()["data"]["incidents"][0];
    assert_eq!(
        (&of_incident["id"], &of_incident["resolution"]),
        (&json!(incident), &json!("recovered"))
    );
    assert_ne!(id(&ended), id(&opened));
    fixture.newest("sent").await;
    let timeline = fixture.get(&format!("/api/incident/{incident}")).await.data(200);
    assert_eq!(timeline["timeline"].to_string().matches("\"told\"").count(), 2, "{timeline}");
    let metrics = fixture.get("/metrics").await.text().to_owned();
    let counted = r#"pisync_notifications_total{kind="webhook",result="sent"} 2"#;
    assert!(metrics.contains(counted), "{metrics}");
}

async fn a_receiver_that_fails_gets_the_same_again(fixture: &Telling) {
    let (receiver, status) = changeable().await;
    let channel = fixture.webhook("ops", &receiver).await["id"].clone();
    let path = format!("/api/channel/{channel}");
    status.store(500, Ordering::SeqCst);
    fixture.has_failed("pi").await;
    fixture.pass(WAIT);
    let first = arrived(&receiver, 1).await.remove(0);
    let failing = poll(async || {
        let shown = fixture.get(&path).await.data(200);
        (shown["state"] == "failing").then_some(shown)
    })
    .await;
    assert!(failing["last_error"].as_str().unwrap().contains("500"), "{failing}");
    assert_eq!(
        (&failing["waiting"], &fixture.newest("pending").await["attempts"]),
        (&json!(1), &json!(1))
    );
    // Its text is made once.
    fixture.pass(10);
    let again = arrived(&receiver, 2).await.remove(1);
    assert_eq!((id(&again), &again.body), (id(&first), &first.body));
    status.store(204, Ordering::SeqCst);
    fixture.pass(40);
    let last = arrived(&receiver, 3).await.remove(2);
    assert_eq!((id(&last), &last.body), (id(&first), &first.body));
    assert_eq!(fixture.newest("sent").await["attempts"], 3);
    assert_eq!(fixture.get(&path).await.data(200)["state"], "ok");

    // One that wants no messages any more gets none.
    status.store(410, Ordering::SeqCst);
    fixture.has_failed("pi-2").await;
    fixture.pass(INTERVAL);
    arrived(&receiver, 4).await;
    poll(async || {
        let shown = fixture.get(&path).await.data(200);
        (shown["state"] == "disabled").then_some(())
    })
    .await;
    assert_eq!(fixture.newest("pending").await["attempts"], 1);
}

async fn a_message_that_is_refused_is_given_up_until_somebody_sends_it_again(fixture: &Telling) {
    let (receiver, status) = changeable().await;
    fixture.webhook("ops", &receiver).await;
    status.store(400, Ordering::SeqCst);
    fixture.has_failed("pi").await;
    fixture.pass(WAIT);
    for attempts in 1..=3 {
        arrived(&receiver, attempts).await;
        poll(async || (fixture.notifications().await[0]["attempts"] == attempts).then_some(()))
            .await;
        fixture.pass(10);
    }
    let failed = fixture.newest("failed").await;
    assert!(failed["last_error"].as_str().unwrap().contains("400"), "{failed}");
    status.store(204, Ordering::SeqCst);
    let path = format!("/api/notification/{}/retry", failed["id"]);
    let retry = async || send(fixture.request(Method::POST, &path)).await;
    assert_eq!(retry().await.data(202), json!({"id": failed["id"], "state": "pending"}));
    let received = arrived(&receiver, 4).await;
    for again in &received {
        assert_eq!((id(again), &again.body), (id(&received[0]), &received[0].body));
    }
    fixture.newest("sent").await;
    assert_eq!(retry().await.error(409), "Notification has not failed");
    let unknown = send(fixture.request(Method::POST, "/api/notification/99/retry")).await;
    assert_eq!(unknown.error(404), "Notification not found");
    let audit = fixture.get("/api/audit").await.text().to_owned();
    assert!(audit.contains("notification.retry"), "{audit}");
}

async fn a_channel_that_does_not_answer_delays_no_other(fixture: &Telling) {
    let stalled = Receiver::start(|_| Reply::Stall).await;
    let (receiver, _) = changeable().await;
    // It comes first.
    let channel = fixture.webhook("stalled", &stalled).await["id"].clone();
    fixture.webhook("ops", &receiver).await;
    fixture.has_failed("pi").await;
    fixture.pass(WAIT);
    arrived(&stalled, 1).await;
    assert_eq!(told(&arrived(&receiver, 1).await[0]), words("opened", "pi"));
    // More than once.
    fixture.is_well("pi").await;
    fixture.pass(WAIT);
    assert_eq!(told(&arrived(&receiver, 2).await[1]), words("resolved", "pi"));
    let waiting = fixture.get(&format!("/api/notifications?channel={channel}")).await.data(200);
    let waiting = waiting["notifications"].as_array().unwrap();
    assert!(waiting.iter().all(|one| one["state"] == "pending"), "{waiting:?}");
    assert_eq!(waiting.len(), 2);
}

async fn what_ends_before_it_is_told_is_never_told(fixture: &Telling) {
    let (receiver, _) = changeable().await;
    fixture.webhook("ops", &receiver).await;
    fixture.has_failed("short").await;
    fixture.is_well("short").await;
    assert_eq!(fixture.newest("dropped").await["items"], json!([]));
    fixture.pass(WAIT);
    // The first message is about another one.
    fixture.has_failed("long").await;
    fixture.pass(WAIT);
    assert_eq!(told(&arrived(&receiver, 1).await[0]), words("opened", "long"));
    fixture.newest("sent").await;
    assert_eq!(receiver.received().len(), 1);
}

async fn a_channel_is_tried(fixture: &Telling) {
    let (receiver, status) = changeable().await;
    let channel = fixture.webhook("ops", &receiver).await;
    let webhook = Webhook::new(channel["signing_secret"].as_str().unwrap()).unwrap();
    let path = format!("/api/channel/{}/test", channel["id"]);
    let test = async || send(fixture.request(Method::POST, &path)).await;
    let went = test().await.data(200);
    assert_eq!((&went["delivered"], &went["status"]), (&json!(true), &json!(204)));
    assert!(went["milliseconds"].is_u64() && went["error"].is_null(), "{went}");
    let received = receiver.only();
    webhook.verify(&received.body, &received.headers).unwrap();
    assert_eq!(received.json()["type"], "fleet.test");
    let soon = test().await;
    assert_eq!((soon.status, soon.header("retry-after")), (429, "5"));
    status.store(500, Ordering::SeqCst);
    fixture.pass(5);
    let went = test().await.data(200);
    assert_eq!((&went["delivered"], &went["status"]), (&json!(false), &json!(500)));
    assert!(went["error"].as_str().unwrap().contains("500"), "{went}");
    // It says nothing of the channel, and nothing waits.
    let shown = fixture.get(&format!("/api/channel/{}", channel["id"])).await.data(200);
    assert_eq!((&shown["state"], &shown["waiting"]), (&json!("ok"), &json!(0)));
    assert_eq!(fixture.notifications().await, json!([]));
    let unknown = send(fixture.request(Method::POST, "/api/channel/99/test")).await;
    assert_eq!(unknown.error(404), "Channel not found");
}

/// A courier that hands messages over, and then may never come back.
struct Hand {
    comes_back: bool,
    handed: Arc<Handed>,
}

#[derive(Default)]
struct Handed {
    texts: AtomicUsize,
    lanes: Mutex<Vec<Lane>>,
    messages: Mutex<Vec<OutgoingMessage>>,
    one: Notify,
}

impl Hand {
    fn channel(&self) -> Self {
        Self { comes_back: self.comes_back, handed: Arc::clone(&self.handed) }
    }
}

impl Courier for Hand {
    fn open(&self, lane: &Lane) -> Result<Box<dyn OpenChannel>, String> {
        self.handed.lanes.lock().unwrap().push(lane.clone());
        Ok(Box::new(self.channel()))
    }
}

#[async_trait]
impl OpenChannel for Hand {
    fn text(&self) -> Arc<dyn MessageText> {
        Arc::new(self.channel())
    }

    async fn deliver(&self, message: &OutgoingMessage) -> Attempt {
        self.handed.messages.lock().unwrap().push(message.clone());
        self.handed.one.notify_one();
        if !self.comes_back {
            std::future::pending::<()>().await;
        }
        Attempt::Delivered(Duration::ZERO)
    }
}

impl MessageText for Hand {
    /// Another one each time, so that a second text would show.
    fn text(&self, facts: &MessageFacts) -> FrozenText {
        let number = self.handed.texts.fetch_add(1, Ordering::SeqCst);
        let body = format!("{number}: {} of {}", facts.items.len(), facts.items_total);
        FrozenText { content_type: "text/plain".to_owned(), body: body.into(), plain: None }
    }
}

async fn whoever_dies_while_sending_is_replaced_after_its_lease(fixture: &TestStore) {
    let store = &*fixture.store;
    let channel = NewChannel {
        name: "ops".to_owned(),
        kind: "webhook".to_owned(),
        config: NewConfig { public: json!({}), secrets: None },
        is_enabled: true,
        is_default: Some(true),
        template: None,
    };
    let created = store.create_channel(&channel, &somebody()).await.unwrap();
    assert!(matches!(created, ChannelCreation::Created(_)), "{created:?}");
    let failures = (1..=5).map(|second| failed("pi", at(second))).collect();
    write_at(&mut *fixture.writer(), at(10), failures).await;
    assert_eq!(sweep(store, at(15)).await.unwrap().events.len(), 1);
    let clock = TestClock::at(at(74));
    let handed = Arc::new(Handed::default());
    let hand = |comes_back| Hand { comes_back, handed: Arc::clone(&handed) };
    let count = || handed.messages.lock().unwrap().len();
    dispatch_once(store, &hand(true), &clock.clock(), "b").await.unwrap();
    assert_eq!(count(), 0, "it was sent before its time");

    let sent = 75;
    clock.set(at(sent));
    {
        let (dying, time) = (hand(false), clock.clock());
        tokio::select! {
            result = dispatch_once(store, &dying, &time, "a") => panic!("{result:?}"),
            () = handed.one.notified() => {}
        }
    }
    let (lane, first) = {
        let (lanes, messages) = (handed.lanes.lock().unwrap(), handed.messages.lock().unwrap());
        (lanes[0].clone(), messages[0].clone())
    };
    // While its lease lasts, nobody else sends.
    clock.set(at(sent + 24));
    dispatch_once(store, &hand(true), &clock.clock(), "b").await.unwrap();
    assert_eq!(count(), 1);
    clock.set(at(sent + 25));
    dispatch_once(store, &hand(true), &clock.clock(), "b").await.unwrap();
    assert_eq!(count(), 2);
    let second = handed.messages.lock().unwrap()[1].clone();
    assert_eq!(first, second);
    assert_eq!(handed.texts.load(Ordering::SeqCst), 1);
    // Whoever comes too late changes nothing.
    let late = Attempt::Disabled("late".to_owned());
    assert!(!store.end_attempt(&lane, &first, &late, clock.now()).await.unwrap());
    assert!(store.channels().await.unwrap().channels[0].is_enabled);
    clock.set(at(sent + 60));
    dispatch_once(store, &hand(true), &clock.clock(), "b").await.unwrap();
    assert_eq!(count(), 2, "it was sent once more");
}

both_stores!(
    a_failing_device_is_told_and_its_end,
    a_receiver_that_fails_gets_the_same_again,
    a_message_that_is_refused_is_given_up_until_somebody_sends_it_again,
    a_channel_that_does_not_answer_delays_no_other,
    what_ends_before_it_is_told_is_never_told,
    a_channel_is_tried,
    whoever_dies_while_sending_is_replaced_after_its_lease,
);
