//! Ingest's statements. `batch_columns` makes their parameters and runs them. Each session of the writer prepares them
//! once.
//!
//! A batch goes into a statement as one array per column. Arrays are unnested side by side in a select list, which makes
//! rows as they are needed. `from unnest(…)` would store each column first, which costs an eighth of the whole.

use tokio_postgres::{Client, Error, Statement};

use super::{claims::ClaimStatements, history::EVENT_COLUMNS, roll_ups::BelowWatermarkStatements};
use crate::store::{Sums, figure_columns::TIMES_AND_STREAK};

const TAKE_IDS: &str =
    "select array_agg(nextval('sync_events_id_seq')) from generate_series(1, $1::bigint)";

/// Registers devices or advances their `updated_at`. A row is new when no transaction has locked or replaced an earlier
/// version of it: its `xmax` is 0.
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

/// Answers the new devices.
fn upsert_devices_statement() -> String {
    format!("with upserted as ({UPSERT_DEVICES}) select device_id from upserted where is_new")
}

/// The upsert of figures, for events that are already inserted. The rule is that of `pisync_core::JobFigures::add`. If
/// the figures alone do not give a streak, `pisync_streak` counts it. The job's row is locked by then. `first` is what
/// must have happened before. Answers all of the batch's jobs.
fn upsert_jobs(first: &str) -> String {
    let types =
        [vec!["text"; 2], vec!["bigint"; Sums::COUNT], TIMES_AND_STREAK_TYPES.to_vec()].concat();
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
        times = TIMES_AND_STREAK.join(", "),
        arrays = arrays.join(", "),
        sums = Sums::add_to("stored"),
        since = format_args!("${JOB_PARAMETERS}"),
    )
}

/// The types of the columns of `device_jobs` behind the sums.
const TIMES_AND_STREAK_TYPES: [&str; TIMES_AND_STREAK.len()] =
    ["timestamptz", "timestamptz", "timestamptz", "timestamptz", "bigint", "timestamptz"];

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

/// True when the part of a statement that writes to `table` has written as many rows as were sent. Otherwise it fails
/// the statement. A trigger may drop a row without an error (`return null`). That refuses the data as much as a trigger
/// that raises an error. Only a failing cast can raise an error within a statement; its message shows the text.
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

/// A batch and its commit in a single statement, with or without devices to register and event ids. Answers the failing
/// jobs, and the new devices, which have no job. Its parts run in the order of `transactions`. Each part starts when
/// the one before has finished with all of its rows.
fn store_statement(with_devices: bool, with_keys: bool) -> String {
    let mut parts = Vec::new();
    let mut answer =
        "select device_id, job, consecutive_failures from jobs where consecutive_failures <> 0"
            .to_owned();
    let mut first = "true".to_owned();
    if with_devices {
        let upsert = renumbered(UPSERT_DEVICES, JOB_PARAMETERS + EVENT_PARAMETERS);
        parts.push(format!("registered as ({upsert})"));
        answer.push_str(" union all select device_id, null, null from registered where is_new");
        // Events of a device that a trigger drops cannot be stored.
        first = "(select count(*) from registered) is not null".to_owned();
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

/// The number of parameters of [`upsert_jobs`]: a device, a job, its figures, and since when streaks count.
pub(super) const JOB_PARAMETERS: usize = 2 + Sums::COUNT + TIMES_AND_STREAK.len() + 1;

/// The number of parameters of [`INSERT_EVENTS`].
pub(super) const EVENT_PARAMETERS: usize = 13;

/// A statement whose parameters follow `before` other parameters.
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

/// An empty array stands for a column that has no value in this batch. Nulls take its place.
const INSERT_EVENTS: &str = "
    insert into sync_events (
        id, device_id, timestamp, total_files_synced, total_errors, internet_speed, job,
        duration_seconds, bytes_synced, metadata, event_id, created_at, updated_at
    )
    select id, device_id, timestamp, total_files_synced, total_errors, speed_hundredths * 0.01, job,
           duration_milliseconds * 0.001, bytes_synced, metadata, event_id,
           coalesce(received, $12), coalesce(received, $12)
      from (
               select unnest($1::bigint[]) as id, unnest($2::text[]) as device_id,
                      unnest($3::timestamptz[]) as timestamp, unnest($4::integer[]) as total_files_synced,
                      unnest($5::integer[]) as total_errors, unnest($6::bigint[]) as speed_hundredths,
                      unnest($7::text[]) as job, unnest($8::bigint[]) as duration_milliseconds,
                      unnest($9::bigint[]) as bytes_synced, unnest($10::text[]) as metadata,
                      unnest($11::text[]) as event_id, unnest($13::timestamptz[]) as received
           ) as batch
";

/// SQL that counts the stored failures of a job after its last success, by date and then by id. The surrounding
/// statement calls the job `job`. It must know the job's `device_id`, `job`, `last_success` and `last_failure`. The
/// rule is that of [`pisync_core::StreakCount::Recount`]; the function `pisync_streak` states it for ingest.
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

/// The parameters of [`INSERT_EVENTS`] that make a key: device, event id, id, timestamp, and `received_at`.
const KEYS_AMONG_EVENTS: [usize; 5] = [2, 11, 1, 3, 12];

/// Inserts the keys of the events that have one. `numbers` are the numbers of its parameters. It fails when an event
/// was reported before. That is rare, and otherwise this form costs least.
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

/// Skips keys that exist already. This statement cannot see which event they belong to. A later statement can, in a
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

/// Whether any event of a batch is stored. If one is, all are.
const ARE_STORED: &str = "
    select exists (
        select
          from unnest($1::text[], $2::timestamptz[], $3::bigint[]) as batch (device_id, timestamp, id)
          join sync_events using (device_id, timestamp, id)
    )
";

/// The prepared statements.
pub(super) struct Statements {
    pub(super) take_ids: Statement,
    pub(super) upsert_devices: Statement,
    pub(super) upsert_jobs: Statement,
    pub(super) insert_events: Statement,
    /// Indexed by whether there are devices to register, then by whether there are event ids.
    pub(super) store: [[Statement; 2]; 2],
    pub(super) insert_keys: Statement,
    pub(super) insert_new_keys: Statement,
    pub(super) find_keys: Statement,
    pub(super) are_stored: Statement,
    pub(super) below_watermark: BelowWatermarkStatements,
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
            below_watermark: BelowWatermarkStatements::prepare(client).await?,
            claims: ClaimStatements::prepare(client).await?,
        })
    }

    pub(super) async fn take_ids(&self, client: &Client, count: i64) -> Result<Vec<i64>, Error> {
        client.query_one(&self.take_ids, &[&count]).await?.try_get(0)
    }
}
