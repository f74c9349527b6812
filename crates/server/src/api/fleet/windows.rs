//! `GET|POST /api/windows` and `PUT|DELETE /api/window/{window_id}`: times at which devices are not expected to report, or at
//! which nobody is told. The command line reads windows with the same function.

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{StatusCode, request::Parts},
    response::Response,
};
use jiff::tz::TimeZone;
use pisync_core::{
    DeviceId, GroupName, Timestamp, Violation, ViolationCode,
    health::{
        WEEKDAYS, Weekly, WindowTimes, time_zone,
        window::{LONGEST_WINDOW, end_of_part, time_of_day, weekday},
    },
    text::{TextError, check_text},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        devices::change::MAX_TAG,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, WithBody, WithConflict, WithQuery},
            extract::{JsonBody, NoQuery, id_in_path},
            fields::{Fields, text},
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    store::{FleetWindow, MOST_WINDOWS, NewWindow, Scope, WindowEffect, WindowScope},
};

const BODY_LIMIT: usize = 64 << 10;
const MAX_NAME: usize = 100;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(list_windows, create_window), RoutePolicy::API)
        .and(routes!(replace_window, delete_window), RoutePolicy::API)
}

/// The path in the OpenAPI document; [`WindowPath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
struct WindowPathParameter {
    /// The window's id.
    #[param(minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 3)]
    window_id: i64,
}

/// The window's id in the path.
struct WindowPath(i64);

impl<S: Send + Sync> FromRequestParts<S> for WindowPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id_in_path(parts, state, "window_id").await.map(Self)
    }
}

/// What a window is for.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum WindowScopeName {
    Fleet,
    Group,
    Device,
    Tag,
}

/// What a window does: `closed`, devices are not expected to report; `quiet`, they are judged, but messages wait.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum WindowEffectName {
    Closed,
    Quiet,
}

/// A weekday.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum WeekdayName {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

/// The part of some weekdays, in local time.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"days": ["mon", "tue", "wed", "thu", "fri"], "start": "16:00", "end": "07:00"}))]
struct WeeklyData {
    /// The days on which it begins.
    #[schema(min_items = 1)]
    days: Vec<WeekdayName>,
    /// When it begins.
    #[schema(pattern = "^([01][0-9]|2[0-3]):[0-5][0-9]$")]
    start: String,
    /// When it ends: the next day, unless this is after `start`. `24:00` is midnight.
    #[schema(pattern = "^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$")]
    end: String,
}

/// A window. Either it is the whole time from `from` to `until`, or some part of weekdays.
#[derive(Serialize, ToSchema)]
struct WindowData {
    #[schema(example = 3)]
    id: i64,
    #[schema(example = "nights")]
    name: String,
    #[schema(value_type = WindowScopeName)]
    scope: &'static str,
    /// The group, the device or the tag; null for the fleet.
    #[schema(example = "school-17")]
    key: Option<String>,
    #[schema(value_type = WindowEffectName)]
    effect: &'static str,
    #[schema(example = "Europe/Berlin")]
    timezone: String,
    #[schema(value_type = Option<String>, format = DateTime)]
    from: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    #[schema(value_type = Option<WeeklyData>)]
    weekly: Option<Value>,
}

impl WindowData {
    fn of(id: i64, window: NewWindow) -> Self {
        let NewWindow { name, scope, effect, timezone, times } = window;
        Self {
            id,
            name,
            scope: scope.word(),
            key: Some(scope.key()).filter(|key| !key.is_empty()).map(str::to_owned),
            effect: effect.as_str(),
            timezone,
            from: times.from,
            until: times.until,
            weekly: times.weekly.as_ref().map(Weekly::to_json),
        }
    }
}

impl From<FleetWindow> for WindowData {
    fn from(window: FleetWindow) -> Self {
        let FleetWindow { id, name, scope, effect, timezone, times } = window;
        Self::of(id, NewWindow { name, scope, effect, timezone, times })
    }
}

/// All windows.
#[derive(Serialize, ToSchema)]
struct WindowList {
    /// By id.
    windows: Vec<WindowData>,
}

/// A window to be stored. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(as = NewWindow, example = json!({
    "name": "nights", "scope": "group", "key": "school-17", "effect": "closed", "timezone": "Europe/Berlin",
    "weekly": {"days": ["mon", "tue", "wed", "thu", "fri"], "start": "16:00", "end": "07:00"},
}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct WindowBody {
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: String,
    scope: WindowScopeName,
    /// The group, the device or the tag. Absent for the fleet, and required otherwise.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    key: Option<String>,
    effect: WindowEffectName,
    /// An IANA time zone.
    timezone: String,
    /// When it begins. A time without an offset is local. Without `weekly` it is required.
    #[schema(format = DateTime)]
    from: Option<String>,
    /// When it ends, at most 366 days later unless there is `weekly`. Without `weekly` it is required.
    #[schema(format = DateTime)]
    until: Option<String>,
    weekly: Option<WeeklyData>,
}

/// A window that is no more.
#[derive(Serialize, ToSchema)]
struct DeletedWindow {
    #[schema(example = 3)]
    id: i64,
}

/// List windows
#[utoipa::path(
    get,
    path = "/api/windows",
    tag = "Fleet",
    security(("key" = ["read"])),
    responses(
        (status = 200, description = "All windows: there are at most 1,000.", body = Success<WindowList>),
        WithQuery,
        AnyTime,
    ),
)]
async fn list_windows(
    State(state): State<SharedState>,
    _: NoQuery,
) -> Result<Success<WindowList>, ApiError> {
    let windows = state.store.windows().await?.into_iter().map(WindowData::from).collect();
    Ok(Success::new("Windows retrieved successfully", WindowList { windows }))
}

/// Make a window
#[utoipa::path(
    post,
    path = "/api/windows",
    tag = "Fleet",
    security(("key" = ["operate"])),
    request_body = WindowBody,
    responses(
        (status = 201, description = "Made.", body = Success<WindowData>),
        WithBody,
        WithConflict,
        AnyTime,
    ),
)]
async fn create_window(
    State(state): State<SharedState>,
    _: NoQuery,
    By(actor): By,
    request: Request,
) -> Result<Response, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    let window = read_window(Fields::of(&body)?)?;
    let id = state.store.create_window(&window, &actor).await?.ok_or_else(too_many)?;
    let data = WindowData::of(id, window);
    Ok(Success::new("Window created successfully", data).with_status(StatusCode::CREATED))
}

fn too_many() -> ApiError {
    ApiError::Conflict(format!("There are {MOST_WINDOWS} windows already; delete some first"))
}

/// Replace a window
#[utoipa::path(
    put,
    path = "/api/window/{window_id}",
    tag = "Fleet",
    security(("key" = ["operate"])),
    params(WindowPathParameter),
    request_body = WindowBody,
    responses(
        (status = 200, description = "The window as it is now.", body = Success<WindowData>),
        (status = 404, description = "No such window.", body = ErrorBody),
        WithBody,
        AnyTime,
    ),
)]
async fn replace_window(
    State(state): State<SharedState>,
    _: NoQuery,
    WindowPath(id): WindowPath,
    By(actor): By,
    request: Request,
) -> Result<Success<WindowData>, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Operate)?;
    let window = read_window(Fields::of(&body)?)?;
    if !state.store.replace_window(id, &window, &actor).await? {
        return Err(ApiError::NotFound("Window"));
    }
    Ok(Success::new("Window updated successfully", WindowData::of(id, window)))
}

/// Remove a window
#[utoipa::path(
    delete,
    path = "/api/window/{window_id}",
    tag = "Fleet",
    security(("key" = ["operate"])),
    params(WindowPathParameter),
    responses(
        (status = 200, description = "Removed.", body = Success<DeletedWindow>),
        (status = 400, description = "Not a possible number, or a query parameter.", body = ErrorBody),
        (status = 404, description = "No such window.", body = ErrorBody),
        AnyTime,
    ),
)]
async fn delete_window(
    State(state): State<SharedState>,
    _: NoQuery,
    WindowPath(id): WindowPath,
    By(actor): By,
) -> Result<Success<DeletedWindow>, ApiError> {
    if !state.store.delete_window(id, &actor).await? {
        return Err(ApiError::NotFound("Window"));
    }
    Ok(Success::new("Window deleted successfully", DeletedWindow { id }))
}

/// One of some words.
fn word<T>(
    words: &'static [&'static str],
    read: impl FnOnce(&str) -> Option<T>,
) -> impl FnOnce(&str) -> Result<T, String> {
    move |text| read(text).ok_or_else(|| format!("must be one of [{}]", words.join(", ")))
}

/// Reads a window, and names every wrong field.
pub(crate) fn read_window(mut fields: Fields) -> Result<NewWindow, Vec<Violation>> {
    const EFFECTS: [&str; 2] = ["closed", "quiet"];
    let name = fields.required("name", text(MAX_NAME));
    let scope = fields.required(
        "scope",
        word(&WindowScope::WORDS, |text| {
            Some(text.to_owned()).filter(|text| WindowScope::WORDS.contains(&text.as_str()))
        }),
    );
    let scope = match scope {
        Some(scope) => read_scope(&mut fields, &scope),
        None => {
            // Of an unknown scope, it must be what the key of any scope is.
            fields.optional("key", text(DeviceId::MAX_CHARACTERS));
            None
        }
    };
    let effect = fields.required("effect", word(&EFFECTS, WindowEffect::from_word));
    let zone = fields.required("timezone", |text| {
        let zone = time_zone(text).ok_or_else(|| "must be an IANA time zone".to_owned())?;
        Ok::<_, String>((text.to_owned(), zone))
    });
    let weekly = read_weekly(&mut fields);
    // Without a zone, local times are read as if it were UTC: only what is wrong with them counts then.
    let zone_of_times = zone.as_ref().map_or(TimeZone::UTC, |(_, zone)| zone.clone());
    let times = read_times(&mut fields, &zone_of_times, weekly);
    let violations = fields.into_violations();
    match (name, scope, effect, zone, times) {
        (Some(name), Some(scope), Some(effect), Some((timezone, _)), Some(times))
            if violations.is_empty() =>
        {
            Ok(NewWindow { name, scope, effect, timezone, times })
        }
        _ => Err(violations),
    }
}

/// The field `key`, by the rule of its scope.
fn read_scope(fields: &mut Fields, scope: &str) -> Option<WindowScope> {
    if scope == "fleet" {
        let key = fields.take("key").filter(|key| !key.is_null());
        if key.is_some() {
            let rule = "is not allowed for the scope fleet";
            fields.refuse("key", ViolationCode::Conflict, rule, key);
            return None;
        }
        return Some(WindowScope::Fleet);
    }
    let key = fields.required("key", |text| match scope {
        "group" => GroupName::new(text).map(|_| text.to_owned()),
        "device" => DeviceId::new(text).map(|_| text.to_owned()),
        _ => check_text(text, MAX_TAG).map(|()| text.to_owned()),
    } as Result<String, TextError>)?;
    WindowScope::new(scope, &key)
}

/// The field `weekly`. `None` when it is wrong, and `Some(None)` when it is absent.
fn read_weekly(fields: &mut Fields) -> Option<Option<Weekly>> {
    let Some(value) = fields.take("weekly").filter(|value| !value.is_null()) else {
        return Some(None);
    };
    let Value::Object(object) = value else {
        fields.refuse("weekly", ViolationCode::Type, "must be an object", Some(value));
        return None;
    };
    let mut inner = Fields::new(object);
    let days = read_days(&mut inner);
    let start = inner.required("start", |text| {
        let rule = || "must be a time of day such as 16:00, from 00:00 to 23:59".to_owned();
        time_of_day(text).ok_or_else(rule)
    });
    let end = inner.required("end", |text| {
        let rule = || "must be a time of day such as 07:00, from 00:00 to 24:00".to_owned();
        end_of_part(text).ok_or_else(rule)
    });
    let violations = inner.into_violations();
    let is_right = violations.is_empty();
    fields.add(violations.into_iter().map(|violation| violation.within("weekly")).collect());
    match (days, start, end) {
        (Some(days), Some(start), Some(end)) if is_right => Some(Some(Weekly { days, start, end })),
        _ => None,
    }
}

fn read_days(weekly: &mut Fields) -> Option<Vec<jiff::civil::Weekday>> {
    let Some(value) = weekly.take("days") else {
        weekly.add(vec![Violation::required("days")]);
        return None;
    };
    let Value::Array(words) = &value else {
        weekly.refuse("days", ViolationCode::Type, "must be an array", Some(value));
        return None;
    };
    if words.is_empty() {
        let rule = "must contain at least 1 items";
        weekly.refuse("days", ViolationCode::Length, rule, Some(value));
        return None;
    }
    let days: Option<Vec<_>> = words.iter().map(|word| weekday(word.as_str()?)).collect();
    if days.is_none() {
        let names: Vec<_> = WEEKDAYS.iter().map(|(name, _)| *name).collect();
        let rule = format!("must be some of [{}]", names.join(", "));
        weekly.refuse("days", ViolationCode::Format, &rule, Some(value));
    }
    days
}

/// The fields `from` and `until`, of which a window without weekdays needs both.
fn read_times(
    fields: &mut Fields,
    zone: &TimeZone,
    weekly: Option<Option<Weekly>>,
) -> Option<WindowTimes> {
    let is_weekly = !matches!(weekly, Some(None));
    let mut time = |name: &'static str| {
        let read = |text: &str| Timestamp::from_iso8601_in(text, zone);
        if is_weekly {
            Some(fields.optional(name, read))
        } else {
            fields.required(name, read).map(Some)
        }
    };
    let (from, until) = (time("from"), time("until"));
    let (from, until) = (from?, until?);
    if let (Some(from), Some(until)) = (from, until) {
        let length = until.as_millisecond() - from.as_millisecond();
        let sent = Some(Value::String(until.to_string()));
        if length <= 0 {
            let rule = r#"must be after "from""#;
            fields.refuse("until", ViolationCode::Conflict, rule, sent);
        } else if !is_weekly && length > LONGEST_WINDOW {
            let rule = r#"must be at most 366 days after "from""#;
            fields.refuse("until", ViolationCode::Range, rule, sent);
        }
    }
    Some(WindowTimes { zone: zone.clone(), from, until, weekly: weekly? })
}
