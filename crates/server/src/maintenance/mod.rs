//! What the store needs from time to time. `app` runs it every hour. What is deleted for its age goes by [`trusted_clock`]:
//! a wrong clock must delete nothing.

mod clock_watch;
mod course;
pub(crate) mod loops;
mod trusted_clock;

use std::{sync::Arc, time::Instant};

use pisync_core::Timestamp;

pub use self::clock_watch::ClockWatch;
use self::trusted_clock::{BelievedTime, TrustedClock};
pub(crate) use self::trusted_clock::{doubt, present};
use crate::{
    clock::Clock,
    metrics::Metrics,
    store::{self, Retention, Store, StoreError, TrustedTimeStore, Verification},
};

/// While there is more to aggregate or to drop: how many times as long as each step to wait after it, so
/// that ingest has nineteen twentieths of the database.
pub(crate) const STEP_YIELD: u32 = 19;

/// In milliseconds.
const DAY: i64 = 86_400_000;

/// See the module.
pub struct Maintenance {
    store: Arc<dyn Store>,
    clock: Arc<TrustedClock>,
    retention: Option<Retention>,
    event_id_retention_days: u32,
}

impl Maintenance {
    /// Of a server that keeps events as long as `retention` says, and their ids for so many days.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        clock: Clock,
        retention: Option<Retention>,
        event_id_retention_days: u32,
    ) -> Self {
        let clock = Arc::new(TrustedClock::new(Arc::<dyn Store>::clone(&store), clock));
        Self { store, clock, retention, event_id_retention_days }
    }

    /// What watches the clock in between.
    #[must_use]
    pub fn clock_watch(&self, metrics: &Arc<Metrics>) -> ClockWatch {
        ClockWatch::new(
            Arc::<dyn Store>::clone(&self.store),
            Arc::clone(&self.clock),
            Arc::clone(metrics),
        )
    }

    /// What must be done before events come.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn prepare(&mut self) -> Result<(), StoreError> {
        match self.clock.judge().await? {
            Some(time) => self.store.maintain(time.now).await,
            None => Ok(()),
        }
    }

    /// Does everything once. While the clock is not set, it does nothing and answers false.
    ///
    /// # Errors
    /// When the database is away. What was done stays.
    pub async fn run(&mut self) -> Result<bool, StoreError> {
        let Some(BelievedTime { now, counting }) = self.clock.judge().await? else {
            return Ok(false);
        };
        self.store.maintain(now).await?;
        if let Some(counting) = counting {
            recount_misdated(&*self.store, counting).await?;
        }
        self.forget_event_ids(now).await?;
        if let Some(retention) = &self.retention {
            drop_old_events(&*self.store, now, retention).await?;
        }
        Ok(true)
    }

    /// Forgets the event ids of so many days ago, in small steps.
    async fn forget_event_ids(&self, now: Timestamp) -> Result<(), StoreError> {
        let days = i64::from(self.event_id_retention_days);
        let oldest = now.saturating_add_milliseconds(-DAY * days);
        loop {
            let started = Instant::now();
            if !self.store.forget_event_ids(oldest).await? {
                return Ok(());
            }
            tokio::time::sleep(started.elapsed() * STEP_YIELD).await;
        }
    }
}

/// Counts again what a clock that was ahead has put behind a date to come, and what such dates come to count in.
async fn recount_misdated(store: &dyn Verification, now: Timestamp) -> Result<(), StoreError> {
    let jobs = store.recount_misdated(now).await?;
    if jobs > 0 {
        tracing::warn!(
            jobs,
            "a clock was wrong when events of some jobs were received, and the jobs were counted again: events count in sums alone until their dates have come, and then in streaks and as the last"
        );
    }
    Ok(())
}

/// Drops what is too old, a little at a time, and yields to ingest in between.
async fn drop_old_events(
    store: &dyn store::Maintenance,
    now: Timestamp,
    retention: &Retention,
) -> Result<(), StoreError> {
    loop {
        let started = Instant::now();
        if !store.drop_old_events(now, retention).await? {
            return Ok(());
        }
        tokio::time::sleep(started.elapsed() * STEP_YIELD).await;
    }
}

/// The present, by whichever clock is behind: the server's or the database's.
pub(super) async fn earlier_time(
    store: &dyn TrustedTimeStore,
    clock: &Clock,
) -> Result<Timestamp, StoreError> {
    let database = database_time(store, clock).await?;
    Ok(database.map_or_else(|| clock.now(), |database| database.min(clock.now())))
}

/// The database's clock, if it has one that `clock` can be compared with.
pub(crate) async fn database_time(
    store: &dyn TrustedTimeStore,
    clock: &Clock,
) -> Result<Option<Timestamp>, StoreError> {
    if clock.is_real() { store.database_time().await } else { Ok(None) }
}
