//! Opening the database for commands that work beside a running server.

use std::sync::Arc;

use pisync_core::Timestamp;

use crate::{
    config::MigrationArgs,
    store::{self, Store, Target, migrations::Migrator},
};

/// Opens the store, with the schema that it needs: SQLite's is brought up to date, as a server does it.
pub(super) async fn open(
    target: &Target,
    migrations: &MigrationArgs,
    now: Timestamp,
) -> Result<Arc<dyn Store>, String> {
    let (mut migrator, pending) = pending(target, migrations).await?;
    if !pending.is_empty() {
        if matches!(target, Target::Postgres(_)) {
            let pending = pending.join(", ");
            return Err(format!("pending migrations: {pending}; run `pisync migrate up` first"));
        }
        // Not under a running server of an older version.
        let _claim = store::claim(target).map_err(|error| error.to_string())?;
        migrator.up(now).await.map_err(|error| error.to_string())?;
    }
    open_settled(target).await
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
    open_settled(target).await
}

/// Opens the store once everything is in it that a server has acknowledged.
async fn open_settled(target: &Target) -> Result<Arc<dyn Store>, String> {
    store::settle(target).map_err(|error| error.to_string())?;
    store::open(target).await.map_err(|error| error.to_string())
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
