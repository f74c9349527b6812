//! Statistics: the figures of the fleet, and its devices that fail repeatedly. The API calls it and both stores
//! implement it. No method changes anything.

use std::collections::HashMap;

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::{
    Count, Device, Figures, Freshness, KeyPart, Page, Place, StoreError, Window,
    ordered_scan::{Direction, Part, Places, page_of},
    summaries::{Measure, SummaryOrder},
};

/// Statistics over devices. Each method is one transaction.
#[async_trait]
pub trait StatsStore: Send + Sync {
    /// The figures of the entire fleet. `active_since` bounds `active_devices`; `recent` is the number of devices with the
    /// latest syncs to list.
    async fn fleet_stats(
        &self,
        active_since: Timestamp,
        recent: u32,
        freshness: Freshness,
    ) -> Result<FleetStats, StoreError>;

    /// The sums of the entire fleet's events within `window`. The times and the streak stay empty.
    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError>;

    /// Devices that failed repeatedly, worst first.
    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError>;
}

/// Devices with the latest syncs by their summaries, the latest first, each with the time of that sync.
pub(super) type LatestSummaries = Vec<(String, i64)>;

/// Whether the `most` devices with the latest syncs are among `devices`. These are the devices of `summaries`, up to
/// `limit` of them, and those with the latest syncs among all that have changed. A device that is in neither has not
/// changed, and comes behind all `summaries`. A right date may have replaced a wrong one of the future meanwhile.
pub(super) fn has_most_recent(
    devices: &[Device],
    summaries: &LatestSummaries,
    limit: u32,
    most: u32,
) -> bool {
    let last_syncs: HashMap<_, _> = devices
        .iter()
        .map(|device| (device.device_id.as_str(), device.figures.last_sync))
        .collect();
    let is_as_late = |(device_id, stored): &&(String, i64)| {
        let last_sync = last_syncs.get(device_id.as_str()).copied().flatten();
        last_sync.is_some_and(|last_sync| last_sync.as_millisecond() >= *stored)
    };
    summaries.len() < limit as usize || summaries.iter().filter(is_as_late).count() >= most as usize
}

/// The devices with the latest syncs of some, the latest first.
pub(super) fn most_recent(mut devices: Vec<Device>, most: u32) -> Vec<Device> {
    devices.retain(|device| device.figures.last_sync.is_some());
    devices.sort_by(|one, other| {
        let syncs = other.figures.last_sync.cmp(&one.figures.last_sync);
        syncs.then_with(|| one.device_id.cmp(&other.device_id))
    });
    devices.truncate(most as usize);
    devices
}

/// Which devices failed repeatedly.
#[derive(Debug, Clone)]
pub struct FailureQuery {
    /// The minimum number of failures.
    pub threshold: u32,
    /// Count the current streak instead of failures.
    pub consecutive: bool,
    /// Only devices that failed within it, and only failures in it. `None` means all time.
    pub window: Option<Window>,
    /// The maximum number of devices; all when `None`.
    pub limit: Option<u32>,
    /// How many devices to skip.
    pub offset: u64,
    /// Only devices behind this place.
    pub after: Option<Place>,
}

impl FailureQuery {
    /// Whether `place` can be in a list of failing devices.
    #[must_use]
    pub fn has(place: &Place) -> bool {
        let is_number = |part: &KeyPart| matches!(part, KeyPart::Number(_));
        place.key.as_ref().is_some_and(|key| key.len() == 2 && key.iter().all(is_number))
    }

    /// The part of the list that is asked for.
    pub(super) fn part(&self) -> Part {
        Part {
            direction: Direction::Descending,
            after: self.after.clone(),
            offset: self.offset,
            limit: self.limit,
        }
    }

    /// The order of the list over all time, and the figure that the threshold is for.
    pub(super) fn of_all_time(&self) -> (SummaryOrder, Measure) {
        if self.consecutive {
            (SummaryOrder::LongestStreaks, Measure::ConsecutiveFailures)
        } else {
            (SummaryOrder::MostFailures, Measure::FailedSyncs)
        }
    }

    /// The place of a device that failed within the window.
    fn place(&self, failing: &Failing) -> Place {
        let count =
            if self.consecutive { failing.consecutive_failures } else { failing.failed_syncs };
        let last_failure = failing.last_failure.map_or(i64::MIN, Timestamp::as_millisecond);
        let key = [count, last_failure].map(KeyPart::Number);
        Place { key: Some(key.into()), device_id: failing.device_id.clone() }
    }

    /// The places that are asked for among all devices that failed within the window.
    pub(super) fn places(&self, failing: &[Failing]) -> Places {
        page_of(failing.iter().map(|device| self.place(device)).collect(), &self.part())
    }
}

/// The page with these `devices`, which are at the places before `next`. Their failures within the window replace those
/// of all time.
pub(super) fn page_within_window(
    failing: &[Failing],
    mut devices: Vec<Device>,
    next: Option<Place>,
) -> Page<Device> {
    let failures = failing.iter().map(|device| (device.device_id.as_str(), device.failed_syncs));
    let failures: HashMap<_, _> = failures.collect();
    for device in &mut devices {
        let within = failures.get(device.device_id.as_str());
        device.figures.failed_syncs = within.copied().unwrap_or_default();
    }
    Page { items: devices, total: Count::Exactly(failing.len() as u64), next }
}

/// A device that failed within a window.
#[derive(Debug)]
pub(super) struct Failing {
    pub(super) device_id: String,
    /// Failures within the window.
    pub(super) failed_syncs: i64,
    /// The current streak.
    pub(super) consecutive_failures: i64,
    /// The latest failure of all time.
    pub(super) last_failure: Option<Timestamp>,
}

/// The entire fleet.
#[derive(Debug)]
pub struct FleetStats {
    /// Registered devices, including those that never reported.
    pub total_devices: u64,
    /// Devices from which something was received since the given moment.
    pub active_devices: u64,
    /// Sums over all devices; the times and the streak are not meaningful here.
    pub figures: Figures,
    /// The ten devices with the latest syncs.
    pub recent_devices: Vec<Device>,
}
