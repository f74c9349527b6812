//! Makes connections: it decides which host is asked, and for how long.
//!
//! The writer, the pool and every command get their sessions here. Each session is therefore checked before anything is
//! sent on it (see `session`). A silent host must never keep the others from being tried.

use std::{
    net::IpAddr,
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool::managed;
use deadpool_postgres::{ClientWrapper, Metrics, Runtime, Timeouts};
use tokio_postgres::config::{SslMode as WireSslMode, TargetSessionAttrs};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    connection::{Connection, Driver, confirm_change, drive},
    durability,
    errors::{describe, unavailable},
    hosts::{Hosts, Place},
    no_session::NoSession,
    session::{self, State},
    tls,
};
use crate::{
    random::Randomness,
    store::{PostgresTarget, SslMode, StoreError},
};

/// How long one address of a host may take to give a session. This includes the connection, encryption, sign-in and the
/// first query. `connect_timeout` in the URL overrides it.
const HOST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long sent data may stay unacknowledged, and how long a connection may be idle before keepalive probes begin. The
/// URL's settings override these.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVES_IDLE: Duration = Duration::from_secs(30);

/// How long to wait for a pooled connection while all are in use.
const POOL_WAIT: Duration = Duration::from_secs(5);

/// Connections in the pool. Reads are short. A small pool saves PostgreSQL's memory, also with several nodes.
const POOL_SIZE: usize = 8;

/// Makes connections.
#[derive(Clone)]
pub(super) struct Connector {
    /// The settings that are the same for all hosts.
    config: tokio_postgres::Config,
    hosts: Arc<Hosts>,
    /// The time-out for each address of a host.
    timeout: Duration,
    /// Whether to skip a host that takes no writes.
    needs_primary: bool,
    /// Whether the database must be in UTF-8. Every database must be, except the one from which others are created.
    needs_utf8: bool,
    /// A mark for this connector's sessions, and the number of sessions so far.
    mark: Arc<(String, AtomicU64)>,
    tls: MakeRustlsConnect,
}

/// Each host, with the reason why it gave no session.
struct Failures(Vec<(String, NoSession)>);

impl From<Failures> for StoreError {
    fn from(Failures(failures): Failures) -> Self {
        if let [(_, NoSession::Refused(why))] = &failures[..] {
            return Self::Unavailable(why.clone());
        }
        let (refusals, others): (Vec<_>, Vec<_>) =
            failures.iter().partition(|(_, reason)| reason.is_refusal());
        let is_away = refusals.is_empty();
        let reasons = refusals.into_iter().chain(others);
        let reasons: Vec<_> = reasons.map(|(place, reason)| format!("{place}: {reason}")).collect();
        let reasons = reasons.join("; ");
        if is_away { unavailable(&reasons) } else { Self::Unavailable(reasons) }
    }
}

/// The pool's connections.
pub(super) type Pool = managed::Pool<Sessions>;

/// One of the pool's connections.
pub(super) type Object = managed::Object<Sessions>;

/// Makes the pool's connections.
pub(super) struct Sessions(Connector);

/// A connection in the pool.
pub(super) struct Pooled {
    client: ClientWrapper,
    /// See [`Connection::unreplicated`].
    unreplicated: Arc<AtomicBool>,
}

impl Pooled {
    /// See [`Connection::confirm_change`].
    pub(super) fn confirm_change(&self) -> Result<(), StoreError> {
        confirm_change(&self.unreplicated)
    }
}

impl Deref for Pooled {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.client
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut ClientWrapper {
        &mut self.client
    }
}

impl Connector {
    pub(super) fn new(target: &PostgresTarget) -> Result<Self, StoreError> {
        let given = &target.config;
        let mut config = common(given);
        config.ssl_mode(match target.ssl_mode {
            SslMode::Disable => WireSslMode::Disable,
            SslMode::Prefer => WireSslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => WireSslMode::Require,
        });
        let hosts = Hosts::of(given);
        let mark = Randomness::system().bytes().map_err(StoreError::Failed)?;
        let mark = mark[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self {
            config,
            // With several hosts, use the one that takes writes. This gives failover without a proxy.
            needs_primary: hosts.places().len() > 1
                || given.get_target_session_attrs() == TargetSessionAttrs::ReadWrite,
            hosts,
            timeout: given.get_connect_timeout().copied().unwrap_or(HOST_TIMEOUT),
            needs_utf8: true,
            mark: Arc::new((mark, AtomicU64::new(0))),
            tls: tls::connector(target.ssl_mode, target.ssl_root_cert.as_deref())?,
        })
    }

    pub(super) fn pool(&self) -> Result<Pool, StoreError> {
        Pool::builder(Sessions(self.clone()))
            .max_size(POOL_SIZE)
            .runtime(Runtime::Tokio1)
            // Making a connection has its own time-outs, one for each host.
            .timeouts(Timeouts { wait: Some(POOL_WAIT), create: None, recycle: Some(POOL_WAIT) })
            .build()
            .map_err(|error| StoreError::Failed(describe(&error)))
    }

    /// A connection outside the pool, to the first host that gives one.
    pub(super) async fn connect(&self) -> Result<Connection, StoreError> {
        self.try_hosts().await.map_err(StoreError::from)
    }

    /// Whether the database exists and can be used.
    pub(super) async fn database_exists(&self) -> Result<bool, StoreError> {
        match self.try_hosts().await {
            Ok(_) => Ok(true),
            Err(failures) if failures.0.iter().any(|(_, reason)| reason.is_missing_database()) => {
                Ok(false)
            }
            Err(failures) => Err(failures.into()),
        }
    }

    async fn try_hosts(&self) -> Result<Connection, Failures> {
        let mut failures = Vec::new();
        for position in self.hosts.in_order() {
            let place = &self.hosts.places()[position];
            let asking = self.hosts.ask(position);
            match self.connect_to(place).await {
                Ok(connection) => {
                    asking.answered();
                    return Ok(connection);
                }
                Err(reason) => failures.push((place.to_string(), reason)),
            }
        }
        Err(Failures(failures))
    }

    /// A connector to another database of the same server, whatever its encoding. Databases are created from it.
    pub(super) fn with_database(&self, name: &str) -> Self {
        let mut other = self.clone();
        other.config.dbname(name);
        other.needs_utf8 = false;
        other
    }

    /// Tries all addresses of a host.
    async fn connect_to(&self, place: &Place) -> Result<Connection, NoSession> {
        let mut reason = None;
        for address in place.addresses(self.timeout).await? {
            // On the heap, because it is large and part of every call that may need a connection.
            match Box::pin(self.connect_at(place, address)).await {
                Ok(connection) => {
                    place.note_answered(address);
                    return Ok(connection);
                }
                Err(other) => reason = Some(other),
            }
        }
        Err(reason.unwrap_or_else(|| NoSession::Unfit("the name has no address".into())))
    }

    /// A session at one address, checked and fit for use.
    async fn connect_at(
        &self,
        place: &Place,
        address: Option<IpAddr>,
    ) -> Result<Connection, NoSession> {
        let (mark, sessions) = &*self.mark;
        let mark = format!("{mark}-{}", sessions.fetch_add(1, Ordering::Relaxed));
        let mut config = self.config.clone();
        place.put_into(&mut config, address);
        let mut direct = config.clone();
        direct.options(session::options(&mark, config.get_options()));

        let (connection, state) = match self.session(&direct).await {
            Ok((connection, state)) if state.has_mark(&mark) => (connection, state),
            // The options did not arrive: a pooler stands between PostgreSQL and us.
            Ok((other, _)) => self.behind_pooler(&config, Some(other)).await?,
            Err(NoSession::Error(error)) if session::refuses_options(&error) => {
                self.behind_pooler(&config, None).await?
            }
            Err(reason) => return Err(reason),
        };
        if self.needs_primary && state.is_read_only() {
            return Err(NoSession::Unfit("takes no writes, being a standby or read-only".into()));
        }
        if self.needs_utf8 {
            state.check_encoding()?;
        }
        self.in_time(async { Ok(durability::secure(&connection.client).await?) }).await?;
        Ok(connection)
    }

    /// A session through a connection pooler that keeps options from PostgreSQL. Fails unless each of our connections
    /// has a session of its own there. `other` is a connection through the same pooler.
    async fn behind_pooler(
        &self,
        config: &tokio_postgres::Config,
        other: Option<Connection>,
    ) -> Result<(Connection, State), NoSession> {
        if config.get_options().is_some() {
            return Err(NoSession::Refused(session::OPTIONS_LOST.into()));
        }
        let other = match other {
            Some(other) => other,
            None => self.session(config).await?.0,
        };
        session::check_pooler(other, self.timeout).await?;
        let (connection, state) = self.session(config).await?;
        let set = session::set_statements();
        self.in_time(async { Ok(connection.client.batch_execute(&set).await?) }).await?;
        Ok((connection, state))
    }

    /// Connects and reads the state of the session.
    async fn session(
        &self,
        config: &tokio_postgres::Config,
    ) -> Result<(Connection, State), NoSession> {
        // The driver's own future is large. On the heap, it does not enlarge every caller's future.
        self.in_time(Box::pin(async {
            let (client, connection) = config.connect(self.tls.clone()).await?;
            let unreplicated = Arc::new(AtomicBool::new(false));
            let driver = tokio::spawn(drive(connection, Arc::clone(&unreplicated)));
            let connection = Connection { client, driver: Driver(Some(driver)), unreplicated };
            let state = State::of(&connection.client).await?;
            Ok((connection, state))
        }))
        .await
    }

    /// Runs `work` within the time-out of a host.
    async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, NoSession>>,
    ) -> Result<T, NoSession> {
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(NoSession::Silent(self.timeout)),
        }
    }
}

/// The settings of a connection, without the hosts.
fn common(given: &tokio_postgres::Config) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    if let Some(user) = given.get_user() {
        config.user(user);
    }
    if let Some(password) = given.get_password() {
        config.password(password);
    }
    if let Some(name) = given.get_dbname() {
        config.dbname(name);
    }
    if let Some(options) = given.get_options() {
        config.options(options);
    }
    let unset = tokio_postgres::Config::new();
    let idle = match given.get_keepalives_idle() {
        idle if idle == unset.get_keepalives_idle() => KEEPALIVES_IDLE,
        idle => idle,
    };
    config
        .application_name(given.get_application_name().unwrap_or("pisync"))
        .channel_binding(given.get_channel_binding())
        .tcp_user_timeout(given.get_tcp_user_timeout().copied().unwrap_or(TCP_USER_TIMEOUT))
        .keepalives(given.get_keepalives())
        .keepalives_idle(idle);
    if let Some(interval) = given.get_keepalives_interval() {
        config.keepalives_interval(interval);
    }
    if let Some(retries) = given.get_keepalives_retries() {
        config.keepalives_retries(retries);
    }
    config
}

impl managed::Manager for Sessions {
    type Type = Pooled;
    type Error = StoreError;

    async fn create(&self) -> Result<Pooled, StoreError> {
        let Connection { client, mut driver, unreplicated } = self.0.connect().await?;
        let task = driver.0.take().ok_or(StoreError::Stopped)?;
        Ok(Pooled { client: ClientWrapper::new(client, task), unreplicated })
    }

    async fn recycle(
        &self,
        pooled: &mut Pooled,
        _: &Metrics,
    ) -> managed::RecycleResult<StoreError> {
        if pooled.client.is_closed() {
            return Err(managed::RecycleError::message("the connection is closed"));
        }
        if pooled.confirm_change().is_err() {
            // The previous user gave up before the warning came. The next user has changed nothing and must not get the
            // error.
            return Err(managed::RecycleError::message("its last commit may not be replicated"));
        }
        Ok(())
    }
}
