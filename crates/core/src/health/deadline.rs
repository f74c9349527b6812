//! By when a device or job is silent. A report is due at the next time of its schedule, and late after a grace. Time in
//! which nobody could have heard it, or in which none was expected, moves the deadline: the server's own outages, pauses,
//! and windows in which a group is closed.
//!
//! Only what touches the time in which the report was to be expected moves its deadline. Noon's restart must not excuse
//! tonight, and a restart every day at the hour of a daily report must not excuse it for ever.

use super::schedule::{CronSchedule, Schedule};
use crate::Timestamp;

/// How much earlier than expected a report may come, at most, in milliseconds: 15 minutes.
const MOST_EARLY: i64 = 15 * 60 * 1000;

/// The longest time that is waited after an outage, a pause or a closed window, in milliseconds: 26 hours, so that a daily
/// report has its chance.
const LONGEST_WAIT_AFTER: i64 = 26 * 60 * 60 * 1000;

/// How many closed windows or pauses, one behind the other, move a deadline.
const MOST_MOVES: usize = 8;

/// How many times of a cron expression may be passed over because nobody was expected then.
const MOST_SKIPPED: usize = 10_000;

/// A span of time. Both ends belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    /// Its first instant.
    pub from: Timestamp,
    /// Its last instant.
    pub until: Timestamp,
}

impl Interval {
    pub(super) fn touches(&self, other: &Self) -> bool {
        self.from <= other.until && other.from <= self.until
    }
}

/// Why a deadline is later than the schedule says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The server could hear nobody.
    Outage,
    /// Somebody paused the device, its group or the fleet.
    Pause,
    /// The device is not expected to report then.
    ClosedWindow,
}

/// The time that does not count for one device or job.
pub trait Exclusions {
    /// Every excluded interval that touches `span`, in any order.
    fn touching(&self, span: Interval) -> Vec<(Cause, Interval)>;
}

/// No time is excluded.
impl Exclusions for () {
    fn touching(&self, _: Interval) -> Vec<(Cause, Interval)> {
        Vec::new()
    }
}

impl Exclusions for [(Cause, Interval)] {
    fn touching(&self, span: Interval) -> Vec<(Cause, Interval)> {
        self.iter().filter(|(_, interval)| interval.touches(&span)).copied().collect()
    }
}

/// Since when a report is waited for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Waiting {
    /// When the server last heard the device or job.
    pub heard: Option<Timestamp>,
    /// Since when it is expected to report, by the roster.
    pub expected_from: Option<Timestamp>,
    /// Since when the schedule applies. A changed policy restarts waiting, so that editing makes nobody silent; it is left
    /// out for who is silent already.
    pub policy_since: Option<Timestamp>,
}

/// An interval that moved a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MovedBy {
    /// What it was.
    pub cause: Cause,
    /// When.
    pub interval: Interval,
}

/// By when a report must be heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadline {
    /// When it is expected by the schedule.
    pub expected_at: Timestamp,
    /// From this instant on, the device or job is silent.
    pub due_at: Timestamp,
    /// What moved the deadline, in the order in which it did. Of a cron expression this is also what times were passed over
    /// for, at most the last eight causes.
    pub moved_by: Vec<MovedBy>,
}

/// The deadline of the next report; `None` when nothing is waited for: it was never heard, and nobody expects it. `grace` is
/// in milliseconds.
pub fn deadline(
    schedule: &Schedule,
    grace: i64,
    waiting: &Waiting,
    excluded: &(impl Exclusions + ?Sized),
) -> Option<Deadline> {
    match schedule {
        Schedule::Every(interval) => every(*interval, grace, waiting, excluded),
        Schedule::Cron(cron) => of_cron(cron, grace, waiting, excluded),
    }
}

fn every(
    interval: i64,
    grace: i64,
    waiting: &Waiting,
    excluded: &(impl Exclusions + ?Sized),
) -> Option<Deadline> {
    waiting.heard.or(waiting.expected_from)?;
    let base = waiting.heard.max(waiting.expected_from).max(waiting.policy_since)?;
    let early = MOST_EARLY.min(interval / 4);
    let expected_at = base.saturating_add_milliseconds(interval);
    let due_at = expected_at.saturating_add_milliseconds(grace);
    let span = Interval { from: expected_at.saturating_add_milliseconds(-early), until: due_at };
    let mut deadline = Deadline { expected_at, due_at, moved_by: Vec::new() };
    let wait_after = interval.saturating_add(grace).min(LONGEST_WAIT_AFTER);
    let mut touching = excluded.touching(span);
    touching.sort_by_key(|(_, interval)| (interval.until, interval.from));
    for (cause, interval) in touching {
        let later = interval.until.saturating_add_milliseconds(wait_after);
        if later > deadline.due_at {
            deadline.due_at = later;
            deadline.moved_by.push(MovedBy { cause, interval });
        }
    }
    move_out(&mut deadline, grace, excluded);
    Some(deadline)
}

fn of_cron(
    cron: &CronSchedule,
    grace: i64,
    waiting: &Waiting,
    excluded: &(impl Exclusions + ?Sized),
) -> Option<Deadline> {
    let asked_since = waiting.expected_from.max(waiting.policy_since);
    waiting.heard.or(waiting.expected_from)?;
    // A time at the very instant from which on times are asked for is one of them.
    let asked_since = asked_since.map(|since| since.saturating_add_milliseconds(-1));
    let mut time = cron.next(waiting.heard.max(asked_since)?)?;
    let mut passed_over: Vec<MovedBy> = Vec::new();
    for _ in 0..MOST_SKIPPED {
        let gap = cron
            .previous(time)
            .map_or(i64::MAX, |before| time.as_millisecond() - before.as_millisecond());
        let early = MOST_EARLY.min(gap / 4);
        let earliest = time.saturating_add_milliseconds(-early);
        let due_at = time.saturating_add_milliseconds(grace);
        let is_answered = waiting.heard.is_some_and(|heard| heard >= earliest);
        let excuse = || {
            let span = Interval { from: earliest, until: due_at };
            let at_time = Interval { from: time, until: time };
            excluded.touching(span).into_iter().find(|(cause, interval)| match cause {
                Cause::Outage => true,
                Cause::Pause | Cause::ClosedWindow => interval.touches(&at_time),
            })
        };
        if !is_answered {
            let Some((cause, interval)) = excuse() else {
                let mut deadline = Deadline { expected_at: time, due_at, moved_by: passed_over };
                move_out(&mut deadline, grace, excluded);
                return Some(deadline);
            };
            let moved = MovedBy { cause, interval };
            if passed_over.last() != Some(&moved) {
                if passed_over.len() == MOST_MOVES {
                    passed_over.remove(0);
                }
                passed_over.push(moved);
            }
        }
        time = cron.next(time)?;
    }
    None
}

/// Moves a deadline that lies within a pause or a closed window behind it.
fn move_out(deadline: &mut Deadline, grace: i64, excluded: &(impl Exclusions + ?Sized)) {
    for _ in 0..MOST_MOVES {
        let at_deadline = Interval { from: deadline.due_at, until: deadline.due_at };
        let mut around = excluded.touching(at_deadline);
        around.retain(|(cause, interval)| {
            *cause != Cause::Outage && interval.until > deadline.due_at
        });
        let Some((cause, interval)) = around.into_iter().max_by_key(|(_, interval)| interval.until)
        else {
            return;
        };
        deadline.due_at = interval.until.saturating_add_milliseconds(grace);
        deadline.moved_by.push(MovedBy { cause, interval });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: i64 = 60 * 1000;
    const HOUR: i64 = 60 * MINUTE;

    fn at(text: &str) -> Timestamp {
        Timestamp::parse_iso8601(&format!("2026-03-{text}Z")).unwrap()
    }

    fn heard(text: &str) -> Waiting {
        Waiting { heard: Some(at(text)), ..Waiting::default() }
    }

    fn excluded(cause: Cause, from: &str, until: &str) -> (Cause, Interval) {
        (cause, Interval { from: at(from), until: at(until) })
    }

    fn due_at(
        schedule: &Schedule,
        grace: i64,
        waiting: &Waiting,
        excluded: &[(Cause, Interval)],
    ) -> Option<Timestamp> {
        deadline(schedule, grace, waiting, excluded).map(|deadline| deadline.due_at)
    }

    fn cron(expression: &str, zone: &str) -> Schedule {
        Schedule::Cron(Box::new(CronSchedule::new(expression, zone).unwrap()))
    }

    #[test]
    fn a_report_is_due_an_interval_and_a_grace_after_the_last() {
        let hourly = Schedule::Every(HOUR);
        let due = |waiting: &Waiting| due_at(&hourly, 30 * MINUTE, waiting, &[]);
        assert_eq!(due(&heard("02T09:00")), Some(at("02T10:30")));
        // Nobody expects it, and it was never heard.
        assert_eq!(due(&Waiting::default()), None);
        let policy_since = Some(at("02T09:20"));
        assert_eq!(due(&Waiting { policy_since, ..Waiting::default() }), None);
        // A policy that is changed restarts waiting, and so does the roster.
        assert_eq!(due(&Waiting { policy_since, ..heard("02T09:00") }), Some(at("02T10:50")));
        let expected_from = Some(at("02T09:40"));
        assert_eq!(due(&Waiting { expected_from, ..heard("02T09:00") }), Some(at("02T11:10")));
        assert_eq!(due(&Waiting { expected_from, ..Waiting::default() }), Some(at("02T11:10")));
    }

    #[test]
    fn an_outage_excuses_what_it_may_have_kept_away_and_nothing_else() {
        let hourly = Schedule::Every(HOUR);
        let due = |from: &str, until: &str| {
            let outage = [excluded(Cause::Outage, from, until)];
            due_at(&hourly, 30 * MINUTE, &heard("02T09:00"), &outage).unwrap()
        };
        // Long before the next report.
        assert_eq!(due("02T09:10", "02T09:20"), at("02T10:30"));
        // From a quarter of an hour before it is expected on.
        assert_eq!(due("02T09:10", "02T09:45"), at("02T11:15"));
        assert_eq!(due("02T09:10", "02T09:44"), at("02T10:30"));
        assert_eq!(due("02T10:30", "02T10:31"), at("02T12:01"));
        assert_eq!(due("02T10:31", "02T10:32"), at("02T10:30"));
    }

    /// A restart every day at noon, when a daily report comes.
    #[test]
    fn restarts_at_the_hour_of_a_daily_report_defer_silence_once() {
        let outages = ["03", "04", "05"]
            .map(|day| excluded(Cause::Outage, &format!("{day}T12:00"), &format!("{day}T12:01")));
        let found = due_at(&Schedule::Every(24 * HOUR), 6 * HOUR, &heard("02T12:00"), &outages);
        assert_eq!(found, Some(at("04T14:01")));
    }

    #[test]
    fn what_is_closed_at_night_is_expected_in_the_morning() {
        let nights = [excluded(Cause::ClosedWindow, "02T15:00", "03T06:00")];
        let hourly = Schedule::Every(HOUR);
        let found = deadline(&hourly, 30 * MINUTE, &heard("02T14:50"), &nights[..]).unwrap();
        assert_eq!(found.due_at, at("03T07:30"));
        assert_eq!(found.moved_by.len(), 1);
        // A deadline within the next night goes on into the morning after it.
        let nights = [
            excluded(Cause::ClosedWindow, "02T15:00", "03T06:00"),
            excluded(Cause::ClosedWindow, "03T15:00", "04T06:00"),
        ];
        let found = due_at(&Schedule::Every(9 * HOUR), HOUR, &heard("02T14:50"), &nights);
        assert_eq!(found, Some(at("04T07:00")));
        // Windows without a gap end the moving at some time.
        let endless: Vec<_> = (1..28)
            .map(|day| {
                excluded(
                    Cause::ClosedWindow,
                    &format!("{day:02}T00:00"),
                    &format!("{:02}T23:00", day),
                )
            })
            .collect();
        assert!(due_at(&hourly, 2 * HOUR, &heard("02T14:50"), &endless).is_some());
    }

    #[test]
    fn a_report_answers_the_time_that_it_is_near() {
        let daily = cron("0 1 * * *", "UTC");
        let due = |heard_at: &str| due_at(&daily, HOUR, &heard(heard_at), &[]).unwrap();
        assert_eq!(due("02T01:00"), at("03T02:00"));
        // A minute early, a quarter of an hour, and more.
        assert_eq!(due("03T00:59:10"), at("04T02:00"));
        assert_eq!(due("03T00:45"), at("04T02:00"));
        assert_eq!(due("03T00:44:59.999"), at("03T02:00"));
        // Late is no less an answer.
        assert_eq!(due("03T20:00"), at("04T02:00"));
        // Every ten minutes, a quarter of the gap is what counts.
        let often = cron("*/10 * * * *", "UTC");
        let due = |heard_at: &str| due_at(&often, MINUTE, &heard(heard_at), &[]).unwrap();
        assert_eq!(due("02T09:07:30"), at("02T09:21"));
        assert_eq!(due("02T09:07:29"), at("02T09:11"));
    }

    #[test]
    fn a_night_without_its_hour_is_waited_for_after_the_gap() {
        let nightly = cron("30 2 * * *", "Europe/Berlin");
        let due = |heard_at: &str| due_at(&nightly, HOUR, &heard(heard_at), &[]).unwrap();
        assert_eq!(due("28T01:30:20"), at("29T02:00"));
        assert_eq!(due("29T01:00:20"), at("30T01:30"));
    }

    #[test]
    fn times_that_nobody_is_asked_for_are_passed_over() {
        let daily = cron("0 1 * * *", "UTC");
        let due = |waiting: &Waiting, excluded: &[_]| due_at(&daily, HOUR, waiting, excluded);
        let since = |text: &str| Some(at(text));
        let waiting = Waiting { expected_from: since("05T01:00"), ..Waiting::default() };
        assert_eq!(due(&waiting, &[]), Some(at("05T02:00")));
        let waiting = Waiting { policy_since: since("05T01:00:00.001"), ..heard("02T01:00") };
        assert_eq!(due(&waiting, &[]), Some(at("06T02:00")));
        let outage = [excluded(Cause::Outage, "03T01:59", "03T02:00")];
        assert_eq!(due(&heard("02T01:00"), &outage), Some(at("04T02:00")));
        let pause = |from, until| [excluded(Cause::Pause, from, until)];
        assert_eq!(due(&heard("02T01:00"), &pause("03T00:00", "03T01:00")), Some(at("04T02:00")));
        // One that begins once the report was expected moves the deadline alone.
        assert_eq!(due(&heard("02T01:00"), &pause("03T01:30", "03T05:00")), Some(at("03T06:00")));
    }

    /// What a time was passed over for is told: each cause once, and of many the last.
    #[test]
    fn what_times_were_passed_over_for_is_told() {
        let hourly = cron("0 * * * *", "UTC");
        let found = |heard_at: &str, excluded: &[_]| {
            deadline(&hourly, 0, &heard(heard_at), excluded).unwrap()
        };
        assert_eq!(found("02T08:00", &[]).moved_by, []);
        let night = excluded(Cause::ClosedWindow, "02T08:30", "02T11:30");
        let outage = excluded(Cause::Outage, "02T12:00", "02T12:01");
        let deadline = found("02T08:00", &[outage, night]);
        assert_eq!(deadline.expected_at, at("02T13:00"));
        let causes: Vec<_> =
            deadline.moved_by.iter().map(|moved| (moved.cause, moved.interval)).collect();
        assert_eq!(causes, [night, outage]);
        // A time that was answered was not passed over.
        assert_eq!(found("02T12:30", &[outage, night]).moved_by, []);
        let outages: Vec<_> = (1..20)
            .map(|hour| {
                excluded(Cause::Outage, &format!("02T{hour:02}:00"), &format!("02T{hour:02}:01"))
            })
            .collect();
        let moved_by = found("02T00:00", &outages).moved_by;
        assert_eq!(moved_by.len(), MOST_MOVES);
        assert_eq!(moved_by.last().unwrap().interval.from, at("02T19:00"));
    }

    proptest! {
        /// Whatever is excluded, a deadline only moves to a later time, and a later report never makes it earlier.
        #[test]
        fn deadlines_only_move_on(
            minutes in 1_i64..3000,
            grace in 0_i64..2000,
            heard_at in 0_i64..20_000,
            later in 0_i64..5000,
            excluded in prop::collection::vec((0_u8..3, 0_i64..30_000, 0_i64..5000), 0..6),
        ) {
            let minute = |minute: i64| at("01T00:00").saturating_add_milliseconds(minute * MINUTE);
            let excluded: Vec<_> = excluded
                .into_iter()
                .map(|(cause, from, length)| {
                    let cause = [Cause::Outage, Cause::Pause, Cause::ClosedWindow][usize::from(cause)];
                    (cause, Interval { from: minute(from), until: minute(from + length) })
                })
                .collect();
            let waiting = |minutes: i64| Waiting { heard: Some(minute(minutes)), ..Waiting::default() };
            let schedule = Schedule::Every(minutes * MINUTE);
            let due = |heard_at, excluded: &[_]| {
                due_at(&schedule, grace * MINUTE, &waiting(heard_at), excluded).unwrap()
            };
            let plain = minute(heard_at + minutes + grace);
            prop_assert_eq!(due(heard_at, &[]), plain);
            let moved = due(heard_at, &excluded);
            prop_assert!(moved >= plain);
            // Outages and windows are not lost by what else is excluded.
            for one in &excluded {
                prop_assert!(moved >= due(heard_at, &[*one]).min(moved));
            }
            prop_assert!(due(heard_at + later, &[]) >= plain);
        }
    }
}
