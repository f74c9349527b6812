//! Changes of what people set for the fleet, its groups, and its devices. The API and the command line call it, and both
//! stores implement it. Each method is one transaction, with its line in the audit log.
//!
//! A sweep learns from `fleet_changes` whom to evaluate again. So each change that may alter the evaluation of a device
//! counts up `fleet_state.version`, and leaves a row there. A change that alters nothing leaves a line in the audit log
//! alone.

use async_trait::async_trait;
use pisync_core::{
    DeviceId, GroupName, Timestamp,
    health::{Pause, Policy, PolicyChange, WindowTimes},
};
use serde_json::{Map, Value, json};

use super::{Actor, DeviceSettings, LevelSettings, StoreError, WindowEffect, WindowScope};

/// The most windows that there may be.
pub const MOST_WINDOWS: u32 = 1_000;

/// The most devices of a roster that is sent at once.
pub const MOST_ROSTER_ROWS: usize = 10_000;

/// Changes of what people set.
#[async_trait]
pub trait FleetChanges: Send + Sync {
    /// Changes what people say about a device; false when it is unknown.
    async fn update_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError>;

    /// The same, but an unknown device becomes known. Unless the change says otherwise, it is expected from now on; one of which
    /// somebody said that nothing is to be expected stays so, as every field does that is not named. True when it is new.
    async fn put_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError>;

    /// Does the same for many devices, none of which is named twice. All of them are expected from now on: a roster has no field
    /// by which it could say otherwise. A dry run changes nothing, and only tells what would change.
    async fn put_roster(
        &self,
        rows: &[RosterRow],
        is_dry_run: bool,
        by: &Actor,
    ) -> Result<RosterOutcome, StoreError>;

    /// Changes what is set for a group. False when nothing is said about the group, and no device is in it; then
    /// nothing is changed, unless `may_create`.
    async fn update_group(
        &self,
        name: &GroupName,
        change: &LevelChange,
        may_create: bool,
        by: &Actor,
    ) -> Result<bool, StoreError>;

    /// Forgets what is set for a group, and takes its devices out of it. Answers how many there were; `None` when
    /// nothing is said about the group, and no device is in it.
    async fn delete_group(&self, name: &GroupName, by: &Actor) -> Result<Option<u64>, StoreError>;

    /// Changes what is set for the whole fleet.
    async fn update_fleet(&self, change: &LevelChange, by: &Actor) -> Result<(), StoreError>;

    /// Adds a window, and answers its id; `None` when there are [`MOST_WINDOWS`] already.
    async fn create_window(
        &self,
        window: &NewWindow,
        by: &Actor,
    ) -> Result<Option<i64>, StoreError>;

    /// Replaces a window; false when it is unknown.
    async fn replace_window(
        &self,
        id: i64,
        window: &NewWindow,
        by: &Actor,
    ) -> Result<bool, StoreError>;

    /// Deletes a window; false when it is unknown.
    async fn delete_window(&self, id: i64, by: &Actor) -> Result<bool, StoreError>;
}

/// A device of a roster, and what is said about it.
#[derive(Debug, Clone)]
pub struct RosterRow {
    /// The device.
    pub device_id: DeviceId,
    /// What to change. It is expected from now on, unless this says otherwise.
    pub change: DeviceChange,
}

/// What a roster has changed, or would change: numbers of devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RosterOutcome {
    /// Those that were unknown.
    pub created: u64,
    /// Those about which something else is said now.
    pub updated: u64,
    /// Those about which the same was said before.
    pub unchanged: u64,
    /// Known devices that are not on the roster.
    pub not_listed: u64,
}

/// What to change about a device: `None` leaves a field alone, `Some(None)` empties it.
#[derive(Debug, Clone, Default)]
pub struct DeviceChange {
    /// The name that people gave it.
    pub name: Option<Option<String>>,
    /// Its group.
    pub group: Option<Option<GroupName>>,
    /// Its tags, in byte-wise order.
    pub tags: Option<Vec<String>>,
    /// What people noted about it.
    pub note: Option<Option<String>>,
    /// Its policy.
    pub policy: Option<PolicyUpdate>,
    /// Whether it is paused.
    pub pause: Option<PauseChange>,
    /// Whether the roster expects it: `Some(None)` takes back what was said about this.
    pub expected: Option<Option<bool>>,
}

/// What to change about the fleet or a group: `None` leaves a field alone.
#[derive(Debug, Clone, Default)]
pub struct LevelChange {
    /// Its policy.
    pub policy: Option<PolicyUpdate>,
    /// Whether it is paused.
    pub pause: Option<PauseChange>,
    /// What people noted about it; `Some(None)` empties it. The fleet has none.
    pub note: Option<Option<String>>,
}

/// How to change a policy.
#[derive(Debug, Clone)]
pub enum PolicyUpdate {
    /// Field by field.
    Merge(PolicyChange),
    /// As a whole.
    Replace(Policy),
}

impl PolicyUpdate {
    fn apply_to(&self, policy: &Policy) -> Policy {
        match self {
            Self::Merge(change) => change.apply_to(policy),
            Self::Replace(policy) => policy.clone(),
        }
    }

    /// As JSON, for the audit log.
    fn to_json(&self) -> Value {
        match self {
            Self::Merge(change) => change.to_json(),
            Self::Replace(policy) => policy.to_json(),
        }
    }
}

/// How to change a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseChange {
    /// Paused until then, or until somebody ends it.
    Until(Option<Timestamp>),
    /// Paused no longer.
    End,
}

impl PauseChange {
    /// The pause that `pause` becomes. One that is in force keeps its beginning; one that ends keeps its interval, because
    /// it still moves deadlines.
    fn apply_to(self, pause: Option<Pause>, now: Timestamp) -> Option<Pause> {
        let in_force = pause.filter(|pause| pause.is_on(now));
        match (self, in_force) {
            (Self::Until(until), Some(Pause { from, .. })) => Some(Pause { from, until }),
            (Self::Until(until), None) => Some(Pause { from: now, until }),
            (Self::End, Some(Pause { from, .. })) => Some(Pause { from, until: Some(now) }),
            (Self::End, None) => pause,
        }
    }

    /// As JSON, in the form in which it is sent.
    fn to_json(self) -> Value {
        match self {
            Self::Until(None) => json!(true),
            Self::Until(Some(until)) => json!(until),
            Self::End => json!(false),
        }
    }
}

/// A window to be stored.
#[derive(Debug, Clone)]
pub struct NewWindow {
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

impl NewWindow {
    /// The weekdays and times as they are stored.
    pub(super) fn weekly(&self) -> Option<String> {
        self.times.weekly.as_ref().map(|weekly| weekly.to_json().to_string())
    }

    /// The details of its line in the audit log.
    pub(super) fn details(&self) -> Value {
        json!({
            "name": self.name,
            "scope": self.scope.word(),
            "key": self.scope.key(),
            "effect": self.effect.as_str(),
            "timezone": self.timezone,
            "from": self.times.from,
            "until": self.times.until,
            "weekly": self.times.weekly.as_ref().map(pisync_core::health::Weekly::to_json),
        })
    }
}

/// Whom a sweep must evaluate again: a kind of scope, and the group, device or tag.
pub(super) type Changed = (&'static str, String);

/// The change of the whole fleet.
pub(super) fn fleet_changed() -> Changed {
    ("fleet", String::new())
}

/// The change of a group.
pub(super) fn group_changed(name: &str) -> Changed {
    ("group", name.to_owned())
}

/// The change of a device.
pub(super) fn device_changed(device_id: &str) -> Changed {
    ("device", device_id.to_owned())
}

/// The change of a window.
pub(super) fn window_changed(scope: &WindowScope) -> Changed {
    (scope.word(), scope.key().to_owned())
}

/// What is said about a device, as a change finds it and leaves it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct DeviceRecord {
    pub(super) name: Option<String>,
    pub(super) group: Option<String>,
    pub(super) settings: DeviceSettings,
}

impl DeviceRecord {
    /// What it becomes at `now`.
    pub(super) fn after(&self, change: &DeviceChange, now: Timestamp) -> Self {
        let mut after = self.clone();
        if let Some(name) = &change.name {
            after.name.clone_from(name);
        }
        if let Some(group) = &change.group {
            after.group = group.as_ref().map(ToString::to_string);
        }
        let settings = &mut after.settings;
        if let Some(tags) = &change.tags {
            settings.tags.clone_from(tags);
        }
        match change.expected {
            None => {}
            Some(Some(true)) => {
                settings.expected_from = settings.expected_from.or(Some(now));
                settings.is_excused = false;
            }
            Some(said) => {
                settings.expected_from = None;
                settings.is_excused = said.is_some();
            }
        }
        let level = LevelChange {
            policy: change.policy.clone(),
            pause: change.pause,
            note: change.note.clone(),
        };
        settings.level = level_after(&settings.level, &level, now);
        if self.moves_to(&after) {
            // Waiting begins anew by the rules of the other group.
            after.settings.level.policy_since = Some(now);
        }
        after
    }

    /// Whether it is in another group afterwards.
    pub(super) fn moves_to(&self, after: &Self) -> bool {
        self.group != after.group
    }

    /// Whether it may be evaluated otherwise afterwards. Names and notes are for people.
    pub(super) fn is_judged_otherwise(&self, after: &Self) -> bool {
        let mut likewise = self.clone();
        likewise.name.clone_from(&after.name);
        likewise.settings.level.note.clone_from(&after.settings.level.note);
        likewise != *after
    }

    /// The policy as it is stored.
    pub(super) fn policy(&self) -> String {
        self.settings.level.policy.to_json().to_string()
    }

    /// When its last pause began, and when it ends.
    pub(super) fn pause(&self) -> (Option<Timestamp>, Option<Timestamp>) {
        pause_times(self.settings.level.pause)
    }
}

/// The times of a pause as they are stored.
pub(super) fn pause_times(pause: Option<Pause>) -> (Option<Timestamp>, Option<Timestamp>) {
    (pause.map(|pause| pause.from), pause.and_then(|pause| pause.until))
}

/// What the settings of a level become at `now`.
pub(super) fn level_after(
    level: &LevelSettings,
    change: &LevelChange,
    now: Timestamp,
) -> LevelSettings {
    let mut after = level.clone();
    if let Some(update) = &change.policy {
        after.policy = update.apply_to(&level.policy);
        if after.policy != level.policy {
            after.policy_since = Some(now);
        }
    }
    if let Some(pause) = change.pause {
        after.pause = pause.apply_to(level.pause, now);
    }
    if let Some(note) = &change.note {
        after.note.clone_from(note);
    }
    after
}

/// Whether devices may be evaluated otherwise afterwards.
pub(super) fn is_level_judged_otherwise(before: &LevelSettings, after: &LevelSettings) -> bool {
    (&before.policy, before.policy_since, before.pause)
        != (&after.policy, after.policy_since, after.pause)
}

/// What the rows of a roster have become: before and after, or `None` before for a device that is new.
pub(super) fn outcome<'a>(
    rows: impl Iterator<Item = (Option<&'a DeviceRecord>, &'a DeviceRecord)>,
    known: u64,
) -> RosterOutcome {
    let mut outcome = RosterOutcome::default();
    let mut listed = 0;
    for (before, after) in rows {
        listed += 1;
        match before {
            None => outcome.created += 1,
            Some(before) if before == after => outcome.unchanged += 1,
            Some(_) => outcome.updated += 1,
        }
    }
    outcome.not_listed = known.saturating_sub(listed);
    outcome
}

impl DeviceChange {
    /// The same, with the device on the roster.
    pub(super) fn on_roster(&self) -> Self {
        Self { expected: self.expected.or(Some(Some(true))), ..self.clone() }
    }

    /// The same for a device that is put by itself: on the roster, unless somebody said before that nothing is to be expected of
    /// it. So a script that sets names and groups does not call back what was said.
    pub(super) fn put(&self, is_excused: bool) -> Self {
        if is_excused { self.clone() } else { self.on_roster() }
    }

    /// The details of its line in the audit log: the fields as they were sent.
    pub(super) fn details(&self) -> Value {
        let mut details = Map::new();
        let mut set = |field: &str, value: Option<Value>| {
            if let Some(value) = value {
                details.insert(field.to_owned(), value);
            }
        };
        set("name", self.name.as_ref().map(|name| json!(name)));
        set("group", self.group.as_ref().map(|group| json!(group)));
        set("tags", self.tags.as_ref().map(|tags| json!(tags)));
        set("note", self.note.as_ref().map(|note| json!(note)));
        set("policy", self.policy.as_ref().map(PolicyUpdate::to_json));
        set("paused", self.pause.map(PauseChange::to_json));
        set("expected", self.expected.map(|expected| json!(expected)));
        Value::Object(details)
    }
}

impl LevelChange {
    /// The details of its line in the audit log: the fields as they were sent.
    pub(super) fn details(&self) -> Value {
        let device = DeviceChange {
            policy: self.policy.clone(),
            pause: self.pause,
            note: self.note.clone(),
            ..DeviceChange::default()
        };
        device.details()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_millisecond(second * 1000).unwrap()
    }

    fn policy(value: &Value) -> PolicyChange {
        PolicyChange::read(value, "policy").unwrap()
    }

    #[test]
    fn a_pause_keeps_its_beginning_and_its_interval() {
        let until = |until| PauseChange::Until(until);
        let pause = |from, until| Some(Pause { from: at(from), until });
        for (before, change, after) in [
            (None, until(None), pause(10, None)),
            (None, until(Some(at(20))), pause(10, Some(at(20)))),
            (None, PauseChange::End, None),
            (pause(5, None), until(None), pause(5, None)),
            (pause(5, None), until(Some(at(20))), pause(5, Some(at(20)))),
            (pause(5, Some(at(30))), until(None), pause(5, None)),
            (pause(5, Some(at(30))), PauseChange::End, pause(5, Some(at(10)))),
            // It is over.
            (pause(5, Some(at(10))), PauseChange::End, pause(5, Some(at(10)))),
            (pause(5, Some(at(10))), until(None), pause(10, None)),
        ] {
            assert_eq!(change.apply_to(before, at(10)), after, "{before:?} {change:?}");
        }
    }

    #[test]
    fn the_roster_remembers_since_when() {
        let record = DeviceRecord::default();
        let expect = |record: &DeviceRecord, expected, second| {
            let change = DeviceChange { expected: Some(expected), ..DeviceChange::default() };
            record.after(&change, at(second))
        };
        let on = expect(&record, Some(true), 1);
        assert_eq!((on.settings.expected_from, on.settings.is_excused), (Some(at(1)), false));
        assert_eq!(expect(&on, Some(true), 2), on);
        let excused = expect(&on, Some(false), 3);
        assert_eq!((excused.settings.expected_from, excused.settings.is_excused), (None, true));
        let again = expect(&excused, Some(true), 4);
        assert_eq!((again.settings.expected_from, again.settings.is_excused), (Some(at(4)), false));
        assert_eq!(expect(&excused, None, 5), record);
    }

    #[test]
    fn what_is_put_is_expected_unless_somebody_said_otherwise() {
        let putting = |expected| DeviceChange { expected, ..DeviceChange::default() };
        for (said, is_excused, expected) in [
            (None, false, Some(Some(true))),
            (None, true, None),
            (Some(Some(true)), true, Some(Some(true))),
            (Some(Some(false)), false, Some(Some(false))),
            (Some(None), false, Some(None)),
            (Some(None), true, Some(None)),
        ] {
            assert_eq!(putting(said).put(is_excused).expected, expected, "{said:?} {is_excused}");
        }
    }

    #[test]
    fn waiting_begins_anew_only_when_the_rules_change() {
        let record = DeviceRecord::default();
        let change =
            |policy: PolicyUpdate| DeviceChange { policy: Some(policy), ..DeviceChange::default() };
        let grace = json!({"grace_seconds": 60, "recover_after": 2});
        let merged = record.after(&change(PolicyUpdate::Merge(policy(&grace))), at(1));
        assert_eq!(merged.settings.level.policy_since, Some(at(1)));
        // The same once more, and a null for what is not set.
        let same = json!({"grace_seconds": 60, "expect": null});
        let unchanged = merged.after(&change(PolicyUpdate::Merge(policy(&same))), at(2));
        assert_eq!(unchanged, merged);
        assert!(!merged.is_judged_otherwise(&unchanged));
        let replacement = Policy::read(&json!({"grace_seconds": 60}), "policy").unwrap();
        let replaced = merged.after(&change(PolicyUpdate::Replace(replacement)), at(3));
        assert_eq!(replaced.settings.level.policy.to_json(), json!({"grace_seconds": 60}));
        assert_eq!(replaced.settings.level.policy_since, Some(at(3)));
        let group = Some(Some(GroupName::new("school").unwrap()));
        let moved = replaced.after(&DeviceChange { group, ..DeviceChange::default() }, at(4));
        assert_eq!(moved.settings.level.policy_since, Some(at(4)));
        let named = DeviceChange {
            name: Some(Some("Library".to_owned())),
            note: Some(Some("behind the door".to_owned())),
            ..DeviceChange::default()
        };
        let named = moved.after(&named, at(5));
        assert_ne!(named, moved);
        assert!(!moved.is_judged_otherwise(&named));
    }
}
