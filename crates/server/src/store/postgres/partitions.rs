//! Monthly partitions of `sync_events` by `created_at`, made ahead of need.

use jiff::{ToSpan, civil::Date, tz::TimeZone};
use pisync_core::Timestamp;
use tokio_postgres::Client;

use super::connect::store_error;
use crate::store::StoreError;

/// Months beyond the present one to have ready: a server that nobody looks after for two months still
/// has somewhere to put its events, and each node looks every hour.
const MONTHS_AHEAD: i32 = 2;

/// How long to wait for the locks that attaching needs. Ingest waits behind a waiting lock, so this is
/// short, and the next round tries again.
const LOCK_TIMEOUT: &str = "2s";

/// Any number that nobody else uses for an advisory lock: "pisync" and a number for the purpose.
const PARTITION_LOCK: i64 = 0x7069_7379_6e63_0002;

/// The first day of the month in which `instant` lies, in UTC.
pub(super) fn month_of(instant: Timestamp) -> Date {
    instant.to_jiff().to_zoned(TimeZone::UTC).date().first_of_month()
}

/// Makes the partitions of this month and those to come.
pub(super) async fn ensure_ahead(client: &mut Client, now: Timestamp) -> Result<(), StoreError> {
    for ahead in 0..=MONTHS_AHEAD {
        if let Ok(month) = month_of(now).checked_add(ahead.months()) {
            ensure(client, month).await?;
        }
    }
    Ok(())
}

/// Makes the partition of the month that begins with `month`, if it is missing.
pub(super) async fn ensure(client: &mut Client, month: Date) -> Result<(), StoreError> {
    create(client, month).await.map_err(store_error)
}

async fn create(client: &mut Client, month: Date) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    if exists(transaction.client(), month).await? {
        return Ok(());
    }
    transaction.execute("select pg_advisory_xact_lock($1)", &[&PARTITION_LOCK]).await?;
    transaction.batch_execute(&format!("set local lock_timeout = '{LOCK_TIMEOUT}'")).await?;
    // Another node may have made it while we waited.
    create_within(transaction.client(), month).await?;
    transaction.commit().await
}

/// Makes the partition of the month that begins with `month`, if it is missing, in the transaction under
/// way, which keeps others from doing the same.
pub(super) async fn create_within(
    client: &Client,
    month: Date,
) -> Result<(), tokio_postgres::Error> {
    let Ok(end) = month.checked_add(1.month()) else { return Ok(()) };
    if exists(client, month).await? {
        return Ok(());
    }
    let name = name_of(month);
    // A table of its own first, attached then: `create table … partition of` would lock the parent
    // against everything, a long export included. The check spares attaching a scan.
    let statements = format!(
        "create table if not exists {name} (
             like sync_events including defaults including comments,
             constraint {name}_month check (
                 created_at >= '{month} 00:00+00' and created_at < '{end} 00:00+00')
         );
         alter table sync_events attach partition {name}
             for values from ('{month} 00:00+00') to ('{end} 00:00+00');
         alter table {name} drop constraint if exists {name}_month;"
    );
    client.batch_execute(&statements).await
}

async fn exists(client: &Client, month: Date) -> Result<bool, tokio_postgres::Error> {
    const EXISTS: &str = "
        select exists (
            select from pg_inherits
             where inhparent = 'sync_events'::regclass and inhrelid = to_regclass($1))
    ";
    client.query_one(EXISTS, &[&name_of(month)]).await?.try_get(0)
}

fn name_of(month: Date) -> String {
    format!("sync_events_{}", month.strftime("%Y_%m"))
}
