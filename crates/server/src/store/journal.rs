//! What `pisync journal` finds in an ingest journal and what it does about it. The command line calls it. Only SQLite
//! has a journal: PostgreSQL acknowledges an event once it is in the tables.

use super::{JournalReport, JournalSalvage, StoreError, Target, sqlite};

/// Inspects the ingest journal of `target` and changes nothing.
///
/// # Errors
/// When there is no such database, or it cannot be read.
pub fn inspect_journal(target: &Target) -> Result<JournalReport, StoreError> {
    sqlite::journal_commands::inspect_journal(sqlite_only(target)?)
}

/// Salvages a damaged ingest journal. It keeps the complete records, marks the missing ones, and keeps the damaged
/// files beside it. The database must be claimed.
///
/// # Errors
/// When there is no such database, or its files cannot be read or written. The salvage can then be run again.
pub fn salvage_journal(target: &Target) -> Result<JournalSalvage, StoreError> {
    sqlite::journal_commands::salvage_journal(sqlite_only(target)?)
}

fn sqlite_only(target: &Target) -> Result<&std::path::Path, StoreError> {
    match target {
        Target::Sqlite(path) => Ok(path),
        Target::Postgres(_) => Err(StoreError::Failed(
            "PostgreSQL has no ingest journal: events are acknowledged once they are in its tables"
                .to_owned(),
        )),
    }
}
