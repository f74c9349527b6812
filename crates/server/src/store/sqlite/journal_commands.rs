//! What commands do with the ingest journal of a database: apply what a killed server has left, inspect it, salvage it.
//! Migrations ask here whether the schema may change. A journal must never be removed before all of it is applied.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    apply::apply_batch,
    claim,
    connection::{self, store_error},
    files,
    ingest_buffer::JournaledBatch,
    ingest_state::{self, set_journal_in_use},
    journal::{self, Journal, JournalState, Survey, unusable},
    log_check, quarantine,
    write_connection::WriteConnection,
};
use crate::store::{JournalReport, JournalSalvage, StoreError};

/// How long a running server may take to apply its journal.
const APPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns once everything that a server has acknowledged by now is in the tables, where other processes look for it. A
/// running server applies its journal within a second. The journal of a killed server is applied here.
pub(in crate::store) fn apply_journal(database: &Path) -> Result<(), StoreError> {
    const POLL_INTERVAL: Duration = Duration::from_millis(20);
    let database = &claim::find(database)?;
    if !has_journal(database)? {
        return Ok(());
    }
    if !claim::is_claimed(database) {
        // A process that claims it meanwhile is a starting server, which does the same.
        let _claim = claim::Claim::take(database)?;
        return recover(database);
    }
    let began = Instant::now();
    let mut connection = WriteConnection::open(database)?;
    let wanted = last_record(&mut connection, database)?;
    while ingest_state::read(&connection.connection).map_err(store_error)?.journal.applied < wanted
    {
        if !claim::is_claimed(database) {
            // The server was killed meanwhile, or has stopped.
            drop(connection);
            return apply_journal(database);
        }
        if began.elapsed() > APPLY_TIMEOUT {
            return Err(StoreError::Unavailable(
                "the server cannot apply its journal to the database; its log says why".to_owned(),
            ));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// Prevents a change of the schema while the ingest journal has acknowledged events that this version could not apply
/// to the new tables.
///
/// # Errors
/// When the journal is damaged, or a newer version has written it. Nothing was changed.
pub(super) fn check_journal(database: &Path) -> Result<(), StoreError> {
    /// A running server may write between two reads, so a wrong result is checked again.
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
    if !files::is_there(database)? {
        return Ok(false);
    }
    if journal::exists(database) {
        return Ok(true);
    }
    match journal_state(database) {
        Ok(state) => Ok(state.is_some_and(|state| state.in_use)),
        // It is no database, or cannot be read. The next code that uses it reports that.
        Err(StoreError::Failed(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the tables of the database at `database` say about its journal, whatever version made them. `None` if they say
/// nothing.
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
        connection.query_row(&select, [], ingest_state::journal_state).map(Some)
    };
    read().map_err(store_error)
}

/// Inspects the ingest journal of the database at `database`. Changes nothing.
pub(in crate::store) fn inspect_journal(database: &Path) -> Result<JournalReport, StoreError> {
    let (database, state) = existing_journal(database)?;
    let database = &database;
    let survey = Survey::read(database, state).map_err(|error| unusable(database, &error))?;
    Ok(survey.report())
}

/// See [`journal::salvage`]. No server may be running.
pub(in crate::store) fn salvage_journal(database: &Path) -> Result<JournalSalvage, StoreError> {
    let log = log_check::salvage(&claim::find_unchecked(database)?).map_err(|error| {
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
        // Everything that is left is in one file.
        let writer = WriteConnection::open(database)?;
        set_journal_in_use(&writer.connection, false).map_err(store_error)?;
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
    if !files::is_there(database)? {
        return Err(missing());
    }
    let file = claim::find(database)?;
    let state = journal_state(&file)?.ok_or_else(missing)?;
    Ok((file, state))
}

/// Applies the journal that a server has left beside the database at `database`, and removes it. No server may be
/// running.
fn recover(database: &Path) -> Result<(), StoreError> {
    let mut connection = WriteConnection::open(database)?;
    if !ingest_state::is_current(&connection.connection).map_err(store_error)? {
        return Err(StoreError::Failed(format!(
            "the last events that were acknowledged for {} are still in its ingest journal, and its tables are those of an older version; run `pisync migrate up` first",
            database.display()
        )));
    }
    let state = ingest_state::read(&connection.connection).map_err(store_error)?;
    let (_, records) = Journal::open(database, state.journal)?;
    let batches: Vec<_> =
        records.into_iter().map(|record| Arc::new(JournaledBatch::from(record))).collect();
    apply_batch(&mut connection, &batches, |_| ()).map_err(store_error)?;
    set_journal_in_use(&connection.connection, false).map_err(store_error)?;
    journal::remove(database).map_err(|error| unusable(database, &error))
}

/// The number of the journal's last record. A server may be writing the journal.
fn last_record(connection: &mut WriteConnection, database: &Path) -> Result<u64, StoreError> {
    let journal = ingest_state::read(&connection.connection).map_err(store_error)?.journal;
    let survey = Survey::read(database, journal).map_err(|error| unusable(database, &error))?;
    Ok(survey.last_number().max(journal.applied))
}
