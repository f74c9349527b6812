//! Which events are aggregated, and to which day and hour each of them belongs. `roll_ups`, and what it calls, build their
//! statements from it.

use rusqlite::Connection;

/// The midnight and the full hour before an event. Remainders of dates before 1970 are negative.
pub(super) const DAY: &str = "timestamp - (timestamp % 86400000 + 86400000) % 86400000";
pub(super) const HOUR: &str = "timestamp - (timestamp % 3600000 + 3600000) % 3600000";

/// The id of the last event that is aggregated. All events up to it are.
pub(super) fn watermark(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("select folded_id from roll_up_state")?
        .query_row([], |row| row.get(0))
}

/// Events of a device that are to be deleted. They were received up to `received_until`, and come up to this one in the
/// order of the index.
pub(super) struct DeletedEvents {
    pub(super) device: i64,
    pub(super) received_until: i64,
    pub(super) timestamp: i64,
    pub(super) id: i64,
}

/// The condition for these events. Their fields are the parameters 1 to 4.
pub(super) const DELETED_EVENTS: &str = "
    device = ?1 and created_at <= ?2 and timestamp <= ?3 and (timestamp < ?3 or id <= ?4)
";
