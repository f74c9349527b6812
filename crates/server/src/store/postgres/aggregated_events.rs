//! Which events are aggregated, and to which day and hour each of them belongs. `roll_ups`, and what it calls, build their
//! statements from it, and lock in its order.

use deadpool_postgres::Transaction;
use pisync_core::Timestamp;
use tokio_postgres::{Error, Row};

use super::locks::ROLL_UP_LOCK;

/// The day and the full hour of an event.
pub(super) const DAY: &str = "(timestamp at time zone 'UTC')::date";
pub(super) const HOUR: &str = "date_trunc('hour', timestamp, 'UTC')";

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
