//! Logs what is learnt of devices while events are stored: new devices, and jobs that keep failing. `task` calls it
//! after each batch. It must limit its lines, because one batch may bring thousands of devices.

use pisync_core::DeviceId;

use crate::{
    log_throttle::{FewPerInterval, PermittedLine},
    store::FailureStreak,
};

/// Failures in a row that are worth a log line.
const NOTABLE_STREAK: i64 = 3;

/// Writes a limited number of lines of each kind.
#[derive(Debug)]
pub(super) struct DeviceLog {
    new: FewPerInterval,
    failing: FewPerInterval,
}

impl DeviceLog {
    pub(super) fn new() -> Self {
        Self { new: FewPerInterval::usual(), failing: FewPerInterval::usual() }
    }

    pub(super) fn note(&self, new_devices: &[DeviceId], streaks: &[FailureStreak]) {
        for device_id in new_devices {
            match self.new.due() {
                Some(PermittedLine { suppressed: 0, is_last: false }) => {
                    tracing::info!(%device_id, "new device");
                }
                Some(PermittedLine { suppressed, .. }) => tracing::info!(
                    %device_id,
                    suppressed,
                    "new device; more than 20 within 10 s are not logged, GET /api/devices lists them all"
                ),
                None => tracing::debug!(%device_id, "new device"),
            }
        }
        let begins = |streak: &&FailureStreak| {
            streak.before < NOTABLE_STREAK && streak.after >= NOTABLE_STREAK
        };
        for streak in streaks.iter().filter(begins) {
            macro_rules! line {
                ($level:ident, $message:literal $(, $field:ident)*) => {
                    tracing::$level!(
                        device_id = %streak.device_id,
                        job = streak.job.as_ref().map(tracing::field::display),
                        consecutive_failures = streak.after,
                        $($field,)*
                        $message
                    )
                };
            }
            match self.failing.due() {
                Some(PermittedLine { suppressed: 0, is_last: false }) => {
                    line!(warn, "a device keeps failing");
                }
                Some(PermittedLine { suppressed, .. }) => line!(
                    warn,
                    "a device keeps failing; more than 20 within 10 s are not logged, GET /api/devices/repeated-failures lists them all",
                    suppressed
                ),
                None => line!(debug, "a device keeps failing"),
            }
        }
    }
}
