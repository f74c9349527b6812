//! What people change about devices.

use deadpool_postgres::Object;
use pisync_core::DeviceId;
use tokio_postgres::{Error, error::SqlState};

use super::roll_ups;
use crate::store::DeviceChange;

/// How often a deletion that met a deadlock is tried again.
const RETRIES: u32 = 5;

pub(super) async fn update_device(
    connection: &Object,
    device_id: &DeviceId,
    change: &DeviceChange,
) -> Result<bool, Error> {
    const UPDATE_DEVICE: &str = r#"
        update devices
           set name    = case when $2 then $3 else name end,
               "group" = case when $4 then $5 else "group" end
         where device_id = $1
    "#;
    let statement = connection.prepare_cached(UPDATE_DEVICE).await?;
    let changed = connection
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
    Ok(changed > 0)
}

pub(super) async fn delete_device(
    connection: &mut Object,
    device_id: &DeviceId,
) -> Result<Option<u64>, Error> {
    let mut attempt = 0;
    loop {
        match try_delete_device(connection, device_id).await {
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
) -> Result<Option<u64>, Error> {
    // The device before its events: its row lock keeps ingest from adding events meanwhile.
    const LOCK_DEVICE: &str = "select from devices where device_id = $1 for update";
    const DELETE_EVENTS: &str = "delete from sync_events where device_id = $1";
    const DELETE_DEVICE: &str = "delete from devices where device_id = $1";
    let transaction = connection.transaction().await?;
    let folded = roll_ups::lock_state(&transaction).await?;
    if transaction.query_opt(LOCK_DEVICE, &[&device_id.as_str()]).await?.is_none() {
        return Ok(None);
    }
    roll_ups::forget(&transaction, device_id, folded).await?;
    let events = transaction.execute(DELETE_EVENTS, &[&device_id.as_str()]).await?;
    transaction.execute(DELETE_DEVICE, &[&device_id.as_str()]).await?;
    transaction.commit().await?;
    Ok(Some(events))
}
