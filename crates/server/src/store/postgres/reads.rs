//! The queries behind the read methods. Statements are prepared once per connection.

use deadpool_postgres::GenericClient;
use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::{Error, IsolationLevel, Row};

use super::connect::Object;
use crate::store::{
    DEVICE_IDS, Device, DeviceQuery, DeviceWithJobs, FailureQuery, Figures, FleetStats, Page,
    like_pattern,
};

/// A device's columns, as [`device_row`] reads them, then its sums over `device_jobs j`.
pub(super) const DEVICE_COLUMNS: &str = r#"d.device_id, d.name, d."group", d.created_at"#;

/// What [`figures`] reads: a device's sums over its jobs, or nulls when it has none.
pub(super) const SUMS: &str = "
    sum(j.total_syncs)::bigint, sum(j.failed_syncs)::bigint, sum(j.total_files_synced)::bigint,
    sum(j.total_errors)::bigint, sum(j.speed_sum)::bigint, sum(j.speed_count)::bigint,
    min(j.first_sync), max(j.last_sync), max(j.last_success), max(j.last_failure),
    max(j.consecutive_failures), max(j.last_received)
";

/// A transaction that sees one moment throughout.
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

/// One page of devices' ids, in byte-wise order.
pub(super) async fn device_ids(
    connection: &Object,
    group: Option<&str>,
    after: Option<&str>,
) -> Result<Vec<DeviceId>, Error> {
    const DEVICE_IDS_AFTER: &str = r#"
        select device_id
          from devices
         where device_id > coalesce($1, '') and ($2::text is null or "group" = $2)
         order by device_id
         limit $3
    "#;
    let select = connection.prepare_cached(DEVICE_IDS_AFTER).await?;
    let rows = connection.query(&select, &[&after, &group, &i64::from(DEVICE_IDS)]).await?;
    // What foreign SQL has named so that nobody can ask for it has no history either.
    let device_id = |row: &Row| Ok(DeviceId::new(row.try_get(0)?).ok());
    rows.iter().filter_map(|row| device_id(row).transpose()).collect()
}

pub(super) async fn repeated_failures(
    connection: &mut Object,
    query: &FailureQuery,
) -> Result<Page<Device>, Error> {
    let measure = if query.consecutive {
        "max(j.consecutive_failures)"
    } else {
        "sum(j.failed_syncs)::bigint"
    };
    let select = format!(
        r#"select {DEVICE_COLUMNS}, {SUMS}
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

pub(super) async fn fleet_stats(
    connection: &mut Object,
    active_since: Timestamp,
) -> Result<FleetStats, Error> {
    const COUNT_DEVICES: &str = "
        select (select count(*) from devices),
               (select count(distinct device_id) from device_jobs where last_received >= $1)
    ";
    let select_sums = format!("select {SUMS} from device_jobs j");
    let select_recent = format!(
        r#"with recent as (
            select device_id, max(last_sync) as last_sync
              from device_jobs
             group by device_id
             order by last_sync desc, device_id
             limit 10
         )
         select {DEVICE_COLUMNS}, {SUMS}
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

pub(super) async fn devices(
    connection: &mut Object,
    query: &DeviceQuery,
) -> Result<Page<Device>, Error> {
    const FILTER: &str = r#"
        ($1::text is null or d.device_id ilike $1 or d.name ilike $1)
        and ($2::text is null or d."group" = $2)
    "#;
    let direction = if query.descending { "desc" } else { "asc" };
    // Figures are summed for the whole fleet only when it is sorted by them, else for the page alone.
    let (key, join) = query.sort.expressions();
    let join = join.map_or_else(String::new, |expression| {
        format!(
            "left join (select device_id, {expression} as key from device_jobs group by device_id) f
                 using (device_id)"
        )
    });
    let select = format!(
        r#"with page as (
            select d.device_id, d.name, d."group", d.created_at, {key} as sort_key
              from devices d {join}
             where {FILTER}
             order by {key} {direction} nulls last, d.device_id
             limit $3 offset $4
         )
         select {DEVICE_COLUMNS}, {SUMS}
           from page d
           left join device_jobs j using (device_id)
          group by d.device_id, d.name, d."group", d.created_at, d.sort_key
          order by d.sort_key {direction} nulls last, d.device_id"#
    );
    let count = format!("select count(*) from devices d where {FILTER}");
    let search = query.search.as_deref().map(like_pattern);
    let snapshot = snapshot(connection).await?;
    let select = snapshot.prepare_cached(&select).await?;
    let (limit, offset) = (i64::from(query.limit), query.offset.cast_signed());
    let rows = snapshot.query(&select, &[&search, &query.group, &limit, &offset]).await?;
    let count = snapshot.prepare_cached(&count).await?;
    let total: i64 = snapshot.query_one(&count, &[&search, &query.group]).await?.try_get(0)?;
    Ok(Page {
        items: rows.iter().map(device_row).collect::<Result<_, _>>()?,
        total: total.cast_unsigned(),
    })
}

pub(super) async fn device(
    connection: &mut Object,
    device_id: &DeviceId,
) -> Result<Option<DeviceWithJobs>, Error> {
    let select = format!(
        "select {DEVICE_COLUMNS}, {SUMS}
           from devices d
           left join device_jobs j using (device_id)
          where d.device_id = $1
          group by d.device_id"
    );
    let snapshot = snapshot(connection).await?;
    let select = snapshot.prepare_cached(&select).await?;
    let Some(row) = snapshot.query_opt(&select, &[&device_id.as_str()]).await? else {
        return Ok(None);
    };
    Ok(Some(DeviceWithJobs {
        device: device_row(&row)?,
        jobs: jobs(&snapshot, device_id.as_str()).await?,
    }))
}

/// Each job's name and figures.
pub(super) async fn jobs(
    client: &impl GenericClient,
    device_id: &str,
) -> Result<Vec<(Option<String>, Figures)>, Error> {
    let select = format!(
        "select nullif(j.job, ''), {SUMS} from device_jobs j where j.device_id = $1
          group by j.job order by j.job"
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

/// Reads [`SUMS`] from column `first` on.
pub(super) fn figures(row: &Row, first: usize) -> Result<Figures, Error> {
    let sum = |column: usize| -> Result<i64, Error> {
        Ok(row.try_get::<_, Option<i64>>(first + column)?.unwrap_or(0))
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

pub(super) fn optional_time(row: &Row, column: usize) -> Result<Option<Timestamp>, Error> {
    Ok(row.try_get::<_, Option<jiff::Timestamp>>(column)?.map(Timestamp::truncate))
}

pub(super) fn time(row: &Row, column: usize) -> Result<Timestamp, Error> {
    row.try_get(column).map(Timestamp::truncate)
}
