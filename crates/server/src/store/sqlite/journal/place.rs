//! Where a journal is and what the tables say of it: what reading and writing one have in common.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::store::{
    StoreError,
    sqlite::paths::{INGEST_JOURNAL, beside, second_name, sync_folder},
};

/// A file grows by this much, filled with zeros: syncing what overwrites them changes nothing but data, and
/// costs the disk one write instead of several.
pub(super) const GROWTH_BYTES: u64 = 1 << 20;

/// What the tables say of the journal (`ingest_state`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct JournalState {
    /// Whose it is: records of another database are none of this one's.
    pub(in super::super) identity: i64,
    /// The last record that is in the tables.
    pub(in super::super) applied: u64,
    /// Whether a server had both files when it ended, without a proper stop: then they must be there.
    pub(in super::super) in_use: bool,
}

/// Whether the database has a journal: none is left when a server has stopped properly.
pub(in super::super) fn exists(database: &Path) -> bool {
    paths(database).iter().any(|path| path.exists())
}

/// Removes the journal of a database, all of which is applied.
pub(in super::super) fn remove(database: &Path) -> io::Result<()> {
    for path in paths(database) {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Renames the journal of a database, for a person to look at, and answers the new names.
pub(in super::super) fn set_all_aside(database: &Path) -> io::Result<Vec<PathBuf>> {
    paths(database).iter().filter(|path| path.exists()).map(|path| set_aside(path)).collect()
}

/// Renames one file of a journal.
pub(super) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = second_name(path)?;
    fs::remove_file(path)?;
    sync_folder(path)?;
    Ok(aside)
}

/// Its two files.
pub(super) fn paths(database: &Path) -> [PathBuf; 2] {
    INGEST_JOURNAL.map(|ending| beside(database, ending))
}

pub(in super::super) fn unusable(database: &Path, error: &io::Error) -> StoreError {
    StoreError::Failed(format!(
        "cannot use the ingest journal beside {}: {error}",
        database.display()
    ))
}
