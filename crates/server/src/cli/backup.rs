//! `pisync backup` copies an SQLite database into one file, and `pisync restore` puts such a file in the database's place.
//! `store` does both; here is what is said about it.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{database, exit::Failure, output::JsonArgs};
use crate::{
    config::{DatabaseArgs, MigrationArgs},
    store,
};

#[derive(Debug, Args)]
#[command(after_help = "\
Works beside a running server: everything acknowledged before is in the copy.
The file is checked and synced to the disk before it gets its name.

Example:
  pisync backup /mnt/usb/pisync-$(date +%F).db

PostgreSQL is backed up with pg_dump: the command for that is printed, and the
exit status is 1.")]
pub(super) struct BackupCommand {
    /// The file to make
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    database: DatabaseArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Stop the server first. The backup is checked before anything is changed. With
--force the database that is replaced is kept beside the new one, with the
ending .replaced.

Examples:
  pisync restore /mnt/usb/pisync.db          where there is no database
  pisync restore /mnt/usb/pisync.db --force  in the place of the one that is there")]
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
    let (devices, events) = (held.devices, held.events);
    let file = command.file.display();
    say!(command.json, "backed up {target} to {file}: devices: {devices}, events: {events}");
    command.json.document(|| {
        json!({
            "database": target.to_string(),
            "file": file.to_string(),
            "devices": devices,
            "events": events,
        })
    });
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
