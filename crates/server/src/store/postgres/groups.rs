//! Runs by group: of each day, and of each hour of the last two weeks. A run belongs to the group in which its device was
//! when the run was received, wherever the device has moved since. `roll_ups` calls it for all that it aggregates and
//! subtracts. The tables must always agree with `device_days`, which knows nothing of groups.

use deadpool_postgres::Transaction;
use pisync_core::Timestamp;
use tokio_postgres::{Error, IsolationLevel, Row};

use super::{aggregated_events::DIALECT, connect::Object};
use crate::store::{
    group_runs::{first_countable_hour, kept_since, uncounted_hours},
    roll_up_sql::{ADD_RUNS, Derived, DerivedTable},
};

/// Common table expressions that add to hours and days of groups. `hours`, the name of another one, has the columns
/// of_group, hour, runs and failed_runs, and may have several rows of a group's hour. Rows are locked in the order of hours,
/// then of days; whoever needs the days' locks first selects from `group_days_added`.
pub(super) fn add(hours: &str) -> String {
    format!(
        r#"group_hours_added as (
             insert into group_hours as stored ("group", hour, runs, failed_runs)
             select of_group, hour, sum(runs)::bigint, sum(failed_runs)::bigint
               from {hours}
              where hour >= (select group_hours_since from roll_up_state)
              group by 1, 2
              order by 1, 2
                 on conflict ("group", hour) {ADD_RUNS}
             returning hour
         ), group_days_added as (
             insert into group_days as stored ("group", day, runs, failed_runs)
             select of_group, (hour at time zone 'UTC')::date, sum(runs)::bigint, sum(failed_runs)::bigint
               from {hours}
              where (select count(*) from group_hours_added) >= 0
              group by 1, 2
              order by 1, 2
                 on conflict ("group", day) {ADD_RUNS}
             returning day
         )"#
    )
}

/// Subtracts a device that will be deleted. Its own rows are deleted together with it. Hours are kept no longer than
/// events, so the events that are left tell what to subtract from them. The state is locked.
pub(super) async fn forget(
    transaction: &Transaction<'_>,
    device_id: &str,
    watermark: jiff::Timestamp,
) -> Result<(), Error> {
    let forget = format!(
        r#"with kept ("group", hour, runs, failed_runs) as materialized (
             {}
         ), hours as (
             insert into group_hours as stored ("group", hour, runs, failed_runs)
             select "group", hour, -runs, -failed_runs from kept
              order by 1, 2
                 on conflict ("group", hour) {ADD_RUNS}
             returning hour
         )
         insert into group_days as stored ("group", day, runs, failed_runs)
         select of_group, day, -sum(runs)::bigint, -sum(failed_runs)::bigint
           from ({}) days
          where (select count(*) from hours) >= 0
          group by 1, 2
          order by 1, 2
             on conflict ("group", day) {ADD_RUNS}"#,
        DIALECT.table("group_hours").of_events("device_id = $1 and created_at <= $2"),
        DIALECT.group_days_of("where days.device_id = $1")
    );
    transaction.execute(&forget, &[&device_id, &watermark]).await.map(|_| ())
}

/// Counts the days of a device that moved again. Its events are aggregated up to `watermark`. The state is locked.
pub(super) async fn count_device_again(
    transaction: &Transaction<'_>,
    device_id: &str,
    watermark: jiff::Timestamp,
) -> Result<(), Error> {
    const DELETE: &str = "delete from device_day_groups where device_id = $1";
    let events = "sync_events where device_id = $1 and created_at <= $2";
    let add = DIALECT.add_day_groups_of(events, "");
    transaction.execute(DELETE, &[&device_id]).await?;
    transaction.execute(&add, &[&device_id, &watermark]).await.map(|_| ())
}

/// Has aggregation wait until moves are there for it to see. Devices are locked after this. Answers up to when events are
/// aggregated.
pub(super) async fn lock_for_moves(
    transaction: &Transaction<'_>,
) -> Result<Option<Timestamp>, Error> {
    const LOCK: &str = "select folded_until from roll_up_state for share";
    let watermark: Option<jiff::Timestamp> = transaction.query_one(LOCK, &[]).await?.try_get(0)?;
    Ok(watermark.map(Timestamp::truncate))
}

/// Notes that devices, which are locked, are about to move to other groups. What has been aggregated, up to `watermark`,
/// stays in the former groups.
pub(super) async fn note_moves(
    transaction: &Transaction<'_>,
    device_ids: &[&str],
    at: Timestamp,
    watermark: Option<Timestamp>,
) -> Result<(), Error> {
    // Earlier moves were noted by a clock that was ahead.
    const NOT_LATER: &str = "
        update group_changes set changed_at = $2 where device_id = any ($1::text[]) and changed_at > $2
    ";
    const NOTE: &str = r#"
        insert into group_changes (device_id, changed_at, changed_id, former_group)
        select device_id, $2,
               coalesce((select max(changed_id) from group_changes c where c.device_id = d.device_id), 0),
               coalesce("group", '')
          from devices d
         where device_id = any ($1::text[])
         order by device_id
    "#;
    if device_ids.is_empty() {
        return Ok(());
    }
    let after = watermark.map(|watermark| watermark.saturating_add_milliseconds(1));
    let at = Some(at).max(after).unwrap_or(at).to_jiff();
    transaction.execute(NOT_LATER, &[&device_ids, &at]).await?;
    transaction.execute(NOTE, &[&device_ids, &at]).await.map(|_| ())
}

/// Drops hours that are over for long, or whose events are no longer kept. A clock that was ahead may have dropped hours
/// that are still to come: from the next one on they are counted again.
pub(super) async fn drop_old_hours(connection: &mut Object, now: Timestamp) -> Result<(), Error> {
    const KEEP: &str = "update roll_up_state set group_hours_since = $1";
    const DROP: &str = "delete from group_hours where hour < $1";
    let state = State::read(&connection.query_one(STATE, &[]).await?)?;
    let since = state.hours_since.as_millisecond();
    let kept = kept_since(since, state.countable(now).as_millisecond(), now);
    let Some(kept) = Timestamp::from_millisecond(kept).filter(|_| kept != since) else {
        return Ok(());
    };
    let transaction = connection.transaction().await?;
    transaction.execute(KEEP, &[&kept.to_jiff()]).await?;
    transaction.execute(DROP, &[&kept.to_jiff()]).await?;
    transaction.commit().await
}

/// What the tables of groups depend on.
struct State {
    /// Hours before this are not counted.
    hours_since: Timestamp,
    /// All events that are dated from this on are kept.
    complete_since: Timestamp,
    /// Whether all events are kept.
    all_kept: bool,
    /// How often the tables were repaired.
    repairs: i64,
}

impl State {
    fn read(row: &Row) -> Result<Self, Error> {
        let complete_since: Option<jiff::Timestamp> = row.try_get(1)?;
        Ok(Self {
            hours_since: Timestamp::truncate(row.try_get(0)?),
            complete_since: complete_since.map_or(Timestamp::MIN, Timestamp::truncate),
            all_kept: row.try_get(2)?,
            repairs: row.try_get(3)?,
        })
    }

    /// The first hour that can be counted.
    fn countable(&self, now: Timestamp) -> Timestamp {
        first_countable_hour(self.complete_since, now)
    }

    /// A table of groups, and what it must have. Of hours, those are compared that are counted. `None` when it is not known:
    /// what belongs to which of a device's groups is known of all events alone.
    fn derived(&self, table: DerivedTable, now: Timestamp) -> Option<Derived> {
        let since = self.hours_since.max(self.countable(now));
        match table {
            DerivedTable::DayGroups if !self.all_kept => None,
            DerivedTable::DayGroups | DerivedTable::Days => Some(DIALECT.derived(table, None)),
            // A literal, because a statement that makes a table takes no parameters.
            DerivedTable::Hours => {
                Some(DIALECT.derived(table, Some(&format!("timestamptz '{since}'"))))
            }
        }
    }
}

/// Reads a [`State`], with [`State::read`].
const STATE: &str =
    "select group_hours_since, streaks_since, raw_since is null, group_repairs from roll_up_state";

/// How many days and hours of groups differ from what they are made from, and how many hours are not counted yet although
/// their events are kept.
pub(super) async fn differences(
    snapshot: &Transaction<'_>,
    now: Timestamp,
) -> Result<(u64, u64, u64), Error> {
    let state = State::read(&snapshot.query_one(STATE, &[]).await?)?;
    let count = async |table| -> Result<u64, Error> {
        let Some(derived) = state.derived(table, now) else { return Ok(0) };
        let count = format!("select count(*) from ({}) wrong", derived.differences());
        snapshot.query_one(&count, &[]).await?.try_get::<_, i64>(0).map(i64::cast_unsigned)
    };
    let wrong_days = count(DerivedTable::DayGroups).await? + count(DerivedTable::Days).await?;
    let wrong_hours = count(DerivedTable::Hours).await?;
    let (since, countable) = (state.hours_since, state.countable(now));
    let uncounted = uncounted_hours(since.as_millisecond(), countable.as_millisecond(), now);
    Ok((wrong_days, wrong_hours, uncounted))
}

/// Corrects the tables. Each is compared in a snapshot of its own, for which nobody waits. Aggregation and deletions change a
/// row and what it must have alike, so that what is to be added stays right until it is added. Only another repair would
/// make it wrong: then nothing is added.
pub(super) async fn repair(connection: &mut Object, now: Timestamp) -> Result<(), Error> {
    const COUNT_ALL: &str =
        "update roll_up_state set group_hours_since = least(group_hours_since, $1)";
    const COUNT: &str =
        "update roll_up_state set group_repairs = group_repairs + 1 where group_repairs = $1";
    let countable = State::read(&connection.query_one(STATE, &[]).await?)?.countable(now);
    connection.execute(COUNT_ALL, &[&countable.to_jiff()]).await?;
    for table in DerivedTable::ALL {
        let snapshot = connection
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .start()
            .await?;
        snapshot.batch_execute("set local statement_timeout = 0").await?;
        let state = State::read(&snapshot.query_one(STATE, &[]).await?)?;
        let Some(derived) = state.derived(table, now) else { continue };
        let find = format!(
            "drop table if exists pg_temp.corrections;
             create temporary table corrections on commit preserve rows as {}",
            derived.differences()
        );
        snapshot.batch_execute(&find).await?;
        snapshot.commit().await?;
        let key = derived.key();
        let rows = format!("select {key}, runs, failed_runs from corrections order by {key}");
        let transaction = connection.transaction().await?;
        if transaction.execute(COUNT, &[&state.repairs]).await? == 1 {
            transaction.execute(&derived.correct(&rows), &[]).await?;
        }
        transaction.batch_execute("drop table corrections").await?;
        transaction.commit().await?;
    }
    Ok(())
}
