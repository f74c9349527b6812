//! What a device's job adds up to, and the rule for its streak of failures, whatever order its events
//! arrive in.
//!
//! A streak is the number of failures after the job's last success, in the order in which a history
//! shows them: by date, and by id where dates are equal. Ids of one batch rise in its order. Ids of
//! different batches need not rise in the order of their commits, so figures alone never decide between
//! a stored event and a new one of the same date: those are counted again. Events dated before what is
//! still kept in full come too late for that: what they would have to be compared with may be gone, so
//! they count in everything but the streak.
//!
//! Nor can anything be dated far ahead of the server's clock, unless a clock was wrong when it came. Such an event
//! would be a job's last for good, and hide all that is reported later. Maintenance finds the jobs that have one and
//! counts them again without it; until its date has come it counts in sums alone. A batch is folded into one [`JobFigures`] per device and job,
//! and the stores add that to the stored ones. The PostgreSQL store states the same rule in SQL; one
//! property test holds both against a naive recount.

use crate::{SyncEvent, Timestamp};

/// The figures of one device's job: over one batch, or over everything it ever reported.
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

/// How far ahead of the server's clock an event may be dated without a clock having been wrong, in milliseconds:
/// twice the largest clock skew that can be allowed, for what is imported may have been received by one, too.
pub const LONGEST_LEAD: i64 = 2 * 24 * 60 * 60 * 1000;

/// The later of two dates, of which one after `latest` yields to one that is not.
#[must_use]
pub fn later_until(latest: Timestamp, left: Timestamp, right: Timestamp) -> Timestamp {
    let (earlier, later) = (left.min(right), left.max(right));
    if later > latest && earlier <= latest { earlier } else { later }
}

/// Whether the streak is known after a batch was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreakCount {
    /// `consecutive_failures` is right.
    Known,
    /// Events arrived out of order, or with the dates of others: the failures after the last success
    /// must be counted among the stored events, by date and then by id. What is dated after `last_failure` does
    /// not count: its date is wrong.
    Recount,
}

impl JobFigures {
    /// Folds the events of one device's job, received at `received`, in the order of their ids. `None` when
    /// there are none. Those dated before `streaks_since` change no streak.
    pub fn fold<'a>(
        events: impl Iterator<Item = &'a SyncEvent> + Clone,
        received: Timestamp,
        streaks_since: Timestamp,
    ) -> Option<Self> {
        let first = events.clone().next()?;
        let mut figures = Self {
            total_syncs: 0,
            failed_syncs: 0,
            total_files_synced: 0,
            total_errors: 0,
            speed_sum: 0,
            speed_count: 0,
            first_sync: first.timestamp,
            last_sync: first.timestamp,
            last_success: None,
            last_failure: None,
            consecutive_failures: 0,
            last_received: received,
        };
        // Where the last success stands among the events.
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

    /// Adds what a batch brought that was folded with the same `streaks_since`. When the answer is
    /// [`StreakCount::Recount`], the caller counts the stored failures after the last success and sets
    /// `consecutive_failures` to that; then `last_success` is not before `streaks_since`, so they are all
    /// there.
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

    /// Whether all events so far are from a clock that was ahead, and have been left out of streaks: each is a success
    /// or a failure, but there is a date of neither. Those it shows are then the wrong ones.
    fn is_all_misdated(&self) -> bool {
        self.last_success.is_none() && self.last_failure.is_none()
    }

    /// The streak once `batch` is added, when it can be told from the figures alone.
    fn streak_with(&self, batch: &Self, streaks_since: Timestamp) -> Option<i64> {
        let since = Some(streaks_since);
        if batch.last_success >= self.last_success && batch.last_success >= since {
            // A newer success ends the old streak, unless a failure that came earlier may stand after it.
            // Of two successes of one instant either may be the last, which matters if there are failures.
            let is_newer = batch.last_success > self.last_success;
            // The old streak's only failure is dated after the new success: it is the first one of the new streak.
            if is_newer && self.consecutive_failures == 1 && self.last_failure > batch.last_success
            {
                return Some(1 + batch.consecutive_failures);
            }
            let is_known = self.last_failure < batch.last_success
                && (is_newer || batch.last_failure < batch.last_success);
            return is_known.then_some(batch.consecutive_failures);
        }
        if batch.last_failure < self.last_success || batch.last_failure < since {
            // Nothing here is dated after the last success, or all of it comes too late.
            return Some(self.consecutive_failures);
        }
        // Known when all that counts of the batch lies after the stored success, not only a part of it.
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

    /// An event with the number of its batch among ids, which need not rise in the order of arrival, then
    /// that of arrival, and its place in the batch. The three together are the event's id.
    type Stored = ((u8, usize, usize), SyncEvent);

    /// The events of a batch that arrives as number `arrival`, under ids that begin with `block`.
    fn batch(block: u8, arrival: usize, reports: &[(i64, u32)]) -> Vec<Stored> {
        let events = reports.iter().map(|(second, errors)| event(*second, *errors));
        events.enumerate().map(|(index, event)| ((block, arrival, index), event)).collect()
    }

    fn fold(events: &[Stored], streaks_since: Timestamp) -> JobFigures {
        let received = Timestamp::from_millisecond(1_000_000).unwrap();
        let mut by_id: Vec<_> = events.iter().collect();
        by_id.sort_by_key(|(id, _)| *id);
        JobFigures::fold(by_id.into_iter().map(|(_, event)| event), received, streaks_since)
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
                let added = fold(&batch, Timestamp::MIN);
                stored.extend(batch);
                match &mut figures {
                    None => figures = Some(added),
                    Some(figures) => if figures.add(&added, Timestamp::MIN) == StreakCount::Recount {
                        figures.consecutive_failures = naive_streak(&stored);
                    },
                }
                let whole = fold(&stored, Timestamp::MIN);
                prop_assert_eq!(figures, Some(whole));
                prop_assert_eq!(whole.consecutive_failures, naive_streak(&stored));
            }
        }
    }

    proptest! {
        /// What is kept begins later and later. The truth is the streak of all events that did not come
        /// too late; counting again sees only what is still kept.
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
                let added = fold(&batch, streaks_since);
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
                let whole = fold(&all, Timestamp::MIN);
                prop_assert_eq!(JobFigures { consecutive_failures: 0, ..figures }, JobFigures { consecutive_failures: 0, ..whole });
                prop_assert_eq!(figures.consecutive_failures, naive_streak(&counting));
            }
        }
    }

    /// Devices that do not know the time: the server dates all events of a batch alike.
    #[test]
    fn events_of_one_instant_follow_each_other_as_they_came() {
        let streak = |errors: &[u32]| {
            let reports: Vec<_> = errors.iter().map(|errors| (0, *errors)).collect();
            fold(&batch(0, 0, &reports), Timestamp::MIN).consecutive_failures
        };
        assert_eq!(streak(&[0, 1, 1, 1]), 3);
        assert_eq!(streak(&[1, 1, 1, 0]), 0);
        assert_eq!(streak(&[1, 0, 1, 1]), 2);
        assert_eq!(streak(&[1, 1]), 2);
    }

    #[test]
    fn events_in_order_never_need_a_recount() {
        let received = Timestamp::from_millisecond(0).unwrap();
        let fold = |event: &SyncEvent| {
            JobFigures::fold([event].into_iter(), received, Timestamp::MIN).unwrap()
        };
        let mut figures = fold(&event(0, 1));
        for second in 1..100 {
            let errors = u32::from(second % 7 != 0);
            assert_eq!(
                figures.add(&fold(&event(second, errors)), Timestamp::MIN),
                StreakCount::Known
            );
        }
        assert_eq!(figures.consecutive_failures, 99 - 98);
    }

    #[test]
    fn a_date_that_cannot_be_gives_way() {
        let at = |second: i64| Timestamp::from_millisecond(second * 1000).unwrap();
        for (left, right, expected) in
            [(1, 2, 2), (2, 12, 2), (12, 2, 2), (10, 11, 10), (11, 12, 12)]
        {
            assert_eq!(later_until(at(10), at(left), at(right)), at(expected), "{left} {right}");
        }
    }
}
