//! The state of a device and of its jobs, as a function of what is known about them. The order in which reports arrive does
//! not matter: silence goes by when the server received the last one, failure by the dates that devices give.

use std::fmt;

use serde::Serialize;

use super::{
    deadline::{Deadline, Exclusions, Interval, Waiting, deadline},
    policy::{FailingRule, milliseconds},
    resolve::{EffectivePolicy, EffectiveRules},
    schedule::Schedule,
};
use crate::Timestamp;

/// By how much dates may be behind receipt, at least, before a device counts as behind, in milliseconds: 24 hours.
const LEAST_BEHIND: i64 = 24 * 60 * 60 * 1000;

/// How many of a job's last runs are looked at when more than the current streak matters.
pub const OUTCOMES: usize = 200;

/// The state of a device or of a job. Of several that apply, the first in this order is the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Somebody said that it is not to be judged for now.
    Paused,
    /// It has never reported.
    Never,
    /// Its report is overdue.
    Silent,
    /// Too many runs have failed.
    Failing,
    /// The last run failed, or its reports come from the past.
    Degraded,
    /// All is well.
    Ok,
}

impl State {
    /// All of them, in their order.
    pub const ALL: [Self; 6] =
        [Self::Paused, Self::Never, Self::Silent, Self::Failing, Self::Degraded, Self::Ok];

    /// The word that stands for it, in answers and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Never => "never",
            Self::Silent => "silent",
            Self::Failing => "failing",
            Self::Degraded => "degraded",
            Self::Ok => "ok",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

/// What kind of problem a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// A report is overdue.
    Silent,
    /// Too many runs have failed.
    Failing,
    /// Something is wrong that need not wake anybody.
    Degraded,
}

impl ProblemKind {
    /// All of them, the worst first.
    pub const ALL: [Self; 3] = [Self::Silent, Self::Failing, Self::Degraded];

    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.state().as_str()
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

    /// The state of who has such a problem, and none that is worse.
    #[must_use]
    pub fn state(self) -> State {
        match self {
            Self::Silent => State::Silent,
            Self::Failing => State::Failing,
            Self::Degraded => State::Degraded,
        }
    }
}

/// Why a device has a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Nothing was heard within interval and grace.
    NoReport,
    /// It is expected, and has never reported.
    NeverReported,
    /// A time of the cron expression, or the interval of a named job, has passed without a report.
    MissedRun,
    /// Failures, as the policy counts them.
    Failures,
    /// A run that was started has not reported within its longest time.
    Overrun,
    /// The last run had errors.
    Errors,
    /// What it reports now is dated long ago: a wrong clock, or a backlog, which hides present failures.
    Behind,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::NoReport,
        Self::NeverReported,
        Self::MissedRun,
        Self::Failures,
        Self::Overrun,
        Self::Errors,
        Self::Behind,
    ];

    /// The word that stands for it, in answers and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoReport => "no_report",
            Self::NeverReported => "never_reported",
            Self::MissedRun => "missed_run",
            Self::Failures => "failures",
            Self::Overrun => "overrun",
            Self::Errors => "errors",
            Self::Behind => "behind",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word)
    }
}

/// What is wrong with a device, or with one of its jobs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// What kind of problem it is.
    pub kind: ProblemKind,
    /// The job; `None` for the device as a whole, and for reports that name no job.
    pub job: Option<String>,
    /// Why.
    pub reason: Reason,
    /// Since when: the deadline that passed; of a device that was never heard, when it came to the roster; the date of the first
    /// failed run that counts (of a streak, the first after the last success); the moment an overrun began; or the newest
    /// date of what is behind. Never after the evaluation.
    pub since: Timestamp,
}

/// One of a job's runs, as it was reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Its date.
    pub at: Timestamp,
    /// Whether it had errors.
    pub has_failed: bool,
}

/// What the reports of a job add up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobReports {
    /// When the server received the last.
    pub last_received: Timestamp,
    /// The latest date.
    pub last_sync: Timestamp,
    /// Failures dated after the last success.
    pub consecutive_failures: i64,
    /// The date of the first of them, if it is known.
    pub first_failure: Option<Timestamp>,
    /// The last runs by date, the latest at the end, at most [`OUTCOMES`]. They need be there only where
    /// [`needs_outcomes`] says so.
    pub outcomes: Vec<Outcome>,
}

/// What is known about a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobFacts {
    /// Its name; `None` for reports that name none.
    pub job: Option<String>,
    /// Since when the policy waits for it; [`waiting_since`] finds it.
    pub waiting_since: Option<Timestamp>,
    /// Its reports; `None` for a job that is expected by name and was never heard.
    pub reports: Option<JobReports>,
}

/// A run that a device has started, and that has not been reported yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRun {
    /// Its job; `None` for a run that names none.
    pub job: Option<String>,
    /// When the server heard of the start.
    pub started_at: Timestamp,
}

/// How far ahead a pause, or an acknowledgement of an incident, may end, in milliseconds: 10 years. What ends later is a slip
/// of the pen in its year, and would be forgotten. Who means "until somebody ends it" gives no end.
pub const FARTHEST_END: i64 = 3_653 * 24 * 60 * 60 * 1000;

/// Why something cannot end at a time. [`fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndError {
    /// It has come.
    Past,
    /// It is more than [`FARTHEST_END`] ahead.
    TooFar,
}

impl fmt::Display for EndError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Past => "must be in the future",
            Self::TooFar => "must be within 10 years",
        })
    }
}

/// Checks when a pause, or an acknowledgement, is to end.
///
/// # Errors
/// When that is not in the future, or too far in it.
pub fn check_end(until: Timestamp, now: Timestamp) -> Result<(), EndError> {
    if until <= now {
        return Err(EndError::Past);
    }
    if until > now.saturating_add_milliseconds(FARTHEST_END) {
        return Err(EndError::TooFar);
    }
    Ok(())
}

/// A time in which a device is not judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pause {
    /// When it began.
    pub from: Timestamp,
    /// When it ends; `None` until somebody ends it.
    pub until: Option<Timestamp>,
}

impl Pause {
    /// Whether it is in force.
    #[must_use]
    pub fn is_on(&self, now: Timestamp) -> bool {
        self.from <= now && self.until.is_none_or(|until| now < until)
    }

    /// It as an interval.
    #[must_use]
    pub fn interval(&self) -> Interval {
        Interval { from: self.from, until: self.until.unwrap_or(Timestamp::MAX) }
    }
}

/// What is known about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFacts {
    /// When it became known.
    pub registered_at: Timestamp,
    /// Since when the roster expects it; `None` when it is on no roster.
    pub expected_from: Option<Timestamp>,
    /// Whether somebody has said that nothing is to be expected of it.
    pub is_excused: bool,
    /// Since when the policy waits for any report; [`waiting_since`] finds it.
    pub waiting_since: Option<Timestamp>,
    /// The pause that is in force; of several the one that ends last.
    pub pause: Option<Pause>,
    /// Its jobs: those that have reported, and those that are expected by name.
    pub jobs: Vec<JobFacts>,
    /// The runs that have started and are not over.
    pub open_runs: Vec<OpenRun>,
}

/// Since when the policy waits. A change of policy restarts waiting, so that editing makes nobody silent; but who was silent
/// already stays so. `stored` is what the last evaluation found: since when it waited, and whether the device or job was
/// silent.
#[must_use]
pub fn waiting_since(
    stored: Option<(Option<Timestamp>, bool)>,
    policy_since: Option<Timestamp>,
) -> Option<Timestamp> {
    match stored {
        Some((waiting_since, true)) => waiting_since,
        _ => policy_since,
    }
}

/// Whether the last runs of a job must be known, beside its streak.
#[must_use]
pub fn needs_outcomes(rules: &EffectiveRules) -> bool {
    matches!(rules.failing.value, FailingRule::OfLast { .. }) || rules.recover_after.value > 1
}

/// A report that is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expectation {
    /// The job; `None` for any report, or reports that name no job.
    pub job: Option<String>,
    /// Whether a job is expected by name, and not just any report.
    pub is_of_job: bool,
    /// From when on it is waited for.
    pub base: Timestamp,
    /// When it is expected, and by when it must be there.
    pub deadline: Deadline,
    /// The grace that the deadline contains, in milliseconds.
    pub grace: i64,
    /// How long two reports may be apart, grace included, in milliseconds.
    pub patience: i64,
    /// The run that holds silence back: when it started, and how long it may take.
    pub held_by: Option<Interval>,
    /// The problem, once the deadline has passed.
    pub reason: Reason,
}

impl Expectation {
    /// Whether its deadline has passed.
    #[must_use]
    pub fn is_missed(&self, now: Timestamp) -> bool {
        self.held_by.is_none() && now >= self.deadline.due_at
    }

    /// From when on the report is late, though its grace is not over.
    fn late_at(&self) -> Option<Timestamp> {
        let late_at = self.deadline.due_at.saturating_add_milliseconds(-self.grace);
        self.held_by.is_none().then_some(late_at)
    }
}

/// The state of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobHealth {
    /// Its name; `None` for reports that name none.
    pub job: Option<String>,
    /// Whether it is expected by name.
    pub is_expected: bool,
    /// Its state.
    pub state: State,
    /// Why it is not ok.
    pub reason: Option<Reason>,
    /// Since when it is not ok.
    pub since: Option<Timestamp>,
    /// When its next report is expected.
    pub next_due: Option<Timestamp>,
    /// Since when the policy waits for it.
    pub waiting_since: Option<Timestamp>,
}

/// What an evaluation finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The device's state.
    pub state: State,
    /// Since when it has it; `None` when this is not known from its reports: for who is well.
    pub since: Option<Timestamp>,
    /// All that is wrong, the worst first. Nothing while it is paused.
    pub problems: Vec<Problem>,
    /// The state of each job.
    pub jobs: Vec<JobHealth>,
    /// What is waited for.
    pub expectations: Vec<Expectation>,
    /// Whether a report is expected of it: only then it counts among the devices of a group.
    pub is_expected: bool,
    /// How long after a report the device is silent, in milliseconds, if it is expected at an interval.
    pub silent_after: Option<i64>,
    /// The grace in it, in milliseconds.
    pub grace: i64,
    /// When it will be silent, unless it is heard before.
    pub due_at: Option<Timestamp>,
    /// From when on its report is late, unless it is heard before.
    pub late_at: Option<Timestamp>,
    /// When it must be evaluated again, whether it is heard or not.
    pub check_at: Option<Timestamp>,
    /// How long two reports may be apart, grace included, in milliseconds.
    pub patience: Option<i64>,
    /// By how much dates may be behind receipt before it counts as behind, in milliseconds.
    pub behind_after: i64,
    /// Whether it is behind, also while it is paused.
    pub is_behind: bool,
}

impl Health {
    /// The earliest time at which a report is expected.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        self.expectations.iter().map(|one| one.deadline.expected_at).min()
    }

    /// Whether it has a problem of this kind.
    #[must_use]
    pub fn has(&self, kind: ProblemKind) -> bool {
        self.problems.iter().any(|problem| problem.kind == kind)
    }

    /// Whether it was to report for the first time, and has not.
    #[must_use]
    pub fn is_overdue(&self) -> bool {
        self.state == State::Never && self.has(ProblemKind::Silent)
    }
}

/// The state of a device, at `now`.
#[must_use]
pub fn evaluate(
    policy: &EffectivePolicy,
    facts: &DeviceFacts,
    excluded: &(impl Exclusions + ?Sized),
    now: Timestamp,
) -> Health {
    Evaluation { policy, facts, excluded, now }.health()
}

struct Evaluation<'a, E: ?Sized> {
    policy: &'a EffectivePolicy,
    facts: &'a DeviceFacts,
    excluded: &'a E,
    now: Timestamp,
}

impl<E: Exclusions + ?Sized> Evaluation<'_, E> {
    fn heard(&self) -> Option<Timestamp> {
        self.reports().map(|reports| reports.last_received).max()
    }

    fn reports(&self) -> impl Iterator<Item = &JobReports> {
        self.facts.jobs.iter().filter_map(|job| job.reports.as_ref())
    }

    fn health(&self) -> Health {
        let pause = self.facts.pause.filter(|pause| pause.is_on(self.now));
        let expectations = self.expectations();
        let is_expected = pause.is_none() && !expectations.is_empty();
        let patience = expectations.iter().map(|one| one.patience).max();
        let behind_after = patience.unwrap_or(0).max(LEAST_BEHIND);
        let mut problems = Vec::new();
        let mut jobs = Vec::new();
        let unheard = self.overrun_jobs();
        for facts in self.facts.jobs.iter().chain(&unheard) {
            let job = self.job(facts, &expectations, &mut problems);
            jobs.push(job);
        }
        let missed = expectations.iter().filter(|one| !one.is_of_job && one.is_missed(self.now));
        problems.extend(missed.map(|one| Problem {
            kind: ProblemKind::Silent,
            job: None,
            reason: one.reason,
            since: match one.reason {
                Reason::NeverReported => self.facts.expected_from.unwrap_or(one.base),
                _ => one.deadline.due_at,
            },
        }));
        let behind = self.behind(behind_after);
        let is_behind = behind.is_some();
        problems.extend(behind);
        problems.sort();
        problems.dedup();
        let mut health = Health {
            state: State::Ok,
            since: None,
            problems,
            jobs,
            is_expected,
            silent_after: None,
            grace: milliseconds(self.policy.rules.grace_seconds.value),
            due_at: None,
            late_at: expectations.iter().filter_map(Expectation::late_at).min(),
            check_at: None,
            patience,
            behind_after,
            is_behind,
            expectations,
        };
        if let Some(pause) = pause {
            health.problems.clear();
            health.state = State::Paused;
            health.since = Some(pause.from);
            health.late_at = None;
            health.check_at = pause.until;
            return health;
        }
        let worst = health.problems.first().map(|problem| problem.kind);
        health.state = match worst {
            _ if self.heard().is_none() => State::Never,
            Some(kind) => kind.state(),
            None => State::Ok,
        };
        health.since = match health.state {
            State::Never => Some(self.facts.expected_from.unwrap_or(self.facts.registered_at)),
            _ => worst.and_then(|kind| {
                let of_kind = health.problems.iter().filter(|problem| problem.kind == kind);
                of_kind.map(|problem| problem.since).min()
            }),
        };
        self.look_again(&mut health);
        health
    }

    /// Jobs that no report and no policy names, and of which a run takes too long.
    fn overrun_jobs(&self) -> Vec<JobFacts> {
        let mut jobs: Vec<JobFacts> = Vec::new();
        for run in self.facts.open_runs.iter().filter(|run| self.now >= self.longest_end(run)) {
            let is_known = |facts: &JobFacts| facts.job == run.job;
            if !self.facts.jobs.iter().any(is_known) && !jobs.iter().any(is_known) {
                jobs.push(JobFacts { job: run.job.clone(), waiting_since: None, reports: None });
            }
        }
        jobs
    }

    /// Sets when the device must be looked at again.
    fn look_again(&self, health: &mut Health) {
        let mut check_at = Vec::new();
        let mut awaited_since = None;
        for expectation in &health.expectations {
            if expectation.is_missed(self.now) {
                continue;
            }
            let due_at = expectation.deadline.due_at;
            // A report that ends the run ends the waiting, too, and may come at any moment.
            if expectation.held_by.is_some() && due_at <= self.now {
                awaited_since = awaited_since.or(Some(due_at));
            }
            match &self.policy.rules.expect.value.schedule() {
                Some(Schedule::Every(interval))
                    if !expectation.is_of_job && self.heard().is_some() =>
                {
                    health.silent_after = Some(interval + health.grace);
                    health.due_at = expectation.held_by.is_none().then_some(due_at);
                }
                _ => check_at.push(due_at),
            }
        }
        for run in &self.facts.open_runs {
            check_at.push(self.longest_end(run));
        }
        health.check_at = check_at.into_iter().filter(|at| *at > self.now).min();
        health.check_at = awaited_since.or(health.check_at);
    }

    /// By when a run must have been reported.
    fn longest_end(&self, run: &OpenRun) -> Timestamp {
        self.policy.run_end(run.job.as_deref(), run.started_at)
    }

    /// All that is waited for.
    fn expectations(&self) -> Vec<Expectation> {
        if self.facts.is_excused {
            return Vec::new();
        }
        let heard = self.heard();
        let mut expectations = Vec::new();
        let runs: Vec<&OpenRun> = self.facts.open_runs.iter().collect();
        let any = &self.policy.rules;
        if heard.is_none() {
            // Before its first report, nothing else is asked of a device.
            let is_asked = any.expect.value.schedule().is_some()
                || self.policy.jobs.iter().any(|job| job.rules.expect.value.schedule().is_some());
            if is_asked {
                let first = milliseconds(self.policy.first_report_seconds.value);
                let waiting = Waiting {
                    heard: None,
                    expected_from: self.facts.expected_from,
                    policy_since: self.facts.waiting_since,
                };
                let schedule = Schedule::Every(first);
                expectations.extend(self.expectation(None, &schedule, 0, &waiting, &runs).map(
                    |expectation| Expectation { reason: Reason::NeverReported, ..expectation },
                ));
            }
            return expectations;
        }
        if let Some(schedule) = any.expect.value.schedule() {
            let waiting = Waiting {
                heard,
                expected_from: self.facts.expected_from,
                policy_since: self.facts.waiting_since,
            };
            let grace = milliseconds(any.grace_seconds.value);
            expectations.extend(self.expectation(None, &schedule, grace, &waiting, &runs));
        }
        for entry in &self.policy.jobs {
            let job = entry.name();
            let Some(schedule) = entry.rules.expect.value.schedule() else { continue };
            let facts = self.facts.jobs.iter().find(|facts| facts.job.as_deref() == job);
            let heard = facts.and_then(|facts| facts.reports.as_ref()).map(|one| one.last_received);
            let waiting = Waiting {
                heard,
                // A device that comes to a policy with jobs is given the time of each from then on.
                expected_from: self.facts.expected_from.max(Some(self.facts.registered_at)),
                policy_since: facts.and_then(|facts| facts.waiting_since),
            };
            let grace = milliseconds(entry.rules.grace_seconds.value);
            let runs: Vec<_> =
                runs.iter().copied().filter(|run| run.job.as_deref() == job).collect();
            expectations.extend(
                self.expectation(Some(job), &schedule, grace, &waiting, &runs).map(|expectation| {
                    let reason =
                        if heard.is_none() { Reason::NeverReported } else { Reason::MissedRun };
                    Expectation { reason, ..expectation }
                }),
            );
        }
        expectations
    }

    /// The next report; `job` is `None` for any, and `Some(None)` for one that names no job.
    fn expectation(
        &self,
        job: Option<Option<&str>>,
        schedule: &Schedule,
        grace: i64,
        waiting: &Waiting,
        runs: &[&OpenRun],
    ) -> Option<Expectation> {
        let deadline = deadline(schedule, grace, waiting, self.excluded)?;
        let base = waiting.heard.max(waiting.expected_from).max(waiting.policy_since)?;
        let interval = match schedule {
            Schedule::Every(interval) => *interval,
            Schedule::Cron(cron) => {
                let before = cron.previous(deadline.expected_at).unwrap_or(deadline.expected_at);
                deadline.expected_at.as_millisecond() - before.as_millisecond()
            }
        };
        let held_by = runs
            .iter()
            .map(|run| Interval { from: run.started_at, until: self.longest_end(run) })
            .max_by_key(|run| run.until);
        let reason = match schedule {
            Schedule::Every(_) => Reason::NoReport,
            Schedule::Cron(_) => Reason::MissedRun,
        };
        Some(Expectation {
            job: job.flatten().map(str::to_owned),
            is_of_job: job.is_some(),
            base,
            deadline,
            grace,
            patience: interval.saturating_add(grace),
            held_by,
            reason,
        })
    }

    /// The state of a job. Its problems are added to `problems`.
    fn job(
        &self,
        facts: &JobFacts,
        expectations: &[Expectation],
        problems: &mut Vec<Problem>,
    ) -> JobHealth {
        let rules = self.policy.rules_of(facts.job.as_deref());
        let expectation = expectations.iter().find(|one| one.is_of_job && one.job == facts.job);
        let mut own = Vec::new();
        let mut add = |kind, reason, since: Timestamp| {
            own.push(Problem { kind, job: facts.job.clone(), reason, since: since.min(self.now) });
        };
        if let Some(missed) = expectation.filter(|one| one.is_missed(self.now)) {
            let since = match missed.reason {
                Reason::NeverReported => missed.base,
                _ => missed.deadline.due_at,
            };
            add(ProblemKind::Silent, missed.reason, since);
        }
        let runs = self.facts.open_runs.iter().filter(|run| run.job == facts.job);
        if let Some(end) =
            runs.map(|run| self.longest_end(run)).min().filter(|end| self.now >= *end)
        {
            add(ProblemKind::Failing, Reason::Overrun, end);
        }
        if let Some(reports) = &facts.reports {
            if let Some(since) = failing_since(rules, reports) {
                add(ProblemKind::Failing, Reason::Failures, since);
            } else if reports.consecutive_failures > 0 {
                let since = reports.first_failure.unwrap_or(reports.last_sync);
                add(ProblemKind::Degraded, Reason::Errors, since);
            }
        }
        own.sort();
        let worst = own.first();
        let state = match worst {
            Some(problem) if problem.reason == Reason::Overrun => State::Failing,
            _ if facts.reports.is_none() => State::Never,
            Some(problem) => problem.kind.state(),
            None => State::Ok,
        };
        let health = JobHealth {
            job: facts.job.clone(),
            is_expected: expectation.is_some(),
            state,
            reason: worst.map(|problem| problem.reason),
            since: worst.map(|problem| problem.since),
            next_due: expectation.map(|one| one.deadline.expected_at),
            waiting_since: facts.waiting_since,
        };
        problems.append(&mut own);
        health
    }

    /// Whether the newest date is long before the last receipt.
    fn behind(&self, behind_after: i64) -> Option<Problem> {
        let heard = self.heard()?;
        let newest = self.reports().map(|reports| reports.last_sync).max()?;
        let lag = heard.as_millisecond() - newest.as_millisecond();
        (lag > behind_after).then_some(Problem {
            kind: ProblemKind::Degraded,
            job: None,
            reason: Reason::Behind,
            since: newest,
        })
    }
}

/// Since when a job is failing; `None` when it is not.
///
/// This is the date of the first failed run of those that made it failing: of a streak, the first after the last success; by
/// "N of the last M", the first failure among the M runs that ended with the N-th. It may be older than a recovery in between,
/// because runs count whether or not an incident was open. It stays while the job is failing, also when that run is no longer among
/// the last M. Only the last [`OUTCOMES`] runs are known: a job that has been failing for longer is so since the first that is.
fn failing_since(rules: &EffectiveRules, reports: &JobReports) -> Option<Timestamp> {
    if !needs_outcomes(rules) {
        let FailingRule::InARow(runs) = rules.failing.value else { return None };
        let is_failing = reports.consecutive_failures >= i64::from(runs);
        return is_failing.then(|| reports.first_failure.unwrap_or(reports.last_sync));
    }
    let enough_successes = rules.recover_after.value as usize;
    let mut since = None;
    let (mut streak, mut successes) = (0_usize, 0_usize);
    let mut first_of_streak = None;
    for (index, outcome) in reports.outcomes.iter().enumerate() {
        if outcome.has_failed {
            if streak == 0 {
                first_of_streak = Some(outcome.at);
            }
            (streak, successes) = (streak + 1, 0);
        } else {
            (streak, successes) = (0, successes + 1);
        }
        let first = match rules.failing.value {
            FailingRule::InARow(runs) => (streak >= runs as usize).then_some(first_of_streak),
            FailingRule::OfLast { failures, of_last } => {
                let last = &reports.outcomes[(index + 1).saturating_sub(of_last as usize)..=index];
                let mut failed = last.iter().filter(|outcome| outcome.has_failed);
                let first = failed.clone().next().map(|outcome| outcome.at);
                (failed.by_ref().count() >= failures as usize).then_some(first)
            }
        };
        match first {
            Some(first) => since = since.or(first),
            None if successes >= enough_successes => since = None,
            None => {}
        }
    }
    since
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::health::{Levels, Policy, deadline::Cause};

    const MINUTE: i64 = 60 * 1000;
    const HOUR: i64 = 60 * MINUTE;

    fn at(text: &str) -> Timestamp {
        Timestamp::parse_iso8601(&format!("2026-03-{text}Z")).unwrap()
    }

    fn policy(fleet: &serde_json::Value) -> EffectivePolicy {
        let nothing = Policy::default();
        let fleet = Policy::read(fleet, "policy").unwrap();
        Levels { device: &nothing, group: &nothing, fleet: &fleet }.resolve()
    }

    fn reports(last: &str, failures: i64) -> JobReports {
        JobReports {
            last_received: at(last),
            last_sync: at(last),
            consecutive_failures: failures,
            first_failure: (failures > 0)
                .then(|| at(last).saturating_add_milliseconds(-(failures - 1) * HOUR)),
            outcomes: Vec::new(),
        }
    }

    fn job(name: Option<&str>, reports: Option<JobReports>) -> JobFacts {
        JobFacts { job: name.map(str::to_owned), waiting_since: None, reports }
    }

    fn device(jobs: Vec<JobFacts>) -> DeviceFacts {
        DeviceFacts {
            registered_at: at("01T00:00"),
            expected_from: None,
            is_excused: false,
            waiting_since: None,
            pause: None,
            jobs,
            open_runs: Vec::new(),
        }
    }

    /// The state, and all problems as `kind job reason since`.
    fn found(policy: &EffectivePolicy, facts: &DeviceFacts, now: &str) -> (State, Vec<String>) {
        let health = evaluate(policy, facts, &(), at(now));
        let problems = health.problems.iter().map(|problem| {
            let job = problem.job.as_deref().unwrap_or("-");
            let since = problem.since.to_string();
            let since = &since[8..16];
            format!("{} {job} {} {since}", problem.kind.as_str(), problem.reason.as_str())
        });
        (health.state, problems.collect())
    }

    /// A job is failing since the first failed run of those that made it failing, until it has recovered.
    #[test]
    fn a_job_is_failing_since_the_first_failure_that_counts() {
        // Each letter is a run, an hour after the one before: F failed, and S did not. The number is that of the run since which
        // the job is failing after the last one.
        let of_last = |failures, of_last| FailingRule::OfLast { failures, of_last };
        for (rule, recover_after, runs, since) in [
            // The second failure of the last five makes it failing: since the first of the two.
            (of_last(2, 5), 1, "SFSSF", Some(1)),
            (of_last(2, 5), 1, "FSSSSF", None),
            (of_last(2, 5), 1, "FSSSF", Some(0)),
            // It stays so when that failure is no longer among the last five.
            (of_last(2, 5), 1, "FFSFSF", Some(0)),
            (of_last(3, 5), 1, "FFFFFFFFFF", Some(0)),
            // It has recovered, and fails anew. A failure before the recovery counts, if it is among the last five.
            (of_last(2, 5), 1, "FFSSSSFF", Some(6)),
            (of_last(2, 5), 1, "FFSSSSF", None),
            (of_last(2, 5), 1, "FSSSFSSSF", Some(4)),
            // One success is not enough, and two failures of five remain.
            (of_last(2, 5), 3, "FFSS", Some(0)),
            (of_last(2, 5), 3, "FFSSSSS", None),
            // A streak: since its own first run.
            (FailingRule::InARow(3), 2, "FSFFF", Some(2)),
            (FailingRule::InARow(3), 2, "FSFFFSF", Some(2)),
            (FailingRule::InARow(3), 2, "FSFFFSSF", None),
        ] {
            let rule = match rule {
                FailingRule::InARow(runs) => json!({"in_a_row": runs}),
                FailingRule::OfLast { failures, of_last } => {
                    json!({"failures": failures, "of_last": of_last})
                }
            };
            let policy = policy(&json!({"failing": rule, "recover_after": recover_after}));
            let hour = |run: usize| {
                at("02T00:00").saturating_add_milliseconds(i64::try_from(run).unwrap() * HOUR)
            };
            let outcomes: Vec<_> = runs
                .chars()
                .enumerate()
                .map(|(run, letter)| Outcome { at: hour(run), has_failed: letter == 'F' })
                .collect();
            let streak = runs.chars().rev().take_while(|letter| *letter == 'F').count();
            let last = hour(runs.len() - 1);
            let reports = JobReports {
                last_received: last,
                last_sync: last,
                consecutive_failures: i64::try_from(streak).unwrap(),
                first_failure: (streak > 0).then(|| hour(runs.len() - streak)),
                outcomes,
            };
            let facts = device(vec![job(None, Some(reports))]);
            let health = evaluate(&policy, &facts, &(), last);
            let failing = health.problems.iter().find(|one| one.kind == ProblemKind::Failing);
            assert_eq!(
                failing.map(|one| one.since),
                since.map(hour),
                "{rule} {recover_after} {runs}"
            );
        }
    }

    #[test]
    fn ends_are_in_the_future_and_not_too_far() {
        let now = at("02T00:00");
        let after = |milliseconds: i64| now.saturating_add_milliseconds(milliseconds);
        for (until, expected) in [
            (now, Err(EndError::Past)),
            (after(1), Ok(())),
            (after(FARTHEST_END), Ok(())),
            (after(FARTHEST_END + 1), Err(EndError::TooFar)),
            (Timestamp::MAX, Err(EndError::TooFar)),
        ] {
            assert_eq!(check_end(until, now), expected, "{until}");
        }
    }

    /// A name, the policy, what is known, the present, and the state and problems that follow.
    type Case<'a> = (
        &'static str,
        &'a EffectivePolicy,
        DeviceFacts,
        &'static str,
        State,
        &'static [&'static str],
    );

    #[test]
    fn the_worst_problem_is_the_state() {
        let plain = policy(&json!({}));
        let well = device(vec![job(None, Some(reports("02T09:00", 0)))]);
        let failing = device(vec![job(None, Some(reports("02T09:00", 3)))]);
        let nightly = policy(&json!({
            "expect": "nothing",
            "jobs": [{"job": "nightly", "expect": {"cron": "0 2 * * *", "timezone": "UTC"},
                      "grace_seconds": 3600, "failing": {"in_a_row": 1}}],
        }));
        let never_nightly = DeviceFacts {
            registered_at: at("02T09:00"),
            jobs: vec![job(None, Some(reports("02T09:00", 0))), job(Some("nightly"), None)],
            ..device(vec![])
        };
        let of_nightly = |last: &str, failures| {
            device(vec![job(Some("nightly"), Some(reports(last, failures)))])
        };
        let cases: Vec<Case<'_>> = vec![
            ("heard", &plain, well.clone(), "02T10:29:59", State::Ok, &[]),
            (
                "not heard",
                &plain,
                well.clone(),
                "02T10:30",
                State::Silent,
                &["silent - no_report 02T10:30"],
            ),
            (
                "one failure",
                &plain,
                device(vec![job(None, Some(reports("02T09:00", 1)))]),
                "02T09:00",
                State::Degraded,
                &["degraded - errors 02T09:00"],
            ),
            (
                "three failures",
                &plain,
                failing.clone(),
                "02T09:00",
                State::Failing,
                &["failing - failures 02T07:00"],
            ),
            (
                "silence before failing",
                &plain,
                failing,
                "02T11:00",
                State::Silent,
                &["silent - no_report 02T10:30", "failing - failures 02T07:00"],
            ),
            ("nobody expects it", &plain, device(vec![]), "09T00:00", State::Never, &[]),
            (
                "on the roster",
                &plain,
                DeviceFacts { expected_from: Some(at("02T00:00")), ..device(vec![]) },
                "02T23:59",
                State::Never,
                &[],
            ),
            (
                "overdue",
                &plain,
                DeviceFacts { expected_from: Some(at("02T00:00")), ..device(vec![]) },
                "03T00:00",
                State::Never,
                &["silent - never_reported 02T00:00"],
            ),
            (
                "excused",
                &plain,
                DeviceFacts { is_excused: true, ..well.clone() },
                "09T00:00",
                State::Ok,
                &[],
            ),
            (
                "paused",
                &plain,
                DeviceFacts {
                    pause: Some(Pause { from: at("02T10:00"), until: None }),
                    ..well.clone()
                },
                "09T00:00",
                State::Paused,
                &[],
            ),
            (
                "a pause that is over",
                &plain,
                DeviceFacts {
                    pause: Some(Pause { from: at("02T10:00"), until: Some(at("02T11:00")) }),
                    ..well.clone()
                },
                "02T11:00",
                State::Silent,
                &["silent - no_report 02T10:30"],
            ),
            (
                "a night without its job",
                &nightly,
                of_nightly("02T02:00", 0),
                "03T03:00",
                State::Silent,
                &["silent nightly missed_run 03T03:00"],
            ),
            (
                "one failure is enough for this job",
                &nightly,
                of_nightly("03T02:00", 1),
                "03T02:30",
                State::Failing,
                &["failing nightly failures 03T02:00"],
            ),
            (
                "a named job that never came",
                &nightly,
                never_nightly.clone(),
                "03T03:00",
                State::Silent,
                &["silent nightly never_reported 02T09:00"],
            ),
            (
                "a date that is behind",
                &plain,
                device(vec![job(
                    None,
                    Some(JobReports { last_sync: at("01T08:59"), ..reports("02T09:00", 0) }),
                )]),
                "02T09:00",
                State::Degraded,
                &["degraded - behind 01T08:59"],
            ),
            (
                "failures dated in the future",
                &plain,
                device(vec![job(
                    None,
                    Some(JobReports {
                        first_failure: Some(at("05T00:00")),
                        ..reports("02T09:00", 1)
                    }),
                )]),
                "02T09:00",
                State::Degraded,
                &["degraded - errors 02T09:00"],
            ),
        ];
        for (name, policy, facts, now, state, problems) in cases {
            let problems: Vec<String> =
                problems.iter().map(|&problem| problem.to_owned()).collect();
            assert_eq!(found(policy, &facts, now), (state, problems), "{name}");
        }
    }

    #[test]
    fn an_open_run_holds_silence_back_until_it_takes_too_long() {
        let policy = policy(&json!({
            "expect": "nothing",
            "jobs": [{"job": "nightly", "expect": {"cron": "0 2 * * *", "timezone": "UTC"},
                      "grace_seconds": 3600, "max_run_seconds": 14400}],
        }));
        let mut facts = device(vec![job(Some("nightly"), Some(reports("03T02:10", 0)))]);
        let started_at = at("04T02:00:05");
        facts.open_runs.push(OpenRun { job: Some("nightly".to_owned()), started_at });
        assert_eq!(found(&policy, &facts, "04T05:00").0, State::Ok);
        assert_eq!(found(&policy, &facts, "04T06:00:04").0, State::Ok);
        let overrun = vec!["failing nightly overrun 04T06:00".to_owned()];
        assert_eq!(found(&policy, &facts, "04T06:00:05"), (State::Failing, overrun));
        // Before the deadline it is looked at then, and after it in every sweep: the report may come at any moment.
        let health = evaluate(&policy, &facts, &(), at("04T02:30"));
        assert_eq!(health.check_at, Some(at("04T03:00")));
        let health = evaluate(&policy, &facts, &(), at("04T05:00"));
        assert_eq!(health.check_at, Some(at("04T03:00")));
        assert_eq!(health.late_at, None);
        // Any report within an hour: silence is found though a run was open when the device was looked at.
        let hourly = self::policy(&json!({}));
        let mut facts = device(vec![job(None, Some(reports("04T09:00", 0)))]);
        facts.open_runs.push(OpenRun { job: None, started_at: at("04T09:00") });
        let health = evaluate(&hourly, &facts, &(), at("04T09:00:15"));
        assert_eq!((health.silent_after, health.due_at), (Some(90 * MINUTE), None));
    }

    /// A run hangs whose job nobody names, and that was never heard.
    #[test]
    fn an_open_run_of_an_unknown_job_is_too_long_in_the_end() {
        let policy = policy(&json!({"max_run_seconds": 3600}));
        let mut facts = device(vec![job(None, Some(reports("04T09:00", 0)))]);
        facts.open_runs.push(OpenRun { job: Some("bk".to_owned()), started_at: at("04T09:30") });
        assert_eq!(found(&policy, &facts, "04T10:29"), (State::Ok, Vec::new()));
        let overrun = vec!["failing bk overrun 04T10:30".to_owned()];
        assert_eq!(found(&policy, &facts, "04T12:00"), (State::Failing, overrun.clone()));
        let health = evaluate(&policy, &facts, &(), at("04T10:00"));
        assert_eq!(health.check_at, Some(at("04T10:30")));
        // It has never reported at all.
        facts.jobs.clear();
        assert_eq!(found(&policy, &facts, "04T12:00"), (State::Never, overrun));
    }

    #[test]
    fn a_change_of_policy_restarts_waiting_but_not_for_the_silent() {
        let since = Some(at("02T12:00"));
        assert_eq!(waiting_since(None, since), since);
        assert_eq!(waiting_since(Some((None, false)), since), since);
        assert_eq!(waiting_since(Some((None, true)), since), None);
        assert_eq!(waiting_since(Some((Some(at("02T10:00")), true)), since), Some(at("02T10:00")));
    }

    #[test]
    fn an_outage_defers_silence() {
        let facts = device(vec![job(None, Some(reports("02T09:00", 0)))]);
        let outage = [(Cause::Outage, Interval { from: at("02T10:00"), until: at("02T10:10") })];
        let state = |now: &str| evaluate(&policy(&json!({})), &facts, &outage[..], at(now)).state;
        assert_eq!(state("02T11:39"), State::Ok);
        assert_eq!(state("02T11:40"), State::Silent);
    }

    /// Whether a job is failing, by its runs in the order of their dates: naively, run by run.
    fn is_failing_naively(rule: FailingRule, recover_after: usize, failed: &[bool]) -> bool {
        let mut is_failing = false;
        for end in 1..=failed.len() {
            let runs = &failed[..end];
            let in_a_row = runs.iter().rev().take_while(|failed| **failed).count();
            let well = runs.iter().rev().take_while(|failed| !**failed).count();
            let is_bad = match rule {
                FailingRule::InARow(most) => in_a_row >= most as usize,
                FailingRule::OfLast { failures, of_last } => {
                    let last = runs.iter().rev().take(of_last as usize);
                    last.filter(|failed| **failed).count() >= failures as usize
                }
            };
            is_failing = is_bad || (is_failing && well < recover_after);
        }
        is_failing
    }

    proptest! {
        /// Whatever the rule: what it says of the reports is what going through them run by run says.
        #[test]
        fn failing_is_what_the_runs_in_their_order_say(
            failed in prop::collection::vec(any::<bool>(), 0..40),
            in_a_row in 1_u32..5,
            failures in 1_u32..6,
            more in 0_u32..6,
            recover_after in 1_u32..4,
            counts in any::<bool>(),
        ) {
            let rule = if counts {
                FailingRule::OfLast { failures, of_last: failures + more }
            } else {
                FailingRule::InARow(in_a_row)
            };
            let policy = policy(&json!({
                "expect": "nothing", "failing": rule.to_json(), "recover_after": recover_after,
            }));
            let date = |index: usize| {
                at("02T00:00").saturating_add_milliseconds(i64::try_from(index).unwrap() * HOUR)
            };
            let streak = failed.iter().rev().take_while(|failed| **failed).count();
            let outcomes: Vec<_> = failed
                .iter()
                .enumerate()
                .map(|(index, failed)| Outcome { at: date(index), has_failed: *failed })
                .collect();
            let reports = (!failed.is_empty()).then(|| JobReports {
                last_received: date(failed.len() - 1),
                last_sync: date(failed.len() - 1),
                consecutive_failures: i64::try_from(streak).unwrap(),
                first_failure: (streak > 0).then(|| date(failed.len() - streak)),
                outcomes,
            });
            let facts = device(vec![job(None, reports)]);
            let health = evaluate(&policy, &facts, &(), at("20T00:00"));
            let expected = is_failing_naively(rule, recover_after as usize, &failed);
            prop_assert_eq!(health.has(ProblemKind::Failing), expected);
            let is_degraded = !expected && streak > 0;
            prop_assert_eq!(health.has(ProblemKind::Degraded), is_degraded);
        }
    }
}
