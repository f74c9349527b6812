//! Which events are aggregated, to which day and hour each of them belongs, and what they add up to. `roll_ups`, and what it
//! calls, build their statements from it.

use rusqlite::Connection;

use crate::store::{
    Sums,
    day_details::{MOST_BYTES, MOST_DURATION, MOST_EVENT_BYTES, MOST_SPEED},
    roll_up_sql::Dialect,
};

/// How SQLite writes what both stores have.
pub(super) const DIALECT: Dialect = Dialect {
    device: "device",
    device_key: "id",
    day: DAY,
    hour: HOUR,
    date: "+timestamp",
    join_events_of_touched: "
        cross join sync_events
           on sync_events.device = touched.device
          and timestamp >= touched.day and timestamp < touched.day + 86400000
    ",
    aggregated: "id <= (select folded_id from roll_up_state)",
    not_aggregated: "id > (select folded_id from roll_up_state)",
    least: "min",
    integer: "",
    event_runs: "count(*), ifnull(sum(total_errors > 0), 0)",
    event_sums,
    event_details,
    bytes_total,
};

/// The midnight and the full hour before an event. Remainders of dates before 1970 are negative.
pub(super) const DAY: &str = "timestamp - (timestamp % 86400000 + 86400000) % 86400000";
pub(super) const HOUR: &str = "timestamp - (timestamp % 3600000 + 3600000) % 3600000";

/// SQL for the sums of rows of `sync_events`, in the order of [`Sums::COLUMNS`].
const EVENT_SUMS: [&str; Sums::COUNT] = [
    "count(*)",
    "ifnull(sum(total_errors > 0), 0)",
    "ifnull(sum(total_files_synced), 0)",
    "ifnull(sum(total_errors), 0)",
    "ifnull(sum(internet_speed), 0)",
    "count(internet_speed)",
];

/// The same, with commas between.
pub(super) fn event_sums() -> String {
    EVENT_SUMS.join(", ")
}

/// SQL that adds up bytes. SQLite fails when a sum exceeds 64 bits, so halves are added up.
fn bytes_total(column: &str) -> String {
    // From this many units of 2^20 on, the sum is at its limit.
    let most = MOST_BYTES >> 20;
    format!(
        "iif(sum({column} >> 20) >= {most}, {MOST_BYTES},
             (sum({column} >> 20) << 20) + sum({column} & 1048575))"
    )
}

/// SQL for the details of rows of `sync_events`, in the order of [`day_details::COLUMNS`].
pub(super) fn event_details() -> String {
    let known =
        |column: &str, most: i64| format!("iif({column} between 0 and {most}, {column}, null)");
    let speed = known("internet_speed", MOST_SPEED);
    let duration = known("duration", MOST_DURATION);
    let bytes = bytes_total(&known("bytes_synced", MOST_EVENT_BYTES));
    format!(
        "min({speed}), max({speed}), ifnull(sum({duration}), 0), count({duration}), max({duration}),
         ifnull({bytes}, 0)"
    )
}

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
