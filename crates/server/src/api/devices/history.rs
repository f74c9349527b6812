//! `GET /api/device/{device_id}/sync-history`: the events of one device, in pages or as a stream. A page is read here;
//! `history_stream` sends the stream.

use axum::{
    extract::State,
    http::{HeaderMap, Version, header},
    response::{IntoResponse, Response},
};
use pisync_core::Timestamp;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        devices::history_stream::{self, StreamRequest},
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, OfDevice, WithQuery},
            extract::{DevicePath, DevicePathParameter, Query},
            figures::DeviceFigures,
            page::{DEFAULT_LIMIT, Pagination},
            query::cursor_text,
            routes::Routes,
        },
    },
    event_format::HistoryEvent,
    middleware::{auth::WithKey, route_policy::RoutePolicy},
    store::{Count, HistoryQuery, SyncHistory},
};

const CSV_EXAMPLE: &str = "id,device_id,event_id,timestamp,total_files_synced,total_errors,internet_speed,job,duration_seconds,bytes_synced,metadata,created_at,updated_at\r\n412,pi-device-001,run-412,2025-06-17T10:30:00.000Z,150,2,45.6,nightly-backup,73.25,104857600,\"{\"\"tool\"\":\"\"restic\"\"}\",2025-06-17T10:30:02.417Z,2025-06-17T10:30:02.417Z\r\n";

const NDJSON_EXAMPLE: &str = "{\"id\":412,\"device_id\":\"pi-device-001\",\"timestamp\":\"2025-06-17T10:30:00.000Z\",\"total_files_synced\":150,\"total_errors\":2,\"internet_speed\":45.6,\"created_at\":\"2025-06-17T10:30:02.417Z\",\"updated_at\":\"2025-06-17T10:30:02.417Z\"}\n";

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_sync_history), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct HistoryParameters {
    /// The most events to list. When absent, 50 in JSON, and all of them in CSV and NDJSON.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// The number of the newest events to skip.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
    /// Continue after this event: the `next_cursor` of the previous page. Pages that follow cursors neither repeat nor
    /// miss an event, even if events arrive meanwhile. A page far down costs no more than the first one. `offset` then
    /// counts from the cursor.
    #[param(pattern = "^[0-9a-f]{32}$", example = "000637c1a3aa9e00000000000000019c")]
    cursor: Option<String>,
    /// Only events at or after this time (ISO 8601). A bare date is its midnight in UTC.
    #[param(rename = "startDate", format = DateTime)]
    start_date: Option<String>,
    /// Only events at or before this time.
    #[param(rename = "endDate", format = DateTime)]
    end_date: Option<String>,
    /// Only events of this job.
    #[param(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    job: Option<String>,
}

/// A device's figures and one page of its events.
#[derive(Serialize, ToSchema)]
struct HistoryData {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// Over all events of the device, whatever the query asks for.
    stats: DeviceFigures,
    /// Single events that the server received before this time are no longer kept (`RETENTION_DAYS`). They count only
    /// in `stats`. Absent while all events are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-05-01T00:00:00.000Z")]
    raw_since: Option<Timestamp>,
    /// Newest first by `timestamp`, then by `id`.
    sync_history: Vec<HistoryEvent>,
    pagination: HistoryPagination,
}

#[derive(Serialize, ToSchema)]
struct HistoryPagination {
    #[serde(flatten)]
    page: Pagination,
    /// The same as `total`: how many events match the query, regardless of `offset` and `cursor`.
    #[schema(example = 412)]
    total_events: u64,
}

/// A device's sync history
///
/// The device's figures, and its events, newest first. With `Accept: text/csv` or `application/x-ndjson` the response
/// is a stream of the events alone, without an upper limit.
///
/// CSV follows RFC 4180 and has a header line. An absent value is an empty cell, and metadata is JSON text. Cells are
/// not escaped against spreadsheet formulas, so that they can be read back unchanged. Tell a spreadsheet to import them
/// as text.
#[utoipa::path(
    get,
    path = "/api/device/{device_id}/sync-history",
    tag = "Devices",
    security(("key" = ["read"])),
    params(
        DevicePathParameter,
        HistoryParameters,
    ),
    responses(
        (
            status = 200,
            description = "The device's history.",
            content(
                (Success<HistoryData> = "application/json"),
                (String = "text/csv", example = json!(CSV_EXAMPLE)),
                (HistoryEvent = "application/x-ndjson", example = json!(NDJSON_EXAMPLE)),
            ),
        ),
        WithQuery,
        OfDevice,
        AnyTime,
    ),
)]
async fn get_sync_history(
    State(state): State<SharedState>,
    DevicePath(device_id): DevicePath,
    WithKey(key): WithKey,
    version: Version,
    headers: HeaderMap,
    Query(mut query): Query,
) -> Result<Response, ApiError> {
    let limit = query.limit();
    let history_query = HistoryQuery {
        device_id,
        limit: limit.unwrap_or(DEFAULT_LIMIT),
        offset: query.offset(),
        after: query.cursor(),
        from: query.timestamp("startDate"),
        until: query.timestamp("endDate"),
        job: query.job(),
        oldest_first: false,
    };
    query.finish_ignoring_others()?;
    let mut response = match history_stream::wanted(&headers) {
        None => one_page(&state, &history_query).await?.into_response(),
        Some(format) => {
            let request = StreamRequest { key, query: history_query, limit, format, version };
            history_stream::respond(state, request).await?
        }
    };
    // A cache must not give this response to a client that asks for another format.
    response.headers_mut().append(header::VARY, header::ACCEPT.into());
    Ok(response)
}

async fn one_page(
    state: &SharedState,
    query: &HistoryQuery,
) -> Result<Success<HistoryData>, ApiError> {
    let SyncHistory { figures, events, next, total_events, raw_since } =
        state.store.sync_history(query).await?.ok_or(ApiError::NotFound("Device"))?;
    let device_id = query.device_id.as_str();
    let data = HistoryData {
        device_id: device_id.to_owned(),
        stats: figures.into(),
        raw_since,
        sync_history: events.into_iter().map(|event| HistoryEvent::new(device_id, event)).collect(),
        pagination: HistoryPagination {
            page: Pagination::by_offset(
                Some(query.limit),
                query.offset,
                Count::Exactly(total_events),
            )
            .with_next(next.map(cursor_text)),
            total_events,
        },
    };
    Ok(Success::new("Sync history retrieved successfully", data))
}
