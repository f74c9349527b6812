//! When reports are expected: at an interval, or at the times of a cron expression in a time zone. Cron's rules for clock
//! changes are Vixie cron's: a local time that is skipped counts at the first instant after the gap; of one that comes
//! twice the first counts, unless the hour field has a wildcard. `croner` implements them.

use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};
use jiff::tz::TimeZone;

use crate::Timestamp;

/// The longest time that may pass between two times of a cron expression, in milliseconds: 8 years, from one 29 February to
/// the next around 2100.
const LONGEST_GAP: i64 = (8 * 366) * 24 * 60 * 60 * 1000;

/// What may stand in a field of a cron expression.
struct CronField {
    /// What people call it.
    name: &'static str,
    /// Its values, in words.
    values: &'static str,
    /// The names that stand for values. `croner` takes any name in any field, which hides a field in the wrong place.
    names: &'static [&'static str],
    /// Letters with a meaning of their own.
    letters: &'static str,
}

/// The fields, in their order.
const CRON_FIELDS: [CronField; 5] = [
    CronField { name: "minute", values: "0 to 59", names: &[], letters: "" },
    CronField { name: "hour", values: "0 to 23", names: &[], letters: "" },
    CronField {
        name: "day of the month",
        values: "1 to 31, or L for the last one",
        names: &[],
        letters: "LW",
    },
    CronField {
        name: "month",
        values: "1 to 12, or JAN to DEC",
        names: &[
            "JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC",
        ],
        letters: "",
    },
    CronField {
        name: "weekday",
        values: "0 to 7 (both are Sunday), or SUN to SAT",
        names: &["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"],
        letters: "L",
    },
];

impl CronField {
    /// Whether `text` is right in the field at `place`.
    fn is_met_by(&self, place: usize, text: &str) -> bool {
        let mut rest = text.to_ascii_uppercase();
        for name in self.names {
            rest = rest.replace(name, "");
        }
        let is_known = |letter: char| !letter.is_alphabetic() || self.letters.contains(letter);
        let mut alone = ["*"; CRON_FIELDS.len()];
        alone[place] = text;
        rest.chars().all(is_known)
            && text.split(',').all(|item| !item.is_empty())
            && parser().parse(&alone.join(" ")).is_ok()
    }
}

/// When reports are expected.
#[derive(Debug, Clone)]
pub enum Schedule {
    /// One within so many milliseconds after another.
    Every(i64),
    /// One at each of these times.
    Cron(Box<CronSchedule>),
}

/// A cron expression in a time zone.
#[derive(Debug, Clone)]
pub struct CronSchedule {
    cron: Cron,
    zone: TimeZone,
}

/// Why a schedule is not accepted. [`std::fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CronError {
    /// The expression cannot be read.
    #[error("is not a cron expression of 5 fields: {0}")]
    Expression(String),
    /// No such time zone is known.
    #[error("must be an IANA time zone")]
    TimeZone,
}

impl CronSchedule {
    /// Reads an expression of 5 fields, and the name of an IANA time zone.
    ///
    /// # Errors
    /// When either cannot be read, or the expression never has a time.
    pub fn new(expression: &str, zone: &str) -> Result<Self, CronError> {
        let zone = time_zone(zone).ok_or(CronError::TimeZone)?;
        let cron = read_cron(expression).map_err(CronError::Expression)?;
        let schedule = Self { cron, zone };
        let start = Timestamp::from_millisecond(0).unwrap_or(Timestamp::MIN);
        if schedule.next(start).is_none() {
            let why = "no month of its months has such a day, as there is no 30 February";
            return Err(CronError::Expression(why.to_owned()));
        }
        Ok(schedule)
    }

    /// The first time after `after`; `None` when there is none for years.
    #[must_use]
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        let start = after.to_jiff().to_zoned(self.zone.clone());
        let next = self.cron.find_next_occurrence(&start, false).ok()?;
        let next = Timestamp::truncate(next.timestamp());
        (next.as_millisecond() - after.as_millisecond() <= LONGEST_GAP).then_some(next)
    }

    /// The last time before `before`; `None` when there is none for years.
    #[must_use]
    pub fn previous(&self, before: Timestamp) -> Option<Timestamp> {
        let start = before.to_jiff().to_zoned(self.zone.clone());
        let previous = self.cron.find_previous_occurrence(&start, false).ok()?;
        let previous = Timestamp::truncate(previous.timestamp());
        (before.as_millisecond() - previous.as_millisecond() <= LONGEST_GAP).then_some(previous)
    }
}

fn parser() -> CronParser {
    CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build()
}

/// Reads an expression, or says which of its fields are wrong and what may stand there. The library's own words are none for
/// people who have never heard of it.
fn read_cron(expression: &str) -> Result<Cron, String> {
    let fields: Vec<_> = expression.split_ascii_whitespace().collect();
    if fields.len() != CRON_FIELDS.len() {
        let count = fields.len();
        return Err(format!(
            "it has {count}; minute, hour, day of the month, month and weekday are needed"
        ));
    }
    let wrong: Vec<_> = CRON_FIELDS
        .iter()
        .zip(&fields)
        .enumerate()
        .filter(|(place, (field, text))| !field.is_met_by(*place, text))
        .map(|(_, (field, text))| {
            let CronField { name, values, .. } = field;
            format!(
                "the {name} {text:?} is wrong, it may be * or {values}, also as a list (1,5), a range from low to high (1-5) or in steps (*/2)"
            )
        })
        .collect();
    if !wrong.is_empty() {
        return Err(wrong.join("; "));
    }
    parser().parse(expression).map_err(|_| "its fields do not fit together".to_owned())
}

/// The IANA time zone of this name.
#[must_use]
pub fn time_zone(name: &str) -> Option<TimeZone> {
    // The library also takes offsets and POSIX rules. Neither is a name that people can look up.
    let is_name = name == "UTC" || name.contains('/');
    is_name.then(|| TimeZone::get(name).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        Timestamp::parse_iso8601(text).unwrap()
    }

    fn times(expression: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
        let schedule = CronSchedule::new(expression, zone).unwrap();
        let mut times = Vec::new();
        let mut last = at(after);
        for _ in 0..count {
            last = schedule.next(last).unwrap();
            times.push(last.to_string().replace(":00.000Z", "Z"));
        }
        times
    }

    /// Berlin's clocks go from 02:00 to 03:00 on 2026-03-29, and from 03:00 back to 02:00 on 2026-10-25.
    #[test]
    fn a_skipped_time_counts_after_the_gap_and_of_a_repeated_one_the_first() {
        let cases: &[(&str, &str, &[&str])] = &[
            (
                "30 2 * * *",
                "2026-03-28T00:00Z",
                &["2026-03-28T01:30Z", "2026-03-29T01:00Z", "2026-03-30T00:30Z"],
            ),
            (
                "30 2 * * *",
                "2026-10-24T00:00Z",
                &["2026-10-24T00:30Z", "2026-10-25T00:30Z", "2026-10-26T01:30Z"],
            ),
            // Every half hour goes on through both hours.
            (
                "*/30 * * * *",
                "2026-10-24T23:59Z",
                &[
                    "2026-10-25T00:00Z",
                    "2026-10-25T00:30Z",
                    "2026-10-25T01:00Z",
                    "2026-10-25T01:30Z",
                ],
            ),
            (
                "*/30 * * * *",
                "2026-03-29T00:30Z",
                &["2026-03-29T01:00Z", "2026-03-29T01:30Z", "2026-03-29T02:00Z"],
            ),
            ("0 2 * * *", "2026-03-28T12:00Z", &["2026-03-29T01:00Z", "2026-03-30T00:00Z"]),
            ("0 3 * * *", "2026-03-28T12:00Z", &["2026-03-29T01:00Z", "2026-03-30T01:00Z"]),
        ];
        for (expression, after, expected) in cases {
            let found = times(expression, "Europe/Berlin", after, expected.len());
            assert_eq!(found, *expected, "{expression} after {after}");
        }
    }

    #[test]
    fn days_of_the_month_and_of_the_week_are_either_or() {
        // As Vixie cron has it when both fields are restricted: the 13th, and every Friday.
        let found = times("0 0 13 * FRI", "UTC", "2026-03-01T00:00Z", 4);
        assert_eq!(
            found,
            ["2026-03-06T00:00Z", "2026-03-13T00:00Z", "2026-03-20T00:00Z", "2026-03-27T00:00Z"]
        );
        let found = times("0 0 29 2 *", "UTC", "2096-03-01T00:00Z", 1);
        assert_eq!(found, ["2104-02-29T00:00Z"]);
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        for (expression, zone, expected) in [
            ("* * * *", "UTC", "is not a cron expression of 5 fields: it has 4"),
            ("0 0 * * * *", "UTC", "is not a cron expression of 5 fields: it has 6"),
            ("", "UTC", "is not a cron expression of 5 fields: it has 0"),
            ("0 0 30 2 *", "UTC", "is not a cron expression of 5 fields: no month"),
            ("@daily", "UTC", "is not a cron expression of 5 fields: it has 1"),
            ("0 0 * * *", "Europe/Nowhere", "must be an IANA time zone"),
            ("0 0 * * *", "+01:00", "must be an IANA time zone"),
            ("0 0 * * *", "EST5EDT,M3.2.0,M11.1.0", "must be an IANA time zone"),
            ("0 0 * * *", "", "must be an IANA time zone"),
        ] {
            let error = CronSchedule::new(expression, zone).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{expression} {zone}: {error}");
        }
    }

    /// The names of the fields that are said to be wrong.
    fn wrong_fields(expression: &str) -> Vec<&'static str> {
        let Err(CronError::Expression(why)) = CronSchedule::new(expression, "UTC") else {
            return Vec::new();
        };
        for word in ["attern", "Component", "croner", "Invalid", "bounds"] {
            assert!(!why.contains(word), "{expression}: {why}");
        }
        let names = CRON_FIELDS.iter().map(|field| field.name);
        let said: Vec<_> = why.split("; ").collect();
        let is_said =
            |name: &&str| said.iter().any(|one| one.starts_with(&format!("the {name} \"")));
        names.filter(is_said).collect()
    }

    #[test]
    fn every_wrong_field_of_an_expression_is_named() {
        for (place, wrong) in [
            (
                0,
                &["60", "-1", "x", "*/0", "*/", "5-1", "1-", "1,,2", ",", "MON", "1#2", "L", "1.5"]
                    [..],
            ),
            (1, &["24", "1-24", "1-5-7", "FEB", "*/x"]),
            (2, &["0", "32", "SUN", "1#2", "XW", "31-1"]),
            (3, &["0", "13", "JANUARY", "MON", "L", "DEC-JAN"]),
            (4, &["8", "SUNDAY", "JAN", "FRI-MON", "1#9", "5W", "@daily"]),
        ] {
            for text in wrong {
                let mut fields = ["*"; 5];
                fields[place] = text;
                let expression = fields.join(" ");
                assert_eq!(wrong_fields(&expression), [CRON_FIELDS[place].name], "{expression}");
            }
        }
        let all: Vec<_> = CRON_FIELDS.iter().map(|field| field.name).collect();
        assert_eq!(wrong_fields("60 24 32 13 8"), all);
        let error = CronSchedule::new("0 25 * * *", "UTC").unwrap_err().to_string();
        let expected = "is not a cron expression of 5 fields: the hour \"25\" is wrong, it may be * or 0 to 23, also as a list (1,5), a range from low to high (1-5) or in steps (*/2)";
        assert_eq!(error, expected);
    }

    #[test]
    fn what_cron_knows_is_read() {
        for expression in [
            "*/15 0-23/2 1,15 jan,Jul mon-FRI",
            "0 2 L * *",
            "0 2 15W * *",
            "0 2 LW * *",
            "0 2 ? * 5L",
            "0 2 * DEC SUN#2",
            "0 2 * * fri-sun",
            " 5\t4  * * 7 ",
        ] {
            assert!(CronSchedule::new(expression, "UTC").is_ok(), "{expression}");
        }
    }

    proptest! {
        /// Whatever is written, the words about it are ours.
        #[test]
        fn words_about_an_expression_are_our_own(fields in prop::collection::vec("[0-9*/,LW#?A-FMON@-]{1,4}", 4..7)) {
            let expression = fields.join(" ");
            if let Err(error) = CronSchedule::new(&expression, "UTC") {
                let error = error.to_string();
                let rest = error.strip_prefix("is not a cron expression of 5 fields: ").unwrap();
                let is_ours = ["it has ", "the ", "no month ", "its fields "].iter().any(|start| rest.starts_with(start));
                prop_assert!(is_ours, "{}", error);
            }
        }

        /// Going back from a time gives the one before, in every zone, whatever its clocks do.
        #[test]
        fn previous_undoes_next(
            expression in prop_oneof![
                Just("30 2 * * *"), Just("*/7 * * * *"), Just("0 */5 * * 1-5"), Just("15 0 1 * *"), Just("0 1,2,3 * * *"),
            ],
            zone in prop_oneof![
                Just("UTC"), Just("Europe/Berlin"), Just("America/New_York"), Just("Australia/Lord_Howe"), Just("Asia/Kolkata"),
            ],
            start in 1_700_000_000_000_i64..1_900_000_000_000,
        ) {
            let schedule = CronSchedule::new(expression, zone).unwrap();
            let start = Timestamp::from_millisecond(start).unwrap();
            let first = schedule.next(start).unwrap();
            let second = schedule.next(first).unwrap();
            prop_assert!(start < first && first < second, "{first} {second}");
            prop_assert_eq!(schedule.previous(second), Some(first));
            prop_assert!(schedule.previous(first).unwrap() <= start);
        }
    }
}
