//! API keys in PostgreSQL. The API, the command line and the keyring call it through `KeyStore`. Making or revoking a
//! key must give the keys a new version, or running servers do not notice it.

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use pisync_core::{DeviceId, GroupName, Timestamp};
use tokio_postgres::{Error, IsolationLevel, Row};

use super::{
    audit::record,
    connect::Object,
    rows::{optional_time, time},
    store::PostgresStore,
};
use crate::store::{
    Actor, ApiKey, KeyStore, Keys, NewKey, Revocation, StoreError, audit::NewAuditEntry,
    keys::stored_scope,
};

const SELECT_VERSION: &str = "select version from api_key_changes";

#[async_trait]
impl KeyStore for PostgresStore {
    async fn create_key(&self, key: &NewKey, by: &Actor) -> Result<i64, StoreError> {
        self.call(async |connection| create_key(connection, key, by).await).await
    }

    async fn revoke_key(&self, id: i64, by: &Actor) -> Result<Revocation, StoreError> {
        self.call(async |connection| revoke_key(connection, id, by).await).await
    }

    async fn keys_version(&self) -> Result<i64, StoreError> {
        self.call(async |connection| {
            let select = connection.prepare_cached(SELECT_VERSION).await?;
            connection.query_one(&select, &[]).await?.try_get(0)
        })
        .await
    }

    async fn keys(&self) -> Result<Keys, StoreError> {
        self.call(async |connection| keys(connection).await).await
    }

    async fn keys_used(&self, used: &[(i64, Timestamp)]) -> Result<(), StoreError> {
        const NOTE_USE: &str = "
            update api_keys k
               set last_used = used.at
              from unnest($1::bigint[], $2::timestamptz[]) used (id, at)
             where k.id = used.id
               and (k.last_used is null or k.last_used < used.at)
        ";
        let (ids, times): (Vec<_>, Vec<_>) =
            used.iter().map(|(id, at)| (*id, at.to_jiff())).unzip();
        self.call(async |connection| {
            let note = connection.prepare_cached(NOTE_USE).await?;
            connection.execute(&note, &[&ids, &times]).await.map(|_| ())
        })
        .await
    }
}

async fn create_key(connection: &mut Object, key: &NewKey, by: &Actor) -> Result<i64, Error> {
    const INSERT_KEY: &str = r#"
        insert into api_keys (hash, hint, name, scope, device_id, "group", created_at, expires_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        returning id
    "#;
    let transaction = connection.transaction().await?;
    let row = transaction
        .query_one(
            INSERT_KEY,
            &[
                &key.hash.as_slice(),
                &key.hint,
                &key.name,
                &key.scope.as_str(),
                &key.device_id.as_ref().map(DeviceId::as_str),
                &key.group.as_ref().map(GroupName::as_str),
                &by.at.to_jiff(),
                &key.expires_at.map(Timestamp::to_jiff),
            ],
        )
        .await?;
    let id = row.try_get(0)?;
    count_change(&transaction).await?;
    record(&transaction, by, &NewAuditEntry::key_created(id, key)).await?;
    transaction.commit().await?;
    Ok(id)
}

async fn revoke_key(connection: &mut Object, id: i64, by: &Actor) -> Result<Revocation, Error> {
    const IS_REVOKED: &str = "
        select revoked_at is not null from api_keys where id = $1 for update
    ";
    const REVOKE: &str = "update api_keys set revoked_at = $2 where id = $1 returning id";
    let transaction = connection.transaction().await?;
    let Some(row) = transaction.query_opt(IS_REVOKED, &[&id]).await? else {
        return Ok(Revocation::Unknown);
    };
    if row.try_get(0)? {
        return Ok(Revocation::Already);
    }
    // Fails when a trigger has dropped the change.
    transaction.query_one(REVOKE, &[&id, &by.at.to_jiff()]).await?;
    count_change(&transaction).await?;
    record(&transaction, by, &NewAuditEntry::key_revoked(id)).await?;
    transaction.commit().await?;
    Ok(Revocation::Revoked)
}

/// Gives the keys a new version that they cannot have had before, because its lower half is random. A standby that has
/// taken over may lack the last change. The next change there must not lead to the version of the lost change. The
/// upper half counts up, because servers from before 2026-11-25 ignore lower versions.
async fn count_change(transaction: &Transaction<'_>) -> Result<(), Error> {
    const CHANGE_VERSION: &str = "
        update api_key_changes
           set version = (((version >> 32) + 1) << 32)
                       | (hashtextextended(gen_random_uuid()::text, 0) & 4294967295)
        returning version
    ";
    transaction.query_one(CHANGE_VERSION, &[]).await.map(|_| ())
}

async fn keys(connection: &mut Object) -> Result<Keys, Error> {
    const SELECT_KEYS: &str = r#"
        select id, hash, hint, name, scope, device_id, "group", created_at, expires_at, revoked_at,
               last_used
          from api_keys
         order by id
    "#;
    let snapshot = connection
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    let version = snapshot.query_one(SELECT_VERSION, &[]).await?.try_get(0)?;
    let rows = snapshot.query(SELECT_KEYS, &[]).await?;
    Ok(Keys { version, keys: rows.iter().map(api_key).collect::<Result<_, _>>()? })
}

fn api_key(row: &Row) -> Result<ApiKey, Error> {
    Ok(ApiKey {
        id: row.try_get(0)?,
        // A hash of another length was not written by us. This value matches no key.
        hash: row.try_get::<_, Vec<u8>>(1)?.try_into().unwrap_or_default(),
        hint: row.try_get(2)?,
        name: row.try_get(3)?,
        scope: stored_scope(row.try_get(4)?),
        device_id: row.try_get(5)?,
        group: row.try_get(6)?,
        created_at: time(row, 7)?,
        expires_at: optional_time(row, 8)?,
        revoked_at: optional_time(row, 9)?,
        last_used: optional_time(row, 10)?,
    })
}
