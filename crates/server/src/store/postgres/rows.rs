//! Converts rows of PostgreSQL's tables into devices, figures and times. All queries of the resources use it. It runs
//! only queries about one device.

use deadpool_postgres::GenericClient;
use pisync_core::Timestamp;
use tokio_postgres::{
    Error, IsolationLevel, Row,
    types::{FromSql, Type},
};

use super::connect::Object;
use crate::store::{Device, Figures, figure_columns};

/// The columns that [`figures`] reads: a device's sums over its jobs `j`, or nulls when it has no jobs.
pub(super) fn job_sums() -> String {
    figure_columns::over_jobs(|column| format!("sum(j.{column})::bigint"))
}

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

/// Reads `DEVICE_COLUMNS` and then [`job_sums`].
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
    figure_columns::read(
        |column| row.try_get(first + column),
        |column| optional_time(row, first + column),
    )
}

/// A time as PostgreSQL keeps it: microseconds since 2000. One that is beyond all years, such as `infinity`, is the first or the
/// last that there is: a row that cannot be read would stop whatever reads many.
struct StoredTime(Timestamp);

impl FromSql<'_> for StoredTime {
    fn from_sql(_: &Type, bytes: &[u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        /// 2000-01-01T00:00Z in milliseconds since 1970.
        const EPOCH: i64 = 946_684_800_000;
        let microsecond = i64::from_be_bytes(bytes.try_into()?);
        let millisecond = microsecond.div_euclid(1000).saturating_add(EPOCH);
        let limit = if microsecond < 0 { Timestamp::MIN } else { Timestamp::MAX };
        Ok(Self(Timestamp::from_millisecond(millisecond).unwrap_or(limit)))
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::TIMESTAMPTZ
    }
}

pub(super) fn optional_time(row: &Row, column: usize) -> Result<Option<Timestamp>, Error> {
    Ok(row.try_get::<_, Option<StoredTime>>(column)?.map(|stored| stored.0))
}

pub(super) fn time(row: &Row, column: usize) -> Result<Timestamp, Error> {
    row.try_get::<_, StoredTime>(column).map(|stored| stored.0)
}

/// A time as a parameter.
pub(super) fn instant(at: Option<Timestamp>) -> Option<jiff::Timestamp> {
    at.map(Timestamp::to_jiff)
}
