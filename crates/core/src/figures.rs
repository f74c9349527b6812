//! The figures of one device's job, and the rule for its streak of failures in whatever order its events arrive. A
//! batch is aggregated into one [`JobFigures`] per device and job; the stores add it to the stored figures. The
//! PostgreSQL store states the same rule in SQL. One property test compares both with a naive recount.
//!
//! A streak is the number of failures after the job's last success. The order is that of the history: by date, then by
//! id. Ids within a batch rise in the order of its events. Ids of different batches may not rise in the order of their
//! commits. Figures alone therefore never decide between a stored event and a new one of the same date: the stored
//! events are counted again.
//!
//! Events older than the period that is fully kept do not change the streak. The events to compare them with may have
//! been deleted. They count in all other figures.
//!
//! An event dated far ahead of the server's clock means that some clock was wrong when it came. It would stay the job's
//! last event for good and hide every later report. Maintenance finds the jobs with such an event and counts them again
//! without it. Until its date has come, the event counts only in the sums.

use crate::{SyncEvent, Timestamp};

/// The figures of one device's job, over one batch or over all its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobFigures {
    /// Syncs reported.
    pub total_syncs: i64,
    /// Syncs with at least one error.
    pub failed_syncs: i64,
    /// Sum of files synced.
    pub total_files_synced: i64,
    /// Sum of errors.
    pub total_errors: i64,
    /// Sum of the measured speeds, in hundredths of Mbps.
    pub speed_sum: i64,
    /// How many syncs measured a speed.
    pub speed_count: i64,
    /// Date of the earliest sync.
    pub first_sync: Timestamp,
    /// Date of the latest sync.
    pub last_sync: Timestamp,
    /// Date of the latest sync without errors.
    pub last_success: Option<Timestamp>,
    /// Date of the latest sync with errors.
    pub last_failure: Option<Timestamp>,
    /// Failures after the latest sync without errors, by date and then by id.
    pub consecutive_failures: i64,
    /// When the server last received an event.
    pub last_received: Timestamp,
}

/// How far ahead of the server's clock a correct event may be dated, in milliseconds. It is twice the largest clock
/// skew that can be allowed: an imported event may come from a server whose own clock was ahead.
pub const LONGEST_LEAD: i64 = 2 * 24 * 60 * 60 * 1000;

/// The later of two dates. A date after `latest` wins only if the other one is after `latest` too.
#[must_use]
pub fn later_until(latest: Timestamp, left: Timestamp, right: Timestamp) -> Timestamp {
    let (earlier, later) = (left.min(right), left.max(right));
    if later > latest && earlier <= latest { earlier } else { later }
}

/// Whether the figures alone give the streak after a batch was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreakCount {
    /// `consecutive_failures` is correct.
    Known,
    /// Events arrived out of order, or share a date with others. The caller must count the stored failures after the
    /// last success, by date and then by id. It must skip events dated after `last_failure`, because their date is
    /// wrong.
    Recount,
}

impl JobFigures {
    /// No event yet. The first is dated `timestamp` and was received at `received`.
    #[must_use]
    pub fn none(timestamp: Timestamp, received: Timestamp) -> Self {
        Self {
            total_syncs: 0,
            failed_syncs: 0,
            total_files_synced: 0,
            total_errors: 0,
            speed_sum: 0,
            speed_count: 0,
            first_sync: timestamp,
            last_sync: timestamp,
            last_success: None,
            last_failure: None,
            consecutive_failures: 0,
            last_received: received,
        }
    }

    /// Aggregates the events of one device's job, which were received at `received` and come in the order of their ids.
    /// Returns `None` when there are none. Events dated before `streaks_since` change no streak.
    pub fn aggregate<'a>(
        events: impl Iterator<Item = &'a SyncEvent> + Clone,
        received: Timestamp,
        streaks_since: Timestamp,
    ) -> Option<Self> {
        let first = events.clone().next()?;
        let mut figures = Self::none(first.timestamp, received);
        // The index of the last success among the events.
        let mut last_success_at = 0;
        for (index, event) in events.clone().enumerate() {
            figures.total_syncs += 1;
            figures.total_files_synced += i64::from(event.total_files_synced);
            figures.total_errors += i64::from(event.total_errors);
            if let Some(speed) = event.internet_speed {
                figures.speed_sum += speed.hundredths();
                figures.speed_count += 1;
            }
            figures.first_sync = figures.first_sync.min(event.timestamp);
            figures.last_sync = figures.last_sync.max(event.timestamp);
            if event.failed() {
                figures.failed_syncs += 1;
                figures.last_failure = figures.last_failure.max(Some(event.timestamp));
            } else if figures.last_success <= Some(event.timestamp) {
                figures.last_success = Some(event.timestamp);
                last_success_at = index;
            }
        }
        let last_success = (figures.last_success, last_success_at);
        let unanswered = events.enumerate().filter(|(index, event)| {
            event.failed()
                && event.timestamp >= streaks_since
                && (Some(event.timestamp), *index) > last_success
        });
        for _ in unanswered {
            figures.consecutive_failures += 1;
        }
        Some(figures)
    }

    /// Adds the figures of a batch that was aggregated with the same `streaks_since`. After [`StreakCount::Recount`]
    /// the caller counts the stored failures after the last success and stores that number as `consecutive_failures`.
    /// All those failures are still stored, because `last_success` is then not before `streaks_since`.
    pub fn add(&mut self, batch: &Self, streaks_since: Timestamp) -> StreakCount {
        let streak = self.streak_with(batch, streaks_since);
        self.total_syncs += batch.total_syncs;
        self.failed_syncs += batch.failed_syncs;
        self.total_files_synced += batch.total_files_synced;
        self.total_errors += batch.total_errors;
        self.speed_sum += batch.speed_sum;
        self.speed_count += batch.speed_count;
        self.first_sync = self.first_sync.min(batch.first_sync);
        if self.is_all_misdated() {
            (self.last_sync, self.last_received) = (batch.last_sync, batch.last_received);
        }
        self.last_sync = self.last_sync.max(batch.last_sync);
        self.last_success = self.last_success.max(batch.last_success);
        self.last_failure = self.last_failure.max(batch.last_failure);
        self.last_received = self.last_received.max(batch.last_received);
        match streak {
            Some(count) => {
                self.consecutive_failures = count;
                StreakCount::Known
            }
            None => StreakCount::Recount,
        }
    }

    /// True if every event so far came from a clock that was ahead. Such events are excluded from streaks, so there is
    /// neither a date of a success nor one of a failure. The dates in these figures are then wrong.
    fn is_all_misdated(&self) -> bool {
        self.last_success.is_none() && self.last_failure.is_none()
    }

    /// The streak after `batch` is added; `None` if the figures alone do not tell.
    fn streak_with(&self, batch: &Self, streaks_since: Timestamp) -> Option<i64> {
        let since = Some(streaks_since);
        if batch.last_success >= self.last_success && batch.last_success >= since {
            // A newer success ends the old streak, unless a failure that arrived earlier is dated after it. If two
            // successes have one date, either may be the last. That matters only if there are failures.
            let is_newer = batch.last_success > self.last_success;
            // The only failure of the old streak is dated after the new success, so it is the first of the new streak.
            if is_newer && self.consecutive_failures == 1 && self.last_failure > batch.last_success
            {
                return Some(1 + batch.consecutive_failures);
            }
            let is_known = self.last_failure < batch.last_success
                && (is_newer || batch.last_failure < batch.last_success);
            return is_known.then_some(batch.consecutive_failures);
        }
        if batch.last_failure < self.last_success || batch.last_failure < since {
            // No failure of the batch is dated after the last success, or all of the batch is too old to count.
            return Some(self.consecutive_failures);
        }
        // The sum is right only if every event of the batch that counts is dated after the stored success.
        (Some(batch.first_sync.max(streaks_since)) > self.last_success)
            .then_some(self.consecutive_failures + batch.consecutive_failures)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{DeviceId, Mbps};

    fn event(second: i64, total_errors: u32) -> SyncEvent {
        SyncEvent {
            device_id: DeviceId::new("pi").unwrap(),
            event_id: None,
            timestamp: Timestamp::from_millisecond(second * 1000).unwrap(),
            total_files_synced: 10,
            total_errors,
            internet_speed: Mbps::from_hundredths(150),
            job: None,
            duration: None,
            bytes_synced: None,
            metadata: None,
        }
    }

    /// An event with three numbers, which together are its id: its batch's number among ids, the batch's number in the
    /// order of arrival, its place in the batch. The first need not rise in the order of arrival.
    type Stored = ((u8, usize, usize), SyncEvent);

    /// The events of the batch that arrives as number `arrival`. Their ids begin with `block`.
    fn batch(block: u8, arrival: usize, reports: &[(i64, u32)]) -> Vec<Stored> {
        let events = reports.iter().map(|(second, errors)| event(*second, *errors));
        events.enumerate().map(|(index, event)| ((block, arrival, index), event)).collect()
    }

    fn aggregate(events: &[Stored], streaks_since: Timestamp) -> JobFigures {
        let received = Timestamp::from_millisecond(1_000_000).unwrap();
        let mut by_id: Vec<_> = events.iter().collect();
        by_id.sort_by_key(|(id, _)| *id);
        JobFigures::aggregate(by_id.into_iter().map(|(_, event)| event), received, streaks_since)
            .unwrap()
    }

    /// The failures at the end of the history.
    fn naive_streak<'a>(events: impl IntoIterator<Item = &'a Stored>) -> i64 {
        let mut history: Vec<_> = events.into_iter().collect();
        history.sort_by_key(|(id, event)| (event.timestamp, *id));
        let streak = history.iter().rev().take_while(|(_, event)| event.failed());
        i64::try_from(streak.count()).unwrap()
    }

    proptest! {
        /// Few distinct instants, so that ties and late arrivals are common.
        #[test]
        fn any_order_and_any_batches_give_the_naive_figures(
            batches in prop::collection::vec(
                (0..4u8, prop::collection::vec((0i64..12, 0u32..2), 1..5)), 1..12,
            ),
        ) {
            let mut stored: Vec<Stored> = Vec::new();
            let mut figures: Option<JobFigures> = None;
            for (arrival, (block, reports)) in batches.into_iter().enumerate() {
                let batch = batch(block, arrival, &reports);
                let added = aggregate(&batch, Timestamp::MIN);
                stored.extend(batch);
                match &mut figures {
                    None => figures = Some(added),
                    Some(figures) => if figures.add(&added, Timestamp::MIN) == StreakCount::Recount {
                        figures.consecutive_failures = naive_streak(&stored);
                    },
                }
                let whole = aggregate(&stored, Timestamp::MIN);
                prop_assert_eq!(figures, Some(whole));
                prop_assert_eq!(whole.consecutive_failures, naive_streak(&stored));
            }
        }
    }

    proptest! {
        /// The kept period begins later and later. The expected streak includes all events that did not come too late;
        /// a recount sees only those still kept.
        #[test]
        fn events_that_come_too_late_change_no_streak(
            batches in prop::collection::vec(
                (0i64..3, 0..4u8, prop::collection::vec((0i64..12, 0u32..2), 1..5)), 1..12,
            ),
        ) {
            let mut since = 0;
            let (mut counting, mut all): (Vec<Stored>, Vec<Stored>) = Default::default();
            let mut figures: Option<JobFigures> = None;
            for (arrival, (later, block, reports)) in batches.into_iter().enumerate() {
                since += later;
                let streaks_since = Timestamp::from_millisecond(since * 1000).unwrap();
                let batch = batch(block, arrival, &reports);
                let added = aggregate(&batch, streaks_since);
                let in_time = batch.iter().filter(|(_, event)| event.timestamp >= streaks_since);
                counting.extend(in_time.cloned());
                all.extend(batch);
                match &mut figures {
                    None => figures = Some(added),
                    Some(figures) => if figures.add(&added, streaks_since) == StreakCount::Recount {
                        prop_assert!(figures.last_success >= Some(streaks_since));
                        let kept = all.iter().filter(|(_, event)| event.timestamp >= streaks_since);
                        figures.consecutive_failures = naive_streak(kept);
                    },
                }
                let figures = figures.unwrap();
                let whole = aggregate(&all, Timestamp::MIN);
                prop_assert_eq!(JobFigures { consecutive_failures: 0, ..figures }, JobFigures { consecutive_failures: 0, ..whole });
                prop_assert_eq!(figures.consecutive_failures, naive_streak(&counting));
            }
        }
    }

    /// Devices without a trustworthy clock: the server gives all events of a batch one date.
    #[test]
    fn events_of_one_instant_follow_each_other_as_they_came() {
        let streak = |errors: &[u32]| {
            let reports: Vec<_> = errors.iter().map(|errors| (0, *errors)).collect();
            aggregate(&batch(0, 0, &reports), Timestamp::MIN).consecutive_failures
        };
        assert_eq!(streak(&[0, 1, 1, 1]), 3);
        assert_eq!(streak(&[1, 1, 1, 0]), 0);
        assert_eq!(streak(&[1, 0, 1, 1]), 2);
        assert_eq!(streak(&[1, 1]), 2);
    }

    #[test]
    fn events_in_order_never_need_a_recount() {
        let received = Timestamp::from_millisecond(0).unwrap();
        let aggregate = |event: &SyncEvent| {
            JobFigures::aggregate([event].into_iter(), received, Timestamp::MIN).unwrap()
        };
        let mut figures = aggregate(&event(0, 1));
        for second in 1..100 {
            let errors = u32::from(second % 7 != 0);
            assert_eq!(
                figures.add(&aggregate(&event(second, errors)), Timestamp::MIN),
                StreakCount::Known
            );
        }
        assert_eq!(figures.consecutive_failures, 99 - 98);
    }

    #[test]
    fn a_date_that_cannot_be_yields() {
        let at = |second: i64| Timestamp::from_millisecond(second * 1000).unwrap();
        for (left, right, expected) in
            [(1, 2, 2), (2, 12, 2), (12, 2, 2), (10, 11, 10), (11, 12, 12)]
        {
            assert_eq!(later_until(at(10), at(left), at(right)), at(expected), "{left} {right}");
        }
    }
}
