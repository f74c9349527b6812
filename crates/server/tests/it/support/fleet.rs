//! Rows of the fleet's health, written with SQL as the sweep would write them.

use pisync::store::Target;
use pisync_core::Timestamp;
use serde_json::{Value, json};

use super::{events::at, store::TestDatabase};

/// A time as the store writes it.
pub(crate) fn time(database: &TestDatabase, time: Timestamp) -> String {
    match database.target {
        Target::Sqlite(_) => time.as_millisecond().to_string(),
        Target::Postgres(_) => format!("timestamptz '{time}'"),
    }
}

fn optional_time(database: &TestDatabase, at: Option<Timestamp>) -> String {
    at.map_or_else(|| "null".to_owned(), |at| time(database, at))
}

fn flag(database: &TestDatabase, flag: bool) -> String {
    match database.target {
        Target::Sqlite(_) => i32::from(flag).to_string(),
        Target::Postgres(_) => flag.to_string(),
    }
}

/// An incident to be written.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) id: i64,
    pub(crate) scope: &'static str,
    pub(crate) subject: String,
    pub(crate) group: String,
    pub(crate) kind: &'static str,
    pub(crate) opened_at: Timestamp,
    pub(crate) resolved_at: Option<Timestamp>,
    pub(crate) flapping_since: Option<Timestamp>,
    pub(crate) summary: Value,
}

impl Row {
    /// An open incident: the group has been silent for a minute.
    pub(crate) fn of_group(id: i64, group: &str) -> Self {
        Self {
            id,
            scope: "group",
            subject: group.to_owned(),
            group: group.to_owned(),
            kind: "silent",
            opened_at: at(-60),
            resolved_at: None,
            flapping_since: None,
            summary: json!({
                "silent": 199, "presumed": 1, "judged": 200,
                "last_heard": at(-5_400).as_millisecond(),
            }),
        }
    }

    /// An open incident: too many runs of the device have failed.
    pub(crate) fn of_device(id: i64, device: &str, group: &str) -> Self {
        Self {
            scope: "device",
            subject: device.to_owned(),
            kind: "failing",
            summary: json!({"failing": 1, "judged": 1, "last_heard": null}),
            ..Self::of_group(id, group)
        }
    }

    pub(crate) fn resolved(self, at: Timestamp) -> Self {
        Self { resolved_at: Some(at), ..self }
    }

    pub(crate) fn sql(&self, database: &TestDatabase) -> String {
        let Self { id, scope, subject, group, kind, summary, .. } = self;
        let (opened_at, resolved_at, flapping_since) = (
            time(database, self.opened_at),
            optional_time(database, self.resolved_at),
            optional_time(database, self.flapping_since),
        );
        let resolution = if self.resolved_at.is_some() { "'recovered'" } else { "null" };
        format!(
            r#"insert into incidents (id, scope, subject, "group", kind, severity, since, opened_at, resolved_at, resolution, flapping_since, summary)
               values ({id}, '{scope}', '{subject}', '{group}', '{kind}', 'critical', {opened_at}, {opened_at}, {resolved_at}, {resolution}, {flapping_since}, '{summary}');
            "#
        )
    }
}

/// Writes a member of an incident.
pub(crate) fn member(
    database: &TestDatabase,
    incident: i64,
    device: &str,
    left_at: Option<Timestamp>,
    is_presumed: bool,
) -> String {
    let (joined_at, left_at) = (time(database, at(-60)), optional_time(database, left_at));
    let presumed = flag(database, is_presumed);
    format!(
        r#"insert into incident_members (incident, device_id, jobs, joined_at, left_at, presumed)
           values ({incident}, '{device}', '[null, "nightly"]', {joined_at}, {left_at}, {presumed});
        "#
    )
}

/// Writes an entry of a timeline.
pub(crate) fn entry(database: &TestDatabase, incident: i64, id: i64, what: &str) -> String {
    let at = time(database, at(-60));
    format!(
        r#"insert into incident_entries (incident, id, at, what, "by", details)
           values ({incident}, {id}, {at}, '{what}', null, '{{"devices": 199}}');
        "#
    )
}
