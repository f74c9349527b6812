//! The roll-ups: sums by device and day, and by hour of the entire fleet. `maintenance` aggregates events into them in
//! small steps, deletions subtract from them, and statistics read them. Whoever locks devices as well must take the
//! lock of `roll_up_state` first.
//!
//! The watermark is an instant. All events that were received up to it are aggregated. Several nodes commit in any
//! order, so it stays about a minute behind the present. A transaction that stores events below the watermark
//! aggregates them itself. Readers add the events above the watermark in the same snapshot, so answers are always
//! exact.

use std::time::Duration;

use deadpool_postgres::Transaction;
use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::{Client, Error, Row, Statement, types::ToSql};

use super::{connect::Object, locks::ROLL_UP_LOCK, rows::snapshot, summaries};
use crate::store::{Figures, Sums, Window};

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

/// SQL for the sums of rows of `sync_events`, in the order of [`Sums::COLUMNS`].
const EVENT_SUMS: [&str; Sums::COUNT] = [
    "count(*)",
    "count(*) filter (where total_errors > 0)",
    "coalesce(sum(total_files_synced), 0)::bigint",
    "coalesce(sum(total_errors), 0)::bigint",
    "coalesce(sum(internet_speed * 100), 0)::bigint",
    "count(internet_speed)",
];

/// The sums of rows of `sync_events`, with commas between.
pub(super) fn event_sums() -> String {
    EVENT_SUMS.join(", ")
}

/// The same, each under the name of its column.
pub(super) fn named_event_sums() -> String {
    let named = EVENT_SUMS.iter().zip(Sums::COLUMNS);
    named.map(|(sum, column)| format!("{sum} as {column}")).collect::<Vec<_>>().join(", ")
}

/// The parts of an insertion of sums: the columns, the sums of the events, and the addition to an existing row.
fn insertion() -> (String, String, String) {
    (Sums::names(), event_sums(), add())
}

const DAY: &str = "(timestamp at time zone 'UTC')::date";
const HOUR: &str = "date_trunc('hour', timestamp, 'UTC')";

/// The end of an insertion of sums, for rows that may exist already.
fn add() -> String {
    format!("do update set {}", Sums::add_to("stored"))
}

/// Adds events to the sums by day. `source`, the rest of a `from` clause, names the events.
fn aggregate_days_of(source: &str) -> String {
    let (names, event_sums, add) = insertion();
    format!(
        "insert into device_days as stored (device_id, day, {names})
         select device_id, {DAY}, {event_sums}
           from {source}
          group by 1, 2
          order by 1, 2
             on conflict (device_id, day) {add}"
    )
}

/// Adds the events that `source` names to the sums by hour, and to the totals. The row of the totals is locked last.
fn aggregate_hours_of(source: &str) -> String {
    let (names, event_sums, add) = insertion();
    let add_to_totals = Sums::sql(|column| {
        format!("{column} = {column} + (select coalesce(sum({column}), 0)::bigint from sums)")
    });
    format!(
        "with sums (hour, {names}) as materialized (
             select {HOUR}, {event_sums} from {source} group by 1
         ), hours as (
             insert into fleet_hours as stored (hour, {names})
             select * from sums order by hour
                 on conflict (hour) {add}
             returning hour
         )
         update fleet_totals set {add_to_totals}
          where (select count(*) from hours) > 0"
    )
}

/// Adds the totals up again from the hours, which deletions change. The state is locked.
pub(super) async fn recount_totals(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.batch_execute(&recount_totals_statement()).await
}

/// The statement of [`recount_totals`].
pub(super) fn recount_totals_statement() -> String {
    let sums = Sums::sql(|column| format!("coalesce(sum({column}), 0)::bigint"));
    format!("update fleet_totals set ({}) = (select {sums} from fleet_hours)", Sums::names())
}

/// Whether the totals differ from the sums of the hours.
pub(super) async fn totals_are_wrong(snapshot: &Transaction<'_>) -> Result<bool, Error> {
    let names = Sums::names();
    let sums = Sums::sql(|column| format!("coalesce(sum({column}), 0)::bigint"));
    let differ = format!(
        "select exists (select {names} from fleet_totals except select {sums} from fleet_hours)"
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

/// The sums by day of the aggregated events that match `filter`, then the day and the device.
pub(super) fn recounted_days(filter: &str) -> String {
    let event_sums = event_sums();
    format!(
        "select {event_sums}, {DAY}::timestamp at time zone 'UTC' as day, device_id
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
    transaction.execute(&aggregate, &[&device_id, &watermark]).await.map(|_| ())
}

/// Adds a device's aggregated events to the sums by hour. The state is locked.
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
    let negative = Sums::negative();
    let delete = format!(
        "with gone as (
            delete from sync_events
             where device_id = $1 and created_at <= $2 {up_to}
         returning timestamp, total_files_synced, total_errors, internet_speed, created_at
         ), by_day (
            day, {names}
         ) as (
            select {DAY}, {event_sums} from gone where created_at <= $3 group by 1
         ), by_hour (
            hour, {names}
         ) as (
            select {HOUR}, {event_sums} from gone where created_at <= $3 group by 1
         ), days as (
            insert into device_days as stored (device_id, day, {names})
            select $1::text, day, {negative} from by_day order by day
                on conflict (device_id, day) {add}
         ), hours as (
            insert into fleet_hours as stored (hour, {names})
            select hour, {negative} from by_hour order by hour
                on conflict (hour) {add}
         )
         select count(*) from gone"
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
    deleted.try_get::<_, i64>(0).map(i64::cast_unsigned)
}

/// The events of a batch that are below the watermark, as of this statement. `received_at` is an empty array when
/// events arrive now, and nulls take its place.
const BELOW_WATERMARK: &str = "(
    select device_id, timestamp, total_files_synced, total_errors,
           speed_hundredths * 0.01 as internet_speed
      from unnest(
               $1::text[], $2::timestamptz[], $3::integer[], $4::integer[], $5::bigint[],
               $6::timestamptz[]
           ) as batch (
               device_id, timestamp, total_files_synced, total_errors, speed_hundredths, received_at
           )
     where coalesce(received_at, $7) <= (select folded_until from roll_up_state)
) below_watermark";

/// Begins the transaction of a writer whose events may be below the watermark. Its lock stops aggregation until the
/// transaction ends; other writers may hold it at the same time. Later statements see the current watermark.
pub(super) const BEGIN_WITHOUT_AGGREGATION: &str = "begin; select from roll_up_state for share";

/// The statements that such a writer runs once its events are inserted.
pub(super) struct BelowWatermarkStatements {
    aggregate_days: Statement,
    aggregate_hours: Statement,
    note_stale: Statement,
}

impl BelowWatermarkStatements {
    pub(super) async fn prepare(client: &Client) -> Result<Self, Error> {
        Ok(Self {
            aggregate_days: client.prepare(&aggregate_days_of(BELOW_WATERMARK)).await?,
            aggregate_hours: client.prepare(&aggregate_hours_of(BELOW_WATERMARK)).await?,
            note_stale: client.prepare(&summaries::note_stale_of(BELOW_WATERMARK)).await?,
        })
    }

    /// Aggregates the events in `parameters` that are below the watermark.
    pub(super) async fn aggregate(
        &self,
        client: &Client,
        parameters: &[&(dyn ToSql + Sync); 7],
    ) -> Result<(), Error> {
        client.execute(&self.aggregate_days, parameters).await?;
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
    const TRY_LOCK: &str = "select pg_try_advisory_xact_lock($1)";
    const OLDEST: &str = "select min(created_at) from sync_events";
    let transaction = connection.transaction().await?;
    transaction.batch_execute(STEP_TIMEOUT).await?;
    if !transaction.query_one(TRY_LOCK, &[&ROLL_UP_LOCK]).await?.try_get::<_, bool>(0)? {
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

/// SQL for the rows of `device_days` or `fleet_hours`, as if exactly the events received up to `until` were aggregated;
/// without `until`, all events. It adds the events that are not aggregated yet to the stored rows. It subtracts
/// aggregated events that were received later than `until`.
pub(super) fn as_of(table: &str, until: Option<Timestamp>) -> String {
    const WATERMARK: &str = "(select coalesce(folded_until, '-infinity') from roll_up_state)";
    let (key, of_event) = match table {
        "device_days" => ("device_id, day", format!("device_id, {DAY}")),
        _ => ("hour", HOUR.to_owned()),
    };
    let (names, groups) = (Sums::names(), if key == "hour" { "1" } else { "1, 2" });
    let sums = Sums::sql(|column| format!("sum({column})::bigint as {column}"));
    let (negative, event_sums) = (Sums::negative(), event_sums());
    let (received, later) = match until {
        None => (String::new(), String::new()),
        Some(until) => (
            format!("and created_at <= '{until}'"),
            format!(
                "union all
                 select * from (
                     with later ({key}, {names}) as (
                         select {of_event}, {event_sums}
                           from sync_events
                          where created_at <= {WATERMARK} and created_at > '{until}'
                          group by {groups}
                     )
                     select {key}, {negative} from later
                 ) negative"
            ),
        ),
    };
    format!(
        "(
            select {key}, {sums}
              from (
                  select {key}, {names} from {table}
                  union all
                  select {of_event}, {event_sums}
                    from sync_events
                   where created_at > {WATERMARK} {received}
                   group by {groups}
                  {later}
              ) deltas
             group by {groups}
        )"
    )
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
    transaction.execute(&aggregate_days_of(EVENTS), &[&after, &until]).await?;
    transaction.execute(&aggregate_hours_of(EVENTS), &[&after, &until]).await?;
    transaction.execute("update roll_up_state set folded_until = $1", &[&until]).await?;
    Ok(())
}

/// Stops aggregation until the transaction ends, and answers the watermark. A caller that also locks devices must take
/// this lock first.
pub(super) async fn lock_state(transaction: &Transaction<'_>) -> Result<Option<Timestamp>, Error> {
    const LOCK_STATE: &str = "select folded_until from roll_up_state for update";
    aggregated_until(&transaction.query_one(LOCK_STATE, &[]).await?)
}

/// Whether events that arrive at `received` may be below the watermark before they are committed. `watermark` is a
/// value of some seconds ago.
pub(super) fn may_be_below_watermark(received: Timestamp, watermark: Option<Timestamp>) -> bool {
    watermark.is_some_and(|watermark| {
        received < watermark.saturating_add_milliseconds(SAFE_AFTER_MILLISECONDS)
    })
}

fn aggregated_until(state: &Row) -> Result<Option<Timestamp>, Error> {
    Ok(state.try_get::<_, Option<jiff::Timestamp>>(0)?.map(Timestamp::truncate))
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
    transaction.execute(&subtract, &[&device_id.as_str(), &watermark.to_jiff()]).await.map(|_| ())
}

/// The watermark, as of this snapshot. It is passed to queries as a value, so that the planner sees how few events
/// follow it.
pub(super) async fn watermark(snapshot: &Transaction<'_>) -> Result<jiff::Timestamp, Error> {
    let state = snapshot.query_one("select folded_until from roll_up_state", &[]).await?;
    Ok(aggregated_until(&state)?.unwrap_or(Timestamp::MIN).to_jiff())
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
