//! Files that are written beside their destination and renamed when they are complete. The store and the command line
//! use them. Their names cannot be guessed, and only their owner can read them. They are removed with their owner or
//! when a signal stops the command. If the command was killed, the next one that creates such a file in the folder
//! removes them.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tempfile::NamedTempFile;

use crate::permissions::with_ending;

/// The beginning of their names.
const PREFIX: &str = ".pisync-partial-";

/// The beginning of their names in earlier versions.
const EARLIER_PREFIX: &str = ".pisync-copy-";

/// The number of random characters in a name.
const RANDOM: usize = 16;

/// The files that SQLite puts beside a database; a temporary file may be a database.
const BESIDE: [&str; 3] = ["-wal", "-shm", "-journal"];

/// How often to create another file when the first one was removed as left over. Another process can do that in the
/// microseconds between creating and locking it.
const ATTEMPTS: usize = 10;

/// The temporary files of this process. A signal may come at any time, whoever owns them.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Empty files of this process that stand in the place of future databases, created to be locked.
static PLACEHOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn placeholders() -> MutexGuard<'static, Vec<PathBuf>> {
    PLACEHOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An empty file that is removed when this process ends, unless it has been filled or replaced by then.
#[derive(Debug)]
pub(crate) struct Placeholder(PathBuf);

impl Placeholder {
    pub(crate) fn new(path: &Path) -> Self {
        placeholders().push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        placeholders().retain(|path| *path != self.0);
    }
}

fn live() -> MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A temporary file; see the module's documentation.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    // Dropped before `entry`.
    file: NamedTempFile,
    entry: Entry,
}

/// The entry of a file in [`LIVE`].
#[derive(Debug)]
struct Entry(PathBuf);

impl Entry {
    fn new(path: &Path) -> Self {
        live().push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        remove_beside(&self.0);
        live().retain(|path| *path != self.0);
    }
}

impl TemporaryFile {
    /// Creates an empty file beside `destination`.
    pub(crate) fn beside(destination: &Path) -> io::Result<Self> {
        let folder = destination.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        for _ in 0..ATTEMPTS {
            let file =
                tempfile::Builder::new().prefix(PREFIX).rand_bytes(RANDOM).tempfile_in(folder)?;
            let entry = Entry::new(file.path());
            // Held until the file is closed. On a file system without locks, no file is considered left over either.
            let _ = file.as_file().lock();
            let metadata = file.as_file().metadata()?;
            if metadata.nlink() > 0 {
                remove_left_over(folder, metadata.uid());
                return Ok(Self { file, entry });
            }
        }
        Err(io::Error::other("each new file is removed by somebody else"))
    }

    /// The current path of the file.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file, to write to.
    pub(crate) fn as_file(&self) -> &File {
        self.file.as_file()
    }

    /// Moves it to its destination, replacing an existing file.
    pub(crate) fn persist(self, destination: &Path) -> io::Result<()> {
        let Self { file, entry: _entry } = self;
        file.persist(destination).map(drop).map_err(|error| error.error)
    }

    /// Moves it to its destination, if nothing is there.
    pub(crate) fn persist_noclobber(self, destination: &Path) -> io::Result<()> {
        let Self { file, entry: _entry } = self;
        file.persist_noclobber(destination).map(drop).map_err(|error| error.error)
    }
}

/// True if this process is writing the file at `path`. Its lock tells other processes, but not this one.
pub(crate) fn is_being_made(path: &Path) -> bool {
    // The name alone is enough, because nobody can guess it.
    live().iter().any(|live| live.file_name() == path.file_name())
}

/// Removes all temporary files of this process. It is called when the process ends without dropping their owners.
pub(crate) fn remove_all() {
    for path in live().iter() {
        // The file may have been moved to its destination already.
        let _ = fs::remove_file(path);
        remove_beside(path);
    }
    for path in placeholders().iter() {
        let is_empty = fs::metadata(path).is_ok_and(|there| there.len() == 0);
        let has_log = BESIDE.iter().any(|ending| with_ending(path, ending).exists());
        if is_empty && !has_log {
            let _ = fs::remove_file(path);
        }
    }
}

fn remove_beside(path: &Path) {
    for ending in BESIDE {
        let _ = fs::remove_file(with_ending(path, ending));
    }
}

/// Removes files in a folder that killed processes of `owner` left. Files of other users stay, whatever their names
/// are, and so do locked files.
fn remove_left_over(folder: &Path, owner: u32) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let is_ours =
            is_name_of_ours(&name) && !BESIDE.iter().any(|ending| ends_with(&name, ending));
        if is_ours && is_left_over(&entry.path(), owner) {
            let path = entry.path();
            remove_beside(&path);
            match fs::remove_file(&path) {
                Ok(()) => {
                    tracing::info!(path = %path.display(), "removed what an interrupted command has left");
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove what an interrupted command has left");
                }
            }
        }
    }
}

fn is_name_of_ours(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    [PREFIX, EARLIER_PREFIX].iter().any(|prefix| name.starts_with(prefix.as_bytes()))
}

fn ends_with(name: &OsStr, ending: &str) -> bool {
    name.as_encoded_bytes().ends_with(ending.as_bytes())
}

fn is_left_over(path: &Path, owner: u32) -> bool {
    // Does not follow links and does not block.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(path) else {
        return false;
    };
    let is_own =
        file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.uid() == owner);
    is_own && file.try_lock().is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_its_owners_alone_until_it_has_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let destination = folder.path().join("file");
        let file = TemporaryFile::beside(&destination).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let path = file.path().to_owned();
        fs::write(folder.path().join(format!("{}-wal", names(folder.path())[0])), "log").unwrap();
        file.persist(&destination).unwrap();
        assert_eq!(names(folder.path()), ["file"]);
        assert!(!live().contains(&path));
        let second = TemporaryFile::beside(&destination).unwrap();
        assert!(second.persist_noclobber(&destination).is_err());
        drop(TemporaryFile::beside(&destination).unwrap());
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn what_was_left_over_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in
            [".pisync-partial-x", ".pisync-partial-x-wal", ".pisync-copy-y", "pisync.db", "kept"]
        {
            fs::write(at(name), "").unwrap();
        }
        symlink(at("kept"), at(".pisync-partial-link")).unwrap();
        fs::create_dir(at(".pisync-partial-folder")).unwrap();
        let used = TemporaryFile::beside(&at("other")).unwrap();
        let file = TemporaryFile::beside(&at("file")).unwrap();
        assert!(used.path().exists(), "somebody is writing it");
        file.persist(&at("file")).unwrap();
        drop(used);
        let expected =
            [".pisync-partial-folder", ".pisync-partial-link", "file", "kept", "pisync.db"];
        assert_eq!(names(folder.path()), expected);
        // Files of another owner are not removed: in a folder that everybody can write, they may have any name.
        fs::write(at(".pisync-copy-y"), "").unwrap();
        let uid = fs::metadata(at("kept")).unwrap().uid();
        remove_left_over(folder.path(), uid + 1);
        assert!(at(".pisync-copy-y").exists());
    }
}
