//! What the store needs from time to time: aggregation, deletion of old events, and recounts. `app` runs it every hour.
//! It deletes by the time of [`trusted_clock`], because a wrong clock must delete nothing.

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
    store::{
        self, HealthStore, Retention, StateDifferences, Store, StoreError, TrustedTimeStore,
        Verification,
    },
};

/// After each step, maintenance waits this many times as long as the step took. Ingest therefore has nineteen
/// twentieths of the database while there is more to aggregate or to drop.
pub(crate) const STEP_YIELD: u32 = 19;

/// In milliseconds.
const DAY: i64 = 86_400_000;

/// Runs the maintenance of one server.
pub struct Maintenance {
    store: Arc<dyn Store>,
    clock: Arc<TrustedClock>,
    retention: Option<Retention>,
    event_id_retention_days: u32,
}

impl Maintenance {
    /// For a server with this `retention` of events. Event ids are kept for `event_id_retention_days`.
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

    /// The watch that checks the clock between two rounds.
    #[must_use]
    pub fn clock_watch(&self, metrics: &Arc<Metrics>) -> ClockWatch {
        ClockWatch::new(
            Arc::<dyn Store>::clone(&self.store),
            Arc::clone(&self.clock),
            Arc::clone(metrics),
        )
    }

    /// Does what must be done before events arrive.
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
    /// When the database is away. The steps that were done stay.
    pub async fn run(&mut self) -> Result<bool, StoreError> {
        let Some(BelievedTime { now, counting }) = self.clock.judge().await? else {
            return Ok(false);
        };
        self.store.maintain(now).await?;
        if let Some(counting) = counting {
            recount_misdated(&*self.store, counting).await?;
        }
        self.forget_event_ids(now).await?;
        drop_old_changes(&*self.store, now).await?;
        correct_states(&*self.store).await?;
        if let Some(retention) = &self.retention {
            drop_old_events(&*self.store, now, retention).await?;
        }
        Ok(true)
    }

    /// Forgets old event ids, in small steps.
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

/// Recounts jobs with events that are dated in the future, because a clock was ahead. Also recounts jobs whose
/// future-dated events have come to count, because their dates have come.
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

/// Makes good the numbers and the order of devices by state, if another program or a mistake has made them wrong. A sweep only
/// adds to them what has changed, so that it costs the same however many devices there are.
async fn correct_states(store: &dyn Verification) -> Result<(), StoreError> {
    let StateDifferences { group_states, device_states } = store.correct_states().await?;
    if group_states + device_states > 0 {
        tracing::warn!(
            group_states,
            device_states,
            "numbers of devices by state, or their order, were wrong and are right again; does another program write to the database?"
        );
    }
    Ok(())
}

/// Drops old changes of states, and incidents that ended long ago, in small steps.
async fn drop_old_changes(store: &dyn HealthStore, now: Timestamp) -> Result<(), StoreError> {
    loop {
        let started = Instant::now();
        if !store.drop_old_changes(now).await? {
            return Ok(());
        }
        tokio::time::sleep(started.elapsed() * STEP_YIELD).await;
    }
}

/// Drops old events in small steps, and yields to ingest in between.
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

/// The present by the earlier of two clocks: the server's and the database's.
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
