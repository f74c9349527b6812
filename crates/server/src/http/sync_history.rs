//! `GET /api/device/{device_id}/sync-history`: what one device reported.

use axum::extract::State;
use pisync_core::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    SharedState,
    envelope::Success,
    error::{AnyTime, ApiError, OfDevice, WithQuery},
    extract::{DevicePath, DevicePathParameter, Query},
    figures::{DeviceFigures, in_mbps, in_seconds},
};
use crate::store::{HistoryQuery, StoredEvent, SyncHistory};

const DEFAULT_LIMIT: u32 = 50;

pub(super) fn router() -> OpenApiRouter<SharedState> {
    OpenApiRouter::new().routes(routes!(get_sync_history))
}

/// The query as the document describes it; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct HistoryParameters {
    /// The most events to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// How many of the newest to pass over.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
    /// Not before this instant: ISO 8601; a bare date is its midnight in UTC.
    #[param(rename = "startDate", format = DateTime)]
    start_date: Option<String>,
    /// Not after this instant.
    #[param(rename = "endDate", format = DateTime)]
    end_date: Option<String>,
    /// Only this job's events.
    #[param(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    job: Option<String>,
}

/// A device's figures and one page of its events.
#[derive(Serialize, ToSchema)]
struct HistoryData {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// Over all of the device's events, whatever the query.
    stats: DeviceFigures,
    /// Newest first by `timestamp`, then by `id`.
    sync_history: Vec<HistoryEvent>,
    pagination: HistoryPagination,
}

/// Where the page stands.
#[derive(Serialize, ToSchema)]
struct HistoryPagination {
    #[schema(example = 50)]
    limit: u32,
    #[schema(example = 0)]
    offset: u64,
    /// How many events the query can page to.
    #[schema(example = 412)]
    total_events: u64,
}

/// One reported sync.
#[derive(Serialize, ToSchema)]
struct HistoryEvent {
    #[schema(example = 1)]
    id: i64,
    #[schema(example = "pi-device-001")]
    device_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "8d1ef3f2-20c0-4c5b-9f7a-3c1f3f3f4b11")]
    event_id: Option<String>,
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:00.000Z")]
    timestamp: Timestamp,
    #[schema(example = 150)]
    total_files_synced: i64,
    #[schema(example = 2)]
    total_errors: i64,
    /// Mbps.
    #[schema(example = 45.6)]
    internet_speed: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "nightly-backup")]
    job: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 73.25)]
    duration_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 104857600)]
    bytes_synced: Option<i64>,
    /// As it was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    metadata: Option<Box<RawValue>>,
    /// When the server received it.
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    updated_at: Timestamp,
}

impl HistoryEvent {
    fn new(device_id: &str, event: StoredEvent) -> Self {
        Self {
            id: event.id,
            device_id: device_id.to_owned(),
            event_id: event.event_id,
            timestamp: event.timestamp,
            total_files_synced: event.total_files_synced,
            total_errors: event.total_errors,
            internet_speed: event.internet_speed.map(in_mbps),
            job: event.job,
            duration_seconds: event.duration.map(in_seconds),
            bytes_synced: event.bytes_synced,
            metadata: event.metadata,
            created_at: event.created_at,
            updated_at: event.updated_at,
        }
    }
}

/// A device's sync history
///
/// The device's figures, and its events newest first.
#[utoipa::path(
    get,
    path = "/api/device/{device_id}/sync-history",
    tag = "Devices",
    security(("key" = ["read"])),
    params(
        DevicePathParameter,
        HistoryParameters,
    ),
    responses(
        (status = 200, description = "The device's history.", body = Success<HistoryData>),
        WithQuery,
        OfDevice,
        AnyTime,
    ),
)]
async fn get_sync_history(
    State(state): State<SharedState>,
    DevicePath(device_id): DevicePath,
    mut query: Query,
) -> Result<Success<HistoryData>, ApiError> {
    let history_query = HistoryQuery {
        device_id,
        limit: query.limit().unwrap_or(DEFAULT_LIMIT),
        offset: query.offset(),
        from: query.timestamp("startDate"),
        until: query.timestamp("endDate"),
        job: query.job(),
    };
    query.finish()?;
    let SyncHistory { figures, events, total_events } =
        state.store.sync_history(&history_query).await?.ok_or(ApiError::NotFound("Device"))?;
    let device_id = history_query.device_id.as_str();
    let data = HistoryData {
        device_id: device_id.to_owned(),
        stats: figures.into(),
        sync_history: events.into_iter().map(|event| HistoryEvent::new(device_id, event)).collect(),
        pagination: HistoryPagination {
            limit: history_query.limit,
            offset: history_query.offset,
            total_events,
        },
    };
    Ok(Success::new("Sync history retrieved successfully", data))
}
