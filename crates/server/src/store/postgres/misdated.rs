//! Jobs whose last event has a date that cannot be, because a clock was wrong when it came. Maintenance counts such a job
//! again without that event. `set_aside_until` says when the first event that does not count comes to count; the job is
//! then counted once more.

use deadpool_postgres::Transaction;
use pisync_core::Timestamp;
use tokio_postgres::{Error, error::SqlState};

use super::{connect::Object, statements::unanswered_failures};

/// How often a device that met a deadlock is tried again.
const RETRIES: u32 = 5;

/// Of a job's events, when the first comes to count that are dated, or were received, after the parameter `latest`; null
/// when there are none.
fn set_aside_until(latest: &str) -> String {
    format!(
        "least(min(timestamp) filter (where timestamp > {latest}),
               min(created_at) filter (where created_at > {latest}))"
    )
}

/// Counts all jobs again that show a date after `latest`, or have events set aside that are dated before; answers how
/// many have changed.
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
    // Where all dates are wrong, they are all there is to show, until ingest brings the first that is right. Without
    // any right time of receipt, the last sync's own date is nearest to it.
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
    // A later statement sees what others had committed before we got the locks.
    let recounted = transaction.execute(&write, &[&device_id, &jobs, &latest]).await?;
    transaction.commit().await?;
    Ok(recounted)
}

/// Notes when a device's jobs are to be counted again, which have just been counted with what is dated up to `latest`.
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
