//! The thread that acknowledges events. It looks up their event ids, assigns their ids, and appends them to the
//! journal. Ingest reaches it through `journal_writer`. It must not acknowledge an event that is not on the disk.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use pisync_core::DeviceId;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::oneshot;

use super::{
    apply_scheduler::ApplyScheduler,
    connection::store_error,
    event_rows::FIND_KEY,
    history::kept_event,
    ingest_buffer::{JournaledBatch, PendingEvent},
    journal::Journal,
    rows::device_number,
    write_connection::REMEMBERED_DEVICES,
};
use crate::store::{Batch, Duplicate, Freshness, StoreError, StoredEvent, Written};

/// Events that are applied together, unless a reader asks for them earlier; some 200 ms of work. With half as many,
/// throughput is a tenth lower when events have event ids.
const APPLY_BATCH_EVENTS: usize = 32_768;

/// How long events stay in the journal alone when there are fewer. They may then wait for what the writer is busy with, and
/// for their own apply batch. An apply batch takes some 200 ms under full load, unless the disk is slow.
const APPLY_INTERVAL: Duration = Duration::from_secs(1);

const _: () = assert!(
    2 * APPLY_INTERVAL.as_millis() <= Freshness::LARGEST_LAG.as_millis(),
    "half of the time is for applying",
);

/// How long to wait while the buffer is full.
const FULL_TIMEOUT: Duration = Duration::from_secs(5);

/// The channel for the answer to a batch.
pub(super) type Reply = oneshot::Sender<Result<Written, StoreError>>;

/// The state of the thread that acknowledges events.
pub(super) struct JournalAppender {
    pub(super) scheduler: ApplyScheduler,
    pub(super) journal: Journal,
    /// A connection that looks up event ids in the tables.
    pub(super) keys: Connection,
    /// The numbers of devices in the tables, as of `devices_epoch`.
    pub(super) devices: HashMap<DeviceId, i64>,
    pub(super) devices_epoch: u64,
}

impl JournalAppender {
    pub(super) fn work(mut self, requests: &Receiver<(Arc<Batch>, Reply)>) {
        loop {
            let since = self.scheduler.buffer.state().since;
            let request = match since {
                None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(since) => {
                    requests.recv_timeout(APPLY_INTERVAL.saturating_sub(since.elapsed()))
                }
            };
            match request {
                Ok((batch, reply)) => {
                    // The caller may have gone away. The batch is stored all the same.
                    let _ = reply.send(self.accept(batch));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let mut state = self.scheduler.buffer.state();
            let is_due = state.since.is_some_and(|since| since.elapsed() >= APPLY_INTERVAL);
            if is_due || state.events >= APPLY_BATCH_EVENTS {
                self.scheduler.call_writer(&mut state);
                if is_due {
                    // The writer is not asked again before this attempt may have ended.
                    state.since = Some(Instant::now());
                }
            }
        }
    }

    fn accept(&mut self, batch: Arc<Batch>) -> Result<Written, StoreError> {
        self.wait_until_not_full()?;
        let repeats = batch.repeats();
        let known = self.find_known(&batch, &repeats).map_err(store_error)?;
        let new = batch.events.len() - repeats.len() - known.len();
        let (first_id, applied) = {
            let mut state = self.scheduler.buffer.state();
            let Some(first_id) = state.take_ids(new) else {
                // More ids are reserved when events are applied.
                self.scheduler.call_writer(&mut state);
                let why = state.unreserved.clone();
                let why = why.unwrap_or_else(|| "no ids are reserved for events".into());
                return Err(StoreError::Unavailable(why));
            };
            state.in_flight = Some(first_id);
            (first_id, state.applied)
        };

        let mut next_id = first_id;
        let mut ids = Vec::with_capacity(batch.events.len());
        let mut positions = Vec::with_capacity(new);
        let mut duplicates = Vec::new();
        for position in 0..batch.events.len() {
            // A repeated event has the same result as the first event of the batch with its event id.
            let first_duplicate = repeats.get(&position).copied().unwrap_or(position);
            let (id, first) = if let Some(known) = known.get(&first_duplicate) {
                known.clone()
            } else if first_duplicate < position {
                (
                    ids[first_duplicate],
                    Some(batch.stored_event(first_duplicate, ids[first_duplicate])),
                )
            } else {
                ids.push(next_id);
                positions.push(position);
                next_id += 1;
                continue;
            };
            ids.push(id);
            duplicates.push(Duplicate { position, first });
        }

        let events = positions.iter().map(|position| &batch.events[*position]);
        let appended = if new == 0 {
            Ok(None)
        } else {
            self.journal.append(first_id, batch.received, events, applied).map(Some)
        };
        let mut state = self.scheduler.buffer.state();
        state.in_flight = None;
        match appended {
            Ok(None) => {}
            Ok(Some((number, bytes))) => {
                state.accept(JournaledBatch { number, first_id, batch, positions, bytes });
            }
            Err(error) => {
                if state.next_id == next_id {
                    // No later id was assigned, so these ids can be used again.
                    state.next_id = first_id;
                }
                let why = format!("the ingest journal cannot be written: {error}");
                return Err(StoreError::Unavailable(why));
            }
        }
        Ok(Written { duplicates, ..Written::new(ids) })
    }

    /// Waits while too many events are in the journal alone. Fails if they cannot be applied.
    fn wait_until_not_full(&self) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut state = self.scheduler.buffer.state();
        loop {
            if let Some(why) = &state.failed {
                return Err(StoreError::Unavailable(why.clone()));
            }
            if !state.is_full() {
                return Ok(());
            }
            if began.elapsed() > FULL_TIMEOUT {
                return Err(StoreError::Unavailable("the database does not keep up".into()));
            }
            self.scheduler.call_writer(&mut state);
            let waited =
                self.scheduler.buffer.attempted.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The events that were reported before this batch, by position. Each comes with the first event's id, and with
    /// that event if it is still kept. Events that repeat an earlier event of the same batch are not included.
    fn find_known(
        &mut self,
        batch: &Batch,
        repeats: &HashMap<usize, usize>,
    ) -> rusqlite::Result<HashMap<usize, (i64, Option<StoredEvent>)>> {
        let mut known = HashMap::new();
        // The buffer is searched before the tables. An event that leaves the buffer in between is then found in the
        // tables.
        let mut unplaced = Vec::new();
        {
            let state = self.scheduler.buffer.state();
            if state.devices_epoch != self.devices_epoch || self.devices.len() > REMEMBERED_DEVICES
            {
                self.devices_epoch = state.devices_epoch;
                self.devices.clear();
            }
            for (position, event) in batch.events.iter().enumerate() {
                let Some(event_id) = &event.event_id else { continue };
                if repeats.contains_key(&position) {
                    continue;
                }
                match state.place(&(event.device_id.clone(), event_id.clone())) {
                    Some(PendingEvent { id, batch, position: at }) => {
                        known.insert(position, (*id, Some(batch.stored_event(*at, *id))));
                    }
                    None => unplaced.push((position, &event.device_id, event_id)),
                }
            }
        }
        if unplaced.is_empty() {
            return Ok(known);
        }
        let snapshot = self.keys.unchecked_transaction()?;
        let mut find = snapshot.prepare_cached(FIND_KEY)?;
        for (position, device_id, event_id) in unplaced {
            let device = match self.devices.get(device_id) {
                Some(device) => *device,
                None => {
                    let Some(device) = device_number(&snapshot, device_id)? else { continue };
                    self.devices.insert(device_id.clone(), device);
                    device
                }
            };
            let key = params![device, event_id.as_str()];
            if let Some(id) = find.query_row(key, |row| row.get(0)).optional()? {
                known.insert(position, (id, kept_event(&snapshot, id)?));
            }
        }
        Ok(known)
    }
}
