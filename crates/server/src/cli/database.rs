//! Opening the database for commands that work beside a running server.

use std::sync::Arc;

use crate::{
    clock::Clock,
    config::MigrationArgs,
    maintenance,
    store::{self, Store, Target, migrations::Migrator},
};

/// Opens the store, with the schema that it needs: SQLite's is brought up to date, as a server does it. Warns of a
/// clock that is not to be trusted.
pub(super) async fn open(
    target: &Target,
    migrations: &MigrationArgs,
    clock: &Clock,
) -> Result<Arc<dyn Store>, String> {
    let store = open_unwarned(target, migrations, clock).await?;
    warn_of_clock(&*store, clock).await?;
    Ok(store)
}

/// The same for a command that looks at the clock by itself.
pub(super) async fn open_unwarned(
    target: &Target,
    migrations: &MigrationArgs,
    clock: &Clock,
) -> Result<Arc<dyn Store>, String> {
    let (mut migrator, pending) = pending(target, migrations).await?;
    if !pending.is_empty() {
        if matches!(target, Target::Postgres(_)) {
            let pending = pending.join(", ");
            return Err(format!("pending migrations: {pending}; run `pisync migrate up` first"));
        }
        // Not under a running server of an older version.
        let _claim = store::claim(target).map_err(|error| error.to_string())?;
        migrator.up(clock.now()).await.map_err(|error| error.to_string())?;
    }
    open_applied(target).await
}

/// Opens the store, whose schema must be current: for commands that only read, and make nothing.
pub(super) async fn open_current(
    target: &Target,
    migrations: &MigrationArgs,
) -> Result<Arc<dyn Store>, String> {
    let (_, pending) = pending(target, migrations).await?;
    if !pending.is_empty() {
        // Opening an SQLite file that is not there would make it.
        return Err(format!(
            "{target} has pending migrations: {}; run `pisync migrate up` first",
            pending.join(", ")
        ));
    }
    open_applied(target).await
}

/// Opens the store once everything is in it that a server has acknowledged.
async fn open_applied(target: &Target) -> Result<Arc<dyn Store>, String> {
    store::apply_journal(target).map_err(|error| error.to_string())?;
    store::open(target).await.map_err(|error| error.to_string())
}

/// Says on standard error what speaks against this machine's clock, for commands that date or compare by it.
pub(super) async fn warn_of_clock(store: &dyn Store, clock: &Clock) -> Result<(), String> {
    let doubt = maintenance::doubt(store, clock).await.map_err(|error| error.to_string())?;
    if let Some(doubt) = doubt {
        eprintln!("pisync: {doubt}");
    }
    Ok(())
}

async fn pending(
    target: &Target,
    migrations: &MigrationArgs,
) -> Result<(Migrator, Vec<String>), String> {
    let migrator = Migrator::new(target, &migrations.migrations_dir).await;
    let mut migrator = migrator.map_err(|error| error.to_string())?;
    let pending = migrator.check().await.map_err(|error| error.to_string())?;
    Ok((migrator, pending))
}
