//! Stores the time by which old events are deleted, in one row. `maintenance` calls it. `store::trusted_time` decides;
//! nothing here may.

use std::time::Duration;

use async_trait::async_trait;
use pisync_core::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};

use super::{
    rows::{optional_time, time},
    store::SqliteStore,
};
use crate::store::{
    StoreError, TrustedTime, TrustedTimeStore,
    trusted_time::{AGREEMENT_MILLISECONDS, WITNESSES, Witnesses},
};

#[async_trait]
impl TrustedTimeStore for SqliteStore {
    async fn trust_time(&self, now: Timestamp, ran: Duration) -> Result<TrustedTime, StoreError> {
        self.writer.call(move |writer| advance(&mut writer.connection, now, ran)).await
    }

    async fn trusted_time(&self) -> Result<Option<TrustedTime>, StoreError> {
        self.read(read).await
    }

    async fn database_time(&self) -> Result<Option<Timestamp>, StoreError> {
        Ok(None)
    }
}

/// Advances the time by which old events are deleted, and answers it.
pub(super) fn advance(
    connection: &mut Connection,
    now: Timestamp,
    ran: Duration,
) -> rusqlite::Result<TrustedTime> {
    const WRITE: &str = "
        insert into trusted_time (id, until, seen, doubted) values (1, ?1, ?2, ?3)
            on conflict (id) do update
           set until = excluded.until, seen = excluded.seen, doubted = excluded.doubted
    ";
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let before = match read(&transaction)? {
        Some(stored) => stored,
        None => TrustedTime::first(newest(&transaction)?, now),
    };
    let witnesses = if before.needs_witnesses(now, ran) {
        witnesses(&transaction, now)?
    } else {
        Witnesses::default()
    };
    let after = before.advance(now, ran, witnesses);
    transaction.execute(
        WRITE,
        params![after.until.as_millisecond(), after.seen.as_millisecond(), after.doubted],
    )?;
    transaction.commit()?;
    Ok(after)
}

/// The last believed time.
pub(super) fn read(connection: &Connection) -> rusqlite::Result<Option<TrustedTime>> {
    const SELECT: &str = "select until, seen, doubted from trusted_time";
    let trusted_time = |row: &Row<'_>| {
        Ok(TrustedTime { until: time(row, 0)?, seen: time(row, 1)?, doubted: row.get(2)? })
    };
    connection.query_row(SELECT, [], trusted_time).optional()
}

/// When the last event was received.
fn newest(connection: &Connection) -> rusqlite::Result<Option<Timestamp>> {
    const NEWEST: &str = "select max(last_received) from device_jobs";
    connection.query_row(NEWEST, [], |row| optional_time(row, 0))
}

fn witnesses(connection: &Connection, now: Timestamp) -> rusqlite::Result<Witnesses> {
    // An event whose date equals its `received_at` was dated by the server itself.
    const WITNESSES_OF: &str = "
        select count(distinct device),
               count(distinct iif(
                   abs(timestamp - created_at) <= ?2 and timestamp <> created_at, device, null
               ))
          from (select device, timestamp, created_at from sync_events order by id desc limit ?3)
         where created_at between ?1 - ?2 and ?1
    ";
    let parameters = params![now.as_millisecond(), AGREEMENT_MILLISECONDS, WITNESSES];
    connection.query_row(WITNESSES_OF, parameters, |row| {
        Ok(Witnesses { devices: row.get(0)?, agreeing: row.get(1)? })
    })
}
