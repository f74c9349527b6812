//! A device's figures as every response shows them. The resources use it, so that no two of them differ.

use pisync_core::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::store::Figures;

/// The figures of a device, or of one of its jobs, over all its events.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeviceFigures {
    #[schema(example = 412)]
    total_syncs: i64,
    #[schema(example = 150)]
    total_files_synced: i64,
    #[schema(example = 2)]
    total_errors: i64,
    /// Mean of the measured speeds in Mbps; null when none was measured.
    #[schema(example = 45.6)]
    avg_internet_speed: Option<f64>,
    /// The earliest sync by its own date.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-01T00:00:03.000Z")]
    first_sync: Option<Timestamp>,
    /// The latest sync by its own date.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:00.000Z")]
    last_sync: Option<Timestamp>,
    /// The latest sync without errors.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-17T10:30:00.000Z")]
    last_success: Option<Timestamp>,
    /// The latest sync with errors.
    #[schema(value_type = Option<String>, format = DateTime, example = "2025-06-11T04:00:09.000Z")]
    last_failed_sync: Option<Timestamp>,
    /// Syncs with errors.
    #[schema(example = 3)]
    failed_syncs: i64,
    /// Syncs without errors.
    #[schema(example = 409)]
    successful_syncs: i64,
    /// Percentage of syncs without errors, with 2 decimals; 0 when there are no syncs. It is 100 only if none has
    /// failed, and 0 only if none has succeeded.
    #[schema(example = 99.27)]
    success_rate: f64,
    /// Failures after the last success, by date and then by id. For a device with several jobs, those of the worst job.
    #[schema(example = 0)]
    consecutive_failures: i64,
}

impl From<Figures> for DeviceFigures {
    fn from(figures: Figures) -> Self {
        Self {
            total_syncs: figures.total_syncs,
            total_files_synced: figures.total_files_synced,
            total_errors: figures.total_errors,
            avg_internet_speed: figures.avg_internet_speed(),
            first_sync: figures.first_sync,
            last_sync: figures.last_sync,
            last_success: figures.last_success,
            last_failed_sync: figures.last_failure,
            failed_syncs: figures.failed_syncs,
            successful_syncs: figures.successful_syncs(),
            success_rate: success_rate(&figures),
            consecutive_failures: figures.consecutive_failures,
        }
    }
}

/// Percentage of syncs without errors, rounded to 2 decimals. Without syncs it is 0, as in the Node service. Rounding
/// never gives 100 if a sync has failed, nor 0 if one has succeeded: people read those values as "all" and "none".
pub(crate) fn success_rate(figures: &Figures) -> f64 {
    let successful = i128::from(figures.successful_syncs());
    let total = i128::from(figures.total_syncs);
    if total <= 0 || successful <= 0 {
        return 0.0;
    }
    if successful >= total {
        return 100.0;
    }
    let hundredths = (successful * 20_000 + total) / (total * 2);
    f64::from(i32::try_from(hundredths.clamp(1, 9_999)).unwrap_or_default()) / 100.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(successful: i64, failed: i64) -> f64 {
        let total_syncs = successful + failed;
        success_rate(&Figures { total_syncs, failed_syncs: failed, ..Figures::default() })
    }

    #[test]
    fn only_all_is_a_hundred_per_cent_and_only_none_is_zero() {
        assert_eq!(rate(0, 0), 0.0);
        assert_eq!(rate(30_000, 0), 100.0);
        assert_eq!(rate(29_999, 1), 99.99);
        assert_eq!(rate(1, 29_999), 0.01);
        assert_eq!(rate(0, 30_000), 0.0);
        assert_eq!(rate(i64::MAX - 1, 1), 99.99);
        assert_eq!(rate(1, i64::MAX - 1), 0.01);
    }

    proptest! {
        #[test]
        fn it_is_rounded_to_the_nearest_hundredth_in_between(
            successful in 1..1_000_000_i32, failed in 1..1_000_000_i32,
        ) {
            let rate = rate(successful.into(), failed.into());
            let exact = f64::from(successful) * 100.0 / f64::from(successful + failed);
            prop_assert!(rate > 0.0 && rate < 100.0);
            let is_nearest = (rate - exact).abs() <= 0.005 + 1e-9;
            prop_assert!(is_nearest || rate == 0.01 || rate == 99.99);
        }
    }
}
