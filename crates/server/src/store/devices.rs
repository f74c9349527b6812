//! Devices: how they are listed, looked up and changed. Deleting one takes many transactions; see [`super::deletion`].

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName};

use super::{Actor, Device, DeviceWithJobs, Page, StoreError};

/// The most devices on a page of [`DeviceStore::device_ids`].
pub(super) const DEVICE_IDS: u32 = 1_000;

/// The devices of the fleet. Each method is one transaction.
#[async_trait]
pub trait DeviceStore: Send + Sync {
    /// One page of devices.
    async fn devices(&self, query: &DeviceQuery) -> Result<Page<Device>, StoreError>;

    /// One device and its jobs; `None` when unknown.
    async fn device(&self, device_id: &DeviceId) -> Result<Option<DeviceWithJobs>, StoreError>;

    /// One page of the ids of all devices, or those of a group, in byte-wise order, beginning after the
    /// device `after`; empty behind the last.
    async fn device_ids(
        &self,
        group: Option<&GroupName>,
        after: Option<&str>,
    ) -> Result<Vec<DeviceId>, StoreError>;

    /// Changes what people say of a device, and adds a line to the audit log; false when it is unknown.
    async fn update_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError>;
}

/// Which devices to list, and in which order.
#[derive(Debug, Clone)]
pub struct DeviceQuery {
    /// Part of the device id or name, whatever the case of ASCII letters.
    pub search: Option<String>,
    /// Only of this group.
    pub group: Option<GroupName>,
    /// By what.
    pub sort: DeviceSort,
    /// Largest or latest first.
    pub descending: bool,
    /// At most so many.
    pub limit: u32,
    /// After so many.
    pub offset: u64,
}

/// What a list of devices can be sorted by. Ties go by device id; what is missing comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceSort {
    /// Byte by byte.
    DeviceId,
    /// What people call it.
    Name,
    /// First seen.
    CreatedAt,
    /// Last received from.
    LastSeen,
    /// Latest sync by its own date.
    LastSync,
    /// Latest sync without errors.
    LastSuccess,
    /// Syncs reported.
    TotalSyncs,
    /// Syncs with errors.
    FailedSyncs,
    /// Current streak.
    ConsecutiveFailures,
}

impl DeviceSort {
    /// What to sort devices `d` by, in either store's SQL; and, when that is a figure, the sum over
    /// `device_jobs` that must be joined as `f.key`.
    pub(super) fn expressions(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::DeviceId => ("d.device_id", None),
            Self::Name => ("d.name", None),
            Self::CreatedAt => ("d.created_at", None),
            Self::LastSeen => ("f.key", Some("max(last_received)")),
            Self::LastSync => ("f.key", Some("max(last_sync)")),
            Self::LastSuccess => ("f.key", Some("max(last_success)")),
            Self::TotalSyncs => ("f.key", Some("sum(total_syncs)")),
            Self::FailedSyncs => ("f.key", Some("sum(failed_syncs)")),
            Self::ConsecutiveFailures => ("f.key", Some("max(consecutive_failures)")),
        }
    }
}

/// What to change about a device: `None` leaves a field alone, `Some(None)` empties it.
#[derive(Debug, Clone, Default)]
pub struct DeviceChange {
    /// What people call it.
    pub name: Option<Option<String>>,
    /// Its group.
    pub group: Option<Option<GroupName>>,
}

/// The pattern for `like … escape '\'` that finds `text` anywhere, taken literally.
pub(super) fn like_pattern(text: &str) -> String {
    let mut pattern = String::from("%");
    for character in text.chars() {
        if matches!(character, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern.push('%');
    pattern
}
