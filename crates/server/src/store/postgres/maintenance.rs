//! Upkeep of PostgreSQL: it makes partitions ahead of need, and aggregates and drops events. `maintenance` and `app`
//! call it through the traits of `store`. Each call does one small step, because ingest shares the database.

use std::time::Instant;

use async_trait::async_trait;
use pisync_core::Timestamp;
use tokio_postgres::Error;

use super::{
    connect::Object, digests, errors::store_error, expiry, groups, partitions, roll_ups,
    store::PostgresStore, summaries,
};
use crate::store::{Maintenance, Retention, RollUps, StoreError, summaries::DEVICES_AT_ONCE};

/// Event ids that are forgotten in one statement.
const FORGOTTEN_AT_ONCE: i64 = 5_000;

#[async_trait]
impl RollUps for PostgresStore {
    async fn aggregate_events(&self, now: Timestamp) -> Result<bool, StoreError> {
        let started = Instant::now();
        let step = self.aggregation_step.get();
        let work = async |connection: &mut Object| roll_ups::aggregate(connection, now, step).await;
        let more = self.call_within(roll_ups::AGGREGATION_TIMEOUT, work).await?;
        if more {
            self.aggregation_step.learn(started.elapsed());
        }
        Ok(more)
    }

    async fn make_digests(&self, now: Timestamp) -> Result<bool, StoreError> {
        let work = async |connection: &mut Object| digests::make_some(connection, now).await;
        self.call_within(roll_ups::AGGREGATION_TIMEOUT, work).await
    }

    async fn drop_group_hours(&self, now: Timestamp) -> Result<(), StoreError> {
        self.call(async |connection| groups::drop_old_hours(connection, now).await).await
    }

    async fn refresh_summaries(&self) -> Result<(), StoreError> {
        let outdated = async |connection: &mut Object| summaries::outdated(connection).await;
        let outdated = self.call_within(roll_ups::AGGREGATION_TIMEOUT, outdated).await?;
        let Some(outdated) = outdated else { return Ok(()) };
        for devices in outdated.devices.chunks(DEVICES_AT_ONCE) {
            if !self.call(async |connection| summaries::refresh(connection, devices).await).await? {
                // Another node does it.
                return Ok(());
            }
        }
        self.call(async |connection| summaries::finish(connection, &outdated).await).await
    }
}

#[async_trait]
impl Maintenance for PostgresStore {
    async fn maintain(&self, now: Timestamp) -> Result<(), StoreError> {
        self.call_unbounded(async |connection| partitions::ensure_ahead(connection, now).await)
            .await
    }

    async fn forget_event_ids(&self, before: Timestamp) -> Result<bool, StoreError> {
        self.call(async |connection| forget_event_ids(connection, before).await).await
    }

    async fn drop_old_events(
        &self,
        now: Timestamp,
        retention: &Retention,
    ) -> Result<bool, StoreError> {
        let connection = self.connector.connect().await?;
        let more = expiry::drop_month(&connection.client, now, retention).await;
        connection.confirm_change()?;
        more.map_err(store_error)
    }
}

async fn forget_event_ids(connection: &Object, before: Timestamp) -> Result<bool, Error> {
    // Old keys are stored together, and the BRIN index finds them.
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
