//! Incidents: how they are listed, looked up and acknowledged. The API and `pisync incident` call it, and both stores
//! implement it. Only the sweep makes, changes and resolves incidents. A page must cost as much however many incidents
//! there are.

use async_trait::async_trait;
use pisync_core::{
    DeviceId, Timestamp,
    health::{IncidentScope, ProblemKind},
};
use serde_json::Value;

use super::{Actor, Count, GroupFilter, HistoryPosition, StoreError, Via, incident_steps::KINDS};

/// Incidents and members are counted up to this number.
pub(super) const COUNTED: u32 = 10_000;

/// The most entries of a timeline that are answered: the newest ones.
pub const TIMELINE: u32 = 1_000;

/// Incidents. Each method is one transaction.
#[async_trait]
pub trait Incidents: Send + Sync {
    /// One page of incidents, newest first: by `opened_at`, then by id.
    async fn incidents(&self, query: &IncidentQuery) -> Result<IncidentPage, StoreError>;

    /// An incident, with the page of its members that skips `offset` of them; `None` when unknown.
    async fn incident(
        &self,
        id: i64,
        limit: u32,
        offset: u64,
    ) -> Result<Option<IncidentDetail>, StoreError>;

    /// Acknowledges an open incident, or withdraws that with `None`. Adds an entry to its timeline and a line to the audit
    /// log. Nothing is written when there is nothing to withdraw.
    async fn acknowledge_incident(
        &self,
        id: i64,
        acknowledgement: Option<&NewAcknowledgement>,
        by: &Actor,
    ) -> Result<AcknowledgeOutcome, StoreError>;

    /// How many devices and incidents are in which state. It reads no device.
    async fn health_counts(&self) -> Result<HealthCounts, StoreError>;
}

/// Which incidents to list.
#[derive(Debug, Clone)]
pub struct IncidentQuery {
    /// Resolved ones instead of open ones.
    pub is_resolved: bool,
    /// Only of this kind.
    pub kind: Option<ProblemKind>,
    /// Only of this scope.
    pub scope: Option<IncidentScope>,
    /// Only this group's: about itself, or about one of its devices. Or only those about devices in no group.
    pub group: Option<GroupFilter>,
    /// Only this device's: about itself, or with it as a member. A member that has left an open incident does not count.
    pub device_id: Option<DeviceId>,
    /// Only those opened at this time or later.
    pub since: Option<Timestamp>,
    /// The maximum number of incidents.
    pub limit: u32,
    /// Only those behind this position.
    pub after: Option<HistoryPosition>,
}

/// The kinds of problems that are incidents.
pub const INCIDENT_KINDS: [ProblemKind; 2] = KINDS;

/// An incident as it is stored. Foreign SQL may have written it, so words are not taken for granted.
#[derive(Debug, Clone)]
pub struct Incident {
    /// Its number.
    pub id: i64,
    /// What it is about.
    pub scope: String,
    /// The device's id or the group's name; [`super::FLEET`] for the fleet.
    pub subject: String,
    /// What is wrong.
    pub kind: String,
    /// How bad that is.
    pub severity: String,
    /// Since when it is wrong.
    pub since: Timestamp,
    /// When the incident was first opened.
    pub opened_at: Timestamp,
    /// When it was resolved; `None` while it is open.
    pub resolved_at: Option<Timestamp>,
    /// Why it was resolved.
    pub resolution: Option<String>,
    /// The last acknowledgement, also one that is over.
    pub acknowledgement: Option<Acknowledgement>,
    /// How often it was opened again.
    pub reopened: i64,
    /// Since when it is opened too often.
    pub flapping_since: Option<Timestamp>,
    /// Figures about its devices: a JSON object.
    pub summary: Value,
}

impl Incident {
    /// Whether it is opened again and again.
    #[must_use]
    pub fn is_flapping(&self) -> bool {
        self.flapping_since.is_some() && self.resolved_at.is_none()
    }

    /// The acknowledgement that is in force at `now`.
    #[must_use]
    pub fn acknowledged(&self, now: Timestamp) -> Option<&Acknowledgement> {
        self.acknowledgement.as_ref().filter(|given| given.until.is_none_or(|until| until > now))
    }
}

/// Somebody's word that an incident is looked after.
#[derive(Debug, Clone)]
pub struct Acknowledgement {
    /// When it was given.
    pub at: Timestamp,
    /// By whom.
    pub by: String,
    /// The time from which on it does not count.
    pub until: Option<Timestamp>,
    /// What was said with it.
    pub note: Option<String>,
}

/// An acknowledgement to be given.
#[derive(Debug, Clone, Default)]
pub struct NewAcknowledgement {
    /// What is said with it.
    pub note: Option<String>,
    /// The time from which on it does not count.
    pub until: Option<Timestamp>,
}

/// What became of an acknowledgement.
#[derive(Debug)]
pub enum AcknowledgeOutcome {
    /// It was given or withdrawn. The incident as it is now.
    Done(Box<Incident>),
    /// The incident is resolved already.
    Resolved,
    /// There is no such incident.
    Unknown,
}

/// One page of incidents.
#[derive(Debug)]
pub struct IncidentPage {
    /// Newest first.
    pub incidents: Vec<Incident>,
    /// How many there are on all pages.
    pub total: Count,
    /// The last incident's position, when more follow.
    pub next: Option<HistoryPosition>,
}

/// An incident with its members and its timeline.
#[derive(Debug)]
pub struct IncidentDetail {
    /// The incident.
    pub incident: Incident,
    /// One page of its members, by device id.
    pub members: Vec<IncidentMember>,
    /// How many members there are.
    pub total_members: Count,
    /// The newest entries, at most [`TIMELINE`], oldest first.
    pub timeline: Vec<IncidentEntry>,
}

/// A device that an incident of a group or of the fleet is about.
#[derive(Debug)]
pub struct IncidentMember {
    /// The device.
    pub device_id: String,
    /// Those of its jobs that it is about: a JSON array.
    pub jobs: Value,
    /// When it joined.
    pub joined_at: Timestamp,
    /// When it left.
    pub left_at: Option<Timestamp>,
    /// Whether its report is only late.
    pub is_presumed: bool,
}

/// Something that happened to an incident.
#[derive(Debug)]
pub struct IncidentEntry {
    /// When.
    pub at: Timestamp,
    /// What: opened, joined, left, presumed, reopened, flapping, acknowledged, told, dropped or resolved.
    pub what: String,
    /// By whom; `None` when it was the server's doing.
    pub by: Option<String>,
    /// Details: a JSON object.
    pub details: Value,
}

/// How many devices and incidents are in which state, and how many messages wait.
#[derive(Debug, Default)]
pub struct HealthCounts {
    /// Devices by state.
    pub devices: Vec<(String, u64)>,
    /// Open incidents by kind and scope.
    pub incidents: Vec<(String, String, u64)>,
    /// When the last sweep began that was completed.
    pub swept_at: Option<Timestamp>,
    /// How many messages wait to be sent.
    pub waiting_notifications: u64,
}

/// The word for an actor in a timeline, given the name of the actor's key.
pub(super) fn name_of(by: &Actor, key_name: Option<String>) -> String {
    match by.via {
        Via::Key(id) => key_name.unwrap_or_else(|| format!("key {id}")),
        Via::Local | Via::Open | Via::CommandLine => by.via.as_str().to_owned(),
    }
}

/// The columns of an incident `i`.
pub(super) const INCIDENT_COLUMNS: &str = "
    i.id, i.scope, i.subject, i.kind, i.severity, i.since, i.opened_at, i.resolved_at, i.resolution,
    i.acknowledged_at, i.acknowledged_by, i.acknowledged_until, i.acknowledged_note, i.reopened,
    i.flapping_since, i.summary
";

/// What differs between the stores.
pub(super) struct Dialect {
    /// Begins the number of a parameter.
    pub(super) placeholder: char,
}

/// The numbers of the parameters of [`Dialect::page`] and [`Dialect::count`]. A query binds those that it has, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parameter {
    /// The most rows.
    Limit,
    /// Not opened before.
    Since,
    /// Opened before, or at the same time with a lower id.
    AfterTime,
    AfterId,
    Group,
    Device,
}

/// A statement, and what its parameters are.
#[derive(Debug)]
pub(super) struct Statement {
    pub(super) sql: String,
    pub(super) parameters: Vec<Parameter>,
}

impl Statement {
    fn bind(&mut self, dialect: &Dialect, parameter: Parameter) -> String {
        let place = self.parameters.iter().position(|known| *known == parameter);
        let place = place.unwrap_or_else(|| {
            self.parameters.push(parameter);
            self.parameters.len() - 1
        });
        format!("{}{}", dialect.placeholder, place + 1)
    }
}

impl Dialect {
    /// Selects a page's [`INCIDENT_COLUMNS`]. Scopes and kinds are few, so the indexes begin with them. A page is merged
    /// from the first rows of each.
    pub(super) fn page(&self, query: &IncidentQuery) -> Statement {
        let mut statement = Statement { sql: String::new(), parameters: Vec::new() };
        let limit = statement.bind(self, Parameter::Limit);
        let mut sources = Vec::new();
        for source in self.sources(query, &mut statement) {
            let mut behind = String::new();
            if query.after.is_some() {
                let time = statement.bind(self, Parameter::AfterTime);
                let id = statement.bind(self, Parameter::AfterId);
                behind = format!("and (i.opened_at, i.id) < ({time}, {id})");
            }
            sources.push(format!(
                "select {INCIDENT_COLUMNS} {source} {behind}
                  order by i.opened_at desc, i.id desc limit {limit}"
            ));
        }
        let sources = union(&sources);
        statement.sql = format!("{sources} order by opened_at desc, id desc limit {limit}");
        statement
    }

    /// Counts the incidents of all pages up to a limit.
    pub(super) fn count(&self, query: &IncidentQuery) -> Statement {
        let mut statement = Statement { sql: String::new(), parameters: Vec::new() };
        let limit = statement.bind(self, Parameter::Limit);
        let sources: Vec<_> = self
            .sources(query, &mut statement)
            .iter()
            .map(|source| format!("select 1 as one {source} limit {limit}"))
            .collect();
        statement.sql = format!("select count(*) from ({}) as counted", union(&sources));
        statement
    }

    /// What a query reads, each part through an index: `from` and `where`.
    fn sources(&self, query: &IncidentQuery, statement: &mut Statement) -> Vec<String> {
        let since = statement.bind(self, Parameter::Since);
        let state = if query.is_resolved { "is not null" } else { "is null" };
        let mut condition = format!("i.resolved_at {state} and i.opened_at >= {since}");
        if query.group.is_some() {
            let group = statement.bind(self, Parameter::Group);
            // A device leads to fewer incidents than its group: its index must be taken.
            let column =
                if query.device_id.is_some() { "'' || i.\"group\"" } else { "i.\"group\"" };
            condition.push_str(&format!(" and {column} = {group}"));
        }
        // Incidents of the fleet and of channels are of no group either, but not of devices in none.
        let has_group = |scope: &IncidentScope| {
            query.group.is_none() || matches!(scope, IncidentScope::Device | IncidentScope::Group)
        };
        let scopes: Vec<_> = IncidentScope::ALL
            .into_iter()
            .filter(|scope| query.scope.is_none_or(|wanted| wanted == *scope))
            .filter(has_group)
            .map(IncidentScope::as_str)
            .collect();
        let kinds: Vec<_> = INCIDENT_KINDS
            .into_iter()
            .filter(|kind| query.kind.is_none_or(|wanted| wanted == *kind))
            .map(ProblemKind::as_str)
            .collect();
        if scopes.is_empty() {
            return vec![format!("from incidents i where {condition} and 1 = 0")];
        }
        if query.device_id.is_none() {
            let pairs = scopes.iter().flat_map(|scope| kinds.iter().map(move |kind| (scope, kind)));
            return pairs
                .map(|(scope, kind)| {
                    format!(
                        "from incidents i where {condition} and i.scope = '{scope}' and i.kind = '{kind}'"
                    )
                })
                .collect();
        }
        let device = statement.bind(self, Parameter::Device);
        let mut sources = Vec::new();
        if scopes.contains(&IncidentScope::Device.as_str()) {
            sources.extend(kinds.iter().map(|kind| {
                format!(
                    "from incidents i
                    where {condition} and i.scope = 'device' and i.subject = {device} and i.kind = '{kind}'"
                )
            }));
        }
        // An incident that is opened again within six hours is the same one. So even in 400 days a device is a member of so
        // few that they can be sorted.
        let kinds = kinds.join("', '");
        let others: Vec<_> = scopes
            .iter()
            .filter(|scope| **scope != IncidentScope::Device.as_str())
            .copied()
            .collect();
        if !others.is_empty() {
            let others = others.join("', '");
            let is_there = if query.is_resolved { "" } else { "and m.left_at is null" };
            // The order of the tables is as it stands here on SQLite.
            sources.push(format!(
                "from incident_members m cross join incidents i
                where m.device_id = {device} {is_there} and i.id = m.incident
                  and {condition} and i.scope in ('{others}') and i.kind in ('{kinds}')"
            ));
        }
        sources
    }
}

fn union(sources: &[String]) -> String {
    let parts: Vec<_> = sources
        .iter()
        .enumerate()
        .map(|(number, source)| format!("select * from ({source}) as part_{number}"))
        .collect();
    parts.join(" union all ")
}

/// JSON as it was stored. Foreign SQL may have written text that is no JSON.
pub(super) fn stored_json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or(Value::Null)
}

/// Says whether an acknowledgement may be given or withdrawn.
pub(super) enum Standing {
    Unknown,
    Resolved,
    /// Open, with or without an acknowledgement in force.
    Open {
        is_acknowledged: bool,
    },
}

/// The details of an entry in the timeline and in the audit log.
pub(super) fn details_of(acknowledgement: Option<&NewAcknowledgement>) -> Value {
    match acknowledgement {
        Some(NewAcknowledgement { note, until }) => {
            let mut details = serde_json::Map::new();
            if let Some(note) = note {
                details.insert("note".to_owned(), note.as_str().into());
            }
            if let Some(until) = until {
                details.insert("until".to_owned(), until.to_string().into());
            }
            Value::Object(details)
        }
        None => serde_json::json!({ "withdrawn": true }),
    }
}
