//! What is expected of devices, as people set it: for the fleet, for a group, for a device, and for a job in each of them.
//! Every field is optional. [`super::resolve`] finds which level decides a field. The API and the command line read and
//! write policies as JSON in the shape below.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::schedule::{CronSchedule, Schedule};
use crate::{JobName, Violation, ViolationCode};

/// The most jobs that one policy names.
pub const MOST_JOBS: usize = 20;

/// The longest cron expression, in characters.
const LONGEST_CRON: usize = 200;

const MINUTE: u32 = 60;
const DAY: u32 = 24 * 60 * MINUTE;

/// When a report is expected.
#[derive(Debug, Clone)]
pub enum Expect {
    /// Within so many seconds after the last.
    Every(u32),
    /// At the times of a cron expression. The texts are as they were given.
    Cron {
        /// The expression.
        cron: String,
        /// The IANA time zone.
        timezone: String,
        /// Both, ready to use.
        schedule: Box<CronSchedule>,
    },
    /// At no time.
    Nothing,
}

impl PartialEq for Expect {
    fn eq(&self, other: &Self) -> bool {
        self.to_json() == other.to_json()
    }
}

impl Expect {
    /// The schedule; `None` when nothing is expected.
    #[must_use]
    pub fn schedule(&self) -> Option<Schedule> {
        match self {
            Self::Every(seconds) => Some(Schedule::Every(milliseconds(*seconds))),
            Self::Cron { schedule, .. } => Some(Schedule::Cron(schedule.clone())),
            Self::Nothing => None,
        }
    }

    /// As JSON, in the form in which it is read.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Every(seconds) => json!({ "every_seconds": seconds }),
            Self::Cron { cron, timezone, .. } => json!({ "cron": cron, "timezone": timezone }),
            Self::Nothing => json!("nothing"),
        }
    }
}

/// Which failures make a job failing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailingRule {
    /// So many in a row.
    InARow(u32),
    /// So many of the last runs.
    OfLast {
        /// The number of failures.
        failures: u32,
        /// Among so many runs.
        of_last: u32,
    },
}

impl FailingRule {
    /// As JSON, in the form in which it is read.
    #[must_use]
    pub fn to_json(self) -> Value {
        match self {
            Self::InARow(runs) => json!({ "in_a_row": runs }),
            Self::OfLast { failures, of_last } => {
                json!({ "failures": failures, "of_last": of_last })
            }
        }
    }
}

/// How bad an incident is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Somebody should look.
    Warning,
    /// Somebody must look now.
    Critical,
}

impl Severity {
    /// All of them, the mildest first.
    pub const ALL: [Self; 3] = [Self::Info, Self::Warning, Self::Critical];

    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|severity| severity.as_str() == word)
    }
}

/// What people may set for reports in general and for one job.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// When a report is expected.
    pub expect: Option<Expect>,
    /// How much later it may come, in seconds: 0 to 30 days.
    pub grace_seconds: Option<u32>,
    /// Which failures make it failing.
    pub failing: Option<FailingRule>,
    /// After how many successes in a row it no longer is: 1 to 20.
    pub recover_after: Option<u32>,
    /// How long a started run may take, in seconds: a minute to 30 days.
    pub max_run_seconds: Option<u32>,
}

/// The rules of one job.
#[derive(Debug, Clone, PartialEq)]
pub struct JobPolicy {
    /// The job; `None` for reports that name none.
    pub job: Option<JobName>,
    /// Its rules.
    pub rules: Rules,
}

/// A policy as somebody set it, for the fleet, a group, or a device.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Policy {
    /// The rules for every job, and when any report at all is expected.
    pub rules: Rules,
    /// By when a device on the roster must have reported for the first time, in seconds: a minute to a year.
    pub first_report_seconds: Option<u32>,
    /// How bad silence is.
    pub silent: Option<Severity>,
    /// How bad failing is.
    pub failing: Option<Severity>,
    /// How many devices of a group must be missing before the group has an incident: 2 to 100,000.
    pub group_at_least: Option<u32>,
    /// And how many of each hundred: 1 to 100.
    pub group_percent: Option<u32>,
    /// Jobs that are expected by name; `None` inherits them.
    pub jobs: Option<Vec<JobPolicy>>,
}

/// A change of a policy. An absent field is left alone, and null inherits it again. So it is with the members of
/// [`MERGED_FIELDS`], as in a JSON Merge Patch (RFC 7396). Any other field is replaced as a whole.
#[derive(Debug, Clone, Default)]
pub struct PolicyChange(Map<String, Value>);

/// The fields whose members are settings of their own, each with a level that decides it. `expect`, `failing` and `jobs` are
/// one setting each: half of a cron expression's object, or of a rule's, would mean nothing.
const MERGED_FIELDS: [&str; 2] = ["severity", "group"];

/// The fields of a policy, in the order in which they are documented.
pub const POLICY_FIELDS: [&str; 9] = [
    "expect",
    "grace_seconds",
    "failing",
    "recover_after",
    "max_run_seconds",
    "first_report_seconds",
    "severity",
    "group",
    "jobs",
];

/// The fields of a job's entry beside `job`.
pub const JOB_FIELDS: [&str; 5] =
    ["expect", "grace_seconds", "failing", "recover_after", "max_run_seconds"];

impl PolicyChange {
    /// Reads a change, each field by its rule. `path` is the policy's own name in the request, such as `policy`.
    ///
    /// # Errors
    /// Every wrong field, by its full name.
    pub fn read(value: &Value, path: &str) -> Result<Self, Vec<Violation>> {
        let mut reader = Reader::default();
        let fields = reader.object(value, path);
        reader.policy(&fields, path);
        if reader.violations.is_empty() { Ok(Self(fields)) } else { Err(reader.violations) }
    }

    /// The policy that `policy` becomes.
    #[must_use]
    pub fn apply_to(&self, policy: &Policy) -> Policy {
        let mut merged = policy.to_map();
        for (field, value) in &self.0 {
            match (merged.get_mut(field), value) {
                // A member that is null counts as absent when the policy is read again.
                (Some(Value::Object(kept)), Value::Object(members))
                    if MERGED_FIELDS.contains(&field.as_str()) =>
                {
                    kept.extend(members.clone());
                }
                _ => {
                    merged.insert(field.clone(), value.clone());
                }
            }
        }
        merged.retain(|_, value| !value.is_null());
        Policy::from_stored(&Value::Object(merged))
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The change as it was sent, for the audit log.
    #[must_use]
    pub fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }
}

impl Policy {
    /// Reads a whole policy: what is absent is inherited. `path` is as in [`PolicyChange::read`].
    ///
    /// # Errors
    /// Every wrong field, by its full name.
    pub fn read(value: &Value, path: &str) -> Result<Self, Vec<Violation>> {
        PolicyChange::read(value, path).map(|change| change.apply_to(&Self::default()))
    }

    /// Reads a policy that this program stored. What foreign SQL made wrong is inherited.
    #[must_use]
    pub fn from_stored(value: &Value) -> Self {
        let mut reader = Reader::default();
        let fields = reader.object(value, "policy");
        reader.policy(&fields, "policy")
    }

    /// Whether it sets nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// As JSON, in the form in which it is read. What is inherited is absent.
    #[must_use]
    pub fn to_json(&self) -> Value {
        Value::Object(self.to_map())
    }

    fn to_map(&self) -> Map<String, Value> {
        let mut fields = self.rules.to_map();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                fields.insert(name.to_owned(), value);
            }
        };
        set("first_report_seconds", self.first_report_seconds.map(Value::from));
        let of_two = |first: (&str, Option<Value>), second: (&str, Option<Value>)| {
            let both: Map<String, Value> = [first, second]
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), value?)))
                .collect();
            (!both.is_empty()).then_some(Value::Object(both))
        };
        let word = |severity: Option<Severity>| severity.map(|one| Value::from(one.as_str()));
        set("severity", of_two(("silent", word(self.silent)), ("failing", word(self.failing))));
        let number = |number: Option<u32>| number.map(Value::from);
        set(
            "group",
            of_two(
                ("at_least", number(self.group_at_least)),
                ("percent", number(self.group_percent)),
            ),
        );
        let jobs =
            |jobs: &Vec<JobPolicy>| Value::Array(jobs.iter().map(JobPolicy::to_json).collect());
        set("jobs", self.jobs.as_ref().map(jobs));
        fields
    }
}

impl JobPolicy {
    fn to_json(&self) -> Value {
        let mut fields = self.rules.to_map();
        fields.insert("job".to_owned(), json!(self.job.as_ref().map(JobName::as_str)));
        Value::Object(fields)
    }
}

impl Rules {
    fn to_map(&self) -> Map<String, Value> {
        let fields = [
            ("expect", self.expect.as_ref().map(Expect::to_json)),
            ("grace_seconds", self.grace_seconds.map(Value::from)),
            ("failing", self.failing.map(FailingRule::to_json)),
            ("recover_after", self.recover_after.map(Value::from)),
            ("max_run_seconds", self.max_run_seconds.map(Value::from)),
        ];
        fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

/// Milliseconds of so many seconds.
pub(super) fn milliseconds(seconds: u32) -> i64 {
    i64::from(seconds) * 1000
}

/// Reads policies, and names what is wrong in them.
#[derive(Default)]
struct Reader {
    violations: Vec<Violation>,
}

impl Reader {
    fn refuse<T>(
        &mut self,
        field: &str,
        code: ViolationCode,
        rule: &str,
        value: &Value,
    ) -> Option<T> {
        self.violations.push(Violation::of(field.to_owned(), code, rule, Some(value.clone())));
        None
    }

    /// The fields of an object; none when it is none.
    fn object(&mut self, value: &Value, path: &str) -> Map<String, Value> {
        if let Value::Object(fields) = value {
            return fields.clone();
        }
        let _: Option<()> = self.refuse(path, ViolationCode::Type, "must be an object", value);
        Map::new()
    }

    /// Refuses fields that are not in `known`.
    fn only(&mut self, fields: &Map<String, Value>, path: &str, known: &[&str]) {
        for (name, value) in fields {
            if !known.contains(&name.as_str()) {
                let field = format!("{path}.{name}");
                let _: Option<()> =
                    self.refuse(&field, ViolationCode::UnknownField, "is not allowed", value);
            }
        }
    }

    fn policy(&mut self, fields: &Map<String, Value>, path: &str) -> Policy {
        self.only(fields, path, &POLICY_FIELDS);
        let (silent, failing) =
            self.severities(fields.get("severity"), &format!("{path}.severity"));
        let (group_at_least, group_percent) =
            self.group(fields.get("group"), &format!("{path}.group"));
        Policy {
            rules: self.rules(fields, path),
            first_report_seconds: self.integer(
                fields,
                path,
                "first_report_seconds",
                MINUTE,
                365 * DAY,
            ),
            silent,
            failing,
            group_at_least,
            group_percent,
            jobs: self.jobs(fields.get("jobs"), &format!("{path}.jobs")),
        }
    }

    fn rules(&mut self, fields: &Map<String, Value>, path: &str) -> Rules {
        Rules {
            expect: self.expect(fields.get("expect"), &format!("{path}.expect")),
            grace_seconds: self.integer(fields, path, "grace_seconds", 0, 30 * DAY),
            failing: self.failing(fields.get("failing"), &format!("{path}.failing")),
            recover_after: self.integer(fields, path, "recover_after", 1, 20),
            max_run_seconds: self.integer(fields, path, "max_run_seconds", MINUTE, 30 * DAY),
        }
    }

    /// An integer of `least` to `most`; absent and null are none.
    fn integer(
        &mut self,
        fields: &Map<String, Value>,
        path: &str,
        name: &str,
        least: u32,
        most: u32,
    ) -> Option<u32> {
        let value = fields.get(name).filter(|value| !value.is_null())?;
        let field = format!("{path}.{name}");
        // What other readers write as 3600.0 is an integer too.
        let whole = value.as_i64().or_else(|| {
            let number = value.as_f64()?;
            #[expect(clippy::cast_possible_truncation, reason = "it is whole and small")]
            (number.fract() == 0.0 && number.abs() < 1e15).then_some(number as i64)
        });
        let Some(whole) = whole else {
            let rule = if value.is_number() { "must be an integer" } else { "must be a number" };
            return self.refuse(&field, ViolationCode::Type, rule, value);
        };
        match u32::try_from(whole) {
            Ok(number) if (least..=most).contains(&number) => Some(number),
            _ if whole > i64::from(most) => {
                let rule = format!("must be less than or equal to {most}");
                self.refuse(&field, ViolationCode::Range, &rule, value)
            }
            _ => {
                let rule = format!("must be greater than or equal to {least}");
                self.refuse(&field, ViolationCode::Range, &rule, value)
            }
        }
    }

    fn expect(&mut self, value: Option<&Value>, path: &str) -> Option<Expect> {
        let value = value.filter(|value| !value.is_null())?;
        let Value::Object(fields) = value else {
            if value == "nothing" {
                return Some(Expect::Nothing);
            }
            let rule = r#"must be "nothing" or an object with "every_seconds" or "cron""#;
            return self.refuse(path, ViolationCode::Type, rule, value);
        };
        self.only(fields, path, &["every_seconds", "cron", "timezone"]);
        match (fields.contains_key("every_seconds"), fields.contains_key("cron")) {
            (true, true) => {
                let rule = r#"must have either "every_seconds" or "cron""#;
                self.refuse(path, ViolationCode::Conflict, rule, value)
            }
            (true, false) => {
                if let Some(timezone) = fields.get("timezone") {
                    let rule = r#"is not allowed without "cron""#;
                    let field = format!("{path}.timezone");
                    let _: Option<()> =
                        self.refuse(&field, ViolationCode::Conflict, rule, timezone);
                }
                if fields["every_seconds"].is_null() {
                    let field = format!("{path}.every_seconds");
                    return self.refuse(
                        &field,
                        ViolationCode::Type,
                        "must be a number",
                        &Value::Null,
                    );
                }
                self.integer(fields, path, "every_seconds", MINUTE, 365 * DAY).map(Expect::Every)
            }
            (false, true) => self.cron(fields, path),
            (false, false) => {
                let rule = r#"must have "every_seconds" or "cron""#;
                self.refuse(path, ViolationCode::Required, rule, value)
            }
        }
    }

    fn cron(&mut self, fields: &Map<String, Value>, path: &str) -> Option<Expect> {
        let cron = self.text(fields, path, "cron");
        let timezone = match fields.get("timezone") {
            Some(_) => self.text(fields, path, "timezone"),
            None => {
                let field = format!("{path}.timezone");
                let violation = Violation::of(field, ViolationCode::Required, "is required", None);
                self.violations.push(violation);
                None
            }
        };
        // Each of the two is checked even when the other one is wrong.
        let zone = timezone.as_deref().filter(|zone| super::schedule::time_zone(zone).is_some());
        if let (None, Some(timezone)) = (zone, &timezone) {
            let field = format!("{path}.timezone");
            let rule = "must be an IANA time zone";
            let _: Option<()> =
                self.refuse(&field, ViolationCode::Format, rule, &Value::from(timezone.as_str()));
        }
        let expression = cron?;
        match CronSchedule::new(&expression, zone.unwrap_or("UTC")) {
            Ok(schedule) => Some(Expect::Cron {
                cron: expression,
                timezone: zone?.to_owned(),
                schedule: Box::new(schedule),
            }),
            Err(error) => {
                let field = format!("{path}.cron");
                let value = Value::from(expression);
                self.refuse(&field, ViolationCode::Format, &error.to_string(), &value)
            }
        }
    }

    fn text(&mut self, fields: &Map<String, Value>, path: &str, name: &str) -> Option<String> {
        let value = &fields[name];
        let field = format!("{path}.{name}");
        let Value::String(text) = value else {
            return self.refuse(&field, ViolationCode::Type, "must be a string", value);
        };
        if text.chars().count() > LONGEST_CRON {
            let rule =
                format!("length must be less than or equal to {LONGEST_CRON} characters long");
            return self.refuse(&field, ViolationCode::Length, &rule, value);
        }
        Some(text.clone())
    }

    fn failing(&mut self, value: Option<&Value>, path: &str) -> Option<FailingRule> {
        let value = value.filter(|value| !value.is_null())?;
        let fields = self.object(value, path);
        if !value.is_object() {
            return None;
        }
        self.only(&fields, path, &["in_a_row", "failures", "of_last"]);
        let of_last = fields.contains_key("failures") || fields.contains_key("of_last");
        if fields.contains_key("in_a_row") == of_last {
            let rule = r#"must have either "in_a_row", or "failures" and "of_last""#;
            return self.refuse(path, ViolationCode::Conflict, rule, value);
        }
        let mut of = |name: &str, most| {
            if fields.get(name).is_none_or(Value::is_null) {
                let field = format!("{path}.{name}");
                self.violations.push(Violation::of(
                    field,
                    ViolationCode::Required,
                    "is required",
                    None,
                ));
                return None;
            }
            self.integer(&fields, path, name, 1, most)
        };
        if !of_last {
            return of("in_a_row", 100).map(FailingRule::InARow);
        }
        let (failures, of_last) = (of("failures", 50), of("of_last", 50));
        let (failures, of_last) = (failures?, of_last?);
        if failures > of_last {
            let field = format!("{path}.failures");
            let rule = r#"must be less than or equal to "of_last""#;
            return self.refuse(&field, ViolationCode::Conflict, rule, &Value::from(failures));
        }
        Some(FailingRule::OfLast { failures, of_last })
    }

    fn severities(
        &mut self,
        value: Option<&Value>,
        path: &str,
    ) -> (Option<Severity>, Option<Severity>) {
        let Some(value) = value.filter(|value| !value.is_null()) else { return (None, None) };
        let fields = self.object(value, path);
        self.only(&fields, path, &["silent", "failing"]);
        let mut of = |name: &str| {
            let value = fields.get(name).filter(|value| !value.is_null())?;
            let severity = value.as_str().and_then(Severity::from_word);
            if severity.is_none() {
                let field = format!("{path}.{name}");
                let rule = "must be one of [info, warning, critical]";
                return self.refuse(&field, ViolationCode::Format, rule, value);
            }
            severity
        };
        (of("silent"), of("failing"))
    }

    fn group(&mut self, value: Option<&Value>, path: &str) -> (Option<u32>, Option<u32>) {
        let Some(value) = value.filter(|value| !value.is_null()) else { return (None, None) };
        let fields = self.object(value, path);
        self.only(&fields, path, &["at_least", "percent"]);
        (
            self.integer(&fields, path, "at_least", 2, 100_000),
            self.integer(&fields, path, "percent", 1, 100),
        )
    }

    fn jobs(&mut self, value: Option<&Value>, path: &str) -> Option<Vec<JobPolicy>> {
        let value = value.filter(|value| !value.is_null())?;
        let Value::Array(entries) = value else {
            return self.refuse(path, ViolationCode::Type, "must be an array", value);
        };
        if entries.len() > MOST_JOBS {
            let rule = format!("must contain less than or equal to {MOST_JOBS} items");
            return self.refuse(path, ViolationCode::Length, &rule, value);
        }
        let mut jobs: Vec<JobPolicy> = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let Some(job) = self.job(entry, &path) else { continue };
            if jobs.iter().any(|other| other.job == job.job) {
                let field = format!("{path}.job");
                let value = entry.get("job").unwrap_or(&Value::Null);
                let rule = "must not be named twice";
                let _: Option<()> = self.refuse(&field, ViolationCode::Conflict, rule, value);
            }
            jobs.push(job);
        }
        Some(jobs)
    }

    fn job(&mut self, entry: &Value, path: &str) -> Option<JobPolicy> {
        let fields = self.object(entry, path);
        if !entry.is_object() {
            return None;
        }
        let known: Vec<&str> = ["job"].into_iter().chain(JOB_FIELDS).collect();
        self.only(&fields, path, &known);
        let rules = self.rules(&fields, path);
        let field = format!("{path}.job");
        let job = match fields.get("job") {
            None => {
                self.violations.push(Violation::of(
                    field,
                    ViolationCode::Required,
                    "is required",
                    None,
                ));
                return None;
            }
            Some(Value::Null) => None,
            Some(value @ Value::String(text)) => match JobName::new(text) {
                Ok(job) => Some(job),
                Err(error) => {
                    return self.refuse(&field, error.code(), &error.to_string(), value);
                }
            },
            Some(value) => {
                return self.refuse(&field, ViolationCode::Type, "must be a string", value);
            }
        };
        Some(JobPolicy { job, rules })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::{Level, Levels};

    /// The fields and messages of what is wrong with a policy.
    fn wrong(policy: &Value) -> Vec<String> {
        let violations = Policy::read(policy, "policy").unwrap_err();
        violations.into_iter().map(|violation| violation.message).collect()
    }

    #[test]
    fn every_wrong_field_is_named() {
        let found = wrong(&json!({
            "expect": {"every_seconds": 59},
            "grace_seconds": 2_592_001,
            "failing": {"failures": 6, "of_last": 5},
            "recover_after": "1",
            "max_run_seconds": 60.5,
            "first_report_seconds": true,
            "severity": {"silent": "bad", "loud": "info"},
            "group": {"at_least": 1, "percent": 101},
            "jobs": [{"expect": "nothing"}, {"job": "a", "group": {}}, {"job": "a"}, {"job": 7}, 5],
            "interval": 5,
        }));
        let expected = [
            r#""policy.expect.every_seconds" must be greater than or equal to 60"#,
            r#""policy.failing.failures" must be less than or equal to "of_last""#,
            r#""policy.first_report_seconds" must be a number"#,
            r#""policy.grace_seconds" must be less than or equal to 2592000"#,
            r#""policy.group.at_least" must be greater than or equal to 2"#,
            r#""policy.group.percent" must be less than or equal to 100"#,
            r#""policy.interval" is not allowed"#,
            r#""policy.jobs[0].job" is required"#,
            r#""policy.jobs[1].group" is not allowed"#,
            r#""policy.jobs[2].job" must not be named twice"#,
            r#""policy.jobs[3].job" must be a string"#,
            r#""policy.jobs[4]" must be an object"#,
            r#""policy.max_run_seconds" must be an integer"#,
            r#""policy.recover_after" must be a number"#,
            r#""policy.severity.loud" is not allowed"#,
            r#""policy.severity.silent" must be one of [info, warning, critical]"#,
        ];
        let mut found = found;
        found.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_expected_must_be_one_thing() {
        let cases = [
            (
                json!("something"),
                r#""policy.expect" must be "nothing" or an object with "every_seconds" or "cron""#,
            ),
            (json!({}), r#""policy.expect" must have "every_seconds" or "cron""#),
            (
                json!({"every_seconds": 60, "cron": "* * * * *"}),
                r#""policy.expect" must have either "every_seconds" or "cron""#,
            ),
            (json!({"cron": "0 2 * * *"}), r#""policy.expect.timezone" is required"#),
            (
                json!({"cron": "0 2 * * *", "timezone": "Mars/Base"}),
                r#""policy.expect.timezone" must be an IANA time zone"#,
            ),
            (
                json!({"every_seconds": 60, "timezone": "UTC"}),
                r#""policy.expect.timezone" is not allowed without "cron""#,
            ),
            (json!({"cron": 5, "timezone": "UTC"}), r#""policy.expect.cron" must be a string"#),
        ];
        for (expect, message) in cases {
            assert_eq!(wrong(&json!({ "expect": expect })), [message]);
        }
        // A field does not hide another one.
        for (expect, expected) in [
            (json!({"every_seconds": 5, "timezone": "UTC"}), ["every_seconds", "timezone"]),
            (json!({"cron": "0 2 * *", "timezone": "Mars/Base"}), ["cron", "timezone"]),
            (json!({"cron": 7, "colour": "red"}), ["colour", "cron"]),
        ] {
            let found = wrong(&json!({ "expect": expect }));
            for field in expected {
                let name = format!("\"policy.expect.{field}\" ");
                assert!(found.iter().any(|one| one.starts_with(&name)), "{field}: {found:?}");
            }
        }
        let found = wrong(&json!({"expect": {"cron": "0 2 * *", "timezone": "UTC"}}));
        let start = r#""policy.expect.cron" is not a cron expression of 5 fields: "#;
        assert!(found[0].starts_with(start), "{found:?}");
    }

    #[test]
    fn a_policy_reads_what_it_writes_and_null_inherits_again() {
        let policy = json!({
            "expect": {"cron": "0 2 * * *", "timezone": "Europe/Berlin"},
            "grace_seconds": 600,
            "failing": {"failures": 2, "of_last": 5},
            "severity": {"failing": "critical"},
            "group": {"percent": 30},
            "jobs": [{"job": null, "grace_seconds": 0}, {"job": "nightly", "expect": "nothing"}],
        });
        let read = Policy::read(&policy, "policy").unwrap();
        assert_eq!(read.to_json(), policy);
        assert_eq!(Policy::from_stored(&read.to_json()), read);
        let change = json!({"expect": null, "grace_seconds": 60, "jobs": null});
        let changed = PolicyChange::read(&change, "policy").unwrap().apply_to(&read);
        let expected = json!({
            "grace_seconds": 60,
            "failing": {"failures": 2, "of_last": 5},
            "severity": {"failing": "critical"},
            "group": {"percent": 30},
        });
        assert_eq!(changed.to_json(), expected);
        // What foreign SQL made wrong is inherited, the rest stays.
        let stored = json!({"grace_seconds": "long", "recover_after": 2});
        assert_eq!(Policy::from_stored(&stored).to_json(), json!({"recover_after": 2}));
    }

    /// A change that names one member of an object leaves its other members alone; null takes a member away.
    #[test]
    fn members_of_objects_are_changed_one_by_one() {
        let policy = json!({
            "expect": {"cron": "0 2 * * *", "timezone": "Europe/Berlin"},
            "failing": {"failures": 2, "of_last": 5},
            "severity": {"silent": "info", "failing": "critical"},
            "group": {"at_least": 7, "percent": 30},
        });
        let read = Policy::read(&policy, "policy").unwrap();
        for (change, field, expected) in [
            (
                json!({"severity": {"silent": "warning"}}),
                "severity",
                json!({"silent": "warning", "failing": "critical"}),
            ),
            (json!({"severity": {"failing": null}}), "severity", json!({"silent": "info"})),
            (json!({"severity": {"silent": null, "failing": null}}), "severity", Value::Null),
            (json!({"severity": {}}), "severity", policy["severity"].clone()),
            (json!({"severity": null}), "severity", Value::Null),
            (json!({"group": {"percent": 60}}), "group", json!({"at_least": 7, "percent": 60})),
            (json!({"group": {"at_least": null}}), "group", json!({"percent": 30})),
            // These are one setting each.
            (json!({"failing": {"in_a_row": 4}}), "failing", json!({"in_a_row": 4})),
            (json!({"expect": {"every_seconds": 600}}), "expect", json!({"every_seconds": 600})),
        ] {
            let changed = PolicyChange::read(&change, "policy").unwrap().apply_to(&read).to_json();
            assert_eq!(changed.get(field).unwrap_or(&Value::Null), &expected, "{change}");
            for other in policy.as_object().unwrap().keys().filter(|other| *other != field) {
                assert_eq!(changed[other], policy[other], "{change}: {other}");
            }
        }
        // A member that was not set before is added, and the rest stays inherited.
        let change = PolicyChange::read(&json!({"group": {"percent": 60}}), "policy").unwrap();
        assert_eq!(
            change.apply_to(&Policy::default()).to_json(),
            json!({"group": {"percent": 60}})
        );
    }

    /// Each member of an object is decided by itself: a level that sets one of them says nothing about the others.
    #[test]
    fn members_of_objects_come_from_the_most_specific_level_that_sets_them() {
        let of = |policy: &Value| Policy::read(policy, "policy").unwrap();
        let device = of(&json!({"severity": {"silent": "info"}}));
        let group = of(&json!({"severity": {"silent": "critical"}, "group": {"percent": 30}}));
        let fleet = of(&json!({
            "severity": {"silent": "critical", "failing": "info"},
            "group": {"at_least": 7, "percent": 60},
        }));
        let resolved = Levels { device: &device, group: &group, fleet: &fleet }.resolve().to_json();
        let decided = |value: Value, from: &str| json!({"value": value, "from": from});
        assert_eq!(
            resolved["severity"],
            json!({"silent": decided(json!("info"), "device"), "failing": decided(json!("info"), "fleet")})
        );
        assert_eq!(
            resolved["group"],
            json!({"at_least": decided(json!(7), "fleet"), "percent": decided(json!(30), "group")})
        );
        let nothing = Policy::default();
        let resolved =
            Levels { device: &device, group: &nothing, fleet: &nothing }.resolve().to_json();
        assert_eq!(resolved["severity"]["failing"], decided(json!("warning"), "built-in"));
        assert_eq!(resolved["group"]["percent"], decided(json!(50), "built-in"));
    }

    #[test]
    fn each_field_comes_from_the_most_specific_level() {
        let of = |policy: &Value| Policy::read(policy, "policy").unwrap();
        let device = of(&json!({"grace_seconds": 60}));
        let group = of(&json!({
            "grace_seconds": 120,
            "recover_after": 2,
            "jobs": [{"job": "nightly", "recover_after": 3}],
        }));
        let fleet = of(&json!({
            "recover_after": 4,
            "max_run_seconds": 600,
            "jobs": [{"job": "nightly", "grace_seconds": 180, "expect": {"every_seconds": 7200}}],
        }));
        let resolved = Levels { device: &device, group: &group, fleet: &fleet }.resolve();
        let any = &resolved.rules;
        assert_eq!((any.grace_seconds.value, any.grace_seconds.from), (60, Level::Device));
        assert_eq!((any.recover_after.value, any.recover_after.from), (2, Level::Group));
        assert_eq!((any.max_run_seconds.value, any.max_run_seconds.from), (600, Level::Fleet));
        // Who names a job has said what is expected.
        assert_eq!((&any.expect.value, any.expect.from), (&Expect::Nothing, Level::BuiltIn));
        // For the job its entries go first, even the fleet's before the device's own policy.
        let nightly = resolved.rules_of(Some("nightly"));
        assert_eq!((nightly.grace_seconds.value, nightly.grace_seconds.from), (180, Level::Fleet));
        assert_eq!((nightly.recover_after.value, nightly.recover_after.from), (3, Level::Group));
        assert_eq!(nightly.expect.value, Expect::Every(7200));
        // Nobody says anything: a report an hour.
        let nothing = Policy::default();
        let resolved = Levels { device: &nothing, group: &nothing, fleet: &nothing }.resolve();
        assert_eq!(resolved.rules.expect.value, Expect::Every(3600));
        assert_eq!(resolved.rules_of(Some("nightly")), &resolved.rules);
    }
}
