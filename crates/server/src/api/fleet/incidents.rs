//! `GET /api/incidents`, `GET /api/incident/{incident_id}` and `POST|DELETE /api/incident/{incident_id}/acknowledge`: what is
//! wrong in the fleet, and who looks after it. The sweep makes and resolves incidents; nothing here does.

use axum::{
    body::HttpBody as _,
    extract::{FromRequestParts, Request, State},
    http::request::Parts,
};
use pisync_core::{
    DeviceId, Timestamp, ViolationCode,
    health::{IncidentScope, check_end},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{
                AnyTime, ApiError, ErrorBody, OfIncident, OfOpenIncident, WithBody, WithQuery,
            },
            extract::{JsonBody, NoQuery, Query, id_in_path},
            fields::{Fields, text},
            page::{DEFAULT_LIMIT, Pagination},
            query::cursor_text,
            routes::Routes,
        },
    },
    incident_format::{
        IncidentData, IncidentDetailData, IncidentKindName, IncidentScopeName, IncidentStateName,
        MAX_NOTE,
    },
    maintenance::present,
    middleware::{
        auth::{self, By, WithKey},
        route_policy::RoutePolicy,
    },
    store::{
        AcknowledgeOutcome, Count, GroupFilter, INCIDENT_KINDS, IncidentQuery, NewAcknowledgement,
        Scope,
    },
};

const BODY_LIMIT: usize = 64 << 10;

/// What acknowledging needs.
const NEEDED: Scope = Scope::Operate;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_incidents), RoutePolicy::API)
        .and(routes!(get_incident), RoutePolicy::API)
        .and(routes!(acknowledge_incident, withdraw_acknowledgement), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct IncidentParameters {
    /// Open incidents, or resolved ones.
    #[param(inline, default = "open")]
    state: Option<IncidentStateName>,
    /// Only incidents of this kind.
    #[param(inline)]
    kind: Option<IncidentKindName>,
    /// Only incidents of this scope.
    #[param(inline)]
    scope: Option<IncidentScopeName>,
    /// Only incidents of this group and of its devices. Empty: only incidents about devices that are in no group.
    #[param(max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]*$")]
    group: Option<String>,
    /// Only incidents of this device, and those that it is a member of. Open incidents that it has left are not listed.
    #[param(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    device_id: Option<String>,
    /// Only incidents that were opened at this time or later (ISO 8601).
    #[param(format = DateTime)]
    since: Option<String>,
    /// The most incidents to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// Continue after this incident: the `next_cursor` of the previous page.
    #[param(pattern = "^[0-9a-f]{32}$")]
    cursor: Option<String>,
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct MemberParameters {
    /// The most members to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// The number of members to skip.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
}

/// One page of incidents.
#[derive(Serialize, ToSchema)]
struct IncidentList {
    /// Newest first, by `opened_at`.
    incidents: Vec<IncidentData>,
    pagination: IncidentPagination,
}

/// The position of a page in its list.
#[derive(Serialize, ToSchema)]
struct IncidentPagination {
    /// The most items on the page.
    #[schema(example = 50)]
    limit: u32,
    /// The `cursor` of the next page; null on the last page.
    next_cursor: Option<String>,
    /// The number of items on all pages.
    #[schema(example = 3)]
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    /// Present instead of `total` when there are too many items to count: the number of items is at least this.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_is_at_least: Option<u64>,
}

/// An incident, one page of its members, and its timeline.
#[derive(Serialize, ToSchema)]
struct IncidentWithMembers {
    #[serde(flatten)]
    incident: IncidentDetailData,
    /// Which part of the members this is.
    pagination: Pagination,
}

/// What to say about an incident. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(as = NewAcknowledgement, example = json!({"note": "The power is off until noon"}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct AcknowledgementBody {
    /// A note for people.
    #[schema(min_length = 1, max_length = 1000, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    note: Option<String>,
    /// From this time on it does not count as acknowledged. It must be in the future, and within 10 years. Without it, it
    /// counts until it is withdrawn, or until the incident ends.
    #[schema(format = DateTime)]
    until: Option<String>,
}

/// The path in the OpenAPI document; [`IncidentPath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
struct IncidentPathParameter {
    /// The incident's id.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 812)]
    incident_id: i64,
}

/// The incident id in the path.
struct IncidentPath(i64);

impl<S: Send + Sync> FromRequestParts<S> for IncidentPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id_in_path(parts, state, "incident_id").await.map(Self)
    }
}

/// List incidents
///
/// What is wrong with devices, groups and the fleet, newest first by `opened_at`. Incidents that were resolved more than 400
/// days ago are deleted.
#[utoipa::path(
    get,
    path = "/api/incidents",
    tag = "Fleet",
    security(("key" = ["read"])),
    params(IncidentParameters),
    responses(
        (status = 200, description = "One page of incidents.", body = Success<IncidentList>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_incidents(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<IncidentList>, ApiError> {
    let wanted = IncidentQuery {
        is_resolved: query
            .choice("state", &[("open", false), ("resolved", true)])
            .unwrap_or_default(),
        kind: query.choice("kind", &INCIDENT_KINDS.map(|kind| (kind.as_str(), kind))),
        scope: query.choice("scope", &IncidentScope::ALL.map(|scope| (scope.as_str(), scope))),
        group: query.name("group", GroupFilter::new),
        device_id: query.name("device_id", DeviceId::new),
        since: query.timestamp("since"),
        limit: query.limit().unwrap_or(DEFAULT_LIMIT),
        after: query.cursor(),
    };
    query.finish()?;
    let page = state.store.incidents(&wanted).await?;
    let now = state.clock.now();
    let (total, total_is_at_least) = match page.total {
        Count::Exactly(total) => (Some(total), None),
        Count::AtLeast(total) => (None, Some(total)),
    };
    let pagination = IncidentPagination {
        limit: wanted.limit,
        next_cursor: page.next.map(cursor_text),
        total,
        total_is_at_least,
    };
    let incidents = page.incidents.into_iter().map(|one| IncidentData::new(one, now)).collect();
    let data = IncidentList { incidents, pagination };
    Ok(Success::new("Incidents retrieved successfully", data))
}

/// One incident
///
/// With its timeline and one page of its members.
#[utoipa::path(
    get,
    path = "/api/incident/{incident_id}",
    tag = "Fleet",
    security(("key" = ["read"])),
    params(IncidentPathParameter, MemberParameters),
    responses(
        (status = 200, description = "The incident.", body = Success<IncidentWithMembers>),
        OfIncident,
        WithQuery,
        AnyTime,
    ),
)]
async fn get_incident(
    State(state): State<SharedState>,
    IncidentPath(id): IncidentPath,
    Query(mut query): Query,
) -> Result<Success<IncidentWithMembers>, ApiError> {
    let limit = query.limit().unwrap_or(DEFAULT_LIMIT);
    let offset = query.offset();
    query.finish()?;
    let found = state.store.incident(id, limit, offset).await?;
    let found = found.ok_or(ApiError::NotFound("Incident"))?;
    let pagination = Pagination::by_offset(Some(limit), offset, found.total_members);
    let incident = IncidentDetailData::new(found, state.clock.now());
    let data = IncidentWithMembers { incident, pagination };
    Ok(Success::new("Incident retrieved successfully", data))
}

/// Acknowledge an incident
///
/// Says that somebody looks after it. Acknowledging it again replaces what was said before. The body may be absent.
#[utoipa::path(
    post,
    path = "/api/incident/{incident_id}/acknowledge",
    tag = "Fleet",
    security(("key" = ["operate"])),
    params(IncidentPathParameter),
    request_body(content = Option<AcknowledgementBody>, content_type = "application/json"),
    responses(
        (status = 200, description = "The incident as it is now.", body = Success<IncidentData>),
        OfOpenIncident,
        WithBody,
        AnyTime,
    ),
)]
async fn acknowledge_incident(
    State(state): State<SharedState>,
    _: NoQuery,
    IncidentPath(id): IncidentPath,
    By(actor): By,
    request: Request,
) -> Result<Success<IncidentData>, ApiError> {
    let key = auth::key_of(&request);
    let acknowledgement = if request.body().is_end_stream() {
        NewAcknowledgement::default()
    } else {
        let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
        // A clock that is behind could otherwise accept an end that has passed.
        let present = present(&*state.store, &state.clock).await?;
        match body.trim_ascii() {
            b"null" => NewAcknowledgement::default(),
            _ => read_acknowledgement(&body, actor.at.max(present))?,
        }
    };
    state.gate.look_again(key.as_ref(), NEEDED)?;
    let outcome = state.store.acknowledge_incident(id, Some(&acknowledgement), &actor).await?;
    answer("Incident acknowledged successfully", outcome, actor.at)
}

/// Withdraw an acknowledgement
///
/// Nothing changes when the incident is not acknowledged.
#[utoipa::path(
    delete,
    path = "/api/incident/{incident_id}/acknowledge",
    tag = "Fleet",
    security(("key" = ["operate"])),
    params(IncidentPathParameter),
    responses(
        (status = 200, description = "The incident as it is now.", body = Success<IncidentData>),
        (status = 400, description = "Not a possible number, or a query parameter.", body = ErrorBody),
        OfOpenIncident,
        AnyTime,
    ),
)]
async fn withdraw_acknowledgement(
    State(state): State<SharedState>,
    _: NoQuery,
    IncidentPath(id): IncidentPath,
    By(actor): By,
    WithKey(key): WithKey,
) -> Result<Success<IncidentData>, ApiError> {
    state.gate.look_again(key.as_ref(), NEEDED)?;
    let outcome = state.store.acknowledge_incident(id, None, &actor).await?;
    answer("Acknowledgement withdrawn successfully", outcome, actor.at)
}

fn answer(
    message: &'static str,
    outcome: AcknowledgeOutcome,
    now: Timestamp,
) -> Result<Success<IncidentData>, ApiError> {
    match outcome {
        AcknowledgeOutcome::Done(incident) => {
            Ok(Success::new(message, IncidentData::new(*incident, now)))
        }
        AcknowledgeOutcome::Resolved => {
            Err(ApiError::Conflict("Incident is already resolved".to_owned()))
        }
        AcknowledgeOutcome::Unknown => Err(ApiError::NotFound("Incident")),
    }
}

fn read_acknowledgement(body: &[u8], now: Timestamp) -> Result<NewAcknowledgement, ApiError> {
    // The same as no body, as a null field is the same as none.
    if body.trim_ascii() == b"null" {
        return Ok(NewAcknowledgement::default());
    }
    let mut fields = Fields::of(body)?;
    let note = fields.optional("note", text(MAX_NOTE));
    let until = fields.optional("until", Timestamp::from_iso8601);
    if let Some(until) = until
        && let Err(error) = check_end(until, now)
    {
        let value = Some(Value::from(until.to_string()));
        fields.refuse("until", ViolationCode::Range, &error.to_string(), value);
    }
    fields.finish()?;
    Ok(NewAcknowledgement { note, until })
}
