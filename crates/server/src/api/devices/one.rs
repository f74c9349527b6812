//! `GET|PATCH|DELETE /api/device/{device_id}`: one device and its jobs. Reports create devices; nothing here does.

use axum::extract::{Request, State};
use pisync_core::{GroupName, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, OfDevice, WithBody},
            extract::{DevicePath, DevicePathParameter, JsonBody, NoQuery},
            fields::{Fields, text},
            figures::DeviceFigures,
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    store::{Device, DeviceChange, DeviceWithJobs, Scope},
};

const BODY_LIMIT: usize = 64 << 10;
const MAX_NAME: usize = 255;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_device, update_device, delete_device), RoutePolicy::API)
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
    /// When the server first heard from it.
    #[schema(value_type = String, format = DateTime, example = "2025-06-01T00:00:05.120Z")]
    device_registered: Timestamp,
    /// When the server last heard from it; null if never.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    last_seen: Option<Timestamp>,
    #[serde(flatten)]
    figures: DeviceFigures,
}

impl From<Device> for DeviceData {
    fn from(device: Device) -> Self {
        Self {
            device_id: device.device_id,
            name: device.name,
            group: device.group,
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
    /// Sorted by name. Events without a job come first, as a job that is null.
    jobs: Vec<JobData>,
}

/// One of a device's jobs.
#[derive(Serialize, ToSchema)]
struct JobData {
    /// Null for events without a job.
    #[schema(example = "nightly-backup")]
    job: Option<String>,
    /// When the server last received an event of this job.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    last_seen: Option<Timestamp>,
    #[serde(flatten)]
    figures: DeviceFigures,
}

impl From<DeviceWithJobs> for DeviceDetail {
    fn from(detail: DeviceWithJobs) -> Self {
        let jobs = detail.jobs.into_iter().map(|(job, figures)| JobData {
            job,
            last_seen: figures.last_seen,
            figures: figures.into(),
        });
        Self { device: detail.device.into(), jobs: jobs.collect() }
    }
}

/// The changes. Absent fields stay unchanged, and null clears a field. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "Library, north wall", "group": "school-17"}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct DeviceUpdate {
    /// A name for people.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: Option<String>,
    /// The group of the device.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    group: Option<String>,
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
    let device = state.store.device(&device_id).await?.ok_or(ApiError::NotFound("Device"))?;
    Ok(Success::new("Device retrieved successfully", device.into()))
}

/// Name a device or put it in a group
#[utoipa::path(
    patch,
    path = "/api/device/{device_id}",
    tag = "Devices",
    security(("key" = ["admin"])),
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
    state.gate.look_again(key.as_ref(), Scope::Admin)?;
    let change = read_change(&body)?;
    if !state.store.update_device(&device_id, &change, &actor).await? {
        return Err(ApiError::NotFound("Device"));
    }
    // The device may have been deleted meanwhile.
    let device = state.store.device(&device_id).await?.ok_or(ApiError::NotFound("Device"))?;
    Ok(Success::new("Device updated successfully", device.into()))
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

fn read_change(body: &[u8]) -> Result<DeviceChange, ApiError> {
    let mut fields = Fields::of(body)?;
    let change = DeviceChange {
        name: fields.nullable("name", text(MAX_NAME)),
        group: fields.nullable("group", GroupName::new),
    };
    fields.finish()?;
    Ok(change)
}
