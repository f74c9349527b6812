//! `GET /api/notifications` and `POST /api/notification/{notification_id}/retry`: what people were told, or are to be told. The
//! outbox makes notifications, and the dispatcher sends them; nothing here does.

use axum::{
    extract::{FromRequestParts, State},
    http::{StatusCode, request::Parts},
    response::Response,
};
use pisync_core::Timestamp;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, OfFailedNotification, WithQuery},
            extract::{NoQuery, Query, id_in_path},
            page::DEFAULT_LIMIT,
            routes::Routes,
        },
    },
    middleware::{
        auth::{By, WithKey},
        route_policy::RoutePolicy,
    },
    store::{
        Count, MOST_ITEMS, Notification, NotificationQuery, NotificationState, RetryOutcome, Scope,
    },
};

/// The largest number that every JSON reader holds exactly, 2⁵³ − 1.
const LARGEST_ID: u64 = (1 << 53) - 1;

/// What sending again needs.
const NEEDED: Scope = Scope::Operate;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_notifications), RoutePolicy::API)
        .and(routes!(retry_notification), RoutePolicy::API)
}

/// What became of a notification.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
#[expect(dead_code, reason = "describes a word, is never made")]
enum NotificationStateName {
    Pending,
    Sent,
    Failed,
    Dropped,
}

/// The query in the OpenAPI document; [`Query`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query, is never made")]
struct NotificationParameters {
    /// Only notifications to the channel with this number.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64)]
    channel: Option<i64>,
    /// Only notifications in this state.
    #[param(inline)]
    state: Option<NotificationStateName>,
    /// The most notifications to list.
    #[param(minimum = 1, maximum = 1000, default = 50)]
    limit: Option<u32>,
    /// Continue after this notification: the `next_cursor` of the previous page.
    #[param(pattern = "^[1-9][0-9]*$")]
    cursor: Option<String>,
}

/// One page of notifications.
#[derive(Serialize, ToSchema)]
struct NotificationList {
    /// Newest first.
    notifications: Vec<NotificationData>,
    pagination: NotificationPagination,
}

/// The position of a page in its list.
#[derive(Serialize, ToSchema)]
struct NotificationPagination {
    /// The most items on the page.
    #[schema(example = 50)]
    limit: u32,
    /// The `cursor` of the next page; null on the last page.
    next_cursor: Option<String>,
    /// The number of items on all pages.
    #[schema(example = 3)]
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    /// Present instead of `total` when there are too many items to count: the number of items is at least this.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_is_at_least: Option<u64>,
}

/// A message that was sent, or is to be sent.
#[derive(Serialize, ToSchema)]
struct NotificationData {
    #[schema(example = 7)]
    id: i64,
    /// The id by which the receiver knows it: the same in every attempt.
    #[schema(example = "msg_19caf0f4a00_7")]
    message_id: String,
    /// The channel.
    channel: NotifiedChannel,
    /// What it is about: `incidents` or `digest`.
    #[schema(example = "incidents")]
    kind: String,
    /// The group that it is about; null for devices in none, and for the fleet.
    #[schema(example = "school-17")]
    group: Option<String>,
    #[schema(value_type = NotificationStateName, example = "sent")]
    state: String,
    #[schema(value_type = String, format = DateTime, example = "2026-03-02T10:30:00.000Z")]
    created_at: Timestamp,
    /// When it is to be sent at the earliest.
    #[schema(value_type = String, format = DateTime, example = "2026-03-02T10:31:00.000Z")]
    due_at: Timestamp,
    /// When it was sent, given up or dropped; null while it is pending.
    #[schema(value_type = Option<String>, format = DateTime, example = "2026-03-02T10:31:00.210Z")]
    ended_at: Option<Timestamp>,
    /// How often it was tried.
    #[schema(example = 1)]
    attempts: i64,
    #[schema(value_type = Option<String>, format = DateTime, example = "2026-03-02T10:31:00.210Z")]
    last_attempt_at: Option<Timestamp>,
    /// Why the last attempt failed.
    last_error: Option<String>,
    /// What it tells: the first 50 changes of incidents.
    items: Vec<NotificationItem>,
}

/// A channel, as a notification names it.
#[derive(Serialize, ToSchema)]
struct NotifiedChannel {
    #[schema(example = 3)]
    id: i64,
    #[schema(example = "ops")]
    name: String,
}

/// What a notification tells of an incident.
#[derive(Serialize, ToSchema)]
struct NotificationItem {
    /// The incident.
    #[schema(example = 812)]
    incident: i64,
    /// What has happened: `opened`, `reopened`, `reminder`, `flapping` or `resolved`.
    #[schema(example = "opened")]
    event: String,
}

impl From<Notification> for NotificationData {
    fn from(notification: Notification) -> Self {
        let items = notification.items.into_iter().take(MOST_ITEMS);
        Self {
            id: notification.id,
            message_id: notification.message_id,
            channel: NotifiedChannel { id: notification.channel, name: notification.channel_name },
            kind: notification.kind,
            group: Some(notification.group).filter(|group| !group.is_empty()),
            state: notification.state,
            created_at: notification.created_at,
            due_at: notification.due_at,
            ended_at: notification.ended_at,
            attempts: notification.attempts,
            last_attempt_at: notification.last_attempt_at,
            last_error: notification.last_error,
            items: items.map(|(incident, event)| NotificationItem { incident, event }).collect(),
        }
    }
}

/// The path in the OpenAPI document; [`NotificationPath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
struct NotificationPathParameter {
    /// The notification's id.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 7)]
    notification_id: i64,
}

/// The notification id in the path.
struct NotificationPath(i64);

impl<S: Send + Sync> FromRequestParts<S> for NotificationPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id_in_path(parts, state, "notification_id").await.map(Self)
    }
}

/// List notifications
///
/// What people were told, and what waits to be sent, newest first. Notifications that ended more than 90 days ago are deleted.
#[utoipa::path(
    get,
    path = "/api/notifications",
    tag = "Fleet",
    security(("key" = ["read"])),
    params(NotificationParameters),
    responses(
        (status = 200, description = "One page of notifications.", body = Success<NotificationList>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_notifications(
    State(state): State<SharedState>,
    Query(mut query): Query,
) -> Result<Success<NotificationList>, ApiError> {
    let wanted = NotificationQuery {
        channel: query.integer("channel", 1..=LARGEST_ID).map(u64::cast_signed),
        state: query.choice("state", &NotificationState::ALL.map(|state| (state.as_str(), state))),
        limit: query.limit().unwrap_or(DEFAULT_LIMIT),
        before: query.id_cursor(),
    };
    query.finish()?;
    let page = state.store.notifications(&wanted).await?;
    let (total, total_is_at_least) = match page.total {
        Count::Exactly(total) => (Some(total), None),
        Count::AtLeast(total) => (None, Some(total)),
    };
    let pagination = NotificationPagination {
        limit: wanted.limit,
        next_cursor: page.next.map(|id| id.to_string()),
        total,
        total_is_at_least,
    };
    let notifications = page.notifications.into_iter().map(NotificationData::from).collect();
    let data = NotificationList { notifications, pagination };
    Ok(Success::new("Notifications retrieved successfully", data))
}

/// Send a failed notification again
///
/// It is sent with the text and the id that it had.
#[utoipa::path(
    post,
    path = "/api/notification/{notification_id}/retry",
    tag = "Fleet",
    security(("key" = ["operate"])),
    params(NotificationPathParameter),
    responses(
        (status = 202, description = "It will be sent.", body = Success<RetriedNotification>),
        (status = 400, description = "Not a possible number, or a query parameter.", body = ErrorBody),
        OfFailedNotification,
        AnyTime,
    ),
)]
async fn retry_notification(
    State(state): State<SharedState>,
    _: NoQuery,
    NotificationPath(id): NotificationPath,
    By(actor): By,
    WithKey(key): WithKey,
) -> Result<Response, ApiError> {
    state.gate.look_again(key.as_ref(), NEEDED)?;
    match state.store.retry_notification(id, &actor).await? {
        RetryOutcome::Done => {
            let data = RetriedNotification { id, state: "pending" };
            let answer = Success::new("Notification will be sent again", data);
            Ok(answer.with_status(StatusCode::ACCEPTED))
        }
        RetryOutcome::NotFailed => {
            Err(ApiError::Conflict("Notification has not failed".to_owned()))
        }
        RetryOutcome::Unknown => Err(ApiError::NotFound("Notification")),
    }
}

/// A notification that is sent again.
#[derive(Serialize, ToSchema)]
struct RetriedNotification {
    #[schema(example = 7)]
    id: i64,
    #[schema(value_type = NotificationStateName, example = "pending")]
    state: &'static str,
}
