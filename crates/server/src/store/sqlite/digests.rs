//! What a device did lately: its runs of the last 30 days, and the average speed of the last 7. A digest covers the whole
//! days before its `day`. Once a day all are made anew, some at a time. An event that comes late changes its device's
//! digest when it is aggregated.

use rusqlite::{Connection, Transaction, TransactionBehavior, params};

use crate::store::verify::DAY_MILLISECONDS;

/// Devices whose digests are made in one transaction.
const DEVICES_AT_ONCE: i64 = 500;

/// A statement that makes the digests of the devices that `chosen` selects, each for a day: device, day.
fn make(chosen: &str) -> String {
    let digests = digests_of(chosen);
    format!(
        "insert into device_digest (device, day, runs_30d, failed_30d, speed_7d)
         select * from ({digests}) where true
             on conflict (device) do update
            set day = excluded.day, runs_30d = excluded.runs_30d, failed_30d = excluded.failed_30d,
                speed_7d = excluded.speed_7d"
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

/// Makes the digests of the devices anew whose events behind the id `watermark`, up to `last`, came so late that their
/// days are part of a digest.
pub(super) fn count_late(
    transaction: &Transaction<'_>,
    watermark: i64,
    last: i64,
) -> rusqlite::Result<()> {
    const LATE: &str = "
        select late.device, ifnull(digest.day, late.digest_day) as day
          from (
              select distinct device, digest_day
                from roll_up_state
                cross join sync_events not indexed
               where sync_events.id > ?1 and sync_events.id <= ?2 and timestamp < digest_day
          ) late
          left join device_digest digest on digest.device = late.device
    ";
    transaction.prepare_cached(&make(LATE))?.execute([watermark, last]).map(|_| ())
}

/// Makes a device's digest anew, if it has one, because its days have changed.
pub(super) fn count_again(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    const ONE: &str = "select device, day from device_digest where device = ?1";
    transaction.prepare_cached(&make(ONE))?.execute([device]).map(|_| ())
}

/// Makes some of the digests of the day that begins at `today`. False when all devices have theirs.
pub(super) fn make_some(connection: &mut Connection, today: i64) -> rusqlite::Result<bool> {
    const STATE: &str = "select digest_day, digest_device from roll_up_state";
    const NEXT: &str = "
        select max(id), count(*)
          from (select id from devices where id > ?1 order by id limit ?2)
    ";
    const CHOSEN: &str = "select id as device, ?1 as day from devices where id > ?2 and id <= ?3";
    const ADVANCE: &str = "update roll_up_state set digest_day = ?1, digest_device = ?2";
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

/// How many digests differ from what they are made from.
pub(super) fn differences(connection: &Connection) -> rusqlite::Result<u64> {
    let digests = digests_of("select device, day from device_digest");
    let wrong = format!(
        "select count(*) from (
             select device, day, runs_30d, failed_30d, speed_7d from device_digest
             except
             select * from ({digests})
         )"
    );
    connection.query_row(&wrong, [], |row| row.get::<_, i64>(0)).map(i64::cast_unsigned)
}

/// Makes all digests anew that there are.
pub(super) fn rebuild(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute(&make("select device, day from device_digest"), []).map(|_| ())
}
