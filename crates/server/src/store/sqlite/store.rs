//! The embedded store: one file, one thread that owns the only connection for writing, and a few connections for
//! reading. Thanks to the write-ahead log, readers need not wait for the writer. The files of the resources call it to
//! run their SQL. No call may read or write while the database's files are away.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use rusqlite::Connection;

use super::{
    apply::apply_journal,
    apply_scheduler::ApplyScheduler,
    claim,
    connection::{self, Cost, Readers},
    files,
    ingest_state::set_journal_in_use,
    paths::Identity,
    watch::Watch,
    writer_thread::WriterThread,
};
use crate::store::{Freshness, PoolUsage, Store, StoreError, step_size::StepSize};

/// How long background work may hold the writer at a time. Ingest waits for it, so it is much less than 50 ms, which
/// nobody would notice.
const STEP_TARGET: Duration = Duration::from_millis(15);

/// Bounds of the number of events that are aggregated, dropped or deleted at a time.
const STEP_EVENTS: RangeInclusive<i64> = 250..=16_000;

/// An open SQLite database.
pub(in crate::store) struct SqliteStore {
    pub(super) path: PathBuf,
    /// Identifies the file that was opened.
    pub(super) identity: Identity,
    /// Watches the files; empty unless this is a server's store.
    pub(super) watch: OnceLock<Watch>,
    pub(super) writer: WriterThread,
    /// Events that are acknowledged and not yet applied; empty unless this is a server's store.
    pub(super) ingest: OnceLock<ApplyScheduler>,
    pub(super) readers: Arc<Readers>,
    /// How many events are aggregated at a time.
    pub(super) aggregation_step: StepSize,
    /// How many events are dropped at a time.
    pub(super) drop_step: StepSize,
    /// How many events of a device are deleted at a time.
    pub(super) delete_step: StepSize,
}

impl SqliteStore {
    pub(in crate::store) fn open(path: &Path) -> Result<Self, StoreError> {
        let path = claim::find(path)?;
        let connection = connection::open_for_writing(&path)?;
        let identity = Identity::at(&path).map_err(|error| files::cannot_open(&path, &error))?;
        Ok(Self {
            identity,
            watch: OnceLock::new(),
            writer: WriterThread::start(connection, &path)?,
            ingest: OnceLock::new(),
            readers: Arc::new(Readers::new(&path)),
            path,
            aggregation_step: StepSize::new(STEP_EVENTS, STEP_TARGET),
            drop_step: StepSize::new(STEP_EVENTS, STEP_TARGET),
            delete_step: StepSize::new(STEP_EVENTS, STEP_TARGET),
        })
    }

    /// Runs `read`, which needs [`Freshness::Everything`].
    pub(super) async fn read_events<T: Send + 'static>(
        &self,
        cost: Cost,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.read_events_as(Freshness::Everything, cost, read).await
    }

    /// Runs `read` on a connection for reading, off the async threads. If it needs everything, it waits until every event
    /// that is acknowledged by now is in the tables.
    pub(super) async fn read_events_as<T: Send + 'static>(
        &self,
        freshness: Freshness,
        cost: Cost,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        match (freshness, self.ingest.get()) {
            (Freshness::Everything, Some(ingest)) => ingest.wait_until_applied().await,
            // Whoever lags does not even ask the writer to apply the journal. It does so in time by itself.
            (Freshness::Lagging, _) | (_, None) => {}
        }
        // A connection that is opened now could lead to another file.
        self.writer.presence().check()?;
        Arc::clone(&self.readers).run(cost, read).await
    }

    /// Runs `read`, which needs no events, on a connection for reading.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        // A connection that is opened now could lead to another file.
        self.writer.presence().check()?;
        Arc::clone(&self.readers).run(Cost::Short, read).await
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn ping(&self) -> Result<(), StoreError> {
        self.writer.presence().check()?;
        // Commands have no thread that watches the files.
        if Identity::at(&self.path).ok() != Some(self.identity) {
            return Err(StoreError::Unavailable(format!(
                "{} is not the file any more that was opened: it was moved, removed or replaced, and what was written since may be gone with it",
                self.path.display()
            )));
        }
        Arc::clone(&self.readers).ping().await
    }

    fn pool_usage(&self) -> PoolUsage {
        self.readers.usage()
    }

    async fn thread_end(&self) -> String {
        self.writer.threads().first_end().await
    }

    #[cfg(test)]
    fn break_writer(&self) {
        assert!(self.writer.try_send(Box::new(|_| panic!("broken by a test"))));
    }

    /// Moves everything from the journal and the log into the file. The file can then be copied by itself.
    async fn close(&self) -> Result<(), StoreError> {
        if let Some(watch) = self.watch.get() {
            watch.stop();
        }
        // Done even when the files are away, because they may only have been renamed.
        self.writer
            .call_anyway(|writer| {
                apply_journal(writer)?;
                writer.return_unused_ids()?;
                set_journal_in_use(&writer.connection, false)?;
                writer.checkpoint()
            })
            .await?;
        // The journal that is there now may belong to another database.
        self.writer.presence().check()?;
        self.ingest.get().map_or(Ok(()), ApplyScheduler::remove_journal)
    }
}
