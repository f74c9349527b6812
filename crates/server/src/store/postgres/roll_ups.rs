//! The roll-ups: sums by device and day, by hour of the entire fleet, and runs by group. `maintenance` aggregates events
//! into them in small steps, deletions subtract from them, and statistics read them. Whoever locks devices as well must
//! take the lock of `roll_up_state` first.
//!
//! The watermark is an instant. All events that were received up to it are aggregated. Several nodes commit in any
//! order, so it stays about a minute behind the present. A transaction that stores events below the watermark
//! aggregates them itself. Readers add the events above the watermark in the same snapshot, so answers are always
//! exact.

use std::time::Duration;

use deadpool_postgres::Transaction;
use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::{Client, Error, Row, Statement, types::ToSql};

use super::{
    aggregated_events::{
        DAY, DIALECT, HOUR, event_details, event_sums, lock_state, try_lock, watermark,
    },
    connect::Object,
    digests, groups,
    rows::snapshot,
    summaries,
};
use crate::store::{Figures, Sums, Window, day_details};

/// Events received longer ago than this are final, once older transactions have ended. A batch's transaction begins
/// within 55 s of its stamp (see `writer::LONGEST_WAIT`). The rest of the minute allows for servers whose clocks differ
/// a little. The writer itself aggregates batches that have waited longer, come from a slower clock, or belong to an
/// import (see [`may_be_below_watermark`]).
const FINAL_AFTER_MILLISECONDS: i64 = 60_000;

/// The start of the oldest transaction that may still store events. Such a transaction has written something, or waits
/// for a lock before it can. Readers and dumps do neither. A transaction that waits for a standby counts as well: its
/// rows are not visible yet, however long ago it was committed locally. Transactions of other roles are visible only to
/// members of `pg_read_all_stats`.
const OLDEST_WRITE: &str = "
    select min(xact_start)
      from pg_stat_activity
     where backend_type = 'client backend' and datname = current_database() and pid <> pg_backend_pid()
       and (backend_xid is not null or wait_event_type = 'Lock')
";

/// A batch may be below the watermark before it is committed, if it was received less than this after the last known
/// watermark. With equal clocks, batches are at least [`FINAL_AFTER_MILLISECONDS`] ahead of it. The rest allows for
/// clocks that differ by some seconds. One case is not detected: a slow clock's batch is in flight at the moment when
/// aggregation, having been behind, catches up.
const SAFE_AFTER_MILLISECONDS: i64 = 50_000;

/// How far an event's date may be ahead of its `received_at` so that a window still finds the event. The bound saves
/// searching earlier months. `MAX_CLOCK_SKEW_SECONDS` is 5 minutes by default.
pub(super) const LONGEST_LEAD_MILLISECONDS: i64 = 31 * 24 * 60 * 60 * 1000;

/// A step sums up a limited number of events. It can take long only if foreign SQL gave very many rows the same
/// `created_at`.
const STEP_TIMEOUT: &str = "set local statement_timeout = '10min'";

/// The maximum time of a step, including the network.
pub(super) const AGGREGATION_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// The parts of an insertion of sums: the columns, the sums of the events, and the addition to an existing row.
fn insertion() -> (String, String, String) {
    (Sums::names(), event_sums(), add())
}

/// The end of an insertion of sums, for rows that may exist already.
fn add() -> String {
    format!("do update set {}", Sums::add_to("stored"))
}

/// The end of an insertion of days, for rows that may exist already.
fn add_to_day() -> String {
    format!("{}, {}", add(), day_details::add_to_stored("least", "greatest"))
}

/// Adds events to the sums by day. `source`, the rest of a `from` clause, names the events.
fn aggregate_days_of(source: &str) -> String {
    let (names, event_sums, _) = insertion();
    let (details, event_details, add) = (day_details::names(), event_details(), add_to_day());
    format!(
        "insert into device_days as stored (device_id, day, {names}, {details})
         select device_id, {DAY}, {event_sums}, {event_details}
           from {source}
          group by 1, 2
          order by 1, 2
             on conflict (device_id, day) {add}"
    )
}

/// Adds the events that `source` names to the sums by hour, to the hours and days of groups, and to the totals. The source
/// is called `sync_events`. The row of the totals is locked last.
fn aggregate_hours_of(source: &str) -> String {
    let (names, event_sums, add) = insertion();
    let sums = Sums::sql(|column| format!("sum({column})::bigint"));
    let add_to_totals = Sums::sql(|column| {
        format!("{column} = {column} + (select coalesce(sum({column}), 0)::bigint from sums)")
    });
    format!(
        "with sums (hour, of_group, {names}) as materialized (
             select {HOUR}, {}, {event_sums} from {source} group by 1, 2
         ), by_group as (
             select of_group, hour, total_syncs as runs, failed_syncs as failed_runs from sums
         ), {}, hours as (
             insert into fleet_hours as stored (hour, {names})
             select hour, {sums}
               from sums
              where (select count(*) from group_days_added) >= 0
              group by hour
              order by hour
                 on conflict (hour) {add}
             returning hour
         )
         update fleet_totals set {add_to_totals}
          where (select count(*) from hours) > 0",
        DIALECT.group_of_event(),
        groups::add("by_group")
    )
}

/// Adds the totals up again from the hours, which deletions change. The state is locked.
pub(super) async fn recount_totals(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.batch_execute(&recount_totals_statement()).await
}

/// The statement of [`recount_totals`].
pub(super) fn recount_totals_statement() -> String {
    let sums = Sums::sql(|column| format!("coalesce(sum({column}), 0)::bigint"));
    let set = Sums::sql(|column| format!("{column} = excluded.{column}"));
    format!(
        "insert into fleet_totals (id, {}) select 1, {sums} from fleet_hours
             on conflict (id) do update set {set}",
        Sums::names()
    )
}

/// Whether the totals differ from the sums of the hours, or are missing.
pub(super) async fn totals_are_wrong(snapshot: &Transaction<'_>) -> Result<bool, Error> {
    let names = Sums::names();
    let sums = Sums::sql(|column| format!("coalesce(sum({column}), 0)::bigint"));
    let differ = format!(
        "select not exists (select {names} from fleet_totals intersect select {sums} from fleet_hours)"
    );
    snapshot.query_one(&differ, &[]).await?.try_get(0)
}

/// The sums of all events.
pub(super) async fn totals(snapshot: &Transaction<'_>) -> Result<Figures, Error> {
    let (names, event_sums) = (Sums::names(), event_sums());
    let sums = Sums::sql(|column| format!("coalesce(sum({column}), 0)::bigint"));
    let select = format!(
        "select {sums}
           from (
               select {names} from fleet_totals
               union all
               select {event_sums} from sync_events where created_at > $1
           ) sums"
    );
    let watermark = watermark(snapshot).await?;
    let row = snapshot.query_one(&select, &[&watermark]).await?;
    self::sums(&row).map(Figures::from)
}

/// The sums by day of the aggregated events that match `filter`, then the day, the device and the details.
pub(super) fn recounted_days(filter: &str) -> String {
    let (event_sums, event_details) = (event_sums(), event_details());
    format!(
        "select {event_sums}, {DAY}::timestamp at time zone 'UTC' as day, device_id, {event_details}
           from sync_events
          where {filter}
          group by day, device_id"
    )
}

/// The same by hour.
pub(super) fn recounted_hours(filter: &str) -> String {
    let event_sums = event_sums();
    format!("select {event_sums}, {HOUR} as hour from sync_events where {filter} group by hour")
}

/// Recomputes the sums of a device's days. The state is locked, and events are aggregated up to `watermark`.
pub(super) async fn aggregate_days_again(
    transaction: &Transaction<'_>,
    device_id: &str,
    watermark: Option<Timestamp>,
) -> Result<(), Error> {
    let aggregate = aggregate_days_of("sync_events where device_id = $1 and created_at <= $2");
    let watermark = watermark.unwrap_or(Timestamp::MIN).to_jiff();
    transaction.execute("delete from device_days where device_id = $1", &[&device_id]).await?;
    transaction.execute(&aggregate, &[&device_id, &watermark]).await?;
    groups::count_device_again(transaction, device_id, watermark).await?;
    digests::note_stale(transaction, device_id).await
}

/// Adds a device's aggregated events to the sums by hour and by group. The state is locked.
pub(super) async fn aggregate_hours_again(
    transaction: &Transaction<'_>,
    device_id: &str,
    watermark: Option<Timestamp>,
) -> Result<(), Error> {
    let aggregate = aggregate_hours_of("sync_events where device_id = $1 and created_at <= $2");
    let watermark = watermark.unwrap_or(Timestamp::MIN).to_jiff();
    transaction.execute(&aggregate, &[&device_id, &watermark]).await.map(|_| ())
}

/// Deletes a device's events with `created_at` up to `received_until`, and subtracts them from the sums by day and
/// hour. With `last` (date and id), it deletes only the events up to that one, in the order of the index. Answers how
/// many. The state is locked.
pub(super) async fn delete_events(
    transaction: &Transaction<'_>,
    device_id: &str,
    received_until: Timestamp,
    last: Option<(jiff::Timestamp, i64)>,
    watermark: Option<Timestamp>,
) -> Result<u64, Error> {
    let up_to = if last.is_some() { "and (timestamp, id) <= ($4, $5)" } else { "" };
    let (names, event_sums, add) = insertion();
    let (details, event_details, add_to_day) =
        (day_details::names(), event_details(), add_to_day());
    let (negative, negative_details) = (Sums::negative(), day_details::negative());
    let negative_sums = Sums::sql(|column| format!("-sum({column})::bigint"));
    let delete = format!(
        "with gone as (
            delete from sync_events
             where device_id = $1 and created_at <= $2 {up_to}
         returning id, device_id, timestamp, total_files_synced, total_errors, internet_speed, duration_seconds,
                   bytes_synced, created_at
         ), by_day (
            day, {names}, {details}
         ) as (
            select {DAY}, {event_sums}, {event_details} from gone where created_at <= $3 group by 1
         ), by_hour (
            hour, of_group, {names}
         ) as (
            select {HOUR}, {}, {event_sums} from gone sync_events where created_at <= $3 group by 1, 2
         ), by_group as (
            select of_group, hour, -total_syncs as runs, -failed_syncs as failed_runs from by_hour
         ), days as (
            insert into device_days as stored (device_id, day, {names}, {details})
            select $1::text, day, {negative}, {negative_details} from by_day order by day
                on conflict (device_id, day) {add_to_day}
         ), day_groups as (
            {}
         ), {}, hours as (
            insert into fleet_hours as stored (hour, {names})
            select hour, {negative_sums} from by_hour group by hour order by hour
                on conflict (hour) {add}
         )
         select count(*) from gone",
        DIALECT.group_of_event(),
        DIALECT.add_day_groups_of("gone sync_events where created_at <= $3", "-"),
        groups::add("by_group")
    );
    let (received_until, watermark) =
        (received_until.to_jiff(), watermark.unwrap_or(Timestamp::MIN).to_jiff());
    let deleted = match &last {
        None => transaction.query_one(&delete, &[&device_id, &received_until, &watermark]).await?,
        Some((timestamp, id)) => {
            let parameters: [&(dyn ToSql + Sync); 5] =
                [&device_id, &received_until, &watermark, timestamp, id];
            transaction.query_one(&delete, &parameters).await?
        }
    };
    digests::note_stale(transaction, device_id).await?;
    deleted.try_get::<_, i64>(0).map(i64::cast_unsigned)
}

/// The events of a batch that are below the watermark, as of this statement. `received_at` is an empty array when
/// events arrive now, and nulls take its place; so it is with the other columns that may be empty. Ids are as high as can
/// be: no move between groups was noted after these events.
const BELOW_WATERMARK: &str = "(
    select 9223372036854775807 as id, device_id, timestamp, total_files_synced, total_errors,
           speed_hundredths * 0.01 as internet_speed, milliseconds * 0.001 as duration_seconds, bytes_synced,
           coalesce(received_at, $7) as created_at
      from unnest(
               $1::text[], $2::timestamptz[], $3::integer[], $4::integer[], $5::bigint[],
               $6::timestamptz[], $8::bigint[], $9::bigint[]
           ) as batch (
               device_id, timestamp, total_files_synced, total_errors, speed_hundredths, received_at,
               milliseconds, bytes_synced
           )
     where coalesce(received_at, $7) <= (select folded_until from roll_up_state)
) sync_events where true";

/// The number of parameters of the statements about them.
pub(super) const BELOW_WATERMARK_PARAMETERS: usize = 9;

/// Begins the transaction of a writer whose events may be below the watermark. Its lock stops aggregation until the
/// transaction ends; other writers may hold it at the same time. Later statements see the current watermark.
pub(super) const BEGIN_WITHOUT_AGGREGATION: &str = "begin; select from roll_up_state for share";

/// The statements that such a writer runs once its events are inserted.
pub(super) struct BelowWatermarkStatements {
    aggregate_days: Statement,
    aggregate_day_groups: Statement,
    aggregate_hours: Statement,
    note_late: Statement,
    note_stale: Statement,
}

impl BelowWatermarkStatements {
    pub(super) async fn prepare(client: &Client) -> Result<Self, Error> {
        let source = BELOW_WATERMARK;
        let day_groups = DIALECT.add_day_groups_of(source, "");
        let late = digests::note_late_of(source);
        Ok(Self {
            aggregate_days: client.prepare(&aggregate_days_of(source)).await?,
            aggregate_day_groups: client.prepare(&day_groups).await?,
            aggregate_hours: client.prepare(&aggregate_hours_of(source)).await?,
            note_late: client.prepare(&late).await?,
            note_stale: client.prepare(&summaries::note_stale_of(source)).await?,
        })
    }

    /// Aggregates the events in `parameters` that are below the watermark.
    pub(super) async fn aggregate(
        &self,
        client: &Client,
        parameters: &[&(dyn ToSql + Sync); BELOW_WATERMARK_PARAMETERS],
    ) -> Result<(), Error> {
        client.execute(&self.aggregate_days, parameters).await?;
        client.execute(&self.aggregate_day_groups, parameters).await?;
        client.execute(&self.note_late, parameters).await?;
        client.execute(&self.note_stale, parameters).await?;
        client.execute(&self.aggregate_hours, parameters).await.map(|_| ())
    }
}

/// Aggregates the events received in the next `milliseconds`. False when there are no more final events, or another
/// node is aggregating.
pub(super) async fn aggregate(
    connection: &mut Object,
    now: Timestamp,
    milliseconds: i64,
) -> Result<bool, Error> {
    const OLDEST: &str = "select min(created_at) from sync_events";
    let transaction = connection.transaction().await?;
    transaction.batch_execute(STEP_TIMEOUT).await?;
    if !try_lock(&transaction).await? {
        return Ok(false);
    }
    // Read before the events. The events are read in later snapshots, which see every transaction that ends in between.
    let oldest_write = transaction.query_one(OLDEST_WRITE, &[]).await?;
    let oldest_write =
        oldest_write.try_get::<_, Option<jiff::Timestamp>>(0)?.map(Timestamp::truncate);
    let last = final_until(oldest_write.map_or(now, |oldest| oldest.min(now)));
    let watermark = match lock_state(&transaction).await? {
        Some(watermark) => Some(watermark),
        // The first aggregation of all begins just before the oldest event.
        None => transaction
            .query_one(OLDEST, &[])
            .await?
            .try_get::<_, Option<jiff::Timestamp>>(0)?
            .map(|oldest| Timestamp::truncate(oldest).saturating_add_milliseconds(-1)),
    };
    let watermark = watermark.unwrap_or(last);
    if watermark > last {
        return Ok(false);
    }
    let until = watermark.saturating_add_milliseconds(milliseconds).min(last);
    aggregate_between(&transaction, watermark, until).await?;
    transaction.commit().await?;
    Ok(until < last)
}

/// Every event received up to this time is committed or given up, unless a transaction that began before `now` is still
/// in progress.
pub(super) fn final_until(now: Timestamp) -> Timestamp {
    now.saturating_add_milliseconds(-FINAL_AFTER_MILLISECONDS)
}

/// Aggregates the events received after `after` and up to `until`. The state is locked, or nobody else uses the
/// database.
pub(super) async fn aggregate_between(
    transaction: &tokio_postgres::Transaction<'_>,
    after: Timestamp,
    until: Timestamp,
) -> Result<(), Error> {
    const EVENTS: &str = "sync_events where created_at > $1 and created_at <= $2";
    let (after, until) = (after.to_jiff(), until.to_jiff());
    let day_groups = DIALECT.add_day_groups_of(EVENTS, "");
    transaction.execute(&aggregate_days_of(EVENTS), &[&after, &until]).await?;
    transaction.execute(&day_groups, &[&after, &until]).await?;
    transaction.execute(&aggregate_hours_of(EVENTS), &[&after, &until]).await?;
    transaction.execute(&digests::note_late_of(EVENTS), &[&after, &until]).await?;
    transaction.execute("update roll_up_state set folded_until = $1", &[&until]).await?;
    Ok(())
}

/// Whether events that arrive at `received` may be below the watermark before they are committed. `watermark` is a
/// value of some seconds ago.
pub(super) fn may_be_below_watermark(received: Timestamp, watermark: Option<Timestamp>) -> bool {
    watermark.is_some_and(|watermark| {
        received < watermark.saturating_add_milliseconds(SAFE_AFTER_MILLISECONDS)
    })
}

/// Subtracts a device that will be deleted from the fleet's sums. `device_days` is deleted together with the device.
/// The state and the device are locked.
pub(super) async fn forget(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    watermark: Option<Timestamp>,
) -> Result<(), Error> {
    // The events that are kept are subtracted hour by hour. The rest of the device's days comes from events that were
    // dropped, whose hours are unknown. It is subtracted from the first hour of each day. Sums of entire days stay
    // correct, and queries use only entire days that far back.
    let (names, event_sums, add) = insertion();
    let negative = Sums::negative();
    let negative_sums = Sums::sql(|column| format!("-sum({column})"));
    let subtract = format!(
        "with raw (
            hour, {names}
         ) as materialized (
            select {HOUR}, {event_sums}
              from sync_events
             where device_id = $1 and created_at <= $2
             group by 1
         )
         insert into fleet_hours as stored (hour, {names})
         select hour, {negative_sums}
           from (
               select * from raw
               union all
               select day::timestamp at time zone 'UTC', {names}
                 from device_days
                where device_id = $1
               union all
               select date_trunc('day', hour, 'UTC'), {negative}
                 from raw
           ) deltas
          group by hour
             on conflict (hour) {add}"
    );
    let Some(watermark) = watermark else { return Ok(()) };
    let watermark = watermark.to_jiff();
    transaction.execute(&subtract, &[&device_id.as_str(), &watermark]).await?;
    groups::forget(transaction, device_id.as_str(), watermark).await
}

/// The sums of the entire fleet's events within a window.
pub(super) async fn window_figures(
    connection: &mut Object,
    window: &Window,
) -> Result<Figures, Error> {
    let (names, event_sums) = (Sums::names(), event_sums());
    let sums = Sums::sql(|column| format!("coalesce(sum({column}), 0)::bigint"));
    let select = format!(
        "select {sums}
           from (
               select {names}
                 from fleet_hours
                where hour >= $1 and hour < $2
               union all
               select {event_sums}
                 from sync_events
                where created_at > $3 and timestamp >= $1 and timestamp < $2
           ) sums"
    );
    let snapshot = snapshot(connection).await?;
    let watermark = watermark(&snapshot).await?;
    let (from, until) = (window.from().to_jiff(), window.until().to_jiff());
    let row = snapshot.query_one(&select, &[&from, &until, &watermark]).await?;
    self::sums(&row).map(Figures::from)
}

/// Reads a row that begins with the sums.
pub(super) fn sums(row: &Row) -> Result<Sums, Error> {
    Sums::read(|column| row.try_get(column))
}
