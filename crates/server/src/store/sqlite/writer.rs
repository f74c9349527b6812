//! The thread that owns the only connection for writing, and what it does.

use std::{collections::HashMap, sync::Arc, thread};

use async_trait::async_trait;
use pisync_core::{
    DeviceId, JobFigures, JobName, Mbps, Metadata, StreakCount, SyncDuration, SyncEvent, Timestamp,
};
use rusqlite::{
    CachedStatement, Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params,
};
use tokio::sync::{mpsc, oneshot};

use super::{
    connection::store_error,
    expiry,
    reads::{device_number, optional_time, time},
    roll_ups,
};
use crate::store::{Batch, DeviceChange, EventWriter, StoreError, Written, batch::JobShare};

/// Calls that may wait for the thread. Ingest has one under way at a time; the rest are rare changes
/// that people make.
const WAITING_CALLS: usize = 64;

/// Devices whose numbers are remembered, some 10 MiB of them. Beyond, all are forgotten and read again.
const REMEMBERED_DEVICES: usize = 100_000;

type Call = Box<dyn FnOnce(&mut WriteConnection) + Send>;

/// A handle on the thread, which ends when the last handle is gone.
#[derive(Clone)]
pub(super) struct WriterThread {
    calls: mpsc::Sender<Call>,
}

impl WriterThread {
    pub(super) fn start(connection: Connection) -> Result<Self, StoreError> {
        let (calls, mut waiting) = mpsc::channel::<Call>(WAITING_CALLS);
        let mut connection = WriteConnection {
            connection,
            devices: HashMap::new(),
            data_version: None,
            streaks_since: Timestamp::MIN,
        };
        thread::Builder::new()
            .name("sqlite-writer".into())
            .spawn(move || {
                while let Some(call) = waiting.blocking_recv() {
                    call(&mut connection);
                }
            })
            .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { calls })
    }

    /// Runs `work` on the thread.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut WriteConnection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, result) = oneshot::channel();
        let call: Call = Box::new(move |connection| {
            // The caller may have gone away; the work is done all the same.
            let _ = reply.send(work(connection));
        });
        self.calls.send(call).await.map_err(|_| StoreError::Stopped)?;
        result.await.map_err(|_| StoreError::Stopped)?.map_err(store_error)
    }
}

/// Ingest's way to the thread.
pub(super) struct SqliteEventWriter {
    thread: WriterThread,
}

impl SqliteEventWriter {
    pub(super) fn new(thread: WriterThread) -> Self {
        Self { thread }
    }
}

#[async_trait]
impl EventWriter for SqliteEventWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let batch = Arc::clone(batch);
        self.thread.call(move |connection| connection.write(&batch)).await
    }

    /// Takes the write lock and a little space in the log, so that a full disk shows.
    async fn probe(&mut self) -> Result<(), StoreError> {
        self.thread
            .call(|connection| {
                connection.connection.execute_batch(
                    "begin immediate; create table pisync_probe (x); drop table pisync_probe; commit",
                )
            })
            .await
    }
}

/// The connection, with what it remembers between transactions.
pub(super) struct WriteConnection {
    pub(super) connection: Connection,
    /// The numbers of devices, as far as committed.
    devices: HashMap<DeviceId, i64>,
    /// Changes when another process has written to the file.
    data_version: Option<i64>,
    /// Events dated before this no longer change streaks.
    pub(super) streaks_since: Timestamp,
}

impl WriteConnection {
    /// Stores a batch with its figures in one transaction.
    fn write(&mut self, batch: &Batch) -> rusqlite::Result<Written> {
        let order = batch.order();
        let mut written = Written::default();

        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = transaction.query_row("pragma data_version", [], |row| row.get(0))?;
        if self.data_version.replace(version) != Some(version)
            || self.devices.len() > REMEMBERED_DEVICES
        {
            self.devices.clear();
            self.streaks_since = expiry::streaks_since(&transaction)?;
        }
        let shares = batch.shares(&order, self.streaks_since);

        // The number of each event's device, by position in the batch.
        let mut numbers = vec![0; batch.events.len()];
        let mut found: Vec<(&DeviceId, i64)> = Vec::new();
        let same_device = |left: &usize, right: &usize| {
            batch.events[*left].device_id == batch.events[*right].device_id
        };
        for positions in order.chunk_by(same_device) {
            let device_id = &batch.events[positions[0]].device_id;
            let number = match self.devices.get(device_id) {
                Some(number) => *number,
                None => {
                    let (number, is_new) = find_or_add(&transaction, device_id, batch.received)?;
                    found.push((device_id, number));
                    if is_new {
                        written.new_devices.push(device_id.clone());
                    }
                    number
                }
            };
            for position in positions {
                numbers[*position] = number;
            }
        }

        written.ids = insert_events(&transaction, batch, &numbers)?;

        let mut jobs = JobStatements::prepare(&transaction)?;
        for share in &shares {
            let number = numbers[share.position];
            let figures = jobs.add(number, share, self.streaks_since)?;
            written.streaks.extend(share.streak(figures.consecutive_failures));
        }

        drop(jobs);
        transaction.commit()?;
        self.devices
            .extend(found.into_iter().map(|(device_id, number)| (device_id.clone(), number)));
        Ok(written)
    }

    pub(super) fn update_device(
        &mut self,
        device_id: &DeviceId,
        change: &DeviceChange,
    ) -> rusqlite::Result<bool> {
        let changed = self.connection.execute(
            r#"
            update devices
               set name    = iif(?2, ?3, name),
                   "group" = iif(?4, ?5, "group")
             where device_id = ?1
            "#,
            params![
                device_id.as_str(),
                change.name.is_some(),
                change.name.as_ref().and_then(Option::as_ref),
                change.group.is_some(),
                change.group.as_ref().and_then(Option::as_ref),
            ],
        )?;
        Ok(changed > 0)
    }

    pub(super) fn delete_device(&mut self, device_id: &DeviceId) -> rusqlite::Result<Option<u64>> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let Some(number) = device_number(&transaction, device_id)? else {
            return Ok(None);
        };
        roll_ups::forget(&transaction, number)?;
        let events = transaction.execute("delete from sync_events where device = ?1", [number])?;
        transaction.execute("delete from devices where id = ?1", [number])?;
        transaction.commit()?;
        self.devices.remove(device_id);
        Ok(Some(u64::try_from(events).unwrap_or(u64::MAX)))
    }

    /// Copies the log into the file and empties it.
    pub(super) fn checkpoint(&mut self) -> rusqlite::Result<()> {
        self.connection.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(()))
    }

    /// Lets SQLite refresh its statistics where they have become stale.
    pub(super) fn optimize(&mut self) -> rusqlite::Result<()> {
        self.connection.execute_batch("pragma optimize")
    }
}

/// A device's number, and whether the device is new.
fn find_or_add(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
    received: Timestamp,
) -> rusqlite::Result<(i64, bool)> {
    if let Some(number) = device_number(transaction, device_id)? {
        return Ok((number, false));
    }
    transaction
        .prepare_cached("insert into devices (device_id, created_at) values (?1, ?2)")?
        .insert(params![device_id.as_str(), received.as_millisecond()])
        .map(|number| (number, true))
}

/// Inserts a batch's events, whose devices have these `numbers`, and returns their ids.
fn insert_events(
    transaction: &Transaction<'_>,
    batch: &Batch,
    numbers: &[i64],
) -> rusqlite::Result<Vec<i64>> {
    const INSERT_EVENT: &str = "
        insert into sync_events (
            device, timestamp, total_files_synced, total_errors, internet_speed,
            job, duration, bytes_synced, metadata, created_at
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
    ";
    let mut insert = transaction.prepare_cached(INSERT_EVENT)?;
    let insert_one = |(event, number): (&SyncEvent, &i64)| {
        insert.insert(params![
            number,
            event.timestamp.as_millisecond(),
            event.total_files_synced,
            event.total_errors,
            event.internet_speed.map(Mbps::hundredths),
            event.job.as_ref().map(JobName::as_str),
            event.duration.map(SyncDuration::milliseconds),
            event.bytes_synced.map(u64::cast_signed),
            event.metadata.as_ref().map(Metadata::as_str),
            batch.received.as_millisecond(),
        ])
    };
    batch.events.iter().zip(numbers).map(insert_one).collect()
}

/// The statements on `device_jobs`, looked up once per batch.
struct JobStatements<'a> {
    select: CachedStatement<'a>,
    insert: CachedStatement<'a>,
    update: CachedStatement<'a>,
    count_unanswered_failures: CachedStatement<'a>,
}

impl<'a> JobStatements<'a> {
    fn prepare(transaction: &'a Transaction<'_>) -> rusqlite::Result<Self> {
        const SELECT: &str = "
            select total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum, speed_count,
                   first_sync, last_sync, last_success, last_failure, consecutive_failures,
                   last_received
              from device_jobs
             where device = ?1 and job = ?2
        ";
        const INSERT: &str = "
            insert into device_jobs (
                device, job, total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum,
                speed_count, first_sync, last_sync, last_success, last_failure, consecutive_failures,
                last_received
            ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)
        ";
        const UPDATE: &str = "
            update device_jobs
               set total_syncs = ?3, failed_syncs = ?4, total_files_synced = ?5, total_errors = ?6,
                   speed_sum = ?7, speed_count = ?8, first_sync = ?9, last_sync = ?10,
                   last_success = ?11, last_failure = ?12, consecutive_failures = ?13,
                   last_received = ?14
             where device = ?1 and job = ?2
        ";
        const COUNT_UNANSWERED_FAILURES: &str = "
            select count(*)
              from sync_events
             where device = ?1 and ifnull(job, '') = ?2 and total_errors > 0 and timestamp > ?3
        ";
        Ok(Self {
            select: transaction.prepare_cached(SELECT)?,
            insert: transaction.prepare_cached(INSERT)?,
            update: transaction.prepare_cached(UPDATE)?,
            count_unanswered_failures: transaction.prepare_cached(COUNT_UNANSWERED_FAILURES)?,
        })
    }

    /// Adds `new` to what is stored of a job, whose events are already inserted, and returns the sum.
    fn add(
        &mut self,
        device: i64,
        share: &JobShare<'_>,
        streaks_since: Timestamp,
    ) -> rusqlite::Result<JobFigures> {
        let (job, new) = (share.job_key(), &share.figures);
        let stored = self.select.query_row(params![device, job], job_figures).optional()?;
        let (figures, write) = match stored {
            None => (*new, &mut self.insert),
            Some(mut figures) => {
                if figures.add(new, streaks_since) == StreakCount::Recount {
                    let after = figures.last_success.map_or(i64::MIN, Timestamp::as_millisecond);
                    figures.consecutive_failures = self
                        .count_unanswered_failures
                        .query_row(params![device, job, after], |row| row.get(0))?;
                }
                (figures, &mut self.update)
            }
        };
        write.execute(params![
            device,
            job,
            figures.total_syncs,
            figures.failed_syncs,
            figures.total_files_synced,
            figures.total_errors,
            figures.speed_sum,
            figures.speed_count,
            figures.first_sync.as_millisecond(),
            figures.last_sync.as_millisecond(),
            figures.last_success.map(Timestamp::as_millisecond),
            figures.last_failure.map(Timestamp::as_millisecond),
            figures.consecutive_failures,
            figures.last_received.as_millisecond(),
        ])?;
        Ok(figures)
    }
}

fn job_figures(row: &Row<'_>) -> rusqlite::Result<JobFigures> {
    Ok(JobFigures {
        total_syncs: row.get(0)?,
        failed_syncs: row.get(1)?,
        total_files_synced: row.get(2)?,
        total_errors: row.get(3)?,
        speed_sum: row.get(4)?,
        speed_count: row.get(5)?,
        first_sync: time(row, 6)?,
        last_sync: time(row, 7)?,
        last_success: optional_time(row, 8)?,
        last_failure: optional_time(row, 9)?,
        consecutive_failures: row.get(10)?,
        last_received: time(row, 11)?,
    })
}
