//! What a recount of raw events finds. `pisync verify` and `maintenance` call it. This module alone decides which
//! figures and sums can be compared; the stores read, count and write.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use pisync_core::{JobFigures, Timestamp};

use super::{DayDetails, StoreError, sums::Sums};

/// The maximum number of devices in one transaction.
pub(super) const PAGE_DEVICES: u32 = 256;

/// Events that are counted in one transaction, unless one device alone has more. They take about a second. A longer
/// snapshot would keep SQLite's log from being emptied and PostgreSQL from cleaning up.
pub(super) const PAGE_EVENTS: i64 = 200_000;

/// Days are UTC days.
pub(super) const DAY_MILLISECONDS: i64 = 24 * 60 * 60 * 1000;

/// When the day of `time` began.
pub(super) fn start_of_day(time: Timestamp) -> Timestamp {
    time.saturating_add_milliseconds(-time.as_millisecond().rem_euclid(DAY_MILLISECONDS))
}

/// Recounts figures and sums from raw events. Safe beside running servers.
#[async_trait]
pub trait Verification: Send + Sync {
    /// Recounts the figures and days of one page of devices from their raw events, as of one moment. The page begins
    /// after the device `after`. With `repair` it then writes the recounted figures, each device in a short transaction
    /// of its own. The answer still tells what was found. Nothing is repaired where old events are no longer kept.
    /// Events dated so far after `now` that a clock must have been wrong change no streak.
    async fn verify(
        &self,
        after: Option<&str>,
        now: Timestamp,
        repair: bool,
    ) -> Result<Verified, StoreError>;

    /// Recounts jobs whose last event is dated, or was received, so far after `now` that a clock must have been wrong.
    /// Such an event would hide every later report for good, so it is set aside. Also recounts jobs whose events were
    /// set aside and are no longer dated so far ahead. Answers how many jobs have changed.
    async fn recount_misdated(&self, now: Timestamp) -> Result<u64, StoreError>;

    /// Recounts the sums of the fleet's hours from all aggregated events, as of one moment. A million events take about
    /// a second. Once old events were dropped, sums can only be found to be too small.
    async fn verify_hours(&self) -> Result<Vec<SumDifference>, StoreError>;

    /// Compares the summaries and digests of devices, the counts of devices, the totals, the days and hours of groups, and the
    /// numbers and the order of devices by state with what they are made from, as of one moment. With `repair` it makes all of them anew, when any differs or hours
    /// of groups are not counted yet. Answers how many differ.
    async fn verify_summaries(
        &self,
        now: Timestamp,
        repair: bool,
    ) -> Result<SummaryDifferences, StoreError>;

    /// Compares the numbers of devices by group and state, and the order of devices by state, with the states that sweeps have
    /// found, and makes good what differs. Answers how much did: only foreign SQL or a mistake makes them differ. It reads the
    /// state of every device, so it is for every hour and not for every sweep.
    async fn correct_states(&self) -> Result<StateDifferences, StoreError>;

    /// Replaces an hour's sums with the recounted ones. False, and nothing is changed, when the stored sums are no
    /// longer what was found.
    async fn repair_hour(&self, seen: &SumDifference) -> Result<bool, StoreError>;
}

/// How many rows differ from the states of devices, as sweeps have found them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateDifferences {
    /// Numbers of devices of a group in a state.
    pub group_states: u64,
    /// Places of devices in the order by state.
    pub device_states: u64,
}

/// How many rows differ from what they are made from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SummaryDifferences {
    /// Summaries of devices that are missing or wrong.
    pub summaries: u64,
    /// Counts of devices that are missing or wrong.
    pub counts: u64,
    /// Totals of the fleet that are wrong.
    pub totals: u64,
    /// Digests of devices that are wrong.
    pub digests: u64,
    /// Days of groups that are wrong, those of devices that moved between groups among them.
    pub group_days: u64,
    /// Hours of groups that are wrong.
    pub group_hours: u64,
    /// Numbers and places of devices by state that are wrong.
    pub states: StateDifferences,
    /// Hours of the last 14 days that are not counted by group, although their events are kept: they were aggregated by
    /// an earlier version. This is no difference.
    pub uncounted_group_hours: u64,
}

impl SummaryDifferences {
    /// How many rows differ.
    #[must_use]
    pub fn number(&self) -> u64 {
        let Self { summaries, counts, totals, digests, group_days, group_hours, states, .. } =
            *self;
        let StateDifferences { group_states, device_states } = states;
        summaries
            + counts
            + totals
            + digests
            + group_days
            + group_hours
            + group_states
            + device_states
    }
}

/// The result of recounting one page of devices.
#[derive(Debug, Default)]
pub struct Verified {
    /// Devices that were checked. Those that are being deleted do not count.
    pub devices: u64,
    /// Events that were counted.
    pub events: u64,
    /// Jobs whose stored figures differ from the sum of their events. All jobs of a device are on the same page.
    pub differences: Vec<JobDifference>,
    /// Days of these devices whose sums differ from those of their aggregated events.
    pub days: Vec<SumDifference>,
    /// Days of these devices whose details an earlier version did not count, with their devices. Their events are all
    /// kept. This is no difference.
    pub unfilled_days: Vec<(String, Timestamp)>,
    /// Devices that exist only as a number, although they have events or figures. SQL that ignored the foreign keys
    /// left them. They cannot be repaired here.
    pub nameless_devices: u64,
    /// Devices of the page that are being deleted. They are not compared: their figures stay until the end, while their
    /// events disappear.
    pub being_deleted: u64,
    /// Since when events are kept individually; `None` while all are kept. Figures count older events too. They can
    /// then only be found too small, and nothing can be repaired.
    pub raw_since: Option<Timestamp>,
    /// The device after which the next page begins. `None` after the last page.
    pub next: Option<String>,
}

/// A job whose stored figures differ from the sum of its events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDifference {
    /// The device.
    pub device_id: String,
    /// The job; `None` for events that name no job.
    pub job: Option<String>,
    /// The stored figures, if the store knows the job.
    pub stored: Option<JobFigures>,
    /// The recounted figures, if the job has events.
    pub recounted: Option<JobFigures>,
}

/// One figure that differs, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FigureDifference {
    /// Its column in `device_jobs`.
    pub figure: &'static str,
    /// The stored value.
    pub stored: String,
    /// The recounted value.
    pub recounted: String,
}

/// A device's day or the fleet's hour whose sums differ from those of its aggregated events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SumDifference {
    /// The device of a day; `None` for an hour of the entire fleet.
    pub device_id: Option<String>,
    /// When it begins.
    pub begins: Timestamp,
    /// The stored sums.
    pub stored: Sums,
    /// The recounted sums.
    pub recounted: Sums,
    /// The stored and the recounted details of a device's day, if both are known.
    pub details: Option<(DayDetails, DayDetails)>,
}

impl SumDifference {
    /// Each sum that differs.
    #[must_use]
    pub fn figures(&self) -> Vec<FigureDifference> {
        let text =
            |value: Option<i64>| value.map_or_else(|| "none".to_owned(), |value| value.to_string());
        let values = |sums: &Sums, details: Option<DayDetails>| {
            let sums: Vec<_> = sums.named().map(|(column, value)| (column, Some(value))).collect();
            let details =
                details.into_iter().flat_map(|details| details.named().collect::<Vec<_>>());
            sums.into_iter().chain(details).collect::<Vec<_>>()
        };
        let (stored, recounted) = self.details.unzip();
        let pairs =
            values(&self.stored, stored).into_iter().zip(values(&self.recounted, recounted));
        pairs
            .filter(|((_, stored), (_, recounted))| stored != recounted)
            .map(|((figure, stored), (_, recounted))| FigureDifference {
                figure,
                stored: text(stored),
                recounted: text(recounted),
            })
            .collect()
    }
}

/// The sums of a day or an hour, and the details of a device's day.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) sums: Sums,
    /// `None` for hours, and for days that are not filled.
    pub(super) details: Option<DayDetails>,
}

impl Counted {
    /// The sums of an hour.
    pub(super) fn of_hour(sums: Sums) -> Self {
        Self { sums, details: None }
    }

    /// Adds an event.
    pub(super) fn add(&mut self, sums: &Sums, details: &DayDetails) {
        self.sums.add(sums);
        self.details.get_or_insert_default().add(details);
    }
}

/// A day or an hour, as it is stored and as it was recounted, where it has a row and events.
#[derive(Debug, Default)]
struct Compared {
    stored: Option<Counted>,
    recounted: Option<Counted>,
}

impl Compared {
    /// Both sums. A missing row equals a row of zeros.
    fn sums(&self) -> (Sums, Sums) {
        let sums = |counted: Option<Counted>| counted.unwrap_or_default().sums;
        (sums(self.stored), sums(self.recounted))
    }

    /// Both details, if the day is filled.
    fn details(&self) -> Option<(DayDetails, DayDetails)> {
        let stored = self.stored?.details?;
        let recounted = self.recounted.unwrap_or_default().details.unwrap_or_default();
        Some((stored, recounted))
    }
}

/// The stored and the recounted sums of days or hours, by device and beginning.
#[derive(Default)]
pub(super) struct SumRecount(BTreeMap<(Option<String>, Timestamp), Compared>);

impl SumRecount {
    pub(super) fn stored(
        &mut self,
        device_id: Option<String>,
        begins: Timestamp,
        counted: Counted,
    ) {
        self.0.entry((device_id, begins)).or_default().stored = Some(counted);
    }

    pub(super) fn recounted(
        &mut self,
        device_id: Option<String>,
        begins: Timestamp,
        counted: Counted,
    ) {
        self.0.entry((device_id, begins)).or_default().recounted = Some(counted);
    }

    /// The days whose details are not filled, although all their events are kept.
    pub(super) fn unfilled(&self) -> Vec<(String, Timestamp)> {
        let unfilled = self.0.iter().filter(|(_, day)| {
            let (stored, recounted) = day.sums();
            day.stored.is_some_and(|stored| stored.details.is_none())
                && day.recounted.is_some()
                && stored == recounted
        });
        unfilled.filter_map(|((device_id, day), _)| Some((device_id.clone()?, *day))).collect()
    }

    /// The sums that differ. While all events are kept (`all_kept`), sums must equal those of the events. Later, the
    /// sums of each day must be at least those of the remaining events. Hours are not compared then, because nobody
    /// knows in which hours a deleted device's events were.
    pub(super) fn differences(self, all_kept: bool) -> Vec<SumDifference> {
        if !all_kept {
            return self.days_that_are_too_small();
        }
        let differences = self.0.into_iter().map(|((device_id, begins), compared)| {
            let (stored, recounted) = compared.sums();
            SumDifference { device_id, begins, stored, recounted, details: compared.details() }
        });
        let differs = |found: &SumDifference| {
            found.stored != found.recounted
                || found.details.is_some_and(|(stored, recounted)| stored != recounted)
        };
        differences.filter(differs).collect()
    }

    /// Adds the sums of hours up to days, and compares those.
    fn days_that_are_too_small(self) -> Vec<SumDifference> {
        let mut days = BTreeMap::<_, (Sums, Sums)>::new();
        for ((device_id, begins), compared) in self.0 {
            let (stored, recounted) = compared.sums();
            let day = days.entry((device_id, start_of_day(begins))).or_default();
            day.0.add(&stored);
            day.1.add(&recounted);
        }
        days.into_iter()
            .filter(|(_, (stored, left))| !stored.hold(left))
            .map(|((device_id, begins), (stored, recounted))| SumDifference {
                device_id,
                begins,
                stored,
                recounted,
                details: None,
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

    /// The figures that differ. While all events are kept (`all_kept`), every figure must equal that of the events.
    /// Later, it must be at least that of the remaining events.
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

/// Whether `stored` can be the figures of the `left` events together with other events. Streaks are not compared.
fn holds(stored: &JobFigures, left: &JobFigures) -> bool {
    Sums::of(stored).hold(&Sums::of(left))
        && stored.first_sync <= left.first_sync
        && stored.last_sync >= left.last_sync
        && stored.last_success >= left.last_success
        && stored.last_failure >= left.last_failure
        && stored.last_received >= left.last_received
}

/// The devices of a page with days to fill, each of them once.
pub(super) fn devices_to_fill(page: &Verified) -> BTreeSet<String> {
    page.unfilled_days.iter().map(|(device_id, _)| device_id.clone()).collect()
}

/// The devices of a page that need repair, each of them once.
pub(super) fn devices_to_repair(page: &Verified) -> BTreeSet<String> {
    let by_jobs = page.differences.iter().map(|job| job.device_id.clone());
    by_jobs.chain(page.days.iter().filter_map(|day| day.device_id.clone())).collect()
}

/// How many of these devices make a page, given their stored numbers of events. At least one.
pub(super) fn page_length(events: impl Iterator<Item = i64>) -> usize {
    let mut sum = 0_i64;
    let fits = events.take_while(|events| {
        sum = sum.saturating_add(*events);
        sum <= PAGE_EVENTS
    });
    fits.count().max(1)
}

/// Replaces an hour's sums unless they have changed. The parameters, which begin with `placeholder`, are the hour, its new
/// sums, and the sums that must still be stored.
pub(super) fn repair_hour_statement(placeholder: char) -> String {
    let numbered = |first: usize| {
        (first..first + Sums::COUNT)
            .map(|number| format!("{placeholder}{number}"))
            .collect::<Vec<_>>()
    };
    let (recounted, expected) = (numbered(2), numbered(2 + Sums::COUNT).join(", "));
    let set: Vec<_> = Sums::COLUMNS
        .iter()
        .zip(&recounted)
        .map(|(column, number)| format!("{column} = {number}"))
        .collect();
    let (names, recounted, set) = (Sums::names(), recounted.join(", "), set.join(", "));
    let stored = Sums::sql(|column| format!("stored.{column}"));
    format!(
        "insert into fleet_hours as stored (hour, {names}) values ({placeholder}1, {recounted})
             on conflict (hour) do update set {set} where ({stored}) = ({expected})"
    )
}

/// Each figure as text, by the name of its column.
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
