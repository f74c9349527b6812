//! Why a device is in its state, and until when it is waited for: in sentences for people, and as a document for programs.
//! The API and the command line answer it.

use jiff::tz::TimeZone;
use pisync_core::{
    Timestamp,
    health::{
        Cause, Expect, Expectation, FailingRule, Interval, JobReports, Level, Pause, Problem,
        ProblemKind, Reason, State,
    },
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::store::Examination;

/// Why a device is in its state.
#[derive(Debug, Serialize, ToSchema)]
pub struct Explanation {
    /// When it was evaluated.
    #[schema(value_type = String, format = DateTime, example = "2026-03-02T10:45:00.000Z")]
    now: Timestamp,
    #[schema(example = "pi-device-001")]
    device_id: String,
    /// Its state.
    #[schema(value_type = String, example = "silent")]
    status: State,
    /// What is known.
    facts: KnownFacts,
    /// What is waited for.
    expectations: Vec<Awaited>,
    /// All of it in words.
    #[schema(example = json!(["pi-device-001 has been silent since 2026-03-02 10:30 UTC."]))]
    sentences: Vec<String>,
}

/// What is known about a device.
#[derive(Debug, Serialize, ToSchema)]
struct KnownFacts {
    /// When the server last heard it.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_seen: Option<Timestamp>,
    /// Since when the roster expects it.
    #[schema(value_type = Option<String>, format = DateTime)]
    expected_from: Option<Timestamp>,
    /// Since when the present policy waits for it.
    #[schema(value_type = Option<String>, format = DateTime)]
    waiting_since: Option<Timestamp>,
    /// The pause that is in force; of several the one that ends last.
    paused: Option<KnownPause>,
    /// All pauses that are in force: the device's own, its group's, the fleet's.
    pauses: Vec<KnownPause>,
    /// Its jobs.
    jobs: Vec<KnownJob>,
    /// Runs that were started and are not over.
    runs: Vec<KnownRun>,
}

/// A pause that is in force.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct KnownPause {
    /// Whose it is: `device`, `group` or `fleet`.
    #[schema(example = "group")]
    by: &'static str,
    #[schema(value_type = String, format = DateTime)]
    from: Timestamp,
    /// Null until somebody ends it.
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
}

/// What is known about a job.
#[derive(Debug, Serialize, ToSchema)]
struct KnownJob {
    /// Null for reports that name none.
    job: Option<String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    last_seen: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    last_sync: Option<Timestamp>,
    consecutive_failures: i64,
}

/// A run that was started.
#[derive(Debug, Serialize, ToSchema)]
struct KnownRun {
    job: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    started_at: Timestamp,
}

/// A report that is waited for.
#[derive(Debug, Serialize, ToSchema)]
struct Awaited {
    /// Null for any report, and for reports that name no job.
    job: Option<String>,
    /// From when on it is waited for.
    #[schema(value_type = String, format = DateTime)]
    base: Timestamp,
    /// When it is expected.
    #[schema(value_type = String, format = DateTime)]
    expected_at: Timestamp,
    /// By when it must be there.
    #[schema(value_type = String, format = DateTime)]
    deadline: Timestamp,
    /// What made the deadline later.
    moved_by: Vec<Mover>,
}

/// What made a deadline later.
#[derive(Debug, Serialize, ToSchema)]
struct Mover {
    /// `outage`, `pause`, `window` or `run`.
    #[schema(value_type = String, example = "outage")]
    what: &'static str,
    #[schema(value_type = String, format = DateTime)]
    from: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    until: Timestamp,
}

impl Mover {
    fn new(what: &'static str, Interval { from, until }: Interval) -> Self {
        Self { what, from, until }
    }
}

impl Awaited {
    fn new(expectation: &Expectation) -> Self {
        let moved_by = expectation.deadline.moved_by.iter().map(|moved| {
            let what = match moved.cause {
                Cause::Outage => "outage",
                Cause::Pause => "pause",
                Cause::ClosedWindow => "window",
            };
            Mover::new(what, moved.interval)
        });
        let run = expectation.held_by.map(|run| Mover::new("run", run));
        Self {
            job: expectation.job.clone(),
            base: expectation.base,
            expected_at: expectation.deadline.expected_at,
            deadline: expectation.deadline.due_at,
            moved_by: moved_by.chain(run).collect(),
        }
    }
}

impl Explanation {
    /// Explains what an examination at `now` has found.
    #[must_use]
    pub fn new(examination: &Examination, now: Timestamp) -> Self {
        let facts = &examination.facts;
        let jobs = facts.jobs.iter().map(|job| {
            let reports = job.reports.as_ref();
            KnownJob {
                job: job.job.clone(),
                last_seen: reports.map(|reports| reports.last_received),
                last_sync: reports.map(|reports| reports.last_sync),
                consecutive_failures: reports.map_or(0, |reports| reports.consecutive_failures),
            }
        });
        let runs = facts
            .open_runs
            .iter()
            .map(|run| KnownRun { job: run.job.clone(), started_at: run.started_at });
        let pauses: Vec<_> = examination
            .pauses
            .in_force(now)
            .map(|(level, Pause { from, until })| KnownPause { by: level.as_str(), from, until })
            .collect();
        let longest = pauses.iter().max_by_key(|pause| pause.until.unwrap_or(Timestamp::MAX));
        Self {
            now,
            device_id: examination.device_id.clone(),
            status: examination.health.state,
            facts: KnownFacts {
                last_seen: examination.heard,
                expected_from: facts.expected_from,
                waiting_since: facts.waiting_since,
                paused: longest.cloned(),
                pauses,
                jobs: jobs.collect(),
                runs: runs.collect(),
            },
            expectations: examination.health.expectations.iter().map(Awaited::new).collect(),
            sentences: sentences(examination, now),
        }
    }

    /// All of it in words.
    #[must_use]
    pub fn sentences(&self) -> &[String] {
        &self.sentences
    }
}

/// An instant for people, to the minute where seconds say nothing.
fn shown(at: Timestamp) -> String {
    let at = at.to_jiff().to_zoned(TimeZone::UTC);
    let has_seconds = at.second() != 0 || at.subsec_nanosecond() != 0;
    let format = if has_seconds { "%Y-%m-%d %H:%M:%S UTC" } else { "%Y-%m-%d %H:%M UTC" };
    at.strftime(format).to_string()
}

/// A duration for people.
fn lasting(milliseconds: i64) -> String {
    const UNITS: [(i64, &str); 4] =
        [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")];
    let mut rest = milliseconds;
    let mut words = Vec::new();
    for (unit, name) in UNITS {
        if rest >= unit && words.len() < 2 {
            words.push(format!("{} {name}", rest / unit));
            rest %= unit;
        }
    }
    if words.is_empty() { "0 s".to_owned() } else { words.join(" ") }
}

fn named(job: Option<&str>) -> String {
    job.map_or_else(|| "its reports that name no job".to_owned(), |job| format!("its job {job}"))
}

fn sentences(examination: &Examination, now: Timestamp) -> Vec<String> {
    let mut sentences = vec![state(examination)];
    if let Some(heard) = examination.heard {
        let ago = lasting(now.as_millisecond() - heard.as_millisecond());
        sentences.push(format!("The server last heard it at {}, {ago} ago.", shown(heard)));
    } else if let Some(from) = examination.facts.expected_from {
        sentences.push(format!("It has been on the roster since {}.", shown(from)));
    }
    let pauses = examination.pauses.in_force(now).map(|(level, pause)| paused(level, pause));
    sentences.extend(pauses);
    if examination.facts.pause.is_some() {
        return sentences;
    }
    sentences.extend(examination.health.problems.iter().map(|one| problem(examination, one)));
    sentences
        .extend(examination.health.expectations.iter().map(|one| awaited(examination, one, now)));
    if examination.health.expectations.is_empty() {
        sentences.push(format!("Nothing is expected of it: {}.", why_nothing(examination)));
    }
    sentences
}

/// A pause that is in force, and how long.
fn paused(level: Level, pause: Pause) -> String {
    let whose = match level {
        Level::Device | Level::BuiltIn => "The device itself is paused",
        Level::Group => "Its group is paused",
        Level::Fleet => "The whole fleet is paused",
    };
    let until = pause.until.map_or_else(
        || "until somebody ends it".to_owned(),
        |until| format!("until {}", shown(until)),
    );
    format!("{whose} since {}, {until}.", shown(pause.from))
}

/// Why nothing is expected of a device that is not paused.
fn why_nothing(examination: &Examination) -> &'static str {
    let policy = &examination.policy;
    let has_schedule = |expect: &Expect| !matches!(expect, Expect::Nothing);
    let is_asked = has_schedule(&policy.rules.expect.value)
        || policy.jobs.iter().any(|job| has_schedule(&job.rules.expect.value));
    if examination.facts.is_excused {
        return "somebody has said so";
    }
    if !is_asked {
        return match policy.rules.expect.from {
            Level::Device => "its own policy says so",
            Level::Group => "the policy of its group says so",
            Level::Fleet => "the policy of the fleet says so",
            Level::BuiltIn => "its policy says so",
        };
    }
    if examination.heard.is_none() && examination.facts.expected_from.is_none() {
        return "it has never reported, and is on no roster";
    }
    "no time of its schedule is to come that is not within a closed window, a pause or an outage"
}

fn state(examination: &Examination) -> String {
    let id = &examination.device_id;
    let words = match examination.health.state {
        State::Paused => "is paused",
        State::Never => "has never reported",
        State::Silent => "is silent",
        State::Failing => "is failing",
        State::Degraded => "is degraded",
        State::Ok => "is well",
    };
    match examination.health.since {
        Some(since)
            if ![State::Ok, State::Paused, State::Never].contains(&examination.health.state) =>
        {
            format!("{id} {words}, since {}.", shown(since))
        }
        _ => format!("{id} {words}."),
    }
}

fn problem(examination: &Examination, problem: &Problem) -> String {
    let job = named(problem.job.as_deref());
    let since = shown(problem.since);
    let reports = examination
        .facts
        .jobs
        .iter()
        .find(|facts| facts.job == problem.job)
        .and_then(|facts| facts.reports.as_ref());
    let failures = reports.map_or(0, |reports: &JobReports| reports.consecutive_failures);
    let rules = examination.policy.rules_of(problem.job.as_deref());
    match (problem.kind, problem.reason) {
        (_, Reason::Failures) => match rules.failing.value {
            FailingRule::InARow(runs) => {
                let times = if failures == 1 { "time" } else { "times" };
                format!(
                    "Runs of {job} have failed {failures} {times} in a row, since {since}; {runs} failures in a row are too many."
                )
            }
            FailingRule::OfLast { failures: most, of_last } => {
                let last = reports.map_or(&[][..], |reports| &reports.outcomes);
                let looked_at = last.iter().rev().take(of_last as usize);
                let failed = looked_at.filter(|outcome| outcome.has_failed).count();
                format!(
                    "{failed} of the last {of_last} runs of {job} have failed, since {since}; {most} are too many."
                )
            }
        },
        (_, Reason::Overrun) => {
            let most = lasting(i64::from(rules.max_run_seconds.value) * 1000);
            format!(
                "A run of {job} was started and has not been reported within {most}, since {since}."
            )
        }
        (_, Reason::Errors) => format!("The last run of {job} had errors, since {since}."),
        (_, Reason::Behind) => format!(
            "What it reports is dated {since} and before: its clock is wrong, or it sends what it could not send earlier."
        ),
        (ProblemKind::Silent, Reason::NeverReported) => {
            format!("A first report is overdue; it was waited for since {since}.")
        }
        (_, Reason::MissedRun) => format!("A report of {job} is missing since {since}."),
        (_, Reason::NoReport | Reason::NeverReported) => {
            format!("A report is missing since {since}.")
        }
    }
}

fn awaited(examination: &Examination, awaited: &Expectation, now: Timestamp) -> String {
    let what = match (&awaited.job, awaited.is_of_job) {
        (Some(job), _) => format!("A report of its job {job}"),
        (None, true) => "A report that names no job".to_owned(),
        (None, false) => "A report".to_owned(),
    };
    let rules = if awaited.is_of_job {
        examination.policy.rules_of(awaited.job.as_deref())
    } else {
        &examination.policy.rules
    };
    let when = match &rules.expect.value {
        _ if awaited.reason == Reason::NeverReported && !awaited.is_of_job => {
            let first = lasting(i64::from(examination.policy.first_report_seconds.value) * 1000);
            format!("within {first} of {}", shown(awaited.base))
        }
        Expect::Every(seconds) => {
            format!("within {} of {}", lasting(i64::from(*seconds) * 1000), shown(awaited.base))
        }
        Expect::Cron { cron, timezone, .. } => {
            format!("at {} (`{cron}`, {timezone})", shown(awaited.deadline.expected_at))
        }
        Expect::Nothing => format!("by {}", shown(awaited.deadline.expected_at)),
    };
    let is_past = awaited.deadline.due_at <= now;
    let (was, deadline) = if awaited.is_missed(now) {
        ("was", format!("it had to be there by {}", shown(awaited.deadline.due_at)))
    } else if is_past {
        ("was", format!("it would be missing since {}", shown(awaited.deadline.due_at)))
    } else {
        ("is", format!("it will be missing from {} on", shown(awaited.deadline.due_at)))
    };
    let grace = if awaited.grace > 0 {
        format!(", with {} of grace", lasting(awaited.grace))
    } else {
        String::new()
    };
    let mut sentence = format!("{what} {was} expected {when}{grace}; {deadline}.");
    for moved in &awaited.deadline.moved_by {
        let (from, until) = (shown(moved.interval.from), shown(moved.interval.until));
        let (why, what) = match moved.cause {
            Cause::Outage => ("nobody could be heard", "the outage"),
            Cause::Pause => ("there was a pause", "the pause"),
            Cause::ClosedWindow => ("a window is closed", "the closed window"),
        };
        // One that nobody has ended.
        if moved.interval.until == Timestamp::MAX {
            sentence += &format!(" Nothing is missing while {what} lasts that began at {from}.");
        } else {
            sentence += &format!(" That was moved, because {why} from {from} until {until}.");
        }
    }
    if let Some(run) = awaited.held_by {
        let (from, until) = (shown(run.from), shown(run.until));
        let may = if run.until <= now { "was to take" } else { "may take" };
        sentence += &format!(
            " It is not missing while the run is open that was started at {from} and {may} until {until}."
        );
    }
    sentence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_shown_in_two_units_at_most() {
        let cases = [
            (0, "0 s"),
            (999, "0 s"),
            (30_000, "30 s"),
            (90 * 60_000, "1 h 30 min"),
            (26 * 3_600_000, "1 d 2 h"),
            (86_400_000 + 61_000, "1 d 1 min"),
        ];
        for (milliseconds, expected) in cases {
            assert_eq!(lasting(milliseconds), expected);
        }
    }
}
