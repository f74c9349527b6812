//! Reads from PostgreSQL what is set for the fleet. The sweep and the API call it through `FleetSettingsStore`.

use std::collections::HashMap;

use async_trait::async_trait;
use deadpool_postgres::GenericClient;
use pisync_core::health::Interval;
use tokio_postgres::{Error, Row};

use super::{
    outbox::routing,
    rows::{optional_time, snapshot, time},
    store::PostgresStore,
};
use crate::store::{
    FleetSettings, FleetSettingsStore, FleetWindow, LevelSettings, StoreError,
    fleet_settings::{OUTAGES_KEPT, WindowColumns, level_settings},
};

#[async_trait]
impl FleetSettingsStore for PostgresStore {
    async fn fleet_settings(&self) -> Result<FleetSettings, StoreError> {
        self.call(async |connection| fleet_settings(&snapshot(connection).await?).await).await
    }

    async fn fleet_version(&self) -> Result<i64, StoreError> {
        const VERSION: &str = "select version from fleet_state";
        self.call(async |connection| {
            let version = connection.prepare_cached(VERSION).await?;
            connection.query_one(&version, &[]).await?.try_get(0)
        })
        .await
    }
}

/// The columns that [`level`] reads.
pub(super) const LEVEL_COLUMNS: &str = "policy, policy_since, paused_from, paused_until, note";

/// Reads [`LEVEL_COLUMNS`] from column `first` on.
pub(super) fn level(row: &Row, first: usize) -> Result<LevelSettings, Error> {
    let pause = (optional_time(row, first + 2)?, optional_time(row, first + 3)?);
    let policy: &str = row.try_get(first)?;
    Ok(level_settings(policy, optional_time(row, first + 1)?, pause, row.try_get(first + 4)?))
}

pub(super) async fn fleet_settings(snapshot: &impl GenericClient) -> Result<FleetSettings, Error> {
    const FLEET: &str = "select version, policy, policy_since, paused_from, paused_until, null::text from fleet_state";
    let select = snapshot.prepare_cached(FLEET).await?;
    let row = snapshot.query_one(&select, &[]).await?;
    let (version, fleet) = (row.try_get(0)?, level(&row, 1)?);
    let groups = format!("select name, {LEVEL_COLUMNS} from groups");
    let groups = snapshot.prepare_cached(&groups).await?;
    let groups = snapshot.query(&groups, &[]).await?;
    let groups = groups
        .iter()
        .map(|row| Ok((row.try_get(0)?, level(row, 1)?)))
        .collect::<Result<HashMap<String, LevelSettings>, Error>>()?;
    let (windows, outages) = (windows(snapshot).await?, outages(snapshot).await?);
    let routing = routing(snapshot).await?;
    Ok(FleetSettings::new(version, fleet, groups, windows, outages, routing))
}

/// All windows, by id.
pub(super) async fn windows(snapshot: &impl GenericClient) -> Result<Vec<FleetWindow>, Error> {
    const WINDOWS: &str = "
        select id, name, scope, key, effect, timezone, weekly, starts_at, ends_at from windows order by id
    ";
    let select = snapshot.prepare_cached(WINDOWS).await?;
    let window = |row: &Row| {
        Ok(WindowColumns {
            id: row.try_get(0)?,
            name: row.try_get(1)?,
            scope: row.try_get(2)?,
            key: row.try_get(3)?,
            effect: row.try_get(4)?,
            timezone: row.try_get(5)?,
            weekly: row.try_get(6)?,
            starts_at: optional_time(row, 7)?,
            ends_at: optional_time(row, 8)?,
        })
    };
    let rows = snapshot.query(&select, &[]).await?;
    rows.iter().filter_map(|row| window(row).map(WindowColumns::window).transpose()).collect()
}

/// When nobody could be heard, as far as it matters to any deadline.
async fn outages(snapshot: &impl GenericClient) -> Result<Vec<Interval>, Error> {
    const OUTAGES: &str = "
        select from_at, until_at
          from outages
         where until_at >= (select max(until_at) from outages) - $1::bigint * interval '1 millisecond'
         order by from_at
    ";
    let select = snapshot.prepare_cached(OUTAGES).await?;
    let rows = snapshot.query(&select, &[&OUTAGES_KEPT]).await?;
    rows.iter().map(|row| Ok(Interval { from: time(row, 0)?, until: time(row, 1)? })).collect()
}
