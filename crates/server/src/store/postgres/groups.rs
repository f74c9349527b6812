//! Runs by group: of each day, and of each hour of the last two weeks. A run belongs to the group in which its device was
//! when the run was received, wherever the device has moved since. `roll_ups` calls it for all that it aggregates and
//! subtracts. The tables must always agree with `device_days`, which knows nothing of groups.

use deadpool_postgres::Transaction;
use pisync_core::{DeviceId, GroupName, Timestamp};
use tokio_postgres::{Error, IsolationLevel, Row, types::ToSql};

use super::{
    aggregated_events::{DAY, HOUR},
    connect::Object,
};
use crate::store::group_runs::{first_countable_hour, kept_since, uncounted_hours};

/// SQL for the group to which a row of `sync_events` belongs: the former group of the first move after the event, or the
/// device's group now. A move is noted behind the watermark, so that what was aggregated before it stays where it is. Times
/// and ids only rise from move to move, so each index finds the first one.
pub(super) const OF_EVENT: &str = r#"
    coalesce(
        (select former_group
           from group_changes move
          where move.id = least(
                    (select id
                       from group_changes later
                      where later.device_id = sync_events.device_id
                        and later.changed_at > sync_events.created_at
                      order by later.changed_at, later.id
                      limit 1),
                    (select id
                       from group_changes later
                      where later.device_id = sync_events.device_id
                        and later.changed_id > sync_events.id
                      order by later.changed_id, later.id
                      limit 1)
                )),
        (select "group" from devices where devices.device_id = sync_events.device_id),
        ''
    )
"#;

/// The condition that a row of `sync_events` counts in `group_hours`.
pub(super) const IS_KEPT_HOUR: &str = "timestamp >= (select group_hours_since from roll_up_state)";

/// SQL for the runs and the failed runs of rows of `sync_events`.
pub(super) const EVENT_RUNS: &str = "count(*), count(*) filter (where total_errors > 0)";

/// The end of an upsert that adds runs to a row, which the statement calls `stored`.
const ADD: &str = "
    do update set runs = stored.runs + excluded.runs, failed_runs = stored.failed_runs + excluded.failed_runs
";

/// SQL for the group in which a device was at first, given SQL for its id.
fn first_of(device_id: &str) -> String {
    format!(
        r#"coalesce(
            (select former_group from group_changes move where move.device_id = {device_id}
              order by move.changed_id, move.id limit 1),
            (select "group" from devices where devices.device_id = {device_id}),
            ''
        )"#
    )
}

/// The condition that a row of `sync_events` counts in `device_day_groups`.
pub(super) fn moved() -> String {
    let first = first_of("sync_events.device_id");
    format!("device_id in (select device_id from group_changes) and {OF_EVENT} <> {first}")
}

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
                 on conflict ("group", hour) {ADD}
             returning hour
         ), group_days_added as (
             insert into group_days as stored ("group", day, runs, failed_runs)
             select of_group, (hour at time zone 'UTC')::date, sum(runs)::bigint, sum(failed_runs)::bigint
               from {hours}
              where (select count(*) from group_hours_added) >= 0
              group by 1, 2
              order by 1, 2
                 on conflict ("group", day) {ADD}
             returning day
         )"#
    )
}

/// A statement that adds the events of `source` that match `condition` to the days of devices that moved, or subtracts them
/// with the `sign` "-". The source is called `sync_events`.
pub(super) fn add_day_groups_of(source: &str, condition: &str, sign: &str) -> String {
    let first = first_of("sync_events.device_id");
    format!(
        r#"insert into device_day_groups as stored (device_id, day, "group", runs, failed_runs)
           select device_id, day, of_group, {sign}runs, {sign}failed_runs
             from (
                 select device_id, {DAY} as day, {OF_EVENT} as of_group, {first} as first_group, {EVENT_RUNS}
                   from {source} sync_events
                  where {condition} and device_id in (select device_id from group_changes)
                  group by 1, 2, 3, 4
             ) counted (device_id, day, of_group, first_group, runs, failed_runs)
            where of_group <> first_group
            order by 1, 2, 3
               on conflict (device_id, day, "group") {ADD}"#
    )
}

/// SQL for the hours of groups to which the events belong that match `condition`: of_group, hour, runs, failed_runs.
fn hours_of(condition: &str) -> String {
    format!(
        "select {OF_EVENT} as of_group, {HOUR} as hour, {EVENT_RUNS}
           from sync_events
          where {condition}
          group by 1, 2"
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
        r#"with hours as (
             insert into group_hours as stored ("group", hour, runs, failed_runs)
             select of_group, hour, -runs, -failed_runs
               from ({}) kept (of_group, hour, runs, failed_runs)
              where hour >= (select group_hours_since from roll_up_state)
              order by 1, 2
                 on conflict ("group", hour) {ADD}
             returning hour
         )
         insert into group_days as stored ("group", day, runs, failed_runs)
         select of_group, day, -sum(runs)::bigint, -sum(failed_runs)::bigint
           from ({}) days
          where (select count(*) from hours) >= 0
          group by 1, 2
          order by 1, 2
             on conflict ("group", day) {ADD}"#,
        hours_of("device_id = $1 and created_at <= $2"),
        days_of_devices("where days.device_id = $1")
    );
    transaction.execute(&forget, &[&device_id, &watermark]).await.map(|_| ())
}

/// SQL for the days of devices with the group to which they belong: of_group, day, runs, failed_runs. `condition` chooses
/// `days` by their `device_id`.
fn days_of_devices(condition: &str) -> String {
    let first = first_of("days.device_id");
    format!(
        r#"select {first} as of_group, day, total_syncs as runs, failed_syncs as failed_runs
             from device_days days {condition}
            union all
           select {first}, day, -runs, -failed_runs from device_day_groups days {condition}
            union all
           select "group", day, runs, failed_runs from device_day_groups days {condition}"#
    )
}

/// Counts the days of a device that moved again. Its events are aggregated up to `watermark`. The state is locked.
pub(super) async fn count_device_again(
    transaction: &Transaction<'_>,
    device_id: &str,
    watermark: jiff::Timestamp,
) -> Result<(), Error> {
    const DELETE: &str = "delete from device_day_groups where device_id = $1";
    let add = add_day_groups_of("sync_events", "device_id = $1 and created_at <= $2", "");
    transaction.execute(DELETE, &[&device_id]).await?;
    transaction.execute(&add, &[&device_id, &watermark]).await.map(|_| ())
}

/// Notes that a device is about to move to another group, if it is. What has been aggregated stays in the former group.
pub(super) async fn note_move(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    group: Option<&GroupName>,
    at: Timestamp,
) -> Result<(), Error> {
    // Aggregation waits until the move is there for it to see.
    const LOCK: &str = "select folded_until from roll_up_state for share";
    const MOVES: &str = r#"
        select from devices where device_id = $1 and "group" is distinct from $2 for no key update
    "#;
    // Earlier moves were noted by a clock that was ahead.
    const NOT_LATER: &str =
        "update group_changes set changed_at = $2 where device_id = $1 and changed_at > $2";
    const NOTE: &str = r#"
        insert into group_changes (device_id, changed_at, changed_id, former_group)
        select device_id, $2,
               coalesce((select max(changed_id) from group_changes where device_id = $1), 0),
               coalesce("group", '')
          from devices
         where device_id = $1
    "#;
    let watermark: Option<jiff::Timestamp> = transaction.query_one(LOCK, &[]).await?.try_get(0)?;
    let (device_id, group) = (device_id.as_str(), group.map(GroupName::as_str));
    if transaction.query_opt(MOVES, &[&device_id, &group]).await?.is_none() {
        return Ok(());
    }
    let after =
        watermark.map(|watermark| Timestamp::truncate(watermark).saturating_add_milliseconds(1));
    let at = Some(at).max(after).unwrap_or(at).to_jiff();
    transaction.execute(NOT_LATER, &[&device_id, &at]).await?;
    transaction.execute(NOTE, &[&device_id, &at]).await.map(|_| ())
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
}

/// Reads a [`State`], with [`State::read`].
const STATE: &str =
    "select group_hours_since, streaks_since, raw_since is null, group_repairs from roll_up_state";

const AGGREGATED: &str = "created_at <= (select folded_until from roll_up_state)";

/// A table of groups, and SQL for what it must have. Hours have a parameter: the first one that is compared.
struct Derived {
    table: &'static str,
    key: &'static str,
    expected: String,
    since: Option<jiff::Timestamp>,
}

fn day_groups() -> Derived {
    let moved = moved();
    Derived {
        table: "device_day_groups",
        key: r#"device_id, day, "group""#,
        expected: format!(
            "select device_id, {DAY}, {OF_EVENT}, {EVENT_RUNS}
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
            "select of_group, day, sum(runs)::bigint, sum(failed_runs)::bigint from ({}) days group by 1, 2",
            days_of_devices("")
        ),
        since: None,
    }
}

fn hours(since: Timestamp) -> Derived {
    Derived {
        table: "group_hours",
        key: r#""group", hour"#,
        expected: hours_of(&format!("{AGGREGATED} and timestamp >= $1")),
        since: Some(since.to_jiff()),
    }
}

impl Derived {
    /// SQL for the rows that differ: their keys, and what must be added to their runs and failed runs.
    fn differences(&self) -> String {
        let Self { table, key, expected, since } = self;
        let columns = format!("{key}, runs, failed_runs");
        let compared = if since.is_some() { "where hour >= $1" } else { "" };
        format!(
            "with expected ({columns}) as ({expected})
             select {key}, sum(runs)::bigint as runs, sum(failed_runs)::bigint as failed_runs
               from (
                   select {columns} from expected
                   union all
                   select {key}, -runs, -failed_runs from {table} {compared}
               ) differences
              group by {key}
             having sum(runs) <> 0 or sum(failed_runs) <> 0"
        )
    }

    fn parameters(&self) -> Vec<&(dyn ToSql + Sync)> {
        self.since.iter().map(|since| since as &(dyn ToSql + Sync)).collect()
    }

    async fn count(&self, snapshot: &Transaction<'_>) -> Result<u64, Error> {
        let count = format!("select count(*) from ({}) wrong", self.differences());
        let row = snapshot.query_one(&count, &self.parameters()).await?;
        row.try_get::<_, i64>(0).map(i64::cast_unsigned)
    }
}

/// How many days and hours of groups differ from what they are made from, and how many hours are not counted yet although
/// their events are kept.
pub(super) async fn differences(
    snapshot: &Transaction<'_>,
    now: Timestamp,
) -> Result<(u64, u64, u64), Error> {
    let state = State::read(&snapshot.query_one(STATE, &[]).await?)?;
    let mut wrong_days = days().count(snapshot).await?;
    if state.all_kept {
        wrong_days += day_groups().count(snapshot).await?;
    }
    let (since, countable) = (state.hours_since, state.countable(now));
    let wrong_hours = hours(since.max(countable)).count(snapshot).await?;
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
    let state = State::read(&connection.query_one(STATE, &[]).await?)?;
    let countable = state.countable(now);
    connection.execute(COUNT_ALL, &[&countable.to_jiff()]).await?;
    // Days are made from the days of devices that moved.
    for derived in [day_groups(), days(), hours(countable)] {
        let key = derived.key;
        let find = format!(
            "drop table if exists pg_temp.corrections;
             create temporary table corrections on commit preserve rows as {}",
            derived.differences()
        );
        let correct = format!(
            "insert into {} as stored ({key}, runs, failed_runs)
             select {key}, runs, failed_runs from corrections order by {key}
                 on conflict ({key}) {ADD}",
            derived.table
        );
        let snapshot = connection
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .start()
            .await?;
        snapshot.batch_execute("set local statement_timeout = 0").await?;
        let state = State::read(&snapshot.query_one(STATE, &[]).await?)?;
        if !state.all_kept && derived.table == "device_day_groups" {
            continue;
        }
        // A statement that makes a table takes no parameters.
        let find = match derived.since {
            None => find,
            Some(since) => find.replace("$1", &format!("timestamptz '{since}'")),
        };
        snapshot.batch_execute(&find).await?;
        snapshot.commit().await?;
        let transaction = connection.transaction().await?;
        if transaction.execute(COUNT, &[&state.repairs]).await? == 1 {
            transaction.execute(&correct, &[]).await?;
        }
        transaction.batch_execute("drop table corrections").await?;
        transaction.commit().await?;
    }
    Ok(())
}
