//! Statistics in SQLite: sums over `device_jobs`, and over roll-ups within a window. The API calls it through
//! `StatsStore`. It changes nothing.

use async_trait::async_trait;
use pisync_core::Timestamp;
use rusqlite::{Connection, params};

use super::{
    connection::Cost,
    roll_ups,
    rows::{device_row, figures, job_sums},
    store::SqliteStore,
};
use crate::store::{
    Device, FailureQuery, Figures, FleetStats, Page, StatsStore, StoreError, Window,
    figure_columns::DEVICE_COLUMNS,
};

#[async_trait]
impl StatsStore for SqliteStore {
    async fn fleet_stats(&self, active_since: Timestamp) -> Result<FleetStats, StoreError> {
        self.read_events(Cost::Short, move |connection| fleet_stats(connection, active_since)).await
    }

    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError> {
        let window = *window;
        self.read_events(Cost::Long, move |connection| {
            roll_ups::window_figures(connection, &window)
        })
        .await
    }

    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError> {
        let query = query.clone();
        self.read_events(Cost::Long, move |connection| match &query.window {
            None => repeated_failures(connection, &query),
            Some(window) => roll_ups::repeated_failures(connection, &query, window),
        })
        .await
    }
}

fn repeated_failures(
    connection: &Connection,
    query: &FailureQuery,
) -> rusqlite::Result<Page<Device>> {
    let measure =
        if query.consecutive { "max(j.consecutive_failures)" } else { "sum(j.failed_syncs)" };
    let sums = job_sums();
    let select = format!(
        "select {DEVICE_COLUMNS}, {sums}
           from device_jobs j
           join devices d on d.id = j.device
          group by j.device
         having {measure} >= ?1
          order by {measure} desc, max(j.last_failure) desc, d.device_id
          limit ?2 offset ?3"
    );
    let count = format!(
        "select count(*)
           from (select 1 from device_jobs j group by j.device having {measure} >= ?1)"
    );
    let snapshot = connection.unchecked_transaction()?;
    let limit = query.limit.map_or(-1, i64::from);
    let items = snapshot
        .prepare_cached(&select)?
        .query_map(params![query.threshold, limit, query.offset.cast_signed()], device_row)?
        .collect::<rusqlite::Result<_>>()?;
    let total: i64 =
        snapshot.prepare_cached(&count)?.query_row([query.threshold], |row| row.get(0))?;
    Ok(Page { items, total: total.cast_unsigned() })
}

fn fleet_stats(connection: &Connection, active_since: Timestamp) -> rusqlite::Result<FleetStats> {
    let sums = job_sums();
    let select_sums = format!("select {sums} from device_jobs j");
    let select_recent = format!(
        "with recent as (
            select j.device, max(j.last_sync) as last_sync
              from device_jobs j
              join devices d on d.id = j.device
             group by j.device
             order by max(j.last_sync) desc, d.device_id
             limit 10
         )
         select {DEVICE_COLUMNS}, {sums}
           from recent
           join devices d on d.id = recent.device
           join device_jobs j on j.device = recent.device
          group by recent.device
          order by recent.last_sync desc, d.device_id"
    );
    const COUNT_DEVICES: &str = "select count(*) from devices";
    const COUNT_ACTIVE: &str =
        "select count(distinct device) from device_jobs where last_received >= ?1";
    let snapshot = connection.unchecked_transaction()?;
    let count = |sql: &str, parameters: &[&dyn rusqlite::ToSql]| -> rusqlite::Result<u64> {
        let count: i64 = snapshot.prepare_cached(sql)?.query_row(parameters, |row| row.get(0))?;
        Ok(count.cast_unsigned())
    };
    Ok(FleetStats {
        total_devices: count(COUNT_DEVICES, &[])?,
        active_devices: count(COUNT_ACTIVE, &[&active_since.as_millisecond()])?,
        figures: snapshot.prepare_cached(&select_sums)?.query_row([], |row| figures(row, 0))?,
        recent_devices: snapshot
            .prepare_cached(&select_recent)?
            .query_map([], device_row)?
            .collect::<rusqlite::Result<_>>()?,
    })
}
