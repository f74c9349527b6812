//! `pisync import`: stores the events of a file, beside a running server or without one, and says what became of them. `import`
//! reads and stores them.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::{Value, json};

use super::{
    database,
    exit::Failure,
    output::JsonArgs,
    progress::{Progress, rate},
};
use crate::{
    clock::Clock,
    config::{ClockSkewArgs, DatabaseArgs, MigrationArgs},
    import::{self, ColumnNames, Format, Import, Source, Status},
    random::Randomness,
    store::{self, Target},
};

/// How often to look for a server that uses the same SQLite file.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
#[command(after_help = "\
Records are what POST /api/sync-event takes, as JSON objects (one per line, or
an array) or as CSV whose first line names the fields in any order; gzip and
zstd are recognised. An event may also have a created_at: when a server
received it, which is kept; without, it is received now. What `pisync export`
writes can be read.

Each record is checked as the API does it. Those that are wrong are put into
the file of rejected records, with their reasons, and the others are stored.
An input that breaks off or is damaged is imported up to that place: run the
command again once it is complete. CSV is UTF-8, its cells are separated by
commas.

Run the same command again after an interruption: it goes on where it was, and
no event is stored twice. An input is known by its records, whatever its name;
one that has grown is imported from where it ended before.

Works beside a running server.

Examples:
  pisync import events.ndjson.gz
  pisync export | ssh new-server pisync import -

Exit status: 0 when every record is stored, 1 on failure, 2 on wrong usage, 3
when some records were rejected and the others are stored. Records that an
earlier run of the same import has rejected count, too.")]
pub(super) struct ImportCommand {
    /// What to import; - for standard input
    file: PathBuf,
    /// How records are written [default: what the first character tells]
    #[arg(long)]
    format: Option<Format>,
    /// Where to put records that are wrong [default: FILE.rejected]
    #[arg(long, value_name = "FILE")]
    rejected: Option<PathBuf>,
    /// Import it once more although it was imported already: events without an event_id are then stored twice
    #[arg(long)]
    again: bool,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    clock_skew: ClockSkewArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

impl ImportCommand {
    fn source(&self) -> Source {
        if self.file.as_os_str() == "-" { Source::Stdin } else { Source::File(self.file.clone()) }
    }

    /// Where records that are wrong go.
    fn rejected(&self) -> PathBuf {
        self.rejected.clone().unwrap_or_else(|| match self.source() {
            Source::File(path) => {
                let mut name = path.into_os_string();
                name.push(".rejected");
                name.into()
            }
            Source::Stdin => "stdin.rejected".into(),
        })
    }
}

pub(super) async fn run(command: &ImportCommand) -> Result<(), Failure> {
    let target = database::existing(&command.database)?;
    let clock = Clock::system();
    let store = database::open_unwarned(&target, &command.migrations, &clock).await?;
    // What keeps the import from being begun is not said twice.
    import::check_clock(&*store, &clock).await?;
    database::warn_of_clock(&*store, &clock).await?;
    let source = command.source();
    let name = source.name();
    let import = Import {
        format: command.format,
        rejected: command.rejected(),
        again: command.again,
        max_clock_skew_seconds: command.clock_skew.max_clock_skew_seconds,
        id: Randomness::system().bytes()?,
        source,
    };
    let mut progress = Progress::new(import.source.bytes());
    let mut is_first = true;
    let watch = |status: &Status| {
        if std::mem::take(&mut is_first) {
            introduce(&progress, status);
        }
        progress.update(status.bytes, status.stored + status.duplicates);
    };
    let mut neighbour = Neighbour { target: &target, looked: None };
    let result = import.run(&*store, &clock, || neighbour.is_there(), watch).await;
    let took = progress.finish();
    let status = result?;
    store.ping().await?;
    // A server that goes on would be kept waiting, and sees to it itself.
    if !neighbour.is_there()
        && let Err(error) = store.close().await
    {
        // Everything is stored all the same, and the next server sees to the rest.
        eprintln!("cannot close the database properly: {error}");
    }
    let Status { stored, duplicates, rejected, .. } = status;
    let json = command.json;
    json.document(|| document(&status, &target, &name, command));
    if let Some(before) = status.resumed.as_ref().filter(|before| before.finished)
        && stored + duplicates + rejected == 0
    {
        say!(
            json,
            "{name} was imported already, at {}, and nothing was done; import it once more with --again",
            before.at
        );
        return outcome(command, &status);
    }
    say!(
        json,
        "imported {stored} events into {target}, {}/s, of {} records; {duplicates} were there already, {rejected} were rejected",
        rate(stored, took),
        status.records
    );
    if status.conflicting > 0 {
        eprintln!(
            "pisync: {} of those that were there already differ from what is stored under their event_id; what is stored stays, so give each event an id of its own and import those again",
            status.conflicting
        );
    }
    if status.is_cut_off {
        eprintln!(
            "pisync: {name} ends in the middle of a record, the last of those rejected; import it again once it is whole"
        );
    }
    outcome(command, &status)
}

/// How the command ends: records that this run or an earlier one of the same import has rejected are not stored.
fn outcome(command: &ImportCommand, status: &Status) -> Result<(), Failure> {
    let rejected = status.rejected_before() + status.rejected;
    if rejected == 0 {
        return Ok(());
    }
    let is_any_stored =
        status.stored + status.duplicates > 0 || status.passed > status.rejected_before();
    let reasons = reasons(command, status, is_any_stored);
    if !is_any_stored {
        return Err(format!("no record is an event; {reasons}").into());
    }
    Err(Failure::partly(format!("{rejected} records were rejected; {reasons}")))
}

/// Where it is said why records were rejected. The file of an earlier run may be gone, or have another name.
fn reasons(command: &ImportCommand, status: &Status, is_any_stored: bool) -> String {
    let file = command.rejected();
    let file = file.display();
    let rejected = status.rejected_before() + status.rejected;
    let missing = rejected.saturating_sub(status.rejected_in_file);
    let Some(before) = status.resumed.as_ref().filter(|_| missing > 0) else {
        return format!("{file} says why");
    };
    let what = match status.rejected_in_file {
        0 => format!("{file}, which would say why, is not there"),
        _ => format!("{file} lacks {missing} of them"),
    };
    let look = format!("look for the file that was written when {} was imported", before.name);
    // An import that waits for the end of a record goes on after what it has taken, also with --again.
    let anew = match (status.is_cut_off, is_any_stored) {
        (true, _) => "",
        (false, true) => {
            ", or write it again with --again --rejected NEW-FILE, which stores events without an event_id twice"
        }
        (false, false) => ", or write it again with --again --rejected NEW-FILE",
    };
    format!("{what}: {look}{anew}")
}

/// What an import has done, for programs.
fn document(status: &Status, target: &Target, name: &str, command: &ImportCommand) -> Value {
    let finished = status.resumed.as_ref().filter(|before| before.finished);
    json!({
        "database": target.to_string(),
        "source": name,
        "records": status.records,
        "stored": status.stored,
        "duplicates": status.duplicates,
        "conflicting": status.conflicting,
        "rejected": status.rejected,
        "rejected_before": status.rejected_before(),
        "rejected_file": (status.rejected_in_file > 0).then(|| command.rejected().display().to_string()),
        "records_before": status.passed,
        "imported_before_at": finished.map(|before| before.at),
        "is_cut_off": status.is_cut_off,
    })
}

/// A server that may be using the same SQLite file.
struct Neighbour<'a> {
    target: &'a Target,
    /// When it was looked for, and whether it was there.
    looked: Option<(Instant, bool)>,
}

impl Neighbour<'_> {
    /// Whether it is there, to the second: looking keeps a server that starts at the same moment out.
    fn is_there(&mut self) -> bool {
        let now = Instant::now();
        let recent = self.looked.filter(|(at, _)| now - *at < LOOK_INTERVAL);
        let (_, is_there) = recent.unwrap_or_else(|| (now, store::is_claimed(self.target)));
        self.looked = Some((recent.map_or(now, |(at, _)| at), is_there));
        is_there
    }
}

/// Says what is special about an import.
fn introduce(progress: &Progress, status: &Status) {
    let ColumnNames { ignored, capital } = &status.column_names;
    if !ignored.is_empty() {
        progress.say(&format!("columns that are ignored: {}", ignored.join(", ")));
    }
    if !capital.is_empty() {
        progress.say(&format!(
            "columns whose names are taken as if they had no capital letters: {}",
            capital.join(", ")
        ));
    }
    if let Some(before) = status.resumed.as_ref().filter(|before| !before.finished) {
        progress.say(&format!(
            "going on after the {} records of the import that was interrupted at {}",
            before.records, before.at
        ));
    }
}
