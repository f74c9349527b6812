//! Ingest's statements and their parameters: a batch goes into a statement as one array per column. Arrays are
//! taken apart side by side in a select list, which makes rows as they are needed; `from unnest(…)` would put
//! each column into a store of its own first, and that costs an eighth of the whole.

use std::collections::HashMap;

use pisync_core::{
    DeviceId, EventId, JobFigures, JobName, Mbps, Metadata, SyncDuration, Timestamp,
};
use tokio_postgres::{Client, Error, Row, Statement, types::ToSql};

use super::{
    claims::ClaimStatements,
    errors::WriteError,
    history::{EVENT_COLUMNS, stored_event},
    roll_ups::PassedStatements,
};
use crate::store::{Batch, StoredEvent, Sums, batch::JobShare};

const TAKE_IDS: &str =
    "select array_agg(nextval('sync_events_id_seq')) from generate_series(1, $1::bigint)";

/// Registers devices or moves their `updated_at` on. A row is new when no transaction has locked or replaced a
/// version of it before: its `xmax` is 0.
const UPSERT_DEVICES: &str = "
    insert into devices (device_id, created_at, updated_at)
    select device_id, coalesce(first_received, $2), coalesce(last_received, $2)
      from unnest($1::text[], $3::timestamptz[], $4::timestamptz[])
           as batch (device_id, first_received, last_received)
        on conflict (device_id) do update
           set created_at = least(devices.created_at, excluded.created_at),
               updated_at = greatest(devices.updated_at, excluded.updated_at)
    returning device_id, xmax = 0 as is_new
";

/// Answers the devices that are new.
fn upsert_devices_statement() -> String {
    format!("with touched as ({UPSERT_DEVICES}) select device_id from touched where is_new")
}

/// The upsert of figures, of events that are inserted already. The rule is that of `pisync_core::JobFigures::add`.
/// Where the figures cannot tell a streak, `pisync_streak` counts it, by then under the lock of the job's row; `first`
/// is what must have happened before. Answers all of the batch's jobs.
fn upsert_jobs(first: &str) -> String {
    let types =
        [vec!["text"; 2], vec!["bigint"; Sums::COUNT], TIMES_AND_STREAK.1.to_vec()].concat();
    let arrays: Vec<_> = types
        .iter()
        .enumerate()
        .map(|(position, kind)| format!("unnest(${}::{kind}[])", position + 1))
        .collect();
    format!(
        "insert into device_jobs as stored (device_id, job, {names}, {times})
         select batch.*
           from (select {arrays}) as batch
          where {first}
             on conflict (device_id, job) do update
            set {sums},
                first_sync         = least(stored.first_sync, excluded.first_sync),
                last_sync          = case
                    when stored.last_success is null and stored.last_failure is null then
                        excluded.last_sync
                    else greatest(stored.last_sync, excluded.last_sync)
                end,
                last_success       = greatest(stored.last_success, excluded.last_success),
                last_failure       = greatest(stored.last_failure, excluded.last_failure),
                last_received      = case
                    when stored.last_success is null and stored.last_failure is null then
                        excluded.last_received
                    else greatest(stored.last_received, excluded.last_received)
                end,
                consecutive_failures = case
                    when excluded.last_success >= coalesce(stored.last_success, '-infinity')
                     and excluded.last_success >= {since} then
                        case
                            when excluded.last_success > coalesce(stored.last_success, '-infinity')
                             and stored.last_failure > excluded.last_success
                             and stored.consecutive_failures = 1 then
                                1 + excluded.consecutive_failures
                            when stored.last_failure >= excluded.last_success
                              or excluded.last_success = stored.last_success
                             and excluded.last_failure >= excluded.last_success then
                                pisync_streak(
                                    stored.device_id, stored.job,
                                    greatest(stored.last_success, excluded.last_success),
                                    greatest(stored.last_failure, excluded.last_failure)
                                )
                            else excluded.consecutive_failures
                        end
                    when excluded.last_failure is null
                      or excluded.last_failure < stored.last_success
                      or excluded.last_failure < {since} then
                        stored.consecutive_failures
                    when greatest(excluded.first_sync, {since})
                       > coalesce(stored.last_success, '-infinity') then
                        stored.consecutive_failures + excluded.consecutive_failures
                    else pisync_streak(
                             stored.device_id, stored.job,
                             greatest(stored.last_success, excluded.last_success),
                             greatest(stored.last_failure, excluded.last_failure)
                         )
                end
         returning device_id, job, consecutive_failures",
        names = Sums::names(),
        times = TIMES_AND_STREAK.0.join(", "),
        arrays = arrays.join(", "),
        sums = Sums::add_to("stored"),
        since = format_args!("${JOB_PARAMETERS}"),
    )
}

/// The columns of `device_jobs` behind the sums, and their types.
const TIMES_AND_STREAK: ([&str; 6], [&str; 6]) = (
    [
        "first_sync",
        "last_sync",
        "last_success",
        "last_failure",
        "consecutive_failures",
        "last_received",
    ],
    ["timestamptz", "timestamptz", "timestamptz", "timestamptz", "bigint", "timestamptz"],
);

/// Answers the jobs that are failing.
fn upsert_jobs_statement() -> String {
    let upsert = upsert_jobs("true");
    format!(
        "with upserted as ({upsert})
         select device_id, job, consecutive_failures from upserted where consecutive_failures <> 0
         union all select null, null, null where not {}",
        all_written("upserted", "device_jobs", "cardinality($1::text[])")
    )
}

/// True when the part of a statement that writes to `table` has written as many rows as were sent. Otherwise it
/// fails the statement: a trigger may drop a row without an error (`return null`), and that refuses the data as much
/// as one that raises an error. The cast is what PostgreSQL has for raising one within a statement, and its message
/// shows the text.
fn all_written(part: &str, table: &str, sent: &str) -> String {
    format!(
        "(select case
                     when count(*) = {sent} then true
                     else ('a trigger on {table} drops rows without an error: ' || count(*)
                           || ' of ' || {sent} || ' were written')::boolean
                 end
            from {part})"
    )
}

/// A whole batch, and its commit, in a single statement, with or without devices to register and event ids.
/// Answers the jobs that are failing, and the devices that are new, which have no job. Its parts come in the order
/// of `transactions`, each when the one before has been carried out for all of its rows.
fn store_statement(with_devices: bool, with_keys: bool) -> String {
    let mut parts = Vec::new();
    let mut answer =
        "select device_id, job, consecutive_failures from jobs where consecutive_failures <> 0"
            .to_owned();
    let mut first = "true".to_owned();
    if with_devices {
        let upsert = renumbered(UPSERT_DEVICES, JOB_PARAMETERS + EVENT_PARAMETERS);
        parts.push(format!("touched as ({upsert})"));
        answer.push_str(" union all select device_id, null, null from touched where is_new");
        // A device that a trigger drops has no place for its events.
        first = "(select count(*) from touched) is not null".to_owned();
    }
    if with_keys {
        let insert = insert_keys_statement(KEYS_AMONG_EVENTS.map(|number| number + JOB_PARAMETERS));
        parts.push(format!("keys as ({insert} and {first} returning id)"));
        let [_, event_id, ..] = KEYS_AMONG_EVENTS.map(|number| number + JOB_PARAMETERS);
        let sent = format!("cardinality(array_remove(${event_id}::text[], null))");
        first = all_written("keys", "event_keys", &sent);
    }
    let insert = renumbered(INSERT_EVENTS, JOB_PARAMETERS);
    parts.push(format!("events as ({insert} where {first} returning id)"));
    let sent = renumbered("cardinality($1::bigint[])", JOB_PARAMETERS);
    let upsert = upsert_jobs(&all_written("events", "sync_events", &sent));
    parts.push(format!("jobs as ({upsert})"));
    answer.push_str(" union all select null, null, null where not ");
    answer.push_str(&all_written("jobs", "device_jobs", "cardinality($1::text[])"));
    format!("with {} {answer}", parts.join(", "))
}

/// How many parameters there are in [`upsert_jobs`]: a device, a job, its figures, and since when streaks count.
const JOB_PARAMETERS: usize = 2 + Sums::COUNT + TIMES_AND_STREAK.0.len() + 1;

/// How many there are in [`INSERT_EVENTS`].
const EVENT_PARAMETERS: usize = 13;

/// A statement whose parameters come after `before` others.
fn renumbered(statement: &str, before: usize) -> String {
    let mut parts = statement.split('$');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = part.split_at(digits);
        let number = number.parse().map_or(0, |number: usize| number + before);
        text.push_str(&format!("${number}{rest}"));
    }
    text
}

/// A column that no event of the batch has a value for is an empty array, and nulls take its place.
const INSERT_EVENTS: &str = "
    insert into sync_events (
        id, device_id, timestamp, total_files_synced, total_errors, internet_speed, job,
        duration_seconds, bytes_synced, metadata, event_id, created_at, updated_at
    )
    select id, device_id, timestamp, total_files_synced, total_errors, speed_hundredths * 0.01, job,
           duration_milliseconds * 0.001, bytes_synced, metadata, event_id,
           coalesce(receipt, $12), coalesce(receipt, $12)
      from (
               select unnest($1::bigint[]) as id, unnest($2::text[]) as device_id,
                      unnest($3::timestamptz[]) as timestamp, unnest($4::integer[]) as total_files_synced,
                      unnest($5::integer[]) as total_errors, unnest($6::bigint[]) as speed_hundredths,
                      unnest($7::text[]) as job, unnest($8::bigint[]) as duration_milliseconds,
                      unnest($9::bigint[]) as bytes_synced, unnest($10::text[]) as metadata,
                      unnest($11::text[]) as event_id, unnest($13::timestamptz[]) as receipt
           ) as batch
";

/// Counts the stored failures of a job after its last success, by date and then by id, given the name under which
/// the statement around it knows the job's `device_id`, `job`, `last_success` and `last_failure`. The rule is that of
/// [`pisync_core::StreakCount::Recount`], and the function `pisync_streak` states it for ingest.
pub(super) fn unanswered_failures(job: &str) -> String {
    format!(
        "select count(*)
           from sync_events event
          where event.device_id = {job}.device_id
            and coalesce(event.job, '') = {job}.job
            and event.total_errors > 0
            and event.timestamp <= {job}.last_failure
            and (event.timestamp, event.id) > (coalesce({job}.last_success, '-infinity'), coalesce((
                    select max(success.id)
                      from sync_events success
                     where success.device_id = {job}.device_id
                       and coalesce(success.job, '') = {job}.job
                       and success.total_errors <= 0
                       and success.timestamp = {job}.last_success
                ), 0))"
    )
}

/// The parameters of [`INSERT_EVENTS`] that make a key: device, event id, id, timestamp, and when it was
/// received.
const KEYS_AMONG_EVENTS: [usize; 5] = [2, 11, 1, 3, 12];

/// Inserts the keys of those events that have one, given the numbers of its parameters. Fails when an event
/// was reported before, which is rare, and costs least when it was not.
fn insert_keys_statement(numbers: [usize; 5]) -> String {
    let [device_id, event_id, id, timestamp, received] = numbers;
    format!(
        "insert into event_keys (device_id, event_id, id, timestamp, created_at)
         select batch.*, ${received}
           from (
                    select unnest(${device_id}::text[]), unnest(${event_id}::text[]) as event_id,
                           unnest(${id}::bigint[]), unnest(${timestamp}::timestamptz[])
                ) as batch
          where event_id is not null"
    )
}

/// Leaves out the keys that are there already. Whose they are, this statement cannot see: one after it does, in a
/// later snapshot.
fn insert_new_keys_statement() -> String {
    format!("{} on conflict do nothing", insert_keys_statement([1, 2, 3, 4, 5]))
}

fn find_keys_statement() -> String {
    format!(
        "select key.device_id, key.event_id, key.id, {EVENT_COLUMNS}
           from unnest($1::text[], $2::text[]) as batch (device_id, event_id)
           join event_keys key using (device_id, event_id)
           left join sync_events event
             on event.device_id = key.device_id
            and event.timestamp = key.timestamp
            and event.id = key.id"
    )
}

/// Whether any of a batch's events is stored: then all are.
const ARE_STORED: &str = "
    select exists (
        select
          from unnest($1::text[], $2::timestamptz[], $3::bigint[]) as batch (device_id, timestamp, id)
          join sync_events using (device_id, timestamp, id)
    )
";

/// The statements as the server has parsed them.
pub(super) struct Statements {
    take_ids: Statement,
    upsert_devices: Statement,
    upsert_jobs: Statement,
    insert_events: Statement,
    /// By whether there are devices to register, then by whether there are event ids.
    store: [[Statement; 2]; 2],
    insert_keys: Statement,
    insert_new_keys: Statement,
    find_keys: Statement,
    are_stored: Statement,
    pub(super) passed: PassedStatements,
    pub(super) claims: ClaimStatements,
}

impl Statements {
    pub(super) async fn prepare(client: &Client) -> Result<Self, Error> {
        let store = async |with_devices, with_keys| {
            client.prepare(&store_statement(with_devices, with_keys)).await
        };
        Ok(Self {
            take_ids: client.prepare(TAKE_IDS).await?,
            upsert_devices: client.prepare(&upsert_devices_statement()).await?,
            upsert_jobs: client.prepare(&upsert_jobs_statement()).await?,
            store: [
                [store(false, false).await?, store(false, true).await?],
                [store(true, false).await?, store(true, true).await?],
            ],
            insert_events: client.prepare(INSERT_EVENTS).await?,
            insert_keys: client.prepare(&insert_keys_statement([1, 2, 3, 4, 5])).await?,
            insert_new_keys: client.prepare(&insert_new_keys_statement()).await?,
            find_keys: client.prepare(&find_keys_statement()).await?,
            are_stored: client.prepare(ARE_STORED).await?,
            passed: PassedStatements::prepare(client).await?,
            claims: ClaimStatements::prepare(client).await?,
        })
    }

    pub(super) async fn take_ids(&self, client: &Client, count: i64) -> Result<Vec<i64>, Error> {
        client.query_one(&self.take_ids, &[&count]).await?.try_get(0)
    }

    /// Registers devices or moves their `updated_at` on; answers the new ones.
    pub(super) async fn upsert_devices(
        &self,
        client: &Client,
        devices: &DeviceColumns<'_>,
        received: jiff::Timestamp,
    ) -> Result<Vec<DeviceId>, WriteError> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let rows = client.query(&self.upsert_devices, &devices.parameters(&received)).await?;
        rows.iter().map(device_of).collect()
    }
}

/// The device that a row begins with, which is one of the batch's.
fn device_of(row: &Row) -> Result<DeviceId, WriteError> {
    let device_id: &str = row.try_get(0)?;
    DeviceId::new(device_id).map_err(|_| {
        WriteError::Impossible(format!("PostgreSQL answered with the device {device_id:?}"))
    })
}

/// Devices in byte-wise order, a vector per column.
pub(super) struct DeviceColumns<'a> {
    device_ids: Vec<&'a str>,
    /// When the batch's events of each device were received; empty when they arrive now.
    first_received: Vec<jiff::Timestamp>,
    last_received: Vec<jiff::Timestamp>,
}

impl<'a> DeviceColumns<'a> {
    /// The devices of the events at the positions `touched`; all of them when events have receipts. Both
    /// positions and the whole batch's `order` are sorted by device.
    pub(super) fn of(batch: &'a Batch, order: &[usize], touched: &[usize]) -> Self {
        let (mut first_received, mut last_received) = (Vec::new(), Vec::new());
        if !batch.receipts.is_empty() {
            for positions in batch.by_device(order) {
                let (first, last) = batch.received_within(positions);
                first_received.push(first.to_jiff());
                last_received.push(last.to_jiff());
            }
        }
        let device_id = |position: &usize| batch.events[*position].device_id.as_str();
        Self { device_ids: touched.iter().map(device_id).collect(), first_received, last_received }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.device_ids.is_empty()
    }

    fn parameters<'b>(&'b self, received: &'b jiff::Timestamp) -> [&'b (dyn ToSql + Sync); 4] {
        [&self.device_ids, received, &self.first_received, &self.last_received]
    }
}

/// The shares of a batch, a vector per column.
pub(super) struct JobColumns<'a> {
    device_ids: Vec<&'a str>,
    jobs: Vec<&'a str>,
    sums: [Vec<i64>; Sums::COUNT],
    first_sync: Vec<jiff::Timestamp>,
    last_sync: Vec<jiff::Timestamp>,
    last_success: Vec<Option<jiff::Timestamp>>,
    last_failure: Vec<Option<jiff::Timestamp>>,
    consecutive_failures: Vec<i64>,
    last_received: Vec<jiff::Timestamp>,
}

impl<'a> JobColumns<'a> {
    pub(super) fn new(shares: &'a [JobShare<'a>]) -> Self {
        let mut sums: [Vec<i64>; Sums::COUNT] =
            std::array::from_fn(|_| Vec::with_capacity(shares.len()));
        for share in shares {
            for (column, sum) in sums.iter_mut().zip(Sums::of(&share.figures).values()) {
                column.push(sum);
            }
        }
        let times = |of: fn(&JobFigures) -> Timestamp| -> Vec<jiff::Timestamp> {
            shares.iter().map(|share| of(&share.figures).to_jiff()).collect()
        };
        let optional_times = |of: fn(&JobFigures) -> Option<Timestamp>| -> Vec<_> {
            shares.iter().map(|share| of(&share.figures).map(Timestamp::to_jiff)).collect()
        };
        Self {
            device_ids: shares.iter().map(|share| share.device_id.as_str()).collect(),
            jobs: shares.iter().map(JobShare::job_key).collect(),
            sums,
            first_sync: times(|figures| figures.first_sync),
            last_sync: times(|figures| figures.last_sync),
            last_success: optional_times(|figures| figures.last_success),
            last_failure: optional_times(|figures| figures.last_failure),
            consecutive_failures: shares
                .iter()
                .map(|share| share.figures.consecutive_failures)
                .collect(),
            last_received: times(|figures| figures.last_received),
        }
    }

    /// Adds the shares; answers the jobs that are failing. The events are inserted already.
    pub(super) async fn upsert(
        &self,
        client: &Client,
        statements: &Statements,
        streaks_since: jiff::Timestamp,
    ) -> Result<Vec<Row>, Error> {
        if self.device_ids.is_empty() {
            return Ok(Vec::new());
        }
        client.query(&statements.upsert_jobs, &self.parameters(&streaks_since)).await
    }

    fn parameters<'b>(
        &'b self,
        streaks_since: &'b jiff::Timestamp,
    ) -> [&'b (dyn ToSql + Sync); JOB_PARAMETERS] {
        let mut parameters: [&(dyn ToSql + Sync); JOB_PARAMETERS] = [streaks_since; JOB_PARAMETERS];
        let figures = self.sums.iter().map(|sum| sum as &(dyn ToSql + Sync)).chain([
            &self.first_sync as &(dyn ToSql + Sync),
            &self.last_sync,
            &self.last_success,
            &self.last_failure,
            &self.consecutive_failures,
            &self.last_received,
        ]);
        let keys = [&self.device_ids as &(dyn ToSql + Sync), &self.jobs];
        for (parameter, value) in parameters.iter_mut().zip(keys.into_iter().chain(figures)) {
            *parameter = value;
        }
        parameters
    }
}

/// Stores a batch and commits it; answers the jobs that are failing, and the devices that are new. See
/// [`store_statement`].
pub(super) async fn store(
    client: &Client,
    statements: &Statements,
    (devices, jobs, events): (&DeviceColumns<'_>, &JobColumns<'_>, &EventColumns<'_>),
    (received, streaks_since): (jiff::Timestamp, jiff::Timestamp),
) -> Result<(Vec<Row>, Vec<DeviceId>), WriteError> {
    let (with_devices, with_keys) = (!devices.is_empty(), !events.event_ids.is_empty());
    let mut parameters = jobs.parameters(&streaks_since).to_vec();
    parameters.extend(events.parameters(&received));
    if with_devices {
        parameters.extend(devices.parameters(&received));
    }
    let statement = &statements.store[usize::from(with_devices)][usize::from(with_keys)];
    let mut failing = Vec::new();
    let mut new_devices = Vec::new();
    for row in client.query(statement, &parameters).await? {
        if row.try_get::<_, Option<&str>>(1)?.is_some() {
            failing.push(row);
        } else {
            new_devices.push(device_of(&row)?);
        }
    }
    Ok((failing, new_devices))
}

/// The events of a batch in the order in which rows are touched, a vector per column.
pub(super) struct EventColumns<'a> {
    ids: Vec<i64>,
    device_ids: Vec<&'a str>,
    timestamps: Vec<jiff::Timestamp>,
    total_files_synced: Vec<i32>,
    total_errors: Vec<i32>,
    // Empty where no event has a value.
    internet_speed: Vec<Option<i64>>,
    jobs: Vec<Option<&'a str>>,
    durations: Vec<Option<i64>>,
    bytes_synced: Vec<Option<i64>>,
    metadata: Vec<Option<&'a str>>,
    event_ids: Vec<Option<&'a str>>,
    /// Empty when all events arrive now.
    receipts: Vec<jiff::Timestamp>,
}

impl<'a> EventColumns<'a> {
    pub(super) fn new(batch: &'a Batch, order: &[usize], ids: &[i64]) -> Self {
        let events = || order.iter().map(|position| &batch.events[*position]);
        Self {
            ids: order.iter().map(|position| ids[*position]).collect(),
            device_ids: events().map(|event| event.device_id.as_str()).collect(),
            timestamps: events().map(|event| event.timestamp.to_jiff()).collect(),
            total_files_synced: events()
                .map(|event| event.total_files_synced.cast_signed())
                .collect(),
            total_errors: events().map(|event| event.total_errors.cast_signed()).collect(),
            internet_speed: optional(
                events().map(|event| event.internet_speed.map(Mbps::hundredths)),
            ),
            jobs: optional(events().map(|event| event.job.as_ref().map(JobName::as_str))),
            durations: optional(
                events().map(|event| event.duration.map(SyncDuration::milliseconds)),
            ),
            bytes_synced: optional(events().map(|event| event.bytes_synced.map(u64::cast_signed))),
            metadata: optional(events().map(|event| event.metadata.as_ref().map(Metadata::as_str))),
            event_ids: optional(events().map(|event| event.event_id.as_ref().map(EventId::as_str))),
            receipts: order
                .iter()
                .filter_map(|position| batch.receipts.get(*position))
                .map(|receipt| receipt.to_jiff())
                .collect(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub(super) async fn insert(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<(), WriteError> {
        if self.is_empty() {
            return Ok(());
        }
        let written =
            client.execute(&statements.insert_events, &self.parameters(&received)).await?;
        check_written("sync_events", written, self.ids.len())
    }

    fn parameters<'b>(
        &'b self,
        received: &'b jiff::Timestamp,
    ) -> [&'b (dyn ToSql + Sync); EVENT_PARAMETERS] {
        [
            &self.ids,
            &self.device_ids,
            &self.timestamps,
            &self.total_files_synced,
            &self.total_errors,
            &self.internet_speed,
            &self.jobs,
            &self.durations,
            &self.bytes_synced,
            &self.metadata,
            &self.event_ids,
            received,
            &self.receipts,
        ]
    }

    /// Folds those events that folding has passed.
    pub(super) async fn fold_passed(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<(), Error> {
        let parameters: [&(dyn ToSql + Sync); 7] = [
            &self.device_ids,
            &self.timestamps,
            &self.total_files_synced,
            &self.total_errors,
            &self.internet_speed,
            &self.receipts,
            &received,
        ];
        statements.passed.fold(client, &parameters).await
    }

    /// Inserts the keys of those that have one; fails when one is there already.
    pub(super) async fn insert_keys(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<(), WriteError> {
        let written = self.write_keys(client, &statements.insert_keys, received).await?;
        check_written("event_keys", written, self.event_ids.iter().flatten().count())
    }

    /// Inserts the keys that are not there yet.
    pub(super) async fn insert_new_keys(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<u64, Error> {
        self.write_keys(client, &statements.insert_new_keys, received).await
    }

    async fn write_keys(
        &self,
        client: &Client,
        statement: &Statement,
        received: jiff::Timestamp,
    ) -> Result<u64, Error> {
        if self.event_ids.is_empty() {
            return Ok(0);
        }
        let parameters: [&(dyn ToSql + Sync); 5] =
            [&self.device_ids, &self.event_ids, &self.ids, &self.timestamps, &received];
        client.execute(statement, &parameters).await
    }

    /// What is kept under their keys.
    pub(super) async fn find_keys(
        &self,
        client: &Client,
        statements: &Statements,
    ) -> Result<KeptEvents, Error> {
        let mut kept = HashMap::new();
        if self.event_ids.is_empty() {
            return Ok(kept);
        }
        for row in client.query(&statements.find_keys, &[&self.device_ids, &self.event_ids]).await?
        {
            let is_there = row.try_get::<_, Option<i64>>(3)?.is_some();
            let event = if is_there { Some(stored_event(&row, 3)?) } else { None };
            kept.insert((row.try_get(0)?, row.try_get(1)?), (row.try_get(2)?, event));
        }
        Ok(kept)
    }

    /// Fails unless all keys were found, which were inserted or there before. One that was there may have been
    /// forgotten meanwhile: then it is to be inserted once more. If that does not help, a trigger drops it.
    pub(super) fn check_found(&self, kept: &KeptEvents) -> Result<(), WriteError> {
        for (device_id, event_id) in self.device_ids.iter().zip(&self.event_ids) {
            let Some(event_id) = event_id else { continue };
            let key = ((*device_id).to_owned(), (*event_id).to_owned());
            if !kept.contains_key(&key) {
                return Err(WriteError::Conflict(
                    "an event id is not in event_keys after it was inserted; a trigger may drop it",
                ));
            }
        }
        Ok(())
    }

    /// Whether the events were stored by an earlier attempt.
    pub(super) async fn are_stored(
        &self,
        client: &Client,
        statements: &Statements,
    ) -> Result<bool, Error> {
        client
            .query_one(&statements.are_stored, &[&self.device_ids, &self.timestamps, &self.ids])
            .await?
            .try_get(0)
    }
}

/// Fails when a statement has written fewer rows than were sent: a trigger has dropped the others.
pub(super) fn check_written(
    table: &'static str,
    written: u64,
    sent: usize,
) -> Result<(), WriteError> {
    if written == sent as u64 { Ok(()) } else { Err(WriteError::Dropped { table, written, sent }) }
}

/// A column that may be without any value; then it is empty.
fn optional<T>(values: impl Iterator<Item = Option<T>>) -> Vec<Option<T>> {
    let column: Vec<Option<T>> = values.collect();
    if column.iter().any(Option::is_some) { column } else { Vec::new() }
}

/// By device and event id: the first event's id, and the event if it is still kept.
pub(super) type KeptEvents = HashMap<(String, String), (i64, Option<StoredEvent>)>;
