//! Converts rows of PostgreSQL's tables into devices, figures and times. All queries of the resources use it. It runs
//! only queries about one device.

use deadpool_postgres::GenericClient;
use pisync_core::Timestamp;
use tokio_postgres::{Error, IsolationLevel, Row};

use super::connect::Object;
use crate::store::{Device, Figures, Sums};

/// The columns of a device, as [`device_row`] reads them before [`job_sums`].
pub(super) const DEVICE_COLUMNS: &str = r#"d.device_id, d.name, d."group", d.created_at"#;

/// The columns that [`figures`] reads: a device's sums over its jobs `j`, or nulls when it has no jobs.
pub(super) fn job_sums() -> String {
    let sums = Sums::sql(|column| format!("sum(j.{column})::bigint"));
    format!(
        "{sums}, min(j.first_sync), max(j.last_sync), max(j.last_success), max(j.last_failure),
         max(j.consecutive_failures), max(j.last_received)"
    )
}

/// The number of columns that [`device_row`] reads: [`DEVICE_COLUMNS`] and [`job_sums`].
pub(super) const DEVICE_ROW: usize = 4 + Sums::COUNT + 6;

/// A transaction that sees a single moment.
pub(super) async fn snapshot(
    connection: &mut Object,
) -> Result<deadpool_postgres::Transaction<'_>, Error> {
    connection
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
}

/// Each job's name and figures.
pub(super) async fn jobs(
    client: &impl GenericClient,
    device_id: &str,
) -> Result<Vec<(Option<String>, Figures)>, Error> {
    let select = format!(
        "select nullif(j.job, ''), {} from device_jobs j where j.device_id = $1
          group by j.job order by j.job",
        job_sums()
    );
    let select = client.prepare_cached(&select).await?;
    let rows = client.query(&select, &[&device_id]).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, figures(row, 1)?))).collect()
}

pub(super) fn device_row(row: &Row) -> Result<Device, Error> {
    Ok(Device {
        device_id: row.try_get(0)?,
        name: row.try_get(1)?,
        group: row.try_get(2)?,
        created_at: time(row, 3)?,
        figures: figures(row, 4)?,
    })
}

/// Reads [`job_sums`] from column `first` on.
pub(super) fn figures(row: &Row, first: usize) -> Result<Figures, Error> {
    let number = |column: usize| -> Result<i64, Error> {
        Ok(row.try_get::<_, Option<i64>>(first + column)?.unwrap_or(0))
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

pub(super) fn optional_time(row: &Row, column: usize) -> Result<Option<Timestamp>, Error> {
    Ok(row.try_get::<_, Option<jiff::Timestamp>>(column)?.map(Timestamp::truncate))
}

pub(super) fn time(row: &Row, column: usize) -> Result<Timestamp, Error> {
    row.try_get(column).map(Timestamp::truncate)
}
