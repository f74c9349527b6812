//! The roll-ups: sums by device and day, and by hour of the entire fleet. `maintenance` aggregates events into them in
//! small steps, deletions subtract from them, and statistics read them. Every event must count exactly once.
//!
//! The watermark is an id. All events up to it are aggregated, and all events that are stored later have a higher id.
//! Readers add the events above the watermark in the same snapshot, so answers are always exact.

use pisync_core::Timestamp;
use rusqlite::{
    Connection, Row, Transaction, TransactionBehavior, named_params, params, params_from_iter,
};

use crate::store::{Figures, Sums, Window};

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
    let select_hours = format!(
        "select {event_sums}, {HOUR} as hour
           from sync_events
          where id > ?1 and id <= ?2
          group by hour"
    );
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let watermark = watermark(&transaction)?;
    let (last, events): (Option<i64>, i64) = transaction
        .prepare_cached(LAST_OF_STEP)?
        .query_row([watermark, most, last], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let Some(last) = last else { return Ok(false) };
    transaction.prepare_cached(&aggregate_days)?.execute([watermark, last])?;
    let hours: Vec<(Sums, i64)> = transaction
        .prepare_cached(&select_hours)?
        .query_map([watermark, last], |row| Ok((sums(row)?, row.get(Sums::COUNT)?)))?
        .collect::<rusqlite::Result<_>>()?;
    add_hours(&transaction, &hours)?;
    transaction.execute("update roll_up_state set folded_id = ?1", [last])?;
    transaction.commit()?;
    Ok(events == most)
}

/// Adds to the sums of hours, and to the totals.
fn add_hours(transaction: &Transaction<'_>, hours: &[(Sums, i64)]) -> rusqlite::Result<()> {
    let names = Sums::names();
    let numbers = |first: usize| {
        let numbers = (first..first + Sums::COUNT).map(|number| format!("?{number}"));
        numbers.collect::<Vec<_>>()
    };
    let add_to_hour = format!(
        "insert into fleet_hours as stored (hour, {names}) values (?1, {})
             on conflict (hour) {}",
        numbers(2).join(", "),
        add()
    );
    let set: Vec<_> = Sums::COLUMNS
        .iter()
        .zip(numbers(1))
        .map(|(column, number)| format!("{column} = {column} + {number}"))
        .collect();
    let add_to_totals = format!("update fleet_totals set {}", set.join(", "));
    let mut total = Sums::default();
    let mut insert = transaction.prepare_cached(&add_to_hour)?;
    for (sums, hour) in hours {
        insert.execute(params_from_iter([*hour].into_iter().chain(sums.values())))?;
        total.add(sums);
    }
    transaction.prepare_cached(&add_to_totals)?.execute(params_from_iter(total.values()))?;
    Ok(())
}

/// Adds the totals up again from the hours, which deletions change.
pub(super) fn recount_totals(connection: &Connection) -> rusqlite::Result<()> {
    let (names, sums) = (Sums::names(), Sums::sql(|column| format!("ifnull(sum({column}), 0)")));
    let recount = format!("update fleet_totals set ({names}) = (select {sums} from fleet_hours)");
    connection.execute(&recount, []).map(|_| ())
}

/// Whether the totals differ from the sums of the hours.
pub(super) fn totals_are_wrong(connection: &Connection) -> rusqlite::Result<bool> {
    let names = Sums::names();
    let sums = Sums::sql(|column| format!("ifnull(sum({column}), 0)"));
    let differ = format!(
        "select exists (select {names} from fleet_totals except select {sums} from fleet_hours)"
    );
    connection.query_row(&differ, [], |row| row.get(0))
}

/// The sums of all events.
pub(super) fn totals(connection: &Connection) -> rusqlite::Result<Figures> {
    let (names, event_sums) = (Sums::names(), event_sums());
    let sums = Sums::sql(|column| format!("ifnull(sum({column}), 0)"));
    let select = format!(
        "select {sums}
           from (
               select {names} from fleet_totals
               union all
               select {event_sums}
                 from sync_events
                where id > (select folded_id from roll_up_state)
           )"
    );
    connection.prepare_cached(&select)?.query_row([], |row| self::sums(row).map(Figures::from))
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
    transaction.execute(&subtract, params![device, watermark(transaction)?]).map(|_| ())
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
