//! Deletes a device in steps (see `store/deletion.rs`). Only the last step locks the device, because ingest waits for
//! that lock. Each step must also subtract the deleted events from the sums by day and hour, in the same transaction.

use std::time::Instant;

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use pisync_core::{DeviceId, LONGEST_LEAD, Timestamp};
use tokio_postgres::{Error, error::SqlState};

use super::{
    aggregated_events, audit, connect::Object, fleet_changes, health, misdated, roll_ups,
    store::PostgresStore, summaries, verify,
};
use crate::store::{
    Actor, DeletionStep, DeviceDeletions, StoreError,
    audit::NewAuditEntry,
    deletion::{Deletion, stored_actor},
};

/// How many times a step is retried after a deadlock.
const RETRIES: u32 = 10;

#[async_trait]
impl DeviceDeletions for PostgresStore {
    async fn begin_deletion(&self, device_id: &DeviceId, by: &Actor) -> Result<bool, StoreError> {
        self.call(async |connection| begin(connection, device_id, by).await).await
    }

    async fn delete_some(&self, device_id: &DeviceId) -> Result<DeletionStep, StoreError> {
        let most = self.delete_step.get();
        let started = Instant::now();
        let step = self
            .call(async |connection| {
                let mut attempt = 0;
                loop {
                    match delete_some(connection, device_id, most).await {
                        // Ingest locks rows in another order. One of the two transactions fails and tries again.
                        Err(error)
                            if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED)
                                && attempt < RETRIES =>
                        {
                            attempt += 1;
                        }
                        result => return result,
                    }
                }
            })
            .await?;
        if matches!(step, DeletionStep::More(_)) {
            self.delete_step.learn(started.elapsed());
        }
        Ok(step)
    }

    async fn deletions(&self) -> Result<Vec<(DeviceId, u64)>, StoreError> {
        const SELECT: &str = "select device_id, deleted_events from device_deletions";
        self.call(async |connection| {
            let mut deletions = Vec::new();
            for row in connection.query(SELECT, &[]).await? {
                if let Ok(device_id) = DeviceId::new(row.try_get(0)?) {
                    deletions.push((device_id, row.try_get::<_, i64>(1)?.cast_unsigned()));
                }
            }
            Ok(deletions)
        })
        .await
    }
}

async fn begin(connection: &mut Object, device_id: &DeviceId, by: &Actor) -> Result<bool, Error> {
    const EXISTS: &str = "select exists (select from devices where device_id = $1)";
    // Events whose `received_at` is in the future, because a clock was wrong, are deleted too.
    const BEGIN: &str = "
        insert into device_deletions (
            device_id, received_until, requested_at, via, key_id, address, deleted_events
        )
        select $1::text, greatest($2, max(last_received)), $2, $3, $4, $5, 0
          from device_jobs
         where device_id = $1
            on conflict (device_id) do nothing
    ";
    let transaction = connection.transaction().await?;
    if !transaction.query_one(EXISTS, &[&device_id.as_str()]).await?.try_get::<_, bool>(0)? {
        return Ok(false);
    }
    let address = by.address.map(|address| address.to_string());
    let (via, key_id) = (by.via.as_str(), by.via.key_id());
    transaction
        .execute(BEGIN, &[&device_id.as_str(), &by.at.to_jiff(), &via, &key_id, &address])
        .await?;
    transaction.commit().await?;
    Ok(true)
}

/// Deletes at most `most` events, or at most `most` event ids. When fewer are left, it does the last step.
async fn delete_some(
    connection: &mut Object,
    device_id: &DeviceId,
    most: i64,
) -> Result<DeletionStep, Error> {
    const LAST_OF_STEP: &str = "
        select timestamp, id
          from sync_events
         where device_id = $1 and created_at <= $2
         order by timestamp, id
         limit 1 offset $3
    ";
    const DELETE_KEYS: &str = "
        delete from event_keys
         where ctid = any (array(
                   select ctid from event_keys where device_id = $1 and created_at <= $2 limit $3
               ))
    ";
    // A device that has given each run another job name has as many jobs as events.
    const DELETE_JOBS: &str = "
        delete from device_jobs
         where ctid = any (array(select ctid from device_jobs where device_id = $1 limit $2))
           and (select count(*) from device_jobs where device_id = $1) > $2
    ";
    const LOCK_DEVICE: &str = "select from devices where device_id = $1 for update";
    const COUNT: &str = "update device_deletions set deleted_events = $2 where device_id = $1";
    let id = device_id.as_str();
    let transaction = connection.transaction().await?;
    let watermark = aggregated_events::lock_state(&transaction).await?;
    let Some(Deletion { received_until, by, deleted_events }) =
        deletion(&transaction, device_id).await?
    else {
        return Ok(DeletionStep::None);
    };
    let until = received_until.to_jiff();
    let more = async |transaction: Transaction<'_>, deleted: u64| -> Result<DeletionStep, Error> {
        transaction.execute(COUNT, &[&id, &deleted.cast_signed()]).await?;
        roll_ups::recount_totals(&transaction).await?;
        summaries::note_stale(&transaction, id).await?;
        transaction.commit().await?;
        Ok(DeletionStep::More(deleted))
    };

    if let Some(last) = transaction.query_opt(LAST_OF_STEP, &[&id, &until, &(most - 1)]).await? {
        let last = (last.try_get::<_, jiff::Timestamp>(0)?, last.try_get::<_, i64>(1)?);
        let deleted =
            roll_ups::delete_events(&transaction, id, received_until, Some(last), watermark)
                .await?;
        return more(transaction, deleted_events + deleted).await;
    }
    if transaction.execute(DELETE_KEYS, &[&id, &until, &most]).await? == most.cast_unsigned()
        || transaction.execute(DELETE_JOBS, &[&id, &most]).await? > 0
    {
        return more(transaction, deleted_events).await;
    }

    // Locks the device before its events: the lock keeps ingest from adding events meanwhile.
    let is_there = transaction.query_opt(LOCK_DEVICE, &[&id]).await?.is_some();
    let mut deleted_events = deleted_events;
    if is_there {
        deleted_events +=
            roll_ups::delete_events(&transaction, id, received_until, None, watermark).await?;
        delete_device(&transaction, device_id, watermark).await?;
        roll_ups::recount_totals(&transaction).await?;
    }
    audit::record(&transaction, &by, &NewAuditEntry::device_deleted(device_id, deleted_events))
        .await?;
    transaction.execute("delete from device_deletions where device_id = $1", &[&id]).await?;
    transaction.commit().await?;
    Ok(DeletionStep::Done(deleted_events))
}

async fn deletion(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
) -> Result<Option<Deletion>, Error> {
    const SELECT: &str = "
        select received_until, requested_at, via, key_id, address, deleted_events
          from device_deletions
         where device_id = $1
           for update
    ";
    let Some(row) = transaction.query_opt(SELECT, &[&device_id.as_str()]).await? else {
        return Ok(None);
    };
    let time = |column| row.try_get(column).map(Timestamp::truncate);
    let by = stored_actor(row.try_get(2)?, row.try_get(3)?, row.try_get(4)?, time(1)?);
    let deleted_events = row.try_get::<_, i64>(5)?.cast_unsigned();
    Ok(Some(Deletion { received_until: time(0)?, by, deleted_events }))
}

/// The last step removes the device. If it has reported since, it is created again with the new events. State and
/// device are locked.
async fn delete_device(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    watermark: Option<Timestamp>,
) -> Result<(), Error> {
    const HAS_REPORTED: &str = "select exists (select from sync_events where device_id = $1)";
    const DELETE_KEYS: &str = "delete from event_keys where device_id = $1";
    const DELETE_DEVICE: &str = "delete from devices where device_id = $1";
    const DELETE_JOBS: &str = "delete from device_jobs where device_id = $1";
    const LAST_RECEIVED: &str = "select max(created_at) from sync_events where device_id = $1";
    // The group stays. Otherwise a key of that group, with which the device may have reported, would be refused.
    const BEGIN_ANEW: &str = "
        update devices
           set name = null, created_at = events.first, updated_at = events.last
          from (
              select min(created_at) as first, max(created_at) as last
                from sync_events
               where device_id = $1
          ) events
         where device_id = $1
    ";
    let id = device_id.as_str();
    roll_ups::forget(transaction, device_id, watermark).await?;
    if !transaction.query_one(HAS_REPORTED, &[&id]).await?.try_get::<_, bool>(0)? {
        // Event ids first: the longer they are left, the more often ingest and this wait for each other.
        transaction.execute(DELETE_KEYS, &[&id]).await?;
        health::forget(transaction, id).await?;
        summaries::forget(transaction, id).await?;
        transaction.execute(DELETE_DEVICE, &[&id]).await?;
        return Ok(());
    }
    summaries::note_stale(transaction, id).await?;
    transaction.execute(DELETE_JOBS, &[&id]).await?;
    let insert = format!(
        "insert into device_jobs ({}) {}",
        verify::job_columns(),
        verify::recounted("device_id = $1", "$2")
    );
    let received: jiff::Timestamp =
        transaction.query_one(LAST_RECEIVED, &[&id]).await?.try_get(0)?;
    let latest = Timestamp::truncate(received).saturating_add_milliseconds(LONGEST_LEAD);
    let latest = latest.to_jiff();
    transaction.execute(&insert, &[&id, &latest]).await?;
    misdated::note_set_aside(transaction, id, latest).await?;
    health::forget(transaction, id).await?;
    fleet_changes::forget(transaction, id).await?;
    roll_ups::aggregate_days_again(transaction, id, watermark).await?;
    roll_ups::aggregate_hours_again(transaction, id, watermark).await?;
    transaction.execute(BEGIN_ANEW, &[&id]).await.map(|_| ())
}
