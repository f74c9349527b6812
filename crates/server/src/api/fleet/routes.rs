//! `GET|PUT /api/routes`: which incidents are told by which channels, and when. They are replaced as a whole, so that nobody
//! undoes a change that somebody else has made meanwhile.

use std::{collections::BTreeSet, ops::RangeInclusive};

use axum::extract::{Request, State};
use pisync_core::{
    GroupName, Violation, ViolationCode,
    health::{IncidentScope, Severity, WEEKDAYS, time_zone, window::time_of_day},
    text::check_text,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        devices::change::MAX_TAG,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, WithBody, WithConflict, WithQuery},
            extract::{JsonBody, NoQuery},
            fields::Fields,
            routes::Routes,
        },
    },
    middleware::{
        auth::{self, By},
        route_policy::RoutePolicy,
    },
    store::{
        INCIDENT_KINDS, MOST_CHANNELS, MOST_ROUTES, Route, RouteDigest, RouteMatch, RoutesOutcome,
        Scope,
    },
};

/// Routes may name many groups.
const BODY_LIMIT: usize = 256 << 10;

/// The most groups or tags of a route.
const MOST_NAMES: usize = 1_000;

/// Messages may wait for a day.
const WAIT_SECONDS: RangeInclusive<u32> = 0..=86_400;

/// The time between two reminders: five minutes to 30 days.
const REMIND_SECONDS: RangeInclusive<u32> = 300..=2_592_000;

/// The most violations that an answer names.
const MOST_VIOLATIONS: usize = 100;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(get_routes, replace_routes), RoutePolicy::API)
}

/// All routes, in their order.
#[derive(Serialize, ToSchema)]
struct RoutesData {
    /// Changes with every change of routes and channels. To be sent with the next change of the routes.
    #[schema(example = 4)]
    version: i64,
    /// Without any, the channels with `default` get everything: after 60 s, every 300 s at most, without reminders.
    #[schema(value_type = Vec<RouteBody>)]
    routes: Vec<Value>,
}

impl RoutesData {
    fn of(version: i64, routes: &[Route]) -> Self {
        Self { version, routes: routes.iter().map(Route::to_json).collect() }
    }
}

/// All routes, in their order. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(as = NewRoutes, example = json!({"version": 4, "routes": [
    {"match": {"severity_at_least": "critical"}, "channels": [3], "wait_seconds": 0, "remind_seconds": 86400},
]}))]
#[expect(dead_code, reason = "describes the body, is never made")]
struct RoutesBody {
    /// The version of the routes that are to be replaced.
    version: i64,
    #[schema(max_items = 100)]
    routes: Vec<RouteBody>,
}

/// A route. Every route that matches an incident applies to it, up to one with `stop`.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Route)]
struct RouteBody {
    #[serde(rename = "match", default)]
    matching: RouteMatchBody,
    /// The ids of the channels. Without any, nobody is told.
    #[schema(max_items = 200)]
    channels: Vec<i64>,
    /// How long a message waits for others to go with it.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 86400, default = 60)]
    wait_seconds: u32,
    /// The least time between two messages about the same group.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 86400, default = 300)]
    interval_seconds: u32,
    /// How often people are reminded of what is open; null: never.
    #[schema(minimum = 300, maximum = 2592000)]
    remind_seconds: Option<u32>,
    digest: Option<RouteDigestBody>,
    /// Whether no further route applies to what it matches.
    #[serde(default)]
    stop: bool,
}

/// Which incidents a route is for: those that match all of it. An empty list matches everything.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
#[schema(as = RouteMatch)]
struct RouteMatchBody {
    #[schema(max_items = 1000)]
    groups: Vec<String>,
    /// Tags of devices.
    #[schema(max_items = 1000)]
    tags: Vec<String>,
    /// `silent` and `failing`.
    kinds: Vec<String>,
    /// `device`, `group` and `fleet`.
    scopes: Vec<String>,
    /// `info`, `warning` or `critical`.
    #[schema(default = "info")]
    severity_at_least: String,
}

/// The times at which messages go out, rather than at once.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RouteDigest)]
struct RouteDigestBody {
    /// The local time of day.
    #[schema(pattern = "^([01][0-9]|2[0-3]):[0-5][0-9]$", example = "07:00")]
    at: String,
    /// The weekdays; all of them when this is left out.
    #[schema(min_items = 1, example = json!(["mon", "tue", "wed", "thu", "fri"]))]
    days: Option<Vec<String>>,
    /// An IANA time zone.
    #[schema(example = "Europe/Berlin")]
    timezone: String,
}

/// The routes
#[utoipa::path(
    get,
    path = "/api/routes",
    tag = "Fleet",
    security(("key" = ["read"])),
    responses(
        (status = 200, description = "All routes.", body = Success<RoutesData>),
        WithQuery,
        AnyTime,
    ),
)]
async fn get_routes(
    State(state): State<SharedState>,
    _: NoQuery,
) -> Result<Success<RoutesData>, ApiError> {
    let list = state.store.routes().await?;
    let data = RoutesData::of(list.version, &list.routes);
    Ok(Success::new("Routes retrieved successfully", data))
}

/// Replace the routes
///
/// All of them at once. A version that is not the present one is refused: somebody has changed routes or channels since.
#[utoipa::path(
    put,
    path = "/api/routes",
    tag = "Fleet",
    security(("key" = ["admin"])),
    request_body = RoutesBody,
    responses(
        (status = 200, description = "The routes as they are now.", body = Success<RoutesData>),
        WithBody,
        WithConflict,
        AnyTime,
    ),
)]
async fn replace_routes(
    State(state): State<SharedState>,
    _: NoQuery,
    By(actor): By,
    request: Request,
) -> Result<Success<RoutesData>, ApiError> {
    let key = auth::key_of(&request);
    let body = JsonBody::of(request, BODY_LIMIT, &state).read().await?;
    state.gate.look_again(key.as_ref(), Scope::Admin)?;
    let (version, routes) = read_routes(Fields::of(&body)?)?;
    match state.store.replace_routes(version, &routes, &actor).await? {
        RoutesOutcome::Replaced(version) => {
            let data = RoutesData::of(version, &routes);
            Ok(Success::new("Routes updated successfully", data))
        }
        RoutesOutcome::Stale => Err(ApiError::Conflict("Routes were changed meanwhile".to_owned())),
        RoutesOutcome::UnknownChannels(unknown) => {
            Err(ApiError::Validation(unknown_channels(&routes, &unknown)))
        }
    }
}

/// Each place at which a channel is named that there is not.
fn unknown_channels(routes: &[Route], unknown: &BTreeSet<i64>) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (place, route) in routes.iter().enumerate() {
        for (index, id) in route.channels.iter().enumerate() {
            if unknown.contains(id) {
                let field = format!("routes[{place}].channels[{index}]");
                let rule = "is the id of no channel";
                let code = ViolationCode::Conflict;
                violations.push(Violation::of(field, code, rule, Some((*id).into())));
            }
        }
    }
    violations.truncate(MOST_VIOLATIONS);
    violations
}

/// Reads all routes and the version that they replace, and names every wrong field.
fn read_routes(mut fields: Fields) -> Result<(i64, Vec<Route>), Vec<Violation>> {
    let version = match fields.take("version") {
        Some(value) if value.as_i64().is_some_and(|version| version >= 0) => value.as_i64(),
        Some(value) => {
            let rule = "must be the version of the routes that are replaced";
            fields.refuse("version", ViolationCode::Type, rule, Some(value));
            None
        }
        None => {
            fields.add(vec![Violation::required("version")]);
            None
        }
    };
    let mut routes = Vec::new();
    match fields.take("routes") {
        Some(Value::Array(items)) if items.len() > MOST_ROUTES => {
            let rule = format!("must contain less than or equal to {MOST_ROUTES} items");
            fields.refuse("routes", ViolationCode::Length, &rule, None);
        }
        Some(Value::Array(items)) => {
            for (place, item) in items.into_iter().enumerate() {
                match nested(item, read_route) {
                    Ok(route) => routes.extend(route),
                    Err(violations) => {
                        let place = format!("routes[{place}]");
                        let within = |violation: Violation| violation.within(&place);
                        fields.add(violations.into_iter().map(within).collect());
                    }
                }
            }
        }
        Some(value) => {
            fields.refuse("routes", ViolationCode::Type, "must be an array", Some(value));
        }
        None => fields.add(vec![Violation::required("routes")]),
    }
    let mut violations = fields.into_violations();
    match version {
        Some(version) if violations.is_empty() => Ok((version, routes)),
        _ => {
            violations.truncate(MOST_VIOLATIONS);
            Err(violations)
        }
    }
}

/// Reads an object. `Ok(None)` is none of its outcomes where `read` names what is wrong.
fn nested<T>(
    value: Value,
    read: impl FnOnce(&mut Fields) -> Option<T>,
) -> Result<Option<T>, Vec<Violation>> {
    let Value::Object(object) = value else {
        let rule = "must be of type object";
        return Err(vec![Violation::of_whole(ViolationCode::Type, rule, Some(value))]);
    };
    let mut fields = Fields::new(object);
    let read = read(&mut fields);
    let violations = fields.into_violations();
    if violations.is_empty() { Ok(read) } else { Err(violations) }
}

/// Reads the field that is an object; `None` when it is wrong.
fn object<T>(
    fields: &mut Fields,
    field: &'static str,
    read: impl FnOnce(&mut Fields) -> Option<T>,
) -> Option<Option<T>> {
    let value = fields.take(field).filter(|value| !value.is_null());
    let Some(value) = value else { return Some(None) };
    match nested(value, read) {
        Ok(read) => Some(read),
        Err(violations) => {
            let within = |violation: Violation| violation.within(field);
            fields.add(violations.into_iter().map(within).collect());
            None
        }
    }
}

fn read_route(fields: &mut Fields) -> Option<Route> {
    let matching = object(fields, "match", |fields| {
        let groups = list(fields, "groups", MOST_NAMES, "must be the name of a group", |group| {
            GroupName::new(group.as_str()?).ok().map(|name| name.as_str().to_owned())
        });
        let tags = list(fields, "tags", MOST_NAMES, "must be a tag", |tag| {
            let tag = tag.as_str()?;
            check_text(tag, MAX_TAG).is_ok().then(|| tag.to_owned())
        });
        let kinds = words(fields, "kinds", &INCIDENT_KINDS.map(|kind| (kind.as_str(), kind)));
        let scopes =
            words(fields, "scopes", &IncidentScope::ALL.map(|scope| (scope.as_str(), scope)));
        let severity = fields.nullable("severity_at_least", |text| {
            Severity::from_word(text).ok_or_else(|| one_of(&Severity::ALL.map(Severity::as_str)))
        });
        Some(RouteMatch {
            groups: groups?,
            tags: tags?,
            kinds: kinds?,
            scopes: scopes?,
            severity_at_least: severity.flatten().unwrap_or(Severity::Info),
        })
    });
    let most = MOST_CHANNELS as usize;
    let channels = match fields.take("channels") {
        None => {
            fields.add(vec![Violation::required("channels")]);
            None
        }
        Some(value) => {
            items(fields, "channels", value, most, "must be the id of a channel", |id| {
                id.as_i64().filter(|id| *id > 0)
            })
        }
    };
    let wait_seconds = number(fields, "wait_seconds", &WAIT_SECONDS);
    let interval_seconds = number(fields, "interval_seconds", &WAIT_SECONDS);
    let remind_seconds = number(fields, "remind_seconds", &REMIND_SECONDS);
    let digest = object(fields, "digest", read_digest);
    let stops = match fields.take("stop") {
        None | Some(Value::Null) => Some(false),
        Some(Value::Bool(stops)) => Some(stops),
        Some(value) => {
            fields.refuse("stop", ViolationCode::Type, "must be a boolean", Some(value));
            None
        }
    };
    Some(Route {
        matching: matching?.unwrap_or_else(everything),
        channels: channels?,
        wait_seconds: wait_seconds?.unwrap_or(Route::WAIT_SECONDS),
        interval_seconds: interval_seconds?.unwrap_or(Route::INTERVAL_SECONDS),
        remind_seconds: remind_seconds?,
        digest: digest?,
        stops: stops?,
    })
}

/// What a route matches that says nothing about it.
fn everything() -> RouteMatch {
    RouteMatch {
        groups: Vec::new(),
        tags: Vec::new(),
        kinds: Vec::new(),
        scopes: Vec::new(),
        severity_at_least: Severity::Info,
    }
}

fn read_digest(fields: &mut Fields) -> Option<RouteDigest> {
    let at = fields.required("at", |text| {
        let rule = || "must be a time of day such as 07:00, from 00:00 to 23:59".to_owned();
        time_of_day(text).ok_or_else(rule)
    });
    let days = words(fields, "days", &WEEKDAYS);
    let timezone = fields.required("timezone", |text| {
        time_zone(text)
            .map(|_| text.to_owned())
            .ok_or_else(|| "must be an IANA time zone".to_owned())
    });
    let mut days = days?;
    if days.is_empty() {
        days = WEEKDAYS.iter().map(|(_, day)| *day).collect();
    }
    Some(RouteDigest { at: at?, days, timezone: timezone? })
}

fn one_of(words: &[&str]) -> String {
    format!("must be one of [{}]", words.join(", "))
}

/// A list of some words. Null and a field that is left out are an empty list. `None` when it is wrong.
fn words<T: Copy>(fields: &mut Fields, field: &'static str, known: &[(&str, T)]) -> Option<Vec<T>> {
    let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
    list(fields, field, known.len(), &one_of(&names), |word| {
        let word = word.as_str()?;
        known.iter().find(|(name, _)| *name == word).map(|(_, value)| *value)
    })
}

/// A list. Null and a field that is left out are an empty one. `None` when it is wrong.
fn list<T>(
    fields: &mut Fields,
    field: &'static str,
    most: usize,
    rule: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Option<Vec<T>> {
    match fields.take(field) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(value) => items(fields, field, value, most, rule, read),
    }
}

/// The items of a list. `None` when it is wrong.
fn items<T>(
    fields: &mut Fields,
    field: &'static str,
    value: Value,
    most: usize,
    rule: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Option<Vec<T>> {
    let items = match value {
        Value::Array(items) if items.len() <= most => items,
        value => {
            let (code, rule) = match &value {
                Value::Array(_) => (
                    ViolationCode::Length,
                    format!("must contain less than or equal to {most} items"),
                ),
                _ => (ViolationCode::Type, "must be an array".to_owned()),
            };
            fields.refuse(field, code, &rule, Some(value));
            return None;
        }
    };
    let mut found = Vec::with_capacity(items.len());
    let mut violations = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        match read(&item) {
            Some(value) => found.push(value),
            None => {
                let field = format!("{field}[{index}]");
                violations.push(Violation::of(field, ViolationCode::Format, rule, Some(item)));
            }
        }
    }
    let is_right = violations.is_empty();
    fields.add(violations);
    is_right.then_some(found)
}

/// A whole number. Null and a field that is left out are none. `None` when it is wrong.
fn number(
    fields: &mut Fields,
    field: &'static str,
    range: &RangeInclusive<u32>,
) -> Option<Option<u32>> {
    let value = fields.take(field).filter(|value| !value.is_null());
    let Some(value) = value else { return Some(None) };
    let number = value.as_f64();
    let (code, rule) = match number {
        None => (ViolationCode::Type, "must be a number".to_owned()),
        Some(number) if number.fract() != 0.0 => {
            (ViolationCode::Type, "must be an integer".to_owned())
        }
        Some(number) if number < f64::from(*range.start()) => {
            let least = range.start();
            (ViolationCode::Range, format!("must be greater than or equal to {least}"))
        }
        Some(number) if number > f64::from(*range.end()) => {
            (ViolationCode::Range, format!("must be less than or equal to {}", range.end()))
        }
        // Within the range, and whole.
        Some(number) => return Some(Some(number as u32)),
    };
    fields.refuse(field, code, &rule, Some(value));
    None
}
