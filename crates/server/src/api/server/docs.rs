//! The OpenAPI document's frame and Swagger UI at `/api-docs`, from files inside the program: it works
//! without the internet.

use std::collections::BTreeMap;

use axum::{
    Router,
    body::Bytes,
    http::header,
    middleware::map_response,
    response::{IntoResponse, Response},
    routing::get,
};
use utoipa::{
    OpenApi,
    openapi::{
        OpenApi as Document, PathItem,
        path::Operation,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::{api::wire::error::ApiError, middleware::auth::SECURITY_SCHEME};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "PiSync",
        description = "Did every device sync, which ones fail, which ones went silent?\n\n\
            Devices report each file-sync run with `POST /api/sync-event`; the other endpoints tell \
            what became of the fleet. Every answer is JSON. Successful ones are wrapped in \
            `{\"success\": true, \"message\": …, \"data\": …}`, errors in \
            `{\"success\": false, \"error\": …}`, with `details` for each wrong field. Times are \
            RFC 3339 in UTC with milliseconds. Every answer carries `X-Request-Id`, which is found \
            again in the server's log; requests that are counted carry `RateLimit-*`. A key is sent as \
            `Authorization: Bearer psk_\u{2026}`.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    tags(
        (name = "Sync events", description = "What devices send."),
        (name = "Devices", description = "What is known of each device."),
        (name = "Fleet", description = "What is known of all of them."),
        (name = "Access", description = "Who may do what, and who did what."),
        (name = "Health", description = "How the server itself is."),
        (name = "About", description = "What this is."),
    ),
)]
struct Outline;

/// The document without its endpoints.
pub(crate) fn outline() -> Document {
    let mut document = Outline::openapi();
    // The workspace's authors and contact are nobody's business here.
    document.info.contact = None;
    let key = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .bearer_format("psk_\u{2026}")
        .description(Some(
            "A key of the scope that the operation names: `ingest`, `read`, or `admin`, which opens \
             everything. Make one with `pisync key create`. On a laptop none is needed: a server that \
             listens on this machine alone serves its own users without.",
        ))
        .build();
    document
        .components
        .get_or_insert_default()
        .add_security_scheme(SECURITY_SCHEME, SecurityScheme::Http(key));
    document
}

/// Every endpoint by method and path, with its summary.
pub(crate) fn endpoints(document: &Document) -> BTreeMap<String, String> {
    let mut endpoints = BTreeMap::new();
    for (path, item) in &document.paths.paths {
        for (method, operation) in operations(item) {
            let summary = operation.summary.clone().unwrap_or_default();
            endpoints.insert(format!("{method} {path}"), summary);
        }
    }
    endpoints
}

pub(crate) fn operations(item: &PathItem) -> impl Iterator<Item = (&'static str, &Operation)> {
    [
        ("GET", &item.get),
        ("POST", &item.post),
        ("PUT", &item.put),
        ("PATCH", &item.patch),
        ("DELETE", &item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_ref()?)))
}

/// Where the document is.
const DOCUMENT: &str = "/api-docs/openapi.json";

/// Swagger UI and the document it shows.
///
/// # Errors
/// When the document cannot be written, which no input can cause.
pub(crate) fn router(document: &Document) -> Result<Router, serde_json::Error> {
    // Written once, and shared by all answers: whoever asks for it needs no key, and may ask often.
    let text = Bytes::from(serde_json::to_vec(document)?);
    let json = [(header::CONTENT_TYPE, "application/json")];
    let pages: Router = SwaggerUi::new("/api-docs").config(Config::from(DOCUMENT)).into();
    let document = get(move || std::future::ready((json, text.clone())));
    Ok(pages.route(DOCUMENT, document).layer(map_response(json_when_missing)))
}

/// A file that Swagger UI does not have is answered like every unknown route.
async fn json_when_missing(response: Response) -> Response {
    if response.status().is_success() || response.status().is_redirection() {
        response
    } else {
        ApiError::NotFound("Route").into_response()
    }
}
