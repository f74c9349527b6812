//! The queries behind the read methods. Each runs on one connection for reading, in one read
//! transaction where it asks more than once.

use pisync_core::{DeviceId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, named_params, params, types::Type};

use crate::store::{
    DEVICE_IDS, Device, DeviceQuery, DeviceWithJobs, FailureQuery, Figures, FleetStats, Page,
    like_pattern,
};

/// A device's columns, as [`device_row`] reads them, then its sums over `device_jobs j`.
pub(super) const DEVICE_COLUMNS: &str = r#"d.device_id, d.name, d."group", d.created_at"#;

/// What [`figures`] reads: a device's sums over its jobs, or nulls when it has none.
pub(super) const SUMS: &str = "
    sum(j.total_syncs), sum(j.failed_syncs), sum(j.total_files_synced), sum(j.total_errors),
    sum(j.speed_sum), sum(j.speed_count), min(j.first_sync), max(j.last_sync),
    max(j.last_success), max(j.last_failure), max(j.consecutive_failures), max(j.last_received)
";

pub(super) fn repeated_failures(
    connection: &Connection,
    query: &FailureQuery,
) -> rusqlite::Result<Page<Device>> {
    let measure =
        if query.consecutive { "max(j.consecutive_failures)" } else { "sum(j.failed_syncs)" };
    let select = format!(
        "select {DEVICE_COLUMNS}, {SUMS}
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

pub(super) fn fleet_stats(
    connection: &Connection,
    active_since: Timestamp,
) -> rusqlite::Result<FleetStats> {
    let select_sums = format!("select {SUMS} from device_jobs j");
    let select_recent = format!(
        "with recent as (
            select j.device, max(j.last_sync) as last_sync
              from device_jobs j
              join devices d on d.id = j.device
             group by j.device
             order by max(j.last_sync) desc, d.device_id
             limit 10
         )
         select {DEVICE_COLUMNS}, {SUMS}
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

pub(super) fn devices(
    connection: &Connection,
    query: &DeviceQuery,
) -> rusqlite::Result<Page<Device>> {
    const FILTER: &str = r#"
        (:search is null or d.device_id like :search escape '\' or d.name like :search escape '\')
        and (:group is null or d."group" = :group)
    "#;
    let direction = if query.descending { "desc" } else { "asc" };
    // Figures are summed for the whole fleet only when it is sorted by them, else for the page alone.
    let (key, join) = query.sort.expressions();
    let join = join.map_or_else(String::new, |expression| {
        format!(
            "left join (select device, {expression} as key from device_jobs group by device) f
                    on f.device = d.id"
        )
    });
    let select = format!(
        r#"with page as (
            select d.id, d.device_id, d.name, d."group", d.created_at, {key} as sort_key
              from devices d {join}
             where {FILTER}
             order by {key} {direction} nulls last, d.device_id
             limit :limit offset :offset
         )
         select {DEVICE_COLUMNS}, {SUMS}
           from page d
           left join device_jobs j on j.device = d.id
          group by d.id
          order by d.sort_key {direction} nulls last, d.device_id"#
    );
    let count = format!("select count(*) from devices d where {FILTER}");
    let search = query.search.as_deref().map(like_pattern);
    let snapshot = connection.unchecked_transaction()?;
    let items = snapshot
        .prepare_cached(&select)?
        .query_map(
            named_params! {
                ":search": search, ":group": query.group,
                ":limit": query.limit, ":offset": query.offset.cast_signed(),
            },
            device_row,
        )?
        .collect::<rusqlite::Result<_>>()?;
    let total: i64 = snapshot
        .prepare_cached(&count)?
        .query_row(named_params! { ":search": search, ":group": query.group }, |row| row.get(0))?;
    Ok(Page { items, total: total.cast_unsigned() })
}

pub(super) fn device(
    connection: &Connection,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<DeviceWithJobs>> {
    let select = format!(
        "select {DEVICE_COLUMNS}, {SUMS}
           from devices d
           left join device_jobs j on j.device = d.id
          where d.device_id = ?1
          group by d.id"
    );
    let snapshot = connection.unchecked_transaction()?;
    let device =
        snapshot.prepare_cached(&select)?.query_row([device_id.as_str()], device_row).optional()?;
    let (Some(device), Some(number)) = (device, device_number(&snapshot, device_id)?) else {
        return Ok(None);
    };
    Ok(Some(DeviceWithJobs { device, jobs: jobs(&snapshot, number)? }))
}

/// The number that stands for a device in the other tables.
/// One page of devices' ids, in byte-wise order.
pub(super) fn device_ids(
    connection: &Connection,
    group: Option<&str>,
    after: Option<&str>,
) -> rusqlite::Result<Vec<DeviceId>> {
    const DEVICE_IDS_AFTER: &str = r#"
        select device_id
          from devices
         where device_id > ifnull(:after, '') and (:group is null or "group" = :group)
         order by device_id
         limit :limit
    "#;
    let mut select = connection.prepare_cached(DEVICE_IDS_AFTER)?;
    let parameters = named_params! { ":after": after, ":group": group, ":limit": DEVICE_IDS };
    let rows = select.query_map(parameters, |row| row.get::<_, String>(0))?;
    // What foreign SQL has named so that nobody can ask for it has no history either.
    rows.filter_map(|id| id.map(|id| DeviceId::new(&id).ok()).transpose()).collect()
}

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
fn figures(row: &Row<'_>, first: usize) -> rusqlite::Result<Figures> {
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
