//! The thread that owns the only connection for writing, and what it does.

use std::{
    collections::{BTreeMap, HashMap},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use async_trait::async_trait;
use pisync_core::{
    DeviceId, EventId, JobFigures, JobName, Mbps, Metadata, StreakCount, SyncDuration, Timestamp,
};
use rusqlite::{
    CachedStatement, Connection, OptionalExtension, Row, Transaction, TransactionBehavior,
    ffi::{SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_ROWID},
    params,
};
use tokio::sync::{mpsc, oneshot};

use super::{
    checkpoint::checkpoint_beside,
    connection::{expect_row, open_for_writing, row_dropped, store_error},
    expiry,
    history::kept_event,
    ids, imports,
    ingest_buffer::IngestBuffer,
    journal::JournalState,
    rows::{device_number, optional_time, time},
    watch::Presence,
};
use crate::{
    store::{Batch, Duplicate, EventWriter, OtherGroup, StoreError, StoredEvent, Written},
    threads::Threads,
};

/// Calls that may wait for the thread. Ingest has one under way at a time; the rest are rare changes
/// that people make.
const WAITING_CALLS: usize = 64;

/// Devices whose numbers are remembered, some 10 MiB of them. Beyond, all are forgotten and read again.
pub(super) const REMEMBERED_DEVICES: usize = 100_000;

/// Room that must be on the disk before events are let in again: what a full batch of small events takes.
const PROBE_BYTES: u32 = 4 << 20;

/// What the thread does next.
pub(super) type Call = Box<dyn FnOnce(&mut WriteConnection) + Send>;

/// A handle on the thread, which ends when the last handle is gone.
#[derive(Clone)]
pub(super) struct WriterThread {
    calls: mpsc::Sender<Call>,
    /// All threads of the store.
    threads: Threads,
    /// Whether the files are where they were.
    presence: Arc<Presence>,
}

impl WriterThread {
    /// `connection` is to the file at `path`.
    pub(super) fn start(mut connection: Connection, path: &Path) -> Result<Self, StoreError> {
        let (calls, mut waiting) = mpsc::channel::<Call>(WAITING_CALLS);
        let threads = Threads::new();
        checkpoint_beside(&mut connection, path, calls.downgrade(), &threads)?;
        let mut connection = WriteConnection::new(connection, path);
        threads
            .start("sqlite-writer", move || {
                while let Some(call) = waiting.blocking_recv() {
                    call(&mut connection);
                }
            })
            .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { calls, threads, presence: Arc::default() })
    }

    /// All threads of the store: none of them may end before it.
    pub(super) fn threads(&self) -> &Threads {
        &self.threads
    }

    /// Has the thread do something, unless there is too much for it to do already; then the answer is false.
    pub(super) fn try_send(&self, call: Call) -> bool {
        self.calls.try_send(call).is_ok()
    }

    /// Whether the files are where they were; what is written is lost otherwise.
    pub(super) fn presence(&self) -> &Arc<Presence> {
        &self.presence
    }

    /// Runs `work` on the thread.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut WriteConnection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.presence.check()?;
        self.call_anyway(work).await
    }

    /// Runs `work` on the thread, wherever the files are.
    pub(super) async fn call_anyway<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut WriteConnection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, result) = oneshot::channel();
        let call: Call = Box::new(move |connection| {
            // The caller may have gone away; the work is done all the same.
            let result = work(connection);
            let _ = reply.send(result.map_err(|error| ids::explain(&connection.connection, error)));
        });
        self.calls.send(call).await.map_err(|_| StoreError::Stopped)?;
        result.await.map_err(|_| StoreError::Stopped)?.map_err(store_error)
    }
}

/// The way of events to the thread that go straight into the tables.
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
        let written = self.thread.call(move |connection| connection.write(&batch)).await?;
        Ok(written?)
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.thread.call(WriteConnection::probe).await
    }
}

/// The connection, with what it remembers between transactions.
pub(super) struct WriteConnection {
    pub(super) connection: Connection,
    /// The file.
    path: PathBuf,
    /// How events are taken in by the server to which the connection belongs, if it is one's.
    buffer: Weak<IngestBuffer>,
    /// The numbers of devices, as far as committed.
    devices: HashMap<DeviceId, i64>,
    /// Changes when another process has written to the file.
    data_version: Option<i64>,
    /// Events dated before this no longer change streaks.
    pub(super) streaks_since: Timestamp,
}

/// How far events have come into the tables.
pub(super) struct IngestState {
    /// The journal they come from.
    pub(super) journal: JournalState,
    /// So many events of the record after the last one in the tables are there, too, or kept in a file.
    pub(super) applied_events: usize,
}

/// How far the journal is in the tables.
#[derive(Debug, Clone, Copy)]
pub(super) struct Through {
    /// Up to this record.
    pub(super) record: u64,
    /// And so many events of the one after it.
    pub(super) events: usize,
}

/// What events are in the journal under.
pub(super) struct Journaled {
    /// Their ids, which rise.
    pub(super) ids: Vec<i64>,
    /// How far the journal is in the tables with them.
    pub(super) through: Through,
}

impl WriteConnection {
    /// Stores a batch that is not in the journal.
    fn write(&mut self, batch: &Batch) -> rusqlite::Result<Result<Written, OtherGroup>> {
        // An event in the journal may have the same id, or be the first of a device.
        self.apply_journal()?;
        self.store_claimed(batch, None)
    }

    /// Opens the file at `path`, whose schema must be current.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        open_for_writing(path).map(|connection| Self::new(connection, path))
    }

    fn new(connection: Connection, path: &Path) -> Self {
        Self {
            connection,
            path: path.to_owned(),
            buffer: Weak::new(),
            devices: HashMap::new(),
            data_version: None,
            streaks_since: Timestamp::MIN,
        }
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// From now on, events come through `buffer`.
    pub(super) fn use_buffer(&mut self, buffer: &Arc<IngestBuffer>) {
        self.buffer = Arc::downgrade(buffer);
    }

    /// Brings what is in the journal into the tables, where changes are going to look for it.
    pub(super) fn apply_journal(&mut self) -> rusqlite::Result<()> {
        match self.buffer.upgrade() {
            Some(buffer) => buffer.apply_journal(self),
            None => Ok(()),
        }
    }

    /// How far events have come into the tables.
    pub(super) fn ingest_state(&self) -> rusqlite::Result<IngestState> {
        const STATE: &str =
            "select journal, settled, journal_in_use, settled_events from ingest_state";
        self.connection.prepare_cached(STATE)?.query_row([], |row| {
            Ok(IngestState {
                journal: journal_state(row)?,
                applied_events: usize::try_from(row.get::<_, u32>(3)?).unwrap_or(usize::MAX),
            })
        })
    }

    /// Notes whether both files of the journal must be there from now on.
    pub(super) fn set_journal_in_use(&self, in_use: bool) -> rusqlite::Result<()> {
        const SET: &str = "update ingest_state set journal_in_use = ?1 where journal_in_use <> ?1";
        self.connection.execute(SET, [in_use]).map(drop)
    }

    /// Whether [`Self::ingest_state`] can be asked for: an older version's tables lack some of it.
    pub(super) fn has_current_ingest_state(&self) -> rusqlite::Result<bool> {
        const EXISTS: &str = "
            select exists (
                       select 1 from pragma_table_info('ingest_state') where name = 'journal_in_use'
                   )
        ";
        self.connection.query_row(EXISTS, [], |row| row.get(0))
    }

    /// Reserves `count` ids above `at_least` and above all that were ever given or reserved, by whomever. Rows
    /// that other programs insert without an id get higher ones from then on.
    pub(super) fn reserve_ids(
        &mut self,
        count: i64,
        at_least: i64,
    ) -> rusqlite::Result<RangeInclusive<i64>> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let reserved = ids::reserve(&transaction, count, at_least)?;
        transaction.commit()?;
        Ok(reserved)
    }

    /// Gives ids back that were reserved last and never given, so that a proper stop leaves no gap. Everything
    /// must be in the tables, and nobody may take ids any more.
    pub(super) fn return_unused_ids(&mut self) -> rusqlite::Result<()> {
        const RETURN: &str =
            "update sqlite_sequence set seq = ?1 - 1 where name = 'sync_events' and seq = ?2";
        let Some(unused) = self.buffer.upgrade().map(|buffer| buffer.unused_ids()) else {
            return Ok(());
        };
        if !unused.is_empty() {
            self.connection.execute(RETURN, [unused.start(), unused.end()])?;
        }
        Ok(())
    }

    /// The highest id of an event in the tables.
    pub(super) fn highest_id(&self) -> rusqlite::Result<i64> {
        self.connection
            .prepare_cached("select ifnull(max(id), 0) from sync_events")?
            .query_row([], |row| row.get(0))
    }

    /// Up to which id events may be folded: all of those that are stored later have a higher one.
    pub(super) fn last_foldable_id(&mut self) -> rusqlite::Result<i64> {
        let Some(buffer) = self.buffer.upgrade() else { return Ok(i64::MAX) };
        buffer.pass_other_writers(self)?;
        Ok(buffer.lowest_open_id() - 1)
    }

    /// Stores a batch without claims, such as one from the journal, with its figures in one transaction.
    pub(super) fn store(
        &mut self,
        batch: &Batch,
        journaled: Option<&Journaled>,
    ) -> rusqlite::Result<Written> {
        let written = self.store_claimed(batch, journaled)?;
        written.map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
    }

    /// Stores a batch with its figures in one transaction, if its claims hold.
    fn store_claimed(
        &mut self,
        batch: &Batch,
        journaled: Option<&Journaled>,
    ) -> rusqlite::Result<Result<Written, OtherGroup>> {
        let order = batch.order();
        let mut written = Written::new(Vec::with_capacity(batch.events.len()));
        let buffer = self.buffer.upgrade();

        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = transaction.query_row("pragma data_version", [], |row| row.get(0))?;
        if self.data_version.replace(version) != Some(version)
            || self.devices.len() > REMEMBERED_DEVICES
        {
            self.devices.clear();
            self.streaks_since = expiry::streaks_since(&transaction)?;
            if let Some(buffer) = &buffer {
                buffer.forget_devices();
            }
        }

        if !batch.claims.is_empty() {
            match batch.check_claims(&groups_of(&transaction, batch)?) {
                Ok(new) => {
                    register(&transaction, &new, batch.received)?;
                    written.new_devices.extend(new.into_keys().cloned());
                }
                // What the transaction has done goes with it: nothing yet.
                Err(refused) => return Ok(Err(refused)),
            }
        }

        // The number of each event's device, by position in the batch.
        let mut numbers = vec![0; batch.events.len()];
        let mut found: Vec<(&DeviceId, i64)> = Vec::new();
        for positions in batch.by_device(&order) {
            let device_id = &batch.events[positions[0]].device_id;
            let number = match self.devices.get(device_id) {
                Some(number) => *number,
                None => {
                    let (received, _) = batch.received_within(positions);
                    let (number, is_new) = find_or_add(&transaction, device_id, received)?;
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

        match journaled {
            Some(Journaled { ids, through }) => {
                record_applied(&transaction, *through)?;
                insert_events(&transaction, batch, &numbers, Ids::Given(ids), &mut written)?;
            }
            None => {
                if !batch.receipts.is_empty() {
                    move_devices_back(&transaction, batch, &order, &numbers)?;
                }
                let first = match buffer.and_then(|buffer| buffer.take_ids(batch.events.len())) {
                    Some(first) => first,
                    None => {
                        let count = i64::try_from(batch.events.len()).unwrap_or(i64::MAX);
                        ids::first_of(&transaction, count, 0)?
                    }
                };
                insert_events(&transaction, batch, &numbers, Ids::From(first), &mut written)?;
            }
        }

        let mut counting = order;
        if !written.duplicates.is_empty() {
            counting.retain(|position| !written.is_duplicate(*position));
        }
        let mut jobs = JobStatements::prepare(&transaction)?;
        for share in &batch.shares(&counting, self.streaks_since) {
            let number = numbers[share.position];
            let figures = jobs.add(number, share.job_key(), &share.figures, self.streaks_since)?;
            written.streaks.extend(share.streak(figures.consecutive_failures));
        }

        drop(jobs);
        if let Some(step) = &batch.import {
            imports::advance(&transaction, step, !batch.events.is_empty())?;
        }
        transaction.commit()?;
        self.devices
            .extend(found.into_iter().map(|(device_id, number)| (device_id.clone(), number)));
        Ok(Ok(written))
    }

    /// For what has nothing to do with events.
    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// A device is deleted: its number is nobody's any more.
    pub(super) fn forget_device(&mut self, device_id: &DeviceId) {
        self.devices.remove(device_id);
        if let Some(buffer) = self.buffer.upgrade() {
            buffer.forget_devices();
        }
    }

    /// Takes the write lock and some room on the disk: on a full one a small transaction may still find
    /// a place, and events would not.
    pub(super) fn probe(&mut self) -> rusqlite::Result<()> {
        const TAKE_ROOM: &str = "
            drop table if exists pisync_probe;
            create table pisync_probe (room blob);
        ";
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(TAKE_ROOM)?;
        transaction.execute("insert into pisync_probe values (zeroblob(?1))", [PROBE_BYTES])?;
        // Committed, or it would never be written.
        transaction.commit()?;
        self.connection.execute_batch("drop table pisync_probe")
    }

    /// Copies the log into the file and empties it.
    pub(super) fn checkpoint(&mut self) -> rusqlite::Result<()> {
        self.connection.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(()))
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
    let written = transaction
        .prepare_cached("insert into devices (device_id, created_at) values (?1, ?2)")?
        .execute(params![device_id.as_str(), received.as_millisecond()])?;
    expect_row("devices", written)?;
    Ok((transaction.last_insert_rowid(), true))
}

/// The groups of those devices that there are which the claims of `batch` are about.
fn groups_of(
    transaction: &Transaction<'_>,
    batch: &Batch,
) -> rusqlite::Result<HashMap<String, Option<String>>> {
    let mut select =
        transaction.prepare_cached(r#"select "group" from devices where device_id = ?1"#)?;
    let mut groups = HashMap::new();
    for device_id in batch.claimed_devices().into_keys() {
        let group = select.query_row([device_id.as_str()], |row| row.get(0)).optional()?;
        groups.extend(group.map(|group| (device_id.to_string(), group)));
    }
    Ok(groups)
}

/// Registers devices in groups.
fn register(
    transaction: &Transaction<'_>,
    devices: &BTreeMap<&DeviceId, &str>,
    received: Timestamp,
) -> rusqlite::Result<()> {
    const REGISTER: &str =
        r#"insert into devices (device_id, "group", created_at) values (?1, ?2, ?3)"#;
    let mut insert = transaction.prepare_cached(REGISTER)?;
    for (device_id, group) in devices {
        let written =
            insert.execute(params![device_id.as_str(), group, received.as_millisecond()])?;
        expect_row("devices", written)?;
    }
    Ok(())
}

/// What the columns `journal`, `settled` and `journal_in_use` of `ingest_state` say, in this order.
pub(super) fn journal_state(row: &Row<'_>) -> rusqlite::Result<JournalState> {
    Ok(JournalState {
        identity: row.get(0)?,
        applied: row.get::<_, i64>(1)?.cast_unsigned(),
        in_use: row.get(2)?,
    })
}

/// Notes how far the journal is in the tables.
pub(super) fn record_applied(connection: &Connection, through: Through) -> rusqlite::Result<()> {
    connection
        .prepare_cached("update ingest_state set settled = ?1, settled_events = ?2")?
        .execute(params![
            through.record.cast_signed(),
            u32::try_from(through.events).unwrap_or(u32::MAX)
        ])
        .map(drop)
}

/// Moves `created_at` of devices back to when the first of their events were received.
fn move_devices_back(
    transaction: &Transaction<'_>,
    batch: &Batch,
    order: &[usize],
    numbers: &[i64],
) -> rusqlite::Result<()> {
    const MOVE_BACK: &str = "update devices set created_at = ?2 where id = ?1 and created_at > ?2";
    let mut move_back = transaction.prepare_cached(MOVE_BACK)?;
    for positions in batch.by_device(order) {
        let (received, _) = batch.received_within(positions);
        move_back.execute(params![numbers[positions[0]], received.as_millisecond()])?;
    }
    Ok(())
}

/// The ids of a batch's events.
#[derive(Clone, Copy)]
enum Ids<'a> {
    /// This one and those after it, without gaps.
    From(i64),
    /// One for each event.
    Given(&'a [i64]),
}

/// Inserts a batch's events, whose devices have these `numbers`, apart from those that were reported
/// before.
fn insert_events(
    transaction: &Transaction<'_>,
    batch: &Batch,
    numbers: &[i64],
    ids: Ids<'_>,
    written: &mut Written,
) -> rusqlite::Result<()> {
    const INSERT_EVENT: &str = "
        insert into sync_events (
            id, device, timestamp, total_files_synced, total_errors, internet_speed,
            job, duration, bytes_synced, metadata, created_at, event_id
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
    ";
    let mut insert = transaction.prepare_cached(INSERT_EVENT)?;
    let mut keys = EventKeys { transaction, add: None };
    written.ids.reserve_exact(batch.events.len());
    let mut last_id = 0;
    let mut positions: Vec<usize> = (0..batch.events.len()).collect();
    if let Ids::Given(_) = ids {
        // In the order in which they stand in the index and among the keys, so that places follow each other.
        positions.sort_unstable_by_key(|position| {
            (numbers[*position], batch.events[*position].timestamp, *position)
        });
    }
    for position in positions {
        let (event, number) = (&batch.events[position], &numbers[position]);
        let id = match ids {
            Ids::From(first) => first.max(last_id + 1),
            Ids::Given(ids) => ids[position],
        };
        if let Some(event_id) = &event.event_id
            && !keys.add(*number, event_id, id, batch.received)?
        {
            let (id, first) = keys.find(*number, event_id)?;
            written.ids.push(id);
            written.duplicates.push(Duplicate { position, first });
            continue;
        }
        let mut insert_as = |id: i64| {
            let written = insert.execute(params![
                id,
                number,
                event.timestamp.as_millisecond(),
                event.total_files_synced,
                event.total_errors,
                event.internet_speed.map(Mbps::hundredths),
                event.job.as_ref().map(JobName::as_str),
                event.duration.map(SyncDuration::milliseconds),
                event.bytes_synced.map(u64::cast_signed),
                event.metadata.as_ref().map(Metadata::as_str),
                batch.received_at(position).as_millisecond(),
                event.event_id.as_ref().map(EventId::as_str),
            ])?;
            expect_row("sync_events", written)
        };
        let id = match insert_as(id) {
            Err(error) if is_id_taken(&error) => {
                // An event that was acknowledged is stored, whatever its id.
                let new_id = ids::next_or_free(transaction, id)?;
                insert_as(new_id)?;
                if let Some(event_id) = &event.event_id {
                    keys.change(*number, event_id, new_id)?;
                }
                tracing::warn!(
                    device_id = %event.device_id,
                    id,
                    new_id,
                    "another program has taken the id of an event, which is therefore stored under another one; insert rows into sync_events without an id"
                );
                new_id
            }
            stored => {
                stored?;
                id
            }
        };
        written.ids.push(id);
        last_id = last_id.max(id);
    }
    written.duplicates.sort_unstable_by_key(|duplicate| duplicate.position);
    Ok(())
}

/// Whether a row was refused since another one has its id.
fn is_id_taken(error: &rusqlite::Error) -> bool {
    error.sqlite_error().is_some_and(|error| {
        matches!(error.extended_code, SQLITE_CONSTRAINT_PRIMARYKEY | SQLITE_CONSTRAINT_ROWID)
    })
}

/// The id of the event that a device reported under an id of its own.
pub(super) const FIND_KEY: &str = "select id from event_keys where device = ?1 and event_id = ?2";

/// The ids that devices gave their events.
struct EventKeys<'a> {
    transaction: &'a Transaction<'a>,
    /// Looked up when the first event of a batch has an id of its own.
    add: Option<CachedStatement<'a>>,
}

impl EventKeys<'_> {
    /// False, and nothing is changed, when the device has reported such an event before.
    fn add(
        &mut self,
        device: i64,
        event_id: &EventId,
        id: i64,
        received: Timestamp,
    ) -> rusqlite::Result<bool> {
        const ADD: &str = "
            insert into event_keys (device, event_id, id, created_at) values (?1, ?2, ?3, ?4)
                on conflict (device, event_id) do nothing
        ";
        let add = match self.add.take() {
            Some(add) => add,
            None => self.transaction.prepare_cached(ADD)?,
        };
        let key = params![device, event_id.as_str(), id, received.as_millisecond()];
        Ok(self.add.insert(add).execute(key)? > 0)
    }

    /// The event has another id.
    fn change(&self, device: i64, event_id: &EventId, id: i64) -> rusqlite::Result<()> {
        self.transaction
            .prepare_cached("update event_keys set id = ?3 where device = ?1 and event_id = ?2")?
            .execute(params![device, event_id.as_str(), id])
            .map(drop)
    }

    /// The id of the event that was first reported, and the event if it is still kept.
    fn find(
        &self,
        device: i64,
        event_id: &EventId,
    ) -> rusqlite::Result<(i64, Option<StoredEvent>)> {
        let id = self
            .transaction
            .prepare_cached(FIND_KEY)?
            .query_row(params![device, event_id.as_str()], |row| row.get(0))
            .optional()?;
        // It was not added, and is not there either.
        let Some(id) = id else { return Err(row_dropped("event_keys")) };
        Ok((id, kept_event(self.transaction, id)?))
    }
}

/// The statements on `device_jobs`, looked up once per batch.
pub(super) struct JobStatements<'a> {
    select: CachedStatement<'a>,
    insert: CachedStatement<'a>,
    update: CachedStatement<'a>,
    count_unanswered_failures: CachedStatement<'a>,
}

impl<'a> JobStatements<'a> {
    pub(super) fn prepare(transaction: &'a Transaction<'_>) -> rusqlite::Result<Self> {
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
             where device = ?1 and ifnull(job, '') = ?2 and total_errors > 0
               and timestamp <= ?4
               and (timestamp, id) > (?3, ifnull((
                       select max(id)
                         from sync_events
                        where device = ?1 and ifnull(job, '') = ?2 and total_errors <= 0 and timestamp = ?3
                   ), 0))
        ";
        Ok(Self {
            select: transaction.prepare_cached(SELECT)?,
            insert: transaction.prepare_cached(INSERT)?,
            update: transaction.prepare_cached(UPDATE)?,
            count_unanswered_failures: transaction.prepare_cached(COUNT_UNANSWERED_FAILURES)?,
        })
    }

    /// Adds `new` to what is stored of a job, whose events are already inserted, and returns the sum.
    pub(super) fn add(
        &mut self,
        device: i64,
        job: &str,
        new: &JobFigures,
        streaks_since: Timestamp,
    ) -> rusqlite::Result<JobFigures> {
        let stored = self.select.query_row(params![device, job], job_figures).optional()?;
        let (figures, write) = match stored {
            None => (*new, &mut self.insert),
            Some(mut figures) => {
                if figures.add(new, streaks_since) == StreakCount::Recount {
                    let after = figures.last_success.map_or(i64::MIN, Timestamp::as_millisecond);
                    let until = figures.last_failure.map_or(i64::MIN, Timestamp::as_millisecond);
                    figures.consecutive_failures = self
                        .count_unanswered_failures
                        .query_row(params![device, job, after, until], |row| row.get(0))?;
                }
                (figures, &mut self.update)
            }
        };
        let written = write.execute(params![
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
        expect_row("device_jobs", written)?;
        Ok(figures)
    }
}

pub(super) fn job_figures(row: &Row<'_>) -> rusqlite::Result<JobFigures> {
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
