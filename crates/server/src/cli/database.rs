//! Opens the database for the commands that work beside a running server. It makes none, and migrates none that a server
//! uses.

use std::sync::Arc;

use super::exit::Failure;
use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    maintenance,
    store::{self, Store, Target, migrations::Migrator},
};

/// The database of a command that makes none.
pub(super) fn existing(database: &DatabaseArgs) -> Result<Target, Failure> {
    let target = database.target()?;
    store::check_exists(&target)?;
    Ok(target)
}

/// Opens the store, with the schema that it needs: SQLite's is brought up to date, as a server does it. Warns of a
/// clock that is not to be trusted.
pub(super) async fn open(
    target: &Target,
    migrations: &MigrationArgs,
    clock: &Clock,
) -> Result<Arc<dyn Store>, Failure> {
    let store = open_unwarned(target, migrations, clock).await?;
    warn_of_clock(&*store, clock).await?;
    Ok(store)
}

/// The same for a command that looks at the clock by itself.
pub(super) async fn open_unwarned(
    target: &Target,
    migrations: &MigrationArgs,
    clock: &Clock,
) -> Result<Arc<dyn Store>, Failure> {
    let (mut migrator, pending) = pending(target, migrations).await?;
    if !pending.is_empty() {
        if matches!(target, Target::Postgres(_)) {
            let pending = pending.join(", ");
            let message = format!("pending migrations: {pending}; run `pisync migrate up` first");
            return Err(message.into());
        }
        // Not under a running server of an older version.
        let _claim = store::claim(target)?;
        migrator.up(clock.now()).await?;
    }
    open_applied(target).await
}

/// Opens the store, whose schema must be current: for commands that only read, and make nothing.
pub(super) async fn open_current(
    target: &Target,
    migrations: &MigrationArgs,
) -> Result<Arc<dyn Store>, Failure> {
    let (_, pending) = pending(target, migrations).await?;
    if !pending.is_empty() {
        let message = format!(
            "{target} has pending migrations: {}; run `pisync migrate up` first",
            pending.join(", ")
        );
        return Err(message.into());
    }
    open_applied(target).await
}

/// Opens the store once everything is in it that a server has acknowledged.
async fn open_applied(target: &Target) -> Result<Arc<dyn Store>, Failure> {
    store::apply_journal(target)?;
    Ok(store::open(target).await?)
}

/// Says on standard error what speaks against this machine's clock, for commands that date or compare by it.
pub(super) async fn warn_of_clock(store: &dyn Store, clock: &Clock) -> Result<(), Failure> {
    let doubt = maintenance::doubt(store, clock).await?;
    if let Some(doubt) = doubt {
        eprintln!("pisync: {doubt}");
    }
    Ok(())
}

async fn pending(
    target: &Target,
    migrations: &MigrationArgs,
) -> Result<(Migrator, Vec<String>), Failure> {
    let mut migrator = Migrator::new(target, &migrations.migrations_dir).await?;
    let pending = migrator.check().await?;
    Ok((migrator, pending))
}
