//! A scenario: what a fleet and its operators do in some hours, and what must come of it. It is written as JSON, which
//! `scenario_reader` reads. `course` follows it, and what came is compared here with what was expected.

use std::collections::BTreeMap;

use pisync_core::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value};

/// What happens, and what must come of it.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// A short name.
    pub id: String,
    /// What it shows, as a sentence.
    pub title: String,
    /// Whose report it goes back to.
    pub from: String,
    /// When simulated time begins.
    pub start: Instant,
    /// When it ends.
    pub end: Instant,
    /// Devices that are known from the start, by group. Nothing is expected of them until they are heard.
    pub groups: BTreeMap<String, Vec<String>>,
    /// Requests before the start.
    pub setup: Vec<Request>,
    /// Webhooks, by name.
    pub channels: Vec<String>,
    /// What happens. Steps at the same instant run in this order.
    pub steps: Vec<Step>,
    /// What must come of it.
    pub expect: Expected,
}

/// An instant, written as an ISO 8601 time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(pub Timestamp);

impl Serialize for Instant {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// A request to the API.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its method.
    pub method: String,
    /// Its path.
    pub path: String,
    /// Its body, as JSON.
    pub body: Option<Value>,
}

/// Something that happens.
#[derive(Debug, Clone)]
pub struct Step {
    /// When.
    pub at: Instant,
    /// What.
    pub action: Action,
    /// The same again.
    pub repeat: Option<Repeat>,
}

/// What happens in a step.
#[derive(Debug, Clone)]
pub enum Action {
    /// Devices report.
    Report(Report),
    /// Devices report events of earlier times.
    Batch(Vec<Map<String, Value>>),
    /// A device starts a run. The fields are those that it sends.
    Start(Map<String, Value>),
    /// Somebody changes something.
    Request(Request),
    /// The server stops, or starts.
    Server(ServerStep),
    /// The database goes away, or is back.
    Database(DatabaseStep),
}

/// Reports of several devices at once.
#[derive(Debug, Clone)]
pub struct Report {
    /// The devices.
    pub device_ids: Vec<String>,
    /// The fields of the event, but for the device. Without a date it has that of the step.
    pub event: Map<String, Value>,
}

/// What becomes of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerStep {
    /// It stops.
    Stop,
    /// It starts.
    Start,
}

/// What becomes of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatabaseStep {
    /// It cannot be reached.
    Away,
    /// It can be reached again.
    Back,
}

/// How often a step is repeated.
#[derive(Debug, Clone, Copy)]
pub struct Repeat {
    /// The time between, in seconds.
    pub every_seconds: u32,
    /// The last time at which it may be.
    pub until: Instant,
}

/// What must come of a scenario, or what came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Expected {
    /// Devices that change their state.
    pub states: Vec<StateEntry>,
    /// What becomes of incidents.
    pub incidents: Vec<IncidentEntry>,
    /// What people are told.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<MessageEntry>,
}

/// A message that people get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MessageEntry {
    /// When it is sent.
    pub at: Instant,
    /// The name of the channel.
    pub channel: String,
    /// What it tells, in any order.
    pub items: Vec<MessageItem>,
}

/// What a message tells of an incident.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct MessageItem {
    /// What has happened: opened, reopened, reminder, flapping, resolved.
    pub event: String,
    /// What the incident is about: a device, a group, the fleet.
    pub scope: String,
    /// Which.
    pub subject: String,
    /// The problem.
    pub kind: String,
}

impl MessageEntry {
    /// The same, with what it tells in one order.
    fn sorted(&self) -> Self {
        let mut sorted = self.clone();
        sorted.items.sort();
        sorted
    }

    fn in_words(&self) -> String {
        let items = self.items.iter().map(|item| {
            let MessageItem { event, scope, subject, kind } = item;
            format!("{scope} {subject} ({kind}) {event}")
        });
        let items: Vec<_> = items.collect();
        format!("{} message to {}: {}", self.at.0, self.channel, items.join(", "))
    }
}

/// Devices that change their state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StateEntry {
    /// When.
    pub at: Instant,
    /// The device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// Several of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub device_ids: Vec<String>,
    /// The state that they are in from then on.
    pub state: String,
}

/// What becomes of an incident.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IncidentEntry {
    /// When.
    pub at: Instant,
    /// What: opened, reopened, flapping, resolved.
    pub what: String,
    /// What it is about: a device, a group, the fleet.
    pub scope: String,
    /// Which.
    pub subject: String,
    /// The problem.
    pub kind: String,
    /// Since when there is the problem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Instant>,
    /// Why it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<String>,
    /// How many devices have the problem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub members: Option<i64>,
}

impl Expected {
    /// What is expected and did not come, and what came and is not expected, in words. Of `came`, what is not given here does
    /// not count.
    #[must_use]
    pub fn differences(&self, came: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut states: Vec<_> = came.states.iter().flat_map(StateEntry::each).collect();
        for expected in self.states.iter().flat_map(StateEntry::each) {
            match states.iter().position(|state| *state == expected) {
                Some(found) => {
                    states.swap_remove(found);
                }
                None => differences.push(format!("missing: {}", in_words(&expected))),
            }
        }
        differences.extend(states.iter().map(|state| format!("not expected: {}", in_words(state))));
        let mut incidents: Vec<&IncidentEntry> = came.incidents.iter().collect();
        for expected in &self.incidents {
            match incidents.iter().position(|incident| expected.is_met_by(incident)) {
                Some(found) => {
                    incidents.swap_remove(found);
                }
                None => differences.push(format!("missing: {}", expected.in_words())),
            }
        }
        differences.extend(
            incidents.iter().map(|incident| format!("not expected: {}", incident.in_words())),
        );
        let mut messages: Vec<_> = came.messages.iter().map(MessageEntry::sorted).collect();
        for expected in self.messages.iter().map(MessageEntry::sorted) {
            match messages.iter().position(|message| *message == expected) {
                Some(found) => {
                    messages.swap_remove(found);
                }
                None => differences.push(format!("missing: {}", expected.in_words())),
            }
        }
        let unexpected = messages.iter().map(|one| format!("not expected: {}", one.in_words()));
        differences.extend(unexpected);
        differences
    }
}

fn in_words((at, device, state): &(Timestamp, &str, &str)) -> String {
    format!("{at} {device} is {state}")
}

impl StateEntry {
    fn each(&self) -> impl Iterator<Item = (Timestamp, &str, &str)> {
        let devices = self.device_id.iter().chain(&self.device_ids);
        devices.map(|device| (self.at.0, device.as_str(), self.state.as_str()))
    }
}

impl IncidentEntry {
    fn is_met_by(&self, came: &Self) -> bool {
        let key = |entry: &Self| {
            let Self { at, what, scope, subject, kind, .. } = entry;
            (*at, what.clone(), scope.clone(), subject.clone(), kind.clone())
        };
        key(self) == key(came)
            && self.since.is_none_or(|since| came.since == Some(since))
            && self.resolution.as_ref().is_none_or(|why| came.resolution.as_ref() == Some(why))
            && self.members.is_none_or(|members| came.members == Some(members))
    }

    fn in_words(&self) -> String {
        let Self { at, what, scope, subject, kind, since, resolution, members } = self;
        let mut words = format!("{} incident of {scope} {subject} ({kind}) {what}", at.0);
        if let Some(since) = since {
            words += &format!(", since {}", since.0);
        }
        if let Some(resolution) = resolution {
            words += &format!(", {resolution}");
        }
        if let Some(members) = members {
            words += &format!(", {members} devices");
        }
        words
    }
}
