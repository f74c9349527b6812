//! `POST /api/sync-event`: a device reports one sync run. This is the hot path. It must not answer before the event is
//! committed.

use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue, StatusCode},
    response::Response,
};
use pisync_core::{
    Arrival, DeviceId, EventId, JobName, Metadata, ParseError, SyncEvent, Timestamp, Violation,
    ViolationCode, event_stream::MAX_EVENT_BYTES,
};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        ApiState, SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, WithBody},
            extract::JsonBody,
            routes::Routes,
        },
    },
    event_format::{in_mbps, in_seconds},
    ingest::Receipt,
    middleware::{auth, route_policy::RoutePolicy},
    store::{Scope, StoredEvent},
};

/// The largest body of a single event, in bytes.
const BODY_LIMIT: usize = MAX_EVENT_BYTES;

/// The header with the same effect as `event_id`, for clients that send it with every request.
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(create_sync_event), RoutePolicy::SYNC)
}

// Describes the body for the OpenAPI document; `pisync_core` reads it.
/// A device's report of one sync run. Unknown fields are ignored.
#[derive(ToSchema)]
#[schema(as = SyncEvent, example = json!({
    "device_id": "pi-device-001",
    "timestamp": "2025-06-17T10:30:00.000Z",
    "total_files_synced": 150,
    "total_errors": 2,
    "internet_speed": 45.6,
}))]
#[expect(dead_code, reason = "describes the body, is never made")]
pub(crate) struct NewSyncEvent {
    /// The device's name for itself, without control characters. The first report registers the device.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    device_id: String,
    /// The device's own id for this report, without control characters. If a report with an `event_id` is sent again,
    /// nothing changes and the status is 200. Give each report its own id, for instance a UUID, and repeat the request
    /// until there is a response.
    #[schema(min_length = 1, max_length = 64, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    event_id: Option<String>,
    /// When the sync ran (ISO 8601). A time without an offset is UTC. It may be at most 5 minutes ahead of the server's
    /// clock, unless configured otherwise.
    #[schema(format = DateTime)]
    timestamp: String,
    /// `unsynced` when the device does not trust its clock. The report is then dated by its arrival and never refused
    /// for its time. `timestamp` is kept as `device_timestamp` in the metadata.
    #[schema(value_type = Option<DeviceClock>)]
    clock: Option<String>,
    /// Files transferred.
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    total_files_synced: u32,
    /// Errors met. A sync with errors counts as failed.
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    total_errors: u32,
    /// Measured speed in Mbps, rounded to 2 decimals; null or absent when it was not measured.
    #[schema(minimum = 0, maximum = 99_999_999.99)]
    internet_speed: Option<f64>,
    /// The device's job that ran. Streaks of failures are counted per job.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    job: Option<String>,
    /// How long the sync took, in seconds, rounded to 3 decimals.
    #[schema(minimum = 0, maximum = 31_536_000)]
    duration_seconds: Option<f64>,
    /// Bytes moved.
    #[schema(minimum = 0, maximum = 9_007_199_254_740_991_u64)]
    bytes_synced: Option<u64>,
    /// Any other data: a JSON object of at most 4 KiB of text. The history returns it as it was sent. An empty array
    /// counts as an empty object.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Metadata>,
}

/// Whether a device trusts its clock.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes the body, is never made")]
pub(crate) enum DeviceClock {
    Synced,
    Unsynced,
}

/// The stored event.
#[derive(Serialize, ToSchema)]
pub(crate) struct CreatedSyncEvent {
    /// Unique among all devices.
    #[schema(example = 1)]
    id: i64,
    #[schema(value_type = String, example = "pi-device-001")]
    device_id: DeviceId,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "8d1ef3f2-20c0-4c5b-9f7a-3c1f3f3f4b11")]
    event_id: Option<EventId>,
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

/// The event as it was stored when it was first reported.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": 1, "duplicate": true, "device_id": "pi-device-001", "event_id": "run-4711",
    "timestamp": "2025-06-17T10:30:00.000Z", "total_files_synced": 150, "total_errors": 2,
    "internet_speed": 45.6, "created_at": "2025-06-17T10:30:02.417Z",
}))]
struct DuplicateSyncEvent {
    id: i64,
    /// Always true.
    duplicate: bool,
    /// Absent when the event itself is no longer kept.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    first: Option<FirstSyncEvent>,
}

/// The stored event that a duplicate repeats.
#[derive(Serialize, ToSchema)]
struct FirstSyncEvent {
    #[schema(value_type = String)]
    device_id: DeviceId,
    event_id: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    timestamp: Timestamp,
    total_files_synced: i64,
    total_errors: i64,
    internet_speed: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_synced: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    metadata: Option<Box<RawValue>>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

impl FirstSyncEvent {
    fn new(device_id: DeviceId, event: StoredEvent) -> Self {
        Self {
            device_id,
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
        }
    }
}

impl ApiState {
    /// The time of arrival, and the latest acceptable date. It fails when the clock is not set: such a clock would
    /// refuse every event as future, although the event is correct.
    pub(crate) fn arrival(&self) -> Result<Arrival, ApiError> {
        let received = self.clock.set_time().map_err(|_| ApiError::ClockNotSet)?;
        Ok(Arrival { received, latest: received.saturating_add_milliseconds(self.max_clock_skew) })
    }
}

/// Report a sync run
///
/// The response comes after the event is committed to disk. A report that is sent again, after its response was lost,
/// is stored again. An `event_id` prevents that, and so does an `Idempotency-Key` header. `Content-Encoding` may be
/// gzip, deflate or zstd.
#[utoipa::path(
    post,
    path = "/api/sync-event",
    tag = "Sync events",
    params((
        "Idempotency-Key" = Option<String>, Header,
        description = "Does the same as `event_id`; when both are sent, they must be equal.",
        min_length = 1, max_length = 64, pattern = r"^[!-~]([ -~]*[!-~])?$",
    )),
    security(("key" = ["ingest"])),
    request_body = NewSyncEvent,
    responses(
        (status = 201, description = "Stored.", body = Success<CreatedSyncEvent>),
        (
            status = 200,
            description = "The device had reported this before, under the same `event_id`; nothing was changed.",
            body = Success<DuplicateSyncEvent>,
        ),
        WithBody,
        AnyTime,
    ),
)]
fn create_sync_event(
    State(state): State<SharedState>,
    request: Request,
) -> impl Future<Output = Result<Response, ApiError>> {
    // An async function's future would hold two copies of the request until the response.
    let mut idempotency_keys = request.headers().get_all(IDEMPOTENCY_KEY).iter().cloned();
    let idempotency_key = idempotency_keys.next();
    let is_ambiguous = idempotency_keys.next().is_some();
    drop(idempotency_keys);
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state);
    async move {
        let body = body.read().await?;
        let event = SyncEvent::from_json(&body, state.arrival()?);
        drop(body);
        let event = event.and_then(|event| match idempotency_key {
            Some(key) => with_idempotency_key(event, &key, is_ambiguous),
            None => Ok(event),
        });
        let event = event.map_err(|error| match error {
            ParseError::Malformed(where_) => {
                state.metrics.rejected(&[]);
                ApiError::Malformed(where_)
            }
            ParseError::Invalid(violations) => {
                state.metrics.rejected(&violations);
                ApiError::Validation(violations)
            }
        })?;
        let key = state.gate.look_again(key.as_ref(), Scope::Ingest)?;
        let group = auth::check_report(key.as_deref(), [&event.device_id])?;
        let receipt = state.ingest.submit(event.clone(), group).await?;
        Ok(answer(event, receipt))
    }
}

fn answer(event: SyncEvent, receipt: Receipt) -> Response {
    match receipt {
        Receipt::Created { id, created_at } => {
            let created = CreatedSyncEvent {
                id,
                device_id: event.device_id,
                event_id: event.event_id,
                timestamp: event.timestamp,
                total_files_synced: event.total_files_synced,
                total_errors: event.total_errors,
                internet_speed: event.internet_speed.map(f64::from),
                job: event.job,
                duration_seconds: event.duration.map(f64::from),
                bytes_synced: event.bytes_synced,
                metadata: event.metadata,
                created_at,
            };
            Success::new("Sync event processed successfully", created)
                .with_status(StatusCode::CREATED)
        }
        Receipt::Duplicate { id, first } => {
            let first = first.map(|first| FirstSyncEvent::new(event.device_id, *first));
            let duplicate = DuplicateSyncEvent { id, duplicate: true, first };
            Success::new("Sync event was processed before", duplicate).with_status(StatusCode::OK)
        }
    }
}

/// The event with the id in the header, which must not contradict the one in the body.
fn with_idempotency_key(
    event: SyncEvent,
    key: &HeaderValue,
    is_ambiguous: bool,
) -> Result<SyncEvent, ParseError> {
    let lossy = String::from_utf8_lossy(key.as_bytes());
    let refuse = |code, rule: &str| {
        let value = Some(lossy.as_ref().into());
        ParseError::Invalid(vec![Violation::of("Idempotency-Key", code, rule, value)])
    };
    if is_ambiguous {
        return Err(refuse(ViolationCode::Conflict, "must be given only once"));
    }
    let text = key.to_str().map_err(|_| refuse(ViolationCode::Format, "must be ASCII text"))?;
    let key = EventId::new(text).map_err(|error| refuse(error.code(), &error.to_string()))?;
    match &event.event_id {
        Some(event_id) if *event_id != key => {
            Err(refuse(ViolationCode::Conflict, "must be the same as \"event_id\""))
        }
        _ => Ok(SyncEvent { event_id: Some(key), ..event }),
    }
}
