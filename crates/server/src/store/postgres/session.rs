//! Checks a new session before anything is sent on it. It must be a PostgreSQL session of its own, with our settings,
//! in a database that can hold any letter. `connect` calls it for every session, because after a failover the same name
//! may lead to another server.

use std::time::Duration;

use tokio_postgres::{Client, SimpleQueryMessage, error::SqlState};

use super::{connection::Connection, no_session::NoSession};

/// Settings of every session. Compiling queries to machine code costs more than running ours. A statement that takes
/// half a minute has gone wrong. A transaction that is left open would hold its locks. Without warnings, PostgreSQL
/// would not report a commit that is not replicated. Our statements are written for this isolation level.
const SETTINGS: [(&str, &str); 7] = [
    ("jit", "off"),
    ("timezone", "UTC"),
    ("client_encoding", "UTF8"),
    ("statement_timeout", "30s"),
    ("idle_in_transaction_session_timeout", "60s"),
    ("client_min_messages", "warning"),
    ("default_transaction_isolation", "read committed"),
];

/// A setting that PostgreSQL does not know. Each session starts with a value of its own. A session with that value was
/// started for us. One without it was started by a pooler in between.
const MARK: &str = "pisync.session";

/// The idle time after which the test session ends, in milliseconds, and how long to wait for its end.
const IDLE_MILLISECONDS: u32 = 100;
const IDLE_WAIT: Duration = Duration::from_secs(2);

/// Why a pooler is refused.
const SHARES_SESSIONS: &str = "a connection pooler in transaction or statement mode answers, where settings, locks \
     and prepared statements do not stay with a connection: use its session mode (of pgbouncer: \
     pool_mode=session for this database or user), or connect to PostgreSQL directly";

/// Why a pooler does not work together with options in the URL.
pub(super) const OPTIONS_LOST: &str = "a connection pooler answers that keeps `options` from PostgreSQL: leave \
     them out of the URL and set them with `alter role … set …`, or connect to PostgreSQL directly";

/// The startup option `options` of a session: our settings, then the user's own.
pub(super) fn options(mark: &str, own: Option<&str>) -> String {
    // A space within a value is escaped.
    let ours =
        SETTINGS.map(|(name, value)| format!("-c {name}={} ", value.replace(' ', "\\ "))).concat();
    format!("{ours}-c {MARK}={mark} {}", own.unwrap_or_default())
}

/// The same settings as statements, for sessions that the options do not reach.
pub(super) fn set_statements() -> String {
    SETTINGS.map(|(name, value)| format!("set {name} = '{value}';")).concat()
}

/// Whether a pooler refuses options.
pub(super) fn refuses_options(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| {
        *error.code() == SqlState::PROTOCOL_VIOLATION
            && error.message().contains("unsupported startup parameter")
    })
}

/// What a session reports about itself.
pub(super) struct State {
    is_read_only: bool,
    encoding: String,
    database: String,
    mark: String,
}

impl State {
    /// A simple query, because poolers pass it through.
    pub(super) async fn of(client: &Client) -> Result<Self, NoSession> {
        let select = format!(
            "select current_setting('transaction_read_only'),
                    current_setting('server_encoding'),
                    current_database(),
                    current_setting('{MARK}', true)"
        );
        let answer = client.simple_query(&select).await?;
        let row = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let Some(row) = row else {
            return Err(NoSession::Unfit("answers the first query with nothing".into()));
        };
        let text =
            |column: usize| row.try_get(column).map(|text| text.unwrap_or_default().to_owned());
        Ok(Self {
            is_read_only: text(0)? == "on",
            encoding: text(1)?,
            database: text(2)?,
            mark: text(3)?,
        })
    }

    /// Whether the session was started with this mark.
    pub(super) fn has_mark(&self, mark: &str) -> bool {
        self.mark == mark
    }

    /// Whether the session cannot write.
    pub(super) fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Fails unless the database can hold any letter. `SQL_ASCII` accepts all bytes, but counts and cuts bytes instead
    /// of letters.
    pub(super) fn check_encoding(&self) -> Result<(), NoSession> {
        if self.encoding == "UTF8" {
            return Ok(());
        }
        let Self { encoding, database, .. } = self;
        Err(NoSession::Refused(format!(
            "the database {database} is encoded in {encoding}, which cannot hold every letter that devices send: \
             PiSync needs UTF8. Name a new database that `pisync db setup` then creates, or create one with \
             `create database NAME encoding 'UTF8' template template0`; pg_dump and pg_restore bring over what is \
             in this one"
        )))
    }
}

/// Finds out whether a pooler gives each connection a session of its own, and fails if not. It tells the session to end
/// when idle. An own session takes its connection with it. If the connection outlives the session, the pooler had lent
/// the session for one transaction only. `connection` is used up. Another user of a lent session can lose it only while
/// nothing runs in it.
pub(super) async fn check_pooler(
    mut connection: Connection,
    timeout: Duration,
) -> Result<(), NoSession> {
    let end_when_idle = format!("set idle_session_timeout = {IDLE_MILLISECONDS}");
    let asked =
        tokio::time::timeout(timeout, connection.client.batch_execute(&end_when_idle)).await;
    asked.map_err(|_| NoSession::Silent(timeout))??;
    if tokio::time::timeout(IDLE_WAIT, connection.closed()).await.is_ok() {
        return Ok(());
    }
    let alive = connection.client.simple_query("select 1");
    match tokio::time::timeout(timeout, alive).await {
        Ok(Ok(_)) => Err(NoSession::Refused(SHARES_SESSIONS.into())),
        Ok(Err(_)) => Ok(()),
        Err(_) => Err(NoSession::Silent(timeout)),
    }
}
