//! How far to believe the clock when something is to be deleted for its age. `app` asks before it deletes event
//! ids or old events; both stores keep the answer, and what is decided is decided here.
//!
//! A clock that jumps ahead would make everything look old. So the database keeps the latest time that was believed.
//! A clock that is a few days ahead of it is believed: servers are switched off for a weekend. Beyond, the believed
//! time only goes on as fast as the server runs, until the devices bear the clock out, or until it has run for two
//! weeks. A clock that is behind is no danger: it makes nothing look old.

use std::time::Duration;

use pisync_core::Timestamp;

const DAY: i64 = 24 * 60 * 60 * 1000;

/// How far the clock may be ahead of the believed time, in milliseconds. What it could cost to believe a wrong
/// clock is the events of so many days.
const LONGEST_PAUSE: i64 = 4 * DAY;

/// After how long a clock is believed that nothing has borne out, in milliseconds: by then somebody has read
/// the warnings, and old events must not be kept for ever.
const LONGEST_DOUBT: i64 = 14 * DAY;

/// By how much an event's own date may differ from when it was received to bear the server's clock out.
pub(super) const AGREEMENT_MILLISECONDS: i64 = 60 * 60 * 1000;

/// Of how many of the latest events to look at the dates.
pub(super) const WITNESSES: i64 = 1_000;

/// What the database keeps of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrustedTime {
    /// The latest time that was believed. Deletions go by it, or by the clock if that is behind.
    pub until: Timestamp,
    /// What the clock said last.
    pub(super) seen: Timestamp,
    /// For how long servers have run with a clock that is not believed, in milliseconds.
    pub(super) doubted: i64,
}

/// What devices say of the server's clock: those that were heard of within the last hour by it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Witnesses {
    pub(super) devices: i64,
    /// Those with an event dated about when it was received, by a clock of their own.
    pub(super) agreeing: i64,
}

impl Witnesses {
    /// One device could be the server itself.
    fn bear_out(self) -> bool {
        self.agreeing >= 2 && self.agreeing * 2 > self.devices
    }
}

impl TrustedTime {
    /// What there is to go by the first time: when the last event was received.
    pub(super) fn first(newest: Option<Timestamp>, now: Timestamp) -> Self {
        Self { until: newest.map_or(now, |newest| newest.min(now)), seen: now, doubted: 0 }
    }

    /// Whether `now` is too far ahead to be believed as it is.
    pub(super) fn doubts(&self, now: Timestamp) -> bool {
        now > self.until.saturating_add_milliseconds(LONGEST_PAUSE)
    }

    /// Moves the believed time on, after a server has run for so long since it last did.
    pub(super) fn advance(self, now: Timestamp, ran: Duration, witnesses: Witnesses) -> Self {
        if !self.doubts(now) || witnesses.bear_out() {
            return Self { until: self.until.max(now), seen: now, doubted: 0 };
        }
        // Several servers do this for one database: together they count no hour twice.
        let passed = now.as_millisecond() - self.seen.as_millisecond();
        let ran = i64::try_from(ran.as_millis()).unwrap_or(i64::MAX);
        let passed = passed.clamp(0, ran);
        let doubted = self.doubted.saturating_add(passed);
        if doubted >= LONGEST_DOUBT {
            return Self { until: now, seen: now, doubted: 0 };
        }
        Self { until: self.until.saturating_add_milliseconds(passed), seen: now, doubted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 60 * 60 * 1000;

    fn at(millisecond: i64) -> Timestamp {
        Timestamp::from_millisecond(1_795_348_800_000 + millisecond).unwrap()
    }

    fn hours(count: u64) -> Duration {
        Duration::from_secs(count * 3600)
    }

    #[test]
    fn a_clock_that_goes_on_is_believed() {
        let mut time = TrustedTime::first(None, at(0));
        for now in [at(HOUR), at(30 * HOUR), at(30 * HOUR + LONGEST_PAUSE)] {
            time = time.advance(now, Duration::ZERO, Witnesses::default());
            assert_eq!(time.until, now);
        }
        let behind = time.advance(at(0), hours(1), Witnesses::default());
        assert_eq!(behind.until, time.until);
    }

    #[test]
    fn a_jump_is_believed_after_two_weeks() {
        let ahead = 400 * DAY;
        let mut time = TrustedTime::first(Some(at(0)), at(ahead));
        time = time.advance(at(ahead), Duration::ZERO, Witnesses::default());
        assert_eq!(time.until, at(0), "an hour at most is believed of an hour");
        // Two servers, whose clocks are both ahead.
        for hour in 1..14 * 24 {
            for server in [0, 1] {
                let now = at(ahead + hour * HOUR + server);
                time = time.advance(now, hours(1), Witnesses::default());
            }
            assert_eq!(time.until, at(hour * HOUR + 1), "{hour}");
        }
        time = time.advance(at(ahead + 14 * DAY), hours(1), Witnesses::default());
        assert_eq!((time.until, time.doubted), (at(ahead + 14 * DAY), 0));
    }

    #[test]
    fn starting_again_and_again_believes_nothing() {
        let mut time = TrustedTime::first(Some(at(0)), at(400 * DAY));
        for start in 0..1_000 {
            time = time.advance(at(400 * DAY + start * HOUR), Duration::ZERO, Witnesses::default());
        }
        assert_eq!(time.until, at(0));
    }

    #[test]
    fn devices_bear_a_clock_out() {
        for (devices, agreeing, bears_out) in
            [(0, 0, false), (1, 1, false), (2, 2, true), (4, 2, false), (5, 3, true), (5, 0, false)]
        {
            let time = TrustedTime::first(Some(at(0)), at(400 * DAY));
            let witnesses = Witnesses { devices, agreeing };
            let time = time.advance(at(400 * DAY), Duration::ZERO, witnesses);
            assert_eq!(time.until == at(400 * DAY), bears_out, "{agreeing} of {devices}");
        }
    }

    #[test]
    fn what_was_received_by_a_clock_that_was_ahead_is_no_guide() {
        assert_eq!(TrustedTime::first(Some(at(400 * DAY)), at(0)).until, at(0));
    }
}
