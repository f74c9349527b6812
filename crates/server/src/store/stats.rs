//! Statistics: what the fleet adds up to, and which of its devices fail repeatedly.

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::{Device, Figures, Page, StoreError, Window};

/// Statistics over devices. Each method is one transaction.
#[async_trait]
pub trait StatsStore: Send + Sync {
    /// The whole fleet's figures. `active_since` bounds `active_devices`.
    async fn fleet_stats(&self, active_since: Timestamp) -> Result<FleetStats, StoreError>;

    /// What the whole fleet's events within `window` add up to. The times and the streak stay empty.
    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError>;

    /// Devices that failed repeatedly, worst first.
    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError>;
}

/// Which devices failed repeatedly.
#[derive(Debug, Clone)]
pub struct FailureQuery {
    /// At least so many failures.
    pub threshold: u32,
    /// Count the current streak instead of failures.
    pub consecutive: bool,
    /// Only devices that failed within it, and only failures in it; of all time when `None`.
    pub window: Option<Window>,
    /// At most so many devices; all when `None`.
    pub limit: Option<u32>,
    /// After so many.
    pub offset: u64,
}

/// The whole fleet.
#[derive(Debug)]
pub struct FleetStats {
    /// Registered devices, those that never reported included.
    pub total_devices: u64,
    /// Devices from which something was received since the given instant.
    pub active_devices: u64,
    /// Sums over all devices; the times and the streak are not meaningful here.
    pub figures: Figures,
    /// The ten devices with the latest syncs.
    pub recent_devices: Vec<Device>,
}
