//! What people change about devices.

use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::{Error, error::SqlState};

use super::{connect::Object, keys, roll_ups};
use crate::store::{Actor, DeviceChange, keys::NewAuditEntry};

/// Event ids that are forgotten in one statement.
const FORGOTTEN_AT_ONCE: i64 = 5_000;

/// How often a deletion that met a deadlock is tried again.
const RETRIES: u32 = 5;

pub(super) async fn update_device(
    connection: &mut Object,
    device_id: &DeviceId,
    change: &DeviceChange,
    by: &Actor,
) -> Result<bool, Error> {
    const UPDATE_DEVICE: &str = r#"
        update devices
           set name    = case when $2 then $3 else name end,
               "group" = case when $4 then $5 else "group" end
         where device_id = $1
    "#;
    let transaction = connection.transaction().await?;
    let statement = transaction.prepare_cached(UPDATE_DEVICE).await?;
    let changed = transaction
        .execute(
            &statement,
            &[
                &device_id.as_str(),
                &change.name.is_some(),
                &change.name.as_ref().and_then(Option::as_ref),
                &change.group.is_some(),
                &change.group.as_ref().and_then(Option::as_ref),
            ],
        )
        .await?;
    if changed == 0 {
        return Ok(false);
    }
    keys::record(&transaction, by, &NewAuditEntry::device_updated(device_id, change)).await?;
    transaction.commit().await?;
    Ok(true)
}

pub(super) async fn forget_event_ids(
    connection: &Object,
    before: Timestamp,
) -> Result<bool, Error> {
    // Old ones lie together, and the BRIN index knows where.
    const FORGET: &str = "
        delete from event_keys
         where ctid = any (array(
                   select ctid from event_keys where created_at < $1 limit $2 for update skip locked
               ))
    ";
    let statement = connection.prepare_cached(FORGET).await?;
    let forgotten =
        connection.execute(&statement, &[&before.to_jiff(), &FORGOTTEN_AT_ONCE]).await?;
    Ok(forgotten == FORGOTTEN_AT_ONCE.cast_unsigned())
}

pub(super) async fn delete_device(
    connection: &mut Object,
    device_id: &DeviceId,
    by: &Actor,
) -> Result<Option<u64>, Error> {
    let mut attempt = 0;
    loop {
        match try_delete_device(connection, device_id, by).await {
            // Ingest touches rows in another order; one of the two tries again.
            Err(error)
                if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) && attempt < RETRIES =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}

async fn try_delete_device(
    connection: &mut Object,
    device_id: &DeviceId,
    by: &Actor,
) -> Result<Option<u64>, Error> {
    // The device before its events: its row lock keeps ingest from adding events meanwhile.
    const LOCK_DEVICE: &str = "select from devices where device_id = $1 for update";
    const DELETE_EVENTS: &str = "delete from sync_events where device_id = $1";
    const DELETE_KEYS: &str = "delete from event_keys where device_id = $1";
    const DELETE_DEVICE: &str = "delete from devices where device_id = $1";
    let transaction = connection.transaction().await?;
    let folded = roll_ups::lock_state(&transaction).await?;
    if transaction.query_opt(LOCK_DEVICE, &[&device_id.as_str()]).await?.is_none() {
        return Ok(None);
    }
    roll_ups::forget(&transaction, device_id, folded).await?;
    let events = transaction.execute(DELETE_EVENTS, &[&device_id.as_str()]).await?;
    transaction.execute(DELETE_KEYS, &[&device_id.as_str()]).await?;
    transaction.execute(DELETE_DEVICE, &[&device_id.as_str()]).await?;
    keys::record(&transaction, by, &NewAuditEntry::device_deleted(device_id, events)).await?;
    transaction.commit().await?;
    Ok(Some(events))
}
