//! Reads from SQLite what is set for the fleet. The sweep and the API call it through `FleetSettingsStore`.

use std::collections::HashMap;

use async_trait::async_trait;
use pisync_core::health::Interval;
use rusqlite::{Connection, Row};

use super::{
    outbox::routing,
    rows::{optional_time, time},
    store::SqliteStore,
};
use crate::store::{
    FleetSettings, FleetSettingsStore, FleetWindow, LevelSettings, StoreError,
    fleet_settings::{OUTAGES_KEPT, WindowColumns, level_settings},
};

#[async_trait]
impl FleetSettingsStore for SqliteStore {
    async fn fleet_settings(&self) -> Result<FleetSettings, StoreError> {
        self.read(|connection| fleet_settings(&*connection.unchecked_transaction()?)).await
    }

    async fn fleet_version(&self) -> Result<i64, StoreError> {
        const VERSION: &str = "select version from fleet_state";
        self.read(|connection| connection.prepare_cached(VERSION)?.query_row([], |row| row.get(0)))
            .await
    }
}

/// The columns that [`level`] reads.
pub(super) const LEVEL_COLUMNS: &str = "policy, policy_since, paused_from, paused_until, note";

/// Reads [`LEVEL_COLUMNS`] from column `first` on.
pub(super) fn level(row: &Row<'_>, first: usize) -> rusqlite::Result<LevelSettings> {
    let pause = (optional_time(row, first + 2)?, optional_time(row, first + 3)?);
    let policy: String = row.get(first)?;
    Ok(level_settings(&policy, optional_time(row, first + 1)?, pause, row.get(first + 4)?))
}

pub(super) fn fleet_settings(snapshot: &Connection) -> rusqlite::Result<FleetSettings> {
    const FLEET: &str =
        "select version, policy, policy_since, paused_from, paused_until, null from fleet_state";
    let (version, fleet) =
        snapshot.prepare_cached(FLEET)?.query_row([], |row| Ok((row.get(0)?, level(row, 1)?)))?;
    let groups = format!("select name, {LEVEL_COLUMNS} from groups");
    let groups = snapshot
        .prepare_cached(&groups)?
        .query_map([], |row| Ok((row.get(0)?, level(row, 1)?)))?
        .collect::<rusqlite::Result<HashMap<String, LevelSettings>>>()?;
    let (windows, outages) = (windows(snapshot)?, outages(snapshot)?);
    Ok(FleetSettings::new(version, fleet, groups, windows, outages, routing(snapshot)?))
}

/// All windows, by id.
pub(super) fn windows(snapshot: &Connection) -> rusqlite::Result<Vec<FleetWindow>> {
    const WINDOWS: &str = "
        select id, name, scope, key, effect, timezone, weekly, starts_at, ends_at from windows order by id
    ";
    let mut windows = snapshot.prepare_cached(WINDOWS)?;
    let windows = windows.query_map([], |row| {
        Ok(WindowColumns {
            id: row.get(0)?,
            name: row.get(1)?,
            scope: row.get(2)?,
            key: row.get(3)?,
            effect: row.get(4)?,
            timezone: row.get(5)?,
            weekly: row.get(6)?,
            starts_at: optional_time(row, 7)?,
            ends_at: optional_time(row, 8)?,
        })
    })?;
    windows.filter_map(|window| window.map(WindowColumns::window).transpose()).collect()
}

/// When nobody could be heard, as far as it matters to any deadline.
fn outages(snapshot: &Connection) -> rusqlite::Result<Vec<Interval>> {
    const OUTAGES: &str = "
        select from_at, until_at
          from outages
         where until_at >= (select max(until_at) from outages) - ?1
         order by from_at
    ";
    snapshot
        .prepare_cached(OUTAGES)?
        .query_map([OUTAGES_KEPT], |row| {
            Ok(Interval { from: time(row, 0)?, until: time(row, 1)? })
        })?
        .collect()
}
