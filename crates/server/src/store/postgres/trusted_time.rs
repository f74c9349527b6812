//! Stores the time by which old events are deleted, in one row, and reads PostgreSQL's own clock. `maintenance` calls
//! it. `store::trusted_time` decides; nothing here may.

use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use pisync_core::Timestamp;
use tokio_postgres::{Client, Error, Row};

use super::{connect::Object, store::PostgresStore};
use crate::store::{
    StoreError, TrustedTime, TrustedTimeStore,
    trusted_time::{AGREEMENT_MILLISECONDS, WITNESSES, Witnesses},
};

#[async_trait]
impl TrustedTimeStore for PostgresStore {
    async fn trust_time(&self, now: Timestamp, ran: Duration) -> Result<TrustedTime, StoreError> {
        self.call(async |connection| advance(connection, now, ran).await).await
    }

    async fn trusted_time(&self) -> Result<Option<TrustedTime>, StoreError> {
        self.call(async |connection| read(connection).await).await
    }

    async fn database_time(&self) -> Result<Option<Timestamp>, StoreError> {
        self.call(async |connection| database_time(connection).await).await.map(Some)
    }
}

/// Advances the time by which old events are deleted, and answers it.
pub(super) async fn advance(
    connection: &mut Object,
    now: Timestamp,
    ran: Duration,
) -> Result<TrustedTime, Error> {
    // Servers that find no row at the same moment wait here for each other.
    const ADD: &str = "
        insert into trusted_time (id, until, seen, doubted)
        select 1, $1::timestamptz, $2::timestamptz, 0
         where not exists (select from trusted_time)
            on conflict (id) do nothing
    ";
    const NEWEST: &str = "select max(last_received) from device_jobs";
    const SELECT: &str = "select until, seen, doubted from trusted_time for update";
    const EXISTS: &str = "select exists (select from trusted_time)";
    const WRITE: &str = "update trusted_time set until = $1, seen = $2, doubted = $3";
    let transaction = connection.transaction().await?;
    if !transaction.query_one(EXISTS, &[]).await?.try_get::<_, bool>(0)? {
        let newest: Option<jiff::Timestamp> =
            transaction.query_one(NEWEST, &[]).await?.try_get(0)?;
        let first = TrustedTime::first(newest.map(Timestamp::truncate), now);
        transaction.execute(ADD, &[&first.until.to_jiff(), &first.seen.to_jiff()]).await?;
    }
    let before = trusted_time(&transaction.query_one(SELECT, &[]).await?)?;
    let witnesses = if before.needs_witnesses(now, ran) {
        witnesses(&transaction, now).await?
    } else {
        Witnesses::default()
    };
    let after = before.advance(now, ran, witnesses);
    let (until, seen) = (after.until.to_jiff(), after.seen.to_jiff());
    transaction.execute(WRITE, &[&until, &seen, &after.doubted]).await?;
    transaction.commit().await?;
    Ok(after)
}

/// The last believed time.
pub(super) async fn read(client: &Client) -> Result<Option<TrustedTime>, Error> {
    const SELECT: &str = "select until, seen, doubted from trusted_time";
    client.query_opt(SELECT, &[]).await?.as_ref().map(trusted_time).transpose()
}

fn trusted_time(row: &Row) -> Result<TrustedTime, Error> {
    Ok(TrustedTime {
        until: Timestamp::truncate(row.try_get(0)?),
        seen: Timestamp::truncate(row.try_get(1)?),
        doubted: row.try_get(2)?,
    })
}

async fn witnesses(transaction: &Transaction<'_>, now: Timestamp) -> Result<Witnesses, Error> {
    // An event whose date equals its `received_at` was dated by the server itself.
    const WITNESSES_OF: &str = "
        select count(distinct device_id),
               count(distinct device_id) filter (
                   where timestamp between created_at - $3::bigint * interval '1 millisecond'
                                       and created_at + $3::bigint * interval '1 millisecond'
                     and timestamp <> created_at
               )
          from (
                   select device_id, timestamp, created_at
                     from sync_events
                    where created_at between $1 and $2
                    limit $4
               ) latest
    ";
    let since = now.saturating_add_milliseconds(-AGREEMENT_MILLISECONDS).to_jiff();
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
        [&since, &now.to_jiff(), &AGREEMENT_MILLISECONDS, &WITNESSES];
    let row = transaction.query_one(WITNESSES_OF, &parameters).await?;
    Ok(Witnesses { devices: row.try_get(0)?, agreeing: row.try_get(1)? })
}

/// The present by PostgreSQL's clock.
pub(super) async fn database_time(client: &Client) -> Result<Timestamp, Error> {
    let time = client.query_one("select clock_timestamp()", &[]).await?.try_get(0)?;
    Ok(Timestamp::truncate(time))
}
