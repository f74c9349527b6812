//! What events add up to, counted in the simplest way: all events of a device are at hand, and streaks come from sorting
//! them. It must share no code with the server's figures, because it is what those are compared with. `expected` calls it.

use serde_json::{Map, Value, json};

use super::event::{Milliseconds, text};

/// An acknowledged event, as far as figures depend on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub(super) date: Milliseconds,
    pub(super) id: i64,
    pub(super) job: u8,
    pub(super) files: u32,
    pub(super) errors: u32,
    /// Hundredths of Mbps.
    pub(super) speed: Option<u32>,
}

impl Stored {
    pub(super) fn failed(&self) -> bool {
        self.errors > 0
    }
}

/// What some events add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub(super) syncs: u64,
    pub(super) failed: u64,
    files: u64,
    errors: u64,
    speed_sum: u64,
    speed_count: u64,
}

impl Sums {
    pub(super) fn of<'a>(events: impl Iterator<Item = &'a Stored>) -> Self {
        let mut sums = Self::default();
        for event in events {
            sums.add(&Self {
                syncs: 1,
                failed: event.failed().into(),
                files: event.files.into(),
                errors: event.errors.into(),
                speed_sum: event.speed.unwrap_or_default().into(),
                speed_count: event.speed.is_some().into(),
            });
        }
        sums
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.syncs += other.syncs;
        self.failed += other.failed;
        self.files += other.files;
        self.errors += other.errors;
        self.speed_sum += other.speed_sum;
        self.speed_count += other.speed_count;
    }

    /// The sums of a whole fleet, with the sums of the other devices of the server that are told by `others`.
    pub(super) fn of_fleet(&self, others: &Value) -> Map<String, Value> {
        let other = |field: &str| others[field].as_u64().unwrap_or_default();
        let (syncs, failed) =
            (self.syncs + other("total_sync_events"), self.failed + other("total_failures"));
        let mut fields = Map::new();
        fields.insert("total_sync_events".to_owned(), json!(syncs));
        fields.insert("total_failures".to_owned(), json!(failed));
        fields.insert(
            "total_files_synced".to_owned(),
            json!(self.files + other("total_files_synced")),
        );
        fields.insert("total_errors".to_owned(), json!(self.errors + other("total_errors")));
        fields.insert("overall_success_rate".to_owned(), json!(rate(syncs, failed)));
        // A mean cannot be taken apart.
        if others.is_null() {
            fields.insert("avg_internet_speed".to_owned(), json!(self.mean_speed()));
        }
        fields
    }

    /// The mean of the measured speeds, rounded to 2 decimals, half up; 0 only when all were 0.
    fn mean_speed(&self) -> Option<f64> {
        if self.speed_count == 0 {
            return None;
        }
        let hundredths = (2 * self.speed_sum + self.speed_count) / (2 * self.speed_count);
        let least = u64::from(self.speed_sum > 0);
        Some(hundredth(hundredths.max(least)))
    }
}

/// The share of syncs without errors in percent, rounded to 2 decimals, half up. Only all is 100, and only none is 0.
fn rate(syncs: u64, failed: u64) -> f64 {
    let successful = syncs - failed;
    if successful == 0 {
        return 0.0;
    }
    if failed == 0 {
        return 100.0;
    }
    let rounded = (successful * 20_000 + syncs) / (2 * syncs);
    hundredth(rounded.clamp(1, 9_999))
}

#[expect(clippy::cast_precision_loss, reason = "a mean or a percentage has few digits")]
fn hundredth(number: u64) -> f64 {
    number as f64 / 100.0
}

/// The figures of a device or of one of its jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Figures {
    pub(super) sums: Sums,
    first: Option<Milliseconds>,
    pub(super) last: Option<Milliseconds>,
    last_success: Option<Milliseconds>,
    pub(super) last_failure: Option<Milliseconds>,
    pub(super) streak: u64,
}

impl Figures {
    pub(super) fn of(events: &[Stored]) -> Self {
        let dates = |failed: Option<bool>| {
            let counts =
                move |event: &&Stored| failed.is_none_or(|failed| event.failed() == failed);
            events.iter().filter(counts).map(|event| event.date)
        };
        let most = events.iter().map(|event| event.job).max().unwrap_or_default();
        Self {
            sums: Sums::of(events.iter()),
            first: dates(None).min(),
            last: dates(None).max(),
            last_success: dates(Some(false)).max(),
            last_failure: dates(Some(true)).max(),
            streak: (0..=most).map(|job| streak(events, job)).max().unwrap_or_default(),
        }
    }

    /// The fields with which the API shows them.
    pub(super) fn shown(&self, with_streak: bool) -> Map<String, Value> {
        let Self { sums, .. } = self;
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| fields.insert(name.to_owned(), value);
        put("total_syncs", json!(sums.syncs));
        put("total_files_synced", json!(sums.files));
        put("total_errors", json!(sums.errors));
        put("avg_internet_speed", json!(sums.mean_speed()));
        put("first_sync", json!(self.first.map(text)));
        put("last_sync", json!(self.last.map(text)));
        put("last_success", json!(self.last_success.map(text)));
        put("last_failed_sync", json!(self.last_failure.map(text)));
        put("failed_syncs", json!(sums.failed));
        put("successful_syncs", json!(sums.syncs - sums.failed));
        put("success_rate", json!(rate(sums.syncs, sums.failed)));
        if with_streak {
            put("consecutive_failures", json!(self.streak));
        }
        fields
    }
}

/// The failures at the end of a job's history, which is sorted by date and then by id.
fn streak(events: &[Stored], job: u8) -> u64 {
    let mut history: Vec<_> = events.iter().filter(|event| event.job == job).collect();
    history.sort_unstable_by_key(|event| (event.date, event.id));
    history.iter().rev().take_while(|event| event.failed()).map(|_| 1).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Events of which the third number says how many errors there were.
    fn events(given: &[(i64, i64, u32, u8)]) -> Vec<Stored> {
        let event = |(date, id, errors, job): &(i64, i64, u32, u8)| Stored {
            date: *date,
            id: *id,
            job: *job,
            files: 10,
            errors: *errors,
            speed: None,
        };
        given.iter().map(event).collect()
    }

    fn streak_of(given: &[(i64, i64, u32, u8)]) -> u64 {
        Figures::of(&events(given)).streak
    }

    #[test]
    fn a_late_event_counts_at_its_own_date() {
        // A success that came last but is dated before both failures ends no streak.
        assert_eq!(streak_of(&[(10, 1, 1, 0), (20, 2, 1, 0), (5, 3, 0, 0)]), 2);
        // One that is dated between them leaves the later failure.
        assert_eq!(streak_of(&[(10, 1, 1, 0), (20, 2, 1, 0), (15, 3, 0, 0)]), 1);
        // A late failure before the last success counts for nothing.
        assert_eq!(streak_of(&[(10, 1, 0, 0), (5, 2, 1, 0)]), 0);
    }

    #[test]
    fn equal_dates_go_by_id() {
        assert_eq!(streak_of(&[(10, 1, 0, 0), (10, 2, 1, 0), (10, 3, 1, 0)]), 2);
        assert_eq!(streak_of(&[(10, 3, 0, 0), (10, 2, 1, 0), (10, 1, 1, 0)]), 0);
        assert_eq!(streak_of(&[(10, 2, 0, 0), (10, 3, 1, 0), (10, 1, 1, 0)]), 1);
    }

    #[test]
    fn the_worst_job_gives_a_devices_streak() {
        let given = [(10, 1, 0, 0), (20, 2, 1, 1), (30, 3, 1, 1), (40, 4, 0, 0), (50, 5, 1, 0)];
        assert_eq!(streak_of(&given), 2);
        // A success of one job ends no other job's streak.
        assert_eq!(streak_of(&[(10, 1, 1, 0), (20, 2, 0, 1)]), 1);
    }

    /// The server's date stands in for the device's, so the event comes after all that were dated before its arrival.
    #[test]
    fn an_unsynced_event_counts_at_its_arrival() {
        assert_eq!(streak_of(&[(10, 1, 1, 0), (20, 2, 1, 0), (1_000, 3, 0, 0)]), 0);
        assert_eq!(streak_of(&[(1_000, 1, 1, 0), (10, 2, 0, 0), (20, 3, 0, 0)]), 1);
    }

    #[test]
    fn figures_are_rounded_as_the_api_promises() {
        let mut given = events(&[(10, 1, 0, 0), (20, 2, 3, 0), (30, 3, 0, 0)]);
        given[0].speed = Some(1);
        given[2].speed = Some(2);
        let shown = Figures::of(&given).shown(true);
        // 0.015 is rounded up.
        assert_eq!(shown["avg_internet_speed"], json!(0.02));
        assert_eq!(shown["success_rate"], json!(66.67));
        assert_eq!(shown["total_errors"], json!(3));
        assert_eq!(shown["first_sync"], json!("1970-01-01T00:00:00.010Z"));
        assert_eq!(shown["last_success"], json!("1970-01-01T00:00:00.030Z"));
        assert_eq!(shown["last_failed_sync"], json!("1970-01-01T00:00:00.020Z"));
        assert_eq!((rate(30_000, 1), rate(30_000, 29_999)), (99.99, 0.01));
        assert_eq!((rate(0, 0), rate(5, 5), rate(5, 0)), (0.0, 0.0, 100.0));
        given[0].speed = Some(0);
        given[2].speed = None;
        assert_eq!(Figures::of(&given).shown(true)["avg_internet_speed"], json!(0.0));
        given[0].speed = None;
        assert_eq!(Figures::of(&given).shown(true)["avg_internet_speed"], Value::Null);
        assert!(!Figures::of(&given).shown(false).contains_key("consecutive_failures"));
    }
}
