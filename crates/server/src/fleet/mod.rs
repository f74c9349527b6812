//! Fleet health: sweeps that find the state of every device, make incidents from it, and notice when the server itself could
//! hear nobody. `app` runs [`watch`] as a background task. Ingest does nothing for it.

pub mod explain;
pub mod sweep;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use pisync_core::Timestamp;

use self::sweep::sweep;
use crate::{
    clock::Clock,
    metrics::Metrics,
    store::{Beat, LARGEST_LAG, Store, StoreError},
};

/// How often a sweep begins, at most, and how often a server gives a sign of life.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(15);

/// When the last sweep began longer ago than this, nobody looks after the fleet, in milliseconds: 2 minutes. Then there is no
/// heartbeat, and `pisync fleet status` tells no states. A sweep begins a minute after the last one at the latest.
pub(crate) const LONGEST_SINCE_SWEEP: i64 = 2 * 60 * 1000;

/// After this time without any sweep, a last one that is in the future no longer counts. Another server whose clock is right
/// about it would have swept by then.
const FOLLOWED_AFTER: Duration = Duration::from_secs(120);

/// After each sweep, this many times as long as it took passes before the next, but no more than [`LONGEST_SWEEP_PAUSE`].
const SWEEP_YIELD: u32 = 19;

/// The longest time between two sweeps. Without it, one in which a million devices turn silent (50 s) would be followed by a
/// quarter of an hour in which nobody looks after the fleet: longer than anybody who watches from outside waits.
const LONGEST_SWEEP_PAUSE: Duration = Duration::from_secs(60);

/// Sweeps, and gives signs of life, for as long as the server runs. `node` is what this server is called.
pub(crate) async fn watch(
    store: Arc<dyn Store>,
    clock: Clock,
    metrics: Arc<Metrics>,
    node: String,
) {
    let mut pulse = Pulse { node, is_first: true, refused: metrics.refused_events() };
    // Before the first sweep it must be known since when nobody was heard.
    while !pulse.beat(&*store, &clock, &metrics).await {
        tokio::time::sleep(SWEEP_INTERVAL).await;
    }
    let beats = async {
        loop {
            tokio::time::sleep(SWEEP_INTERVAL).await;
            pulse.beat(&*store, &clock, &metrics).await;
        }
    };
    let sweeps = async {
        let mut ahead = None;
        loop {
            let started = Instant::now();
            sweep_once(&*store, &clock, &mut ahead).await;
            metrics.swept(started.elapsed());
            tokio::time::sleep(pause_after(started.elapsed())).await;
        }
    };
    tokio::join!(beats, sweeps);
}

/// How long to wait after a sweep that took so long.
fn pause_after(sweep: Duration) -> Duration {
    sweep.saturating_mul(SWEEP_YIELD).clamp(SWEEP_INTERVAL, LONGEST_SWEEP_PAUSE)
}

/// The last sweep, when that was in the future, and since when nobody has swept.
type Ahead = Option<(Timestamp, Instant)>;

async fn sweep_once(store: &dyn Store, clock: &Clock, ahead: &mut Ahead) {
    // A clock that is not set would make everybody silent, or nobody.
    let Ok(now) = clock.check() else { return };
    let swept = match sweep(store, now).await {
        Ok(swept) => swept,
        Err(error) => return log_failure(&error, "looking after the fleet"),
    };
    swept.log();
    if swept.is_complete {
        *ahead = None;
    } else if let Err(error) = follow_clock(store, now, ahead).await {
        log_failure(&error, "looking after the fleet");
    }
}

/// A sweep that was made by a clock that was ahead would stop all others until then. When nobody has swept for two minutes,
/// this server's clock is followed.
async fn follow_clock(
    store: &dyn Store,
    now: Timestamp,
    ahead: &mut Ahead,
) -> Result<(), StoreError> {
    let swept_at = store.health_counts().await?.swept_at;
    let in_future = swept_at.filter(|at| at.as_millisecond() - now.as_millisecond() > LARGEST_LAG);
    let Some(swept_at) = in_future else {
        *ahead = None;
        return Ok(());
    };
    match *ahead {
        Some((same, since)) if same == swept_at => {
            if since.elapsed() >= FOLLOWED_AFTER && store.follow_clock(swept_at, now).await? {
                tracing::warn!(
                    %swept_at,
                    "the last sweep was made by a clock that was ahead; this server's clock counts from now on"
                );
                *ahead = None;
            }
        }
        _ => *ahead = Some((swept_at, Instant::now())),
    }
    Ok(())
}

fn log_failure(error: &StoreError, work: &str) {
    if let StoreError::Unavailable(error) = error {
        // Ingest logs that already.
        tracing::debug!(error, "{work} waits while the database is away");
    } else {
        tracing::warn!(%error, "{work} failed; it will be tried again");
    }
}

/// The signs of life of one server.
struct Pulse {
    node: String,
    is_first: bool,
    /// How many valid events had been refused at the last one.
    refused: u64,
}

impl Pulse {
    /// Gives one; false when that is not possible now.
    async fn beat(&mut self, store: &dyn Store, clock: &Clock, metrics: &Metrics) -> bool {
        let Ok(at) = clock.check() else { return false };
        let refused = metrics.refused_events();
        let beat = Beat {
            at,
            is_first: self.is_first,
            has_refused: refused > self.refused,
            node: self.node.clone(),
        };
        match store.beat(&beat).await {
            Ok(outage) => {
                (self.is_first, self.refused) = (false, refused);
                if let Some(outage) = outage {
                    tracing::info!(
                        from = %outage.from,
                        until = %outage.until,
                        cause = outage.cause.as_str(),
                        "nobody could be heard for a while; no device counts as silent for it"
                    );
                }
                true
            }
            Err(error) => {
                log_failure(&error, "giving a sign of life");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_give_way_and_are_never_taken_for_missing() {
        let seconds = Duration::from_secs_f64;
        for (sweep, pause) in [(0.1, 15.0), (1.0, 19.0), (3.0, 57.0), (50.0, 60.0)] {
            assert_eq!(pause_after(seconds(sweep)), seconds(pause), "{sweep}");
        }
        // As long as each sweep takes no more than half a minute, whoever watches finds one that is recent enough.
        let longest = 2 * Duration::from_secs(30) + LONGEST_SWEEP_PAUSE;
        assert!(longest.as_millis() <= u128::from(LONGEST_SINCE_SWEEP.unsigned_abs()));
    }
}
