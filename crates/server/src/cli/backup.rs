//! `pisync backup` and `pisync restore`: an SQLite database in one file, and back.

use std::path::PathBuf;

use clap::Args;

use super::{database, exit::Failure};
use crate::{
    config::{DatabaseArgs, MigrationArgs},
    store,
};

#[derive(Debug, Args)]
#[command(after_help = "\
Works beside a running server: what was acknowledged before is in it. The file
is checked and on the disk before it gets its name.

Example:
  pisync backup /mnt/usb/pisync-$(date +%F).db

PostgreSQL is backed up with pg_dump: then the command to use is printed, and
the exit status is 1.")]
pub(super) struct BackupCommand {
    /// The file to make
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    database: DatabaseArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Stop the server first. The backup is checked before anything is changed. With
--force the database that is replaced is kept beside the new one, with the
ending .replaced.")]
pub(super) struct RestoreCommand {
    /// A file that `pisync backup` has made
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Replace the database if there is one
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

pub(super) fn backup(command: &BackupCommand) -> Result<(), Failure> {
    let target = database::existing(&command.database)?;
    let held = store::backup(&target, &command.file, command.force)?;
    println!(
        "backed up {target} to {}: devices: {}, events: {}",
        command.file.display(),
        held.devices,
        held.events
    );
    Ok(())
}

pub(super) async fn restore(command: &RestoreCommand) -> Result<(), Failure> {
    let target = command.database.target()?;
    let folder = &command.migrations.migrations_dir;
    let restored = store::restore(&target, &command.file, command.force, folder).await?;
    println!(
        "restored {target} from {}: devices: {}, events: {}",
        command.file.display(),
        restored.holds.devices,
        restored.holds.events
    );
    if let Some(replaced) = restored.replaced {
        println!("what was there before is kept as {}", replaced.display());
    }
    if !restored.pending.is_empty() {
        println!(
            "the next start of the server applies the migrations {}",
            restored.pending.join(", ")
        );
    }
    Ok(())
}
