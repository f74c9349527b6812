//! The endless loops of upkeep: maintenance, aggregation, and deletions that were interrupted. `app` runs each as a
//! background task. None of them returns.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Maintenance, STEP_YIELD, earlier_time};
use crate::{
    clock::Clock,
    metrics::Metrics,
    store::{DeviceDeletions, Store, StoreError},
};

/// How often maintenance runs.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// How soon maintenance is tried again after a failure.
const MAINTENANCE_RETRY: Duration = Duration::from_secs(60);

/// How often events are aggregated into the sums by day and hour. The interval is short because reads add up events
/// that are not aggregated yet. A small number of events is aggregated in less than one step.
const AGGREGATION_INTERVAL: Duration = Duration::from_secs(30);

/// Up to how many events per second a server counts as quiet, and how many times as long as a step it then waits after
/// each. So what was stored at once, by an import or at the top of the hour, is aggregated in a quarter of the time.
const QUIET_RATE: u64 = 100;
const QUIET_YIELD: u32 = 3;

/// The shortest time between two rounds that bring summaries up to date, and how much longer than a round it is. Devices
/// that report every second are then written rarely. While ingest is idle, a round takes a millisecond.
const SHORTEST_REFRESH_INTERVAL: Duration = Duration::from_secs(5);
const REFRESH_PAUSE: u32 = 20;

/// How often to check for interrupted deletions of devices.
const DELETIONS_INTERVAL: Duration = Duration::from_secs(30);

/// Runs maintenance from time to time.
pub(crate) async fn maintain(mut maintenance: Maintenance) {
    loop {
        let pause = match maintenance.run().await {
            Ok(true) => MAINTENANCE_INTERVAL,
            // The clock is not set yet.
            Ok(false) => MAINTENANCE_RETRY,
            Err(error) => {
                tracing::warn!(%error, "maintenance failed; it will be tried again");
                MAINTENANCE_RETRY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Continues interrupted deletions of devices, at the start and whenever one has made no progress for an interval. A
/// deletion that another process still works on is skipped.
pub(crate) async fn finish_deletions(store: Arc<dyn DeviceDeletions>) {
    let mut before = None;
    loop {
        match store.deletions().await {
            Ok(found) => {
                for (device_id, deleted) in &found {
                    let is_stuck = before.as_ref().is_none_or(|before: &Vec<_>| {
                        before.contains(&(device_id.clone(), *deleted))
                    });
                    if !is_stuck {
                        continue;
                    }
                    match store.finish_deletion(device_id).await {
                        Ok(events) => tracing::info!(
                            %device_id,
                            events,
                            "the deletion of a device, which had been interrupted, is complete"
                        ),
                        Err(error) => tracing::warn!(
                            %device_id,
                            %error,
                            "the deletion of a device cannot go on; it will be tried again"
                        ),
                    }
                }
                before = Some(found);
            }
            Err(error) => tracing::debug!(%error, "cannot look for interrupted deletions"),
        }
        tokio::time::sleep(DELETIONS_INTERVAL).await;
    }
}

/// How long to wait after `work` has failed.
fn pause_after(error: &StoreError, work: &str) -> Duration {
    if let StoreError::Unavailable(error) = error {
        // Ingest logs that already.
        tracing::debug!(error, "{work} waits while the database is away");
        AGGREGATION_INTERVAL
    } else {
        tracing::warn!(%error, "{work} failed; it will be tried again");
        MAINTENANCE_RETRY
    }
}

/// Brings the summaries of devices up to date, the less often the longer it takes.
pub(crate) async fn refresh_summaries(store: Arc<dyn Store>) {
    loop {
        let started = Instant::now();
        let pause = match store.refresh_summaries().await {
            Ok(()) => {
                let pause = started.elapsed().saturating_mul(REFRESH_PAUSE);
                pause.clamp(SHORTEST_REFRESH_INTERVAL, AGGREGATION_INTERVAL)
            }
            Err(error) => pause_after(&error, "bringing summaries of devices up to date"),
        };
        tokio::time::sleep(pause).await;
    }
}

/// Aggregates events in small steps, and yields to ingest in between, less while this server stores next to nothing. Once a
/// day it then makes the digests of all devices.
pub(crate) async fn aggregate(store: Arc<dyn Store>, clock: Clock, metrics: Arc<Metrics>) {
    let mut last_step = Instant::now();
    let mut stored_before = metrics.stored_events();
    loop {
        let started = Instant::now();
        let stored = metrics.stored_events();
        let since_last_step = started.duration_since(last_step);
        let is_quiet =
            stored.saturating_sub(stored_before) <= QUIET_RATE * (since_last_step.as_secs() + 1);
        (last_step, stored_before) = (started, stored);
        let aggregated = async {
            // Later events were received by a clock that was ahead. Aggregation does not wait for their time.
            let now = earlier_time(&*store, &clock).await?;
            if store.aggregate_events(now).await? || store.make_digests(now).await? {
                return Ok(true);
            }
            store.drop_group_hours(now).await?;
            Ok(false)
        };
        let pause = match aggregated.await {
            Ok(true) => started.elapsed() * if is_quiet { QUIET_YIELD } else { STEP_YIELD },
            Ok(false) => AGGREGATION_INTERVAL,
            Err(error) => pause_after(&error, "aggregating events"),
        };
        tokio::time::sleep(pause).await;
    }
}
