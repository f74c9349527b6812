//! What a device did lately: its runs of the last 30 days, and the average speed of the last 7. A digest covers the whole
//! days before its `day`. Once a day all are made anew, some at a time. An event that comes late makes its device's digest
//! stale when it is aggregated; stale ones are made anew first.

use rusqlite::{Connection, Transaction, TransactionBehavior, params};

use super::write_connection::WriteConnection;
use crate::store::verify::DAY_MILLISECONDS;

/// Devices whose digests are made in one transaction.
const DEVICES_AT_ONCE: i64 = 500;

/// A statement that makes the digests of the devices that `chosen` selects, each for a day: device, day.
fn make(chosen: &str) -> String {
    let digests = digests_of(chosen);
    format!(
        "insert into device_digest (device, day, runs_30d, failed_30d, speed_7d, is_stale)
         select digests.*, 0 from ({digests}) digests where true
             on conflict (device) do update
            set day = excluded.day, runs_30d = excluded.runs_30d, failed_30d = excluded.failed_30d,
                speed_7d = excluded.speed_7d, is_stale = 0"
    )
}

/// SQL for the digests of chosen devices, in the order of the columns of the table.
fn digests_of(chosen: &str) -> String {
    const LENGTH: i64 = DAY_MILLISECONDS;
    let of_week =
        |column: &str| format!("sum(iif(days.day >= chosen.day - 7 * {LENGTH}, days.{column}, 0))");
    let (speeds, measured) = (of_week("speed_sum"), of_week("speed_count"));
    // The average is rounded; it is null when there is nothing to divide by.
    format!(
        "select chosen.device, chosen.day, ifnull(sum(days.total_syncs), 0),
                ifnull(sum(days.failed_syncs), 0), (2 * {speeds} + {measured}) / (2 * {measured})
           from ({chosen}) chosen
           left join device_days days
             on days.device = chosen.device
            and days.day >= chosen.day - 30 * {LENGTH} and days.day < chosen.day
          group by chosen.device"
    )
}

/// Notes the devices whose events behind the id `watermark`, up to `last`, came so late that their days are part of a
/// digest.
pub(super) fn note_late(
    transaction: &Transaction<'_>,
    watermark: i64,
    last: i64,
) -> rusqlite::Result<()> {
    // A digest that is not made anew yet may be some days old.
    const NOTE: &str = "
        insert into device_digest (device, day, runs_30d, failed_30d, speed_7d, is_stale)
        select distinct device, digest_day, 0, 0, null, 1
          from roll_up_state
          cross join sync_events not indexed
         where sync_events.id > ?1 and sync_events.id <= ?2
           and timestamp < digest_day and timestamp >= digest_day - 60 * 86400000
            on conflict (device) do update set is_stale = 1 where is_stale = 0
    ";
    transaction.prepare_cached(NOTE)?.execute([watermark, last]).map(|_| ())
}

/// Notes that a device's days have changed.
pub(super) fn note_stale(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    const NOTE: &str = "update device_digest set is_stale = 1 where device = ?1";
    transaction.prepare_cached(NOTE)?.execute([device]).map(|_| ())
}

/// Makes some of the digests that are stale. False when none are left.
pub(super) fn make_stale(writer: &mut WriteConnection) -> rusqlite::Result<bool> {
    const STALE: &str =
        "select device, day from device_digest where is_stale = 1 order by device limit ?1";
    const ANY: &str = "select exists (select 1 from device_digest where is_stale = 1)";
    let is_any = |connection: &Connection| -> rusqlite::Result<bool> {
        connection.prepare_cached(ANY)?.query_row([], |row| row.get(0))
    };
    if !is_any(&writer.connection)? {
        return Ok(false);
    }
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.prepare_cached(&make(STALE))?.execute([DEVICES_AT_ONCE])?;
    let more = is_any(&transaction)?;
    transaction.commit()?;
    Ok(more)
}

/// Makes some of the digests of the day that begins at `today`. False when all devices have theirs.
pub(super) fn make_some(writer: &mut WriteConnection, today: i64) -> rusqlite::Result<bool> {
    const STATE: &str = "select digest_day, digest_device from roll_up_state";
    const NEXT: &str = "
        select max(id), count(*)
          from (select id from devices where id > ?1 order by id limit ?2)
    ";
    const CHOSEN: &str = "select id as device, ?1 as day from devices where id > ?2 and id <= ?3";
    const ADVANCE: &str = "update roll_up_state set digest_day = ?1, digest_device = ?2";
    if make_stale(writer)? {
        return Ok(true);
    }
    let connection = &mut writer.connection;
    let (day, device): (Option<i64>, Option<i64>) =
        connection.query_row(STATE, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let is_of_today = day == Some(today);
    // Around midnight, another clock may have been a little ahead.
    if is_of_today && device.is_none() || day == Some(today + DAY_MILLISECONDS) {
        return Ok(false);
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let after = device.filter(|_| is_of_today).unwrap_or(0);
    let (last, devices): (Option<i64>, i64) = transaction
        .prepare_cached(NEXT)?
        .query_row([after, DEVICES_AT_ONCE], |row| Ok((row.get(0)?, row.get(1)?)))?;
    if let Some(last) = last {
        transaction.prepare_cached(&make(CHOSEN))?.execute([today, after, last])?;
    }
    let more = devices == DEVICES_AT_ONCE;
    transaction.execute(ADVANCE, params![today, last.filter(|_| more)])?;
    transaction.commit()?;
    Ok(more)
}

/// SQL for the devices whose digests are wrong or missing: device. Stale ones are not.
fn wrong() -> String {
    const MADE: &str = "device <= ifnull(digest_device, 9223372036854775807)";
    let digests = digests_of("select device, day from device_digest where is_stale = 0");
    format!(
        "select device
           from (
               select device, day, runs_30d, failed_30d, speed_7d from device_digest where is_stale = 0
               except
               select * from ({digests})
           )
         union
         select device
           from device_digest, roll_up_state
          where is_stale = 0 and (day > digest_day or day <> digest_day and {MADE})
         union
         select device
           from device_days, roll_up_state
          where day >= digest_day - 30 * {DAY_MILLISECONDS} and day < digest_day and total_syncs > 0
            and {MADE} and device not in (select device from device_digest)"
    )
}

/// How many digests differ from what they are made from, or are missing.
pub(super) fn differences(connection: &Connection) -> rusqlite::Result<u64> {
    let count = format!("select count(*) from ({})", wrong());
    connection.query_row(&count, [], |row| row.get::<_, i64>(0)).map(i64::cast_unsigned)
}

/// Notes all wrong digests as stale, for [`make_stale`].
pub(super) fn note_wrong(writer: &mut WriteConnection) -> rusqlite::Result<()> {
    let note = format!(
        "insert into device_digest (device, day, runs_30d, failed_30d, speed_7d, is_stale)
         select device, digest_day, 0, 0, null, 1 from ({}), roll_up_state where digest_day is not null
             on conflict (device) do update set day = excluded.day, is_stale = 1",
        wrong()
    );
    writer.connection.execute(&note, []).map(|_| ())
}
