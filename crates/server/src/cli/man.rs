//! `pisync man`: a manual page for each command, from the definition that also reads what is typed. It writes into one folder
//! and reads no setting. The pages are for everybody, so they have ordinary modes, unlike what holds a fleet's data.

use std::{fs, path::PathBuf};

use clap::Args;

use super::exit::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo pisync man /usr/local/share/man/man1 && man pisync-key-create")]
pub(super) struct ManCommand {
    /// The folder to write them into; it is made when it is missing
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(super) fn run(command: &ManCommand) -> Result<(), Failure> {
    let folder = &command.folder;
    let failed = |error| format!("cannot write manual pages to {}: {error}", folder.display());
    fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(super::definition(), folder).map_err(failed)?;
    println!("wrote manual pages to {}", folder.display());
    Ok(())
}
