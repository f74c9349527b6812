//! The roll-ups: sums by device and day, by hour of the entire fleet, and runs by group. `maintenance` aggregates events
//! into them in small steps, deletions subtract from them, and statistics read them. Every event must count exactly once.
//!
//! The watermark is an id. All events up to it are aggregated, and all events that are stored later have a higher id.
//! Readers add the events above the watermark in the same snapshot, so answers are always exact.

use std::collections::BTreeMap;

use rusqlite::{
    Connection, Row, Transaction, TransactionBehavior, named_params, params, params_from_iter,
};

use super::{
    aggregated_events::{
        DAY, DELETED_EVENTS, DIALECT, DeletedEvents, HOUR, event_details, event_sums, watermark,
    },
    digests,
    groups::{self, GroupHour},
};
use crate::store::{Figures, Sums, Window, day_details, roll_up_sql::TableOfSums};

/// The end of an insertion of days, for rows that may exist already.
fn add_to_day() -> String {
    format!("{}, {}", add(), day_details::add_to_stored("min", "max"))
}

/// The parts of an insertion of sums: the columns, the sums of the events, and the addition to an existing row.
fn insertion() -> (String, String, String) {
    (Sums::names(), event_sums(), add())
}

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
    let (names, event_sums, _) = insertion();
    let (details, event_details, add) = (day_details::names(), event_details(), add_to_day());
    let aggregate_days = format!(
        "insert into device_days as stored (device, day, {names}, {details})
         select device, {DAY}, {event_sums}, {event_details}
           from sync_events
          where id > ?1 and id <= ?2
          group by 1, 2
             on conflict (device, day) {add}"
    );
    let select_hours = format!(
        "select {event_sums}, {HOUR} as hour, {} as of_group
           from sync_events
          where id > ?1 and id <= ?2
          group by hour, of_group",
        DIALECT.group_of_event()
    );
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let watermark = watermark(&transaction)?;
    let (last, events): (Option<i64>, i64) = transaction
        .prepare_cached(LAST_OF_STEP)?
        .query_row([watermark, most, last], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let Some(last) = last else { return Ok(false) };
    transaction.prepare_cached(&aggregate_days)?.execute([watermark, last])?;
    let hours: Vec<(Sums, i64, String)> = transaction
        .prepare_cached(&select_hours)?
        .query_map([watermark, last], |row| {
            Ok((sums(row)?, row.get(Sums::COUNT)?, row.get(Sums::COUNT + 1)?))
        })?
        .collect::<rusqlite::Result<_>>()?;
    add_hours(&transaction, &hours)?;
    groups::add(&transaction, &hours.into_iter().map(GroupHour::from).collect::<Vec<_>>())?;
    groups::add_moved(&transaction, watermark, last)?;
    digests::note_late(&transaction, watermark, last)?;
    transaction.execute("update roll_up_state set folded_id = ?1", [last])?;
    transaction.commit()?;
    Ok(events == most)
}

/// Adds to the sums of hours, and to the totals. Each row has the sums of a group's hour.
fn add_hours(transaction: &Transaction<'_>, hours: &[(Sums, i64, String)]) -> rusqlite::Result<()> {
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
    let mut fleet = BTreeMap::<i64, Sums>::new();
    for (sums, hour, _) in hours {
        fleet.entry(*hour).or_default().add(sums);
    }
    for (hour, sums) in &fleet {
        insert.execute(params_from_iter([*hour].into_iter().chain(sums.values())))?;
        total.add(sums);
    }
    transaction.prepare_cached(&add_to_totals)?.execute(params_from_iter(total.values()))?;
    Ok(())
}

/// Adds the totals up again from the hours, which deletions change.
pub(super) fn recount_totals(connection: &Connection) -> rusqlite::Result<()> {
    let (names, sums) = (Sums::names(), Sums::sql(|column| format!("ifnull(sum({column}), 0)")));
    let set = Sums::sql(|column| format!("{column} = excluded.{column}"));
    let recount = format!(
        "insert into fleet_totals (id, {names}) select 1, {sums} from fleet_hours where true
             on conflict (id) do update set {set}"
    );
    connection.execute(&recount, []).map(|_| ())
}

/// Whether the totals differ from the sums of the hours, or are missing.
pub(super) fn totals_are_wrong(connection: &Connection) -> rusqlite::Result<bool> {
    let names = Sums::names();
    let sums = Sums::sql(|column| format!("ifnull(sum({column}), 0)"));
    let differ = format!(
        "select not exists (select {names} from fleet_totals intersect select {sums} from fleet_hours)"
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
    groups::forget(transaction, device)
}

/// Subtracts events that are to be deleted from the sums by day and hour.
pub(super) fn subtract(
    transaction: &Transaction<'_>,
    events: &DeletedEvents,
) -> rusqlite::Result<()> {
    let watermark = watermark(transaction)?;
    groups::subtract(transaction, events, watermark)?;
    for (table, add) in [("device_days", add_to_day()), ("fleet_hours", add())] {
        let table_of_sums = DIALECT.table(table);
        let gone = table_of_sums.of_events(&format!("{DELETED_EVENTS} and id <= ?5"));
        let TableOfSums { key, columns, negative, .. } = &table_of_sums;
        let subtract = format!(
            "with gone ({key}, {columns}) as materialized ({gone})
             insert into {table} as stored ({key}, {columns})
             select {key}, {negative} from gone where true
                 on conflict ({key}) {add}"
        );
        let DeletedEvents { device, received_until, timestamp, id } = *events;
        let parameters = params![device, received_until, timestamp, id, watermark];
        transaction.prepare_cached(&subtract)?.execute(parameters)?;
    }
    digests::note_stale(transaction, events.device)
}

/// Adds a device's aggregated events to the sums by hour and by group.
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
    let watermark = watermark(transaction)?;
    transaction.execute(&aggregate, params![device, watermark])?;
    groups::add_device(transaction, device, watermark)
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
