//! The audit log in SQLite. The modules that change something call it, within their transaction. It must never change
//! or remove a line.

use async_trait::async_trait;
use rusqlite::{Connection, Transaction, params};

use super::{connection::expect_row, rows::time, store::SqliteStore};
use crate::store::{
    Actor, AuditEntry, AuditLog, StoreError,
    audit::{NewAuditEntry, stored_details},
};

#[async_trait]
impl AuditLog for SqliteStore {
    async fn audit(&self, before: Option<i64>, limit: u32) -> Result<Vec<AuditEntry>, StoreError> {
        self.read(move |connection| audit(connection, before, limit)).await
    }

    async fn audit_length(&self, most: u32) -> Result<u64, StoreError> {
        const COUNT_ENTRIES: &str = "select count(*) from (select 1 from audit_log limit ?1)";
        self.read(move |connection| {
            let mut select = connection.prepare_cached(COUNT_ENTRIES)?;
            select.query_row([most], |row| row.get::<_, i64>(0)).map(i64::cast_unsigned)
        })
        .await
    }
}

/// Adds a line to the audit log, in the transaction of the change that it describes.
pub(super) fn record(
    transaction: &Transaction<'_>,
    by: &Actor,
    entry: &NewAuditEntry,
) -> rusqlite::Result<()> {
    const INSERT_ENTRY: &str = "
        insert into audit_log (at, via, key_id, address, action, subject, details)
        values (?1, ?2, ?3, ?4, ?5, ?6, ?7)
    ";
    let values = params![
        by.at.as_millisecond(),
        by.via.as_str(),
        by.via.key_id(),
        by.address.map(|address| address.to_string()),
        entry.action,
        entry.subject,
        entry.details,
    ];
    expect_row("audit_log", transaction.execute(INSERT_ENTRY, values)?)
}

fn audit(
    connection: &Connection,
    before: Option<i64>,
    limit: u32,
) -> rusqlite::Result<Vec<AuditEntry>> {
    const SELECT_ENTRIES: &str = "
        select id, at, via, key_id, address, action, subject, details
          from audit_log
         where id < ?1
         order by id desc
         limit ?2
    ";
    connection
        .prepare_cached(SELECT_ENTRIES)?
        .query_map(params![before.unwrap_or(i64::MAX), limit], |row| {
            Ok(AuditEntry {
                id: row.get(0)?,
                at: time(row, 1)?,
                via: row.get(2)?,
                key_id: row.get(3)?,
                address: row.get(4)?,
                action: row.get(5)?,
                subject: row.get(6)?,
                details: stored_details(row.get(7)?),
            })
        })?
        .collect()
}
