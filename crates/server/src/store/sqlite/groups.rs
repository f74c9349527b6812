//! Runs by group: of each day, and of each hour of the last two weeks. A run belongs to the group in which its device was
//! when the run was received, wherever the device has moved since. `roll_ups` calls it for all that it aggregates and
//! subtracts. The tables must always agree with `device_days`, which knows nothing of groups.

use std::collections::BTreeMap;

use pisync_core::Timestamp;
use rusqlite::{
    Connection, Params, Row, Transaction, TransactionBehavior, params, params_from_iter,
    types::Value,
};

use super::{
    aggregated_events::{self, DELETED_EVENTS, DIALECT, DeletedEvents},
    expiry,
    write_connection::WriteConnection,
};
use crate::store::{
    Sums,
    group_runs::{first_countable_hour, kept_since, uncounted_hours},
    roll_up_sql::{ADD_RUNS, Derived, DerivedTable, Dialect},
    verify::DAY_MILLISECONDS,
};

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
    let add_to_hour = format!(
        r#"insert into group_hours as stored ("group", hour, runs, failed_runs)
           select ?1, ?2, ?3, ?4
            where ?2 >= (select group_hours_since from roll_up_state)
               on conflict ("group", hour) {ADD_RUNS}"#
    );
    let mut add_to_hour = transaction.prepare_cached(&add_to_hour)?;
    for GroupHour { group, hour, runs, failed_runs } in hours {
        add_to_hour.execute(params![group, hour, runs, failed_runs])?;
    }
    Ok(())
}

fn add_days(
    transaction: &Transaction<'_>,
    days: impl Iterator<Item = (String, i64, (i64, i64))>,
) -> rusqlite::Result<()> {
    let add_to_day = format!(
        r#"insert into group_days as stored ("group", day, runs, failed_runs) values (?1, ?2, ?3, ?4)
               on conflict ("group", day) {ADD_RUNS}"#
    );
    let mut add_to_day = transaction.prepare_cached(&add_to_day)?;
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
    let add = DIALECT.add_day_groups_of(source, "");
    transaction.prepare_cached(&add)?.execute([watermark, last]).map(|_| ())
}

/// The hours of the groups to which the events belong that match a condition.
fn hours_of(
    transaction: &Transaction<'_>,
    condition: &str,
    parameters: impl Params,
) -> rusqlite::Result<Vec<GroupHour>> {
    let Dialect { hour, event_runs, .. } = DIALECT;
    let select = format!(
        "select {} as of_group, {hour} as hour, {event_runs}
           from sync_events
          where {condition}
          group by of_group, hour",
        DIALECT.group_of_event()
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
    let subtract = DIALECT.add_day_groups_of(&format!("sync_events where {condition}"), "-");
    transaction.prepare_cached(&subtract)?.execute(parameters).map(|_| ())
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
        DIALECT.group_days_of("where days.device = ?1")
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

/// Counts the days of a device that moved again. Its events are aggregated up to the id `watermark`.
pub(super) fn count_device_again(
    transaction: &Transaction<'_>,
    device: i64,
    watermark: i64,
) -> rusqlite::Result<()> {
    transaction.execute("delete from device_day_groups where device = ?1", [device])?;
    let add = DIALECT.add_day_groups_of("sync_events where device = ?1 and id <= ?2", "");
    transaction.prepare_cached(&add)?.execute([device, watermark]).map(|_| ())
}

/// Notes that a device is about to move to another group.
pub(super) fn note_move(
    transaction: &Transaction<'_>,
    device: i64,
    at: Timestamp,
) -> rusqlite::Result<()> {
    // Earlier moves were noted by a clock that was ahead.
    const NOT_LATER: &str =
        "update group_changes set changed_at = ?2 where device = ?1 and changed_at > ?2";
    const NOTE: &str = r#"
        insert into group_changes (device, changed_at, changed_id, former_group)
        select id, ?2, (select folded_id + 1 from roll_up_state), ifnull("group", '')
          from devices
         where id = ?1
    "#;
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

/// A table of groups, and what it must have. Of hours, those are compared that are counted, which is the parameter then.
fn derived(
    connection: &Connection,
    table: DerivedTable,
    now: Timestamp,
) -> rusqlite::Result<(Derived, Option<i64>)> {
    if table != DerivedTable::Hours {
        return Ok((DIALECT.derived(table, None), None));
    }
    let since = hours_since(connection)?.max(countable_since(connection, now)?);
    Ok((DIALECT.derived(table, Some("?1")), Some(since)))
}

/// Whether it is known what a table must have: what belongs to which of a device's groups is known of all events alone.
fn is_known(connection: &Connection, table: DerivedTable) -> rusqlite::Result<bool> {
    Ok(table != DerivedTable::DayGroups || expiry::raw_since(connection)?.is_none())
}

/// How many days and hours of groups differ from what they are made from, and how many hours are not counted yet although
/// their events are kept.
pub(super) fn differences(
    connection: &Connection,
    now: Timestamp,
) -> rusqlite::Result<(u64, u64, u64)> {
    let count = |table| -> rusqlite::Result<u64> {
        if !is_known(connection, table)? {
            return Ok(0);
        }
        let (derived, since) = derived(connection, table, now)?;
        let count = format!("select count(*) from ({})", derived.differences());
        let number =
            connection.query_row(&count, params_from_iter(since), |row| row.get::<_, i64>(0))?;
        Ok(number.cast_unsigned())
    };
    let wrong_days = count(DerivedTable::DayGroups)? + count(DerivedTable::Days)?;
    let wrong_hours = count(DerivedTable::Hours)?;
    let (since, countable) = (hours_since(connection)?, countable_since(connection, now)?);
    Ok((wrong_days, wrong_hours, uncounted_hours(since, countable, now)))
}

/// What to add to the rows of a table, as of one moment. Aggregation and deletions change a row and what it must have alike,
/// so that the correction stays right until it is added. Only another repair would make it wrong.
pub(super) struct Correction {
    derived: Derived,
    rows: Vec<Vec<Value>>,
    repairs: i64,
}

/// Finds what is wrong in a table.
pub(super) fn correction(
    connection: &Connection,
    table: DerivedTable,
    now: Timestamp,
) -> rusqlite::Result<Correction> {
    let snapshot = connection.unchecked_transaction()?;
    let repairs =
        snapshot.query_row("select group_repairs from roll_up_state", [], |row| row.get(0))?;
    let (derived, since) = derived(&snapshot, table, now)?;
    let mut rows = Vec::new();
    if is_known(&snapshot, table)? {
        let columns = derived.columns();
        rows = snapshot
            .prepare(&derived.differences())?
            .query_map(params_from_iter(since), |row| {
                (0..columns).map(|column| row.get(column)).collect()
            })?
            .collect::<rusqlite::Result<_>>()?;
    }
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
    let numbers: Vec<_> =
        (1..=correction.derived.columns()).map(|number| format!("?{number}")).collect();
    let values = format!("values ({})", numbers.join(", "));
    let mut correct = transaction.prepare(&correction.derived.correct(&values))?;
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
