//! What a device's job adds up to, and the rule for its streak of failures, whatever order its events
//! arrive in.
//!
//! A streak is the number of failures dated after the job's last success; a success at the same
//! instant ends it. A batch is folded into one [`JobFigures`] per device and job, and the stores add
//! that to the stored ones. The PostgreSQL store states the same rule in SQL; one property test holds
//! both against a naive recount.

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
    /// Failures dated after `last_success`.
    pub consecutive_failures: i64,
    /// When the server last received an event.
    pub last_received: Timestamp,
}

/// Whether the streak is known after a batch was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreakCount {
    /// `consecutive_failures` is right.
    Known,
    /// Events arrived out of order: the failures after `last_success` must be counted among the
    /// stored events.
    Recount,
}

impl JobFigures {
    /// Folds the events of one device's job, received at `received`. `None` when there are none.
    pub fn fold<'a>(
        events: impl Iterator<Item = &'a SyncEvent> + Clone,
        received: Timestamp,
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
        for event in events.clone() {
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
            } else {
                figures.last_success = figures.last_success.max(Some(event.timestamp));
            }
        }
        let unanswered =
            events.filter(|event| event.failed() && Some(event.timestamp) > figures.last_success);
        for _ in unanswered {
            figures.consecutive_failures += 1;
        }
        Some(figures)
    }

    /// Adds what a batch brought. When the answer is [`StreakCount::Recount`], the caller counts the
    /// stored failures dated after `last_success` and sets `consecutive_failures` to that.
    pub fn add(&mut self, batch: &Self) -> StreakCount {
        let streak = self.streak_with(batch);
        self.total_syncs += batch.total_syncs;
        self.failed_syncs += batch.failed_syncs;
        self.total_files_synced += batch.total_files_synced;
        self.total_errors += batch.total_errors;
        self.speed_sum += batch.speed_sum;
        self.speed_count += batch.speed_count;
        self.first_sync = self.first_sync.min(batch.first_sync);
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

    /// The streak once `batch` is added, when it can be told from the figures alone.
    fn streak_with(&self, batch: &Self) -> Option<i64> {
        if batch.last_success > self.last_success {
            // A newer success ends the old streak, unless a failure dated after it came earlier.
            return (self.last_failure <= batch.last_success).then_some(batch.consecutive_failures);
        }
        if batch.last_failure <= self.last_success {
            // Nothing here is dated after the last success.
            return Some(self.consecutive_failures);
        }
        // Known when the whole batch lies after the stored success, not only a part of it.
        (Some(batch.first_sync) > self.last_success)
            .then_some(self.consecutive_failures + batch.consecutive_failures)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{DeviceId, sync_event::Mbps};

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

    fn naive_streak(events: &[SyncEvent]) -> i64 {
        let last_success =
            events.iter().filter(|event| !event.failed()).map(|event| event.timestamp).max();
        let streak =
            events.iter().filter(|event| event.failed() && Some(event.timestamp) > last_success);
        i64::try_from(streak.count()).unwrap()
    }

    proptest! {
        /// Few distinct instants, so that ties and late arrivals are common.
        #[test]
        fn any_order_and_any_batches_give_the_naive_figures(
            batches in prop::collection::vec(prop::collection::vec((0i64..12, 0u32..2), 1..5), 1..12),
        ) {
            let received = Timestamp::from_millisecond(1_000_000).unwrap();
            let mut stored: Vec<SyncEvent> = Vec::new();
            let mut figures: Option<JobFigures> = None;
            for batch in batches {
                let batch: Vec<_> = batch.into_iter().map(|(second, errors)| event(second, errors)).collect();
                let added = JobFigures::fold(batch.iter(), received).unwrap();
                stored.extend(batch);
                match &mut figures {
                    None => figures = Some(added),
                    Some(figures) => if figures.add(&added) == StreakCount::Recount {
                        figures.consecutive_failures = naive_streak(&stored);
                    },
                }
                let whole = JobFigures::fold(stored.iter(), received).unwrap();
                prop_assert_eq!(figures, Some(whole));
                prop_assert_eq!(whole.consecutive_failures, naive_streak(&stored));
            }
        }
    }

    #[test]
    fn events_in_order_never_need_a_recount() {
        let received = Timestamp::from_millisecond(0).unwrap();
        let fold = |event: &SyncEvent| JobFigures::fold([event].into_iter(), received).unwrap();
        let mut figures = fold(&event(0, 1));
        for second in 1..100 {
            let errors = u32::from(second % 7 != 0);
            assert_eq!(figures.add(&fold(&event(second, errors))), StreakCount::Known);
        }
        assert_eq!(figures.consecutive_failures, 99 - 98);
    }
}
