//! Drops old events by entire months. `maintenance` calls it. It detaches and drops a partition once its month is past
//! and aggregated. A drop must be announced beforehand, so that every node knows since when it counts streaks.

use deadpool_postgres::GenericClient;
use jiff::{ToSpan, civil::Date, tz::TimeZone};
use pisync_core::Timestamp;
use tokio_postgres::{Client, Error};

use super::{locks::EXPIRY_LOCK, partitions::month_of};
use crate::store::Retention;

/// How long before the drop of events it is announced. Writers check every 10 s.
const NOTICE_MILLISECONDS: i64 = 5 * 60_000;

/// How long to wait for a lock. Dropping a month locks `devices`, too, because of the foreign key, and ingest waits
/// behind that lock. It is better to try again later.
const LOCK_TIMEOUT: &str = "set lock_timeout = '300ms'";

/// Marks a table that is to be dropped. A server may end between detaching and dropping; the next attempt finds the
/// table by this mark. A table that somebody else has detached is not ours.
const MARK: &str = "PiSync is dropping this";

/// Announces the months that are past, or drops one that was announced. Answers whether there may be another. The
/// connection keeps settings of its own and must not be used for anything else afterwards.
pub(super) async fn drop_month(
    client: &Client,
    now: Timestamp,
    retention: &Retention,
) -> Result<bool, Error> {
    const TRY_LOCK: &str = "select pg_try_advisory_lock($1)";
    if !client.query_one(TRY_LOCK, &[&EXPIRY_LOCK]).await?.try_get::<_, bool>(0)? {
        return Ok(false);
    }
    let result = drop_month_under_lock(client, now, retention).await;
    // If this fails, closing the connection releases the lock a little later.
    let _ = client.execute("select pg_advisory_unlock($1)", &[&EXPIRY_LOCK]).await;
    result
}

async fn drop_month_under_lock(
    client: &Client,
    now: Timestamp,
    retention: &Retention,
) -> Result<bool, Error> {
    const MONTHS: &str = "
        select month.relname::text, inherits.inhdetachpending
          from pg_class month
          join pg_class events
            on events.oid = 'sync_events'::regclass and events.relnamespace = month.relnamespace
          left join pg_inherits inherits
            on inherits.inhrelid = month.oid and inherits.inhparent = events.oid
         where month.relkind = 'r' and month.relname ~ '^sync_events_[0-9]{4}_[0-9]{2}$'
           and (inherits.inhrelid is not null or obj_description(month.oid, 'pg_class') = $1)
         order by month.relname collate \"C\"
         limit 1
    ";
    const STATE: &str = "select folded_until, raw_since, announced_at from roll_up_state";
    const ANNOUNCE: &str = "
        update roll_up_state set raw_since = $1, streaks_since = $2, announced_at = $3
    ";
    let Some(oldest) = client.query_opt(MONTHS, &[&MARK]).await? else { return Ok(false) };
    let table: String = oldest.try_get(0)?;
    let detach_pending: Option<bool> = oldest.try_get(1)?;
    // The end of the drop: the month in which the oldest events to keep were received.
    let kept_since = month_of(retention.oldest(now));
    let Some(end) = end_of(&table).filter(|end| *end <= kept_since) else { return Ok(false) };

    let state = client.query_one(STATE, &[]).await?;
    let time = |column| -> Result<Option<Timestamp>, Error> {
        Ok(state.try_get::<_, Option<jiff::Timestamp>>(column)?.map(Timestamp::truncate))
    };
    let (aggregated_until, raw_since, announced_at) = (time(0)?, time(1)?, time(2)?);
    let (end, kept_since) = (midnight(end), midnight(kept_since));
    if aggregated_until < Some(end) {
        return Ok(false);
    }
    if raw_since < Some(end) {
        let streaks_since = kept_since.saturating_add_milliseconds(retention.longest_lead());
        let times = [kept_since, streaks_since, now].map(Timestamp::to_jiff);
        client.execute(ANNOUNCE, &[&times[0], &times[1], &times[2]]).await?;
        return Ok(false);
    }
    let notice = now.saturating_add_milliseconds(-NOTICE_MILLISECONDS);
    if announced_at.is_some_and(|announced_at| announced_at > notice) {
        return Ok(false);
    }
    // Each statement is sent separately, because the first cannot run within a transaction.
    client.batch_execute(LOCK_TIMEOUT).await?;
    client.batch_execute("set statement_timeout = 0").await?;
    match detach_pending {
        Some(false) => {
            client.batch_execute(&format!("comment on table {table} is '{MARK}'")).await?;
            let detach = format!("alter table sync_events detach partition {table} concurrently");
            client.batch_execute(&detach).await?;
        }
        // An earlier attempt waited for a lock and gave up.
        Some(true) => {
            let finish = format!("alter table sync_events detach partition {table} finalize");
            client.batch_execute(&finish).await?;
        }
        None => {}
    }
    client.batch_execute(&format!("drop table {table}")).await?;
    tracing::info!(table, "events of a month that is past were dropped");
    Ok(true)
}

/// The day after the last day of a partition's month.
fn end_of(table: &str) -> Option<Date> {
    let month = table.strip_prefix("sync_events_")?;
    let first = Date::strptime("%Y_%m_%d", format!("{month}_01")).ok()?;
    first.checked_add(1.month()).ok()
}

fn midnight(day: Date) -> Timestamp {
    let zoned = day.to_zoned(TimeZone::UTC);
    zoned.map_or(Timestamp::MIN, |zoned| Timestamp::truncate(zoned.timestamp()))
}

/// Events received before this are dropped or about to be; `None` while all are kept.
pub(super) async fn raw_since(client: &impl GenericClient) -> Result<Option<Timestamp>, Error> {
    let select = client.prepare_cached("select raw_since from roll_up_state").await?;
    let since: Option<jiff::Timestamp> = client.query_one(&select, &[]).await?.try_get(0)?;
    Ok(since.map(Timestamp::truncate))
}

/// What a writer must know about events of other writers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Watermarks {
    /// Events dated before this no longer change streaks.
    pub(super) streaks_since: Timestamp,
    /// Events received up to this time are aggregated; `None` before the first aggregation.
    pub(super) aggregated_until: Option<Timestamp>,
}

pub(super) async fn watermarks(client: &Client) -> Result<Watermarks, Error> {
    const WATERMARKS: &str = "select streaks_since, folded_until from roll_up_state";
    let state = client.query_one(WATERMARKS, &[]).await?;
    let time = |column| -> Result<Option<Timestamp>, Error> {
        Ok(state.try_get::<_, Option<jiff::Timestamp>>(column)?.map(Timestamp::truncate))
    };
    Ok(Watermarks { streaks_since: time(0)?.unwrap_or(Timestamp::MIN), aggregated_until: time(1)? })
}
