//! Converts rows of SQLite's tables into devices, figures and times. All queries of the resources use it. It runs only
//! queries that look up one device's rows.

use pisync_core::{DeviceId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, types::Type};

use crate::store::{Device, Figures, Sums};

/// The columns of a device, as [`device_row`] reads them before [`job_sums`].
pub(super) const DEVICE_COLUMNS: &str = r#"d.device_id, d.name, d."group", d.created_at"#;

/// The columns that [`figures`] reads: a device's sums over its jobs `j`, or nulls when it has no jobs.
pub(super) fn job_sums() -> String {
    let sums = Sums::sql(|column| format!("sum(j.{column})"));
    format!(
        "{sums}, min(j.first_sync), max(j.last_sync), max(j.last_success), max(j.last_failure),
         max(j.consecutive_failures), max(j.last_received)"
    )
}

/// The number of columns that [`device_row`] reads: [`DEVICE_COLUMNS`] and [`job_sums`].
pub(super) const DEVICE_ROW: usize = 4 + Sums::COUNT + 6;

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
    let number = |column: usize| -> rusqlite::Result<i64> {
        Ok(row.get::<_, Option<i64>>(first + column)?.unwrap_or(0))
    };
    let after = first + Sums::COUNT;
    Ok(Figures {
        first_sync: optional_time(row, after)?,
        last_sync: optional_time(row, after + 1)?,
        last_success: optional_time(row, after + 2)?,
        last_failure: optional_time(row, after + 3)?,
        consecutive_failures: number(Sums::COUNT + 4)?,
        last_seen: optional_time(row, after + 5)?,
        ..Sums::read(number)?.into()
    })
}

pub(super) fn optional_time(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Timestamp>> {
    let Some(millisecond) = row.get::<_, Option<i64>>(column)? else {
        return Ok(None);
    };
    Timestamp::from_millisecond(millisecond)
        .map(Some)
        .ok_or(rusqlite::Error::IntegralValueOutOfRange(column, millisecond))
}

pub(super) fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<Timestamp> {
    optional_time(row, column)?
        .ok_or_else(|| rusqlite::Error::InvalidColumnType(column, "a time".to_owned(), Type::Null))
}
