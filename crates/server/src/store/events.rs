//! Events: how they are written, and how a device's history is read. `ingest`, `import`, the API and exports call it;
//! both stores implement it. A write must never return before its events are durable.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{Batch, EventPage, HistoryQuery, Observations, StoreError, SyncHistory, Written};

/// The events of all devices. Each method is one transaction.
#[async_trait]
pub trait EventStore: Send + Sync {
    /// A writer that writes batches into the tables before it returns.
    fn event_writer(&self) -> Box<dyn EventWriter>;

    /// The writer for ingest; there is one per server. When it returns, events survive a power cut and every later read
    /// finds them. What is learnt of their devices may come later, as `observations`.
    async fn ingest_writer(
        &self,
        observations: mpsc::UnboundedSender<Observations>,
    ) -> Result<Box<dyn EventWriter>, StoreError>;

    /// A device's figures and one page of its events; `None` for an unknown device.
    async fn sync_history(&self, query: &HistoryQuery) -> Result<Option<SyncHistory>, StoreError>;

    /// One page of a device's events and nothing else; `None` for an unknown device. Long lists are read page by page.
    /// A read that stays open would keep the database from cleaning up behind it.
    async fn events(&self, query: &HistoryQuery) -> Result<Option<EventPage>, StoreError>;
}

/// Writes batches of events. One task owns it.
#[async_trait]
pub trait EventWriter: Send {
    /// Stores a batch in one transaction, figures included, and returns once it is committed. No batch may be in
    /// flight.
    ///
    /// # Errors
    /// After any error but [`StoreError::OutcomeUnknown`] nothing of the batch is stored. After that one, writing the
    /// same batch (the same `Arc`) again stores it exactly once.
    ///
    /// [`StoreError::OtherGroup`] when a [`GroupClaim`] does not hold in that transaction. Nobody can have moved or
    /// deleted a device in between. Only [`EventStore::event_writer`]s check claims.
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError>;

    /// Pipelines a batch: it is stored behind those in flight. False when that is not possible now; then nothing has
    /// happened, and the batch can be written once no batch is in flight.
    fn send(&mut self, _batch: &Arc<Batch>) -> bool {
        false
    }

    /// Waits for the batch that was sent first. `None` when it is not known to be stored. Once no batch is in flight,
    /// writing the same batch (the same `Arc`) stores it exactly once. The future may be dropped and called for again.
    async fn sent(&mut self) -> Option<Written> {
        None
    }

    /// Whether writing could work now; reconnects if necessary.
    async fn probe(&mut self) -> Result<(), StoreError>;

    /// Does what is left to do for the batches that were written.
    async fn finish(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}
