//! Deletes devices in steps. A history of millions of events takes many short transactions; between them, others read
//! and report. The API calls it, and `app` resumes interrupted deletions. A deletion must never take events that were
//! received after it began.
//!
//! A deletion is recorded in `device_deletions` before its first step, so an interrupted one continues. Until the last
//! step the device is listed with its totals, while its history and its part of the windows shrink. The last step
//! deletes the device, in one transaction with its line of the audit log. If the device has reported since the deletion
//! began, it is created again with those events alone.

use std::time::Instant;

use async_trait::async_trait;
use pisync_core::{DeviceId, Timestamp};

use super::{Actor, AuditLog, StoreError, Via};

/// How many of the newest lines of the audit log are searched for a deletion that has just ended.
const RECENT_LINES: u32 = 100;

/// The result of a step. Each variant tells how many of the device's events are deleted so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeletionStep {
    /// There is more to do.
    More(u64),
    /// That was the last one.
    Done(u64),
    /// No deletion of this device is in progress, because somebody else has done the rest.
    None,
}

/// Deletions of devices. Each required method is one transaction.
#[async_trait]
pub trait DeviceDeletions: AuditLog + Send + Sync {
    /// Records that a device is to be deleted, and who wants it; false when the device is unknown.
    async fn begin_deletion(&self, device_id: &DeviceId, by: &Actor) -> Result<bool, StoreError>;

    /// Does a small part of a deletion that has begun, in one transaction.
    async fn delete_some(&self, device_id: &DeviceId) -> Result<DeletionStep, StoreError>;

    /// The devices that are being deleted, and how many of their events are deleted so far.
    async fn deletions(&self) -> Result<Vec<(DeviceId, u64)>, StoreError>;

    /// Deletes a device with all its events and figures, and answers how many events were deleted; `None` when the
    /// device is unknown. The audit log records who did it. When the caller gives up, [`Self::deletions`] lists what is
    /// left.
    async fn delete_device(
        &self,
        device_id: &DeviceId,
        by: &Actor,
    ) -> Result<Option<u64>, StoreError> {
        if !self.begin_deletion(device_id, by).await? {
            return Ok(None);
        }
        self.finish_deletion(device_id).await.map(Some)
    }

    /// Continues a deletion until its end.
    async fn finish_deletion(&self, device_id: &DeviceId) -> Result<u64, StoreError> {
        let mut deleted = 0;
        loop {
            let started = Instant::now();
            match self.delete_some(device_id).await? {
                DeletionStep::More(events) => deleted = events,
                DeletionStep::Done(events) => return Ok(events),
                // Somebody else has done the last step; the audit log tells how many events were deleted.
                DeletionStep::None => {
                    let lines = self.audit(None, RECENT_LINES).await?;
                    let logged = lines
                        .iter()
                        .find(|line| {
                            line.action == "device.delete" && line.subject == device_id.as_str()
                        })
                        .and_then(|line| line.details["deleted_events"].as_u64());
                    return Ok(logged.unwrap_or(deleted));
                }
            }
            // Others get at least as much of the database's time.
            tokio::time::sleep(started.elapsed()).await;
        }
    }
}

/// A deletion as it is stored.
#[derive(Debug)]
pub(super) struct Deletion {
    /// Events with `received_at` up to this time are deleted.
    pub(super) received_until: Timestamp,
    /// Who asked for it.
    pub(super) by: Actor,
    /// How many events are deleted so far.
    pub(super) deleted_events: u64,
}

/// The actor in the form that a deletion stores.
pub(super) fn stored_actor(
    via: &str,
    key_id: Option<i64>,
    address: Option<&str>,
    at: Timestamp,
) -> Actor {
    let via = match (via, key_id) {
        (_, Some(key_id)) => Via::Key(key_id),
        ("open", None) => Via::Open,
        ("command line", None) => Via::CommandLine,
        _ => Via::Local,
    };
    Actor { via, address: address.and_then(|address| address.parse().ok()), at }
}
