//! `pisync journal`: shows what is in the ingest journal of an SQLite database, and goes on with a damaged one. `store` reads and
//! salvages it. `inspect` changes nothing.

use clap::{Args, Subcommand};

use super::{database, exit::Failure};
use crate::{
    config::DatabaseArgs,
    store::{self, JournalFileReport, JournalReport, Target},
};

#[derive(Debug, Args)]
#[command(after_help = "\
A server acknowledges events once they are in its ingest journal, the files
pisync.db.ingest-1 and pisync.db.ingest-2, and brings them into the tables
within a second. After a crash the next start does so. It refuses to when the
disk has lost some of them: then inspect shows what is left, and salvage makes
it go on without what is lost.

Examples:
  pisync journal inspect
  pisync journal salvage")]
pub(super) struct JournalCommand {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    database: DatabaseArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show what is in the journal; changes nothing
    #[command(after_help = "\
Beside a running server it shows one moment of files that change.

Example:
  pisync journal inspect --data-dir /var/lib/pisync

Exit status: 0 when all that was acknowledged can be read, 1 when some of it is
lost, 2 on wrong usage, 4 when that could not be found out.")]
    Inspect,
    /// Keep what can be read, mark what is lost, and keep the damaged files
    #[command(after_help = "\
Stop the server first. Nothing is changed when nothing is damaged. The events
that are kept go into the tables with the next start of the server, or with the
next command that reads them. Events that can be read in the damaged parts are
written to pisync.db.doubtful.ndjson: look through them before you import them.

Examples:
  pisync journal salvage
  pisync import data/pisync.db.doubtful.ndjson")]
    Salvage,
}

pub(super) fn run(command: &JournalCommand) -> Result<(), Failure> {
    match command.action {
        Action::Inspect => inspect(&command.database),
        Action::Salvage => salvage(&database::existing(&command.database)?),
    }
}

fn inspect(database: &DatabaseArgs) -> Result<(), Failure> {
    let read = || -> Result<_, Failure> {
        let target = database::existing(database)?;
        let report = store::inspect_journal(&target)?;
        Ok((target, report))
    };
    let (target, report) = read().map_err(Failure::unanswered)?;
    let JournalReport { applied, files, unapplied_events, damage, newer_version } = report;
    println!("{target}: the tables have all records up to {applied}");
    if files.is_empty() && damage.is_none() {
        println!("there is no ingest journal: everything that was acknowledged is in the tables");
        return Ok(());
    }
    for file in &files {
        print_file(file);
    }
    println!("events in the journal alone: {unapplied_events}");
    if let Some(version) = newer_version {
        let message = format!(
            "there are records in format {version}, which this version of PiSync cannot read"
        );
        return Err(Failure::from(message).unanswered());
    }
    match damage {
        None => Ok(()),
        Some(damage) => {
            Err(format!("{damage}; `pisync journal salvage` goes on without them").into())
        }
    }
}

fn print_file(file: &JournalFileReport) {
    println!("{}: {} bytes", file.path.display(), file.bytes);
    for stretch in &file.records {
        println!(
            "  bytes {:>9} to {:>9}: records {} to {}, events: {}",
            stretch.bytes.start,
            stretch.bytes.end - 1,
            stretch.first,
            stretch.last,
            stretch.events
        );
    }
    for place in &file.other {
        println!("  bytes {:>9} to {:>9}: no record", place.start, place.end - 1);
    }
    if file.applied_records > 0 {
        println!("  records that are in the tables: {}", file.applied_records);
    }
    if file.foreign_records > 0 {
        println!("  records of another database: {}", file.foreign_records);
    }
}

fn salvage(target: &Target) -> Result<(), Failure> {
    let _claim = store::claim(target)?;
    let salvaged = store::salvage_journal(target)?;
    let Some(damage) = salvaged.damage else {
        println!(
            "nothing is damaged, and nothing was changed; events in the journal alone: {}",
            salvaged.events
        );
        return Ok(());
    };
    println!("{damage}");
    println!(
        "kept: {} events, which the next start of the server brings into the tables",
        salvaged.events
    );
    for file in &salvaged.kept {
        println!("the damaged file is {}", file.display());
    }
    if let Some(file) = &salvaged.doubtful {
        println!(
            "events that may not be as they were are in {}: look through them, then `pisync import` them",
            file.display()
        );
    }
    Ok(())
}
