//! How far to believe the clock when something is deleted for its age. `maintenance` asks before it deletes event ids or old
//! events. Both stores keep the answer; this module alone decides it.
//!
//! A clock that jumps ahead would make everything look old. So the database keeps the latest time that was believed.
//! A server that starts believes a clock that is a few days ahead of that: servers are switched off for a weekend. Beyond,
//! and once the server runs, the believed time moves on only as fast as the server runs. That ends when devices confirm the
//! clock, or after two weeks. A clock that is behind makes nothing look old. The believed time goes back when devices
//! confirm that clock, or when it has run for five minutes and any device has reported by it.

use std::time::Duration;

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::StoreError;

const DAY: i64 = 24 * 60 * 60 * 1000;

/// How far the clock may be ahead of the believed time when a server starts, in milliseconds. What it could cost to
/// believe a wrong clock is the events of so many days.
const LONGEST_PAUSE: i64 = 4 * DAY;

/// How far the clock of a running server may get ahead of what its run accounts for, in milliseconds.
pub(crate) const LARGEST_STEP: i64 = 60 * 60 * 1000;

/// By how much two clocks may differ before anybody hears of it, in milliseconds. Servers on one PostgreSQL rely on
/// their clocks to a minute, when they aggregate events.
pub(crate) const NOTABLE_DIFFERENCE: i64 = 60_000;

/// After how long a clock is believed that nothing has borne out, in milliseconds: by then somebody has read
/// the warnings, and old events must not be kept for ever.
const LONGEST_DOUBT: i64 = 14 * DAY;

/// After how long a clock is believed that is behind the believed time, in milliseconds, if devices have reported by
/// it meanwhile: whatever sets a clock after a start has done it by then. To believe it deletes nothing, and what its
/// going ahead again would change in streaks is counted again.
const LONGEST_CONTRADICTION: i64 = 5 * 60 * 1000;

/// By how much an event's own date may differ from when it was received to bear the server's clock out.
pub(super) const AGREEMENT_MILLISECONDS: i64 = 60 * 60 * 1000;

/// Of how many of the latest events to look at the dates.
pub(super) const WITNESSES: i64 = 1_000;

/// The time that is believed when something is deleted for its age.
#[async_trait]
pub trait TrustedTimeStore: Send + Sync {
    /// Moves the time on by which old events and event ids are deleted, given what the clock says and for how long
    /// this server has run since it last did.
    async fn trust_time(&self, now: Timestamp, ran: Duration) -> Result<TrustedTime, StoreError>;

    /// The time that was believed last, which `trust_time` moves on; `None` before a server has.
    async fn trusted_time(&self) -> Result<Option<TrustedTime>, StoreError>;

    /// The database's own clock; `None` on SQLite, which goes by the server's.
    async fn database_time(&self) -> Result<Option<Timestamp>, StoreError>;
}

/// What the database keeps of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrustedTime {
    /// The latest time that was believed. Deletions go by it, or by the clock if that is behind.
    pub until: Timestamp,
    /// What the clock said last.
    pub(super) seen: Timestamp,
    /// For how long servers have run with a clock that is not believed, in milliseconds. Negative while that clock is
    /// behind.
    pub(super) doubted: i64,
}

/// How a clock stands to the believed time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Nothing speaks against it.
    Plausible,
    /// It is too far ahead to be believed.
    Ahead,
    /// It has shown a later time before, or another server's has.
    Behind,
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

    /// How a clock that shows `now` stands to it, for whoever has just come.
    pub(crate) fn standing(&self, now: Timestamp) -> Standing {
        if self.doubts(now, Duration::ZERO) {
            Standing::Ahead
        } else if now < self.until.saturating_add_milliseconds(-NOTABLE_DIFFERENCE) {
            Standing::Behind
        } else {
            Standing::Plausible
        }
    }

    /// Whether `now` is too far ahead to be believed as it is, by a server that has run for so long since it last
    /// moved the believed time on.
    fn doubts(&self, now: Timestamp, ran: Duration) -> bool {
        let lead = if ran.is_zero() {
            LONGEST_PAUSE
        } else {
            LARGEST_STEP.saturating_add(milliseconds(ran))
        };
        now > self.until.saturating_add_milliseconds(lead)
    }

    /// Whether the believed time is so far ahead of `now` that devices can tell which of them is right.
    fn contradicts(&self, now: Timestamp) -> bool {
        now < self.until.saturating_add_milliseconds(-AGREEMENT_MILLISECONDS)
    }

    /// Whether what devices say matters.
    pub(super) fn needs_witnesses(&self, now: Timestamp, ran: Duration) -> bool {
        self.doubts(now, ran) || self.contradicts(now)
    }

    /// Moves the believed time on, after a server has run for so long since it last did.
    pub(super) fn advance(self, now: Timestamp, ran: Duration, witnesses: Witnesses) -> Self {
        if witnesses.bear_out() && self.contradicts(now) {
            return Self { until: now, seen: now, doubted: 0 };
        }
        // Several servers do this for one database: together they count no hour twice.
        let elapsed = now.as_millisecond() - self.seen.as_millisecond();
        let elapsed = elapsed.clamp(0, milliseconds(ran));
        if self.contradicts(now) {
            let behind = self.doubted.min(0).saturating_sub(elapsed);
            if behind <= -LONGEST_CONTRADICTION && witnesses.devices > 0 {
                return Self { until: now, seen: now, doubted: 0 };
            }
            return Self { until: self.until, seen: now, doubted: behind };
        }
        if !self.doubts(now, ran) || witnesses.bear_out() {
            return Self { until: self.until.max(now), seen: now, doubted: 0 };
        }
        let doubted = self.doubted.max(0).saturating_add(elapsed);
        if doubted >= LONGEST_DOUBT {
            return Self { until: now, seen: now, doubted: 0 };
        }
        Self { until: self.until.saturating_add_milliseconds(elapsed), seen: now, doubted }
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
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

    /// A server that runs knows how much time has passed. One that starts does not.
    #[test]
    fn a_running_server_believes_no_jump() {
        let time = TrustedTime::first(None, at(0));
        for (now, ran, is_believed) in [
            (at(3 * DAY), Duration::ZERO, true),
            (at(3 * DAY), hours(1), false),
            (at(3 * HOUR), hours(1), false),
            (at(3 * HOUR), hours(3), true),
            (at(2 * HOUR), hours(1), true),
        ] {
            let after = time.advance(now, ran, Witnesses::default());
            assert_eq!(after.until == now, is_believed, "{now} after {ran:?}");
            assert!(after.until <= now);
        }
    }

    #[test]
    fn devices_correct_a_time_that_was_wrong() {
        let time = TrustedTime::first(None, at(400 * DAY));
        let unheard = time.advance(at(0), hours(1), Witnesses::default());
        assert_eq!(unheard.until, at(400 * DAY));
        let unheard = unheard.advance(at(HOUR), hours(1), Witnesses::default());
        assert_eq!(unheard.until, at(400 * DAY));
        let witnesses = Witnesses { devices: 3, agreeing: 2 };
        assert_eq!(time.advance(at(0), hours(1), witnesses).until, at(0));
        // They cannot tell within an hour.
        let now = at(400 * DAY - HOUR);
        assert_eq!(time.advance(now, hours(1), witnesses).until, at(400 * DAY));
    }

    #[test]
    fn a_clock_that_is_behind_is_believed_once_it_has_gone_on() {
        const MINUTE: i64 = 60 * 1000;
        let minutes = |count: u64| Duration::from_secs(count * 60);
        let one = Witnesses { devices: 1, agreeing: 0 };
        let mut time = TrustedTime::first(None, at(400 * DAY));
        // Starting again and again is no course.
        for start in 0..20 {
            time = time.advance(at(start * MINUTE), Duration::ZERO, one);
        }
        time = time.advance(at(23 * MINUTE), minutes(4), one);
        assert_eq!(time.until, at(400 * DAY));
        time = time.advance(at(24 * MINUTE), minutes(1), one);
        assert_eq!((time.until, time.doubted), (at(24 * MINUTE), 0));
        // When it was behind nevertheless, nothing is deleted by it at once.
        let set = time.advance(at(5 * DAY), minutes(10), one);
        assert!(set.until <= at(40 * MINUTE));
    }

    #[test]
    fn standings() {
        let time = TrustedTime::first(None, at(0));
        for (now, standing) in [
            (-NOTABLE_DIFFERENCE - 1, Standing::Behind),
            (-NOTABLE_DIFFERENCE, Standing::Plausible),
            (LONGEST_PAUSE, Standing::Plausible),
            (LONGEST_PAUSE + 1, Standing::Ahead),
        ] {
            assert_eq!(time.standing(at(now)), standing, "{now}");
        }
    }

    #[test]
    fn what_was_received_by_a_clock_that_was_ahead_is_no_guide() {
        assert_eq!(TrustedTime::first(Some(at(400 * DAY)), at(0)).until, at(0));
    }
}
