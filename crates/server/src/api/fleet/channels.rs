//! `GET|POST /api/channels`, `GET|PUT|PATCH|DELETE /api/channel/{channel_id}` and `POST /api/channel/{channel_id}/rotate-secret|test`:
//! by which ways people are told of incidents. An answer must never contain a secret, except a signing secret to whoever has
//! just made it. The command line shows channels with the same types.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::Response,
};
use pisync_core::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, IntoResponses, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, WithBody, WithConflict, WithQuery},
            extract::{JsonBody, NoQuery, id_in_path, read_object},
            fields::Fields,
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By, WithKey},
        route_policy::RoutePolicy,
    },
    notify::{
        channels::Delivery,
        manage::{self, Change, ChannelError, ChannelView},
    },
    store::{Actor, Scope},
};

const BODY_LIMIT: usize = 64 << 10;

/// The scope that changes need.
const NEEDED: Scope = Scope::Admin;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_channels, create_channel), RoutePolicy::API)
        .and(
            routes!(get_channel, replace_channel, update_channel, delete_channel),
            RoutePolicy::API,
        )
        .and(routes!(rotate_secret), RoutePolicy::API)
        .and(routes!(test_channel), RoutePolicy::API)
}

/// The path in the OpenAPI document; [`ChannelPath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
struct ChannelPathParameter {
    /// The channel's id.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 3)]
    channel_id: i64,
}

/// The channel's id in the path.
struct ChannelPath(i64);

impl<S: Send + Sync> FromRequestParts<S> for ChannelPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id_in_path(parts, state, "channel_id").await.map(Self)
    }
}

/// The kind of a channel.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ChannelKindName {
    Webhook,
    Slack,
    Discord,
    Teams,
    Ntfy,
    Telegram,
    Email,
}

/// How a channel is: `failing`, what was last sent did not arrive; `disabled`, somebody or its service has switched it off;
/// `locked`, its secrets were stored under another key.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum ChannelStateName {
    Ok,
    Failing,
    Disabled,
    Locked,
}

/// A channel. Of its secrets the last four characters are shown, or nothing of short ones; a locked channel shows none.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": 3, "name": "on call", "kind": "slack", "enabled": true, "default": true, "template": null,
    "state": "ok", "last_error": null, "failing_since": null, "waiting": 0,
    "created_at": "2025-06-01T00:00:05.120Z", "url": "…x7Qa",
}))]
pub(crate) struct ChannelData {
    id: i64,
    name: String,
    #[schema(value_type = ChannelKindName)]
    kind: String,
    /// Whether anything is sent by it.
    enabled: bool,
    /// Whether it gets what no route matches.
    default: bool,
    /// The template of its messages; null for the built-in text.
    template: Option<String>,
    #[schema(value_type = ChannelStateName)]
    state: &'static str,
    /// Why the last attempt failed; null when it did not.
    last_error: Option<String>,
    /// Since when attempts fail.
    #[schema(value_type = Option<String>, format = DateTime)]
    failing_since: Option<Timestamp>,
    /// How many notifications wait to be sent by it.
    waiting: u64,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[serde(flatten)]
    #[schema(value_type = ChannelFields)]
    fields: Map<String, Value>,
}

impl From<&ChannelView> for ChannelData {
    fn from(view: &ChannelView) -> Self {
        let channel = &view.channel;
        Self {
            id: channel.id,
            name: channel.name.clone(),
            kind: channel.kind.clone(),
            enabled: channel.is_enabled,
            default: channel.is_default,
            template: channel.template.clone(),
            state: view.state().as_str(),
            last_error: channel.last_error.clone(),
            failing_since: channel.failing_since,
            waiting: channel.waiting,
            created_at: channel.created_at,
            fields: view.masked(),
        }
    }
}

/// The fields of the kinds. Which there are depends on the kind.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "describes fields, is never made")]
struct ChannelFields {
    /// Secret. webhook, slack, discord and teams: where messages are posted to.
    #[schema(max_length = 1000)]
    url: Option<String>,
    /// Secret. webhook: signs messages by Standard Webhooks; made when it is left out.
    signing_secret: Option<String>,
    /// Secret. webhook: up to 10 headers to send, by name.
    #[schema(value_type = Option<Object>)]
    headers: Option<Value>,
    /// ntfy: the server, such as https://ntfy.sh.
    server: Option<String>,
    /// Secret. ntfy: the topic, which whoever knows it can read.
    #[schema(max_length = 1000)]
    topic: Option<String>,
    /// Secret. ntfy: the access token, if the server asks for one.
    #[schema(max_length = 1000)]
    token: Option<String>,
    /// Secret. telegram: the bot's token.
    #[schema(max_length = 1000)]
    bot_token: Option<String>,
    /// telegram: the chat.
    #[schema(max_length = 255)]
    chat_id: Option<String>,
    /// telegram: the thread in it.
    thread_id: Option<i64>,
    /// email: one address.
    #[schema(max_length = 255)]
    to: Option<String>,
}

/// All channels.
#[derive(Serialize, ToSchema)]
struct ChannelList {
    /// By id.
    channels: Vec<ChannelData>,
}

/// A new signing secret.
#[derive(Serialize, ToSchema)]
struct RotatedSecret {
    #[schema(example = 3)]
    id: i64,
    /// The secret. It is shown only this once.
    #[schema(example = "whsec_…")]
    signing_secret: String,
}

/// A channel to be stored. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[schema(as = NewChannel, example = json!({
    "name": "on call", "kind": "ntfy", "server": "https://ntfy.sh", "topic": "school-alerts-of-ours",
}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct ChannelBody {
    /// No other channel may have this name.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: String,
    kind: ChannelKindName,
    /// Whether anything is sent by it. True when it is left out.
    #[schema(required = false)]
    enabled: bool,
    /// Whether it gets what no route matches. When it is left out, true for the first channel and false for others.
    #[schema(required = false)]
    default: bool,
    /// The template of its messages: at most 16 KiB of minijinja.
    #[schema(max_length = 16384)]
    template: Option<String>,
    #[serde(flatten)]
    fields: ChannelFields,
}

/// What to change about a channel. Absent fields stay unchanged, its kind stays always. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[schema(example = json!({"enabled": false}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct ChannelChange {
    #[schema(
        min_length = 1,
        max_length = 100,
        pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$",
        required = false
    )]
    name: String,
    #[schema(required = false)]
    kind: ChannelKindName,
    #[schema(required = false)]
    enabled: bool,
    #[schema(required = false)]
    default: bool,
    #[schema(max_length = 16384)]
    template: Option<String>,
    #[serde(flatten)]
    fields: ChannelFields,
}

/// A channel that is no more.
#[derive(Serialize, ToSchema)]
struct DeletedChannel {
    #[schema(example = 3)]
    id: i64,
    /// How many notifications have waited to be sent by it, and are dropped.
    dropped_notifications: u64,
}

/// The answers to a channel that is not there.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
enum OfChannel {
    /// No such channel.
    #[response(status = 404)]
    NotFound(ErrorBody),
}

impl From<ChannelError> for ApiError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Fields(violations) => Self::Validation(violations),
            ChannelError::Unknown => Self::NotFound("Channel"),
            ChannelError::NameTaken
            | ChannelError::TooMany
            | ChannelError::NotSigned
            | ChannelError::Locked
            | ChannelError::NoKey
            | ChannelError::Stale => Self::Conflict(error.to_string()),
            ChannelError::NotSealed(detail) | ChannelError::Randomness(detail) => {
                Self::Internal(detail)
            }
            ChannelError::Store(error) => error.into(),
        }
    }
}

/// The channel as it is now.
async fn shown(state: &SharedState, id: i64) -> Result<ChannelData, ApiError> {
    let view = manage::channel(&*state.store, &state.secrets, id).await?;
    Ok(ChannelData::from(&view))
}

/// Keeps an answer with a secret out of every cache.
fn uncached(mut response: Response) -> Response {
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// List channels
#[utoipa::path(
    get,
    path = "/api/channels",
    tag = "Fleet",
    security(("key" = ["read"])),
    responses(
        (status = 200, description = "All channels: there are at most 200.", body = Success<ChannelList>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_channels(
    State(state): State<SharedState>,
    _: NoQuery,
) -> Result<Success<ChannelList>, ApiError> {
    let channels = manage::channels(&*state.store, &state.secrets).await?;
    let channels = channels.iter().map(ChannelData::from).collect();
    Ok(Success::new("Channels retrieved successfully", ChannelList { channels }))
}

/// Make a channel
///
/// The answer shows the `signing_secret` of a webhook only this once.
#[utoipa::path(
    post,
    path = "/api/channels",
    tag = "Fleet",
    security(("key" = ["admin"])),
    request_body = ChannelBody,
    responses(
        (status = 201, description = "Made.", body = Success<ChannelData>),
        WithBody,
        WithConflict,
        AnyTime,
    ),
)]
async fn create_channel(
    State(state): State<SharedState>,
    _: NoQuery,
    By(actor): By,
    request: Request,
) -> Result<Response, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), NEEDED)?;
    let request = manage::read_new(Fields::of(&body)?, &state.secrets)?;
    if let Some(courier) = &state.courier {
        request.check_target(&courier.sender).await?;
    }
    let (id, signing_secret) =
        manage::create(&*state.store, &state.secrets, request, &actor).await?;
    let mut channel = shown(&state, id).await?;
    if let Some(secret) = signing_secret {
        channel.fields.insert("signing_secret".to_owned(), secret.into());
    }
    let answer = Success::new("Channel created successfully", channel);
    Ok(uncached(answer.with_status(StatusCode::CREATED)))
}

/// A channel
#[utoipa::path(
    get,
    path = "/api/channel/{channel_id}",
    tag = "Fleet",
    security(("key" = ["read"])),
    params(ChannelPathParameter),
    responses(
        (status = 200, description = "The channel.", body = Success<ChannelData>),
        OfChannel,
        WithQuery,
        AnyTime,
    ),
)]
async fn get_channel(
    State(state): State<SharedState>,
    _: NoQuery,
    ChannelPath(id): ChannelPath,
) -> Result<Success<ChannelData>, ApiError> {
    Ok(Success::new("Channel retrieved successfully", shown(&state, id).await?))
}

/// Replace a channel
///
/// Secrets that are left out stay, and so does its kind. Everything else that is left out is as in a new channel.
#[utoipa::path(
    put,
    path = "/api/channel/{channel_id}",
    tag = "Fleet",
    security(("key" = ["admin"])),
    params(ChannelPathParameter),
    request_body = ChannelBody,
    responses(
        (status = 200, description = "The channel as it is now.", body = Success<ChannelData>),
        OfChannel,
        WithBody,
        WithConflict,
        AnyTime,
    ),
)]
async fn replace_channel(
    State(state): State<SharedState>,
    _: NoQuery,
    ChannelPath(id): ChannelPath,
    By(actor): By,
    request: Request,
) -> Result<Success<ChannelData>, ApiError> {
    change(&state, id, request, Change::Replace, &actor).await
}

/// Change a channel
///
/// With null, a field is emptied. Setting where it sends, or enabling it, also forgets its failures.
#[utoipa::path(
    patch,
    path = "/api/channel/{channel_id}",
    tag = "Fleet",
    security(("key" = ["admin"])),
    params(ChannelPathParameter),
    request_body = ChannelChange,
    responses(
        (status = 200, description = "The channel as it is now.", body = Success<ChannelData>),
        OfChannel,
        WithBody,
        WithConflict,
        AnyTime,
    ),
)]
async fn update_channel(
    State(state): State<SharedState>,
    _: NoQuery,
    ChannelPath(id): ChannelPath,
    By(actor): By,
    request: Request,
) -> Result<Success<ChannelData>, ApiError> {
    change(&state, id, request, Change::Merge, &actor).await
}

async fn change(
    state: &SharedState,
    id: i64,
    request: Request,
    change: Change,
    by: &Actor,
) -> Result<Success<ChannelData>, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, state).read().await?;
    state.gate.look_again(key.as_ref(), NEEDED)?;
    let fields = read_object(&body)?;
    let (store, secrets) = (&*state.store, &state.secrets);
    if let Some(courier) = &state.courier {
        manage::check_changed(store, secrets, &courier.sender, id, &fields, change).await?;
    }
    manage::update(store, secrets, id, &fields, change, by).await?;
    Ok(Success::new("Channel updated successfully", shown(state, id).await?))
}

/// Remove a channel
///
/// What waits to be sent by it is dropped, and routes lose it. A route that has no other channel is removed with it.
#[utoipa::path(
    delete,
    path = "/api/channel/{channel_id}",
    tag = "Fleet",
    security(("key" = ["admin"])),
    params(ChannelPathParameter),
    responses(
        (status = 200, description = "Removed.", body = Success<DeletedChannel>),
        (status = 400, description = "Not a possible number, or a query parameter.", body = ErrorBody),
        OfChannel,
        AnyTime,
    ),
)]
async fn delete_channel(
    State(state): State<SharedState>,
    _: NoQuery,
    ChannelPath(id): ChannelPath,
    By(actor): By,
) -> Result<Success<DeletedChannel>, ApiError> {
    let dropped = state.store.delete_channel(id, &actor).await?;
    let dropped_notifications = dropped.ok_or(ApiError::NotFound("Channel"))?;
    let data = DeletedChannel { id, dropped_notifications };
    Ok(Success::new("Channel deleted successfully", data))
}

/// Replace a webhook's signing secret
///
/// The answer shows the new secret only this once. For 24 hours, messages are signed with the one before, too.
#[utoipa::path(
    post,
    path = "/api/channel/{channel_id}/rotate-secret",
    tag = "Fleet",
    security(("key" = ["admin"])),
    params(ChannelPathParameter),
    responses(
        (status = 200, description = "Replaced.", body = Success<RotatedSecret>),
        (status = 400, description = "Not a possible number, or a query parameter.", body = ErrorBody),
        OfChannel,
        WithConflict,
        AnyTime,
    ),
)]
async fn rotate_secret(
    State(state): State<SharedState>,
    _: NoQuery,
    ChannelPath(id): ChannelPath,
    By(actor): By,
    WithKey(key): WithKey,
) -> Result<Response, ApiError> {
    state.gate.look_again(key.as_ref(), NEEDED)?;
    let signing_secret = manage::rotate(&*state.store, &state.secrets, id, &actor).await?;
    let data = RotatedSecret { id, signing_secret };
    let answer = Success::new("Signing secret replaced successfully", data);
    Ok(uncached(answer.with_status(StatusCode::OK)))
}

/// Try a channel
///
/// Sends a test message at once, past what waits, and answers how that went. Once in 5 s for each channel.
#[utoipa::path(
    post,
    path = "/api/channel/{channel_id}/test",
    tag = "Fleet",
    security(("key" = ["admin"])),
    params(ChannelPathParameter),
    responses(
        (status = 200, description = "How it went.", body = Success<ChannelTest>),
        (status = 400, description = "Not a possible number, or a query parameter.", body = ErrorBody),
        OfChannel,
        WithConflict,
        AnyTime,
    ),
)]
async fn test_channel(
    State(state): State<SharedState>,
    _: NoQuery,
    ChannelPath(id): ChannelPath,
    WithKey(key): WithKey,
) -> Result<Success<ChannelTest>, ApiError> {
    state.gate.look_again(key.as_ref(), NEEDED)?;
    let view = manage::channel(&*state.store, &state.secrets, id).await?;
    let now = state.clock.now();
    state.channel_tests.begin(id, now)?;
    let Some(courier) = &state.courier else {
        return Err(ApiError::Conflict("Nothing is sent here".to_owned()));
    };
    let base_url = courier.base_url.as_deref();
    let (delivery, milliseconds) = manage::send_test(&view, &courier.sender, base_url, now).await?;
    let data = ChannelTest::new(delivery, milliseconds);
    Ok(Success::new("Test message sent", data))
}

/// How a test message went.
#[derive(Serialize, ToSchema)]
pub(crate) struct ChannelTest {
    /// Whether the receiver has it.
    #[schema(example = true)]
    pub(crate) delivered: bool,
    /// The status that the receiver answered, of HTTP or SMTP; null when it did not answer.
    #[schema(example = 200)]
    pub(crate) status: Option<u16>,
    /// How long it took.
    #[schema(example = 120)]
    pub(crate) milliseconds: u64,
    /// Why it was not delivered.
    pub(crate) error: Option<String>,
}

impl ChannelTest {
    pub(crate) fn new(delivery: Delivery, milliseconds: u64) -> Self {
        match delivery {
            Delivery::Delivered { status } => {
                Self { delivered: true, status: Some(status), milliseconds, error: None }
            }
            Delivery::Failed { status, error, .. } => {
                Self { delivered: false, status, milliseconds, error: Some(error) }
            }
        }
    }
}

/// When each channel was tried last.
#[derive(Default)]
pub(crate) struct ChannelTests(Mutex<HashMap<i64, Timestamp>>);

impl ChannelTests {
    /// Two tests of a channel are so far apart, in milliseconds.
    const PAUSE: i64 = 5_000;

    /// Begins a test, unless there was one a moment ago.
    fn begin(&self, channel: i64, now: Timestamp) -> Result<(), ApiError> {
        let mut tests = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tests.retain(|_, last| {
            (0..Self::PAUSE).contains(&(now.as_millisecond() - last.as_millisecond()))
        });
        match tests.get(&channel) {
            Some(last) => {
                let left = Self::PAUSE - (now.as_millisecond() - last.as_millisecond());
                let seconds = u64::try_from(left).unwrap_or(0).div_ceil(1000);
                Err(ApiError::TooManyRequests { seconds, whom: "for this channel" })
            }
            None => {
                tests.insert(channel, now);
                Ok(())
            }
        }
    }
}
