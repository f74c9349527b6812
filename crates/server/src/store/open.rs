//! Chooses the store that a target means, and prepares a database before it is opened. It creates the database, claims
//! it for one process, and applies what a killed server has left in its journal. `app` and the commands call it.

use std::{path::Path, sync::Arc};

use super::{Store, StoreError, Target, postgres, sqlite};

/// Opens the store that `target` names, whose schema must be current (see [`super::migrations`]).
///
/// # Errors
/// When it cannot be opened; the message says what to do.
pub async fn open(target: &Target) -> Result<Arc<dyn Store>, StoreError> {
    match target {
        Target::Sqlite(path) => Ok(Arc::new(sqlite::SqliteStore::open(path)?)),
        Target::Postgres(postgres) => {
            Ok(Arc::new(postgres::PostgresStore::connect(postgres).await?))
        }
    }
}

/// Whether there is a database at `target`. PostgreSQL says so by itself when it is asked for one that is not there.
///
/// # Errors
/// When something is in the way of finding out.
pub fn exists(target: &Target) -> Result<bool, StoreError> {
    match target {
        Target::Sqlite(path) => sqlite::files::exists(path),
        Target::Postgres(_) => Ok(true),
    }
}

/// Checks that there is a database at `target`. Commands call it that must not create an empty database when its name
/// is misspelt. PostgreSQL creates none, and reports a missing database itself.
///
/// # Errors
/// When there is no database, or something is in the way of finding out.
pub fn check_exists(target: &Target) -> Result<(), StoreError> {
    match target {
        Target::Sqlite(path) => sqlite::files::check_exists(path),
        Target::Postgres(_) => Ok(()),
    }
}

/// Creates the PostgreSQL database that `target` names; false when there was nothing to create. An
/// SQLite file is made by the first migration.
///
/// # Errors
/// When PostgreSQL cannot be reached or refuses.
pub async fn create_database(target: &Target) -> Result<bool, StoreError> {
    match target {
        Target::Sqlite(_) => Ok(false),
        Target::Postgres(postgres) => postgres::create_database(postgres).await,
    }
}

/// Keeps others from changing the same SQLite file under a running server, for as long as this value lives. PostgreSQL
/// needs no claim.
#[derive(Debug)]
pub struct Claim(Option<sqlite::claim::Claim>);

impl Claim {
    /// Checks that the claimed file is still the one that its name leads to.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self) -> Result<(), StoreError> {
        self.0.as_ref().map_or(Ok(()), sqlite::claim::Claim::check)
    }
}

/// Claims `target` for this process.
///
/// # Errors
/// When another process holds it.
pub fn claim(target: &Target) -> Result<Claim, StoreError> {
    match target {
        Target::Sqlite(path) => sqlite::claim::Claim::take(path).map(Some).map(Claim),
        Target::Postgres(_) => Ok(Claim(None)),
    }
}

/// Whether a server on this machine has claimed `target`. PostgreSQL needs no claim.
#[must_use]
pub fn is_claimed(target: &Target) -> bool {
    match target {
        Target::Sqlite(path) => sqlite::claim::is_claimed(path),
        Target::Postgres(_) => false,
    }
}

/// Checks that `path` may be written to: it must not be a file of the database itself.
///
/// # Errors
/// When it is such a file.
pub fn check_output(target: &Target, path: &Path) -> Result<(), StoreError> {
    match target {
        Target::Sqlite(database) => sqlite::files::check_is_not_ours(database, path),
        Target::Postgres(_) => Ok(()),
    }
}

/// Returns once everything that a server has acknowledged by now is where other processes look for it. On SQLite, a
/// running server applies its journal within a second. What a killed server has left is applied here.
///
/// # Errors
/// When that is not possible.
pub fn apply_journal(target: &Target) -> Result<(), StoreError> {
    match target {
        Target::Sqlite(path) => sqlite::journal_commands::apply_journal(path),
        Target::Postgres(_) => Ok(()),
    }
}
