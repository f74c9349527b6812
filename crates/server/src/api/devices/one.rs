//! `GET /api/devices` and `GET|PATCH|DELETE /api/device/{device_id}`: the fleet's devices, one by one.

use axum::extract::{Request, State};
use pisync_core::{Timestamp, Violation, text::check_text};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, OfDevice, WithBody, WithQuery},
            extract::{DevicePath, DevicePathParameter, JsonBody, Query, read_object},
            figures::DeviceFigures,
        },
    },
    middleware::auth::{self, By},
    store::{Device, DeviceChange, DeviceQuery, DeviceSort, DeviceWithJobs, Scope},
};

const DEFAULT_LIMIT: u32 = 50;
const BODY_LIMIT: usize = 64 << 10;
const MAX_NAME: usize = 255;
const MAX_GROUP: usize = 100;
const MAX_SEARCH: usize = 255;

/// What a list can be sorted by; a minus sign before it turns it round.
const SORTS: [(&str, (DeviceSort, bool)); 18] = [
    ("device_id", (DeviceSort::DeviceId, false)),
    ("-device_id", (DeviceSort::DeviceId, true)),
    ("name", (DeviceSort::Name, false)),
    ("-name", (DeviceSort::Name, true)),
    ("device_registered", (DeviceSort::CreatedAt, false)),
    ("-device_registered", (DeviceSort::CreatedAt, true)),
    ("last_seen", (DeviceSort::LastSeen, false)),
    ("-last_seen", (DeviceSort::LastSeen, true)),
    ("last_sync", (DeviceSort::LastSync, false)),
    ("-last_sync", (DeviceSort::LastSync, true)),
    ("last_success", (DeviceSort::LastSuccess, false)),
    ("-last_success", (DeviceSort::LastSuccess, true)),
    ("total_syncs", (DeviceSort::TotalSyncs, false)),
    ("-total_syncs", (DeviceSort::TotalSyncs, true)),
    ("failed_syncs", (DeviceSort::FailedSyncs, false)),
    ("-failed_syncs", (DeviceSort::FailedSyncs, true)),
    ("consecutive_failures", (DeviceSort::ConsecutiveFailures, false)),
    ("-consecutive_failures", (DeviceSort::ConsecutiveFailures, true)),
];

pub(crate) fn router() -> OpenApiRouter<SharedState> {
    OpenApiRouter::new().routes(routes!(list_devices)).routes(routes!(
        get_device,
        update_device,
        delete_device
    ))
}

/// The query as the document describes it; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct DeviceParameters {
    /// Part of the device's id or name; upper and lower case of a to z are the same.
    #[param(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    q: Option<String>,
    /// Only devices of this group.
    #[param(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    group: Option<String>,
    /// By what to sort; with a minus sign before it, largest or latest first. What is missing comes
    /// last, ties go by `device_id`.
    #[param(inline)]
    sort: Option<SortName>,
    /// The most devices to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// How many to pass over.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
}

/// The names in [`SORTS`], for the document.
struct SortName;

impl utoipa::PartialSchema for SortName {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .enum_values(Some(SORTS.map(|(name, _)| name)))
            .default(Some(SORTS[0].0.into()))
            .into()
    }
}

impl ToSchema for SortName {}

/// One page of devices.
#[derive(Serialize, ToSchema)]
struct DeviceList {
    devices: Vec<DeviceData>,
    pagination: DevicePagination,
}

/// Where the page stands.
#[derive(Serialize, ToSchema)]
struct DevicePagination {
    #[schema(example = 50)]
    limit: u32,
    #[schema(example = 0)]
    offset: u64,
    /// How many devices there are on all pages.
    #[schema(example = 5000)]
    total_devices: u64,
}

/// A device, with its figures over all its jobs.
#[derive(Serialize, ToSchema)]
struct DeviceData {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// What people call it.
    #[schema(example = "Library, north wall")]
    name: Option<String>,
    /// Which group people put it in.
    #[schema(example = "school-17")]
    group: Option<String>,
    /// When it was first seen.
    #[schema(value_type = String, format = DateTime, example = "2025-06-01T00:00:05.120Z")]
    device_registered: Timestamp,
    /// When the server last heard from it; null when never.
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
    /// By name; events that name no job come first, with a null.
    jobs: Vec<JobData>,
}

/// One of a device's jobs.
#[derive(Serialize, ToSchema)]
struct JobData {
    /// Null for events that name no job.
    #[schema(example = "nightly-backup")]
    job: Option<String>,
    /// When the server last heard of it.
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

/// What to change. Absent fields stay as they are, null empties one; other fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "Library, north wall", "group": "school-17"}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct DeviceUpdate {
    /// What people call it.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: Option<String>,
    /// Which group it belongs to.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    group: Option<String>,
}

/// A device that was removed.
#[derive(Serialize, ToSchema)]
struct DeletedDevice {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// How many of its events were removed with it.
    #[schema(example = 412)]
    deleted_events: u64,
}

/// List devices
///
/// Each with its figures over all its jobs.
#[utoipa::path(
    get,
    path = "/api/devices",
    tag = "Devices",
    security(("key" = ["read"])),
    params(DeviceParameters),
    responses(
        (status = 200, description = "One page of devices.", body = Success<DeviceList>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_devices(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<DeviceList>, ApiError> {
    let (sort, descending) = query.choice("sort", &SORTS).unwrap_or((DeviceSort::DeviceId, false));
    let device_query = DeviceQuery {
        search: query.text("q", MAX_SEARCH),
        group: query.text("group", MAX_GROUP),
        sort,
        descending,
        limit: query.limit().unwrap_or(DEFAULT_LIMIT),
        offset: query.offset(),
    };
    query.finish()?;
    let page = state.store.devices(&device_query).await?;
    let data = DeviceList {
        devices: page.items.into_iter().map(DeviceData::from).collect(),
        pagination: DevicePagination {
            limit: device_query.limit,
            offset: device_query.offset,
            total_devices: page.total,
        },
    };
    Ok(Success::new("Devices retrieved successfully", data))
}

/// One device
///
/// With its figures over all its jobs, and those of each job.
#[utoipa::path(
    get,
    path = "/api/device/{device_id}",
    tag = "Devices",
    security(("key" = ["read"])),
    params(DevicePathParameter),
    responses(
        (status = 200, description = "The device.", body = Success<DeviceDetail>),
        (status = 400, description = "Not a possible device id.", body = ErrorBody),
        OfDevice,
        AnyTime,
    ),
)]
async fn get_device(
    State(state): State<SharedState>,
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
    // Somebody may have deleted it meanwhile.
    let device = state.store.device(&device_id).await?.ok_or(ApiError::NotFound("Device"))?;
    Ok(Success::new("Device updated successfully", device.into()))
}

/// Remove a device
///
/// With all its events and figures, for good. When it reports again, it is a new device.
#[utoipa::path(
    delete,
    path = "/api/device/{device_id}",
    tag = "Devices",
    security(("key" = ["admin"])),
    params(DevicePathParameter),
    responses(
        (status = 200, description = "Removed.", body = Success<DeletedDevice>),
        (status = 400, description = "Not a possible device id.", body = ErrorBody),
        OfDevice,
        AnyTime,
    ),
)]
async fn delete_device(
    State(state): State<SharedState>,
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
    let mut fields = read_object(body)?;
    let mut violations = Vec::new();
    let change = DeviceChange {
        name: read_text(&mut fields, "name", MAX_NAME, &mut violations),
        group: read_text(&mut fields, "group", MAX_GROUP, &mut violations),
    };
    // A misspelt field must not look like a change that was made.
    for (field, value) in fields {
        violations.push(Violation::of(field, "is not allowed", Some(value)));
    }
    if violations.is_empty() { Ok(change) } else { Err(ApiError::Validation(violations)) }
}

fn read_text(
    fields: &mut Map<String, Value>,
    field: &'static str,
    most: usize,
    violations: &mut Vec<Violation>,
) -> Option<Option<String>> {
    let value = fields.remove(field)?;
    let rule = match &value {
        Value::Null => return Some(None),
        Value::String(text) => match check_text(text, most) {
            Ok(()) => return Some(Some(text.clone())),
            Err(error) => error.to_string(),
        },
        _ => "must be a string".to_owned(),
    };
    violations.push(Violation::of(field, &rule, Some(value)));
    None
}
