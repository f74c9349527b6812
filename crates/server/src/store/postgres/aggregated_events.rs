//! Which events are aggregated, to which day and hour each of them belongs, and what they add up to. `roll_ups`, and what it
//! calls, build their statements from it, and lock in its order.

use deadpool_postgres::Transaction;
use pisync_core::Timestamp;
use tokio_postgres::{Error, Row};

use super::locks::ROLL_UP_LOCK;
use crate::store::{
    Sums,
    day_details::{MOST_BYTES, MOST_DURATION, MOST_EVENT_BYTES, MOST_SPEED},
    roll_up_sql::Dialect,
};

/// How PostgreSQL writes what both stores have.
pub(super) const DIALECT: Dialect = Dialect {
    device: "device_id",
    device_key: "device_id",
    day: DAY,
    hour: HOUR,
    date: "timestamp",
    join_events_of_touched: "
        join sync_events
          on sync_events.device_id = touched.device_id
         and timestamp >= touched.day::timestamp at time zone 'UTC'
         and timestamp < (touched.day + 1)::timestamp at time zone 'UTC'
    ",
    aggregated: "created_at <= (select coalesce(folded_until, '-infinity') from roll_up_state)",
    not_aggregated: "created_at > (select coalesce(folded_until, '-infinity') from roll_up_state)",
    least: "least",
    integer: "::bigint",
    event_runs: "count(*), count(*) filter (where total_errors > 0)",
    event_sums,
    event_details,
    bytes_total: |column| format!("sum({column})"),
};

/// The day and the full hour of an event.
pub(super) const DAY: &str = "(timestamp at time zone 'UTC')::date";
pub(super) const HOUR: &str = "date_trunc('hour', timestamp, 'UTC')";

/// SQL for the sums of rows of `sync_events`, in the order of [`Sums::COLUMNS`].
const EVENT_SUMS: [&str; Sums::COUNT] = [
    "count(*)",
    "count(*) filter (where total_errors > 0)",
    "coalesce(sum(total_files_synced), 0)::bigint",
    "coalesce(sum(total_errors), 0)::bigint",
    "coalesce(sum(internet_speed * 100), 0)::bigint",
    "count(internet_speed)",
];

/// The sums of rows of `sync_events`, with commas between.
pub(super) fn event_sums() -> String {
    EVENT_SUMS.join(", ")
}

/// SQL for the details of rows of `sync_events`, in the order of [`day_details::COLUMNS`].
pub(super) fn event_details() -> String {
    let known =
        |value: &str, most: i64| format!("case when {value} between 0 and {most} then {value} end");
    let speed = known("(internet_speed * 100)", MOST_SPEED);
    let duration = known("(duration_seconds * 1000)", MOST_DURATION);
    let bytes = known("bytes_synced", MOST_EVENT_BYTES);
    format!(
        "min({speed})::bigint, max({speed})::bigint, coalesce(sum({duration}), 0)::bigint, count({duration}),
         max({duration})::bigint, least(coalesce(sum({bytes}), 0), {MOST_BYTES})::bigint"
    )
}

/// The sums of rows of `sync_events`, each under the name of its column.
pub(super) fn named_event_sums() -> String {
    let named = EVENT_SUMS.iter().zip(Sums::COLUMNS);
    named.map(|(sum, column)| format!("{sum} as {column}")).collect::<Vec<_>>().join(", ")
}

/// Tries to become the node that aggregates, until the transaction ends. False when another one does.
pub(super) async fn try_lock(transaction: &Transaction<'_>) -> Result<bool, Error> {
    const TRY_LOCK: &str = "select pg_try_advisory_xact_lock($1)";
    transaction.query_one(TRY_LOCK, &[&ROLL_UP_LOCK]).await?.try_get(0)
}

/// Stops aggregation until the transaction ends, and answers the watermark. A caller that also locks devices must take
/// this lock first.
pub(super) async fn lock_state(transaction: &Transaction<'_>) -> Result<Option<Timestamp>, Error> {
    const LOCK_STATE: &str = "select folded_until from roll_up_state for update";
    aggregated_until(&transaction.query_one(LOCK_STATE, &[]).await?)
}

/// The watermark, as of this snapshot. It is passed to queries as a value, so that the planner sees how few events
/// follow it.
pub(super) async fn watermark(snapshot: &Transaction<'_>) -> Result<jiff::Timestamp, Error> {
    let state = snapshot.query_one("select folded_until from roll_up_state", &[]).await?;
    Ok(aggregated_until(&state)?.unwrap_or(Timestamp::MIN).to_jiff())
}

fn aggregated_until(state: &Row) -> Result<Option<Timestamp>, Error> {
    Ok(state.try_get::<_, Option<jiff::Timestamp>>(0)?.map(Timestamp::truncate))
}
