//! Reads from SQLite what the API shows of the fleet, its groups, and its devices. The API calls it through `FleetViews`.

use std::collections::HashMap;

use async_trait::async_trait;
use pisync_core::{
    DeviceId, GroupName,
    health::{Levels, State},
};
use rusqlite::{Connection, OptionalExtension, Row, named_params};

use super::{
    fleet_changes::{SETTINGS, SETTINGS_COLUMNS, device_settings},
    fleet_settings::{level, windows},
    rows::{device_number, optional_time, time},
    store::SqliteStore,
};
use crate::store::{
    Count, DeviceView, FleetView, FleetViews, FleetWindow, GroupQuery, GroupView, HealthView,
    JobView, LevelSettings, OutageView, Page, Pauses, StateCounts, StoreError,
    devices::like_pattern,
    fleet_views::{DeviceDetailView, SHOWN_OUTAGES},
};

#[async_trait]
impl FleetViews for SqliteStore {
    async fn device_views(
        &self,
        device_ids: &[String],
    ) -> Result<HashMap<String, DeviceView>, StoreError> {
        let device_ids = device_ids.to_vec();
        self.read(move |connection| device_views(connection, &device_ids)).await
    }

    async fn device_detail(
        &self,
        device_id: &DeviceId,
    ) -> Result<Option<DeviceDetailView>, StoreError> {
        let device_id = device_id.clone();
        self.read(move |connection| device_detail(connection, &device_id)).await
    }

    async fn groups(&self, query: &GroupQuery) -> Result<Page<GroupView>, StoreError> {
        let query = query.clone();
        self.read(move |connection| groups(connection, &query)).await
    }

    async fn group(&self, name: &GroupName) -> Result<Option<GroupView>, StoreError> {
        let name = name.clone();
        self.read(move |connection| {
            let source = r#"
                select :name as name
                 where exists (select 1 from groups where name = :name)
                    or exists (select 1 from devices where "group" = :name)
            "#;
            let select = select_groups(source, OF_GROUP);
            let mut select = connection.prepare_cached(&select)?;
            select.query_row(named_params! { ":name": name.as_str() }, group_row).optional()
        })
        .await
    }

    async fn ungrouped(&self) -> Result<GroupView, StoreError> {
        self.read(|connection| {
            let select = select_groups("select '' as name", OF_NO_GROUP);
            connection.prepare_cached(&select)?.query_row([], group_row)
        })
        .await
    }

    async fn fleet(&self) -> Result<FleetView, StoreError> {
        self.read(|connection| fleet(&*connection.unchecked_transaction()?)).await
    }

    async fn windows(&self) -> Result<Vec<FleetWindow>, StoreError> {
        self.read(windows).await
    }
}

fn device_view(row: &Row<'_>, first: usize) -> rusqlite::Result<DeviceView> {
    let health = first + SETTINGS;
    let (state, problems): (Option<String>, Option<String>) =
        (row.get(health)?, row.get(health + 2)?);
    let (since, next_due) = (optional_time(row, health + 1)?, optional_time(row, health + 3)?);
    Ok(DeviceView {
        settings: device_settings(row, first)?,
        health: HealthView::stored(state.as_deref(), since, problems.as_deref(), next_due),
    })
}

/// Selects one device, and the columns that [`device_view`] reads.
fn select_device(columns: &str) -> String {
    format!(
        "select {columns} {SETTINGS_COLUMNS}, h.state, h.since, h.problems, h.next_due
           from devices d
           left join device_settings s on s.device = d.id
           left join device_health h on h.device = d.id
          where d.device_id = ?1"
    )
}

fn device_views(
    connection: &Connection,
    device_ids: &[String],
) -> rusqlite::Result<HashMap<String, DeviceView>> {
    let snapshot = connection.unchecked_transaction()?;
    let mut select = snapshot.prepare_cached(&select_device(""))?;
    let mut views = HashMap::with_capacity(device_ids.len());
    for device_id in device_ids {
        let view = select.query_row([device_id], |row| device_view(row, 0)).optional()?;
        views.extend(view.map(|view| (device_id.clone(), view)));
    }
    Ok(views)
}

fn device_detail(
    connection: &Connection,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<DeviceDetailView>> {
    let snapshot = connection.unchecked_transaction()?;
    let found = snapshot
        .prepare_cached(&select_device(r#"d."group", "#))?
        .query_row([device_id.as_str()], |row| {
            Ok((row.get::<_, Option<String>>(0)?, device_view(row, 1)?))
        })
        .optional()?;
    let (Some((group, device)), Some(number)) = (found, device_number(&snapshot, device_id)?)
    else {
        return Ok(None);
    };
    let fleet = fleet_level(&snapshot)?;
    let group = group_level(&snapshot, group.as_deref())?;
    let own = &device.settings.level;
    let policy =
        Levels { device: &own.policy, group: &group.policy, fleet: &fleet.policy }.resolve();
    let pauses = Pauses { device: own.pause, group: group.pause, fleet: fleet.pause };
    Ok(Some(DeviceDetailView { pauses, policy, jobs: jobs(&snapshot, number)?, device }))
}

fn fleet_level(snapshot: &Connection) -> rusqlite::Result<LevelSettings> {
    const FLEET: &str =
        "select policy, policy_since, paused_from, paused_until, null from fleet_state";
    snapshot.prepare_cached(FLEET)?.query_row([], |row| level(row, 0))
}

fn group_level(snapshot: &Connection, group: Option<&str>) -> rusqlite::Result<LevelSettings> {
    const GROUP: &str =
        "select policy, policy_since, paused_from, paused_until, note from groups where name = ?1";
    let found =
        snapshot.prepare_cached(GROUP)?.query_row([group], |row| level(row, 0)).optional()?;
    Ok(found.unwrap_or_default())
}

/// What is known of a device's jobs.
fn jobs(snapshot: &Connection, device: i64) -> rusqlite::Result<HashMap<Option<String>, JobView>> {
    const JOBS: &str = "
        select nullif(job, ''), state, is_expected, next_due from job_health where device = ?1
    ";
    const RUNS: &str = "
        select nullif(job, ''), max(received_at) from run_starts where device = ?1 group by job
    ";
    let mut jobs = HashMap::<Option<String>, JobView>::new();
    let mut select = snapshot.prepare_cached(JOBS)?;
    let mut rows = select.query([device])?;
    while let Some(row) = rows.next()? {
        let state: String = row.get(1)?;
        let view = JobView {
            state: State::from_word(&state),
            is_expected: row.get(2)?,
            next_due: optional_time(row, 3)?,
            run_started: None,
        };
        jobs.insert(row.get(0)?, view);
    }
    let mut select = snapshot.prepare_cached(RUNS)?;
    let mut rows = select.query([device])?;
    while let Some(row) = rows.next()? {
        jobs.entry(row.get(0)?).or_default().run_started = optional_time(row, 1)?;
    }
    Ok(jobs)
}

/// The devices `d` of a group `n`, and those of none.
const OF_GROUP: &str = r#"d."group" = n.name"#;
const OF_NO_GROUP: &str = r#"d."group" is null"#;

/// Selects groups, whose names `source` selects, in the columns that [`group_row`] reads. `devices` is the condition on their
/// devices.
fn select_groups(source: &str, devices: &str) -> String {
    format!(
        r#"select n.name, (select count(*) from devices d where {devices}),
                  (select json_group_object(c.state, c.devices) from group_states c where c."group" = n.name),
                  (select count(*) from incidents i
                    where i."group" = n.name and i.resolved_at is null and i.scope in ('device', 'group')),
                  ifnull(g.policy, '{{}}'), g.policy_since, g.paused_from, g.paused_until, g.note,
                  '{{}}', null, f.paused_from, f.paused_until, null,
                  (select count(*) from device_health o
                    where o."group" = n.name and o.state = 'never' and o.is_overdue = 1)
             from ({source}) n
             left join groups g on g.name = n.name
             join fleet_state f"#
    )
}

fn group_row(row: &Row<'_>) -> rusqlite::Result<GroupView> {
    let (devices, states, open_incidents): (i64, String, i64) =
        (row.get(1)?, row.get(2)?, row.get(3)?);
    Ok(GroupView {
        name: row.get(0)?,
        devices: devices.cast_unsigned(),
        states: StateCounts::from_json(&states),
        overdue: row.get::<_, i64>(14)?.cast_unsigned(),
        open_incidents: open_incidents.cast_unsigned(),
        level: level(row, 4)?,
        fleet_pause: level(row, 9)?.pause,
    })
}

fn groups(connection: &Connection, query: &GroupQuery) -> rusqlite::Result<Page<GroupView>> {
    const NAMES: &str = r#"
        select name
          from (select name from groups union select "group" from devices where "group" is not null)
         where :search is null or name like :search escape '\'
    "#;
    let search = query.search.as_deref().map(like_pattern);
    let offset = i64::try_from(query.offset).unwrap_or(i64::MAX);
    let snapshot = connection.unchecked_transaction()?;
    let total: i64 = snapshot
        .prepare_cached(&format!("select count(*) from ({NAMES})"))?
        .query_row(named_params! { ":search": search }, |row| row.get(0))?;
    let page = format!("{NAMES} order by name limit :limit offset :offset");
    let select = format!("{} order by n.name", select_groups(&page, OF_GROUP));
    let items = snapshot
        .prepare_cached(&select)?
        .query_map(
            named_params! { ":search": search, ":limit": query.limit, ":offset": offset },
            group_row,
        )?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Page { items, total: Count::Exactly(total.cast_unsigned()), next: None })
}

fn fleet(snapshot: &Connection) -> rusqlite::Result<FleetView> {
    const STATES: &str = "select state, sum(devices) from group_states group by state";
    const FIGURES: &str = "
        select (select count(*) from device_health where is_overdue = 1),
               (select count(*) from incidents where resolved_at is null), swept_at
          from fleet_state
    ";
    const OUTAGES: &str =
        "select from_at, until_at, cause from outages order by from_at desc limit ?1";
    let states = snapshot
        .prepare_cached(STATES)?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<(String, i64)>>>()?;
    let (overdue, open_incidents, swept_at) =
        snapshot.prepare_cached(FIGURES)?.query_row([], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, optional_time(row, 2)?))
        })?;
    let outages = snapshot
        .prepare_cached(OUTAGES)?
        .query_map([SHOWN_OUTAGES], |row| {
            Ok(OutageView { from: time(row, 0)?, until: time(row, 1)?, cause: row.get(2)? })
        })?
        .collect::<rusqlite::Result<_>>()?;
    Ok(FleetView {
        level: fleet_level(snapshot)?,
        states: StateCounts::of(states.iter().map(|(state, devices)| (state.as_str(), *devices))),
        overdue: overdue.cast_unsigned(),
        open_incidents: open_incidents.cast_unsigned(),
        swept_at,
        outages,
    })
}
