//! The state of devices and jobs, as sweeps find it and keep it. A sweep asks for the devices whose kept state contradicts
//! what is known about them, evaluates those alone, and writes what has changed. It keeps nothing in memory, so that imports,
//! foreign SQL, other servers and crashes need no care.
//!
//! Both stores read the rows below, call [`evaluate`], and write what it answers, in one transaction per step.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use pisync_core::{
    Timestamp,
    health::{
        self, DeviceFacts, Health, JobFacts, JobReports, OpenRun, Outcome, Problem, State,
        needs_outcomes, state::OUTCOMES, waiting_since,
    },
};
use serde_json::{Value, json};

use super::{DeviceSettings, FleetSettings, Pauses, StoreError, WindowScope};

/// How many devices are evaluated at a time. SQLite stores no report meanwhile, for some 15 ms.
pub const DEVICES_PER_STEP: usize = 1_000;

/// For how long changes of states are kept, in milliseconds: 30 days.
pub(super) const CHANGES_KEPT: i64 = 30 * 24 * 60 * 60 * 1000;

/// For how long incidents are kept that have ended, in milliseconds: 400 days.
pub(super) const INCIDENTS_KEPT: i64 = 400 * 24 * 60 * 60 * 1000;

/// How many changes of states, or incidents, are deleted for their age at a time.
pub(super) const DELETED_AT_ONCE: i64 = 1_000;

/// For how long nothing may be heard of a server before this counts as an outage, in milliseconds: 45 s, three beats.
pub(super) const LONGEST_SILENCE: i64 = 45_000;

/// By how much a clock may be behind the last sweep before its server does not sweep, in milliseconds: 5 s.
pub(crate) const LARGEST_LAG: i64 = 5_000;

/// The states of devices and jobs.
#[async_trait]
pub trait HealthStore: Send + Sync {
    /// The ids of the devices whose kept state may contradict what is known at `now`.
    async fn contradicted_devices(&self, now: Timestamp) -> Result<Vec<String>, StoreError>;

    /// What people have changed since the last sweep, in the order of its versions.
    async fn changes_to_sweep(&self) -> Result<Vec<SettingsChange>, StoreError>;

    /// The ids of the devices in a scope, in byte-wise order, at most [`DEVICES_PER_STEP`], after the device `after`.
    async fn devices_in(
        &self,
        scope: &WindowScope,
        after: Option<&str>,
    ) -> Result<Vec<String>, StoreError>;

    /// Evaluates devices and keeps what is found, as one transaction; at most [`DEVICES_PER_STEP`]. `None` when another server
    /// is sweeping, or has swept with a later time.
    async fn evaluate_devices(
        &self,
        devices: &[String],
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Evaluations>, StoreError>;

    /// Notes that a sweep has begun at `now` and gone through by the settings of a version; false when another server is
    /// sweeping, or has swept with a later time.
    async fn end_sweep(&self, version: i64, now: Timestamp) -> Result<bool, StoreError>;

    /// Takes `now` for the time of the last sweep, if that was at `swept_at`, which is ahead: the clock by which it was made was
    /// wrong. False when another server has swept since.
    async fn follow_clock(&self, swept_at: Timestamp, now: Timestamp) -> Result<bool, StoreError>;

    /// Deletes some changes of states that are older than 30 days, and some incidents that ended 400 days ago; true when more
    /// are left.
    async fn drop_old_changes(&self, now: Timestamp) -> Result<bool, StoreError>;

    /// Notes that this server lives, and could store what it was sent. When too long a time has passed since the last sign of
    /// life of any server, that time is recorded as an outage.
    async fn beat(&self, beat: &Beat) -> Result<Option<Outage>, StoreError>;

    /// Notes that this server ends by itself.
    async fn note_stop(&self, now: Timestamp) -> Result<(), StoreError>;

    /// The next time at which a sweep may find something if nothing is reported or changed before; `None` when there is none.
    /// A backtest passes over the sweeps before it.
    async fn next_look(&self) -> Result<Option<Timestamp>, StoreError>;

    /// Takes every time until `until` for one in which this server lived. A backtest calls it for the beats that it leaves out.
    async fn pass_over(&self, until: Timestamp) -> Result<(), StoreError>;

    /// Makes devices known that have not reported and are on no roster: device ids, and their groups. A backtest calls it for
    /// the devices that a fleet begins with.
    async fn register_devices(
        &self,
        devices: &[(String, Option<String>)],
        at: Timestamp,
    ) -> Result<(), StoreError>;

    /// The newest changes of states, at most `limit`, and older than the change `before`.
    async fn state_changes(
        &self,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<StateChange>, StoreError>;

    /// What is known about a device, evaluated at `now`, whatever is kept; `None` when it is unknown.
    async fn examine_device(
        &self,
        device_id: &str,
        now: Timestamp,
    ) -> Result<Option<Examination>, StoreError>;
}

/// What people have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsChange {
    /// Its number.
    pub version: i64,
    /// The devices that it concerns.
    pub scope: WindowScope,
}

/// A sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// When.
    pub at: Timestamp,
    /// Whether it is the first of this server.
    pub is_first: bool,
    /// Whether valid events had to be refused since the last.
    pub has_refused: bool,
    /// What the server is called.
    pub node: String,
}

/// When nobody could be heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outage {
    /// The last sign of life before it.
    pub from: Timestamp,
    /// The first after it.
    pub until: Timestamp,
    /// Why.
    pub cause: OutageCause,
}

/// Why nobody could be heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutageCause {
    /// The servers had been stopped.
    Stopped,
    /// No server gave a sign of life: it was killed, its clock jumped, or the database was away.
    Down,
    /// Events were refused.
    Refusing,
}

impl OutageCause {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Down => "down",
            Self::Refusing => "refusing",
        }
    }
}

/// The last signs of life of all servers.
#[derive(Debug, Clone, Copy)]
pub(super) struct LastSigns {
    pub(super) alive_at: Option<Timestamp>,
    pub(super) stopped_at: Option<Timestamp>,
}

impl LastSigns {
    /// Whether the clock was further on at the last sign of life, by more than two servers' clocks differ.
    pub(super) fn has_stepped_back(&self, now: Timestamp) -> bool {
        let ahead = |alive_at: Timestamp| alive_at.as_millisecond() - now.as_millisecond();
        self.alive_at.is_some_and(|alive_at| ahead(alive_at) > LARGEST_LAG)
    }
}

/// The outage that ends with a beat, if any does. `is_alone` is whether no other server can be alive: on SQLite.
pub(super) fn outage(beat: &Beat, signs: LastSigns, is_alone: bool) -> Option<Outage> {
    let alive_at = signs.alive_at?;
    let outage = |cause| {
        let from = signs.stopped_at.map_or(alive_at, |stopped_at| stopped_at.max(alive_at));
        (from < beat.at).then_some(Outage { from, until: beat.at, cause })
    };
    let is_long_ago = beat.at.as_millisecond() - alive_at.as_millisecond() > LONGEST_SILENCE;
    // Nobody has lived since the last clean end.
    let has_stopped = signs.stopped_at.is_some_and(|stopped_at| stopped_at >= alive_at);
    if beat.is_first && has_stopped {
        return outage(OutageCause::Stopped);
    }
    if is_long_ago || (beat.is_first && is_alone) {
        return outage(OutageCause::Down);
    }
    if beat.has_refused { outage(OutageCause::Refusing) } else { None }
}

/// A device that went from one state to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateChange {
    /// Its number; it grows with time.
    pub id: i64,
    /// When a sweep found it.
    pub at: Timestamp,
    /// The device.
    pub device_id: String,
    /// The state before; `None` for a device that was evaluated for the first time.
    pub from: Option<String>,
    /// The state after.
    pub to: String,
    /// The reason of its worst problem.
    pub reason: Option<String>,
}

/// What a step of a sweep has done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Evaluations {
    /// How many devices were evaluated.
    pub devices: usize,
    /// How many are in another state than before.
    pub changes: usize,
}

/// What is known about a device, and what follows from it.
#[derive(Debug)]
pub struct Examination {
    /// Its id.
    pub device_id: String,
    /// The group that it is in.
    pub group: Option<String>,
    /// When the server last heard it.
    pub heard: Option<Timestamp>,
    /// What applies to it.
    pub policy: health::EffectivePolicy,
    /// The pauses of the device, its group and the fleet, in force or not.
    pub pauses: Pauses,
    /// What is known.
    pub facts: DeviceFacts,
    /// What follows.
    pub health: Health,
}

/// A device as it is read for an evaluation.
#[derive(Debug)]
pub(super) struct DeviceRow {
    pub(super) device_id: String,
    /// Empty for none.
    pub(super) group: String,
    pub(super) registered_at: Timestamp,
    pub(super) settings: DeviceSettings,
    pub(super) kept: Option<HealthRow>,
    /// Those that have reported or have a kept state, in the order of their names.
    pub(super) jobs: Vec<JobRow>,
    pub(super) runs: Vec<RunRow>,
}

/// A job as it is read for an evaluation.
#[derive(Debug)]
pub(super) struct JobRow {
    /// Empty for reports that name none.
    pub(super) job: String,
    pub(super) figures: Option<JobFigureRow>,
    pub(super) kept: Option<JobHealthRow>,
}

/// What a job's reports add up to, as far as an evaluation needs it.
#[derive(Debug, Clone)]
pub(super) struct JobFigureRow {
    pub(super) failed_syncs: i64,
    pub(super) consecutive_failures: i64,
    pub(super) last_received: Timestamp,
    pub(super) last_sync: Timestamp,
    pub(super) last_success: Option<Timestamp>,
    pub(super) last_failure: Option<Timestamp>,
    /// Filled in where [`DeviceRow::failing_jobs`] asks for it.
    pub(super) first_failure: Option<Timestamp>,
    /// Filled in where [`DeviceRow::counted_jobs`] asks for it; the latest at the end.
    pub(super) outcomes: Vec<Outcome>,
}

/// A started run as it is read.
#[derive(Debug, Clone)]
pub(super) struct RunRow {
    pub(super) job: String,
    pub(super) run_id: String,
    pub(super) received_at: Timestamp,
    /// Whether an event with its id is stored.
    pub(super) is_reported: bool,
}

/// The state of a device as it is kept; see the migration for its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HealthRow {
    pub(super) group: String,
    pub(super) state: String,
    pub(super) since: Timestamp,
    pub(super) problems: String,
    pub(super) is_expected: bool,
    pub(super) is_overdue: bool,
    pub(super) is_behind: bool,
    pub(super) silent_after: Option<i64>,
    pub(super) grace: i64,
    pub(super) due_at: Option<Timestamp>,
    pub(super) late_at: Option<Timestamp>,
    pub(super) check_at: Option<Timestamp>,
    pub(super) patience: Option<i64>,
    pub(super) behind_after: i64,
    pub(super) next_due: Option<Timestamp>,
    pub(super) waiting_since: Option<Timestamp>,
    pub(super) heard_at: Option<Timestamp>,
    pub(super) policy_version: i64,
}

/// The columns of `device_health` `h` that [`HealthRow`] has, in its order.
pub(super) const HEALTH_COLUMNS: &str = r#"
    h."group", h.state, h.since, h.problems, h.is_expected, h.is_overdue, h.is_behind, h.silent_after, h.grace,
    h.due_at, h.late_at, h.check_at, h.patience, h.behind_after, h.next_due, h.waiting_since, h.heard_at,
    h.policy_version
"#;

/// A problem as it is kept in `device_health`.
#[derive(Debug, Clone)]
pub(super) struct KeptProblem {
    pub(super) kind: String,
    pub(super) job: Option<String>,
    pub(super) reason: String,
    pub(super) since: Timestamp,
}

impl KeptProblem {
    /// Reads the JSON array of `device_health`. What foreign SQL made wrong is left out.
    pub(super) fn read(problems: &str) -> Vec<Self> {
        let problems: Value = serde_json::from_str(problems).unwrap_or(Value::Null);
        let read = |problem: &Value| {
            Some(Self {
                kind: problem["kind"].as_str()?.to_owned(),
                job: problem["job"].as_str().map(str::to_owned),
                reason: problem["reason"].as_str()?.to_owned(),
                since: Timestamp::parse_iso8601(problem["since"].as_str()?)?,
            })
        };
        problems.as_array().into_iter().flatten().filter_map(read).collect()
    }
}

/// The state of a job as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobHealthRow {
    pub(super) job: String,
    pub(super) is_expected: bool,
    pub(super) state: String,
    pub(super) reason: Option<String>,
    pub(super) since: Option<Timestamp>,
    pub(super) next_due: Option<Timestamp>,
    pub(super) waiting_since: Option<Timestamp>,
    pub(super) heard_at: Option<Timestamp>,
    pub(super) seen_failures: i64,
    pub(super) seen_failed: i64,
}

/// What to write about a device after its evaluation.
#[derive(Debug)]
pub(super) struct Evaluated {
    pub(super) device_id: String,
    /// The new row, if it differs from the kept one.
    pub(super) health: Option<HealthRow>,
    /// The group, the state, and whether a report was expected, as they were kept.
    pub(super) before: Option<(String, String, bool)>,
    /// Whether incidents are to be made from it.
    pub(super) is_unreconciled: bool,
    /// Whether it is in another state than before, or since another time.
    pub(super) is_in_other_state: bool,
    /// The reason of the worst problem.
    pub(super) reason: Option<&'static str>,
    /// Jobs whose rows are new or differ.
    pub(super) jobs: Vec<JobHealthRow>,
    /// Jobs that no longer need a row.
    pub(super) forgotten_jobs: Vec<String>,
    /// Runs that are over.
    pub(super) ended_runs: Vec<(String, String)>,
    /// Runs, and when to look at them again.
    pub(super) awaited_runs: Vec<(String, String, Option<Timestamp>)>,
}

impl Evaluated {
    /// The states before and after, when they differ.
    pub(super) fn change(&self) -> Option<(Option<&str>, &str)> {
        let after = self.health.as_ref()?.state.as_str();
        let before = self.before.as_ref().map(|(_, state, _)| state.as_str());
        (before != Some(after)).then_some((before, after))
    }

    /// The former group of a device that has moved.
    pub(super) fn left_group(&self) -> Option<&str> {
        let (before, ..) = self.before.as_ref()?;
        let after = &self.health.as_ref()?.group;
        (before != after).then_some(before)
    }
}

/// By how much the numbers of devices change, by group and state: all of them, and those of which a report is expected.
pub(super) type StateCounts = BTreeMap<(String, String), (i64, i64)>;

/// By how much the numbers of devices change.
pub(super) fn state_counts<'a>(evaluated: impl Iterator<Item = &'a Evaluated>) -> StateCounts {
    let mut counts = StateCounts::new();
    for one in evaluated {
        let Some(after) = &one.health else { continue };
        let mut add = |group: &str, state: &str, is_expected: bool, by: i64| {
            let count = counts.entry((group.to_owned(), state.to_owned())).or_default();
            count.0 += by;
            count.1 += if is_expected { by } else { 0 };
        };
        if let Some((group, state, is_expected)) = &one.before {
            add(group, state, *is_expected, -1);
        }
        add(&after.group, &after.state, after.is_expected, 1);
    }
    counts.retain(|_, count| *count != (0, 0));
    counts
}

/// The name of a job, as the rules know it.
fn named(job: &str) -> Option<&str> {
    (!job.is_empty()).then_some(job)
}

impl DeviceRow {
    /// The jobs whose first failure after the last success must be known.
    pub(super) fn failing_jobs(&mut self) -> impl Iterator<Item = (&str, &mut JobFigureRow)> {
        self.jobs.iter_mut().filter_map(|row| {
            let figures = row.figures.as_mut()?;
            (figures.consecutive_failures > 0).then_some((row.job.as_str(), figures))
        })
    }

    /// The jobs whose last runs must be known, at most [`OUTCOMES`].
    pub(super) fn counted_jobs<'a>(
        &'a mut self,
        settings: &'a FleetSettings,
    ) -> impl Iterator<Item = (&'a str, &'a mut JobFigureRow)> {
        let policy = settings.policy_of_device(&self.group, &self.settings);
        self.jobs.iter_mut().filter_map(move |row| {
            let figures = row.figures.as_mut()?;
            // Without a failure there is nothing to count.
            let is_counted =
                figures.failed_syncs > 0 && needs_outcomes(policy.rules_of(named(&row.job)));
            is_counted.then_some((row.job.as_str(), figures))
        })
    }

    /// When the device was last heard.
    fn heard(&self) -> Option<Timestamp> {
        let figures = self.jobs.iter().filter_map(|job| job.figures.as_ref());
        figures.map(|figures| figures.last_received).max()
    }

    /// Whether a run is over: its event is stored; its job was heard, where it has no id or its time was over; or the next
    /// run of its job has begun.
    fn is_over(&self, run: &RunRow, policy: &health::EffectivePolicy) -> bool {
        let job = self.jobs.iter().find(|job| job.job == run.job);
        let heard = job.and_then(|job| job.figures.as_ref()).map(|figures| figures.last_received);
        run.is_reported
            || (run.run_id.is_empty() && heard > Some(run.received_at))
            || heard > Some(run.end(policy))
            || self.runs.iter().any(|other| {
                other.job == run.job && other.received_at > run.received_at && !other.is_reported
            })
    }

    /// What is known, as the rules take it.
    fn facts(
        &self,
        settings: &FleetSettings,
        policy: &health::EffectivePolicy,
        now: Timestamp,
    ) -> DeviceFacts {
        let policy_since = settings.policy_since(&self.group, &self.settings);
        let silent = State::Silent.as_str();
        let kept = self.kept.as_ref();
        let is_silent = |kept: &HealthRow| {
            // A device that is silent, or overdue, for another reason than a single job.
            kept.is_overdue
                || KeptProblem::read(&kept.problems)
                    .iter()
                    .any(|problem| problem.kind == silent && problem.job.is_none())
        };
        let mut jobs: Vec<JobFacts> = self
            .jobs
            .iter()
            .map(|row| JobFacts {
                job: named(&row.job).map(str::to_owned),
                waiting_since: waiting_since(
                    row.kept.as_ref().map(|kept| {
                        let is_missed = kept.is_expected
                            && matches!(
                                kept.reason.as_deref(),
                                Some("missed_run" | "never_reported")
                            );
                        (kept.waiting_since, is_missed)
                    }),
                    policy_since,
                ),
                reports: row.figures.as_ref().map(|figures| JobReports {
                    last_received: figures.last_received,
                    last_sync: figures.last_sync,
                    consecutive_failures: figures.consecutive_failures,
                    first_failure: figures.first_failure,
                    outcomes: figures.outcomes.clone(),
                }),
            })
            .collect();
        // A kept state of a job that is neither expected any more nor was ever heard says nothing.
        jobs.retain(|job| job.reports.is_some() || policy.names(job.job.as_deref()));
        for entry in &policy.jobs {
            let job = entry.name();
            if !jobs.iter().any(|known| known.job.as_deref() == job) {
                let job = job.map(str::to_owned);
                jobs.push(JobFacts { job, waiting_since: policy_since, reports: None });
            }
        }
        DeviceFacts {
            registered_at: self.registered_at,
            expected_from: self.settings.expected_from,
            is_excused: self.settings.is_excused,
            waiting_since: waiting_since(
                kept.map(|kept| (kept.waiting_since, is_silent(kept))),
                policy_since,
            ),
            pause: settings.pauses(&self.group, &self.settings).longest(now),
            jobs,
            open_runs: self
                .runs
                .iter()
                .filter(|run| !self.is_over(run, policy))
                .map(|run| OpenRun {
                    job: named(&run.job).map(str::to_owned),
                    started_at: run.received_at,
                })
                .collect(),
        }
    }
}

impl RunRow {
    /// By when it must have been reported.
    fn end(&self, policy: &health::EffectivePolicy) -> Timestamp {
        policy.run_end(named(&self.job), self.received_at)
    }
}

/// Evaluates a device by what is known, whatever is kept.
pub(super) fn examine(row: DeviceRow, settings: &FleetSettings, now: Timestamp) -> Examination {
    let policy = settings.policy_of_device(&row.group, &row.settings).into_owned();
    let facts = row.facts(settings, &policy, now);
    let excluded = settings.excluded(&row.device_id, &row.group, &row.settings);
    let health = health::evaluate(&policy, &facts, &excluded, now);
    let heard = row.heard();
    let pauses = settings.pauses(&row.group, &row.settings);
    let group = (!row.group.is_empty()).then_some(row.group);
    Examination { device_id: row.device_id, group, heard, policy, pauses, facts, health }
}

/// What to write about a device.
pub(super) fn evaluate(row: &DeviceRow, settings: &FleetSettings, now: Timestamp) -> Evaluated {
    let policy = settings.policy_of_device(&row.group, &row.settings);
    let facts = row.facts(settings, &policy, now);
    let excluded = settings.excluded(&row.device_id, &row.group, &row.settings);
    let health = health::evaluate(&policy, &facts, &excluded, now);
    let kept = row.kept.as_ref();
    let state = health.state.as_str();
    let problems = problems_json(&health.problems);
    let since = health.since.unwrap_or_else(|| match kept {
        Some(kept) if kept.state == state => kept.since,
        _ => now,
    });
    // What incidents depend on.
    let is_other = kept.is_none_or(|kept| {
        kept.state != state
            || kept.problems != problems
            || kept.is_expected != health.is_expected
            || kept.group != row.group
    });
    let is_plain = kept.is_none() && health.problems.is_empty();
    let next = HealthRow {
        group: row.group.clone(),
        state: state.to_owned(),
        since,
        problems,
        is_expected: health.is_expected,
        is_overdue: health.is_overdue(),
        is_behind: health.is_behind,
        silent_after: health.silent_after,
        grace: health.grace,
        due_at: health.due_at,
        late_at: health.late_at,
        check_at: health.check_at,
        patience: health.patience,
        behind_after: health.behind_after,
        next_due: health.next_due(),
        waiting_since: facts.waiting_since,
        heard_at: row.heard(),
        policy_version: settings.version,
    };
    let is_in_other_state =
        kept.is_none_or(|kept| kept.state != next.state || kept.since != next.since);
    let is_same = kept.is_some_and(|kept| {
        *kept == HealthRow { policy_version: kept.policy_version, ..next.clone() }
    });
    let (jobs, forgotten_jobs) = job_rows(row, &policy, &health);
    let (mut ended_runs, mut awaited_runs) = (Vec::new(), Vec::new());
    for run in &row.runs {
        let name = (run.job.clone(), run.run_id.clone());
        if row.is_over(run, &policy) {
            ended_runs.push(name);
        } else {
            // Once its time is over, only a report changes anything.
            let end = Some(run.end(&policy)).filter(|end| *end > now);
            awaited_runs.push((name.0, name.1, end));
        }
    }
    Evaluated {
        device_id: row.device_id.clone(),
        health: (!is_same).then_some(next),
        before: kept.map(|kept| (kept.group.clone(), kept.state.clone(), kept.is_expected)),
        is_unreconciled: is_other && !is_plain,
        is_in_other_state,
        reason: health.problems.first().map(|problem| problem.reason.as_str()),
        jobs,
        forgotten_jobs,
        ended_runs,
        awaited_runs,
    }
}

/// The rows of jobs that differ from the kept ones, and the jobs that no longer need one.
fn job_rows(
    row: &DeviceRow,
    policy: &health::EffectivePolicy,
    health: &Health,
) -> (Vec<JobHealthRow>, Vec<String>) {
    let mut changed = Vec::new();
    for job in &health.jobs {
        let name = job.job.as_deref().unwrap_or_default();
        let known = row.jobs.iter().find(|known| known.job == name);
        let figures = known.and_then(|known| known.figures.as_ref());
        let is_named = policy.names(job.job.as_deref());
        let is_counted = needs_outcomes(policy.rules_of(job.job.as_deref()))
            && figures.is_some_and(|figures| figures.failed_syncs > 0);
        if !is_named && !is_counted && job.state == State::Ok {
            continue;
        }
        let next = JobHealthRow {
            job: name.to_owned(),
            is_expected: job.is_expected,
            state: job.state.as_str().to_owned(),
            reason: job.reason.map(|reason| reason.as_str().to_owned()),
            since: job.since,
            next_due: job.next_due,
            waiting_since: job.waiting_since,
            heard_at: figures.map(|figures| figures.last_received),
            seen_failures: figures.map_or(0, |figures| figures.consecutive_failures),
            seen_failed: figures.map_or(0, |figures| figures.failed_syncs),
        };
        changed.push(next);
    }
    let kept = || row.jobs.iter().filter_map(|job| job.kept.as_ref());
    let forgotten = kept()
        .filter(|kept| !changed.iter().any(|next| next.job == kept.job))
        .map(|kept| kept.job.clone())
        .collect();
    changed.retain(|next| !kept().any(|kept| kept == next));
    (changed, forgotten)
}

/// Problems as they are kept and answered.
fn problems_json(problems: &[Problem]) -> String {
    Value::Array(problems.iter().map(|problem| json!(problem)).collect()).to_string()
}

/// How many of a job's runs are read.
pub(super) const OUTCOMES_READ: i64 = OUTCOMES as i64;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_millisecond(1_772_442_000_000 + second * 1000).unwrap()
    }

    fn beat(second: i64, is_first: bool) -> Beat {
        Beat { at: at(second), is_first, has_refused: false, node: "a".to_owned() }
    }

    #[test]
    fn an_outage_is_what_lies_between_two_signs_of_life() {
        let signs = |alive: i64, stopped: Option<i64>| LastSigns {
            alive_at: Some(at(alive)),
            stopped_at: stopped.map(at),
        };
        let cases = [
            // The next beat, a late one, and one after too long a time.
            (beat(15, false), signs(0, None), false, None),
            (beat(45, false), signs(0, None), false, None),
            (beat(46, false), signs(0, None), false, Some((0, OutageCause::Down))),
            // A server that starts beside another one, and one that starts where no other can be.
            (beat(15, true), signs(0, None), false, None),
            (beat(15, true), signs(0, None), true, Some((0, OutageCause::Down))),
            // After a clean end the time since it counts, however short.
            (beat(15, true), signs(0, Some(5)), false, Some((5, OutageCause::Stopped))),
            // Another server lived after that end.
            (beat(15, true), signs(10, Some(5)), false, None),
            // A clock that went back.
            (beat(0, false), signs(100, None), false, None),
        ];
        let refusing = Beat { has_refused: true, ..beat(15, false) };
        let refused = (refusing, signs(0, None), false, Some((0, OutageCause::Refusing)));
        for (beat, signs, is_alone, expected) in cases.into_iter().chain([refused]) {
            let found = outage(&beat, signs, is_alone);
            let expected =
                expected.map(|(from, cause)| Outage { from: at(from), until: beat.at, cause });
            assert_eq!(found, expected, "{beat:?} {signs:?}");
        }
        let nobody = LastSigns { alive_at: None, stopped_at: None };
        assert_eq!(outage(&beat(15, true), nobody, true), None);
    }
}
