//! Deletes a device in steps (see `store/deletion.rs`). Each step is one transaction of the writer, for which ingest
//! waits, so it must be short. It must also subtract the deleted events from the sums by day and hour, in the same
//! transaction.

use std::time::Instant;

use async_trait::async_trait;
use pisync_core::{DeviceId, LONGEST_LEAD};
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::{
    aggregated_events,
    apply::apply_journal,
    audit, fleet_changes, health, roll_ups,
    rows::{device_number, time},
    store::SqliteStore,
    summaries, verify,
    write_connection::WriteConnection,
};
use crate::store::{
    Actor, DeletionStep, DeviceDeletions, StoreError,
    audit::NewAuditEntry,
    deletion::{Deletion, stored_actor},
};

#[async_trait]
impl DeviceDeletions for SqliteStore {
    async fn begin_deletion(&self, device_id: &DeviceId, by: &Actor) -> Result<bool, StoreError> {
        let (device_id, by) = (device_id.clone(), *by);
        self.writer.call(move |writer| begin(writer, &device_id, &by)).await
    }

    async fn delete_some(&self, device_id: &DeviceId) -> Result<DeletionStep, StoreError> {
        let (device_id, most) = (device_id.clone(), self.delete_step.get());
        let delete_some = move |writer: &mut WriteConnection| {
            let started = Instant::now();
            delete_some(writer, &device_id, most).map(|step| (step, started.elapsed()))
        };
        let (step, took) = self.writer.call(delete_some).await?;
        if matches!(step, DeletionStep::More(_)) {
            self.delete_step.learn(took);
        }
        Ok(step)
    }

    async fn deletions(&self) -> Result<Vec<(DeviceId, u64)>, StoreError> {
        self.read(deletions).await
    }
}

fn deletions(connection: &Connection) -> rusqlite::Result<Vec<(DeviceId, u64)>> {
    let mut select =
        connection.prepare_cached("select device_id, deleted_events from device_deletions")?;
    let rows = select.query_map([], |row| {
        let deleted: i64 = row.get(1)?;
        Ok((row.get::<_, String>(0)?, deleted.cast_unsigned()))
    })?;
    rows.filter_map(|row| match row {
        Ok((id, deleted)) => DeviceId::new(&id).ok().map(|id| Ok((id, deleted))),
        Err(error) => Some(Err(error)),
    })
    .collect()
}

fn begin(writer: &mut WriteConnection, device_id: &DeviceId, by: &Actor) -> rusqlite::Result<bool> {
    // Events whose `received_at` is in the future, because a clock was wrong, are deleted too.
    const BEGIN: &str = "
        insert into device_deletions (
            device_id, received_until, requested_at, via, key_id, address, deleted_events
        )
        select ?1, max(?3, ifnull(max(last_received), ?3)), ?3, ?4, ?5, ?6, 0
          from device_jobs
         where device = ?2
            on conflict (device_id) do nothing
    ";
    // Events that were acknowledged before are deleted with the device.
    apply_journal(writer)?;
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let Some(number) = device_number(&transaction, device_id)? else { return Ok(false) };
    transaction.execute(
        BEGIN,
        params![
            device_id.as_str(),
            number,
            by.at.as_millisecond(),
            by.via.as_str(),
            by.via.key_id(),
            by.address.map(|address| address.to_string()),
        ],
    )?;
    transaction.commit()?;
    Ok(true)
}

/// Deletes at most `most` events, or at most `most` event ids. When fewer are left, it does the last step.
fn delete_some(
    writer: &mut WriteConnection,
    device_id: &DeviceId,
    most: i64,
) -> rusqlite::Result<DeletionStep> {
    const DELETE_KEYS: &str = "
        delete from event_keys
         where (device, event_id) in (
                   select device, event_id
                     from event_keys
                    where device = ?1 and created_at <= ?2
                    limit ?3
               )
    ";
    const DELETE_JOBS: &str = "
        delete from device_jobs
         where (device, job) in (select device, job from device_jobs where device = ?1 limit ?2)
    ";
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let Some(Deletion { received_until, by, deleted_events }) = deletion(&transaction, device_id)?
    else {
        return Ok(DeletionStep::None);
    };
    let until = received_until.as_millisecond();
    let Some(device) = device_number(&transaction, device_id)? else {
        // Foreign SQL has deleted the rest.
        end(&transaction, device_id, &by, deleted_events)?;
        transaction.commit()?;
        return Ok(DeletionStep::Done(deleted_events));
    };

    let (events, is_more) = delete_events(&transaction, device, until, most)?;
    let deleted_events = deleted_events + events;
    let keys_left = is_more || {
        let keys =
            transaction.prepare_cached(DELETE_KEYS)?.execute(params![device, until, most])?;
        i64::try_from(keys).is_ok_and(|keys| keys == most)
    };
    // A device that has given each run another job name has as many jobs as events.
    let is_more = keys_left
        || number_of_jobs(&transaction, device)? > most && {
            transaction.prepare_cached(DELETE_JOBS)?.execute(params![device, most])? > 0
        };
    if is_more {
        roll_ups::recount_totals(&transaction)?;
        summaries::note_stale(&transaction, device)?;
        transaction
            .prepare_cached("update device_deletions set deleted_events = ?2 where device_id = ?1")?
            .execute(params![device_id.as_str(), deleted_events.cast_signed()])?;
        transaction.commit()?;
        return Ok(DeletionStep::More(deleted_events));
    }

    delete_device(&transaction, device)?;
    roll_ups::recount_totals(&transaction)?;
    end(&transaction, device_id, &by, deleted_events)?;
    transaction.commit()?;
    writer.forget_device(device_id);
    Ok(DeletionStep::Done(deleted_events))
}

fn deletion(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<Deletion>> {
    const SELECT: &str = "
        select received_until, requested_at, via, key_id, address, deleted_events
          from device_deletions
         where device_id = ?1
    ";
    transaction
        .prepare_cached(SELECT)?
        .query_row([device_id.as_str()], |row| {
            let via: String = row.get(2)?;
            let address: Option<String> = row.get(4)?;
            Ok(Deletion {
                received_until: time(row, 0)?,
                by: stored_actor(&via, row.get(3)?, address.as_deref(), time(row, 1)?),
                deleted_events: row.get::<_, i64>(5)?.cast_unsigned(),
            })
        })
        .optional()
}

fn number_of_jobs(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<i64> {
    transaction
        .prepare_cached("select count(*) from device_jobs where device = ?1")?
        .query_row([device], |row| row.get(0))
}

/// Deletes the next events in the order of the index, and subtracts them from the sums. Answers how many, and whether
/// there may be more.
fn delete_events(
    transaction: &Transaction<'_>,
    device: i64,
    until: i64,
    most: i64,
) -> rusqlite::Result<(u64, bool)> {
    const LAST_OF_STEP: &str = "
        select timestamp, id
          from sync_events
         where device = ?1 and created_at <= ?2
         order by timestamp, id
         limit 1 offset ?3
    ";
    let last: Option<(i64, i64)> = transaction
        .prepare_cached(LAST_OF_STEP)?
        .query_row(params![device, until, most - 1], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let is_more = last.is_some();
    let (timestamp, id) = last.unwrap_or((i64::MAX, i64::MAX));
    let step = aggregated_events::DeletedEvents { device, received_until: until, timestamp, id };
    roll_ups::subtract(transaction, &step)?;
    let delete = format!("delete from sync_events where {}", aggregated_events::DELETED_EVENTS);
    let deleted =
        transaction.prepare_cached(&delete)?.execute(params![device, until, timestamp, id])?;
    Ok((deleted as u64, is_more))
}

/// The last step removes the device. If it has reported since, it is created again with the new events.
fn delete_device(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    const HAS_REPORTED: &str = "select exists (select 1 from sync_events where device = ?1)";
    const LAST_RECEIVED: &str = "select max(created_at) from sync_events where device = ?1";
    // The group stays. Otherwise a key of that group, with which the device may have reported, would be refused.
    const BEGIN_ANEW: &str = "
        update devices
           set name = null,
               created_at = (select min(created_at) from sync_events where device = ?1)
         where id = ?1
    ";
    roll_ups::forget(transaction, device)?;
    health::forget(transaction, device)?;
    if !transaction.query_row(HAS_REPORTED, [device], |row| row.get(0))? {
        summaries::forget(transaction, device)?;
        return transaction.execute("delete from devices where id = ?1", [device]).map(|_| ());
    }
    roll_ups::aggregate_hours_again(transaction, device)?;
    let received = transaction.query_row(LAST_RECEIVED, [device], |row| time(row, 0))?;
    let latest = received.saturating_add_milliseconds(LONGEST_LEAD);
    verify::write_recounted(transaction, device, latest)?;
    fleet_changes::forget(transaction, device)?;
    transaction.execute(BEGIN_ANEW, [device]).map(|_| ())
}

fn end(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    by: &Actor,
    deleted_events: u64,
) -> rusqlite::Result<()> {
    audit::record(transaction, by, &NewAuditEntry::device_deleted(device_id, deleted_events))?;
    transaction
        .execute("delete from device_deletions where device_id = ?1", [device_id.as_str()])
        .map(|_| ())
}
