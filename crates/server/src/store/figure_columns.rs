//! The columns in which figures stand: how both stores select them, and in which order they are read. The stores pass in
//! how they cast a sum and how they read a cell. Nothing here runs a query.

use pisync_core::{JobFigures, Timestamp};

use super::{Figures, Sums};

/// The columns of `device_jobs` behind the sums.
pub(super) const TIMES_AND_STREAK: [&str; 6] = [
    "first_sync",
    "last_sync",
    "last_success",
    "last_failure",
    "consecutive_failures",
    "last_received",
];

/// The columns of a job's figures, as [`read_job`] reads them.
pub(super) fn job_columns() -> Vec<&'static str> {
    [&Sums::COLUMNS[..], &TIMES_AND_STREAK].concat()
}

/// The columns of a device, which stand before its figures.
pub(super) const DEVICE_COLUMNS: &str = r#"d.device_id, d.name, d."group", d.created_at"#;

/// The number of columns of figures.
pub(super) const FIGURES: usize = Sums::COUNT + TIMES_AND_STREAK.len();

/// A device's figures over its jobs `j`, as [`read`] reads them; nulls when it has no jobs. `sum` makes SQL that adds up a
/// column.
pub(super) fn over_jobs(sum: impl Fn(&str) -> String) -> String {
    let sums = Sums::sql(sum);
    format!(
        "{sums}, min(j.first_sync), max(j.last_sync), max(j.last_success), max(j.last_failure),
         max(j.consecutive_failures), max(j.last_received)"
    )
}

/// Reads figures, given functions that read the column with a number from 0 on. What is null is 0, or no time.
pub(super) fn read<E>(
    number: impl Fn(usize) -> Result<Option<i64>, E>,
    time: impl Fn(usize) -> Result<Option<Timestamp>, E>,
) -> Result<Figures, E> {
    let number = |column| Ok(number(column)?.unwrap_or(0));
    let after = Sums::COUNT;
    Ok(Figures {
        first_sync: time(after)?,
        last_sync: time(after + 1)?,
        last_success: time(after + 2)?,
        last_failure: time(after + 3)?,
        consecutive_failures: number(after + 4)?,
        last_seen: time(after + 5)?,
        ..Sums::read(number)?.into()
    })
}

/// Reads a job's figures, given functions that read the column with a number from 0 on: a number, a time, and a time that
/// may be null.
pub(super) fn read_job<E>(
    number: impl Fn(usize) -> Result<i64, E>,
    time: impl Fn(usize) -> Result<Timestamp, E>,
    optional_time: impl Fn(usize) -> Result<Option<Timestamp>, E>,
) -> Result<JobFigures, E> {
    let after = Sums::COUNT;
    let mut figures = JobFigures::none(time(after)?, time(after + 5)?);
    Sums::read(&number)?.put_into(&mut figures);
    figures.last_sync = time(after + 1)?;
    figures.last_success = optional_time(after + 2)?;
    figures.last_failure = optional_time(after + 3)?;
    figures.consecutive_failures = number(after + 4)?;
    Ok(figures)
}
