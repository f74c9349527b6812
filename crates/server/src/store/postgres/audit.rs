//! The audit log in PostgreSQL. The modules that change something call it, within their transaction. It must never
//! change or remove a line.

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use tokio_postgres::Error;

use super::{connect::Object, rows::time, store::PostgresStore};
use crate::store::{
    Actor, AuditEntry, AuditLog, StoreError,
    audit::{NewAuditEntry, stored_details},
};

#[async_trait]
impl AuditLog for PostgresStore {
    async fn audit(&self, before: Option<i64>, limit: u32) -> Result<Vec<AuditEntry>, StoreError> {
        self.call(async |connection| audit(connection, before, limit).await).await
    }

    async fn audit_length(&self, most: u32) -> Result<u64, StoreError> {
        const COUNT_ENTRIES: &str =
            "select count(*) from (select 1 from audit_log limit $1) as counted";
        self.call(async |connection| {
            let select = connection.prepare_cached(COUNT_ENTRIES).await?;
            let row = connection.query_one(&select, &[&i64::from(most)]).await?;
            row.try_get::<_, i64>(0).map(i64::cast_unsigned)
        })
        .await
    }
}

/// Adds a line to the audit log, in the transaction of the change that it describes.
pub(super) async fn record(
    transaction: &Transaction<'_>,
    by: &Actor,
    entry: &NewAuditEntry,
) -> Result<(), Error> {
    const INSERT_ENTRY: &str = "
        insert into audit_log (at, via, key_id, address, action, subject, details)
        values ($1, $2, $3, $4, $5, $6, $7)
        returning id
    ";
    let address = by.address.map(|address| address.to_string());
    // Fails when a trigger has dropped the line.
    transaction
        .query_one(
            INSERT_ENTRY,
            &[
                &by.at.to_jiff(),
                &by.via.as_str(),
                &by.via.key_id(),
                &address,
                &entry.action,
                &entry.subject,
                &entry.details,
            ],
        )
        .await
        .map(|_| ())
}

async fn audit(
    connection: &Object,
    before: Option<i64>,
    limit: u32,
) -> Result<Vec<AuditEntry>, Error> {
    const SELECT_ENTRIES: &str = "
        select id, at, via, key_id, address, action, subject, details
          from audit_log
         where id < $1
         order by id desc
         limit $2
    ";
    let select = connection.prepare_cached(SELECT_ENTRIES).await?;
    let rows = connection.query(&select, &[&before.unwrap_or(i64::MAX), &i64::from(limit)]).await?;
    rows.iter()
        .map(|row| {
            Ok(AuditEntry {
                id: row.try_get(0)?,
                at: time(row, 1)?,
                via: row.try_get(2)?,
                key_id: row.try_get(3)?,
                address: row.try_get(4)?,
                action: row.try_get(5)?,
                subject: row.try_get(6)?,
                details: stored_details(row.try_get(7)?),
            })
        })
        .collect()
}
