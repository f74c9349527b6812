//! Runs by group: of each day, and of each hour of the last two weeks. A run belongs to the group in which its device was
//! when the run was received, wherever the device has moved since. `roll_ups` calls it for all that it aggregates and
//! subtracts. The tables must always agree with `device_days`, which knows nothing of groups.

use deadpool_postgres::Transaction;
use pisync_core::{DeviceId, GroupName, Timestamp};
use tokio_postgres::{Error, types::ToSql};

use super::aggregated_events::{DAY, HOUR};
use crate::store::group_runs::{HOUR_MILLISECONDS, first_kept_hour};

/// SQL for the group to which a row of `sync_events` belongs: the former group of the first move after the event, or the
/// device's group now. A move is noted behind the watermark, so that what was aggregated before it stays where it is.
pub(super) const OF_EVENT: &str = r#"
    coalesce(
        (select former_group
           from group_changes move
          where move.device_id = sync_events.device_id
            and (sync_events.created_at < move.changed_at or sync_events.id < move.changed_id)
          order by move.id
          limit 1),
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
            (select former_group from group_changes move where move.device_id = {device_id} order by move.id limit 1),
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

/// A statement that adds the events of `source`, the rest of a `from` clause, to the days of devices that moved, or
/// subtracts them with the `sign` "-". The source is called `sync_events`.
pub(super) fn add_day_groups_of(source: &str, condition: &str, sign: &str) -> String {
    let moved = moved();
    format!(
        r#"insert into device_day_groups as stored (device_id, day, "group", runs, failed_runs)
           select device_id, day, of_group, {sign}runs, {sign}failed_runs
             from (
                 select device_id, {DAY} as day, {OF_EVENT} as of_group, {EVENT_RUNS}
                   from {source} sync_events
                  where {condition} and {moved}
                  group by 1, 2, 3
             ) counted (device_id, day, of_group, runs, failed_runs)
            order by 1, 2, 3
               on conflict (device_id, day, "group") {ADD}"#
    )
}

/// SQL for the hours of groups to which the events of `source` belong: of_group, hour, runs, failed_runs.
fn hours_of(condition: &str) -> String {
    format!(
        "select {OF_EVENT} as of_group, {HOUR} as hour, {EVENT_RUNS}
           from sync_events
          where {condition}
          group by 1, 2"
    )
}

/// Subtracts a device that will be deleted. Its own rows are deleted together with it. The state is locked.
pub(super) async fn forget(
    transaction: &Transaction<'_>,
    device_id: &str,
    watermark: jiff::Timestamp,
) -> Result<(), Error> {
    // The hours of events that are no longer kept are unknown: they are subtracted from the first hour of their day.
    let forget = format!(
        "with kept (of_group, hour, runs, failed_runs) as materialized (
             {}
         ), rest as (
             select of_group, day::timestamp at time zone 'UTC' as hour, runs, failed_runs from ({}) days
              union all
             select of_group, date_trunc('day', hour, 'UTC'), -runs, -failed_runs from kept
         ), gone as (
             select of_group, hour, -runs as runs, -failed_runs as failed_runs from kept
              union all
             select of_group, hour, -runs, -failed_runs from rest
         ), {}
         select",
        hours_of("device_id = $1 and created_at <= $2"),
        days_of_devices("where days.device_id = $1"),
        add("gone")
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
    const NOTE: &str = r#"
        insert into group_changes (device_id, changed_at, changed_id, former_group)
        select device_id, greatest($2, $4::timestamptz + interval '1 ms'), 0, coalesce("group", '')
          from devices
         where device_id = $1 and "group" is distinct from $3
    "#;
    let watermark: Option<jiff::Timestamp> = transaction.query_one(LOCK, &[]).await?.try_get(0)?;
    let group = group.map(GroupName::as_str);
    let parameters: [&(dyn ToSql + Sync); 4] =
        [&device_id.as_str(), &at.to_jiff(), &group, &watermark];
    transaction.execute(NOTE, &parameters).await.map(|_| ())
}

/// Drops hours that are over for long.
pub(super) async fn drop_old_hours(
    transaction: &Transaction<'_>,
    now: Timestamp,
) -> Result<(), Error> {
    const KEEP: &str =
        "update roll_up_state set group_hours_since = greatest(group_hours_since, $1)";
    const DROP: &str =
        "delete from group_hours where hour < (select group_hours_since from roll_up_state)";
    transaction.execute(KEEP, &[&first_kept_hour(now).to_jiff()]).await?;
    transaction.execute(DROP, &[]).await.map(|_| ())
}

/// SQL for the first hour from which on every event is kept that is dated later. $1 is the first hour that is kept.
const COUNTABLE_SINCE: &str = "
    (select greatest($1, date_trunc('hour', streaks_since + interval '59 min 59.999999 s', 'UTC')) from roll_up_state)
";

/// What the tables of groups must have.
struct Expected {
    day_groups: String,
    days: String,
    /// $1 is the first hour.
    hours: String,
}

impl Expected {
    fn new() -> Self {
        const AGGREGATED: &str = "created_at <= (select folded_until from roll_up_state)";
        let moved = moved();
        Self {
            day_groups: format!(
                "select device_id, {DAY}, {OF_EVENT}, {EVENT_RUNS}
                   from sync_events
                  where {AGGREGATED} and {moved}
                  group by 1, 2, 3"
            ),
            days: format!(
                "select of_group, day, sum(runs)::bigint, sum(failed_runs)::bigint from ({}) days group by 1, 2",
                days_of_devices("")
            ),
            hours: hours_of(&format!("{AGGREGATED} and timestamp >= $1")),
        }
    }
}

/// How many days and hours of groups differ from what they are made from, and how many hours are not counted yet although
/// their events are kept.
pub(super) async fn differences(
    snapshot: &Transaction<'_>,
    now: Timestamp,
) -> Result<(u64, u64, u64), Error> {
    const STATE: &str = "select raw_since is null, group_hours_since from roll_up_state";
    let wrong = |key: &str, stored: &str, expected: &str| {
        let columns = format!("{key}, runs, failed_runs");
        format!(
            "with expected ({columns}) as ({expected})
             select count(*)
               from (
                   select {key}
                     from (
                         select {columns} from {stored}
                         union all
                         select {key}, -runs, -failed_runs from expected
                     ) differences
                    group by {key}
                   having sum(runs) <> 0 or sum(failed_runs) <> 0
               ) wrong"
        )
    };
    let count = async |select: String, parameters: &[&(dyn ToSql + Sync)]| -> Result<u64, Error> {
        let row = snapshot.query_one(&select, parameters).await?;
        row.try_get::<_, i64>(0).map(i64::cast_unsigned)
    };
    let Expected { day_groups, days, hours } = Expected::new();
    let state = snapshot.query_one(STATE, &[]).await?;
    let (all_kept, since): (bool, jiff::Timestamp) = (state.try_get(0)?, state.try_get(1)?);
    let mut wrong_days = count(wrong(r#""group", day"#, "group_days", &days), &[]).await?;
    if all_kept {
        let key = r#"device_id, day, "group""#;
        wrong_days += count(wrong(key, "device_day_groups", &day_groups), &[]).await?;
    }
    let countable = countable_since(snapshot, now).await?;
    let counted = since.max(countable);
    let stored = "group_hours where hour >= $1";
    let wrong_hours = count(wrong(r#""group", hour"#, stored, &hours), &[&counted]).await?;
    let end = since.min(now.to_jiff()).as_millisecond();
    let uncounted = (end - countable.as_millisecond()).max(0) / HOUR_MILLISECONDS;
    Ok((wrong_days, wrong_hours, uncounted.cast_unsigned()))
}

async fn countable_since(
    transaction: &Transaction<'_>,
    now: Timestamp,
) -> Result<jiff::Timestamp, Error> {
    let select = format!("select {COUNTABLE_SINCE}");
    let kept = first_kept_hour(now).to_jiff();
    transaction.query_one(&select, &[&kept]).await?.try_get(0)
}

/// Makes days and hours of groups anew from what they are made from, as far as that is kept. The state is locked.
pub(super) async fn rebuild(transaction: &Transaction<'_>, now: Timestamp) -> Result<(), Error> {
    const COUNTED: &str =
        "update roll_up_state set group_hours_since = least(group_hours_since, $1)";
    let Expected { day_groups, days, hours } = Expected::new();
    let all_kept: bool = transaction
        .query_one("select raw_since is null from roll_up_state", &[])
        .await?
        .try_get(0)?;
    if all_kept {
        transaction
            .batch_execute(&format!(
                r#"delete from device_day_groups;
                   insert into device_day_groups (device_id, day, "group", runs, failed_runs) {day_groups}"#
            ))
            .await?;
    }
    transaction
        .batch_execute(&format!(
            r#"delete from group_days;
               insert into group_days ("group", day, runs, failed_runs) {days}"#
        ))
        .await?;
    let countable = countable_since(transaction, now).await?;
    transaction.execute("delete from group_hours where hour >= $1", &[&countable]).await?;
    let insert = format!(r#"insert into group_hours ("group", hour, runs, failed_runs) {hours}"#);
    transaction.execute(&insert, &[&countable]).await?;
    transaction.execute(COUNTED, &[&countable]).await.map(|_| ())
}
