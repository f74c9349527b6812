//! Reads from PostgreSQL what the API shows of the fleet, its groups, and its devices. The API calls it through `FleetViews`.

use std::collections::HashMap;

use async_trait::async_trait;
use deadpool_postgres::GenericClient;
use pisync_core::{
    DeviceId, GroupName,
    health::{Levels, State},
};
use tokio_postgres::{Error, Row};

use super::{
    connect::Object,
    fleet_changes::{SETTINGS, SETTINGS_COLUMNS, device_settings},
    fleet_settings::{level, windows},
    rows::{optional_time, snapshot, time},
    store::PostgresStore,
};
use crate::store::{
    Count, DeviceView, FleetView, FleetViews, FleetWindow, GroupQuery, GroupView, HealthView,
    JobView, LevelSettings, OutageView, Page, Pauses, StateCounts, StoreError,
    devices::like_pattern,
    fleet_views::{DeviceDetailView, SHOWN_OUTAGES},
};

#[async_trait]
impl FleetViews for PostgresStore {
    async fn device_views(
        &self,
        device_ids: &[String],
    ) -> Result<HashMap<String, DeviceView>, StoreError> {
        self.call(async |connection| {
            let select = connection.prepare_cached(&select_devices()).await?;
            let rows = connection.query(&select, &[&device_ids]).await?;
            rows.iter().map(|row| Ok((row.try_get(0)?, device_view(row)?))).collect()
        })
        .await
    }

    async fn device_detail(
        &self,
        device_id: &DeviceId,
    ) -> Result<Option<DeviceDetailView>, StoreError> {
        self.call(async |connection| device_detail(connection, device_id).await).await
    }

    async fn groups(&self, query: &GroupQuery) -> Result<Page<GroupView>, StoreError> {
        self.call(async |connection| groups(connection, query).await).await
    }

    async fn group(&self, name: &GroupName) -> Result<Option<GroupView>, StoreError> {
        let source = r#"
            select $1::text as name
             where exists (select from groups where name = $1)
                or exists (select from devices where "group" = $1)
        "#;
        self.call(async |connection| {
            let select = connection.prepare_cached(&select_groups(source, OF_GROUP)).await?;
            let row = connection.query_opt(&select, &[&name.as_str()]).await?;
            row.as_ref().map(group_row).transpose()
        })
        .await
    }

    async fn ungrouped(&self) -> Result<GroupView, StoreError> {
        self.call(async |connection| {
            let select = select_groups("select ''::text as name", OF_NO_GROUP);
            let select = connection.prepare_cached(&select).await?;
            group_row(&connection.query_one(&select, &[]).await?)
        })
        .await
    }

    async fn fleet(&self) -> Result<FleetView, StoreError> {
        self.call(async |connection| fleet(&snapshot(connection).await?).await).await
    }

    async fn windows(&self) -> Result<Vec<FleetWindow>, StoreError> {
        self.call(async |connection| windows(&snapshot(connection).await?).await).await
    }
}

/// Selects the devices `$1`, in the columns that [`device_view`] reads: the id and the group come first.
fn select_devices() -> String {
    format!(
        r#"select d.device_id, d."group", {SETTINGS_COLUMNS}, h.state, h.since, h.problems, h.next_due
             from devices d
             left join device_settings s using (device_id)
             left join device_health h using (device_id)
            where d.device_id = any ($1::text[])"#
    )
}

fn device_view(row: &Row) -> Result<DeviceView, Error> {
    const FIRST: usize = 2;
    let health = FIRST + SETTINGS;
    let (since, next_due) = (optional_time(row, health + 1)?, optional_time(row, health + 3)?);
    Ok(DeviceView {
        settings: device_settings(row, FIRST)?,
        health: HealthView::stored(row.try_get(health)?, since, row.try_get(health + 2)?, next_due),
    })
}

async fn device_detail(
    connection: &mut Object,
    device_id: &DeviceId,
) -> Result<Option<DeviceDetailView>, Error> {
    const GROUP: &str =
        "select policy, policy_since, paused_from, paused_until, note from groups where name = $1";
    let snapshot = snapshot(connection).await?;
    let select = snapshot.prepare_cached(&select_devices()).await?;
    let ids = [device_id.as_str()];
    let Some(row) = snapshot.query_opt(&select, &[&ids.as_slice()]).await? else { return Ok(None) };
    let (group, device) = (row.try_get::<_, Option<&str>>(1)?, device_view(&row)?);
    let fleet = fleet_level(&snapshot).await?;
    let select = snapshot.prepare_cached(GROUP).await?;
    let group = snapshot.query_opt(&select, &[&group]).await?;
    let group = group.map(|row| level(&row, 0)).transpose()?.unwrap_or_default();
    let own = &device.settings.level;
    let policy =
        Levels { device: &own.policy, group: &group.policy, fleet: &fleet.policy }.resolve();
    let pauses = Pauses { device: own.pause, group: group.pause, fleet: fleet.pause };
    let jobs = jobs(&snapshot, device_id.as_str()).await?;
    Ok(Some(DeviceDetailView { pauses, policy, jobs, device }))
}

async fn fleet_level(snapshot: &impl GenericClient) -> Result<LevelSettings, Error> {
    const FLEET: &str =
        "select policy, policy_since, paused_from, paused_until, null::text from fleet_state";
    let select = snapshot.prepare_cached(FLEET).await?;
    level(&snapshot.query_one(&select, &[]).await?, 0)
}

/// What is known of a device's jobs.
async fn jobs(
    snapshot: &impl GenericClient,
    device_id: &str,
) -> Result<HashMap<Option<String>, JobView>, Error> {
    const JOBS: &str = "
        select nullif(job, ''), state, is_expected, next_due from job_health where device_id = $1
    ";
    const RUNS: &str = "
        select nullif(job, ''), max(received_at) from run_starts where device_id = $1 group by job
    ";
    let mut jobs = HashMap::<Option<String>, JobView>::new();
    let select = snapshot.prepare_cached(JOBS).await?;
    for row in snapshot.query(&select, &[&device_id]).await? {
        let view = JobView {
            state: State::from_word(row.try_get(1)?),
            is_expected: row.try_get(2)?,
            next_due: optional_time(&row, 3)?,
            run_started: None,
        };
        jobs.insert(row.try_get(0)?, view);
    }
    let select = snapshot.prepare_cached(RUNS).await?;
    for row in snapshot.query(&select, &[&device_id]).await? {
        jobs.entry(row.try_get(0)?).or_default().run_started = optional_time(&row, 1)?;
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
                  coalesce(
                      (select json_object_agg(c.state, c.devices)::text from group_states c where c."group" = n.name),
                      '{{}}'
                  ),
                  (select count(*) from incidents i
                    where i."group" = n.name and i.resolved_at is null and i.scope in ('device', 'group')),
                  coalesce(g.policy, '{{}}'), g.policy_since, g.paused_from, g.paused_until, g.note,
                  '{{}}', null::timestamptz, f.paused_from, f.paused_until, null::text,
                  (select count(*) from device_health o
                    where o."group" = n.name and o.state = 'never' and o.is_overdue)
             from ({source}) n
             left join groups g on g.name = n.name
            cross join fleet_state f"#
    )
}

fn group_row(row: &Row) -> Result<GroupView, Error> {
    Ok(GroupView {
        name: row.try_get(0)?,
        devices: row.try_get::<_, i64>(1)?.cast_unsigned(),
        states: StateCounts::from_json(row.try_get(2)?),
        overdue: row.try_get::<_, i64>(14)?.cast_unsigned(),
        open_incidents: row.try_get::<_, i64>(3)?.cast_unsigned(),
        level: level(row, 4)?,
        fleet_pause: level(row, 9)?.pause,
    })
}

async fn groups(connection: &mut Object, query: &GroupQuery) -> Result<Page<GroupView>, Error> {
    const NAMES: &str = r#"
        select name collate "C" as name
          from (
              select name from groups
              union
              select "group" collate "C" from devices where "group" is not null
          ) named
         where $1::text is null or name ilike $1 escape '\'
    "#;
    let search = query.search.as_deref().map(like_pattern);
    let offset = i64::try_from(query.offset).unwrap_or(i64::MAX);
    let snapshot = snapshot(connection).await?;
    let count = snapshot.prepare_cached(&format!("select count(*) from ({NAMES}) named")).await?;
    let total: i64 = snapshot.query_one(&count, &[&search]).await?.try_get(0)?;
    let page = format!("{NAMES} order by name limit $2 offset $3");
    let select = format!("{} order by n.name", select_groups(&page, OF_GROUP));
    let select = snapshot.prepare_cached(&select).await?;
    let rows = snapshot.query(&select, &[&search, &i64::from(query.limit), &offset]).await?;
    let items = rows.iter().map(group_row).collect::<Result<_, _>>()?;
    Ok(Page { items, total: Count::Exactly(total.cast_unsigned()), next: None })
}

async fn fleet(snapshot: &impl GenericClient) -> Result<FleetView, Error> {
    const STATES: &str = "select state, sum(devices)::bigint from group_states group by state";
    const FIGURES: &str = "
        select (select count(*) from device_health where is_overdue),
               (select count(*) from incidents where resolved_at is null), swept_at
          from fleet_state
    ";
    const OUTAGES: &str =
        "select from_at, until_at, cause from outages order by from_at desc limit $1";
    let select = snapshot.prepare_cached(STATES).await?;
    let states = snapshot.query(&select, &[]).await?;
    let states = states
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<Vec<(&str, i64)>, Error>>()?;
    let select = snapshot.prepare_cached(FIGURES).await?;
    let figures = snapshot.query_one(&select, &[]).await?;
    let select = snapshot.prepare_cached(OUTAGES).await?;
    let outages = snapshot.query(&select, &[&i64::from(SHOWN_OUTAGES)]).await?;
    let outage = |row: &Row| {
        Ok(OutageView { from: time(row, 0)?, until: time(row, 1)?, cause: row.try_get(2)? })
    };
    Ok(FleetView {
        level: fleet_level(snapshot).await?,
        states: StateCounts::of(states),
        overdue: figures.try_get::<_, i64>(0)?.cast_unsigned(),
        open_incidents: figures.try_get::<_, i64>(1)?.cast_unsigned(),
        swept_at: optional_time(&figures, 2)?,
        outages: outages.iter().map(outage).collect::<Result<_, Error>>()?,
    })
}
