//! The roll-ups: sums by device and day, and by hour of the entire fleet. `maintenance` aggregates events into them in
//! small steps, deletions subtract from them, and statistics read them. Every event must count exactly once.
//!
//! The watermark is an id. All events up to it are aggregated, and all events that are stored later have a higher id.
//! Readers add the events above the watermark in the same snapshot, so answers are always exact.

use pisync_core::Timestamp;
use rusqlite::{Connection, Row, Transaction, TransactionBehavior, named_params, params};

use super::rows::{device_row, job_sums};
use crate::store::{
    Device, FailureQuery, Figures, Page, Sums, Window,
    figure_columns::{DEVICE_COLUMNS, DEVICE_ROW},
};

/// SQL for the sums of rows of `sync_events`, in the order of [`Sums::COLUMNS`].
const EVENT_SUMS: [&str; Sums::COUNT] = [
    "count(*)",
    "ifnull(sum(total_errors > 0), 0)",
    "ifnull(sum(total_files_synced), 0)",
    "ifnull(sum(total_errors), 0)",
    "ifnull(sum(internet_speed), 0)",
    "count(internet_speed)",
];

fn event_sums() -> String {
    EVENT_SUMS.join(", ")
}

/// The parts of an insertion of sums: the columns, the sums of the events, and the addition to an existing row.
fn insertion() -> (String, String, String) {
    (Sums::names(), event_sums(), add())
}

/// The midnight and the full hour before an event. Remainders of dates before 1970 are negative.
const DAY: &str = "timestamp - (timestamp % 86400000 + 86400000) % 86400000";
const HOUR: &str = "timestamp - (timestamp % 3600000 + 3600000) % 3600000";

/// The end of an insertion of sums, for rows that may exist already. The table is called `stored`.
fn add() -> String {
    format!("do update set {}", Sums::add_to("stored"))
}

/// Aggregates the next `most` events with ids up to `last`; false when there are no more. It runs on the writer's
/// thread, so it must be short.
pub(super) fn aggregate(
    connection: &mut Connection,
    most: i64,
    last: i64,
) -> rusqlite::Result<bool> {
    const LAST_OF_STEP: &str = "
        select max(id), count(*)
          from (select id from sync_events where id > ?1 and id <= ?3 order by id limit ?2)
    ";
    let (names, event_sums, add) = insertion();
    let aggregate_days = format!(
        "insert into device_days as stored (device, day, {names})
         select device, {DAY}, {event_sums}
           from sync_events
          where id > ?1 and id <= ?2
          group by 1, 2
             on conflict (device, day) {add}"
    );
    let aggregate_hours = format!(
        "insert into fleet_hours as stored (hour, {names})
         select {HOUR}, {event_sums}
           from sync_events
          where id > ?1 and id <= ?2
          group by 1
             on conflict (hour) {add}"
    );
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let watermark = watermark(&transaction)?;
    let (last, events): (Option<i64>, i64) = transaction
        .prepare_cached(LAST_OF_STEP)?
        .query_row([watermark, most, last], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let Some(last) = last else { return Ok(false) };
    transaction.prepare_cached(&aggregate_days)?.execute([watermark, last])?;
    transaction.prepare_cached(&aggregate_hours)?.execute([watermark, last])?;
    transaction.execute("update roll_up_state set folded_id = ?1", [last])?;
    transaction.commit()?;
    Ok(events == most)
}

/// SQL for the rows of `device_days` or `fleet_hours`, as if exactly the events received up to `until` were aggregated;
/// without `until`, all events. It adds the events that are not aggregated yet to the stored rows. It subtracts
/// aggregated events that were received later than `until`.
pub(super) fn as_of(table: &str, until: Option<Timestamp>) -> String {
    const WATERMARK: &str = "(select folded_id from roll_up_state)";
    let (key, of_event) = match table {
        "device_days" => ("device, day", format!("device, {DAY}")),
        _ => ("hour", HOUR.to_owned()),
    };
    let (names, groups) = (Sums::names(), if key == "hour" { "1" } else { "1, 2" });
    let sums = Sums::sql(|column| format!("sum({column}) as {column}"));
    let (negative, event_sums) = (Sums::negative(), event_sums());
    let (received, later) = match until.map(Timestamp::as_millisecond) {
        None => (String::new(), String::new()),
        Some(until) => (
            format!("and created_at <= {until}"),
            format!(
                "union all
                 select * from (
                     with later ({key}, {names}) as (
                         select {of_event}, {event_sums}
                           from sync_events
                          where id <= {WATERMARK} and created_at > {until}
                          group by {groups}
                     )
                     select {key}, {negative} from later
                 )"
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
                   where id > {WATERMARK} {received}
                   group by {groups}
                  {later}
              )
             group by {groups}
        )"
    )
}

pub(super) fn watermark(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("select folded_id from roll_up_state")?
        .query_row([], |row| row.get(0))
}

/// Subtracts a device that will be deleted from the fleet's sums. `device_days` is deleted together with the device.
pub(super) fn forget(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
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
             where device = ?1 and id <= ?2
             group by 1
         )
         insert into fleet_hours as stored (hour, {names})
         select hour, {negative_sums}
           from (
               select * from raw
               union all
               select day, {names}
                 from device_days
                where device = ?1
               union all
               select hour - (hour % 86400000 + 86400000) % 86400000, {negative}
                 from raw
           )
          where true
          group by hour
             on conflict (hour) {add}"
    );
    transaction.execute(&subtract, params![device, watermark(transaction)?])?;
    Ok(())
}

/// Events of a device that are to be deleted. They were received up to `received_until`, and come up to this one in the
/// order of the index.
pub(super) struct DeletedEvents {
    pub(super) device: i64,
    pub(super) received_until: i64,
    pub(super) timestamp: i64,
    pub(super) id: i64,
}

/// The condition for these events. Their fields are the parameters 1 to 4.
pub(super) const DELETED_EVENTS: &str = "
    device = ?1 and created_at <= ?2 and timestamp <= ?3 and (timestamp < ?3 or id <= ?4)
";

/// Subtracts events that are to be deleted from the sums by day and hour.
pub(super) fn subtract(
    transaction: &Transaction<'_>,
    events: &DeletedEvents,
) -> rusqlite::Result<()> {
    let (names, event_sums, add) = insertion();
    let negative = Sums::negative();
    for (table, key, of_event) in [
        ("device_days", "device, day", format!("device, {DAY}")),
        ("fleet_hours", "hour", HOUR.to_owned()),
    ] {
        let groups = if key == "hour" { "1" } else { "1, 2" };
        let subtract = format!(
            "with gone (
                {key}, {names}
             ) as materialized (
                select {of_event}, {event_sums}
                  from sync_events
                 where {DELETED_EVENTS} and id <= ?5
                 group by {groups}
             )
             insert into {table} as stored ({key}, {names})
             select {key}, {negative} from gone where true
                 on conflict ({key}) {add}"
        );
        let DeletedEvents { device, received_until, timestamp, id } = *events;
        let parameters = params![device, received_until, timestamp, id, watermark(transaction)?];
        transaction.prepare_cached(&subtract)?.execute(parameters)?;
    }
    Ok(())
}

/// Adds a device's aggregated events to the sums by hour.
pub(super) fn aggregate_hours_again(
    transaction: &Transaction<'_>,
    device: i64,
) -> rusqlite::Result<()> {
    let (names, event_sums, add) = insertion();
    let aggregate = format!(
        "insert into fleet_hours as stored (hour, {names})
         select {HOUR}, {event_sums}
           from sync_events
          where device = ?1 and id <= ?2
          group by 1
             on conflict (hour) {add}"
    );
    transaction.execute(&aggregate, params![device, watermark(transaction)?]).map(|_| ())
}

/// The sums of the entire fleet's events within a window.
pub(super) fn window_figures(
    connection: &Connection,
    window: &Window,
) -> rusqlite::Result<Figures> {
    let (names, event_sums) = (Sums::names(), event_sums());
    let sums = Sums::sql(|column| format!("ifnull(sum({column}), 0)"));
    // The plus signs keep SQLite from searching the events by date, device by device.
    let select = format!(
        "select {sums}
           from (
               select {names}
                 from fleet_hours
                where hour >= :from and hour < :until
               union all
               select {event_sums}
                 from sync_events
                where id > (select folded_id from roll_up_state)
                  and +timestamp >= :from and +timestamp < :until
           )"
    );
    connection.prepare_cached(&select)?.query_row(
        named_params! {
            ":from": window.from().as_millisecond(), ":until": window.until().as_millisecond(),
        },
        |row| self::sums(row).map(Figures::from),
    )
}

/// Reads a row that begins with the sums.
pub(super) fn sums(row: &Row<'_>) -> rusqlite::Result<Sums> {
    Sums::read(|column| row.get(column))
}

/// Devices that failed within a window. Their number of failures in it replaces that of all time.
pub(super) fn repeated_failures(
    connection: &Connection,
    query: &FailureQuery,
    window: &Window,
) -> rusqlite::Result<Page<Device>> {
    const BY_DAY: &str = "
        select device, sum(failed_syncs) as failed_syncs
          from (
              select device, failed_syncs
                from device_days
               where day >= :from and day < :until and failed_syncs > 0
              union all
              select device, 1
                from sync_events
               where id > (select folded_id from roll_up_state)
                 and total_errors > 0 and +timestamp >= :from and +timestamp < :until
          )
         group by device
    ";
    // Uses the index of failed events.
    const BY_EVENT: &str = "
        select device, count(*) as failed_syncs
          from sync_events
         where total_errors > 0 and timestamp >= :from and timestamp < :until
         group by device
    ";
    let failing = if window.is_whole_days() { BY_DAY } else { BY_EVENT };
    let (measure, least) = if query.consecutive {
        ("max(j.consecutive_failures)", "1")
    } else {
        ("failing.failed_syncs", ":threshold")
    };
    let sums = job_sums();
    let listed = format!(
        "with failing as materialized (select * from ({failing}) where failed_syncs >= {least})
         select {DEVICE_COLUMNS}, {sums}, failing.failed_syncs, count(*) over ()
           from failing
           join devices d on d.id = failing.device
           join device_jobs j on j.device = failing.device
          group by failing.device
         having {measure} >= :threshold"
    );
    let select = format!(
        "{listed}
          order by {measure} desc, max(j.last_failure) desc, d.device_id
          limit :limit offset :offset"
    );
    let count = format!("select count(*) from ({listed})");
    let (from, until) = (window.from().as_millisecond(), window.until().as_millisecond());
    let snapshot = connection.unchecked_transaction()?;
    let mut total = 0_i64;
    let items: Vec<Device> = snapshot
        .prepare_cached(&select)?
        .query_map(
            named_params! {
                ":from": from, ":until": until, ":threshold": query.threshold,
                ":limit": query.limit.map_or(-1, i64::from), ":offset": query.offset.cast_signed(),
            },
            |row| {
                let mut device = device_row(row)?;
                device.figures.failed_syncs = row.get(DEVICE_ROW)?;
                total = row.get(DEVICE_ROW + 1)?;
                Ok(device)
            },
        )?
        .collect::<rusqlite::Result<_>>()?;
    // Behind the last page no row carries the total.
    if items.is_empty() && query.offset > 0 {
        let parameters =
            named_params! { ":from": from, ":until": until, ":threshold": query.threshold };
        total = snapshot.prepare_cached(&count)?.query_row(parameters, |row| row.get(0))?;
    }
    Ok(Page { items, total: total.cast_unsigned() })
}
