//! What people have set for the fleet, its groups, and its devices, as far as the state of devices depends on it. A sweep
//! reads it once, and evaluates all devices by it. Changes are in [`super::fleet_changes`].

use std::{borrow::Cow, collections::HashMap};

use async_trait::async_trait;
use pisync_core::{
    Timestamp,
    health::{
        Cause, EffectivePolicy, Exclusions, Interval, Level, Levels, Pause, Policy, Weekly,
        WindowTimes, time_zone,
    },
};
use serde_json::Value;

use super::{StoreError, routing::Routing};

/// Outages that ended before are of no interest to any deadline, in milliseconds: the longest interval and grace together,
/// and as much again.
pub(super) const OUTAGES_KEPT: i64 = 2 * (365 + 30) * 24 * 60 * 60 * 1000;

/// What people have set.
#[async_trait]
pub trait FleetSettingsStore: Send + Sync {
    /// What is set for the fleet, and for everything but single devices.
    async fn fleet_settings(&self) -> Result<FleetSettings, StoreError>;

    /// The number that every change of settings counts up.
    async fn fleet_version(&self) -> Result<i64, StoreError>;
}

/// What is set for the fleet, or for a group.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LevelSettings {
    /// Its policy.
    pub policy: Policy,
    /// When this was last changed.
    pub policy_since: Option<Timestamp>,
    /// Its last pause.
    pub pause: Option<Pause>,
    /// What people noted about it.
    pub note: Option<String>,
}

/// What is set for a device.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeviceSettings {
    /// Its policy, its pause, and the note.
    pub level: LevelSettings,
    /// Since when the roster expects it.
    pub expected_from: Option<Timestamp>,
    /// Whether nothing is to be expected of it.
    pub is_excused: bool,
    /// Its tags, in byte-wise order.
    pub tags: Vec<String>,
}

/// The last pauses of a device, its group, and the whole fleet, in force or not. A device is paused while any of them is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pauses {
    /// Its own.
    pub device: Option<Pause>,
    /// Its group's.
    pub group: Option<Pause>,
    /// The fleet's.
    pub fleet: Option<Pause>,
}

impl Pauses {
    /// Each of them, and whose it is.
    pub fn each(self) -> impl Iterator<Item = (Level, Pause)> {
        [(Level::Device, self.device), (Level::Group, self.group), (Level::Fleet, self.fleet)]
            .into_iter()
            .filter_map(|(level, pause)| pause.map(|pause| (level, pause)))
    }

    /// Those that are in force at `now`.
    pub fn in_force(self, now: Timestamp) -> impl Iterator<Item = (Level, Pause)> {
        self.each().filter(move |(_, pause)| pause.is_on(now))
    }

    /// The one in force that ends last.
    #[must_use]
    pub fn longest(self, now: Timestamp) -> Option<Pause> {
        let in_force = self.in_force(now).map(|(_, pause)| pause);
        in_force.max_by_key(|pause| pause.until.unwrap_or(Timestamp::MAX))
    }
}

/// What a window is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum WindowScope {
    /// Every device.
    Fleet,
    /// The devices of a group.
    Group(String),
    /// One device.
    Device(String),
    /// The devices with a tag.
    Tag(String),
}

impl WindowScope {
    /// The words for the kinds of scopes.
    pub const WORDS: [&'static str; 4] = ["fleet", "group", "device", "tag"];

    /// The scope that a word and a name stand for.
    #[must_use]
    pub fn new(word: &str, key: &str) -> Option<Self> {
        Some(match word {
            "fleet" => Self::Fleet,
            "group" => Self::Group(key.to_owned()),
            "device" => Self::Device(key.to_owned()),
            "tag" => Self::Tag(key.to_owned()),
            _ => return None,
        })
    }

    /// The word for its kind.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Fleet => "fleet",
            Self::Group(_) => "group",
            Self::Device(_) => "device",
            Self::Tag(_) => "tag",
        }
    }

    /// Which group, device, or tag it is; empty for the fleet.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Fleet => "",
            Self::Group(key) | Self::Device(key) | Self::Tag(key) => key,
        }
    }
}

/// What a window does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowEffect {
    /// Devices are not expected to report.
    Closed,
    /// They are judged, but nobody is told.
    Quiet,
}

impl WindowEffect {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Closed, Self::Quiet];

    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Quiet => "quiet",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|effect| effect.as_str() == word)
    }
}

/// A window as it is stored.
#[derive(Debug, Clone)]
pub struct FleetWindow {
    /// Its id.
    pub id: i64,
    /// What people call it.
    pub name: String,
    /// What it is for.
    pub scope: WindowScope,
    /// What it does.
    pub effect: WindowEffect,
    /// The IANA time zone, as it was given.
    pub timezone: String,
    /// When it is.
    pub times: WindowTimes,
}

/// The columns of a window as both stores keep them.
pub(super) struct WindowColumns {
    pub(super) id: i64,
    pub(super) name: String,
    pub(super) scope: String,
    pub(super) key: String,
    pub(super) effect: String,
    pub(super) timezone: String,
    pub(super) weekly: Option<String>,
    pub(super) starts_at: Option<Timestamp>,
    pub(super) ends_at: Option<Timestamp>,
}

impl WindowColumns {
    /// The window; `None` when foreign SQL made it something else.
    pub(super) fn window(self) -> Option<FleetWindow> {
        let weekly = match &self.weekly {
            Some(text) => Some(Weekly::from_json(&serde_json::from_str(text).ok()?)?),
            None => None,
        };
        Some(FleetWindow {
            id: self.id,
            name: self.name,
            scope: WindowScope::new(&self.scope, &self.key)?,
            effect: WindowEffect::from_word(&self.effect)?,
            times: WindowTimes {
                zone: time_zone(&self.timezone)?,
                from: self.starts_at,
                until: self.ends_at,
                weekly,
            },
            timezone: self.timezone,
        })
    }
}

/// The settings of a level as both stores keep them.
pub(super) fn level_settings(
    policy: &str,
    policy_since: Option<Timestamp>,
    (paused_from, paused_until): (Option<Timestamp>, Option<Timestamp>),
    note: Option<String>,
) -> LevelSettings {
    // Foreign SQL may have written text that is no JSON. Then nothing is set.
    let policy = serde_json::from_str(policy).unwrap_or(Value::Null);
    LevelSettings {
        policy: Policy::from_stored(&policy),
        policy_since,
        pause: paused_from.map(|from| Pause { from, until: paused_until }),
        note,
    }
}

/// What is set for the fleet, and for everything but single devices, at one moment.
#[derive(Debug)]
pub struct FleetSettings {
    /// The number of the last change.
    pub version: i64,
    /// What is set for the whole fleet.
    pub fleet: LevelSettings,
    /// What is set for groups.
    pub groups: HashMap<String, LevelSettings>,
    /// All windows, by id.
    pub windows: Vec<FleetWindow>,
    /// When nobody could be heard, in the order of time.
    pub outages: Vec<Interval>,
    /// How incidents reach people.
    pub(super) routing: Routing,
    /// The policies of groups, for devices that have none of their own.
    resolved: HashMap<String, EffectivePolicy>,
    /// That of devices in groups about which nothing is said.
    resolved_for_others: EffectivePolicy,
}

impl FleetSettings {
    pub(super) fn new(
        version: i64,
        fleet: LevelSettings,
        groups: HashMap<String, LevelSettings>,
        windows: Vec<FleetWindow>,
        outages: Vec<Interval>,
        routing: Routing,
    ) -> Self {
        let nothing = Policy::default();
        let of =
            |group: &Policy| Levels { device: &nothing, group, fleet: &fleet.policy }.resolve();
        let resolved =
            groups.iter().map(|(name, group)| (name.clone(), of(&group.policy))).collect();
        let resolved_for_others = of(&nothing);
        Self { version, fleet, groups, windows, outages, routing, resolved, resolved_for_others }
    }

    /// The policy that applies to a group as a whole, and to its devices that have none of their own.
    #[must_use]
    pub fn policy_of_group(&self, group: &str) -> &EffectivePolicy {
        self.resolved.get(group).unwrap_or(&self.resolved_for_others)
    }

    /// The policy that applies to a device.
    #[must_use]
    pub fn policy_of_device(
        &self,
        group: &str,
        settings: &DeviceSettings,
    ) -> Cow<'_, EffectivePolicy> {
        let device = &settings.level.policy;
        if device.is_empty() {
            return Cow::Borrowed(self.policy_of_group(group));
        }
        let nothing = Policy::default();
        let group = self.groups.get(group).map_or(&nothing, |group| &group.policy);
        Cow::Owned(Levels { device, group, fleet: &self.fleet.policy }.resolve())
    }

    /// Since when all that applies to a device's reports has been as it is.
    #[must_use]
    pub fn policy_since(&self, group: &str, settings: &DeviceSettings) -> Option<Timestamp> {
        let group = self.groups.get(group).and_then(|group| group.policy_since);
        settings.level.policy_since.max(group).max(self.fleet.policy_since)
    }

    /// The pauses of a device, its group, and the fleet, in force or not.
    #[must_use]
    pub fn pauses(&self, group: &str, settings: &DeviceSettings) -> Pauses {
        Pauses {
            device: settings.level.pause,
            group: self.groups.get(group).and_then(|group| group.pause),
            fleet: self.fleet.pause,
        }
    }

    /// Whether messages wait for the end of some window.
    #[must_use]
    pub fn has_quiet_windows(&self) -> bool {
        self.windows.iter().any(|window| window.effect == WindowEffect::Quiet)
    }

    /// The windows with an effect that are for a device.
    pub fn windows_of<'a>(
        &'a self,
        effect: WindowEffect,
        device_id: &'a str,
        group: &'a str,
        tags: &'a [String],
    ) -> impl Iterator<Item = &'a FleetWindow> {
        self.windows.iter().filter(move |window| {
            window.effect == effect
                && match &window.scope {
                    WindowScope::Fleet => true,
                    WindowScope::Group(key) => key == group,
                    WindowScope::Device(key) => key == device_id,
                    WindowScope::Tag(key) => tags.contains(key),
                }
        })
    }

    /// The time that does not count for a device.
    #[must_use]
    pub fn excluded<'a>(
        &'a self,
        device_id: &'a str,
        group: &'a str,
        settings: &'a DeviceSettings,
    ) -> ExcludedTime<'a> {
        let windows = self.windows_of(WindowEffect::Closed, device_id, group, &settings.tags);
        ExcludedTime {
            outages: &self.outages,
            pauses: self.pauses(group, settings),
            windows: windows.map(|window| &window.times).collect(),
        }
    }
}

/// The time that does not count for a device.
#[derive(Debug)]
pub struct ExcludedTime<'a> {
    /// In the order of time; none overlaps another.
    outages: &'a [Interval],
    pauses: Pauses,
    windows: Vec<&'a WindowTimes>,
}

impl Exclusions for ExcludedTime<'_> {
    fn touching(&self, span: Interval) -> Vec<(Cause, Interval)> {
        let touches =
            |interval: &Interval| interval.from <= span.until && span.from <= interval.until;
        let first = self.outages.partition_point(|outage| outage.until < span.from);
        let outages = self.outages[first..].iter().take_while(|outage| outage.from <= span.until);
        let pauses = self.pauses.each().map(|(_, pause)| pause.interval()).filter(touches);
        let windows = self.windows.iter().flat_map(|window| window.touching(span));
        outages
            .map(|outage| (Cause::Outage, *outage))
            .chain(pauses.map(|pause| (Cause::Pause, pause)))
            .chain(windows.map(|window| (Cause::ClosedWindow, window)))
            .collect()
    }
}
