//! What is set for devices, groups and the fleet, and how they are, as the API shows it. States and incidents are what the last
//! sweep has made of them. Nothing here evaluates anything.

use std::collections::HashMap;

use async_trait::async_trait;
use pisync_core::{
    DeviceId, GroupName, Timestamp,
    health::{EffectivePolicy, Pause, State},
};
use serde_json::Value;

use super::{DeviceSettings, FleetWindow, LevelSettings, Page, Pauses, StoreError};

/// How many outages are shown, the latest first.
pub(super) const SHOWN_OUTAGES: u32 = 20;

/// What the API shows. Each method sees one moment.
#[async_trait]
pub trait FleetViews: Send + Sync {
    /// What is set for devices, and how they are, by their ids. Unknown ones are missing.
    async fn device_views(
        &self,
        device_ids: &[String],
    ) -> Result<HashMap<String, DeviceView>, StoreError>;

    /// The same for one device, with what follows from its group and the fleet; `None` when it is unknown.
    async fn device_detail(
        &self,
        device_id: &DeviceId,
    ) -> Result<Option<DeviceDetailView>, StoreError>;

    /// One page of groups, in byte-wise order: those about which something is said, and those that have devices.
    async fn groups(&self, query: &GroupQuery) -> Result<Page<GroupView>, StoreError>;

    /// One group; `None` when nothing is said about it, and no device is in it.
    async fn group(&self, name: &GroupName) -> Result<Option<GroupView>, StoreError>;

    /// The devices that are in no group, as a group with the empty name.
    async fn ungrouped(&self) -> Result<GroupView, StoreError>;

    /// The whole fleet.
    async fn fleet(&self) -> Result<FleetView, StoreError>;

    /// All windows, by id.
    async fn windows(&self) -> Result<Vec<FleetWindow>, StoreError>;
}

/// What is set for a device, and how it is.
#[derive(Debug, Clone, Default)]
pub struct DeviceView {
    /// What is set for it.
    pub settings: DeviceSettings,
    /// How it is; `None` until it is evaluated for the first time.
    pub health: Option<HealthView>,
}

/// The state of a device.
#[derive(Debug, Clone)]
pub struct HealthView {
    /// The state.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// What is wrong, as a JSON array.
    pub problems: Value,
    /// When its next report is expected.
    pub next_due: Option<Timestamp>,
}

impl HealthView {
    /// The state as it is stored; `None` when foreign SQL made it something else.
    pub(super) fn stored(
        state: Option<&str>,
        since: Option<Timestamp>,
        problems: Option<&str>,
        next_due: Option<Timestamp>,
    ) -> Option<Self> {
        let problems = serde_json::from_str(problems?).ok().filter(Value::is_array);
        Some(Self {
            state: State::from_word(state?)?,
            since: since?,
            problems: problems.unwrap_or_else(|| Value::Array(Vec::new())),
            next_due,
        })
    }
}

/// One device, with what follows from its group and the fleet.
#[derive(Debug)]
pub struct DeviceDetailView {
    /// The device by itself.
    pub device: DeviceView,
    /// The last pauses of the device, its group, and the fleet.
    pub pauses: Pauses,
    /// The policy that applies to it.
    pub policy: EffectivePolicy,
    /// What is known of its jobs; `None` stands for reports that name none.
    pub jobs: HashMap<Option<String>, JobView>,
}

/// How a job of a device is.
#[derive(Debug, Clone, Copy, Default)]
pub struct JobView {
    /// Its state; `None` when nothing is to be said about it.
    pub state: Option<State>,
    /// Whether it is expected by name.
    pub is_expected: bool,
    /// When its next report is expected.
    pub next_due: Option<Timestamp>,
    /// When the latest of its runs began that are not over.
    pub run_started: Option<Timestamp>,
}

/// Which groups to list.
#[derive(Debug, Clone)]
pub struct GroupQuery {
    /// A part of the group's name. The case of ASCII letters does not matter.
    pub search: Option<String>,
    /// The most groups.
    pub limit: u32,
    /// How many to skip.
    pub offset: u64,
}

/// A group.
#[derive(Debug, Clone)]
pub struct GroupView {
    /// Its name.
    pub name: String,
    /// How many devices are in it.
    pub devices: u64,
    /// How many of them are in which state.
    pub states: StateCounts,
    /// How many of them are overdue.
    pub overdue: u64,
    /// How many incidents of the group and its devices are open.
    pub open_incidents: u64,
    /// What is set for it.
    pub level: LevelSettings,
    /// The last pause of the whole fleet.
    pub fleet_pause: Option<Pause>,
}

/// The whole fleet.
#[derive(Debug, Clone)]
pub struct FleetView {
    /// What is set for it.
    pub level: LevelSettings,
    /// How many devices are in which state.
    pub states: StateCounts,
    /// How many devices are overdue.
    pub overdue: u64,
    /// How many incidents are open.
    pub open_incidents: u64,
    /// When the last sweep began that went through.
    pub swept_at: Option<Timestamp>,
    /// When nobody could be heard, the latest first.
    pub outages: Vec<OutageView>,
}

/// A time in which nobody could be heard.
#[derive(Debug, Clone)]
pub struct OutageView {
    /// When it began.
    pub from: Timestamp,
    /// When it ended.
    pub until: Timestamp,
    /// Why.
    pub cause: String,
}

/// How many devices are in which state, in the order of [`State::ALL`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateCounts(pub [u64; State::ALL.len()]);

impl StateCounts {
    /// Reads states and numbers of devices. Words that stand for no state are left out.
    pub(super) fn of<'a>(counts: impl IntoIterator<Item = (&'a str, i64)>) -> Self {
        let mut found = Self::default();
        for (word, devices) in counts {
            let place = State::ALL.iter().position(|state| state.as_str() == word);
            if let Some(place) = place {
                // A number that a deletion is about to correct may be negative for a moment.
                found.0[place] += u64::try_from(devices).unwrap_or(0);
            }
        }
        found
    }

    /// Reads a JSON object of states and numbers of devices.
    pub(super) fn from_json(text: &str) -> Self {
        let counts: HashMap<String, i64> = serde_json::from_str(text).unwrap_or_default();
        Self::of(counts.iter().map(|(word, devices)| (word.as_str(), *devices)))
    }

    /// Each state with its number of devices.
    pub fn each(&self) -> impl Iterator<Item = (State, u64)> {
        State::ALL.into_iter().zip(self.0)
    }

    /// How many devices are in this state.
    #[must_use]
    pub fn count(&self, state: State) -> u64 {
        self.each().find(|(known, _)| *known == state).map_or(0, |(_, devices)| devices)
    }

    /// One line for people, such as `212 devices: 198 ok, 5 failing, 9 silent`. States without devices are left out.
    #[must_use]
    pub fn in_words(&self) -> String {
        let total: u64 = self.0.iter().sum();
        let states = State::ALL.into_iter().rev().filter(|state| self.count(*state) > 0);
        let words: Vec<_> =
            states.map(|state| format!("{} {}", self.count(state), state.as_str())).collect();
        match total {
            0 => "no device has been evaluated yet".to_owned(),
            1 => format!("1 device: {}", words.join(", ")),
            _ => format!("{total} devices: {}", words.join(", ")),
        }
    }
}
