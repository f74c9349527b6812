//! Decides how far the clock is believed when something is deleted for its age. `maintenance` asks before it deletes
//! event ids or old events. Both stores keep the answer; this module alone decides it.
//!
//! A clock that jumps ahead would make everything look old. The database therefore keeps the latest time that was
//! believed. A server that starts believes a clock that is a few days ahead of that time, because servers are switched
//! off for a weekend. A clock that is further ahead is doubted. A running server doubts one that is further ahead than
//! its running time allows. The believed time then advances only as fast as the server runs. That ends when devices
//! confirm the clock, or after two weeks.
//!
//! A clock that is behind makes nothing look old. The believed time goes back when devices confirm that clock. It also
//! goes back when the clock has run for five minutes and any device has reported by it.

use std::time::Duration;

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::StoreError;

const DAY: i64 = 24 * 60 * 60 * 1000;

/// How far the clock may be ahead of the believed time when a server starts, in milliseconds. Believing a wrong clock
/// costs at most the events of so many days.
const LONGEST_PAUSE: i64 = 4 * DAY;

/// How far the clock of a running server may get ahead of its running time, in milliseconds.
pub(crate) const LARGEST_STEP: i64 = 60 * 60 * 1000;

/// How far two clocks may differ before a warning, in milliseconds. When servers on one PostgreSQL aggregate events,
/// they rely on their clocks to a minute.
pub(crate) const NOTABLE_DIFFERENCE: i64 = 60_000;

/// After how long an unconfirmed clock is believed, in milliseconds. By then somebody has read the warnings, and old
/// events must not be kept for ever.
const LONGEST_DOUBT: i64 = 14 * DAY;

/// After how long a clock behind the believed time is believed, in milliseconds, if devices have reported by it
/// meanwhile. Whatever sets a clock after a start has done it by then. Believing it deletes nothing. If it goes ahead
/// again, the streaks that this changes are counted again.
const LONGEST_CONTRADICTION: i64 = 5 * 60 * 1000;

/// How far an event's own date may differ from its `received_at` and still confirm the server's clock.
pub(super) const AGREEMENT_MILLISECONDS: i64 = 60 * 60 * 1000;

/// How many of the latest events are checked for their dates.
pub(super) const WITNESSES: i64 = 1_000;

/// The time that is believed when something is deleted for its age.
#[async_trait]
pub trait TrustedTimeStore: Send + Sync {
    /// Advances the time by which old events and event ids are deleted. It is given what the clock says, and how long
    /// this server has run since the last call.
    async fn trust_time(&self, now: Timestamp, ran: Duration) -> Result<TrustedTime, StoreError>;

    /// The last believed time, which `trust_time` advances; `None` before any server has.
    async fn trusted_time(&self) -> Result<Option<TrustedTime>, StoreError>;

    /// The database's own clock; `None` on SQLite, which uses the server's.
    async fn database_time(&self) -> Result<Option<Timestamp>, StoreError>;
}

/// The state of the believed time in the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrustedTime {
    /// The latest time that was believed. Deletions use it, or the clock if the clock is behind.
    pub until: Timestamp,
    /// What the clock showed last.
    pub(super) seen: Timestamp,
    /// How long servers have run with a clock that is not believed, in milliseconds. Negative while that clock is
    /// behind.
    pub(super) doubted: i64,
}

/// How a clock compares with the believed time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It agrees with the believed time.
    Plausible,
    /// It is too far ahead to be believed.
    Ahead,
    /// It is behind a time that it, or another server's clock, has shown before.
    Behind,
}

/// What devices say about the server's clock. Only devices that were heard of within the last hour, by that clock,
/// count.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Witnesses {
    pub(super) devices: i64,
    /// Devices that use a clock of their own and have an event dated about its `received_at`.
    pub(super) agreeing: i64,
}

impl Witnesses {
    /// A single device could run on the server itself.
    fn bear_out(self) -> bool {
        self.agreeing >= 2 && self.agreeing * 2 > self.devices
    }
}

impl TrustedTime {
    /// The first state, when there is none. It starts from the time at which the last event was received.
    pub(super) fn first(newest: Option<Timestamp>, now: Timestamp) -> Self {
        Self { until: newest.map_or(now, |newest| newest.min(now)), seen: now, doubted: 0 }
    }

    /// How a clock that shows `now` compares with it, for a process that has just started.
    pub(crate) fn standing(&self, now: Timestamp) -> Standing {
        if self.doubts(now, Duration::ZERO) {
            Standing::Ahead
        } else if now < self.until.saturating_add_milliseconds(-NOTABLE_DIFFERENCE) {
            Standing::Behind
        } else {
            Standing::Plausible
        }
    }

    /// Whether `now` is too far ahead to be believed. `ran` is how long the server has run since it last advanced the
    /// believed time.
    fn doubts(&self, now: Timestamp, ran: Duration) -> bool {
        let lead = if ran.is_zero() {
            LONGEST_PAUSE
        } else {
            LARGEST_STEP.saturating_add(milliseconds(ran))
        };
        now > self.until.saturating_add_milliseconds(lead)
    }

    /// Whether the believed time is so far ahead of `now` that devices can tell which of the two is right.
    fn contradicts(&self, now: Timestamp) -> bool {
        now < self.until.saturating_add_milliseconds(-AGREEMENT_MILLISECONDS)
    }

    /// Whether the reports of devices are needed for the decision.
    pub(super) fn needs_witnesses(&self, now: Timestamp, ran: Duration) -> bool {
        self.doubts(now, ran) || self.contradicts(now)
    }

    /// Advances the believed time. `ran` is how long the server has run since it last did so.
    pub(super) fn advance(self, now: Timestamp, ran: Duration, witnesses: Witnesses) -> Self {
        if witnesses.bear_out() && self.contradicts(now) {
            return Self { until: now, seen: now, doubted: 0 };
        }
        // Several servers do this for one database. Together they must not count an hour twice.
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
        // Two servers with clocks that are both ahead.
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

    /// A running server knows how much time has passed. A starting one does not.
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
        // Devices cannot decide within an hour.
        let now = at(400 * DAY - HOUR);
        assert_eq!(time.advance(now, hours(1), witnesses).until, at(400 * DAY));
    }

    #[test]
    fn a_clock_that_is_behind_is_believed_once_it_has_gone_on() {
        const MINUTE: i64 = 60 * 1000;
        let minutes = |count: u64| Duration::from_secs(count * 60);
        let one = Witnesses { devices: 1, agreeing: 0 };
        let mut time = TrustedTime::first(None, at(400 * DAY));
        // Starting again and again does not count as running.
        for start in 0..20 {
            time = time.advance(at(start * MINUTE), Duration::ZERO, one);
        }
        time = time.advance(at(23 * MINUTE), minutes(4), one);
        assert_eq!(time.until, at(400 * DAY));
        time = time.advance(at(24 * MINUTE), minutes(1), one);
        assert_eq!((time.until, time.doubted), (at(24 * MINUTE), 0));
        // If it was behind nevertheless, nothing is deleted by it at once.
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
