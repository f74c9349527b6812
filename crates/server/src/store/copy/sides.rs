//! What a store does of a copy: one side is read, the other is filled. Both stores implement these traits.

use async_trait::async_trait;
use pisync_core::Timestamp;
use tokio::{sync::mpsc, task::JoinHandle};

use super::tables::{Column, Row, Table};
use crate::store::StoreError;

/// Rows that are handed on at a time: one COPY on PostgreSQL, one turn of a thread on SQLite, and some
/// megabytes at the most, for metadata is at most 4 KiB.
pub(in crate::store) const BATCH_ROWS: usize = 4_096;

/// Batches that may wait between reading and writing, so that neither waits for each step of the other.
const WAITING_BATCHES: usize = 2;

/// Of which events the sums by day and hour are to be. SQLite tells what is aggregated by ids, PostgreSQL by
/// receipt: so the source adds up what the destination is going to regard as aggregated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Sums {
    /// Of those that are aggregated, as they are stored.
    Stored,
    /// Of all events.
    Everything,
    /// Of the events received until then.
    ReceivedUntil(Timestamp),
}

/// What to read.
#[derive(Debug, Clone)]
pub(in crate::store) struct Selection {
    pub(in crate::store) table: &'static Table,
    pub(in crate::store) columns: Vec<&'static Column>,
    pub(in crate::store) sums: Sums,
}

/// Rows on their way from where they are read. Whoever drops this ends the reading.
pub(in crate::store) struct RowStream {
    batches: mpsc::Receiver<Vec<Row>>,
    reading: JoinHandle<Result<(), StoreError>>,
}

impl RowStream {
    /// Begins what `read` starts, with the sender that it is given.
    pub(in crate::store) fn start(
        read: impl FnOnce(mpsc::Sender<Vec<Row>>) -> JoinHandle<Result<(), StoreError>>,
    ) -> Self {
        let (sender, batches) = mpsc::channel(WAITING_BATCHES);
        Self { batches, reading: read(sender) }
    }

    /// The next rows; `None` after the last, and not to be called again then.
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

/// Reads a database as it is at one moment.
#[async_trait]
pub(in crate::store) trait CopyReader: Send + Sync {
    /// Tables and columns that are not PiSync's.
    async fn left_out(&self) -> Result<Vec<String>, StoreError>;

    /// How many rows a table has.
    async fn count(&self, table: &'static Table) -> Result<u64, StoreError>;

    /// The highest id that a row of a numbered table ever had, or any number between that and the next.
    async fn last_id(&self, table: &'static Table) -> Result<i64, StoreError>;

    /// A table's rows, in any order.
    fn rows(&self, selection: Selection) -> RowStream;
}

/// Fills a new database, and shows it at the end.
#[async_trait]
pub(in crate::store) trait CopyWriter: Send + Sync {
    /// Whether the store has this column.
    fn keeps(&self, table: &'static Table, column: &'static Column) -> bool;

    /// The smallest difference between two times, in microseconds.
    fn time_step(&self) -> i64;

    /// Of which events it needs the sums.
    fn sums(&self, now: Timestamp) -> Sums;

    /// Gives no id up to this one to anybody.
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

    /// Shows everybody what was written, whose sums are of the events that `sums` says.
    async fn finish(self: Box<Self>, sums: Sums) -> Result<(), StoreError>;
}
