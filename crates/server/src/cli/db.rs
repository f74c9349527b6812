//! `pisync db setup`: makes the database that a server needs, and its tables. It is the only command that creates a database
//! in PostgreSQL.

use clap::{Args, Subcommand};

use super::{exit::Failure, migrate};
use crate::{
    config::{DatabaseArgs, MigrationArgs},
    store,
};

const SETUP_HELP: &str = "\
Run it as often as you like: what is there stays. On PostgreSQL the role must
be allowed to create databases, or the database must exist already.

Examples:
  pisync db setup                            data/pisync.db
  pisync db setup --database-url postgres://pisync@localhost/pisync";

#[derive(Debug, Args)]
#[command(after_help = SETUP_HELP)]
pub(super) struct DbCommand {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create the database if it is missing, then apply all migrations
    #[command(after_help = SETUP_HELP)]
    Setup,
}

pub(super) async fn run(command: &DbCommand) -> Result<(), Failure> {
    let Action::Setup = command.action;
    let target = command.database.target()?;
    if store::create_database(&target).await? {
        println!("created {target}");
    }
    migrate::up(&target, &command.migrations.migrations_dir).await?;
    println!("{target} is ready");
    Ok(())
}
