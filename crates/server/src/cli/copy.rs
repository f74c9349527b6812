//! `pisync copy`: copies everything into another, empty database and shows how far it is. `store` does it; the source is never
//! changed.

use clap::Args;
use pisync_core::Timestamp;
use serde_json::json;

use super::{database, exit::Failure, output::JsonArgs, progress::Progress};
use crate::{
    clock::Clock,
    config::CopyArgs,
    store::{self, Copied, CopyProgress, Target},
};

#[derive(Debug, Args)]
#[command(after_help = "\
The copy is of one moment: a server may go on using the source meanwhile, and
what it receives later is not copied. So to move, stop the server first.

The destination must be empty; its tables, or its SQLite file, are made. It is
filled in one transaction and compared with the source before that ends: it
holds everything or nothing. After an interruption just run it again.

Examples:
  pisync copy --from sqlite:data/pisync.db \\
              --to postgres://pisync@localhost/pisync
  COPY_TO=postgres://pisync:secret@db/pisync pisync copy --from sqlite:pisync.db
                                  keeps the password out of the list of processes")]
pub(super) struct CopyCommand {
    #[command(flatten)]
    databases: CopyArgs,
    #[command(flatten)]
    json: JsonArgs,
}

pub(super) async fn run(command: &CopyCommand) -> Result<(), Failure> {
    let (from, to) = command.databases.targets()?;
    // The other side regards events before it as received already.
    let clock = Clock::system();
    let now = clock.check()?;
    let mut table = None;
    let json = command.json;
    let mut report = |progress| show(&mut table, json, progress);
    let copied = store::copy(&from, &to, now, &mut report).await;
    if copied.is_err()
        && let Some(table) = table
    {
        table.progress.finish();
    }
    let copied = copied?;
    say(json, &from, &to, &copied);
    // Only now is it known that the source can be opened. A copy that is there must not fail for that.
    if let Ok(store) = store::open(&from).await {
        let _ = database::warn_of_clock(&*store, &clock).await;
    }
    say!(json, "what {from} received after {now} may not be in it");
    json.document(|| document(&from, &to, now, &copied));
    Ok(())
}

fn document(from: &Target, to: &Target, now: Timestamp, copied: &Copied) -> serde_json::Value {
    json!({
        "from": from.to_string(),
        "to": to.to_string(),
        "as_of": now,
        "rows": copied.rows,
        "not_copied": copied.unknown,
    })
}

fn say(json: JsonArgs, from: &Target, to: &Target, copied: &Copied) {
    for name in &copied.unknown {
        say!(json, "not copied, because it is not PiSync's: {name}");
    }
    let rows = |table: &str| copied.rows.get(table).copied().unwrap_or_default();
    say!(
        json,
        "copied {from} to {to}: devices: {}, events: {}; all tables have the same rows and checksums",
        rows("devices"),
        rows("sync_events")
    );
}

/// The table that is being copied or compared.
struct Table {
    name: &'static str,
    comparing: bool,
    rows: u64,
    progress: Progress,
}

fn show(table: &mut Option<Table>, json: JsonArgs, progress: CopyProgress) {
    match progress {
        CopyProgress::Table { name, comparing, rows } => {
            let progress = Progress::new(Some(rows)).counting(format!("rows of {name}"));
            *table = Some(Table { name, comparing, rows: 0, progress });
        }
        CopyProgress::Rows(rows) => {
            if let Some(table) = table {
                table.rows += rows;
                table.progress.update(table.rows, table.rows);
            }
        }
        CopyProgress::Done(rows) => {
            if let Some(Table { name, comparing, progress, .. }) = table.take() {
                progress.finish();
                let done = if comparing { "compared" } else { "copied" };
                say!(json, "{done:<9} {name}: {rows}");
            }
        }
    }
}
