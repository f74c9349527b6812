//! The writer of events, with a connection of its own. It decides when to connect, how each batch is written, and what
//! to do when a write fails. Ingest owns one and each import another. `transactions` turns a batch into statements. It
//! must never report a batch as stored while its outcome is in doubt.
//!
//! A batch that is a single statement can be pipelined: PostgreSQL starts on it before the answer to the previous one
//! has arrived. A pipelined batch that fails is written again by itself.

mod recovery;

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
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use self::recovery::InDoubt;
use super::{
    connect::Connector,
    connection::Backend,
    durability,
    errors::{WriteError, is_connection_lost, store_error},
    expiry::{self, Watermarks},
    partitions, roll_ups,
    statements::Statements,
    transactions::{self, ID_BLOCK, Session, Stored, Transaction, Work},
};
use crate::store::{Batch, EventWriter, StoreError, Written};

/// Maximum time for one batch with all its attempts. After that the connection is given up. Batches take far less; the
/// limit is for a server that has stopped answering.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a statement waits for a lock that others hold. PostgreSQL then cancels it, and the batch is tried again. A
/// statement that is cancelled while it waits for a lock has certainly failed and is not in doubt. Transactions of
/// servers and commands hold such locks for a fraction of this time.
const LOCK_TIMEOUT: Duration = Duration::from_millis(2_500);

/// If a batch has waited longer than this since its stamp, its own transaction aggregates it, as if it were below the
/// watermark. Aggregation relies on every other transaction beginning within a minute of its batch's stamp (see
/// `roll_ups`). The minute covers this wait, an attempt, and the statement ahead of it on the same connection.
/// PostgreSQL cancels that statement after 30 s.
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// How many times a batch is retried after a deadlock or another passing conflict.
const RETRIES: u32 = 5;

/// `devices.updated_at` is advanced when it is older than this. Each update rewrites the row. A burst of one device's
/// events should not rewrite it each time.
const LAST_SEEN_STEP_MILLISECONDS: i64 = 60_000;

/// How long the [`Watermarks`] are remembered. The start of streaks is announced 5 minutes before it moves. The
/// aggregation watermark advances constantly, a minute behind the present.
const WATERMARKS_MILLISECONDS: i64 = 10_000;

/// Devices whose last update is remembered; they take some 10 MiB. Beyond this number all are forgotten.
const REMEMBERED_DEVICES: usize = 100_000;

/// More ids are taken when fewer than this are left.
const ID_RESERVE: usize = 2_048;

/// How many batches take the deduplicating path after one that contained a repeated event. When answers were lost, many
/// devices send again.
const DEDUPLICATING_BATCHES: u32 = 32;

const NO_ANSWER: &str = "PostgreSQL does not answer";
const NO_SESSION: &str = "a mistake in PiSync: a batch was to be written without a session";

/// Allocates some space where the database's tables are. It uses a temporary table, which no other session sees and
/// which the commit drops.
const RESERVE_SPACE: &str = "
    begin;
    create temporary table pisync_probe on commit drop as
    select repeat('x', 1000) from generate_series(1, 4096);
    commit
";

/// Writes batches through one connection.
pub(super) struct PostgresEventWriter {
    connector: Connector,
    session: Option<Arc<Session>>,
    /// Batches in flight, the oldest first.
    sent: VecDeque<Sent>,
    /// When this node last advanced the `updated_at` of each device.
    last_seen: HashMap<DeviceId, Timestamp>,
    /// Months whose partition is known to exist.
    months: HashSet<Date>,
    /// Ids taken from the sequence and not used yet.
    ids: VecDeque<i64>,
    /// Whether a batch in flight brings more ids.
    ids_are_coming: bool,
    /// How far the other nodes have come. It is refreshed from time to time.
    watermarks: Watermarks,
    /// When `watermarks` was read.
    watermarks_read: Option<Timestamp>,
    /// Batches whose outcome is in doubt.
    in_doubt: Vec<InDoubt>,
    /// Sessions that were given up. PostgreSQL may still be working in them, or waiting there for a standby.
    abandoned: Vec<Backend>,
    /// How many of the next batches take the deduplicating path.
    deduplicating_batches: u32,
    /// How far the current transaction has come.
    transaction: Transaction,
    /// Whether the last batch found the disk full.
    disk_full: bool,
}

/// A batch in flight, as one statement.
struct Sent {
    batch: Arc<Batch>,
    ids: Vec<i64>,
    /// The events whose devices it registers or updates.
    upserted: Vec<usize>,
    brings_ids: bool,
    session: Arc<Session>,
    /// When to give up waiting for its answer.
    deadline: Instant,
    outcome: BoxFuture<'static, Result<Stored, WriteError>>,
}

impl PostgresEventWriter {
    /// Connects before the first batch. A person who starts a server then learns at once what is wrong with the
    /// database.
    pub(super) async fn ready(mut self) -> Result<Self, StoreError> {
        self.connect().await?;
        Ok(self)
    }

    pub(super) fn new(connector: Connector) -> Self {
        Self {
            connector,
            session: None,
            sent: VecDeque::new(),
            last_seen: HashMap::new(),
            months: HashSet::new(),
            ids: VecDeque::new(),
            ids_are_coming: false,
            watermarks: Watermarks { streaks_since: Timestamp::MIN, aggregated_until: None },
            watermarks_read: None,
            in_doubt: Vec::new(),
            abandoned: Vec::new(),
            deduplicating_batches: 0,
            transaction: Transaction::default(),
            disk_full: false,
        }
    }

    async fn connect(&mut self) -> Result<(), StoreError> {
        // Detects a connection that a restarted server has closed, before anything is sent on it.
        self.session.take_if(|session| session.connection.client.is_closed());
        if self.session.is_none() {
            let connection = self.connector.connect().await?;
            let client = &connection.client;
            // Abandoned sessions would pile up, and keep their locks.
            for backend in std::mem::take(&mut self.abandoned) {
                backend.tell_to_end(client).await.map_err(store_error)?;
            }
            durability::check_tables(client).await?;
            let set = format!("set lock_timeout = {}", LOCK_TIMEOUT.as_millis());
            client.batch_execute(&set).await.map_err(store_error)?;
            let backend = Backend::of(client).await.map_err(store_error)?;
            let statements = Statements::prepare(client).await.map_err(store_error)?;
            self.session = Some(Arc::new(Session { connection, statements, backend }));
            // The server may be another one, or may have crashed; see `write`.
            self.ids.clear();
            self.ids_are_coming = false;
        }
        Ok(())
    }

    /// Connects if necessary. Then makes the partitions of the batch's months, and takes enough ids.
    async fn prepare(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.connect().await?;
        // Nothing is in flight, so no other task holds the session.
        let Some(session) = self.session.as_mut().and_then(Arc::get_mut) else {
            return Err(StoreError::Failed(NO_SESSION.into()));
        };
        if !is_fresh(self.watermarks_read, batch.received) {
            let client = &session.connection.client;
            durability::secure(client).await.map_err(store_error)?;
            self.watermarks = expiry::watermarks(client).await.map_err(store_error)?;
            self.watermarks_read = Some(batch.received);
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

    /// Takes an id for each event of the batch.
    fn use_ids(&mut self, batch: &Batch) -> Result<Vec<i64>, StoreError> {
        let (events, ids) = (batch.events.len(), self.ids.len());
        if ids < events {
            return Err(StoreError::Failed(format!(
                "PostgreSQL gave {ids} ids for {events} events"
            )));
        }
        Ok(self.ids.drain(..events).collect())
    }

    fn session(&self) -> Result<Arc<Session>, WriteError> {
        self.session.clone().ok_or_else(|| WriteError::Impossible(NO_SESSION.into()))
    }

    /// Whether nothing must be prepared for the batch.
    fn is_prepared(&self, batch: &Batch) -> bool {
        is_fresh(self.watermarks_read, batch.received)
            && months_of(batch).is_subset(&self.months)
            && self.ids.len() >= batch.events.len()
    }

    /// Whether the batch can be one statement.
    fn is_plain(&self, batch: &Batch) -> bool {
        batch.import.is_none() && batch.claims.is_empty() && !self.may_be_below_watermark(batch)
    }

    /// Whether to check first which events of the batch were reported before.
    fn needs_deduplication(&self, batch: &Batch, repeats: &HashMap<usize, usize>) -> bool {
        let has_keys = || batch.events.iter().any(|event| event.event_id.is_some());
        !repeats.is_empty() || self.deduplicating_batches > 0 && has_keys()
    }

    /// Pipelines the batch as one statement. Requires [`Self::is_plain`] and not [`Self::needs_deduplication`].
    fn send_single(&mut self, session: &Arc<Session>, batch: &Arc<Batch>, ids: Vec<i64>) -> Sent {
        let order = batch.order();
        let upserted = self.devices_to_upsert(batch, &order);
        let brings_ids = self.ids.len() < ID_RESERVE && !self.ids_are_coming;
        self.ids_are_coming |= brings_ids;
        let outcome = transactions::write_single(
            Arc::clone(session),
            Arc::clone(batch),
            (order, ids.clone(), upserted.clone()),
            self.watermarks.streaks_since,
            brings_ids,
        );
        let mut sent = Sent {
            batch: Arc::clone(batch),
            ids,
            upserted,
            brings_ids,
            session: Arc::clone(session),
            deadline: Instant::now() + WRITE_TIMEOUT,
            outcome: outcome.boxed(),
        };
        // The first poll sends it. It cannot be ready yet, and there is no task to wake.
        if let Some(outcome) = (&mut sent.outcome).now_or_never() {
            sent.outcome = future::ready(outcome).boxed();
        }
        sent
    }

    /// Notes what follows from a stored batch, and answers its result.
    fn was_stored(&mut self, sent: Sent, stored: Stored) -> Written {
        self.disk_full = false;
        self.ids.extend(stored.taken_ids);
        self.mark_seen(&sent.upserted, &sent.batch);
        let Stored { new_devices, streaks, .. } = stored;
        Written { new_devices, streaks, ..Written::new(sent.ids) }
    }

    /// Writes the batch in one transaction. `ids` are the events' ids in the batch's order.
    async fn transact(&mut self, batch: &Arc<Batch>, ids: &[i64]) -> Result<Written, WriteError> {
        let session = self.session()?;
        let repeats = batch.repeats();
        // The deduplicating path also checks claims.
        let needs_deduplication =
            self.needs_deduplication(batch, &repeats) || !batch.claims.is_empty();
        if !needs_deduplication && self.is_plain(batch) {
            self.transaction.committing = true;
            let mut sent = self.send_single(&session, batch, ids.to_vec());
            let stored = (&mut sent.outcome).await;
            self.ids_are_coming &= !sent.brings_ids;
            let stored = stored?;
            self.transaction.committing = false;
            return Ok(self.was_stored(sent, stored));
        }
        let order = batch.order();
        let upserted = self.devices_to_upsert(batch, &order);
        let work = Work {
            session: &session,
            batch,
            ids,
            order,
            upserted: &upserted,
            streaks_since: self.watermarks.streaks_since,
            may_be_below_watermark: self.may_be_below_watermark(batch),
        };
        let written = if needs_deduplication {
            self.deduplicating_batches = self.deduplicating_batches.saturating_sub(1);
            work.write_deduplicating(&repeats, &mut self.transaction).await?
        } else {
            let take_ids = self.ids.len() < ID_RESERVE;
            let (written, taken) = work.write_multi(take_ids, &mut self.transaction).await?;
            self.ids.extend(taken);
            written
        };
        self.mark_seen(&upserted, batch);
        Ok(written)
    }

    /// Whether events of the batch are below the watermark, or may be before they are committed.
    fn may_be_below_watermark(&self, batch: &Batch) -> bool {
        !batch.received_at.is_empty()
            || batch.stamped.elapsed() > LONGEST_WAIT
            || roll_ups::may_be_below_watermark(batch.received, self.watermarks.aggregated_until)
    }

    /// One event of each device that may be new, or whose `updated_at` is due. If events have a `received_at` of their
    /// own, one of every device. Such a time may be earlier than what is stored for the device.
    fn devices_to_upsert(&self, batch: &Batch, order: &[usize]) -> Vec<usize> {
        let due = batch.received.saturating_add_milliseconds(-LAST_SEEN_STEP_MILLISECONDS);
        let is_due = |device_id| self.last_seen.get(device_id).is_none_or(|seen| *seen < due);
        batch
            .by_device(order)
            .map(|positions| positions[0])
            .filter(|first| {
                !batch.received_at.is_empty() || is_due(&batch.events[*first].device_id)
            })
            .collect()
    }

    fn mark_seen(&mut self, upserted: &[usize], batch: &Batch) {
        if batch.received_at.is_empty() {
            if self.last_seen.len() > REMEMBERED_DEVICES {
                self.last_seen.clear();
            }
            let device_ids = upserted.iter().map(|first| batch.events[*first].device_id.clone());
            self.last_seen.extend(device_ids.map(|device_id| (device_id, batch.received)));
        }
    }
}

#[async_trait]
impl EventWriter for PostgresEventWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let in_doubt = self.in_doubt.iter().position(|left| Arc::ptr_eq(&left.batch, batch));
        if let Some(position) = in_doubt {
            let in_doubt = self.in_doubt.swap_remove(position);
            let found = tokio::time::timeout(WRITE_TIMEOUT, async {
                self.connect().await?;
                self.find_stored(&in_doubt).await
            });
            match found.await.unwrap_or_else(|_| Err(StoreError::Unavailable(NO_ANSWER.into()))) {
                Ok(Some(written)) => return Ok(written),
                Ok(None) => {}
                Err(error) => {
                    // The outcome is still unknown.
                    self.abandon_session();
                    self.in_doubt.push(in_doubt);
                    return Err(StoreError::OutcomeUnknown(error.to_string()));
                }
            }
        }
        let deadline = Instant::now() + WRITE_TIMEOUT;
        let mut attempt = 0;
        loop {
            self.transaction = Transaction::default();
            let reuses_session = self.session.is_some();
            // Each attempt uses other ids. A server that has crashed may hand out its last ids again.
            let mut ids = Vec::new();
            let work = async {
                self.prepare(batch).await?;
                ids = self.use_ids(batch)?;
                Ok::<_, StoreError>(self.transact(batch, &ids).await)
            };
            let outcome = tokio::time::timeout_at(deadline, work).await;
            let why = match outcome {
                Ok(Ok(Ok(written))) => {
                    self.disk_full = false;
                    return Ok(written);
                }
                Ok(Ok(Err(error))) if !self.transaction.committing || !error.leaves_doubt() => {
                    self.recover(error, attempt, deadline).await?;
                    attempt += 1;
                    continue;
                }
                // Only the first statement shows that a restarted server has closed an idle connection.
                Ok(Err(StoreError::Unavailable(_))) if attempt == 0 && reuses_session => {
                    self.abandon_session();
                    attempt += 1;
                    continue;
                }
                Ok(Err(error)) => {
                    if matches!(error, StoreError::Unavailable(_)) {
                        self.abandon_session();
                    }
                    return Err(error);
                }
                Ok(Ok(Err(error))) => error.to_string(),
                Err(_) if self.transaction.committing => NO_ANSWER.into(),
                Err(_) => {
                    self.abandon_session();
                    return Err(StoreError::Unavailable(NO_ANSWER.into()));
                }
            };
            let session = self.session()?;
            self.leave_in_doubt(batch, ids, &session);
            return Err(StoreError::OutcomeUnknown(why));
        }
    }

    fn send(&mut self, batch: &Arc<Batch>) -> bool {
        let Some(session) = self.session.clone() else { return false };
        if session.connection.client.is_closed()
            || !self.is_prepared(batch)
            || !self.is_plain(batch)
            || self.needs_deduplication(batch, &batch.repeats())
        {
            return false;
        }
        // If there are too few ids, none is taken.
        let Ok(ids) = self.use_ids(batch) else { return false };
        let sent = self.send_single(&session, batch, ids);
        self.sent.push_back(sent);
        true
    }

    async fn sent(&mut self) -> Option<Written> {
        let first = self.sent.front_mut()?;
        let outcome = tokio::time::timeout_at(first.deadline, &mut first.outcome).await;
        let sent = self.sent.pop_front()?;
        self.ids_are_coming &= !sent.brings_ids;
        match outcome {
            Ok(Ok(stored)) => return Some(self.was_stored(sent, stored)),
            Ok(Err(WriteError::Sql(error))) if !is_connection_lost(&error) => {
                self.classify(&error);
            }
            _ => self.leave_in_doubt(&sent.batch, sent.ids, &sent.session),
        }
        None
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.connect().await?;
        let session = self.session()?;
        let client = &session.connection.client;
        // A server without space for events can still answer, and so can one that cannot commit.
        let statement = if self.disk_full { RESERVE_SPACE } else { durability::CONFIRM };
        let work = async {
            match client.batch_execute(statement).await {
                // A missing right to create such a table says nothing about the disk.
                Err(error)
                    if self.disk_full
                        && error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) =>
                {
                    client.batch_execute("rollback").await
                }
                result => result,
            }
        };
        let result = match tokio::time::timeout(WRITE_TIMEOUT, work).await {
            Ok(result) => result.map_err(store_error),
            Err(_) => Err(StoreError::Unavailable(NO_ANSWER.into())),
        };
        let replicated = || session.connection.check_replicated().map_err(StoreError::from);
        let result = result.and_then(|()| replicated());
        if result.is_err() {
            self.abandon_session();
        }
        result
    }
}

/// Whether a value that was read at `read` may be used at `now`.
fn is_fresh(read: Option<Timestamp>, now: Timestamp) -> bool {
    let due = now.saturating_add_milliseconds(-WATERMARKS_MILLISECONDS);
    read.is_some_and(|read| (due..=now).contains(&read))
}

/// The months in which the events of a batch were received.
fn months_of(batch: &Batch) -> HashSet<Date> {
    let now = batch.received_at.is_empty().then_some(batch.received);
    batch.received_at.iter().copied().chain(now).map(partitions::month_of).collect()
}
