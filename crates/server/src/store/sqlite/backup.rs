//! Whole copies of the file: out of a database that may be in use, and into the place of one that is not.

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

/// What a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackedUp {
    /// Registered devices.
    pub devices: u64,
    /// Events that are kept one by one.
    pub events: u64,
}

/// How long to wait for somebody who is using the database that is to be replaced.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// A checked copy of a database, on the disk under a name that nobody knows; it goes with this value until
/// it is put in its place.
pub(crate) struct Copy {
    file: TemporaryFile,
    pub(crate) holds: BackedUp,
}

impl Copy {
    /// Copies the database at `source`, as it is at this moment, to beside `destination`. Whoever writes
    /// meanwhile is not disturbed.
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
                    Some(ErrorCode::NotADatabase) => format!("{from} is not a PiSync database"),
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

    /// An empty file beside `destination`, for a database that is put there once it is made.
    pub(crate) fn empty(destination: &Path) -> Result<Self, StoreError> {
        let file = new_file(destination)?;
        Ok(Self { file, holds: BackedUp { devices: 0, events: 0 } })
    }

    /// Where the copy is.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives the copy its name, at once and for good.
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

    /// Puts the copy in the place of `database`, which no server uses, and tells where what was there is
    /// kept. At every moment there is the one or the other.
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

    /// Puts the copy where there is no database, or one with nothing in it.
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
        // A log that is left over would be taken for the new file's own.
        for ending in [WRITE_AHEAD_LOG, LOG_INDEX, ROLLBACK_JOURNAL] {
            match fs::remove_file(beside(database, ending)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(error)),
                _ => {}
            }
        }
        // Whoever could apply it has removed it.
        for kept in journal::set_all_aside(database).map_err(cannot)? {
            tracing::warn!(
                file = %kept.display(),
                "the ingest journal of the replaced database was renamed; it has acknowledged events that are not in the tables"
            );
        }
        self.belong_like(database).map_err(cannot)?;
        self.put_at(database, true)
    }

    /// Gives the copy the owner of `database`, or of its folder: whoever restores may be root, and the server
    /// is not.
    fn belong_like(&self, database: &Path) -> io::Result<()> {
        let model = if database.exists() { database } else { folder_of(database) };
        permissions::give_to_owner_of(model, self.file.as_file())
    }
}

/// Whoever asked for it has to say so.
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

/// The journal beside the source is not the copy's, whatever version made the tables that tell of it.
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

/// Sees to it that nobody has the database open and that nothing of it is left in its log.
fn empty_log(database: &Path) -> Result<(), StoreError> {
    let leave_log = || -> rusqlite::Result<String> {
        let connection = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        connection.busy_timeout(RELEASE_TIMEOUT)?;
        // Succeeds for the only one who has the file open.
        connection.query_row("pragma journal_mode = delete", [], |row| row.get(0))
    };
    match leave_log().map_err(|error| (error.sqlite_error_code(), error)) {
        Ok(mode) if mode == "delete" => Ok(()),
        // It is because it is damaged that it is replaced.
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

/// Gives the file a second name, under which it stays beside those that were replaced before; `None` on a file system
/// that cannot.
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

/// A file beside `destination`.
fn new_file(destination: &Path) -> Result<TemporaryFile, StoreError> {
    let folder = folder_of(destination);
    TemporaryFile::beside(destination)
        .map_err(|error| failed(format!("cannot create a file in {}: {error}", folder.display())))
}

fn failed(message: String) -> StoreError {
    StoreError::Failed(message)
}
