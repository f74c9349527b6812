//! `GET /` and `GET /api`: what this server is, and its endpoints. The response must reveal nothing about the fleet.

use std::collections::BTreeMap;

use axum::{Json, extract::State, response::IntoResponse};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{error::AnyTime, routes::Routes},
    },
    middleware::route_policy::RoutePolicy,
};

/// The response reveals nothing about the fleet, so a link on a foreign page may open it.
const ROOT: RoutePolicy = RoutePolicy { opens_from_links: true, ..RoutePolicy::API };

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_root), ROOT).and(routes!(get_api), RoutePolicy::API)
}

/// What this server is.
#[derive(Serialize, ToSchema)]
struct Welcome {
    success: bool,
    message: &'static str,
    version: &'static str,
    /// The path of the documentation.
    documentation: &'static str,
    /// The summary of each endpoint, by method and path.
    endpoints: BTreeMap<String, String>,
}

fn welcome(state: &SharedState) -> Json<Welcome> {
    Json(Welcome {
        success: true,
        message: "Welcome to PiSync Backend API",
        version: env!("CARGO_PKG_VERSION"),
        documentation: "/api-docs",
        endpoints: state.endpoints.clone(),
    })
}

/// Welcome
#[utoipa::path(
    get,
    path = "/",
    tag = "About",
    security(("key" = ["read"])),
    responses((status = 200, description = "What this is.", body = Welcome), AnyTime),
)]
async fn get_root(State(state): State<SharedState>) -> impl IntoResponse {
    welcome(&state)
}

/// Welcome
#[utoipa::path(
    get,
    path = "/api",
    tag = "About",
    security(("key" = ["read"])),
    responses((status = 200, description = "What this is.", body = Welcome), AnyTime),
)]
async fn get_api(State(state): State<SharedState>) -> impl IntoResponse {
    welcome(&state)
}
