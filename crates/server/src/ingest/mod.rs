//! Group commit: every reported event passes through here into the store. The API submits events; `app` starts the
//! tasks. An event must never be acknowledged before it is committed.
//!
//! One task owns the store's writer. It takes everything that waits in a queue, stores it in one transaction, and only
//! then answers each waiter. There is no timer: a batch is what gathered while the last one was being committed. A
//! batch is pipelined behind the one in flight once enough events wait for it. The database therefore need not wait for
//! us. The queue is bounded in events and in bytes. When it is full, or the database is away, the answer comes at once.
//!
//! Events that were sent with a key of a group have a lane of their own: a queue, a task, and a writer. That writer
//! checks in its transaction whether their devices are in the group. Events of other keys therefore pay nothing for it.

mod device_log;
mod permits;
mod queue;
mod run_starts;
mod task;

use std::sync::{Arc, atomic::AtomicBool};

use pisync_core::{GroupName, SyncEvent, Timestamp};
use tokio::sync::{mpsc, oneshot};

use self::{
    permits::Load,
    queue::{Backlog, Lane, Submission, enqueue},
    task::IngestTask,
};
pub use self::{
    permits::Permit,
    run_starts::{Full, RunStartQueue},
    task::IngestTasks,
};
use crate::{
    clock::Clock,
    metrics::{Metrics, REFUSALS},
    store::{EventWriter, Observations, StoredEvent},
};

/// Proof that an event is stored.
#[derive(Debug, Clone)]
pub enum Receipt {
    /// It is stored now.
    Created {
        /// The event's id.
        id: i64,
        /// When it was received.
        created_at: Timestamp,
    },
    /// It was stored before, under the same event id.
    Duplicate {
        /// The first event's id.
        id: i64,
        /// The first event; `None` when it is no longer kept.
        first: Option<Box<StoredEvent>>,
    },
}

/// Why an event was not stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IngestError {
    /// The queue is full.
    Overloaded,
    /// The database is away or gave the transaction up, or the server is shutting down. The event may be stored all the
    /// same if the connection was lost during a commit and could not be restored in time.
    Unavailable,
    /// A device is not in the group that it must be in.
    OtherGroup,
    /// The database refused this event, or something else is wrong; the text is for the log.
    Failed(String),
}

/// The entrance to ingest. Cheap to clone.
#[derive(Clone)]
pub struct Ingest {
    /// For events of any device.
    any: Lane,
    /// For events whose devices must be in a group.
    grouped: Lane,
    load: Arc<Load>,
    metrics: Arc<Metrics>,
}

/// The writers of the two lanes.
pub struct Writers {
    /// Writes events of any device.
    pub any: Box<dyn EventWriter>,
    /// Writes events whose devices must be in a group. It must write straight into the tables, which know the groups.
    pub grouped: Box<dyn EventWriter>,
}

impl Ingest {
    /// Makes an entrance and its tasks, which the caller spawns and watches. The first writer sends to `observations`
    /// what it learns after it has returned.
    #[must_use]
    pub fn new(
        writers: Writers,
        observations: mpsc::UnboundedReceiver<Observations>,
        clock: &Clock,
        metrics: &Arc<Metrics>,
    ) -> (Self, IngestTasks) {
        let load = Arc::new(Load::default());
        let lane = |writer, observations| {
            let (queue, waiting) = mpsc::unbounded_channel();
            let lane = Lane {
                queue,
                backlog: Arc::new(Backlog::new()),
                available: Arc::new(AtomicBool::new(true)),
            };
            let task = IngestTask::new(writer, observations, waiting, &load, &lane, clock, metrics);
            (lane, task)
        };
        let (any, any_task) = lane(writers.any, observations);
        // This writer learns nothing after it has returned.
        let (_, no_observations) = mpsc::unbounded_channel();
        let (grouped, grouped_task) = lane(writers.grouped, no_observations);
        let entrance = Self { any, grouped, load: Arc::clone(&load), metrics: Arc::clone(metrics) };
        (entrance, IngestTasks { any: any_task, grouped: grouped_task })
    }

    /// Whether events are being stored at present.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.any.is_available()
    }

    /// An empty permit for a body that is arriving.
    #[must_use]
    pub fn permit(&self) -> Permit {
        Permit::new(&self.load, true)
    }

    /// Stores `event` and returns once it is committed. With a `group`, its device must be in that group or new. A new
    /// device is put into the group.
    ///
    /// # Errors
    /// See [`IngestError`].
    pub fn submit(
        &self,
        event: SyncEvent,
        group: Option<GroupName>,
    ) -> impl Future<Output = Result<Receipt, IngestError>> {
        let mut permit = Permit::new(&self.load, false);
        let lane = self.lane(group.as_ref());
        let waiting = permit
            .reserve(&event)
            .and_then(|()| enqueue(lane, |reply| Submission::One { event, group, reply, permit }));
        self.wait_for(waiting, 1)
    }

    /// Stores `events`, which hold `permit`, in one transaction and returns once it is committed. With a `group`, all
    /// devices must be in that group or new.
    ///
    /// # Errors
    /// See [`IngestError`].
    pub async fn submit_many(
        &self,
        events: Vec<SyncEvent>,
        group: Option<GroupName>,
        mut permit: Permit,
    ) -> Result<Vec<Receipt>, IngestError> {
        let count = events.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        permit.has_arrived();
        let lane = self.lane(group.as_ref());
        let waiting = enqueue(lane, |reply| Submission::Many { events, group, reply, permit });
        self.wait_for(waiting, count).await
    }

    fn lane(&self, group: Option<&GroupName>) -> &Lane {
        if group.is_some() { &self.grouped } else { &self.any }
    }

    async fn wait_for<T>(
        &self,
        waiting: Result<oneshot::Receiver<Result<T, IngestError>>, IngestError>,
        events: usize,
    ) -> Result<T, IngestError> {
        let result = match waiting {
            Ok(answer) => answer.await.unwrap_or(Err(IngestError::Unavailable)),
            Err(error) => Err(error),
        };
        result.inspect_err(|error| self.count_refused(error, events))
    }

    /// Counts events that were valid and yet not stored.
    pub fn count_refused(&self, error: &IngestError, events: usize) {
        let [overloaded, unavailable, failed] = REFUSALS;
        let reason = match error {
            IngestError::Overloaded => overloaded,
            IngestError::Unavailable => unavailable,
            IngestError::OtherGroup => return,
            IngestError::Failed(_) => failed,
        };
        self.metrics.refused(reason, events as u64);
    }
}
