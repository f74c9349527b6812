//! Complete copies of the database file. They are taken from a database that may be in use, and replace one that is
//! not. `store::backup` and `store::copy` call it. At every moment there must be a complete database under the name.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{
    connection::open_existing,
    files::{holds_something, replaced_names},
    journal,
    paths::{LOG_INDEX, ROLLBACK_JOURNAL, WRITE_AHEAD_LOG, beside},
};
use crate::{
    permissions::{self, folder_of},
    store::StoreError,
    temporary::TemporaryFile,
};

/// The contents of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackedUp {
    /// Registered devices.
    pub devices: u64,
    /// Events that are kept individually.
    pub events: u64,
}

/// How long to wait for others that use the database to be replaced.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// A checked copy of a database, on the disk under a temporary name. Dropping this value removes it, unless it was put
/// in its place.
pub(crate) struct Copy {
    file: TemporaryFile,
    pub(crate) holds: BackedUp,
}

impl Copy {
    /// Copies the database at `source`, as it is at this moment, to a file beside `destination`. Writers are not
    /// disturbed.
    pub(crate) fn make(source: &Path, destination: &Path) -> Result<Self, StoreError> {
        if !source.is_file() {
            return Err(failed(format!("there is no database file {}", source.display())));
        }
        let (folder, file) = (folder_of(destination), new_file(destination)?);
        let Some(path) = file.path().to_str() else {
            return Err(failed(format!("the path {} is not UTF-8", file.path().display())));
        };
        let holds = copy_and_check(source, path).map_err(|error| {
            let from = source.display();
            failed(match error {
                CopyError::Damaged(problem) => format!("{from} is damaged: {problem}"),
                CopyError::Sqlite(error) => match error.sqlite_error_code() {
                    Some(ErrorCode::NotADatabase) => {
                        format!("{from} is not a PiSync database; name another file")
                    }
                    Some(ErrorCode::DatabaseCorrupt) => format!("{from} is damaged: {error}"),
                    _ => format!("cannot copy {from} to {}: {error}", folder.display()),
                },
            })
        })?;
        file.as_file()
            .sync_all()
            .map_err(|error| failed(format!("cannot write {path}: {error}")))?;
        Ok(Self { file, holds })
    }

    /// An empty file beside `destination`. A database is made in it and then put in place.
    pub(crate) fn empty(destination: &Path) -> Result<Self, StoreError> {
        let file = new_file(destination)?;
        Ok(Self { file, holds: BackedUp { devices: 0, events: 0 } })
    }

    /// The path of the copy.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives the copy its name, atomically and durably.
    pub(crate) fn put_at(self, destination: &Path, overwrite: bool) -> Result<(), StoreError> {
        let put = if overwrite {
            self.file.persist(destination)
        } else {
            self.file.persist_noclobber(destination)
        };
        put.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => exists(destination),
            _ => failed(format!("cannot write {}: {error}", destination.display())),
        })?;
        let folder = folder_of(destination);
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| failed(format!("cannot sync {}: {error}", folder.display())))
    }

    /// Puts the copy in the place of `database`, which no server uses. Answers where the replaced database is kept. At
    /// every moment one of the two is there.
    pub(crate) fn replace(self, database: &Path) -> Result<Option<PathBuf>, StoreError> {
        let kept = if holds_something(database) {
            empty_log(database)?;
            keep_replaced(database)
        } else {
            None
        };
        self.take_place(database)?;
        Ok(kept)
    }

    /// Puts the copy where there is no database, or an empty one.
    pub(crate) fn take_empty_place(self, database: &Path) -> Result<(), StoreError> {
        if database.exists() {
            empty_log(database)?;
        }
        self.file.as_file().sync_all().map_err(|error| {
            failed(format!("cannot write {}: {error}", self.file.path().display()))
        })?;
        self.take_place(database)
    }

    fn take_place(self, database: &Path) -> Result<(), StoreError> {
        let cannot =
            |error: io::Error| failed(format!("cannot replace {}: {error}", database.display()));
        // SQLite would take an old log for the new file's own.
        for ending in [WRITE_AHEAD_LOG, LOG_INDEX, ROLLBACK_JOURNAL] {
            match fs::remove_file(beside(database, ending)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(error)),
                _ => {}
            }
        }
        // A journal that could be applied was already applied and removed.
        for kept in journal::set_all_aside(database).map_err(cannot)? {
            tracing::warn!(
                file = %kept.display(),
                "the ingest journal of the replaced database was renamed; it has acknowledged events that are not in the tables"
            );
        }
        self.belong_like(database).map_err(cannot)?;
        self.put_at(database, true)
    }

    /// Gives the copy the owner of `database`, or of its folder. The user who restores may be root, while the server is
    /// not.
    fn belong_like(&self, database: &Path) -> io::Result<()> {
        let model = if database.exists() { database } else { folder_of(database) };
        permissions::give_to_owner_of(model, self.file.as_file())
    }
}

/// The user must ask for a replacement explicitly.
pub(crate) fn exists(path: &Path) -> StoreError {
    failed(format!("{} exists; --force replaces it", path.display()))
}

enum CopyError {
    Sqlite(rusqlite::Error),
    Damaged(String),
}

impl From<rusqlite::Error> for CopyError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn copy_and_check(source: &Path, destination: &str) -> Result<BackedUp, CopyError> {
    const COUNT: &str = "select (select count(*) from devices), (select count(*) from sync_events)";
    open_existing(source)?.execute("vacuum into ?1", [destination])?;
    let copy = Connection::open(destination)?;
    let verdict: String = copy.query_row("pragma integrity_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(CopyError::Damaged(verdict));
    }
    leave_journal(&copy)?;
    let is_ours: bool = copy.query_row(
        "select count(*) = 3 from sqlite_schema
          where name in ('pisync_migrations', 'devices', 'sync_events')",
        [],
        |row| row.get(0),
    )?;
    let (devices, events): (i64, i64) = if is_ours {
        copy.query_row(COUNT, [], |row| Ok((row.get(0)?, row.get(1)?)))?
    } else {
        (0, 0)
    };
    Ok(BackedUp { devices: devices.cast_unsigned(), events: events.cast_unsigned() })
}

/// Clears what the copied tables say about the journal, whatever version made them. The journal beside the source is
/// not the copy's.
fn leave_journal(copy: &Connection) -> rusqlite::Result<()> {
    const COLUMNS: &str = "select name from pragma_table_info('ingest_state')";
    const WITHOUT_JOURNAL: [(&str, &str); 4] = [
        ("journal", "random()"),
        ("settled", "0"),
        ("settled_events", "0"),
        ("journal_in_use", "0"),
    ];
    let columns: Vec<String> =
        copy.prepare(COLUMNS)?.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    for (column, value) in WITHOUT_JOURNAL {
        if columns.iter().any(|name| name == column) {
            copy.execute(&format!("update ingest_state set {column} = {value}"), [])?;
        }
    }
    Ok(())
}

/// Ensures that nobody has the database open and that its log is empty.
fn empty_log(database: &Path) -> Result<(), StoreError> {
    let leave_log = || -> rusqlite::Result<String> {
        let connection = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        connection.busy_timeout(RELEASE_TIMEOUT)?;
        // This succeeds only if nobody else has the file open.
        connection.query_row("pragma journal_mode = delete", [], |row| row.get(0))
    };
    match leave_log().map_err(|error| (error.sqlite_error_code(), error)) {
        Ok(mode) if mode == "delete" => Ok(()),
        // A damaged database may be replaced.
        Err((Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt), _)) => Ok(()),
        Ok(_) | Err((Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked), _)) => {
            Err(failed(format!(
                "{} is in use by another process; wait for it or stop it first",
                database.display()
            )))
        }
        Err((_, error)) => Err(failed(format!("cannot open {}: {error}", database.display()))),
    }
}

/// Gives the file a second name, beside the databases that were replaced before. `None` on a file system without hard
/// links.
fn keep_replaced(database: &Path) -> Option<PathBuf> {
    for name in replaced_names(database) {
        match fs::hard_link(database, &name) {
            Ok(()) => return Some(name),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) => return None,
        }
    }
    None
}

/// A temporary file beside `destination`.
fn new_file(destination: &Path) -> Result<TemporaryFile, StoreError> {
    let folder = folder_of(destination);
    TemporaryFile::beside(destination)
        .map_err(|error| failed(format!("cannot create a file in {}: {error}", folder.display())))
}

fn failed(message: String) -> StoreError {
    StoreError::Failed(message)
}
