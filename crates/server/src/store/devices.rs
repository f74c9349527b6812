//! Devices: how they are listed and looked up. The API calls it and both stores implement it. What people set for a device
//! is in [`super::fleet_changes`]. Deleting one takes many transactions; see [`super::deletion`].

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, health::State, text::TextError};

use super::{Device, DeviceWithJobs, KeyPart, Page, Place, StoreError};

/// No stored time is further from 1970 than this, in microseconds: the end of the year 9999.
const LARGEST_MICROSECOND: i64 = 253_402_300_800_000_000;

/// The most devices on a page of [`DeviceStore::device_ids`].
pub(super) const DEVICE_IDS: u32 = 1_000;

/// The devices of the fleet. Each method is one transaction.
#[async_trait]
pub trait DeviceStore: Send + Sync {
    /// One page of devices.
    async fn devices(&self, query: &DeviceQuery) -> Result<Page<Device>, StoreError>;

    /// One device and its jobs; `None` when unknown.
    async fn device(&self, device_id: &DeviceId) -> Result<Option<DeviceWithJobs>, StoreError>;

    /// One page of the ids of all devices, or of a group's devices, in byte-wise order. It begins after the device
    /// `after`, and is empty behind the last.
    async fn device_ids(
        &self,
        group: Option<&GroupName>,
        after: Option<&str>,
    ) -> Result<Vec<DeviceId>, StoreError>;
}

/// Whose devices or incidents to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupFilter {
    /// Those of a group.
    Named(GroupName),
    /// Those of the devices that are in no group.
    Ungrouped,
}

impl GroupFilter {
    /// Reads one. A name may be any text, so only the empty one can stand for "no group".
    ///
    /// # Errors
    /// When the text cannot be a group's name.
    pub fn new(text: &str) -> Result<Self, TextError> {
        if text.is_empty() { Ok(Self::Ungrouped) } else { GroupName::new(text).map(Self::Named) }
    }

    /// The group as states and incidents are kept under it: the empty name for none.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Named(name) => name.as_str(),
            Self::Ungrouped => "",
        }
    }
}

impl From<GroupName> for GroupFilter {
    fn from(name: GroupName) -> Self {
        Self::Named(name)
    }
}

/// Which devices to list, and in which order.
#[derive(Debug, Clone)]
pub struct DeviceQuery {
    /// A part of the device's id or name. The case of ASCII letters does not matter.
    pub search: Option<String>,
    /// Only devices of this group, or of none.
    pub group: Option<GroupFilter>,
    /// Only devices with this tag.
    pub tag: Option<String>,
    /// Only devices in one of these states, as the last sweep has found them; all when empty.
    pub states: Vec<State>,
    /// Only devices that are overdue.
    pub is_overdue: bool,
    /// The sort key.
    pub sort: DeviceSort,
    /// Largest or latest first.
    pub descending: bool,
    /// The maximum number of devices.
    pub limit: u32,
    /// How many devices to skip.
    pub offset: u64,
    /// Only devices behind this place.
    pub after: Option<Place>,
}

/// What a list of devices can be sorted by. Ties are sorted by device id; missing values come last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceSort {
    /// By device id, byte by byte.
    DeviceId,
    /// By the name that people gave it.
    Name,
    /// When the device was first seen.
    CreatedAt,
    /// When the server last received an event of it.
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
    /// The state that the last sweep has found, the most urgent first; then since when.
    Status,
    /// Since when the device has been in that state.
    StatusSince,
}

impl DeviceSort {
    /// Whether `place` can be in a list that is sorted by this.
    #[must_use]
    pub fn has(self, place: &Place) -> bool {
        let (parts, may_be_missing) = match self {
            Self::DeviceId => (0, false),
            Self::CreatedAt => (1, false),
            Self::Status => (2, true),
            Self::Name
            | Self::LastSeen
            | Self::LastSync
            | Self::LastSuccess
            | Self::TotalSyncs
            | Self::FailedSyncs
            | Self::ConsecutiveFailures
            | Self::StatusSince => (1, true),
        };
        place.key.as_ref().map_or(may_be_missing, |key| {
            let is_right = |part: &KeyPart| match part {
                KeyPart::Text(_) => self == Self::Name,
                KeyPart::Number(number) if self == Self::CreatedAt => {
                    (-LARGEST_MICROSECOND..=LARGEST_MICROSECOND).contains(number)
                }
                KeyPart::Number(_) => self != Self::Name,
            };
            key.len() == parts && key.iter().all(is_right)
        })
    }
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
