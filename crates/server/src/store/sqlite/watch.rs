//! Watches whether the files of a running server's database are still in their places. Somebody may remove the folder,
//! replace a file or unmount a disk. The server would then write into files that nobody finds again. A thread checks
//! several times a second. While a file is away, the store must refuse everything.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use super::paths::{INGEST_JOURNAL, Identity, LOG_INDEX, WRITE_AHEAD_LOG, beside};
use crate::{store::StoreError, threads::Threads};

/// How often to check. Events that are acknowledged in between may be lost with the files.
const INTERVAL: Duration = Duration::from_millis(250);

/// Whether the files are in their places. Checking it costs one read of memory.
#[derive(Debug, Default)]
pub(super) struct Presence {
    is_lost: AtomicBool,
    /// What is wrong, while something is.
    problem: Mutex<String>,
}

impl Presence {
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Relaxed)
    }

    /// # Errors
    /// While a file is away. The error says what is wrong.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        if self.is_lost() {
            let problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(StoreError::Unavailable(problem.clone()));
        }
        Ok(())
    }

    fn set(&self, problem: Option<String>) {
        let is_lost = problem.is_some();
        if let Some(problem) = problem {
            *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
        }
        self.is_lost.store(is_lost, Ordering::Relaxed);
    }
}

/// A thread that checks the files. It ends with this value.
pub(super) struct Watch {
    files: Arc<Mutex<Files>>,
    presence: Arc<Presence>,
    _running: Sender<()>,
}

impl Watch {
    /// Watches the database at `database`, whose file has this identity, and reports to `presence`.
    pub(super) fn start(
        database: &Path,
        identity: Identity,
        presence: Arc<Presence>,
        threads: &Threads,
    ) -> Result<Self, StoreError> {
        let mut files = Files::new(database, identity);
        // The files that exist now are remembered from the start.
        files.look(&presence);
        let files = Arc::new(Mutex::new(files));
        let (running, ended) = channel();
        let (looking, telling) = (Arc::clone(&files), Arc::clone(&presence));
        threads
            .start("sqlite-watch", move || watch(&looking, &telling, &ended))
            .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { files, presence, _running: running })
    }

    /// Checks once more and then stops checking, because files are about to be removed.
    pub(super) fn stop(&self) {
        let mut files = locked(&self.files);
        files.look(&self.presence);
        files.stopped = true;
    }
}

fn locked(files: &Mutex<Files>) -> MutexGuard<'_, Files> {
    files.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(files: &Mutex<Files>, presence: &Presence, ended: &Receiver<()>) {
    loop {
        locked(files).look(presence);
        if ended.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

struct Files {
    database: PathBuf,
    /// Each file, with its identity when it was first seen.
    known: Vec<(PathBuf, Option<Identity>)>,
    stopped: bool,
    warned_of_names: bool,
}

impl Files {
    fn new(database: &Path, identity: Identity) -> Self {
        let others = [WRITE_AHEAD_LOG, LOG_INDEX].into_iter().chain(INGEST_JOURNAL);
        let mut known: Vec<_> = others.map(|ending| (beside(database, ending), None)).collect();
        known.push((database.to_owned(), Some(identity)));
        Self { database: database.to_owned(), known, stopped: false, warned_of_names: false }
    }

    fn look(&mut self, presence: &Presence) {
        if self.stopped {
            return;
        }
        let problem = self.problem();
        match &problem {
            Some(problem) if !presence.is_lost() => tracing::error!(
                problem,
                "the database's files are not where they were: nothing is stored or read, and events are answered 503, until they are back; \
                 what was acknowledged in the second before may be lost with them"
            ),
            None if presence.is_lost() => {
                tracing::info!("the database's files are where they were; the server goes on");
            }
            _ => {}
        }
        presence.set(problem);
        self.warn_of_names();
    }

    /// What is wrong with the first file that has a problem.
    fn problem(&mut self) -> Option<String> {
        for (path, known) in &mut self.known {
            let problem = match (Identity::at(path), *known) {
                (Ok(found), Some(known)) if found != known => "another file is in its place",
                (Ok(found), _) => {
                    *known = Some(found);
                    continue;
                }
                (Err(error), None) if error.kind() == io::ErrorKind::NotFound => continue,
                (Err(error), _) if error.kind() == io::ErrorKind::NotFound => "it is gone",
                (Err(error), _) => return Some(format!("{}: {error}", path.display())),
            };
            return Some(format!("{}: {problem}", path.display()));
        }
        None
    }

    /// SQLite would treat a second name as another database, with a log of its own.
    fn warn_of_names(&mut self) {
        let names = fs::metadata(&self.database).map_or(0, |there| there.nlink());
        if names > 1 && !self.warned_of_names {
            tracing::warn!(
                database = %self.database.display(),
                names,
                "the database file has another name (a hard link); remove that, or the next start is refused"
            );
        }
        self.warned_of_names = names > 1;
    }
}
