//! The rows of `device_jobs`: the figures of a job, to which each batch adds its deltas. The write connection and
//! `verify` call it. Nothing else may change these rows.

use std::sync::LazyLock;

use pisync_core::{JobFigures, StreakCount, Timestamp};
use rusqlite::{CachedStatement, OptionalExtension, Row, Transaction, params};

use super::{
    connection::expect_row,
    rows::{optional_time, time},
};
use crate::store::{
    Sums,
    figure_columns::{job_columns, read_job},
};

/// A job's figures, as [`job_figures`] reads them.
pub(super) static JOB_COLUMNS: LazyLock<String> = LazyLock::new(|| job_columns().join(", "));

static SELECT: LazyLock<String> = LazyLock::new(|| {
    format!("select {} from device_jobs where device = ?1 and job = ?2", *JOB_COLUMNS)
});

static INSERT: LazyLock<String> = LazyLock::new(|| {
    let numbers: Vec<_> =
        (0..job_columns().len()).map(|position| format!("?{}", FIRST_FIGURE + position)).collect();
    format!(
        "insert into device_jobs (device, job, {}) values (?1, ?2, {})",
        *JOB_COLUMNS,
        numbers.join(", ")
    )
});

static UPDATE: LazyLock<String> = LazyLock::new(|| {
    let set: Vec<_> = job_columns()
        .iter()
        .enumerate()
        .map(|(position, column)| format!("{column} = ?{}", FIRST_FIGURE + position))
        .collect();
    format!("update device_jobs set {} where device = ?1 and job = ?2", set.join(", "))
});

/// The number of the first figure among the parameters of [`INSERT`] and [`UPDATE`], behind the device and the job.
const FIRST_FIGURE: usize = 3;

/// The statements on `device_jobs`, prepared once per batch.
pub(super) struct JobStatements<'a> {
    select: CachedStatement<'a>,
    insert: CachedStatement<'a>,
    update: CachedStatement<'a>,
    count_unanswered_failures: CachedStatement<'a>,
}

impl<'a> JobStatements<'a> {
    pub(super) fn prepare(transaction: &'a Transaction<'_>) -> rusqlite::Result<Self> {
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
            select: transaction.prepare_cached(&SELECT)?,
            insert: transaction.prepare_cached(&INSERT)?,
            update: transaction.prepare_cached(&UPDATE)?,
            count_unanswered_failures: transaction.prepare_cached(COUNT_UNANSWERED_FAILURES)?,
        })
    }

    /// Adds `new` to the stored figures of a job and answers the sum. The job's events are already inserted.
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
        write.raw_bind_parameter(1, device)?;
        write.raw_bind_parameter(2, job)?;
        let sums = Sums::of(&figures).values();
        for (position, sum) in sums.into_iter().enumerate() {
            write.raw_bind_parameter(FIRST_FIGURE + position, sum)?;
        }
        let after = FIRST_FIGURE + Sums::COUNT;
        let others = [
            Some(figures.first_sync.as_millisecond()),
            Some(figures.last_sync.as_millisecond()),
            figures.last_success.map(Timestamp::as_millisecond),
            figures.last_failure.map(Timestamp::as_millisecond),
            Some(figures.consecutive_failures),
            Some(figures.last_received.as_millisecond()),
        ];
        for (position, other) in others.into_iter().enumerate() {
            write.raw_bind_parameter(after + position, other)?;
        }
        let written = write.raw_execute()?;
        expect_row("device_jobs", written)?;
        Ok(figures)
    }
}

/// Reads a row that begins with [`JOB_COLUMNS`].
pub(super) fn job_figures(row: &Row<'_>) -> rusqlite::Result<JobFigures> {
    read_job(
        |column| row.get(column),
        |column| time(row, column),
        |column| optional_time(row, column),
    )
}
