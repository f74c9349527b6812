//! Recounts jobs whose last event has an impossible date, because a clock was wrong when the event arrived.
//! `maintenance` calls it. Such a job is recounted without that event. `set_aside_until` tells when the first skipped
//! event begins to count; the job is then recounted once more. Nothing here changes an event.

use pisync_core::Timestamp;
use rusqlite::{Transaction, TransactionBehavior, params};

use super::{apply::apply_journal, summaries, write_connection::WriteConnection};

/// Devices in one step. All events of each device are read while ingest waits.
const DEVICES: u32 = 4;

/// SQL for the time when the first skipped event of a job begins to count. Events that are dated, or were received,
/// after `?2` are skipped. Null when there are none.
const SET_ASIDE_UNTIL: &str = "
    min(ifnull(min(timestamp) filter (where timestamp > ?2), min(created_at) filter (where created_at > ?2)),
        ifnull(min(created_at) filter (where created_at > ?2), min(timestamp) filter (where timestamp > ?2)))
";

/// Recounts jobs of some devices, those after the device number `after`. These are jobs that show a date after
/// `latest`, and jobs with skipped events whose date is no longer after it. Answers how many have changed, and after
/// which device to continue.
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
    // If all dates of a job are wrong, it shows them until ingest brings the first correct one. If no `received_at` is
    // correct, the date of the last sync is the best estimate.
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
        summaries::note_stale(&transaction, *device)?;
        recounted += transaction.prepare_cached(&recount)?.execute(params![device, latest])? as u64;
    }
    transaction.commit()?;
    let next = devices.last().copied().filter(|_| devices.len() == DEVICES as usize);
    Ok((recounted, next))
}

/// Notes when a device's jobs must be recounted. They were just recounted from the events dated up to `latest`.
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
