//! Group commit: the way of every event into the store.
//!
//! One task owns the store's writer. It takes everything that waits in a bounded queue, stores it in
//! one transaction, and goes on with the next; a second task answers each waiter once the store says that
//! the batch is on disk. There is no timer: a batch is what gathered while the last one was being
//! committed. A full queue and an absent database are answered at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use pisync_core::{SyncEvent, Timestamp};
use tokio::sync::{mpsc, oneshot};

use crate::{
    clock::Clock,
    metrics::Metrics,
    store::{Batch, Durable, EventWriter, StoreError, Written},
};

/// Events that may wait. 5,000 devices reporting at the same second must find room; a waiting event
/// takes a few hundred bytes, or 5 KiB with the largest metadata.
const QUEUE_EVENTS: usize = 8_192;

/// Events per transaction. Beyond some hundreds a larger batch gains nothing, and everybody in it
/// waits longer.
const BATCH_EVENTS: usize = 1_024;

/// Batches that may be committed and not on disk yet. Beyond, the disk is what everybody waits for.
const UNDURABLE_BATCHES: usize = 4;

/// How often to look whether the database is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// How long to try to learn whether a batch was committed when the connection was lost on the way.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(15);

/// How often to try meanwhile.
const SETTLE_INTERVAL: Duration = Duration::from_millis(200);

/// Failures in a row that are worth a line in the log.
const NOTABLE_STREAK: i64 = 3;

/// Proof that an event is stored.
#[derive(Debug, Clone, Copy)]
pub struct Receipt {
    /// The event's id.
    pub id: i64,
    /// When it was received.
    pub created_at: Timestamp,
}

/// Why an event was not stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IngestError {
    /// The queue is full.
    Overloaded,
    /// The database is away, or the server is shutting down. When the connection was lost during a
    /// commit and could not be had back in time, the event may be stored all the same.
    Unavailable,
    /// The database refused this event, or something else is wrong; the text is for the log.
    Failed(String),
}

struct Submission {
    event: SyncEvent,
    reply: Reply,
}

type Reply = oneshot::Sender<Result<Receipt, IngestError>>;

/// Whether the database is there, and a line in the log when that changes.
#[derive(Debug)]
struct Availability(AtomicBool);

impl Availability {
    fn is_available(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn went_away(&self, why: &str) {
        if self.0.swap(false, Ordering::Relaxed) {
            tracing::error!(
                error = why,
                "the database is unavailable; events are answered 503 until it is back"
            );
        }
    }

    fn came_back(&self) {
        if !self.0.swap(true, Ordering::Relaxed) {
            tracing::info!("the database is back; events are accepted again");
        }
    }
}

/// The entrance. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ingest {
    queue: mpsc::Sender<Submission>,
    availability: Arc<Availability>,
    metrics: Arc<Metrics>,
}

impl Ingest {
    /// Makes an entrance and the task behind it, which the caller spawns and watches.
    #[must_use]
    pub fn new(
        writer: Box<dyn EventWriter>,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> (Self, IngestTask) {
        let (queue, waiting) = mpsc::channel(QUEUE_EVENTS);
        let availability = Arc::new(Availability(AtomicBool::new(true)));
        let entrance =
            Self { queue, availability: Arc::clone(&availability), metrics: Arc::clone(&metrics) };
        (entrance, IngestTask { writer, waiting, availability, clock, metrics })
    }

    /// Whether events are being stored at present.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.availability.is_available()
    }

    /// Stores `event` and returns once it is committed.
    ///
    /// # Errors
    /// See [`IngestError`].
    pub async fn submit(&self, event: SyncEvent) -> Result<Receipt, IngestError> {
        let result = self.enqueue_and_wait(event).await;
        if let Err(error) = &result {
            let reason = match error {
                IngestError::Overloaded => "overloaded",
                IngestError::Unavailable => "unavailable",
                IngestError::Failed(_) => "failed",
            };
            self.metrics.refused(reason, 1);
        }
        result
    }

    async fn enqueue_and_wait(&self, event: SyncEvent) -> Result<Receipt, IngestError> {
        if !self.is_available() {
            return Err(IngestError::Unavailable);
        }
        let (reply, answer) = oneshot::channel();
        self.queue.try_send(Submission { event, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => IngestError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => IngestError::Unavailable,
        })?;
        answer.await.unwrap_or(Err(IngestError::Unavailable))
    }
}

/// The task that owns the writer.
pub struct IngestTask {
    writer: Box<dyn EventWriter>,
    waiting: mpsc::Receiver<Submission>,
    availability: Arc<Availability>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl IngestTask {
    /// Works until `shutdown` comes, then takes nothing more, stores what is queued, and returns.
    ///
    /// # Errors
    /// When the writer has come to its end. The process cannot go on without it.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), StoreError> {
        let (committed, acknowledging) = mpsc::channel(UNDURABLE_BATCHES);
        let acknowledger = Acknowledger {
            committed: acknowledging,
            availability: Arc::clone(&self.availability),
            metrics: Arc::clone(&self.metrics),
        };
        // Both end together: this one's channel closes when the other returns.
        let (taken, acknowledged) =
            tokio::join!(self.take(committed, shutdown), acknowledger.run());
        taken.and(acknowledged)
    }

    /// Takes submissions until the end.
    async fn take(
        &mut self,
        committed: mpsc::Sender<Committed>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), StoreError> {
        tokio::pin!(shutdown);
        let mut closing = false;
        let mut submissions = Vec::with_capacity(BATCH_EVENTS);
        loop {
            tokio::select! {
                // In this order: closing must not wait for a queue that never empties.
                biased;
                () = &mut shutdown, if !closing => {
                    closing = true;
                    self.waiting.close();
                }
                taken = self.waiting.recv_many(&mut submissions, BATCH_EVENTS) => {
                    if taken == 0 {
                        return Ok(());
                    }
                    self.metrics.queue_events.set(i64::try_from(self.waiting.len()).unwrap_or(0));
                    if self.availability.is_available() {
                        self.store(submissions.drain(..), &committed).await?;
                    } else {
                        // They came in while the database was being found away.
                        refuse(submissions.drain(..));
                    }
                }
                () = tokio::time::sleep(PROBE_INTERVAL), if !self.availability.is_available() => {
                    if self.writer.probe().await.is_ok() {
                        self.availability.came_back();
                    }
                }
            }
        }
    }

    /// Commits submissions and passes them on to be answered. When the database refuses the batch for
    /// the data in it, the batch is halved until the culprit stands alone: the others lose nothing.
    async fn store(
        &mut self,
        submissions: impl Iterator<Item = Submission>,
        committed: &mpsc::Sender<Committed>,
    ) -> Result<(), StoreError> {
        let received = self.clock.now();
        let whole: (Vec<_>, Vec<_>) = submissions
            // Whoever has hung up would take the answer for lost and send again: don't store twice.
            .filter(|submission| !submission.reply.is_closed())
            .map(|submission| (submission.event, submission.reply))
            .unzip();
        let mut parts = vec![whole];
        while let Some((events, mut replies)) = parts.pop() {
            if events.is_empty() {
                continue;
            }
            let batch = Arc::new(Batch { received, events });
            let began = Instant::now();
            let error = match self.commit(&batch).await {
                Ok((written, durable)) => {
                    let batch = Committed { batch, written, durable, replies, began };
                    committed.send(batch).await.map_err(|_| StoreError::Stopped)?;
                    continue;
                }
                Err(StoreError::Stopped) => return Err(StoreError::Stopped),
                Err(error) => error,
            };
            if matches!(error, StoreError::Rejected(_)) && batch.events.len() > 1 {
                let middle = batch.events.len() / 2;
                let second_half = replies.split_off(middle);
                parts.push((batch.events[middle..].to_vec(), second_half));
                parts.push((batch.events[..middle].to_vec(), replies));
                continue;
            }
            answer_all(replies, &error);
        }
        Ok(())
    }

    /// Commits a batch; when the outcome is unknown, tries to learn it for a while. Says when the
    /// database has gone away.
    async fn commit(&mut self, batch: &Arc<Batch>) -> Result<(Written, Durable), StoreError> {
        let began = Instant::now();
        let mut result = self.writer.commit(batch).await;
        while let Err(StoreError::OutcomeUnknown(why)) = &result {
            self.availability.went_away(why);
            if began.elapsed() > SETTLE_TIMEOUT {
                break;
            }
            // Those in the queue are certainly not stored: they need not wait for the outcome.
            let mut waiting = Vec::new();
            while let Ok(submission) = self.waiting.try_recv() {
                waiting.push(submission);
            }
            refuse(waiting.into_iter());
            tokio::time::sleep(SETTLE_INTERVAL).await;
            result = self.writer.commit(batch).await;
        }
        match &result {
            Err(StoreError::Unavailable(why)) => self.availability.went_away(why),
            Ok(_) => self.availability.came_back(),
            Err(_) => {}
        }
        result
    }
}

/// A batch that is committed, and those who wait for it to be on disk.
struct Committed {
    batch: Arc<Batch>,
    written: Written,
    durable: Durable,
    replies: Vec<Reply>,
    began: Instant,
}

/// Answers waiters, batch by batch, once their events are on disk.
struct Acknowledger {
    committed: mpsc::Receiver<Committed>,
    availability: Arc<Availability>,
    metrics: Arc<Metrics>,
}

impl Acknowledger {
    async fn run(mut self) -> Result<(), StoreError> {
        while let Some(committed) = self.committed.recv().await {
            let Committed { batch, written, durable, replies, began } = committed;
            match durable.wait().await {
                Ok(()) => {
                    self.record(&batch, &written, began.elapsed());
                    for (reply, id) in replies.into_iter().zip(written.ids) {
                        let _ = reply.send(Ok(Receipt { id, created_at: batch.received }));
                    }
                }
                Err(StoreError::Stopped) => return Err(StoreError::Stopped),
                Err(error) => {
                    self.availability.went_away(&error.to_string());
                    answer_all(replies, &error);
                }
            }
        }
        Ok(())
    }

    fn record(&self, batch: &Batch, written: &Written, duration: Duration) {
        let events = batch.events.len();
        let failed = batch.events.iter().filter(|event| event.failed()).count();
        self.metrics.stored((events - failed) as u64, failed as u64);
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        self.metrics.batch_events.observe(events as f64);
        self.metrics.batch_duration.observe(duration.as_secs_f64());
        for device_id in &written.new_devices {
            tracing::info!(%device_id, "new device");
        }
        for streak in &written.streaks {
            if streak.before < NOTABLE_STREAK && streak.after >= NOTABLE_STREAK {
                tracing::warn!(
                    device_id = %streak.device_id,
                    job = streak.job.as_ref().map(tracing::field::display),
                    consecutive_failures = streak.after,
                    "a device keeps failing"
                );
            }
        }
        if tracing::enabled!(tracing::Level::DEBUG) {
            for (event, id) in batch.events.iter().zip(&written.ids) {
                tracing::debug!(
                    id,
                    device_id = %event.device_id,
                    total_files_synced = event.total_files_synced,
                    total_errors = event.total_errors,
                    "sync event stored"
                );
            }
        }
    }
}

/// Answers everybody with the same error.
fn answer_all(replies: Vec<Reply>, error: &StoreError) {
    let answer = match error {
        StoreError::Unavailable(_) | StoreError::OutcomeUnknown(_) => IngestError::Unavailable,
        _ => IngestError::Failed(error.to_string()),
    };
    for reply in replies {
        let _ = reply.send(Err(answer.clone()));
    }
}

/// Answers that the database is away.
fn refuse(submissions: impl Iterator<Item = Submission>) {
    for submission in submissions {
        let _ = submission.reply.send(Err(IngestError::Unavailable));
    }
}
