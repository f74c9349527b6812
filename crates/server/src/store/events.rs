//! Events: how they are written, and how a device's history is read.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{Batch, EventPage, HistoryQuery, Observations, StoreError, SyncHistory, Written};

/// The events of all devices. Each method is one transaction.
#[async_trait]
pub trait EventStore: Send + Sync {
    /// Something to write batches through, which are in the tables when it returns.
    fn event_writer(&self) -> Box<dyn EventWriter>;

    /// What ingest writes through; there is one per server. When it returns, events survive a power cut and
    /// every later read finds them, but what is learnt of their devices may come later, as `observations`.
    async fn ingest_writer(
        &self,
        observations: mpsc::UnboundedSender<Observations>,
    ) -> Result<Box<dyn EventWriter>, StoreError>;

    /// A device's figures and one page of its events; `None` for an unknown device.
    async fn sync_history(&self, query: &HistoryQuery) -> Result<Option<SyncHistory>, StoreError>;

    /// One page of a device's events and nothing else; `None` for an unknown device. Long lists are
    /// read page by page: a read that stays open keeps the database from clearing up behind it.
    async fn events(&self, query: &HistoryQuery) -> Result<Option<EventPage>, StoreError>;
}

/// Writes batches of events. One task owns it.
#[async_trait]
pub trait EventWriter: Send {
    /// Stores a batch in one transaction, figures included, and returns once it is committed. None may be in flight.
    ///
    /// # Errors
    /// After any error but [`StoreError::OutcomeUnknown`] nothing of the batch is stored. After that
    /// one, writing the same batch (the same `Arc`) again stores it exactly once.
    ///
    /// [`StoreError::OtherGroup`] when a batch's [`GroupClaim`]s do not hold in that transaction: nobody can have moved or
    /// deleted a device in between. Only [`EventStore::event_writer`]s look at claims.
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError>;

    /// Pipelines a batch: it is stored behind those in flight. False when that cannot be done now, and nothing has
    /// happened: then it can be written, once none is in flight.
    fn send(&mut self, _batch: &Arc<Batch>) -> bool {
        false
    }

    /// Waits for the batch that was sent first. `None` when it is not known to be stored: once none is in flight,
    /// writing the same batch (the same `Arc`) stores it exactly once. The future may be dropped and
    /// another one asked for.
    async fn sent(&mut self) -> Option<Written> {
        None
    }

    /// Whether writing could work now; connects again if need be.
    async fn probe(&mut self) -> Result<(), StoreError>;

    /// Does what is left to do for what was written.
    async fn finish(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}
