//! The heartbeat: a post each minute to whoever watches this server from outside, as long as the fleet is looked after. When it
//! stops coming, somebody else must tell people, because nobody here can.

use std::{sync::Arc, time::Duration};

use axum::http::HeaderMap;
use reqwest::Url;

use super::{Hidden, sender::Sender};
use crate::{clock::Clock, fleet::LONGEST_SINCE_SWEEP, ingest::Ingest, store::Store};

/// How often it is posted.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(60);

/// Posts the heartbeat for as long as the server runs.
pub(crate) async fn beat(
    url: Hidden<Url>,
    sender: Sender,
    store: Arc<dyn Store>,
    ingest: Ingest,
    clock: Clock,
) {
    loop {
        if looks_after_fleet(&*store, &ingest, &clock).await {
            let answer =
                sender.post(url.reveal(), "text/plain", HeaderMap::new(), Vec::new()).await;
            match answer {
                Ok(answer) if answer.status.is_success() => tracing::debug!("heartbeat sent"),
                Ok(answer) => {
                    let status = answer.status.as_u16();
                    tracing::warn!(status, "the heartbeat was refused");
                }
                Err(error) => tracing::warn!(error, "the heartbeat could not be sent"),
            }
        } else {
            tracing::warn!("no heartbeat: the fleet is not looked after, or nothing can be stored");
        }
        tokio::time::sleep(HEARTBEAT_INTERVAL).await;
    }
}

async fn looks_after_fleet(store: &dyn Store, ingest: &Ingest, clock: &Clock) -> bool {
    let Ok(now) = clock.check() else { return false };
    let Ok(counts) = store.health_counts().await else { return false };
    let is_swept = counts
        .swept_at
        .is_some_and(|at| now.as_millisecond() - at.as_millisecond() <= LONGEST_SINCE_SWEEP);
    is_swept && ingest.is_available()
}
