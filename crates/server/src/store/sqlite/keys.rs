//! API keys in SQLite. The API, the command line and the keyring call it through `KeyStore`. Making or revoking a key
//! must give the keys a new version, or running servers do not notice it.

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use super::{
    audit::record,
    connection::expect_row,
    rows::{optional_time, time},
    store::SqliteStore,
};
use crate::store::{
    Actor, ApiKey, KeyStore, Keys, NewKey, Revocation, StoreError, audit::NewAuditEntry,
    keys::stored_scope,
};

#[async_trait]
impl KeyStore for SqliteStore {
    async fn create_key(&self, key: &NewKey, by: &Actor) -> Result<i64, StoreError> {
        let (key, by) = (key.clone(), *by);
        self.writer.call(move |writer| create_key(writer.connection(), &key, &by)).await
    }

    async fn revoke_key(&self, id: i64, by: &Actor) -> Result<Revocation, StoreError> {
        let by = *by;
        self.writer.call(move |writer| revoke_key(writer.connection(), id, &by)).await
    }

    async fn keys_version(&self) -> Result<i64, StoreError> {
        self.read(version).await
    }

    async fn keys(&self) -> Result<Keys, StoreError> {
        self.read(keys).await
    }

    async fn keys_used(&self, used: &[(i64, Timestamp)]) -> Result<(), StoreError> {
        let used = used.to_vec();
        self.writer.call(move |writer| keys_used(writer.connection(), &used)).await
    }
}

fn create_key(connection: &mut Connection, key: &NewKey, by: &Actor) -> rusqlite::Result<i64> {
    const INSERT_KEY: &str = r#"
        insert into api_keys (hash, hint, name, scope, device_id, "group", created_at, expires_at)
        values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
    "#;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let values = params![
        key.hash,
        key.hint,
        key.name,
        key.scope.as_str(),
        key.device_id.as_ref().map(DeviceId::as_str),
        key.group.as_ref().map(GroupName::as_str),
        by.at.as_millisecond(),
        key.expires_at.map(Timestamp::as_millisecond),
    ];
    expect_row("api_keys", transaction.execute(INSERT_KEY, values)?)?;
    let id = transaction.last_insert_rowid();
    count_change(&transaction)?;
    record(&transaction, by, &NewAuditEntry::key_created(id, key))?;
    transaction.commit()?;
    Ok(id)
}

fn revoke_key(connection: &mut Connection, id: i64, by: &Actor) -> rusqlite::Result<Revocation> {
    const IS_REVOKED: &str = "select revoked_at is not null from api_keys where id = ?1";
    const REVOKE: &str = "update api_keys set revoked_at = ?2 where id = ?1";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    match transaction.query_row(IS_REVOKED, [id], |row| row.get(0)).optional()? {
        None => return Ok(Revocation::Unknown),
        Some(true) => return Ok(Revocation::Already),
        Some(false) => {}
    }
    let revoked = transaction.execute(REVOKE, params![id, by.at.as_millisecond()])?;
    expect_row("api_keys", revoked)?;
    count_change(&transaction)?;
    record(&transaction, by, &NewAuditEntry::key_revoked(id))?;
    transaction.commit()?;
    Ok(Revocation::Revoked)
}

/// Gives the keys a new version that they cannot have had before, because its lower half is random. A restored file
/// lacks the last changes. The next change there must not lead to the version of a lost change. The upper half counts
/// up, as on PostgreSQL.
fn count_change(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    const CHANGE_VERSION: &str = "
        update api_key_changes
           set version = (((version >> 32) + 1) << 32) | (random() & 4294967295)
    ";
    expect_row("api_key_changes", transaction.execute(CHANGE_VERSION, [])?)
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("select version from api_key_changes")?
        .query_row([], |row| row.get(0))
}

fn keys(connection: &Connection) -> rusqlite::Result<Keys> {
    const SELECT_KEYS: &str = r#"
        select id, hash, hint, name, scope, device_id, "group", created_at, expires_at, revoked_at,
               last_used
          from api_keys
         order by id
    "#;
    let snapshot = connection.unchecked_transaction()?;
    let version = version(&snapshot)?;
    let keys =
        snapshot.prepare_cached(SELECT_KEYS)?.query_map([], api_key)?.collect::<Result<_, _>>()?;
    Ok(Keys { version, keys })
}

fn api_key(row: &Row<'_>) -> rusqlite::Result<ApiKey> {
    Ok(ApiKey {
        id: row.get(0)?,
        hash: row.get(1)?,
        hint: row.get(2)?,
        name: row.get(3)?,
        scope: stored_scope(&row.get::<_, String>(4)?),
        device_id: row.get(5)?,
        group: row.get(6)?,
        created_at: time(row, 7)?,
        expires_at: optional_time(row, 8)?,
        revoked_at: optional_time(row, 9)?,
        last_used: optional_time(row, 10)?,
    })
}

fn keys_used(connection: &mut Connection, used: &[(i64, Timestamp)]) -> rusqlite::Result<()> {
    const NOTE_USE: &str = "
        update api_keys set last_used = ?2 where id = ?1 and ifnull(last_used, ?2 - 1) < ?2
    ";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut note = transaction.prepare_cached(NOTE_USE)?;
    for (id, at) in used {
        note.execute(params![id, at.as_millisecond()])?;
    }
    drop(note);
    transaction.commit()
}
