//! How rows of SQLite's tables become devices, figures and times. All queries of the resources use it.

use pisync_core::{DeviceId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, types::Type};

use crate::store::{Device, Figures};

/// A device's columns, as [`device_row`] reads them, then its sums over `device_jobs j`.
pub(super) const DEVICE_COLUMNS: &str = r#"d.device_id, d.name, d."group", d.created_at"#;

/// What [`figures`] reads: a device's sums over its jobs, or nulls when it has none.
pub(super) const SUMS: &str = "
    sum(j.total_syncs), sum(j.failed_syncs), sum(j.total_files_synced), sum(j.total_errors),
    sum(j.speed_sum), sum(j.speed_count), min(j.first_sync), max(j.last_sync),
    max(j.last_success), max(j.last_failure), max(j.consecutive_failures), max(j.last_received)
";

/// The number that stands for a device in the other tables.
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
    let select = format!("select {SUMS} from device_jobs j where j.device = ?1");
    connection.prepare_cached(&select)?.query_row([device], |row| figures(row, 0))
}

/// Each job's name and figures.
pub(super) fn jobs(
    connection: &Connection,
    device: i64,
) -> rusqlite::Result<Vec<(Option<String>, Figures)>> {
    let select = format!(
        "select nullif(j.job, ''), {SUMS} from device_jobs j where j.device = ?1
          group by j.job order by j.job"
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

/// Reads [`SUMS`] from column `first` on.
pub(super) fn figures(row: &Row<'_>, first: usize) -> rusqlite::Result<Figures> {
    let sum = |column: usize| -> rusqlite::Result<i64> {
        Ok(row.get::<_, Option<i64>>(first + column)?.unwrap_or(0))
    };
    Ok(Figures {
        total_syncs: sum(0)?,
        failed_syncs: sum(1)?,
        total_files_synced: sum(2)?,
        total_errors: sum(3)?,
        speed_sum: sum(4)?,
        speed_count: sum(5)?,
        first_sync: optional_time(row, first + 6)?,
        last_sync: optional_time(row, first + 7)?,
        last_success: optional_time(row, first + 8)?,
        last_failure: optional_time(row, first + 9)?,
        consecutive_failures: sum(10)?,
        last_seen: optional_time(row, first + 11)?,
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
