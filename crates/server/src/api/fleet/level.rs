//! What devices, groups and the fleet have alike: a policy, a pause, a note, and a number of devices in each state. The
//! resources read and show it with this.

use pisync_core::{
    Timestamp, Violation, ViolationCode,
    health::{Level, Policy, PolicyChange, check_end},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{PartialSchema, ToSchema, openapi};

use crate::{
    api::wire::fields::{Fields, text},
    store::{LevelChange, PauseChange, Pauses, PolicyUpdate, StateCounts},
};

/// The longest note, in characters.
const MAX_NOTE: usize = 1_000;

/// How a policy in a body is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Update {
    /// `PATCH`: field by field.
    Merge,
    /// `PUT`: it replaces the stored one.
    Replace,
}

/// The field `policy`.
pub(crate) fn policy(fields: &mut Fields, update: Update) -> Option<PolicyUpdate> {
    let value = fields.take("policy")?;
    if value.is_null() {
        return Some(PolicyUpdate::Replace(Policy::default()));
    }
    let read = match update {
        Update::Merge => PolicyChange::read(&value, "policy").map(PolicyUpdate::Merge),
        Update::Replace => Policy::read(&value, "policy").map(PolicyUpdate::Replace),
    };
    match read {
        Ok(update) => Some(update),
        Err(violations) => {
            fields.add(violations);
            None
        }
    }
}

/// The field `paused`: yes, no, or until a time after `now`, within 10 years.
pub(crate) fn paused(fields: &mut Fields, now: Timestamp) -> Option<PauseChange> {
    let value = fields.take("paused")?;
    let (code, rule) = match &value {
        Value::Null | Value::Bool(false) => return Some(PauseChange::End),
        Value::Bool(true) => return Some(PauseChange::Until(None)),
        Value::String(text) => match Timestamp::from_iso8601(text) {
            Ok(until) => match check_end(until, now) {
                Ok(()) => return Some(PauseChange::Until(Some(until))),
                Err(error) => (ViolationCode::Range, error.to_string()),
            },
            Err(error) => (error.code(), error.to_string()),
        },
        _ => (ViolationCode::Type, "must be true, false or a time in the future".to_owned()),
    };
    fields.refuse("paused", code, &rule, Some(value));
    None
}

/// The field `note`.
pub(crate) fn note(fields: &mut Fields) -> Option<Option<String>> {
    fields.nullable("note", text(MAX_NOTE))
}

/// The fields of a group.
pub(crate) fn group_change(
    mut fields: Fields,
    update: Update,
    now: Timestamp,
) -> Result<LevelChange, Vec<Violation>> {
    let change = LevelChange {
        policy: policy(&mut fields, update),
        pause: paused(&mut fields, now),
        note: note(&mut fields),
    };
    let violations = fields.into_violations();
    if violations.is_empty() { Ok(change) } else { Err(violations) }
}

/// The fields of the fleet.
pub(crate) fn fleet_change(
    mut fields: Fields,
    now: Timestamp,
) -> Result<LevelChange, Vec<Violation>> {
    let change = LevelChange {
        policy: policy(&mut fields, Update::Merge),
        pause: paused(&mut fields, now),
        note: None,
    };
    let violations = fields.into_violations();
    if violations.is_empty() { Ok(change) } else { Err(violations) }
}

/// Whether something is paused now.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct PauseData {
    /// Whether it is paused now, by itself or by what it belongs to.
    #[schema(example = false)]
    paused: bool,
    /// When the last of its pauses ends; null without one, and for one that somebody must end.
    #[schema(value_type = Option<String>, format = DateTime)]
    paused_until: Option<Timestamp>,
    /// Whose pauses are in force: its own, its group's, the fleet's. `paused` of each level ends its own pause alone.
    #[schema(value_type = Vec<PausedByName>)]
    paused_by: Vec<&'static str>,
}

impl PauseData {
    /// What is in force of several pauses at `now`.
    pub(crate) fn of(pauses: Pauses, now: Timestamp) -> Self {
        let longest = pauses.longest(now);
        Self {
            paused: longest.is_some(),
            paused_until: longest.and_then(|pause| pause.until),
            paused_by: pauses.in_force(now).map(|(level, _)| Level::as_str(level)).collect(),
        }
    }
}

/// Whose pause is in force.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum PausedByName {
    Device,
    Group,
    Fleet,
}

/// How many devices are in which state, as the last sweep has found them.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct ByStatus {
    paused: u64,
    /// On the roster, and never heard.
    never: u64,
    silent: u64,
    failing: u64,
    degraded: u64,
    #[schema(example = 198)]
    ok: u64,
}

impl From<StateCounts> for ByStatus {
    fn from(StateCounts([paused, never, silent, failing, degraded, ok]): StateCounts) -> Self {
        Self { paused, never, silent, failing, degraded, ok }
    }
}

/// The state of a device or a job, for the OpenAPI document.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StatusName {
    Never,
    Ok,
    Degraded,
    Failing,
    Silent,
    Paused,
}

/// `true`, `false`, or a time in the future, within 10 years.
pub(crate) struct Paused;

impl PartialSchema for Paused {
    fn schema() -> openapi::RefOr<openapi::schema::Schema> {
        one_of(&json!([
            {"type": ["boolean", "null"]},
            {"type": "string", "format": "date-time"},
        ]))
    }
}

impl ToSchema for Paused {}

/// A policy in a request: what is expected of reports. Every field is optional, and null inherits it.
pub(crate) struct PolicyBody;

impl PartialSchema for PolicyBody {
    fn schema() -> openapi::RefOr<openapi::schema::Schema> {
        let integer = |least: u32, most: u32| json!({"type": ["integer", "null"], "minimum": least, "maximum": most});
        let object = |properties: Value, required: Value| {
            json!({
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": false,
            })
        };
        let count = |most: u32| json!({"type": "integer", "minimum": 1, "maximum": most});
        let severity =
            json!({"type": ["string", "null"], "enum": ["info", "warning", "critical", null]});
        let expect = json!({"oneOf": [
            {"type": ["string", "null"], "enum": ["nothing", null]},
            object(json!({"every_seconds": {"type": "integer", "minimum": 60, "maximum": 31_536_000}}), json!(["every_seconds"])),
            object(
                json!({
                    "cron": {"type": "string", "maxLength": 200, "description": "Five fields: minute, hour, day, month, weekday."},
                    "timezone": {"type": "string", "maxLength": 200, "description": "An IANA time zone."},
                }),
                json!(["cron", "timezone"]),
            ),
        ]});
        let failing = json!({"oneOf": [
            {"type": "null"},
            object(json!({"in_a_row": count(100)}), json!(["in_a_row"])),
            object(json!({"failures": count(50), "of_last": count(50)}), json!(["failures", "of_last"])),
        ]});
        let mut rules = json!({
            "expect": expect,
            "grace_seconds": integer(0, 2_592_000),
            "failing": failing,
            "recover_after": integer(1, 20),
            "max_run_seconds": integer(60, 2_592_000),
        });
        let mut job = rules.clone();
        job["job"] = json!({
            "type": ["string", "null"],
            "minLength": 1,
            "maxLength": 100,
            "pattern": r"^[^\u0000-\u001F\u007F-\u009F]+$",
            "description": "Null for reports that name no job.",
        });
        let either = |inner: Value| json!({"oneOf": [{"type": "null"}, inner]});
        rules["first_report_seconds"] = integer(60, 31_536_000);
        rules["severity"] =
            either(object(json!({"silent": severity.clone(), "failing": severity}), json!([])));
        rules["group"] = either(object(
            json!({"at_least": integer(2, 100_000), "percent": integer(1, 100)}),
            json!([]),
        ));
        rules["jobs"] =
            either(json!({"type": "array", "maxItems": 20, "items": object(job, json!(["job"]))}));
        one_of(&json!([{"type": "null"}, object(rules, json!([]))]))
    }
}

impl ToSchema for PolicyBody {}

/// A schema that JSON describes.
pub(crate) fn one_of(schemas: &Value) -> openapi::RefOr<openapi::schema::Schema> {
    let schema = serde_json::from_value(json!({ "oneOf": schemas }));
    // It is a constant, and tests compare it with what is served.
    schema.unwrap_or_else(|_| openapi::ObjectBuilder::new().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_are_read_as_they_are_written() {
        for schema in [Paused::schema(), PolicyBody::schema()] {
            let schema = serde_json::to_value(schema).unwrap();
            assert!(schema["oneOf"].as_array().unwrap().len() > 1, "{schema}");
        }
    }
}
