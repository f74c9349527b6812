//! What a store must do for a copy: one side is read, the other is filled. Both stores implement these traits and `run`
//! calls them. Reading must not change the source.

use async_trait::async_trait;
use pisync_core::Timestamp;
use tokio::{sync::mpsc, task::JoinHandle};

use super::tables::{Column, Row, Table};
use crate::store::StoreError;

/// Rows that are passed on at a time: one COPY on PostgreSQL, one call of a thread on SQLite. They have some megabytes
/// at most, because metadata has at most 4 KiB.
pub(in crate::store) const BATCH_ROWS: usize = 4_096;

/// Batches that may wait between reading and writing. Neither side then waits for each step of the other.
const WAITING_BATCHES: usize = 2;

/// The events that the sums by day and hour must cover. SQLite decides by id which events are aggregated; PostgreSQL
/// decides by `received_at`. The source therefore sums up the events that the destination will regard as aggregated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Sums {
    /// The aggregated events: the sums as they are stored.
    Stored,
    /// All events.
    Everything,
    /// The events with `received_at` up to this time.
    ReceivedUntil(Timestamp),
}

/// What to read.
#[derive(Debug, Clone)]
pub(in crate::store) struct Selection {
    pub(in crate::store) table: &'static Table,
    pub(in crate::store) columns: Vec<&'static Column>,
    pub(in crate::store) sums: Sums,
}

/// A stream of rows from the side that is read. Dropping it ends the reading.
pub(in crate::store) struct RowStream {
    batches: mpsc::Receiver<Vec<Row>>,
    reading: JoinHandle<Result<(), StoreError>>,
}

impl RowStream {
    /// Starts `read`, which sends rows through the given sender.
    pub(in crate::store) fn start(
        read: impl FnOnce(mpsc::Sender<Vec<Row>>) -> JoinHandle<Result<(), StoreError>>,
    ) -> Self {
        let (sender, batches) = mpsc::channel(WAITING_BATCHES);
        Self { batches, reading: read(sender) }
    }

    /// The next rows; `None` after the last. It must not be called again after `None`.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Row>>, StoreError> {
        if let Some(rows) = self.batches.recv().await {
            return Ok(Some(rows));
        }
        let ended = (&mut self.reading).await;
        ended
            .map_err(|error| StoreError::Failed(format!("reading failed: {error}")))?
            .map(|()| None)
    }
}

/// Reads a database as of one moment.
#[async_trait]
pub(in crate::store) trait CopyReader: Send + Sync {
    /// Tables and columns that are not PiSync's.
    async fn unknown(&self) -> Result<Vec<String>, StoreError>;

    /// How many rows a table has.
    async fn count(&self, table: &'static Table) -> Result<u64, StoreError>;

    /// The highest id that a row of a numbered table ever had, or any number between that and the next id.
    async fn last_id(&self, table: &'static Table) -> Result<i64, StoreError>;

    /// A table's rows, in any order.
    fn rows(&self, selection: Selection) -> RowStream;
}

/// Fills a new database, and makes it visible at the end.
#[async_trait]
pub(in crate::store) trait CopyWriter: Send + Sync {
    /// Whether the store has this column.
    fn keeps(&self, table: &'static Table, column: &'static Column) -> bool;

    /// The smallest difference that the store keeps between two times, in microseconds.
    fn time_step(&self) -> i64;

    /// Which events its sums must cover.
    fn sums(&self, now: Timestamp) -> Sums;

    /// Reserves all ids up to this one, so that they are never assigned.
    async fn set_last_id(&self, table: &'static Table, id: i64) -> Result<(), StoreError>;

    /// A table's rows as they were written, in any order.
    fn rows(&self, selection: Selection) -> RowStream;

    /// Adds rows.
    async fn write(
        &mut self,
        table: &'static Table,
        columns: &[&'static Column],
        rows: Vec<Row>,
    ) -> Result<(), StoreError>;

    /// Makes everything that was written visible. `sums` tells which events its sums cover.
    async fn finish(self: Box<Self>, sums: Sums) -> Result<(), StoreError>;
}
