//! `GET|POST /api/keys` and `DELETE /api/key/{key_id}`: the keys that open this API, for admins.

use axum::{
    extract::{FromRequestParts, Path, Request, State},
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::Response,
};
use pisync_core::{DeviceId, Timestamp, Violation, text::check_text};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, WithBody, WithQuery},
            extract::{JsonBody, Query, read_object},
        },
    },
    keys::{self, CreateError, KeyWish, MAX_NAME},
    maintenance::present,
    middleware::auth::{self, By},
    store::{ApiKey, Revocation, Scope},
};

const DEFAULT_LIMIT: u32 = 50;
const BODY_LIMIT: usize = 64 << 10;
const MAX_GROUP: usize = 100;

pub(crate) fn router() -> OpenApiRouter<SharedState> {
    OpenApiRouter::new().routes(routes!(list_keys, create_key)).routes(routes!(revoke_key))
}

/// The query as the document describes it; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct KeyParameters {
    /// The most keys to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// How many to pass over.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0)]
    offset: Option<u64>,
}

/// What a key opens: `ingest` reporting, `read` everything but keys and the audit log, `admin` everything.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ScopeName {
    Ingest,
    Read,
    Admin,
}

/// One page of keys.
#[derive(Serialize, ToSchema)]
struct KeyList {
    /// Oldest first; revoked and expired ones included.
    keys: Vec<KeyData>,
    pagination: KeyPagination,
}

/// Where the page stands.
#[derive(Serialize, ToSchema)]
struct KeyPagination {
    #[schema(example = 50)]
    limit: u32,
    #[schema(example = 0)]
    offset: u64,
    /// How many keys there are on all pages.
    #[schema(example = 3)]
    total_keys: u64,
}

/// What is known of a key. The key itself is kept nowhere.
#[derive(Serialize, ToSchema)]
struct KeyData {
    #[schema(example = 3)]
    id: i64,
    /// Its first characters.
    #[schema(example = "psk_4fTq")]
    hint: String,
    #[schema(example = "school 17")]
    name: Option<String>,
    #[schema(value_type = ScopeName, example = "ingest")]
    scope: &'static str,
    /// The only device that it may report for.
    #[schema(example = "pi-device-001")]
    device_id: Option<String>,
    /// The only group whose devices it may report for.
    group: Option<String>,
    #[schema(value_type = String, format = DateTime, example = "2025-06-01T00:00:05.120Z")]
    created_at: Timestamp,
    /// From when on it opens nothing.
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    revoked_at: Option<Timestamp>,
    /// When it was last used, to the hour.
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

/// A key to be made; other fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(as = NewKey, example = json!({"scope": "ingest", "name": "school 17", "group": "school-17"}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct NewKeyBody {
    scope: ScopeName,
    /// What to call it.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: Option<String>,
    /// The only device that it may report for; with the scope `ingest`.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    device_id: Option<String>,
    /// The only group whose devices it may report for; with the scope `ingest`, not beside `device_id`. A
    /// device that was never seen is put in it.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    group: Option<String>,
    /// From when on it opens nothing; in the future.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
}

/// A key that was made.
#[derive(Serialize, ToSchema)]
struct CreatedKey {
    #[schema(example = 3)]
    id: i64,
    /// The key itself. It is shown this once.
    #[schema(example = "psk_4fTqMnbq0F1OQYc3ZVQ2Ckq0Zc4Hsm5QKqDdT7nW8xX1aBcDe")]
    key: String,
}

/// A key that opens nothing any more.
#[derive(Serialize, ToSchema)]
struct RevokedKey {
    #[schema(example = 3)]
    id: i64,
}

/// The path as the document describes it; [`KeyPath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
struct KeyPathParameter {
    /// The key's number.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 3)]
    key_id: i64,
}

/// The key named in the path.
struct KeyPath(i64);

impl<S: Send + Sync> FromRequestParts<S> for KeyPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = Path::<String>::from_request_parts(parts, state).await.ok().map(|path| path.0);
        let id = text.as_ref().and_then(|text| text.parse().ok()).filter(|id| *id > 0);
        id.map(Self).ok_or_else(|| {
            let violation =
                Violation::of("key_id", "must be a positive number", text.map(Value::from));
            ApiError::Validation(vec![violation])
        })
    }
}

/// List keys
///
/// What is known of them; the keys themselves are kept nowhere.
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
    query.finish()?;
    // The table is small, and people ask rarely: a page is cut from all of it.
    let keys = state.store.keys().await?.keys;
    let total_keys = keys.len() as u64;
    let page = keys.into_iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
    let data = KeyList {
        keys: page.take(limit as usize).map(KeyData::from).collect(),
        pagination: KeyPagination { limit, offset, total_keys },
    };
    Ok(Success::new("Keys retrieved successfully", data))
}

/// Make a key
///
/// The answer shows it this once. It opens every server within a second, this one at once.
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
    By(actor): By,
    request: Request,
) -> Result<Response, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Admin)?;
    // By a clock that is behind, a key would be made that has ended.
    let present = present(&*state.store, &state.clock).await?;
    let wish = read_wish(&body, actor.at.max(present))?;
    let created = keys::create(&*state.store, &state.randomness, wish, &actor).await;
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
/// It opens nothing any more: here at once, on other servers within a second. It stays in the list.
#[utoipa::path(
    delete,
    path = "/api/key/{key_id}",
    tag = "Access",
    security(("key" = ["admin"])),
    params(KeyPathParameter),
    responses(
        (status = 200, description = "Revoked, now or before.", body = Success<RevokedKey>),
        (status = 400, description = "Not a possible number.", body = ErrorBody),
        (status = 404, description = "No such key.", body = ErrorBody),
        AnyTime,
    ),
)]
async fn revoke_key(
    State(state): State<SharedState>,
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

fn read_wish(body: &[u8], now: Timestamp) -> Result<KeyWish, ApiError> {
    let fields = read_object(body)?;
    let mut reader = Reader { fields, violations: Vec::new() };
    let scope = reader.required("scope", str::parse::<Scope>);
    let wish = KeyWish {
        // One that is missing or wrong is told of by itself; nothing else is wrong because of it.
        scope: scope.unwrap_or(Scope::Ingest),
        name: reader.optional("name", |text| short(text, MAX_NAME)),
        device_id: reader
            .optional("device_id", |text| DeviceId::new(text).map_err(|error| error.to_string())),
        group: reader.optional("group", |text| short(text, MAX_GROUP)),
        expires_at: reader.optional("expires_at", |text| {
            Timestamp::from_iso8601(text).map_err(|error| error.to_string())
        }),
    };
    let Reader { fields, mut violations } = reader;
    for (field, problem) in wish.problems(now) {
        violations.push(Violation::of(field, problem, None));
    }
    // A misspelt field must not make a key that opens more than was meant.
    for (field, value) in fields {
        violations.push(Violation::of(field, "is not allowed", Some(value)));
    }
    if violations.is_empty() { Ok(wish) } else { Err(ApiError::Validation(violations)) }
}

fn short(text: &str, most: usize) -> Result<String, String> {
    check_text(text, most).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

/// Takes fields out of an object, and remembers what is wrong with them.
struct Reader {
    fields: Map<String, Value>,
    violations: Vec<Violation>,
}

impl Reader {
    fn required<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        if !self.fields.contains_key(field) {
            self.violations.push(Violation::required(field));
            return None;
        }
        let is_null = self.fields[field].is_null();
        let value = self.optional(field, read);
        if is_null {
            self.violations.push(Violation::of(field, "must be a string", Some(Value::Null)));
        }
        value
    }

    /// A text; null is as good as none.
    fn optional<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.fields.remove(field).filter(|value| !value.is_null())?;
        let rule = match &value {
            Value::String(text) => match read(text) {
                Ok(read) => return Some(read),
                Err(rule) => rule,
            },
            _ => "must be a string".to_owned(),
        };
        self.violations.push(Violation::of(field, &rule, Some(value)));
        None
    }
}
