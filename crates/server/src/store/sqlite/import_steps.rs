//! How far imports have come, as rows of `imports`. The write connection writes them and `imports` reads them. A step
//! must be written in the transaction that stores its events.

use rusqlite::{Row, Transaction, params};

use super::{connection::expect_row, rows::time};
use crate::store::{ImportProgress, ImportStep};

/// Notes the progress of an import in the transaction. Fails if another import stores the same records. `has_events`
/// tells whether the step stores any events.
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

/// A row of `imports`.
pub(super) fn import(row: &Row<'_>) -> rusqlite::Result<ImportProgress> {
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
