//! How far imports have come, in SQLite.

use rusqlite::{Connection, Row, Transaction, params};

use super::reads::time;
use crate::store::ImportProgress;

/// Notes how far an import comes with the transaction.
pub(super) fn advance(
    transaction: &Transaction<'_>,
    progress: &ImportProgress,
) -> rusqlite::Result<()> {
    const ADVANCE: &str = "
        insert or replace into imports (
            id, name, head, records, digest, rejected, finished, updated_at
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
    ";
    transaction.prepare_cached(ADVANCE)?.execute(params![
        progress.id,
        progress.name,
        progress.head,
        progress.records.cast_signed(),
        progress.digest,
        progress.rejected.cast_signed(),
        progress.finished,
        progress.at.as_millisecond(),
    ])?;
    Ok(())
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
