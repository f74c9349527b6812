//! Group commit: the way of every event into the store.
//!
//! One task owns the store's writer. It takes everything that waits in a bounded queue, stores it in
//! one transaction, and only then answers each waiter. There is no timer: a batch is what gathered
//! while the last one was being committed. A full queue and an absent database are answered at once.

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
    store::{Batch, EventWriter, StoreError, Written},
};

/// Events that may wait. 5,000 devices reporting at the same second must find room; a waiting event
/// takes a few hundred bytes, or 5 KiB with the largest metadata.
const QUEUE_EVENTS: usize = 8_192;

/// Events per transaction. Beyond some hundreds a larger batch gains nothing, and everybody in it
/// waits longer.
const BATCH_EVENTS: usize = 1_024;

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
    reply: oneshot::Sender<Result<Receipt, IngestError>>,
}

/// The entrance. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ingest {
    queue: mpsc::Sender<Submission>,
    available: Arc<AtomicBool>,
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
        let available = Arc::new(AtomicBool::new(true));
        let entrance =
            Self { queue, available: Arc::clone(&available), metrics: Arc::clone(&metrics) };
        let task = IngestTask { writer, waiting, available, logged_away: false, clock, metrics };
        (entrance, task)
    }

    /// Whether events are being stored at present.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.available.load(Ordering::Relaxed)
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
    available: Arc<AtomicBool>,
    /// Whether the log has it last that the database is away.
    logged_away: bool,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl IngestTask {
    /// Works until `shutdown` comes, then takes nothing more, stores what is queued, and returns.
    ///
    /// # Errors
    /// When the writer has come to its end. The process cannot go on without it.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), StoreError> {
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
                    if self.available.load(Ordering::Relaxed) {
                        self.store(submissions.drain(..)).await?;
                    } else {
                        // They came in while the database was being found away.
                        refuse(submissions.drain(..));
                    }
                }
                () = tokio::time::sleep(PROBE_INTERVAL), if !self.available.load(Ordering::Relaxed) => {
                    if self.writer.probe().await.is_ok() {
                        self.available.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
    }

    /// Stores submissions and answers them. When the database refuses the batch for the data in it,
    /// the batch is halved until the culprit stands alone: the others lose nothing.
    async fn store(
        &mut self,
        submissions: impl Iterator<Item = Submission>,
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
            let started = Instant::now();
            let error = match self.write(&batch).await {
                Ok(written) => {
                    self.record(&batch, &written, started.elapsed());
                    for (reply, id) in replies.into_iter().zip(written.ids) {
                        let _ = reply.send(Ok(Receipt { id, created_at: received }));
                    }
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
            let answer = match &error {
                StoreError::Unavailable(_) | StoreError::OutcomeUnknown(_) => {
                    IngestError::Unavailable
                }
                _ => IngestError::Failed(error.to_string()),
            };
            for reply in replies {
                let _ = reply.send(Err(answer.clone()));
            }
        }
        Ok(())
    }

    /// Writes a batch; when the outcome is unknown, tries to learn it for a while. Says when the
    /// database has gone away.
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let started = Instant::now();
        let mut result = self.writer.write(batch).await;
        while let Err(StoreError::OutcomeUnknown(why)) = &result {
            self.went_away(why);
            if started.elapsed() > SETTLE_TIMEOUT {
                break;
            }
            // Those in the queue are certainly not stored: they need not wait for the outcome.
            let mut waiting = Vec::new();
            while let Ok(submission) = self.waiting.try_recv() {
                waiting.push(submission);
            }
            refuse(waiting.into_iter());
            tokio::time::sleep(SETTLE_INTERVAL).await;
            result = self.writer.write(batch).await;
        }
        match &result {
            Err(StoreError::Unavailable(why)) => self.went_away(why),
            Ok(_) => self.came_back(),
            Err(_) => {}
        }
        result
    }

    fn went_away(&mut self, why: &str) {
        self.available.store(false, Ordering::Relaxed);
        if !std::mem::replace(&mut self.logged_away, true) {
            tracing::error!(
                error = why,
                "the database is unavailable; events are answered 503 until it is back"
            );
        }
    }

    /// Says so once something is stored: a probe may succeed where events find no room.
    fn came_back(&mut self) {
        self.available.store(true, Ordering::Relaxed);
        if std::mem::take(&mut self.logged_away) {
            tracing::info!("the database is back; events are stored again");
        }
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

/// Answers that the database is away.
fn refuse(submissions: impl Iterator<Item = Submission>) {
    for submission in submissions {
        let _ = submission.reply.send(Err(IngestError::Unavailable));
    }
}
