//! Changes in PostgreSQL what people set for the fleet, its groups, and its devices. The API and the command line call it
//! through `FleetChanges`. What a change makes of a device or a level is decided in `store::fleet_changes`.
//!
//! Each transaction first locks the row of `fleet_state`, so changes follow one another. Then come the state of roll-ups,
//! devices in byte-wise order, and what is set for them, as in every other transaction.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use pisync_core::{DeviceId, GroupName, Timestamp};
use tokio_postgres::{Error, Row};

use super::{
    audit::record,
    connect::Object,
    fleet_settings::{LEVEL_COLUMNS, level},
    groups, outbox,
    rows::optional_time,
    store::PostgresStore,
};
use crate::store::{
    Actor, DeviceChange, DeviceSettings, FleetChanges, LevelChange, LevelSettings, MOST_WINDOWS,
    NewWindow, RosterOutcome, RosterRow, StoreError, WindowScope,
    audit::NewAuditEntry,
    fleet_changes::{
        Changed, DeviceRecord, device_changed, fleet_changed, group_changed,
        is_level_judged_otherwise, level_after, outcome, pause_times, window_changed,
    },
};

#[async_trait]
impl FleetChanges for PostgresStore {
    async fn update_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        self.call(async |connection| update_device(connection, device_id, change, by).await).await
    }

    async fn put_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        self.call(async |connection| put_device(connection, device_id, change, by).await).await
    }

    async fn put_roster(
        &self,
        rows: &[RosterRow],
        is_dry_run: bool,
        by: &Actor,
    ) -> Result<RosterOutcome, StoreError> {
        self.call(async |connection| put_roster(connection, rows, is_dry_run, by).await).await
    }

    async fn update_group(
        &self,
        name: &GroupName,
        change: &LevelChange,
        may_create: bool,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        self.call(async |connection| update_group(connection, name, change, may_create, by).await)
            .await
    }

    async fn delete_group(&self, name: &GroupName, by: &Actor) -> Result<Option<u64>, StoreError> {
        self.call(async |connection| delete_group(connection, name, by).await).await
    }

    async fn update_fleet(&self, change: &LevelChange, by: &Actor) -> Result<(), StoreError> {
        self.call(async |connection| update_fleet(connection, change, by).await).await
    }

    async fn create_window(
        &self,
        window: &NewWindow,
        by: &Actor,
    ) -> Result<Option<i64>, StoreError> {
        self.call(async |connection| create_window(connection, window, by).await).await
    }

    async fn replace_window(
        &self,
        id: i64,
        window: &NewWindow,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        self.call(async |connection| replace_window(connection, id, window, by).await).await
    }

    async fn delete_window(&self, id: i64, by: &Actor) -> Result<bool, StoreError> {
        self.call(async |connection| delete_window(connection, id, by).await).await
    }
}

/// Begins a change: others wait until it has ended.
async fn begin(connection: &mut Object) -> Result<Transaction<'_>, Error> {
    const LOCK: &str = "select from fleet_state for no key update";
    let transaction = connection.transaction().await?;
    transaction.query_one(LOCK, &[]).await?;
    Ok(transaction)
}

/// Tells the sweep whom to evaluate again.
async fn note_changes(transaction: &Transaction<'_>, changes: &[Changed]) -> Result<(), Error> {
    const NOTE: &str = "
        with counted as (
            update fleet_state set version = version + cardinality($1::text[]) returning version
        )
        insert into fleet_changes (version, scope, key)
        select counted.version - cardinality($1::text[]) + changed.number, changed.scope, changed.key
          from counted, unnest($1::text[], $2::text[]) with ordinality as changed (scope, key, number)
        returning version
    ";
    if changes.is_empty() {
        return Ok(());
    }
    let (scopes, keys): (Vec<_>, Vec<_>) =
        changes.iter().map(|(scope, key)| (*scope, key.as_str())).unzip();
    let note = transaction.prepare_cached(NOTE).await?;
    let written = transaction.query(&note, &[&scopes, &keys]).await?.len();
    expect_rows(transaction, written as u64, changes.len()).await
}

/// Fails when a trigger has dropped some of the rows.
async fn expect_rows(
    transaction: &Transaction<'_>,
    written: u64,
    expected: usize,
) -> Result<(), Error> {
    if written == expected as u64 {
        return Ok(());
    }
    // An answer without the one row that is asked for is an error of the driver.
    transaction.query_one("select where false", &[]).await.map(|_| ())
}

/// The settings of a device `d`, whose row `s` there may not be, as [`device_settings`] reads them.
pub(super) const SETTINGS_COLUMNS: &str = "
    coalesce(s.policy, '{}'), s.policy_since, s.paused_from, s.paused_until, s.note, s.expected_from,
    coalesce(s.is_excused, false),
    array(select t.tag from device_tags t where t.device_id = d.device_id order by t.tag)
";

/// The number of [`SETTINGS_COLUMNS`].
pub(super) const SETTINGS: usize = 8;

/// Reads [`SETTINGS_COLUMNS`] from column `first` on.
pub(super) fn device_settings(row: &Row, first: usize) -> Result<DeviceSettings, Error> {
    Ok(DeviceSettings {
        level: level(row, first)?,
        expected_from: optional_time(row, first + 5)?,
        is_excused: row.try_get(first + 6)?,
        tags: row.try_get(first + 7)?,
    })
}

/// What is said about a device before a change, unless it is new, and after it.
struct Device<'a> {
    device_id: &'a str,
    before: Option<DeviceRecord>,
    after: DeviceRecord,
}

impl Device<'_> {
    fn moves(&self) -> bool {
        self.before.as_ref().is_some_and(|before| before.moves_to(&self.after))
    }

    fn has_new(&self, differs: impl Fn(&DeviceRecord, &DeviceRecord) -> bool) -> bool {
        self.before.as_ref().is_none_or(|before| differs(before, &self.after))
    }
}

/// Changes what is said about devices, given in byte-wise order and none of them twice. Unknown ones become known, if they
/// may; otherwise they are left out.
async fn change_devices<'a>(
    transaction: &Transaction<'_>,
    rows: &[(&'a str, &DeviceChange)],
    may_create: bool,
    now: Timestamp,
) -> Result<Vec<Device<'a>>, Error> {
    // Locks the known ones, in their order, without writing them. A device that a report makes known meanwhile is
    // waited for.
    const CREATE: &str = r#"
        insert into devices (device_id, name, "group", created_at, updated_at)
        select device_id, name, "group", $4, $4
          from unnest($1::text[], $2::text[], $3::text[]) as listed (device_id, name, "group")
         order by device_id collate "C"
            on conflict (device_id) do update set name = devices.name where false
        returning device_id
    "#;
    const LOCK: &str = r#"
        select device_id
          from devices
         where device_id = any ($1::text[])
         order by device_id collate "C"
           for no key update
    "#;
    // They are not among those that are summarized, whatever the clocks of servers say.
    const NOTE_NEW: &str = "insert into stale_summaries (device_id) select unnest($1::text[])";
    let select = format!(
        r#"select d.device_id, d.name, d."group", {SETTINGS_COLUMNS}
             from devices d
             left join device_settings s using (device_id)
            where d.device_id = any ($1::text[])"#
    );
    let watermark = groups::lock_for_moves(transaction).await?;
    let ids: Vec<_> = rows.iter().map(|(device_id, _)| *device_id).collect();
    let mut created = HashSet::new();
    if may_create {
        let new: Vec<_> =
            rows.iter().map(|(_, change)| DeviceRecord::default().after(change, now)).collect();
        let names: Vec<_> = new.iter().map(|record| record.name.as_deref()).collect();
        let groups: Vec<_> = new.iter().map(|record| record.group.as_deref()).collect();
        let create = transaction.prepare_cached(CREATE).await?;
        let rows = transaction.query(&create, &[&ids, &names, &groups, &now.to_jiff()]).await?;
        for row in rows {
            created.insert(row.try_get::<_, String>(0)?);
        }
        if !created.is_empty() {
            let new: Vec<_> = created.iter().map(String::as_str).collect();
            transaction.execute(NOTE_NEW, &[&new]).await?;
        }
    } else {
        let lock = transaction.prepare_cached(LOCK).await?;
        transaction.query(&lock, &[&ids]).await?;
    }
    let select = transaction.prepare_cached(&select).await?;
    let mut known = HashMap::new();
    for row in transaction.query(&select, &[&ids]).await? {
        let (name, group) = (row.try_get(1)?, row.try_get(2)?);
        let record = DeviceRecord { name, group, settings: device_settings(&row, 3)? };
        known.insert(row.try_get::<_, String>(0)?, record);
    }
    if may_create {
        expect_rows(transaction, known.len() as u64, rows.len()).await?;
    }
    let mut devices = Vec::with_capacity(rows.len());
    for (device_id, change) in rows {
        let Some(record) = known.remove(*device_id) else { continue };
        let is_new = created.contains(*device_id);
        let before = (!is_new).then_some(record);
        let after = before.clone().unwrap_or_default().after(change, now);
        devices.push(Device { device_id, before, after });
    }
    let moved: Vec<_> =
        devices.iter().filter(|device| device.moves()).map(|device| device.device_id).collect();
    groups::note_moves(transaction, &moved, now, watermark).await?;
    write_devices(transaction, &devices).await?;
    write_settings(transaction, &devices).await?;
    write_tags(transaction, &devices).await?;
    let changes: Vec<_> = devices
        .iter()
        .filter(|device| device.has_new(DeviceRecord::is_judged_otherwise))
        .map(|device| device_changed(device.device_id))
        .collect();
    note_changes(transaction, &changes).await?;
    Ok(devices)
}

/// Writes the names and groups of known devices.
async fn write_devices(transaction: &Transaction<'_>, devices: &[Device<'_>]) -> Result<(), Error> {
    const WRITE: &str = r#"
        update devices d
           set name = changed.name, "group" = changed."group"
          from unnest($1::text[], $2::text[], $3::text[]) as changed (device_id, name, "group")
         where d.device_id = changed.device_id
    "#;
    let (mut ids, mut names, mut groups) = (Vec::new(), Vec::new(), Vec::new());
    for Device { device_id, before, after } in devices {
        let Some(before) = before else { continue };
        if (&before.name, &before.group) != (&after.name, &after.group) {
            ids.push(*device_id);
            names.push(after.name.as_deref());
            groups.push(after.group.as_deref());
        }
    }
    if ids.is_empty() {
        return Ok(());
    }
    let write = transaction.prepare_cached(WRITE).await?;
    // Of `devices`, a trigger may drop rows that it takes for unchanged.
    transaction.execute(&write, &[&ids, &names, &groups]).await.map(|_| ())
}

async fn write_settings(
    transaction: &Transaction<'_>,
    devices: &[Device<'_>],
) -> Result<(), Error> {
    const WRITE: &str = "
        insert into device_settings (
            device_id, policy, policy_since, paused_from, paused_until, expected_from, is_excused, note
        )
        select *
          from unnest(
                   $1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[],
                   $6::timestamptz[], $7::boolean[], $8::text[]
               )
            on conflict (device_id) do update
           set policy = excluded.policy, policy_since = excluded.policy_since,
               paused_from = excluded.paused_from, paused_until = excluded.paused_until,
               expected_from = excluded.expected_from, is_excused = excluded.is_excused,
               note = excluded.note
    ";
    let time = |time: Option<Timestamp>| time.map(Timestamp::to_jiff);
    let changed: Vec<_> = devices
        .iter()
        .filter(|device| device.has_new(|before, after| before.settings != after.settings))
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let ids: Vec<_> = changed.iter().map(|device| device.device_id).collect();
    let policies: Vec<_> = changed.iter().map(|device| device.after.policy()).collect();
    let (mut policies_since, mut paused_from, mut paused_until) =
        (Vec::new(), Vec::new(), Vec::new());
    let (mut expected_from, mut excused, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for Device { after, .. } in &changed {
        let (from, until) = after.pause();
        policies_since.push(time(after.settings.level.policy_since));
        paused_from.push(time(from));
        paused_until.push(time(until));
        expected_from.push(time(after.settings.expected_from));
        excused.push(after.settings.is_excused);
        notes.push(after.settings.level.note.as_deref());
    }
    let write = transaction.prepare_cached(WRITE).await?;
    let written = transaction
        .execute(
            &write,
            &[
                &ids,
                &policies,
                &policies_since,
                &paused_from,
                &paused_until,
                &expected_from,
                &excused,
                &notes,
            ],
        )
        .await?;
    expect_rows(transaction, written, changed.len()).await
}

async fn write_tags(transaction: &Transaction<'_>, devices: &[Device<'_>]) -> Result<(), Error> {
    const DELETE: &str = "delete from device_tags where device_id = any ($1::text[])";
    const INSERT: &str = "
        insert into device_tags (device_id, tag) select * from unnest($1::text[], $2::text[])
    ";
    let (mut ids, mut tagged, mut tags) = (Vec::new(), Vec::new(), Vec::new());
    for device in devices {
        if device.has_new(|before, after| before.settings.tags != after.settings.tags) {
            ids.push(device.device_id);
            for tag in &device.after.settings.tags {
                tagged.push(device.device_id);
                tags.push(tag.as_str());
            }
        }
    }
    if ids.is_empty() {
        return Ok(());
    }
    transaction.execute(DELETE, &[&ids]).await?;
    let insert = transaction.prepare_cached(INSERT).await?;
    let written = transaction.execute(&insert, &[&tagged, &tags]).await?;
    expect_rows(transaction, written, tags.len()).await
}

async fn update_device(
    connection: &mut Object,
    device_id: &DeviceId,
    change: &DeviceChange,
    by: &Actor,
) -> Result<bool, Error> {
    let transaction = begin(connection).await?;
    let rows = [(device_id.as_str(), change)];
    if change_devices(&transaction, &rows, false, by.at).await?.is_empty() {
        return Ok(false);
    }
    record(&transaction, by, &NewAuditEntry::device_updated(device_id, change)).await?;
    transaction.commit().await?;
    Ok(true)
}

async fn put_device(
    connection: &mut Object,
    device_id: &DeviceId,
    change: &DeviceChange,
    by: &Actor,
) -> Result<bool, Error> {
    // Nobody else changes it meanwhile: changes of settings follow one another.
    const IS_EXCUSED: &str = "
        select exists (select from device_settings where device_id = $1 and is_excused)
    ";
    let transaction = begin(connection).await?;
    let is_excused = transaction.query_one(IS_EXCUSED, &[&device_id.as_str()]).await?.try_get(0)?;
    let change = change.put(is_excused);
    let rows = [(device_id.as_str(), &change)];
    let devices = change_devices(&transaction, &rows, true, by.at).await?;
    let is_new = devices.iter().any(|device| device.before.is_none());
    let entry = match is_new {
        true => NewAuditEntry::device_created(device_id, &change),
        false => NewAuditEntry::device_updated(device_id, &change),
    };
    record(&transaction, by, &entry).await?;
    transaction.commit().await?;
    Ok(is_new)
}

async fn put_roster(
    connection: &mut Object,
    rows: &[RosterRow],
    is_dry_run: bool,
    by: &Actor,
) -> Result<RosterOutcome, Error> {
    const KNOWN: &str = "select count(*) from devices";
    let changes: Vec<_> =
        rows.iter().map(|row| (row.device_id.as_str(), row.change.on_roster())).collect();
    let mut changes: Vec<_> =
        changes.iter().map(|(device_id, change)| (*device_id, change)).collect();
    changes.sort_unstable_by_key(|(device_id, _)| *device_id);
    let transaction = begin(connection).await?;
    let devices = change_devices(&transaction, &changes, true, by.at).await?;
    let known: i64 = transaction.query_one(KNOWN, &[]).await?.try_get(0)?;
    let devices = devices.iter().map(|device| (device.before.as_ref(), &device.after));
    let outcome = outcome(devices, known.cast_unsigned());
    if is_dry_run {
        transaction.rollback().await?;
        return Ok(outcome);
    }
    record(&transaction, by, &NewAuditEntry::roster_put(&outcome)).await?;
    transaction.commit().await?;
    Ok(outcome)
}

async fn update_group(
    connection: &mut Object,
    name: &GroupName,
    change: &LevelChange,
    may_create: bool,
    by: &Actor,
) -> Result<bool, Error> {
    const HAS_DEVICES: &str = r#"select exists (select from devices where "group" = $1)"#;
    const WRITE: &str = "
        insert into groups (name, policy, policy_since, paused_from, paused_until, note)
        values ($1, $2, $3, $4, $5, $6)
            on conflict (name) do update
           set policy = excluded.policy, policy_since = excluded.policy_since,
               paused_from = excluded.paused_from, paused_until = excluded.paused_until,
               note = excluded.note
        returning name
    ";
    let transaction = begin(connection).await?;
    let name_text = name.as_str();
    let select = format!("select {LEVEL_COLUMNS} from groups where name = $1");
    let stored = transaction.query_opt(&select, &[&name_text]).await?;
    let stored = stored.map(|row| level(&row, 0)).transpose()?;
    if stored.is_none()
        && !may_create
        && !transaction.query_one(HAS_DEVICES, &[&name_text]).await?.try_get::<_, bool>(0)?
    {
        return Ok(false);
    }
    let before = stored.clone().unwrap_or_default();
    let after = level_after(&before, change, by.at);
    if stored.is_none() || before != after {
        let (policy, [since, from, until]) = level_values(&after);
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
            [&name_text, &policy, &since, &from, &until, &after.note];
        // Fails when a trigger has dropped the row.
        transaction.query_one(WRITE, &values).await?;
    }
    if is_level_judged_otherwise(&before, &after) {
        note_changes(&transaction, &[group_changed(name_text)]).await?;
    }
    record(&transaction, by, &NewAuditEntry::group_updated(name, change)).await?;
    transaction.commit().await?;
    Ok(true)
}

/// The policy of a level, since when it holds, and when its last pause began and ends, as they are stored.
fn level_values(level: &LevelSettings) -> (String, [Option<jiff::Timestamp>; 3]) {
    let (from, until) = pause_times(level.pause);
    let times = [level.policy_since, from, until].map(|time| time.map(Timestamp::to_jiff));
    (level.policy.to_json().to_string(), times)
}

async fn delete_group(
    connection: &mut Object,
    name: &GroupName,
    by: &Actor,
) -> Result<Option<u64>, Error> {
    const DELETE: &str = "delete from groups where name = $1";
    const MEMBERS: &str = r#"select device_id from devices where "group" = $1 order by device_id"#;
    let transaction = begin(connection).await?;
    let name_text = name.as_str();
    let deleted = transaction.execute(DELETE, &[&name_text]).await?;
    let rows = transaction.query(MEMBERS, &[&name_text]).await?;
    let mut members = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<&str>, _>>()?;
    if deleted == 0 && members.is_empty() {
        return Ok(None);
    }
    members.sort_unstable();
    let leave = DeviceChange { group: Some(None), ..DeviceChange::default() };
    let members: Vec<_> = members.into_iter().map(|member| (member, &leave)).collect();
    let left = change_devices(&transaction, &members, false, by.at).await?.len() as u64;
    record(&transaction, by, &NewAuditEntry::group_deleted(name, left)).await?;
    transaction.commit().await?;
    Ok(Some(left))
}

async fn update_fleet(
    connection: &mut Object,
    change: &LevelChange,
    by: &Actor,
) -> Result<(), Error> {
    const SELECT: &str =
        "select policy, policy_since, paused_from, paused_until, null::text from fleet_state";
    const WRITE: &str = "
        update fleet_state set policy = $1, policy_since = $2, paused_from = $3, paused_until = $4
        returning id
    ";
    let transaction = begin(connection).await?;
    let before = level(&transaction.query_one(SELECT, &[]).await?, 0)?;
    let after = level_after(&before, change, by.at);
    if is_level_judged_otherwise(&before, &after) {
        let (policy, [since, from, until]) = level_values(&after);
        // Fails when a trigger has dropped the change.
        transaction.query_one(WRITE, &[&policy, &since, &from, &until]).await?;
        note_changes(&transaction, &[fleet_changed()]).await?;
    }
    record(&transaction, by, &NewAuditEntry::fleet_updated(change)).await?;
    transaction.commit().await
}

async fn create_window(
    connection: &mut Object,
    window: &NewWindow,
    by: &Actor,
) -> Result<Option<i64>, Error> {
    const COUNT: &str = "select count(*) from windows";
    const INSERT: &str = "
        insert into windows (name, scope, key, effect, timezone, weekly, starts_at, ends_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        returning id
    ";
    let transaction = begin(connection).await?;
    let number: i64 = transaction.query_one(COUNT, &[]).await?.try_get(0)?;
    if number >= i64::from(MOST_WINDOWS) {
        return Ok(None);
    }
    let (scope, key, effect) = (window.scope.word(), window.scope.key(), window.effect.as_str());
    let [from, until] =
        [window.times.from, window.times.until].map(|time| time.map(Timestamp::to_jiff));
    let weekly = window.weekly();
    let row = transaction
        .query_one(
            INSERT,
            &[&window.name, &scope, &key, &effect, &window.timezone, &weekly, &from, &until],
        )
        .await?;
    let id = row.try_get(0)?;
    note_changes(&transaction, &[window_changed(&window.scope)]).await?;
    record(&transaction, by, &NewAuditEntry::window_created(id, window)).await?;
    transaction.commit().await?;
    Ok(Some(id))
}

/// The name of a window, and for what it is.
async fn stored_window(
    transaction: &Transaction<'_>,
    id: i64,
) -> Result<Option<(String, Option<WindowScope>)>, Error> {
    const SELECT: &str = "select name, scope, key from windows where id = $1";
    let Some(row) = transaction.query_opt(SELECT, &[&id]).await? else { return Ok(None) };
    let scope = WindowScope::new(row.try_get(1)?, row.try_get(2)?);
    Ok(Some((row.try_get(0)?, scope)))
}

async fn replace_window(
    connection: &mut Object,
    id: i64,
    window: &NewWindow,
    by: &Actor,
) -> Result<bool, Error> {
    // A row that is the same as before is not written.
    const REPLACE: &str = "
        update windows
           set name = $2, scope = $3, key = $4, effect = $5, timezone = $6, weekly = $7,
               starts_at = $8, ends_at = $9
         where id = $1
           and (scope, key, effect, timezone, weekly, starts_at, ends_at)
               is distinct from ($3, $4, $5, $6, $7, $8, $9)
    ";
    const RENAME: &str = "update windows set name = $2 where id = $1 and name <> $2";
    let transaction = begin(connection).await?;
    let Some((_, scope)) = stored_window(&transaction, id).await? else { return Ok(false) };
    outbox::look_again(&transaction, by.at).await?;
    let [from, until] =
        [window.times.from, window.times.until].map(|time| time.map(Timestamp::to_jiff));
    let weekly = window.weekly();
    let replaced = transaction
        .execute(
            REPLACE,
            &[
                &id,
                &window.name,
                &window.scope.word(),
                &window.scope.key(),
                &window.effect.as_str(),
                &window.timezone,
                &weekly,
                &from,
                &until,
            ],
        )
        .await?;
    if replaced > 0 {
        let mut changes: Vec<_> = scope.iter().chain([&window.scope]).map(window_changed).collect();
        changes.dedup();
        note_changes(&transaction, &changes).await?;
    } else {
        transaction.execute(RENAME, &[&id, &window.name]).await?;
    }
    record(&transaction, by, &NewAuditEntry::window_replaced(id, window)).await?;
    transaction.commit().await?;
    Ok(true)
}

async fn delete_window(connection: &mut Object, id: i64, by: &Actor) -> Result<bool, Error> {
    // Fails when a trigger has kept the row.
    const DELETE: &str = "delete from windows where id = $1 returning id";
    let transaction = begin(connection).await?;
    let Some((name, scope)) = stored_window(&transaction, id).await? else { return Ok(false) };
    outbox::look_again(&transaction, by.at).await?;
    transaction.query_one(DELETE, &[&id]).await?;
    let changes: Vec<_> = scope.iter().map(window_changed).collect();
    note_changes(&transaction, &changes).await?;
    record(&transaction, by, &NewAuditEntry::window_deleted(id, &name)).await?;
    transaction.commit().await?;
    Ok(true)
}

/// Removes what was said about a device that begins anew.
pub(super) async fn forget(transaction: &Transaction<'_>, device_id: &str) -> Result<(), Error> {
    for table in ["device_settings", "device_tags"] {
        let delete = format!("delete from {table} where device_id = $1");
        transaction.execute(&delete, &[&device_id]).await?;
    }
    Ok(())
}
