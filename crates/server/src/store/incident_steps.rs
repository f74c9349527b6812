//! Makes incidents from the states of devices. A step reads the troubles of one group, or of the fleet, decides by the rules
//! of [`pisync_core::health::incident`], and writes, in one transaction: a crash in between repeats it. It goes by what is,
//! never by what has just happened, so that nothing depends on the order of steps.
//!
//! The fleet comes first, then the groups. An incident of the fleet or of a group takes over the devices that have the
//! problem: they are its members, and have no incident of their own.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use pisync_core::{
    Timestamp,
    health::{
        EffectivePolicy, IncidentScope, Level, Policy, ProblemKind, Reason, Resolution, Severity,
        State, Tally, Threshold,
        incident::{self, CALM_FOR, LEAST_LONG, REOPENED_WITHIN},
        resolve::Decided,
    },
};
use serde_json::{Value, json};

use super::{DeviceSettings, FleetSettings, LevelSettings, StoreError, health::KeptProblem};

/// How many devices a step takes up at a time.
pub(super) const DEVICES_AT_ONCE: i64 = 500;

/// How many devices an entry of a timeline names.
const NAMED_IN_ENTRY: usize = 20;

/// Where there are no channels, somebody counts as told of an incident after this time, in milliseconds: as long as a message
/// would wait for others.
const TOLD_AFTER: i64 = 60_000;

/// The subject of the fleet's incidents.
pub const FLEET: &str = "fleet";

/// The kinds of problems that are incidents.
pub(super) const KINDS: [ProblemKind; 2] = [ProblemKind::Silent, ProblemKind::Failing];

/// Makes incidents. Each step is one transaction.
#[async_trait]
pub trait IncidentSteps: Send + Sync {
    /// The groups whose incidents may differ from the states of their devices. The devices in no group are the group with the
    /// empty name.
    async fn groups_to_reconcile(&self, now: Timestamp) -> Result<Vec<String>, StoreError>;

    /// Makes the fleet's incidents match; `None` when another server is at it.
    async fn reconcile_fleet(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Vec<IncidentEvent>>, StoreError>;

    /// Makes the incidents of a group and its devices match, for some devices at a time; `None` when another server is at it.
    async fn reconcile_group(
        &self,
        group: &str,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Reconciled>, StoreError>;
}

/// What a step has done.
#[derive(Debug, Default)]
pub struct Reconciled {
    /// What became of incidents.
    pub events: Vec<IncidentEvent>,
    /// Whether devices are left for another step.
    pub has_more: bool,
}

/// Something that people would want to know about an incident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncidentEvent {
    /// The incident.
    pub id: i64,
    /// What happened.
    pub what: IncidentChange,
    /// What it is about.
    pub scope: IncidentScope,
    /// Which device or group.
    pub subject: String,
    /// The problem.
    pub kind: ProblemKind,
    /// How bad it is.
    pub severity: Severity,
    /// Since when there is the problem.
    pub since: Timestamp,
    /// Why it has ended.
    pub resolution: Option<Resolution>,
    /// How many devices have the problem.
    pub members: i64,
}

/// What happens to incidents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IncidentChange {
    /// It is new.
    Opened,
    /// It had ended, and is open again.
    Reopened,
    /// It is open again, as so often.
    Flapping,
    /// It has ended.
    Resolved,
}

impl IncidentChange {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Reopened => "reopened",
            Self::Flapping => "flapping",
            Self::Resolved => "resolved",
        }
    }
}

/// An incident as it is kept, but for what people say about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IncidentRow {
    /// `None` for one that is to be made.
    pub(super) id: Option<i64>,
    pub(super) scope: IncidentScope,
    pub(super) subject: String,
    pub(super) group: String,
    pub(super) kind: ProblemKind,
    pub(super) severity: Severity,
    pub(super) since: Timestamp,
    pub(super) opened_at: Timestamp,
    pub(super) resolved_at: Option<Timestamp>,
    pub(super) resolution: Option<String>,
    pub(super) reopened: i64,
    pub(super) reopenings: Vec<Timestamp>,
    pub(super) flapping_since: Option<Timestamp>,
    pub(super) calm_at: Option<Timestamp>,
    pub(super) next_at: Option<Timestamp>,
    pub(super) summary: Value,
    /// Whether a message has told of it.
    pub(super) is_told: bool,
}

/// The columns of an incident as both stores keep them.
pub(super) struct IncidentColumns {
    pub(super) id: i64,
    pub(super) scope: String,
    pub(super) subject: String,
    pub(super) group: String,
    pub(super) kind: String,
    pub(super) severity: String,
    pub(super) since: Timestamp,
    pub(super) opened_at: Timestamp,
    pub(super) resolved_at: Option<Timestamp>,
    pub(super) resolution: Option<String>,
    pub(super) reopened: i64,
    pub(super) reopenings: String,
    pub(super) flapping_since: Option<Timestamp>,
    pub(super) calm_at: Option<Timestamp>,
    pub(super) next_at: Option<Timestamp>,
    pub(super) summary: String,
    pub(super) is_told: bool,
}

/// The columns that [`IncidentColumns`] has, in its order.
pub(super) const INCIDENT_COLUMNS: &str = r#"
    id, scope, subject, "group", kind, severity, since, opened_at, resolved_at, resolution, reopened, reopenings,
    flapping_since, calm_at, next_at, summary,
    exists (select 1
              from notification_items t
              join notifications n on n.id = t.notification
             where t.incident = incidents.id and n.frozen_at is not null) as is_told
"#;

impl IncidentColumns {
    /// The incident; `None` when foreign SQL made it something else.
    pub(super) fn incident(self) -> Option<IncidentRow> {
        let reopenings: Vec<i64> = serde_json::from_str(&self.reopenings).unwrap_or_default();
        Some(IncidentRow {
            id: Some(self.id),
            scope: IncidentScope::from_word(&self.scope)?,
            subject: self.subject,
            group: self.group,
            kind: ProblemKind::from_word(&self.kind)?,
            severity: Severity::from_word(&self.severity)?,
            since: self.since,
            opened_at: self.opened_at,
            resolved_at: self.resolved_at,
            resolution: self.resolution,
            reopened: self.reopened,
            reopenings: reopenings.into_iter().filter_map(Timestamp::from_millisecond).collect(),
            flapping_since: self.flapping_since,
            calm_at: self.calm_at,
            next_at: self.next_at,
            summary: serde_json::from_str(&self.summary).unwrap_or_else(|_| json!({})),
            is_told: self.is_told,
        })
    }
}

impl IncidentRow {
    /// The reopenings as they are kept.
    pub(super) fn reopenings_json(&self) -> String {
        let reopenings = self.reopenings.iter().map(|at| at.as_millisecond());
        Value::from(reopenings.collect::<Vec<_>>()).to_string()
    }

    fn is_open(&self) -> bool {
        self.resolved_at.is_none()
    }

    /// When it opened, or was opened again the last time.
    fn last_opened_at(&self) -> Timestamp {
        self.reopenings.last().copied().unwrap_or(self.opened_at)
    }

    /// Whether anybody knows of it.
    fn is_told(&self, settings: &FleetSettings, now: Timestamp) -> bool {
        if !settings.routing.is_empty() {
            return self.is_told;
        }
        let opened_at = self.last_opened_at();
        now.as_millisecond() - opened_at.as_millisecond() >= TOLD_AFTER
    }
}

/// A device that has, or had, a problem.
#[derive(Debug, Clone)]
pub(super) struct TroubleRow {
    pub(super) device_id: String,
    /// What is kept of its state; `None` when it was deleted.
    pub(super) state: Option<TroubleState>,
}

/// What is kept of a device's state, as far as incidents depend on it.
#[derive(Debug, Clone)]
pub(super) struct TroubleState {
    pub(super) group: String,
    pub(super) state: String,
    pub(super) problems: Vec<KeptProblem>,
    pub(super) is_expected: bool,
    pub(super) patience: Option<i64>,
    pub(super) heard_at: Option<Timestamp>,
    /// Of each job its name, the latest date of a success, and when it was last received, as JSON.
    pub(super) reports: String,
    /// Its own policy, as JSON.
    pub(super) policy: String,
}

impl TroubleState {
    /// When jobs last succeeded, by their own dates, and when they were last received; `None` stands for all jobs.
    fn last_reports(&self, jobs: Option<&[String]>) -> (Option<Timestamp>, Option<Timestamp>) {
        let reports: Vec<(String, Option<i64>, Option<i64>)> =
            serde_json::from_str(&self.reports).unwrap_or_default();
        let wanted = || {
            reports
                .iter()
                .filter(|(job, ..)| jobs.is_none_or(|jobs| jobs.iter().any(|one| one == job)))
        };
        let success = wanted().filter_map(|(_, success, _)| *success).max();
        let received = wanted().filter_map(|(.., received)| *received).max();
        (
            success.and_then(Timestamp::from_millisecond),
            received.and_then(Timestamp::from_millisecond),
        )
    }
}

/// A device that an incident of many is no longer about.
#[derive(Debug)]
pub(super) struct GoneMember {
    pub(super) device: TroubleRow,
    pub(super) joined_at: Timestamp,
    /// The jobs for which it joined, as JSON.
    pub(super) jobs: String,
    pub(super) is_presumed: bool,
}

/// Which members of an incident tell why it ends: those that leave it now, and those that have left it since it became calm.
#[derive(Debug)]
pub(super) struct WantedMembers {
    pub(super) incident: i64,
    pub(super) kind: ProblemKind,
    /// The group that the incident is about; `None` for the fleet.
    pub(super) group: Option<String>,
    pub(super) left_since: Timestamp,
}

/// How many members are asked why an incident ends.
pub(super) const ASKED_MEMBERS: i64 = 500;

impl TroubleRow {
    /// The problems of a kind.
    fn problems(&self, kind: ProblemKind) -> impl Iterator<Item = &KeptProblem> {
        let problems = self.state.iter().flat_map(|state| &state.problems);
        problems.filter(move |problem| problem.kind == kind.as_str())
    }

    fn has(&self, kind: ProblemKind) -> bool {
        self.problems(kind).next().is_some()
    }

    fn since(&self, kind: ProblemKind) -> Option<Timestamp> {
        self.problems(kind).map(|problem| problem.since).min()
    }

    fn jobs(&self, kind: ProblemKind) -> Vec<String> {
        self.problems(kind).filter_map(|problem| problem.job.clone()).collect()
    }

    /// Whether it has had the problem for so long that it no longer counts for its group.
    fn is_long(&self, kind: ProblemKind, now: Timestamp) -> bool {
        let patience = self.state.as_ref().and_then(|state| state.patience);
        self.since(kind).is_some_and(|since| since < long_ago(patience, now))
    }
}

/// A problem that began before this no longer counts for a group.
pub(super) fn long_ago(patience: Option<i64>, now: Timestamp) -> Timestamp {
    now.saturating_add_milliseconds(-LEAST_LONG.max(patience.unwrap_or(0)))
}

/// What a step reads.
#[derive(Debug)]
pub(super) struct GroupFacts {
    /// The group.
    pub(super) group: String,
    /// The open incidents of the fleet, the group, and its devices.
    pub(super) open: Vec<IncidentRow>,
    /// Some devices of the group from whose state incidents are still to be made, and those whose incident is to be looked at.
    pub(super) devices: Vec<TroubleRow>,
    /// Whether there are more of the former.
    pub(super) has_more: bool,
    /// How the group is doing, for each of [`KINDS`].
    pub(super) tallies: [Tally; 2],
    /// The devices that are late and not silent.
    pub(super) late: Vec<String>,
    /// When the next device of the group will be late; known when `late` is.
    pub(super) next_late: Option<Timestamp>,
    /// When any device of the group was last heard; known when `late` is.
    pub(super) last_heard: Option<Timestamp>,
    /// The members of the group's open incidents that have not left: incident, device, whether it is presumed.
    pub(super) members: Vec<(i64, TroubleRow, bool)>,
    /// For each of [`KINDS`], how many devices have the problem since the group's open incident began.
    pub(super) missing: [i64; 2],
    /// Incidents of these devices and the group that ended within [`REOPENED_WITHIN`], the latest of each.
    pub(super) ended: Vec<IncidentRow>,
}

impl GroupFacts {
    /// Whether it must be known which devices are late: while the group has an incident about silence, or may get one.
    pub(super) fn needs_late(open: &[IncidentRow], devices: &[TroubleRow]) -> bool {
        let is_silent = |device: &TroubleRow| {
            device.state.as_ref().is_some_and(|one| one.state == State::Silent.as_str())
        };
        Self::of_group(open, ProblemKind::Silent).is_some() || devices.iter().any(is_silent)
    }

    /// The open incident of the group itself.
    pub(super) fn of_group(open: &[IncidentRow], kind: ProblemKind) -> Option<&IncidentRow> {
        open.iter().find(|one| one.scope == IncidentScope::Group && one.kind == kind)
    }

    /// Notes when a report of each device that is not silent is late.
    pub(super) fn note_late(&mut self, late: Vec<(String, Timestamp)>, now: Timestamp) {
        self.next_late =
            late.iter().map(|(_, late_at)| *late_at).filter(|late_at| *late_at > now).min();
        let late = late.into_iter().filter(|(_, late_at)| *late_at <= now);
        let last_heard = self.last_heard;
        for (device_id, late_at) in late {
            self.tallies[0].late += 1;
            if last_heard.is_some_and(|heard| late_at > heard) {
                self.tallies[0].late_in_dark += 1;
            }
            self.late.push(device_id);
        }
    }
}

/// A change of one incident.
#[derive(Debug)]
pub(super) struct IncidentWrite {
    pub(super) incident: IncidentRow,
    /// Devices that join, their jobs as JSON, and whether they are presumed.
    pub(super) joined: Vec<(String, String, bool)>,
    /// Devices that leave.
    pub(super) left: Vec<String>,
    /// What its timeline gains: what, and details.
    pub(super) entries: Vec<(&'static str, Value)>,
    pub(super) event: Option<IncidentChange>,
}

impl IncidentWrite {
    fn of(incident: IncidentRow) -> Self {
        Self { incident, joined: Vec::new(), left: Vec::new(), entries: Vec::new(), event: None }
    }

    /// Whether it changes anything.
    fn is_needed(&self, open: &[IncidentRow]) -> bool {
        !self.joined.is_empty()
            || !self.left.is_empty()
            || !self.entries.is_empty()
            || !open.contains(&self.incident)
    }

    /// Whom to ask why it ends; `None` when it does not, when that is known, or when it is about one device alone.
    pub(super) fn wanted_members(
        &self,
        open: &[IncidentRow],
        now: Timestamp,
    ) -> Option<WantedMembers> {
        let incident = &self.incident;
        let is_open_question = self.event == Some(IncidentChange::Resolved)
            && incident.resolution.as_deref() == Some(Resolution::Recovered.as_str());
        let group = match incident.scope {
            IncidentScope::Group if is_open_question => Some(incident.subject.clone()),
            IncidentScope::Fleet if is_open_question => None,
            _ => return None,
        };
        let before = open.iter().find(|one| one.id == incident.id)?;
        let calm_since = before.calm_at.map(|calm_at| {
            calm_at.saturating_add_milliseconds(-calm_for(before.flapping_since.is_some()))
        });
        Some(WantedMembers {
            incident: incident.id?,
            kind: incident.kind,
            group,
            left_since: calm_since.unwrap_or(now),
        })
    }

    /// Sets why it ends: for the reason of most of those that left it last. `has_devices` is whether any device is in its
    /// group.
    pub(super) fn ends_for(&mut self, gone: &[GoneMember], has_devices: bool) {
        let incident = &self.incident;
        let reasons: Vec<_> =
            gone.iter().filter_map(|member| why_gone(member, incident, has_devices)).collect();
        let count = |one: &Resolution| reasons.iter().filter(|reason| *reason == one).count();
        // Of equally many the first.
        let order = [
            Resolution::Recovered,
            Resolution::LateReport,
            Resolution::Paused,
            Resolution::Policy,
            Resolution::Deleted,
        ];
        let Some(most) = order.into_iter().rev().max_by_key(count).filter(|most| count(most) > 0)
        else {
            return;
        };
        let word = most.as_str();
        self.incident.resolution = Some(word.to_owned());
        for (what, details) in &mut self.entries {
            if *what == IncidentChange::Resolved.as_str() {
                *details = json!({ "resolution": word });
            }
        }
    }

    /// What people would want to know of it, once it has its id.
    pub(super) fn event(&self, id: i64) -> Option<IncidentEvent> {
        let incident = &self.incident;
        let count = |name: &str| incident.summary[name].as_i64().unwrap_or(0);
        Some(IncidentEvent {
            id,
            what: self.event?,
            scope: incident.scope,
            subject: incident.subject.clone(),
            kind: incident.kind,
            severity: incident.severity,
            since: incident.since,
            resolution: incident.resolution.as_deref().and_then(|word| {
                Resolution::ALL.into_iter().find(|resolution| resolution.as_str() == word)
            }),
            members: count(incident.kind.as_str()) + count("presumed"),
        })
    }
}

/// The incidents before a step, and what becomes of them.
struct Step<'a> {
    facts: &'a GroupFacts,
    settings: &'a FleetSettings,
    now: Timestamp,
    /// The members of the group's open incidents that have not left and are not only presumed: incident and device.
    members: HashSet<(i64, &'a str)>,
    /// By scope, subject and kind.
    writes: BTreeMap<(IncidentScope, String, ProblemKind), IncidentWrite>,
}

/// What a step of a group writes.
pub(super) fn group_writes(
    facts: &GroupFacts,
    settings: &FleetSettings,
    now: Timestamp,
) -> Vec<IncidentWrite> {
    let members = facts.members.iter().filter(|(.., presumed)| !presumed);
    let members = members.map(|(id, member, _)| (*id, member.device_id.as_str())).collect();
    let mut step = Step { facts, settings, now, members, writes: BTreeMap::new() };
    for (index, kind) in KINDS.into_iter().enumerate() {
        step.kind(index, kind);
    }
    step.writes.into_values().filter(|write| write.is_needed(&facts.open)).collect()
}

/// How the fleet is doing, for each of [`KINDS`], and its incidents.
#[derive(Debug)]
pub(super) struct FleetFacts {
    /// Its open incidents.
    pub(super) open: Vec<IncidentRow>,
    /// Those that have ended not long ago.
    pub(super) ended: Vec<IncidentRow>,
    pub(super) tallies: [Tally; 2],
    /// How many devices have the problem since the open incident began.
    pub(super) missing: [i64; 2],
    pub(super) last_heard: Option<Timestamp>,
    /// Whether devices have a new problem of the kind.
    pub(super) has_new: [bool; 2],
}

/// What a step of the fleet writes.
pub(super) fn fleet_writes(
    facts: &FleetFacts,
    settings: &FleetSettings,
    now: Timestamp,
) -> Vec<IncidentWrite> {
    let policy = settings.policy_of_group("");
    let threshold = Threshold::of_fleet(policy.group_percent.value);
    let mut writes = Vec::new();
    for (index, kind) in KINDS.into_iter().enumerate() {
        let tally = &facts.tallies[index];
        let (missing, late) = (facts.missing[index], tally.late);
        let open = facts.open.iter().find(|one| one.kind == kind);
        match open {
            Some(open) => {
                let silent = Summary { kind, count: missing, presumed: late, judged: tally.judged };
                let calm = Calm { missing: missing + late, at_risk: tally.at_risk(), threshold };
                let mut write = IncidentWrite::of(open.clone());
                write.incident.summary = silent.json(facts.last_heard);
                remember(&mut write, &open.summary, &threshold, BTreeSet::new());
                // Its members may come and go with every sweep.
                calm.end(&mut write, calm.resolution(&open.summary), now);
                if write.incident.is_open() {
                    write.incident.next_at = Some(now);
                } else {
                    // Whom it was about stays to be seen.
                    write.incident.summary = open.summary.clone();
                }
                writes.push(write);
            }
            None if facts.has_new[index] && incident::opens(kind, &threshold, tally) => {
                let ended = facts.ended.iter().find(|one| one.kind == kind);
                let new = NewIncident {
                    scope: IncidentScope::Fleet,
                    subject: FLEET,
                    group: "",
                    kind,
                    severity: severity_of_all(kind, policy),
                    since: tally.since.unwrap_or(now),
                };
                let mut write = new.open(ended, now);
                let silent =
                    Summary { kind, count: tally.in_problem, presumed: late, judged: tally.judged };
                write.incident.summary = silent.json(facts.last_heard);
                write.incident.next_at = Some(now);
                write.entries.push((word(&write), write.incident.summary.clone()));
                remember(&mut write, &Value::Null, &threshold, BTreeSet::new());
                writes.push(write);
            }
            None => {}
        }
    }
    writes
}

/// What becomes of the incidents about channels. `channels` are those that are enabled, and since when each has failed that has
/// done so for long.
pub(super) fn channel_writes(
    open: &[IncidentRow],
    channels: &[(String, Option<Timestamp>)],
    now: Timestamp,
) -> Vec<IncidentWrite> {
    let mut writes = Vec::new();
    for (name, failing_since) in channels {
        let Some(since) = *failing_since else { continue };
        if open.iter().any(|one| one.subject == *name) {
            continue;
        }
        let new = NewIncident {
            scope: IncidentScope::Channel,
            subject: name,
            group: "",
            kind: ProblemKind::Failing,
            severity: Severity::Critical,
            since,
        };
        let mut write = new.open(None, now);
        let summary = Summary { kind: ProblemKind::Failing, count: 1, presumed: 0, judged: 1 };
        write.incident.summary = summary.json(None);
        write.entries.push((word(&write), write.incident.summary.clone()));
        writes.push(write);
    }
    for incident in open {
        let channel = channels.iter().find(|(name, _)| *name == incident.subject);
        let resolution = match channel {
            Some((_, Some(_))) => continue,
            Some((_, None)) => Resolution::Recovered,
            None => Resolution::Deleted,
        };
        let mut write = IncidentWrite::of(incident.clone());
        resolve(&mut write, resolution, now);
        writes.push(write);
    }
    writes
}

/// The word for what happened to an incident, in its timeline.
fn word(write: &IncidentWrite) -> &'static str {
    write.event.unwrap_or(IncidentChange::Opened).as_str()
}

/// How bad an incident of a group or the fleet is: critical, unless somebody says otherwise.
fn severity_of_all(kind: ProblemKind, policy: &EffectivePolicy) -> Severity {
    let Decided { value, from } = severity(kind, policy);
    if from == Level::BuiltIn { Severity::Critical } else { value }
}

fn severity(kind: ProblemKind, policy: &EffectivePolicy) -> Decided<Severity> {
    match kind {
        ProblemKind::Silent => policy.silent,
        ProblemKind::Failing | ProblemKind::Degraded => policy.failing,
    }
}

/// The figures of an incident of many devices.
struct Summary {
    kind: ProblemKind,
    count: i64,
    presumed: i64,
    judged: i64,
}

impl Summary {
    fn json(&self, last_heard: Option<Timestamp>) -> Value {
        json!({
            self.kind.as_str(): self.count,
            "presumed": self.presumed,
            "judged": self.judged,
            "last_heard": last_heard.map(Timestamp::as_millisecond),
        })
    }
}

/// Whether an incident of many devices ends.
struct Calm {
    missing: i64,
    at_risk: i64,
    threshold: Threshold,
}

/// For how long it must be calm before an incident of many ends, in milliseconds.
fn calm_for(is_flapping: bool) -> i64 {
    if is_flapping { incident::calm_of_flapping(None) } else { CALM_FOR }
}

/// Notes with an incident of many what its end depends on: the share of devices at which it opened, and why its devices fail.
fn remember(
    write: &mut IncidentWrite,
    before: &Value,
    threshold: &Threshold,
    mut reasons: BTreeSet<String>,
) {
    let summary = &mut write.incident.summary;
    summary["percent"] = json!(percent_at_opening(before).unwrap_or(threshold.percent));
    reasons.extend(texts(&before["reasons"]));
    if !reasons.is_empty() {
        summary["reasons"] = json!(reasons);
    }
}

fn percent_at_opening(summary: &Value) -> Option<u32> {
    summary["percent"].as_u64().and_then(|percent| u32::try_from(percent).ok())
}

/// The texts of a JSON array.
fn texts(value: &Value) -> impl Iterator<Item = String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned)
}

impl Calm {
    /// Why it ends: because somebody raised the share of devices, if by the share at which it opened it would go on. Otherwise
    /// its devices tell.
    fn resolution(&self, summary: &Value) -> Resolution {
        let percent = percent_at_opening(summary).unwrap_or(self.threshold.percent);
        let at_opening = Threshold { percent, ..self.threshold };
        let would_go_on =
            self.missing > 0 && !incident::is_calm(&at_opening, self.missing, self.at_risk);
        if would_go_on { Resolution::Policy } else { Resolution::Recovered }
    }

    /// Ends it at once when nobody is missing, and after a while when few enough are.
    fn end(&self, write: &mut IncidentWrite, resolution: Resolution, now: Timestamp) {
        let incident = &mut write.incident;
        let is_flapping = incident.flapping_since.is_some();
        let is_over = self.missing == 0 && !is_flapping;
        if !is_over && !incident::is_calm(&self.threshold, self.missing, self.at_risk) {
            incident.calm_at = None;
            return;
        }
        let wait = calm_for(is_flapping);
        let calm_at = incident.calm_at.unwrap_or(now.saturating_add_milliseconds(wait));
        incident.calm_at = Some(calm_at);
        if is_over || calm_at <= now {
            resolve(write, resolution, now);
        }
    }
}

fn resolve(write: &mut IncidentWrite, resolution: Resolution, now: Timestamp) {
    let incident = &mut write.incident;
    incident.resolved_at = Some(now);
    incident.resolution = Some(resolution.as_str().to_owned());
    (incident.calm_at, incident.next_at, incident.flapping_since) = (None, None, None);
    write.entries.push(("resolved", json!({ "resolution": resolution.as_str() })));
    write.event = Some(IncidentChange::Resolved);
}

/// An incident that is to be opened, or opened again.
struct NewIncident<'a> {
    scope: IncidentScope,
    subject: &'a str,
    group: &'a str,
    kind: ProblemKind,
    severity: Severity,
    since: Timestamp,
}

impl NewIncident<'_> {
    /// Opens the one that ended not long ago, or else a new one.
    fn open(&self, ended: Option<&IncidentRow>, now: Timestamp) -> IncidentWrite {
        let mut write = match ended {
            Some(ended) => {
                let is_flapping = incident::is_flapping(&ended.reopenings, now);
                let mut reopenings: Vec<_> = incident::recent(&ended.reopenings, now).collect();
                reopenings.push(now);
                let mut write = IncidentWrite::of(IncidentRow {
                    resolved_at: None,
                    resolution: None,
                    reopened: ended.reopened + 1,
                    reopenings,
                    flapping_since: is_flapping.then_some(now),
                    calm_at: None,
                    next_at: None,
                    ..ended.clone()
                });
                write.event = Some(if is_flapping {
                    IncidentChange::Flapping
                } else {
                    IncidentChange::Reopened
                });
                write
            }
            None => {
                let mut write = IncidentWrite::of(IncidentRow {
                    id: None,
                    scope: self.scope,
                    subject: self.subject.to_owned(),
                    group: String::new(),
                    kind: self.kind,
                    severity: self.severity,
                    since: self.since,
                    opened_at: now,
                    resolved_at: None,
                    resolution: None,
                    reopened: 0,
                    reopenings: Vec::new(),
                    flapping_since: None,
                    calm_at: None,
                    next_at: None,
                    summary: json!({}),
                    is_told: false,
                });
                write.event = Some(IncidentChange::Opened);
                write
            }
        };
        write.incident.group = self.group.to_owned();
        write.incident.severity = self.severity;
        write.incident.since = self.since;
        write
    }
}

impl Step<'_> {
    fn open(&self, scope: IncidentScope, subject: &str, kind: ProblemKind) -> Option<&IncidentRow> {
        self.facts
            .open
            .iter()
            .find(|one| one.scope == scope && one.subject == subject && one.kind == kind)
    }

    fn ended(
        &self,
        scope: IncidentScope,
        subject: &str,
        kind: ProblemKind,
    ) -> Option<&IncidentRow> {
        self.facts
            .ended
            .iter()
            .find(|one| one.scope == scope && one.subject == subject && one.kind == kind)
    }

    /// The change of an open incident.
    fn write(&mut self, incident: &IncidentRow) -> &mut IncidentWrite {
        let key = (incident.scope, incident.subject.clone(), incident.kind);
        self.writes.entry(key).or_insert_with(|| IncidentWrite::of(incident.clone()))
    }

    fn add(&mut self, write: IncidentWrite) {
        let incident = &write.incident;
        let key = (incident.scope, incident.subject.clone(), incident.kind);
        self.writes.insert(key, write);
    }

    /// Whether a device of the facts is in this group.
    fn is_here(&self, device: &TroubleRow) -> bool {
        device.state.as_ref().is_some_and(|state| state.group == self.facts.group)
    }

    fn kind(&mut self, index: usize, kind: ProblemKind) {
        let facts = self.facts;
        let fleet = self.open(IncidentScope::Fleet, FLEET, kind).cloned();
        let group = self.open(IncidentScope::Group, &facts.group, kind).cloned();
        let (with, without): (Vec<&TroubleRow>, Vec<&TroubleRow>) =
            facts.devices.iter().partition(|device| self.is_here(device) && device.has(kind));
        // Since when an incident of many is open that takes devices over.
        let mut covered_since: Option<Timestamp> = None;
        if let Some(fleet) = &fleet {
            self.join(fleet, &with, &without);
            covered_since = Some(fleet.last_opened_at());
        }
        let mut left_over = Vec::new();
        match &group {
            Some(group) => {
                let goes_on =
                    self.go_on(index, group, &with, &without, fleet.is_some(), &mut left_over);
                let opened_at = goes_on.then(|| group.last_opened_at());
                covered_since = covered_since.into_iter().chain(opened_at).min();
            }
            None if fleet.is_none() => {
                covered_since = self.open_group(index, kind, &with).then_some(self.now);
            }
            None => {}
        }
        let of_devices: Vec<IncidentRow> = facts
            .open
            .iter()
            .filter(|one| one.scope == IncidentScope::Device && one.kind == kind)
            .cloned()
            .collect();
        for own in &of_devices {
            self.own_incident(own, covered_since);
        }
        let has_own: BTreeSet<&str> = of_devices.iter().map(|own| own.subject.as_str()).collect();
        for device in with.into_iter().chain(left_over.iter()) {
            let is_covered = covered_since.is_some_and(|opened_at| {
                !device.is_long(kind, opened_at)
                    || group.as_ref().is_some_and(|group| self.is_member(group, device))
            });
            if !is_covered && !has_own.contains(device.device_id.as_str()) {
                self.open_device(device, kind);
            }
        }
    }

    /// Whether a device is a member of an incident of the group, not only presumed.
    fn is_member(&self, incident: &IncidentRow, device: &TroubleRow) -> bool {
        incident.id.is_some_and(|id| self.members.contains(&(id, device.device_id.as_str())))
    }

    /// Takes devices with the problem into an incident of many, and lets those without leave.
    fn join(&mut self, incident: &IncidentRow, with: &[&TroubleRow], without: &[&TroubleRow]) {
        let kind = incident.kind;
        let opened_at = incident.last_opened_at();
        let joined: Vec<_> = with
            .iter()
            .filter(|device| !device.is_long(kind, opened_at) && !self.is_member(incident, device))
            .map(|device| {
                let jobs = Value::from(device.jobs(kind)).to_string();
                (device.device_id.clone(), jobs, false)
            })
            .collect();
        let left: Vec<_> = without.iter().map(|device| device.device_id.clone()).collect();
        let write = self.write(incident);
        write.joined.extend(joined);
        write.left.extend(left);
    }

    /// Opens an incident of the group, if its devices have it together.
    fn open_group(&mut self, index: usize, kind: ProblemKind, with: &[&TroubleRow]) -> bool {
        let tally = self.facts.tallies[index];
        let policy = self.settings.policy_of_group(&self.facts.group);
        let is_new = |device: &&&TroubleRow| !device.is_long(kind, self.now);
        let has_new = with.iter().any(|device| is_new(&device));
        if !has_new || !incident::opens(kind, &threshold(policy, &self.facts.group), &tally) {
            return false;
        }
        let new = NewIncident {
            scope: IncidentScope::Group,
            subject: &self.facts.group,
            group: &self.facts.group,
            kind,
            severity: severity_of_all(kind, policy),
            since: tally.since.unwrap_or(self.now),
        };
        let ended = self.ended(IncidentScope::Group, &self.facts.group, kind);
        let mut write = new.open(ended, self.now);
        let presumed = if kind == ProblemKind::Silent { tally.late } else { 0 };
        let summary = Summary { kind, count: tally.in_problem, presumed, judged: tally.judged };
        write.incident.summary = summary.json(self.facts.last_heard);
        write.incident.next_at = Some(self.now);
        write.entries.push((word(&write), write.incident.summary.clone()));
        let threshold = threshold(policy, &self.facts.group);
        remember(&mut write, &Value::Null, &threshold, reasons(with.iter().copied(), kind));
        for device in with.iter().filter(is_new) {
            let jobs = Value::from(device.jobs(kind)).to_string();
            write.joined.push((device.device_id.clone(), jobs, false));
        }
        if kind == ProblemKind::Silent {
            let late = self.facts.late.iter();
            write.joined.extend(late.map(|device| (device.clone(), "[]".to_owned(), true)));
            if !self.facts.late.is_empty() {
                write.entries.push(("presumed", named(&self.facts.late)));
            }
        }
        self.add(write);
        true
    }

    /// Brings the group's open incident up to date; false when it ends. The devices that then still have the problem go to
    /// `left_over`.
    fn go_on(
        &mut self,
        index: usize,
        group: &IncidentRow,
        with: &[&TroubleRow],
        without: &[&TroubleRow],
        is_in_fleet: bool,
        left_over: &mut Vec<TroubleRow>,
    ) -> bool {
        let (kind, now) = (group.kind, self.now);
        self.join(group, with, without);
        let facts = self.facts;
        let tally = facts.tallies[index];
        let is_silence = kind == ProblemKind::Silent;
        // Members who have left by moving or deletion, or without a step of their own.
        let members: Vec<_> =
            facts.members.iter().filter(|(id, ..)| Some(*id) == group.id).collect();
        let late: BTreeSet<&str> = facts.late.iter().map(String::as_str).collect();
        let gone: Vec<&TroubleRow> = members
            .iter()
            .filter(|(_, member, presumed)| {
                let is_missing = self.is_here(member) && member.has(kind);
                !(is_missing || (*presumed && late.contains(member.device_id.as_str())))
            })
            .map(|(_, member, _)| member)
            .collect();
        let left: Vec<String> = gone.iter().map(|member| member.device_id.clone()).collect();
        let known: BTreeSet<&str> =
            members.iter().map(|(_, member, _)| member.device_id.as_str()).collect();
        let newly_late: Vec<String> = facts
            .late
            .iter()
            .filter(|device| is_silence && !known.contains(device.as_str()))
            .cloned()
            .collect();
        let missing = facts.missing[index];
        let threshold = threshold(self.settings.policy_of_group(&facts.group), &facts.group);
        let late_count = if is_silence { tally.late } else { 0 };
        let is_told = group.is_told(self.settings, now);
        let with_problem = with.iter().copied().chain(members.iter().map(|(_, member, _)| member));
        let reasons = reasons(with_problem, kind);
        let write = self.write(group);
        write.left.extend(left);
        write.left.sort();
        write.left.dedup();
        let is_known = |device: &String| known.contains(device.as_str());
        write.left.retain(is_known);
        if !write.left.is_empty() {
            let left = named(&write.left);
            write.entries.push(("left", left));
        }
        let joined: Vec<String> = write.joined.iter().map(|(device, ..)| device.clone()).collect();
        if !joined.is_empty() {
            write.entries.push(("joined", named(&joined)));
        }
        if !newly_late.is_empty() {
            write.entries.push(("presumed", named(&newly_late)));
            let presumed = newly_late.into_iter().map(|device| (device, "[]".to_owned(), true));
            write.joined.extend(presumed);
        }
        let summary = Summary { kind, count: missing, presumed: late_count, judged: tally.judged };
        write.incident.summary = summary.json(facts.last_heard);
        remember(write, &group.summary, &threshold, reasons);
        let calm = Calm { missing: missing + late_count, at_risk: tally.at_risk(), threshold };
        if is_in_fleet && !is_told {
            write.incident.summary = group.summary.clone();
            resolve(write, Resolution::Merged, now);
            return true;
        }
        calm.end(write, calm.resolution(&group.summary), now);
        if !write.incident.is_open() {
            // Whom it was about stays to be seen.
            write.incident.summary = group.summary.clone();
        }
        if write.incident.is_open() {
            // Devices become late, and are heard again, without a step of their own.
            let is_spreading =
                !facts.late.is_empty() || members.iter().any(|(_, _, presumed)| *presumed);
            let next_late = facts.next_late.filter(|_| is_silence);
            write.incident.next_at = if is_spreading && is_silence {
                Some(now)
            } else {
                [write.incident.calm_at, next_late].into_iter().flatten().min()
            };
            return true;
        }
        left_over.extend(
            members
                .iter()
                .filter(|(_, member, _)| self.is_here(member) && member.has(kind))
                .map(|(_, member, _)| member.clone()),
        );
        false
    }

    /// Brings a device's own incident up to date.
    fn own_incident(&mut self, own: &IncidentRow, covered_since: Option<Timestamp>) {
        let (kind, now) = (own.kind, self.now);
        let device = self.facts.devices.iter().find(|device| device.device_id == own.subject);
        let Some(device) = device else {
            return;
        };
        if let Some(state) = &device.state
            && device.has(kind)
        {
            let group = state.group.clone();
            let is_covered = group == self.facts.group
                && covered_since.is_some_and(|opened_at| !device.is_long(kind, opened_at));
            let is_merged = is_covered && !own.is_told(self.settings, now);
            let summary = summary_of_device(device, kind);
            let (since, jobs) = (device.since(kind), device.jobs(kind));
            let write = self.write(own);
            write.incident.group = group;
            write.incident.calm_at = None;
            write.incident.next_at = None;
            write.incident.summary = summary;
            write.incident.since = since.unwrap_or(own.since);
            if is_merged {
                resolve(write, Resolution::Merged, now);
            }
            if is_covered {
                self.take_over(&own.subject, kind, jobs);
            }
            return;
        }
        let resolution = resolution(device, &Concern::of_device(own));
        let patience = device.state.as_ref().and_then(|state| state.patience);
        let is_gone = device.state.is_none();
        let write = self.write(own);
        if own.flapping_since.is_some() && !is_gone && resolution != Resolution::Paused {
            let wait = incident::calm_of_flapping(patience);
            let calm_at = own.calm_at.unwrap_or(now.saturating_add_milliseconds(wait));
            write.incident.calm_at = Some(calm_at);
            write.incident.next_at = Some(calm_at);
            if calm_at > now {
                return;
            }
        }
        resolve(write, resolution, now);
    }

    /// Makes a device with an incident of its own a member of the group's.
    fn take_over(&mut self, device_id: &str, kind: ProblemKind, jobs: Vec<String>) {
        let key = (IncidentScope::Group, self.facts.group.clone(), kind);
        if let Some(write) = self.writes.get_mut(&key)
            && !write.joined.iter().any(|(joined, ..)| joined == device_id)
        {
            write.joined.push((device_id.to_owned(), Value::from(jobs).to_string(), false));
        }
    }

    fn open_device(&mut self, device: &TroubleRow, kind: ProblemKind) {
        let Some(state) = &device.state else { return };
        let own = serde_json::from_str(&state.policy).unwrap_or(Value::Null);
        let level = LevelSettings { policy: Policy::from_stored(&own), ..LevelSettings::default() };
        let own = DeviceSettings { level, ..DeviceSettings::default() };
        let policy = self.settings.policy_of_device(&state.group, &own);
        let new = NewIncident {
            scope: IncidentScope::Device,
            subject: &device.device_id,
            group: &state.group,
            kind,
            severity: severity(kind, &policy).value,
            since: device.since(kind).unwrap_or(self.now),
        };
        let ended = self.ended(IncidentScope::Device, &device.device_id, kind);
        let mut write = new.open(ended, self.now);
        write.incident.summary = summary_of_device(device, kind);
        write.entries.push((word(&write), write.incident.summary.clone()));
        self.add(write);
    }
}

fn threshold(policy: &EffectivePolicy, group: &str) -> Threshold {
    let (at_least, percent) = (policy.group_at_least.value, policy.group_percent.value);
    Threshold::of_group(at_least, percent, !group.is_empty())
}

/// Devices as an entry of a timeline names them: some, and how many.
fn named(devices: &[String]) -> Value {
    let some: Vec<_> = devices.iter().take(NAMED_IN_ENTRY).collect();
    json!({ "devices": some, "count": devices.len() })
}

fn summary_of_device(device: &TroubleRow, kind: ProblemKind) -> Value {
    let problems: Vec<&KeptProblem> = device.problems(kind).collect();
    let heard = device.state.as_ref().and_then(|state| state.heard_at);
    json!({
        kind.as_str(): 1,
        "presumed": 0,
        "judged": 1,
        "last_heard": heard.map(Timestamp::as_millisecond),
        "jobs": problems.iter().map(|problem| &problem.job).collect::<Vec<_>>(),
        "reasons": problems.iter().map(|problem| &problem.reason).collect::<Vec<_>>(),
    })
}

/// Why devices have a problem of a kind. Of silence it is of no interest.
fn reasons<'a>(
    devices: impl Iterator<Item = &'a TroubleRow>,
    kind: ProblemKind,
) -> BTreeSet<String> {
    if kind == ProblemKind::Silent {
        return BTreeSet::new();
    }
    devices.flat_map(|device| device.problems(kind)).map(|problem| problem.reason.clone()).collect()
}

/// What an incident says of a device that had its problem.
struct Concern {
    kind: ProblemKind,
    /// Since when there is the problem.
    since: Timestamp,
    /// Since when the incident is about the device.
    from: Timestamp,
    /// The jobs that have it, reports that name none under the empty name; `None` for the device as a whole.
    jobs: Option<Vec<String>>,
    /// Whether failed runs are the problem, and not only one that takes too long.
    is_failures: bool,
}

impl Concern {
    /// The device that an incident is about alone.
    fn of_device(own: &IncidentRow) -> Self {
        Self {
            kind: own.kind,
            since: own.since,
            from: own.last_opened_at(),
            jobs: jobs_of(own.kind, &own.summary["jobs"]),
            is_failures: texts(&own.summary["reasons"])
                .any(|reason| reason == Reason::Failures.as_str()),
        }
    }

    /// One of many.
    fn of_member(incident: &IncidentRow, member: &GoneMember) -> Self {
        let mut reasons = texts(&incident.summary["reasons"]).peekable();
        Self {
            kind: incident.kind,
            since: incident.since,
            from: incident.last_opened_at().max(member.joined_at),
            jobs: jobs_of(
                incident.kind,
                &serde_json::from_str(&member.jobs).unwrap_or(Value::Null),
            ),
            is_failures: reasons.peek().is_none()
                || reasons.any(|reason| reason == Reason::Failures.as_str()),
        }
    }
}

/// The jobs of a JSON array; null is silence of the device as a whole, and failures of reports that name no job.
fn jobs_of(kind: ProblemKind, jobs: &Value) -> Option<Vec<String>> {
    let jobs = jobs.as_array().filter(|jobs| !jobs.is_empty())?;
    if kind == ProblemKind::Silent && jobs.iter().any(Value::is_null) {
        return None;
    }
    Some(jobs.iter().map(|job| job.as_str().unwrap_or_default().to_owned()).collect())
}

/// Why a device no longer has a problem.
fn resolution(device: &TroubleRow, concern: &Concern) -> Resolution {
    let Some(state) = &device.state else { return Resolution::Deleted };
    if state.state == State::Paused.as_str() {
        return Resolution::Paused;
    }
    let (success, received) = state.last_reports(concern.jobs.as_deref());
    let is_heard = received.is_some_and(|received| received >= concern.from);
    match concern.kind {
        // Of a job that is no longer expected nothing need be heard.
        _ if !is_heard || !state.is_expected && concern.kind == ProblemKind::Silent => {
            Resolution::Policy
        }
        ProblemKind::Failing if concern.is_failures => match success {
            Some(success) if success >= concern.from => Resolution::Recovered,
            Some(success) if success >= concern.since => Resolution::LateReport,
            Some(_) | None => Resolution::Policy,
        },
        _ => Resolution::Recovered,
    }
}

/// Why a device is no longer one of those that an incident is about; `None` when this does not tell.
fn why_gone(member: &GoneMember, incident: &IncidentRow, has_devices: bool) -> Option<Resolution> {
    let Some(state) = &member.device.state else { return Some(Resolution::Deleted) };
    if incident.scope == IncidentScope::Group && state.group != incident.subject {
        // A group that was deleted, or given another name, has left no device behind.
        return Some(if has_devices { Resolution::Policy } else { Resolution::Deleted });
    }
    if member.device.has(incident.kind) {
        return None;
    }
    let resolution = resolution(&member.device, &Concern::of_member(incident, member));
    // A device that was only late may be so still.
    let is_late = member.is_presumed && state.is_expected && resolution == Resolution::Policy;
    (!is_late).then_some(resolution)
}

/// Incidents that ended before this are not opened again.
pub(super) fn reopened_since(now: Timestamp) -> Timestamp {
    now.saturating_add_milliseconds(-REOPENED_WITHIN)
}
