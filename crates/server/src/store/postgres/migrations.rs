//! Migrations on PostgreSQL, and making the database they run in.

use async_trait::async_trait;
use pisync_core::Timestamp;
use tokio_postgres::{GenericClient, Transaction, error::SqlState};

use super::connect::{Connection, Connector, describe, store_error};
use crate::store::{
    PostgresTarget, StoreError,
    migrations::{Applied, Contents, Migration, MigrationDatabase, NODE_MIGRATION, Ours, Source},
};

/// Any number that nobody else uses for an advisory lock: "pisync" and a number for the purpose.
const MIGRATION_LOCK: i64 = 0x7069_7379_6e63_0001;

/// Of what was applied.
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

/// One connection, for as long as the command runs.
pub(crate) struct PostgresMigrations {
    pub(super) connection: Connection,
}

impl PostgresMigrations {
    pub(crate) async fn connect(target: &PostgresTarget) -> Result<Self, StoreError> {
        let connection = Connector::new(target)?.connect().await?;
        // A migration of a large table may take its time.
        connection
            .client
            .batch_execute("set statement_timeout = 0; set idle_in_transaction_session_timeout = 0")
            .await
            .map_err(store_error)?;
        Ok(Self { connection })
    }

    /// A transaction that only one process has at a time.
    pub(super) async fn locked(&mut self) -> Result<Transaction<'_>, tokio_postgres::Error> {
        let transaction = self.connection.client.transaction().await?;
        transaction.execute("select pg_advisory_xact_lock($1)", &[&MIGRATION_LOCK]).await?;
        Ok(transaction)
    }

    async fn try_apply(
        &mut self,
        migration: &Migration,
        batch: i64,
        now: Timestamp,
    ) -> Result<bool, tokio_postgres::Error> {
        let transaction = self.locked().await?;
        transaction.batch_execute(CREATE_TABLE).await?;
        if is_applied(&transaction, &migration.name).await? {
            return Ok(false);
        }
        run(&transaction, migration, batch, now).await?;
        transaction.commit().await?;
        Ok(true)
    }

    async fn try_revert(&mut self, migration: &Migration) -> Result<bool, tokio_postgres::Error> {
        let transaction = self.locked().await?;
        if !is_applied(&transaction, &migration.name).await? {
            return Ok(false);
        }
        transaction.batch_execute(&migration.down).await?;
        transaction
            .execute("delete from pisync_migrations where name = $1", &[&migration.name])
            .await?;
        transaction.commit().await?;
        Ok(true)
    }
}

#[async_trait]
impl MigrationDatabase for PostgresMigrations {
    async fn contents(&mut self) -> Result<Contents, StoreError> {
        contents(&self.connection.client).await.map_err(store_error)
    }

    async fn apply(
        &mut self,
        migration: &Migration,
        batch: i64,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        self.try_apply(migration, batch, now).await.map_err(store_error)
    }

    async fn revert(&mut self, migration: &Migration) -> Result<bool, StoreError> {
        self.try_revert(migration).await.map_err(store_error)
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
    // Looked for last: another server may be making them all just now, in one transaction, and must
    // not be taken for somebody else.
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
        // A table without a row is what is left after all was taken back, and the Node service's tables may
        // have been given back.
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

async fn is_applied(
    transaction: &Transaction<'_>,
    name: &str,
) -> Result<bool, tokio_postgres::Error> {
    const EXISTS: &str = "select exists (select from pisync_migrations where name = $1)";
    transaction.query_one(EXISTS, &[&name]).await?.try_get(0)
}

/// Creates the database that `target` names, from the server's maintenance database; false when it
/// was there already.
pub(crate) async fn create_database(target: &PostgresTarget) -> Result<bool, StoreError> {
    let connector = Connector::new(target)?;
    let name = target.config.get_dbname().unwrap_or("pisync");
    let maintenance = connector.with_database("postgres").connect().await.map_err(|error| {
        StoreError::Unavailable(format!(
            "cannot open the maintenance database \"postgres\": {error}"
        ))
    })?;
    let quoted = format!("\"{}\"", name.replace('"', "\"\""));
    let created = maintenance
        .client
        .batch_execute(&format!("create database {quoted} encoding 'UTF8' template template0"))
        .await;
    match created {
        Ok(()) => Ok(true),
        Err(error) if error.code() == Some(&SqlState::DUPLICATE_DATABASE) => Ok(false),
        Err(error) => Err(StoreError::Failed(format!(
            "cannot create the database {name}: {}; create it as a PostgreSQL administrator, or grant this user CREATEDB",
            describe(&error)
        ))),
    }
}
