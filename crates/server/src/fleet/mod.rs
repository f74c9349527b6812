//! Fleet health: sweeps that find the state of every device, make incidents from it, and notice when the server itself could
//! hear nobody. `app` runs [`watch`] as a background task. Ingest does nothing for it.

pub mod explain;
pub mod sweep;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use self::sweep::sweep;
use crate::{
    clock::Clock,
    metrics::Metrics,
    store::{Beat, Store, StoreError},
};

/// How often a sweep begins, at most, and how often a server gives a sign of life.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(15);

/// After each sweep, this many times as long as it took passes before the next.
const SWEEP_YIELD: u32 = 19;

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
        loop {
            let started = Instant::now();
            sweep_once(&*store, &clock).await;
            metrics.swept(started.elapsed());
            let pause = started.elapsed().saturating_mul(SWEEP_YIELD).max(SWEEP_INTERVAL);
            tokio::time::sleep(pause).await;
        }
    };
    tokio::join!(beats, sweeps);
}

async fn sweep_once(store: &dyn Store, clock: &Clock) {
    // A clock that is not set would make everybody silent, or nobody.
    let Ok(now) = clock.check() else { return };
    match sweep(store, now).await {
        Ok(swept) => swept.log(),
        Err(error) => log_failure(&error, "looking after the fleet"),
    }
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
