//! `PUT /api/devices`: the roster, which says what devices there are. It never removes one. All of it is stored, or nothing.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, header},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        devices::{
            change::Tags,
            roster_rows::{RosterFormat, read_roster},
        },
        wire::{
            charset::Charset,
            decompress::{Compression, decompress},
            envelope::Success,
            error::{AnyTime, ApiError, WithBody},
            extract::{Arriving, Query},
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    store::{RosterOutcome, Scope},
};

/// The largest body, in decompressed bytes.
const BODY_LIMIT: usize = 10 << 20;

/// A large body may take this many times as long as a small one, as a batch of events may.
const TIMES_AS_LONG: u32 = 20;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(put_devices), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct RosterParameters {
    /// Tell what would change, and change nothing.
    #[param(default = false)]
    dry_run: Option<bool>,
}

/// A device of the roster. Absent fields stay unchanged, and null clears a field. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"device_id": "pi-device-001", "name": "Library", "group": "school-17", "tags": ["indoor"]}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct RosterDevice {
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    device_id: String,
    /// A name for people.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: Option<String>,
    /// The group of the device.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    group: Option<String>,
    /// Up to 20 tags of 1 to 50 characters.
    #[schema(value_type = Tags, required = false)]
    tags: Option<Vec<String>>,
    /// A note for people.
    #[schema(min_length = 1, max_length = 1000, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    note: Option<String>,
}

/// What has changed, or with `dry_run` would change: numbers of devices.
#[derive(Serialize, ToSchema)]
struct RosterData {
    /// Those that were unknown.
    #[schema(example = 12)]
    created: u64,
    /// Those about which something else is said now.
    #[schema(example = 3)]
    updated: u64,
    /// Those about which the same was said before.
    #[schema(example = 985)]
    unchanged: u64,
    /// Known devices that are not on this list. Nothing happens to them.
    #[schema(example = 40)]
    not_listed: u64,
}

impl From<RosterOutcome> for RosterData {
    fn from(outcome: RosterOutcome) -> Self {
        let RosterOutcome { created, updated, unchanged, not_listed } = outcome;
        Self { created, updated, unchanged, not_listed }
    }
}

/// Set the roster
///
/// The devices that there are, at most 10,000 in 10 MiB: as a JSON array, as one object per line
/// (`application/x-ndjson`), or as `text/csv`. Unknown devices become known, and all of them are expected to report from
/// now on. None is removed. If any row is wrong, nothing is stored; `details` names up to 100 wrong fields, such as
/// `[17].group`, where rows are counted from 0.
///
/// CSV begins with a line of names: `device_id`, and any of `name`, `group`, `tags` and `note`. Tags are separated by
/// semicolons. An empty cell leaves the field as it is. `details` also names the line, as editors count them.
#[utoipa::path(
    put,
    path = "/api/devices",
    tag = "Devices",
    security(("key" = ["operate"])),
    params(RosterParameters),
    request_body(
        description = "The devices. `Content-Encoding` gzip, deflate and zstd are understood.",
        content(
            (Vec<RosterDevice> = "application/json"),
            (String = "application/x-ndjson", example =
                "{\"device_id\":\"pi-device-001\",\"group\":\"school-17\"}\n{\"device_id\":\"pi-device-002\"}\n"),
            (String = "text/csv", example =
                "device_id,name,group,tags,note\npi-device-001,Library,school-17,indoor;wall,\n"),
        ),
    ),
    responses(
        (status = 200, description = "What has changed.", body = Success<RosterData>),
        WithBody,
        AnyTime,
    ),
)]
async fn put_devices(
    State(state): State<SharedState>,
    Query(mut query): Query,
    By(actor): By,
    request: Request,
) -> Result<Success<RosterData>, ApiError> {
    let is_dry_run = query.boolean("dry_run");
    query.finish()?;
    let key = auth::key_of(&request);
    let format = format(request.headers())?;
    if Charset::of(request.headers())? != Charset::Utf8 {
        return Err(ApiError::UnsupportedMediaType("send UTF-8"));
    }
    let compression = Compression::of(request.headers())?;
    let mut permit = state.ingest.permit();
    let most = match compression {
        None => BODY_LIMIT,
        Some(_) => Compression::compressed_limit(BODY_LIMIT),
    };
    let body = Arriving::in_pieces(request.into_body(), state.body_timeout, TIMES_AS_LONG);
    let mut body = body.collect(most, &mut permit).await.map_err(|error| match error {
        ApiError::BodyTooLarge(_) => ApiError::BodyTooLarge(BODY_LIMIT),
        other => other,
    })?;
    permit.has_arrived();
    if let Some(compression) = compression {
        let _turn = state.decoders.acquire().await.map_err(|_| ApiError::Overloaded)?;
        body = decompress(compression, body, BODY_LIMIT, &mut permit)?;
    }
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    // Reading 10 MiB takes a tenth of a second, for which no other request should wait.
    let read = tokio::task::spawn_blocking(move || read_roster(&body, format)).await;
    let rows = read.map_err(|error| ApiError::Internal(error.to_string()))??;
    let outcome = state.store.put_roster(&rows, is_dry_run, &actor).await?;
    if is_dry_run {
        return Ok(Success::new("Nothing was changed", outcome.into()));
    }
    Ok(Success::new("Roster stored successfully", outcome.into()))
}

/// The format of the body, from its Content-Type.
fn format(headers: &HeaderMap) -> Result<RosterFormat, ApiError> {
    let media_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .map(|media_type| media_type.trim().to_ascii_lowercase());
    match media_type.as_deref() {
        Some("application/json") => Ok(RosterFormat::Array),
        Some("application/x-ndjson" | "application/ndjson" | "application/jsonl") => {
            Ok(RosterFormat::Lines)
        }
        Some("text/csv") => Ok(RosterFormat::Csv),
        _ => Err(ApiError::UnsupportedMediaType(
            "send a JSON array with Content-Type: application/json, one device per line with application/x-ndjson, or text/csv",
        )),
    }
}
