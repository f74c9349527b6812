//! Upkeep of a store: it aggregates events into roll-ups, makes partitions ahead of need, and drops old events. `app`
//! and `maintenance` call it in small steps. No step may hold the database for long, because ingest waits.

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::{Retention, StoreError};

/// The sums by day and hour into which events are aggregated.
#[async_trait]
pub trait RollUps: Send + Sync {
    /// Aggregates a small number of stored events into the sums by day and hour. Answers whether there is more to do at
    /// once. Reads are always exact, and quicker after it.
    async fn aggregate_events(&self, now: Timestamp) -> Result<bool, StoreError>;

    /// Makes the digests of some devices: stale ones first, then those of the day of `now`. Answers whether there are more
    /// to make. The store keeps how far it came.
    async fn make_digests(&self, now: Timestamp) -> Result<bool, StoreError>;

    /// Drops the runs of groups by hour that are older than two weeks, or than the events that are kept.
    async fn drop_group_hours(&self, now: Timestamp) -> Result<(), StoreError>;

    /// Brings the summaries of all devices up to date whose events were aggregated since the last time. Reads are exact
    /// without it, and quicker after it.
    async fn refresh_summaries(&self) -> Result<(), StoreError>;
}

/// Upkeep. Each call does a small part of the work in one transaction.
#[async_trait]
pub trait Maintenance: Send + Sync {
    /// Does what is necessary from time to time, such as making partitions ahead of need.
    async fn maintain(&self, now: Timestamp) -> Result<(), StoreError>;

    /// Forgets some thousand event ids received before `before`. Answers whether there may be more.
    async fn forget_event_ids(&self, before: Timestamp) -> Result<bool, StoreError>;

    /// Drops some old events that are aggregated. Answers whether to continue at once. Sums, totals and streaks stay.
    async fn drop_old_events(
        &self,
        now: Timestamp,
        retention: &Retention,
    ) -> Result<bool, StoreError>;
}
