//! Ingest's own connection: a batch is one statement, which commits by itself, and otherwise one transaction
//! of two round trips.
//!
//! The order of statements is what makes streaks exact with several nodes. The upsert of `device_jobs`
//! locks the rows; a streak that must be recounted is recounted in a later statement, whose snapshot
//! is taken after the lock and so sees what the other node has committed meanwhile. A batch that needs
//! that cannot be one statement: it fails as such, and is written in steps.
//!
//! A batch with an event that was reported before fails as a whole when sent in one go. It is then
//! written carefully: first the event ids, then, step by step, what they leave to be stored.
//!
//! Batches that are one statement can be sent off one behind the other, so that PostgreSQL goes on with the
//! next while the answer to the last is still being taken in. What fails among them is written by itself.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{
    FutureExt,
    future::{self, BoxFuture},
};
use jiff::civil::Date;
use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::{Error, Row, error::SqlState};

use super::{
    connect::{
        Backend, Connection, Connector, describe, is_connection_lost, is_raised, store_error,
    },
    expiry::{self, Horizon},
    imports, partitions, roll_ups,
    statements::{DeviceColumns, EventColumns, JobColumns, KeptEvents, Statements, recount, store},
};
use crate::store::{
    Batch, Duplicate, EventWriter, FailureStreak, StoreError, Written, batch::JobShare,
};

/// Longest time for one batch before the connection is given up. Far more than any batch takes; it
/// is for a server that has stopped answering.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a batch is tried again after a deadlock or another passing conflict.
const RETRIES: u32 = 5;

/// `devices.updated_at` is moved on when it is older than this. Each move rewrites the row, and a
/// burst of one device's events should not rewrite it each time.
const LAST_SEEN_STEP_MILLISECONDS: i64 = 60_000;

/// How long the [`Horizon`] is remembered. What streaks count from is announced 5 minutes before it moves;
/// what is folded moves on all the time, a minute behind.
const HORIZON_MILLISECONDS: i64 = 10_000;

/// Devices whose last move is remembered, some 10 MiB of them. Beyond, all are forgotten.
const REMEMBERED_DEVICES: usize = 100_000;

/// Ids taken from the sequence at a time, and how many to have left before more are taken. Other
/// nodes take theirs from the same sequence, so ids rise with time only roughly.
const ID_BLOCK: i64 = 4_096;
const ID_RESERVE: usize = 2_048;

/// Batches that are written carefully after one that held an event reported before: devices send again
/// when answers were lost, and then many do.
const CAREFUL_BATCHES: u32 = 32;

/// Longest run of batches that are written in steps after one in which a streak had to be recounted; and after
/// how many others the next run is short again.
const STEPWISE_BATCHES: u32 = 32;

const NO_ANSWER: &str = "PostgreSQL does not answer";

/// Takes some room where the database's tables are, in a table that nobody else sees and that goes with the
/// transaction.
const TAKE_ROOM: &str = "
    begin;
    create temporary table pisync_probe on commit drop as
    select repeat('x', 1000) from generate_series(1, 4096);
    commit
";

/// See the module.
pub(super) struct PostgresEventWriter {
    connector: Connector,
    session: Option<Arc<Session>>,
    /// Batches that have been sent off, the oldest first.
    sent: VecDeque<Sent>,
    /// When each device's `updated_at` was last moved on by this node.
    last_seen: HashMap<DeviceId, Timestamp>,
    /// Months whose partition is known to exist.
    months: HashSet<Date>,
    /// Ids taken from the sequence and not used yet.
    ids: VecDeque<i64>,
    /// Whether a batch that has been sent off brings more of them.
    ids_are_coming: bool,
    /// How far back others have come, by and by.
    horizon: Horizon,
    /// When that was looked up.
    horizon_read: Option<Timestamp>,
    /// Batches that may or may not have been committed.
    unsettled: Vec<Unsettled>,
    /// How many batches are still to be written carefully.
    careful_batches: u32,
    /// Which batches are to be written in steps.
    steps: Steps,
    /// Whether a transaction is open that an error leaves open.
    open: bool,
    /// Whether the transaction under way has been asked to commit.
    committing: bool,
    /// Whether the last batch found no room on the disk.
    disk_full: bool,
}

/// A batch in which a streak must be recounted has to be written again, in steps. One in a while is cheaper
/// than steps for all; where devices report out of order all the time, steps are: the run of batches that
/// are written in steps doubles while they keep coming.
#[derive(Default)]
struct Steps {
    /// Batches that are still to be written in steps.
    left: u32,
    /// How many there were the last time.
    run: u32,
    /// Batches that were written otherwise since.
    others: u32,
}

impl Steps {
    /// Whether the next batch is to be written in steps.
    fn are_due(&self) -> bool {
        self.left > 0
    }

    /// Whether to write the next batch in steps; that is then done.
    fn take(&mut self) -> bool {
        if self.are_due() {
            self.left -= 1;
            return true;
        }
        self.others = self.others.saturating_add(1);
        false
    }

    /// A batch could not be written otherwise.
    fn start(&mut self) {
        let others = std::mem::take(&mut self.others);
        let run = if others > STEPWISE_BATCHES { 1 } else { self.run.saturating_mul(2).max(1) };
        self.run = run.min(STEPWISE_BATCHES);
        self.left = self.run;
    }
}

/// A batch whose answer was lost.
struct Unsettled {
    batch: Arc<Batch>,
    ids: Vec<i64>,
    /// Who may still be storing it.
    backend: Backend,
}

/// A batch that has been sent off as one statement.
struct Sent {
    batch: Arc<Batch>,
    ids: Vec<i64>,
    /// The events whose devices it registers or moves on.
    touched: Vec<usize>,
    brings_ids: bool,
    session: Arc<Session>,
    outcome: BoxFuture<'static, Result<Stored, Error>>,
}

/// What a batch that is one statement comes to.
struct Stored {
    new_devices: Vec<DeviceId>,
    streaks: Vec<FailureStreak>,
    taken_ids: Vec<i64>,
}

struct Session {
    connection: Connection,
    statements: Statements,
    backend: Backend,
}

impl PostgresEventWriter {
    pub(super) fn new(connector: Connector) -> Self {
        Self {
            connector,
            session: None,
            sent: VecDeque::new(),
            last_seen: HashMap::new(),
            months: HashSet::new(),
            ids: VecDeque::new(),
            ids_are_coming: false,
            horizon: Horizon { streaks_since: Timestamp::MIN, folded_until: None },
            horizon_read: None,
            unsettled: Vec::new(),
            careful_batches: 0,
            steps: Steps::default(),
            open: false,
            committing: false,
            disk_full: false,
        }
    }

    async fn connect(&mut self) -> Result<(), StoreError> {
        // A connection that a restarted server has closed shows here, before anything is sent on it.
        self.session.take_if(|session| session.connection.client.is_closed());
        if self.session.is_none() {
            let connection = self.connector.connect().await?;
            let backend = Backend::of(&connection.client).await.map_err(store_error)?;
            let statements = Statements::prepare(&connection.client).await.map_err(store_error)?;
            self.session = Some(Arc::new(Session { connection, statements, backend }));
            // The server may be another one, or one that has crashed; see `write`.
            self.ids.clear();
            self.ids_are_coming = false;
        }
        Ok(())
    }

    /// Connects if need be, sees to the months' partitions and to enough ids.
    async fn prepare(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.connect().await?;
        // Nothing is under way, so nobody else has the session.
        let Some(session) = self.session.as_mut().and_then(Arc::get_mut) else {
            return Err(StoreError::Stopped);
        };
        if !is_fresh(self.horizon_read, batch.received) {
            let client = &session.connection.client;
            self.horizon = expiry::horizon(client).await.map_err(store_error)?;
            self.horizon_read = Some(batch.received);
        }
        for month in months_of(batch) {
            if !self.months.contains(&month) {
                partitions::ensure(&mut session.connection.client, month).await?;
                self.months.insert(month);
            }
        }
        if self.ids.len() < batch.events.len() {
            let count = i64::try_from(batch.events.len()).unwrap_or(i64::MAX).max(ID_BLOCK);
            let taken = session.statements.take_ids(&session.connection.client, count).await;
            self.ids.extend(taken.map_err(store_error)?);
        }
        Ok(())
    }

    /// Whether there is nothing to prepare for the batch.
    fn is_prepared(&self, batch: &Batch) -> bool {
        is_fresh(self.horizon_read, batch.received)
            && months_of(batch).is_subset(&self.months)
            && self.ids.len() >= batch.events.len()
    }

    /// Whether the batch can be one statement, if no streak must be recounted.
    fn is_plain(&self, batch: &Batch) -> bool {
        batch.progress.is_none() && !self.may_be_passed(batch)
    }

    /// Whether to look first which events of the batch were reported before.
    fn calls_for_care(&self, batch: &Batch, repeats: &HashMap<usize, usize>) -> bool {
        let has_keys = || batch.events.iter().any(|event| event.event_id.is_some());
        !repeats.is_empty() || self.careful_batches > 0 && has_keys()
    }

    /// Sends the batch off as one statement, which nothing must speak against.
    fn send_whole(&mut self, session: &Arc<Session>, batch: &Arc<Batch>, ids: Vec<i64>) -> Sent {
        let order = batch.order();
        let touched = self.devices_to_touch(batch, &order);
        let brings_ids = self.ids.len() < ID_RESERVE && !self.ids_are_coming;
        self.ids_are_coming |= brings_ids;
        let outcome = store_whole(
            Arc::clone(session),
            Arc::clone(batch),
            (order, ids.clone(), touched.clone()),
            self.horizon.streaks_since,
            brings_ids,
        );
        let mut sent = Sent {
            batch: Arc::clone(batch),
            ids,
            touched,
            brings_ids,
            session: Arc::clone(session),
            outcome: outcome.boxed(),
        };
        // The first look at it sends it. There is nothing to be had yet, and nobody to wake.
        if let Some(outcome) = (&mut sent.outcome).now_or_never() {
            sent.outcome = future::ready(outcome).boxed();
        }
        sent
    }

    /// What is known once a batch is stored that had been sent off.
    fn was_stored(&mut self, sent: Sent, stored: Stored) -> Written {
        self.disk_full = false;
        self.ids.extend(stored.taken_ids);
        self.saw(&sent.touched, &sent.batch);
        let Stored { new_devices, streaks, .. } = stored;
        Written { ids: sent.ids, new_devices, streaks, ..Written::default() }
    }

    /// One transaction. `ids` are the events' ids in the batch's order.
    async fn transact(&mut self, batch: &Arc<Batch>, ids: &[i64]) -> Result<Written, Error> {
        let repeats = batch.repeats();
        if self.calls_for_care(batch, &repeats) {
            self.careful_batches = self.careful_batches.saturating_sub(1);
            return self.write_carefully(batch, ids, &repeats).await;
        }
        if !self.is_plain(batch) || self.steps.take() {
            return self.write_in_steps(batch, ids).await;
        }
        let Some(session) = self.session.clone() else { return Ok(Written::default()) };
        self.committing = true;
        let mut sent = self.send_whole(&session, batch, ids.to_vec());
        let stored = (&mut sent.outcome).await;
        self.ids_are_coming &= !sent.brings_ids;
        let stored = stored?;
        self.committing = false;
        Ok(self.was_stored(sent, stored))
    }

    /// Sends everything but the commit without waiting for an answer.
    async fn write_in_steps(&mut self, batch: &Batch, ids: &[i64]) -> Result<Written, Error> {
        let Some(Session { connection, statements, .. }) = self.session.as_deref() else {
            return Ok(Written::default());
        };
        let client = &connection.client;
        let received = batch.received.to_jiff();
        let streaks_since = self.horizon.streaks_since.to_jiff();
        let order = batch.order();
        let shares = batch.shares(&order, self.horizon.streaks_since);
        let touched = self.devices_to_touch(batch, &order);
        let devices = DeviceColumns::of(batch, &order, &touched);
        let jobs = JobColumns::new(&shares);
        let events = EventColumns::new(batch, &order, ids);
        let take_ids = async {
            if self.ids.len() < ID_RESERVE {
                statements.take_ids(client, ID_BLOCK).await
            } else {
                Ok(Vec::new())
            }
        };
        let may_be_passed = self.may_be_passed(batch);

        self.open = true;
        // Polled in this order, so sent in this order, without waiting for each other's answers.
        let ((begun, new_devices, keyed, failing, inserted), taken) = future::join(
            future::join5(
                client.batch_execute(begin_statement(may_be_passed)),
                statements.upsert_devices(client, &devices, received),
                events.insert_keys(client, statements, received),
                jobs.upsert(client, statements, streaks_since),
                events.insert(client, statements, received),
            ),
            take_ids,
        )
        .await;
        begun?;
        let new_devices = new_devices?;
        keyed?;
        let failing = failing?;
        inserted?;
        let taken = taken?;
        if may_be_passed {
            events.fold_passed(client, statements, received).await?;
        }
        if let Some(progress) = &batch.progress {
            imports::advance(client, progress).await?;
        }
        self.committing = true;
        let (recounted, committed) =
            future::join(recount(client, statements, &failing), client.batch_execute("commit"))
                .await;
        // The recount first: when it fails, the commit behind it has rolled back.
        let recounted = recounted?;
        committed?;
        (self.open, self.committing) = (false, false);

        let streaks = streaks(&shares, &failing, &recounted)?;
        self.ids.extend(taken);
        self.saw(&touched, batch);
        Ok(Written { ids: ids.to_vec(), new_devices, streaks, ..Written::default() })
    }

    /// Finds out which events were reported before, and stores the others. `repeats` are those that
    /// repeat an earlier one of the same batch.
    async fn write_carefully(
        &mut self,
        batch: &Batch,
        ids: &[i64],
        repeats: &HashMap<usize, usize>,
    ) -> Result<Written, Error> {
        let Some(Session { connection, statements, .. }) = self.session.as_deref() else {
            return Ok(Written::default());
        };
        let client = &connection.client;
        let received = batch.received.to_jiff();
        let streaks_since = self.horizon.streaks_since.to_jiff();
        let mut order = batch.order();
        let touched = self.devices_to_touch(batch, &order);
        let devices = DeviceColumns::of(batch, &order, &touched);
        let mut first_of_each = order.clone();
        first_of_each.retain(|position| !repeats.contains_key(position));
        let keys = EventColumns::new(batch, &first_of_each, ids);

        let may_be_passed = self.may_be_passed(batch);

        self.open = true;
        client.batch_execute(begin_statement(may_be_passed)).await?;
        let new_devices = statements.upsert_devices(client, &devices, received).await?;
        keys.insert_new_keys(client, statements, received).await?;
        let kept = keys.find_keys(client, statements).await?;
        let mut written = resolve(batch, ids, repeats, &kept);

        order.retain(|position| !written.is_duplicate(*position));
        let shares = batch.shares(&order, self.horizon.streaks_since);
        let jobs = JobColumns::new(&shares);
        let failing = jobs.upsert(client, statements, streaks_since).await?;
        let events = EventColumns::new(batch, &order, ids);
        events.insert(client, statements, received).await?;
        if may_be_passed {
            events.fold_passed(client, statements, received).await?;
        }
        if let Some(progress) = &batch.progress {
            imports::advance(client, progress).await?;
        }
        let recounted = recount(client, statements, &failing).await?;
        self.committing = true;
        client.batch_execute("commit").await?;
        (self.open, self.committing) = (false, false);

        written.new_devices = new_devices;
        written.streaks = streaks(&shares, &failing, &recounted)?;
        self.saw(&touched, batch);
        Ok(written)
    }

    /// Whether a batch was stored by an attempt whose outcome was lost, and how.
    async fn find_stored(&mut self, unsettled: &Unsettled) -> Result<Option<Written>, StoreError> {
        let Some(Session { connection, statements, .. }) = self.session.as_deref() else {
            return Ok(None);
        };
        let client = &connection.client;
        let Unsettled { batch, ids, backend } = unsettled;
        // What was sent to it may still be on its way through it.
        if !backend.end(client).await.map_err(store_error)? {
            return Err(StoreError::Unavailable("a session that was lost does not end".into()));
        }
        let events = EventColumns::new(batch, &batch.order(), ids);
        if !events.are_stored(client, statements).await.map_err(store_error)? {
            return Ok(None);
        }
        let kept = events.find_keys(client, statements).await.map_err(store_error)?;
        Ok(Some(resolve(batch, ids, &batch.repeats(), &kept)))
    }

    /// Whether folding may pass events of the batch before they are committed, or has passed them.
    fn may_be_passed(&self, batch: &Batch) -> bool {
        !batch.receipts.is_empty()
            || roll_ups::may_be_passed(batch.received, self.horizon.folded_until)
    }

    /// An event of each of the batch's devices that may be new, or whose `updated_at` is due; of all of them
    /// when events have receipts, which may be older than what is known of their devices.
    fn devices_to_touch(&self, batch: &Batch, order: &[usize]) -> Vec<usize> {
        let due = batch.received.saturating_add_milliseconds(-LAST_SEEN_STEP_MILLISECONDS);
        let is_due = |device_id| self.last_seen.get(device_id).is_none_or(|seen| *seen < due);
        batch
            .by_device(order)
            .map(|positions| positions[0])
            .filter(|first| !batch.receipts.is_empty() || is_due(&batch.events[*first].device_id))
            .collect()
    }

    fn saw(&mut self, touched: &[usize], batch: &Batch) {
        if batch.receipts.is_empty() {
            if self.last_seen.len() > REMEMBERED_DEVICES {
                self.last_seen.clear();
            }
            let device_ids = touched.iter().map(|first| batch.events[*first].device_id.clone());
            self.last_seen.extend(device_ids.map(|device_id| (device_id, batch.received)));
        }
    }

    /// Remembers that `batch` may be stored under `ids`, by `session`, of which nothing more can be had.
    fn leave_unsettled(&mut self, batch: &Arc<Batch>, ids: Vec<i64>, session: &Arc<Session>) {
        session.connection.close();
        self.session.take_if(|current| Arc::ptr_eq(current, session));
        // Of others that have been given up, nobody is going to ask.
        self.unsettled.retain(|unsettled| Arc::strong_count(&unsettled.batch) > 1);
        self.unsettled.push(Unsettled { batch: Arc::clone(batch), ids, backend: session.backend });
    }

    /// What to do about a failed transaction: `Ok` to try again.
    async fn recover(&mut self, error: Error, attempt: u32) -> Result<(), StoreError> {
        if is_connection_lost(&error) {
            self.session = None;
            // An idle connection that a restarted server has closed shows only now.
            return if attempt == 0 { Ok(()) } else { Err(store_error(error)) };
        }
        if std::mem::take(&mut self.open)
            && let Some(session) = &self.session
        {
            let rollback = session.connection.client.batch_execute("rollback");
            if !matches!(tokio::time::timeout(WRITE_TIMEOUT, rollback).await, Ok(Ok(()))) {
                self.session = None;
            }
        }
        if attempt < self.heed(&error) { Ok(()) } else { Err(store_error(error)) }
    }

    /// Draws from what PostgreSQL says of a batch how to write it; tells how often that is worth trying.
    fn heed(&mut self, error: &Error) -> u32 {
        let Some(code) = error.code().filter(|_| !is_raised(error)) else { return 0 };
        self.disk_full = *code == SqlState::DISK_FULL;
        if *code == SqlState::T_R_DEADLOCK_DETECTED || *code == SqlState::T_R_SERIALIZATION_FAILURE
        {
            RETRIES
        } else if *code == SqlState::FOREIGN_KEY_VIOLATION {
            // A device was deleted behind our back, perhaps after the deletion and this batch had
            // met in a deadlock: register it again.
            self.last_seen.clear();
            RETRIES
        } else if *code == SqlState::UNIQUE_VIOLATION && names(error, "event_keys_pkey") {
            self.careful_batches = CAREFUL_BATCHES;
            RETRIES
        } else if *code == SqlState::DIVISION_BY_ZERO {
            self.steps.start();
            RETRIES
        } else if *code == SqlState::CHECK_VIOLATION && names_no_constraint(error) {
            // The month's partition is missing after all: somebody has dropped or detached it.
            if std::mem::take(&mut self.months).is_empty() { 0 } else { RETRIES }
        } else if *code == SqlState::FEATURE_NOT_SUPPORTED
            || *code == SqlState::INVALID_SQL_STATEMENT_NAME
            || *code == SqlState::READ_ONLY_SQL_TRANSACTION
        {
            // A statement that outlived a migration, or a server that has become a standby.
            self.session = None;
            1
        } else {
            0
        }
    }
}

#[async_trait]
impl EventWriter for PostgresEventWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let unsettled = self.unsettled.iter().position(|left| Arc::ptr_eq(&left.batch, batch));
        if let Some(position) = unsettled {
            let unsettled = self.unsettled.swap_remove(position);
            let found = tokio::time::timeout(WRITE_TIMEOUT, async {
                self.connect().await?;
                self.find_stored(&unsettled).await
            });
            match found.await.unwrap_or_else(|_| Err(StoreError::Unavailable(NO_ANSWER.into()))) {
                Ok(Some(written)) => return Ok(written),
                Ok(None) => {}
                Err(error) => {
                    // Still not known.
                    self.session = None;
                    self.unsettled.push(unsettled);
                    return Err(StoreError::OutcomeUnknown(error.to_string()));
                }
            }
        }
        for attempt in 0.. {
            (self.open, self.committing) = (false, false);
            let reuses_session = self.session.is_some();
            // Others at each attempt: a server that has crashed may hand out again what it had handed out last.
            let mut ids = Vec::new();
            let work = async {
                self.prepare(batch).await?;
                ids.extend(self.ids.drain(..batch.events.len()));
                Ok::<_, StoreError>(self.transact(batch, &ids).await)
            };
            let outcome = tokio::time::timeout(WRITE_TIMEOUT, work).await;
            let why = match outcome {
                Ok(Ok(Ok(written))) => {
                    self.disk_full = false;
                    return Ok(written);
                }
                Ok(Ok(Err(error))) if !self.committing || !is_connection_lost(&error) => {
                    self.recover(error, attempt).await?;
                    continue;
                }
                // An idle connection that a restarted server has closed shows only now.
                Ok(Err(StoreError::Unavailable(_))) if attempt == 0 && reuses_session => {
                    self.session = None;
                    continue;
                }
                Ok(Err(error)) => {
                    if matches!(error, StoreError::Unavailable(_)) {
                        self.session = None;
                    }
                    return Err(error);
                }
                Ok(Ok(Err(error))) => describe(&error),
                Err(_) if self.committing => NO_ANSWER.into(),
                Err(_) => {
                    self.session = None;
                    return Err(StoreError::Unavailable(NO_ANSWER.into()));
                }
            };
            if let Some(session) = self.session.clone() {
                self.leave_unsettled(batch, ids, &session);
            }
            return Err(StoreError::OutcomeUnknown(why));
        }
        Err(StoreError::Stopped)
    }

    fn send(&mut self, batch: &Arc<Batch>) -> bool {
        let Some(session) = self.session.clone() else { return false };
        if session.connection.client.is_closed()
            || !self.is_prepared(batch)
            || !self.is_plain(batch)
            || self.steps.are_due()
            || self.calls_for_care(batch, &batch.repeats())
        {
            return false;
        }
        self.steps.take();
        let ids = self.ids.drain(..batch.events.len()).collect();
        let sent = self.send_whole(&session, batch, ids);
        self.sent.push_back(sent);
        true
    }

    async fn sent(&mut self) -> Option<Written> {
        let first = self.sent.front_mut()?;
        let outcome = tokio::time::timeout(WRITE_TIMEOUT, &mut first.outcome).await;
        let sent = self.sent.pop_front()?;
        self.ids_are_coming &= !sent.brings_ids;
        match outcome {
            Ok(Ok(stored)) => return Some(self.was_stored(sent, stored)),
            Ok(Err(error)) if !is_connection_lost(&error) => {
                self.heed(&error);
            }
            _ => self.leave_unsettled(&sent.batch, sent.ids, &sent.session),
        }
        None
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.connect().await?;
        let Some(session) = &self.session else { return Err(StoreError::Stopped) };
        let client = &session.connection.client;
        // Whoever has no room for events can still answer.
        let alive = client.batch_execute(if self.disk_full { TAKE_ROOM } else { "select 1" });
        let result = match tokio::time::timeout(WRITE_TIMEOUT, alive).await {
            // Not being allowed to make such a table says nothing about the disk.
            Ok(Err(error))
                if self.disk_full && error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) =>
            {
                client.batch_execute("rollback").await.map_err(store_error)
            }
            Ok(result) => result.map_err(store_error),
            Err(_) => Err(StoreError::Unavailable(NO_ANSWER.into())),
        };
        if result.is_err() {
            self.session = None;
        }
        result
    }
}

/// Stores a batch in one statement. Given the positions of its events in order, their ids, and those whose
/// devices are to be touched.
async fn store_whole(
    session: Arc<Session>,
    batch: Arc<Batch>,
    (order, ids, touched): (Vec<usize>, Vec<i64>, Vec<usize>),
    streaks_since: Timestamp,
    take_ids: bool,
) -> Result<Stored, Error> {
    let Session { connection, statements, .. } = &*session;
    let client = &connection.client;
    let shares = batch.shares(&order, streaks_since);
    let devices = DeviceColumns::of(&batch, &order, &touched);
    let jobs = JobColumns::new(&shares);
    let events = EventColumns::new(&batch, &order, &ids);
    let take_ids = async {
        if take_ids { statements.take_ids(client, ID_BLOCK).await } else { Ok(Vec::new()) }
    };
    let columns = (&devices, &jobs, &events);
    let times = (batch.received.to_jiff(), streaks_since.to_jiff());
    let (stored, taken) = future::join(store(client, statements, columns, times), take_ids).await;
    let (failing, new_devices) = stored?;
    let streaks = streaks(&shares, &failing, &[])?;
    // They can be taken later, too.
    Ok(Stored { new_devices, streaks, taken_ids: taken.unwrap_or_default() })
}

/// Which events of a batch count, given what is kept under their event ids: those that are kept under
/// their own id.
fn resolve(
    batch: &Batch,
    ids: &[i64],
    repeats: &HashMap<usize, usize>,
    kept: &KeptEvents,
) -> Written {
    let mut written = Written { ids: ids.to_vec(), ..Written::default() };
    for (position, event) in batch.events.iter().enumerate() {
        let Some(event_id) = &event.event_id else { continue };
        let key = (event.device_id.to_string(), event_id.to_string());
        let Some((id, stored)) = kept.get(&key) else { continue };
        if *id == ids[position] {
            continue;
        }
        // The batch's own first event is not always read back: it may not be inserted yet.
        let own = repeats.get(&position).filter(|first| ids[**first] == *id);
        let first = own.map(|first| batch.stored_event(*first, *id)).or_else(|| stored.clone());
        written.ids[position] = *id;
        written.duplicates.push(Duplicate { position, first });
    }
    written
}

/// The streaks that a batch made or prolonged: as the upsert told, or as they were recounted.
fn streaks(
    shares: &[JobShare<'_>],
    failing: &[Row],
    recounted: &[Row],
) -> Result<Vec<FailureStreak>, Error> {
    let mut streaks = Vec::new();
    for row in failing.iter().chain(recounted) {
        let key: (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
        let count: i64 = row.try_get(2)?;
        let found =
            shares.binary_search_by(|share| (share.device_id.as_str(), share.job_key()).cmp(&key));
        // Below zero it is among the recounted.
        if let Ok(position) = found
            && count >= 0
        {
            streaks.extend(shares[position].streak(count));
        }
    }
    Ok(streaks)
}

/// Whether what was looked up at `read` may be used at `now`.
fn is_fresh(read: Option<Timestamp>, now: Timestamp) -> bool {
    let due = now.saturating_add_milliseconds(-HORIZON_MILLISECONDS);
    read.is_some_and(|read| (due..=now).contains(&read))
}

fn begin_statement(may_be_passed: bool) -> &'static str {
    if may_be_passed { roll_ups::BEGIN_WITHOUT_FOLDING } else { "begin" }
}

/// The months in which the events of a batch were received.
fn months_of(batch: &Batch) -> HashSet<Date> {
    let now = batch.receipts.is_empty().then_some(batch.received);
    batch.receipts.iter().copied().chain(now).map(partitions::month_of).collect()
}

/// A row that no partition takes violates a check that has no name.
fn names_no_constraint(error: &Error) -> bool {
    error.as_db_error().is_some_and(|error| error.constraint().is_none())
}

/// Whether the error is about this constraint.
fn names(error: &Error, constraint: &str) -> bool {
    error.as_db_error().is_some_and(|error| error.constraint() == Some(constraint))
}
