//! `pisync migrate`: the schema, forth and back.

use std::path::Path;

use clap::{Args, Subcommand};

use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    store::{
        self, Target,
        migrations::{self, Migration, Migrator},
    },
};

#[derive(Debug, Args)]
#[command(after_help = "\
Files are named YYYY-MM-DD-NN-name.up.sql and .down.sql. Each runs in a
transaction; what was applied stands in the table pisync_migrations.")]
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
    /// Apply all pending migrations
    Up,
    /// Take back the last N applied migrations
    Down {
        /// How many
        #[arg(default_value_t = 1, value_name = "N")]
        count: usize,
        /// Go on although data will be lost
        #[arg(long)]
        yes: bool,
    },
    /// Take back everything that the last `up` applied
    Rollback {
        /// Go on although data will be lost
        #[arg(long)]
        yes: bool,
    },
    /// Show what is applied and what is pending
    Status,
    /// Make a pair of files for a migration of your own
    New {
        /// What it does, in a few words joined by hyphens
        name: String,
    },
}

pub(super) async fn run(command: &MigrateCommand) -> Result<(), String> {
    let folder = &command.migrations.migrations_dir;
    let target = command.database.target().map_err(|error| error.to_string())?;
    match &command.action {
        Action::Up => {
            if up(&target, folder).await? == 0 {
                println!("nothing to do: every migration is applied");
            }
            Ok(())
        }
        Action::Down { count, yes } => {
            let mut migrator = open(&target, folder).await?;
            let last = migrator.last(*count).await.map_err(|error| error.to_string())?;
            down(&target, &mut migrator, &last, *yes).await
        }
        Action::Rollback { yes } => {
            let mut migrator = open(&target, folder).await?;
            let last = migrator.last_batch().await.map_err(|error| error.to_string())?;
            down(&target, &mut migrator, &last, *yes).await
        }
        Action::Status => status(&target, folder).await,
        Action::New { name } => {
            let files = migrations::create_pair(folder, name, Clock::system().now())
                .map_err(|error| error.to_string())?;
            for file in files {
                println!("{}", file.display());
            }
            Ok(())
        }
    }
}

async fn open(target: &Target, folder: &Path) -> Result<Migrator, String> {
    Migrator::new(target, folder).await.map_err(|error| error.to_string())
}

/// Applies what is pending, says so, and tells how many that were.
pub(super) async fn up(target: &Target, folder: &Path) -> Result<usize, String> {
    let now = Clock::system().now();
    let applied = open(target, folder).await?.up(now).await.map_err(|error| error.to_string())?;
    for name in &applied {
        println!("applied   {name}");
    }
    // So that events find their partitions, whoever writes them.
    let store = store::open(target).await.map_err(|error| error.to_string())?;
    store.maintain(now).await.map_err(|error| error.to_string())?;
    Ok(applied.len())
}

async fn down(
    target: &Target,
    migrator: &mut Migrator,
    migrations: &[Migration],
    yes: bool,
) -> Result<(), String> {
    // Not under a running server.
    let _claim = store::claim(target).map_err(|error| error.to_string())?;
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
        return Err(format!(
            "this would lose for good, in {target}:\n{}\nnothing was done; go on with --yes",
            losses.join("\n")
        ));
    }
    for name in migrator.down(migrations).await.map_err(|error| error.to_string())? {
        println!("taken back {name}");
    }
    Ok(())
}

async fn status(target: &Target, folder: &Path) -> Result<(), String> {
    println!("{target}");
    for line in open(target, folder).await?.status().await.map_err(|error| error.to_string())? {
        let state = line.applied_at.map_or("pending".to_owned(), |at| format!("applied {at}"));
        let problem = line.problem.map_or(String::new(), |problem| format!("  ({problem})"));
        println!("  {state:<33} {:<9} {}{problem}", line.source.as_str(), line.name);
    }
    Ok(())
}
