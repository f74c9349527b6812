//! Changes in SQLite what people set for the fleet, its groups, and its devices. The API and the command line call it through
//! `FleetChanges`. What a change makes of a device or a level is decided in `store::fleet_changes`.

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use super::{
    apply::apply_journal,
    audit::record,
    connection::expect_row,
    fleet_settings::{LEVEL_COLUMNS, level},
    groups, outbox,
    rows::optional_time,
    store::SqliteStore,
    write_connection::WriteConnection,
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
impl FleetChanges for SqliteStore {
    async fn update_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        let (device_id, change, by) = (device_id.clone(), change.clone(), *by);
        self.writer.call(move |writer| update_device(writer, &device_id, &change, &by)).await
    }

    async fn put_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        let (device_id, change, by) = (device_id.clone(), change.clone(), *by);
        self.writer.call(move |writer| put_device(writer, &device_id, &change, &by)).await
    }

    async fn put_roster(
        &self,
        rows: &[RosterRow],
        is_dry_run: bool,
        by: &Actor,
    ) -> Result<RosterOutcome, StoreError> {
        let (rows, by) = (rows.to_vec(), *by);
        self.writer.call(move |writer| put_roster(writer, &rows, is_dry_run, &by)).await
    }

    async fn update_group(
        &self,
        name: &GroupName,
        change: &LevelChange,
        may_create: bool,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        let (name, change, by) = (name.clone(), change.clone(), *by);
        self.writer
            .call(move |writer| update_group(writer.connection(), &name, &change, may_create, &by))
            .await
    }

    async fn delete_group(&self, name: &GroupName, by: &Actor) -> Result<Option<u64>, StoreError> {
        let (name, by) = (name.clone(), *by);
        self.writer.call(move |writer| delete_group(writer, &name, &by)).await
    }

    async fn update_fleet(&self, change: &LevelChange, by: &Actor) -> Result<(), StoreError> {
        let (change, by) = (change.clone(), *by);
        self.writer.call(move |writer| update_fleet(writer.connection(), &change, &by)).await
    }

    async fn create_window(
        &self,
        window: &NewWindow,
        by: &Actor,
    ) -> Result<Option<i64>, StoreError> {
        let (window, by) = (window.clone(), *by);
        self.writer.call(move |writer| create_window(writer.connection(), &window, &by)).await
    }

    async fn replace_window(
        &self,
        id: i64,
        window: &NewWindow,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        let (window, by) = (window.clone(), *by);
        self.writer.call(move |writer| replace_window(writer.connection(), id, &window, &by)).await
    }

    async fn delete_window(&self, id: i64, by: &Actor) -> Result<bool, StoreError> {
        let by = *by;
        self.writer.call(move |writer| delete_window(writer.connection(), id, &by)).await
    }
}

/// Tells the sweep whom to evaluate again.
fn note_changes(transaction: &Transaction<'_>, changes: &[Changed]) -> rusqlite::Result<()> {
    const COUNT: &str = "update fleet_state set version = version + ?1 returning version";
    const NOTE: &str = "insert into fleet_changes (version, scope, key) values (?1, ?2, ?3)";
    let number = i64::try_from(changes.len()).unwrap_or(i64::MAX);
    if number == 0 {
        return Ok(());
    }
    let last: i64 = transaction.prepare_cached(COUNT)?.query_row([number], |row| row.get(0))?;
    let mut note = transaction.prepare_cached(NOTE)?;
    for (version, (scope, key)) in (last - number + 1..).zip(changes) {
        expect_row("fleet_changes", note.execute(params![version, scope, key])?)?;
    }
    Ok(())
}

/// The settings of a device `d`, whose row `s` there may not be, as [`device_settings`] reads them.
pub(super) const SETTINGS_COLUMNS: &str = "
    ifnull(s.policy, '{}'), s.policy_since, s.paused_from, s.paused_until, s.note, s.expected_from,
    ifnull(s.is_excused, 0), (select json_group_array(t.tag) from device_tags t where t.device = d.id)
";

/// The number of [`SETTINGS_COLUMNS`].
pub(super) const SETTINGS: usize = 8;

/// Reads [`SETTINGS_COLUMNS`] from column `first` on.
pub(super) fn device_settings(row: &Row<'_>, first: usize) -> rusqlite::Result<DeviceSettings> {
    let tags: String = row.get(first + 7)?;
    let mut tags: Vec<String> = serde_json::from_str(&tags).unwrap_or_default();
    tags.sort_unstable();
    Ok(DeviceSettings {
        level: level(row, first)?,
        expected_from: optional_time(row, first + 5)?,
        is_excused: row.get(first + 6)?,
        tags,
    })
}

/// The number of a device, and what is said about it.
fn find(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<(i64, DeviceRecord)>> {
    let select = format!(
        r#"select d.id, d.name, d."group", {SETTINGS_COLUMNS}
             from devices d
             left join device_settings s on s.device = d.id
            where d.device_id = ?1"#
    );
    transaction
        .prepare_cached(&select)?
        .query_row([device_id.as_str()], |row| {
            let (name, group) = (row.get(1)?, row.get(2)?);
            let record = DeviceRecord { name, group, settings: device_settings(row, 3)? };
            Ok((row.get(0)?, record))
        })
        .optional()
}

/// What is said about a device before a change, unless it is new, and after it.
type BeforeAndAfter = (Option<DeviceRecord>, DeviceRecord);

/// Changes what is said about a known device.
fn change_known(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    change: &DeviceChange,
    now: Timestamp,
    changes: &mut Vec<Changed>,
) -> rusqlite::Result<Option<BeforeAndAfter>> {
    const UPDATE_DEVICE: &str = r#"update devices set name = ?2, "group" = ?3 where id = ?1"#;
    let Some((number, before)) = find(transaction, device_id)? else { return Ok(None) };
    let after = before.after(change, now);
    if before.moves_to(&after) {
        groups::note_move(transaction, number, now)?;
    }
    if (&before.name, &before.group) != (&after.name, &after.group) {
        let written = transaction.prepare_cached(UPDATE_DEVICE)?.execute(params![
            number,
            after.name,
            after.group
        ])?;
        expect_row("devices", written)?;
    }
    if before.settings != after.settings {
        write_settings(transaction, number, &after)?;
    }
    if before.settings.tags != after.settings.tags {
        write_tags(transaction, number, &after.settings.tags)?;
    }
    if before.is_judged_otherwise(&after) {
        changes.push(device_changed(device_id.as_str()));
    }
    Ok(Some((Some(before), after)))
}

/// Changes what is said about a device, which becomes known if it is not.
fn change(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    change: &DeviceChange,
    now: Timestamp,
    changes: &mut Vec<Changed>,
) -> rusqlite::Result<BeforeAndAfter> {
    const REGISTER: &str =
        r#"insert into devices (device_id, name, "group", created_at) values (?1, ?2, ?3, ?4)"#;
    if let Some(known) = change_known(transaction, device_id, change, now, changes)? {
        return Ok(known);
    }
    let after = DeviceRecord::default().after(change, now);
    let written = transaction.prepare_cached(REGISTER)?.execute(params![
        device_id.as_str(),
        after.name,
        after.group,
        now.as_millisecond()
    ])?;
    expect_row("devices", written)?;
    let number = transaction.last_insert_rowid();
    write_settings(transaction, number, &after)?;
    write_tags(transaction, number, &after.settings.tags)?;
    changes.push(device_changed(device_id.as_str()));
    Ok((None, after))
}

fn write_settings(
    transaction: &Transaction<'_>,
    device: i64,
    record: &DeviceRecord,
) -> rusqlite::Result<()> {
    const WRITE: &str = "
        insert into device_settings (
            device, policy, policy_since, paused_from, paused_until, expected_from, is_excused, note
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
            on conflict (device) do update
           set policy = excluded.policy, policy_since = excluded.policy_since,
               paused_from = excluded.paused_from, paused_until = excluded.paused_until,
               expected_from = excluded.expected_from, is_excused = excluded.is_excused,
               note = excluded.note
    ";
    let (paused_from, paused_until) = record.pause();
    let settings = &record.settings;
    let written = transaction.prepare_cached(WRITE)?.execute(params![
        device,
        record.policy(),
        settings.level.policy_since.map(Timestamp::as_millisecond),
        paused_from.map(Timestamp::as_millisecond),
        paused_until.map(Timestamp::as_millisecond),
        settings.expected_from.map(Timestamp::as_millisecond),
        settings.is_excused,
        settings.level.note,
    ])?;
    expect_row("device_settings", written)
}

fn write_tags(transaction: &Transaction<'_>, device: i64, tags: &[String]) -> rusqlite::Result<()> {
    transaction.prepare_cached("delete from device_tags where device = ?1")?.execute([device])?;
    let mut insert =
        transaction.prepare_cached("insert into device_tags (device, tag) values (?1, ?2)")?;
    for tag in tags {
        expect_row("device_tags", insert.execute(params![device, tag])?)?;
    }
    Ok(())
}

/// Begins a transaction on devices. What is acknowledged belongs to the groups in which devices were until now.
fn begin(writer: &mut WriteConnection) -> rusqlite::Result<Transaction<'_>> {
    apply_journal(writer)?;
    writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)
}

fn update_device(
    writer: &mut WriteConnection,
    device_id: &DeviceId,
    change: &DeviceChange,
    by: &Actor,
) -> rusqlite::Result<bool> {
    let transaction = begin(writer)?;
    let mut changes = Vec::new();
    if change_known(&transaction, device_id, change, by.at, &mut changes)?.is_none() {
        return Ok(false);
    }
    note_changes(&transaction, &changes)?;
    record(&transaction, by, &NewAuditEntry::device_updated(device_id, change))?;
    transaction.commit()?;
    Ok(true)
}

fn put_device(
    writer: &mut WriteConnection,
    device_id: &DeviceId,
    change: &DeviceChange,
    by: &Actor,
) -> rusqlite::Result<bool> {
    let transaction = begin(writer)?;
    let is_excused =
        find(&transaction, device_id)?.is_some_and(|(_, record)| record.settings.is_excused);
    let change = change.put(is_excused);
    let mut changes = Vec::new();
    let (before, _) = self::change(&transaction, device_id, &change, by.at, &mut changes)?;
    let entry = match before {
        None => NewAuditEntry::device_created(device_id, &change),
        Some(_) => NewAuditEntry::device_updated(device_id, &change),
    };
    note_changes(&transaction, &changes)?;
    record(&transaction, by, &entry)?;
    transaction.commit()?;
    Ok(before.is_none())
}

fn put_roster(
    writer: &mut WriteConnection,
    rows: &[RosterRow],
    is_dry_run: bool,
    by: &Actor,
) -> rusqlite::Result<RosterOutcome> {
    const KNOWN: &str = "select count(*) from devices";
    let transaction = begin(writer)?;
    let mut changes = Vec::new();
    let mut devices = Vec::with_capacity(rows.len());
    for row in rows {
        let change = row.change.on_roster();
        let device = self::change(&transaction, &row.device_id, &change, by.at, &mut changes)?;
        devices.push(device);
    }
    let known: i64 = transaction.query_row(KNOWN, [], |row| row.get(0))?;
    let devices = devices.iter().map(|(before, after)| (before.as_ref(), after));
    let outcome = outcome(devices, known.cast_unsigned());
    if is_dry_run {
        transaction.rollback()?;
        return Ok(outcome);
    }
    note_changes(&transaction, &changes)?;
    record(&transaction, by, &NewAuditEntry::roster_put(&outcome))?;
    transaction.commit()?;
    Ok(outcome)
}

/// Whether any device is in a group.
fn has_devices(transaction: &Transaction<'_>, name: &GroupName) -> rusqlite::Result<bool> {
    const HAS: &str = r#"select exists (select 1 from devices where "group" = ?1)"#;
    transaction.query_row(HAS, [name.as_str()], |row| row.get(0))
}

fn update_group(
    connection: &mut Connection,
    name: &GroupName,
    change: &LevelChange,
    may_create: bool,
    by: &Actor,
) -> rusqlite::Result<bool> {
    const WRITE: &str = "
        insert into groups (name, policy, policy_since, paused_from, paused_until, note)
        values (?1, ?2, ?3, ?4, ?5, ?6)
            on conflict (name) do update
           set policy = excluded.policy, policy_since = excluded.policy_since,
               paused_from = excluded.paused_from, paused_until = excluded.paused_until,
               note = excluded.note
    ";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let select = format!("select {LEVEL_COLUMNS} from groups where name = ?1");
    let stored = transaction.query_row(&select, [name.as_str()], |row| level(row, 0)).optional()?;
    if stored.is_none() && !may_create && !has_devices(&transaction, name)? {
        return Ok(false);
    }
    let before = stored.clone().unwrap_or_default();
    let after = level_after(&before, change, by.at);
    if stored.is_none() || before != after {
        let written = transaction.execute(WRITE, level_values(name.as_str(), &after))?;
        expect_row("groups", written)?;
    }
    if is_level_judged_otherwise(&before, &after) {
        note_changes(&transaction, &[group_changed(name.as_str())])?;
    }
    record(&transaction, by, &NewAuditEntry::group_updated(name, change))?;
    transaction.commit()?;
    Ok(true)
}

/// A key, a policy and when it was changed, the ends of the last pause, and a note.
type LevelValues<'a> = (&'a str, String, Option<i64>, Option<i64>, Option<i64>, &'a Option<String>);

/// A key, and the settings of a level, as parameters.
fn level_values<'a>(key: &'a str, level: &'a LevelSettings) -> LevelValues<'a> {
    let (paused_from, paused_until) = pause_times(level.pause);
    (
        key,
        level.policy.to_json().to_string(),
        level.policy_since.map(Timestamp::as_millisecond),
        paused_from.map(Timestamp::as_millisecond),
        paused_until.map(Timestamp::as_millisecond),
        &level.note,
    )
}

fn delete_group(
    writer: &mut WriteConnection,
    name: &GroupName,
    by: &Actor,
) -> rusqlite::Result<Option<u64>> {
    const MEMBERS: &str = r#"select device_id from devices where "group" = ?1 order by device_id"#;
    const DELETE: &str = "delete from groups where name = ?1";
    let transaction = begin(writer)?;
    let deleted = transaction.execute(DELETE, [name.as_str()])?;
    let members: Vec<String> = transaction
        .prepare_cached(MEMBERS)?
        .query_map([name.as_str()], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    if deleted == 0 && members.is_empty() {
        return Ok(None);
    }
    let leave = DeviceChange { group: Some(None), ..DeviceChange::default() };
    let mut changes = Vec::new();
    let mut left = 0;
    for member in &members {
        // Foreign SQL may have written an id that nobody can request.
        let Ok(device_id) = DeviceId::new(member) else { continue };
        change_known(&transaction, &device_id, &leave, by.at, &mut changes)?;
        left += 1;
    }
    note_changes(&transaction, &changes)?;
    record(&transaction, by, &NewAuditEntry::group_deleted(name, left))?;
    transaction.commit()?;
    Ok(Some(left))
}

fn update_fleet(
    connection: &mut Connection,
    change: &LevelChange,
    by: &Actor,
) -> rusqlite::Result<()> {
    const SELECT: &str =
        "select policy, policy_since, paused_from, paused_until, null from fleet_state";
    const WRITE: &str = "
        update fleet_state set policy = ?1, policy_since = ?2, paused_from = ?3, paused_until = ?4
    ";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let before = transaction.query_row(SELECT, [], |row| level(row, 0))?;
    let after = level_after(&before, change, by.at);
    if is_level_judged_otherwise(&before, &after) {
        let (_, policy, policy_since, paused_from, paused_until, _) = level_values("", &after);
        let written =
            transaction.execute(WRITE, params![policy, policy_since, paused_from, paused_until])?;
        expect_row("fleet_state", written)?;
        note_changes(&transaction, &[fleet_changed()])?;
    }
    record(&transaction, by, &NewAuditEntry::fleet_updated(change))?;
    transaction.commit()
}

fn create_window(
    connection: &mut Connection,
    window: &NewWindow,
    by: &Actor,
) -> rusqlite::Result<Option<i64>> {
    const COUNT: &str = "select count(*) from windows";
    const INSERT: &str = "
        insert into windows (name, scope, key, effect, timezone, weekly, starts_at, ends_at)
        values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
    ";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let number: i64 = transaction.query_row(COUNT, [], |row| row.get(0))?;
    if number >= i64::from(MOST_WINDOWS) {
        return Ok(None);
    }
    let written = transaction.execute(
        INSERT,
        params![
            window.name,
            window.scope.word(),
            window.scope.key(),
            window.effect.as_str(),
            window.timezone,
            window.weekly(),
            window.times.from.map(Timestamp::as_millisecond),
            window.times.until.map(Timestamp::as_millisecond),
        ],
    )?;
    expect_row("windows", written)?;
    let id = transaction.last_insert_rowid();
    note_changes(&transaction, &[window_changed(&window.scope)])?;
    record(&transaction, by, &NewAuditEntry::window_created(id, window))?;
    transaction.commit()?;
    Ok(Some(id))
}

/// The name of a window, and for what it is.
fn stored_window(
    transaction: &Transaction<'_>,
    id: i64,
) -> rusqlite::Result<Option<(String, Option<WindowScope>)>> {
    const SELECT: &str = "select name, scope, key from windows where id = ?1";
    transaction
        .query_row(SELECT, [id], |row| {
            let (scope, key): (String, String) = (row.get(1)?, row.get(2)?);
            Ok((row.get(0)?, WindowScope::new(&scope, &key)))
        })
        .optional()
}

fn replace_window(
    connection: &mut Connection,
    id: i64,
    window: &NewWindow,
    by: &Actor,
) -> rusqlite::Result<bool> {
    // A row that is the same as before is not written.
    const REPLACE: &str = "
        update windows
           set name = ?2, scope = ?3, key = ?4, effect = ?5, timezone = ?6, weekly = ?7,
               starts_at = ?8, ends_at = ?9
         where id = ?1
           and (scope, key, effect, timezone, weekly, starts_at, ends_at)
            is not (?3, ?4, ?5, ?6, ?7, ?8, ?9)
    ";
    const RENAME: &str = "update windows set name = ?2 where id = ?1 and name <> ?2";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let Some((_, scope)) = stored_window(&transaction, id)? else { return Ok(false) };
    outbox::look_again(&transaction, by.at)?;
    let replaced = transaction.execute(
        REPLACE,
        params![
            id,
            window.name,
            window.scope.word(),
            window.scope.key(),
            window.effect.as_str(),
            window.timezone,
            window.weekly(),
            window.times.from.map(Timestamp::as_millisecond),
            window.times.until.map(Timestamp::as_millisecond),
        ],
    )?;
    if replaced > 0 {
        let mut changes: Vec<_> = scope.iter().chain([&window.scope]).map(window_changed).collect();
        changes.dedup();
        note_changes(&transaction, &changes)?;
    } else {
        transaction.execute(RENAME, params![id, window.name])?;
    }
    record(&transaction, by, &NewAuditEntry::window_replaced(id, window))?;
    transaction.commit()?;
    Ok(true)
}

fn delete_window(connection: &mut Connection, id: i64, by: &Actor) -> rusqlite::Result<bool> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let Some((name, scope)) = stored_window(&transaction, id)? else { return Ok(false) };
    outbox::look_again(&transaction, by.at)?;
    let deleted = transaction.execute("delete from windows where id = ?1", [id])?;
    expect_row("windows", deleted)?;
    let changes: Vec<_> = scope.iter().map(window_changed).collect();
    note_changes(&transaction, &changes)?;
    record(&transaction, by, &NewAuditEntry::window_deleted(id, &name))?;
    transaction.commit()?;
    Ok(true)
}

/// Removes what was said about a device that begins anew.
pub(super) fn forget(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    for table in ["device_settings", "device_tags"] {
        transaction.execute(&format!("delete from {table} where device = ?1"), [device])?;
    }
    Ok(())
}
