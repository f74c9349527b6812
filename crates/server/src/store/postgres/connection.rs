//! One connection to PostgreSQL, and the process that serves it there. `connect` makes connections; the writer, the
//! pool and commands own them. No commit may count as done while PostgreSQL warns that it may not be replicated.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::{AsyncMessage, Client};

use super::{
    durability,
    errors::{WriteError, describe},
};
use crate::store::StoreError;

/// How long to wait until a session has ended after it was told to.
const BACKEND_END_TIMEOUT: Duration = Duration::from_secs(4);

/// Fails when PostgreSQL has warned of a commit that may not be replicated.
pub(super) fn confirm_change(unreplicated: &AtomicBool) -> Result<(), StoreError> {
    if unreplicated.load(Ordering::Acquire) { Err(StoreError::Unreplicated) } else { Ok(()) }
}

/// A connection outside the pool. Dropping it closes it at once.
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) driver: Driver,
    /// Whether PostgreSQL has warned of a commit that may not be replicated.
    pub(super) unreplicated: Arc<AtomicBool>,
}

/// The task that carries a connection's messages. It ends with its owner.
pub(super) struct Driver(pub(super) Option<tokio::task::JoinHandle<()>>);

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Connection {
    /// Fails when a commit in this session may not be replicated, although PostgreSQL answered that it was carried out.
    /// The warning arrives before the answer.
    pub(super) fn check_replicated(&self) -> Result<(), WriteError> {
        if self.unreplicated.load(Ordering::Acquire) {
            return Err(WriteError::Unreplicated);
        }
        Ok(())
    }

    /// The same check for changes other than events that are reported to somebody. After a failure the session must not
    /// be used any more.
    pub(super) fn confirm_change(&self) -> Result<(), StoreError> {
        confirm_change(&self.unreplicated)
    }

    /// Closes it. Every call that still waits for an answer fails.
    pub(super) fn close(&self) {
        if let Some(task) = &self.driver.0 {
            task.abort();
        }
    }

    /// Waits for the other side to close it.
    pub(super) async fn closed(&mut self) {
        if let Some(task) = &mut self.driver.0 {
            let _ = task.await;
            self.driver.0 = None;
        }
    }
}

/// The process behind a session on PostgreSQL's side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backend {
    pid: i32,
    started: jiff::Timestamp,
}

impl Backend {
    /// The process that serves `client`.
    pub(super) async fn of(client: &Client) -> Result<Self, tokio_postgres::Error> {
        const SELECT: &str =
            "select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()";
        let row = client.query_one(SELECT, &[]).await?;
        Ok(Self { pid: row.try_get(0)?, started: row.try_get(1)? })
    }

    /// Tells the process to end, through another session. It does not wait for the end.
    pub(super) async fn tell_to_end(&self, client: &Client) -> Result<(), tokio_postgres::Error> {
        const END: &str = "
            select pg_terminate_backend(pid) from pg_stat_activity where pid = $1 and backend_start = $2
        ";
        client.query_opt(END, &[&self.pid, &self.started]).await.map(drop)
    }

    /// Ends the process through another session. After that, nothing that was sent to it takes effect. False when it is
    /// still there after some seconds. On another server, such as a standby that has taken over, the process does not
    /// exist.
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

/// Carries a connection's messages until it ends. It notes a warning that a commit may not be replicated.
pub(super) async fn drive<S, T>(
    mut connection: tokio_postgres::Connection<S, T>,
    unreplicated: Arc<AtomicBool>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
        match message {
            Ok(AsyncMessage::Notice(notice)) if durability::is_unreplicated(&notice) => {
                unreplicated.store(true, Ordering::Release);
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(error = describe(&error), "database connection ended");
                return;
            }
        }
    }
}
