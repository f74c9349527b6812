//! `POST /api/sync-event`: a device reports one sync run.

use axum::{
    extract::{Request, State},
    http::StatusCode,
    response::Response,
};
use pisync_core::{DeviceId, JobName, Metadata, ParseError, SyncEvent, Timestamp};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    SharedState, auth,
    envelope::Success,
    error::{AnyTime, ApiError, WithBody},
    extract::json_body,
};

/// The largest body of a single event, in bytes.
const BODY_LIMIT: usize = 64 << 10;

pub(super) fn router() -> OpenApiRouter<SharedState> {
    OpenApiRouter::new().routes(routes!(create_sync_event))
}

// Describes the body; `pisync_core` reads it.
/// What a device reports of one sync run. Unknown fields are ignored.
#[derive(ToSchema)]
#[schema(as = SyncEvent, example = json!({
    "device_id": "pi-device-001",
    "timestamp": "2025-06-17T10:30:00.000Z",
    "total_files_synced": 150,
    "total_errors": 2,
    "internet_speed": 45.6,
}))]
#[expect(dead_code, reason = "describes the body, is never made")]
pub(super) struct NewSyncEvent {
    /// What the device calls itself; no control characters. It is registered on first sight.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    device_id: String,
    /// When the sync ran, ISO 8601; without an offset it is read as UTC. At most 5 minutes ahead of
    /// the server's clock, unless configured otherwise.
    #[schema(format = DateTime)]
    timestamp: String,
    /// Files transferred.
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    total_files_synced: u32,
    /// Errors met. A sync with errors counts as failed.
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    total_errors: u32,
    /// Measured speed in Mbps, rounded to 2 decimals; null or absent when it was not measured.
    #[schema(minimum = 0, maximum = 99_999_999.99)]
    internet_speed: Option<f64>,
    /// Which of the device's jobs this was. Streaks of failures are counted per job.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    job: Option<String>,
    /// How long it took, in seconds with 3 decimals.
    #[schema(minimum = 0, maximum = 31_536_000)]
    duration_seconds: Option<f64>,
    /// Bytes moved.
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_u64)]
    bytes_synced: Option<u64>,
    /// Anything else worth keeping: a JSON object of at most 4 KiB of text, given back in history as
    /// it was sent.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Metadata>,
}

/// The event as it was stored.
#[derive(Serialize, ToSchema)]
pub(super) struct CreatedSyncEvent {
    /// Unique over all devices.
    #[schema(example = 1)]
    id: i64,
    #[schema(value_type = String, example = "pi-device-001")]
    device_id: DeviceId,
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:00.000Z")]
    timestamp: Timestamp,
    #[schema(example = 150)]
    total_files_synced: u32,
    #[schema(example = 2)]
    total_errors: u32,
    #[schema(example = 45.6)]
    internet_speed: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "nightly-backup")]
    job: Option<JobName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 73.25)]
    duration_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 104857600)]
    bytes_synced: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    metadata: Option<Metadata>,
    /// When the server received it.
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    created_at: Timestamp,
}

/// Report a sync run
///
/// Answers once the event is committed to disk. Sent again after a lost answer, it is stored again.
#[utoipa::path(
    post,
    path = "/api/sync-event",
    tag = "Sync events",
    security(("key" = ["ingest"])),
    request_body = NewSyncEvent,
    responses(
        (status = 201, description = "Stored.", body = Success<CreatedSyncEvent>),
        WithBody,
        AnyTime,
    ),
)]
async fn create_sync_event(
    State(state): State<SharedState>,
    request: Request,
) -> Result<Response, ApiError> {
    let key = auth::key_of(&request);
    let body = json_body(request, BODY_LIMIT, state.body_timeout).await?;
    let latest = state.clock.now().saturating_add_milliseconds(state.max_clock_skew);
    let event = SyncEvent::from_json(&body, latest).map_err(|error| match error {
        ParseError::Malformed(where_) => ApiError::Malformed(where_),
        ParseError::Invalid(violations) => ApiError::Validation(violations),
    })?;
    if let Some(key) = key {
        auth::check_report(&state, &key, &event.device_id).await?;
    }
    let receipt = state.ingest.submit(event.clone()).await?;
    let created = CreatedSyncEvent {
        id: receipt.id,
        device_id: event.device_id,
        timestamp: event.timestamp,
        total_files_synced: event.total_files_synced,
        total_errors: event.total_errors,
        internet_speed: event.internet_speed.map(f64::from),
        job: event.job,
        duration_seconds: event.duration.map(f64::from),
        bytes_synced: event.bytes_synced,
        metadata: event.metadata,
        created_at: receipt.created_at,
    };
    Ok(Success::new("Sync event processed successfully", created).with_status(StatusCode::CREATED))
}
