//! What a migration is, and what the migrator needs of a store. Both stores implement [`MigrationDatabase`] and
//! `migrator` calls it. A migration and its record must be written in one transaction.

use async_trait::async_trait;
use pisync_core::Timestamp;
use sha2::{Digest, Sha256};

use crate::store::StoreError;

/// The file name of the Node service's own migration, which it left in its table `migrations`.
pub(in crate::store) const NODE_MIGRATION: &str = "001_create_devices_and_sync_events_tables.js";

/// Where a migration comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Part of the program.
    Embedded,
    /// A pair of files in `MIGRATIONS_DIR`.
    User,
}

impl Source {
    /// Reads what [`Self::as_str`] has written.
    pub(in crate::store) fn parse(text: &str) -> Self {
        if text == Self::User.as_str() { Self::User } else { Self::Embedded }
    }

    /// The form that is stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::User => "user",
        }
    }
}

/// One change of the schema.
#[derive(Debug, Clone)]
pub struct Migration {
    /// `YYYY-MM-DD-NN-name`.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
    /// The SQL that makes the change.
    pub up: String,
    /// The SQL that rolls it back.
    pub down: String,
}

impl Migration {
    /// SHA-256 of both directions, in hexadecimal.
    #[must_use]
    pub fn checksum(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update(&self.up);
        hasher.update([0]);
        hasher.update(&self.down);
        hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What rolling it back loses for good. Its `down` file says so in lines `-- loses: …`.
    pub fn losses(&self) -> impl Iterator<Item = &str> {
        self.down.lines().filter_map(|line| line.strip_prefix("-- loses:")).map(str::trim)
    }
}

/// A migration that was applied to the database.
#[derive(Debug, Clone)]
pub struct Applied {
    /// Its name.
    pub name: String,
    /// Where it came from.
    pub source: Source,
    /// Its checksum when it was applied.
    pub checksum: String,
    /// The number of the command that applied it. Migrations that one command applied share a number.
    pub batch: i64,
    /// When it was applied.
    pub applied_at: Timestamp,
}

/// What a database contains before the migrator changes it.
#[derive(Debug)]
pub(in crate::store) enum Contents {
    /// Ours, or empty.
    Ours(Ours),
    /// The Node service's tables.
    NodeService,
    /// A table of another program that has one of our names.
    Foreign(&'static str),
}

/// What is known of a database of ours.
#[derive(Debug, Default)]
pub(in crate::store) struct Ours {
    /// The applied migrations, in that order.
    pub applied: Vec<Applied>,
    /// Whether its first rows came from the Node service. Rolling back the first migration then restores that service's
    /// tables.
    pub taken_over: bool,
}

/// What the migrator needs of a store.
#[async_trait]
pub(in crate::store) trait MigrationDatabase: Send {
    /// Inspects the database and changes nothing.
    async fn contents(&mut self) -> Result<Contents, StoreError>;

    /// Whether the schema may be changed. Acknowledged events that are not in the tables yet must be applicable to this
    /// version's tables.
    fn may_change(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Runs a migration's `up` and records it, in one transaction under the lock, in which [`may_apply`] allows it.
    /// False when another process has applied it meanwhile.
    async fn apply(
        &mut self,
        migration: &Migration,
        before: &[String],
        batch: i64,
        now: Timestamp,
    ) -> Result<bool, StoreError>;

    /// Runs a migration's `down` and removes its record, in the same way, if [`may_revert`] allows it. False when it is
    /// no longer applied.
    async fn revert(&mut self, migration: &Migration) -> Result<bool, StoreError>;
}

/// Whether the migration `name` may be applied now that those in `applied` are. Each migration has the lock by itself, so
/// another process may have rolled back some of those that must come `before`.
pub(in crate::store) fn may_apply(
    applied: &[String],
    name: &str,
    before: &[String],
) -> Result<bool, StoreError> {
    if applied.iter().any(|one| one == name) {
        return Ok(false);
    }
    match before.iter().find(|one| !applied.contains(one)) {
        Some(missing) => Err(StoreError::Failed(format!(
            "another process has rolled {missing} back meanwhile; let it end, look with `pisync migrate status`, and run this again"
        ))),
        None => Ok(true),
    }
}

/// Whether the migration `name` may be rolled back. It must be the last one of those in `applied`.
pub(in crate::store) fn may_revert(applied: &[String], name: &str) -> Result<bool, StoreError> {
    if !applied.iter().any(|one| one == name) {
        return Ok(false);
    }
    match applied.last().filter(|last| *last != name) {
        Some(last) => Err(StoreError::Failed(format!(
            "another process has applied {last} meanwhile; let it end, look with `pisync migrate status`, and run this again"
        ))),
        None => Ok(true),
    }
}

/// Why migrations cannot run.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The database belongs to the Node service; see [`NODE_MIGRATION`].
    #[error(
        "this database was made by the Node PiSync and is left untouched: take it over with `pisync migrate up`, after a backup and a rehearsal with `pisync migrate up --dry-run` (see docs/coming-from-node.md)"
    )]
    NodeService,
    /// The database is not one of ours.
    #[error(
        "the table {0} exists, but PiSync did not make it; name a database of its own with DB_NAME or DATABASE_URL"
    )]
    Foreign(&'static str),
    /// Made by a later version.
    #[error(
        "the database is newer than this program: it has the migrations {}; run the newer version, or roll them back with it", .0.join(", ")
    )]
    Newer(Vec<String>),
    /// An applied migration's text has changed since.
    #[error(
        "the migration {0} was edited after it was applied; put its files back as they were and write a new migration instead"
    )]
    Edited(String),
    /// A user's migration cannot be rolled back without its file.
    #[error(
        "the files of the applied migration {0} are missing from the migrations folder; put them back, or name the folder that has them with MIGRATIONS_DIR"
    )]
    Missing(String),
    /// A new migration cannot have this name.
    #[error(
        "{0:?} is no name for a migration: use letters, digits and hyphens, for instance add-site-column"
    )]
    BadName(String),
    /// A file in the folder is invalid.
    #[error("{0}")]
    BadFile(String),
    /// A migration failed; it left nothing behind.
    #[error("migration {name} failed and was undone: {error}")]
    Run {
        /// The migration.
        name: String,
        /// The database's error.
        error: StoreError,
    },
    /// The database cannot be reached or opened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_is_noticed_between_two_migrations() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let applied = names(&["a", "b"]);
        assert!(may_apply(&applied, "c", &names(&["a", "b"])).unwrap());
        assert!(!may_apply(&applied, "b", &names(&["a"])).unwrap(), "it is applied already");
        let error = may_apply(&names(&["a"]), "c", &applied).unwrap_err().to_string();
        assert!(error.starts_with("another process has rolled b back meanwhile"), "{error}");
        assert!(may_revert(&applied, "b").unwrap());
        assert!(!may_revert(&applied, "c").unwrap(), "it is rolled back already");
        let error = may_revert(&applied, "a").unwrap_err().to_string();
        assert!(error.starts_with("another process has applied b meanwhile"), "{error}");
    }
}
