//! Group commit: the way of every event into the store.
//!
//! One task owns the store's writer. It takes everything that waits in a bounded queue, stores it in
//! one transaction, and only then answers each waiter. There is no timer: a batch is what gathered
//! while the last one was being committed. The queue is bounded in events and in bytes; when it is full,
//! or the database away, the answer comes at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use pisync_core::{DeviceId, SyncEvent, Timestamp};
use tokio::sync::{mpsc, oneshot};

use crate::{
    clock::Clock,
    metrics::Metrics,
    store::{Batch, EventWriter, FailureStreak, News, StoreError, StoredEvent, Written},
};

/// Events that may wait or be under way, batches included: 5,000 devices reporting at the same second
/// must find room, and several devices that deliver 10,000 each after a day without a network.
const QUEUE_EVENTS: usize = 65_536;

/// Memory that they may take, in bytes. Most events take some 250, one with the largest metadata 5,000.
const QUEUE_BYTES: usize = 32 << 20;

/// Events per transaction. Beyond some hundreds a larger batch gains nothing, and everybody in it
/// waits longer. What was submitted together stays together, however many.
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
#[derive(Debug, Clone)]
pub enum Receipt {
    /// It is now.
    Created {
        /// The event's id.
        id: i64,
        /// When it was received.
        created_at: Timestamp,
    },
    /// It had been before, under the same event id.
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
    /// The database is away, or the server is shutting down. When the connection was lost during a
    /// commit and could not be had back in time, the event may be stored all the same.
    Unavailable,
    /// The database refused this event, or something else is wrong; the text is for the log.
    Failed(String),
}

/// What was submitted together, and who waits for the answer.
enum Submission {
    One {
        event: SyncEvent,
        reply: oneshot::Sender<Result<Receipt, IngestError>>,
        room: Room,
    },
    Many {
        events: Vec<SyncEvent>,
        reply: oneshot::Sender<Result<Vec<Receipt>, IngestError>>,
        room: Room,
    },
}

impl Submission {
    fn len(&self) -> usize {
        match self {
            Self::One { .. } => 1,
            Self::Many { events, .. } => events.len(),
        }
    }

    /// Whether nobody waits for the answer any more.
    fn is_abandoned(&self) -> bool {
        match self {
            Self::One { reply, .. } => reply.is_closed(),
            Self::Many { reply, .. } => reply.is_closed(),
        }
    }

    /// Puts the events at the end of `batch`.
    fn unpack(self, batch: &mut Vec<SyncEvent>) -> Waiter {
        match self {
            Self::One { event, reply, room } => {
                batch.push(event);
                Waiter::One { reply, _room: room }
            }
            Self::Many { events, reply, room } => {
                let count = events.len();
                batch.extend(events);
                Waiter::Many { count, reply, _room: room }
            }
        }
    }

    fn refuse(self, error: IngestError) {
        let mut events = Vec::new();
        self.unpack(&mut events).refuse(error);
    }
}

/// A submission without its events, which are in a batch.
enum Waiter {
    One { reply: oneshot::Sender<Result<Receipt, IngestError>>, _room: Room },
    Many { count: usize, reply: oneshot::Sender<Result<Vec<Receipt>, IngestError>>, _room: Room },
}

impl Waiter {
    fn len(&self) -> usize {
        match self {
            Self::One { .. } => 1,
            Self::Many { count, .. } => *count,
        }
    }

    /// Answers with the next of `receipts`. Whoever waited may have gone away meanwhile.
    fn answer(self, mut receipts: impl Iterator<Item = Receipt>) {
        match self {
            Self::One { reply, .. } => {
                if let Some(receipt) = receipts.next() {
                    let _ = reply.send(Ok(receipt));
                }
            }
            Self::Many { count, reply, .. } => {
                let _ = reply.send(Ok(receipts.take(count).collect()));
            }
        }
    }

    fn refuse(self, error: IngestError) {
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

/// What all events in the queue and under way amount to.
#[derive(Debug, Default)]
struct Load {
    events: AtomicUsize,
    bytes: AtomicUsize,
}

/// A share of the queue's bounds, given back when it is dropped. It is taken while a batch is being
/// read, so that bodies under way count too.
#[derive(Debug)]
pub struct Room {
    load: Arc<Load>,
    events: usize,
    bytes: usize,
}

impl Room {
    /// Makes room for one more event.
    ///
    /// # Errors
    /// [`IngestError::Overloaded`] when there is none.
    pub fn take(&mut self, event: &SyncEvent) -> Result<(), IngestError> {
        self.events += 1;
        if self.load.events.fetch_add(1, Ordering::Relaxed) >= QUEUE_EVENTS {
            // What was added goes again with the room.
            return Err(IngestError::Overloaded);
        }
        self.take_bytes(weight(event))
    }

    /// Makes room for so many bytes of something else.
    ///
    /// # Errors
    /// [`IngestError::Overloaded`] when there is none.
    pub fn take_bytes(&mut self, bytes: usize) -> Result<(), IngestError> {
        self.bytes += bytes;
        let before = self.load.bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > QUEUE_BYTES { Err(IngestError::Overloaded) } else { Ok(()) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.load.events.fetch_sub(self.events, Ordering::Relaxed);
        self.load.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
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

/// The entrance. Cheap to clone.
#[derive(Clone)]
pub struct Ingest {
    // Bounded by `load`, which counts what a bound on submissions could not.
    queue: mpsc::UnboundedSender<Submission>,
    load: Arc<Load>,
    available: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
}

impl Ingest {
    /// Makes an entrance and the task behind it, which the caller spawns and watches. `news` is what
    /// `writer` learns after it has returned.
    #[must_use]
    pub fn new(
        writer: Box<dyn EventWriter>,
        news: mpsc::UnboundedReceiver<News>,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> (Self, IngestTask) {
        let (queue, waiting) = mpsc::unbounded_channel();
        let load = Arc::new(Load::default());
        let available = Arc::new(AtomicBool::new(true));
        let entrance = Self {
            queue,
            load: Arc::clone(&load),
            available: Arc::clone(&available),
            metrics: Arc::clone(&metrics),
        };
        let task = IngestTask {
            writer,
            news,
            waiting,
            load,
            available,
            logged_away: false,
            clock,
            metrics,
        };
        (entrance, task)
    }

    /// Whether events are being stored at present.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.available.load(Ordering::Relaxed)
    }

    /// Room for no event yet.
    #[must_use]
    pub fn room(&self) -> Room {
        Room { load: Arc::clone(&self.load), events: 0, bytes: 0 }
    }

    /// Stores `event` and returns once it is committed.
    ///
    /// # Errors
    /// See [`IngestError`].
    pub fn submit(&self, event: SyncEvent) -> impl Future<Output = Result<Receipt, IngestError>> {
        let mut room = self.room();
        let waiting = room
            .take(&event)
            .and_then(|()| self.enqueue(|reply| Submission::One { event, reply, room }));
        self.wait_for(waiting, 1)
    }

    /// Stores `events`, for which there is `room`, in one transaction and returns once it is committed.
    ///
    /// # Errors
    /// See [`IngestError`].
    pub async fn submit_many(
        &self,
        events: Vec<SyncEvent>,
        room: Room,
    ) -> Result<Vec<Receipt>, IngestError> {
        let count = events.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        let waiting = self.enqueue(|reply| Submission::Many { events, reply, room });
        self.wait_for(waiting, count).await
    }

    fn enqueue<T>(
        &self,
        submission: impl FnOnce(oneshot::Sender<Result<T, IngestError>>) -> Submission,
    ) -> Result<oneshot::Receiver<Result<T, IngestError>>, IngestError> {
        if !self.is_available() {
            return Err(IngestError::Unavailable);
        }
        let (reply, answer) = oneshot::channel();
        self.queue.send(submission(reply)).map_err(|_| IngestError::Unavailable)?;
        Ok(answer)
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
        let reason = match error {
            IngestError::Overloaded => "overloaded",
            IngestError::Unavailable => "unavailable",
            IngestError::Failed(_) => "failed",
        };
        self.metrics.refused(reason, events as u64);
    }
}

/// The task that owns the writer.
pub struct IngestTask {
    writer: Box<dyn EventWriter>,
    news: mpsc::UnboundedReceiver<News>,
    waiting: mpsc::UnboundedReceiver<Submission>,
    load: Arc<Load>,
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
                        break;
                    }
                    self.store_all(&mut submissions).await?;
                }
                Some(news) = self.news.recv() => announce(&news.new_devices, &news.streaks),
                () = tokio::time::sleep(PROBE_INTERVAL), if !self.available.load(Ordering::Relaxed) => {
                    if self.writer.probe().await.is_ok() {
                        self.available.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
        let finished = self.writer.finish().await;
        while let Ok(news) = self.news.try_recv() {
            announce(&news.new_devices, &news.streaks);
        }
        match finished {
            // What was acknowledged is safe all the same, and the next start sees to it.
            Err(StoreError::Unavailable(why)) => {
                tracing::warn!(error = why, "the database cannot be left in order");
                Ok(())
            }
            finished => finished,
        }
    }

    /// Stores submissions, some hundred events at a time.
    async fn store_all(&mut self, submissions: &mut Vec<Submission>) -> Result<(), StoreError> {
        while !submissions.is_empty() {
            let mut events = 0;
            let fits = |submission: &&Submission| {
                let first = events == 0;
                events += submission.len();
                first || events <= BATCH_EVENTS
            };
            let count = submissions.iter().take_while(fits).count();
            let together: Vec<_> = submissions.drain(..count).collect();
            let taken: usize = together.iter().map(Submission::len).sum();
            let load = self.load.events.load(Ordering::Relaxed);
            self.metrics.queue_events.set(i64::try_from(load.saturating_sub(taken)).unwrap_or(0));
            if self.available.load(Ordering::Relaxed) {
                self.store(together).await?;
            } else {
                // They came in while the database was being found away.
                refuse(together.into_iter());
            }
        }
        Ok(())
    }

    /// Stores submissions in one transaction and answers them. When the database refuses the batch for
    /// the data in it, the submissions are halved until the culprit stands alone: the others lose
    /// nothing.
    async fn store(&mut self, submissions: Vec<Submission>) -> Result<(), StoreError> {
        let received = self.clock.now();
        let mut events = Vec::with_capacity(submissions.len());
        let waiters: Vec<Waiter> = submissions
            .into_iter()
            // Whoever has hung up would take the answer for lost and send again: don't store twice.
            .filter(|submission| !submission.is_abandoned())
            .map(|submission| submission.unpack(&mut events))
            .collect();
        let mut parts = vec![(events, waiters)];
        while let Some((events, mut waiters)) = parts.pop() {
            if events.is_empty() {
                continue;
            }
            let batch = Arc::new(Batch::new(received, events));
            let started = Instant::now();
            let error = match self.write(&batch).await {
                Ok(written) => {
                    self.record(&batch, &written, started.elapsed());
                    let mut receipts = receipts(written, received);
                    for waiter in waiters {
                        waiter.answer(&mut receipts);
                    }
                    continue;
                }
                Err(StoreError::Stopped) => return Err(StoreError::Stopped),
                Err(error) => error,
            };
            if matches!(error, StoreError::Rejected(_)) && waiters.len() > 1 {
                let second_half = waiters.split_off(waiters.len() / 2);
                let middle: usize = waiters.iter().map(Waiter::len).sum();
                parts.push((batch.events[middle..].to_vec(), second_half));
                parts.push((batch.events[..middle].to_vec(), waiters));
                continue;
            }
            let answer = match &error {
                StoreError::Unavailable(_) | StoreError::OutcomeUnknown(_) => {
                    IngestError::Unavailable
                }
                _ => IngestError::Failed(error.to_string()),
            };
            for waiter in waiters {
                waiter.refuse(answer.clone());
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
        let duplicates = written.duplicates.len();
        let failed = batch.events.iter().filter(|event| event.failed()).count();
        let failed_duplicates = written
            .duplicates
            .iter()
            .filter(|duplicate| batch.events[duplicate.position].failed())
            .count();
        let stored_failed = failed - failed_duplicates;
        self.metrics.stored(events - duplicates - stored_failed, stored_failed, duplicates);
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        self.metrics.batch_events.observe(events as f64);
        self.metrics.batch_duration.observe(duration.as_secs_f64());
        announce(&written.new_devices, &written.streaks);
        if tracing::enabled!(tracing::Level::DEBUG) {
            for (position, (event, id)) in batch.events.iter().zip(&written.ids).enumerate() {
                tracing::debug!(
                    id,
                    duplicate = written.is_duplicate(position),
                    device_id = %event.device_id,
                    total_files_synced = event.total_files_synced,
                    total_errors = event.total_errors,
                    "sync event stored"
                );
            }
        }
    }
}

/// Puts what was learnt of devices into the log.
fn announce(new_devices: &[DeviceId], streaks: &[FailureStreak]) {
    for device_id in new_devices {
        tracing::info!(%device_id, "new device");
    }
    for streak in streaks {
        if streak.before < NOTABLE_STREAK && streak.after >= NOTABLE_STREAK {
            tracing::warn!(
                device_id = %streak.device_id,
                job = streak.job.as_ref().map(tracing::field::display),
                consecutive_failures = streak.after,
                "a device keeps failing"
            );
        }
    }
}

/// What to answer for each event of a batch, in order.
fn receipts(written: Written, received: Timestamp) -> impl Iterator<Item = Receipt> {
    let mut duplicates = written.duplicates.into_iter().peekable();
    written.ids.into_iter().enumerate().map(move |(position, id)| {
        match duplicates.next_if(|duplicate| duplicate.position == position) {
            Some(duplicate) => Receipt::Duplicate { id, first: duplicate.first.map(Box::new) },
            None => Receipt::Created { id, created_at: received },
        }
    })
}

/// Answers that the database is away.
fn refuse(submissions: impl Iterator<Item = Submission>) {
    for submission in submissions {
        submission.refuse(IngestError::Unavailable);
    }
}
