//! Permits bound the events and memory that ingest holds. Each event or body reserves a permit while it arrives, waits
//! and is stored. `ingest` and the batch endpoint call it. Nothing here may wait: beyond the bounds a reservation fails
//! at once. A permit is released when it is dropped.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use pisync_core::SyncEvent;

use super::IngestError;

/// Events that may wait or be in flight, batches included. 5,000 devices that report in the same second must find a
/// permit. So must several devices that deliver 10,000 events each after a day without a network.
const QUEUE_EVENTS: usize = 65_536;

/// Memory that these events may take, in bytes. Most events take some 250 bytes; one with the largest metadata takes
/// 5,000.
const QUEUE_BYTES: usize = 32 << 20;

/// Bodies that are still arriving may hold three quarters of both bounds. Some clients never finish their body. Those
/// must not keep out the events that arrive in one piece, as nearly all do.
const ARRIVING_EVENTS: usize = QUEUE_EVENTS / 4 * 3;
const ARRIVING_BYTES: usize = QUEUE_BYTES / 4 * 3;

/// What all events in the queue and in flight hold, together with all bodies that are arriving.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) all: Held,
    /// The part that is held by bodies that are arriving.
    arriving: Held,
}

#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) events: AtomicUsize,
    bytes: AtomicUsize,
}

impl Held {
    /// Adds events; answers whether the sum is still at most `bound`. The events count in any case.
    fn add_events(&self, events: usize, bound: usize) -> bool {
        self.events.fetch_add(events, Ordering::Relaxed) + events <= bound
    }

    /// Adds bytes in the same way.
    fn add_bytes(&self, bytes: usize, bound: usize) -> bool {
        self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= bound
    }

    fn remove(&self, events: usize, bytes: usize) {
        self.events.fetch_sub(events, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A part of the bounds, released when it is dropped. It is reserved while a body arrives, so that bodies that are
/// still arriving count, too.
#[derive(Debug)]
pub struct Permit {
    load: Arc<Load>,
    events: usize,
    bytes: usize,
    /// Whether it is held by a body that is still arriving.
    is_arriving: bool,
}

impl Permit {
    pub(super) fn new(load: &Arc<Load>, is_arriving: bool) -> Self {
        Self { load: Arc::clone(load), events: 0, bytes: 0, is_arriving }
    }

    /// A second permit within the same bounds. It is released separately.
    #[must_use]
    pub fn new_sibling(&self) -> Self {
        Self::new(&self.load, self.is_arriving)
    }

    /// Reserves one more event.
    ///
    /// [`IngestError::Overloaded`] when a bound is exceeded.
    /// [`IngestError::Overloaded`] when there is none.
    pub fn reserve(&mut self, event: &SyncEvent) -> Result<(), IngestError> {
        // The permit releases what was added, even if it was too much.
        self.events += 1;
        let mut fits = self.load.all.add_events(1, QUEUE_EVENTS);
        if self.is_arriving {
            fits &= self.load.arriving.add_events(1, ARRIVING_EVENTS);
        }
        if !fits {
            return Err(IngestError::Overloaded);
        }
        self.reserve_bytes(weight(event))
    }

    /// Reserves bytes for something other than an event.
    ///
    /// # Errors
    /// [`IngestError::Overloaded`] when a bound is exceeded.
    pub fn reserve_bytes(&mut self, bytes: usize) -> Result<(), IngestError> {
        self.bytes += bytes;
        let mut fits = self.load.all.add_bytes(bytes, QUEUE_BYTES);
        if self.is_arriving {
            fits &= self.load.arriving.add_bytes(bytes, ARRIVING_BYTES);
        }
        if fits { Ok(()) } else { Err(IngestError::Overloaded) }
    }

    /// Notes that the entire body has arrived. The rest of the work does not depend on its client.
    pub fn has_arrived(&mut self) {
        if std::mem::take(&mut self.is_arriving) {
            self.load.arriving.remove(self.events, self.bytes);
        }
    }
}

#[cfg(test)]
impl Permit {
    /// A permit within bounds that nobody else uses.
    pub(crate) fn alone() -> Self {
        Self::new(&Arc::default(), true)
    }

    /// How many bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.has_arrived();
        self.load.all.remove(self.events, self.bytes);
    }
}

/// The memory that an event takes, in bytes.
fn weight(event: &SyncEvent) -> usize {
    size_of::<SyncEvent>()
        + event.device_id.as_str().len()
        + event.event_id.as_ref().map_or(0, |event_id| event_id.as_str().len())
        + event.job.as_ref().map_or(0, |job| job.as_str().len())
        + event.metadata.as_ref().map_or(0, |metadata| metadata.as_str().len())
}
