//! For how long runs are counted by group and hour. Both stores use it. Nothing here runs SQL.

use pisync_core::Timestamp;

/// The length of an hour.
pub(super) const HOUR_MILLISECONDS: i64 = 60 * 60 * 1000;

/// For how many hours runs are kept by group and hour: 14 days. By group and day they are kept for ever.
const KEPT_HOURS: i64 = 14 * 24;

/// The first hour whose runs by group are kept.
pub(super) fn first_kept_hour(now: Timestamp) -> Timestamp {
    let into_hour = now.as_millisecond().rem_euclid(HOUR_MILLISECONDS);
    now.saturating_add_milliseconds(-into_hour - KEPT_HOURS * HOUR_MILLISECONDS)
}
