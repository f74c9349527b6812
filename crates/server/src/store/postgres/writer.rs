//! Ingest's own connection: a batch is one transaction, sent in one go.
//!
//! The order of statements is what makes streaks exact with several nodes. The upsert of `device_jobs`
//! locks the rows; a streak that must be recounted is recounted in a later statement, whose snapshot
//! is taken after the lock and so sees what the other node has committed meanwhile.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures_util::future;
use jiff::civil::Date;
use pisync_core::{DeviceId, JobFigures, JobName, Mbps, Metadata, SyncDuration, Timestamp};
use tokio_postgres::{
    Client, Error, Row, Statement,
    error::SqlState,
    types::{FromSql, ToSql},
};

use super::{
    connect::{Connection, Connector, describe, is_connection_lost, store_error},
    expiry, partitions,
};
use crate::store::{Batch, EventWriter, FailureStreak, StoreError, Written, batch::JobShare};

/// Longest time for one batch before the connection is given up. Far more than any batch takes; it
/// is for a server that has stopped answering.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a batch is tried again after a deadlock or another passing conflict.
const RETRIES: u32 = 5;

/// `devices.updated_at` is moved on when it is older than this. Each move rewrites the row, and a
/// burst of one device's events should not rewrite it each time.
const LAST_SEEN_STEP_MILLISECONDS: i64 = 60_000;

/// How long it is remembered which events come too late for streaks. It moves once a month, and is
/// announced 5 minutes before events go.
const STREAKS_SINCE_MILLISECONDS: i64 = 60_000;

/// Devices whose last move is remembered, some 10 MiB of them. Beyond, all are forgotten.
const REMEMBERED_DEVICES: usize = 100_000;

/// Ids taken from the sequence at a time, and how many to have left before more are taken. Other
/// nodes take theirs from the same sequence, so ids rise with time only roughly.
const ID_BLOCK: i64 = 4_096;
const ID_RESERVE: usize = 2_048;

const NO_ANSWER: &str = "PostgreSQL does not answer";

const TAKE_IDS: &str = "select nextval('sync_events_id_seq') from generate_series(1, $1::bigint)";

/// Answers the devices that are new. A row is new when no transaction has locked or replaced a version
/// of it before: its `xmax` is 0.
const UPSERT_DEVICES: &str = "
    with upserted as (
        insert into devices (device_id, created_at, updated_at)
        select device_id, $2, $2
          from unnest($1::text[]) as batch (device_id)
            on conflict (device_id) do update
               set updated_at = greatest(devices.updated_at, excluded.updated_at)
        returning device_id, xmax = 0 as is_new
    )
    select device_id from upserted where is_new
";

/// Answers the jobs that are failing, with -1 for a streak that must be recounted. The rule is that of
/// `pisync_core::JobFigures::add`.
const UPSERT_JOBS: &str = "
    with upserted as (
        insert into device_jobs as stored (
            device_id, job, total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum,
            speed_count, first_sync, last_sync, last_success, last_failure, consecutive_failures,
            last_received
        )
        select batch.*, $14
          from unnest(
                   $1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[],
                   $7::bigint[], $8::bigint[], $9::timestamptz[], $10::timestamptz[],
                   $11::timestamptz[], $12::timestamptz[], $13::bigint[]
               ) as batch
            on conflict (device_id, job) do update
               set total_syncs        = stored.total_syncs + excluded.total_syncs,
                   failed_syncs       = stored.failed_syncs + excluded.failed_syncs,
                   total_files_synced = stored.total_files_synced + excluded.total_files_synced,
                   total_errors       = stored.total_errors + excluded.total_errors,
                   speed_sum          = stored.speed_sum + excluded.speed_sum,
                   speed_count        = stored.speed_count + excluded.speed_count,
                   first_sync         = least(stored.first_sync, excluded.first_sync),
                   last_sync          = greatest(stored.last_sync, excluded.last_sync),
                   last_success       = greatest(stored.last_success, excluded.last_success),
                   last_failure       = greatest(stored.last_failure, excluded.last_failure),
                   last_received      = greatest(stored.last_received, excluded.last_received),
                   consecutive_failures = case
                       when excluded.last_success > coalesce(stored.last_success, '-infinity')
                        and excluded.last_success >= $15 then
                           case
                               when stored.last_failure > excluded.last_success then -1
                               else excluded.consecutive_failures
                           end
                       when excluded.last_failure is null
                         or excluded.last_failure <= stored.last_success
                         or excluded.last_failure < $15 then
                           stored.consecutive_failures
                       when greatest(excluded.first_sync, $15)
                          > coalesce(stored.last_success, '-infinity') then
                           stored.consecutive_failures + excluded.consecutive_failures
                       else -1
                   end
        returning device_id, job, consecutive_failures
    )
    select device_id, job, consecutive_failures from upserted where consecutive_failures <> 0
";

const INSERT_EVENTS: &str = "
    insert into sync_events (
        id, device_id, timestamp, total_files_synced, total_errors, internet_speed, job,
        duration_seconds, bytes_synced, metadata, created_at, updated_at
    )
    select id, device_id, timestamp, total_files_synced, total_errors, speed_hundredths * 0.01, job,
           duration_milliseconds * 0.001, bytes_synced, metadata, $11, $11
      from unnest(
               $1::bigint[], $2::text[], $3::timestamptz[], $4::integer[], $5::integer[],
               $6::bigint[], $7::text[], $8::bigint[], $9::bigint[], $10::text[]
           ) as batch (
               id, device_id, timestamp, total_files_synced, total_errors, speed_hundredths, job,
               duration_milliseconds, bytes_synced, metadata
           )
";

const RECOUNT_STREAKS: &str = "
    update device_jobs stored
       set consecutive_failures = (
               select count(*)
                 from sync_events event
                where event.device_id = stored.device_id
                  and coalesce(event.job, '') = stored.job
                  and event.total_errors > 0
                  and event.timestamp > coalesce(stored.last_success, '-infinity')
           )
      from unnest($1::text[], $2::text[]) as batch (device_id, job)
     where stored.device_id = batch.device_id and stored.job = batch.job
    returning stored.device_id, stored.job, stored.consecutive_failures
";

const IS_STORED: &str = "
    select exists (select from sync_events where device_id = $1 and timestamp = $2 and id = $3)
";

/// See the module.
pub(super) struct PostgresEventWriter {
    connector: Connector,
    session: Option<Session>,
    /// When each device's `updated_at` was last moved on by this node.
    last_seen: HashMap<DeviceId, Timestamp>,
    /// Months whose partition is known to exist.
    months: HashSet<Date>,
    /// Ids taken from the sequence and not used yet.
    ids: VecDeque<i64>,
    /// Events dated before this no longer change streaks.
    streaks_since: Timestamp,
    /// When that was looked up.
    streaks_since_read: Option<Timestamp>,
    /// A batch that may or may not have been committed.
    unsettled: Option<Unsettled>,
    /// Whether the transaction under way has been asked to commit.
    committing: bool,
}

struct Unsettled {
    batch: Arc<Batch>,
    ids: Vec<i64>,
}

struct Session {
    connection: Connection,
    statements: Statements,
}

struct Statements {
    take_ids: Statement,
    upsert_devices: Statement,
    upsert_jobs: Statement,
    insert_events: Statement,
    recount_streaks: Statement,
    is_stored: Statement,
}

impl PostgresEventWriter {
    pub(super) fn new(connector: Connector) -> Self {
        Self {
            connector,
            session: None,
            last_seen: HashMap::new(),
            months: HashSet::new(),
            ids: VecDeque::new(),
            streaks_since: Timestamp::MIN,
            streaks_since_read: None,
            unsettled: None,
            committing: false,
        }
    }

    async fn connect(&mut self) -> Result<(), StoreError> {
        if self.session.is_none() {
            let connection = self.connector.connect().await?;
            let statements = Statements::prepare(&connection).await.map_err(store_error)?;
            self.session = Some(Session { connection, statements });
        }
        Ok(())
    }

    /// Connects if need be, sees to the month's partition and to enough ids.
    async fn prepare(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.connect().await?;
        let Some(session) = &mut self.session else { return Err(StoreError::Stopped) };
        let due = batch.received.saturating_add_milliseconds(-STREAKS_SINCE_MILLISECONDS);
        if self.streaks_since_read.is_none_or(|read| !(due..=batch.received).contains(&read)) {
            let client = &session.connection.client;
            self.streaks_since = expiry::streaks_since(client).await.map_err(store_error)?;
            self.streaks_since_read = Some(batch.received);
        }
        let month = partitions::month_of(batch.received);
        if !self.months.contains(&month) {
            partitions::ensure(&mut session.connection.client, month).await?;
            self.months.insert(month);
        }
        if self.ids.len() < batch.events.len() {
            let count = i64::try_from(batch.events.len()).unwrap_or(i64::MAX).max(ID_BLOCK);
            let rows = session
                .connection
                .client
                .query(&session.statements.take_ids, &[&count])
                .await
                .map_err(store_error)?;
            self.ids.extend(column::<i64>(&rows).map_err(store_error)?);
        }
        Ok(())
    }

    /// One transaction. `ids` are the events' ids in the batch's order.
    async fn transact(
        &mut self,
        batch: &Batch,
        ids: &[i64],
        may_be_stored: bool,
    ) -> Result<Written, Error> {
        let Some(Session { connection, statements }) = &self.session else {
            return Ok(Written::default());
        };
        let client = &connection.client;
        let order = batch.order();
        let shares = batch.shares(&order, self.streaks_since);
        let received = batch.received.to_jiff();

        let unseen = self.devices_to_touch(batch, &shares);
        let jobs = JobColumns::new(&shares);
        let events = EventColumns::new(batch, &order, ids);
        let wants_ids = self.ids.len() < ID_RESERVE;

        let begin = client.batch_execute("begin");
        let upsert_devices = async {
            if unseen.is_empty() {
                return Ok(Vec::new());
            }
            client.query(&statements.upsert_devices, &[&unseen, &received]).await
        };
        let streaks_since = self.streaks_since.to_jiff();
        let upsert_jobs = jobs.upsert(client, &statements.upsert_jobs, &received, &streaks_since);

        let mut written = Written { ids: ids.to_vec(), ..Written::default() };
        let (new_devices, failing) = if may_be_stored {
            begin.await?;
            let new_devices = upsert_devices.await?;
            let failing = upsert_jobs.await?;
            // The upserts have waited for the lost transaction's locks: it is over now.
            let first = &batch.events[0];
            let parameters: [&(dyn ToSql + Sync); 3] =
                [&first.device_id.as_str(), &first.timestamp.to_jiff(), &ids[0]];
            if client.query_one(&statements.is_stored, &parameters).await?.try_get(0)? {
                client.batch_execute("rollback").await?;
                return Ok(written);
            }
            events.insert(client, &statements.insert_events, &received).await?;
            (new_devices, failing)
        } else {
            // Polled in this order, so sent in this order, without waiting for each other's answers.
            let take_ids = async {
                if wants_ids {
                    client.query(&statements.take_ids, &[&ID_BLOCK]).await
                } else {
                    Ok(Vec::new())
                }
            };
            let insert_events = events.insert(client, &statements.insert_events, &received);
            let (begun, new_devices, failing, inserted, taken) =
                future::join5(begin, upsert_devices, upsert_jobs, insert_events, take_ids).await;
            begun?;
            let (new_devices, failing) = (new_devices?, failing?);
            inserted?;
            self.ids.extend(column::<i64>(&taken?)?);
            (new_devices, failing)
        };

        for row in &new_devices {
            if let Ok(device_id) = DeviceId::new(row.try_get(0)?) {
                written.new_devices.push(device_id);
            }
        }
        let mut recounts: Vec<&JobShare<'_>> = Vec::new();
        for row in &failing {
            let Some((share, streak)) = find_share(&shares, row)? else { continue };
            if streak < 0 {
                recounts.push(share);
            } else {
                written.streaks.extend(share.streak(streak));
            }
        }
        if !recounts.is_empty() {
            written.streaks.extend(recount(client, &statements.recount_streaks, &recounts).await?);
        }

        let touched: Vec<DeviceId> = shares
            .iter()
            .filter(|share| unseen.contains(&share.device_id.as_str()))
            .map(|share| share.device_id.clone())
            .collect();
        self.committing = true;
        client.batch_execute("commit").await?;
        self.committing = false;
        self.last_seen.extend(touched.into_iter().map(|device_id| (device_id, batch.received)));
        Ok(written)
    }

    /// The batch's devices that may be new, or whose `updated_at` is due, in byte-wise order.
    fn devices_to_touch<'a>(&self, batch: &Batch, shares: &[JobShare<'a>]) -> Vec<&'a str> {
        let due = batch.received.saturating_add_milliseconds(-LAST_SEEN_STEP_MILLISECONDS);
        let mut devices: Vec<&str> = shares
            .iter()
            .map(|share| share.device_id)
            .filter(|device_id| self.last_seen.get(*device_id).is_none_or(|seen| *seen < due))
            .map(DeviceId::as_str)
            .collect();
        devices.dedup();
        devices
    }

    /// Remembers that `batch` may be stored under `ids`.
    fn leave_unsettled(
        &mut self,
        batch: &Arc<Batch>,
        ids: Option<Vec<i64>>,
        why: String,
    ) -> StoreError {
        self.session = None;
        self.unsettled = ids.map(|ids| Unsettled { batch: Arc::clone(batch), ids });
        StoreError::OutcomeUnknown(why)
    }

    /// What to do about a failed transaction: `Ok` to try again.
    async fn recover(&mut self, error: Error, attempt: u32) -> Result<(), StoreError> {
        if is_connection_lost(&error) {
            self.session = None;
            // An idle connection that a restarted server has closed shows only now.
            return if attempt == 0 { Ok(()) } else { Err(store_error(error)) };
        }
        if let Some(session) = &self.session {
            let rollback = session.connection.client.batch_execute("rollback");
            if !matches!(tokio::time::timeout(WRITE_TIMEOUT, rollback).await, Ok(Ok(()))) {
                self.session = None;
            }
        }
        let Some(code) = error.code().cloned() else { return Err(store_error(error)) };
        let again = if code == SqlState::T_R_DEADLOCK_DETECTED
            || code == SqlState::T_R_SERIALIZATION_FAILURE
        {
            attempt < RETRIES
        } else if code == SqlState::FOREIGN_KEY_VIOLATION {
            // A device was deleted behind our back, perhaps after the deletion and this batch had
            // met in a deadlock: register it again.
            self.last_seen.clear();
            attempt < RETRIES
        } else if code == SqlState::CHECK_VIOLATION && names_no_constraint(&error) {
            // The month's partition is missing after all: somebody has dropped or detached it.
            !std::mem::take(&mut self.months).is_empty() && attempt < RETRIES
        } else if code == SqlState::FEATURE_NOT_SUPPORTED
            || code == SqlState::INVALID_SQL_STATEMENT_NAME
            || code == SqlState::READ_ONLY_SQL_TRANSACTION
        {
            // A statement that outlived a migration, or a server that has become a standby.
            self.session = None;
            attempt == 0
        } else {
            false
        };
        if again { Ok(()) } else { Err(store_error(error)) }
    }
}

#[async_trait]
impl EventWriter for PostgresEventWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let unsettled =
            self.unsettled.take().filter(|unsettled| Arc::ptr_eq(&unsettled.batch, batch));
        let may_be_stored = unsettled.is_some();
        let mut ids = unsettled.map(|unsettled| unsettled.ids);
        if self.last_seen.len() > REMEMBERED_DEVICES {
            self.last_seen.clear();
        }

        for attempt in 0.. {
            self.committing = false;
            let reuses_session = self.session.is_some();
            let work = async {
                self.prepare(batch).await?;
                let ids = ids.get_or_insert_with(|| {
                    self.ids.drain(..batch.events.len()).collect::<Vec<_>>()
                });
                Ok::<_, StoreError>(self.transact(batch, ids, may_be_stored).await)
            };
            let error = match tokio::time::timeout(WRITE_TIMEOUT, work).await {
                Ok(Ok(Ok(written))) => return Ok(written),
                Ok(Ok(Err(error))) if self.committing && is_connection_lost(&error) => {
                    StoreError::OutcomeUnknown(describe(&error))
                }
                Ok(Ok(Err(error))) => match self.recover(error, attempt).await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                // An idle connection that a restarted server has closed shows only now.
                Ok(Err(StoreError::Unavailable(_))) if attempt == 0 && reuses_session => {
                    self.session = None;
                    continue;
                }
                Ok(Err(error)) => error,
                Err(_) if self.committing => StoreError::OutcomeUnknown(NO_ANSWER.into()),
                Err(_) => StoreError::Unavailable(NO_ANSWER.into()),
            };
            return Err(match error {
                StoreError::OutcomeUnknown(why) => self.leave_unsettled(batch, ids, why),
                // Still not known: this attempt has not come as far as looking.
                StoreError::Unavailable(why) if may_be_stored => {
                    self.leave_unsettled(batch, ids, why)
                }
                StoreError::Unavailable(why) => {
                    self.session = None;
                    StoreError::Unavailable(why)
                }
                error => error,
            });
        }
        Err(StoreError::Stopped)
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.connect().await?;
        let Some(session) = &self.session else { return Err(StoreError::Stopped) };
        let alive = session.connection.client.batch_execute("select 1");
        let result = match tokio::time::timeout(WRITE_TIMEOUT, alive).await {
            Ok(result) => result.map_err(store_error),
            Err(_) => Err(StoreError::Unavailable(NO_ANSWER.into())),
        };
        if result.is_err() {
            self.session = None;
        }
        result
    }
}

impl Statements {
    async fn prepare(connection: &Connection) -> Result<Self, Error> {
        let client = &connection.client;
        Ok(Self {
            take_ids: client.prepare(TAKE_IDS).await?,
            upsert_devices: client.prepare(UPSERT_DEVICES).await?,
            upsert_jobs: client.prepare(UPSERT_JOBS).await?,
            insert_events: client.prepare(INSERT_EVENTS).await?,
            recount_streaks: client.prepare(RECOUNT_STREAKS).await?,
            is_stored: client.prepare(IS_STORED).await?,
        })
    }
}

/// The shares of a batch, a vector per column.
struct JobColumns<'a> {
    device_ids: Vec<&'a str>,
    jobs: Vec<&'a str>,
    total_syncs: Vec<i64>,
    failed_syncs: Vec<i64>,
    total_files_synced: Vec<i64>,
    total_errors: Vec<i64>,
    speed_sum: Vec<i64>,
    speed_count: Vec<i64>,
    first_sync: Vec<jiff::Timestamp>,
    last_sync: Vec<jiff::Timestamp>,
    last_success: Vec<Option<jiff::Timestamp>>,
    last_failure: Vec<Option<jiff::Timestamp>>,
    consecutive_failures: Vec<i64>,
}

impl<'a> JobColumns<'a> {
    fn new(shares: &'a [JobShare<'a>]) -> Self {
        let numbers = |of: fn(&JobFigures) -> i64| -> Vec<i64> {
            shares.iter().map(|share| of(&share.figures)).collect()
        };
        let times = |of: fn(&JobFigures) -> Timestamp| -> Vec<jiff::Timestamp> {
            shares.iter().map(|share| of(&share.figures).to_jiff()).collect()
        };
        let optional_times = |of: fn(&JobFigures) -> Option<Timestamp>| -> Vec<_> {
            shares.iter().map(|share| of(&share.figures).map(Timestamp::to_jiff)).collect()
        };
        Self {
            device_ids: shares.iter().map(|share| share.device_id.as_str()).collect(),
            jobs: shares.iter().map(JobShare::job_key).collect(),
            total_syncs: numbers(|figures| figures.total_syncs),
            failed_syncs: numbers(|figures| figures.failed_syncs),
            total_files_synced: numbers(|figures| figures.total_files_synced),
            total_errors: numbers(|figures| figures.total_errors),
            speed_sum: numbers(|figures| figures.speed_sum),
            speed_count: numbers(|figures| figures.speed_count),
            first_sync: times(|figures| figures.first_sync),
            last_sync: times(|figures| figures.last_sync),
            last_success: optional_times(|figures| figures.last_success),
            last_failure: optional_times(|figures| figures.last_failure),
            consecutive_failures: numbers(|figures| figures.consecutive_failures),
        }
    }

    async fn upsert(
        &self,
        client: &Client,
        statement: &Statement,
        received: &jiff::Timestamp,
        streaks_since: &jiff::Timestamp,
    ) -> Result<Vec<Row>, Error> {
        let parameters: [&(dyn ToSql + Sync); 15] = [
            &self.device_ids,
            &self.jobs,
            &self.total_syncs,
            &self.failed_syncs,
            &self.total_files_synced,
            &self.total_errors,
            &self.speed_sum,
            &self.speed_count,
            &self.first_sync,
            &self.last_sync,
            &self.last_success,
            &self.last_failure,
            &self.consecutive_failures,
            received,
            streaks_since,
        ];
        client.query(statement, &parameters).await
    }
}

/// The events of a batch in the order in which rows are touched, a vector per column.
struct EventColumns<'a> {
    ids: Vec<i64>,
    device_ids: Vec<&'a str>,
    timestamps: Vec<jiff::Timestamp>,
    total_files_synced: Vec<i32>,
    total_errors: Vec<i32>,
    internet_speed: Vec<Option<i64>>,
    jobs: Vec<Option<&'a str>>,
    durations: Vec<Option<i64>>,
    bytes_synced: Vec<Option<i64>>,
    metadata: Vec<Option<&'a str>>,
}

impl<'a> EventColumns<'a> {
    fn new(batch: &'a Batch, order: &[usize], ids: &[i64]) -> Self {
        let events = || order.iter().map(|position| &batch.events[*position]);
        Self {
            ids: order.iter().map(|position| ids[*position]).collect(),
            device_ids: events().map(|event| event.device_id.as_str()).collect(),
            timestamps: events().map(|event| event.timestamp.to_jiff()).collect(),
            total_files_synced: events()
                .map(|event| event.total_files_synced.cast_signed())
                .collect(),
            total_errors: events().map(|event| event.total_errors.cast_signed()).collect(),
            internet_speed: events()
                .map(|event| event.internet_speed.map(Mbps::hundredths))
                .collect(),
            jobs: events().map(|event| event.job.as_ref().map(JobName::as_str)).collect(),
            durations: events()
                .map(|event| event.duration.map(SyncDuration::milliseconds))
                .collect(),
            bytes_synced: events().map(|event| event.bytes_synced.map(u64::cast_signed)).collect(),
            metadata: events().map(|event| event.metadata.as_ref().map(Metadata::as_str)).collect(),
        }
    }

    async fn insert(
        &self,
        client: &Client,
        statement: &Statement,
        received: &jiff::Timestamp,
    ) -> Result<u64, Error> {
        let parameters: [&(dyn ToSql + Sync); 11] = [
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
            received,
        ];
        client.execute(statement, &parameters).await
    }
}

/// Counts streaks among the stored events. The rows of `device_jobs` are locked.
async fn recount(
    client: &Client,
    statement: &Statement,
    shares: &[&JobShare<'_>],
) -> Result<Vec<FailureStreak>, Error> {
    let device_ids: Vec<&str> = shares.iter().map(|share| share.device_id.as_str()).collect();
    let jobs: Vec<&str> = shares.iter().map(|share| share.job_key()).collect();
    let mut streaks = Vec::new();
    for row in client.query(statement, &[&device_ids, &jobs]).await? {
        let (device_id, job): (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
        let share = shares
            .iter()
            .find(|share| share.device_id.as_str() == device_id && share.job_key() == job);
        let streak = row.try_get(2)?;
        streaks.extend(share.and_then(|share| share.streak(streak)));
    }
    Ok(streaks)
}

/// The share that a row of [`UPSERT_JOBS`] is about, and its streak.
fn find_share<'a, 'b>(
    shares: &'a [JobShare<'b>],
    row: &Row,
) -> Result<Option<(&'a JobShare<'b>, i64)>, Error> {
    let key: (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
    let found =
        shares.binary_search_by(|share| (share.device_id.as_str(), share.job_key()).cmp(&key));
    let streak = row.try_get(2)?;
    Ok(found.ok().map(|position| (&shares[position], streak)))
}

/// A row that no partition takes violates a check that has no name.
fn names_no_constraint(error: &Error) -> bool {
    error.as_db_error().is_some_and(|error| error.constraint().is_none())
}

/// The first column of rows.
fn column<T: for<'a> FromSql<'a>>(rows: &[Row]) -> Result<Vec<T>, Error> {
    rows.iter().map(|row| row.try_get(0)).collect()
}
