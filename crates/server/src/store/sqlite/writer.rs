//! The thread that owns the only connection for writing, and what it does.
//!
//! Its commits do not wait for the disk (`synchronous=normal`: the log is written, and synced before each
//! checkpoint). A second thread syncs the log after a commit, and only then is anybody told that what was
//! committed is safe. So the next batch is being written while the last one is being synced, and several
//! commits may share one sync.

use std::{collections::HashMap, fs::File, path::Path, sync::Arc, thread};

use async_trait::async_trait;
use pisync_core::{DeviceId, JobFigures, StreakCount, SyncEvent, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot};

use super::{
    connection::store_error,
    reads::{optional_time, time},
};
use crate::store::{Batch, DeviceChange, Durable, EventWriter, StoreError, Written};

/// Calls that may wait for the thread. Ingest has one under way at a time; the rest are rare changes
/// that people make.
const WAITING_CALLS: usize = 64;

/// Devices whose numbers are remembered, some 10 MiB of them. Beyond, all are forgotten and read again.
const REMEMBERED_DEVICES: usize = 100_000;

type Call = Box<dyn FnOnce(&mut WriteConnection) + Send>;

/// A handle on both threads, which end when the last handle is gone.
#[derive(Clone)]
pub(super) struct WriterThread {
    calls: mpsc::Sender<Call>,
    syncs: mpsc::UnboundedSender<SyncRequest>,
}

/// Somebody who waits for the log to be on disk.
type SyncRequest = oneshot::Sender<Result<(), StoreError>>;

impl WriterThread {
    /// Starts both threads for the database at `path`, which `connection` has open.
    pub(super) fn start(connection: Connection, path: &Path) -> Result<Self, StoreError> {
        connection.pragma_update(None, "synchronous", "normal").map_err(store_error)?;
        let (calls, mut waiting_calls) = mpsc::channel::<Call>(WAITING_CALLS);
        let (syncs, waiting_syncs) = mpsc::unbounded_channel();
        let mut connection =
            WriteConnection { connection, devices: HashMap::new(), data_version: None };
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        spawn("sqlite-writer", move || {
            while let Some(call) = waiting_calls.blocking_recv() {
                call(&mut connection);
            }
        })?;
        spawn("sqlite-sync", move || sync_log(Path::new(&log), waiting_syncs))?;
        Ok(Self { calls, syncs })
    }

    /// Asks for everything committed so far to be synced.
    fn sync(&self) -> Durable {
        let (sync, told) = oneshot::channel();
        // When the thread is gone, waiting says so.
        let _ = self.syncs.send(sync);
        Durable::told_by(told)
    }

    /// Runs `work`, which commits something, and returns once that is on disk.
    pub(super) async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut WriteConnection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let result = self.call(work).await?;
        self.sync().wait().await?;
        Ok(result)
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

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), StoreError> {
    thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(drop)
        .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))
}

/// Syncs the log as often as somebody waits for it; whoever came while the last sync ran shares the next.
fn sync_log(log: &Path, mut waiting: mpsc::UnboundedReceiver<SyncRequest>) {
    while let Some(first) = waiting.blocking_recv() {
        let mut syncs = vec![first];
        while let Ok(next) = waiting.try_recv() {
            syncs.push(next);
        }
        // Opened each time: it costs little beside the sync, and is the right file whatever became of
        // the last one. SQLite holds no locks on it that closing could drop.
        let result = File::open(log).and_then(|file| file.sync_data());
        for sync in syncs {
            let told = match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(StoreError::Unavailable(format!("cannot sync the log: {error}"))),
            };
            let _ = sync.send(told);
        }
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
    async fn commit(&mut self, batch: &Arc<Batch>) -> Result<(Written, Durable), StoreError> {
        let batch = Arc::clone(batch);
        let thread = self.thread.clone();
        self.thread
            .call(move |connection| {
                let written = connection.write(&batch)?;
                Ok((written, thread.sync()))
            })
            .await
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
    connection: Connection,
    /// The numbers of devices, as far as committed.
    devices: HashMap<DeviceId, i64>,
    /// Changes when another process has written to the file.
    data_version: Option<i64>,
}

impl WriteConnection {
    /// Stores a batch with its figures in one transaction.
    fn write(&mut self, batch: &Batch) -> rusqlite::Result<Written> {
        let order = batch.order();
        let shares = batch.shares(&order);
        let mut written =
            Written { ids: Vec::with_capacity(batch.events.len()), ..Written::default() };

        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = transaction.query_row("pragma data_version", [], |row| row.get(0))?;
        if self.data_version.replace(version) != Some(version)
            || self.devices.len() > REMEMBERED_DEVICES
        {
            self.devices.clear();
        }

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

        for (event, number) in batch.events.iter().zip(&numbers) {
            written.ids.push(insert_event(&transaction, *number, event, batch.received)?);
        }

        for share in &shares {
            let number = numbers[share.position];
            let figures = add_figures(&transaction, number, share.job_key(), &share.figures)?;
            written.streaks.extend(share.streak(figures.consecutive_failures));
        }

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

fn device_number(
    transaction: &Transaction<'_>,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<i64>> {
    transaction
        .prepare_cached("select id from devices where device_id = ?1")?
        .query_row([device_id.as_str()], |row| row.get(0))
        .optional()
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

fn insert_event(
    transaction: &Transaction<'_>,
    device: i64,
    event: &SyncEvent,
    received: Timestamp,
) -> rusqlite::Result<i64> {
    const INSERT_EVENT: &str = "
        insert into sync_events (
            device, timestamp, total_files_synced, total_errors, internet_speed,
            job, duration, bytes_synced, metadata, created_at
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
    ";
    transaction.prepare_cached(INSERT_EVENT)?.insert(params![
        device,
        event.timestamp.as_millisecond(),
        event.total_files_synced,
        event.total_errors,
        event.internet_speed.map(pisync_core::Mbps::hundredths),
        event.job.as_ref().map(pisync_core::JobName::as_str),
        event.duration.map(pisync_core::SyncDuration::milliseconds),
        event.bytes_synced.map(u64::cast_signed),
        event.metadata.as_ref().map(pisync_core::Metadata::as_str),
        received.as_millisecond(),
    ])
}

/// Adds `new` to what is stored of a job, whose events are already inserted, and returns the sum.
fn add_figures(
    transaction: &Transaction<'_>,
    device: i64,
    job: &str,
    new: &JobFigures,
) -> rusqlite::Result<JobFigures> {
    const SELECT_FIGURES: &str = "
        select total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum, speed_count,
               first_sync, last_sync, last_success, last_failure, consecutive_failures, last_received
          from device_jobs
         where device = ?1 and job = ?2
    ";
    const REPLACE_FIGURES: &str = "
        replace into device_jobs (
            device, job, total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum,
            speed_count, first_sync, last_sync, last_success, last_failure, consecutive_failures,
            last_received
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)
    ";
    let stored = transaction
        .prepare_cached(SELECT_FIGURES)?
        .query_row(params![device, job], job_figures)
        .optional()?;
    let figures = match stored {
        None => *new,
        Some(mut figures) => {
            if figures.add(new) == StreakCount::Recount {
                figures.consecutive_failures =
                    recount_streak(transaction, device, job, figures.last_success)?;
            }
            figures
        }
    };
    transaction.prepare_cached(REPLACE_FIGURES)?.execute(params![
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

fn recount_streak(
    transaction: &Transaction<'_>,
    device: i64,
    job: &str,
    last_success: Option<Timestamp>,
) -> rusqlite::Result<i64> {
    const COUNT_UNANSWERED_FAILURES: &str = "
        select count(*)
          from sync_events
         where device = ?1 and ifnull(job, '') = ?2 and total_errors > 0 and timestamp > ?3
    ";
    let after = last_success.map_or(i64::MIN, Timestamp::as_millisecond);
    transaction
        .prepare_cached(COUNT_UNANSWERED_FAILURES)?
        .query_row(params![device, job, after], |row| row.get(0))
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
