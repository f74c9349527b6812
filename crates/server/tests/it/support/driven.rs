//! A server whose fleet the test looks after: it runs with `FLEET=off`, and the test gives the signs of life, sweeps and sends,
//! at the instants of a clock that it moves. So nothing depends on how fast the machine is. Everything else is the server's:
//! requests, ingest, the database, and messages that go to receivers by HTTP.

use std::sync::Arc;

use pisync::{
    config::Settings,
    fleet::sweep::{Swept, sweep},
    notify::{
        courier::SystemCourier,
        dispatch::dispatch_once,
        secrets::{Secrets, SecretsKey},
        sender::{Sender, SenderSettings},
    },
    random::Randomness,
    store::{self, Beat, Store, Target},
};
use pisync_core::Timestamp;
use serde_json::{Value, json};
use standardwebhooks::Webhook;
use tokio::runtime::Handle;

use super::{
    http::{failure, success},
    receiver::{Received, Receiver},
    server::TestServer,
    store::{Fixture, TestDatabase},
};

/// What the server is called that looks after the fleet.
const NODE: &str = "test";

/// How often there is a sweep, in milliseconds.
pub(crate) const TICK: i64 = 15_000;

/// The server, and what the test drives of it.
pub(crate) struct DrivenServer {
    pub(crate) server: TestServer,
    pub(crate) store: Arc<dyn Store>,
    courier: SystemCourier,
}

impl std::ops::Deref for DrivenServer {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.server
    }
}

impl DrivenServer {
    /// A server whose clock stands at `at`. It may send to this machine.
    pub(crate) async fn start(
        at: Timestamp,
        database: TestDatabase,
        adjust: impl FnOnce(&mut Settings),
    ) -> Self {
        // PostgreSQL has no file beside it for the key.
        let key = database.file().is_none().then(|| SecretsKey::parse(&"0f".repeat(32)).unwrap());
        let allowed = vec!["127.0.0.0/8".parse().unwrap()];
        let server = TestServer::start_at(at, database, |settings| {
            settings.watches_fleet = false;
            settings.secrets_key = key.clone();
            settings.sender.allowed.clone_from(&allowed);
            adjust(settings);
        })
        .await;
        server.get("/health/ready").await.json(200);
        let target = &server.database.target;
        let courier = SystemCourier {
            sender: Sender::new(SenderSettings { allowed, ..SenderSettings::default() }).unwrap(),
            secrets: Secrets::of(target, key, Randomness::system()),
            base_url: None,
            clock: server.clock.clock(),
        };
        let store = store::open(target).await.unwrap();
        Self { server, store, courier }
    }

    /// Stops the server and what the test drives of it, and gives the database back.
    pub(crate) async fn stop(self) -> TestDatabase {
        self.store.note_stop(self.clock.now()).await.unwrap();
        self.store.close().await.unwrap();
        self.server.stop().await
    }

    /// Gives a sign of life.
    pub(crate) async fn beat(&self, is_first: bool, has_refused: bool) {
        let beat = Beat { at: self.clock.now(), is_first, has_refused, node: NODE.to_owned() };
        self.store.beat(&beat).await.unwrap();
    }

    /// Waits until what was reported is where a sweep looks for it.
    async fn applied(&self) {
        if let Target::Sqlite(_) = self.database.target {
            self.get("/api/devices?limit=1").await.data(200);
        }
    }

    /// What a server does at an instant, with nothing left out since the last one: it gives a sign of life, sweeps, and sends.
    pub(crate) async fn tick(&self, has_refused: bool) -> Swept {
        self.applied().await;
        self.beat(false, has_refused).await;
        let now = self.clock.now();
        let swept = sweep(&*self.store, now).await.unwrap();
        assert!(swept.is_complete, "the sweep at {now} did not go through");
        self.dispatch().await;
        swept
    }

    /// Sends what is due.
    pub(crate) async fn dispatch(&self) {
        dispatch_once(&*self.store, &self.courier, &self.clock.clock(), NODE).await.unwrap();
    }

    /// Takes the time until `at` for one in which the server lived and nothing was to be done, and has an instant then.
    pub(crate) async fn pass_to(&self, at: Timestamp) -> Swept {
        self.store.pass_over(at.saturating_add_milliseconds(-TICK)).await.unwrap();
        self.clock.set(at);
        self.tick(false).await
    }

    /// The same so many seconds later.
    pub(crate) async fn pass(&self, seconds: i64) -> Swept {
        self.pass_to(self.clock.now().saturating_add_milliseconds(seconds * 1000)).await
    }

    /// Makes a webhook that leads to `receiver`.
    pub(crate) async fn webhook(&self, name: &str, receiver: &Receiver) -> WebhookReceiver {
        let body = json!({
            "name": name, "kind": "webhook", "url": receiver.url(&format!("/{name}")), "default": true,
        });
        let channel = self.post("/api/channels", &body).await.data(201);
        let secret = channel["signing_secret"].as_str().unwrap();
        WebhookReceiver {
            name: name.to_owned(),
            id: channel["id"].as_i64().unwrap(),
            webhook: Webhook::new(secret).unwrap(),
        }
    }

    /// Replaces all routes.
    pub(crate) async fn route(&self, routes: &Value) {
        let version = self.get("/api/routes").await.data(200)["version"].take();
        let body = json!({"version": version, "routes": routes});
        self.put("/api/routes", &body).await.data(200);
    }

    /// Three failures in a row are reported.
    pub(crate) async fn fails(&self, device: &str) {
        for second in (1..=3).rev() {
            let at = self.clock.now().saturating_add_milliseconds(-second * 1000);
            self.server.store(&failure(device, at)).await;
        }
    }

    /// A success is reported.
    pub(crate) async fn is_well(&self, device: &str) {
        self.server.store(&success(device, self.clock.now())).await;
    }

    /// The only open incident of this kind about a device.
    pub(crate) async fn incident(&self, device: &str, kind: &str) -> i64 {
        let path = format!("/api/incidents?device_id={device}&kind={kind}");
        let found = self.get(&path).await.data(200);
        let [only] = &found["incidents"].as_array().unwrap()[..] else { panic!("{found}") };
        only["id"].as_i64().unwrap()
    }
}

impl Fixture for DrivenServer {
    /// At noon on a Friday: 2026-03-27T12:00:00Z.
    async fn prepare(database: TestDatabase) -> Self {
        let at = Timestamp::parse_iso8601("2026-03-27T12:00:00Z").unwrap();
        let driven = Self::start(at, database, |_| {}).await;
        driven.beat(true, false).await;
        driven
    }

    fn into_database(self) -> TestDatabase {
        tokio::task::block_in_place(|| Handle::current().block_on(self.stop()))
    }
}

/// What the owner of a webhook knows of it.
pub(crate) struct WebhookReceiver {
    pub(crate) name: String,
    pub(crate) id: i64,
    webhook: Webhook,
}

impl WebhookReceiver {
    /// Verifies a message that was sent at `at`, as an independent implementation of Standard Webhooks does, and gives its
    /// body. That implementation compares with the present what this one compares with `at`.
    #[track_caller]
    pub(crate) fn verify(&self, received: &Received, at: Timestamp) -> Value {
        let seconds = at.as_millisecond().div_euclid(1000);
        assert_eq!(received.header("webhook-timestamp"), seconds.to_string());
        let id = received.header("webhook-id");
        let signature = self.webhook.sign(id, seconds, &received.body).unwrap();
        assert_eq!(received.header("webhook-signature"), signature);
        let body = received.json();
        assert_eq!(body["timestamp"], at.to_string());
        body
    }
}
