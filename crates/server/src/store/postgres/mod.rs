//! The production store: PostgreSQL 14 or newer, through one connection that ingest owns and a pool
//! for everything else.

mod changes;
mod connect;
mod keys;
mod migrations;
mod partitions;
mod reads;
mod statements;
mod tls;
mod verify;
mod writer;

use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{Object, Pool};
use pisync_core::{DeviceId, Timestamp};

pub(super) use migrations::{PostgresMigrations, create_database};

use self::{
    connect::{Connector, store_error},
    writer::PostgresEventWriter,
};
use super::{
    Actor, Device, DeviceChange, DeviceQuery, DeviceWithJobs, EventWriter, FailureQuery,
    FleetStats, HistoryQuery, Page, PoolUsage, PostgresTarget, Store, StoreError, SyncHistory,
    Verified, verify::devices_of,
};

/// How long a sign of life may take.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest time that one read or change may take on our side. PostgreSQL gives up a little earlier
/// (see `connect`); this is for when it does not answer at all.
const CALL_TIMEOUT: Duration = Duration::from_secs(35);

/// See the module.
pub(super) struct PostgresStore {
    connector: Connector,
    pool: Pool,
}

impl PostgresStore {
    pub(super) async fn connect(target: &PostgresTarget) -> Result<Self, StoreError> {
        let connector = Connector::new(target)?;
        let pool = connector.pool()?;
        let store = Self { connector, pool };
        store.ping().await?;
        Ok(store)
    }

    async fn connection(&self) -> Result<Object, StoreError> {
        self.pool.get().await.map_err(|error| StoreError::Unavailable(connect::describe(&error)))
    }

    /// Runs `work` on a pooled connection, for a bounded time.
    async fn call<T>(
        &self,
        work: impl AsyncFnOnce(&mut Object) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, StoreError> {
        let mut connection = self.connection().await?;
        match tokio::time::timeout(CALL_TIMEOUT, work(&mut connection)).await {
            Ok(result) => result.map_err(store_error),
            Err(_) => {
                // Whoever got it next would wait for the same silence.
                drop(Object::take(connection));
                Err(StoreError::Unavailable("PostgreSQL does not answer".into()))
            }
        }
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn ping(&self) -> Result<(), StoreError> {
        let ping = self.call(async |connection| {
            connection.query_one("select exists (select from devices)", &[]).await
        });
        match tokio::time::timeout(PING_TIMEOUT, ping).await {
            Ok(result) => result.map(|_| ()),
            Err(_) => Err(StoreError::Unavailable("PostgreSQL does not answer".into())),
        }
    }

    fn event_writer(&self) -> Box<dyn EventWriter> {
        Box::new(PostgresEventWriter::new(self.connector.clone()))
    }

    async fn sync_history(&self, query: &HistoryQuery) -> Result<Option<SyncHistory>, StoreError> {
        self.call(async |connection| reads::sync_history(connection, query).await).await
    }

    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError> {
        self.call(async |connection| reads::repeated_failures(connection, query).await).await
    }

    async fn fleet_stats(&self, active_since: Timestamp) -> Result<FleetStats, StoreError> {
        self.call(async |connection| reads::fleet_stats(connection, active_since).await).await
    }

    async fn devices(&self, query: &DeviceQuery) -> Result<Page<Device>, StoreError> {
        self.call(async |connection| reads::devices(connection, query).await).await
    }

    async fn device(&self, device_id: &DeviceId) -> Result<Option<DeviceWithJobs>, StoreError> {
        self.call(async |connection| reads::device(connection, device_id).await).await
    }

    async fn update_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        self.call(async |connection| {
            changes::update_device(connection, device_id, change, by).await
        })
        .await
    }

    async fn delete_device(
        &self,
        device_id: &DeviceId,
        by: &Actor,
    ) -> Result<Option<u64>, StoreError> {
        self.call(async |connection| changes::delete_device(connection, device_id, by).await).await
    }

    async fn forget_event_ids(&self, before: Timestamp) -> Result<bool, StoreError> {
        self.call(async |connection| changes::forget_event_ids(connection, before).await).await
    }

    async fn verify(&self, after: Option<&str>, repair: bool) -> Result<Verified, StoreError> {
        // Not `call`: a long history takes as long as it takes.
        let mut connection = self.connection().await?;
        let verified = verify::page(&mut connection, after).await.map_err(store_error)?;
        if repair {
            for device_id in devices_of(&verified.differences) {
                verify::repair(&mut connection, &device_id).await.map_err(store_error)?;
            }
        }
        Ok(verified)
    }

    async fn maintain(&self, now: Timestamp) -> Result<(), StoreError> {
        let mut connection = self.connection().await?;
        partitions::ensure_ahead(&mut connection, now).await
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.pool.close();
        Ok(())
    }

    fn pool_usage(&self) -> PoolUsage {
        let status = self.pool.status();
        PoolUsage {
            max: status.max_size,
            in_use: status.size.saturating_sub(status.available),
            waiting: status.waiting,
        }
    }
}
