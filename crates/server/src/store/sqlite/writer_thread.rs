//! The thread that owns the connection for writing. Whoever changes something sends it a call; calls run one after the
//! other.

use std::{path::Path, sync::Arc};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::{
    checkpoint::{checkpoint_beside, copy_log},
    connection::store_error,
    ids,
    watch::Presence,
    write_connection::WriteConnection,
};
use crate::{store::StoreError, threads::Threads};

/// Calls that may wait for the thread. Ingest has one in flight at a time; the rest are rare changes
/// that people make.
const WAITING_CALLS: usize = 64;

/// What the thread does next.
pub(super) type Call = Box<dyn FnOnce(&mut WriteConnection) + Send>;

/// A handle on the thread, which ends when the last handle is gone.
#[derive(Clone)]
pub(super) struct WriterThread {
    calls: mpsc::Sender<Call>,
    /// All threads of the store.
    threads: Threads,
    /// Whether the files are where they were.
    presence: Arc<Presence>,
}

impl WriterThread {
    /// `connection` is to the file at `path`.
    pub(super) fn start(mut connection: Connection, path: &Path) -> Result<Self, StoreError> {
        let (calls, mut waiting) = mpsc::channel::<Call>(WAITING_CALLS);
        let threads = Threads::new();
        let reach = calls.downgrade();
        let copy_rest = move || {
            let Some(calls) = reach.upgrade() else { return false };
            let rest: Call = Box::new(|writer| {
                // Reported by the checkpoints when there is something to report.
                let _ = copy_log(&writer.connection);
            });
            calls.blocking_send(rest).is_ok()
        };
        checkpoint_beside(&mut connection, path, copy_rest, &threads)?;
        let mut connection = WriteConnection::new(connection, path);
        threads
            .start("sqlite-writer", move || {
                while let Some(call) = waiting.blocking_recv() {
                    call(&mut connection);
                }
            })
            .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { calls, threads, presence: Arc::default() })
    }

    /// All threads of the store: none of them may end before it.
    pub(super) fn threads(&self) -> &Threads {
        &self.threads
    }

    /// Has the thread do something, unless there is too much for it to do already; then the answer is false.
    pub(super) fn try_send(&self, call: Call) -> bool {
        self.calls.try_send(call).is_ok()
    }

    /// Whether the files are where they were; what is written is lost otherwise.
    pub(super) fn presence(&self) -> &Arc<Presence> {
        &self.presence
    }

    /// Runs `work` on the thread.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut WriteConnection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.presence.check()?;
        self.call_anyway(work).await
    }

    /// Runs `work` on the thread, wherever the files are.
    pub(super) async fn call_anyway<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut WriteConnection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, result) = oneshot::channel();
        let call: Call = Box::new(move |connection| {
            // The caller may have gone away; the work is done all the same.
            let result = work(connection);
            let _ = reply.send(result.map_err(|error| ids::explain(&connection.connection, error)));
        });
        self.calls.send(call).await.map_err(|_| StoreError::Stopped)?;
        result.await.map_err(|_| StoreError::Stopped)?.map_err(store_error)
    }
}
