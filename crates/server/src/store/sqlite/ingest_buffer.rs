//! The ingest buffer of a server: events that are acknowledged once they are in the journal, and applied to the tables many
//! at a time. The journal appender fills it, the writer applies it, and readers wait for it.
//!
//! An event touches a place in the index, a row of figures and, with an id, a place among the keys, all of them
//! somewhere in the file. Applying thousands of events together changes each page once for several of them, and writes it
//! once; and nobody waits for it. Whoever reads waits until everything that was acknowledged before is applied, so nobody
//! sees that it was ever anywhere else.

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::sync_channel},
    time::Instant,
};

use pisync_core::{DeviceId, EventId};
use tokio::sync::{mpsc, watch};

use super::{
    apply::apply,
    checkpoint::copy_log,
    connection::{SERVING_BUSY_TIMEOUT, open_for_requests, store_error},
    ids,
    journal::{self, Journal, Record},
    journal_appender::{BATCHES_IN_FLIGHT, JournalAppender, JournalWriter},
    writer::{Call, IngestState, Through, WriteConnection, WriterThread},
};
use crate::store::{Batch, Observations, StoreError};

/// Events that may be in the journal alone, and their bytes there. Beyond, events wait, and then find the
/// queue before them full.
const MOST_EVENTS: usize = 65_536;
const MOST_BYTES: usize = 32 << 20;

/// Ids that are reserved at a time, before they are given: those of [`MOST_EVENTS`] and of the largest batch
/// after them, twice. A crash loses what is left of them.
const RESERVED_IDS: i64 = 262_144;

/// With fewer left, more are reserved.
const FEWEST_RESERVED_IDS: i64 = RESERVED_IDS / 2;

/// Events that are in the journal.
#[derive(Debug)]
pub(super) struct JournaledBatch {
    /// The journal's record.
    pub(super) number: u64,
    pub(super) first_id: i64,
    pub(super) batch: Arc<Batch>,
    /// Positions of the events in the batch, without duplicates. Their ids follow the first.
    pub(super) positions: Vec<usize>,
    pub(super) bytes: usize,
}

impl From<Record> for JournaledBatch {
    fn from(record: Record) -> Self {
        let Record { number, first_id, received, events } = record;
        let positions = (0..events.len()).collect();
        let batch = Arc::new(Batch::new(received, events));
        // How long it was matters little: it is brought into the tables at once.
        Self { number, first_id, batch, positions, bytes: 0 }
    }
}

impl JournaledBatch {
    pub(super) fn ids(&self) -> impl Iterator<Item = i64> {
        (self.first_id..).take(self.positions.len())
    }

    /// How far the journal is applied with the first `events` of these.
    pub(super) fn through(&self, events: usize) -> Through {
        if events < self.positions.len() {
            Through { record: self.number - 1, events }
        } else {
            Through { record: self.number, events: 0 }
        }
    }
}

/// Where an event with an id of its device's is, that is not in the tables yet.
#[derive(Debug, Clone)]
pub(super) struct PendingEvent {
    pub(super) id: i64,
    pub(super) batch: Arc<Batch>,
    pub(super) position: usize,
}

pub(super) type PendingEvents = HashMap<(DeviceId, EventId), PendingEvent>;

#[derive(Debug, Default)]
pub(super) struct State {
    /// The next event's id.
    pub(super) next_id: i64,
    /// The last id that is reserved for this server's events.
    last_reserved_id: i64,
    /// The first id of the batch that is being written into the journal.
    pub(super) in_flight: Option<i64>,
    /// In the journal alone.
    pub(super) accepted: VecDeque<Arc<JournaledBatch>>,
    pending_events: PendingEvents,
    /// When the first of them came.
    pub(super) since: Option<Instant>,
    /// Those that are being brought into the tables, or were, in vain.
    applying: Vec<Arc<JournaledBatch>>,
    applying_events: PendingEvents,
    pub(super) events: usize,
    pub(super) bytes: usize,
    /// The last record in the tables, and in the journal.
    pub(super) applied: u64,
    pub(super) last: u64,
    /// Changes when the numbers of devices may have: one was deleted, or another process has written.
    pub(super) devices_epoch: u64,
    /// Whether the writer has been called.
    called: bool,
    /// Why the last attempt failed.
    pub(super) failed: Option<String>,
    /// Why no more ids could be reserved.
    pub(super) unreserved: Option<String>,
}

impl State {
    /// The lowest id that an event may have that is not in the tables.
    pub(super) fn lowest_open_id(&self) -> i64 {
        let apply_batch = self.applying.first().or(self.accepted.front());
        apply_batch.map(|accepted| accepted.first_id).or(self.in_flight).unwrap_or(self.next_id)
    }

    pub(super) fn place(&self, key: &(DeviceId, EventId)) -> Option<&PendingEvent> {
        self.pending_events.get(key).or_else(|| self.applying_events.get(key))
    }

    pub(super) fn accept(&mut self, accepted: JournaledBatch) {
        for (position, id) in accepted.positions.iter().copied().zip(accepted.ids()) {
            let event = &accepted.batch.events[position];
            if let Some(event_id) = &event.event_id {
                let place = PendingEvent { id, batch: Arc::clone(&accepted.batch), position };
                self.pending_events.insert((event.device_id.clone(), event_id.clone()), place);
            }
        }
        self.events += accepted.positions.len();
        self.bytes += accepted.bytes;
        self.last = accepted.number;
        self.since.get_or_insert_with(Instant::now);
        self.accepted.push_back(Arc::new(accepted));
    }

    /// Gives `count` ids that follow each other, and answers the first; `None` when so many are not reserved.
    pub(super) fn take_ids(&mut self, count: usize) -> Option<i64> {
        let (first, next) = (self.next_id, self.next_id.checked_add(i64::try_from(count).ok()?)?);
        if next - 1 > self.last_reserved_id {
            return None;
        }
        self.next_id = next;
        Some(first)
    }

    pub(super) fn is_full(&self) -> bool {
        self.events >= MOST_EVENTS || self.bytes >= MOST_BYTES
    }
}

/// What the threads and readers share.
pub(super) struct IngestBuffer {
    pub(super) state: Mutex<State>,
    /// Notified when a batch is applied, or could not be.
    pub(super) ended: Condvar,
    /// How often it was notified.
    endings: watch::Sender<u64>,
    /// Tells ingest what was learnt on the way.
    pub(super) observations: mpsc::UnboundedSender<Observations>,
    pub(super) writer: WriterThread,
    pub(super) database: PathBuf,
}

impl IngestBuffer {
    /// Goes on with the journal of the database at `database`, whose writer is `writer`.
    pub(super) async fn start(
        database: &Path,
        writer: WriterThread,
        observations: mpsc::UnboundedSender<Observations>,
    ) -> Result<(Arc<Self>, JournalWriter), StoreError> {
        let IngestState { journal: found, .. } =
            writer.call(|connection| connection.ingest_state()).await?;
        let (mut journal, records) = Journal::open(database, found)?;
        journal.create_files().map_err(|error| unusable(database, &error))?;
        writer
            .call(|connection| {
                connection.set_journal_in_use(true)?;
                // Whoever copies or mounts the database's file alone must find it there, too.
                copy_log(&connection.connection)
            })
            .await?;
        let keys = open_for_requests(database).map_err(store_error)?;
        keys.pragma_update(None, "query_only", true).map_err(store_error)?;

        let mut state = State { applied: found.applied, last: found.applied, ..State::default() };
        let mut last_id = 0;
        for record in records {
            let accepted = JournaledBatch::from(record);
            last_id = last_id.max(accepted.ids().last().unwrap_or(0));
            state.accept(accepted);
        }
        let reserved =
            writer.call(move |connection| connection.reserve_ids(RESERVED_IDS, last_id)).await?;
        (state.next_id, state.last_reserved_id) = reserved.into_inner();
        let buffer = Arc::new(Self {
            state: Mutex::new(state),
            ended: Condvar::new(),
            endings: watch::Sender::new(0),
            observations,
            writer: writer.clone(),
            database: database.to_owned(),
        });
        let shared = Arc::clone(&buffer);
        let use_buffer = move |connection: &mut WriteConnection| {
            connection.use_buffer(&shared);
            connection.connection.busy_timeout(SERVING_BUSY_TIMEOUT)
        };
        writer.call(use_buffer).await?;

        let (requests, waiting) = sync_channel(BATCHES_IN_FLIGHT);
        let appender = JournalAppender {
            buffer: Arc::clone(&buffer),
            journal,
            keys,
            devices: HashMap::new(),
            devices_epoch: 0,
        };
        writer
            .threads()
            .start("sqlite-journal", move || appender.work(&waiting))
            .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
        let writer =
            JournalWriter { buffer: Arc::clone(&buffer), requests, replies: VecDeque::new() };
        Ok((buffer, writer))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns once everything that is acknowledged by now is in the tables, or an attempt to bring it there
    /// has failed: then whoever reads does not see what is in the journal alone.
    pub(super) async fn wait_until_applied(self: &Arc<Self>) {
        let mut endings = self.endings.subscribe();
        let wanted = self.state().last;
        loop {
            endings.mark_unchanged();
            {
                let mut state = self.state();
                if state.applied >= wanted || state.failed.is_some() {
                    return;
                }
                self.call_writer(&mut state);
            }
            // The sender lives as long as `self`.
            let _ = endings.changed().await;
        }
    }

    /// Has the writer bring what is in the journal into the tables, if it has not been called already.
    pub(super) fn call_writer(self: &Arc<Self>, state: &mut State) {
        if state.called {
            return;
        }
        let buffer = Arc::clone(self);
        let call: Call = Box::new(move |connection| {
            buffer.state().called = false;
            // Whoever waits is told.
            let _ = buffer.apply_journal(connection);
        });
        // Someone else has work for it; it is called again.
        state.called = self.writer.try_send(call);
    }

    /// Brings everything into the tables that is in the journal by now.
    pub(super) fn apply_journal(&self, connection: &mut WriteConnection) -> rusqlite::Result<()> {
        let wanted = self.state().last;
        while let Some(apply_batch) = self.next_apply_batch(wanted) {
            let result = apply(connection, &apply_batch, |observations| {
                // Nobody listens any more when the server stops.
                let _ = self.observations.send(observations);
            });
            let result = result.map_err(|error| ids::explain(&connection.connection, error));
            self.apply_ended(apply_batch, result.as_ref().err());
            result?;
        }
        let left = {
            let state = self.state();
            state.last_reserved_id - state.next_id + 1
        };
        if left < FEWEST_RESERVED_IDS { self.reserve_ids(connection) } else { Ok(()) }
    }

    /// Reserves more ids. They follow those that are left, unless somebody else has taken ids meanwhile.
    fn reserve_ids(&self, connection: &mut WriteConnection) -> rusqlite::Result<()> {
        let Some((first, last)) = self.more_ids(connection)? else { return Ok(()) };
        let mut state = self.state();
        if first != state.last_reserved_id + 1 {
            state.next_id = first;
        }
        state.last_reserved_id = last;
        Ok(())
    }

    /// Sees to it that the next event's id is above all ids in the tables, so that what is in them can be
    /// folded.
    pub(super) fn pass_other_writers(
        &self,
        connection: &mut WriteConnection,
    ) -> rusqlite::Result<()> {
        let highest = connection.highest_id()?;
        if highest < self.state().next_id {
            return Ok(());
        }
        // Somebody else has taken ids above ours, or without asking from among them.
        if let Some((first, last)) = self.more_ids(connection)? {
            let mut state = self.state();
            (state.next_id, state.last_reserved_id) = (first, last);
        }
        Ok(())
    }

    /// Reserves more ids; `None` when there are no more. Then those that are left are given, which nothing speaks
    /// against, and no event is acknowledged after them.
    fn more_ids(&self, connection: &mut WriteConnection) -> rusqlite::Result<Option<(i64, i64)>> {
        let reserved = connection.reserve_ids(RESERVED_IDS, 0);
        let why = reserved.as_ref().err().filter(|error| ids::are_used_up(error));
        let why = why.map(ToString::to_string);
        let mut state = self.state();
        if let Some(error) = &why
            && state.unreserved.is_none()
        {
            let left = state.last_reserved_id - state.next_id + 1;
            tracing::error!(error, left, "events will be answered 503 once no ids are left");
        }
        state.unreserved = why;
        if state.unreserved.is_some() {
            return Ok(None);
        }
        drop(state);
        reserved.map(|ids| Some(ids.into_inner()))
    }

    /// The ids that were reserved and never given. Nobody may take any more.
    pub(super) fn unused_ids(&self) -> std::ops::RangeInclusive<i64> {
        let state = self.state();
        state.next_id..=state.last_reserved_id
    }

    /// What is to be brought into the tables next, until the record `wanted` is.
    fn next_apply_batch(&self, wanted: u64) -> Option<Vec<Arc<JournaledBatch>>> {
        let mut state = self.state();
        let state = &mut *state;
        if state.applied >= wanted {
            state.failed = None;
            return None;
        }
        if state.applying.is_empty() {
            state.applying.extend(state.accepted.drain(..));
            std::mem::swap(&mut state.applying_events, &mut state.pending_events);
            state.since = None;
        }
        Some(state.applying.clone())
    }

    fn apply_ended(&self, apply_batch: Vec<Arc<JournaledBatch>>, error: Option<&rusqlite::Error>) {
        let mut state = self.state();
        let done = match error {
            None => {
                state.failed = None;
                state.applied =
                    apply_batch.last().map_or(state.applied, |accepted| accepted.number);
                state.events -= apply_batch.iter().map(|one| one.positions.len()).sum::<usize>();
                state.bytes -= apply_batch.iter().map(|one| one.bytes).sum::<usize>();
                Some((
                    std::mem::take(&mut state.applying),
                    std::mem::take(&mut state.applying_events),
                ))
            }
            Some(error) => {
                state.failed = Some(error.to_string());
                // When to try again.
                state.since = Some(Instant::now());
                None
            }
        };
        drop(state);
        self.ended.notify_all();
        self.endings.send_modify(|endings| *endings += 1);
        // Thousands of events are not dropped while others wait for the state.
        drop((done, apply_batch));
    }

    /// All events that are going to be stored by the server, and are not, have at least this id.
    pub(super) fn lowest_open_id(&self) -> i64 {
        self.state().lowest_open_id()
    }

    /// Numbers of devices may not be what they were.
    pub(super) fn forget_devices(&self) {
        self.state().devices_epoch += 1;
    }

    /// Gives `count` ids to events that don't go through the journal; answers the first.
    pub(super) fn take_ids(&self, count: usize) -> Option<i64> {
        self.state().take_ids(count)
    }

    /// Removes the journal once nothing is in it alone. Nobody may write any more.
    pub(super) fn remove_journal(&self) -> Result<(), StoreError> {
        let state = self.state();
        if let Some(error) = &state.failed {
            return Err(StoreError::Unavailable(error.clone()));
        }
        journal::remove(&self.database).map_err(|error| unusable(&self.database, &error))
    }
}

pub(super) fn unusable(database: &Path, error: &std::io::Error) -> StoreError {
    StoreError::Failed(format!(
        "cannot use the ingest journal beside {}: {error}",
        database.display()
    ))
}
