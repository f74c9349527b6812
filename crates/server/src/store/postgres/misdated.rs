//! Recounts jobs whose last event has an impossible date, because a clock was wrong when the event arrived.
//! `maintenance` calls it. Such a job is recounted without that event. `set_aside_until` tells when the first skipped
//! event begins to count; the job is then recounted once more. Nothing here changes an event.

use deadpool_postgres::Transaction;
use pisync_core::Timestamp;
use tokio_postgres::{Error, error::SqlState};

use super::{connect::Object, statements::unanswered_failures, summaries};

/// How many times a device is retried after a deadlock.
const RETRIES: u32 = 5;

/// SQL for the time when the first skipped event of a job begins to count. Events that are dated, or were received,
/// after the parameter `latest` are skipped. Null when there are none.
fn set_aside_until(latest: &str) -> String {
    format!(
        "least(min(timestamp) filter (where timestamp > {latest}),
               min(created_at) filter (where created_at > {latest}))"
    )
}

/// Recounts all jobs that show a date after `latest`, and all jobs with skipped events whose date is no longer after
/// it. Answers how many jobs have changed.
pub(super) async fn recount(connection: &mut Object, latest: Timestamp) -> Result<u64, Error> {
    const FIND: &str = "
        select distinct device_id
          from device_jobs
         where greatest(last_sync, last_received) > $1 or set_aside_until <= $1
         order by device_id
    ";
    let mut recounted = 0;
    for row in connection.query(FIND, &[&latest.to_jiff()]).await? {
        let device_id: &str = row.try_get(0)?;
        let mut attempt = 0;
        recounted += loop {
            match recount_device(connection, device_id, latest).await {
                Err(error)
                    if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED)
                        && attempt < RETRIES =>
                {
                    attempt += 1;
                }
                result => break result?,
            }
        };
    }
    Ok(recounted)
}

async fn recount_device(
    connection: &mut Object,
    device_id: &str,
    latest: Timestamp,
) -> Result<u64, Error> {
    const LOCK_JOBS: &str = "
        select job
          from device_jobs
         where device_id = $1 and (greatest(last_sync, last_received) > $2 or set_aside_until <= $2)
         order by job
           for update
    ";
    // If all dates of a job are wrong, it shows them until ingest brings the first correct one. If no `received_at` is
    // correct, the date of the last sync is the best estimate.
    let write = format!(
        "update device_jobs stored
            set last_sync = coalesce(dated.last_sync, stored.last_sync),
                last_success = dated.last_success,
                last_failure = dated.last_failure,
                last_received = coalesce(dated.last_received, dated.last_sync, stored.last_received),
                set_aside_until = dated.set_aside_until,
                consecutive_failures = ({})
           from (
                    select device_id, coalesce(job, '') as job,
                           max(timestamp) filter (where timestamp <= $3) as last_sync,
                           max(timestamp) filter (where timestamp <= $3 and total_errors <= 0) as last_success,
                           max(timestamp) filter (where timestamp <= $3 and total_errors > 0) as last_failure,
                           max(created_at) filter (where created_at <= $3) as last_received,
                           {} as set_aside_until
                      from sync_events
                     where device_id = $1
                     group by device_id, coalesce(job, '')
                ) dated
          where stored.device_id = $1 and stored.job = any($2::text[]) and stored.job = dated.job
            and (stored.last_sync, stored.last_success, stored.last_failure, stored.last_received,
                 stored.set_aside_until)
                is distinct from
                (coalesce(dated.last_sync, stored.last_sync), dated.last_success, dated.last_failure,
                 coalesce(dated.last_received, dated.last_sync, stored.last_received),
                 dated.set_aside_until)",
        unanswered_failures("dated"),
        set_aside_until("$3")
    );
    let transaction = connection.transaction().await?;
    let latest = latest.to_jiff();
    let locked = transaction.query(LOCK_JOBS, &[&device_id, &latest]).await?;
    let jobs: Vec<&str> = locked.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    // A later statement sees what others committed before we got the locks.
    let recounted = transaction.execute(&write, &[&device_id, &jobs, &latest]).await?;
    summaries::note_stale(&transaction, device_id).await?;
    transaction.commit().await?;
    Ok(recounted)
}

/// Notes when a device's jobs must be recounted. They were just recounted from the events dated up to `latest`.
pub(super) async fn note_set_aside(
    transaction: &Transaction<'_>,
    device_id: &str,
    latest: jiff::Timestamp,
) -> Result<(), Error> {
    let note = format!(
        "update device_jobs stored
           set set_aside_until = dated.set_aside_until
          from (
                   select coalesce(job, '') as job, {} as set_aside_until
                     from sync_events
                    where device_id = $1
                    group by coalesce(job, '')
               ) dated
         where stored.device_id = $1 and stored.job = dated.job
           and stored.set_aside_until is distinct from dated.set_aside_until",
        set_aside_until("$2")
    );
    transaction.execute(&note, &[&device_id, &latest]).await.map(|_| ())
}
