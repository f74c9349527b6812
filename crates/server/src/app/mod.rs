//! Starts and stops a server: the only place that connects store, ingest and HTTP. The command line and the tests call
//! `run`. Only `cli` and the tests may depend on it.

mod tasks;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot};

use self::tasks::Tasks;
use crate::{
    api::{self, ApiParts},
    clock::Clock,
    config::{Settings, http::AuthMode},
    fleet,
    ingest::{Ingest, RunStartQueue, Writers},
    keys::{self, Keyring},
    logs,
    maintenance::{Maintenance, loops},
    metrics::Metrics,
    net::{self, ConnectionSettings, Listeners, Tls},
    notify::{
        courier::SystemCourier,
        dispatch::{Courier, dispatch, holder_name},
        heartbeat,
        secrets::Secrets,
        sender::Sender,
    },
    random::Randomness,
    store::{
        self, Store, StoreError, Target,
        migrations::{MigrationError, Migrator},
    },
};

/// The name of the task that stores events.
const INGEST: &str = "ingest";

/// How long ingest may take to store its queue when the server stops. Requests in flight get 20 s before it, so a stop
/// takes less than 30 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(9);

/// How long it may take to store the starts of runs that wait at the end. A second's worth of them takes some milliseconds.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(900);

/// Why a server did not start, or ended early.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The schema is not as required.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// Migrations are pending and may not be run automatically.
    #[error(
        "pending migrations: {}; run `pisync migrate up`, or let the server do it with AUTO_MIGRATE=true",
        .0.join(", ")
    )]
    PendingMigrations(Vec<String>),
    /// The database cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The network can reach the server, and no admin key exists.
    #[error(
        "listening on {0} needs a key, and there is none yet: make one with `pisync key create --scope admin`, or let everybody in with AUTH=off"
    )]
    NoAdminKey(SocketAddr),
    /// TLS is configured, but its files are invalid.
    #[error("{0}")]
    Tls(String),
    /// Messages cannot be sent with these settings.
    #[error("{0}")]
    Notify(String),
    /// The OpenAPI document cannot be written: a bug.
    #[error("cannot write the API's documentation: {0}")]
    Document(std::io::Error),
    /// Everything is stored, but not all of it in the database's own file.
    #[error(
        "the database cannot be closed: {0}; what was acknowledged is safe in the files beside it, and the next start goes on from them: leave them where they are"
    )]
    NotClosed(StoreError),
    /// An essential background task has ended.
    #[error("{0}; the server stops, start it again")]
    Died(String),
}

/// Runs a server on `listeners` until `shutdown` completes. Before it returns, everything accepted is committed and
/// answered.
///
/// # Errors
/// See [`AppError`].
/// See [`AppError`].
pub async fn run(
    settings: Settings,
    clock: Clock,
    listeners: impl Into<Listeners>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AppError> {
    // A SQLite file belongs to one server, even during migrations.
    let claim = store::claim(&settings.target)?;
    migrate(&settings, &clock).await?;
    let store = store::open(&settings.target).await?;
    claim.check()?;
    serve(settings, clock, listeners.into(), shutdown, store, Tasks::default()).await
}

/// Runs a server on `store`, with its background tasks in `tasks`.
async fn serve(
    settings: Settings,
    clock: Clock,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
    store: Arc<dyn Store>,
    mut tasks: Tasks,
) -> Result<(), AppError> {
    let mut maintenance = Maintenance::new(
        Arc::clone(&store),
        clock.clone(),
        settings.retention,
        settings.event_id_retention_days,
    );
    maintenance.prepare().await?;

    let died = |error: &dyn std::fmt::Display| AppError::Died(error.to_string());
    let addresses = listeners.addresses().map_err(|error| died(&error))?;
    let address = most_reachable(&addresses);
    let address = address.ok_or_else(|| died(&"there is no address to listen on"))?;
    let (tls, tls_watch) = match settings.http.tls.clone().map(Tls::load).transpose() {
        Ok(tls) => tls.unzip(),
        Err(error) => return Err(AppError::Tls(error)),
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    if let Some(watch) = tls_watch {
        tasks.start("TLS_CERT", forever(watch.follow()));
    }
    let keyring = Arc::new(Keyring::default());
    keyring.refresh(&*store).await?;
    let has_admin = keyring.has_admin(clock.now());
    check_admin_key(settings.http.auth, address, has_admin)?;
    warn_of_access(settings.http.auth, address, has_admin);
    let metrics = Arc::new(Metrics::new().map_err(|error| died(&error))?);
    let (tell, observations) = mpsc::unbounded_channel();
    let writers = Writers { any: store.ingest_writer(tell).await?, grouped: store.event_writer() };
    let (ingest, task) = Ingest::new(writers, observations, &clock, &metrics);
    let (stop_ingest, stopped) = oneshot::channel::<()>();
    let stopped = async {
        let _ = stopped.await;
    };
    tasks.start(INGEST, async { task.run(stopped).await.map_err(|error| error.to_string()) });
    tasks.start("the clock", forever(maintenance.clock_watch(&metrics).follow()));
    tasks.start("maintenance", forever(loops::maintain(maintenance)));
    let aggregation = loops::aggregate(Arc::clone(&store), clock.clone(), Arc::clone(&metrics));
    tasks.start("aggregation", forever(aggregation));
    tasks.start("summaries", forever(loops::refresh_summaries(Arc::clone(&store))));
    tasks.start("deletions", forever(loops::finish_deletions(Arc::<dyn Store>::clone(&store))));
    let courier = Arc::new(courier(&settings, &clock)?);
    if settings.watches_fleet {
        let node = format!("{address} ({})", std::process::id());
        let holder = holder_name(&node, &Randomness::system()).map_err(AppError::Notify)?;
        let watch = fleet::watch(Arc::clone(&store), clock.clone(), Arc::clone(&metrics), node);
        tasks.start("fleet health", forever(watch));
        let carrier: Arc<dyn Courier> = Arc::<SystemCourier>::clone(&courier);
        let sending =
            dispatch(Arc::clone(&store), carrier, clock.clone(), Arc::clone(&metrics), holder);
        tasks.start("notifications", forever(sending));
    }
    if let Some(url) = settings.heartbeat_url.clone() {
        let sender = courier.sender.clone();
        let beats = heartbeat::beat(url, sender, Arc::clone(&store), ingest.clone(), clock.clone());
        tasks.start("heartbeat", forever(beats));
    }
    let run_starts = Arc::new(RunStartQueue::default());
    tasks.start("run starts", forever(Arc::clone(&run_starts).follow(Arc::clone(&store))));
    tasks.start("API keys", forever(keys::follow(Arc::clone(&keyring), Arc::clone(&store))));
    let threads = Arc::clone(&store);
    tasks.start("the database", async move { Err(threads.thread_end().await) });
    tasks.start("the log", async { Err(logs::thread_end().await) });
    let stop_clock = clock.clone();
    let parts = ApiParts {
        store: Arc::clone(&store),
        ingest,
        run_starts: Arc::clone(&run_starts),
        clock,
        metrics,
        randomness: Randomness::system(),
        keyring,
        address,
    };
    let router = api::router_with_courier(parts, &settings.http, Arc::clone(&courier));
    let router = router.map_err(AppError::Document)?;

    let connections = ConnectionSettings {
        max_connections: settings.http.max_connections,
        timeouts: settings.http.timeouts,
        tls,
    };

    let others = addresses.iter().filter(|other| **other != address);
    let also: Vec<_> = others.map(|other| format!("{scheme}://{other}")).collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        database = %settings.target,
        also = (!also.is_empty()).then(|| also.join(" ")),
        "PiSync is ready on {scheme}://{address}; its documentation is at /api-docs"
    );
    let ended = tokio::select! {
        () = net::serve(listeners, router, connections, shutdown) => None,
        ended = tasks.first_end() => Some(ended),
    };
    if let Some(ended) = ended {
        // Open connections may still send, but nothing is acknowledged any more.
        tasks.stop().await;
        return Err(ended);
    }
    drop(stop_ingest);
    tasks.finish(INGEST, DRAIN_TIMEOUT).await?;
    run_starts.flush(&*store, FLUSH_TIMEOUT).await;
    // The time until the next start then counts as one in which nobody could be heard.
    if settings.watches_fleet
        && let Ok(now) = stop_clock.check()
        && let Err(error) = store.note_stop(now).await
    {
        tracing::debug!(%error, "the end of the server could not be noted");
    }
    if let Err(error) = store.close().await {
        // If the files are gone, the last acknowledged events are lost with them. The ping then reports that.
        store.ping().await?;
        return Err(AppError::NotClosed(error));
    }
    Ok(())
}

/// What sends messages.
fn courier(settings: &Settings, clock: &Clock) -> Result<SystemCourier, AppError> {
    let sender = Sender::new(settings.sender.clone()).map_err(AppError::Notify)?;
    let secrets = Secrets::of(&settings.target, settings.secrets_key.clone(), Randomness::system());
    Ok(SystemCourier {
        sender,
        secrets,
        base_url: settings.public_url.clone(),
        clock: clock.clone(),
    })
}

/// Adapts a task that never ends by itself.
async fn forever(task: impl Future<Output = ()>) -> Result<(), String> {
    task.await;
    Ok(())
}

/// The address that decides the rules of access: one that other machines can reach, if there is one.
pub(crate) fn most_reachable(addresses: &[SocketAddr]) -> Option<SocketAddr> {
    let is_reachable = |address: &&SocketAddr| !is_loopback(address);
    addresses.iter().find(is_reachable).or(addresses.first()).copied()
}

fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// Checks whether a server may listen at `address`. It must not be open to the network by mistake, or closed to
/// everybody. `pisync doctor` asks the same.
///
/// # Errors
/// [`AppError::NoAdminKey`].
pub(crate) fn check_admin_key(
    auth: AuthMode,
    address: SocketAddr,
    has_admin: bool,
) -> Result<(), AppError> {
    if auth == AuthMode::Auto && !is_loopback(&address) && !has_admin {
        return Err(AppError::NoAdminKey(address));
    }
    Ok(())
}

/// Logs what a server's owner should know of who may do what.
fn warn_of_access(auth: AuthMode, address: SocketAddr, has_admin: bool) {
    match auth {
        AuthMode::Off if !is_loopback(&address) => tracing::warn!(
            "listening beyond this machine with AUTH=off: whoever reaches the server can read and write everything"
        ),
        AuthMode::Required if !has_admin => tracing::warn!(
            "nobody can change anything yet: make a key with `pisync key create --scope admin`"
        ),
        AuthMode::Auto | AuthMode::Off | AuthMode::Required => {}
    }
}

/// Brings the schema up to date, or says why the server cannot start with it.
async fn migrate(settings: &Settings, clock: &Clock) -> Result<(), AppError> {
    let mut migrator = Migrator::new(&settings.target, &settings.migrations_dir).await?;
    if settings.auto_migrate || matches!(settings.target, Target::Sqlite(_)) {
        for name in migrator.up(clock.now()).await? {
            tracing::info!(migration = name, "migration applied");
        }
        return Ok(());
    }
    let pending = migrator.check().await?;
    if pending.is_empty() { Ok(()) } else { Err(AppError::PendingMigrations(pending)) }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, path::Path};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::config::http::{ANSWER_BYTES, HttpSettings, Timeouts, TlsFiles};

    /// Reports an event on a connection that stays open, and returns the first line of the response. The line is empty
    /// if the connection has been closed.
    async fn report(connection: &mut TcpStream) -> String {
        let body = r#"{"device_id": "pi", "timestamp": "2026-11-22T12:00:00Z", "total_files_synced": 1, "total_errors": 0}"#;
        let request = format!(
            "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut answer = Vec::new();
        let exchange = async {
            connection.write_all(request.as_bytes()).await?;
            // The envelope ends with two braces.
            while !answer.ends_with(b"}") && connection.read_buf(&mut answer).await? > 0 {}
            std::io::Result::Ok(())
        };
        let _ = exchange.await;
        String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
    }

    fn settings(target: Target) -> Settings {
        Settings {
            target,
            migrations_dir: "/nonexistent".into(),
            auto_migrate: true,
            watches_fleet: true,
            public_url: None,
            secrets_key: None,
            sender: crate::notify::sender::SenderSettings::default(),
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

    /// A panic in any thread of the store stops the server, which then acknowledges nothing.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_dead_thread_ends_the_server() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(Target::Sqlite(folder.path().join("pisync.db")));
        let clock = Clock::system();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        migrate(&settings, &clock).await.unwrap();
        let store = store::open(&settings.target).await.unwrap();
        let running = tokio::spawn(serve(
            settings,
            clock,
            listener.into(),
            std::future::pending(),
            Arc::clone(&store),
            Tasks::default(),
        ));
        let mut connection = TcpStream::connect(address).await.unwrap();
        assert_eq!(report(&mut connection).await, "HTTP/1.1 201 Created");

        store.break_writer();
        let ended = tokio::time::timeout(Duration::from_secs(20), running).await;
        assert_eq!(
            ended.expect("it goes on").unwrap().unwrap_err().to_string(),
            "the database: the thread sqlite-writer panicked: broken by a test; the server stops, start it again"
        );
        let answer = report(&mut connection).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }

    /// TLS with its own certificate, in `folder`.
    fn tls_files(folder: &Path) -> TlsFiles {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let files = TlsFiles { certificate: folder.join("cert.pem"), key: folder.join("key.pem") };
        std::fs::write(&files.certificate, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        files
    }

    /// When any background task ends, the server stops with a message that names the task.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_task_that_ends_ends_the_server() {
        let names = [
            "TLS_CERT",
            INGEST,
            "the clock",
            "maintenance",
            "aggregation",
            "summaries",
            "deletions",
            "fleet health",
            "notifications",
            "heartbeat",
            "run starts",
            "API keys",
            "the database",
            "the log",
        ];
        for name in names {
            let folder = tempfile::tempdir().unwrap();
            let mut settings = settings(Target::Sqlite(folder.path().join("pisync.db")));
            settings.http.tls = Some(tls_files(folder.path()));
            // An address that is not reached.
            let heartbeat = "http://127.0.0.1:9/".parse().unwrap();
            settings.heartbeat_url = Some(crate::notify::Hidden::new(heartbeat));
            let clock = Clock::system();
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let address = listener.local_addr().unwrap();
            migrate(&settings, &clock).await.unwrap();
            let store = store::open(&settings.target).await.unwrap();
            let (tasks, mut started) = Tasks::observed();
            let shutdown = std::future::pending();
            let running =
                tokio::spawn(serve(settings, clock, listener.into(), shutdown, store, tasks));
            // The server closes a connection that does not speak TLS. It does so only after all its tasks have started.
            let mut connection = TcpStream::connect(address).await.unwrap();
            connection.write_all(b"no TLS\r\n").await.unwrap();
            let _ = connection.read_to_end(&mut Vec::new()).await;

            let mut tasks = Vec::new();
            while let Ok(task) = started.try_recv() {
                tasks.push(task);
            }
            assert_eq!(tasks.iter().map(|(name, _)| *name).collect::<Vec<_>>(), names);
            let task = tasks.iter().find(|(other, _)| *other == name);
            task.expect("a task of this name").1.abort();
            let ended = tokio::time::timeout(Duration::from_secs(20), running).await;
            let error = ended.expect("it goes on").unwrap().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: ")), "{name}: {error}");
            assert!(error.ends_with("; the server stops, start it again"), "{name}: {error}");
        }
    }
}
