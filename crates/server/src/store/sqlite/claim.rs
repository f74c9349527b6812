//! The lock that says which process owns a database. Everything that opens a database comes through here first: servers
//! claim it, others find its file with [`find`].
//!
//! The lock is on the database file itself (`flock`), not on a file beside it. It is therefore the same lock for every
//! path, symbolic link or mount, and nobody can delete it. SQLite's own locks are POSIX locks, which do not conflict
//! with it. A process loses its POSIX locks once it closes *any* descriptor of the file. A descriptor that is opened
//! here must therefore stay open while the file has a name ([`HANDLES`]).

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use super::{
    files::{cannot_open, create_folder, half_replaced, resolve},
    log_check,
    paths::{Identity, WRITE_AHEAD_LOG, beside, files_of},
};
use crate::{
    permissions::{self, PRIVATE, folder_of},
    store::StoreError,
    temporary::{self, Placeholder},
};

/// The lock file of earlier versions, which did not lock the database file.
const FORMER_LOCK: &str = ".lock";

/// How long to retry while the lock is held. A process that looks for a server holds it for a moment.
const CLAIM_PATIENCE: Duration = Duration::from_millis(300);

const CLAIM_INTERVAL: Duration = Duration::from_millis(20);

/// The time that a server may take between its claim and the first use of its log.
const LOG_PATIENCE: Duration = Duration::from_secs(1);

/// The database file that `path` leads to, for callers that open it without claiming it.
///
/// # Errors
/// When opening it could do damage.
pub(super) fn find(path: &Path) -> Result<PathBuf, StoreError> {
    let database = find_unchecked(path)?;
    let is_held = Handle::open(&database, false).is_ok_and(|(handle, _)| handle.is_held(false));
    if !is_held {
        log_check::check(&database)?;
    }
    Ok(database)
}

/// The same, without checking its log for damage. For callers that check the log themselves.
pub(super) fn find_unchecked(path: &Path) -> Result<PathBuf, StoreError> {
    let database = resolve(path)?;
    check_common_log(&database)?;
    Ok(database)
}

/// The database files that this process has opened to check their locks. Each stays open while the file has a name.
/// Closing it would drop the locks that SQLite holds on it in this process.
static HANDLES: Mutex<Vec<Arc<Handle>>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Handle {
    file: File,
    identity: Identity,
    /// Whether this process has claimed the file. The lock belongs to the descriptor, so it does not exclude others in
    /// the same process.
    is_claimed: Mutex<bool>,
}

impl Handle {
    /// The handle of the file at `database`. With `create`, a missing file is created. Also answers whether it was.
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
            // Opened for writing where possible. On an overlay file system, this gives the file that is written.
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

    /// How many names the file has; 0 when it was deleted.
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

    /// Whether another process holds the lock. If this process holds it, answers `ours`.
    fn is_held(&self, ours: bool) -> bool {
        let is_claimed = self.claimed();
        if *is_claimed {
            return ours;
        }
        match self.file.try_lock_shared() {
            Ok(()) => {
                // If this fails, the lock ends with the process.
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

/// Keeps others from changing the database, for as long as this value or the process lives.
#[derive(Debug)]
pub(in crate::store) struct Claim {
    database: PathBuf,
    handle: Arc<Handle>,
    /// The file that was created for the lock, if there was none before.
    placeholder: Option<Placeholder>,
    _former: Option<File>,
}

impl Claim {
    /// Claims the database that `path` leads to. Makes its files private.
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
                // Another file may have taken its name while the lock was taken.
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
                    "{} is in use by a running PiSync server; stop that one first, or name another database with DATA_DIR or DATABASE_URL",
                    path.display()
                )));
            }
            thread::sleep(CLAIM_INTERVAL);
        }
    }

    /// Removes what an interrupted restore has left, and the permissions of others on the files.
    fn tidy(&self) -> Result<(), StoreError> {
        let there = fs::metadata(&self.database).ok();
        if let Some(other) = there.and_then(|there| half_replaced(&self.database, &there)) {
            fs::remove_file(&other).map_err(|error| {
                StoreError::Failed(format!("cannot remove {}: {error}", other.display()))
            })?;
        }
        let files = files_of(&self.database).unwrap_or_else(|error| {
            let folder = folder_of(&self.database).display();
            tracing::warn!(%folder, %error, "cannot look whether others may open the database's files; check the folder's owner and mode");
            Vec::new()
        });
        for path in files {
            match permissions::restrict(&path, PRIVATE) {
                Ok(None) => {}
                Ok(Some(mode)) => tracing::info!(
                    file = %path.display(),
                    "others might open this file (its mode was {mode:04o}); now its owner alone may"
                ),
                Err(error) => tracing::warn!(
                    file = %path.display(),
                    %error,
                    "others may open this file, and that cannot be changed; take their rights away with chmod 600"
                ),
            }
        }
        Ok(())
    }

    /// Checks that the path still leads to the claimed file.
    ///
    /// # Errors
    /// When another file has taken its place.
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
        // A file that was created for the lock alone is removed with it.
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

/// Takes the lock of earlier versions, if its file exists; `None` when one of them holds it.
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
    // Without a file there is no server. Asking must create nothing.
    Handle::open(&database, false).is_ok_and(|(handle, _)| handle.is_held(true))
        || File::open(beside(&database, FORMER_LOCK))
            .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Checks that another process that has claimed `database` finds its log where we do. It does not if the file alone is
/// mounted elsewhere. Each process would then miss what the other writes.
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
