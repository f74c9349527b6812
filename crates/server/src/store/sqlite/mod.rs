//! The embedded store: one file, one thread that owns the only connection for writing, and a few
//! connections for reading that the write-ahead log keeps out of its way.

mod connection;
mod keys;
mod migrations;
mod reads;
mod verify;
mod writer;

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use pisync_core::{DeviceId, Timestamp};
use rusqlite::Connection;

pub(super) use migrations::SqliteMigrations;

use self::{
    connection::Readers,
    writer::{SqliteEventWriter, WriterThread},
};
use super::{
    Actor, Device, DeviceChange, DeviceQuery, DeviceWithJobs, EventWriter, FailureQuery,
    FleetStats, HistoryQuery, Page, PoolUsage, Store, StoreError, SyncHistory, Verified,
    verify::devices_of,
};

/// See the module.
pub(super) struct SqliteStore {
    writer: WriterThread,
    readers: Arc<Readers>,
}

impl SqliteStore {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let connection = connection::open_for_writing(path)?;
        Ok(Self { writer: WriterThread::start(connection)?, readers: Arc::new(Readers::new(path)) })
    }

    /// Runs `read` on a connection for reading, off the async threads.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        Arc::clone(&self.readers).run(read).await
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn ping(&self) -> Result<(), StoreError> {
        const SIGN_OF_LIFE: &str = "select exists (select 1 from devices)";
        self.read(|connection| connection.query_row(SIGN_OF_LIFE, [], |_| Ok(()))).await
    }

    fn event_writer(&self) -> Box<dyn EventWriter> {
        Box::new(SqliteEventWriter::new(self.writer.clone()))
    }

    async fn sync_history(&self, query: &HistoryQuery) -> Result<Option<SyncHistory>, StoreError> {
        let query = query.clone();
        self.read(move |connection| reads::sync_history(connection, &query)).await
    }

    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError> {
        let query = query.clone();
        self.read(move |connection| reads::repeated_failures(connection, &query)).await
    }

    async fn fleet_stats(&self, active_since: Timestamp) -> Result<FleetStats, StoreError> {
        self.read(move |connection| reads::fleet_stats(connection, active_since)).await
    }

    async fn devices(&self, query: &DeviceQuery) -> Result<Page<Device>, StoreError> {
        let query = query.clone();
        self.read(move |connection| reads::devices(connection, &query)).await
    }

    async fn device(&self, device_id: &DeviceId) -> Result<Option<DeviceWithJobs>, StoreError> {
        let device_id = device_id.clone();
        self.read(move |connection| reads::device(connection, &device_id)).await
    }

    async fn update_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        let (device_id, change, by) = (device_id.clone(), change.clone(), *by);
        self.writer.call(move |connection| connection.update_device(&device_id, &change, &by)).await
    }

    async fn delete_device(
        &self,
        device_id: &DeviceId,
        by: &Actor,
    ) -> Result<Option<u64>, StoreError> {
        let (device_id, by) = (device_id.clone(), *by);
        self.writer.call(move |connection| connection.delete_device(&device_id, &by)).await
    }

    async fn forget_event_ids(&self, before: Timestamp) -> Result<bool, StoreError> {
        self.writer.call(move |connection| connection.forget_event_ids(before)).await
    }

    async fn verify(&self, after: Option<&str>, repair: bool) -> Result<Verified, StoreError> {
        let after = after.map(str::to_owned);
        let verified =
            self.read(move |connection| verify::page(connection, after.as_deref())).await?;
        if repair {
            for device_id in devices_of(&verified.differences) {
                self.writer.call(move |writer| verify::repair(writer, &device_id)).await?;
            }
        }
        Ok(verified)
    }

    async fn maintain(&self, _now: Timestamp) -> Result<(), StoreError> {
        self.writer.call(writer::WriteConnection::optimize).await
    }

    /// Brings everything from the log into the file, which can then be copied by itself.
    async fn close(&self) -> Result<(), StoreError> {
        self.writer.call(writer::WriteConnection::checkpoint).await
    }

    fn pool_usage(&self) -> PoolUsage {
        self.readers.usage()
    }
}

/// Locks the file beside the database that says a server is using it. The lock goes with the process,
/// however it ends.
pub(super) fn lock_file(database: &Path) -> Result<File, StoreError> {
    connection::create_folder(database)?;
    let mut path = PathBuf::from(database).into_os_string();
    path.push(".lock");
    let path = PathBuf::from(path);
    let file = File::create(&path).map_err(|error| {
        StoreError::Failed(format!(
            "cannot open {}: {error}; set DATA_DIR to a folder that the server may write",
            path.display()
        ))
    })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Failed(format!(
            "{} is in use by a running PiSync server; stop that one first, or set DATA_DIR to another folder",
            database.display()
        ))),
        Err(TryLockError::Error(error)) => {
            Err(StoreError::Failed(format!("cannot lock {}: {error}", path.display())))
        }
    }
}
