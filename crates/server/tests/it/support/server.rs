//! A whole PiSync server inside the test process: real store, real sockets, and a clock that moves at
//! the test's word.

use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use pisync::{
    app::{self, AppError},
    clock::Clock,
    config::Settings,
    config::http::{ANSWER_BYTES, AuthMode, HttpSettings, Timeouts},
    notify::{sender::SenderSettings, smtp::SmtpSettings},
    store::Target,
};
use pisync_core::Timestamp;
use tokio::{net::TcpListener, runtime::Handle, sync::oneshot, task::JoinHandle};

use super::{
    events::now,
    http::Client,
    store::{Fixture, TestDatabase},
};

/// The time of day, as the test has it. Stands still at [`now`] until it is moved.
#[derive(Clone)]
pub(crate) struct TestClock(Arc<AtomicI64>);

impl TestClock {
    pub(crate) fn at(time: Timestamp) -> Self {
        Self(Arc::new(AtomicI64::new(time.as_millisecond())))
    }

    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::from_millisecond(self.0.load(Ordering::SeqCst)).unwrap()
    }

    pub(crate) fn set(&self, time: Timestamp) {
        self.0.store(time.as_millisecond(), Ordering::SeqCst);
    }

    /// A clock that is not set while it stands before 2026.
    pub(crate) fn clock(&self) -> Clock {
        let clock = self.clone();
        Clock::new(move || clock.now()).not_before(Timestamp::parse_iso8601("2026-01-02").unwrap())
    }
}

/// A running server, and a client of it.
pub(crate) struct TestServer {
    pub(crate) clock: TestClock,
    pub(crate) database: TestDatabase,
    client: Client,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), AppError>>,
}

impl Deref for TestServer {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl TestServer {
    /// A server with the usual settings: the defaults, but without rate limits.
    pub(crate) async fn start(database: TestDatabase) -> Self {
        Self::start_with(database, |_| {}).await
    }

    /// A server on a fresh SQLite file, for tests of what no store has a part in.
    pub(crate) async fn on_sqlite(adjust: impl FnOnce(&mut HttpSettings)) -> Self {
        Self::start_with(TestDatabase::sqlite(), |settings| adjust(&mut settings.http)).await
    }

    /// A server with settings of the test's own. It is ready when this returns.
    pub(crate) async fn start_with(
        database: TestDatabase,
        adjust: impl FnOnce(&mut Settings),
    ) -> Self {
        let server = Self::start_at(now(), database, adjust).await;
        // The connection waits until the server takes it in.
        server.get("/health/ready").await.json(200);
        server
    }

    /// A server whose clock stands at `time`, which it may not be ready with.
    pub(crate) async fn start_at(
        time: Timestamp,
        database: TestDatabase,
        adjust: impl FnOnce(&mut Settings),
    ) -> Self {
        let mut settings = settings(database.target.clone());
        adjust(&mut settings);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let client = Client::new(listener.local_addr().unwrap());
        let clock = TestClock::at(time);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(app::run(settings, clock.clock(), listener, async {
            // Also when the test has failed and let go of the other end.
            let _ = stopped.await;
        }));
        let server = Self { clock, database, client, stop, task };
        server.get("/health/live").await.json(200);
        server
    }

    pub(crate) fn is_postgres(&self) -> bool {
        matches!(self.database.target, Target::Postgres(_))
    }

    /// Tells the server to stop and gives what remains: its end to wait for, and the database.
    pub(crate) fn begin_stop(self) -> (JoinHandle<Result<(), AppError>>, TestDatabase) {
        self.stop.send(()).expect("the server has ended before its time");
        (self.task, self.database)
    }

    /// Stops the server, which must end well, and gives the database back.
    pub(crate) async fn stop(self) -> TestDatabase {
        let (task, database) = self.begin_stop();
        task.await.unwrap().unwrap();
        database
    }
}

/// What a server is told to be: the defaults, but without rate limits.
fn settings(target: Target) -> Settings {
    let smtp = SmtpSettings::parse("smtp://localhost:1?tls=none", Some("pisync@fleet.example"));
    Settings {
        target,
        migrations_dir: "/nonexistent".into(),
        auto_migrate: true,
        watches_fleet: true,
        public_url: None,
        secrets_key: None,
        // Channels of e-mail may be made. Nobody listens there.
        sender: SenderSettings { smtp: Some(smtp.unwrap()), ..SenderSettings::default() },
        heartbeat_url: None,
        event_id_retention_days: 90,
        retention: None,
        http: HttpSettings {
            auth: AuthMode::Auto,
            max_clock_skew_seconds: 300,
            sync_per_minute: 0,
            api_per_minute: 0,
            key_per_minute: 0,
            max_connections: 0,
            max_requests: 0,
            answer_bytes: ANSWER_BYTES,
            tls: None,
            trusted_proxies: Vec::new(),
            cors_origins: Vec::new(),
            timeouts: Timeouts::default(),
        },
    }
}

impl Fixture for TestServer {
    async fn prepare(database: TestDatabase) -> Self {
        Self::start(database).await
    }

    fn into_database(self) -> TestDatabase {
        // Every test runs on several threads, so one may wait.
        tokio::task::block_in_place(|| Handle::current().block_on(self.stop()))
    }
}

/// A port that nobody listens on.
pub(crate) fn unused_address() -> SocketAddr {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}
