//! The rows that a batch of events adds: devices, events and event ids. The write connection calls it within the
//! transaction of the batch. Nothing here may begin or end a transaction.

use std::collections::{BTreeMap, HashMap};

use pisync_core::{DeviceId, EventId, GroupName, JobName, Mbps, Metadata, SyncDuration, Timestamp};
use rusqlite::{
    CachedStatement, OptionalExtension, Transaction,
    ffi::{SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_ROWID},
    params,
};

use super::{
    connection::{expect_row, row_dropped},
    history::kept_event,
    ids,
    rows::device_number,
};
use crate::store::{Batch, Duplicate, StoredEvent, Written};

/// Answers a device's number, and whether the device is new.
pub(super) fn find_or_add(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    received: Timestamp,
) -> rusqlite::Result<(i64, bool)> {
    if let Some(number) = device_number(transaction, device_id)? {
        return Ok((number, false));
    }
    let written = transaction
        .prepare_cached("insert into devices (device_id, created_at) values (?1, ?2)")?
        .execute(params![device_id.as_str(), received.as_millisecond()])?;
    expect_row("devices", written)?;
    Ok((transaction.last_insert_rowid(), true))
}

/// The groups of the existing devices that the claims of `batch` are about.
pub(super) fn groups_of(
    transaction: &Transaction<'_>,
    batch: &Batch,
) -> rusqlite::Result<HashMap<String, Option<String>>> {
    let mut select =
        transaction.prepare_cached(r#"select "group" from devices where device_id = ?1"#)?;
    let mut groups = HashMap::new();
    for device_id in batch.claimed_devices().into_keys() {
        let group = select.query_row([device_id.as_str()], |row| row.get(0)).optional()?;
        groups.extend(group.map(|group| (device_id.to_string(), group)));
    }
    Ok(groups)
}

/// Registers devices in groups.
pub(super) fn register(
    transaction: &Transaction<'_>,
    devices: &BTreeMap<&DeviceId, &GroupName>,
    received: Timestamp,
) -> rusqlite::Result<()> {
    const REGISTER: &str =
        r#"insert into devices (device_id, "group", created_at) values (?1, ?2, ?3)"#;
    let mut insert = transaction.prepare_cached(REGISTER)?;
    for (device_id, group) in devices {
        let written = insert.execute(params![
            device_id.as_str(),
            group.as_str(),
            received.as_millisecond()
        ])?;
        expect_row("devices", written)?;
    }
    Ok(())
}

/// Moves `created_at` of devices back to the `received_at` of their first event.
pub(super) fn move_devices_back(
    transaction: &Transaction<'_>,
    batch: &Batch,
    order: &[usize],
    numbers: &[i64],
) -> rusqlite::Result<()> {
    const MOVE_BACK: &str = "update devices set created_at = ?2 where id = ?1 and created_at > ?2";
    let mut move_back = transaction.prepare_cached(MOVE_BACK)?;
    for positions in batch.by_device(order) {
        let (received, _) = batch.received_within(positions);
        move_back.execute(params![numbers[positions[0]], received.as_millisecond()])?;
    }
    Ok(())
}

/// The ids for a batch's events.
#[derive(Clone, Copy)]
pub(super) enum Ids<'a> {
    /// This id and the following ones, without gaps.
    From(i64),
    /// An id for each event.
    Given(&'a [i64]),
}

/// Inserts a batch's events, except those that were reported before. `numbers` are the numbers of their devices.
pub(super) fn insert_events(
    transaction: &Transaction<'_>,
    batch: &Batch,
    numbers: &[i64],
    ids: Ids<'_>,
    written: &mut Written,
) -> rusqlite::Result<()> {
    const INSERT_EVENT: &str = "
        insert into sync_events (
            id, device, timestamp, total_files_synced, total_errors, internet_speed,
            job, duration, bytes_synced, metadata, created_at, event_id
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
    ";
    let mut insert = transaction.prepare_cached(INSERT_EVENT)?;
    let mut keys = EventKeys { transaction, add: None };
    written.ids.reserve_exact(batch.events.len());
    let mut last_id = 0;
    let mut positions: Vec<usize> = (0..batch.events.len()).collect();
    if let Ids::Given(_) = ids {
        // In the order of the index and of the event ids. Writes then go to neighbouring places.
        positions.sort_unstable_by_key(|position| {
            (numbers[*position], batch.events[*position].timestamp, *position)
        });
    }
    for position in positions {
        let (event, number) = (&batch.events[position], &numbers[position]);
        let id = match ids {
            Ids::From(first) => first.max(last_id + 1),
            Ids::Given(ids) => ids[position],
        };
        if let Some(event_id) = &event.event_id
            && !keys.add(*number, event_id, id, batch.received)?
        {
            let (id, first) = keys.find(*number, event_id)?;
            written.ids.push(id);
            written.duplicates.push(Duplicate { position, first });
            continue;
        }
        let mut insert_as = |id: i64| {
            let written = insert.execute(params![
                id,
                number,
                event.timestamp.as_millisecond(),
                event.total_files_synced,
                event.total_errors,
                event.internet_speed.map(Mbps::hundredths),
                event.job.as_ref().map(JobName::as_str),
                event.duration.map(SyncDuration::milliseconds),
                event.bytes_synced.map(u64::cast_signed),
                event.metadata.as_ref().map(Metadata::as_str),
                batch.received_at(position).as_millisecond(),
                event.event_id.as_ref().map(EventId::as_str),
            ])?;
            expect_row("sync_events", written)
        };
        let id = match insert_as(id) {
            Err(error) if is_id_taken(&error) => {
                // An acknowledged event is stored, even under another id.
                let new_id = ids::next_or_free(transaction, id)?;
                insert_as(new_id)?;
                if let Some(event_id) = &event.event_id {
                    keys.change(*number, event_id, new_id)?;
                }
                tracing::warn!(
                    device_id = %event.device_id,
                    id,
                    new_id,
                    "another program has taken the id of an event, which is therefore stored under another one; insert rows into sync_events without an id"
                );
                new_id
            }
            stored => {
                stored?;
                id
            }
        };
        written.ids.push(id);
        last_id = last_id.max(id);
    }
    written.duplicates.sort_unstable_by_key(|duplicate| duplicate.position);
    Ok(())
}

/// Whether a row was refused because another row has its id.
fn is_id_taken(error: &rusqlite::Error) -> bool {
    error.sqlite_error().is_some_and(|error| {
        matches!(error.extended_code, SQLITE_CONSTRAINT_PRIMARYKEY | SQLITE_CONSTRAINT_ROWID)
    })
}

/// Finds the id of an event by its device and the device's own id for it.
pub(super) const FIND_KEY: &str = "select id from event_keys where device = ?1 and event_id = ?2";

/// The ids that devices gave their events.
struct EventKeys<'a> {
    transaction: &'a Transaction<'a>,
    /// Prepared at the first event of a batch that has an id of its own.
    add: Option<CachedStatement<'a>>,
}

impl EventKeys<'_> {
    /// Adds an event id. False, and nothing is changed, when the device has reported it before.
    fn add(
        &mut self,
        device: i64,
        event_id: &EventId,
        id: i64,
        received: Timestamp,
    ) -> rusqlite::Result<bool> {
        const ADD: &str = "
            insert into event_keys (device, event_id, id, created_at) values (?1, ?2, ?3, ?4)
                on conflict (device, event_id) do nothing
        ";
        let add = match self.add.take() {
            Some(add) => add,
            None => self.transaction.prepare_cached(ADD)?,
        };
        let key = params![device, event_id.as_str(), id, received.as_millisecond()];
        Ok(self.add.insert(add).execute(key)? > 0)
    }

    /// Changes the id of the event to which the event id leads.
    fn change(&self, device: i64, event_id: &EventId, id: i64) -> rusqlite::Result<()> {
        self.transaction
            .prepare_cached("update event_keys set id = ?3 where device = ?1 and event_id = ?2")?
            .execute(params![device, event_id.as_str(), id])
            .map(drop)
    }

    /// The id of the event that was first reported, and that event if it is still kept.
    fn find(
        &self,
        device: i64,
        event_id: &EventId,
    ) -> rusqlite::Result<(i64, Option<StoredEvent>)> {
        let id = self
            .transaction
            .prepare_cached(FIND_KEY)?
            .query_row(params![device, event_id.as_str()], |row| row.get(0))
            .optional()?;
        // The event id was not added, and does not exist either.
        let Some(id) = id else { return Err(row_dropped("event_keys")) };
        Ok((id, kept_event(self.transaction, id)?))
    }
}
