//! The rows of `device_jobs`: a job's figures, to which each batch adds what it has of the job. The write connection,
//! `verify` and nobody else changes them.

use pisync_core::{JobFigures, StreakCount, Timestamp};
use rusqlite::{CachedStatement, OptionalExtension, Row, Transaction, params};

use super::{
    connection::expect_row,
    rows::{optional_time, time},
};

/// The statements on `device_jobs`, looked up once per batch.
pub(super) struct JobStatements<'a> {
    select: CachedStatement<'a>,
    insert: CachedStatement<'a>,
    update: CachedStatement<'a>,
    count_unanswered_failures: CachedStatement<'a>,
}

impl<'a> JobStatements<'a> {
    pub(super) fn prepare(transaction: &'a Transaction<'_>) -> rusqlite::Result<Self> {
        const SELECT: &str = "
            select total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum, speed_count,
                   first_sync, last_sync, last_success, last_failure, consecutive_failures,
                   last_received
              from device_jobs
             where device = ?1 and job = ?2
        ";
        const INSERT: &str = "
            insert into device_jobs (
                device, job, total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum,
                speed_count, first_sync, last_sync, last_success, last_failure, consecutive_failures,
                last_received
            ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)
        ";
        const UPDATE: &str = "
            update device_jobs
               set total_syncs = ?3, failed_syncs = ?4, total_files_synced = ?5, total_errors = ?6,
                   speed_sum = ?7, speed_count = ?8, first_sync = ?9, last_sync = ?10,
                   last_success = ?11, last_failure = ?12, consecutive_failures = ?13,
                   last_received = ?14
             where device = ?1 and job = ?2
        ";
        const COUNT_UNANSWERED_FAILURES: &str = "
            select count(*)
              from sync_events
             where device = ?1 and ifnull(job, '') = ?2 and total_errors > 0
               and timestamp <= ?4
               and (timestamp, id) > (?3, ifnull((
                       select max(id)
                         from sync_events
                        where device = ?1 and ifnull(job, '') = ?2 and total_errors <= 0 and timestamp = ?3
                   ), 0))
        ";
        Ok(Self {
            select: transaction.prepare_cached(SELECT)?,
            insert: transaction.prepare_cached(INSERT)?,
            update: transaction.prepare_cached(UPDATE)?,
            count_unanswered_failures: transaction.prepare_cached(COUNT_UNANSWERED_FAILURES)?,
        })
    }

    /// Adds `new` to what is stored of a job, whose events are already inserted, and returns the sum.
    pub(super) fn add(
        &mut self,
        device: i64,
        job: &str,
        new: &JobFigures,
        streaks_since: Timestamp,
    ) -> rusqlite::Result<JobFigures> {
        let stored = self.select.query_row(params![device, job], job_figures).optional()?;
        let (figures, write) = match stored {
            None => (*new, &mut self.insert),
            Some(mut figures) => {
                if figures.add(new, streaks_since) == StreakCount::Recount {
                    let after = figures.last_success.map_or(i64::MIN, Timestamp::as_millisecond);
                    let until = figures.last_failure.map_or(i64::MIN, Timestamp::as_millisecond);
                    figures.consecutive_failures = self
                        .count_unanswered_failures
                        .query_row(params![device, job, after, until], |row| row.get(0))?;
                }
                (figures, &mut self.update)
            }
        };
        let written = write.execute(params![
            device,
            job,
            figures.total_syncs,
            figures.failed_syncs,
            figures.total_files_synced,
            figures.total_errors,
            figures.speed_sum,
            figures.speed_count,
            figures.first_sync.as_millisecond(),
            figures.last_sync.as_millisecond(),
            figures.last_success.map(Timestamp::as_millisecond),
            figures.last_failure.map(Timestamp::as_millisecond),
            figures.consecutive_failures,
            figures.last_received.as_millisecond(),
        ])?;
        expect_row("device_jobs", written)?;
        Ok(figures)
    }
}

pub(super) fn job_figures(row: &Row<'_>) -> rusqlite::Result<JobFigures> {
    Ok(JobFigures {
        total_syncs: row.get(0)?,
        failed_syncs: row.get(1)?,
        total_files_synced: row.get(2)?,
        total_errors: row.get(3)?,
        speed_sum: row.get(4)?,
        speed_count: row.get(5)?,
        first_sync: time(row, 6)?,
        last_sync: time(row, 7)?,
        last_success: optional_time(row, 8)?,
        last_failure: optional_time(row, 9)?,
        consecutive_failures: row.get(10)?,
        last_received: time(row, 11)?,
    })
}
