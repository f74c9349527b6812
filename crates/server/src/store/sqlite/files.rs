//! The database's file: which one a path leads to, what stands beside it, and the lock that says whose it is.
//! Everything that opens a database comes through here first.
//!
//! The lock is on the database file itself (`flock`), not on a file beside it: whatever path somebody comes by,
//! a symbolic link or a mount, it is the same lock, and nobody can delete it. SQLite's own locks are POSIX
//! locks, which do not meet it. But a process loses those once it closes *any* descriptor of the file, so a
//! descriptor that is opened here is never closed while the file has a name ([`HANDLES`]).

use std::{
    fs::{self, File, Metadata, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rusqlite::ErrorCode;

use super::log_check;
use crate::{
    permissions::{self, PRIVATE, folder_of, with_ending},
    store::StoreError,
    temporary::{self, Placeholder},
};

/// SQLite's write-ahead log and the index of it, which are there while somebody has the database open.
pub(super) const WRITE_AHEAD_LOG: &str = "-wal";
pub(super) const LOG_INDEX: &str = "-shm";

/// SQLite's journal of a transaction, where there is no write-ahead log.
pub(super) const ROLLBACK_JOURNAL: &str = "-journal";

/// Acknowledged events that the tables refuse.
pub(super) const REFUSED_EVENTS: &str = ".refused.ndjson";

/// Events that stood in damaged parts of the journal.
pub(super) const DOUBTFUL_EVENTS: &str = ".doubtful.ndjson";

/// The database that `pisync restore` has replaced.
pub(super) const REPLACED: &str = ".replaced";

/// The lock of programs before this one, which kept it in a file of its own.
const FORMER_LOCK: &str = ".lock";

/// Symbolic links that may lead from one to the next, as many as Linux follows.
const MOST_LINKS: usize = 40;

/// How long to try again when the lock is held: whoever looks for a server holds it for a moment.
const CLAIM_PATIENCE: Duration = Duration::from_millis(300);

const CLAIM_INTERVAL: Duration = Duration::from_millis(20);

/// How long a server may take from its claim to the first use of its log.
const LOG_PATIENCE: Duration = Duration::from_secs(1);

/// The file beside `database`, a path from [`resolve`], whose name has this ending.
pub(super) fn beside(database: &Path, ending: &str) -> PathBuf {
    with_ending(database, ending)
}

/// The database file that `path` leads to, for whoever opens it without having claimed it.
///
/// # Errors
/// When it cannot be opened without damage.
pub(super) fn find(path: &Path) -> Result<PathBuf, StoreError> {
    let database = find_unchecked(path)?;
    let is_held = Handle::open(&database, false).is_ok_and(|(handle, _)| handle.is_held(false));
    if !is_held {
        log_check::check(&database)?;
    }
    Ok(database)
}

/// The same for whoever looks for damage in its log.
pub(super) fn find_unchecked(path: &Path) -> Result<PathBuf, StoreError> {
    let database = resolve(path)?;
    check_common_log(&database)?;
    Ok(database)
}

/// The database file that `path` leads to through whatever symbolic links, whether it is there already or not.
/// SQLite keeps its log beside that file, and so do we with everything else.
///
/// # Errors
/// When it leads nowhere, or to a file with several names: each name would have a log of its own.
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
            std::path::absolute(&file).map_err(|error| failed(&error))?
        }
        // Probably a disk that is not mounted. A new database in its place would look like a loss.
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

/// Whether a restore is at work, or was killed, between giving the database its second name and taking its
/// first.
fn is_half_replaced(database: &Path, there: &Metadata) -> bool {
    half_replaced(database, there).is_some()
}

/// The second name that such a restore has given the database.
fn half_replaced(database: &Path, there: &Metadata) -> Option<PathBuf> {
    let is_it = |other: &PathBuf| Identity::at(other).is_ok_and(|at| at == Identity::of(there));
    if there.nlink() != 2 {
        return None;
    }
    replaced_names(database).take_while(|name| name.exists()).find(is_it)
}

/// What databases are called that restores have replaced, the oldest first: an ending, and from the second on a number.
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

/// Checks that what is written to `path` would not take the place of the database at `database`, or of a file that
/// belongs to it.
///
/// # Errors
/// When it would.
pub(in crate::store) fn check_is_not_ours(database: &Path, path: &Path) -> Result<(), StoreError> {
    let (Ok(database), Ok(resolved)) = (resolve(database), resolve(path)) else { return Ok(()) };
    let endings =
        ["", WRITE_AHEAD_LOG, LOG_INDEX, ROLLBACK_JOURNAL, REFUSED_EVENTS, DOUBTFUL_EVENTS];
    let is_ours = |ending: &&str| {
        let file = beside(&database, ending);
        file == resolved || is_same_file(path, &file)
    };
    if endings.iter().chain(&super::journal::ENDINGS).any(is_ours) {
        return Err(StoreError::Failed(format!(
            "{} is the database itself, or a file that belongs to it; name another file",
            path.display()
        )));
    }
    Ok(())
}

/// What tells one file from all others, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// Of the file that `path` leads to.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|metadata| Self::of(&metadata))
    }
}

/// Makes an empty file for a database that is not there yet, with its folder: for its owner alone. SQLite
/// gives its log the same owner and mode.
pub(super) fn create(database: &Path) -> Result<(), StoreError> {
    create_folder(database)?;
    match permissions::create_for_server(database, PRIVATE) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(cannot_open(database, &error))
        }
        _ => Ok(()),
    }
}

fn create_folder(database: &Path) -> Result<(), StoreError> {
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

/// What to do about a file or folder that cannot be opened or made, if anything is known; follows the error.
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
const NOT_WRITABLE: &str = "; set DATA_DIR to a folder that the server may write";

/// Why SQLite could not open the database at `path`, or read what it begins with, and what to do about it.
pub(super) fn sqlite_cannot_open(path: &Path, error: &rusqlite::Error) -> StoreError {
    let way_on = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => DISK_FULL,
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            NOT_WRITABLE
        }
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            "; bring back a backup with `pisync restore`, or set DATA_DIR to another folder"
        }
        _ => "",
    };
    StoreError::Failed(format!("cannot open {}: {error}{way_on}", path.display()))
}

/// Whether there is a database: an empty file is what a start leaves that was killed at once.
pub(in crate::store) fn holds_something(database: &Path) -> bool {
    fs::metadata(database).is_ok_and(|there| there.len() > 0)
}

/// The database files that this process has opened to look at their locks. They stay open until the file has
/// no name any more: closing one would drop the locks that SQLite holds on it in this process.
static HANDLES: Mutex<Vec<Arc<Handle>>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Handle {
    file: File,
    identity: Identity,
    /// Whether this process has claimed the file. The lock is of the descriptor, so it would not keep
    /// somebody in the same process out.
    is_claimed: Mutex<bool>,
}

impl Handle {
    /// The one for the file that is at `database`; with `create` it is made when there is none. Tells whether
    /// it was.
    fn open(database: &Path, create: bool) -> io::Result<(Arc<Self>, bool)> {
        let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match Identity::at(database) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && create => None,
            found => Some(found?),
        };
        if let Some(handle) = handles.iter().find(|handle| Some(handle.identity) == found) {
            return Ok((Arc::clone(handle), false));
        }
        let is_new = found.is_none();
        let file = if is_new {
            permissions::create_for_server(database, PRIVATE)?
        } else {
            // For writing where that is possible: on an overlay the file is then the one that is written.
            match File::options().read(true).write(true).open(database) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                    ) =>
                {
                    File::open(database)?
                }
                opened => opened?,
            }
        };
        let identity = Identity::of(&file.metadata()?);
        let handle = Arc::new(Self { file, identity, is_claimed: Mutex::new(false) });
        handles.retain(|handle| Arc::strong_count(handle) > 1 || handle.names() > 0);
        handles.push(Arc::clone(&handle));
        Ok((handle, is_new))
    }

    /// How many names the file has; none when it was deleted.
    fn names(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.nlink())
    }

    fn claimed(&self) -> MutexGuard<'_, bool> {
        self.is_claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock; false when it is held.
    fn try_claim(&self) -> io::Result<bool> {
        let mut is_claimed = self.claimed();
        if *is_claimed {
            return Ok(false);
        }
        match self.file.try_lock() {
            Ok(()) => *is_claimed = true,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(*is_claimed)
    }

    /// Whether another process holds the lock, or, if this one does, what `ours` says.
    fn is_held(&self, ours: bool) -> bool {
        let is_claimed = self.claimed();
        if *is_claimed {
            return ours;
        }
        match self.file.try_lock_shared() {
            Ok(()) => {
                // It goes with the process at the latest.
                let _ = self.file.unlock();
                false
            }
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Error(_)) => false,
        }
    }

    fn release(&self) {
        let mut is_claimed = self.claimed();
        let _ = self.file.unlock();
        *is_claimed = false;
    }
}

/// Keeps others from changing the database, for as long as it lives or the process does.
#[derive(Debug)]
pub(in crate::store) struct Claim {
    database: PathBuf,
    handle: Arc<Handle>,
    /// What was made for the lock, when there was no file before.
    placeholder: Option<Placeholder>,
    _former: Option<File>,
}

impl Claim {
    /// Claims the database that `path` leads to. Its files are made private.
    ///
    /// # Errors
    /// When a server holds it.
    pub(in crate::store) fn take(path: &Path) -> Result<Self, StoreError> {
        create_folder(path)?;
        let database = resolve(path)?;
        let began = Instant::now();
        loop {
            let (handle, is_new) =
                Handle::open(&database, true).map_err(|error| cannot_open(&database, &error))?;
            let is_ours = handle.try_claim().map_err(|error| {
                StoreError::Failed(format!("cannot lock {}: {error}", database.display()))
            })?;
            if is_ours {
                let former = lock_former(&database);
                // Another file may have come there while the lock was taken.
                let is_there = Identity::at(&database).is_ok_and(|at| at == handle.identity);
                if is_there && let Some(former) = former {
                    let placeholder = is_new.then(|| Placeholder::new(&database));
                    let claim = Self { database, handle, placeholder, _former: former };
                    claim.tidy()?;
                    return Ok(claim);
                }
                handle.release();
            }
            if began.elapsed() > CLAIM_PATIENCE {
                return Err(StoreError::Failed(format!(
                    "{} is in use by a running PiSync server; stop that one first, or set DATA_DIR to another folder",
                    path.display()
                )));
            }
            thread::sleep(CLAIM_INTERVAL);
        }
    }

    /// Takes away what an interrupted restore has left, and what others may do with the files.
    fn tidy(&self) -> Result<(), StoreError> {
        let there = fs::metadata(&self.database).ok();
        if let Some(other) = there.and_then(|there| half_replaced(&self.database, &there)) {
            fs::remove_file(&other).map_err(|error| {
                StoreError::Failed(format!("cannot remove {}: {error}", other.display()))
            })?;
        }
        let files = ["", WRITE_AHEAD_LOG, LOG_INDEX, REFUSED_EVENTS, DOUBTFUL_EVENTS, REPLACED];
        for file in files.iter().chain(&super::journal::ENDINGS) {
            let path = beside(&self.database, file);
            match permissions::restrict(&path, PRIVATE) {
                Ok(None) => {}
                Ok(Some(mode)) => tracing::info!(
                    file = %path.display(),
                    "others might open this file (its mode was {mode:04o}); now its owner alone may"
                ),
                Err(error) => tracing::warn!(
                    file = %path.display(),
                    %error,
                    "others may open this file, and that cannot be changed"
                ),
            }
        }
        Ok(())
    }

    /// Checks that the path still leads to the file that was claimed.
    ///
    /// # Errors
    /// When somebody has put another one there.
    pub(in crate::store) fn check(&self) -> Result<(), StoreError> {
        if Identity::at(&self.database).is_ok_and(|at| at == self.handle.identity) {
            return Ok(());
        }
        Err(StoreError::Failed(format!(
            "{} was replaced while it was opened; start again once nobody changes it",
            self.database.display()
        )))
    }

    /// The database's file.
    pub(in crate::store) fn database(&self) -> &Path {
        &self.database
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // What was made for the lock alone goes with it.
        if self.placeholder.is_some()
            && !beside(&self.database, WRITE_AHEAD_LOG).exists()
            && fs::metadata(&self.database)
                .is_ok_and(|there| there.len() == 0 && Identity::of(&there) == self.handle.identity)
        {
            let _ = fs::remove_file(&self.database);
        }
        self.handle.release();
    }
}

/// Takes the lock of former programs, if it is there; `None` when one of them holds it.
#[expect(clippy::option_option, reason = "whether it may be taken, and what was")]
fn lock_former(database: &Path) -> Option<Option<File>> {
    let Ok(file) = File::open(beside(database, FORMER_LOCK)) else { return Some(None) };
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => None,
        _ => Some(Some(file)),
    }
}

/// Whether a server has claimed the database that `path` leads to.
pub(in crate::store) fn is_claimed(path: &Path) -> bool {
    let Ok(database) = resolve(path) else { return false };
    if temporary::is_being_made(&database) {
        return false;
    }
    // Without a file there is no server, and nothing is left behind by asking.
    Handle::open(&database, false).is_ok_and(|(handle, _)| handle.is_held(true))
        || File::open(beside(&database, FORMER_LOCK))
            .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Checks that another process that has claimed `database` finds its log where we do. It does not when the file
/// alone is mounted somewhere else: then each would miss what the other writes.
fn check_common_log(database: &Path) -> Result<(), StoreError> {
    if temporary::is_being_made(database) {
        return Ok(());
    }
    let is_held = || Handle::open(database, false).is_ok_and(|(handle, _)| handle.is_held(false));
    let began = Instant::now();
    while !beside(database, WRITE_AHEAD_LOG).exists() && is_held() {
        if began.elapsed() > LOG_PATIENCE {
            return Err(StoreError::Failed(format!(
                "{} is in use by a server that reaches it by another path, so its log is not here; use the same path (mount the folder, not the file alone)",
                database.display()
            )));
        }
        thread::sleep(CLAIM_INTERVAL);
    }
    Ok(())
}
