//! Which policy decides what: field by field, the entry of a job in the device's, the group's and the fleet's policy, then
//! these policies themselves, then what is built in.

use serde_json::{Map, Value, json};

use super::policy::{Expect, FailingRule, JobPolicy, Policy, Rules, Severity, milliseconds};
use crate::{JobName, Timestamp};

/// Within how many seconds a report is expected when nobody says otherwise: an hour.
pub const DEFAULT_INTERVAL: u32 = 3600;

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The device's own policy.
    Device,
    /// The policy of its group.
    Group,
    /// The fleet's policy.
    Fleet,
    /// Nobody has set it.
    BuiltIn,
}

impl Level {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Group => "group",
            Self::Fleet => "fleet",
            Self::BuiltIn => "built-in",
        }
    }
}

/// A value, and who decided it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decided<T> {
    /// The value.
    pub value: T,
    /// The level that set it.
    pub from: Level,
}

impl<T> Decided<T> {
    fn to_json(&self, value: impl FnOnce(&T) -> Value) -> Value {
        json!({ "value": value(&self.value), "from": self.from.as_str() })
    }
}

/// The policies that apply to a device.
#[derive(Debug, Clone, Copy)]
pub struct Levels<'a> {
    /// Its own.
    pub device: &'a Policy,
    /// Its group's.
    pub group: &'a Policy,
    /// The fleet's.
    pub fleet: &'a Policy,
}

/// The rules for one job, or for all reports of a device.
#[derive(Debug, Clone, PartialEq)]
pub struct EffectiveRules {
    /// When a report is expected.
    pub expect: Decided<Expect>,
    /// How many seconds later it may come.
    pub grace_seconds: Decided<u32>,
    /// Which failures make it failing.
    pub failing: Decided<FailingRule>,
    /// After how many successes in a row it no longer is.
    pub recover_after: Decided<u32>,
    /// How many seconds a started run may take.
    pub max_run_seconds: Decided<u32>,
}

/// What applies to a device.
#[derive(Debug, Clone, PartialEq)]
pub struct EffectivePolicy {
    /// When any report is expected, and the rules of jobs that are not named.
    pub rules: EffectiveRules,
    /// By when a device on the roster must have reported, in seconds.
    pub first_report_seconds: Decided<u32>,
    /// How bad silence is.
    pub silent: Decided<Severity>,
    /// How bad failing is.
    pub failing: Decided<Severity>,
    /// How many devices of a group must be missing.
    pub group_at_least: Decided<u32>,
    /// And how many of each hundred.
    pub group_percent: Decided<u32>,
    /// The jobs that are expected by name, in the order of their names; the reports that name no job come first.
    pub jobs: Vec<EffectiveJob>,
}

/// The rules of a job that is expected by name.
#[derive(Debug, Clone, PartialEq)]
pub struct EffectiveJob {
    /// The job; `None` for reports that name none.
    pub job: Option<JobName>,
    /// The most specific level that names it.
    pub from: Level,
    /// Its rules.
    pub rules: EffectiveRules,
}

impl<'a> Levels<'a> {
    fn each(self) -> [(Level, &'a Policy); 3] {
        [(Level::Device, self.device), (Level::Group, self.group), (Level::Fleet, self.fleet)]
    }

    fn decide<T>(self, field: impl Fn(&'a Policy) -> Option<T>, built_in: T) -> Decided<T> {
        self.each()
            .into_iter()
            .find_map(|(from, policy)| field(policy).map(|value| Decided { value, from }))
            .unwrap_or(Decided { value: built_in, from: Level::BuiltIn })
    }

    /// One of the rules: for a job that is named, first what its entries say.
    fn rule<T>(
        self,
        entries: &[(Level, &'a JobPolicy)],
        field: impl Fn(&'a Rules) -> Option<T>,
        built_in: T,
    ) -> Decided<T> {
        entries
            .iter()
            .find_map(|(from, entry)| {
                field(&entry.rules).map(|value| Decided { value, from: *from })
            })
            .unwrap_or_else(|| self.decide(|policy| field(&policy.rules), built_in))
    }

    fn rules(self, entries: &[(Level, &'a JobPolicy)], expect: Expect) -> EffectiveRules {
        EffectiveRules {
            expect: self.rule(entries, |rules| rules.expect.clone(), expect),
            grace_seconds: self.rule(entries, |rules| rules.grace_seconds, 1800),
            failing: self.rule(entries, |rules| rules.failing, FailingRule::InARow(3)),
            recover_after: self.rule(entries, |rules| rules.recover_after, 1),
            max_run_seconds: self.rule(entries, |rules| rules.max_run_seconds, 12 * 3600),
        }
    }

    /// The names of all jobs that any level names.
    fn jobs(self) -> Vec<Option<&'a JobName>> {
        let mut names: Vec<_> = self
            .each()
            .into_iter()
            .flat_map(|(_, policy)| policy.jobs.iter().flatten())
            .map(|entry| entry.job.as_ref())
            .collect();
        names.sort_unstable_by_key(|name| name.map(JobName::as_str));
        names.dedup();
        names
    }

    fn entries(self, job: Option<&JobName>) -> Vec<(Level, &'a JobPolicy)> {
        self.each()
            .into_iter()
            .filter_map(|(level, policy)| {
                let mut entries = policy.jobs.iter().flatten();
                entries.find(|entry| entry.job.as_ref() == job).map(|entry| (level, entry))
            })
            .collect()
    }

    /// What applies.
    #[must_use]
    pub fn resolve(self) -> EffectivePolicy {
        let names = self.jobs();
        // Who names jobs has said what is expected: nothing else is.
        let expect =
            if names.is_empty() { Expect::Every(DEFAULT_INTERVAL) } else { Expect::Nothing };
        let jobs = names.into_iter().map(|job| {
            let entries = self.entries(job);
            EffectiveJob {
                job: job.cloned(),
                from: entries.first().map_or(Level::BuiltIn, |(level, _)| *level),
                rules: self.rules(&entries, Expect::Every(DEFAULT_INTERVAL)),
            }
        });
        EffectivePolicy {
            rules: self.rules(&[], expect),
            first_report_seconds: self.decide(|policy| policy.first_report_seconds, 24 * 3600),
            silent: self.decide(|policy| policy.silent, Severity::Warning),
            failing: self.decide(|policy| policy.failing, Severity::Warning),
            group_at_least: self.decide(|policy| policy.group_at_least, 5),
            group_percent: self.decide(|policy| policy.group_percent, 50),
            jobs: jobs.collect(),
        }
    }
}

impl EffectiveJob {
    /// The job's name; `None` for reports that name none.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.job.as_ref().map(JobName::as_str)
    }
}

impl EffectiveRules {
    fn to_map(&self) -> Map<String, Value> {
        let number = |number: &u32| json!(number);
        [
            ("expect", self.expect.to_json(Expect::to_json)),
            ("grace_seconds", self.grace_seconds.to_json(number)),
            ("failing", self.failing.to_json(|rule| rule.to_json())),
            ("recover_after", self.recover_after.to_json(number)),
            ("max_run_seconds", self.max_run_seconds.to_json(number)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

impl EffectivePolicy {
    /// The rules that apply to a job; `None` stands for reports that name none.
    #[must_use]
    pub fn rules_of(&self, job: Option<&str>) -> &EffectiveRules {
        let entry = self.jobs.iter().find(|entry| entry.name() == job);
        entry.map_or(&self.rules, |entry| &entry.rules)
    }

    /// Whether a job is expected by name.
    #[must_use]
    pub fn names(&self, job: Option<&str>) -> bool {
        self.jobs.iter().any(|entry| entry.name() == job)
    }

    /// By when a run of a job that has started must have been reported.
    #[must_use]
    pub fn run_end(&self, job: Option<&str>, started_at: Timestamp) -> Timestamp {
        let longest = milliseconds(self.rules_of(job).max_run_seconds.value);
        started_at.saturating_add_milliseconds(longest)
    }

    /// As JSON: each field with its value and the level that decided it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut fields = self.rules.to_map();
        let number = |number: &u32| json!(number);
        let word = |severity: &Severity| json!(severity.as_str());
        fields.insert("first_report_seconds".to_owned(), self.first_report_seconds.to_json(number));
        fields.insert(
            "severity".to_owned(),
            json!({ "silent": self.silent.to_json(word), "failing": self.failing.to_json(word) }),
        );
        fields.insert(
            "group".to_owned(),
            json!({
                "at_least": self.group_at_least.to_json(number),
                "percent": self.group_percent.to_json(number),
            }),
        );
        let jobs: Vec<_> = self
            .jobs
            .iter()
            .map(|entry| {
                let mut fields = entry.rules.to_map();
                fields.insert("job".to_owned(), json!(entry.name()));
                fields.insert("from".to_owned(), json!(entry.from.as_str()));
                Value::Object(fields)
            })
            .collect();
        fields.insert("jobs".to_owned(), Value::Array(jobs));
        Value::Object(fields)
    }
}
