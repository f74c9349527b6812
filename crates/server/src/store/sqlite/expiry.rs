//! Drops old events in small steps, once they are aggregated into the sums by day and hour. The file then gives their
//! pages back. `maintenance` calls it. No step may take long, because ingest waits for it.

use pisync_core::Timestamp;
use rusqlite::{Connection, TransactionBehavior, params};

use super::{aggregated_events::watermark, rows::optional_time};

/// Empty pages are given back when they exceed this fraction of the file. It is better to keep those that the next
/// events will need.
const MOST_EMPTY: i64 = 4;

/// Pages that are given back at a time. Each may move a page from the end of the file.
const VACUUM_PAGES: u32 = 128;

/// Drops the next `most` events that were received before `before`; false when there are no more. Their date may be up
/// to `lead` milliseconds after their `received_at`.
///
/// Events are dropped in the order of their ids. An event with a `received_at` after `now` came while the clock was
/// ahead. It is as old as the next event, and is dropped together with it.
pub(super) fn drop_events(
    connection: &mut Connection,
    now: Timestamp,
    before: Timestamp,
    lead: i64,
    most: i64,
) -> rusqlite::Result<bool> {
    const OLDEST: &str = "
        select id, created_at from sync_events where id <= ?1 and created_at <= ?3 order by id limit ?2
    ";
    const DELETE: &str = "delete from sync_events where id <= ?1";
    const SINCE: &str = "
        update roll_up_state
           set raw_since     = max(ifnull(raw_since, ?1), ?1),
               streaks_since = max(ifnull(streaks_since, ?2), ?2)
    ";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let (mut last, mut newest, mut events) = (None, i64::MIN, 0);
    {
        let mut select = transaction.prepare_cached(OLDEST)?;
        let mut rows = select.query([watermark(&transaction)?, most, now.as_millisecond()])?;
        while let Some(row) = rows.next()? {
            let received: i64 = row.get(1)?;
            if received >= before.as_millisecond() {
                break;
            }
            last = Some(row.get::<_, i64>(0)?);
            newest = newest.max(received);
            events += 1;
        }
    }
    let Some(last) = last else { return Ok(false) };
    transaction.prepare_cached(DELETE)?.execute([last])?;
    let kept_since = newest + 1;
    transaction.prepare_cached(SINCE)?.execute(params![kept_since, kept_since + lead])?;
    transaction.commit()?;
    Ok(events == most)
}

/// Gives some empty pages at the end of the file back. False when there are few, or they cannot be given back.
pub(super) fn shrink(connection: &Connection) -> rusqlite::Result<bool> {
    let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let empty = pragma("freelist_count")?;
    if empty <= VACUUM_PAGES.into() || empty <= pragma("page_count")? / MOST_EMPTY {
        return Ok(false);
    }
    connection.execute_batch(&format!("pragma incremental_vacuum({VACUUM_PAGES})"))?;
    Ok(pragma("freelist_count")? < empty)
}

/// Events dated before this no longer change streaks.
pub(super) fn streaks_since(connection: &Connection) -> rusqlite::Result<Timestamp> {
    connection
        .prepare_cached("select streaks_since from roll_up_state")?
        .query_row([], |row| Ok(optional_time(row, 0)?.unwrap_or(Timestamp::MIN)))
}

/// Events received before this are dropped; `None` while all are kept.
pub(super) fn raw_since(connection: &Connection) -> rusqlite::Result<Option<Timestamp>> {
    connection
        .prepare_cached("select raw_since from roll_up_state")?
        .query_row([], |row| optional_time(row, 0))
}
