//! Migrations on PostgreSQL, and creating the database that they run in. `migrator` and `open` call it. Only one
//! process may migrate at a time; an advisory lock ensures it.

use async_trait::async_trait;
use pisync_core::Timestamp;
use tokio_postgres::{GenericClient, Transaction, error::SqlState};

use super::{
    connect::Connector,
    connection::Connection,
    errors::{describe, store_error},
    locks::MIGRATION_LOCK,
};
use crate::store::{
    PostgresTarget, StoreError,
    migrations::{
        Applied, Contents, Migration, MigrationDatabase, NODE_MIGRATION, Ours, Source, may_apply,
        may_revert,
    },
};

/// Creates the table that records what was applied.
pub(super) const CREATE_TABLE: &str = "
    create table if not exists pisync_migrations (
        id         bigint generated always as identity primary key,
        name       text        not null unique,
        source     text        not null,
        checksum   text        not null,
        batch      bigint      not null,
        applied_at timestamptz not null
    )
";

/// The role, the database, and the schema in which tables are made.
const NAMES: &str = "
    select quote_ident(current_user),
           quote_ident(current_database()),
           quote_ident(coalesce(current_schema(), 'public'))
";

/// One connection, for the entire command.
pub(crate) struct PostgresMigrations {
    pub(super) connection: Connection,
}

impl PostgresMigrations {
    pub(crate) async fn connect(target: &PostgresTarget) -> Result<Self, StoreError> {
        let connection = Connector::new(target)?.connect().await?;
        // Migrating a large table may take any time.
        connection
            .client
            .batch_execute("set statement_timeout = 0; set idle_in_transaction_session_timeout = 0")
            .await
            .map_err(store_error)?;
        Ok(Self { connection })
    }

    /// Begins a transaction that only one process has at a time.
    pub(super) async fn locked(&mut self) -> Result<Transaction<'_>, tokio_postgres::Error> {
        let transaction = self.connection.client.transaction().await?;
        transaction.execute("select pg_advisory_xact_lock($1)", &[&MIGRATION_LOCK]).await?;
        Ok(transaction)
    }

    /// Finds out what is in the database.
    pub(super) async fn look(&self) -> Result<Contents, StoreError> {
        match contents(&self.connection.client).await {
            Ok(contents) => Ok(contents),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Adds to a missing right what an administrator can do about it.
    async fn explain(&self, error: tokio_postgres::Error) -> StoreError {
        let code = error.code().cloned();
        let text = describe(&error);
        let missing_right = code == Some(SqlState::INSUFFICIENT_PRIVILEGE);
        if !missing_right && code != Some(SqlState::INVALID_SCHEMA_NAME) {
            return store_error(error);
        }
        // The failed transaction is rolled back by now, so the session can be queried.
        let names = self.connection.client.query_one(NAMES, &[]).await;
        let name = |column: usize| -> String {
            let found = names.as_ref().ok().and_then(|row| row.try_get(column).ok());
            found.unwrap_or_else(|| "NAME".to_owned())
        };
        let (user, database, schema) = (name(0), name(1), name(2));
        StoreError::Failed(if !missing_right {
            format!(
                "{text}: create the schema that search_path names, with `create schema NAME authorization {user}`"
            )
        } else if text.contains(" schema ") {
            format!(
                "{text}: the user {user} may not make tables there, which PostgreSQL 15 and later leave to the \
                 database's owner; as an administrator, run `grant usage, create on schema {schema} to {user}` in the \
                 database {database}, or `alter database {database} owner to {user}`"
            )
        } else {
            format!(
                "{text}: PiSync's tables must belong to the user that it connects as, which is {user}; connect as \
                 their owner, or give them to {user} with `alter table … owner to {user}` as an administrator"
            )
        })
    }

    async fn try_apply(
        &mut self,
        migration: &Migration,
        before: &[String],
        batch: i64,
        now: Timestamp,
    ) -> Result<Result<bool, StoreError>, tokio_postgres::Error> {
        let transaction = self.locked().await?;
        transaction.batch_execute(CREATE_TABLE).await?;
        match may_apply(&names(&transaction).await?, &migration.name, before) {
            Ok(true) => {}
            other => return Ok(other),
        }
        run(&transaction, migration, batch, now).await?;
        transaction.commit().await?;
        Ok(Ok(true))
    }

    async fn try_revert(
        &mut self,
        migration: &Migration,
    ) -> Result<Result<bool, StoreError>, tokio_postgres::Error> {
        let transaction = self.locked().await?;
        match may_revert(&names(&transaction).await?, &migration.name) {
            Ok(true) => {}
            other => return Ok(other),
        }
        transaction.batch_execute(&migration.down).await?;
        transaction
            .execute("delete from pisync_migrations where name = $1", &[&migration.name])
            .await?;
        transaction.commit().await?;
        Ok(Ok(true))
    }
}

#[async_trait]
impl MigrationDatabase for PostgresMigrations {
    async fn contents(&mut self) -> Result<Contents, StoreError> {
        self.look().await
    }

    async fn apply(
        &mut self,
        migration: &Migration,
        before: &[String],
        batch: i64,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        match self.try_apply(migration, before, batch, now).await {
            Ok(applied) => self.connection.confirm_change().and(applied),
            Err(error) => Err(self.explain(error).await),
        }
    }

    async fn revert(&mut self, migration: &Migration) -> Result<bool, StoreError> {
        match self.try_revert(migration).await {
            Ok(reverted) => self.connection.confirm_change().and(reverted),
            Err(error) => Err(self.explain(error).await),
        }
    }
}

/// Runs a migration's `up` and records it.
pub(super) async fn run(
    transaction: &Transaction<'_>,
    migration: &Migration,
    batch: i64,
    now: Timestamp,
) -> Result<(), tokio_postgres::Error> {
    const RECORD: &str = "
        insert into pisync_migrations (name, source, checksum, batch, applied_at)
        values ($1, $2, $3, $4, $5)
    ";
    let (source, checksum) = (migration.source.as_str(), migration.checksum());
    transaction.batch_execute(&migration.up).await?;
    transaction
        .execute(RECORD, &[&migration.name, &source, &checksum, &batch, &now.to_jiff()])
        .await?;
    Ok(())
}

pub(super) async fn contents(
    client: &impl GenericClient,
) -> Result<Contents, tokio_postgres::Error> {
    const APPLIED: &str = "
        select name, source, checksum, batch, applied_at from pisync_migrations order by id
    ";
    const IS_NODE_SERVICE: &str = "select exists (select from migrations where filename = $1)";
    let mut table_of_our_name = None;
    for table in ["devices", "sync_events"] {
        if table_of_our_name.is_none() && has_table(client, table).await? {
            table_of_our_name = Some(table);
        }
    }
    // Searched for last. Another server may be making all of them at this moment, in one transaction. It must not be
    // taken for another program.
    if has_table(client, "pisync_migrations").await? {
        let rows = client.query(APPLIED, &[]).await?;
        let applied: Result<Vec<_>, _> = rows
            .iter()
            .map(|row| {
                Ok(Applied {
                    name: row.try_get(0)?,
                    source: Source::parse(row.try_get(1)?),
                    checksum: row.try_get(2)?,
                    batch: row.try_get(3)?,
                    applied_at: Timestamp::truncate(row.try_get(4)?),
                })
            })
            .collect();
        let applied = applied?;
        // An empty table remains after everything was rolled back. The Node service's tables may have been restored
        // then.
        if !applied.is_empty() {
            let taken_over = has_table(client, "pisync_take_over").await?;
            return Ok(Contents::Ours(Ours { applied, taken_over }));
        }
    }
    let Some(table) = table_of_our_name else { return Ok(Contents::Ours(Ours::default())) };
    let node_service = has_column(client, "migrations", "filename").await?
        && client.query_one(IS_NODE_SERVICE, &[&NODE_MIGRATION]).await?.try_get(0)?;
    Ok(if node_service { Contents::NodeService } else { Contents::Foreign(table) })
}

async fn has_table(
    client: &impl GenericClient,
    table: &str,
) -> Result<bool, tokio_postgres::Error> {
    client.query_one("select to_regclass($1) is not null", &[&table]).await?.try_get(0)
}

async fn has_column(
    client: &impl GenericClient,
    table: &str,
    column: &str,
) -> Result<bool, tokio_postgres::Error> {
    const EXISTS: &str = "
        select exists (
            select from pg_attribute where attrelid = to_regclass($1) and attname = $2)
    ";
    client.query_one(EXISTS, &[&table, &column]).await?.try_get(0)
}

/// The applied migrations in their order.
async fn names(transaction: &Transaction<'_>) -> Result<Vec<String>, tokio_postgres::Error> {
    const NAMES: &str = "select name from pisync_migrations order by id";
    transaction.query(NAMES, &[]).await?.iter().map(|row| row.try_get(0)).collect()
}

/// Creates the database that `target` names, from one that every server has. False when it existed already and can be
/// used.
pub(crate) async fn create_database(target: &PostgresTarget) -> Result<bool, StoreError> {
    let connector = Connector::new(target)?;
    if connector.database_exists().await? {
        return Ok(false);
    }
    let name = target.config.get_dbname().unwrap_or("pisync");
    let maintenance = match connector.with_database("postgres").connect().await {
        Ok(maintenance) => maintenance,
        // That database exists by default, but may have been dropped.
        Err(error) => connector.with_database("template1").connect().await.map_err(|_| {
            StoreError::Unavailable(format!(
                "the database {name} does not exist, and the database postgres, from which it would be created, \
                 cannot be opened: {error}"
            ))
        })?,
    };
    let quoted = format!("\"{}\"", name.replace('"', "\"\""));
    let create = format!("create database {quoted} encoding 'UTF8' template template0");
    let mut created = maintenance.client.batch_execute(&create).await;
    if matches!(&created, Err(error) if error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE)) {
        // The server's locale may require another encoding. PiSync sorts byte by byte and needs no locale.
        let create = format!("{create} lc_collate 'C' lc_ctype 'C'");
        created = maintenance.client.batch_execute(&create).await;
    }
    match created {
        Ok(()) => maintenance.confirm_change().map(|()| true),
        Err(error) if error.code() == Some(&SqlState::DUPLICATE_DATABASE) => Ok(false),
        // Another process is creating it at this moment, or was killed while it did.
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => Ok(false),
        Err(error) => Err(StoreError::Failed(format!(
            "cannot create the database {name}: {}; as a PostgreSQL administrator, grant this user CREATEDB, or run \
             `create database {quoted} owner USER encoding 'UTF8' template template0`",
            describe(&error)
        ))),
    }
}
