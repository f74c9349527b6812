//! `pisync migrate`: applies changes of the schema, rolls them back, and lists them. What it prints while it takes over a database
//! of the Node service is in `take_over`. It rolls nothing back under a running server.

use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{database, exit::Failure, output::JsonArgs, take_over};
use crate::{
    clock::Clock,
    config::{ANY_NUMBER, DatabaseArgs, MigrationArgs, number},
    store::{
        self, Target,
        migrations::{self, Migration, Migrator},
        take_over::TakeOver,
    },
};

#[derive(Debug, Args)]
#[command(after_help = "\
On a database made by the Node PiSync, `up` takes it over; try that first with
`up --dry-run`. See docs/coming-from-node.md.

Files are named YYYY-MM-DD-NN-name.up.sql and .down.sql. Each runs in a
transaction; what was applied stands in the table pisync_migrations.

Examples:
  pisync migrate status         what is applied and what is pending
  pisync migrate up
  pisync migrate down 2         roll back the last two
  pisync migrate new add-rooms  files for a migration of your own")]
pub(super) struct MigrateCommand {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Apply all pending migrations; takes over a database made by the Node PiSync
    #[command(after_help = "\
Examples:
  pisync migrate up
  pisync migrate up --dry-run  what would be done
  pisync migrate up --dry-run --source-timezone Europe/Berlin")]
    Up(UpArgs),
    /// Roll back the last N applied migrations
    #[command(after_help = "\
Stop the server first.

Examples:
  pisync migrate down          the last one
  pisync migrate down 2 --yes  the last two, although data will be lost")]
    Down {
        /// How many
        #[arg(
            default_value_t = 1,
            value_name = "N",
            value_parser = number::<usize>(1..=*ANY_NUMBER.end())
        )]
        count: usize,
        /// Go on although data will be lost
        #[arg(long)]
        yes: bool,
    },
    /// Roll back everything that the last `up` applied
    #[command(after_help = "\
Stop the server first.

Example:
  pisync migrate rollback")]
    Rollback {
        /// Go on although data will be lost
        #[arg(long)]
        yes: bool,
    },
    /// Show what is applied and what is pending
    #[command(after_help = "\
Examples:
  pisync migrate status
  pisync migrate status --json")]
    Status {
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Make a pair of files for a migration of your own
    #[command(after_help = "\
Example:
  pisync migrate new add-rooms  prints the names of the two files to fill in")]
    New {
        /// What it does, in a few words joined by hyphens
        name: String,
    },
}

#[derive(Debug, Args)]
struct UpArgs {
    /// Say what would be done, and change nothing. Of a take-over it also says what was found, and how
    /// much time and disk it will take
    #[arg(long)]
    dry_run: bool,
    /// Take-over: the time zone of the Node service's clock, by its IANA name such as Europe/Berlin;
    /// UTC when not given. Its times have none of their own. A time that the clock skipped counts as
    /// one hour later, one that it had twice as the second
    #[arg(long, value_name = "ZONE")]
    source_timezone: Option<String>,
}

pub(super) async fn run(command: &MigrateCommand) -> Result<(), Failure> {
    let folder = &command.migrations.migrations_dir;
    let database = &command.database;
    match &command.action {
        Action::Up(arguments) => take_over_or_up(&database.target()?, folder, arguments).await,
        Action::Down { count, yes } => {
            let target = database::existing(database)?;
            let mut migrator = open(&target, folder).await?;
            let last = migrator.last(*count).await?;
            down(&target, &mut migrator, &last, *yes).await
        }
        Action::Rollback { yes } => {
            let target = database::existing(database)?;
            let mut migrator = open(&target, folder).await?;
            let last = migrator.last_batch().await?;
            down(&target, &mut migrator, &last, *yes).await
        }
        Action::Status { json } => status(&database::existing(database)?, folder, *json).await,
        Action::New { name } => {
            let files = migrations::create_pair(folder, name, Clock::system().now())?;
            for file in files {
                println!("{}", file.display());
            }
            Ok(())
        }
    }
}

async fn open(target: &Target, folder: &Path) -> Result<Migrator, Failure> {
    Ok(Migrator::new(target, folder).await?)
}

async fn take_over_or_up(
    target: &Target,
    folder: &Path,
    arguments: &UpArgs,
) -> Result<(), Failure> {
    let time_zone = arguments.source_timezone.as_deref();
    let take_over = TakeOver::open(target, time_zone.unwrap_or("UTC")).await?;
    if take_over.is_none() && time_zone.is_some() {
        // No error: the same command is run again after it was interrupted at the very end.
        println!(
            "--source-timezone is for a database of the Node PiSync, which this is not, or no longer"
        );
    }
    let was_node = match take_over {
        Some(mut take_over) if arguments.dry_run => {
            return take_over::rehearse(target, &mut take_over).await;
        }
        Some(mut take_over) => take_over::run(target, &mut take_over).await?,
        None => false,
    };
    if arguments.dry_run {
        return dry_run(target, folder).await;
    }
    if up(target, folder).await? == 0 && !was_node {
        println!("nothing to do: every migration is applied");
    }
    Ok(())
}

async fn dry_run(target: &Target, folder: &Path) -> Result<(), Failure> {
    let pending = open(target, folder).await?.check().await?;
    for name in &pending {
        println!("pending   {name}");
    }
    println!("{target}: {} to apply; nothing was changed", count(pending.len()));
    Ok(())
}

fn count(migrations: usize) -> String {
    match migrations {
        0 => "no migration".to_owned(),
        1 => "1 migration".to_owned(),
        more => format!("{more} migrations"),
    }
}

/// Applies what is pending, says so, and tells how many that were.
pub(super) async fn up(target: &Target, folder: &Path) -> Result<usize, Failure> {
    let clock = Clock::system();
    let now = clock.now();
    let applied = open(target, folder).await?.up(now).await?;
    for name in &applied {
        println!("applied   {name}");
    }
    let store = store::open(target).await?;
    database::warn_of_clock(&*store, &clock).await?;
    // So that events find their partitions, whoever writes them. A clock that is not set would make old ones.
    if clock.check().is_ok() {
        store.maintain(now).await?;
    }
    Ok(applied.len())
}

async fn down(
    target: &Target,
    migrator: &mut Migrator,
    migrations: &[Migration],
    yes: bool,
) -> Result<(), Failure> {
    store::apply_journal(target)?;
    // Not under a running server.
    let _claim = store::claim(target)?;
    if migrations.is_empty() {
        println!("nothing to do: no migration is applied");
        return Ok(());
    }
    let losses: Vec<String> = migrations
        .iter()
        .flat_map(|migration| {
            let real = migration.losses().filter(|loss| *loss != "nothing");
            real.map(|loss| format!("  {}: {loss}", migration.name))
        })
        .collect();
    if !losses.is_empty() && !yes {
        let message = format!(
            "this would lose for good, in {target}:\n{}\nnothing was done; go on with --yes",
            losses.join("\n")
        );
        return Err(message.into());
    }
    for name in migrator.down(migrations).await? {
        println!("rolled back {name}");
    }
    Ok(())
}

async fn status(target: &Target, folder: &Path, json: JsonArgs) -> Result<(), Failure> {
    let lines = open(target, folder).await?.status().await?;
    say!(json, "{target}");
    for line in &lines {
        let state = line.applied_at.map_or("pending".to_owned(), |at| format!("applied {at}"));
        let problem = line.problem.map_or(String::new(), |problem| format!("  ({problem})"));
        say!(json, "  {state:<33} {:<9} {}{problem}", line.source.as_str(), line.name);
    }
    json.document(|| {
        let migrations = lines.iter().map(|line| {
            json!({
                "name": line.name,
                "source": line.source.as_str(),
                "state": if line.applied_at.is_some() { "applied" } else { "pending" },
                "applied_at": line.applied_at,
                "problem": line.problem,
            })
        });
        json!({"database": target.to_string(), "migrations": migrations.collect::<Vec<_>>()})
    });
    Ok(())
}
