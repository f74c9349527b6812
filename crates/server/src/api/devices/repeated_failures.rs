//! `GET /api/devices/repeated-failures`: devices that keep failing. The store counts the failures and the streaks.

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
            page::Pagination,
            query::place_text,
            routes::Routes,
            window::WindowName,
        },
    },
    middleware::route_policy::RoutePolicy,
    store::{Device, FailureQuery},
};

const DEFAULT_THRESHOLD: u32 = 3;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_repeated_failures), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct FailureParameters {
    /// The least number of failures.
    #[param(minimum = 1, maximum = 100, default = 3)]
    threshold: Option<u32>,
    /// Count the failures since the last success instead of all failures.
    #[param(default = false)]
    consecutive: Option<bool>,
    /// Count only failures dated within a window: `24h` is the current hour (UTC) and the 23 hours before it. `7d` and
    /// `30d` are the current day and the 6 or 29 days before it. Late reports count by their own date. With
    /// `consecutive`, the list contains only devices that failed within the window, with their entire streaks.
    #[param(inline, example = "24h")]
    window: Option<WindowName>,
    /// The most devices to list; all when absent.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// The number of the worst devices to skip.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
    /// Continue after this device: the `next_cursor` of the previous page, which had the same `consecutive` and
    /// `window`.
    #[param(pattern = "^([0-9a-f]{2})+$")]
    cursor: Option<String>,
}

/// The devices that failed at least `threshold` times.
#[derive(Serialize, ToSchema)]
struct FailureData {
    #[schema(example = 3)]
    threshold: u32,
    /// The requested window; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "24h")]
    window: Option<&'static str>,
    /// The beginning of the window; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-16T11:00:00.000Z")]
    window_start: Option<Timestamp>,
    /// The number of devices on all pages.
    #[schema(example = 5000)]
    total_devices: u64,
    /// Most failures first, then the latest failure, then by `device_id`.
    devices: Vec<FailingDevice>,
    pagination: Pagination,
}

/// A device that keeps failing.
#[derive(Serialize, ToSchema)]
struct FailingDevice {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// Syncs with errors, of all time or within the window.
    #[schema(example = 3)]
    total_failed_syncs: i64,
    /// Failures after the last success, by date and then by id, whatever the window is. For a device with several jobs,
    /// those of the worst job.
    #[schema(example = 0)]
    consecutive_failures: i64,
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-11T04:00:09.000Z")]
    last_failed_sync: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:00.000Z")]
    last_success: Option<Timestamp>,
    /// When the server first heard from it.
    #[schema(value_type = String, format = DateTime, example = "2025-06-01T00:00:05.120Z")]
    device_registered: Timestamp,
    /// When the server last heard from it.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    last_seen: Option<Timestamp>,
}

impl From<Device> for FailingDevice {
    fn from(device: Device) -> Self {
        Self {
            device_id: device.device_id,
            total_failed_syncs: device.figures.failed_syncs,
            consecutive_failures: device.figures.consecutive_failures,
            last_failed_sync: device.figures.last_failure,
            last_success: device.figures.last_success,
            device_registered: device.created_at,
            last_seen: device.figures.last_seen,
        }
    }
}

/// Devices that failed repeatedly
///
/// A failed sync is one with `total_errors` above 0.
#[utoipa::path(
    get,
    path = "/api/devices/repeated-failures",
    tag = "Devices",
    security(("key" = ["read"])),
    params(FailureParameters),
    responses(
        (status = 200, description = "The devices, worst first.", body = Success<FailureData>),
        WithQuery,
        AnyTime,
    ),
)]
async fn get_repeated_failures(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<FailureData>, ApiError> {
    let threshold = query.integer("threshold", 1..=100).and_then(|value| u32::try_from(value).ok());
    let window = query.window(state.clock.now());
    let consecutive = query.boolean("consecutive");
    let list = if consecutive { "streaks" } else { "failures" };
    let failure_query = FailureQuery {
        threshold: threshold.unwrap_or(DEFAULT_THRESHOLD),
        consecutive,
        window: window.map(|(_, window)| window),
        limit: query.limit(),
        offset: query.offset(),
        after: query.place(list, FailureQuery::has),
    };
    query.finish_ignoring_others()?;
    let page = state.store.repeated_failures(&failure_query).await?;
    let data = FailureData {
        threshold: failure_query.threshold,
        window: window.map(|(name, _)| name),
        window_start: window.map(|(_, window)| window.from()),
        total_devices: page.total.exact().unwrap_or_default(),
        devices: page.items.into_iter().map(FailingDevice::from).collect(),
        pagination: Pagination::by_offset(failure_query.limit, failure_query.offset, page.total)
            .with_next(page.next.map(|place| place_text(list, &place))),
    };
    Ok(Success::new("Devices with repeated failures retrieved successfully", data))
}
