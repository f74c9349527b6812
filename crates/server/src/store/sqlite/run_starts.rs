//! Started runs in SQLite. The background task that stores them calls it through `RunStarts`. It must not have the ingest
//! journal applied unless a device is missing.

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, Timestamp};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::{rows::device_number, store::SqliteStore};
use crate::store::{RunStarts, StartedRun, StoreError, run_starts::MOST_STARTS};

#[async_trait]
impl RunStarts for SqliteStore {
    async fn add_run_starts(&self, runs: &[StartedRun]) -> Result<u64, StoreError> {
        let runs = runs.to_vec();
        let (added, unknown) =
            self.writer.call(move |writer| add(writer.connection(), runs)).await?;
        let Some(ingest) = self.ingest.get().filter(|_| !unknown.is_empty()) else {
            return Ok(added);
        };
        // The first report of a device may be acknowledged and not be in the tables yet.
        ingest.wait_until_applied().await;
        let (late, _) = self.writer.call(move |writer| add(writer.connection(), unknown)).await?;
        Ok(added + late)
    }

    async fn may_report_in(
        &self,
        device_id: &DeviceId,
        group: &GroupName,
    ) -> Result<bool, StoreError> {
        const IS_IN: &str = r#"select "group" is ?2 from devices where device_id = ?1"#;
        let (device_id, group) = (device_id.clone(), group.clone());
        self.read(move |connection| {
            let mut select = connection.prepare_cached(IS_IN)?;
            let is_in = select.query_row([device_id.as_str(), group.as_str()], |row| row.get(0));
            Ok(is_in.optional()?.unwrap_or(true))
        })
        .await
    }
}

/// Adds runs. Answers how many are new, and those whose devices are unknown.
fn add(
    connection: &mut Connection,
    runs: Vec<StartedRun>,
) -> rusqlite::Result<(u64, Vec<StartedRun>)> {
    const ADD: &str = r#"
        insert into run_starts (device, job, run_id, received_at, timestamp, due_at)
        select id, ?2, ?3, ?4, ?5, ?4
          from devices
         where device_id = ?1
           and (?6 is null or "group" = ?6)
           and (select count(*) from run_starts where device = devices.id) < ?7
            on conflict do nothing
    "#;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let (mut added, mut unknown) = (0, Vec::new());
    let mut insert = transaction.prepare_cached(ADD)?;
    for run in runs {
        let inserted = insert.execute(params![
            run.key.device_id.as_str(),
            run.key.stored_job(),
            run.key.stored_run_id(),
            run.received_at.as_millisecond(),
            run.timestamp.map(Timestamp::as_millisecond),
            run.group.as_ref().map(GroupName::as_str),
            MOST_STARTS,
        ])?;
        if inserted == 0 && device_number(&transaction, &run.key.device_id)?.is_none() {
            unknown.push(run);
        }
        added += inserted as u64;
    }
    drop(insert);
    transaction.commit()?;
    Ok((added, unknown))
}
