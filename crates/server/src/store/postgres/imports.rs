//! How far imports have come, in PostgreSQL. `transactions` writes the progress and `import` reads it. A step must be
//! written in the transaction that stores its events.

use async_trait::async_trait;
use tokio_postgres::{Client, Error, Row};

use super::{
    batch_columns::check_written, connect::Object, errors::WriteError, rows::time,
    store::PostgresStore,
};
use crate::store::{Digest, ImportLog, ImportProgress, ImportStep, StoreError};

#[async_trait]
impl ImportLog for PostgresStore {
    async fn imports(&self) -> Result<Vec<ImportProgress>, StoreError> {
        self.call(async |connection| imports(connection).await).await
    }
}

/// Notes the progress of an import in the transaction that is open on `client`. Fails if another import stores the same
/// records. `has_events` tells whether the step stores any events.
pub(super) async fn advance(
    client: &Client,
    step: &ImportStep,
    has_events: bool,
) -> Result<(), WriteError> {
    // Imports that begin alike take turns: each holds the lock until its transaction ends.
    const LOCK: &str = "select pg_advisory_xact_lock(hashtextextended(encode($1, 'hex'), 0))";
    const SAME: &str = "
        select id, name, head, records, digest, rejected, finished, updated_at
          from imports
         where head = $1 or id = $2
    ";
    const ADVANCE: &str = "
        insert into imports (id, name, head, records, digest, rejected, finished, updated_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
            on conflict (id) do update
               set head = excluded.head, records = excluded.records, digest = excluded.digest,
                   rejected = excluded.rejected, finished = excluded.finished,
                   updated_at = excluded.updated_at
    ";
    let progress = &step.progress;
    client.execute(LOCK, &[&progress.head.as_slice()]).await?;
    let rows = client.query(SAME, &[&progress.head.as_slice(), &progress.id.as_slice()]).await?;
    let stored: Vec<_> = rows.iter().map(import).collect::<Result<_, Error>>()?;
    step.check(stored.iter().flatten(), has_events)
        .map_err(|error| WriteError::Refused(error.to_string()))?;
    let written = client
        .execute(
            ADVANCE,
            &[
                &progress.id.as_slice(),
                &progress.name,
                &progress.head.as_slice(),
                &progress.records.cast_signed(),
                &progress.digest.as_slice(),
                &progress.rejected.cast_signed(),
                &progress.finished,
                &progress.at.to_jiff(),
            ],
        )
        .await?;
    check_written("imports", written, 1)
}

/// All imports.
async fn imports(connection: &Object) -> Result<Vec<ImportProgress>, Error> {
    const IMPORTS: &str = "
        select id, name, head, records, digest, rejected, finished, updated_at from imports
    ";
    let rows = connection.query(IMPORTS, &[]).await?;
    rows.iter().filter_map(|row| import(row).transpose()).collect()
}

/// Reads an import; `None` for a row that another program wrote.
fn import(row: &Row) -> Result<Option<ImportProgress>, Error> {
    let digest = |column| Ok::<_, Error>(Digest::try_from(row.try_get::<_, &[u8]>(column)?).ok());
    let (Some(id), Some(head), Some(sum)) = (digest(0)?, digest(2)?, digest(4)?) else {
        return Ok(None);
    };
    Ok(Some(ImportProgress {
        id,
        name: row.try_get(1)?,
        head,
        records: row.try_get::<_, i64>(3)?.cast_unsigned(),
        digest: sum,
        rejected: row.try_get::<_, i64>(5)?.cast_unsigned(),
        finished: row.try_get(6)?,
        at: time(row, 7)?,
    }))
}
