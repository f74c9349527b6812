//! The outline of the OpenAPI document, and Swagger UI at `/api-docs`. `api` merges the documentation of the resources
//! into the outline. All files are inside the program, so nothing here may need the internet.

use std::{collections::BTreeMap, io, sync::Arc};

use axum::{
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use utoipa::{
    OpenApi,
    openapi::{
        Header, ObjectBuilder, OpenApi as Document, Ref, RefOr, Type,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use utoipa_swagger_ui::{Config, SwaggerFile};

use crate::{
    api::{
        SharedState,
        wire::{
            error::ApiError,
            routes::{Routes, SECURITY_SCHEME, operations, operations_mut},
        },
    },
    middleware::{
        assets::Assets,
        route_policy::{Access, Policies, RateClass, RoutePolicy},
    },
};

/// For Swagger UI: the server's own scripts and styles, and the pictures in its style sheet. The one inline style of
/// its bundle is allowed by its hash. If a new bundle has another style, the browser's error names the new hash.
static CONTENT_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; \
     style-src 'self' 'sha256-RL3ie0nH+Lzz2YNqQN83mnU0J1ot4QL7b99vMdIX99w='; \
     img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'",
);

/// Everybody can read the documentation. It reveals nothing about the fleet.
const POLICY: RoutePolicy = RoutePolicy {
    access: Access::Anyone,
    content_policy: &CONTENT_POLICY,
    ..RoutePolicy::UNCOUNTED
};

/// The path of the document.
const DOCUMENT: &str = "/api-docs/openapi.json";

/// The document's name among the files.
const DOCUMENT_FILE: &str = "openapi.json";

/// The page that loads the other files.
const PAGE: &str = "index.html";

/// The files that the page loads. Swagger UI's other files are for other pages.
const FILES: [&str; 7] = [
    "favicon-16x16.png",
    "favicon-32x32.png",
    "index.css",
    "swagger-initializer.js",
    "swagger-ui-bundle.js",
    "swagger-ui-standalone-preset.js",
    "swagger-ui.css",
];

#[derive(OpenApi)]
#[openapi(
    info(
        title = "PiSync",
        description = "Did every device sync, which ones fail, which ones went silent?\n\n\
            Devices report each file-sync run with `POST /api/sync-event`; the other endpoints tell \
            what became of the fleet. Every answer is JSON. Successful ones are wrapped in \
            `{\"success\": true, \"message\": …, \"data\": …}`, errors in \
            `{\"success\": false, \"error\": …, \"code\": …}`, with `details` for each wrong field. Programs go by \
            `code`; the words beside it may change. Times are \
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
    // utoipa fills in the authors and the contact of the workspace, which do not belong here.
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

/// The summary of each endpoint, by method and path.
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

/// The headers of responses: the component's name in the document, the header's name, its type and its description.
const HEADERS: [(&str, &str, Type, &str); 7] = [
    (
        "RequestId",
        "X-Request-Id",
        Type::String,
        "Names the request in the server's log; the client's own, when it sent one.",
    ),
    (
        "RateLimitLimit",
        "RateLimit-Limit",
        Type::Integer,
        "Requests a minute from this address, or with this key. Absent where there is no limit.",
    ),
    ("RateLimitRemaining", "RateLimit-Remaining", Type::Integer, "How many of them are left."),
    ("RateLimitReset", "RateLimit-Reset", Type::Integer, "Seconds until all of them are."),
    (
        "RateLimitPolicy",
        "RateLimit-Policy",
        Type::String,
        "The limit and its window, such as `50;w=60`.",
    ),
    ("RetryAfter", "Retry-After", Type::Integer, "Seconds after which to try again."),
    (
        "WwwAuthenticate",
        "WWW-Authenticate",
        Type::String,
        "How to send a key, and what is wrong with the one that was sent (RFC 6750).",
    ),
];

/// The headers that responses have, besides those that every page may read.
pub(crate) fn header_names() -> impl Iterator<Item = HeaderName> {
    HEADERS.into_iter().filter_map(|(_, name, ..)| name.parse().ok())
}

/// Declares in the document which headers each response has.
pub(crate) fn declare_headers(document: &mut Document, policies: &Policies) {
    let components = document.components.get_or_insert_default();
    for (component, _, of_type, description) in HEADERS {
        let mut header = Header::new(ObjectBuilder::new().schema_type(of_type));
        header.description = Some(description.to_owned());
        components.headers.insert(component.to_owned(), header.into());
    }
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations_mut(item) {
            let is_counted = policies.of(path, &method).rate != RateClass::Uncounted;
            for (status, response) in &mut operation.responses.responses {
                let RefOr::T(response) = response else { continue };
                for (component, name, ..) in HEADERS {
                    let is_carried = match component {
                        "RequestId" => true,
                        "RetryAfter" => matches!(status.as_str(), "429" | "503"),
                        "WwwAuthenticate" => matches!(status.as_str(), "401" | "403"),
                        // Refused requests are counted everywhere.
                        _ => is_counted || matches!(status.as_str(), "401" | "403" | "429"),
                    };
                    if is_carried {
                        let header = Ref::new(format!("#/components/headers/{component}"));
                        response.headers.insert(name.to_owned(), RefOr::Ref(header));
                    }
                }
            }
        }
    }
}

/// The routes of Swagger UI and of the document that it shows.
///
/// # Errors
/// When a file of Swagger UI is missing, or the document cannot be serialized. Both are bugs.
pub(crate) fn routes(document: &Document) -> Result<Routes, io::Error> {
    let assets = Arc::new(files(document)?);
    let file = |name: Option<&'static str>| {
        let assets = Arc::clone(&assets);
        get(
            move |path: Result<Path<String>, PathRejection>,
                  headers: HeaderMap,
                  State(_): State<SharedState>| {
                let name =
                    name.map_or_else(|| path.map(|path| path.0).unwrap_or_default(), str::to_owned);
                let answer = assets.respond(&name, &headers);
                std::future::ready(
                    answer.unwrap_or_else(|| ApiError::NotFound("Route").into_response()),
                )
            },
        )
    };
    Ok(Routes::default()
        .and_undocumented("/api-docs", get(to_page), POLICY)
        .and_undocumented("/api-docs/", file(Some(PAGE)), POLICY)
        .and_undocumented(DOCUMENT, file(Some(DOCUMENT_FILE)), POLICY)
        .and_undocumented("/api-docs/{*rest}", file(None), POLICY))
}

/// The links of the page are relative to a folder.
async fn to_page() -> Response {
    Redirect::to("/api-docs/").into_response()
}

/// The page, the files that it loads, and the document.
fn files(document: &Document) -> Result<Assets, io::Error> {
    let config = Arc::new(Config::from(DOCUMENT));
    let find = |name: &str| -> Result<SwaggerFile<'static>, io::Error> {
        let file = utoipa_swagger_ui::serve(name, Arc::clone(&config));
        let file = file.map_err(|error| io::Error::other(error.to_string()))?;
        file.ok_or_else(|| io::Error::other(format!("Swagger UI has no {name}")))
    };
    let mut assets = Assets::default();
    for name in FILES {
        let SwaggerFile { bytes, content_type, gzpipped: is_gzipped, .. } = find(name)?;
        let bytes = bytes.into_owned().into();
        if is_gzipped {
            assets.add_gzipped(name, &content_type, bytes)?;
        } else {
            assets.add(name, &content_type, bytes)?;
        }
    }
    let json = serde_json::to_vec(document)?;
    assets.add(DOCUMENT_FILE, "application/json", json.into())?;
    let page = find(PAGE)?;
    let mut html = plain(&page)?;
    for (name, hashed) in assets.names() {
        for prefix in ["\"./", "\""] {
            html = html.replace(&format!("{prefix}{name}\""), &format!("\"./{hashed}\""));
        }
    }
    assets.add(PAGE, &page.content_type, html.into())?;
    Ok(assets)
}

/// The text of a file.
fn plain(file: &SwaggerFile<'_>) -> Result<String, io::Error> {
    if file.gzpipped {
        io::read_to_string(flate2::read::GzDecoder::new(&*file.bytes))
    } else {
        String::from_utf8(file.bytes.to_vec()).map_err(io::Error::other)
    }
}
