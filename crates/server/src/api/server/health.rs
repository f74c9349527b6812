//! The server's health, for people, load balancers and orchestrators. The routes are not rate limited and need no key,
//! because a load balancer has none. The responses have no envelope, because the Node service's `/health` had none.

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use pisync_core::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            error::{ApiError, RETRY_WHEN_AWAY},
            routes::Routes,
        },
    },
    middleware::route_policy::RoutePolicy,
};

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_health), RoutePolicy::UNCOUNTED)
        .and(routes!(get_liveness), RoutePolicy::UNCOUNTED)
        .and(routes!(get_readiness), RoutePolicy::UNCOUNTED)
}

/// The methods that the server knows at all, for `OPTIONS *`.
const METHODS: HeaderValue = HeaderValue::from_static("DELETE,GET,HEAD,OPTIONS,PATCH,POST");

/// Responds to a method that a known route does not have. `OPTIONS` asks which methods it has; HAProxy sends it to
/// check whether a server is there. The router adds the methods as `Allow`.
pub(crate) async fn other_method(method: Method) -> Response {
    if method == Method::OPTIONS {
        return StatusCode::NO_CONTENT.into_response();
    }
    ApiError::MethodNotAllowed.into_response()
}

/// Responds to an unknown route. `OPTIONS *` asks about the entire server (RFC 9110, 9.3.7).
pub(crate) async fn unknown_route(method: Method, uri: Uri) -> Response {
    if method == Method::OPTIONS && uri.path() == "*" {
        return (StatusCode::NO_CONTENT, [(header::ALLOW, METHODS)]).into_response();
    }
    ApiError::NotFound("Route").into_response()
}

/// The server's health.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"status": "OK", "port": 3000, "timestamp": "2026-11-22T14:58:20.597Z"}))]
struct Health {
    /// `OK`, or `UNAVAILABLE` while the database is away or the clock is not set.
    status: &'static str,
    /// The port that the server listens on.
    port: u16,
    #[schema(value_type = String, format = DateTime)]
    timestamp: Timestamp,
}

impl Health {
    fn ok(state: &SharedState) -> Json<Self> {
        Json(Self { status: "OK", port: state.port, timestamp: state.clock.now() })
    }
}

/// Is the server there?
#[utoipa::path(
    get,
    path = "/health",
    tag = "Health",
    security(()),
    responses((status = 200, description = "It is.", body = Health)),
)]
async fn get_health(State(state): State<SharedState>) -> impl IntoResponse {
    Health::ok(&state)
}

/// Is the process alive?
///
/// Does not query the database, because restarting the server would not repair it.
#[utoipa::path(
    get,
    path = "/health/live",
    tag = "Health",
    security(()),
    responses((status = 200, description = "It is.", body = Health)),
)]
async fn get_liveness(State(state): State<SharedState>) -> impl IntoResponse {
    Health::ok(&state)
}

/// Can it serve requests?
///
/// Queries the database.
#[utoipa::path(
    get,
    path = "/health/ready",
    tag = "Health",
    security(()),
    responses(
        (status = 200, description = "It can.", body = Health),
        (status = 503, description = "The database is away, the server's clock is not set, or the server is shutting down.", body = Health),
    ),
)]
async fn get_readiness(State(state): State<SharedState>) -> Response {
    let can_store = state.ingest.is_available() && state.clock.set_time().is_ok();
    if can_store && state.store.ping().await.is_ok() {
        return Health::ok(&state).into_response();
    }
    let health = Health { status: "UNAVAILABLE", port: state.port, timestamp: state.clock.now() };
    let retry_after = [(header::RETRY_AFTER, HeaderValue::from(RETRY_WHEN_AWAY))];
    (StatusCode::SERVICE_UNAVAILABLE, retry_after, Json(health)).into_response()
}
