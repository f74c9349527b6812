//! Group commit: the way of every event into the store.
//!
//! One task owns the store's writer. It takes everything that waits in a bounded queue, stores it in
//! one transaction, and only then answers each waiter. There is no timer: a batch is what gathered
//! while the last one was being committed, or, as soon as that is as much as the last one, it is sent off
//! behind it, so that the database need not wait for us. The queue is bounded in events and in bytes; when it
//! is full, or the database away, the answer comes at once.
//!
//! Events that were sent with a key of a group have a lane of their own: a queue, a task, and a writer that looks in
//! its transaction whether their devices are in the group. So those without pay nothing for it.

mod device_log;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use pisync_core::{SyncEvent, Timestamp};
use tokio::sync::{Notify, mpsc, oneshot};

use self::device_log::DeviceLog;
use crate::{
    clock::Clock,
    metrics::Metrics,
    seldom::Seldom,
    store::{
        Batch, Conflict, EventWriter, GroupClaim, News, OtherGroup, StoreError, StoredEvent,
        Written,
    },
};

/// Events that may wait or be under way, batches included: 5,000 devices reporting at the same second
/// must find room, and several devices that deliver 10,000 each after a day without a network.
const QUEUE_EVENTS: usize = 65_536;

/// Memory that they may take, in bytes. Most events take some 250, one with the largest metadata 5,000.
const QUEUE_BYTES: usize = 32 << 20;

/// What of both bodies may hold that are still arriving: three quarters. Some clients never finish theirs, and must not
/// keep out the events that arrive whole, as nearly all do.
const ARRIVING_EVENTS: usize = QUEUE_EVENTS / 4 * 3;
const ARRIVING_BYTES: usize = QUEUE_BYTES / 4 * 3;

/// Events per transaction. Beyond some hundreds a larger batch gains nothing, and everybody in it
/// waits longer. What was submitted together stays together, however many.
const BATCH_EVENTS: usize = 1_024;

/// Batches that may be under way at a time. One is being stored; a second keeps the store from waiting for the
/// next; a third would only keep later events out of the second.
const BATCHES_UNDER_WAY: usize = 2;

/// Events that are enough for a batch while another one is under way, however many there are.
const ENOUGH_EVENTS: usize = 256;

/// How often to look whether the database is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// How long after a batch was sent off to try to learn whether it was committed, when the connection was lost on
/// the way.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(25);

/// How often to try meanwhile.
const SETTLE_INTERVAL: Duration = Duration::from_millis(200);

/// A device that gives all of its events one id does so with each report: one line in so long is enough.
const CONFLICT_LOGGED_EVERY: Duration = Duration::from_secs(1);

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
    /// The database is away or gave the transaction up, or the server is shutting down. When the connection was lost during a
    /// commit and could not be had back in time, the event may be stored all the same.
    Unavailable,
    /// A device is not in the group that it must be in.
    OtherGroup,
    /// The database refused this event, or something else is wrong; the text is for the log.
    Failed(String),
}

/// What was submitted together, and who waits for the answer.
enum Submission {
    One {
        event: SyncEvent,
        group: Option<String>,
        reply: oneshot::Sender<Result<Receipt, IngestError>>,
        room: Room,
    },
    Many {
        events: Vec<SyncEvent>,
        group: Option<String>,
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
            Self::One { event, group, reply, room } => {
                batch.push(event);
                Waiter::One { group, reply, _room: room }
            }
            Self::Many { events, group, reply, room } => {
                let count = events.len();
                batch.extend(events);
                Waiter::Many { count, group, reply, _room: room }
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
    One {
        group: Option<String>,
        reply: oneshot::Sender<Result<Receipt, IngestError>>,
        _room: Room,
    },
    Many {
        count: usize,
        group: Option<String>,
        reply: oneshot::Sender<Result<Vec<Receipt>, IngestError>>,
        _room: Room,
    },
}

impl Waiter {
    fn len(&self) -> usize {
        match self {
            Self::One { .. } => 1,
            Self::Many { count, .. } => *count,
        }
    }

    /// The group that its devices must be in.
    fn group(&self) -> Option<&String> {
        match self {
            Self::One { group, .. } | Self::Many { group, .. } => group.as_ref(),
        }
    }

    /// Answers with the next of `receipts`, of which there is one for each event. Whoever waited may have gone
    /// away meanwhile.
    fn answer(self, mut receipts: impl Iterator<Item = Receipt>) {
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

/// The batch that events make which are brought by `waiters`, one after the other.
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

/// A part of a batch that could not be stored as a whole. It has waited since that one was stamped.
fn part_of(whole: &Batch, events: Vec<SyncEvent>, waiters: &[Waiter]) -> Arc<Batch> {
    Arc::new(Batch { stamped: whole.stamped, ..batch_of(whole.received, events, waiters) })
}

/// What all events in the queue and under way amount to, and all bodies that are arriving.
#[derive(Debug, Default)]
struct Load {
    all: Held,
    /// What of it is held by bodies that are arriving.
    arriving: Held,
}

#[derive(Debug, Default)]
struct Held {
    events: AtomicUsize,
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

/// What waits in the queue, for the task to know when it is enough for another batch.
#[derive(Debug)]
struct Backlog {
    /// Counted in after they are in the queue, so for a moment there may be fewer than none.
    events: AtomicIsize,
    /// How many of them ring, when there were not so many before; at least one.
    enough: AtomicIsize,
    bell: Notify,
}

impl Backlog {
    fn new() -> Self {
        Self { events: AtomicIsize::new(0), enough: AtomicIsize::new(1), bell: Notify::new() }
    }

    /// So many events have come into the queue. Should the bell not ring that is just being asked for, no harm
    /// is done: the batch under way ends soon.
    fn add(&self, events: usize) {
        let before = self.events.fetch_add(events.cast_signed(), Ordering::Relaxed);
        let enough = self.enough.load(Ordering::Relaxed);
        if before < enough && before + events.cast_signed() >= enough {
            self.bell.notify_one();
        }
    }

    fn remove(&self, events: usize) {
        self.events.fetch_sub(events.cast_signed(), Ordering::Relaxed);
    }

    fn is_enough(&self) -> bool {
        self.events.load(Ordering::Relaxed) >= self.enough.load(Ordering::Relaxed)
    }
}

/// A share of the queue's bounds, given back when it is dropped. It is taken while a body arrives, so that bodies
/// under way count too.
#[derive(Debug)]
pub struct Room {
    load: Arc<Load>,
    events: usize,
    bytes: usize,
    /// Whether it is held by a body that is still arriving.
    is_arriving: bool,
}

impl Room {
    fn new(load: &Arc<Load>, is_arriving: bool) -> Self {
        Self { load: Arc::clone(load), events: 0, bytes: 0, is_arriving }
    }

    /// Room of the same bounds, given back by itself.
    #[must_use]
    pub fn another(&self) -> Self {
        Self::new(&self.load, self.is_arriving)
    }

    /// Makes room for one more event.
    ///
    /// # Errors
    /// [`IngestError::Overloaded`] when there is none.
    pub fn take(&mut self, event: &SyncEvent) -> Result<(), IngestError> {
        // What is added goes again with the room, also when it was too much.
        self.events += 1;
        let mut fits = self.load.all.add_events(1, QUEUE_EVENTS);
        if self.is_arriving {
            fits &= self.load.arriving.add_events(1, ARRIVING_EVENTS);
        }
        if !fits {
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
impl Room {
    /// Of bounds that nobody else shares.
    pub(crate) fn alone() -> Self {
        Self::new(&Arc::default(), true)
    }

    /// How many bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Room {
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

/// A queue, as those see it who put events into it.
#[derive(Clone)]
struct Lane {
    // Bounded by `Load`, which counts what a bound on submissions could not.
    queue: mpsc::UnboundedSender<Submission>,
    backlog: Arc<Backlog>,
    available: Arc<AtomicBool>,
}

impl Lane {
    fn is_available(&self) -> bool {
        self.available.load(Ordering::Relaxed)
    }
}

/// The entrance. Cheap to clone.
#[derive(Clone)]
pub struct Ingest {
    /// For events of any device.
    any: Lane,
    /// For those whose devices must be in a group.
    grouped: Lane,
    load: Arc<Load>,
    metrics: Arc<Metrics>,
}

/// What events are written through.
pub struct Writers {
    /// Those of any device.
    pub any: Box<dyn EventWriter>,
    /// Those whose devices must be in a group. It must write into the tables themselves, where groups are.
    pub grouped: Box<dyn EventWriter>,
}

impl Ingest {
    /// Makes an entrance and the tasks behind it, which the caller spawns and watches. `news` is what
    /// the first of the writers learns after it has returned.
    #[must_use]
    pub fn new(
        writers: Writers,
        news: mpsc::UnboundedReceiver<News>,
        clock: &Clock,
        metrics: &Arc<Metrics>,
    ) -> (Self, IngestTasks) {
        let load = Arc::new(Load::default());
        let lane = |writer, news| {
            let (queue, waiting) = mpsc::unbounded_channel();
            let backlog = Arc::new(Backlog::new());
            let available = Arc::new(AtomicBool::new(true));
            let task = IngestTask {
                writer,
                news,
                waiting,
                next: None,
                under_way: VecDeque::new(),
                peak: 0,
                load: Arc::clone(&load),
                backlog: Arc::clone(&backlog),
                available: Arc::clone(&available),
                logged_away: false,
                clock: clock.clone(),
                metrics: Arc::clone(metrics),
                conflicts_logged: Seldom::new(CONFLICT_LOGGED_EVERY),
                device_log: DeviceLog::new(),
            };
            (Lane { queue, backlog, available }, task)
        };
        let (any, any_task) = lane(writers.any, news);
        // Its writer has nothing to tell afterwards.
        let (_, no_news) = mpsc::unbounded_channel();
        let (grouped, grouped_task) = lane(writers.grouped, no_news);
        let entrance = Self { any, grouped, load: Arc::clone(&load), metrics: Arc::clone(metrics) };
        (entrance, IngestTasks { any: any_task, grouped: grouped_task })
    }

    /// Whether events are being stored at present.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.any.is_available()
    }

    /// Room for a body that arrives, of which there is nothing yet.
    #[must_use]
    pub fn room(&self) -> Room {
        Room::new(&self.load, true)
    }

    /// Stores `event` and returns once it is committed. When a `group` is named, its device must be in it, or new: then
    /// it is put there.
    ///
    /// # Errors
    /// See [`IngestError`].
    pub fn submit(
        &self,
        event: SyncEvent,
        group: Option<String>,
    ) -> impl Future<Output = Result<Receipt, IngestError>> {
        let mut room = Room::new(&self.load, false);
        let lane = self.lane(group.as_ref());
        let waiting = room
            .take(&event)
            .and_then(|()| enqueue(lane, |reply| Submission::One { event, group, reply, room }));
        self.wait_for(waiting, 1)
    }

    /// Stores `events`, for which there is `room`, in one transaction and returns once it is committed. When a `group`
    /// is named, all devices must be in it, or new.
    ///
    /// # Errors
    /// See [`IngestError`].
    pub async fn submit_many(
        &self,
        events: Vec<SyncEvent>,
        group: Option<String>,
        mut room: Room,
    ) -> Result<Vec<Receipt>, IngestError> {
        let count = events.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        room.has_arrived();
        let lane = self.lane(group.as_ref());
        let waiting = enqueue(lane, |reply| Submission::Many { events, group, reply, room });
        self.wait_for(waiting, count).await
    }

    fn lane(&self, group: Option<&String>) -> &Lane {
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
        let reason = match error {
            IngestError::Overloaded => "overloaded",
            IngestError::Unavailable => "unavailable",
            IngestError::OtherGroup => return,
            IngestError::Failed(_) => "failed",
        };
        self.metrics.refused(reason, events as u64);
    }
}

fn enqueue<T>(
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

/// A batch on its way into the store, and who waits for it.
struct UnderWay {
    batch: Arc<Batch>,
    waiters: Vec<Waiter>,
    since: Instant,
}

impl UnderWay {
    /// Takes out those of which the events with a claim begin at `refused`, and tells them that a device is in
    /// another group; the rest is a batch of its own.
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

/// The tasks behind the entrance.
pub struct IngestTasks {
    any: IngestTask,
    grouped: IngestTask,
}

impl IngestTasks {
    /// Work until `shutdown` comes, then take nothing more, store what is queued, and return.
    ///
    /// # Errors
    /// When a writer has come to its end. The process cannot go on without it.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), StoreError> {
        let shutdown = shutdown.shared();
        // Only the one is polled that has something to do.
        let mut lanes: FuturesUnordered<_> =
            [self.any, self.grouped].map(|lane| lane.run(shutdown.clone())).into_iter().collect();
        while let Some(ended) = lanes.next().await {
            ended?;
        }
        Ok(())
    }
}

/// The task that owns a writer.
struct IngestTask {
    writer: Box<dyn EventWriter>,
    news: mpsc::UnboundedReceiver<News>,
    waiting: mpsc::UnboundedReceiver<Submission>,
    /// Taken from the queue already.
    next: Option<Submission>,
    /// Batches that have been sent off, the oldest first.
    under_way: VecDeque<UnderWay>,
    /// The most events that there were at a time lately.
    peak: usize,
    load: Arc<Load>,
    backlog: Arc<Backlog>,
    available: Arc<AtomicBool>,
    /// Whether the log has it last that the database is away.
    logged_away: bool,
    clock: Clock,
    metrics: Arc<Metrics>,
    conflicts_logged: Seldom,
    device_log: DeviceLog,
}

impl IngestTask {
    /// Works until `shutdown` comes, then takes nothing more, stores what is queued, and returns.
    async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), StoreError> {
        tokio::pin!(shutdown);
        let mut closing = false;
        loop {
            tokio::select! {
                // In this order: closing must not wait for a queue that never empties.
                biased;
                () = &mut shutdown, if !closing => {
                    closing = true;
                    self.waiting.close();
                }
                () = std::future::ready(()), if self.may_send() => self.send_off().await?,
                written = self.writer.sent(), if !self.under_way.is_empty() => {
                    self.finish_first(written).await?;
                }
                submission = self.waiting.recv(), if self.under_way.is_empty() => {
                    match submission {
                        Some(submission) => self.next = Some(self.taken(submission)),
                        None => break,
                    }
                }
                () = self.backlog.bell.notified(), if !self.under_way.is_empty() => {}
                Some(news) = self.news.recv() => self.device_log.note(&news.new_devices, &news.streaks),
                () = tokio::time::sleep(PROBE_INTERVAL), if !self.available.load(Ordering::Relaxed) => {
                    if self.writer.probe().await.is_ok() {
                        self.available.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
        let finished = self.writer.finish().await;
        while let Ok(news) = self.news.try_recv() {
            self.device_log.note(&news.new_devices, &news.streaks);
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

    /// Whether the next batch is to be sent off: there are events for one, or enough while another is under way.
    fn may_send(&self) -> bool {
        if self.under_way.is_empty() {
            return self.next.is_some();
        }
        self.under_way.len() < BATCHES_UNDER_WAY
            && (self.next.is_some() || self.backlog.is_enough())
    }

    /// Sees how many events there are at a time. Half of them are enough for a batch while another one is under
    /// way: with fewer, batches would become smaller, and more than that do not come together.
    fn look_at_load(&mut self) {
        let load = self.load.all.events.load(Ordering::Relaxed);
        self.peak = load.max(self.peak - self.peak / 16);
        let enough = (self.peak / 2).clamp(1, ENOUGH_EVENTS);
        self.backlog.enough.store(enough.cast_signed(), Ordering::Relaxed);
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

    /// Takes what waits, some hundred events at most, and sends it off. Where that cannot be done it is stored,
    /// after what is under way.
    async fn send_off(&mut self) -> Result<(), StoreError> {
        let received = self.clock.now();
        let mut events = Vec::new();
        let mut waiters = Vec::new();
        while let Some(submission) = self.take() {
            if !events.is_empty() && events.len() + submission.len() > BATCH_EVENTS {
                self.next = Some(submission);
                break;
            }
            // Whoever has hung up would take the answer for lost and send again: don't store twice.
            if !submission.is_abandoned() {
                waiters.push(submission.unpack(&mut events));
            }
        }
        let under_way: usize = self.under_way.iter().map(|sent| sent.batch.events.len()).sum();
        let waiting = self.load.all.events.load(Ordering::Relaxed);
        let waiting = waiting.saturating_sub(under_way + events.len());
        self.metrics.queue_events.set(i64::try_from(waiting).unwrap_or(0));
        if events.is_empty() {
            return Ok(());
        }
        let batch = Arc::new(batch_of(received, events, &waiters));
        let sent = UnderWay { batch, waiters, since: Instant::now() };
        if self.available.load(Ordering::Relaxed) && self.writer.send(&sent.batch) {
            self.under_way.push_back(sent);
            return Ok(());
        }
        while !self.under_way.is_empty() {
            let written = self.writer.sent().await;
            self.finish_first(written).await?;
        }
        self.store(sent).await
    }

    /// Answers those who wait for the batch that was sent off first. When it is not known to be stored, waits
    /// for the others, too, and writes all of which that is so.
    async fn finish_first(&mut self, mut written: Option<Written>) -> Result<(), StoreError> {
        self.look_at_load();
        let mut unknown = Vec::new();
        while let Some(sent) = self.under_way.pop_front() {
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
            if unknown.is_empty() || self.under_way.is_empty() {
                break;
            }
            written = self.writer.sent().await;
        }
        for sent in unknown {
            self.store(sent).await?;
        }
        Ok(())
    }

    fn answer(&self, UnderWay { batch, waiters, since }: UnderWay, written: Written) {
        self.record(&batch, &written, since.elapsed());
        let mut receipts = receipts(written, batch.received);
        for waiter in waiters {
            waiter.answer(&mut receipts);
        }
    }

    /// Stores a batch and answers those who wait for it. When the database refuses it for the data in it, the
    /// submissions are halved until the culprit stands alone: the others lose nothing.
    async fn store(&mut self, batch: UnderWay) -> Result<(), StoreError> {
        let mut parts = vec![batch];
        while let Some(mut part) = parts.pop() {
            if !self.available.load(Ordering::Relaxed) {
                // It went away with the batch before, or while these came in.
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
                let half = |events: &[SyncEvent], waiters: Vec<_>| UnderWay {
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
                // The others go on. Whether it is the same again and again, only the log can show.
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

    /// Writes a batch; when the outcome is unknown, tries to learn it for a while. Says when the
    /// database has gone away.
    async fn write(&mut self, part: &UnderWay) -> Result<Written, StoreError> {
        let UnderWay { batch, since, .. } = part;
        let mut result = self.writer.write(batch).await;
        while let Err(StoreError::OutcomeUnknown(why)) = &result {
            self.went_away(why);
            if since.elapsed() > SETTLE_TIMEOUT {
                break;
            }
            // Those in the queue are certainly not stored: they need not wait for the outcome.
            while let Some(submission) = self.take() {
                submission.refuse(IngestError::Unavailable);
            }
            tokio::time::sleep(SETTLE_INTERVAL).await;
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
    /// Says of duplicates when they are not what is stored. They are answered as duplicates all the same: the
    /// contract has it so, and an error would make the device try for ever.
    fn note_conflicts(&self, batch: &Batch, written: &Written) {
        for Conflict { event, first, fields } in written.conflicts(batch) {
            self.metrics.event_id_conflict();
            if let Some(passed_over) = self.conflicts_logged.due() {
                tracing::warn!(
                    device_id = %event.device_id,
                    event_id = event.event_id.as_ref().map(tracing::field::display),
                    stored_id = first.id,
                    differs_in = fields.join(", "),
                    passed_over,
                    "an event_id was used again for another event, which is not stored; give each event an id of its own. Of the next second's nothing is logged, pisync_sync_event_id_conflicts_total counts them"
                );
            }
        }
    }
}

/// Tells those who wait that their events are not stored, or not known to be.
fn refuse(waiters: Vec<Waiter>, error: &StoreError) {
    let answer = match error {
        StoreError::Unavailable(_) | StoreError::Transient(_) | StoreError::OutcomeUnknown(_) => {
            IngestError::Unavailable
        }
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
