//! The permissions of files that the program writes. Modules that create files and folders call this. Reports and
//! hashes of keys are private: files are readable by their owner only, and folders are closed to others, whatever the
//! umask is.
//!
//! A command that root runs must not leave files that a server of another user cannot open. What root creates for a
//! server is given to the owner of the containing folder.

use std::{
    fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown},
    path::{Path, PathBuf},
};

/// The mode of files with events or keys.
pub(crate) const PRIVATE: u32 = 0o600;

/// The mode of log files. A group may read them.
pub(crate) const LOG: u32 = 0o640;

/// The mode of folders.
const FOLDER: u32 = 0o750;

/// The permission bits of a mode.
const PERMISSION_BITS: u32 = 0o777;

/// The user that may change the owner of files.
const ROOT: u32 = 0;

/// Opens a server's file at `path` for appending. Creates it with this `mode` if it is missing.
pub(crate) fn append(path: &Path, mode: u32) -> io::Result<File> {
    match create_for_server(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            File::options().append(true).open(path)
        }
        made => made,
    }
}

/// Creates a server's file at `path`, as [`create_new`] does.
pub(crate) fn create_for_server(path: &Path, mode: u32) -> io::Result<File> {
    let file = create_new(path, mode)?;
    give_to_owner_of(folder_of(path), &file)?;
    Ok(file)
}

/// Creates the file at `path` with this `mode` and opens it for appending.
///
/// # Errors
/// When it cannot be created, or the name exists already. An existing link is an error as well, because it might lead
/// anywhere.
pub(crate) fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).append(true).create_new(true).mode(mode).open(path)?;
    // Restores the bits that the umask removed.
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}

/// Creates the folder at `path` and its parents. Existing folders stay unchanged, because they may be used for other
/// things too.
pub(crate) fn create_folder(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = folder_of(path);
    if parent != Path::new("/") {
        create_folder(parent)?;
    }
    match DirBuilder::new().mode(FOLDER).create(path) {
        // Another process created it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            fs::set_permissions(path, Permissions::from_mode(FOLDER))?;
            let (model, own) = (fs::metadata(parent)?, fs::metadata(path)?);
            if must_be_given(&own, &model) {
                chown(path, Some(model.uid()), Some(model.gid()))?;
            }
            Ok(())
        }
    }
}

/// Gives `file`, if root owns it, to the owner of `model`.
pub(crate) fn give_to_owner_of(model: &Path, file: &File) -> io::Result<()> {
    let (model, own) = (fs::metadata(model)?, file.metadata()?);
    if must_be_given(&own, &model) {
        fchown(file, Some(model.uid()), Some(model.gid()))?;
    }
    Ok(())
}

fn must_be_given(own: &Metadata, model: &Metadata) -> bool {
    own.uid() == ROOT && model.uid() != ROOT
}

/// Removes from the file at `path` the permissions that `mode` does not allow. Returns its previous mode. Returns
/// `None` when nothing had to be removed or the file does not exist.
pub(crate) fn restrict(path: &Path, mode: u32) -> io::Result<Option<u32>> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata?,
    };
    let before = metadata.permissions().mode() & PERMISSION_BITS;
    // A link might lead to another user's file.
    if !metadata.is_file() || before & !mode == 0 {
        return Ok(None);
    }
    fs::set_permissions(path, Permissions::from_mode(before & mode))?;
    Ok(Some(before))
}

/// The folder that contains `path`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `path` with `ending` appended to its name.
pub(crate) fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & PERMISSION_BITS
    }

    #[test]
    fn modes_are_what_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        create_folder(&inner).unwrap();
        assert_eq!((mode(&inner), mode(inner.parent().unwrap())), (0o750, 0o750));
        let file = inner.join("file");
        for _ in 0..2 {
            append(&file, LOG).unwrap();
            assert_eq!(mode(&file), 0o640);
        }
        assert_eq!(restrict(&file, LOG).unwrap(), None);
        assert_eq!(restrict(&file, PRIVATE).unwrap(), Some(0o640));
        assert_eq!(mode(&file), 0o600);
        assert_eq!(restrict(&inner.join("none"), PRIVATE).unwrap(), None);
    }

    #[test]
    fn what_a_link_leads_to_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(restrict(&link, PRIVATE).unwrap(), None);
        assert_eq!(create_new(&link, PRIVATE).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(mode(&file), 0o644);
    }

    #[test]
    fn existing_folders_stay_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        create_folder(folder.path()).unwrap();
        assert_eq!(mode(folder.path()), 0o755);
    }
}
