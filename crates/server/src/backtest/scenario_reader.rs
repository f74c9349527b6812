//! Reads a scenario from JSON, and names everything that is wrong in it with its place: a misspelt field must not make a
//! scenario pass. The command line and tests call it. It knows what a scenario may say, and runs nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use axum::http::Uri;
use pisync_core::{
    DeviceId, GroupName, ParseError, SyncEvent, Timestamp, Violation, ViolationCode,
    event_fields::event_field,
    health::{IncidentScope, ProblemKind, Resolution, State},
    run_start::RunStart,
    sync_event::Arrival,
    text::{TextError, check_text, json_text},
};
use serde_json::{Map, Value};

use super::scenario::{
    Action, DatabaseStep, Expected, IncidentEntry, Instant, MessageEntry, MessageItem, Repeat,
    Report, Request, Scenario, ServerStep, StateEntry, Step,
};
use crate::{
    api::wire::fields::{Fields, text},
    store::{INCIDENT_KINDS, IncidentChange, ItemKind, MOST_CHANNELS},
};

/// The longest name of a scenario or a channel, in characters.
const MAX_NAME: usize = 100;

/// The longest sentence about a scenario, in characters.
const MAX_SENTENCE: usize = 1_000;

/// The longest path of a request, in characters.
const MAX_PATH: usize = 2_000;

/// The longest time between two repetitions, in seconds: a year.
const LONGEST_REPETITION: u64 = 365 * 24 * 60 * 60;

/// The most wrong places that are told.
const MOST_TOLD: usize = 100;

/// What a request may do.
const METHODS: [&str; 5] = ["GET", "POST", "PUT", "PATCH", "DELETE"];

/// What a step may be.
const ACTIONS: [&str; 6] = ["report", "batch", "start", "request", "server", "database"];

const CHANGES: [IncidentChange; 4] = [
    IncidentChange::Opened,
    IncidentChange::Reopened,
    IncidentChange::Flapping,
    IncidentChange::Resolved,
];

/// Why a text is no scenario.
#[derive(Debug)]
pub enum ScenarioError {
    /// It is not JSON, and where it stops being JSON.
    NotJson(String),
    /// These places are wrong.
    Wrong(Vec<Violation>),
}

impl fmt::Display for ScenarioError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotJson(how) => write!(formatter, "it is not JSON: {how}"),
            Self::Wrong(violations) => {
                let told: Vec<_> =
                    violations.iter().take(MOST_TOLD).map(|one| one.message.as_str()).collect();
                formatter.write_str(&told.join("\n  "))?;
                match violations.len() - told.len() {
                    0 => Ok(()),
                    more => write!(formatter, "\n  and {more} more"),
                }
            }
        }
    }
}

impl std::error::Error for ScenarioError {}

impl Scenario {
    /// Reads a scenario.
    ///
    /// # Errors
    /// Everything that is wrong in it.
    pub fn read(text: &[u8]) -> Result<Self, ScenarioError> {
        let text = json_text(text).map_err(ScenarioError::NotJson)?;
        let value = serde_json::from_str(text)
            .map_err(|error| ScenarioError::NotJson(error.to_string()))?;
        Self::from_value(value).map_err(ScenarioError::Wrong)
    }

    /// Reads a scenario from JSON that is read already.
    ///
    /// # Errors
    /// Everything that is wrong in it.
    pub fn from_value(value: Value) -> Result<Self, Vec<Violation>> {
        let Value::Object(object) = value else {
            let rule = "must be an object";
            return Err(vec![Violation::of_whole(ViolationCode::Type, rule, Some(value))]);
        };
        let mut fields = Fields::new(object);
        let read = scenario(&mut fields);
        let violations = fields.into_violations();
        match read {
            Some(read) if violations.is_empty() => Ok(read),
            _ => Err(violations),
        }
    }
}

/// Reads an event of which only what matters is given, as it is received at `at`.
pub(super) fn event(
    mut fields: Map<String, Value>,
    at: Timestamp,
) -> Result<SyncEvent, Vec<Violation>> {
    // The server ignores what it does not know. Here it is a mistake.
    let unknown = fields.iter().filter(|(name, _)| event_field(name).is_none());
    let mut violations: Vec<_> = unknown
        .map(|(name, value)| {
            let (code, sent) = (ViolationCode::UnknownField, Some(value.clone()));
            Violation::of(name.clone(), code, "is not allowed", sent)
        })
        .collect();
    fields.entry("timestamp").or_insert_with(|| at.to_string().into());
    fields.entry("total_files_synced").or_insert_with(|| 1.into());
    fields.entry("total_errors").or_insert_with(|| 0.into());
    let body = Value::Object(fields).to_string();
    match SyncEvent::from_json(body.as_bytes(), arrival(at)) {
        Ok(event) if violations.is_empty() => Ok(event),
        Ok(_) => Err(violations),
        Err(error) => {
            violations.extend(violations_of(error));
            Err(violations)
        }
    }
}

/// Reads a device's word that a run has begun.
pub(super) fn run_start(
    fields: &Map<String, Value>,
    at: Timestamp,
) -> Result<RunStart, Vec<Violation>> {
    let body = Value::Object(fields.clone()).to_string();
    RunStart::from_json(body.as_bytes(), arrival(at)).map_err(violations_of)
}

/// A scenario may have clocks that are ahead; what the server does with them is tested elsewhere.
fn arrival(at: Timestamp) -> Arrival {
    Arrival { received: at, latest: Timestamp::MAX }
}

fn violations_of(error: ParseError) -> Vec<Violation> {
    match error {
        ParseError::Invalid(violations) => violations,
        // It was made from JSON.
        ParseError::Malformed(why) => {
            vec![Violation::of_whole(ViolationCode::MalformedJson, &why, None)]
        }
    }
}

/// The time of a scenario, as far as it can be read.
#[derive(Clone, Copy)]
struct Span {
    start: Option<Timestamp>,
    end: Option<Timestamp>,
}

fn scenario(fields: &mut Fields) -> Option<Scenario> {
    let id = fields.required("id", text(MAX_NAME));
    let title = fields.required("title", text(MAX_SENTENCE));
    let from = fields.optional("from", text(MAX_SENTENCE));
    let start = fields.required("start", Timestamp::from_iso8601);
    let end = fields.required("end", Timestamp::from_iso8601);
    if let (Some(start), Some(end)) = (start, end)
        && end <= start
    {
        let sent = Some(Value::from(end.to_string()));
        fields.refuse("end", ViolationCode::Conflict, r#"must be after "start""#, sent);
    }
    let span = Span { start, end };
    let groups = groups(fields);
    let setup =
        list(fields, "setup", |value, place, violations| object(value, place, violations, request));
    let channels = names(fields, "channels", |name| check_text(name, MAX_NAME));
    if channels.len() > MOST_CHANNELS as usize {
        let rule = format!("must contain less than or equal to {MOST_CHANNELS} items");
        fields.refuse("channels", ViolationCode::Length, &rule, None);
    }
    let mut last = None;
    needed(fields, "steps");
    let steps = list(fields, "steps", |value, place, violations| {
        object(value, place, violations, |fields| step(fields, span, &mut last))
    });
    let expect = match fields.take("expect") {
        None => Some(Expected::default()),
        Some(value) => {
            let mut violations = Vec::new();
            let read = object(value, "expect", &mut violations, |fields| {
                Some(expected(fields, span, &channels))
            });
            fields.add(violations);
            read
        }
    };
    Some(Scenario {
        id: id?,
        title: title?,
        from: from.unwrap_or_default(),
        start: Instant(start?),
        end: Instant(end?),
        groups,
        setup,
        channels,
        steps,
        expect: expect?,
    })
}

fn check_device(name: &str) -> Result<(), TextError> {
    DeviceId::new(name).map(|_| ())
}

/// Refuses that a field is left out.
fn needed(fields: &mut Fields, field: &'static str) {
    if fields.get(field).is_none() {
        fields.add(vec![Violation::required(field)]);
    }
}

/// Refuses that a list is left out or empty.
fn filled(fields: &mut Fields, field: &'static str) {
    needed(fields, field);
    if fields.get(field).and_then(Value::as_array).is_some_and(Vec::is_empty) {
        let rule = "must contain at least 1 items";
        fields.refuse(field, ViolationCode::Length, rule, None);
    }
}

/// Reads an object at some place.
fn object<T>(
    value: Value,
    place: &str,
    violations: &mut Vec<Violation>,
    read: impl FnOnce(&mut Fields) -> Option<T>,
) -> Option<T> {
    let Value::Object(object) = value else {
        let rule = "must be an object";
        violations.push(Violation::of(place.to_owned(), ViolationCode::Type, rule, Some(value)));
        return None;
    };
    let mut fields = Fields::new(object);
    let read = read(&mut fields);
    let wrong = fields.into_violations().into_iter();
    violations.extend(wrong.map(|violation| violation.within(place)));
    read
}

/// Reads the items of a list that may be left out. `read` is told the place of each.
fn list<T>(
    fields: &mut Fields,
    field: &'static str,
    mut read: impl FnMut(Value, &str, &mut Vec<Violation>) -> Option<T>,
) -> Vec<T> {
    let mut violations = Vec::new();
    let items = match fields.take(field) {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(value) => {
            fields.refuse(field, ViolationCode::Type, "must be an array", Some(value));
            return Vec::new();
        }
    };
    let read = items
        .into_iter()
        .enumerate()
        .filter_map(|(index, item)| read(item, &format!("{field}[{index}]"), &mut violations));
    let read = read.collect();
    fields.add(violations);
    read
}

/// Reads a list of names, of which none may come twice.
fn names(
    fields: &mut Fields,
    field: &'static str,
    check: impl Fn(&str) -> Result<(), TextError>,
) -> Vec<String> {
    let mut seen = BTreeSet::new();
    list(fields, field, |value, place, violations| match name(value, place, &check, &mut seen) {
        Ok(name) => Some(name),
        Err(violation) => {
            violations.push(violation);
            None
        }
    })
}

/// Reads a name that must not be among those that were `seen`.
fn name(
    value: Value,
    place: &str,
    check: impl Fn(&str) -> Result<(), TextError>,
    seen: &mut BTreeSet<String>,
) -> Result<String, Violation> {
    let (code, rule) = match &value {
        Value::String(name) => match check(name) {
            Ok(()) if seen.insert(name.clone()) => return Ok(name.clone()),
            Ok(()) => (ViolationCode::Conflict, "must not be named twice".to_owned()),
            Err(error) => (error.code(), error.to_string()),
        },
        _ => (ViolationCode::Type, "must be a string".to_owned()),
    };
    Err(Violation::of(place.to_owned(), code, &rule, Some(value)))
}

/// Devices by group. No device is in two.
fn groups(fields: &mut Fields) -> BTreeMap<String, Vec<String>> {
    let mut groups = BTreeMap::new();
    let object = match fields.take("groups") {
        None => return groups,
        Some(Value::Object(object)) => object,
        Some(value) => {
            fields.refuse("groups", ViolationCode::Type, "must be an object", Some(value));
            return groups;
        }
    };
    let mut violations = Vec::new();
    let mut seen = BTreeSet::new();
    for (group, devices) in object {
        let place = format!("groups.{group}");
        if let Err(error) = GroupName::new(&group) {
            let rule = format!("is not the name of a group: it {error}");
            violations.push(Violation::of(place.clone(), error.code(), &rule, None));
        }
        let Value::Array(devices) = devices else {
            let rule = "must be an array";
            violations.push(Violation::of(place, ViolationCode::Type, rule, Some(devices)));
            continue;
        };
        let mut members = Vec::with_capacity(devices.len());
        for (index, device) in devices.into_iter().enumerate() {
            match name(device, &format!("{place}[{index}]"), check_device, &mut seen) {
                Ok(device) => members.push(device),
                Err(violation) => violations.push(violation),
            }
        }
        groups.insert(group, members);
    }
    fields.add(violations);
    groups
}

fn request(fields: &mut Fields) -> Option<Request> {
    let method = word(fields, "method", &METHODS);
    let path = fields.required("path", |path| {
        let is_path = path.starts_with('/') && path.parse::<Uri>().is_ok();
        if is_path && path.chars().count() <= MAX_PATH {
            Ok(path.to_owned())
        } else {
            Err("must be a path such as /api/device/a".to_owned())
        }
    });
    let body = fields.take("body");
    Some(Request { method: method?, path: path?, body })
}

/// One of some words that must be there.
fn word(fields: &mut Fields, field: &'static str, words: &[&str]) -> Option<String> {
    fields.required(field, |text| one_of(text, words))
}

fn one_of(text: &str, words: &[&str]) -> Result<String, String> {
    if words.contains(&text) {
        Ok(text.to_owned())
    } else {
        Err(format!("must be one of [{}]", words.join(", ")))
    }
}

/// A time that must be there and within the scenario.
fn instant(fields: &mut Fields, field: &'static str, span: Span) -> Option<Timestamp> {
    let at = fields.required(field, Timestamp::from_iso8601)?;
    let rule = match span {
        Span { start: Some(start), .. } if at < start => r#"must not be before "start""#,
        Span { end: Some(end), .. } if at > end => r#"must not be after "end""#,
        _ => return Some(at),
    };
    fields.refuse(field, ViolationCode::Range, rule, Some(at.to_string().into()));
    None
}

/// A step. `last` is the time of the one before.
fn step(fields: &mut Fields, span: Span, last: &mut Option<Timestamp>) -> Option<Step> {
    let at = instant(fields, "at", span);
    if let (Some(at), Some(last)) = (at, *last)
        && at < last
    {
        let rule = "must not be before that of the step before";
        fields.refuse("at", ViolationCode::Conflict, rule, Some(at.to_string().into()));
    }
    *last = at.or(*last);
    // What depends on the time is read as of any.
    let when = at.or(span.start).unwrap_or(Timestamp::MIN);
    let is_repeated = fields.get("repeat").is_some();
    let repeat = repeat(fields, span, at);
    let given: Vec<_> = ACTIONS.into_iter().filter(|action| fields.get(action).is_some()).collect();
    let [action] = given[..] else {
        for action in given {
            fields.take(action);
        }
        let rule = format!("must have one of [{}]", ACTIONS.join(", "));
        fields.add(vec![Violation::of_whole(ViolationCode::Conflict, &rule, None)]);
        return None;
    };
    let mut violations = Vec::new();
    let read = match action {
        "server" => word(fields, "server", &["stop", "start"]).map(|word| {
            Action::Server(if word == "stop" { ServerStep::Stop } else { ServerStep::Start })
        }),
        "database" => word(fields, "database", &["away", "back"]).map(|word| {
            Action::Database(if word == "away" { DatabaseStep::Away } else { DatabaseStep::Back })
        }),
        "batch" => {
            filled(fields, "batch");
            let batch = list(fields, "batch", |value, place, violations| {
                let fields = map(value, place, violations)?;
                check(event(fields.clone(), when), place, violations).then_some(fields)
            });
            Some(Action::Batch(batch))
        }
        _ => {
            let value = fields.take(action)?;
            match action {
                "report" => object(value, action, &mut violations, |fields| {
                    report(fields, when, is_repeated)
                })
                .map(Action::Report),
                "start" => map(value, action, &mut violations).and_then(|fields| {
                    let is_right = check(run_start(&fields, when), action, &mut violations);
                    is_right.then_some(Action::Start(fields))
                }),
                _ => object(value, action, &mut violations, request).map(Action::Request),
            }
        }
    };
    fields.add(violations);
    Some(Step { at: Instant(at?), action: read?, repeat: repeat? })
}

fn map(value: Value, place: &str, violations: &mut Vec<Violation>) -> Option<Map<String, Value>> {
    match value {
        Value::Object(fields) => Some(fields),
        value => {
            let (code, rule) = (ViolationCode::Type, "must be an object");
            violations.push(Violation::of(place.to_owned(), code, rule, Some(value)));
            None
        }
    }
}

/// Notes what is wrong with what a device sends; false when anything is.
fn check<T>(read: Result<T, Vec<Violation>>, place: &str, violations: &mut Vec<Violation>) -> bool {
    let Err(wrong) = read else { return true };
    violations.extend(wrong.into_iter().map(|violation| violation.within(place)));
    false
}

/// How a step is repeated. `None` when that is wrong, and `Some(None)` when it is not repeated.
fn repeat(fields: &mut Fields, span: Span, at: Option<Timestamp>) -> Option<Option<Repeat>> {
    let Some(value) = fields.take("repeat") else { return Some(None) };
    let mut violations = Vec::new();
    let read = object(value, "repeat", &mut violations, |fields| {
        let every_seconds = match fields.take("every_seconds") {
            None => {
                fields.add(vec![Violation::required("every_seconds")]);
                None
            }
            Some(value) => {
                let seconds =
                    value.as_u64().filter(|every| (1..=LONGEST_REPETITION).contains(every));
                let seconds = seconds.and_then(|every| u32::try_from(every).ok());
                if seconds.is_none() {
                    let rule = format!("must be a whole number from 1 to {LONGEST_REPETITION}");
                    fields.refuse("every_seconds", ViolationCode::Range, &rule, Some(value));
                }
                seconds
            }
        };
        let until = instant(fields, "until", span);
        if let (Some(at), Some(until)) = (at, until)
            && until < at
        {
            let sent = Some(until.to_string().into());
            fields.refuse("until", ViolationCode::Conflict, r#"must not be before "at""#, sent);
        }
        Some(Repeat { every_seconds: every_seconds?, until: Instant(until?) })
    });
    fields.add(violations);
    read.map(Some)
}

/// A report of some devices. `is_repeated` is whether the same comes again.
fn report(fields: &mut Fields, when: Timestamp, is_repeated: bool) -> Option<Report> {
    filled(fields, "device_ids");
    let device_ids = names(fields, "device_ids", check_device);
    let given = fields.take_rest();
    let mut sent = given.clone();
    if let Some(device) = sent.insert("device_id".to_owned(), "device".into()) {
        let rule = r#"is not allowed beside "device_ids""#;
        fields.refuse("device_id", ViolationCode::Conflict, rule, Some(device));
    }
    if is_repeated && let Some(event_id) = sent.get("event_id") {
        let rule = "is not allowed in what is repeated: the server would store it once";
        fields.refuse("event_id", ViolationCode::Conflict, rule, Some(event_id.clone()));
    }
    if let Err(violations) = event(sent, when) {
        fields.add(violations);
    }
    Some(Report { device_ids, event: given })
}

fn expected(fields: &mut Fields, span: Span, channels: &[String]) -> Expected {
    let states = list(fields, "states", |value, place, violations| {
        object(value, place, violations, |fields| state(fields, span))
    });
    let incidents = list(fields, "incidents", |value, place, violations| {
        object(value, place, violations, |fields| incident(fields, span))
    });
    let messages = list(fields, "messages", |value, place, violations| {
        object(value, place, violations, |fields| message(fields, span, channels))
    });
    Expected { states, incidents, messages }
}

fn state(fields: &mut Fields, span: Span) -> Option<StateEntry> {
    let at = instant(fields, "at", span);
    let (has_one, has_many) =
        (fields.get("device_id").is_some(), fields.get("device_ids").is_some());
    if has_one == has_many {
        let rule = r#"must have either "device_id" or "device_ids""#;
        fields.add(vec![Violation::of_whole(ViolationCode::Conflict, rule, None)]);
    }
    let mut device_id = None;
    if has_one {
        device_id = fields
            .required("device_id", |text| DeviceId::new(text).map(|device| device.to_string()));
    }
    let device_ids = names(fields, "device_ids", check_device);
    let state = word(fields, "state", &State::ALL.map(State::as_str));
    Some(StateEntry { at: Instant(at?), device_id, device_ids, state: state? })
}

fn incident(fields: &mut Fields, span: Span) -> Option<IncidentEntry> {
    let at = instant(fields, "at", span);
    let what = word(fields, "what", &CHANGES.map(IncidentChange::as_str));
    let (scope, subject, kind) = about(fields);
    let since = fields.optional("since", Timestamp::from_iso8601);
    let resolution = fields
        .optional("resolution", |text| one_of(text, &Resolution::ALL.map(Resolution::as_str)));
    if resolution.is_some() && what.as_deref().is_some_and(|what| what != "resolved") {
        let sent = resolution.clone().map(Value::from);
        fields.refuse("resolution", ViolationCode::Conflict, "is only for what is resolved", sent);
    }
    let members = match fields.take("members") {
        None => None,
        Some(value) => {
            let members = value.as_i64().filter(|members| *members >= 0);
            if members.is_none() {
                let rule = "must be a whole number from 0 on";
                fields.refuse("members", ViolationCode::Type, rule, Some(value));
            }
            members
        }
    };
    Some(IncidentEntry {
        at: Instant(at?),
        what: what?,
        scope: scope?,
        subject: subject?,
        kind: kind?,
        since: since.map(Instant),
        resolution,
        members,
    })
}

/// What an incident is about: its scope, its subject, and its kind.
fn about(fields: &mut Fields) -> (Option<String>, Option<String>, Option<String>) {
    (
        word(fields, "scope", &IncidentScope::ALL.map(IncidentScope::as_str)),
        fields.required("subject", |subject| match subject {
            // The devices in no group.
            "" => Ok(String::new()),
            _ => text(DeviceId::MAX_CHARACTERS)(subject),
        }),
        word(fields, "kind", &INCIDENT_KINDS.map(ProblemKind::as_str)),
    )
}

fn message(fields: &mut Fields, span: Span, channels: &[String]) -> Option<MessageEntry> {
    let at = instant(fields, "at", span);
    let channel = fields.required("channel", |name| {
        if channels.iter().any(|known| known == name) {
            Ok(name.to_owned())
        } else {
            Err(format!("must be one of \"channels\": [{}]", channels.join(", ")))
        }
    });
    needed(fields, "items");
    let items = list(fields, "items", |value, place, violations| {
        object(value, place, violations, |fields| {
            let event = word(fields, "event", &ItemKind::ALL.map(ItemKind::as_str));
            let (scope, subject, kind) = about(fields);
            Some(MessageItem { event: event?, scope: scope?, subject: subject?, kind: kind? })
        })
    });
    Some(MessageEntry { at: Instant(at?), channel: channel?, items })
}

#[cfg(test)]
mod tests;
