//! What events hold of the bounds of ingest while they arrive, wait and are stored: a permit each, released when it is
//! dropped. Beyond the bounds events are refused at once.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use pisync_core::SyncEvent;

use super::IngestError;

/// Events that may wait or be in flight, batches included: 5,000 devices reporting at the same second
/// must find permit, and several devices that deliver 10,000 each after a day without a network.
const QUEUE_EVENTS: usize = 65_536;

/// Memory that they may take, in bytes. Most events take some 250, one with the largest metadata 5,000.
const QUEUE_BYTES: usize = 32 << 20;

/// What of both bodies may hold that are still arriving: three quarters. Some clients never finish theirs, and must not
/// keep out the events that arrive whole, as nearly all do.
const ARRIVING_EVENTS: usize = QUEUE_EVENTS / 4 * 3;
const ARRIVING_BYTES: usize = QUEUE_BYTES / 4 * 3;

/// What all events in the queue and in flight amount to, and all bodies that are arriving.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) all: Held,
    /// What of it is held by bodies that are arriving.
    arriving: Held,
}

#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) events: AtomicUsize,
    bytes: AtomicUsize,
}

impl Held {
    /// Whether it is still at most the bound once there are so many more events. They count in any case.
    fn add_events(&self, events: usize, bound: usize) -> bool {
        self.events.fetch_add(events, Ordering::Relaxed) + events <= bound
    }

    /// The same of bytes.
    fn add_bytes(&self, bytes: usize, bound: usize) -> bool {
        self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= bound
    }

    fn remove(&self, events: usize, bytes: usize) {
        self.events.fetch_sub(events, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A share of the bounds, released when it is dropped. It is reserved while a body arrives, so that bodies in flight count,
/// too.
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

    /// Another permit within the same bounds, released by itself.
    #[must_use]
    pub fn new_sibling(&self) -> Self {
        Self::new(&self.load, self.is_arriving)
    }

    /// Reserves one more event.
    ///
    /// # Errors
    /// [`IngestError::Overloaded`] when there is none.
    pub fn reserve(&mut self, event: &SyncEvent) -> Result<(), IngestError> {
        // What is added goes again with the permit, also when it was too much.
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

    /// Reserves so many bytes of something else.
    ///
    /// # Errors
    /// [`IngestError::Overloaded`] when there is none.
    pub fn reserve_bytes(&mut self, bytes: usize) -> Result<(), IngestError> {
        self.bytes += bytes;
        let mut fits = self.load.all.add_bytes(bytes, QUEUE_BYTES);
        if self.is_arriving {
            fits &= self.load.arriving.add_bytes(bytes, ARRIVING_BYTES);
        }
        if fits { Ok(()) } else { Err(IngestError::Overloaded) }
    }

    /// The whole body has arrived. What is still to be done with it does not depend on its client.
    pub fn has_arrived(&mut self) {
        if std::mem::take(&mut self.is_arriving) {
            self.load.arriving.remove(self.events, self.bytes);
        }
    }
}

#[cfg(test)]
impl Permit {
    /// Of bounds that nobody else shares.
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
