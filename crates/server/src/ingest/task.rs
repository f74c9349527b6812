//! The task that owns a writer of the store. It makes batches of what waits in the queue, stores them, and answers the
//! waiters. `ingest` creates it and `app` runs it. It must not answer an event as stored before the commit.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use pisync_core::{SyncEvent, Timestamp};
use tokio::sync::mpsc;

use super::{
    IngestError, Receipt,
    device_log::DeviceLog,
    permits::Load,
    queue::{Backlog, Lane, Submission, Waiter},
};
use crate::{
    clock::Clock,
    log_throttle::OnePerInterval,
    metrics::Metrics,
    store::{
        Batch, Conflict, EventWriter, GroupClaim, Observations, OtherGroup, StoreError, Written,
    },
};

/// Events per transaction. Beyond some hundreds a larger batch gains nothing, and every event in it waits longer.
/// Events that were submitted together stay together, however many they are.
const BATCH_EVENTS: usize = 1_024;

/// Batches that may be in flight at a time. One is being stored. A second keeps the store from waiting for the next. A
/// third would only keep later events out of the second.
const BATCHES_IN_FLIGHT: usize = 2;

/// With this many events waiting, the next batch is sent while another one is in flight, whatever the load.
const WAKE_EVENTS: usize = 256;

/// How often to check whether the database is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// How long to try to learn whether a batch was committed, after the connection was lost. It is counted from the moment
/// at which the batch was sent.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(25);

/// How often to try within that time.
const RESOLVE_INTERVAL: Duration = Duration::from_millis(200);

/// A device that gives all of its events the same id does so with each report. One line per interval is enough.
const CONFLICT_LOGGED_EVERY: Duration = Duration::from_secs(1);

/// Makes a batch of the events of `waiters`, in the same order.
fn batch_of(received: Timestamp, events: Vec<SyncEvent>, waiters: &[Waiter]) -> Batch {
    let mut claims = Vec::new();
    let mut next = 0;
    for waiter in waiters {
        let first = next;
        next += waiter.len();
        if let Some(group) = waiter.group() {
            claims.push(GroupClaim { events: first..next, group: group.clone() });
        }
    }
    Batch { claims, ..Batch::new(received, events) }
}

/// A part of a batch that could not be stored as a whole. It keeps the stamp of that batch, because it has waited since
/// then.
fn part_of(whole: &Batch, events: Vec<SyncEvent>, waiters: &[Waiter]) -> Arc<Batch> {
    Arc::new(Batch { stamped: whole.stamped, ..batch_of(whole.received, events, waiters) })
}

/// A batch on its way into the store, and who waits for it.
struct InFlight {
    batch: Arc<Batch>,
    waiters: Vec<Waiter>,
    since: Instant,
}

impl InFlight {
    /// Removes the submissions whose events begin at `refused`, and tells their waiters that a device is in another
    /// group. The rest becomes a batch of its own.
    fn without(self, refused: &[usize]) -> Self {
        let Self { batch, waiters, .. } = self;
        let mut events = Vec::new();
        let mut others = Vec::new();
        let mut next = 0;
        for waiter in waiters {
            let first = next;
            next += waiter.len();
            if refused.contains(&first) {
                waiter.refuse(IngestError::OtherGroup);
            } else {
                events.extend_from_slice(&batch.events[first..next]);
                others.push(waiter);
            }
        }
        let batch = part_of(&batch, events, &others);
        Self { batch, waiters: others, since: Instant::now() }
    }
}

/// The tasks that store what is submitted.
pub struct IngestTasks {
    pub(super) any: IngestTask,
    pub(super) grouped: IngestTask,
}

impl IngestTasks {
    /// Work until `shutdown` comes, then take nothing more, store what is queued, and return.
    ///
    /// # Errors
    /// When a writer has ended. The process cannot go on without it.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), StoreError> {
        let shutdown = shutdown.shared();
        // Polls only the lane that has something to do.
        let mut lanes: FuturesUnordered<_> =
            [self.any, self.grouped].map(|lane| lane.run(shutdown.clone())).into_iter().collect();
        while let Some(ended) = lanes.next().await {
            ended?;
        }
        Ok(())
    }
}

/// The task that owns a writer.
pub(super) struct IngestTask {
    writer: Box<dyn EventWriter>,
    observations: mpsc::UnboundedReceiver<Observations>,
    waiting: mpsc::UnboundedReceiver<Submission>,
    /// A submission that was already taken from the queue.
    next: Option<Submission>,
    /// Batches in flight, the oldest first.
    in_flight: VecDeque<InFlight>,
    /// The recent maximum of events held at a time; it decays slowly.
    peak: usize,
    load: Arc<Load>,
    backlog: Arc<Backlog>,
    available: Arc<AtomicBool>,
    /// Whether the last log line said that the database is away.
    logged_away: bool,
    clock: Clock,
    metrics: Arc<Metrics>,
    conflicts_logged: OnePerInterval,
    device_log: DeviceLog,
}

impl IngestTask {
    /// Stores with `writer` what arrives on `waiting`. The writer sends to `observations` what it learns after it has
    /// returned.
    pub(super) fn new(
        writer: Box<dyn EventWriter>,
        observations: mpsc::UnboundedReceiver<Observations>,
        waiting: mpsc::UnboundedReceiver<Submission>,
        load: &Arc<Load>,
        lane: &Lane,
        clock: &Clock,
        metrics: &Arc<Metrics>,
    ) -> Self {
        Self {
            writer,
            observations,
            waiting,
            next: None,
            in_flight: VecDeque::new(),
            peak: 0,
            load: Arc::clone(load),
            backlog: Arc::clone(&lane.backlog),
            available: Arc::clone(&lane.available),
            logged_away: false,
            clock: clock.clone(),
            metrics: Arc::clone(metrics),
            conflicts_logged: OnePerInterval::new(CONFLICT_LOGGED_EVERY),
            device_log: DeviceLog::new(),
        }
    }

    /// Works until `shutdown` comes, then takes nothing more, stores what is queued, and returns.
    async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), StoreError> {
        tokio::pin!(shutdown);
        let mut closing = false;
        loop {
            tokio::select! {
                // The order matters: closing must not wait for a queue that never empties.
                biased;
                () = &mut shutdown, if !closing => {
                    closing = true;
                    self.waiting.close();
                }
                () = std::future::ready(()), if self.may_pipeline() => self.pipeline().await?,
                written = self.writer.sent(), if !self.in_flight.is_empty() => {
                    self.finish_first(written).await?;
                }
                submission = self.waiting.recv(), if self.in_flight.is_empty() => {
                    match submission {
                        Some(submission) => self.next = Some(self.taken(submission)),
                        None => break,
                    }
                }
                () = self.backlog.wake.notified(), if !self.in_flight.is_empty() => {}
                Some(learnt) = self.observations.recv() => self.device_log.note(&learnt.new_devices, &learnt.streaks),
                () = tokio::time::sleep(PROBE_INTERVAL), if !self.available.load(Ordering::Relaxed) => {
                    if self.writer.probe().await.is_ok() {
                        self.available.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
        let finished = self.writer.finish().await;
        while let Ok(learnt) = self.observations.try_recv() {
            self.device_log.note(&learnt.new_devices, &learnt.streaks);
        }
        match finished {
            // Acknowledged events are safe all the same. The next start applies them.
            Err(StoreError::Unavailable(why)) => {
                tracing::warn!(error = why, "the database cannot be left in order");
                Ok(())
            }
            finished => finished,
        }
    }

    /// Whether to send the next batch. It needs one event when nothing is in flight, and enough events otherwise.
    fn may_pipeline(&self) -> bool {
        if self.in_flight.is_empty() {
            return self.next.is_some();
        }
        self.in_flight.len() < BATCHES_IN_FLIGHT
            && (self.next.is_some() || self.backlog.is_at_wake_threshold())
    }

    /// Measures how many events are held at a time and sets the wake threshold to half of that. With a lower threshold,
    /// batches would become smaller. A higher one would never be reached while a batch is in flight.
    fn look_at_load(&mut self) {
        let load = self.load.all.events.load(Ordering::Relaxed);
        self.peak = load.max(self.peak - self.peak / 16);
        let threshold = (self.peak / 2).clamp(1, WAKE_EVENTS);
        self.backlog.wake_threshold.store(threshold.cast_signed(), Ordering::Relaxed);
    }

    /// Notes that the submission has left the queue.
    fn taken(&self, submission: Submission) -> Submission {
        self.backlog.remove(submission.len());
        submission
    }

    fn take(&mut self) -> Option<Submission> {
        let next = self.next.take();
        next.or_else(|| self.waiting.try_recv().ok().map(|submission| self.taken(submission)))
    }

    /// Takes what waits, up to [`BATCH_EVENTS`] events or one larger submission, and sends it behind the batch in
    /// flight. If the writer cannot take it now, the batch is stored once nothing is in flight.
    async fn pipeline(&mut self) -> Result<(), StoreError> {
        let received = self.clock.now();
        let mut events = Vec::new();
        let mut waiters = Vec::new();
        while let Some(submission) = self.take() {
            if !events.is_empty() && events.len() + submission.len() > BATCH_EVENTS {
                self.next = Some(submission);
                break;
            }
            // A client that has hung up did not hear an answer and sends again. Its events must not be stored twice.
            if !submission.is_abandoned() {
                waiters.push(submission.unpack(&mut events));
            }
        }
        let in_flight: usize = self.in_flight.iter().map(|sent| sent.batch.events.len()).sum();
        let waiting = self.load.all.events.load(Ordering::Relaxed);
        let waiting = waiting.saturating_sub(in_flight + events.len());
        self.metrics.queue_events.set(i64::try_from(waiting).unwrap_or(0));
        if events.is_empty() {
            return Ok(());
        }
        let batch = Arc::new(batch_of(received, events, &waiters));
        let sent = InFlight { batch, waiters, since: Instant::now() };
        if self.available.load(Ordering::Relaxed) && self.writer.send(&sent.batch) {
            self.in_flight.push_back(sent);
            return Ok(());
        }
        while !self.in_flight.is_empty() {
            let written = self.writer.sent().await;
            self.finish_first(written).await?;
        }
        self.store(sent).await
    }

    /// Answers those who wait for the batch that was sent first. If that batch is not known to be stored, waits for the
    /// other batches in flight, too. Then writes every batch that is not known to be stored.
    async fn finish_first(&mut self, mut written: Option<Written>) -> Result<(), StoreError> {
        self.look_at_load();
        let mut unknown = Vec::new();
        while let Some(sent) = self.in_flight.pop_front() {
            match written {
                Some(written) => {
                    self.came_back();
                    match written.check(&sent.batch) {
                        Ok(written) => self.answer(sent, written),
                        Err(error) => refuse(sent.waiters, &error),
                    }
                }
                None => unknown.push(sent),
            }
            if unknown.is_empty() || self.in_flight.is_empty() {
                break;
            }
            written = self.writer.sent().await;
        }
        for sent in unknown {
            self.store(sent).await?;
        }
        Ok(())
    }

    fn answer(&self, InFlight { batch, waiters, since }: InFlight, written: Written) {
        self.record(&batch, &written, since.elapsed());
        let mut receipts = receipts(written, batch.received);
        for waiter in waiters {
            waiter.answer(&mut receipts);
        }
    }

    /// Stores a batch and answers those who wait for it. If the database refuses the data, the submissions are halved
    /// until the wrong one stands alone. The others lose nothing.
    async fn store(&mut self, batch: InFlight) -> Result<(), StoreError> {
        let mut parts = vec![batch];
        while let Some(mut part) = parts.pop() {
            if !self.available.load(Ordering::Relaxed) {
                // The database went away with the batch before, or while these events arrived.
                for waiter in part.waiters {
                    waiter.refuse(IngestError::Unavailable);
                }
                continue;
            }
            let error = match self.write(&part).await {
                Ok(written) => {
                    self.answer(part, written);
                    continue;
                }
                Err(StoreError::Stopped) => return Err(StoreError::Stopped),
                Err(StoreError::OtherGroup(OtherGroup { refused })) => {
                    let others = part.without(&refused);
                    if !others.waiters.is_empty() {
                        parts.push(others);
                    }
                    continue;
                }
                Err(error) => error,
            };
            if matches!(error, StoreError::Rejected(_)) && part.waiters.len() > 1 {
                let half = |events: &[SyncEvent], waiters: Vec<_>| InFlight {
                    batch: part_of(&part.batch, events.to_vec(), &waiters),
                    waiters,
                    since: Instant::now(),
                };
                let second_half = part.waiters.split_off(part.waiters.len() / 2);
                let middle: usize = part.waiters.iter().map(Waiter::len).sum();
                let (first, second) = part.batch.events.split_at(middle);
                parts.push(half(second, second_half));
                parts.push(half(first, part.waiters));
                continue;
            }
            if let StoreError::Transient(why) = &error {
                // The other parts go on. Only the log can show whether the same error comes again and again.
                tracing::warn!(
                    error = why,
                    events = part.batch.events.len(),
                    "the database gave a batch up; its events are answered 503"
                );
            }
            refuse(part.waiters, &error);
        }
        Ok(())
    }

    /// Writes a batch. If the outcome is unknown, tries to learn it for a while. Logs when the database has gone away.
    async fn write(&mut self, part: &InFlight) -> Result<Written, StoreError> {
        let InFlight { batch, since, .. } = part;
        let mut result = self.writer.write(batch).await;
        while let Err(StoreError::OutcomeUnknown(why)) = &result {
            self.went_away(why);
            if since.elapsed() > RESOLVE_TIMEOUT {
                break;
            }
            // The events in the queue are certainly not stored. They need not wait for the outcome.
            while let Some(submission) = self.take() {
                submission.refuse(IngestError::Unavailable);
            }
            tokio::time::sleep(RESOLVE_INTERVAL).await;
            result = self.writer.write(batch).await;
        }
        match &result {
            Err(StoreError::Unavailable(why)) => self.went_away(why),
            Ok(_) => self.came_back(),
            Err(_) => {}
        }
        result?.check(batch)
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

    /// Notes that the database stores events again. A probe is not enough: it may succeed where events find no disk
    /// space.
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
        self.note_conflicts(batch, written);
        self.device_log.note(&written.new_devices, &written.streaks);
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

impl IngestTask {
    /// Logs duplicates that differ from what is stored. They are answered as duplicates all the same, as the contract
    /// says: an error would make the device try for ever.
    fn note_conflicts(&self, batch: &Batch, written: &Written) {
        for Conflict { event, first, fields } in written.conflicts(batch) {
            self.metrics.event_id_conflict();
            if let Some(suppressed) = self.conflicts_logged.due() {
                tracing::warn!(
                    device_id = %event.device_id,
                    event_id = event.event_id.as_ref().map(tracing::field::display),
                    stored_id = first.id,
                    differs_in = fields.join(", "),
                    suppressed,
                    "an event_id was used again for another event, which is not stored; give each event an id of its own. Of the next second's nothing is logged, pisync_sync_event_id_conflicts_total counts them"
                );
            }
        }
    }
}

/// Tells the waiters that their events are not stored, or not known to be stored.
fn refuse(waiters: Vec<Waiter>, error: &StoreError) {
    let answer = match error {
        StoreError::Unavailable(_)
        | StoreError::Transient(_)
        | StoreError::OutcomeUnknown(_)
        | StoreError::Unreplicated => IngestError::Unavailable,
        StoreError::OtherGroup(_) => IngestError::OtherGroup,
        StoreError::Busy(_) => IngestError::Overloaded,
        StoreError::Rejected(_)
        | StoreError::TooSlow(_)
        | StoreError::Failed(_)
        | StoreError::Stopped => IngestError::Failed(error.to_string()),
    };
    for waiter in waiters {
        waiter.refuse(answer.clone());
    }
}

/// The answer for each event of a batch, in order.
fn receipts(written: Written, received: Timestamp) -> impl Iterator<Item = Receipt> {
    let mut duplicates = written.duplicates.into_iter().peekable();
    written.ids.into_iter().enumerate().map(move |(position, id)| {
        match duplicates.next_if(|duplicate| duplicate.position == position) {
            Some(duplicate) => Receipt::Duplicate { id, first: duplicate.first.map(Box::new) },
            None => Receipt::Created { id, created_at: received },
        }
    })
}
