//! The names of a database's files, what distinguishes one file from another, and how a file gets another name.
//! Everything that works with files of a database uses it. Nothing here may open a database.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::permissions::{folder_of, with_ending};

/// SQLite's write-ahead log and its index. They exist while somebody has the database open.
pub(super) const WRITE_AHEAD_LOG: &str = "-wal";
pub(super) const LOG_INDEX: &str = "-shm";

/// SQLite's rollback journal, which it uses without a write-ahead log.
pub(super) const ROLLBACK_JOURNAL: &str = "-journal";

/// Acknowledged events that the tables refuse.
pub(super) const REFUSED_EVENTS: &str = ".refused.ndjson";

/// Events that stood in damaged parts of the journal.
pub(super) const DOUBTFUL_EVENTS: &str = ".doubtful.ndjson";

/// The database that `pisync restore` has replaced.
pub(super) const REPLACED: &str = ".replaced";

/// The endings of the ingest journal's two files.
pub(super) const INGEST_JOURNAL: [&str; 2] = [".ingest-1", ".ingest-2"];

/// The file beside `database` (a resolved path) whose name has this ending.
pub(super) fn beside(database: &Path, ending: &str) -> PathBuf {
    with_ending(database, ending)
}

/// Identifies a file, whatever its name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The identity of the file that `path` leads to.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|metadata| Self::of(&metadata))
    }
}

/// Gives a file a second name without replacing another file.
pub(super) fn second_name(path: &Path) -> io::Result<PathBuf> {
    for number in 1.. {
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".aside-{number}"));
        let aside = PathBuf::from(aside);
        match fs::hard_link(path, &aside) {
            Ok(()) => {
                sync_folder(path)?;
                return Ok(aside);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) if !aside.exists() => {
                // The file system has no hard links.
                fs::copy(path, &aside)?;
                File::open(&aside)?.sync_all()?;
                sync_folder(path)?;
                return Ok(aside);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("no name is free"))
}

/// Syncs the folder of `path`, so that its names are on the disk.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}
