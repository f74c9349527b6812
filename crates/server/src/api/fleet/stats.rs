//! `GET /api/stats`: the figures of the entire fleet. The store computes them.

use axum::extract::State;
use pisync_core::Timestamp;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, WithQuery},
            extract::Query,
            figures::success_rate,
            routes::Routes,
            window::WindowName,
        },
    },
    middleware::route_policy::RoutePolicy,
    store::{Device, FleetStats, Freshness},
};

/// A device is active if the server heard from it within this many milliseconds: 24 hours.
pub(crate) const ACTIVE_MILLISECONDS: i64 = 24 * 60 * 60 * 1000;

/// How many devices with the latest syncs are listed.
const RECENT_DEVICES: u32 = 10;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_stats), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct StatsParameters {
    /// Count only events dated within a window: `24h` is the current hour (UTC) and the 23 hours before it. `7d` and
    /// `30d` are the current day and the 6 or 29 days before it. Late reports count by their own date. The window
    /// applies to the sums, the rate and the mean, but not to the devices and their figures.
    #[param(inline, example = "7d")]
    window: Option<WindowName>,
}

/// The fleet's figures, over all devices, and over all time or a window.
#[derive(Serialize, ToSchema)]
struct StatsData {
    /// The requested window; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "7d")]
    window: Option<&'static str>,
    /// The beginning of the window; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-11T00:00:00.000Z")]
    window_start: Option<Timestamp>,
    #[schema(example = 5000)]
    total_devices: u64,
    #[schema(example = 2060000)]
    total_sync_events: i64,
    /// Syncs with errors.
    #[schema(example = 14200)]
    total_failures: i64,
    #[schema(example = 150)]
    total_files_synced: i64,
    #[schema(example = 2)]
    total_errors: i64,
    /// Percentage of syncs without errors, with 2 decimals; 0 when there are no syncs. It is 100 only if none has
    /// failed, and 0 only if none has succeeded.
    #[schema(example = 99.31)]
    overall_success_rate: f64,
    /// Mean of the measured speeds in Mbps; null when none was measured.
    #[schema(example = 45.6)]
    avg_internet_speed: Option<f64>,
    /// Devices that the server heard from in the last 24 hours.
    #[schema(example = 4987)]
    active_devices_24h: u64,
    /// The 10 devices with the latest syncs, and their figures of all time.
    recent_devices: Vec<RecentDevice>,
}

/// A device that synced recently.
#[derive(Serialize, ToSchema)]
struct RecentDevice {
    #[schema(example = "pi-device-001")]
    device_id: String,
    #[schema(example = 412)]
    total_syncs: i64,
    #[schema(example = 150)]
    total_files_synced: i64,
    #[schema(example = 2)]
    total_errors: i64,
    #[schema(example = 3)]
    failed_syncs: i64,
    /// By the sync's own date.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:00.000Z")]
    last_sync: Option<Timestamp>,
    /// The latest sync with errors.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-11T04:00:09.000Z")]
    last_failed_sync: Option<Timestamp>,
}

impl From<Device> for RecentDevice {
    fn from(device: Device) -> Self {
        Self {
            device_id: device.device_id,
            total_syncs: device.figures.total_syncs,
            total_files_synced: device.figures.total_files_synced,
            total_errors: device.figures.total_errors,
            failed_syncs: device.figures.failed_syncs,
            last_sync: device.figures.last_sync,
            last_failed_sync: device.figures.last_failure,
        }
    }
}

impl From<FleetStats> for StatsData {
    fn from(stats: FleetStats) -> Self {
        Self {
            window: None,
            window_start: None,
            total_devices: stats.total_devices,
            total_sync_events: stats.figures.total_syncs,
            total_failures: stats.figures.failed_syncs,
            total_files_synced: stats.figures.total_files_synced,
            total_errors: stats.figures.total_errors,
            overall_success_rate: success_rate(&stats.figures),
            avg_internet_speed: stats.figures.avg_internet_speed(),
            active_devices_24h: stats.active_devices,
            recent_devices: stats.recent_devices.into_iter().map(RecentDevice::from).collect(),
        }
    }
}

/// Fleet statistics
#[utoipa::path(
    get,
    path = "/api/stats",
    tag = "Fleet",
    security(("key" = ["read"])),
    params(StatsParameters),
    responses(
        (status = 200, description = "The fleet's figures.", body = Success<StatsData>),
        WithQuery,
        AnyTime,
    ),
)]
async fn get_stats(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<StatsData>, ApiError> {
    let window = query.window(state.clock.now());
    query.finish_ignoring_others()?;
    let mut stats = state
        .store
        .fleet_stats(state.active_since(), RECENT_DEVICES, Freshness::Everything)
        .await?;
    if let Some((_, window)) = &window {
        stats.figures = state.store.window_figures(window).await?;
    }
    let data = StatsData {
        window: window.map(|(name, _)| name),
        window_start: window.map(|(_, window)| window.from()),
        ..stats.into()
    };
    Ok(Success::new("System statistics retrieved successfully", data))
}
