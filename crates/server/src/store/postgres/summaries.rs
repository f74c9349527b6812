//! The summaries of devices in PostgreSQL: brings them up to date, and reads lists and counts from them. The watermark is
//! the time of an event: only devices that were first seen, or have events received, after it, and those in
//! `stale_summaries`, may differ from their summaries. It follows the watermark of the roll-ups, for the same reasons.

use std::collections::BTreeSet;

use deadpool_postgres::Transaction;
use tokio_postgres::{
    Error, Row,
    types::{ToSql, Type},
};

use super::{
    aggregated_events,
    connect::Object,
    rows::{device_row, figures, job_sums, snapshot},
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
    placeholder: '$',
    like: "ilike",
    device_of_row: "d.device_id = s.device_id",
    created_at: "(extract(epoch from d.created_at) * 1000000)::bigint",
    time: |parameter| {
        format!("timestamptz 'epoch' + {parameter}::bigint * interval '1 microsecond'")
    },
    device: ("d.device_id", "device_id"),
    is_overdue: "h.is_overdue",
};

/// Runs a statement that is planned for its parameters: how many rows are asked for decides on the index.
async fn query(snapshot: &Transaction<'_>, statement: Statement) -> Result<Vec<Row>, Error> {
    let parameters: Vec<(&(dyn ToSql + Sync), Type)> = statement
        .parameters
        .iter()
        .map(|part| match part {
            KeyPart::Number(number) => (number as &(dyn ToSql + Sync), Type::INT8),
            KeyPart::Text(text) => (text as &(dyn ToSql + Sync), Type::TEXT),
        })
        .collect();
    snapshot.query_typed(&statement.sql, &parameters).await
}

/// Selects devices `d` of `source` as they are and as they are summarized, in the columns that [`changed_device`] reads.
fn select_changed(source: &str) -> (String, String) {
    let stored = COLUMNS.map(|column| format!("s.{column}")).join(", ");
    let columns = format!("d.device_id, {}, s.device_id is not null, {stored}", job_sums());
    let joins = format!(
        "({source}) changed
           join devices d using (device_id)
           left join device_jobs j using (device_id)
           left join device_summaries s using (device_id)"
    );
    (columns, joins)
}

const GROUPED: &str = "d.device_id, s.device_id";

fn changed_device(row: &Row) -> Result<ChangedDevice, Error> {
    let after = 1 + FIGURES;
    let stored = if row.try_get(after)? {
        Some(Summary::read(|column| row.try_get(after + 1 + column))?)
    } else {
        None
    };
    Ok(ChangedDevice { device_id: row.try_get(0)?, stored, fresh: Summary::of(&figures(row, 1)?) })
}

/// The watermark of the summaries, as of this snapshot.
pub(super) struct SummarizedUntil(
    /// A literal in SQL, so that the planner sees how few events follow it.
    String,
);

impl SummarizedUntil {
    pub(super) async fn read(snapshot: &Transaction<'_>) -> Result<Self, Error> {
        let state = snapshot.query_one("select summarized_until from roll_up_state", &[]).await?;
        let until = state.try_get::<_, Option<jiff::Timestamp>>(0)?;
        let until = until.map_or_else(|| "-infinity".to_owned(), |until| until.to_string());
        Ok(Self(format!("timestamptz '{until}'")))
    }

    /// Selects the devices that may differ from their summaries.
    fn changed(&self) -> String {
        let Self(until) = self;
        format!(
            "select device_id from sync_events where created_at > {until}
             union
             select device_id from devices where created_at > {until}
             union
             select device_id from stale_summaries"
        )
    }
}

/// The devices that may have changed since their summaries were brought up to date.
pub(super) async fn changed(
    snapshot: &Transaction<'_>,
    filter: &Filter,
) -> Result<Vec<ChangedDevice>, Error> {
    let source = SummarizedUntil::read(snapshot).await?.changed();
    let (columns, joins) = select_changed(&source);
    let select = device_list::filtered(&columns, &joins, filter, GROUPED, &DIALECT);
    query(snapshot, select).await?.iter().map(changed_device).collect()
}

/// The places of a part of a list.
pub(super) async fn places(
    snapshot: &Transaction<'_>,
    order: Order,
    part: Part,
    filter: &Filter,
) -> Result<Places, Error> {
    if filter.has_index()
        && count(snapshot, filter, SORTED_IN_MEMORY).await? <= SORTED_IN_MEMORY.into()
    {
        return Ok(page_of(indexed_places(snapshot, order, filter).await?, &part));
    }
    let scan = match order {
        Order::Summary(order) => {
            let changed = changed(snapshot, filter).await?;
            return summary_places(snapshot, order, part, filter, &changed).await;
        }
        Order::DeviceId => Scan::by_device_id(part.clone()),
        Order::Name | Order::CreatedAt | Order::State(_) => Scan::new(part.clone(), Vec::new()),
    };
    run(snapshot, scan, order, part.direction, filter).await
}

/// The places of a part of a list in the order of a figure, given the devices that have `changed`.
pub(super) async fn summary_places(
    snapshot: &Transaction<'_>,
    order: SummaryOrder,
    part: Part,
    filter: &Filter,
    changed: &[ChangedDevice],
) -> Result<Places, Error> {
    let direction = part.direction;
    let fresh = changed.iter().map(|device| device.fresh.place(order, &device.device_id));
    let scan = Scan::new_within(part, fresh.collect(), |place| filter.takes(place));
    run(snapshot, scan, Order::Summary(order), direction, filter).await
}

async fn run(
    snapshot: &Transaction<'_>,
    mut scan: Scan,
    order: Order,
    direction: Direction,
    filter: &Filter,
) -> Result<Places, Error> {
    while let Some(request) = scan.request() {
        let select = device_list::places(order, direction, filter, &request, &DIALECT);
        let rows = query(snapshot, select).await?;
        let found = rows.iter().map(|row| place(row, order, &request));
        let found = found.collect::<Result<_, _>>()?;
        scan.take(request, found);
    }
    Ok(scan.finish())
}

fn place(row: &Row, order: Order, request: &Request) -> Result<Place, Error> {
    // A device without a key is found by asking for it.
    let has_key = !matches!(request, Request::Block { key: None, .. });
    let part = |column| match order {
        Order::Name => row.try_get(column).map(KeyPart::Text),
        _ => row.try_get(column).map(KeyPart::Number),
    };
    let key = has_key.then(|| (1..row.len()).map(part).collect::<Result<_, _>>());
    Ok(Place { key: key.transpose()?, device_id: row.try_get(0)? })
}

/// The places of all devices that an index finds, in any order.
async fn indexed_places(
    snapshot: &Transaction<'_>,
    order: Order,
    filter: &Filter,
) -> Result<Vec<Place>, Error> {
    if let Order::State(order) = order {
        let place = |row: &Row| {
            let key = (1..row.len())
                .map(|column| Ok(row.try_get::<_, Option<i64>>(column)?.map(KeyPart::Number)));
            Ok(Place { key: key.collect::<Result<_, Error>>()?, device_id: row.try_get(0)? })
        };
        let select = device_list::indexed_states(order, filter, &DIALECT);
        return query(snapshot, select).await?.iter().map(place).collect();
    }
    let columns = format!("{DEVICE_COLUMNS}, {}, {}", job_sums(), DIALECT.created_at);
    let joins = "devices d left join device_jobs j using (device_id)";
    let select = device_list::filtered(&columns, joins, filter, "d.device_id", &DIALECT);
    let place = |row: &Row| {
        let device = device_row(row)?;
        let created_at = row.try_get(4 + FIGURES)?;
        let summary = Summary::of(&device.figures);
        let key = |order| summary.key(order);
        Ok(device_list::place(order, device.device_id, device.name, created_at, key))
    };
    query(snapshot, select).await?.iter().map(place).collect()
}

/// How many devices `filter` finds, up to one more than `most`.
pub(super) async fn count(
    snapshot: &Transaction<'_>,
    filter: &Filter,
    most: u32,
) -> Result<u64, Error> {
    let rows = query(snapshot, device_list::count(filter, most, &DIALECT)).await?;
    let count = rows.first().map_or(Ok(0), |row| row.try_get::<_, i64>(0))?;
    Ok(count.cast_unsigned())
}

/// The devices at these places, in their order, with their figures.
pub(super) async fn devices_at(
    snapshot: &Transaction<'_>,
    places: &[Place],
) -> Result<Vec<Device>, Error> {
    let sums = job_sums();
    let select = format!(
        "select {DEVICE_COLUMNS}, {sums}
           from devices d
           left join device_jobs j using (device_id)
          where d.device_id = any($1::text[])
          group by d.device_id"
    );
    let ids: Vec<_> = places.iter().map(|place| place.device_id.as_str()).collect();
    let rows = snapshot.query_typed(&select, &[(&ids, Type::TEXT_ARRAY)]).await?;
    let devices = rows.iter().map(device_row).collect::<Result<_, _>>()?;
    Ok(device_list::in_order(places, devices))
}

/// How many summaries are in the buckets of `measure` from `first` on.
async fn counted_from(
    snapshot: &Transaction<'_>,
    measure: Measure,
    first: i64,
) -> Result<i64, Error> {
    const COUNT: &str = "
        select coalesce(sum(devices), 0)::bigint
          from device_counts
         where measure = $1 and bucket >= $2
    ";
    let count = snapshot.prepare_cached(COUNT).await?;
    snapshot.query_one(&count, &[&measure.as_str(), &first]).await?.try_get(0)
}

/// How many devices were last seen at `since` or later. The counts of whole minutes are added up. Of the devices that have
/// changed, only those are looked at closely whose summaries say that they were not seen since.
pub(super) async fn active_devices(
    snapshot: &Transaction<'_>,
    summarized: &SummarizedUntil,
    since: i64,
) -> Result<u64, Error> {
    const WITHIN_MINUTE: &str =
        "select count(*) from device_summaries where last_seen >= $1 and last_seen < $2";
    const LAST_SEEN: &str = "
        (select floor(extract(epoch from max(last_received)) * 1000)::bigint
           from device_jobs j where j.device_id = changed.device_id)
    ";
    let changed = summarized.changed();
    let active_again = format!(
        "select count(*)
           from ({changed}) changed
           left join device_summaries s using (device_id)
          where coalesce(s.last_seen, $1 - 1) < $1 and {LAST_SEEN} >= $1"
    );
    // Only what is no event can make a device one that was seen before.
    let inactive_now = format!(
        "select count(*)
           from (select distinct device_id from stale_summaries) changed
           join device_summaries s using (device_id)
          where s.last_seen >= $1 and coalesce({LAST_SEEN}, $1 - 1) < $1"
    );
    let next_minute = minute_of(since).saturating_add(1);
    let until = next_minute.saturating_mul(MINUTE_MILLISECONDS);
    let count = async |sql: &str, parameters: &[&i64]| -> Result<i64, Error> {
        let parameters: Vec<(&(dyn ToSql + Sync), Type)> = parameters
            .iter()
            .map(|parameter| (*parameter as &(dyn ToSql + Sync), Type::INT8))
            .collect();
        let rows = snapshot.query_typed(sql, &parameters).await?;
        rows.first().map_or(Ok(0), |row| row.try_get(0))
    };
    let active = counted_from(snapshot, Measure::LastSeen, next_minute).await?
        + count(WITHIN_MINUTE, &[&since, &until]).await?
        + count(&active_again, &[&since]).await?
        - count(&inactive_now, &[&since]).await?;
    Ok(active.cast_unsigned())
}

/// The devices with the `most` latest syncs, the latest first.
pub(super) async fn recent_devices(
    snapshot: &Transaction<'_>,
    summarized: &SummarizedUntil,
    most: u32,
) -> Result<Vec<Device>, Error> {
    const BY_SUMMARIES: &str = "
        select device_id, last_sync
          from device_summaries
         where last_sync is not null
         order by last_sync desc, device_id
         limit $1
    ";
    let changed = summarized.changed();
    let changed = format!(
        "select device_id
           from ({changed}) changed
           join device_jobs using (device_id)
          group by device_id
          order by max(last_sync) desc, device_id
          limit $1"
    );
    let rows = snapshot.query_typed(&changed, &[(&i64::from(most), Type::INT8)]).await?;
    let changed: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let mut limit = most;
    loop {
        let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&i64::from(limit), Type::INT8)];
        let rows = snapshot.query_typed(BY_SUMMARIES, &parameters).await?;
        let summary = |row: &Row| Ok((row.try_get(0)?, row.try_get(1)?));
        let summaries: LatestSummaries = rows.iter().map(summary).collect::<Result<_, Error>>()?;
        let ids: BTreeSet<_> =
            summaries.iter().map(|(device_id, _)| device_id).chain(&changed).cloned().collect();
        let places: Vec<_> =
            ids.into_iter().map(|device_id| Place { key: None, device_id }).collect();
        let devices = devices_at(snapshot, &places).await?;
        if has_most_recent(&devices, &summaries, limit, most) {
            return Ok(most_recent(devices, most));
        }
        limit = limit.saturating_mul(8);
    }
}

/// How many devices have at least this number, by their summaries.
pub(super) async fn number_with(
    snapshot: &Transaction<'_>,
    measure: Measure,
    least: i64,
) -> Result<i64, Error> {
    if least <= LARGEST_BUCKET {
        return counted_from(snapshot, measure, least).await;
    }
    let column = measure.as_str();
    let count = format!("select count(*) from device_summaries where {column} >= $1");
    snapshot.query_one(&count, &[&least]).await?.try_get(0)
}

/// What was to be brought up to date at one moment.
pub(super) struct Outdated {
    pub(super) devices: Vec<String>,
    /// The new watermark.
    watermark: Option<jiff::Timestamp>,
    /// The rows of `stale_summaries`.
    stale: Vec<i64>,
}

pub(super) async fn outdated(connection: &mut Object) -> Result<Option<Outdated>, Error> {
    const STATE: &str = "select summarized_until, folded_until from roll_up_state";
    let snapshot = snapshot(connection).await?;
    let state = snapshot.query_one(STATE, &[]).await?;
    let summarized: Option<jiff::Timestamp> = state.try_get(0)?;
    let watermark: Option<jiff::Timestamp> = state.try_get(1)?;
    let rows = snapshot.query("select id, device_id from stale_summaries", &[]).await?;
    let mut stale = Vec::with_capacity(rows.len());
    let mut devices = Vec::with_capacity(rows.len());
    for row in &rows {
        stale.push(row.try_get(0)?);
        devices.push(row.try_get(1)?);
    }
    if let Some(watermark) = watermark
        && summarized.is_none_or(|summarized| summarized < watermark)
    {
        let after = summarized.map_or_else(|| "-infinity".to_owned(), |after| after.to_string());
        let select = format!(
            "select device_id
               from sync_events
              where created_at > timestamptz '{after}' and created_at <= timestamptz '{watermark}'
              union
             select device_id
               from devices
              where created_at > timestamptz '{after}' and created_at <= timestamptz '{watermark}'"
        );
        for row in snapshot.query(&select, &[]).await? {
            devices.push(row.try_get(0)?);
        }
    } else if stale.is_empty() {
        return Ok(None);
    }
    devices.sort_unstable();
    devices.dedup();
    Ok(Some(Outdated { devices, watermark, stale }))
}

/// Brings the summaries of some devices, given in byte-wise order, up to date. False when another node does that.
pub(super) async fn refresh(connection: &mut Object, devices: &[String]) -> Result<bool, Error> {
    let transaction = connection.transaction().await?;
    // Only one node at a time does this: its locks would be in the way of another's.
    if !aggregated_events::try_lock(&transaction).await? {
        return Ok(false);
    }
    write_summaries(&transaction, devices).await?;
    transaction.commit().await?;
    Ok(true)
}

/// All `outdated` devices are brought up to date: moves the watermark.
pub(super) async fn finish(connection: &mut Object, outdated: &Outdated) -> Result<(), Error> {
    const MOVE: &str = "update roll_up_state set summarized_until = greatest(summarized_until, $1)";
    let transaction = connection.transaction().await?;
    transaction.execute(MOVE, &[&outdated.watermark]).await?;
    transaction
        .execute("delete from stale_summaries where id = any($1)", &[&outdated.stale])
        .await?;
    transaction.commit().await
}

async fn write_summaries(transaction: &Transaction<'_>, devices: &[String]) -> Result<(), Error> {
    // Whoever deletes a device takes its summary away from the counts.
    const LOCK: &str = "
        select from devices where device_id = any($1::text[]) order by device_id for key share
    ";
    let (columns, joins) =
        select_changed("select unnest($1::text[])::varchar collate \"C\" as device_id");
    let select = format!("select {columns} from {joins} group by {GROUPED}");
    let names = COLUMNS.join(", ");
    let set = COLUMNS.map(|column| format!("{column} = excluded.{column}")).join(", ");
    let arrays: Vec<_> =
        (2..2 + COLUMNS.len()).map(|number| format!("unnest(${number}::bigint[])")).collect();
    let upsert = format!(
        "insert into device_summaries (device_id, {names})
         select unnest($1::text[]), {}
             on conflict (device_id) do update set {set}",
        arrays.join(", ")
    );
    transaction.query_typed(LOCK, &[(&devices, Type::TEXT_ARRAY)]).await?;
    let rows = transaction.query_typed(&select, &[(&devices, Type::TEXT_ARRAY)]).await?;
    let changed: Vec<_> = rows.iter().map(changed_device).collect::<Result<_, _>>()?;
    let mut counts = CountChanges::default();
    let mut ids = Vec::new();
    let mut values: [Vec<Option<i64>>; COLUMNS.len()] = Default::default();
    for ChangedDevice { device_id, stored, fresh } in &changed {
        if stored.as_ref() == Some(fresh) {
            continue;
        }
        counts.replace(stored.as_ref(), Some(fresh));
        ids.push(device_id.as_str());
        for (column, value) in values.iter_mut().zip(fresh.values()) {
            column.push(value);
        }
    }
    let upsert = transaction.prepare_cached(&upsert).await?;
    let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&ids];
    parameters.extend(values.iter().map(|column| column as &(dyn ToSql + Sync)));
    transaction.execute(&upsert, &parameters).await?;
    write_counts(transaction, &counts).await
}

async fn write_counts(transaction: &Transaction<'_>, counts: &CountChanges) -> Result<(), Error> {
    const ADD: &str = "
        insert into device_counts as stored (measure, bucket, devices)
        select unnest($1::text[]), unnest($2::bigint[]), unnest($3::bigint[])
            on conflict (measure, bucket) do update set devices = stored.devices + excluded.devices
    ";
    // Minutes pass, and most of their buckets get empty.
    const REMOVE_EMPTY: &str = "
        delete from device_counts
         where devices = 0
           and (measure, bucket) in (select unnest($1::text[]), unnest($2::bigint[]))
    ";
    let (mut measures, mut buckets, mut changes) = (Vec::new(), Vec::new(), Vec::new());
    for (measure, bucket, change) in counts.changes() {
        measures.push(measure);
        buckets.push(bucket);
        changes.push(change);
    }
    let add = transaction.prepare_cached(ADD).await?;
    transaction.execute(&add, &[&measures, &buckets, &changes]).await?;
    let remove_empty = transaction.prepare_cached(REMOVE_EMPTY).await?;
    transaction.execute(&remove_empty, &[&measures, &buckets]).await.map(|_| ())
}

/// Notes that something else than a new event changed a device's figures.
pub(super) async fn note_stale(
    transaction: &Transaction<'_>,
    device_id: &str,
) -> Result<(), Error> {
    const NOTE: &str = "insert into stale_summaries (device_id) values ($1)";
    transaction.execute(NOTE, &[&device_id]).await.map(|_| ())
}

/// The same for the devices of all events that `source`, the rest of a `from` clause, names.
pub(super) fn note_stale_of(source: &str) -> String {
    format!("insert into stale_summaries (device_id) select distinct device_id from {source}")
}

/// Removes a device that will be deleted from the counts. Its summary is deleted together with the device, which is
/// locked.
pub(super) async fn forget(transaction: &Transaction<'_>, device_id: &str) -> Result<(), Error> {
    let select =
        format!("select {} from device_summaries where device_id = $1", COLUMNS.join(", "));
    let mut counts = CountChanges::default();
    if let Some(row) = transaction.query_opt(&select, &[&device_id]).await? {
        counts.replace(Some(&Summary::read(|column| row.try_get(column))?), None);
    }
    write_counts(transaction, &counts).await
}

/// How many devices there are. Devices that were registered before the watermark have summaries, or are noted.
pub(super) async fn number_of_devices(
    snapshot: &Transaction<'_>,
    summarized: &SummarizedUntil,
) -> Result<u64, Error> {
    let SummarizedUntil(until) = summarized;
    let new = format!(
        "select count(*)
           from (
               select device_id from devices where created_at > {until}
               union
               select device_id from devices join stale_summaries using (device_id)
           ) new
          where not exists (select from device_summaries s where s.device_id = new.device_id)"
    );
    let new: i64 = snapshot.query_one(&new, &[]).await?.try_get(0)?;
    Ok((counted_from(snapshot, Measure::FailedSyncs, 0).await? + new).cast_unsigned())
}

/// What a summary is made from, in the order of [`COLUMNS`].
const FRESH: &str = "
    floor(extract(epoch from max(j.last_received)) * 1000)::bigint,
    floor(extract(epoch from max(j.last_sync)) * 1000)::bigint,
    floor(extract(epoch from max(j.last_success)) * 1000)::bigint,
    coalesce(floor(extract(epoch from max(j.last_failure)) * 1000)::bigint, -9223372036854775808),
    sum(j.total_syncs)::bigint, sum(j.failed_syncs)::bigint, max(j.consecutive_failures)
";

/// What the counts are made from.
const COUNTED: &str = "
    select 'last_seen' as measure, floor(last_seen / 60000.0)::bigint as bucket, count(*) as devices
      from device_summaries
     where last_seen is not null
     group by 2
    union all
    select 'failed_syncs', least(coalesce(failed_syncs, 0), 100), count(*) from device_summaries group by 2
    union all
    select 'consecutive_failures', least(coalesce(consecutive_failures, 0), 100), count(*)
      from device_summaries
     group by 2
";

/// Statements that make all summaries and counts anew. Unless nobody else uses the database, the caller must have the
/// lock of aggregation and that of the state: another node would add its changes to counts that are new.
pub(super) fn rebuild_statements() -> String {
    format!(
        "delete from device_summaries;
         delete from device_counts;
         delete from stale_summaries;
         insert into device_summaries
         select device_id, {FRESH}
           from devices
           left join device_jobs j using (device_id)
          group by device_id;
         insert into device_counts {COUNTED};
         update roll_up_state set summarized_until = folded_until;"
    )
}

/// How many summaries and counts differ from what they are made from. Devices that have changed since are left out.
pub(super) async fn differences(snapshot: &Transaction<'_>) -> Result<(u64, u64), Error> {
    let columns = COLUMNS.map(|column| format!("s.{column}")).join(", ");
    let changed = SummarizedUntil::read(snapshot).await?.changed();
    let wrong = format!(
        "select count(*)
           from (
               select device_id
                 from devices
                 left join device_jobs j using (device_id)
                 left join device_summaries s using (device_id)
                where device_id not in ({changed})
                group by device_id, s.device_id
               having ({columns}) is distinct from ({FRESH})
           ) wrong"
    );
    let wrong_counts = format!(
        "select count(*)
           from (
               select measure, bucket
                 from (
                     select measure, bucket, devices from device_counts
                     union all
                     select measure, bucket, -devices from ({COUNTED}) counted
                 ) differences
                group by measure, bucket
               having sum(devices) <> 0
           ) wrong"
    );
    let count = async |sql: &str| -> Result<u64, Error> {
        snapshot.query_one(sql, &[]).await?.try_get::<_, i64>(0).map(i64::cast_unsigned)
    };
    Ok((count(&wrong).await?, count(&wrong_counts).await?))
}
