//! `GET /api/audit`: who changed what, for admins. The store adds each line in the transaction of the change itself.
//! Nothing may change or remove a line.

use axum::extract::State;
use pisync_core::Timestamp;
use serde::Serialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, WithQuery},
            extract::Query,
            page::{DEFAULT_LIMIT, Pagination},
            routes::Routes,
        },
    },
    middleware::route_policy::RoutePolicy,
    store::{AuditEntry, Count},
};

/// The most lines that are counted for `total`, because the log only grows. Counting them takes some milliseconds.
const MOST_COUNTED: u32 = 10_000;

/// The largest id of a line that JSON holds exactly.
const MAX_LINE: u64 = (1 << 53) - 1;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_audit), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct AuditParameters {
    /// The most lines to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// Continue after this line: the `next_cursor` of the previous page.
    #[param(pattern = "^[1-9][0-9]*$", example = "4711")]
    cursor: Option<String>,
    /// Only lines before this one: the `next_before` of the previous page. The same as `cursor`.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64)]
    before: Option<u64>,
}

/// One page of the log.
#[derive(Serialize, ToSchema)]
struct AuditPage {
    /// Newest first.
    entries: Vec<AuditData>,
    /// The same as `next_cursor`, as a number.
    #[schema(example = 4711)]
    next_before: Option<i64>,
    pagination: Pagination,
}

/// A change, and who made it.
#[derive(Serialize, ToSchema)]
struct AuditData {
    #[schema(example = 4712)]
    id: i64,
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    at: Timestamp,
    /// How the author was authenticated: `key`, `local` (without a key, from the server's own machine), `open` (keys
    /// are not required) or `command line`.
    #[schema(example = "key")]
    via: String,
    /// The id of the author's key.
    #[schema(example = 3)]
    key_id: Option<i64>,
    /// The author's IP address.
    #[schema(example = "192.0.2.17")]
    address: Option<String>,
    /// `key.create`, `key.revoke`, `device.create`, `device.update`, `device.delete`, `roster.put`, `group.update`,
    /// `group.delete`, `fleet.update`, `window.create`, `window.update`, `window.delete`, `incident.acknowledge`,
    /// `incident.withdraw`.
    #[schema(example = "device.delete")]
    action: String,
    /// What was changed: the id of a key, of a device or of an incident.
    #[schema(example = "pi-device-001")]
    subject: String,
    /// The details of the change.
    #[schema(value_type = Object)]
    details: Value,
}

impl From<AuditEntry> for AuditData {
    fn from(entry: AuditEntry) -> Self {
        Self {
            id: entry.id,
            at: entry.at,
            via: entry.via,
            key_id: entry.key_id,
            address: entry.address,
            action: entry.action,
            subject: entry.subject,
            details: entry.details,
        }
    }
}

/// Who changed what
///
/// Changes of keys and devices: created, updated, revoked, deleted. Acknowledgements of incidents. Reports of devices are not
/// included.
#[utoipa::path(
    get,
    path = "/api/audit",
    tag = "Access",
    security(("key" = ["admin"])),
    params(AuditParameters),
    responses(
        (status = 200, description = "One page of the log.", body = Success<AuditPage>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_audit(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<AuditPage>, ApiError> {
    let limit = query.limit().unwrap_or(DEFAULT_LIMIT);
    let before = query.integer("before", 1..=MAX_LINE).map(u64::cast_signed);
    let cursor = query.id_cursor();
    query.finish()?;
    // One more line than asked for shows whether there is another page.
    let before = before.into_iter().chain(cursor).min();
    let mut entries = state.store.audit(before, limit + 1).await?;
    let has_more = entries.len() > limit as usize;
    entries.truncate(limit as usize);
    let next_before = entries.last().map(|entry| entry.id).filter(|_| has_more);
    let counted = state.store.audit_length(MOST_COUNTED + 1).await?;
    let pagination = Pagination::by_offset(Some(limit), 0, Count::up_to(MOST_COUNTED, counted))
        .with_next(next_before.map(|id| id.to_string()));
    let entries = entries.into_iter().map(AuditData::from).collect();
    let data = AuditPage { entries, next_before, pagination };
    Ok(Success::new("Audit log retrieved successfully", data))
}
