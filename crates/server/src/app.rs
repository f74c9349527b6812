//! The one place that wires everything together: store, ingest and HTTP, and their beginning and end.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::{
    clock::Clock,
    http::{self, ApiParts, AuthMode, ConnectionSettings, HttpSettings, Listeners, Tls},
    ingest::Ingest,
    keys::{self, Keyring},
    maintenance::{Maintenance, STEP_YIELD, earlier_time},
    metrics::Metrics,
    random::Randomness,
    store::{
        self, Retention, Store, StoreError, Target,
        migrations::{MigrationError, Migrator},
    },
};

/// How often the store looks after itself.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// How often it tries again when that failed.
const MAINTENANCE_RETRY: Duration = Duration::from_secs(60);

/// How often events are folded into the sums by day and hour. Reads add up those that are not, so it is
/// not long; and a few at a time are folded in less than a step.
const FOLD_INTERVAL: Duration = Duration::from_secs(30);

/// How long ingest may take to store what is queued when the server stops. With the 20 s that requests
/// under way get, it stays within 30 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(9);

/// What a server is told to be.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The database.
    pub target: Target,
    /// Where users' own migrations are; need not exist.
    pub migrations_dir: PathBuf,
    /// Whether to run pending migrations at the start.
    pub auto_migrate: bool,
    /// For how many days event ids are remembered.
    pub event_id_retention_days: u32,
    /// How long events are kept one by one; for ever when `None`.
    pub retention: Option<Retention>,
    /// The API.
    pub http: HttpSettings,
}

/// Why a server did not start, or ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The schema is not what it must be.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// Migrations are pending and may not be run.
    #[error(
        "pending migrations: {}; run `pisync migrate up`, or let the server do it with AUTO_MIGRATE=true",
        .0.join(", ")
    )]
    PendingMigrations(Vec<String>),
    /// The database cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Everybody could reach the server, and nobody has a key.
    #[error(
        "listening on {0} needs a key, and there is none yet: make one with `pisync key create --scope admin`, or let everybody in with AUTH=off"
    )]
    NoAdminKey(SocketAddr),
    /// TLS is asked for, but its files are of no use.
    #[error("{0}")]
    Tls(String),
    /// A part of the server has died.
    #[error("{0}; the server stops")]
    Died(String),
}

/// Runs a server on `listeners` until `shutdown` comes; then everything that was accepted is committed
/// and answered before it returns.
///
/// # Errors
/// See [`AppError`].
pub async fn run(
    settings: Settings,
    clock: Clock,
    listeners: impl Into<Listeners>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AppError> {
    // A SQLite file belongs to one server, also while it migrates.
    let _claim = store::claim(&settings.target)?;
    migrate(&settings, &clock).await?;
    let store = store::open(&settings.target).await?;
    let mut maintenance = Maintenance::new(
        Arc::clone(&store),
        clock.clone(),
        settings.retention,
        settings.event_id_retention_days,
    );
    maintenance.prepare().await?;

    let died = |error: &dyn std::fmt::Display| AppError::Died(error.to_string());
    let listeners = listeners.into();
    let addresses = listeners.addresses().map_err(|error| died(&error))?;
    // What it takes to be let in depends on whether others than this machine's own users can get here.
    let reaches_out = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
    let address = addresses.iter().find(reaches_out).or(addresses.first()).copied();
    let address = address.ok_or_else(|| died(&"there is no address to listen on"))?;
    let (tls, tls_watch) = match settings.http.tls.clone().map(Tls::load).transpose() {
        Ok(tls) => tls.unzip(),
        Err(error) => return Err(AppError::Tls(error)),
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let _watching = tls_watch.map(|watch| Background(tokio::spawn(watch.follow())));
    let keyring = Arc::new(Keyring::default());
    keyring.refresh(&*store).await?;
    check_keys(settings.http.auth, address, keyring.has_admin(clock.now()))?;
    let metrics = Arc::new(Metrics::new().map_err(|error| died(&error))?);
    let (tell, news) = mpsc::unbounded_channel();
    let writer = store.ingest_writer(tell).await?;
    let (ingest, task) = Ingest::new(writer, news, clock.clone(), Arc::clone(&metrics));
    let (stop_ingest, stopped) = oneshot::channel::<()>();
    let mut ingest_task = tokio::spawn(task.run(async {
        let _ = stopped.await;
    }));
    let mut maintenance = Background(tokio::spawn(maintain(maintenance)));
    let mut folding = Background(tokio::spawn(fold(Arc::clone(&store), clock.clone())));
    let mut following =
        Background(tokio::spawn(keys::follow(Arc::clone(&keyring), Arc::clone(&store))));
    let parts = ApiParts {
        store: Arc::clone(&store),
        ingest,
        clock,
        metrics,
        randomness: Randomness::system(),
        keyring,
        address,
    };
    let router = http::router(parts, &settings.http);

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
    tokio::select! {
        () = http::serve(listeners, router, connections, shutdown) => {}
        ended = &mut ingest_task => return Err(ended_early("ingest", ended)),
        ended = &mut maintenance.0 => return Err(ended_early("maintenance", ended.map(Ok))),
        ended = &mut following.0 => return Err(ended_early("following keys", ended.map(Ok))),
        ended = &mut folding.0 => return Err(ended_early("folding", ended.map(Ok))),
    }
    drop((maintenance, folding));
    drop(stop_ingest);
    match tokio::time::timeout(DRAIN_TIMEOUT, ingest_task).await {
        Ok(Ok(result)) => result?,
        Ok(Err(error)) => return Err(died(&error)),
        Err(_) => return Err(died(&"the database did not take what was queued in time")),
    }
    if let Err(error) = store.close().await {
        // Everything is stored all the same, and the next start sees to the rest.
        tracing::warn!(%error, "cannot close the database properly");
    }
    Ok(())
}

/// A background task, which ends with its owner.
struct Background(JoinHandle<()>);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn ended_early(
    what: &str,
    ended: Result<Result<(), StoreError>, tokio::task::JoinError>,
) -> AppError {
    AppError::Died(match ended {
        Ok(Ok(())) => format!("{what} ended early"),
        Ok(Err(error)) => format!("{what} ended early: {error}"),
        Err(error) => format!("{what} ended early: {error}"),
    })
}

/// Whether a server may listen at `address`: not before the whole network, with nobody able to get in or
/// everybody by mistake.
fn check_keys(auth: AuthMode, address: SocketAddr, has_admin: bool) -> Result<(), AppError> {
    let is_loopback = address.ip().to_canonical().is_loopback();
    match auth {
        AuthMode::Auto if !is_loopback && !has_admin => return Err(AppError::NoAdminKey(address)),
        AuthMode::Off if !is_loopback => tracing::warn!(
            "listening beyond this machine with AUTH=off: whoever reaches the server can read and write everything"
        ),
        AuthMode::Required if !has_admin => tracing::warn!(
            "nobody can change anything yet: make a key with `pisync key create --scope admin`"
        ),
        AuthMode::Auto | AuthMode::Off | AuthMode::Required => {}
    }
    Ok(())
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

async fn maintain(mut maintenance: Maintenance) {
    loop {
        let pause = match maintenance.run().await {
            Ok(true) => MAINTENANCE_INTERVAL,
            // The clock is not set yet.
            Ok(false) => MAINTENANCE_RETRY,
            Err(error) => {
                tracing::warn!(%error, "maintenance failed; it will be tried again");
                MAINTENANCE_RETRY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Folds events a few at a time, and gives way to ingest in between.
async fn fold(store: Arc<dyn Store>, clock: Clock) {
    loop {
        let started = Instant::now();
        let folded = async {
            // Events beyond would be received by a clock that is ahead, and are not waited for.
            let now = earlier_time(&*store, &clock).await?;
            store.fold_events(now).await
        };
        let pause = match folded.await {
            Ok(true) => started.elapsed() * STEP_YIELD,
            Ok(false) => FOLD_INTERVAL,
            Err(StoreError::Unavailable(error)) => {
                // Ingest says so in the log.
                tracing::debug!(error, "events cannot be folded while the database is away");
                FOLD_INTERVAL
            }
            Err(error) => {
                tracing::warn!(%error, "folding events failed; it will be tried again");
                MAINTENANCE_RETRY
            }
        };
        tokio::time::sleep(pause).await;
    }
}
