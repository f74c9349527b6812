//! Summaries of devices: what their jobs add up to, and how many devices have a figure. Lists and counts read them
//! instead of a row per job. A background task brings them up to date. Readers replace the summaries of devices that
//! have changed since, in the same snapshot, so that answers are exact. Nothing here runs SQL.

use std::collections::BTreeMap;

use pisync_core::Timestamp;

use super::{
    Figures,
    ordered_scan::{KeyPart, Place},
};

/// Devices that are brought up to date in one transaction.
pub(super) const DEVICES_AT_ONCE: usize = 500;

/// Numbers from this one on are counted together.
pub(super) const LARGEST_BUCKET: i64 = 100;

/// The length of a bucket of times.
pub(super) const MINUTE_MILLISECONDS: i64 = 60_000;

/// The time of the last failure of a device that never failed.
const NEVER: i64 = i64::MIN;

/// A row of `device_summaries`. Times are in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) last_seen: Option<i64>,
    pub(super) last_sync: Option<i64>,
    pub(super) last_success: Option<i64>,
    /// The smallest number when there was none.
    pub(super) last_failure: i64,
    pub(super) total_syncs: i64,
    pub(super) failed_syncs: i64,
    pub(super) consecutive_failures: i64,
}

/// The columns of a [`Summary`], in its order.
pub(super) const COLUMNS: [&str; 7] = [
    "last_seen",
    "last_sync",
    "last_success",
    "last_failure",
    "total_syncs",
    "failed_syncs",
    "consecutive_failures",
];

impl Summary {
    /// What a device's figures over all its jobs say.
    pub(super) fn of(figures: &Figures) -> Self {
        let millisecond = |time: Option<Timestamp>| time.map(Timestamp::as_millisecond);
        Self {
            last_seen: millisecond(figures.last_seen),
            last_sync: millisecond(figures.last_sync),
            last_success: millisecond(figures.last_success),
            last_failure: millisecond(figures.last_failure).unwrap_or(NEVER),
            total_syncs: figures.total_syncs,
            failed_syncs: figures.failed_syncs,
            consecutive_failures: figures.consecutive_failures,
        }
    }

    /// Reads a row. `number` reads the column with a number from 0 on.
    pub(super) fn read<E>(number: impl Fn(usize) -> Result<Option<i64>, E>) -> Result<Self, E> {
        let count = |column| Ok(number(column)?.unwrap_or_default());
        Ok(Self {
            last_seen: number(0)?,
            last_sync: number(1)?,
            last_success: number(2)?,
            last_failure: number(3)?.unwrap_or(NEVER),
            total_syncs: count(4)?,
            failed_syncs: count(5)?,
            consecutive_failures: count(6)?,
        })
    }

    /// The values of the row, in the order of [`COLUMNS`].
    pub(super) fn values(&self) -> [Option<i64>; COLUMNS.len()] {
        [
            self.last_seen,
            self.last_sync,
            self.last_success,
            Some(self.last_failure),
            self.reported(self.total_syncs),
            self.reported(self.failed_syncs),
            self.reported(self.consecutive_failures),
        ]
    }

    /// A number of the device's syncs. A device that never reported has none: it comes last in every list.
    fn reported(&self, number: i64) -> Option<i64> {
        (self.total_syncs > 0).then_some(number)
    }

    /// What a list is sorted by.
    pub(super) fn key(&self, order: SummaryOrder) -> Option<Vec<KeyPart>> {
        let numbers = match order {
            SummaryOrder::LastSeen => vec![self.last_seen?],
            SummaryOrder::LastSync => vec![self.last_sync?],
            SummaryOrder::LastSuccess => vec![self.last_success?],
            SummaryOrder::TotalSyncs => vec![self.reported(self.total_syncs)?],
            SummaryOrder::FailedSyncs => vec![self.reported(self.failed_syncs)?],
            SummaryOrder::ConsecutiveFailures => vec![self.reported(self.consecutive_failures)?],
            SummaryOrder::MostFailures => {
                vec![self.reported(self.failed_syncs)?, self.last_failure]
            }
            SummaryOrder::LongestStreaks => {
                vec![self.reported(self.consecutive_failures)?, self.last_failure]
            }
        };
        Some(numbers.into_iter().map(KeyPart::Number).collect())
    }

    /// The device's place in a list.
    pub(super) fn place(&self, order: SummaryOrder, device_id: &str) -> Place {
        Place { key: self.key(order), device_id: device_id.to_owned() }
    }

    /// The number that is counted, or the minute.
    pub(super) fn number(&self, measure: Measure) -> i64 {
        match measure {
            Measure::LastSeen => self.last_seen.map_or(i64::MIN, minute_of),
            Measure::FailedSyncs => self.failed_syncs,
            Measure::ConsecutiveFailures => self.consecutive_failures,
        }
    }

    /// The buckets in which the device is counted.
    fn buckets(&self) -> impl Iterator<Item = (Measure, i64)> + use<> {
        let minute = self.last_seen.map(|seen| (Measure::LastSeen, minute_of(seen)));
        let of = |measure, number: i64| (measure, number.min(LARGEST_BUCKET));
        minute.into_iter().chain([
            of(Measure::FailedSyncs, self.failed_syncs),
            of(Measure::ConsecutiveFailures, self.consecutive_failures),
        ])
    }
}

/// The minute of a time, both counted from 1970 on.
pub(super) fn minute_of(millisecond: i64) -> i64 {
    millisecond.div_euclid(MINUTE_MILLISECONDS)
}

/// The orders that `device_summaries` has an index for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SummaryOrder {
    LastSeen,
    LastSync,
    LastSuccess,
    TotalSyncs,
    FailedSyncs,
    ConsecutiveFailures,
    /// By failures, then by the latest one.
    MostFailures,
    /// By the streak, then by the latest failure.
    LongestStreaks,
}

impl SummaryOrder {
    /// The columns to sort by.
    pub(super) fn columns(self) -> &'static [&'static str] {
        match self {
            Self::LastSeen => &["last_seen"],
            Self::LastSync => &["last_sync"],
            Self::LastSuccess => &["last_success"],
            Self::TotalSyncs => &["total_syncs"],
            Self::FailedSyncs => &["failed_syncs"],
            Self::ConsecutiveFailures => &["consecutive_failures"],
            Self::MostFailures => &["failed_syncs", "last_failure"],
            Self::LongestStreaks => &["consecutive_failures", "last_failure"],
        }
    }
}

/// A figure by which devices are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    /// By the minute.
    LastSeen,
    FailedSyncs,
    ConsecutiveFailures,
}

impl Measure {
    /// The name in `device_counts`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::LastSeen => "last_seen",
            Self::FailedSyncs => "failed_syncs",
            Self::ConsecutiveFailures => "consecutive_failures",
        }
    }
}

/// How the counts change with some summaries.
#[derive(Debug, Default)]
pub(super) struct CountChanges(BTreeMap<(Measure, i64), i64>);

impl CountChanges {
    /// A device's summary is replaced. `None` stands for none.
    pub(super) fn replace(&mut self, old: Option<&Summary>, new: Option<&Summary>) {
        for (summary, change) in [(old, -1), (new, 1)] {
            for bucket in summary.into_iter().flat_map(Summary::buckets) {
                *self.0.entry(bucket).or_default() += change;
            }
        }
    }

    /// The buckets that change, in the order of their key: measure, bucket and by how many devices.
    pub(super) fn changes(&self) -> impl Iterator<Item = (&'static str, i64, i64)> {
        let changed = self.0.iter().filter(|(_, change)| **change != 0);
        changed.map(|((measure, bucket), change)| (measure.as_str(), *bucket, *change))
    }
}

/// A device that has changed since its summary was brought up to date.
#[derive(Debug)]
pub(super) struct ChangedDevice {
    pub(super) device_id: String,
    /// The summary that is stored; `None` when the device is new.
    pub(super) stored: Option<Summary>,
    /// As it is now.
    pub(super) fresh: Summary,
}

/// By how much a count over the stored summaries is to be corrected, for the devices that have changed.
pub(super) fn correction(changed: &[ChangedDevice], counts: impl Fn(&Summary) -> bool) -> i64 {
    changed
        .iter()
        .map(|device| {
            let stored = device.stored.as_ref().is_some_and(&counts);
            i64::from(counts(&device.fresh)) - i64::from(stored)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Summary = Summary {
        last_seen: None,
        last_sync: None,
        last_success: None,
        last_failure: NEVER,
        total_syncs: 0,
        failed_syncs: 0,
        consecutive_failures: 0,
    };

    #[test]
    fn a_summary_is_read_as_it_is_written() {
        let summary =
            Summary { last_seen: Some(1), last_success: Some(3), total_syncs: 5, ..NOTHING };
        let values = summary.values();
        assert_eq!(Summary::read(|column| Ok::<_, ()>(values[column])), Ok(summary));
        assert_eq!(Summary::of(&Figures::default()), NOTHING);
    }

    #[test]
    fn counts_follow_what_is_replaced() {
        let mut counts = CountChanges::default();
        let failing = Summary { failed_syncs: 250, last_seen: Some(-1), ..NOTHING };
        counts.replace(None, Some(&NOTHING));
        counts.replace(Some(&NOTHING), Some(&failing));
        let changes: Vec<_> = counts.changes().collect();
        let expected =
            [("last_seen", -1, 1), ("failed_syncs", 100, 1), ("consecutive_failures", 0, 1)];
        assert_eq!(changes, expected);
        counts.replace(Some(&failing), None);
        assert_eq!(counts.changes().count(), 0);
    }
}
