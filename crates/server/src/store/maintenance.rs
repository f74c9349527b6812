//! What a store needs from time to time: aggregating events into roll-ups, making partitions ahead of need, and dropping
//! what is too old. `app` and `maintenance` call it in small steps, between which ingest has the database.

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::{Retention, StoreError};

/// The sums by day and hour that events are aggregated into.
#[async_trait]
pub trait RollUps: Send + Sync {
    /// Aggregates a small number of stored events into the sums by day and hour, and tells whether there is
    /// more to do at once. Reads are right whenever this is done; they are quicker after it.
    async fn aggregate_events(&self, now: Timestamp) -> Result<bool, StoreError>;
}

/// Upkeep. Each call does a small part of the work in one transaction.
#[async_trait]
pub trait Maintenance: Send + Sync {
    /// Does what must be done from time to time, such as making partitions ahead of need.
    async fn maintain(&self, now: Timestamp) -> Result<(), StoreError>;

    /// Forgets some thousand event ids received before `before`; tells whether there may be more.
    async fn forget_event_ids(&self, before: Timestamp) -> Result<bool, StoreError>;

    /// Drops some events that were received too long ago and are aggregated, and tells whether to go on at
    /// once. Sums, totals and streaks stay.
    async fn drop_old_events(
        &self,
        now: Timestamp,
        retention: &Retention,
    ) -> Result<bool, StoreError>;
}
