//! Migrations on SQLite. `migrator` calls it through `MigrationDatabase`. Everything here blocks, so a running server
//! must not call it.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use pisync_core::Timestamp;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::{
    claim,
    connection::{open_existing, open_for_writing, store_error},
    files,
    journal_commands::check_journal,
    rows::time,
};
use crate::store::{
    StoreError,
    migrations::{
        Applied, Contents, Migration, MigrationDatabase, Ours, Source, may_apply, may_revert,
    },
};

/// Creates the table that records what was applied.
const CREATE_TABLE: &str = "
    create table if not exists pisync_migrations (
        id         integer primary key autoincrement,
        name       text    not null unique,
        source     text    not null,
        checksum   text    not null,
        batch      integer not null,
        applied_at integer not null
    ) strict
";

/// Opens the file for each step; the first step that writes creates it. Everything here blocks: it runs from the
/// command line and before a server starts.
pub(crate) struct SqliteMigrations {
    path: PathBuf,
}

impl SqliteMigrations {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Runs `change` in one transaction, if the applied migrations allow it. No other writer can be in the middle of one.
    fn change(
        &self,
        may_change: impl FnOnce(&[String]) -> Result<bool, StoreError>,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> Result<bool, StoreError> {
        let mut connection = open_for_writing(&claim::find(&self.path)?)?;
        let run = || {
            // Foreign keys are off while tables are rebuilt. References are checked before the commit.
            connection.pragma_update(None, "foreign_keys", false)?;
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(CREATE_TABLE)?;
            match may_change(&names(&transaction)?) {
                Ok(true) => {}
                other => return Ok(other),
            }
            change(&transaction)?;
            let dangling: Option<String> = transaction
                .query_row("pragma foreign_key_check", [], |row| row.get(0))
                .optional()?;
            if let Some(table) = dangling {
                let problem = format!("rows of {table} would refer to nothing");
                return Err(rusqlite::Error::ToSqlConversionFailure(problem.into()));
            }
            transaction.commit()?;
            Ok(Ok(true))
        };
        run().map_err(store_error)?
    }
}

#[async_trait]
impl MigrationDatabase for SqliteMigrations {
    async fn contents(&mut self) -> Result<Contents, StoreError> {
        let path = claim::find(&self.path)?;
        if !files::is_there(&path)? {
            return Ok(Contents::Ours(Ours::default()));
        }
        let read = || -> rusqlite::Result<Contents> {
            let connection = open_existing(&path)?;
            // A single snapshot, because another server may be making the tables at this moment.
            let snapshot = connection.unchecked_transaction()?;
            let exists = |table: &str| has_table(&snapshot, table);
            if exists("pisync_migrations")? {
                return applied(&snapshot)
                    .map(|applied| Contents::Ours(Ours { applied, taken_over: false }));
            }
            for table in ["devices", "sync_events"] {
                if exists(table)? {
                    return Ok(Contents::Foreign(table));
                }
            }
            Ok(Contents::Ours(Ours::default()))
        };
        read().map_err(|error| files::sqlite_cannot_open(&self.path, &error))
    }

    fn may_change(&self) -> Result<(), StoreError> {
        check_journal(&claim::find(&self.path)?)
    }

    async fn apply(
        &mut self,
        migration: &Migration,
        before: &[String],
        batch: i64,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        const RECORD: &str = "
            insert into pisync_migrations (name, source, checksum, batch, applied_at)
            values (?1, ?2, ?3, ?4, ?5)
        ";
        let may_change = |applied: &[String]| may_apply(applied, &migration.name, before);
        self.change(may_change, |transaction| {
            transaction.execute_batch(&migration.up)?;
            transaction.execute(
                RECORD,
                params![
                    migration.name,
                    migration.source.as_str(),
                    migration.checksum(),
                    batch,
                    now.as_millisecond()
                ],
            )?;
            Ok(())
        })
    }

    async fn revert(&mut self, migration: &Migration) -> Result<bool, StoreError> {
        let may_change = |applied: &[String]| may_revert(applied, &migration.name);
        self.change(may_change, |transaction| {
            transaction.execute_batch(&migration.down)?;
            transaction
                .execute("delete from pisync_migrations where name = ?1", [&migration.name])?;
            Ok(())
        })
    }
}

fn has_table(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    const EXISTS: &str =
        "select exists (select 1 from sqlite_schema where type = 'table' and name = ?1)";
    connection.query_row(EXISTS, [table], |row| row.get(0))
}

/// The applied migrations in their order.
fn names(transaction: &Transaction<'_>) -> rusqlite::Result<Vec<String>> {
    const NAMES: &str = "select name from pisync_migrations order by id";
    transaction.prepare(NAMES)?.query_map([], |row| row.get(0))?.collect()
}

fn applied(connection: &Connection) -> rusqlite::Result<Vec<Applied>> {
    connection
        .prepare(
            "select name, source, checksum, batch, applied_at from pisync_migrations order by id",
        )?
        .query_map([], |row| {
            Ok(Applied {
                name: row.get(0)?,
                source: Source::parse(&row.get::<_, String>(1)?),
                checksum: row.get(2)?,
                batch: row.get(3)?,
                applied_at: time(row, 4)?,
            })
        })?
        .collect()
}
