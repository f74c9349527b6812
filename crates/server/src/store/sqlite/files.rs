//! The database's file: which one a path leads to, how it is created, and what to say when it cannot be opened.
//! `claim`, `connection` and the commands call it. A path must always be resolved here first, because SQLite keeps a
//! log for each name of a file.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rusqlite::ErrorCode;

use super::paths::{Identity, REPLACED, belongs, beside, files_of};
use crate::{
    permissions::{self, PRIVATE, folder_of, with_ending},
    store::StoreError,
};

/// The maximum number of symbolic links to follow, the same as in Linux.
const MOST_LINKS: usize = 40;

/// The database file that `path` leads to through symbolic links. The file may be missing. SQLite keeps its log beside
/// that file, and we keep all other files there.
///
/// # Errors
/// When it leads nowhere, or to a file with several names. Each name would have a log of its own.
pub(in crate::store) fn resolve(path: &Path) -> Result<PathBuf, StoreError> {
    let failed = |problem: &dyn std::fmt::Display| {
        StoreError::Failed(format!("cannot open {}: {problem}", path.display()))
    };
    let mut file = path.to_owned();
    let mut links = 0;
    while fs::symlink_metadata(&file).is_ok_and(|there| there.is_symlink()) {
        let target = fs::read_link(&file).map_err(|error| failed(&error))?;
        file = folder_of(&file).join(target);
        links += 1;
        if links > MOST_LINKS {
            return Err(failed(&"its symbolic links lead in a circle"));
        }
    }
    let Some(name) = file.file_name() else { return Err(failed(&"it names no file")) };
    let resolved = match folder_of(&file).canonicalize() {
        Ok(folder) => folder.join(name),
        Err(error) if error.kind() == io::ErrorKind::NotFound && links == 0 => {
            // The folder is still to be made, unless a link stands in its place.
            let mut folders = folder_of(&file).ancestors();
            if let Some(link) = folders.find(|folder| folder.is_symlink() && !folder.exists()) {
                let link = link.display();
                return Err(failed(&format!(
                    "{link} is a symbolic link that leads to no folder; is the disk mounted?"
                )));
            }
            std::path::absolute(&file).map_err(|error| failed(&error))?
        }
        // The disk is probably not mounted. A new database in its place would look like a loss.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(failed(&format!(
                "it is a symbolic link to {}, and there is no such folder; is the disk mounted?",
                file.display()
            )));
        }
        Err(error) => return Err(failed(&error)),
    };
    if let Ok(there) = fs::metadata(&resolved) {
        check_names(&resolved, &there)?;
    }
    Ok(resolved)
}

/// Checks that a file has one name alone.
fn check_names(database: &Path, there: &Metadata) -> Result<(), StoreError> {
    if !there.is_file() || there.nlink() <= 1 || is_half_replaced(database, there) {
        return Ok(());
    }
    Err(StoreError::Failed(format!(
        "{} has {} names (hard links), and whoever comes by another one would damage it; remove the other names, or make a copy with cp and use that",
        database.display(),
        there.nlink()
    )))
}

/// Whether a restore is between two steps: the database has its second name already, and the copy not yet the first.
/// The restore may have been killed.
fn is_half_replaced(database: &Path, there: &Metadata) -> bool {
    half_replaced(database, there).is_some()
}

/// The second name that such a restore has given the database.
pub(super) fn half_replaced(database: &Path, there: &Metadata) -> Option<PathBuf> {
    let is_it = |other: &PathBuf| Identity::at(other).is_ok_and(|at| at == Identity::of(there));
    if there.nlink() != 2 {
        return None;
    }
    replaced_names(database).take_while(|name| name.exists()).find(is_it)
}

/// The names of databases that restores have replaced, the oldest first. Each has an ending; from the second one on, a
/// number follows.
pub(super) fn replaced_names(database: &Path) -> impl Iterator<Item = PathBuf> {
    let first = beside(database, REPLACED);
    let later = (2..).map({
        let first = first.clone();
        move |number: u32| with_ending(&first, &format!("-{number}"))
    });
    std::iter::once(first).chain(later)
}

/// Whether both are the same file.
pub(in crate::store) fn is_same_file(left: &Path, right: &Path) -> bool {
    matches!((Identity::at(left), Identity::at(right)), (Ok(left), Ok(right)) if left == right)
}

/// Checks that a file written to `path` would not replace the database at `database`, or a file that belongs to it.
///
/// # Errors
/// When it would.
pub(in crate::store) fn check_is_not_ours(database: &Path, path: &Path) -> Result<(), StoreError> {
    let (Ok(database), Ok(resolved)) = (resolve(database), resolve(path)) else { return Ok(()) };
    // Another name of one of the files would do as much harm.
    let is_another_name =
        || files_of(&database).is_ok_and(|files| files.iter().any(|file| is_same_file(path, file)));
    if belongs(&database, &resolved) || is_another_name() {
        return Err(StoreError::Failed(format!(
            "{} is the database itself, or a file that belongs to it; name another file",
            path.display()
        )));
    }
    Ok(())
}

/// Creates an empty file for a new database, with its folder. Only its owner can open it; SQLite gives its log the same
/// owner and mode.
pub(super) fn create(database: &Path) -> Result<(), StoreError> {
    create_folder(database)?;
    match permissions::create_for_server(database, PRIVATE) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(cannot_open(database, &error))
        }
        _ => Ok(()),
    }
}

pub(super) fn create_folder(database: &Path) -> Result<(), StoreError> {
    let folder = folder_of(database);
    permissions::create_folder(folder).map_err(|error| {
        let way_on = way_on(&error);
        StoreError::Failed(format!("cannot create {}: {error}{way_on}", folder.display()))
    })
}

pub(super) fn cannot_open(file: &Path, error: &io::Error) -> StoreError {
    let way_on = way_on(error);
    StoreError::Failed(format!("cannot open {}: {error}{way_on}", file.display()))
}

/// Advice, if any, about a file or folder that cannot be opened or created. It follows the error.
fn way_on(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DISK_FULL,
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::AlreadyExists
        | io::ErrorKind::NotFound => NOT_WRITABLE,
        _ => "",
    }
}

const DISK_FULL: &str = "; make room on its disk";
/// SQLite does not tell that there is no room for the file that its processes share.
pub(super) const MAYBE_FULL: &str = "; look whether its disk is full or broken";
const NOT_WRITABLE: &str = "; set DATA_DIR or DATABASE_URL to a place that the server may write";

/// Why SQLite could not open the database at `path`, or read its beginning, and what to do about it.
pub(super) fn sqlite_cannot_open(path: &Path, error: &rusqlite::Error) -> StoreError {
    let way_on = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => DISK_FULL,
        Some(ErrorCode::SystemIoFailure) => MAYBE_FULL,
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            NOT_WRITABLE
        }
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            "; bring back a backup with `pisync restore`, or name another database with DATA_DIR or DATABASE_URL"
        }
        _ => "",
    };
    StoreError::Failed(format!("cannot open {}: {error}{way_on}", path.display()))
}

/// Whether there is a database. A start that was killed at once leaves an empty file.
pub(in crate::store) fn holds_something(database: &Path) -> bool {
    fs::metadata(database).is_ok_and(|there| there.len() > 0)
}

/// Whether there is anything at `path`.
///
/// # Errors
/// When that cannot be known: a folder may be no folder, or one that this user may not search.
pub(super) fn is_there(path: &Path) -> Result<bool, StoreError> {
    path.try_exists().map_err(|error| cannot_open(path, &error))
}

/// See [`store::exists`](crate::store::exists).
pub(in crate::store) fn exists(path: &Path) -> Result<bool, StoreError> {
    let database = resolve(path)?;
    if !is_there(&database)? {
        return Ok(false);
    }
    // An empty file is no database yet.
    let there = fs::metadata(&database).map_err(|error| cannot_open(&database, &error))?;
    Ok(!there.is_file() || there.len() > 0)
}

/// See [`store::check_exists`](crate::store::check_exists).
pub(in crate::store) fn check_exists(path: &Path) -> Result<(), StoreError> {
    if exists(path)? {
        return Ok(());
    }
    Err(StoreError::Failed(format!(
        "no database at {}; name another with DATA_DIR or DATABASE_URL, or run `pisync serve` once",
        path.display()
    )))
}
