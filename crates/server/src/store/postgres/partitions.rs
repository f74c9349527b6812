//! Makes monthly partitions of `sync_events` by `created_at`, ahead of need. `maintenance`, the writer and copies call
//! it. It must never hold a lock for long, because ingest waits behind it.

use jiff::{ToSpan, civil::Date, tz::TimeZone};
use pisync_core::Timestamp;
use tokio_postgres::Client;

use super::{
    errors::store_error,
    locks::{EXPIRY_LOCK, PARTITION_LOCK},
};
use crate::store::StoreError;

/// Months to have ready beyond the present one. A server that nobody attends to for two months still has a place for
/// its events. Each node checks every hour.
const MONTHS_AHEAD: i32 = 2;

/// How long to wait for the locks that attaching needs. Ingest waits behind a waiting lock. The limit is therefore
/// short, and the next round tries again.
const LOCK_TIMEOUT: &str = "2s";

/// The first day of the month in which `instant` lies, in UTC.
pub(super) fn month_of(instant: Timestamp) -> Date {
    instant.to_jiff().to_zoned(TimeZone::UTC).date().first_of_month()
}

/// This month and the following months that need partitions.
pub(super) fn months_ahead(now: Timestamp) -> impl Iterator<Item = Date> {
    (0..=MONTHS_AHEAD).filter_map(move |ahead| month_of(now).checked_add(ahead.months()).ok())
}

/// Makes the partitions of these months.
pub(super) async fn ensure_ahead(client: &mut Client, now: Timestamp) -> Result<(), StoreError> {
    for month in months_ahead(now) {
        ensure(client, month).await?;
    }
    Ok(())
}

/// Makes the partition of the month that begins with `month`, if it is missing.
pub(super) async fn ensure(client: &mut Client, month: Date) -> Result<(), StoreError> {
    let Some(partition) = Partition::of(month) else { return Ok(()) };
    create(client, &partition).await.map_err(store_error)
}

/// The table of a month's events. It is made as a separate table and attached then. `create table … partition of` would
/// lock the parent against everything, even a long export.
pub(super) struct Partition {
    pub(super) table: String,
    first: Date,
    /// The first day of the next month.
    end: Date,
}

impl Partition {
    /// The partition of the month that begins with `first`; `None` for the last month of the calendar.
    pub(super) fn of(first: Date) -> Option<Self> {
        let end = first.checked_add(1.month()).ok()?;
        Some(Self { table: format!("sync_events_{}", first.strftime("%Y_%m")), first, end })
    }

    /// The first day of the month.
    pub(super) fn month(&self) -> Date {
        self.first
    }

    /// The month's beginning and end, as SQL text.
    pub(super) fn bounds(&self) -> (String, String) {
        (format!("{} 00:00+00", self.first), format!("{} 00:00+00", self.end))
    }

    /// Makes the table. Its check constraint saves a scan when it is attached.
    pub(super) fn create(&self) -> String {
        let (table, (first, end)) = (&self.table, self.bounds());
        format!(
            "create table if not exists {table} (
                 like sync_events including defaults including comments,
                 constraint {table}_month check (created_at >= '{first}' and created_at < '{end}')
             );"
        )
    }

    /// Attaches it as a partition.
    pub(super) fn attach(&self) -> String {
        let (table, (first, end)) = (&self.table, self.bounds());
        format!(
            "alter table sync_events attach partition {table} for values from ('{first}') to ('{end}');
             alter table {table} drop constraint if exists {table}_month;"
        )
    }
}

async fn create(client: &mut Client, partition: &Partition) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    if state(transaction.client(), partition).await? == State::Attached {
        return Ok(());
    }
    transaction.batch_execute(&format!("set local lock_timeout = '{LOCK_TIMEOUT}'")).await?;
    transaction.execute("select pg_advisory_xact_lock($1)", &[&PARTITION_LOCK]).await?;
    // Another node may have made it while we waited.
    create_within(transaction.client(), partition).await?;
    transaction.commit().await
}

/// Makes the partition, if it is missing, in the caller's transaction. That transaction must keep others from doing the
/// same.
pub(super) async fn create_within(
    client: &Client,
    partition: &Partition,
) -> Result<(), tokio_postgres::Error> {
    let mut found = state(client, partition).await?;
    if matches!(found, State::Leaving | State::Detached) {
        // With this lock, any process that was about to drop the partition has done so, or was killed.
        client.execute("select pg_advisory_xact_lock($1)", &[&EXPIRY_LOCK]).await?;
        found = state(client, partition).await?;
    }
    match found {
        State::Attached => return Ok(()),
        State::Leaving => {
            let table = &partition.table;
            let finish = format!("alter table sync_events detach partition {table} finalize");
            client.batch_execute(&finish).await?;
        }
        State::Detached | State::Missing => {}
    }
    client.batch_execute(&partition.create()).await?;
    client.batch_execute(&partition.attach()).await
}

/// The state of a month's partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Queries find its rows, and new rows go there.
    Attached,
    /// It is being detached and takes no more rows. If detaching is interrupted, it stays in this state.
    Leaving,
    /// It is a separate table, perhaps about to be dropped.
    Detached,
    Missing,
}

async fn state(client: &Client, partition: &Partition) -> Result<State, tokio_postgres::Error> {
    const STATE: &str = "
        select to_regclass($1) is not null,
               (select inhdetachpending from pg_inherits
                 where inhparent = 'sync_events'::regclass and inhrelid = to_regclass($1))
    ";
    let row = client.query_one(STATE, &[&partition.table]).await?;
    Ok(match (row.try_get(0)?, row.try_get(1)?) {
        (_, Some(false)) => State::Attached,
        (_, Some(true)) => State::Leaving,
        (true, None) => State::Detached,
        (false, None) => State::Missing,
    })
}
