//! `GET /api/groups` and `PUT|PATCH|DELETE /api/group/{name}`: the groups of devices, what is set for them, and how their
//! devices are. A group need not be made: a device may be put into one about which nothing is said.

use axum::{
    extract::{FromRequestParts, Path, Request, State},
    http::request::Parts,
};
use pisync_core::{GroupName, Timestamp, Violation, ViolationCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        fleet::level::{ByStatus, PauseData, Paused, PolicyBody, Update, group_change},
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, WithBody, WithQuery},
            extract::{JsonBody, NoQuery, Query},
            fields::Fields,
            page::{DEFAULT_LIMIT, Pagination},
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    store::{GroupQuery, GroupView, Pauses, Scope},
};

const BODY_LIMIT: usize = 64 << 10;
const MAX_SEARCH: usize = 100;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_groups), RoutePolicy::API)
        .and(routes!(put_group, update_group, delete_group), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct GroupParameters {
    /// A part of the group's name. Case is ignored for the letters a to z.
    #[param(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    q: Option<String>,
    /// The most groups to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// The number of groups to skip.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
}

/// The path in the OpenAPI document; [`GroupPath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
struct GroupPathParameter {
    /// The group's name.
    #[param(
        min_length = 1,
        max_length = 100,
        pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$",
        example = "school-17"
    )]
    name: String,
}

/// The group's name in the path.
struct GroupPath(GroupName);

impl<S: Send + Sync> FromRequestParts<S> for GroupPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let refuse = |code, rule: &str, value: Option<Value>| {
            ApiError::Validation(vec![Violation::of("name", code, rule, value)])
        };
        let Ok(Path(text)) = Path::<String>::from_request_parts(parts, state).await else {
            return Err(refuse(ViolationCode::Format, "must be valid UTF-8", None));
        };
        GroupName::new(&text)
            .map(Self)
            .map_err(|error| refuse(error.code(), &error.to_string(), Some(Value::from(text))))
    }
}

/// A group, what is set for it, and how its devices are.
#[derive(Serialize, ToSchema)]
struct GroupData {
    #[schema(example = "school-17")]
    name: String,
    /// How many devices are in it.
    #[schema(example = 200)]
    devices: u64,
    /// How many of them are in which state. A device that no sweep has evaluated yet is in none.
    by_status: ByStatus,
    /// How many incidents of the group and its devices are open.
    #[schema(example = 1)]
    open_incidents: u64,
    /// Its own policy; what is absent is inherited from the fleet.
    #[schema(value_type = Object)]
    policy: Value,
    #[schema(example = "closed in August")]
    note: Option<String>,
    #[serde(flatten)]
    pause: PauseData,
}

impl GroupData {
    fn of(group: GroupView, now: Timestamp) -> Self {
        Self {
            name: group.name,
            devices: group.devices,
            by_status: group.states.into(),
            open_incidents: group.open_incidents,
            policy: group.level.policy.to_json(),
            note: group.level.note,
            pause: PauseData::of(
                Pauses { device: None, group: group.level.pause, fleet: group.fleet_pause },
                now,
            ),
        }
    }
}

/// One page of groups.
#[derive(Serialize, ToSchema)]
struct GroupList {
    /// By name, byte by byte.
    groups: Vec<GroupData>,
    pagination: Pagination,
}

/// What to set for a group. Absent fields stay unchanged. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"policy": {"grace_seconds": 3600}, "note": "closed in August"}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct GroupUpdate {
    #[schema(value_type = PolicyBody, required = false)]
    policy: Option<Value>,
    #[schema(value_type = Paused, required = false)]
    paused: Option<Value>,
    /// A note for people; null clears it.
    #[schema(min_length = 1, max_length = 1000, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    note: Option<String>,
}

/// A group that is no more.
#[derive(Serialize, ToSchema)]
struct DeletedGroup {
    #[schema(example = "school-17")]
    name: String,
    /// How many devices were in it, and are in none now.
    #[schema(example = 200)]
    devices: u64,
}

/// List groups
///
/// Those about which something is set, and those that have devices.
#[utoipa::path(
    get,
    path = "/api/groups",
    tag = "Fleet",
    security(("key" = ["read"])),
    params(GroupParameters),
    responses(
        (status = 200, description = "One page of groups.", body = Success<GroupList>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_groups(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<GroupList>, ApiError> {
    let group_query = GroupQuery {
        search: query.text("q", MAX_SEARCH),
        limit: query.limit().unwrap_or(DEFAULT_LIMIT),
        offset: query.offset(),
    };
    query.finish()?;
    let page = state.store.groups(&group_query).await?;
    let now = state.clock.now();
    let data = GroupList {
        groups: page.items.into_iter().map(|group| GroupData::of(group, now)).collect(),
        pagination: Pagination::by_offset(Some(group_query.limit), group_query.offset, page.total),
    };
    Ok(Success::new("Groups retrieved successfully", data))
}

async fn read_group(state: &SharedState, name: &GroupName) -> Result<GroupData, ApiError> {
    let group = state.store.group(name).await?.ok_or(ApiError::NotFound("Group"))?;
    Ok(GroupData::of(group, state.clock.now()))
}

/// Set up a group
///
/// The group need not be known. A policy replaces the stored one.
#[utoipa::path(
    put,
    path = "/api/group/{name}",
    tag = "Fleet",
    security(("key" = ["operate"])),
    params(GroupPathParameter),
    request_body = GroupUpdate,
    responses(
        (status = 200, description = "The group as it is now.", body = Success<GroupData>),
        WithBody,
        AnyTime,
    ),
)]
async fn put_group(
    State(state): State<SharedState>,
    _: NoQuery,
    GroupPath(name): GroupPath,
    By(actor): By,
    request: Request,
) -> Result<Success<GroupData>, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    let change = group_change(Fields::of(&body)?, Update::Replace, actor.at)?;
    state.store.update_group(&name, &change, true, &actor).await?;
    Ok(Success::new("Group updated successfully", read_group(&state, &name).await?))
}

/// Change a group
///
/// The fields of a policy are changed one by one, and so are the members of `severity` and `group`; null inherits a field or
/// a member again.
#[utoipa::path(
    patch,
    path = "/api/group/{name}",
    tag = "Fleet",
    security(("key" = ["operate"])),
    params(GroupPathParameter),
    request_body = GroupUpdate,
    responses(
        (status = 200, description = "The group as it is now.", body = Success<GroupData>),
        (status = 404, description = "Nothing is set for such a group, and no device is in it.", body = ErrorBody),
        WithBody,
        AnyTime,
    ),
)]
async fn update_group(
    State(state): State<SharedState>,
    _: NoQuery,
    GroupPath(name): GroupPath,
    By(actor): By,
    request: Request,
) -> Result<Success<GroupData>, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    let change = group_change(Fields::of(&body)?, Update::Merge, actor.at)?;
    if !state.store.update_group(&name, &change, false, &actor).await? {
        return Err(ApiError::NotFound("Group"));
    }
    Ok(Success::new("Group updated successfully", read_group(&state, &name).await?))
}

/// Remove a group
///
/// What is set for it is forgotten, and its devices are in no group any more. A device that moves is waited for anew, by
/// the rules of the fleet. Keys for the group stay.
#[utoipa::path(
    delete,
    path = "/api/group/{name}",
    tag = "Fleet",
    security(("key" = ["admin"])),
    params(GroupPathParameter),
    responses(
        (status = 200, description = "Removed.", body = Success<DeletedGroup>),
        (status = 400, description = "Not a possible name, or a query parameter.", body = ErrorBody),
        (status = 404, description = "Nothing is set for such a group, and no device is in it.", body = ErrorBody),
        AnyTime,
    ),
)]
async fn delete_group(
    State(state): State<SharedState>,
    _: NoQuery,
    GroupPath(name): GroupPath,
    By(actor): By,
) -> Result<Success<DeletedGroup>, ApiError> {
    let devices =
        state.store.delete_group(&name, &actor).await?.ok_or(ApiError::NotFound("Group"))?;
    tracing::info!(group = %name, devices, "group deleted");
    let data = DeletedGroup { name: name.as_str().to_owned(), devices };
    Ok(Success::new("Group deleted successfully", data))
}
