//! Runs by group: of each day, and of each hour of the last two weeks. A run belongs to the group in which its device was
//! when the run was received, wherever the device has moved since. `roll_ups` calls it for all that it aggregates and
//! subtracts. The tables must always agree with `device_days`, which knows nothing of groups.

use std::collections::BTreeMap;

use pisync_core::{DeviceId, GroupName, Timestamp};
use rusqlite::{Connection, Params, Row, Transaction, TransactionBehavior, params};

use super::{
    aggregated_events::{self, DAY, DELETED_EVENTS, DeletedEvents, HOUR},
    expiry,
    write_connection::WriteConnection,
};
use crate::store::{
    Sums,
    group_runs::{HOUR_MILLISECONDS, first_kept_hour},
    verify::DAY_MILLISECONDS,
};

/// SQL for the group to which a row of `sync_events` belongs: the former group of the first move after the event, or the
/// device's group now. A move says by time what came before it. What had been aggregated by then is recognized by its
/// id, so that a clock that was ahead changes no group's past.
pub(super) const OF_EVENT: &str = r#"
    coalesce(
        (select former_group
           from group_changes move
          where move.device = sync_events.device
            and (sync_events.created_at < move.changed_at or sync_events.id < move.changed_id)
          order by move.id
          limit 1),
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
            (select former_group from group_changes move where move.device = {device} order by move.id limit 1),
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
pub(super) fn add(
    transaction: &Transaction<'_>,
    hours: impl Iterator<Item = GroupHour>,
) -> rusqlite::Result<()> {
    const ADD_TO_HOUR: &str = r#"
        insert into group_hours as stored ("group", hour, runs, failed_runs)
        select ?1, ?2, ?3, ?4
         where ?2 >= (select group_hours_since from roll_up_state)
            on conflict ("group", hour) do update
           set runs = stored.runs + excluded.runs, failed_runs = stored.failed_runs + excluded.failed_runs
    "#;
    let mut add_to_hour = transaction.prepare_cached(ADD_TO_HOUR)?;
    let mut days = BTreeMap::<(String, i64), (i64, i64)>::new();
    for GroupHour { group, hour, runs, failed_runs } in hours {
        add_to_hour.execute(params![group, hour, runs, failed_runs])?;
        let day = hour - hour.rem_euclid(DAY_MILLISECONDS);
        let of_day = days.entry((group, day)).or_default();
        *of_day = (of_day.0 + runs, of_day.1 + failed_runs);
    }
    add_days(transaction, days.into_iter().map(|((group, day), runs)| (group, day, runs)))
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
    let moved = moved();
    format!(
        r#"with counted (device, day, of_group, runs, failed_runs) as materialized (
            select device, {DAY}, {OF_EVENT} as of_group, {EVENT_RUNS}
              from {source} and {moved}
             group by 1, 2, 3
         )
         insert into device_day_groups as stored (device, day, "group", runs, failed_runs)
         select device, day, of_group, {sign}runs, {sign}failed_runs from counted where true
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
    add(transaction, hours.into_iter().map(GroupHour::negative))?;
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
    add(transaction, hours.into_iter())
}

/// Subtracts a device that will be deleted. Its own rows are deleted together with it.
pub(super) fn forget(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    let days = format!(
        r#"select of_group, day, sum(runs), sum(failed_runs) from ({}) group by 1, 2"#,
        days_of_devices("where days.device = ?1")
    );
    let days: Vec<GroupHour> = transaction
        .prepare_cached(&days)?
        .query_map([device], GroupHour::read)?
        .collect::<rusqlite::Result<_>>()?;
    // The hours of events that are no longer kept are unknown: they are subtracted from the first hour of their day.
    let watermark = aggregated_events::watermark(transaction)?;
    let kept = hours_of(transaction, "device = ?1 and id <= ?2", [device, watermark])?;
    let mut rest = BTreeMap::<(String, i64), (i64, i64)>::new();
    for GroupHour { group, hour, runs, failed_runs } in days {
        rest.insert((group, hour), (runs, failed_runs));
    }
    for GroupHour { group, hour, runs, failed_runs } in &kept {
        let day = hour - hour.rem_euclid(DAY_MILLISECONDS);
        let of_day = rest.entry((group.clone(), day)).or_default();
        *of_day = (of_day.0 - runs, of_day.1 - failed_runs);
    }
    let rest = rest.into_iter().map(|((group, hour), (runs, failed_runs))| GroupHour {
        group,
        hour,
        runs,
        failed_runs,
    });
    add(transaction, kept.into_iter().chain(rest).map(GroupHour::negative))
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
    const NOTE: &str = r#"
        insert into group_changes (device, changed_at, changed_id, former_group)
        select id, ?2, (select folded_id + 1 from roll_up_state), ifnull("group", '')
          from devices
         where device_id = ?1 and "group" is not ?3
    "#;
    let group = group.map(GroupName::as_str);
    transaction
        .prepare_cached(NOTE)?
        .execute(params![device_id.as_str(), at.as_millisecond(), group])
        .map(|_| ())
}

/// Drops hours that are over for long.
pub(super) fn drop_old_hours(writer: &mut WriteConnection, now: Timestamp) -> rusqlite::Result<()> {
    const KEEP: &str = "update roll_up_state set group_hours_since = max(group_hours_since, ?1)";
    const DROP: &str =
        "delete from group_hours where hour < (select group_hours_since from roll_up_state)";
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute(KEEP, [first_kept_hour(now).as_millisecond()])?;
    transaction.execute(DROP, [])?;
    transaction.commit()
}

/// The first hour from which on every event is kept that is dated later.
fn countable_since(connection: &Connection, now: Timestamp) -> rusqlite::Result<i64> {
    let events_since = expiry::streaks_since(connection)?.as_millisecond();
    let hour = events_since.saturating_add(HOUR_MILLISECONDS - 1);
    let hour = hour.saturating_sub(hour.rem_euclid(HOUR_MILLISECONDS));
    Ok(hour.max(first_kept_hour(now).as_millisecond()))
}

/// What the tables of groups must have. The parameter is the first hour to count.
struct Expected {
    day_groups: String,
    days: String,
    hours: String,
}

impl Expected {
    fn new() -> Self {
        const AGGREGATED: &str = "id <= (select folded_id from roll_up_state)";
        let moved = moved();
        Self {
            day_groups: format!(
                "select device, {DAY} as day, {OF_EVENT} as of_group, {EVENT_RUNS}
                   from sync_events
                  where {AGGREGATED} and {moved}
                  group by 1, 2, 3"
            ),
            days: format!(
                "select of_group, day, sum(runs), sum(failed_runs) from ({}) group by 1, 2",
                days_of_devices("")
            ),
            // Neither counts nor dates keep SQLite from reading the events one after the other.
            hours: format!(
                "select {OF_EVENT} as of_group, {HOUR} as hour, {EVENT_RUNS}
                   from sync_events not indexed
                  where {AGGREGATED} and timestamp >= ?1
                  group by 1, 2"
            ),
        }
    }
}

/// How many days and hours of groups differ from what they are made from, and how many hours are not counted yet although
/// their events are kept.
pub(super) fn differences(
    connection: &Connection,
    now: Timestamp,
) -> rusqlite::Result<(u64, u64, u64)> {
    let count = |key: &str, stored: &str, expected: &str, hour: Option<i64>| {
        let keys = key.split(", ").count();
        let numbers: Vec<_> = (1..=keys).map(|number| number.to_string()).collect();
        let numbers = numbers.join(", ");
        let columns = format!("{key}, runs, failed_runs");
        let select = format!(
            "with expected ({columns}) as ({expected})
             select count(*)
               from (
                   select {key}
                     from (
                         select {columns} from {stored}
                         union all
                         select {key}, -runs, -failed_runs from expected
                     )
                    group by {numbers}
                   having sum(runs) <> 0 or sum(failed_runs) <> 0
               )"
        );
        let read = |row: &Row<'_>| row.get::<_, i64>(0).map(i64::cast_unsigned);
        match hour {
            None => connection.query_row(&select, [], read),
            Some(hour) => connection.query_row(&select, [hour], read),
        }
    };
    let Expected { day_groups, days, hours } = Expected::new();
    let mut wrong_days = count(r#""group", day"#, "group_days", &days, None)?;
    if expiry::raw_since(connection)?.is_none() {
        wrong_days += count(r#"device, day, "group""#, "device_day_groups", &day_groups, None)?;
    }
    let (since, countable) = (hours_since(connection)?, countable_since(connection, now)?);
    let counted = since.max(countable);
    let stored = "group_hours where hour >= ?1";
    let wrong_hours = count(r#""group", hour"#, stored, &hours, Some(counted))?;
    let end = now.as_millisecond();
    let uncounted = (since.min(end) - countable).max(0) / HOUR_MILLISECONDS;
    Ok((wrong_days, wrong_hours, uncounted.cast_unsigned()))
}

fn hours_since(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("select group_hours_since from roll_up_state", [], |row| row.get(0))
}

/// Makes days and hours of groups anew from what they are made from, as far as that is kept.
pub(super) fn rebuild(transaction: &Transaction<'_>, now: Timestamp) -> rusqlite::Result<()> {
    let Expected { day_groups, days, hours } = Expected::new();
    if expiry::raw_since(transaction)?.is_none() {
        transaction.execute("delete from device_day_groups", [])?;
        transaction.execute(
            &format!(
                r#"insert into device_day_groups (device, day, "group", runs, failed_runs) {day_groups}"#
            ),
            [],
        )?;
    }
    transaction.execute("delete from group_days", [])?;
    let insert = format!(r#"insert into group_days ("group", day, runs, failed_runs) {days}"#);
    transaction.execute(&insert, [])?;
    let countable = countable_since(transaction, now)?;
    transaction.execute("delete from group_hours where hour >= ?1", [countable])?;
    let insert = format!(r#"insert into group_hours ("group", hour, runs, failed_runs) {hours}"#);
    transaction.execute(&insert, [countable])?;
    const COUNTED: &str = "update roll_up_state set group_hours_since = min(group_hours_since, ?1)";
    transaction.execute(COUNTED, [countable]).map(|_| ())
}
