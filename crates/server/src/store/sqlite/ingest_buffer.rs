//! The ingest buffer of a server. It holds events that are acknowledged, because they are in the journal, but not yet
//! applied to the tables. The journal appender fills it, `apply` empties it, and readers wait for it. It must not do
//! I/O.
//!
//! An event changes a page of the index, one of the figures and, with an id, one of the event ids. Applying thousands
//! of events together changes each page once for several of them. A reader waits until everything that was acknowledged
//! before is applied.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use pisync_core::{DeviceId, EventId};
use tokio::sync::{mpsc, watch};

use super::{ingest_state::Through, journal::Record};
use crate::store::{Batch, Observations};

/// The maximum number of events that are in the journal alone, and of their bytes there. Beyond it, events wait. The
/// queue before them then fills up.
const MOST_EVENTS: usize = 65_536;
const MOST_BYTES: usize = 32 << 20;

/// Events of one record of the journal.
#[derive(Debug)]
pub(super) struct JournaledBatch {
    /// The number of the journal's record.
    pub(super) number: u64,
    pub(super) first_id: i64,
    pub(super) batch: Arc<Batch>,
    /// Positions of the events in the batch, without duplicates. Their ids are consecutive, from `first_id` on.
    pub(super) positions: Vec<usize>,
    pub(super) bytes: usize,
}

impl From<Record> for JournaledBatch {
    fn from(record: Record) -> Self {
        let Record { number, first_id, received, events } = record;
        let positions = (0..events.len()).collect();
        let batch = Arc::new(Batch::new(received, events));
        // The true waiting time does not matter, because the batch is applied at once.
        Self { number, first_id, batch, positions, bytes: 0 }
    }
}

impl JournaledBatch {
    pub(super) fn ids(&self) -> impl Iterator<Item = i64> {
        (self.first_id..).take(self.positions.len())
    }

    /// How far the journal is applied after the first `events` events of this record.
    pub(super) fn through(&self, events: usize) -> Through {
        if events < self.positions.len() {
            Through { record: self.number - 1, events }
        } else {
            Through { record: self.number, events: 0 }
        }
    }
}

/// An event that has an event id and is not in the tables yet.
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
    pub(super) last_reserved_id: i64,
    /// The first id of the batch that is being written to the journal.
    pub(super) in_flight: Option<i64>,
    /// Batches that are in the journal alone.
    pub(super) accepted: VecDeque<Arc<JournaledBatch>>,
    pending_events: PendingEvents,
    /// When the first of them arrived.
    pub(super) since: Option<Instant>,
    /// Batches that are being applied, or whose last attempt has failed.
    applying: Vec<Arc<JournaledBatch>>,
    applying_events: PendingEvents,
    pub(super) events: usize,
    pub(super) bytes: usize,
    /// The last record in the tables, and the last one in the journal.
    pub(super) applied: u64,
    pub(super) last: u64,
    /// Changes when numbers of devices may have changed: a device was deleted, or another process has written.
    pub(super) devices_epoch: u64,
    /// Whether somebody has asked the writer to apply, and it has not begun yet.
    pub(super) is_wanted: bool,
    /// Whether a call in the writer's queue is there to apply.
    pub(super) called: bool,
    /// Why the last attempt failed.
    pub(super) failed: Option<String>,
    /// Why no more ids could be reserved.
    pub(super) unreserved: Option<String>,
}

impl State {
    /// The state with no event in the journal alone. The records up to `applied` are in the tables.
    pub(super) fn new(applied: u64) -> Self {
        Self { applied, last: applied, ..Self::default() }
    }

    /// The lowest id that an event outside the tables may have.
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

    /// Assigns `count` consecutive ids and answers the first; `None` when too few are reserved.
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

/// The state that the threads and readers share.
pub(super) struct IngestBuffer {
    state: Mutex<State>,
    /// Notified when a batch is applied, or could not be applied.
    pub(super) attempted: Condvar,
    /// How often it was notified.
    attempts: watch::Sender<u64>,
    /// Passes to ingest what applying has learnt.
    observations: mpsc::UnboundedSender<Observations>,
}

impl IngestBuffer {
    /// A buffer with the contents of a journal. What applying learns of devices goes to `observations`.
    pub(super) fn new(state: State, observations: mpsc::UnboundedSender<Observations>) -> Self {
        Self {
            state: Mutex::new(state),
            attempted: Condvar::new(),
            attempts: watch::Sender::new(0),
            observations,
        }
    }

    /// Passes to ingest what applying has learnt.
    pub(super) fn tell(&self, observations: Observations) {
        // The receiver is gone while the server stops.
        let _ = self.observations.send(observations);
    }

    /// Changes with each attempt to apply.
    pub(super) fn attempts(&self) -> watch::Receiver<u64> {
        self.attempts.subscribe()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reserved ids that were never assigned. Nobody may take ids any more.
    pub(super) fn unused_ids(&self) -> std::ops::RangeInclusive<i64> {
        let state = self.state();
        state.next_id..=state.last_reserved_id
    }

    /// The batches to apply next; `None` once the record `wanted` is applied.
    pub(super) fn next_apply_batch(&self, wanted: u64) -> Option<Vec<Arc<JournaledBatch>>> {
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

    /// Notes the result of applying a batch, and wakes the waiters.
    pub(super) fn apply_ended(
        &self,
        apply_batch: Vec<Arc<JournaledBatch>>,
        error: Option<&rusqlite::Error>,
    ) {
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
                // The time from which the next attempt is counted.
                state.since = Some(Instant::now());
                None
            }
        };
        drop(state);
        self.attempted.notify_all();
        self.attempts.send_modify(|attempts| *attempts += 1);
        // Dropped after the lock is released. Others need not wait while thousands of events are dropped.
        drop((done, apply_batch));
    }

    /// All events that the server is going to store have at least this id.
    pub(super) fn lowest_open_id(&self) -> i64 {
        self.state().lowest_open_id()
    }

    /// Notes that numbers of devices may have changed.
    pub(super) fn forget_devices(&self) {
        self.state().devices_epoch += 1;
    }

    /// Assigns `count` ids to events that skip the journal, and answers the first.
    pub(super) fn take_ids(&self, count: usize) -> Option<i64> {
        self.state().take_ids(count)
    }
}
