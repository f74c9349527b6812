//! What a device did lately: its runs of the last 30 days, and the average speed of the last 7. A digest covers the whole
//! days before its `day`. Once a day all are made anew, some at a time. An event that comes late changes its device's
//! digest when it is aggregated.

use deadpool_postgres::Transaction;
use jiff::{ToSpan, civil::Date, tz::TimeZone};
use pisync_core::Timestamp;
use tokio_postgres::Error;

use super::{aggregated_events, connect::Object};

/// Devices whose digests are made in one transaction.
const DEVICES_AT_ONCE: i64 = 500;

/// A statement that makes the digests of the devices that `chosen` selects, each for a day: device_id, day.
fn make(chosen: &str) -> String {
    let digests = digests_of(chosen);
    format!(
        "insert into device_digest (device_id, day, runs_30d, failed_30d, speed_7d, is_stale)
         select digests.*, false from ({digests}) digests
          order by device_id
             on conflict (device_id) do update
            set day = excluded.day, runs_30d = excluded.runs_30d, failed_30d = excluded.failed_30d,
                speed_7d = excluded.speed_7d, is_stale = false"
    )
}

/// SQL for the digests of chosen devices, in the order of the columns of the table.
fn digests_of(chosen: &str) -> String {
    let of_week = |column: &str| {
        format!("coalesce(sum(days.{column}) filter (where days.day >= chosen.day - 7), 0)")
    };
    let (speeds, measured) = (of_week("speed_sum"), of_week("speed_count"));
    // The average is rounded; it is null when there is nothing to divide by.
    format!(
        "select chosen.device_id, chosen.day, coalesce(sum(days.total_syncs), 0)::bigint as runs_30d,
                coalesce(sum(days.failed_syncs), 0)::bigint as failed_30d,
                div(2 * {speeds} + {measured}, nullif(2 * {measured}, 0))::bigint as speed_7d
           from ({chosen}) chosen
           left join device_days days
             on days.device_id = chosen.device_id
            and days.day >= chosen.day - 30 and days.day < chosen.day
          group by chosen.device_id, chosen.day"
    )
}

/// A statement that notes the devices of which `source`, the rest of a `from` clause with a condition, has events that came
/// so late that their days are part of a digest.
pub(super) fn note_late_of(source: &str) -> String {
    // A digest that is not made anew yet may be some days old.
    format!(
        "insert into device_digest as stored (device_id, day, runs_30d, failed_30d, speed_7d, is_stale)
         select distinct device_id, digest_day, 0, 0, null::bigint, true
           from roll_up_state, {source}
            and timestamp < digest_day::timestamp at time zone 'UTC'
            and timestamp >= (digest_day - 60)::timestamp at time zone 'UTC'
          order by device_id
             on conflict (device_id) do update set is_stale = true where not stored.is_stale"
    )
}

/// Notes that a device's days have changed.
pub(super) async fn note_stale(
    transaction: &Transaction<'_>,
    device_id: &str,
) -> Result<(), Error> {
    const NOTE: &str = "update device_digest set is_stale = true where device_id = $1";
    transaction.execute(NOTE, &[&device_id]).await.map(|_| ())
}

/// Makes some of the digests that are stale. False when none are left, or another node is at work.
pub(super) async fn make_stale(connection: &mut Object) -> Result<bool, Error> {
    const ANY: &str = "select exists (select from device_digest where is_stale)";
    const STALE: &str =
        "select device_id, day from device_digest where is_stale order by device_id limit $1";
    let any = connection.prepare_cached(ANY).await?;
    if !connection.query_one(&any, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(false);
    }
    let transaction = connection.transaction().await?;
    if !aggregated_events::try_lock(&transaction).await? {
        return Ok(false);
    }
    aggregated_events::lock_state(&transaction).await?;
    transaction.execute(&make(STALE), &[&DEVICES_AT_ONCE]).await?;
    let more = transaction.query_one(&any, &[]).await?.try_get(0)?;
    transaction.commit().await?;
    Ok(more)
}

/// Makes some of the digests that are stale, or of those of the day of `now`. False when all devices have theirs, or another node is at work.
pub(super) async fn make_some(connection: &mut Object, now: Timestamp) -> Result<bool, Error> {
    const STATE: &str = "select digest_day, digest_device from roll_up_state";
    const NEXT: &str = r#"
        select max(device_id) collate "C", count(*)
          from (select device_id from devices where device_id > $1 order by device_id limit $2) next
    "#;
    const CHOSEN: &str = "
        select device_id, $1::date as day from devices where device_id > $2 and device_id <= $3
    ";
    const ADVANCE: &str = "update roll_up_state set digest_day = $1, digest_device = $2";
    if make_stale(connection).await? {
        return Ok(true);
    }
    let today = now.to_jiff().to_zoned(TimeZone::UTC).date();
    let is_done = |day: Option<Date>, device: Option<&String>| {
        // Around midnight, another node's clock may be a little ahead.
        day == Some(today) && device.is_none()
            || day.is_some() && day == today.checked_add(1.day()).ok()
    };
    let state = connection.query_one(STATE, &[]).await?;
    if is_done(state.try_get(0)?, state.try_get::<_, Option<String>>(1)?.as_ref()) {
        return Ok(false);
    }
    let transaction = connection.transaction().await?;
    if !aggregated_events::try_lock(&transaction).await? {
        return Ok(false);
    }
    aggregated_events::lock_state(&transaction).await?;
    let state = transaction.query_one(STATE, &[]).await?;
    let (day, device): (Option<Date>, Option<String>) = (state.try_get(0)?, state.try_get(1)?);
    if is_done(day, device.as_ref()) {
        return Ok(false);
    }
    let after = device.filter(|_| day == Some(today)).unwrap_or_default();
    let next = transaction.query_one(NEXT, &[&after, &DEVICES_AT_ONCE]).await?;
    let (last, devices): (Option<String>, i64) = (next.try_get(0)?, next.try_get(1)?);
    if let Some(last) = &last {
        let make = transaction.prepare_cached(&make(CHOSEN)).await?;
        transaction.execute(&make, &[&today, &after, last]).await?;
    }
    let more = devices == DEVICES_AT_ONCE;
    transaction.execute(ADVANCE, &[&today, &last.filter(|_| more)]).await?;
    transaction.commit().await?;
    Ok(more)
}

/// SQL for the devices whose digests are wrong or missing: device_id. Stale ones are not.
fn wrong() -> String {
    const MADE: &str = "(digest_device is null or device_id <= digest_device)";
    let digests = digests_of("select device_id, day from device_digest where not is_stale");
    format!(
        "select device_id
           from (
               select device_id, day, runs_30d, failed_30d, speed_7d from device_digest where not is_stale
               except
               {digests}
           ) differing
         union
         select device_id
           from device_digest, roll_up_state
          where not is_stale and (day > digest_day or day <> digest_day and {MADE})
         union
         select device_id
           from device_days, roll_up_state
          where day >= digest_day - 30 and day < digest_day and total_syncs > 0
            and {MADE} and device_id not in (select device_id from device_digest)"
    )
}

/// How many digests differ from what they are made from, or are missing.
pub(super) async fn differences(snapshot: &Transaction<'_>) -> Result<u64, Error> {
    let count = format!("select count(*) from ({}) wrong", wrong());
    snapshot.query_one(&count, &[]).await?.try_get::<_, i64>(0).map(i64::cast_unsigned)
}

/// Notes all wrong digests as stale, for [`make_stale`].
pub(super) async fn note_wrong(connection: &Object) -> Result<(), Error> {
    let note = format!(
        "insert into device_digest (device_id, day, runs_30d, failed_30d, speed_7d, is_stale)
         select device_id, digest_day, 0, 0, null::bigint, true
           from ({}) wrong, roll_up_state
          where digest_day is not null
          order by device_id
             on conflict (device_id) do update set day = excluded.day, is_stale = true",
        wrong()
    );
    connection.execute(&note, &[]).await.map(|_| ())
}
