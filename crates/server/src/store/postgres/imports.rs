//! How far imports have come, in PostgreSQL.

use tokio_postgres::{Client, Error, Row};

use super::{connect::Object, reads::time};
use crate::store::{Digest, ImportProgress};

/// Notes how far an import comes with the transaction that is open on `client`.
pub(super) async fn advance(client: &Client, progress: &ImportProgress) -> Result<(), Error> {
    const ADVANCE: &str = "
        insert into imports (id, name, head, records, digest, rejected, finished, updated_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
            on conflict (id) do update
               set head = excluded.head, records = excluded.records, digest = excluded.digest,
                   rejected = excluded.rejected, finished = excluded.finished,
                   updated_at = excluded.updated_at
    ";
    client
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
        .await
        .map(|_| ())
}

/// All imports.
pub(super) async fn imports(connection: &Object) -> Result<Vec<ImportProgress>, Error> {
    const IMPORTS: &str = "
        select id, name, head, records, digest, rejected, finished, updated_at from imports
    ";
    let rows = connection.query(IMPORTS, &[]).await?;
    rows.iter().filter_map(|row| import(row).transpose()).collect()
}

/// An import; `None` for a row that is none of ours.
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
