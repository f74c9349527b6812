//! Notices within two seconds that the machine's clock has jumped while the server runs. It then has the streaks
//! recounted that a wrong date has changed. It also notices when reports are refused as dated in the future. `app` runs
//! it. It only compares two clocks and two counters, so that ingest does not become slower.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use pisync_core::Timestamp;

use super::{recount_misdated, trusted_clock::TrustedClock};
use crate::{
    metrics::Metrics,
    store::{StoreError, Verification},
};

/// How often to check.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often to try again when the database was away.
const RETRY: Duration = Duration::from_secs(10);

/// Watches the clock for as long as the server runs.
pub struct ClockWatch {
    store: Arc<dyn Verification>,
    clock: Arc<TrustedClock>,
    metrics: Arc<Metrics>,
    refusals: Refusals,
    /// Whether streaks must be recounted once the clock is no longer behind.
    is_recount_due: bool,
}

impl ClockWatch {
    pub(super) fn new(
        store: Arc<dyn Verification>,
        clock: Arc<TrustedClock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let refusals = Refusals::new(&metrics, Instant::now());
        Self { store, clock, metrics, refusals, is_recount_due: false }
    }

    /// Watches for as long as the server runs.
    pub async fn follow(mut self) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let counts = Counts::of(&self.metrics);
            self.refusals.look(counts, self.clock.shown(), Instant::now());
            match self.look().await {
                Ok(()) => continue,
                // Ingest logs this already.
                Err(StoreError::Unavailable(error)) => {
                    tracing::debug!(error, "cannot judge the clock while the database is away");
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot judge the clock; it will be tried again");
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn look(&mut self) -> Result<(), StoreError> {
        self.is_recount_due |= self.clock.is_due().await;
        if !self.is_recount_due {
            return Ok(());
        }
        if let Some(time) = self.clock.judge().await?
            && let Some(counting) = time.counting
        {
            recount_misdated(&*self.store, counting).await?;
        }
        self.is_recount_due = false;
        Ok(())
    }
}

/// Reports since the server's start.
#[derive(Clone, Copy)]
struct Counts {
    /// Reports that were refused because of a date in the future.
    refused: u64,
    stored: u64,
}

impl Counts {
    fn of(metrics: &Metrics) -> Self {
        Self { refused: metrics.refused_as_future(), stored: metrics.stored_events() }
    }
}

/// Distinguishes a server whose clock is behind from a device whose clock is ahead. If the server's clock is behind,
/// most reports are refused.
struct Refusals {
    /// The start of the period, and the counts at that time.
    since: Instant,
    before: Counts,
    said: bool,
}

impl Refusals {
    /// Fewer refusals say nothing.
    const FEWEST: u64 = 3;

    /// How long to count before the counts start again from zero. Devices report every hour or more often.
    const PERIOD: Duration = Duration::from_secs(60 * 60);

    fn new(metrics: &Metrics, at: Instant) -> Self {
        Self { since: at, before: Counts::of(metrics), said: false }
    }

    fn look(&mut self, counts: Counts, clock: Timestamp, at: Instant) {
        let refused = counts.refused - self.before.refused;
        let stored = counts.stored - self.before.stored;
        let is_wrong = refused >= Self::FEWEST && refused > stored;
        if is_wrong && !self.said {
            tracing::warn!(
                refused,
                stored,
                %clock,
                "most reports are refused since they are dated in the future; probably this server's clock is behind: set it; if it is right, set those of the devices, or have them report with \"clock\": \"unsynced\""
            );
            self.said = true;
        }
        if at - self.since < Self::PERIOD || (refused > 0 && stored == 0) {
            return;
        }
        if self.said && !is_wrong {
            tracing::info!(refused, stored, "reports are no longer refused as from the future");
            self.said = false;
        }
        (self.since, self.before) = (at, counts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_count_when_they_prevail() {
        let began = Instant::now();
        let clock = Timestamp::MIN;
        let mut refusals =
            Refusals { since: began, before: Counts { refused: 7, stored: 90 }, said: false };
        let hour = Refusals::PERIOD.as_secs();
        for (second, refused, stored, said) in [
            (1, 2, 0, false),
            // A device whose clock is ahead, among others.
            (2, 5, 9, false),
            (hour, 9, 20, false),
            // The counts start again.
            (hour + 1, 12, 22, true),
            (2 * hour, 20, 23, true),
            (3 * hour, 21, 40, false),
            // With few reports, the period is longer.
            (4 * hour, 22, 40, false),
            (6 * hour, 23, 40, false),
            (9 * hour, 24, 40, true),
            (10 * hour, 24, 50, false),
        ] {
            let counts = Counts { refused: 7 + refused, stored: 90 + stored };
            refusals.look(counts, clock, began + Duration::from_secs(second));
            assert_eq!(refusals.said, said, "after {second} s");
        }
    }
}
