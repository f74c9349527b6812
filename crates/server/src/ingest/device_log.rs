//! What is learnt of devices while events are stored, in the log.

use pisync_core::DeviceId;

use crate::{
    seldom::{FewPerInterval, OfFew},
    store::FailureStreak,
};

/// Failures in a row that are worth a line in the log.
const NOTABLE_STREAK: i64 = 3;

/// Writes some lines of each kind: one batch may bring thousands of devices.
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
                Some(OfFew { passed_over: 0, is_last: false }) => {
                    tracing::info!(%device_id, "new device");
                }
                Some(OfFew { passed_over, .. }) => tracing::info!(
                    %device_id,
                    passed_over,
                    "new device; of more than 20 within 10 s nothing is logged, GET /api/devices lists them all"
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
                Some(OfFew { passed_over: 0, is_last: false }) => {
                    line!(warn, "a device keeps failing");
                }
                Some(OfFew { passed_over, .. }) => line!(
                    warn,
                    "a device keeps failing; of more than 20 within 10 s nothing is logged, GET /api/devices/repeated-failures lists them all",
                    passed_over
                ),
                None => line!(debug, "a device keeps failing"),
            }
        }
    }
}
