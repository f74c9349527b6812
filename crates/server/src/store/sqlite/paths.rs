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

/// What the names of files that belong to a database end in, behind the database's own name. It is the only list of them.
const ENDINGS: [&str; 8] = [
    WRITE_AHEAD_LOG,
    LOG_INDEX,
    ROLLBACK_JOURNAL,
    REFUSED_EVENTS,
    DOUBTFUL_EVENTS,
    REPLACED,
    INGEST_JOURNAL[0],
    INGEST_JOURNAL[1],
];

/// What stands before a number in the names of files that were kept beside others of the same kind.
const ASIDE: &str = ".aside-";

/// Whether the file at `path` is the database, or belongs to it, by its name: the database's own with endings. Both are
/// resolved paths. The file need not exist.
pub(super) fn belongs(database: &Path, path: &Path) -> bool {
    database.parent() == path.parent() && has_name(database, path)
}

fn has_name(database: &Path, path: &Path) -> bool {
    let (Some(name), Some(other)) = (database.file_name(), path.file_name()) else { return false };
    let rest = other.as_encoded_bytes().strip_prefix(name.as_encoded_bytes());
    rest.is_some_and(is_ending)
}

/// Whether a text is one ending after the other, some of them with a number, or nothing.
fn is_ending(mut rest: &[u8]) -> bool {
    while !rest.is_empty() {
        let known = ENDINGS.iter().find_map(|ending| rest.strip_prefix(ending.as_bytes()));
        let numbered = || {
            let number = rest.strip_prefix(ASIDE.as_bytes()).or_else(|| rest.strip_prefix(b"-"))?;
            let digits = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
            (digits > 0).then(|| &number[digits..])
        };
        match known.or_else(numbered) {
            Some(further) => rest = further,
            None => return false,
        }
    }
    true
}

/// The files that are there and belong to a database, itself included. `database` is a resolved path.
pub(super) fn files_of(database: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder_of(database))? {
        let path = folder_of(database).join(entry?.file_name());
        if has_name(database, &path) {
            files.push(path);
        }
    }
    Ok(files)
}

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
        aside.push(format!("{ASIDE}{number}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_belong_to_a_database_by_their_endings() {
        let database = Path::new("/data/pisync.db");
        for name in [
            "pisync.db",
            "pisync.db-wal",
            "pisync.db-shm",
            "pisync.db-journal",
            "pisync.db.ingest-1",
            "pisync.db.ingest-2",
            "pisync.db.ingest-1.aside-12",
            "pisync.db.refused.ndjson",
            "pisync.db.doubtful.ndjson",
            "pisync.db.replaced",
            "pisync.db.replaced-2",
            "pisync.db.replaced-2-wal",
            "pisync.db-wal.aside-1",
        ] {
            assert!(belongs(database, &Path::new("/data").join(name)), "{name}");
            assert!(!belongs(database, &Path::new("/elsewhere").join(name)), "{name}");
        }
        for name in [
            "pisync",
            "pisync.db.gz",
            "pisync.db2",
            "pisync.db-old",
            "pisync.db-",
            "pisync.db.aside-",
            "pisync.db.ingest-3",
            "pisync.db.replaced.ndjson",
            "my-pisync.db",
        ] {
            assert!(!belongs(database, &Path::new("/data").join(name)), "{name}");
        }
    }
}
