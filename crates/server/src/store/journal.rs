//! What `pisync journal` finds in an ingest journal and what it does about it. Only SQLite has one: on PostgreSQL an
//! event is acknowledged once it is in the tables.

use super::{JournalReport, JournalSalvage, StoreError, Target, sqlite};

/// Looks into the ingest journal of `target`, and changes nothing.
///
/// # Errors
/// When there is no such database, or it cannot be read.
pub fn inspect_journal(target: &Target) -> Result<JournalReport, StoreError> {
    sqlite::journal_commands::inspect_journal(sqlite_only(target)?)
}

/// Goes on with a damaged ingest journal: keeps what is whole, marks what is missing, and keeps the damaged files
/// beside it. The database must be claimed.
///
/// # Errors
/// When there is no such database, or its files cannot be read or written; then it can be run again.
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
