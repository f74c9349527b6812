//! Statistics: the figures of the fleet, and its devices that fail repeatedly. The API calls it and both stores
//! implement it. No method changes anything.

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::{Device, Figures, Page, StoreError, Window};

/// Statistics over devices. Each method is one transaction.
#[async_trait]
pub trait StatsStore: Send + Sync {
    /// The figures of the entire fleet. `active_since` bounds `active_devices`.
    async fn fleet_stats(&self, active_since: Timestamp) -> Result<FleetStats, StoreError>;

    /// The sums of the entire fleet's events within `window`. The times and the streak stay empty.
    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError>;

    /// Devices that failed repeatedly, worst first.
    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError>;
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
