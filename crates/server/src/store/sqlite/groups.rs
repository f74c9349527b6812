//! Runs by group: of each day, and of each hour of the last two weeks. A run belongs to the group in which its device was
//! when the run was received, wherever the device has moved since. `roll_ups` calls it for all that it aggregates and
//! subtracts. The tables must always agree with `device_days`, which knows nothing of groups.

use std::collections::BTreeMap;

use pisync_core::{DeviceId, GroupName, Timestamp};
use rusqlite::{
    Connection, OptionalExtension, Params, Row, Transaction, TransactionBehavior, params,
    params_from_iter, types::Value,
};

use super::{
    aggregated_events::{self, DAY, DELETED_EVENTS, DeletedEvents, HOUR},
    expiry,
    write_connection::WriteConnection,
};
use crate::store::{
    Sums,
    group_runs::{first_countable_hour, kept_since, uncounted_hours},
    verify::DAY_MILLISECONDS,
};

/// SQL for the group to which a row of `sync_events` belongs: the former group of the first move after the event, or the
/// device's group now. A move says by time what came before it. What had been aggregated by then is recognized by its
/// id, so that a clock that was ahead changes no group's past. Both only rise from move to move, so each index finds the
/// first one.
pub(super) const OF_EVENT: &str = r#"
    coalesce(
        (select former_group
           from group_changes move
          where move.id = min(
                    ifnull((select id
                              from group_changes later
                             where later.device = sync_events.device
                               and later.changed_at > sync_events.created_at
                             order by later.changed_at, later.id
                             limit 1), 9223372036854775807),
                    ifnull((select id
                              from group_changes later
                             where later.device = sync_events.device
                               and later.changed_id > sync_events.id
                             order by later.changed_id, later.id
                             limit 1), 9223372036854775807)
                )),
        (select "group" from devices where devices.id = sync_events.device),
        ''
    )
"#;

/// The condition that a row of `sync_events` counts in `group_hours`.
pub(super) const IS_KEPT_HOUR: &str = "timestamp >= (select group_hours_since from roll_up_state)";

/// SQL for the runs and the failed runs of rows of `sync_events`.
pub(super) const EVENT_RUNS: &str = "count(*), ifnull(sum(total_errors > 0), 0)";

/// SQL for the group in which a device was at first, given SQL for the device's number.
fn first_of(device: &str) -> String {
    format!(
        r#"coalesce(
            (select former_group from group_changes move where move.device = {device}
              order by move.changed_id, move.id limit 1),
            (select "group" from devices where devices.id = {device}),
            ''
        )"#
    )
}

/// The condition that a row of `sync_events` counts in `device_day_groups`.
pub(super) fn moved() -> String {
    let first = first_of("sync_events.device");
    format!("device in (select device from group_changes) and {OF_EVENT} <> {first}")
}

/// Runs of a group within an hour.
#[derive(Debug)]
pub(super) struct GroupHour {
    group: String,
    hour: i64,
    runs: i64,
    failed_runs: i64,
}

impl From<(Sums, i64, String)> for GroupHour {
    fn from((sums, hour, group): (Sums, i64, String)) -> Self {
        Self { group, hour, runs: sums.total_syncs, failed_runs: sums.failed_syncs }
    }
}

impl GroupHour {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            group: row.get(0)?,
            hour: row.get(1)?,
            runs: row.get(2)?,
            failed_runs: row.get(3)?,
        })
    }

    fn negative(self) -> Self {
        Self { runs: -self.runs, failed_runs: -self.failed_runs, ..self }
    }
}

/// Adds runs to the hours and days of groups.
pub(super) fn add(transaction: &Transaction<'_>, hours: &[GroupHour]) -> rusqlite::Result<()> {
    add_hours(transaction, hours)?;
    let mut days = BTreeMap::<(String, i64), (i64, i64)>::new();
    for GroupHour { group, hour, runs, failed_runs } in hours {
        let day = hour - hour.rem_euclid(DAY_MILLISECONDS);
        let of_day = days.entry((group.clone(), day)).or_default();
        *of_day = (of_day.0 + runs, of_day.1 + failed_runs);
    }
    add_days(transaction, days.into_iter().map(|((group, day), runs)| (group, day, runs)))
}

fn add_hours(transaction: &Transaction<'_>, hours: &[GroupHour]) -> rusqlite::Result<()> {
    const ADD_TO_HOUR: &str = r#"
        insert into group_hours as stored ("group", hour, runs, failed_runs)
        select ?1, ?2, ?3, ?4
         where ?2 >= (select group_hours_since from roll_up_state)
            on conflict ("group", hour) do update
           set runs = stored.runs + excluded.runs, failed_runs = stored.failed_runs + excluded.failed_runs
    "#;
    let mut add_to_hour = transaction.prepare_cached(ADD_TO_HOUR)?;
    for GroupHour { group, hour, runs, failed_runs } in hours {
        add_to_hour.execute(params![group, hour, runs, failed_runs])?;
    }
    Ok(())
}

fn add_days(
    transaction: &Transaction<'_>,
    days: impl Iterator<Item = (String, i64, (i64, i64))>,
) -> rusqlite::Result<()> {
    const ADD_TO_DAY: &str = r#"
        insert into group_days as stored ("group", day, runs, failed_runs) values (?1, ?2, ?3, ?4)
            on conflict ("group", day) do update
           set runs = stored.runs + excluded.runs, failed_runs = stored.failed_runs + excluded.failed_runs
    "#;
    let mut add_to_day = transaction.prepare_cached(ADD_TO_DAY)?;
    for (group, day, (runs, failed_runs)) in days {
        add_to_day.execute(params![group, day, runs, failed_runs])?;
    }
    Ok(())
}

/// Adds the events behind the id `watermark`, up to `last`, to the days of devices that moved.
pub(super) fn add_moved(
    transaction: &Transaction<'_>,
    watermark: i64,
    last: i64,
) -> rusqlite::Result<()> {
    const HAS_MOVES: &str = "select exists (select 1 from group_changes)";
    if !transaction.prepare_cached(HAS_MOVES)?.query_row([], |row| row.get(0))? {
        return Ok(());
    }
    // The step has few events, and a device that moved may have many.
    let source = "sync_events not indexed where id > ?1 and id <= ?2";
    transaction.prepare_cached(&add_day_groups(source, ""))?.execute([watermark, last]).map(|_| ())
}

/// A statement that adds the events of `source`, the rest of a `from` clause, to `device_day_groups`, or subtracts them with
/// the `sign` "-".
fn add_day_groups(source: &str, sign: &str) -> String {
    let first = first_of("sync_events.device");
    format!(
        r#"with counted (device, day, of_group, first_group, runs, failed_runs) as materialized (
            select device, {DAY}, {OF_EVENT} as of_group, {first} as first_group, {EVENT_RUNS}
              from {source} and device in (select device from group_changes)
             group by 1, 2, 3, 4
         )
         insert into device_day_groups as stored (device, day, "group", runs, failed_runs)
         select device, day, of_group, {sign}runs, {sign}failed_runs
           from counted
          where of_group <> first_group
             on conflict (device, day, "group") do update
            set runs = stored.runs + excluded.runs, failed_runs = stored.failed_runs + excluded.failed_runs"#
    )
}

/// The hours of the groups to which the events belong that match a condition.
fn hours_of(
    transaction: &Transaction<'_>,
    condition: &str,
    parameters: impl Params,
) -> rusqlite::Result<Vec<GroupHour>> {
    let select = format!(
        "select {OF_EVENT} as of_group, {HOUR} as hour, {EVENT_RUNS}
           from sync_events
          where {condition}
          group by of_group, hour"
    );
    transaction.prepare_cached(&select)?.query_map(parameters, GroupHour::read)?.collect()
}

/// Subtracts events that are to be deleted. They are aggregated up to the id `watermark`.
pub(super) fn subtract(
    transaction: &Transaction<'_>,
    events: &DeletedEvents,
    watermark: i64,
) -> rusqlite::Result<()> {
    let DeletedEvents { device, received_until, timestamp, id } = *events;
    let condition = format!("{DELETED_EVENTS} and id <= ?5");
    let parameters = params![device, received_until, timestamp, id, watermark];
    let hours = hours_of(transaction, &condition, parameters)?;
    add(transaction, &hours.into_iter().map(GroupHour::negative).collect::<Vec<_>>())?;
    let source = format!("sync_events where {condition}");
    transaction.prepare_cached(&add_day_groups(&source, "-"))?.execute(parameters).map(|_| ())
}

/// Adds a device's aggregated events.
pub(super) fn add_device(
    transaction: &Transaction<'_>,
    device: i64,
    watermark: i64,
) -> rusqlite::Result<()> {
    let hours = hours_of(transaction, "device = ?1 and id <= ?2", [device, watermark])?;
    add(transaction, &hours)
}

/// Subtracts a device that will be deleted. Its own rows are deleted together with it. Hours are kept no longer than
/// events, so the events that are left tell what to subtract from them.
pub(super) fn forget(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    let days = format!(
        "select of_group, day, -sum(runs), -sum(failed_runs) from ({}) group by 1, 2",
        days_of_devices("where days.device = ?1")
    );
    let watermark = aggregated_events::watermark(transaction)?;
    let hours = hours_of(transaction, "device = ?1 and id <= ?2", [device, watermark])?;
    add_hours(transaction, &hours.into_iter().map(GroupHour::negative).collect::<Vec<_>>())?;
    let days: Vec<_> = transaction
        .prepare_cached(&days)?
        .query_map([device], |row| Ok((row.get(0)?, row.get(1)?, (row.get(2)?, row.get(3)?))))?
        .collect::<rusqlite::Result<_>>()?;
    add_days(transaction, days.into_iter())
}

/// SQL for the days of devices with the group to which they belong: of_group, day, runs, failed_runs. `condition` chooses
/// `days` by their `device`.
fn days_of_devices(condition: &str) -> String {
    let first = first_of("days.device");
    format!(
        r#"select {first} as of_group, day, total_syncs as runs, failed_syncs as failed_runs
             from device_days days {condition}
            union all
           select {first}, day, -runs, -failed_runs from device_day_groups days {condition}
            union all
           select "group", day, runs, failed_runs from device_day_groups days {condition}"#
    )
}

/// Counts the days of a device that moved again. Its events are aggregated up to the id `watermark`.
pub(super) fn count_device_again(
    transaction: &Transaction<'_>,
    device: i64,
    watermark: i64,
) -> rusqlite::Result<()> {
    transaction.execute("delete from device_day_groups where device = ?1", [device])?;
    let add = add_day_groups("sync_events where device = ?1 and id <= ?2", "");
    transaction.prepare_cached(&add)?.execute([device, watermark]).map(|_| ())
}

/// Notes that a device is about to move to another group, if it is.
pub(super) fn note_move(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    group: Option<&GroupName>,
    at: Timestamp,
) -> rusqlite::Result<()> {
    const MOVES: &str = r#"select id from devices where device_id = ?1 and "group" is not ?2"#;
    // Earlier moves were noted by a clock that was ahead.
    const NOT_LATER: &str =
        "update group_changes set changed_at = ?2 where device = ?1 and changed_at > ?2";
    const NOTE: &str = r#"
        insert into group_changes (device, changed_at, changed_id, former_group)
        select id, ?2, (select folded_id + 1 from roll_up_state), ifnull("group", '')
          from devices
         where id = ?1
    "#;
    let group = group.map(GroupName::as_str);
    let device: Option<i64> = transaction
        .prepare_cached(MOVES)?
        .query_row(params![device_id.as_str(), group], |row| row.get(0))
        .optional()?;
    let Some(device) = device else { return Ok(()) };
    for statement in [NOT_LATER, NOTE] {
        transaction.prepare_cached(statement)?.execute([device, at.as_millisecond()])?;
    }
    Ok(())
}

/// Drops hours that are over for long, or whose events are no longer kept. A clock that was ahead may have dropped hours
/// that are still to come: from the next one on they are counted again.
pub(super) fn drop_old_hours(writer: &mut WriteConnection, now: Timestamp) -> rusqlite::Result<()> {
    const KEEP: &str = "update roll_up_state set group_hours_since = ?1";
    const DROP: &str = "delete from group_hours where hour < ?1";
    let since = hours_since(&writer.connection)?;
    let kept = kept_since(since, countable_since(&writer.connection, now)?, now);
    if kept == since {
        return Ok(());
    }
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute(KEEP, [kept])?;
    transaction.execute(DROP, [kept])?;
    transaction.commit()
}

/// The first hour from which on every event is kept that is dated later, and hours are kept.
fn countable_since(connection: &Connection, now: Timestamp) -> rusqlite::Result<i64> {
    Ok(first_countable_hour(expiry::streaks_since(connection)?, now).as_millisecond())
}

fn hours_since(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("select group_hours_since from roll_up_state", [], |row| row.get(0))
}

/// A table of groups, and SQL for what it must have.
struct Derived {
    table: &'static str,
    key: &'static str,
    expected: String,
    /// The first hour that is compared; `None` for days.
    since: Option<i64>,
}

const AGGREGATED: &str = "id <= (select folded_id from roll_up_state)";

fn day_groups() -> Derived {
    let moved = moved();
    Derived {
        table: "device_day_groups",
        key: r#"device, day, "group""#,
        expected: format!(
            "select device, {DAY} as day, {OF_EVENT} as of_group, {EVENT_RUNS}
               from sync_events
              where {AGGREGATED} and {moved}
              group by 1, 2, 3"
        ),
        since: None,
    }
}

fn days() -> Derived {
    Derived {
        table: "group_days",
        key: r#""group", day"#,
        expected: format!(
            "select of_group, day, sum(runs), sum(failed_runs) from ({}) group by 1, 2",
            days_of_devices("")
        ),
        since: None,
    }
}

fn hours(since: i64) -> Derived {
    Derived {
        table: "group_hours",
        key: r#""group", hour"#,
        // SQLite is to read the events one after the other.
        expected: format!(
            "select {OF_EVENT} as of_group, {HOUR} as hour, {EVENT_RUNS}
               from sync_events not indexed
              where {AGGREGATED} and timestamp >= ?1
              group by 1, 2"
        ),
        since: Some(since),
    }
}

impl Derived {
    /// SQL for the rows that differ: their keys, and what must be added to their runs and failed runs.
    fn differences(&self) -> String {
        let Self { table, key, expected, since } = self;
        let numbers: Vec<_> =
            (1..=key.split(", ").count()).map(|number| number.to_string()).collect();
        let numbers = numbers.join(", ");
        let columns = format!("{key}, runs, failed_runs");
        let compared = if since.is_some() { "where hour >= ?1" } else { "" };
        format!(
            "with expected ({columns}) as ({expected})
             select {key}, sum(runs) as runs, sum(failed_runs) as failed_runs
               from (
                   select {columns} from expected
                   union all
                   select {key}, -runs, -failed_runs from {table} {compared}
               )
              group by {numbers}
             having sum(runs) <> 0 or sum(failed_runs) <> 0"
        )
    }

    fn count(&self, connection: &Connection) -> rusqlite::Result<u64> {
        let count = format!("select count(*) from ({})", self.differences());
        let number = connection
            .query_row(&count, params_from_iter(self.since), |row| row.get::<_, i64>(0))?;
        Ok(number.cast_unsigned())
    }

    /// Reads what must be added to which rows.
    fn corrections(&self, connection: &Connection) -> rusqlite::Result<Vec<Vec<Value>>> {
        let columns = self.key.split(", ").count() + 2;
        connection
            .prepare(&self.differences())?
            .query_map(params_from_iter(self.since), |row| {
                (0..columns).map(|column| row.get(column)).collect()
            })?
            .collect()
    }

    /// The statement that adds a correction.
    fn correct(&self) -> String {
        let Self { table, key, .. } = self;
        let numbers: Vec<_> =
            (1..=key.split(", ").count() + 2).map(|number| format!("?{number}")).collect();
        format!(
            "insert into {table} as stored ({key}, runs, failed_runs) values ({})
                 on conflict ({key}) do update
                set runs = stored.runs + excluded.runs, failed_runs = stored.failed_runs + excluded.failed_runs",
            numbers.join(", ")
        )
    }
}

/// How many days and hours of groups differ from what they are made from, and how many hours are not counted yet although
/// their events are kept.
pub(super) fn differences(
    connection: &Connection,
    now: Timestamp,
) -> rusqlite::Result<(u64, u64, u64)> {
    let mut wrong_days = days().count(connection)?;
    if expiry::raw_since(connection)?.is_none() {
        wrong_days += day_groups().count(connection)?;
    }
    let (since, countable) = (hours_since(connection)?, countable_since(connection, now)?);
    let wrong_hours = hours(since.max(countable)).count(connection)?;
    Ok((wrong_days, wrong_hours, uncounted_hours(since, countable, now)))
}

/// What to add to the rows of a table, as of one moment. Aggregation and deletions change a row and what it must have alike,
/// so that the correction stays right until it is added. Only another repair would make it wrong.
pub(super) struct Correction {
    derived: Derived,
    rows: Vec<Vec<Value>>,
    repairs: i64,
}

/// The tables, in the order in which they are repaired: days are made from the days of devices that moved.
#[derive(Clone, Copy)]
pub(super) enum Table {
    DayGroups,
    Days,
    Hours,
}

pub(super) const TABLES: [Table; 3] = [Table::DayGroups, Table::Days, Table::Hours];

/// Finds what is wrong in a table.
pub(super) fn correction(
    connection: &Connection,
    table: Table,
    now: Timestamp,
) -> rusqlite::Result<Correction> {
    let snapshot = connection.unchecked_transaction()?;
    let repairs =
        snapshot.query_row("select group_repairs from roll_up_state", [], |row| row.get(0))?;
    let derived = match table {
        Table::DayGroups => day_groups(),
        Table::Days => days(),
        Table::Hours => hours(hours_since(&snapshot)?.max(countable_since(&snapshot, now)?)),
    };
    let is_known = !matches!(table, Table::DayGroups) || expiry::raw_since(&snapshot)?.is_none();
    let rows = if is_known { derived.corrections(&snapshot)? } else { Vec::new() };
    Ok(Correction { derived, rows, repairs })
}

/// Corrects a table. Nothing is changed when another repair was quicker.
pub(super) fn correct(
    writer: &mut WriteConnection,
    correction: &Correction,
) -> rusqlite::Result<()> {
    const COUNT: &str =
        "update roll_up_state set group_repairs = group_repairs + 1 where group_repairs = ?1";
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if transaction.execute(COUNT, [correction.repairs])? == 0 {
        return Ok(());
    }
    let mut correct = transaction.prepare(&correction.derived.correct())?;
    for row in &correction.rows {
        correct.execute(params_from_iter(row))?;
    }
    drop(correct);
    transaction.commit()
}

/// Has the hours counted from now on whose events are kept. Those that were aggregated before are found missing.
pub(super) fn count_all_hours(
    writer: &mut WriteConnection,
    now: Timestamp,
) -> rusqlite::Result<()> {
    const COUNT: &str = "update roll_up_state set group_hours_since = min(group_hours_since, ?1)";
    let countable = countable_since(&writer.connection, now)?;
    writer.connection.execute(COUNT, [countable]).map(|_| ())
}
