//! `GET|POST /api/keys` and `DELETE /api/key/{key_id}`: the keys of this API, for admins. A response must never contain
//! a key, except the one that creates it.

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::Response,
};
use pisync_core::{DeviceId, GroupName, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, WithBody, WithQuery},
            extract::{JsonBody, NoQuery, Query, id_in_path},
            fields::{Fields, text},
            page::{DEFAULT_LIMIT, Pagination},
            routes::Routes,
        },
    },
    keys::{self, CreateError, KeyRequest, MAX_NAME, Problem},
    maintenance::present,
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    store::{ApiKey, Count, Revocation, Scope},
};

const BODY_LIMIT: usize = 64 << 10;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_keys, create_key), RoutePolicy::API)
        .and(routes!(revoke_key), RoutePolicy::API)
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct KeyParameters {
    /// The most keys to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// The number of keys to skip.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
    /// Continue after this key: the `next_cursor` of the previous page. `offset` then counts from there.
    #[param(pattern = "^[1-9][0-9]*$", example = "50")]
    cursor: Option<String>,
}

/// What a key grants: `ingest` reporting, `read` everything except keys and the audit log, `operate` that and what an
/// operator changes (devices, the roster, groups, policies, windows, incidents) but no deletion, `admin` everything.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ScopeName {
    Ingest,
    Read,
    Operate,
    Admin,
}

/// One page of keys.
#[derive(Serialize, ToSchema)]
struct KeyList {
    /// Oldest first, including revoked and expired keys.
    keys: Vec<KeyData>,
    pagination: KeyPagination,
}

#[derive(Serialize, ToSchema)]
struct KeyPagination {
    #[serde(flatten)]
    page: Pagination,
    /// The same as `total`.
    #[schema(example = 3)]
    total_keys: u64,
}

/// A key's properties. The key itself is not stored.
#[derive(Serialize, ToSchema)]
struct KeyData {
    #[schema(example = 3)]
    id: i64,
    /// The first characters of the key.
    #[schema(example = "psk_4fTq")]
    hint: String,
    #[schema(example = "school 17")]
    name: Option<String>,
    #[schema(value_type = ScopeName, example = "ingest")]
    scope: &'static str,
    /// The only device that the key may report for.
    #[schema(example = "pi-device-001")]
    device_id: Option<String>,
    /// The only group whose devices the key may report for.
    group: Option<String>,
    #[schema(value_type = String, format = DateTime, example = "2025-06-01T00:00:05.120Z")]
    created_at: Timestamp,
    /// From this time on the key is not valid.
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    revoked_at: Option<Timestamp>,
    /// The hour in which the key was last used.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:00:00.000Z")]
    last_used: Option<Timestamp>,
}

impl From<ApiKey> for KeyData {
    fn from(key: ApiKey) -> Self {
        Self {
            id: key.id,
            hint: key.hint,
            name: key.name,
            scope: key.scope.as_str(),
            device_id: key.device_id,
            group: key.group,
            created_at: key.created_at,
            expires_at: key.expires_at,
            revoked_at: key.revoked_at,
            last_used: key.last_used,
        }
    }
}

/// The properties of a new key. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(as = NewKey, example = json!({"scope": "ingest", "name": "school 17", "group": "school-17"}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct NewKeyBody {
    scope: ScopeName,
    /// A name for people.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: Option<String>,
    /// The only device that the key may report for. Only with the scope `ingest`.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    device_id: Option<String>,
    /// The only group whose devices the key may report for. Only with the scope `ingest`, and not together with
    /// `device_id`. A new device that reports with the key is added to the group.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    group: Option<String>,
    /// From this time on the key is not valid. It must be in the future.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
}

/// A new key.
#[derive(Serialize, ToSchema)]
struct CreatedKey {
    #[schema(example = 3)]
    id: i64,
    /// The key itself. It is shown only this once.
    #[schema(example = "psk_4fTqMnbq0F1OQYc3ZVQ2Ckq0Zc4Hsm5QKqDdT7nW8xX1aBcDe")]
    key: String,
}

/// A revoked key.
#[derive(Serialize, ToSchema)]
struct RevokedKey {
    #[schema(example = 3)]
    id: i64,
}

/// The path in the OpenAPI document; [`KeyPath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
struct KeyPathParameter {
    /// The key's id.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 3)]
    key_id: i64,
}

/// The key id in the path.
struct KeyPath(i64);

impl<S: Send + Sync> FromRequestParts<S> for KeyPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id_in_path(parts, state, "key_id").await.map(Self)
    }
}

/// List keys
///
/// Their properties only: the keys themselves are not stored.
#[utoipa::path(
    get,
    path = "/api/keys",
    tag = "Access",
    security(("key" = ["admin"])),
    params(KeyParameters),
    responses(
        (status = 200, description = "One page of keys.", body = Success<KeyList>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_keys(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<KeyList>, ApiError> {
    let limit = query.limit().unwrap_or(DEFAULT_LIMIT);
    let offset = query.offset();
    let after = query.id_cursor().unwrap_or(0);
    query.finish()?;
    // The table is small and requests are rare, so a page is cut from the entire list.
    let keys = state.store.keys().await?.keys;
    let total_keys = keys.len() as u64;
    let mut rest = keys
        .into_iter()
        .filter(|key| key.id > after)
        .skip(usize::try_from(offset).unwrap_or(usize::MAX));
    let keys: Vec<_> = rest.by_ref().take(limit as usize).map(KeyData::from).collect();
    let next = keys.last().map(|key| key.id.to_string()).filter(|_| rest.next().is_some());
    let page =
        Pagination::by_offset(Some(limit), offset, Count::Exactly(total_keys)).with_next(next);
    let data = KeyList { keys, pagination: KeyPagination { page, total_keys } };
    Ok(Success::new("Keys retrieved successfully", data))
}

/// Make a key
///
/// The response shows the key only this once. The key is valid on this server at once, and on other servers within a
/// second.
#[utoipa::path(
    post,
    path = "/api/keys",
    tag = "Access",
    security(("key" = ["admin"])),
    request_body = NewKeyBody,
    responses(
        (status = 201, description = "Made.", body = Success<CreatedKey>),
        WithBody,
        AnyTime,
    ),
)]
async fn create_key(
    State(state): State<SharedState>,
    _: NoQuery,
    By(actor): By,
    request: Request,
) -> Result<Response, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Admin)?;
    // A clock that is behind could otherwise create a key that has already expired.
    let present = present(&*state.store, &state.clock).await?;
    let key_request = read_key_request(&body, actor.at.max(present))?;
    let created = keys::create(&*state.store, &state.randomness, key_request, &actor).await;
    let (id, secret) = created.map_err(|error| match error {
        CreateError::Randomness(detail) => ApiError::Internal(detail),
        CreateError::Store(error) => error.into(),
    })?;
    tracing::info!(id, hint = secret.hint(), "key made");
    state.gate.refresh(&*state.store).await?;
    let data = CreatedKey { id, key: secret.as_str().to_owned() };
    let mut response =
        Success::new("Key created successfully", data).with_status(StatusCode::CREATED);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Revoke a key
///
/// The key is no longer valid: on this server at once, on other servers within a second. It stays in the list.
#[utoipa::path(
    delete,
    path = "/api/key/{key_id}",
    tag = "Access",
    security(("key" = ["admin"])),
    params(KeyPathParameter),
    responses(
        (status = 200, description = "Revoked, now or before.", body = Success<RevokedKey>),
        (status = 400, description = "Not a possible number, or a query parameter.", body = ErrorBody),
        (status = 404, description = "No such key.", body = ErrorBody),
        AnyTime,
    ),
)]
async fn revoke_key(
    State(state): State<SharedState>,
    _: NoQuery,
    KeyPath(id): KeyPath,
    By(actor): By,
) -> Result<Success<RevokedKey>, ApiError> {
    match state.store.revoke_key(id, &actor).await? {
        Revocation::Unknown => return Err(ApiError::NotFound("Key")),
        Revocation::Already => {}
        Revocation::Revoked => {
            tracing::info!(id, "key revoked");
            state.gate.refresh(&*state.store).await?;
        }
    }
    Ok(Success::new("Key revoked successfully", RevokedKey { id }))
}

fn read_key_request(body: &[u8], now: Timestamp) -> Result<KeyRequest, ApiError> {
    let mut fields = Fields::of(body)?;
    let scope = fields.required("scope", str::parse::<Scope>);
    let key_request = KeyRequest {
        // A missing or invalid scope is reported by itself. It must not cause further violations.
        scope: scope.unwrap_or(Scope::Ingest),
        name: fields.optional("name", text(MAX_NAME)),
        device_id: fields.optional("device_id", DeviceId::new),
        group: fields.optional("group", GroupName::new),
        expires_at: fields.optional("expires_at", Timestamp::from_iso8601),
    };
    for Problem { field, code, rule } in key_request.problems(now) {
        fields.refuse(field, code, rule, None);
    }
    fields.finish()?;
    Ok(key_request)
}
