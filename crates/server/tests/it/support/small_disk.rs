//! A disk that a test can fill: some megabytes of memory, mounted where only a process of ours and those that
//! it is told to start can see it. It goes with that process, however the tests end.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

/// A full disk answers writes with this many bytes at the latest.
const BLOCK: usize = 4096;

pub(crate) struct SmallDisk {
    folder: TempDir,
    keeper: Child,
    /// Not root: the keeper is, in a world of its own.
    is_user: bool,
}

impl SmallDisk {
    /// A disk of so many megabytes.
    pub(crate) fn new(megabytes: u32) -> Self {
        let folder = tempfile::Builder::new().prefix("pisync-disk-").tempdir().unwrap();
        let is_user = !super::postgres::is_root();
        // It waits for the end of its input, which comes with the end of this process at the latest.
        let script = "mount -t tmpfs -o size=$1m,mode=777 tmpfs \"$2\" && echo mounted && cat";
        let mut keeper = Command::new("unshare")
            .arg(if is_user { "-rm" } else { "-m" })
            .args(["sh", "-c", script, "keeper", &megabytes.to_string()])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let mut answer = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut answer).unwrap();
        assert_eq!(
            answer, "mounted\n",
            "cannot mount a small disk: run the tests as root, or where users may `unshare -rm`"
        );
        Self { folder, keeper, is_user }
    }

    /// Where the disk is, for those that see it.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// What a command line must begin with to see the disk.
    pub(crate) fn entrance(&self) -> Vec<String> {
        let target = self.keeper.id().to_string();
        let mut words = vec!["nsenter", "--mount", "--target", &target];
        if self.is_user {
            words.extend(["--user", "--preserve-credentials"]);
        }
        words.into_iter().map(str::to_owned).collect()
    }

    /// The same for a program that refuses to be root, which a user is in the keeper's world.
    pub(crate) fn entrance_of_user(&self) -> Vec<String> {
        let mut words = self.entrance();
        if self.is_user {
            words.extend(["unshare", "--map-user=1000", "--map-group=1000"].map(str::to_owned));
        }
        words
    }

    /// A new folder on the disk that PostgreSQL may have.
    pub(crate) fn folder_for_postgres(&self) -> PathBuf {
        let folder = self.seen_from_here("postgres");
        fs::create_dir(&folder).unwrap();
        if !self.is_user {
            assert!(Command::new("chown").arg("postgres").arg(&folder).status().unwrap().success());
        }
        self.path().join("postgres")
    }

    /// A file on the disk, for this process, which does not see it.
    pub(crate) fn seen_from_here(&self, name: &str) -> PathBuf {
        let path = self.folder.path().strip_prefix("/").unwrap();
        Path::new("/proc").join(self.keeper.id().to_string()).join("root").join(path).join(name)
    }

    /// Leaves no room on the disk.
    pub(crate) fn fill(&self) {
        let mut ballast = File::create(self.seen_from_here("ballast")).unwrap();
        while ballast.write_all(&[0; BLOCK]).is_ok() {}
    }

    /// Makes room again.
    pub(crate) fn make_room(&self) {
        fs::remove_file(self.seen_from_here("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
