//! What people change about devices.

use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::Error;

use super::{connect::Object, keys};
use crate::store::{Actor, DeviceChange, keys::NewAuditEntry};

/// Event ids that are forgotten in one statement.
const FORGOTTEN_AT_ONCE: i64 = 5_000;

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
