//! `GET /metrics`: the server's metrics, for Prometheus. It reads the fleet's figures from the store, and must still
//! respond when the database is slow.

use std::time::Duration;

use axum::{extract::State, http::header, response::IntoResponse};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            error::{AnyTime, ApiError, WithQuery},
            extract::NoQuery,
            routes::Routes,
        },
    },
    middleware::route_policy::RoutePolicy,
    store::{Freshness, StoreError},
};

/// A scrape skips the fleet's figures when the database takes longer than this. The process's own metrics matter most
/// when the database is slow.
const FLEET_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_metrics), RoutePolicy::UNCOUNTED)
}

/// Measurements
///
/// In Prometheus' text format: response times and statuses by route, connections, process memory and CPU, active
/// devices, devices by status, open incidents, the share of successful syncs, queue depth and batch sizes. What is said of the devices and their syncs may be
/// up to 2 s old.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "Health",
    security(("key" = ["read"])),
    responses(
        (status = 200, description = "The measurements.", body = String, content_type = "text/plain"),
        WithQuery,
        AnyTime,
    ),
)]
async fn get_metrics(
    State(state): State<SharedState>,
    _: NoQuery,
) -> Result<impl IntoResponse, ApiError> {
    state.metrics.set_pool(state.store.pool_usage());
    let figures = async {
        let stats = state.store.fleet_stats(state.active_since(), 0, Freshness::Lagging).await?;
        Ok::<_, StoreError>((stats, state.store.health_counts().await?))
    };
    if let Ok(Ok((stats, health))) = tokio::time::timeout(FLEET_TIMEOUT, figures).await {
        state.metrics.set_fleet(&stats, &health);
    }
    let text = state.metrics.render().map_err(|error| ApiError::Internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}
