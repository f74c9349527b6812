//! Connecting, the settings every session gets, and what PostgreSQL's errors mean to us.

use std::{error::Error, time::Duration};

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime, Timeouts};
use tokio_postgres::{
    Client,
    config::{SslMode as WireSslMode, TargetSessionAttrs},
    error::SqlState,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls;
use crate::store::{PostgresTarget, SslMode, StoreError};

/// How long to wait for a connection to be made, of each host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long to wait for all of it: several hosts, the handshake, signing in.
const SESSION_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for a session's end that has been asked for.
const BACKEND_END_TIMEOUT: Duration = Duration::from_secs(4);

/// Connections in the pool. Reads are short; a small pool keeps PostgreSQL's memory small, with
/// several nodes before it.
const POOL_SIZE: usize = 8;

/// Settings of every session. Compiling queries to machine code costs more than ours take; a
/// statement that takes half a minute has gone wrong; a transaction left open would hold its locks.
const SESSION_OPTIONS: &str = "-c jit=off -c timezone=UTC -c client_encoding=UTF8 \
     -c statement_timeout=30s -c idle_in_transaction_session_timeout=60s";

/// Makes connections.
#[derive(Clone)]
pub(super) struct Connector {
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
}

/// A connection of one's own. Dropping it closes it at once.
pub(super) struct Connection {
    pub(super) client: Client,
    driver: tokio::task::JoinHandle<()>,
}

impl Connection {
    /// Ends it: whoever still waits for an answer hears that the connection is closed.
    pub(super) fn close(&self) {
        self.driver.abort();
    }
}

/// The process behind a session on PostgreSQL's side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backend {
    pid: i32,
    started: jiff::Timestamp,
}

impl Backend {
    /// The one that serves `client`.
    pub(super) async fn of(client: &Client) -> Result<Self, tokio_postgres::Error> {
        const SELECT: &str =
            "select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()";
        let row = client.query_one(SELECT, &[]).await?;
        Ok(Self { pid: row.try_get(0)?, started: row.try_get(1)? })
    }

    /// Ends it, through the session of another, so that nothing that it was sent takes effect any more; false
    /// when it is still there after some seconds. Another server, such as a standby that has taken over, does
    /// not have it.
    pub(super) async fn end(&self, client: &Client) -> Result<bool, tokio_postgres::Error> {
        let end = format!(
            "select pg_terminate_backend(pid, {})
               from pg_stat_activity
              where pid = $1 and backend_start = $2",
            BACKEND_END_TIMEOUT.as_millis()
        );
        match client.query_opt(&end, &[&self.pid, &self.started]).await? {
            None => Ok(true),
            Some(row) => row.try_get(0),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Connector {
    pub(super) fn new(target: &PostgresTarget) -> Result<Self, StoreError> {
        let mut config = target.config.clone();
        let options = match config.get_options() {
            Some(own) => format!("{SESSION_OPTIONS} {own}"),
            None => SESSION_OPTIONS.to_owned(),
        };
        config
            .options(options)
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_user_timeout(Duration::from_secs(10))
            .keepalives_idle(Duration::from_secs(30))
            .ssl_mode(match target.ssl_mode {
                SslMode::Disable => WireSslMode::Disable,
                SslMode::Prefer => WireSslMode::Prefer,
                SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => WireSslMode::Require,
            });
        if config.get_application_name().is_none() {
            config.application_name("pisync");
        }
        if config.get_hosts().len() > 1 {
            // Of several hosts, the one that takes writes: failover without a proxy.
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        Ok(Self { config, tls: tls::connector(target.ssl_mode, target.ssl_root_cert.as_deref())? })
    }

    pub(super) fn pool(&self) -> Result<Pool, StoreError> {
        let manager = Manager::from_config(
            self.config.clone(),
            self.tls.clone(),
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        Pool::builder(manager)
            .max_size(POOL_SIZE)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(SESSION_TIMEOUT),
                create: Some(SESSION_TIMEOUT),
                recycle: Some(SESSION_TIMEOUT),
            })
            .build()
            .map_err(|error| StoreError::Failed(describe(&error)))
    }

    /// A connection outside the pool.
    pub(super) async fn connect(&self) -> Result<Connection, StoreError> {
        let connecting =
            tokio::time::timeout(SESSION_TIMEOUT, self.config.connect(self.tls.clone()));
        match connecting.await {
            Ok(Ok((client, connection))) => {
                let driver = tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(error = describe(&error), "database connection ended");
                    }
                });
                Ok(Connection { client, driver })
            }
            Ok(Err(error)) if error.code() == Some(&SqlState::INVALID_CATALOG_NAME) => {
                let hint = "create it with `pisync db setup`, or set DB_NAME to another";
                Err(StoreError::Unavailable(format!("{}; {hint}", describe(&error))))
            }
            Ok(Err(error)) => Err(StoreError::Unavailable(describe(&error))),
            Err(_) => Err(StoreError::Unavailable("PostgreSQL does not answer".into())),
        }
    }

    /// The same server, another database.
    pub(super) fn with_database(&self, name: &str) -> Self {
        let mut other = self.clone();
        other.config.dbname(name);
        other
    }
}

/// An error with all its causes, in one line; the driver's own text leaves out what matters.
pub(super) fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    // PostgreSQL's details and hints are lines of their own.
    text.replace('\n', "; ")
}

/// Sorts PostgreSQL's errors by what can be done about them.
#[expect(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
pub(super) fn store_error(error: tokio_postgres::Error) -> StoreError {
    let text = describe(&error);
    let Some(code) = error.code() else {
        // No answer from the server: the connection is gone, or the driver could not encode a value.
        return if error.is_closed() || is_io(&error) {
            StoreError::Unavailable(text)
        } else {
            StoreError::Failed(text)
        };
    };
    match code.code().get(..2) {
        // Data exceptions and constraints.
        Some("22" | "23") => StoreError::Rejected(text),
        // Connection trouble, rollbacks such as deadlocks, lack of resources (disk, memory,
        // connections), interventions (shutdown, cancelled, statement time-out), system errors.
        Some("08" | "40" | "53" | "55" | "57" | "58") => StoreError::Unavailable(text),
        // A server that has become a standby.
        _ if *code == SqlState::READ_ONLY_SQL_TRANSACTION => StoreError::Unavailable(text),
        _ => StoreError::Failed(text),
    }
}

/// Whether the connection is no longer of use.
pub(super) fn is_connection_lost(error: &tokio_postgres::Error) -> bool {
    let class = error.code().and_then(|code| code.code().get(..2));
    error.is_closed() || is_io(error) || matches!(class, Some("08" | "57"))
}

fn is_io(error: &tokio_postgres::Error) -> bool {
    error.source().is_some_and(<dyn Error>::is::<std::io::Error>)
}
