//! Checks whether devices are in the group that a key reports for. `transactions` calls it in the transaction that
//! stores the events. The rows of the devices stay locked until its end, so nobody can move or delete a device in
//! between.

use std::collections::HashMap;

use futures_util::future;
use pisync_core::DeviceId;
use tokio_postgres::{Client, Error, Statement, types::ToSql};

use super::errors::WriteError;
use crate::store::Batch;

/// Registers new devices and locks the others without changing them. It does so in byte-wise order, so that nodes never
/// deadlock. If a claim does not hold, the rollback also removes the registered devices.
const REGISTER_AND_LOCK: &str = r#"
    insert into devices as stored (device_id, "group", created_at, updated_at)
    select device_id, "group", $3, $3
      from unnest($1::text[], $2::text[]) as claimed (device_id, "group")
        on conflict (device_id) do update
           set updated_at = stored.updated_at
         where false
    returning device_id
"#;

/// A separate statement, whose snapshot is taken after the locks. It looks the devices up one by one: its plan is made while
/// the table may be empty, and kept while it grows.
const SELECT_GROUPS: &str = r#"
    select found.device_id, found."group"
      from unnest($1::text[]) as claimed (device_id)
     cross join lateral (
               select device_id, "group" from devices where devices.device_id = claimed.device_id limit 1
           ) found
"#;

/// The prepared statements.
pub(super) struct ClaimStatements {
    register_and_lock: Statement,
    select_groups: Statement,
}

impl ClaimStatements {
    pub(super) async fn prepare(client: &Client) -> Result<Self, Error> {
        Ok(Self {
            register_and_lock: client.prepare(REGISTER_AND_LOCK).await?,
            select_groups: client.prepare(SELECT_GROUPS).await?,
        })
    }

    /// Registers the claims' new devices and checks the claims of `batch`. Answers the new devices.
    pub(super) async fn check(
        &self,
        client: &Client,
        batch: &Batch,
    ) -> Result<Vec<DeviceId>, WriteError> {
        let (device_ids, groups): (Vec<&str>, Vec<&str>) = batch
            .claimed_devices()
            .into_iter()
            .map(|(device_id, group)| (device_id.as_str(), group.as_str()))
            .unzip();
        let received = batch.received.to_jiff();
        let columns: [&(dyn ToSql + Sync); 3] = [&device_ids, &groups, &received];
        // Both are sent without waiting for the first answer.
        let (registered, found) = future::join(
            client.query(&self.register_and_lock, &columns),
            client.query(&self.select_groups, &[&device_ids]),
        )
        .await;
        // The error of the first one says more than that of the second.
        let registered = registered?;
        let mut groups: HashMap<String, Option<String>> = HashMap::new();
        for row in found? {
            groups.insert(row.try_get(0)?, row.try_get(1)?);
        }
        let mut new_devices = Vec::new();
        for row in registered {
            let device_id: &str = row.try_get(0)?;
            groups.remove(device_id);
            new_devices.extend(DeviceId::new(device_id).ok());
        }
        batch.check_claims(&groups)?;
        Ok(new_devices)
    }
}
