//! Runs that devices have started, and whose reports are awaited. The API notes them, and a background task of the server
//! stores them. The sweep reads them and removes those that are over. Nothing here may create a device.

use async_trait::async_trait;
use pisync_core::{DeviceId, EventId, GroupName, JobName, Timestamp};

use super::StoreError;

/// The most started runs of a device that are kept. The sweep removes a run when it is over, at the latest when its policy's
/// `max_run_seconds` have passed. Further starts are dropped, not the oldest: otherwise a device that starts one run after
/// another and never reports would never be found hung.
pub const MOST_STARTS: u32 = 100;

/// A run that a device says it has started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartedRun {
    /// Which run it is.
    pub key: RunKey,
    /// When the server heard of it.
    pub received_at: Timestamp,
    /// When the device says that it began.
    pub timestamp: Option<Timestamp>,
    /// The group in which the device must be.
    pub group: Option<GroupName>,
}

/// What tells runs apart. Only one run without a `run_id` is kept of each job.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RunKey {
    /// The device.
    pub device_id: DeviceId,
    /// Its job; `None` for runs that name none.
    pub job: Option<JobName>,
    /// The `event_id` that the run's report will carry.
    pub run_id: Option<EventId>,
}

impl RunKey {
    /// The job as it is stored.
    pub(super) fn stored_job(&self) -> &str {
        self.job.as_ref().map_or("", JobName::as_str)
    }

    /// The run's id as it is stored.
    pub(super) fn stored_run_id(&self) -> &str {
        self.run_id.as_ref().map_or("", EventId::as_str)
    }

    /// How many bytes its texts have.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.device_id.as_str().len() + self.stored_job().len() + self.stored_run_id().len()
    }
}

/// Started runs. Each method is one transaction.
#[async_trait]
pub trait RunStarts: Send + Sync {
    /// Stores started runs, and answers how many of them are new. A run that is known already stays as it is. A run is
    /// dropped when its device is unknown, is not in the group that it must be in, or has [`MOST_STARTS`] of them.
    async fn add_run_starts(&self, runs: &[StartedRun]) -> Result<u64, StoreError>;

    /// Whether a key of `group` may report for a device: the device is in the group, or unknown.
    async fn may_report_in(
        &self,
        device_id: &DeviceId,
        group: &GroupName,
    ) -> Result<bool, StoreError>;
}
