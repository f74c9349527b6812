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
        let fields = expression.split_ascii_whitespace().count();
        if fields != 5 {
            return Err(CronError::Expression(format!("it has {fields}")));
        }
        let parser =
            CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron =
            parser.parse(expression).map_err(|error| CronError::Expression(error.to_string()))?;
        let schedule = Self { cron, zone };
        // Such as the 30 February.
        let start = Timestamp::from_millisecond(0).unwrap_or(Timestamp::MIN);
        if schedule.next(start).is_none() {
            return Err(CronError::Expression("no day is one of its days".to_owned()));
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
            ("61 * * * *", "UTC", "is not a cron expression of 5 fields: "),
            ("0 0 30 2 *", "UTC", "is not a cron expression of 5 fields: no day"),
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

    proptest! {
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
