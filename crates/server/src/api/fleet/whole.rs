//! `GET|PATCH /api/fleet`: what is set for the whole fleet, and how it is, as the last sweep has found it.

use axum::extract::{Request, State};
use pisync_core::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        fleet::channels::ChannelStateName,
        fleet::level::{ByStatus, PauseData, Paused, PolicyBody, fleet_change},
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, WithBody, WithQuery},
            extract::{JsonBody, NoQuery},
            fields::Fields,
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    notify::manage::{self, ChannelView},
    store::{FleetView, Pauses, Scope},
};

const BODY_LIMIT: usize = 64 << 10;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_fleet, update_fleet), RoutePolicy::API)
}

/// The whole fleet.
#[derive(Serialize, ToSchema)]
struct FleetData {
    /// The policy of the fleet; what is absent is built in.
    #[schema(value_type = Object)]
    policy: Value,
    #[serde(flatten)]
    pause: PauseData,
    /// How many devices are in which state. A device that no sweep has evaluated yet is in none.
    by_status: ByStatus,
    /// How many devices are on the roster and were not heard in time for the first time.
    #[schema(example = 2)]
    overdue: u64,
    #[schema(example = 1)]
    open_incidents: u64,
    /// When the last sweep began that went through; null before the first.
    #[schema(value_type = Option<String>, format = DateTime)]
    swept_at: Option<Timestamp>,
    /// The last 20 times in which nobody could be heard, the latest first.
    outages: Vec<OutageData>,
    /// By which ways people are told of incidents, by id.
    channels: Vec<ChannelSummary>,
}

/// How a channel is.
#[derive(Serialize, ToSchema)]
struct ChannelSummary {
    #[schema(example = 3)]
    id: i64,
    #[schema(example = "on call")]
    name: String,
    #[schema(value_type = ChannelStateName)]
    state: &'static str,
}

/// A time in which nobody could be heard.
#[derive(Serialize, ToSchema)]
struct OutageData {
    #[schema(value_type = String, format = DateTime)]
    from: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    until: Timestamp,
    /// `stopped`, `down` or `refusing`.
    #[schema(example = "stopped")]
    cause: String,
}

impl FleetData {
    fn of(fleet: FleetView, channels: Vec<ChannelView>, now: Timestamp) -> Self {
        let outages = fleet.outages.into_iter();
        Self {
            policy: fleet.level.policy.to_json(),
            pause: PauseData::of(Pauses { fleet: fleet.level.pause, ..Pauses::default() }, now),
            by_status: fleet.states.into(),
            overdue: fleet.overdue,
            open_incidents: fleet.open_incidents,
            swept_at: fleet.swept_at,
            outages: outages
                .map(|outage| OutageData {
                    from: outage.from,
                    until: outage.until,
                    cause: outage.cause,
                })
                .collect(),
            channels: channels
                .into_iter()
                .map(|view| ChannelSummary {
                    id: view.channel.id,
                    state: view.state().as_str(),
                    name: view.channel.name,
                })
                .collect(),
        }
    }
}

/// What to set for the fleet. Absent fields stay unchanged. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"policy": {"expect": {"every_seconds": 3600}}}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct FleetUpdate {
    #[schema(value_type = PolicyBody, required = false)]
    policy: Option<Value>,
    #[schema(value_type = Paused, required = false)]
    paused: Option<Value>,
}

async fn read_fleet(state: &SharedState) -> Result<FleetData, ApiError> {
    let channels = manage::channels(&*state.store, &state.secrets).await?;
    Ok(FleetData::of(state.store.fleet().await?, channels, state.clock.now()))
}

/// The fleet
#[utoipa::path(
    get,
    path = "/api/fleet",
    tag = "Fleet",
    security(("key" = ["read"])),
    responses(
        (status = 200, description = "The fleet.", body = Success<FleetData>),
        WithQuery,
        AnyTime,
    ),
)]
async fn get_fleet(
    State(state): State<SharedState>,
    _: NoQuery,
) -> Result<Success<FleetData>, ApiError> {
    Ok(Success::new("Fleet retrieved successfully", read_fleet(&state).await?))
}

/// Change what is set for the fleet
///
/// The fields of a policy are changed one by one, and so are the members of `severity` and `group`; with null, a field or
/// a member is as it is built in.
#[utoipa::path(
    patch,
    path = "/api/fleet",
    tag = "Fleet",
    security(("key" = ["operate"])),
    request_body = FleetUpdate,
    responses(
        (status = 200, description = "The fleet as it is now.", body = Success<FleetData>),
        WithBody,
        AnyTime,
    ),
)]
async fn update_fleet(
    State(state): State<SharedState>,
    _: NoQuery,
    By(actor): By,
    request: Request,
) -> Result<Success<FleetData>, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    let change = fleet_change(Fields::of(&body)?, actor.at)?;
    state.store.update_fleet(&change, &actor).await?;
    Ok(Success::new("Fleet updated successfully", read_fleet(&state).await?))
}
