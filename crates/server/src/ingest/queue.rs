//! The queue between those who submit events and the task that stores them. It keeps which events were submitted
//! together, and who waits for the answer. It also decides when the task is woken. `ingest` fills it and `task` empties
//! it. The queue has no bound of its own; `permits` bounds it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicIsize, Ordering},
};

use pisync_core::{GroupName, SyncEvent};
use tokio::sync::{Notify, mpsc, oneshot};

use super::{IngestError, Receipt, permits::Permit};

/// What was submitted together, and who waits for the answer.
pub(super) enum Submission {
    One {
        event: SyncEvent,
        group: Option<GroupName>,
        reply: oneshot::Sender<Result<Receipt, IngestError>>,
        permit: Permit,
    },
    Many {
        events: Vec<SyncEvent>,
        group: Option<GroupName>,
        reply: oneshot::Sender<Result<Vec<Receipt>, IngestError>>,
        permit: Permit,
    },
}

impl Submission {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::One { .. } => 1,
            Self::Many { events, .. } => events.len(),
        }
    }

    /// Whether nobody waits for the answer any more.
    pub(super) fn is_abandoned(&self) -> bool {
        match self {
            Self::One { reply, .. } => reply.is_closed(),
            Self::Many { reply, .. } => reply.is_closed(),
        }
    }

    /// Puts the events at the end of `batch`.
    pub(super) fn unpack(self, batch: &mut Vec<SyncEvent>) -> Waiter {
        match self {
            Self::One { event, group, reply, permit } => {
                batch.push(event);
                Waiter::One { group, reply, _permit: permit }
            }
            Self::Many { events, group, reply, permit } => {
                let count = events.len();
                batch.extend(events);
                Waiter::Many { count, group, reply, _permit: permit }
            }
        }
    }

    pub(super) fn refuse(self, error: IngestError) {
        let mut events = Vec::new();
        self.unpack(&mut events).refuse(error);
    }
}

/// A submission whose events were moved into a batch.
pub(super) enum Waiter {
    One {
        group: Option<GroupName>,
        reply: oneshot::Sender<Result<Receipt, IngestError>>,
        _permit: Permit,
    },
    Many {
        count: usize,
        group: Option<GroupName>,
        reply: oneshot::Sender<Result<Vec<Receipt>, IngestError>>,
        _permit: Permit,
    },
}

impl Waiter {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::One { .. } => 1,
            Self::Many { count, .. } => *count,
        }
    }

    /// The group that its devices must be in.
    pub(super) fn group(&self) -> Option<&GroupName> {
        match self {
            Self::One { group, .. } | Self::Many { group, .. } => group.as_ref(),
        }
    }

    /// Answers with the next of `receipts`, one for each event. The waiter may have gone away meanwhile.
    pub(super) fn answer(self, mut receipts: impl Iterator<Item = Receipt>) {
        let missing = || IngestError::Failed("a mistake in PiSync: an event has no receipt".into());
        match self {
            Self::One { reply, .. } => {
                let _ = reply.send(receipts.next().ok_or_else(missing));
            }
            Self::Many { count, reply, .. } => {
                let receipts: Vec<_> = receipts.take(count).collect();
                let is_complete = receipts.len() == count;
                let _ = reply.send(if is_complete { Ok(receipts) } else { Err(missing()) });
            }
        }
    }

    pub(super) fn refuse(self, error: IngestError) {
        match self {
            Self::One { reply, .. } => {
                let _ = reply.send(Err(error));
            }
            Self::Many { reply, .. } => {
                let _ = reply.send(Err(error));
            }
        }
    }
}

/// The number of events in the queue. The task uses it to decide when the next batch is worth sending.
#[derive(Debug)]
pub(super) struct Backlog {
    /// Events are counted after they have entered the queue. The number may therefore be negative for a moment.
    events: AtomicIsize,
    /// The task is woken when the number of events rises to this threshold or beyond; it is at least one.
    pub(super) wake_threshold: AtomicIsize,
    pub(super) wake: Notify,
}

impl Backlog {
    pub(super) fn new() -> Self {
        Self {
            events: AtomicIsize::new(0),
            wake_threshold: AtomicIsize::new(1),
            wake: Notify::new(),
        }
    }

    /// Counts events that have entered the queue. The task may miss a wake-up while the threshold is being changed.
    /// That does no harm, because the batch in flight ends soon.
    pub(super) fn add(&self, events: usize) {
        let before = self.events.fetch_add(events.cast_signed(), Ordering::Relaxed);
        let threshold = self.wake_threshold.load(Ordering::Relaxed);
        if before < threshold && before + events.cast_signed() >= threshold {
            self.wake.notify_one();
        }
    }

    pub(super) fn remove(&self, events: usize) {
        self.events.fetch_sub(events.cast_signed(), Ordering::Relaxed);
    }

    pub(super) fn is_at_wake_threshold(&self) -> bool {
        self.events.load(Ordering::Relaxed) >= self.wake_threshold.load(Ordering::Relaxed)
    }
}

/// One queue, as seen by those who put events into it.
#[derive(Clone)]
pub(super) struct Lane {
    // Bounded by `Load`, which counts events and bytes. A bound of the channel could only count submissions.
    pub(super) queue: mpsc::UnboundedSender<Submission>,
    pub(super) backlog: Arc<Backlog>,
    pub(super) available: Arc<AtomicBool>,
}

impl Lane {
    pub(super) fn is_available(&self) -> bool {
        self.available.load(Ordering::Relaxed)
    }
}

pub(super) fn enqueue<T>(
    lane: &Lane,
    submission: impl FnOnce(oneshot::Sender<Result<T, IngestError>>) -> Submission,
) -> Result<oneshot::Receiver<Result<T, IngestError>>, IngestError> {
    if !lane.is_available() {
        return Err(IngestError::Unavailable);
    }
    let (reply, answer) = oneshot::channel();
    let submission = submission(reply);
    let events = submission.len();
    lane.queue.send(submission).map_err(|_| IngestError::Unavailable)?;
    lane.backlog.add(events);
    Ok(answer)
}
