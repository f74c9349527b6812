//! `GET /api/devices`: the devices of the fleet, in pages. `one` defines how a device looks.

use axum::extract::State;
use pisync_core::health::State as Health;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        devices::{change::MAX_TAG, one::DeviceData},
        fleet::level::StatusName,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, WithQuery},
            extract::Query,
            page::{DEFAULT_LIMIT, Pagination},
            query::place_text,
            routes::Routes,
        },
    },
    middleware::route_policy::RoutePolicy,
    store::{DeviceQuery, DeviceSort, GroupFilter},
};

const MAX_SEARCH: usize = 255;

/// The sort orders. A minus sign reverses one.
const SORTS: [(&str, (DeviceSort, bool)); 22] = [
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
    ("status", (DeviceSort::Status, false)),
    ("-status", (DeviceSort::Status, true)),
    ("status_since", (DeviceSort::StatusSince, false)),
    ("-status_since", (DeviceSort::StatusSince, true)),
];

/// The states by their names.
const STATES: [(&str, Health); 6] = [
    ("never", Health::Never),
    ("ok", Health::Ok),
    ("degraded", Health::Degraded),
    ("failing", Health::Failing),
    ("silent", Health::Silent),
    ("paused", Health::Paused),
];

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_devices), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct DeviceParameters {
    /// A part of the device's id or name. Case is ignored for the letters a to z.
    #[param(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    q: Option<String>,
    /// Only devices of this group. Empty: only devices that are in no group.
    #[param(max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]*$")]
    group: Option<String>,
    /// Only devices with this tag.
    #[param(min_length = 1, max_length = 50, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    tag: Option<String>,
    /// Only devices in one of these states, as the last sweep has found them.
    #[param(style = Form, explode = false, min_items = 1, inline)]
    status: Option<Vec<StatusName>>,
    /// True: only devices that are overdue.
    #[param(default = false)]
    overdue: Option<bool>,
    /// The sort order. With a minus sign, the largest or latest comes first. Missing values come last, and equal ones
    /// are sorted by `device_id`. `status` begins with the most urgent (silent, failing, degraded, never, ok, paused), and of
    /// each state with the device that has been in it for the longest time; states are those that the last sweep has found.
    #[param(inline)]
    sort: Option<SortName>,
    /// The most devices to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// The number of devices to skip.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
    /// Continue after this device: the `next_cursor` of the previous page, which had the same `sort`.
    #[param(pattern = "^([0-9a-f]{2})+$")]
    cursor: Option<String>,
}

/// The names in [`SORTS`], for the OpenAPI document.
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

#[derive(Serialize, ToSchema)]
struct DevicePagination {
    #[serde(flatten)]
    page: Pagination,
    /// The same as `total`; absent with it.
    #[schema(example = 5000)]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_devices: Option<u64>,
}

/// List devices
///
/// Each with its figures over all its jobs, and the state in which the last sweep has found it.
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
    let order = query.choice("sort", &SORTS.map(|(name, order)| (name, (name, order))));
    let (list, (sort, descending)) = order.unwrap_or(SORTS[0]);
    let device_query = DeviceQuery {
        search: query.text("q", MAX_SEARCH),
        group: query.name("group", GroupFilter::new),
        tag: query.text("tag", MAX_TAG),
        states: query.choices("status", &STATES).unwrap_or_default(),
        is_overdue: query.boolean("overdue"),
        sort,
        descending,
        limit: query.limit().unwrap_or(DEFAULT_LIMIT),
        offset: query.offset(),
        after: query.place(list, |place| sort.has(place)),
    };
    query.finish()?;
    let page = state.store.devices(&device_query).await?;
    let ids: Vec<_> = page.items.iter().map(|device| device.device_id.clone()).collect();
    let mut views = state.store.device_views(&ids).await?;
    let devices = page.items.into_iter().map(|device| {
        let view = views.remove(&device.device_id).unwrap_or_default();
        DeviceData::of(device, view)
    });
    let data = DeviceList {
        devices: devices.collect(),
        pagination: DevicePagination {
            total_devices: page.total.exact(),
            page: Pagination::by_offset(Some(device_query.limit), device_query.offset, page.total)
                .with_next(page.next.map(|place| place_text(list, &place))),
        },
    };
    Ok(Success::new("Devices retrieved successfully", data))
}
