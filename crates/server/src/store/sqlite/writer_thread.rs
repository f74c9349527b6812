//! The thread that owns the connection for writing. Every change is sent to it as a call; calls run one after the
//! other. Before a call it applies the ingest journal if somebody waits for that, however many calls wait. The files of
//! the resources use it. A call must be short, because ingest waits behind it.

use std::{path::Path, sync::Arc};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::{
    apply::apply_if_wanted,
    checkpoint::{checkpoint_beside, copy_log},
    connection::store_error,
    ids,
    watch::Presence,
    write_connection::WriteConnection,
};
use crate::{store::StoreError, threads::Threads};

/// Calls that may wait for the thread. Ingest has one in flight at a time. The rest are rare changes that people make.
const WAITING_CALLS: usize = 64;

/// A call for the thread.
pub(super) type Call = Box<dyn FnOnce(&mut WriteConnection) + Send>;

/// A handle to the thread, which ends when the last handle is dropped.
#[derive(Clone)]
pub(super) struct WriterThread {
    calls: mpsc::Sender<Call>,
    /// All threads of the store.
    threads: Threads,
    /// Whether the files are in their places.
    presence: Arc<Presence>,
}

impl WriterThread {
    /// Starts the thread. `connection` leads to the file at `path`.
    pub(super) fn start(mut connection: Connection, path: &Path) -> Result<Self, StoreError> {
        let (calls, mut waiting) = mpsc::channel::<Call>(WAITING_CALLS);
        let threads = Threads::new();
        let reach = calls.downgrade();
        let copy_rest = move || {
            let Some(calls) = reach.upgrade() else { return false };
            let rest: Call = Box::new(|writer| {
                // The checkpoint thread reports an error of its own, so this one is ignored.
                let _ = copy_log(&writer.connection);
            });
            calls.blocking_send(rest).is_ok()
        };
        checkpoint_beside(&mut connection, path, copy_rest, &threads)?;
        let mut connection = WriteConnection::new(connection, path);
        threads
            .start("sqlite-writer", move || {
                while let Some(call) = waiting.blocking_recv() {
                    apply_if_wanted(&mut connection);
                    call(&mut connection);
                }
            })
            .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { calls, threads, presence: Arc::default() })
    }

    /// All threads of the store. None of them may end before the store.
    pub(super) fn threads(&self) -> &Threads {
        &self.threads
    }

    /// Sends a call to the thread; false when too many calls are waiting.
    pub(super) fn try_send(&self, call: Call) -> bool {
        self.calls.try_send(call).is_ok()
    }

    /// Whether the files are in their places. If they are not, everything that is written is lost.
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

    /// Runs `work` on the thread, even when the files are away.
    pub(super) async fn call_anyway<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut WriteConnection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, result) = oneshot::channel();
        let call: Call = Box::new(move |connection| {
            // The caller may have gone away. The work is done all the same.
            let result = work(connection);
            let _ = reply.send(result.map_err(|error| ids::explain(&connection.connection, error)));
        });
        self.calls.send(call).await.map_err(|_| StoreError::Stopped)?;
        result.await.map_err(|_| StoreError::Stopped)?.map_err(store_error)
    }
}
