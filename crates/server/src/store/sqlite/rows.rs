//! Converts rows of SQLite's tables into devices, figures and times. All queries of the resources use it. It runs only
//! queries that look up one device's rows.

use pisync_core::{DeviceId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, types::Type};

use crate::store::{Device, Figures, figure_columns};

/// The columns that [`figures`] reads: a device's sums over its jobs `j`, or nulls when it has no jobs.
pub(super) fn job_sums() -> String {
    figure_columns::over_jobs(|column| format!("sum(j.{column})"))
}

/// The number of a device, which stands for it in the other tables.
pub(super) fn device_number(
    connection: &Connection,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("select id from devices where device_id = ?1")?
        .query_row([device_id.as_str()], |row| row.get(0))
        .optional()
}

pub(super) fn figures_of_device(connection: &Connection, device: i64) -> rusqlite::Result<Figures> {
    let select = format!("select {} from device_jobs j where j.device = ?1", job_sums());
    connection.prepare_cached(&select)?.query_row([device], |row| figures(row, 0))
}

/// Each job's name and figures.
pub(super) fn jobs(
    connection: &Connection,
    device: i64,
) -> rusqlite::Result<Vec<(Option<String>, Figures)>> {
    let select = format!(
        "select nullif(j.job, ''), {} from device_jobs j where j.device = ?1
          group by j.job order by j.job",
        job_sums()
    );
    connection
        .prepare_cached(&select)?
        .query_map([device], |row| Ok((row.get(0)?, figures(row, 1)?)))?
        .collect()
}

/// Reads `DEVICE_COLUMNS` and then [`job_sums`].
pub(super) fn device_row(row: &Row<'_>) -> rusqlite::Result<Device> {
    Ok(Device {
        device_id: row.get(0)?,
        name: row.get(1)?,
        group: row.get(2)?,
        created_at: time(row, 3)?,
        figures: figures(row, 4)?,
    })
}

/// Reads [`job_sums`] from column `first` on.
pub(super) fn figures(row: &Row<'_>, first: usize) -> rusqlite::Result<Figures> {
    figure_columns::read(
        |column| row.get(first + column),
        |column| optional_time(row, first + column),
    )
}

/// A time. One that foreign SQL has put beyond all years is the first or the last that there is: a row that cannot be read
/// would stop whatever reads many.
pub(super) fn optional_time(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Timestamp>> {
    let millisecond: Option<i64> = row.get(column)?;
    Ok(millisecond.map(|millisecond| {
        let limit = if millisecond < 0 { Timestamp::MIN } else { Timestamp::MAX };
        Timestamp::from_millisecond(millisecond).unwrap_or(limit)
    }))
}

pub(super) fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<Timestamp> {
    optional_time(row, column)?
        .ok_or_else(|| rusqlite::Error::InvalidColumnType(column, "a time".to_owned(), Type::Null))
}
