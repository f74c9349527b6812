//! Jobs whose last event has a date that cannot be, because a clock was wrong when it came. Maintenance counts such a job
//! again without that event. `set_aside_until` says when the first event that does not count comes to count; the job is
//! then counted once more.

use pisync_core::Timestamp;
use rusqlite::{Transaction, TransactionBehavior, params};

use super::{apply::apply_journal, write_connection::WriteConnection};

/// Devices at a time: all of a device's events are read, while ingest waits.
const DEVICES: u32 = 4;

/// Of a job's events, when the first comes to count that are dated, or were received, after `?2`; null when there are none.
const SET_ASIDE_UNTIL: &str = "
    min(ifnull(min(timestamp) filter (where timestamp > ?2), min(created_at) filter (where created_at > ?2)),
        ifnull(min(created_at) filter (where created_at > ?2), min(timestamp) filter (where timestamp > ?2)))
";

/// Counts the jobs of some devices again, those after the device number `after`, when they show a date after `latest`,
/// or have events set aside that are dated before. Answers how many have changed, and after which device to go on.
pub(super) fn recount_some(
    writer: &mut WriteConnection,
    after: Option<i64>,
    latest: Timestamp,
) -> rusqlite::Result<(u64, Option<i64>)> {
    const FIND: &str = "
        select distinct device
          from device_jobs
         where device > ?1 and (max(last_sync, last_received) > ?2 or set_aside_until <= ?2)
         order by device
         limit ?3
    ";
    // Where all dates are wrong, they are all there is to show, until ingest brings the first that is right. Without
    // any right time of receipt, the last sync's own date is nearest to it.
    let recount = format!(
        "
        with dates as (
            select ifnull(job, '') as job,
                   max(timestamp) filter (where timestamp <= ?2) as last_sync,
                   max(timestamp) filter (where timestamp <= ?2 and total_errors <= 0) as last_success,
                   max(timestamp) filter (where timestamp <= ?2 and total_errors > 0) as last_failure,
                   max(created_at) filter (where created_at <= ?2) as last_received,
                   {SET_ASIDE_UNTIL} as set_aside_until
              from sync_events
             where device = ?1
             group by 1
        )
        update device_jobs
           set last_sync = ifnull(dates.last_sync, device_jobs.last_sync),
               last_success = dates.last_success,
               last_failure = dates.last_failure,
               last_received = coalesce(dates.last_received, dates.last_sync, device_jobs.last_received),
               set_aside_until = dates.set_aside_until,
               consecutive_failures = (
                   select count(*)
                     from sync_events event
                    where event.device = ?1 and ifnull(event.job, '') = dates.job
                      and event.total_errors > 0 and event.timestamp <= ?2
                      and (event.timestamp, event.id) > (
                              ifnull(dates.last_success, -9223372036854775808),
                              ifnull((
                                  select max(success.id)
                                    from sync_events success
                                   where success.device = ?1 and ifnull(success.job, '') = dates.job
                                     and success.total_errors <= 0
                                     and success.timestamp = dates.last_success
                              ), 0)
                          )
               )
          from dates
         where device_jobs.device = ?1 and device_jobs.job = dates.job
           and (max(device_jobs.last_sync, device_jobs.last_received) > ?2
                or device_jobs.set_aside_until <= ?2)
           and (device_jobs.last_sync, device_jobs.last_success, device_jobs.last_failure,
                device_jobs.last_received, device_jobs.set_aside_until)
               is not (ifnull(dates.last_sync, device_jobs.last_sync), dates.last_success,
                       dates.last_failure,
                       coalesce(dates.last_received, dates.last_sync, device_jobs.last_received),
                       dates.set_aside_until)
    "
    );
    apply_journal(writer)?;
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let latest = latest.as_millisecond();
    let devices: Vec<i64> = transaction
        .prepare_cached(FIND)?
        .query_map(params![after.unwrap_or(0), latest, DEVICES], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut recounted = 0;
    for device in &devices {
        recounted += transaction.prepare_cached(&recount)?.execute(params![device, latest])? as u64;
    }
    transaction.commit()?;
    let next = devices.last().copied().filter(|_| devices.len() == DEVICES as usize);
    Ok((recounted, next))
}

/// Notes when a device's jobs are to be counted again, which have just been counted with what is dated up to `latest`.
pub(super) fn note_set_aside(
    transaction: &Transaction<'_>,
    device: i64,
    latest: Timestamp,
) -> rusqlite::Result<()> {
    let note = format!(
        "
        with dates as (
            select ifnull(job, '') as job, {SET_ASIDE_UNTIL} as set_aside_until
              from sync_events
             where device = ?1
             group by 1
        )
        update device_jobs
           set set_aside_until = dates.set_aside_until
          from dates
         where device_jobs.device = ?1 and device_jobs.job = dates.job
           and dates.set_aside_until is not null
    "
    );
    transaction.prepare_cached(&note)?.execute(params![device, latest.as_millisecond()]).map(drop)
}
