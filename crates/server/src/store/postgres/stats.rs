//! Statistics in PostgreSQL: sums over `device_jobs`, and over roll-ups within a window. The API calls it through
//! `StatsStore`. It changes nothing.

use async_trait::async_trait;
use pisync_core::Timestamp;
use tokio_postgres::Error;

use super::{
    connect::Object,
    roll_ups,
    rows::{device_row, figures, job_sums, snapshot},
    store::PostgresStore,
};
use crate::store::{
    Device, FailureQuery, Figures, FleetStats, Page, StatsStore, StoreError, Window,
    figure_columns::DEVICE_COLUMNS,
};

#[async_trait]
impl StatsStore for PostgresStore {
    async fn fleet_stats(&self, active_since: Timestamp) -> Result<FleetStats, StoreError> {
        self.call(async |connection| fleet_stats(connection, active_since).await).await
    }

    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError> {
        self.call_long(async |connection| roll_ups::window_figures(connection, window).await).await
    }

    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError> {
        self.call_long(async |connection| match &query.window {
            None => repeated_failures(connection, query).await,
            Some(window) => roll_ups::repeated_failures(connection, query, window).await,
        })
        .await
    }
}

async fn repeated_failures(
    connection: &mut Object,
    query: &FailureQuery,
) -> Result<Page<Device>, Error> {
    let measure = if query.consecutive {
        "max(j.consecutive_failures)"
    } else {
        "sum(j.failed_syncs)::bigint"
    };
    let sums = job_sums();
    let select = format!(
        r#"select {DEVICE_COLUMNS}, {sums}
             from device_jobs j
             join devices d using (device_id)
            group by d.device_id
           having {measure} >= $1
            order by {measure} desc, max(j.last_failure) desc nulls last, d.device_id
            limit $2 offset $3"#
    );
    let count = format!(
        "select count(*)
           from (select from device_jobs j group by j.device_id having {measure} >= $1) failing"
    );
    let snapshot = snapshot(connection).await?;
    let (threshold, limit) = (i64::from(query.threshold), query.limit.map(i64::from));
    let select = snapshot.prepare_cached(&select).await?;
    let rows = snapshot.query(&select, &[&threshold, &limit, &query.offset.cast_signed()]).await?;
    let count = snapshot.prepare_cached(&count).await?;
    let total: i64 = snapshot.query_one(&count, &[&threshold]).await?.try_get(0)?;
    Ok(Page {
        items: rows.iter().map(device_row).collect::<Result<_, _>>()?,
        total: total.cast_unsigned(),
    })
}

async fn fleet_stats(
    connection: &mut Object,
    active_since: Timestamp,
) -> Result<FleetStats, Error> {
    const COUNT_DEVICES: &str = "
        select (select count(*) from devices),
               (select count(distinct device_id) from device_jobs where last_received >= $1)
    ";
    let sums = job_sums();
    let select_sums = format!("select {sums} from device_jobs j");
    let select_recent = format!(
        r#"with recent as (
            select device_id, max(last_sync) as last_sync
              from device_jobs
             group by device_id
             order by last_sync desc, device_id
             limit 10
         )
         select {DEVICE_COLUMNS}, {sums}
           from recent
           join devices d using (device_id)
           join device_jobs j using (device_id)
          group by d.device_id, recent.last_sync
          order by recent.last_sync desc, d.device_id"#
    );
    let snapshot = snapshot(connection).await?;
    let counts = snapshot.prepare_cached(COUNT_DEVICES).await?;
    let counts = snapshot.query_one(&counts, &[&active_since.to_jiff()]).await?;
    let sums = snapshot.prepare_cached(&select_sums).await?;
    let sums = snapshot.query_one(&sums, &[]).await?;
    let recent = snapshot.prepare_cached(&select_recent).await?;
    let recent = snapshot.query(&recent, &[]).await?;
    Ok(FleetStats {
        total_devices: counts.try_get::<_, i64>(0)?.cast_unsigned(),
        active_devices: counts.try_get::<_, i64>(1)?.cast_unsigned(),
        figures: figures(&sums, 0)?,
        recent_devices: recent.iter().map(device_row).collect::<Result<_, _>>()?,
    })
}
