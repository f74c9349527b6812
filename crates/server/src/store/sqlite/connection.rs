//! Opens the database file and applies the settings of every connection. Also keeps the connections for reading. The
//! store and the commands call it. The path of a database must come through `claim` first.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, config::DbConfig, ffi, ffi::SQLITE_CONSTRAINT_TRIGGER,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::files;
use crate::store::{PoolUsage, StoreError};

/// How long a command, or a starting server, waits for another process, such as an import or a backup. On a busy SD
/// card, one sync of a large log to the disk may take many seconds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(60);

/// The same, once requests wait for the answer.
pub(super) const SERVING_BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes per page of a new file, SQLite's default. A file keeps the page size that it was created with.
const PAGE_BYTES: u32 = 4_096;

/// Pages in the write-ahead log before it is copied back, 64 MiB. The default of 1,000 pages makes ingest a third
/// slower. Each checkpoint writes random pages once, so fewer checkpoints write fewer of them.
pub(super) const CHECKPOINT_PAGES: u32 = 64 * 1_024 * 1_024 / PAGE_BYTES;

/// Connections for reading. Queries are short, and two cores can use only a few at a time.
const READERS: usize = 6;

/// How many of them may run reads whose cost grows with a history. The others are reserved for the rest, such as the
/// dashboard, or the check whether a key may report for a device.
const LONG_READS: usize = 4;

/// How long a read may take that a request waits for; the same as on PostgreSQL (`statement_timeout`).
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a read checks the time, in steps of SQLite's virtual machine. These take some tenths of a millisecond.
const STEPS_BETWEEN_LOOKS: i32 = 10_000;

/// How long a request waits for a connection for reading.
const READER_WAIT: Duration = Duration::from_secs(5);

/// How many statements the writer keeps prepared: all that there are, some 150. With 32, a step of a sweep prepared most of its
/// statements again for each device, which took four fifths of its time.
const CACHED_STATEMENTS: usize = 256;

/// Opens the file for writing. Creates the file and its folder when they are missing.
pub(super) fn open_for_writing(path: &Path) -> Result<Connection, StoreError> {
    files::create(path)?;
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        // Set before anything is written. Later they can be changed only by rewriting the file.
        connection.pragma_update(None, "page_size", PAGE_BYTES)?;
        connection.pragma_update(None, "auto_vacuum", "incremental")?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        // An acknowledged event survives a power cut, because every commit is synced to the disk.
        connection.pragma_update(None, "synchronous", "full")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        // After a checkpoint that a long read has delayed, the log is cut back to this size.
        connection.pragma_update(None, "journal_size_limit", 128 << 20)?;
        // A negative value means kibibytes.
        connection.pragma_update(None, "cache_size", -16_384)?;
        connection.pragma_update(None, "temp_store", "memory")?;
        connection.set_prepared_statement_cache_capacity(CACHED_STATEMENTS);
        // Otherwise a statement is planned anew for each value that the planner had a look at: for each device of a step.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        Ok(connection)
    };
    open().map_err(|error| files::sqlite_cannot_open(path, &error))
}

/// Opens the existing file, for copying the log into it.
pub(super) fn open_for_checkpoints(path: &Path) -> rusqlite::Result<Connection> {
    let connection = open_for_requests(path)?;
    // The log is synced before it is copied. The file is synced before the log is reused.
    connection.pragma_update(None, "synchronous", "full")?;
    Ok(connection)
}

/// Opens the existing file. Even a reader may have to wait for another process. That process may be reading the log
/// after a crash, or copying it into the file because it closes last.
pub(super) fn open_existing(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    Ok(connection)
}

/// Opens the existing file, for a server whose clients wait.
pub(super) fn open_for_requests(path: &Path) -> rusqlite::Result<Connection> {
    let connection = open_existing(path)?;
    connection.busy_timeout(SERVING_BUSY_TIMEOUT)?;
    Ok(connection)
}

/// What a read may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cost {
    /// The cost is low, whatever the database holds.
    Short,
    /// The cost grows with the length of a history.
    Long,
    /// The read may take any time, because no request waits for it.
    Unbounded,
}

/// A few connections for reading. Each is opened when it is first needed.
pub(super) struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    long_permits: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
    /// A connection that only checks that the file can be read. It must not wait for other reads.
    pulse: Mutex<Option<Connection>>,
    waiting: AtomicUsize,
    timeout: Duration,
}

impl Readers {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            permits: Arc::new(Semaphore::new(READERS)),
            long_permits: Arc::new(Semaphore::new(LONG_READS)),
            idle: Mutex::new(Vec::new()),
            pulse: Mutex::new(None),
            waiting: 0.into(),
            timeout: READ_TIMEOUT,
        }
    }

    /// Checks that the file can be read, however busy the connections for reading are.
    pub(super) async fn ping(self: Arc<Self>) -> Result<(), StoreError> {
        const SIGN_OF_LIFE: &str = "select exists (select 1 from devices)";
        let ping = tokio::task::spawn_blocking(move || {
            let mut pulse = self.pulse.lock().unwrap_or_else(PoisonError::into_inner);
            let connection = match pulse.take() {
                Some(connection) => connection,
                None => self.open().map_err(store_error)?,
            };
            connection.query_row(SIGN_OF_LIFE, [], |_| Ok(())).map_err(store_error)?;
            *pulse = Some(connection);
            Ok(())
        });
        ping.await.map_err(|error| StoreError::Failed(format!("a read failed: {error}")))?
    }

    /// Runs `read` on a thread that may block. The connection is returned even if the caller goes away meanwhile.
    pub(super) async fn run<T: Send + 'static>(
        self: Arc<Self>,
        cost: Cost,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permits = tokio::time::timeout(READER_WAIT, self.permits(cost)).await;
        let Ok(Some(permits)) = permits else {
            return Err(StoreError::Busy("all connections for reading are busy".into()));
        };
        let task = tokio::task::spawn_blocking(move || {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut connection = match idle {
                Some(connection) => connection,
                None => self.open().map_err(store_error)?,
            };
            let began = Instant::now();
            let timeout = self.timeout;
            let is_late = (cost != Cost::Unbounded).then_some(move || began.elapsed() > timeout);
            connection.progress_handler(STEPS_BETWEEN_LOOKS, is_late).map_err(store_error)?;
            let result = read(&connection).map_err(|error| match error.sqlite_error_code() {
                Some(ErrorCode::OperationInterrupted) => too_slow(timeout),
                _ => store_error(error),
            });
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            drop(permits);
            result
        });
        task.await.map_err(|error| StoreError::Failed(format!("a read failed: {error}")))?
    }

    /// The permits to hold while reading; `None` when the semaphores are closed.
    async fn permits(&self, cost: Cost) -> Option<[Option<OwnedSemaphorePermit>; 2]> {
        let _waiting = Waiting::one(&self.waiting);
        let long = match cost {
            Cost::Short => None,
            Cost::Long | Cost::Unbounded => {
                Some(Arc::clone(&self.long_permits).acquire_owned().await.ok()?)
            }
        };
        let any = Arc::clone(&self.permits).acquire_owned().await.ok()?;
        Some([long, Some(any)])
    }

    fn open(&self) -> rusqlite::Result<Connection> {
        let connection = open_for_requests(&self.path)?;
        connection.pragma_update(None, "query_only", true)?;
        connection.pragma_update(None, "temp_store", "memory")?;
        Ok(connection)
    }

    pub(super) fn usage(&self) -> PoolUsage {
        PoolUsage {
            max: READERS,
            in_use: READERS - self.permits.available_permits(),
            waiting: self.waiting.load(Ordering::Relaxed),
        }
    }
}

/// Counts one waiter, for as long as this value lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn one(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn too_slow(timeout: Duration) -> StoreError {
    StoreError::TooSlow(format!("a read took longer than {} s", timeout.as_secs_f32()))
}

/// Classifies SQLite's errors by what can be done about them.
#[expect(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
pub(super) fn store_error(error: rusqlite::Error) -> StoreError {
    let message = error.to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            StoreError::Unavailable(format!(
                "another process keeps writing to the database; stop that one, or try again later ({message})"
            ))
        }
        Some(ErrorCode::SystemIoFailure) => {
            let way_on = files::MAYBE_FULL;
            StoreError::Unavailable(format!("the database is unavailable: {message}{way_on}"))
        }
        Some(
            ErrorCode::DiskFull
            | ErrorCode::CannotOpen
            | ErrorCode::ReadOnly
            | ErrorCode::OutOfMemory,
        ) => StoreError::Unavailable(format!("the database is unavailable: {message}")),
        _ if refuses_data(&error) => StoreError::Rejected(message),
        _ => StoreError::Failed(message),
    }
}

/// Fails when a statement that should write one row of `table` has written none. A trigger may drop a row without an
/// error (`raise(ignore)`). That refuses the data as much as a trigger that raises an error.
pub(super) fn expect_row(table: &str, written: usize) -> rusqlite::Result<()> {
    if written > 0 { Ok(()) } else { Err(row_dropped(table)) }
}

/// The error for a row of `table` that a trigger has dropped.
pub(super) fn row_dropped(table: &str) -> rusqlite::Error {
    let refused = ffi::Error {
        code: ErrorCode::ConstraintViolation,
        extended_code: SQLITE_CONSTRAINT_TRIGGER,
    };
    let why = format!("a trigger on {table} drops the row without an error");
    rusqlite::Error::SqliteFailure(refused, Some(why))
}

/// Whether the database has refused the data itself.
pub(super) fn refuses_data(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig)
    )
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Readers of an empty database, and its folder.
    fn readers(timeout: Duration) -> (Arc<Readers>, tempfile::TempDir) {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("pisync.db");
        open_for_writing(&path)
            .unwrap()
            .execute_batch("create table devices (id integer)")
            .unwrap();
        (Arc::new(Readers { timeout, ..Readers::new(&path) }), folder)
    }

    const ENDLESS: &str = "
        with recursive numbers (n) as (select 1 union all select n + 1 from numbers)
        select count(*) from numbers
    ";

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn long_reads_leave_room_for_others() {
        let (readers, _folder) = readers(READ_TIMEOUT);
        let (began, beginnings) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let ends = Arc::new(Mutex::new(ends));
        let mut long = Vec::new();
        for _ in 0..40 {
            let (began, ends) = (began.clone(), Arc::clone(&ends));
            long.push(tokio::spawn(Arc::clone(&readers).run(Cost::Long, move |_| {
                began.send(()).unwrap();
                // Runs until the test lets it end.
                let _ = ends.lock().unwrap().recv();
                Ok(())
            })));
        }
        for _ in 0..LONG_READS {
            beginnings.recv().unwrap();
        }
        Arc::clone(&readers).ping().await.unwrap();
        let short = |connection: &Connection| {
            connection.query_row("select 1", [], |row| row.get::<_, i64>(0))
        };
        assert_eq!(Arc::clone(&readers).run(Cost::Short, short).await.unwrap(), 1);
        assert!(beginnings.try_recv().is_err(), "more long reads than may be");
        drop(end);
        for read in long {
            read.await.unwrap().unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_read_that_takes_too_long_is_given_up() {
        let (readers, _folder) = readers(Duration::from_millis(50));
        let endless =
            |connection: &Connection| connection.query_row(ENDLESS, [], |row| row.get::<_, i64>(0));
        for _ in 0..2 * READERS {
            let given_up = Arc::clone(&readers).run(Cost::Long, endless).await.unwrap_err();
            assert!(matches!(given_up, StoreError::TooSlow(_)), "{given_up}");
        }
        // The connection can still be used.
        let short = |connection: &Connection| {
            connection.query_row("select 1", [], |row| row.get::<_, i64>(0))
        };
        assert_eq!(Arc::clone(&readers).run(Cost::Long, short).await.unwrap(), 1);
    }
}
