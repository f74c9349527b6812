//! A device's figures as every answer shows them.

use pisync_core::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::store::Figures;

/// What a device, or one of its jobs, adds up to over everything it ever reported.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeviceFigures {
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
    /// Syncs with errors.
    #[schema(example = 3)]
    failed_syncs: i64,
    /// Syncs without errors.
    #[schema(example = 409)]
    successful_syncs: i64,
    /// Per cent of syncs without errors; 0 when there are none.
    #[schema(example = 99.27)]
    success_rate: f64,
    /// Failures dated after the last success; of a device with several jobs, those of the worst.
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
            failed_syncs: figures.failed_syncs,
            successful_syncs: figures.successful_syncs(),
            success_rate: success_rate(&figures),
            consecutive_failures: figures.consecutive_failures,
        }
    }
}

/// Per cent of syncs without errors, rounded to 2 decimals; 0 when there are none, as the Node service
/// had it.
pub(super) fn success_rate(figures: &Figures) -> f64 {
    figures.success_ratio().map_or(0.0, |ratio| (ratio * 10_000.0).round() / 100.0)
}
