//! The embedded store: one file, one thread that owns the only connection for writing, and a few
//! connections for reading that the write-ahead log keeps out of its way.

mod apply;
mod audit;
pub(super) mod backup;
mod checkpoint;
mod connection;
pub(super) mod copy;
mod deletion;
mod devices;
mod events;
mod expiry;
pub(super) mod files;
mod history;
mod ids;
mod imports;
mod ingest_buffer;
mod journal;
mod journal_appender;
mod keys;
pub(super) mod log_check;
mod maintenance;
mod migrations;
mod misdated;
mod quarantine;
mod roll_ups;
mod rows;
mod stats;
mod trusted_time;
mod verify;
mod watch;
mod writer;

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use rusqlite::Connection;

pub(super) use migrations::SqliteMigrations;

use self::{
    connection::{Cost, Readers, store_error},
    files::Identity,
    ingest_buffer::{IngestBuffer, unusable},
    journal::{JournalState, Survey},
    watch::Watch,
    writer::{WriteConnection, WriterThread},
};
use super::{JournalReport, JournalSalvage, PoolUsage, Store, StoreError, step_size::StepSize};

/// How long background work may hold the writer at a time. Ingest waits for it, so it is much less than
/// the 50 ms that nobody would notice.
const STEP_TARGET: Duration = Duration::from_millis(15);

/// Bounds of the number of events that are folded, dropped or deleted at a time.
const STEP_EVENTS: RangeInclusive<i64> = 250..=16_000;

/// See the module.
pub(super) struct SqliteStore {
    path: PathBuf,
    /// The file that was opened.
    identity: Identity,
    /// Looks at the files; empty when this is no server's.
    watch: OnceLock<Watch>,
    writer: WriterThread,
    /// How events are taken in; empty when this is no server's.
    buffer: OnceLock<Arc<IngestBuffer>>,
    readers: Arc<Readers>,
    /// Events to fold at a time.
    fold_step: StepSize,
    /// Events to drop at a time.
    drop_step: StepSize,
    /// Events of a device to delete at a time.
    delete_step: StepSize,
}

impl SqliteStore {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let path = files::find(path)?;
        let connection = connection::open_for_writing(&path)?;
        let identity = Identity::at(&path).map_err(|error| files::cannot_open(&path, &error))?;
        Ok(Self {
            identity,
            watch: OnceLock::new(),
            writer: WriterThread::start(connection, &path)?,
            buffer: OnceLock::new(),
            readers: Arc::new(Readers::new(&path)),
            path,
            fold_step: StepSize::new(STEP_EVENTS, STEP_TARGET),
            drop_step: StepSize::new(STEP_EVENTS, STEP_TARGET),
            delete_step: StepSize::new(STEP_EVENTS, STEP_TARGET),
        })
    }

    /// Runs `read` on a connection for reading, off the async threads, once every event that is acknowledged
    /// by now is in the tables.
    async fn read_events<T: Send + 'static>(
        &self,
        cost: Cost,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        if let Some(buffer) = self.buffer.get() {
            buffer.wait_until_applied().await;
        }
        // A connection that is opened now would be to another file.
        self.writer.presence().check()?;
        Arc::clone(&self.readers).run(cost, read).await
    }

    /// Runs `read`, which has nothing to do with events, on a connection for reading.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        // A connection that is opened now would be to another file.
        self.writer.presence().check()?;
        Arc::clone(&self.readers).run(Cost::Short, read).await
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn ping(&self) -> Result<(), StoreError> {
        self.writer.presence().check()?;
        // Commands have no thread that watches the files.
        if Identity::at(&self.path).ok() != Some(self.identity) {
            return Err(StoreError::Unavailable(format!(
                "{} is not the file any more that was opened: it was moved, removed or replaced, and what was written since may be gone with it",
                self.path.display()
            )));
        }
        Arc::clone(&self.readers).ping().await
    }

    fn pool_usage(&self) -> PoolUsage {
        self.readers.usage()
    }

    async fn thread_end(&self) -> String {
        self.writer.threads().first_end().await
    }

    #[cfg(test)]
    fn break_writer(&self) {
        assert!(self.writer.try_send(Box::new(|_| panic!("broken by a test"))));
    }

    /// Brings everything from the journal and the log into the file, which can then be copied by itself.
    async fn close(&self) -> Result<(), StoreError> {
        if let Some(watch) = self.watch.get() {
            watch.stop();
        }
        // Also when the files are away: they may only have been renamed.
        self.writer
            .call_anyway(|connection| {
                connection.apply_journal()?;
                connection.return_unused_ids()?;
                connection.set_journal_in_use(false)?;
                connection.checkpoint()
            })
            .await?;
        // The journal that is there now may be another database's.
        self.writer.presence().check()?;
        self.buffer.get().map_or(Ok(()), |buffer| buffer.remove_journal())
    }
}

/// How long a running server may take to bring what is in its journal into the tables.
const APPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns once everything that a server has acknowledged by now is in the tables, where other processes look
/// for it. A running server sees to that within a second; what one has left behind that is gone, this brings
/// there.
pub(super) fn apply_journal(database: &Path) -> Result<(), StoreError> {
    const POLL_INTERVAL: Duration = Duration::from_millis(20);
    let database = &files::find(database)?;
    if !has_journal(database)? {
        return Ok(());
    }
    if !files::is_claimed(database) {
        // Whoever claims it meanwhile is a server that starts, and does the same.
        let _claim = files::Claim::take(database)?;
        return apply::recover(database);
    }
    let began = Instant::now();
    let mut connection = WriteConnection::open(database)?;
    let wanted = apply::last_record(&mut connection, database)?;
    while connection.ingest_state().map_err(store_error)?.journal.applied < wanted {
        if !files::is_claimed(database) {
            // The server was killed meanwhile, or has stopped.
            drop(connection);
            return apply_journal(database);
        }
        if began.elapsed() > APPLY_TIMEOUT {
            return Err(StoreError::Unavailable(
                "the server cannot bring what it has acknowledged into the database; its log says why"
                    .to_owned(),
            ));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// Sees to it that the schema is not changed while there are acknowledged events in the ingest journal that this
/// version could not bring into the new tables.
///
/// # Errors
/// When the journal is damaged or a newer version's; then nothing was changed.
pub(super) fn check_journal(database: &Path) -> Result<(), StoreError> {
    /// Under a running server, what is read may be of several moments.
    const ATTEMPTS: usize = 3;
    if !has_journal(database)? {
        return Ok(());
    }
    let mut attempt = 1;
    loop {
        let Some(state) = journal_state(database)? else { return Ok(()) };
        let survey = Survey::read(database, state).map_err(|error| unusable(database, &error))?;
        match survey.check() {
            Err(_) if attempt < ATTEMPTS => attempt += 1,
            checked => return checked,
        }
    }
}

/// Whether the database at `database` has an ingest journal, or must have one.
fn has_journal(database: &Path) -> Result<bool, StoreError> {
    if !database.exists() {
        return Ok(false);
    }
    if journal::exists(database) {
        return Ok(true);
    }
    match journal_state(database) {
        Ok(state) => Ok(state.is_some_and(|state| state.in_use)),
        // It is no database, or cannot be read: whoever is to use it says so.
        Err(StoreError::Failed(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the tables of the database at `database` say of its journal, whatever version made them; `None` where there
/// is no such thing.
fn journal_state(database: &Path) -> Result<Option<JournalState>, StoreError> {
    const COLUMNS: &str = "select count(*), ifnull(sum(name = 'journal_in_use'), 0) from pragma_table_info('ingest_state')";
    let read = || -> rusqlite::Result<Option<JournalState>> {
        let connection = connection::open_existing(database)?;
        let (columns, knows_use): (u32, bool) =
            connection.query_row(COLUMNS, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        if columns == 0 {
            return Ok(None);
        }
        let in_use = if knows_use { "journal_in_use" } else { "false" };
        let select = format!("select journal, settled, {in_use} from ingest_state");
        connection.query_row(&select, [], writer::journal_state).map(Some)
    };
    read().map_err(store_error)
}

/// What is in the ingest journal of the database at `database`. Changes nothing.
pub(super) fn inspect_journal(database: &Path) -> Result<JournalReport, StoreError> {
    let (database, state) = existing_journal(database)?;
    let database = &database;
    let survey = Survey::read(database, state).map_err(|error| unusable(database, &error))?;
    Ok(survey.report())
}

/// See [`journal::salvage`]. No server may be running.
pub(super) fn salvage_journal(database: &Path) -> Result<JournalSalvage, StoreError> {
    let log = log_check::salvage(&files::find_unchecked(database)?).map_err(|error| {
        StoreError::Failed(format!("cannot salvage the log of {}: {error}", database.display()))
    })?;
    let (database, state) = existing_journal(database)?;
    let database = &database;
    let mut salvaged =
        journal::salvage(database, state).map_err(|error| unusable(database, &error))?;
    if !salvaged.doubtful.is_empty() {
        let file = quarantine::keep_doubtful(database, std::mem::take(&mut salvaged.doubtful))?;
        salvaged.result.doubtful = Some(file);
    }
    if state.in_use && salvaged.result.damage.is_some() {
        // What is left is in one file.
        let writer = WriteConnection::open(database)?;
        writer.set_journal_in_use(false).map_err(store_error)?;
    }
    if let Some((lost, kept)) = log {
        let journal = salvaged.result.damage.take();
        salvaged.result.damage =
            Some([Some(lost), journal].into_iter().flatten().collect::<Vec<_>>().join("; "));
        salvaged.result.kept.push(kept);
    }
    Ok(salvaged.result)
}

/// The file of the database at `database`, and the state of its journal.
fn existing_journal(database: &Path) -> Result<(PathBuf, JournalState), StoreError> {
    let missing =
        || StoreError::Failed(format!("there is no PiSync database at {}", database.display()));
    if !database.exists() {
        return Err(missing());
    }
    let file = files::find(database)?;
    let state = journal_state(&file)?.ok_or_else(missing)?;
    Ok((file, state))
}
