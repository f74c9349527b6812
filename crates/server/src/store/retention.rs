//! How long events are kept individually. The configuration makes a [`Retention`], and `maintenance` drops events by
//! it. It must never be so short that the figures of the last 24 hours lack an event.

use pisync_core::Timestamp;

const DAY_SECONDS: i64 = 24 * 60 * 60;

/// How long to keep events, counted from their `received_at`.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    days: u32,
    max_clock_skew_seconds: u32,
}

impl Retention {
    /// Keeps events for `days` days. An event's date may be ahead of its `received_at` by up to
    /// `max_clock_skew_seconds`. `None` when `days` is too short. The last 24 hours are counted event by event, so
    /// every event dated within them must be there.
    #[must_use]
    pub fn new(days: u32, max_clock_skew_seconds: u32) -> Option<Self> {
        (days >= Self::fewest_days(max_clock_skew_seconds))
            .then_some(Self { days, max_clock_skew_seconds })
    }

    /// The shortest possible retention, in days.
    #[must_use]
    pub fn fewest_days(max_clock_skew_seconds: u32) -> u32 {
        let skew = i64::from(max_clock_skew_seconds.max(1));
        u32::try_from(1 + (skew + DAY_SECONDS - 1) / DAY_SECONDS).unwrap_or(u32::MAX)
    }

    /// Events received before this need not be kept.
    pub(super) fn oldest(&self, now: Timestamp) -> Timestamp {
        now.saturating_add_milliseconds(-i64::from(self.days) * DAY_SECONDS * 1000)
    }

    /// How far an event's date may be ahead of its `received_at`, in milliseconds.
    pub(super) fn longest_lead(&self) -> i64 {
        i64::from(self.max_clock_skew_seconds) * 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_last_24_hours_need_is_kept() {
        for (skew, fewest) in [(0, 2), (300, 2), (86_400, 2), (86_401, 3), (u32::MAX, 49_712)] {
            assert_eq!(Retention::fewest_days(skew), fewest, "{skew}");
            assert!(Retention::new(fewest, skew).is_some());
            assert!(Retention::new(fewest - 1, skew).is_none());
        }
    }
}
