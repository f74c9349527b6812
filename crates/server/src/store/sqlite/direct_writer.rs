//! Writes batches straight into the tables, past the ingest journal. The command line's imports use it. Events with a
//! key of a group use it, too, because their claims hold only in the transaction that stores the events. It must apply
//! the journal first.

use std::sync::Arc;

use async_trait::async_trait;

use super::{apply::apply_journal, write_connection::WriteConnection, writer_thread::WriterThread};
use crate::store::{Batch, EventWriter, OtherGroup, StoreError, Written};

/// The writer of events that are stored straight in the tables.
pub(super) struct SqliteEventWriter {
    thread: WriterThread,
}

impl SqliteEventWriter {
    pub(super) fn new(thread: WriterThread) -> Self {
        Self { thread }
    }
}

#[async_trait]
impl EventWriter for SqliteEventWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let batch = Arc::clone(batch);
        let written = self.thread.call(move |connection| write(connection, &batch)).await?;
        Ok(written?)
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.thread.call(WriteConnection::probe).await
    }
}

/// Stores a batch that is not in the journal.
fn write(
    writer: &mut WriteConnection,
    batch: &Batch,
) -> rusqlite::Result<Result<Written, OtherGroup>> {
    // An event in the journal may have the same id, or be the first of a device.
    apply_journal(writer)?;
    writer.store_claimed(batch, None)
}
