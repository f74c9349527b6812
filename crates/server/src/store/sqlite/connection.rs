//! Opening the file, the settings every connection gets, and the connections for reading.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags};
use tokio::sync::Semaphore;

use super::files;
use crate::store::{PoolUsage, StoreError};

/// How long to wait for another process that is writing (an import, a key being made) before saying
/// that the database is busy.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes in a page of a new file, SQLite's default. A file keeps the size that it was made with.
const PAGE_BYTES: u32 = 4_096;

/// Pages in the write-ahead log before it is copied back, 64 MiB. The default of 1,000 pages makes
/// ingest a third slower: random pages are written once per checkpoint, so fewer checkpoints write
/// fewer of them.
pub(super) const CHECKPOINT_PAGES: u32 = 64 * 1_024 * 1_024 / PAGE_BYTES;

/// Connections for reading. Queries are short, and two cores cannot use more than a few at a time.
const READERS: usize = 4;

/// How long a request waits for a connection for reading.
const READER_WAIT: Duration = Duration::from_secs(5);

/// Opens the file for writing; it is made, with its folder, when it is missing.
pub(super) fn open_for_writing(path: &Path) -> Result<Connection, StoreError> {
    files::create(path)?;
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        // Before anything is written: a file cannot be changed to these later without rewriting it.
        connection.pragma_update(None, "page_size", PAGE_BYTES)?;
        connection.pragma_update(None, "auto_vacuum", "incremental")?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        // An acknowledged event survives a power cut: every commit is synced to the disk.
        connection.pragma_update(None, "synchronous", "full")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        // The log is cut back to this size after a checkpoint that a long read had delayed.
        connection.pragma_update(None, "journal_size_limit", 128 << 20)?;
        // Negative: kibibytes.
        connection.pragma_update(None, "cache_size", -16_384)?;
        connection.pragma_update(None, "temp_store", "memory")?;
        connection.set_prepared_statement_cache_capacity(32);
        Ok(connection)
    };
    open().map_err(|error| {
        StoreError::Failed(format!(
            "cannot open {}: {error}; set DATA_DIR to a folder that the server may write",
            path.display()
        ))
    })
}

/// Opens the file, which exists, for copying the log into it.
pub(super) fn open_for_checkpoints(path: &Path) -> rusqlite::Result<Connection> {
    let connection = open_existing(path)?;
    // The log is synced before it is copied, and the file before the log is given up.
    connection.pragma_update(None, "synchronous", "full")?;
    Ok(connection)
}

pub(super) fn open_existing(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    Ok(connection)
}

/// A few connections for reading, opened when first needed.
pub(super) struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
    waiting: std::sync::atomic::AtomicUsize,
}

impl Readers {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            permits: Arc::new(Semaphore::new(READERS)),
            idle: Mutex::new(Vec::new()),
            waiting: 0.into(),
        }
    }

    /// Runs `read` on a thread that may block. The connection comes back also when the caller has
    /// gone away meanwhile.
    pub(super) async fn run<T: Send + 'static>(
        self: Arc<Self>,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        use std::sync::atomic::Ordering::Relaxed;
        self.waiting.fetch_add(1, Relaxed);
        let permit =
            tokio::time::timeout(READER_WAIT, Arc::clone(&self.permits).acquire_owned()).await;
        self.waiting.fetch_sub(1, Relaxed);
        let Ok(Ok(permit)) = permit else {
            return Err(StoreError::Unavailable("all connections for reading are busy".into()));
        };
        let task = tokio::task::spawn_blocking(move || {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match idle {
                Some(connection) => connection,
                None => self.open().map_err(store_error)?,
            };
            let result = read(&connection).map_err(store_error);
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            drop(permit);
            result
        });
        task.await.map_err(|error| StoreError::Failed(format!("a read failed: {error}")))?
    }

    fn open(&self) -> rusqlite::Result<Connection> {
        let connection = open_existing(&self.path)?;
        connection.pragma_update(None, "query_only", true)?;
        connection.pragma_update(None, "temp_store", "memory")?;
        Ok(connection)
    }

    pub(super) fn usage(&self) -> PoolUsage {
        PoolUsage {
            max: READERS,
            in_use: READERS - self.permits.available_permits(),
            waiting: self.waiting.load(std::sync::atomic::Ordering::Relaxed),
        }
    }
}

/// Sorts SQLite's errors by what can be done about them.
#[expect(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
pub(super) fn store_error(error: rusqlite::Error) -> StoreError {
    let message = error.to_string();
    match error.sqlite_error_code() {
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::DiskFull
            | ErrorCode::SystemIoFailure
            | ErrorCode::CannotOpen
            | ErrorCode::ReadOnly
            | ErrorCode::OutOfMemory,
        ) => StoreError::Unavailable(message),
        _ if refuses_data(&error) => StoreError::Rejected(message),
        _ => StoreError::Failed(message),
    }
}

/// Whether the database has refused the data itself.
pub(super) fn refuses_data(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig)
    )
}
