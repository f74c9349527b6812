//! `GET|PUT|PATCH|DELETE /api/device/{device_id}`: one device and its jobs. A device becomes known by its first report, or
//! here and on a roster before that.

use axum::{
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use pisync_core::{
    DeviceId, Timestamp,
    health::{ProblemKind, Reason, State as Health},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        devices::change::{DeviceUpdate, device_change},
        fleet::level::{PauseData, StatusName, Update},
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, OfDevice, WithBody},
            extract::{DevicePath, DevicePathParameter, JsonBody, NoQuery},
            fields::Fields,
            figures::DeviceFigures,
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    store::{Device, DeviceDetailView, DeviceView, DeviceWithJobs, Figures, JobView, Scope},
};

const BODY_LIMIT: usize = 64 << 10;

pub(crate) fn routes() -> Routes {
    let operations = routes!(get_device, put_device, update_device, delete_device);
    Routes::new(operations, RoutePolicy::API)
}

/// A device, with its figures over all its jobs.
#[derive(Serialize, ToSchema)]
pub(super) struct DeviceData {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// A name that people gave it.
    #[schema(example = "Library, north wall")]
    name: Option<String>,
    /// The group that people put it in.
    #[schema(example = "school-17")]
    group: Option<String>,
    /// By name, byte by byte.
    #[schema(example = json!(["indoor"]))]
    tags: Vec<String>,
    /// Whether the roster expects it to report: true when it is on the roster, and false when somebody said that nothing is
    /// to be expected of it. Null when nobody said either. It is then expected once it has reported.
    expected: Option<bool>,
    /// The state in which the last sweep has found it. Null until it is evaluated for the first time, which takes 15
    /// seconds at most.
    #[schema(value_type = Option<StatusName>)]
    status: Option<Health>,
    /// Since when it is in this state.
    #[schema(value_type = Option<String>, format = DateTime)]
    status_since: Option<Timestamp>,
    /// What is wrong with it and its jobs.
    #[schema(value_type = Vec<ProblemData>)]
    problems: Value,
    /// When its next report is expected; null when none is.
    #[schema(value_type = Option<String>, format = DateTime)]
    next_due: Option<Timestamp>,
    /// When the server first heard from it, or was told that there is such a device.
    #[schema(value_type = String, format = DateTime, example = "2025-06-01T00:00:05.120Z")]
    device_registered: Timestamp,
    /// When the server last heard from it; null if never.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    last_seen: Option<Timestamp>,
    #[serde(flatten)]
    figures: DeviceFigures,
}

/// What is wrong with a device, or with one of its jobs.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the object, is never made")]
struct ProblemData {
    #[schema(value_type = ProblemKindName)]
    kind: ProblemKind,
    /// Null for the device as a whole, and for reports that name no job.
    #[schema(required)]
    job: Option<String>,
    #[schema(value_type = ReasonName)]
    reason: Reason,
    #[schema(value_type = String, format = DateTime)]
    since: Timestamp,
}

/// The kind of a problem.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ProblemKindName {
    Silent,
    Failing,
    Degraded,
}

/// Why something is a problem.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ReasonName {
    NoReport,
    NeverReported,
    MissedRun,
    Failures,
    Overrun,
    Errors,
    Behind,
}

impl DeviceData {
    pub(super) fn of(device: Device, view: DeviceView) -> Self {
        let DeviceView { settings, health } = view;
        let expected = match (settings.expected_from, settings.is_excused) {
            (Some(_), _) => Some(true),
            (None, true) => Some(false),
            (None, false) => None,
        };
        Self {
            device_id: device.device_id,
            name: device.name,
            group: device.group,
            tags: settings.tags,
            expected,
            status: health.as_ref().map(|health| health.state),
            status_since: health.as_ref().map(|health| health.since),
            next_due: health.as_ref().and_then(|health| health.next_due),
            problems: health.map_or_else(|| Value::Array(Vec::new()), |health| health.problems),
            device_registered: device.created_at,
            last_seen: device.figures.last_seen,
            figures: device.figures.into(),
        }
    }
}

/// A device, with its figures and those of each job.
#[derive(Serialize, ToSchema)]
struct DeviceDetail {
    #[serde(flatten)]
    device: DeviceData,
    #[schema(example = "behind the door")]
    note: Option<String>,
    #[serde(flatten)]
    pause: PauseData,
    /// Its own policy; what is absent is inherited from its group and the fleet.
    #[schema(value_type = Object)]
    policy: Value,
    /// What applies to it: each field with its `value`, and `from` where it comes: `device`, `group`, `fleet` or
    /// `built-in`.
    #[schema(value_type = Object)]
    effective_policy: Value,
    /// Sorted by name. Events without a job come first, as a job that is null.
    jobs: Vec<JobData>,
}

/// One of a device's jobs.
#[derive(Serialize, ToSchema)]
struct JobData {
    /// Null for events without a job.
    #[schema(example = "nightly-backup")]
    job: Option<String>,
    /// The state in which the last sweep has found it; null until its device is evaluated.
    #[schema(value_type = Option<StatusName>)]
    status: Option<Health>,
    /// Whether a policy names it.
    expected: bool,
    /// When its next report is expected; null when none is.
    #[schema(value_type = Option<String>, format = DateTime)]
    next_due: Option<Timestamp>,
    /// When the device said that it began a run that is not over; null without one.
    #[schema(value_type = Option<String>, format = DateTime)]
    run_started: Option<Timestamp>,
    /// When the server last received an event of this job.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    last_seen: Option<Timestamp>,
    #[serde(flatten)]
    figures: DeviceFigures,
}

impl JobData {
    fn of(job: Option<String>, figures: Figures, view: JobView, is_evaluated: bool) -> Self {
        Self {
            job,
            // Only jobs that are expected or have a problem are stored.
            status: view.state.or(is_evaluated.then_some(Health::Ok)),
            expected: view.is_expected,
            next_due: view.next_due,
            run_started: view.run_started,
            last_seen: figures.last_seen,
            figures: figures.into(),
        }
    }
}

impl DeviceDetail {
    fn of(found: DeviceWithJobs, view: DeviceDetailView, now: Timestamp) -> Self {
        let DeviceDetailView { device, pauses, policy, jobs: mut views } = view;
        let is_evaluated = device.health.is_some();
        let mut jobs: Vec<_> = found
            .jobs
            .into_iter()
            .map(|(job, figures)| {
                let view = views.remove(&job).unwrap_or_default();
                JobData::of(job, figures, view, is_evaluated)
            })
            .collect();
        // Jobs that are expected, or have begun, and have never reported.
        jobs.extend(
            views
                .into_iter()
                .map(|(job, view)| JobData::of(job, Figures::default(), view, is_evaluated)),
        );
        jobs.sort_by(|one, other| one.job.cmp(&other.job));
        Self {
            note: device.settings.level.note.clone(),
            policy: device.settings.level.policy.to_json(),
            effective_policy: policy.to_json(),
            pause: PauseData::of(pauses, now),
            device: DeviceData::of(found.device, device),
            jobs,
        }
    }
}

/// A deleted device.
#[derive(Serialize, ToSchema)]
struct DeletedDevice {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// The number of its events that were deleted with it.
    #[schema(example = 412)]
    deleted_events: u64,
}

/// One device
///
/// Its figures over all its jobs, and the figures of each job.
#[utoipa::path(
    get,
    path = "/api/device/{device_id}",
    tag = "Devices",
    security(("key" = ["read"])),
    params(DevicePathParameter),
    responses(
        (status = 200, description = "The device.", body = Success<DeviceDetail>),
        (status = 400, description = "Not a possible device id, or a query parameter.", body = ErrorBody),
        OfDevice,
        AnyTime,
    ),
)]
async fn get_device(
    State(state): State<SharedState>,
    _: NoQuery,
    DevicePath(device_id): DevicePath,
) -> Result<Success<DeviceDetail>, ApiError> {
    Ok(Success::new("Device retrieved successfully", read_device(&state, &device_id).await?))
}

/// The device as it is now. It may have been deleted meanwhile.
async fn read_device(state: &SharedState, device_id: &DeviceId) -> Result<DeviceDetail, ApiError> {
    let device = state.store.device(device_id).await?;
    let view = state.store.device_detail(device_id).await?;
    let (device, view) = device.zip(view).ok_or(ApiError::NotFound("Device"))?;
    Ok(DeviceDetail::of(device, view, state.clock.now()))
}

/// Put a device on the roster
///
/// The device need not be known. It is expected to report from now on, unless `expected` says otherwise now, or somebody said
/// `false` before: absent fields stay unchanged. A policy replaces the stored one.
#[utoipa::path(
    put,
    path = "/api/device/{device_id}",
    tag = "Devices",
    security(("key" = ["operate"])),
    params(DevicePathParameter),
    request_body = DeviceUpdate,
    responses(
        (status = 200, description = "The device was known. It as it is now.", body = Success<DeviceDetail>),
        (status = 201, description = "The device is new.", body = Success<DeviceDetail>),
        OfDevice,
        WithBody,
        AnyTime,
    ),
)]
async fn put_device(
    State(state): State<SharedState>,
    _: NoQuery,
    DevicePath(device_id): DevicePath,
    By(actor): By,
    request: Request,
) -> Result<Response, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    let change = device_change(Fields::of(&body)?, Update::Replace, actor.at)?;
    let is_new = state.store.put_device(&device_id, &change, &actor).await?;
    let device = read_device(&state, &device_id).await?;
    Ok(match is_new {
        true => {
            Success::new("Device created successfully", device).with_status(StatusCode::CREATED)
        }
        false => Success::new("Device updated successfully", device).into_response(),
    })
}

/// Change what is set for a device
///
/// Its name, group, tags, note and policy, whether it is expected, and whether it is paused. The fields of a policy are
/// changed one by one, and so are the members of `severity` and `group`; null inherits a field or a member again. A device
/// whose policy or group changes is waited for anew. `paused` is the device's own pause: `paused_by` of the answer tells
/// whose pauses are in force.
#[utoipa::path(
    patch,
    path = "/api/device/{device_id}",
    tag = "Devices",
    security(("key" = ["operate"])),
    params(DevicePathParameter),
    request_body = DeviceUpdate,
    responses(
        (status = 200, description = "The device as it is now.", body = Success<DeviceDetail>),
        OfDevice,
        WithBody,
        AnyTime,
    ),
)]
async fn update_device(
    State(state): State<SharedState>,
    _: NoQuery,
    DevicePath(device_id): DevicePath,
    By(actor): By,
    request: Request,
) -> Result<Success<DeviceDetail>, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    let change = device_change(Fields::of(&body)?, Update::Merge, actor.at)?;
    if !state.store.update_device(&device_id, &change, &actor).await? {
        return Err(ApiError::NotFound("Device"));
    }
    Ok(Success::new("Device updated successfully", read_device(&state, &device_id).await?))
}

/// Remove a device
///
/// Deletes the device with all its events and figures for good. If it reports again, it is a new device.
#[utoipa::path(
    delete,
    path = "/api/device/{device_id}",
    tag = "Devices",
    security(("key" = ["admin"])),
    params(DevicePathParameter),
    responses(
        (status = 200, description = "Removed.", body = Success<DeletedDevice>),
        (status = 400, description = "Not a possible device id, or a query parameter.", body = ErrorBody),
        OfDevice,
        AnyTime,
    ),
)]
async fn delete_device(
    State(state): State<SharedState>,
    _: NoQuery,
    DevicePath(device_id): DevicePath,
    By(actor): By,
) -> Result<Success<DeletedDevice>, ApiError> {
    let deleted_events =
        state.store.delete_device(&device_id, &actor).await?.ok_or(ApiError::NotFound("Device"))?;
    tracing::info!(%device_id, deleted_events, "device deleted");
    let data = DeletedDevice { device_id: device_id.as_str().to_owned(), deleted_events };
    Ok(Success::new("Device deleted successfully", data))
}
