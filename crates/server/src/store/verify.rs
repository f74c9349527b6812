//! What a recount of raw events finds. This module alone decides which figures and sums can be compared; the stores read,
//! count and write.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use pisync_core::{JobFigures, Timestamp};

use super::{StoreError, sums::Sums};

/// Devices that are looked at in one transaction, at most.
pub(super) const PAGE_DEVICES: u32 = 256;

/// Events that are counted in one transaction, unless one device alone has more: a second's work, so that
/// the snapshot keeps neither SQLite's log from being emptied nor PostgreSQL from cleaning up.
pub(super) const PAGE_EVENTS: i64 = 200_000;

/// Days are those of UTC.
pub(super) const DAY_MILLISECONDS: i64 = 24 * 60 * 60 * 1000;

/// Recounting figures and sums from raw events. Safe beside running servers.
#[async_trait]
pub trait Verification: Send + Sync {
    /// Recounts the figures and days of one page of devices, those after the device `after`, from their raw
    /// events, as of one moment. With `repair` it then writes what the events add up to, each device in a short
    /// transaction of its own; the answer still tells what was found. Where old events are no longer kept,
    /// nothing is repaired. Events dated so far after `now` that a clock must have been wrong change no streak.
    async fn verify(
        &self,
        after: Option<&str>,
        now: Timestamp,
        repair: bool,
    ) -> Result<Verified, StoreError>;

    /// Counts the jobs again whose last events are dated, or were received, so far after `now` that a clock must have
    /// been wrong then: what is reported later would be hidden behind them for good. Such events are set aside. Counts
    /// the jobs again, too, whose events that were set aside are no longer dated so far ahead. Answers how many have changed.
    async fn recount_misdated(&self, now: Timestamp) -> Result<u64, StoreError>;

    /// Recounts the sums of the fleet's hours from all aggregated events, as of one moment: some second for a
    /// million of them. Once old events were dropped, sums can only be found to be too small.
    async fn verify_hours(&self) -> Result<Vec<SumDifference>, StoreError>;

    /// Writes what was recounted in the place of an hour's sums; false, and nothing is changed, when they
    /// are no longer what was found.
    async fn repair_hour(&self, seen: &SumDifference) -> Result<bool, StoreError>;
}

/// What came of recounting one page of devices.
#[derive(Debug, Default)]
pub struct Verified {
    /// Devices looked at, apart from those that are being deleted.
    pub devices: u64,
    /// Events counted.
    pub events: u64,
    /// Jobs whose stored figures are not what their events add up to; all of a device's jobs are on the
    /// same page.
    pub differences: Vec<JobDifference>,
    /// Days of these devices whose sums are not what their aggregated events add up to.
    pub days: Vec<SumDifference>,
    /// Devices that the store has only a number of, although there are events or figures of them: SQL
    /// that did not mind the foreign keys left them. They cannot be repaired here.
    pub nameless_devices: u64,
    /// Devices of the page that are being deleted. They are not compared: until the end they have their figures, and
    /// fewer and fewer events.
    pub being_deleted: u64,
    /// Since when events are kept one by one; `None` while all are. Figures count older ones too, so they
    /// can then only be too small, and nothing can be repaired.
    pub raw_since: Option<Timestamp>,
    /// Where the next page begins: after this device. `None` after the last page.
    pub next: Option<String>,
}

/// A job whose stored figures are not what its events add up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDifference {
    /// Whose job.
    pub device_id: String,
    /// Which; `None` for events that name no job.
    pub job: Option<String>,
    /// What the store has, if it knows the job.
    pub stored: Option<JobFigures>,
    /// What the events add up to, if there are any.
    pub recounted: Option<JobFigures>,
}

/// One figure that differs, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FigureDifference {
    /// Its column in `device_jobs`.
    pub figure: &'static str,
    /// What the store has.
    pub stored: String,
    /// What the events add up to.
    pub recounted: String,
}

/// A device's day, or the fleet's hour, whose sums are not what its aggregated events add up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SumDifference {
    /// Whose day; `None` for an hour of the whole fleet.
    pub device_id: Option<String>,
    /// When it begins.
    pub begins: Timestamp,
    /// What the store has.
    pub stored: Sums,
    /// What the events add up to.
    pub recounted: Sums,
}

impl SumDifference {
    /// Each sum that differs.
    #[must_use]
    pub fn figures(&self) -> Vec<FigureDifference> {
        let pairs = self.stored.named().zip(self.recounted.named());
        pairs
            .filter(|((_, stored), (_, recounted))| stored != recounted)
            .map(|((figure, stored), (_, recounted))| FigureDifference {
                figure,
                stored: stored.to_string(),
                recounted: recounted.to_string(),
            })
            .collect()
    }
}

/// The stored and the recounted sums of days or hours, by whose and when they begin.
#[derive(Default)]
pub(super) struct SumRecount(BTreeMap<(Option<String>, Timestamp), (Sums, Sums)>);

impl SumRecount {
    pub(super) fn stored(&mut self, device_id: Option<String>, begins: Timestamp, sums: Sums) {
        self.0.entry((device_id, begins)).or_default().0.add(&sums);
    }

    pub(super) fn recounted(&mut self, device_id: Option<String>, begins: Timestamp, sums: Sums) {
        self.0.entry((device_id, begins)).or_default().1.add(&sums);
    }

    /// The sums of hours by their days.
    fn by_day(self) -> Self {
        let mut days = Self::default();
        for ((device_id, begins), (stored, recounted)) in self.0 {
            let into_day = begins.as_millisecond().rem_euclid(DAY_MILLISECONDS);
            let day = begins.saturating_add_milliseconds(-into_day);
            days.stored(device_id.clone(), day, stored);
            days.recounted(device_id, day, recounted);
        }
        days
    }

    /// What differs. While all events are kept (`all_kept`), sums must be what they add up to; later, those
    /// of whole days must hold at least the events that are left: nobody knows any more in which hours a
    /// deleted device's events were. No row is as good as one of zeros.
    pub(super) fn differences(self, all_kept: bool) -> Vec<SumDifference> {
        let sums = if all_kept { self } else { self.by_day() };
        let differs = |(stored, recounted): &(Sums, Sums)| {
            if all_kept { stored != recounted } else { !stored.hold(recounted) }
        };
        sums.0
            .into_iter()
            .filter(|(_, sums)| differs(sums))
            .map(|((device_id, begins), (stored, recounted))| SumDifference {
                device_id,
                begins,
                stored,
                recounted,
            })
            .collect()
    }
}

impl JobDifference {
    /// Each figure that differs.
    #[must_use]
    pub fn figures(&self) -> Vec<FigureDifference> {
        let (stored, recounted) = (columns(self.stored), columns(self.recounted));
        let pairs = stored.into_iter().zip(recounted);
        pairs
            .filter(|((_, stored), (_, recounted))| stored != recounted)
            .map(|((figure, stored), (_, recounted))| FigureDifference {
                figure,
                stored,
                recounted,
            })
            .collect()
    }
}

/// The stored and the recounted figures of jobs, by device and job.
#[derive(Default)]
pub(super) struct Recount(BTreeMap<(String, String), (Option<JobFigures>, Option<JobFigures>)>);

impl Recount {
    pub(super) fn stored(&mut self, device_id: String, job: String, figures: JobFigures) {
        self.0.entry((device_id, job)).or_default().0 = Some(figures);
    }

    pub(super) fn recounted(&mut self, device_id: String, job: String, figures: JobFigures) {
        self.0.entry((device_id, job)).or_default().1 = Some(figures);
    }

    /// How many events were counted.
    pub(super) fn events(&self) -> u64 {
        let recounted = self.0.values().filter_map(|(_, recounted)| recounted.as_ref());
        recounted.map(|figures| figures.total_syncs.cast_unsigned()).sum()
    }

    /// What differs. While all events are kept (`all_kept`), every figure must be what they add up to;
    /// later, the figures must hold at least those that are left.
    pub(super) fn differences(self, all_kept: bool) -> Vec<JobDifference> {
        let differs = |(stored, recounted): &(Option<JobFigures>, Option<JobFigures>)| {
            if all_kept {
                return stored != recounted;
            }
            match (stored, recounted) {
                (_, None) => false,
                (None, Some(_)) => true,
                (Some(stored), Some(left)) => !holds(stored, left),
            }
        };
        self.0
            .into_iter()
            .filter(|(_, figures)| differs(figures))
            .map(|((device_id, job), (stored, recounted))| JobDifference {
                device_id,
                job: (!job.is_empty()).then_some(job),
                stored,
                recounted,
            })
            .collect()
    }
}

/// Whether `stored` can be the figures of the events that are `left` and of others. Streaks cannot be told.
fn holds(stored: &JobFigures, left: &JobFigures) -> bool {
    Sums::of(stored).hold(&Sums::of(left))
        && stored.first_sync <= left.first_sync
        && stored.last_sync >= left.last_sync
        && stored.last_success >= left.last_success
        && stored.last_failure >= left.last_failure
        && stored.last_received >= left.last_received
}

/// The devices of a page that need repair, each once.
pub(super) fn devices_to_repair(page: &Verified) -> BTreeSet<String> {
    let by_jobs = page.differences.iter().map(|job| job.device_id.clone());
    by_jobs.chain(page.days.iter().filter_map(|day| day.device_id.clone())).collect()
}

/// How many of these devices, given with their stored numbers of events, make a page: at least one.
pub(super) fn page_length(events: impl Iterator<Item = i64>) -> usize {
    let mut sum = 0_i64;
    let fits = events.take_while(|events| {
        sum = sum.saturating_add(*events);
        sum <= PAGE_EVENTS
    });
    fits.count().max(1)
}

/// Figures by the name of their column, in words.
fn columns(figures: Option<JobFigures>) -> Vec<(&'static str, String)> {
    let none = || "none".to_owned();
    let sums = figures.as_ref().map(|figures| Sums::of(figures).values());
    let sums = Sums::COLUMNS.into_iter().enumerate().map(|(position, column)| {
        (column, sums.map_or_else(none, |sums| sums[position].to_string()))
    });
    let time = |of: fn(&JobFigures) -> Option<Timestamp>| {
        figures.as_ref().and_then(of).map_or_else(none, |time| time.to_string())
    };
    let streak = figures.as_ref().map(|figures| figures.consecutive_failures.to_string());
    sums.chain([
        ("first_sync", time(|figures| Some(figures.first_sync))),
        ("last_sync", time(|figures| Some(figures.last_sync))),
        ("last_success", time(|figures| figures.last_success)),
        ("last_failure", time(|figures| figures.last_failure)),
        ("consecutive_failures", streak.unwrap_or_else(none)),
        ("last_received", time(|figures| Some(figures.last_received))),
    ])
    .collect()
}
