//! The summaries of devices in SQLite: brings them up to date, and reads lists and counts from them. The watermark is the
//! id of an event: only later devices, those with later events, and those in `stale_summaries`, may differ from their
//! summaries.

use std::collections::BTreeSet;

use rusqlite::{
    Connection, Row, Transaction, TransactionBehavior, params, params_from_iter, types::Value,
};

use super::{
    rows::{device_row, figures, job_sums},
    write_connection::WriteConnection,
};
use crate::store::{
    Device,
    device_list::{self, Dialect, Filter, Order, SORTED_IN_MEMORY, Statement},
    figure_columns::{DEVICE_COLUMNS, FIGURES},
    ordered_scan::{Direction, KeyPart, Part, Place, Places, Request, Scan, page_of},
    stats::{LatestSummaries, has_most_recent, most_recent},
    summaries::{
        COLUMNS, ChangedDevice, CountChanges, LARGEST_BUCKET, MINUTE_MILLISECONDS, Measure,
        Summary, SummaryOrder, minute_of,
    },
};

const DIALECT: Dialect = Dialect {
    placeholder: '?',
    like: "like",
    device_of_row: "d.id = s.device",
    created_at: "d.created_at",
    time: str::to_owned,
    device: ("d.id", "device"),
    is_overdue: "h.is_overdue = 1",
};

/// Devices that may differ from their summaries. The latest events are found by their ids, of which SQLite thinks less than
/// of reading an index from end to end.
const CHANGED: &str = "
    select device from sync_events not indexed where id > (select summarized_id from roll_up_state)
    union
    select id from devices where id > (select summarized_device from roll_up_state)
    union
    select device from stale_summaries
";

/// What a summary is made from, in the order of [`COLUMNS`].
const FRESH: &str = "
    max(j.last_received), max(j.last_sync), max(j.last_success),
    ifnull(max(j.last_failure), -9223372036854775808), sum(j.total_syncs), sum(j.failed_syncs),
    max(j.consecutive_failures)
";

/// What the counts are made from.
const COUNTED: &str = "
    select 'last_seen' as measure,
           (last_seen - (last_seen % 60000 + 60000) % 60000) / 60000 as bucket,
           count(*) as devices
      from device_summaries
     where last_seen is not null
     group by 2
    union all
    select 'failed_syncs', min(ifnull(failed_syncs, 0), 100), count(*) from device_summaries group by 2
    union all
    select 'consecutive_failures', min(ifnull(consecutive_failures, 0), 100), count(*)
      from device_summaries
     group by 2
";

fn values(parameters: Vec<KeyPart>) -> impl Iterator<Item = Value> {
    parameters.into_iter().map(|part| match part {
        KeyPart::Number(number) => Value::Integer(number),
        KeyPart::Text(text) => Value::Text(text),
    })
}

fn query<T>(
    connection: &Connection,
    statement: Statement,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    let mut select = connection.prepare_cached(&statement.sql)?;
    select.query_map(params_from_iter(values(statement.parameters)), read)?.collect()
}

/// Selects devices `d` of `source` as they are and as they are summarized, in the columns that [`changed_device`] reads.
/// `cross join` has SQLite go through the few devices that have changed. By itself it goes through all devices.
fn select_changed(source: &str) -> (String, String) {
    let stored = COLUMNS.map(|column| format!("s.{column}")).join(", ");
    let columns = format!("d.device_id, {}, s.device is not null, {stored}", job_sums());
    let joins = format!(
        "({source}) changed
           cross join devices d on d.id = changed.device
           left join device_jobs j on j.device = d.id
           left join device_summaries s on s.device = d.id"
    );
    (columns, joins)
}

fn changed_device(row: &Row<'_>) -> rusqlite::Result<ChangedDevice> {
    let after = 1 + FIGURES;
    let is_stored: bool = row.get(after)?;
    let stored =
        is_stored.then(|| Summary::read(|column| row.get(after + 1 + column))).transpose()?;
    Ok(ChangedDevice { device_id: row.get(0)?, stored, fresh: Summary::of(&figures(row, 1)?) })
}

/// The devices that may have changed since their summaries were brought up to date.
pub(super) fn changed(
    connection: &Connection,
    filter: &Filter,
) -> rusqlite::Result<Vec<ChangedDevice>> {
    let (columns, joins) = select_changed(CHANGED);
    let select = device_list::filtered(&columns, &joins, filter, "d.id", &DIALECT);
    query(connection, select, changed_device)
}

/// The places of a part of a list. All of it is read in the transaction of `connection`.
pub(super) fn places(
    connection: &Connection,
    order: Order,
    part: Part,
    filter: &Filter,
) -> rusqlite::Result<Places> {
    if filter.has_index() && count(connection, filter, SORTED_IN_MEMORY)? <= SORTED_IN_MEMORY.into()
    {
        return Ok(page_of(indexed_places(connection, order, filter)?, &part));
    }
    let scan = match order {
        Order::Summary(order) => {
            return summary_places(connection, order, part, filter, &changed(connection, filter)?);
        }
        Order::DeviceId => Scan::by_device_id(part.clone()),
        Order::Name | Order::CreatedAt | Order::State(_) => Scan::new(part.clone(), Vec::new()),
    };
    run(connection, scan, order, part.direction, filter)
}

/// The places of a part of a list in the order of a figure, given the devices that have `changed`.
pub(super) fn summary_places(
    connection: &Connection,
    order: SummaryOrder,
    part: Part,
    filter: &Filter,
    changed: &[ChangedDevice],
) -> rusqlite::Result<Places> {
    let direction = part.direction;
    let fresh = changed.iter().map(|device| device.fresh.place(order, &device.device_id));
    let scan = Scan::new_within(part, fresh.collect(), |place| filter.takes(place));
    run(connection, scan, Order::Summary(order), direction, filter)
}

fn run(
    connection: &Connection,
    mut scan: Scan,
    order: Order,
    direction: Direction,
    filter: &Filter,
) -> rusqlite::Result<Places> {
    while let Some(request) = scan.request() {
        let select = device_list::places(order, direction, filter, &request, &DIALECT);
        let found = query(connection, select, |row| place(row, order, &request))?;
        scan.take(request, found);
    }
    Ok(scan.finish())
}

fn place(row: &Row<'_>, order: Order, request: &Request) -> rusqlite::Result<Place> {
    // A device without a key is found by asking for it.
    let has_key = !matches!(request, Request::Block { key: None, .. });
    let parts = row.as_ref().column_count() - 1;
    let part = |column| match order {
        Order::Name => row.get(column).map(KeyPart::Text),
        _ => row.get(column).map(KeyPart::Number),
    };
    let key = has_key.then(|| (1..=parts).map(part).collect::<rusqlite::Result<_>>());
    Ok(Place { key: key.transpose()?, device_id: row.get(0)? })
}

/// The places of all devices that an index finds, in any order.
fn indexed_places(
    connection: &Connection,
    order: Order,
    filter: &Filter,
) -> rusqlite::Result<Vec<Place>> {
    if let Order::State(order) = order {
        return query(connection, device_list::indexed_states(order, filter, &DIALECT), |row| {
            let parts = 1..row.as_ref().column_count();
            let key =
                parts.map(|column| Ok(row.get::<_, Option<i64>>(column)?.map(KeyPart::Number)));
            Ok(Place { key: key.collect::<rusqlite::Result<_>>()?, device_id: row.get(0)? })
        });
    }
    let columns = format!("{DEVICE_COLUMNS}, {}", job_sums());
    let joins = "devices d left join device_jobs j on j.device = d.id";
    let select = device_list::filtered(&columns, joins, filter, "d.id", &DIALECT);
    query(connection, select, |row| {
        let device = device_row(row)?;
        let created_at = device.created_at.as_millisecond();
        let summary = Summary::of(&device.figures);
        let key = |order| summary.key(order);
        Ok(device_list::place(order, device.device_id, device.name, created_at, key))
    })
}

/// How many devices `filter` finds, up to one more than `most`.
pub(super) fn count(connection: &Connection, filter: &Filter, most: u32) -> rusqlite::Result<u64> {
    let counted: Vec<i64> =
        query(connection, device_list::count(filter, most, &DIALECT), |row| row.get(0))?;
    Ok(counted.into_iter().sum::<i64>().cast_unsigned())
}

/// The devices at these places, in their order, with their figures.
pub(super) fn devices_at(
    connection: &Connection,
    places: &[Place],
) -> rusqlite::Result<Vec<Device>> {
    let sums = job_sums();
    let select = format!(
        "select {DEVICE_COLUMNS}, {sums}
           from json_each(?1) page
           join devices d on d.device_id = page.value
           left join device_jobs j on j.device = d.id
          group by d.id"
    );
    let ids: Vec<_> = places.iter().map(|place| place.device_id.as_str()).collect();
    let mut select = connection.prepare_cached(&select)?;
    let devices = select.query_map([serde_json::json!(ids).to_string()], device_row)?;
    Ok(device_list::in_order(places, devices.collect::<rusqlite::Result<_>>()?))
}

/// How many summaries are in the buckets of `measure` from `first` on.
fn counted_from(connection: &Connection, measure: Measure, first: i64) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(
            "select ifnull(sum(devices), 0) from device_counts where measure = ?1 and bucket >= ?2",
        )?
        .query_row(params![measure.as_str(), first], |row| row.get(0))
}

/// How many devices were last seen at `since` or later. The counts of whole minutes are added up. Of the devices that have
/// changed, only those are looked at closely whose summaries say that they were not seen since.
pub(super) fn active_devices(connection: &Connection, since: i64) -> rusqlite::Result<u64> {
    const WITHIN_MINUTE: &str =
        "select count(*) from device_summaries where last_seen >= ?1 and last_seen < ?2";
    let active_again = format!(
        "select count(*)
           from ({CHANGED}) changed
           left join device_summaries s on s.device = changed.device
          where ifnull(s.last_seen, ?1 - 1) < ?1
            and (select max(last_received) from device_jobs j where j.device = changed.device) >= ?1"
    );
    // Only what is no event can make a device one that was seen before.
    let inactive_now = "
        select count(*)
          from (select distinct device from stale_summaries) stale
          join device_summaries s on s.device = stale.device
         where s.last_seen >= ?1
           and ifnull((select max(last_received) from device_jobs j where j.device = stale.device), ?1 - 1) < ?1
    ";
    let next_minute = minute_of(since).saturating_add(1);
    let until = next_minute.saturating_mul(MINUTE_MILLISECONDS);
    let count = |sql: &str, parameters: &[i64]| -> rusqlite::Result<i64> {
        connection.prepare_cached(sql)?.query_row(params_from_iter(parameters), |row| row.get(0))
    };
    let active = counted_from(connection, Measure::LastSeen, next_minute)?
        + count(WITHIN_MINUTE, &[since, until])?
        + count(&active_again, &[since])?
        - count(inactive_now, &[since])?;
    Ok(active.cast_unsigned())
}

/// The devices with the `most` latest syncs, the latest first.
pub(super) fn recent_devices(connection: &Connection, most: u32) -> rusqlite::Result<Vec<Device>> {
    const BY_SUMMARIES: &str = "
        select device_id, last_sync
          from device_summaries
         where last_sync is not null
         order by last_sync desc, device_id
         limit ?1
    ";
    let changed = format!(
        "select d.device_id
           from ({CHANGED}) changed
           cross join devices d on d.id = changed.device
           cross join device_jobs j on j.device = d.id
          group by d.id
          order by max(j.last_sync) desc, d.device_id
          limit ?1"
    );
    let changed: Vec<String> = connection
        .prepare_cached(&changed)?
        .query_map([most], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut limit = most;
    loop {
        let summaries: LatestSummaries = connection
            .prepare_cached(BY_SUMMARIES)?
            .query_map([limit], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<_>>()?;
        let ids: BTreeSet<_> =
            summaries.iter().map(|(device_id, _)| device_id).chain(&changed).cloned().collect();
        let places: Vec<_> =
            ids.into_iter().map(|device_id| Place { key: None, device_id }).collect();
        let devices = devices_at(connection, &places)?;
        if has_most_recent(&devices, &summaries, limit, most) {
            return Ok(most_recent(devices, most));
        }
        limit = limit.saturating_mul(8);
    }
}

/// How many devices have at least this number, by their summaries.
pub(super) fn number_with(
    connection: &Connection,
    measure: Measure,
    least: i64,
) -> rusqlite::Result<i64> {
    if least <= LARGEST_BUCKET {
        return counted_from(connection, measure, least);
    }
    let column = measure.as_str();
    connection
        .prepare_cached(&format!("select count(*) from device_summaries where {column} >= ?1"))?
        .query_row([least], |row| row.get(0))
}

/// How many devices there are. All devices up to a number have summaries.
pub(super) fn number_of_devices(connection: &Connection) -> rusqlite::Result<u64> {
    const NEW: &str = "
        select count(*)
          from devices d
         where d.id > (select summarized_device from roll_up_state)
           and not exists (select 1 from device_summaries s where s.device = d.id)
    ";
    let new: i64 = connection.prepare_cached(NEW)?.query_row([], |row| row.get(0))?;
    Ok((counted_from(connection, Measure::FailedSyncs, 0)? + new).cast_unsigned())
}

/// What was to be brought up to date at one moment.
pub(super) struct Outdated {
    /// The numbers of the devices.
    pub(super) devices: Vec<i64>,
    /// The new watermarks.
    watermark: i64,
    last_device: i64,
    /// The last row of `stale_summaries`.
    last_stale: i64,
}

/// What is to be brought up to date, but for events with ids after `last`.
pub(super) fn outdated(connection: &Connection, last: i64) -> rusqlite::Result<Option<Outdated>> {
    const DEVICES: &str = "
        select device from sync_events not indexed where id > ?1 and id <= ?2
        union
        select id from devices where id > ?3
        union
        select device from stale_summaries
    ";
    const STATE: &str = "
        select summarized_id, min(?1, (select ifnull(max(id), 0) from sync_events)),
               summarized_device,
               (select ifnull(max(id), 0) from devices),
               (select ifnull(max(id), 0) from stale_summaries)
          from roll_up_state
    ";
    let snapshot = connection.unchecked_transaction()?;
    let [summarized, watermark, summarized_device, last_device, last_stale]: [i64; 5] =
        snapshot.prepare_cached(STATE)?.query_row([last], |row| {
            Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?])
        })?;
    if summarized >= watermark && summarized_device >= last_device && last_stale == 0 {
        return Ok(None);
    }
    let devices = snapshot
        .prepare_cached(DEVICES)?
        .query_map([summarized, watermark, summarized_device], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Some(Outdated { devices, watermark, last_device, last_stale }))
}

/// Brings the summaries of some devices up to date.
pub(super) fn refresh(writer: &mut WriteConnection, devices: &[i64]) -> rusqlite::Result<()> {
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    write_summaries(&transaction, devices)?;
    transaction.commit()
}

fn write_summaries(transaction: &Transaction<'_>, devices: &[i64]) -> rusqlite::Result<()> {
    let (columns, joins) = select_changed("select value as device from json_each(?1)");
    let select = format!("select {columns} from {joins} group by d.id");
    let names = COLUMNS.join(", ");
    let numbers: Vec<_> = (2..2 + COLUMNS.len()).map(|number| format!("?{number}")).collect();
    let insert = format!(
        "insert into device_summaries (device, device_id, {names})
         select id, device_id, {} from devices where device_id = ?1",
        numbers.join(", ")
    );
    let changed: Vec<ChangedDevice> = transaction
        .prepare_cached(&select)?
        .query_map([serde_json::json!(devices).to_string()], changed_device)?
        .collect::<rusqlite::Result<_>>()?;
    let mut counts = CountChanges::default();
    for ChangedDevice { device_id, stored, fresh } in &changed {
        counts.replace(stored.as_ref(), Some(fresh));
        let id = Value::Text(device_id.clone());
        let Some(stored) = stored else {
            let values = fresh.values().into_iter().map(Value::from);
            transaction
                .prepare_cached(&insert)?
                .execute(params_from_iter([id].into_iter().chain(values)))?;
            continue;
        };
        // SQLite rewrites the indexes of all columns that are set, even of those that keep their values.
        let differing: Vec<_> = COLUMNS
            .into_iter()
            .zip(stored.values().into_iter().zip(fresh.values()))
            .filter(|(_, (stored, fresh))| stored != fresh)
            .collect();
        if differing.is_empty() {
            continue;
        }
        let set: Vec<_> = differing
            .iter()
            .enumerate()
            .map(|(position, (column, _))| format!("{column} = ?{}", position + 2))
            .collect();
        let update = format!(
            "update device_summaries set {}
              where device = (select id from devices where device_id = ?1)",
            set.join(", ")
        );
        let values = differing.into_iter().map(|(_, (_, fresh))| Value::from(fresh));
        transaction
            .prepare_cached(&update)?
            .execute(params_from_iter([id].into_iter().chain(values)))?;
    }
    write_counts(transaction, &counts)
}

fn write_counts(transaction: &Transaction<'_>, counts: &CountChanges) -> rusqlite::Result<()> {
    const ADD: &str = "
        insert into device_counts as stored (measure, bucket, devices) values (?1, ?2, ?3)
            on conflict (measure, bucket) do update set devices = stored.devices + excluded.devices
    ";
    // Minutes pass, and most of their buckets get empty.
    const REMOVE_EMPTY: &str =
        "delete from device_counts where measure = ?1 and bucket = ?2 and devices = 0";
    let mut add = transaction.prepare_cached(ADD)?;
    let mut remove_empty = transaction.prepare_cached(REMOVE_EMPTY)?;
    for (measure, bucket, change) in counts.changes() {
        add.execute(params![measure, bucket, change])?;
        if change < 0 {
            remove_empty.execute(params![measure, bucket])?;
        }
    }
    Ok(())
}

/// All `outdated` devices are brought up to date: moves the watermarks.
pub(super) fn finish(writer: &mut WriteConnection, outdated: &Outdated) -> rusqlite::Result<()> {
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute(
        "update roll_up_state
            set summarized_id = max(summarized_id, ?1),
                summarized_device = max(summarized_device, ?2)",
        [outdated.watermark, outdated.last_device],
    )?;
    transaction.execute("delete from stale_summaries where id <= ?1", [outdated.last_stale])?;
    transaction.commit()
}

/// Notes that something else than a new event changed a device's figures.
pub(super) fn note_stale(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    transaction
        .prepare_cached("insert into stale_summaries (device) values (?1)")?
        .execute([device])
        .map(|_| ())
}

/// Removes a device that will be deleted from the counts. Its summary is deleted together with the device.
pub(super) fn forget(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    let select = format!("select {} from device_summaries where device = ?1", COLUMNS.join(", "));
    let mut counts = CountChanges::default();
    let mut select = transaction.prepare_cached(&select)?;
    let mut rows = select.query([device])?;
    if let Some(row) = rows.next()? {
        counts.replace(Some(&Summary::read(|column| row.get(column))?), None);
    }
    write_counts(transaction, &counts)
}

/// Makes all summaries and counts anew, in the caller's transaction.
pub(super) fn rebuild(connection: &Connection) -> rusqlite::Result<()> {
    let rebuild = format!(
        "
        delete from device_summaries;
        delete from device_counts;
        delete from stale_summaries;
        insert into device_summaries
        select d.id, d.device_id, {FRESH}
          from devices d
          left join device_jobs j on j.device = d.id
         group by d.id;
        insert into device_counts
        {COUNTED};
        update roll_up_state
           set summarized_id = folded_id, summarized_device = ifnull((select max(id) from devices), 0);
    "
    );
    connection.execute_batch(&rebuild)
}

/// How many summaries and counts differ from what they are made from. Devices that have changed since are left out.
pub(super) fn differences(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    let columns = COLUMNS.map(|column| format!("s.{column}")).join(", ");
    let wrong = format!(
        "select count(*)
           from (
               select d.id
                 from devices d
                 left join device_jobs j on j.device = d.id
                 left join device_summaries s on s.device = d.id
                where d.id not in ({CHANGED})
                group by d.id
               having ({columns}) is not ({FRESH})
           )"
    );
    let wrong_counts = format!(
        "select count(*)
           from (
               select measure, bucket, sum(devices) as devices
                 from (
                     select measure, bucket, devices from device_counts
                     union all
                     select measure, bucket, -devices from ({COUNTED})
                 )
                group by measure, bucket
               having sum(devices) <> 0
           )"
    );
    let count = |sql: &str| -> rusqlite::Result<u64> {
        connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map(i64::cast_unsigned)
    };
    Ok((count(&wrong)?, count(&wrong_counts)?))
}
