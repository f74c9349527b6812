//! Started runs in PostgreSQL. The background task that stores them calls it through `RunStarts`.

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, Timestamp};
use tokio_postgres::Error;

use super::{connect::Object, store::PostgresStore};
use crate::store::{RunStarts, StartedRun, StoreError, run_starts::MOST_STARTS};

#[async_trait]
impl RunStarts for PostgresStore {
    async fn add_run_starts(&self, runs: &[StartedRun]) -> Result<u64, StoreError> {
        self.call(async |connection| add(connection, runs).await).await
    }

    async fn may_report_in(
        &self,
        device_id: &DeviceId,
        group: &GroupName,
    ) -> Result<bool, StoreError> {
        const IS_IN: &str =
            r#"select "group" is not distinct from $2 from devices where device_id = $1"#;
        self.call(async |connection| {
            let select = connection.prepare_cached(IS_IN).await?;
            let found =
                connection.query_opt(&select, &[&device_id.as_str(), &group.as_str()]).await?;
            found.map_or(Ok(true), |row| row.try_get(0))
        })
        .await
    }
}

async fn add(connection: &mut Object, runs: &[StartedRun]) -> Result<u64, Error> {
    // The devices are locked as a foreign key locks them, in one order. A device that is being deleted is waited for, and
    // then left out, where the key alone would refuse all of the runs.
    const ADD: &str = r#"
        with offered as (
            select distinct on (device_id, job, run_id)
                   device_id, job, run_id, received_at, timestamp, of_group
              from unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::timestamptz[], $6::text[])
                   with ordinality as sent (device_id, job, run_id, received_at, timestamp, of_group, place)
             order by device_id, job, run_id, place
        ), known as (
            select o.*, (select count(*) from run_starts r where r.device_id = d.device_id) as kept
              from devices d
              join offered o on o.device_id = d.device_id
             where (o.of_group is null or d."group" = o.of_group)
               and not exists (select from run_starts r
                                where r.device_id = d.device_id and r.job = o.job and r.run_id = o.run_id)
             order by d.device_id
               for key share of d
        ), numbered as (
            select *, kept + row_number() over (partition by device_id order by received_at) as number
              from known
        )
        insert into run_starts (device_id, job, run_id, received_at, timestamp, due_at)
        select device_id, job, run_id, received_at, timestamp, received_at
          from numbered
         where number <= $7
         order by device_id, job, run_id
            on conflict do nothing
    "#;
    let devices: Vec<_> = runs.iter().map(|run| run.key.device_id.as_str()).collect();
    let jobs: Vec<_> = runs.iter().map(|run| run.key.stored_job()).collect();
    let run_ids: Vec<_> = runs.iter().map(|run| run.key.stored_run_id()).collect();
    let received: Vec<_> = runs.iter().map(|run| run.received_at.to_jiff()).collect();
    let timestamps: Vec<_> = runs.iter().map(|run| run.timestamp.map(Timestamp::to_jiff)).collect();
    let groups: Vec<_> = runs.iter().map(|run| run.group.as_ref().map(GroupName::as_str)).collect();
    let add = connection.prepare_cached(ADD).await?;
    connection
        .execute(
            &add,
            &[&devices, &jobs, &run_ids, &received, &timestamps, &groups, &i64::from(MOST_STARTS)],
        )
        .await
}
