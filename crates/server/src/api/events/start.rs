//! `POST /api/sync-start`: a device says that a run has begun, so that silence waits for the run's end and a hung run is
//! found. It is noted in memory and stored within a second. Nothing here may hold up a report.

use axum::{
    extract::{Request, State},
    http::StatusCode,
    response::Response,
};
use pisync_core::{DeviceId, EventId, JobName, ParseError, RunStart, Timestamp};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::one::DeviceClock;
use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, WithBody},
            extract::{JsonBody, NoQuery},
            routes::Routes,
        },
    },
    ingest::Full,
    middleware::{auth, route_policy::RoutePolicy},
    store::{RunKey, Scope, StartedRun},
};

const BODY_LIMIT: usize = 64 << 10;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(create_sync_start), RoutePolicy::SYNC)
}

// Describes the body for the OpenAPI document; `pisync_core` reads it.
/// A device's word that a run has begun. Unknown fields are refused.
#[derive(ToSchema, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(as = SyncStart, example = json!({
    "device_id": "pi-device-001",
    "job": "nightly-backup",
    "run_id": "8d1ef3f2-20c0-4c5b-9f7a-3c1f3f3f4b11",
}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct NewSyncStart {
    /// The device's name for itself, without control characters.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    device_id: String,
    /// The device's job that has begun.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    job: Option<String>,
    /// The `event_id` that the run's report will carry. Without one, the next report of the job ends the run.
    #[schema(min_length = 1, max_length = 64, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    run_id: Option<String>,
    /// When the run began (ISO 8601). The rules are those of a sync event.
    #[schema(format = DateTime)]
    timestamp: Option<String>,
    /// `unsynced` when the device does not trust its clock. `timestamp` is then not used.
    #[schema(value_type = Option<DeviceClock>)]
    clock: Option<String>,
}

/// The start as it was noted.
#[derive(Serialize, ToSchema)]
struct NotedSyncStart {
    #[schema(value_type = String, example = "pi-device-001")]
    device_id: DeviceId,
    #[schema(value_type = Option<String>, example = "nightly-backup")]
    job: Option<JobName>,
    #[schema(value_type = Option<String>, example = "8d1ef3f2-20c0-4c5b-9f7a-3c1f3f3f4b11")]
    run_id: Option<EventId>,
    /// When the server received it.
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    received_at: Timestamp,
}

/// Report the start of a sync run
///
/// No report: it changes no figures, and makes no device known. While the run is open, its device and job do not count as
/// silent. When the run takes longer than `max_run_seconds` of its policy, it is hung, and its job counts as failing.
///
/// The start is stored within a second after the response; a crash in between may lose it. Sending it again changes nothing.
/// A start of a device that has never reported is dropped. Up to 100 open runs of a device are kept; further ones are dropped.
#[utoipa::path(
    post,
    path = "/api/sync-start",
    tag = "Sync events",
    security(("key" = ["ingest"])),
    request_body = NewSyncStart,
    responses(
        (status = 202, description = "Noted.", body = Success<NotedSyncStart>),
        WithBody,
        AnyTime,
    ),
)]
async fn create_sync_start(
    State(state): State<SharedState>,
    _: NoQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    let arrival = state.arrival()?;
    let start = RunStart::from_json(&body, arrival).map_err(|error| match error {
        ParseError::Malformed(where_) => ApiError::Malformed(where_),
        ParseError::Invalid(violations) => ApiError::Validation(violations),
    })?;
    drop(body);
    let key = state.gate.look_again(key.as_ref(), Scope::Ingest)?;
    let group = auth::check_report(key.as_deref(), [&start.device_id])?;
    // Only keys of a group ask the database. The group is checked again when the start is stored.
    if let Some(group) = &group
        && !state.store.may_report_in(&start.device_id, group).await?
    {
        return Err(ApiError::OtherDevice);
    }
    let RunStart { device_id, job, run_id, timestamp } = start;
    let key = RunKey { device_id, job, run_id };
    let run = StartedRun { key: key.clone(), received_at: arrival.received, timestamp, group };
    let received_at = state.run_starts.note(run).map_err(|Full| ApiError::Overloaded)?;
    let RunKey { device_id, job, run_id } = key;
    let data = NotedSyncStart { device_id, job, run_id, received_at };
    Ok(Success::new("Sync start noted successfully", data).with_status(StatusCode::ACCEPTED))
}
