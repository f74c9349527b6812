//! Where a journal's files are, and what the tables say about the journal. Reading and writing a journal both use it.
//! Nothing here reads the contents of the files.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::store::{
    StoreError,
    sqlite::paths::{INGEST_JOURNAL, beside, second_name, sync_folder},
};

/// A file grows by this much at a time, filled with zeros. Syncing an overwrite of these zeros changes only data. It
/// costs the disk one write instead of several.
pub(super) const GROWTH_BYTES: u64 = 1 << 20;

/// What the tables say about the journal (`ingest_state`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct JournalState {
    /// Identifies the journal. Records of another database do not belong to this one.
    pub(in super::super) identity: i64,
    /// The last record that is in the tables.
    pub(in super::super) applied: u64,
    /// Whether a server had both files and ended without a proper stop. Both files must then exist.
    pub(in super::super) in_use: bool,
}

/// Whether the database has a journal. A proper stop of a server removes it.
pub(in super::super) fn exists(database: &Path) -> bool {
    paths(database).iter().any(|path| path.exists())
}

/// Removes the journal of a database. All of it must be applied.
pub(in super::super) fn remove(database: &Path) -> io::Result<()> {
    for path in paths(database) {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Renames the journal of a database, so that a person can inspect it. Answers the new names.
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
