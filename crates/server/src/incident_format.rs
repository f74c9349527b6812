//! How incidents are written, in answers of the API and by `pisync incident`. Both give the same fields the same names.

use pisync_core::{Timestamp, health::ProblemKind};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::store::{Acknowledgement, Incident, IncidentDetail, IncidentEntry, IncidentMember};

/// The longest note of an acknowledgement, in characters.
pub(crate) const MAX_NOTE: usize = 1_000;

/// Something that is wrong with a device, a group or the fleet.
#[derive(Serialize, ToSchema)]
pub(crate) struct IncidentData {
    #[schema(example = 812)]
    id: i64,
    #[schema(value_type = IncidentScopeName, example = "group")]
    scope: String,
    /// The device's id or the group's name; `fleet` for the fleet.
    #[schema(example = "school-17")]
    subject: String,
    #[schema(value_type = IncidentKindName, example = "silent")]
    kind: String,
    #[schema(value_type = SeverityName, example = "critical")]
    severity: String,
    #[schema(value_type = IncidentStateName, example = "open")]
    state: &'static str,
    /// Since when it is wrong. After a reopening, since when it is wrong again.
    #[schema(value_type = String, format = DateTime, example = "2026-03-02T10:30:00.000Z")]
    since: Timestamp,
    /// When the incident was first opened.
    #[schema(value_type = String, format = DateTime, example = "2026-03-02T10:30:00.000Z")]
    opened_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    resolved_at: Option<Timestamp>,
    /// Why it was resolved: `recovered`, `late_report`, `policy`, `paused`, `deleted`, `merged`.
    resolution: Option<String>,
    /// How often it was opened again.
    #[schema(example = 0)]
    reopened: i64,
    /// It was opened again so often that nobody is told any more until it is calm.
    flapping: bool,
    /// Who looks after it; null when nobody does.
    acknowledged: Option<AcknowledgedData>,
    devices: IncidentDevices,
    /// When the last of its devices was heard.
    #[schema(value_type = Option<String>, format = DateTime, example = "2026-03-02T09:00:10.000Z")]
    last_heard: Option<Timestamp>,
}

/// Somebody looks after an incident.
#[derive(Serialize, ToSchema)]
struct AcknowledgedData {
    #[schema(value_type = String, format = DateTime, example = "2026-03-02T10:35:00.000Z")]
    at: Timestamp,
    /// The name of the key that was used (`key 3` when it has none), or how the request was admitted without one.
    #[schema(example = "Ada")]
    by: String,
    /// From then on it does not count as acknowledged.
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    #[schema(example = "The power is off until noon")]
    note: Option<String>,
}

/// How many devices an incident is about.
#[derive(Serialize, ToSchema)]
struct IncidentDevices {
    /// Silent devices. Absent when the incident is about failing ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 199)]
    silent: Option<i64>,
    /// Devices whose reports are late, so that they are presumed to be silent. Absent when the incident is about failing
    /// ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 0)]
    presumed: Option<i64>,
    /// Failing devices. Absent when the incident is about silent ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    failing: Option<i64>,
    /// Devices of which a report was expected.
    #[schema(example = 200)]
    judged: i64,
}

impl IncidentDevices {
    fn of(incident: &Incident) -> Self {
        let count = |name: &str| incident.summary[name].as_i64().unwrap_or(0);
        let is_failing = incident.kind == ProblemKind::Failing.as_str();
        Self {
            silent: (!is_failing).then(|| count("silent")),
            presumed: (!is_failing).then(|| count("presumed")),
            failing: is_failing.then(|| count("failing")),
            judged: count("judged"),
        }
    }
}

impl IncidentData {
    /// The incident as it stands at `now`.
    pub(crate) fn new(incident: Incident, now: Timestamp) -> Self {
        let acknowledged = incident.acknowledged(now).cloned();
        let acknowledged = acknowledged.map(|Acknowledgement { at, by, until, note }| {
            AcknowledgedData { at, by, until, note }
        });
        let last_heard = incident.summary["last_heard"].as_i64();
        Self {
            flapping: incident.is_flapping(),
            devices: IncidentDevices::of(&incident),
            last_heard: last_heard.and_then(Timestamp::from_millisecond),
            state: if incident.resolved_at.is_some() { "resolved" } else { "open" },
            acknowledged,
            id: incident.id,
            scope: incident.scope,
            subject: incident.subject,
            kind: incident.kind,
            severity: incident.severity,
            since: incident.since,
            opened_at: incident.opened_at,
            resolved_at: incident.resolved_at,
            resolution: incident.resolution,
            reopened: incident.reopened,
        }
    }
}

/// An incident, one page of its members, and its timeline.
#[derive(Serialize, ToSchema)]
pub(crate) struct IncidentDetailData {
    #[serde(flatten)]
    incident: IncidentData,
    /// Devices that an incident of a group or of the fleet is about, by id. `pagination` says which part of them.
    members: Vec<MemberData>,
    /// What has happened, oldest first. Of a long one, the last 1,000 entries.
    timeline: Vec<EntryData>,
}

impl IncidentDetailData {
    /// The incident as it stands at `now`.
    pub(crate) fn new(detail: IncidentDetail, now: Timestamp) -> Self {
        Self {
            incident: IncidentData::new(detail.incident, now),
            members: detail.members.into_iter().map(MemberData::from).collect(),
            timeline: detail.timeline.into_iter().map(EntryData::from).collect(),
        }
    }
}

/// A device that an incident is about.
#[derive(Serialize, ToSchema)]
struct MemberData {
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// Those of its jobs that the incident is about.
    #[schema(value_type = Vec<Option<String>>)]
    jobs: Value,
    #[schema(value_type = String, format = DateTime)]
    joined_at: Timestamp,
    /// Null while it is a member.
    #[schema(value_type = Option<String>, format = DateTime)]
    left_at: Option<Timestamp>,
    /// Its report is only late.
    presumed: bool,
}

impl From<IncidentMember> for MemberData {
    fn from(member: IncidentMember) -> Self {
        Self {
            device_id: member.device_id,
            jobs: if member.jobs.is_array() { member.jobs } else { Value::Array(Vec::new()) },
            joined_at: member.joined_at,
            left_at: member.left_at,
            presumed: member.is_presumed,
        }
    }
}

/// Something that happened to an incident.
#[derive(Serialize, ToSchema)]
struct EntryData {
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    #[schema(value_type = EntryName, example = "opened")]
    what: String,
    /// Who did it; null when the server did.
    by: Option<String>,
    #[schema(value_type = Object)]
    details: Value,
}

impl From<IncidentEntry> for EntryData {
    fn from(entry: IncidentEntry) -> Self {
        let IncidentEntry { at, what, by, details } = entry;
        Self { at, what, by, details: Value::Object(shown_details(&details)) }
    }
}

/// The details of an entry as they are shown: times as texts. Foreign SQL may have made them something else.
pub(crate) fn shown_details(details: &Value) -> serde_json::Map<String, Value> {
    let mut shown = details.as_object().cloned().unwrap_or_default();
    if let Some(heard) = shown.get_mut("last_heard") {
        let at = heard.as_i64().and_then(Timestamp::from_millisecond);
        *heard = at.map_or(Value::Null, |at| at.to_string().into());
    }
    shown
}

/// Enums of the OpenAPI document.
macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($word:ident),+ $(,)? })+) => {$(
        $(#[$doc])*
        #[derive(ToSchema)]
        #[schema(rename_all = "lowercase")]
        #[expect(dead_code, reason = "describes answers and parameters, is never made")]
        pub(crate) enum $name { $($word),+ }
    )+};
}

words! {
    /// What an incident is about.
    IncidentScopeName { Device, Group, Fleet, Channel }
    /// What is wrong: reports do not come, or too many runs have failed.
    IncidentKindName { Silent, Failing }
    /// Whether an incident is over.
    IncidentStateName { Open, Resolved }
    /// How bad an incident is.
    SeverityName { Info, Warning, Critical }
    /// What happened to an incident.
    EntryName {
        Opened, Joined, Left, Presumed, Reopened, Flapping, Acknowledged, Told, Dropped, Resolved,
    }
}
