//! The folders that a server writes to: may it, who else may read what is in them, and is there room on their disks? Nothing
//! is made to find out.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, access, statvfs};

use super::Report;
use crate::{permissions::folder_of, store::Target};

/// Below it a server soon refuses events: its ingest journal alone may take twice 32 MiB, and its log as much.
const TOO_LITTLE_ROOM: u64 = 128 << 20;

/// Below it somebody should make room: a fleet of 5,000 devices that report each hour fills it in some weeks.
const LITTLE_ROOM: u64 = 1 << 30;

/// The bits of a mode that let everybody read.
const OTHERS_READ: u32 = 0o004;

pub(super) fn check(report: &mut Report<'_>, target: &Target, logs: Option<&Path>) {
    let data = match target {
        Target::Sqlite(path) => Some((path, folder_of(path).to_owned())),
        // PostgreSQL's disk is its own affair.
        Target::Postgres(_) => None,
    };
    if let Some((database, folder)) = &data {
        folder_check(report, "data folder", folder, "DATA_DIR");
        files(report, database);
    }
    if let Some(logs) = logs {
        folder_check(report, "log folder", logs, "LOG_DIR");
    }
    let data = data.map(|(_, folder)| folder);
    for folder in [data.as_deref(), logs].into_iter().flatten() {
        room(report, folder);
    }
}

/// The folder itself, or the one that it would be made in. A symbolic link that leads nowhere is there, too: no folder
/// can be made in its place.
fn existing(folder: &Path) -> PathBuf {
    let mut there = folder;
    while there.symlink_metadata().is_err() {
        match there.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => there = parent,
            _ => return PathBuf::from("."),
        }
    }
    there.to_owned()
}

fn folder_check(report: &mut Report<'_>, check: &'static str, folder: &Path, setting: &str) {
    let there = existing(folder);
    let shown = folder.display();
    if there.is_symlink() && !there.exists() {
        let there = there.display();
        return report.fail(
            check,
            format!("{there} is a symbolic link that leads to no folder; mount its disk, or set {setting} to another folder"),
        );
    }
    if !there.is_dir() {
        let there = there.display();
        return report
            .fail(check, format!("{there} is not a folder; set {setting} to another folder"));
    }
    if access(&there, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let there = there.display();
        return report.fail(
            check,
            format!("this user cannot write to {there}; give it to the server's user (chown), or set {setting} to another folder"),
        );
    }
    if there == folder {
        report.ok(check, format!("{shown} can be written to"));
    } else {
        report.ok(check, format!("{shown} can be made"));
    }
}

/// The database's file, once there is one.
fn files(report: &mut Report<'_>, database: &Path) {
    const CHECK: &str = "database file";
    let Ok(metadata) = fs::metadata(database) else { return };
    let shown = database.display();
    if access(database, Access::READ_OK | Access::WRITE_OK).is_err() {
        report.fail(
            CHECK,
            format!("this user cannot write {shown}; run the command as the server's user, or give it the file (chown)"),
        );
    } else if metadata.permissions().mode() & OTHERS_READ != 0 {
        report.warn(
            CHECK,
            format!("everybody may read {shown}, with its hashes of keys: chmod 600 {shown}"),
        );
    } else {
        report.ok(CHECK, format!("{shown} can be read and written, and not by everybody"));
    }
}

fn room(report: &mut Report<'_>, folder: &Path) {
    const CHECK: &str = "disk space";
    let shown = folder.display();
    let found = match statvfs(existing(folder)) {
        Ok(found) => found,
        Err(error) => {
            let message = format!("the disk of {shown} cannot be looked at: {error}");
            return report.warn(CHECK, message);
        }
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let said = format!("{} MiB are free on the disk of {shown}", free >> 20);
    if free < TOO_LITTLE_ROOM {
        report.fail(CHECK, format!("{said}; make room, or set RETENTION_DAYS"));
    } else if free < LITTLE_ROOM {
        report.warn(CHECK, format!("{said}; make room soon"));
    } else {
        report.ok(CHECK, said);
    }
}
