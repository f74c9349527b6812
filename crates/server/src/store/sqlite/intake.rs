//! How a server takes events in: they are acknowledged once they are in the journal, and brought into the
//! tables many at a time.
//!
//! An event touches a place in the index, a row of figures and, with an id, a place among the keys, all of them
//! somewhere in the file. Bringing thousands of events into the tables together changes each page once for
//! several of them, and writes it once; and nobody waits for it. Whoever reads waits until everything that was
//! acknowledged before is in the tables, so nobody sees that it was ever anywhere else.

use std::{
    collections::{HashMap, VecDeque},
    io::Write as _,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pisync_core::{DeviceId, EventId, JobName, Metadata, SyncEvent, Timestamp};
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    connection::{SERVING_BUSY_TIMEOUT, open_for_requests, refuses_data, store_error},
    files::{DOUBTFUL_EVENTS, REFUSED_EVENTS, beside},
    history::kept_event,
    ids,
    journal::{self, Journal, Record, Survey},
    reads::device_number,
    writer::{
        Call, FIND_KEY, IngestState, Journaled, REMEMBERED_DEVICES, Through, WriteConnection,
        WriterThread, settle_through,
    },
};
use crate::{
    permissions::{self, PRIVATE},
    store::{Batch, Duplicate, EventWriter, News, StoreError, StoredEvent, Written},
};

/// Events that are brought into the tables together, unless somebody asks for them before: some 200 ms of
/// work. With half as many, one event in ten fewer is stored where they have ids.
const LUMP_EVENTS: usize = 32_768;

/// How long events are left in the journal alone when there are fewer.
const LUMP_TIME: Duration = Duration::from_secs(1);

/// Events that may be in the journal alone, and their bytes there. Beyond, events wait, and then find the
/// queue before them full.
const MOST_EVENTS: usize = 65_536;
const MOST_BYTES: usize = 32 << 20;

/// Ids that are reserved at a time, before they are given: those of [`MOST_EVENTS`] and of the largest batch
/// after them, twice. A crash loses what is left of them.
const RESERVED_IDS: i64 = 262_144;

/// With fewer left, more are reserved.
const FEWEST_RESERVED_IDS: i64 = RESERVED_IDS / 2;

/// Batches that may be sent off before the first of them is in the journal.
const BATCHES_SENT_OFF: usize = 2;

/// How long to wait for room, which comes with every lump.
const ROOM_TIMEOUT: Duration = Duration::from_secs(5);

/// Events that are in the journal.
#[derive(Debug)]
struct Accepted {
    /// The journal's record.
    number: u64,
    first_id: i64,
    batch: Arc<Batch>,
    /// Positions of the events in the batch, without duplicates. Their ids follow the first.
    positions: Vec<usize>,
    bytes: usize,
}

impl From<Record> for Accepted {
    fn from(record: Record) -> Self {
        let Record { number, first_id, received, events } = record;
        let positions = (0..events.len()).collect();
        let batch = Arc::new(Batch::new(received, events));
        // How long it was matters little: it is brought into the tables at once.
        Self { number, first_id, batch, positions, bytes: 0 }
    }
}

impl Accepted {
    fn ids(&self) -> impl Iterator<Item = i64> {
        (self.first_id..).take(self.positions.len())
    }

    /// How far the journal is applied with the first `events` of these.
    fn through(&self, events: usize) -> Through {
        if events < self.positions.len() {
            Through { record: self.number - 1, events }
        } else {
            Through { record: self.number, events: 0 }
        }
    }
}

/// Where an event with an id of its device's is, that is not in the tables yet.
#[derive(Debug, Clone)]
struct Place {
    id: i64,
    batch: Arc<Batch>,
    position: usize,
}

type Places = HashMap<(DeviceId, EventId), Place>;

#[derive(Debug, Default)]
struct State {
    /// The next event's id.
    next_id: i64,
    /// The last id that is reserved for this server's events.
    last_reserved_id: i64,
    /// The first id of the batch that is being written into the journal.
    under_way: Option<i64>,
    /// In the journal alone.
    accepted: VecDeque<Arc<Accepted>>,
    accepted_places: Places,
    /// When the first of them came.
    since: Option<Instant>,
    /// Those that are being brought into the tables, or were, in vain.
    lump: Vec<Arc<Accepted>>,
    lump_places: Places,
    events: usize,
    bytes: usize,
    /// The last record in the tables, and in the journal.
    settled: u64,
    last: u64,
    /// Changes when the numbers of devices may have: one was deleted, or another process has written.
    devices_epoch: u64,
    /// Whether the writer has been called.
    called: bool,
    /// Why the last attempt failed.
    failed: Option<String>,
    /// Why no more ids could be reserved.
    unreserved: Option<String>,
}

impl State {
    /// The lowest id that an event may have that is not in the tables.
    fn lowest_open_id(&self) -> i64 {
        let lump = self.lump.first().or(self.accepted.front());
        lump.map(|accepted| accepted.first_id).or(self.under_way).unwrap_or(self.next_id)
    }

    fn place(&self, key: &(DeviceId, EventId)) -> Option<&Place> {
        self.accepted_places.get(key).or_else(|| self.lump_places.get(key))
    }

    fn accept(&mut self, accepted: Accepted) {
        for (position, id) in accepted.positions.iter().copied().zip(accepted.ids()) {
            let event = &accepted.batch.events[position];
            if let Some(event_id) = &event.event_id {
                let place = Place { id, batch: Arc::clone(&accepted.batch), position };
                self.accepted_places.insert((event.device_id.clone(), event_id.clone()), place);
            }
        }
        self.events += accepted.positions.len();
        self.bytes += accepted.bytes;
        self.last = accepted.number;
        self.since.get_or_insert_with(Instant::now);
        self.accepted.push_back(Arc::new(accepted));
    }

    /// Gives `count` ids that follow each other, and answers the first; `None` when so many are not reserved.
    fn take_ids(&mut self, count: usize) -> Option<i64> {
        let (first, next) = (self.next_id, self.next_id.checked_add(i64::try_from(count).ok()?)?);
        if next - 1 > self.last_reserved_id {
            return None;
        }
        self.next_id = next;
        Some(first)
    }

    fn is_full(&self) -> bool {
        self.events >= MOST_EVENTS || self.bytes >= MOST_BYTES
    }
}

/// What the threads and readers share.
pub(super) struct Intake {
    state: Mutex<State>,
    /// Rings when a lump is in the tables, or could not be brought there.
    ended: Condvar,
    /// How often it has rung.
    endings: watch::Sender<u64>,
    /// Tells ingest what was learnt on the way.
    news: mpsc::UnboundedSender<News>,
    writer: WriterThread,
    database: PathBuf,
}

impl Intake {
    /// Goes on with the journal of the database at `database`, whose writer is `writer`.
    pub(super) async fn start(
        database: &Path,
        writer: WriterThread,
        news: mpsc::UnboundedSender<News>,
    ) -> Result<(Arc<Self>, IntakeWriter), StoreError> {
        let IngestState { journal: found, .. } =
            writer.call(|connection| connection.ingest_state()).await?;
        let (mut journal, records) = Journal::open(database, found)?;
        journal.create_files().map_err(|error| unusable(database, &error))?;
        writer
            .call(|connection| {
                connection.set_journal_in_use(true)?;
                // Whoever copies or mounts the database's file alone must find it there, too.
                connection.checkpoint()
            })
            .await?;
        let keys = open_for_requests(database).map_err(store_error)?;
        keys.pragma_update(None, "query_only", true).map_err(store_error)?;

        let mut state = State { settled: found.applied, last: found.applied, ..State::default() };
        let mut last_id = 0;
        for record in records {
            let accepted = Accepted::from(record);
            last_id = last_id.max(accepted.ids().last().unwrap_or(0));
            state.accept(accepted);
        }
        let reserved =
            writer.call(move |connection| connection.reserve_ids(RESERVED_IDS, last_id)).await?;
        (state.next_id, state.last_reserved_id) = reserved.into_inner();
        let intake = Arc::new(Self {
            state: Mutex::new(state),
            ended: Condvar::new(),
            endings: watch::Sender::new(0),
            news,
            writer: writer.clone(),
            database: database.to_owned(),
        });
        let shared = Arc::clone(&intake);
        let take_in = move |connection: &mut WriteConnection| {
            connection.take_in_through(&shared);
            connection.connection.busy_timeout(SERVING_BUSY_TIMEOUT)
        };
        writer.call(take_in).await?;

        let (requests, waiting) = sync_channel(BATCHES_SENT_OFF);
        let desk = Desk {
            intake: Arc::clone(&intake),
            journal,
            keys,
            devices: HashMap::new(),
            devices_epoch: 0,
        };
        writer
            .threads()
            .start("sqlite-journal", move || desk.work(&waiting))
            .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
        let writer =
            IntakeWriter { intake: Arc::clone(&intake), requests, replies: VecDeque::new() };
        Ok((intake, writer))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns once everything that is acknowledged by now is in the tables, or an attempt to bring it there
    /// has failed: then whoever reads does not see what is in the journal alone.
    pub(super) async fn settled(self: &Arc<Self>) {
        let mut endings = self.endings.subscribe();
        let wanted = self.state().last;
        loop {
            endings.mark_unchanged();
            {
                let mut state = self.state();
                if state.settled >= wanted || state.failed.is_some() {
                    return;
                }
                self.call_writer(&mut state);
            }
            // The sender lives as long as `self`.
            let _ = endings.changed().await;
        }
    }

    /// Has the writer bring what is in the journal into the tables, if it has not been called already.
    fn call_writer(self: &Arc<Self>, state: &mut State) {
        if state.called {
            return;
        }
        let intake = Arc::clone(self);
        let call: Call = Box::new(move |connection| {
            intake.state().called = false;
            // Whoever waits is told.
            let _ = intake.settle(connection);
        });
        // Someone else has work for it; it is called again.
        state.called = self.writer.try_send(call);
    }

    /// Brings everything into the tables that is in the journal by now.
    pub(super) fn settle(&self, connection: &mut WriteConnection) -> rusqlite::Result<()> {
        let wanted = self.state().last;
        while let Some(lump) = self.take_lump(wanted) {
            let result = store_lump(connection, &lump, |news| {
                // Nobody listens any more when the server stops.
                let _ = self.news.send(news);
            });
            let result = result.map_err(|error| ids::explain(&connection.connection, error));
            self.end_lump(lump, result.as_ref().err());
            result?;
        }
        let left = {
            let state = self.state();
            state.last_reserved_id - state.next_id + 1
        };
        if left < FEWEST_RESERVED_IDS { self.reserve_ids(connection) } else { Ok(()) }
    }

    /// Reserves more ids. They follow those that are left, unless somebody else has taken ids meanwhile.
    fn reserve_ids(&self, connection: &mut WriteConnection) -> rusqlite::Result<()> {
        let Some((first, last)) = self.more_ids(connection)? else { return Ok(()) };
        let mut state = self.state();
        if first != state.last_reserved_id + 1 {
            state.next_id = first;
        }
        state.last_reserved_id = last;
        Ok(())
    }

    /// Sees to it that the next event's id is above all ids in the tables, so that what is in them can be
    /// folded.
    pub(super) fn pass_other_writers(
        &self,
        connection: &mut WriteConnection,
    ) -> rusqlite::Result<()> {
        let highest = connection.highest_id()?;
        if highest < self.state().next_id {
            return Ok(());
        }
        // Somebody else has taken ids above ours, or without asking from among them.
        if let Some((first, last)) = self.more_ids(connection)? {
            let mut state = self.state();
            (state.next_id, state.last_reserved_id) = (first, last);
        }
        Ok(())
    }

    /// Reserves more ids; `None` when there are no more. Then those that are left are given, which nothing speaks
    /// against, and no event is acknowledged after them.
    fn more_ids(&self, connection: &mut WriteConnection) -> rusqlite::Result<Option<(i64, i64)>> {
        let reserved = connection.reserve_ids(RESERVED_IDS, 0);
        let why = reserved.as_ref().err().filter(|error| ids::are_used_up(error));
        let why = why.map(ToString::to_string);
        let mut state = self.state();
        if let Some(error) = &why
            && state.unreserved.is_none()
        {
            let left = state.last_reserved_id - state.next_id + 1;
            tracing::error!(error, left, "events will be answered 503 once no ids are left");
        }
        state.unreserved = why;
        if state.unreserved.is_some() {
            return Ok(None);
        }
        drop(state);
        reserved.map(|ids| Some(ids.into_inner()))
    }

    /// The ids that were reserved and never given. Nobody may take any more.
    pub(super) fn unused_ids(&self) -> std::ops::RangeInclusive<i64> {
        let state = self.state();
        state.next_id..=state.last_reserved_id
    }

    /// What is to be brought into the tables next, until the record `wanted` is.
    fn take_lump(&self, wanted: u64) -> Option<Vec<Arc<Accepted>>> {
        let mut state = self.state();
        let state = &mut *state;
        if state.settled >= wanted {
            state.failed = None;
            return None;
        }
        if state.lump.is_empty() {
            state.lump.extend(state.accepted.drain(..));
            std::mem::swap(&mut state.lump_places, &mut state.accepted_places);
            state.since = None;
        }
        Some(state.lump.clone())
    }

    fn end_lump(&self, lump: Vec<Arc<Accepted>>, error: Option<&rusqlite::Error>) {
        let mut state = self.state();
        let done = match error {
            None => {
                state.failed = None;
                state.settled = lump.last().map_or(state.settled, |accepted| accepted.number);
                state.events -= lump.iter().map(|one| one.positions.len()).sum::<usize>();
                state.bytes -= lump.iter().map(|one| one.bytes).sum::<usize>();
                Some((std::mem::take(&mut state.lump), std::mem::take(&mut state.lump_places)))
            }
            Some(error) => {
                state.failed = Some(error.to_string());
                // When to try again.
                state.since = Some(Instant::now());
                None
            }
        };
        drop(state);
        self.ended.notify_all();
        self.endings.send_modify(|endings| *endings += 1);
        // Thousands of events are not dropped while others wait for the state.
        drop((done, lump));
    }

    /// All events that are going to be stored by the server, and are not, have at least this id.
    pub(super) fn lowest_open_id(&self) -> i64 {
        self.state().lowest_open_id()
    }

    /// Numbers of devices may not be what they were.
    pub(super) fn forget_devices(&self) {
        self.state().devices_epoch += 1;
    }

    /// Gives `count` ids to events that don't go through the journal; answers the first.
    pub(super) fn take_ids(&self, count: usize) -> Option<i64> {
        self.state().take_ids(count)
    }

    /// Removes the journal once nothing is in it alone. Nobody may write any more.
    pub(super) fn remove_journal(&self) -> Result<(), StoreError> {
        let state = self.state();
        if let Some(error) = &state.failed {
            return Err(StoreError::Unavailable(error.clone()));
        }
        journal::remove(&self.database).map_err(|error| unusable(&self.database, &error))
    }
}

/// Brings what a server has left in the journal of the database at `database` into its tables, and removes the
/// journal. The server must not run.
pub(super) fn recover(database: &Path) -> Result<(), StoreError> {
    let mut connection = WriteConnection::open(database)?;
    if !connection.has_current_ingest_state().map_err(store_error)? {
        return Err(StoreError::Failed(format!(
            "the last events that were acknowledged for {} are still in its ingest journal, and its tables are those of an older version; run `pisync migrate up` first",
            database.display()
        )));
    }
    let state = connection.ingest_state().map_err(store_error)?;
    let (_, records) = Journal::open(database, state.journal)?;
    let lump: Vec<_> = records.into_iter().map(|record| Arc::new(Accepted::from(record))).collect();
    store_lump(&mut connection, &lump, |_| ()).map_err(store_error)?;
    connection.set_journal_in_use(false).map_err(store_error)?;
    journal::remove(database).map_err(|error| unusable(database, &error))
}

/// The number of the journal's last record. A server may be writing it.
pub(super) fn last_record(
    connection: &mut WriteConnection,
    database: &Path,
) -> Result<u64, StoreError> {
    let journal = connection.ingest_state().map_err(store_error)?.journal;
    let survey = Survey::read(database, journal).map_err(|error| unusable(database, &error))?;
    Ok(survey.last_number().max(journal.applied))
}

pub(super) fn unusable(database: &Path, error: &std::io::Error) -> StoreError {
    StoreError::Failed(format!(
        "cannot use the ingest journal beside {}: {error}",
        database.display()
    ))
}

/// Stores a lump in one transaction, and passes on what is learnt. What the tables refuse is looked for among
/// its events and left out: what they could refuse has been refused at the door, so this is for the
/// unforeseen.
fn store_lump(
    connection: &mut WriteConnection,
    lump: &[Arc<Accepted>],
    mut tell: impl FnMut(News),
) -> rusqlite::Result<()> {
    // What an attempt before this one has stored, which may have been interrupted anywhere.
    let IngestState { journal, settled_events } = connection.ingest_state()?;
    let done = lump.iter().take_while(|accepted| accepted.number <= journal.applied).count();
    let lump = &lump[done..];
    let mut store = |connection: &mut WriteConnection, lump: &[_], events| {
        let news = store_together(connection, lump, events)?;
        if !news.new_devices.is_empty() || !news.streaks.is_empty() {
            tell(news);
        }
        Ok(())
    };
    match store(connection, lump, settled_events..usize::MAX) {
        Err(error) if refuses_data(&error) => {}
        other => return other,
    }
    let mut first = settled_events;
    for accepted in lump {
        let one = std::slice::from_ref(accepted);
        match store(connection, one, first..usize::MAX) {
            Err(error) if refuses_data(&error) => {}
            other => {
                other?;
                first = 0;
                continue;
            }
        }
        for (index, position) in accepted.positions.iter().enumerate().skip(first) {
            match store(connection, one, index..index + 1) {
                Err(error) if refuses_data(&error) => {
                    keep_aside(connection.path(), &accepted.batch, *position, &error);
                    settle_through(&connection.connection, accepted.through(index + 1))?;
                }
                other => other?,
            }
        }
        first = 0;
    }
    Ok(())
}

/// Keeps an event that was acknowledged and that the tables refuse, in a file from which it can be imported
/// once the reason is gone.
fn keep_aside(database: &Path, batch: &Batch, position: usize, refused: &dyn std::fmt::Display) {
    let path = beside(database, REFUSED_EVENTS);
    let line = import_line(batch, position);
    let file = path.display();
    match append_lines(&path, std::slice::from_ref(&line)) {
        Ok(()) => tracing::error!(
            error = %refused,
            device_id = %batch.events[position].device_id,
            %file,
            "the database refuses an event that was acknowledged; it is kept in a file, for `pisync import`"
        ),
        Err(error) => tracing::error!(
            error = %refused,
            event = %line,
            %file,
            "the database refuses an event that was acknowledged, and it cannot be kept: {error}"
        ),
    }
}

/// Keeps events that were found in a damaged stretch of the journal in a file, as `pisync import` reads it, and
/// answers where. Nobody knows whether they are as they were, nor when they were received.
pub(super) fn keep_doubtful(
    database: &Path,
    events: Vec<SyncEvent>,
) -> Result<PathBuf, StoreError> {
    let path = beside(database, DOUBTFUL_EVENTS);
    let batch = Batch::new(Timestamp::MIN, events);
    let lines: Vec<_> = (0..batch.events.len())
        .map(|position| {
            let mut line = import_line(&batch, position);
            if let Some(fields) = line.as_object_mut() {
                fields.remove("created_at");
            }
            line
        })
        .collect();
    append_lines(&path, &lines)
        .map_err(|error| StoreError::Failed(format!("cannot write {}: {error}", path.display())))?;
    Ok(path)
}

/// Puts lines at the end of a file, which is made when it is missing, and on the disk.
fn append_lines(path: &Path, lines: &[Value]) -> std::io::Result<()> {
    let mut file = permissions::append(path, PRIVATE)?;
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// An event as `pisync import` reads it.
#[expect(clippy::cast_precision_loss, reason = "at most 35 bits")]
fn import_line(batch: &Batch, position: usize) -> Value {
    let event = &batch.events[position];
    json!({
        "device_id": event.device_id.as_str(),
        "event_id": event.event_id.as_ref().map(EventId::as_str),
        "timestamp": event.timestamp,
        "total_files_synced": event.total_files_synced,
        "total_errors": event.total_errors,
        "internet_speed": event.internet_speed.map(|speed| speed.hundredths() as f64 / 100.0),
        "job": event.job.as_ref().map(JobName::as_str),
        "duration_seconds": event.duration.map(|took| took.milliseconds() as f64 / 1000.0),
        "bytes_synced": event.bytes_synced,
        "metadata": event.metadata.as_ref().map(Metadata::to_raw_value),
        "created_at": batch.received_at(position),
    })
}

/// Stores a lump in one transaction; of its first batch only the events with these indexes.
fn store_together(
    connection: &mut WriteConnection,
    lump: &[Arc<Accepted>],
    events: Range<usize>,
) -> rusqlite::Result<News> {
    let (Some(first), Some(last)) = (lump.first(), lump.last()) else {
        return Ok(News::default());
    };
    let count = lump.iter().map(|accepted| accepted.positions.len()).sum();
    let mut batch = Batch::new(last.batch.received, Vec::with_capacity(count));
    let mut ids = Vec::with_capacity(count);
    for accepted in lump {
        let is_first = Arc::ptr_eq(accepted, first);
        for (index, (position, id)) in accepted.positions.iter().zip(accepted.ids()).enumerate() {
            if !is_first || events.contains(&index) {
                batch.events.push(accepted.batch.events[*position].clone());
                batch.receipts.push(accepted.batch.received_at(*position));
                ids.push(id);
            }
        }
    }
    let through = if lump.len() == 1 { last.through(events.end) } else { last.through(usize::MAX) };
    let written = connection.store(&batch, Some(&Journaled { ids, through }))?;
    // Its event_id was free when it was acknowledged.
    for duplicate in &written.duplicates {
        let event = &batch.events[duplicate.position];
        if duplicate.first.as_ref().is_some_and(|first| !first.differences(event).is_empty()) {
            const TAKEN: &str =
                "another program has stored another event of this device under the same event_id";
            keep_aside(connection.path(), &batch, duplicate.position, &TAKEN);
        }
    }
    Ok(News { new_devices: written.new_devices, streaks: written.streaks })
}

type Reply = oneshot::Sender<Result<Written, StoreError>>;

/// Ingest's way to the journal.
pub(super) struct IntakeWriter {
    intake: Arc<Intake>,
    requests: SyncSender<(Arc<Batch>, Reply)>,
    /// Of batches that have been sent off, the oldest first.
    replies: VecDeque<oneshot::Receiver<Result<Written, StoreError>>>,
}

#[async_trait]
impl EventWriter for IntakeWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        self.intake.writer.presence().check()?;
        let (reply, result) = oneshot::channel();
        // None is under way, so there is room.
        self.requests.send((Arc::clone(batch), reply)).map_err(|_| StoreError::Stopped)?;
        result.await.map_err(|_| StoreError::Stopped)?
    }

    fn send(&mut self, batch: &Arc<Batch>) -> bool {
        if self.intake.writer.presence().is_lost() {
            return false;
        }
        let (reply, result) = oneshot::channel();
        let has_room = self.requests.try_send((Arc::clone(batch), reply)).is_ok();
        if has_room {
            self.replies.push_back(result);
        }
        has_room
    }

    async fn sent(&mut self) -> Option<Written> {
        let result = self.replies.front_mut()?.await;
        self.replies.pop_front();
        result.ok()?.ok()
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.intake
            .writer
            .call(|connection| {
                connection.settle()?;
                connection.probe()
            })
            .await
    }

    async fn finish(&mut self) -> Result<(), StoreError> {
        self.intake.writer.call(WriteConnection::settle).await
    }
}

/// The thread that acknowledges events.
struct Desk {
    intake: Arc<Intake>,
    journal: Journal,
    /// For looking up event ids in the tables.
    keys: Connection,
    /// The numbers of devices there, as of `devices_epoch`.
    devices: HashMap<DeviceId, i64>,
    devices_epoch: u64,
}

impl Desk {
    fn work(mut self, requests: &Receiver<(Arc<Batch>, Reply)>) {
        loop {
            let since = self.intake.state().since;
            let request = match since {
                None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(since) => requests.recv_timeout(LUMP_TIME.saturating_sub(since.elapsed())),
            };
            match request {
                Ok((batch, reply)) => {
                    // Whoever waited may have gone away; the batch is stored all the same.
                    let _ = reply.send(self.accept(batch));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let mut state = self.intake.state();
            let is_due = state.since.is_some_and(|since| since.elapsed() >= LUMP_TIME);
            if is_due || state.events >= LUMP_EVENTS {
                self.intake.call_writer(&mut state);
                if is_due {
                    // Not again before that may be over.
                    state.since = Some(Instant::now());
                }
            }
        }
    }

    fn accept(&mut self, batch: Arc<Batch>) -> Result<Written, StoreError> {
        self.wait_for_room()?;
        let repeats = batch.repeats();
        let known = self.find_known(&batch, &repeats).map_err(store_error)?;
        let new = batch.events.len() - repeats.len() - known.len();
        let (first_id, settled) = {
            let mut state = self.intake.state();
            let Some(first_id) = state.take_ids(new) else {
                // More are reserved when events are brought into the tables.
                self.intake.call_writer(&mut state);
                let why = state.unreserved.clone();
                let why = why.unwrap_or_else(|| "no ids are reserved for events".into());
                return Err(StoreError::Unavailable(why));
            };
            state.under_way = Some(first_id);
            (first_id, state.settled)
        };

        let mut next_id = first_id;
        let mut ids = Vec::with_capacity(batch.events.len());
        let mut positions = Vec::with_capacity(new);
        let mut duplicates = Vec::new();
        for position in 0..batch.events.len() {
            // Whatever the first of its name in the batch is found to be, this one is too.
            let namesake = repeats.get(&position).copied().unwrap_or(position);
            let (id, first) = if let Some(known) = known.get(&namesake) {
                known.clone()
            } else if namesake < position {
                (ids[namesake], Some(batch.stored_event(namesake, ids[namesake])))
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
            self.journal.append(first_id, batch.received, events, settled).map(Some)
        };
        let mut state = self.intake.state();
        state.under_way = None;
        match appended {
            Ok(None) => {}
            Ok(Some((number, bytes))) => {
                state.accept(Accepted { number, first_id, batch, positions, bytes });
            }
            Err(error) => {
                if state.next_id == next_id {
                    // Nobody has had one after them.
                    state.next_id = first_id;
                }
                let why = format!("the ingest journal cannot be written: {error}");
                return Err(StoreError::Unavailable(why));
            }
        }
        Ok(Written { duplicates, ..Written::new(ids) })
    }

    /// Waits while too much is in the journal alone, and refuses while that cannot be brought further.
    fn wait_for_room(&self) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut state = self.intake.state();
        loop {
            if let Some(why) = &state.failed {
                return Err(StoreError::Unavailable(why.clone()));
            }
            if !state.is_full() {
                return Ok(());
            }
            if began.elapsed() > ROOM_TIMEOUT {
                return Err(StoreError::Unavailable("the database does not keep up".into()));
            }
            self.intake.call_writer(&mut state);
            let waited = self.intake.ended.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The events that were reported before the batch, by position: the first one's id, and that one if it is
    /// still kept. Those that repeat an earlier one of the batch are left out.
    fn find_known(
        &mut self,
        batch: &Batch,
        repeats: &HashMap<usize, usize>,
    ) -> rusqlite::Result<HashMap<usize, (i64, Option<StoredEvent>)>> {
        let mut known = HashMap::new();
        // First among those that are not in the tables, then in the tables: what leaves the one meanwhile
        // is found in the other.
        let mut unplaced = Vec::new();
        {
            let state = self.intake.state();
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
                    Some(Place { id, batch, position: at }) => {
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
