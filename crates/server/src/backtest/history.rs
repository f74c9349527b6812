//! The past of a fleet, as a store has kept it: its devices, what is set for them now, the channels and routes of now, and the
//! reports in the order in which the server received them. A replay takes it as its input. Nothing is written. Each read is short, so that the database can
//! clean up behind it, and reports are kept in memory: 40 bytes each.

use std::collections::HashMap;

use pisync_core::{DeviceId, GroupName, JobName, SyncEvent, Timestamp, sync_event::MAX_COUNT};

use super::{BacktestError, course::ticks, receivers::ReplayedChannel};
use crate::store::{
    DeviceSettings, FleetSettings, HistoryQuery, Route, Store, StoreError, StoredEvent,
};

/// The number of events per page.
const PAGE: u32 = 1_000;

/// How many of a job's reports from before the beginning are kept: as many as a rule can look back at.
const EARLIER_REPORTS: usize = pisync_core::health::state::OUTCOMES;

/// What the channel is called that there is where none is stored. It gets whatever no route matches.
const EVERYTHING: &str = "everything";

/// The past of a fleet.
#[derive(Debug)]
pub struct History {
    /// From when on it is replayed: as was asked, or from the first thing on that is stored. Before that, nobody knows who
    /// reported, so that everybody would look silent.
    pub from: Timestamp,
    /// Until when, at most the moment at which it was read.
    pub until: Timestamp,
    /// What is set for the fleet, its groups and in windows, and when nobody could be heard.
    pub(super) settings: FleetSettings,
    /// Who is told. It is never empty.
    pub channels: Vec<ReplayedChannel>,
    /// By which rules.
    pub(super) routes: Vec<Route>,
    pub(super) devices: Vec<PastDevice>,
    /// In the order of time.
    reports: Vec<PastReport>,
    /// The names of jobs, by number.
    jobs: Vec<JobName>,
}

/// A device as it is now.
#[derive(Debug)]
pub(super) struct PastDevice {
    pub(super) device_id: DeviceId,
    pub(super) group: Option<GroupName>,
    pub(super) registered_at: Timestamp,
    pub(super) settings: DeviceSettings,
}

/// What a replay needs of a report.
#[derive(Debug, Clone, Copy)]
struct PastReport {
    received: Timestamp,
    id: i64,
    timestamp: Timestamp,
    device: u32,
    /// The job's number, and one more; 0 for none.
    job: u32,
    total_errors: u32,
}

/// What to read.
#[derive(Debug, Clone)]
pub struct HistoryRange {
    /// Only the devices that are in this group now.
    pub group: Option<GroupName>,
    /// From when on the history is replayed.
    pub from: Timestamp,
    /// Until when.
    pub until: Timestamp,
}

impl History {
    /// Reads the past of a fleet. Calls `watch` with the number of reports that were looked at so far.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn read(
        store: &dyn Store,
        range: HistoryRange,
        mut watch: impl FnMut(u64),
    ) -> Result<Self, StoreError> {
        let HistoryRange { group, from, until } = range;
        let settings = store.fleet_settings().await?;
        let stored = store.channels().await?.channels;
        let mut channels: Vec<_> = stored.into_iter().map(ReplayedChannel::from).collect();
        if channels.is_empty() {
            channels.push(ReplayedChannel::unstored(EVERYTHING));
        }
        let mut history = Self {
            from,
            until,
            settings,
            channels,
            routes: store.routes().await?.routes,
            devices: Vec::new(),
            reports: Vec::new(),
            jobs: Vec::new(),
        };
        let mut job_numbers = HashMap::new();
        let mut seen = 0;
        let mut after: Option<DeviceId> = None;
        loop {
            let last = after.as_ref().map(DeviceId::as_str);
            let device_ids = store.device_ids(group.as_ref(), last).await?;
            let names: Vec<_> = device_ids.iter().map(ToString::to_string).collect();
            let mut views = store.device_views(&names).await?;
            for device_id in &device_ids {
                let settings = views.remove(device_id.as_str()).unwrap_or_default().settings;
                history
                    .read_device(store, device_id, settings, &mut job_numbers, &mut seen)
                    .await?;
                watch(seen);
            }
            after = device_ids.into_iter().next_back();
            if after.is_none() {
                break;
            }
        }
        history.reports.sort_unstable_by_key(|report| (report.received, report.id));
        if history.earlier_count() == 0 {
            history.from = history.from.max(history.beginning());
        }
        Ok(history)
    }

    /// When the first thing happened that is stored.
    fn beginning(&self) -> Timestamp {
        let registered = || self.devices.iter().map(|device| device.registered_at).min();
        let first = self.reports.first().map(|report| report.received);
        first.or_else(registered).unwrap_or(self.until)
    }

    /// Reads a device, unless it was first seen after the end, or has been deleted meanwhile.
    async fn read_device(
        &mut self,
        store: &dyn Store,
        device_id: &DeviceId,
        settings: DeviceSettings,
        job_numbers: &mut HashMap<String, u32>,
        seen: &mut u64,
    ) -> Result<(), StoreError> {
        let Some(found) = store.device(device_id).await? else { return Ok(()) };
        let registered_at = found.device.created_at;
        if registered_at >= self.until {
            return Ok(());
        }
        let number = u32::try_from(self.devices.len());
        let device = number.map_err(|_| StoreError::Failed("too many devices".to_owned()))?;
        self.devices.push(PastDevice {
            device_id: device_id.clone(),
            group: found.device.group.as_deref().and_then(|name| GroupName::new(name).ok()),
            registered_at,
            settings,
        });
        // Pages go by date, which a wrong clock makes anything, so that all are read.
        let mut query = HistoryQuery::newest(device_id.clone(), PAGE);
        let mut earlier = EarlierReports::default();
        while let Some(page) = store.events(&query).await? {
            *seen += page.events.len() as u64;
            for event in &page.events {
                let Some(report) = self.report(event, device, job_numbers) else { continue };
                if event.created_at >= self.from || earlier.counts(&report) {
                    self.reports.push(report);
                }
            }
            match page.next {
                Some(next) => query.after = Some(next),
                None => break,
            }
        }
        // A report that is dated long ago may be the last that was heard.
        self.reports.extend(earlier.last_heard());
        Ok(())
    }

    /// What a replay needs of an event; `None` when it came after the end.
    fn report(
        &mut self,
        event: &StoredEvent,
        device: u32,
        job_numbers: &mut HashMap<String, u32>,
    ) -> Option<PastReport> {
        if event.created_at > self.until {
            return None;
        }
        let job = match &event.job {
            None => 0,
            Some(job) => match job_numbers.get(job) {
                Some(number) => *number,
                None => {
                    self.jobs.push(JobName::new(job).ok()?);
                    let number = u32::try_from(self.jobs.len()).ok()?;
                    *job_numbers.entry(job.clone()).or_insert(number)
                }
            },
        };
        Some(PastReport {
            received: event.created_at,
            id: event.id,
            timestamp: event.timestamp,
            device,
            job,
            total_errors: u32::try_from(event.total_errors).unwrap_or(0).min(MAX_COUNT),
        })
    }

    /// How many reports were received in the time that is replayed.
    #[must_use]
    pub fn report_count(&self) -> usize {
        self.reports.len() - self.earlier_count()
    }

    /// How many devices there are.
    #[must_use]
    pub fn device_count(&self) -> usize {
        self.devices.len()
    }

    /// When the first sweep of a replay is.
    #[must_use]
    pub fn first_sweep(&self) -> Timestamp {
        ticks(self.from, self.until).next().unwrap_or(self.until)
    }

    /// The number of reports from before the beginning that are kept.
    pub(super) fn earlier_count(&self) -> usize {
        self.reports.partition_point(|report| report.received < self.from)
    }

    /// When the report at this position was received.
    pub(super) fn received(&self, position: usize) -> Option<Timestamp> {
        self.reports.get(position).map(|report| report.received)
    }

    /// The report at this position, as far as health depends on it.
    pub(super) fn event(&self, position: usize) -> Result<SyncEvent, BacktestError> {
        let missing = || BacktestError::Server("a report is missing".to_owned());
        let report = self.reports.get(position).ok_or_else(missing)?;
        let device = self.devices.get(report.device as usize).ok_or_else(missing)?;
        let job = report.job.checked_sub(1).and_then(|number| self.jobs.get(number as usize));
        Ok(SyncEvent {
            device_id: device.device_id.clone(),
            event_id: None,
            timestamp: report.timestamp,
            total_files_synced: 0,
            total_errors: report.total_errors,
            internet_speed: None,
            job: job.cloned(),
            duration: None,
            bytes_synced: None,
            metadata: None,
        })
    }
}

/// Which of a device's reports from before the beginning count. They come newest first, by their own date.
#[derive(Default)]
struct EarlierReports {
    /// By job: how many were kept, and whether one of them was a success.
    jobs: HashMap<u32, (usize, bool)>,
    /// Of those that were not kept, the one that was received last.
    last_dropped: Option<PastReport>,
}

impl EarlierReports {
    fn counts(&mut self, report: &PastReport) -> bool {
        let (kept, has_success) = self.jobs.entry(report.job).or_default();
        // All failures since the last success are a streak, however many.
        if *kept >= EARLIER_REPORTS && *has_success {
            let is_later = |dropped: &PastReport| dropped.received < report.received;
            if self.last_dropped.as_ref().is_none_or(is_later) {
                self.last_dropped = Some(*report);
            }
            return false;
        }
        *kept += 1;
        *has_success |= report.total_errors == 0;
        true
    }

    fn last_heard(self) -> Option<PastReport> {
        self.last_dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(id: i64, job: u32, total_errors: u32) -> PastReport {
        let received = Timestamp::from_millisecond(1_772_442_000_000 + id).unwrap();
        PastReport { received, id, timestamp: received, device: 0, job, total_errors }
    }

    #[test]
    fn of_earlier_reports_those_count_on_which_a_state_depends() {
        let mut earlier = EarlierReports::default();
        let most = i64::try_from(EARLIER_REPORTS).unwrap();
        // Job 1 has failed for longer than any rule looks back, job 2 succeeds.
        let counts: Vec<_> = (0..most + 10)
            .rev()
            .map(|id| (earlier.counts(&report(id, 1, 1)), earlier.counts(&report(id, 2, 0))))
            .collect();
        assert!(counts.iter().all(|(failing, _)| *failing));
        assert_eq!(counts.iter().filter(|(_, fine)| *fine).count(), EARLIER_REPORTS);
        assert!(earlier.counts(&report(-1, 1, 0)), "the last success ends the streak");
        assert!(!earlier.counts(&report(-2, 1, 0)));
        // Dated long ago, but received after all others.
        assert!(!earlier.counts(&report(most + 20, 2, 0)));
        assert_eq!(earlier.last_heard().map(|last| last.id), Some(most + 20));
    }
}
