//! Measures the machine's clock against a clock that nobody sets: the time since the machine was switched on,
//! suspension included. A difference between the two is a jump, whether NTP or a person made it. `trusted_clock` calls
//! it. It reads no clock itself.

use std::time::Duration;

use pisync_core::Timestamp;

use crate::store::{LARGEST_STEP, NOTABLE_DIFFERENCE};

/// The jumps of one clock.
#[derive(Debug, Default)]
pub(super) struct Course {
    /// What both clocks showed last.
    seen: Option<(Timestamp, Duration)>,
    /// How far the clock has jumped since it was last certain, in milliseconds; `None` if it has not. A small jump may
    /// have been believed since. It is therefore remembered until the next one.
    off: Option<i64>,
    is_back: bool,
}

impl Course {
    /// How many milliseconds the clock has jumped since the last call of `go_on`, if it has jumped.
    pub(super) fn jump(&self, now: Timestamp, at: Duration) -> Option<i64> {
        let (before, before_at) = self.seen?;
        let elapsed = i64::try_from(at.saturating_sub(before_at).as_millis()).unwrap_or(i64::MAX);
        let by = now.as_millisecond() - before.as_millisecond() - elapsed;
        (by.abs() > NOTABLE_DIFFERENCE).then_some(by)
    }

    /// Notes what both clocks show now, and answers the jump since the last call. `was_certain` tells whether the clock
    /// had passed every check before the jump.
    pub(super) fn go_on(&mut self, now: Timestamp, at: Duration, was_certain: bool) -> Option<i64> {
        let jump = self.jump(now, at);
        self.seen = Some((now, at));
        if let Some(by) = jump {
            let before = self.off.filter(|off| !was_certain || off.abs() <= LARGEST_STEP);
            let off = before.map(|off| off.saturating_add(by));
            self.is_back = off.is_some_and(|off| off.abs() <= NOTABLE_DIFFERENCE);
            self.off = match off {
                _ if self.is_back => None,
                _ if was_certain => Some(by),
                off => off,
            };
        }
        jump
    }

    /// Whether the last jump returned the clock to the time at which it had passed every check.
    pub(super) fn is_back(&self) -> bool {
        self.is_back
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR: i64 = 365 * 24 * 60 * 60;

    /// Passes seconds of the clock to a course. Each comes with the seconds that have really passed, and whether the
    /// clock was certain.
    fn follow(looks: &[(i64, u64, bool)]) -> Vec<(Option<i64>, bool)> {
        let began = Duration::from_secs(90);
        let mut course = Course::default();
        let look = |(shown, elapsed, was_certain): &(i64, u64, bool)| {
            let now = Timestamp::from_millisecond(1_795_348_800_000 + shown * 1000).unwrap();
            let jump = course.go_on(now, began + Duration::from_secs(*elapsed), *was_certain);
            (jump.map(|by| by / 1000), course.is_back())
        };
        looks.iter().map(look).collect()
    }

    #[test]
    fn a_clock_that_goes_on_has_not_jumped() {
        // This also finds a clock that is set by less than a minute again and again.
        let looks =
            [(0, 0, false), (1, 1, true), (51, 2, true), (110, 3, true), (3710, 3604, true)];
        assert!(follow(&looks).iter().all(|found| *found == (None, false)));
    }

    #[test]
    fn a_clock_comes_back() {
        let found = follow(&[
            (0, 0, true),
            (YEAR + 1, 1, true),
            // The clock is set back, first not quite, then correctly.
            (7202, 2, false),
            (8, 3, false),
            (9, 4, true),
        ]);
        let expected =
            [(None, false), (Some(YEAR), false), (Some(-YEAR + 7200), false), (Some(-7195), true)];
        assert_eq!(found[..4], expected);
        assert_eq!(found[4], (None, true), "nothing has spoken against it since");
    }

    #[test]
    fn a_clock_comes_back_that_was_believed() {
        let found = follow(&[(0, 0, true), (1801, 1, true), (2, 2, true), (1803, 3, true)]);
        let jumps = [(None, false), (Some(1800), false), (Some(-1800), true), (Some(1800), false)];
        assert_eq!(found, jumps);
        // A clock that was far ahead for so long that it was believed.
        assert_eq!(follow(&[(0, 0, true), (YEAR, 0, true), (0, 0, true)])[2], (Some(-YEAR), false));
    }

    #[test]
    fn where_a_clock_was_that_was_never_certain_is_nowhere_to_come_back_to() {
        let found = follow(&[(YEAR, 0, false), (0, 0, false), (YEAR, 0, false), (0, 0, true)]);
        let jumps = [None, Some(-YEAR), Some(YEAR), Some(-YEAR)];
        assert_eq!(found, jumps.map(|jump| (jump, false)));
    }
}
