//! How far imports have come, in SQLite.

use async_trait::async_trait;
use rusqlite::{Connection, Row, Transaction, params};

use super::{SqliteStore, connection::expect_row, rows::time};
use crate::store::{ImportLog, ImportProgress, ImportStep, StoreError};

#[async_trait]
impl ImportLog for SqliteStore {
    async fn imports(&self) -> Result<Vec<ImportProgress>, StoreError> {
        self.read(imports).await
    }
}

/// Notes how far an import comes with the transaction, unless another one imports the same. `has_events` says whether
/// it stores any.
pub(super) fn advance(
    transaction: &Transaction<'_>,
    step: &ImportStep,
    has_events: bool,
) -> rusqlite::Result<()> {
    const SAME: &str = "
        select id, name, head, records, digest, rejected, finished, updated_at
          from imports
         where head = ?1 or id = ?2
    ";
    const ADVANCE: &str = "
        insert or replace into imports (
            id, name, head, records, digest, rejected, finished, updated_at
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
    ";
    let progress = &step.progress;
    let stored = transaction
        .prepare_cached(SAME)?
        .query_map(params![progress.head, progress.id], import)?
        .collect::<Result<Vec<_>, _>>()?;
    step.check(&stored, has_events)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
    let written = transaction.prepare_cached(ADVANCE)?.execute(params![
        progress.id,
        progress.name,
        progress.head,
        progress.records.cast_signed(),
        progress.digest,
        progress.rejected.cast_signed(),
        progress.finished,
        progress.at.as_millisecond(),
    ])?;
    expect_row("imports", written)
}

/// All imports.
pub(super) fn imports(connection: &Connection) -> rusqlite::Result<Vec<ImportProgress>> {
    const IMPORTS: &str = "
        select id, name, head, records, digest, rejected, finished, updated_at from imports
    ";
    let mut select = connection.prepare(IMPORTS)?;
    select.query_map([], import)?.collect()
}

fn import(row: &Row<'_>) -> rusqlite::Result<ImportProgress> {
    Ok(ImportProgress {
        id: row.get(0)?,
        name: row.get(1)?,
        head: row.get(2)?,
        records: row.get::<_, i64>(3)?.cast_unsigned(),
        digest: row.get(4)?,
        rejected: row.get::<_, i64>(5)?.cast_unsigned(),
        finished: row.get(6)?,
        at: time(row, 7)?,
    })
}
