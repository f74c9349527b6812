//! The queries behind the read methods. Each runs on one connection for reading, in one read
//! transaction where it asks more than once.

use pisync_core::{DeviceId, JobName, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, named_params, params, types::Type};

use crate::store::{
    Device, DeviceQuery, DeviceWithJobs, FailureQuery, Figures, FleetStats, HistoryQuery, Page,
    StoredEvent, SyncHistory, like_pattern, stored_metadata,
};

/// A device's columns, as [`device_row`] reads them, then its sums over `device_jobs j`.
const DEVICE_COLUMNS: &str = r#"d.device_id, d.name, d."group", d.created_at"#;

/// What [`figures`] reads: a device's sums over its jobs, or nulls when it has none.
const SUMS: &str = "
    sum(j.total_syncs), sum(j.failed_syncs), sum(j.total_files_synced), sum(j.total_errors),
    sum(j.speed_sum), sum(j.speed_count), min(j.first_sync), max(j.last_sync),
    max(j.last_success), max(j.last_failure), max(j.consecutive_failures), max(j.last_received)
";

/// What [`stored_event`] reads.
pub(super) const EVENT_COLUMNS: &str = "
    id, timestamp, total_files_synced, total_errors, internet_speed, job, duration, bytes_synced,
    metadata, created_at, event_id
";

pub(super) fn sync_history(
    connection: &Connection,
    query: &HistoryQuery,
) -> rusqlite::Result<Option<SyncHistory>> {
    let select_events = format!(
        "select {EVENT_COLUMNS}
           from sync_events
          where device = :device
            and timestamp between :from and :until
            and (:job is null or job = :job)
          order by timestamp desc, id desc
          limit :limit offset :offset"
    );
    const COUNT_EVENTS: &str = "
        select count(*)
          from sync_events
         where device = :device
           and timestamp between :from and :until
           and (:job is null or job = :job)
    ";
    let snapshot = connection.unchecked_transaction()?;
    let Some(device) = device_number(&snapshot, &query.device_id)? else {
        return Ok(None);
    };
    let jobs = jobs(&snapshot, device)?;
    let job = query.job.as_ref().map(JobName::as_str);
    let from = query.from.unwrap_or(Timestamp::MIN).as_millisecond();
    let until = query.until.unwrap_or(Timestamp::MAX).as_millisecond();

    let events = snapshot
        .prepare_cached(&select_events)?
        .query_map(
            named_params! {
                ":device": device, ":from": from, ":until": until, ":job": job,
                ":limit": query.limit, ":offset": query.offset.cast_signed(),
            },
            stored_event,
        )?
        .collect::<rusqlite::Result<_>>()?;

    let total_events = if query.from.is_none() && query.until.is_none() {
        // Known without counting rows, so that a long history costs no more than a short one.
        jobs.iter()
            .filter(|(name, _)| job.is_none() || name.as_deref() == job)
            .map(|(_, figures)| figures.total_syncs)
            .sum::<i64>()
    } else {
        snapshot.prepare_cached(COUNT_EVENTS)?.query_row(
            named_params! { ":device": device, ":from": from, ":until": until, ":job": job },
            |row| row.get(0),
        )?
    };
    Ok(Some(SyncHistory {
        figures: figures_of_device(&snapshot, device)?,
        events,
        total_events: total_events.cast_unsigned(),
    }))
}

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
pub(super) fn device_number(
    connection: &Connection,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("select id from devices where device_id = ?1")?
        .query_row([device_id.as_str()], |row| row.get(0))
        .optional()
}

fn figures_of_device(connection: &Connection, device: i64) -> rusqlite::Result<Figures> {
    let select = format!("select {SUMS} from device_jobs j where j.device = ?1");
    connection.prepare_cached(&select)?.query_row([device], |row| figures(row, 0))
}

/// Each job's name and figures.
fn jobs(connection: &Connection, device: i64) -> rusqlite::Result<Vec<(Option<String>, Figures)>> {
    let select = format!(
        "select nullif(j.job, ''), {SUMS} from device_jobs j where j.device = ?1
          group by j.job order by j.job"
    );
    connection
        .prepare_cached(&select)?
        .query_map([device], |row| Ok((row.get(0)?, figures(row, 1)?)))?
        .collect()
}

fn device_row(row: &Row<'_>) -> rusqlite::Result<Device> {
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

pub(super) fn stored_event(row: &Row<'_>) -> rusqlite::Result<StoredEvent> {
    let created_at = time(row, 9)?;
    Ok(StoredEvent {
        id: row.get(0)?,
        timestamp: time(row, 1)?,
        total_files_synced: row.get(2)?,
        total_errors: row.get(3)?,
        internet_speed: row.get(4)?,
        job: row.get(5)?,
        duration: row.get(6)?,
        bytes_synced: row.get(7)?,
        metadata: row.get::<_, Option<String>>(8)?.and_then(stored_metadata),
        created_at,
        updated_at: created_at,
        event_id: row.get(10)?,
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
