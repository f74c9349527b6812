//! Imports events that were exported, logged or kept elsewhere. The command line calls it, also beside running servers.
//! A thread reads and checks records while the batch before them is stored. Progress is stored in the same transaction
//! as the events. An interrupted import therefore continues where it stopped, and must not store any record twice.

mod csv;
mod input;
mod records;
mod rejected;
mod resume;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use pisync_core::{Arrival, ParseError, ReceivedEvent, Timestamp, Violation, ViolationCode};
use tokio::sync::mpsc;

pub use self::{csv::ColumnNames, input::Source, records::Format};
use self::{
    records::Record,
    rejected::{Rejected, RejectedFile},
    resume::Rest,
};
use crate::{
    clock::Clock,
    maintenance::database_time,
    store::{
        Batch, Digest, EventWriter, ImportProgress, ImportStep, Store, StoreError,
        TrustedTimeStore, Written,
    },
    threads::Threads,
};

/// Records in one transaction. They take some 20 ms, which servers that write meanwhile hardly notice. Larger
/// transactions gain little.
const STEP_RECORDS: usize = 1_000;

/// The maximum length of the text of these records together, in bytes.
const STEP_BYTES: usize = 4 << 20;

/// Steps that are read ahead. With one, reading and storing go on at the same time. The other makes up for a slow
/// commit.
const STEPS_AHEAD: usize = 2;

/// How far this machine's clock may be ahead of PostgreSQL's, in milliseconds: an hour.
const LARGEST_LEAD: i64 = 60 * 60 * 1000;

/// How long to wait for a database that is away.
const PATIENCE: Duration = Duration::from_secs(15);

/// How often to try within that time.
const RETRY: Duration = Duration::from_millis(500);

/// Why an import has ended early, in words for the user.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ImportError(String);

/// What to import.
#[derive(Debug)]
pub struct Import {
    /// The input.
    pub source: Source,
    /// How records follow each other. With `None`, the beginning of the input decides.
    pub format: Option<Format>,
    /// The file for rejected records.
    pub rejected: PathBuf,
    /// Whether to import the input once more, although it was imported already.
    pub again: bool,
    /// How far an event's date may be ahead of its `received_at`.
    pub max_clock_skew_seconds: u32,
    /// A random id for this import, unless it continues another one.
    pub id: Digest,
}

/// How far an import has come.
#[derive(Debug, Default)]
pub struct Status {
    /// Bytes of the input that were read, before decompression.
    pub bytes: u64,
    /// Records that earlier imports have taken; this one continues after them.
    pub passed: u64,
    /// Events that were stored.
    pub stored: u64,
    /// Events that were stored before under the same event id.
    pub duplicates: u64,
    /// Duplicates that differ from what is stored under their event id.
    pub conflicting: u64,
    /// Records that are not valid events.
    pub rejected: u64,
    /// Records in the file of rejected records: those of this import, and of earlier ones if their file is still there.
    pub rejected_in_file: u64,
    /// Records that were read. Each was stored, is a duplicate or was rejected.
    pub records: u64,
    /// Whether the input ends in the middle of a record, which is then rejected. Once the input is complete, the same
    /// import continues with that record.
    pub is_cut_off: bool,
    /// The earlier import that this one continues, if any.
    pub resumed: Option<ImportProgress>,
    /// Unusual names of CSV columns.
    pub column_names: ColumnNames,
}

impl Status {
    /// Records that earlier runs of this import have rejected. They are still not stored.
    #[must_use]
    pub fn rejected_before(&self) -> u64 {
        self.resumed.as_ref().map_or(0, |before| before.rejected)
    }

    /// The error that ended an import, with a count of the records before it.
    fn after(&self, error: ImportError) -> ImportError {
        let taken = self.stored + self.duplicates + self.rejected;
        if taken == 0 {
            return error;
        }
        let Self { stored, duplicates, rejected, .. } = self;
        ImportError(format!(
            "{error}; of the {taken} records before, {stored} are imported, {duplicates} were there already, {rejected} were rejected"
        ))
    }
}

/// The first message of the reading thread.
struct Beginning {
    resumed: Option<ImportProgress>,
    column_names: ColumnNames,
}

/// Records that were read and checked.
#[derive(Default)]
struct Step {
    events: Vec<ReceivedEvent>,
    rejected: Vec<Rejected>,
    /// How many records were taken so far; the digests identify them.
    records: u64,
    digest: Digest,
    head: Digest,
    /// Whether nothing follows.
    is_last: bool,
    /// Whether the last rejected record is cut off by the end of the input. It does not count among the records taken,
    /// because the complete record will differ.
    is_cut_off: bool,
}

enum Message {
    Beginning(Beginning),
    Step(Step),
}

impl Import {
    /// Imports into `store`. `watch` is called after every step. `must_yield` tells whether this import must yield the
    /// database to others between two steps.
    ///
    /// # Errors
    /// What is wrong with the input, the database or the file of rejected records. Steps that were stored stay, and the
    /// same import continues after them.
    pub async fn run(
        self,
        store: &dyn Store,
        clock: &Clock,
        mut must_yield: impl FnMut() -> bool,
        mut watch: impl FnMut(&Status),
    ) -> Result<Status, ImportError> {
        check_clock(store, clock).await?;
        let mut imports = store.imports().await.map_err(|error| ImportError(error.to_string()))?;
        let known: Arc<[Digest]> = imports.iter().map(|import| import.id).collect();
        if self.again {
            imports.retain(|import| !import.finished);
        }
        let taken = Arc::new(AtomicU64::new(0));
        let import = Arc::new(self);
        let mut messages = read_ahead(&import, imports, clock, &taken)?;
        let mut status = Status::default();
        let mut rejected_file = None;
        let mut writer = store.event_writer();
        let (mut before, mut is_read) = (None, false);
        while let Some(message) = messages.recv().await {
            status.bytes = taken.load(Ordering::Relaxed);
            match message.map_err(|error| status.after(error))? {
                Message::Beginning(beginning) => {
                    status.passed = beginning.resumed.as_ref().map_or(0, |resumed| resumed.records);
                    before =
                        beginning.resumed.as_ref().map(|resumed| (resumed.records, resumed.digest));
                    status.resumed = beginning.resumed;
                    status.column_names = beginning.column_names;
                    let file = RejectedFile::open(import.rejected.clone(), status.passed)?;
                    status.rejected_in_file = file.records();
                    rejected_file = Some(file);
                    watch(&status);
                }
                Message::Step(step) => {
                    is_read = step.is_last;
                    if let Some(file) = &mut rejected_file {
                        file.add(&step.rejected)?;
                        status.rejected_in_file = file.records();
                    }
                    let started = Instant::now();
                    import
                        .store(&mut *writer, step, &mut before, &known, clock, &mut status)
                        .await?;
                    watch(&status);
                    if must_yield() {
                        // The pause is as long as the others had to wait. They get their turn within a few of our
                        // steps.
                        tokio::time::sleep(started.elapsed()).await;
                    }
                }
            }
        }
        if !is_read {
            // The reading thread has panicked.
            let early = "the thread that reads has ended before the end of the input: this is a fault of PiSync, please report it; the same command goes on after what is stored";
            return Err(status.after(ImportError(early.to_owned())));
        }
        let Status { records, stored, duplicates, rejected, .. } = status;
        if records != stored + duplicates + rejected {
            return Err(ImportError(format!(
                "{records} records were read, but {stored} imported, {duplicates} there already and {rejected} rejected: this is a fault of PiSync, please report it"
            )));
        }
        Ok(status)
    }

    /// Stores one step behind `before`, and then advances `before`; see [`ImportStep`].
    async fn store(
        &self,
        writer: &mut dyn EventWriter,
        step: Step,
        before: &mut Option<(u64, Digest)>,
        known: &Arc<[Digest]>,
        clock: &Clock,
        status: &mut Status,
    ) -> Result<(), ImportError> {
        let cut_off = u64::from(step.is_cut_off);
        status.records = step.records - status.passed + cut_off;
        status.is_cut_off = step.is_cut_off;
        status.rejected += step.rejected.len() as u64;
        let is_new = step.records > status.passed;
        if !is_new && status.resumed.as_ref().is_some_and(|resumed| resumed.finished) {
            return Ok(());
        }
        let (resumed, after) = (status.resumed.as_ref(), (step.records, step.digest));
        let progress = ImportProgress {
            id: resumed.map_or(self.id, |resumed| resumed.id),
            name: self.source.name(),
            head: step.head,
            records: step.records,
            digest: step.digest,
            rejected: status.rejected_before() + status.rejected - cut_off,
            finished: step.is_last && !step.is_cut_off,
            at: clock.now(),
        };
        let import = ImportStep { progress, before: *before, known: Arc::clone(known) };
        let received = clock.now();
        let received_at = received_at(&step.events, received);
        let events: Vec<_> = step.events.into_iter().map(|event| event.event).collect();
        let count = events.len() as u64;
        let batch =
            Arc::new(Batch { received_at, import: Some(import), ..Batch::new(received, events) });
        let written = write(writer, &batch).await.map_err(|error| {
            ImportError(format!(
                "cannot store the records up to {}: {error}; those before them are stored, and the same command goes on after them",
                after.0
            ))
        })?;
        let duplicates = written.duplicates.len() as u64;
        status.duplicates += duplicates;
        status.conflicting += written.conflicts(&batch).count() as u64;
        status.stored += count - duplicates;
        *before = Some(after);
        Ok(())
    }

    /// Reads and checks the input to its end.
    fn read(
        &self,
        imports: &[ImportProgress],
        clock: &Clock,
        taken: &Arc<AtomicU64>,
        messages: &mpsc::Sender<Result<Message, ImportError>>,
    ) -> Result<(), ImportError> {
        #[cfg(test)]
        assert!(self.source.name() != tests::BREAKS_THE_READER, "the reader is broken");
        let mut rest = Rest::open(&self.source, self.format, imports, taken)?;
        let beginning =
            Beginning { resumed: rest.resumed.clone(), column_names: rest.column_names().clone() };
        let mut message = Message::Beginning(beginning);
        loop {
            let is_last = matches!(&message, Message::Step(step) if step.is_last);
            // A receiver that is gone has met an error, and reports it.
            if messages.blocking_send(Ok(message)).is_err() || is_last {
                return Ok(());
            }
            let mut step = Step::default();
            let result = self.read_step(&mut rest, clock, &mut step);
            step.records = rest.fingerprint.records;
            (step.digest, step.head) = (rest.fingerprint.digest(), rest.fingerprint.head());
            if result.is_err() && !(step.events.is_empty() && step.rejected.is_empty()) {
                // The records before the broken place are imported.
                let _ = messages.blocking_send(Ok(Message::Step(step)));
                return result;
            }
            result?;
            message = Message::Step(step);
        }
    }

    /// Reads and checks some records, up to a broken place of the input.
    fn read_step(
        &self,
        rest: &mut Rest,
        clock: &Clock,
        step: &mut Step,
    ) -> Result<(), ImportError> {
        let received = clock.now();
        let skew = i64::from(self.max_clock_skew_seconds) * 1000;
        let arrival = Arrival { received, latest: received.saturating_add_milliseconds(skew) };
        let mut bytes = 0;
        while step.events.len() + step.rejected.len() < STEP_RECORDS && bytes < STEP_BYTES {
            let Some(record) = rest.next()? else {
                step.is_last = true;
                break;
            };
            bytes += record.text.len();
            let checked = check(&record, arrival);
            if checked.is_err() && record.may_be_cut_off {
                (step.is_last, step.is_cut_off) = (true, true);
            } else {
                rest.take(&record);
            }
            match checked {
                Ok(event) => step.events.push(event),
                Err(details) => {
                    let text = String::from_utf8_lossy(&record.text).into_owned();
                    let number = rest.fingerprint.records + u64::from(step.is_cut_off);
                    step.rejected.push(Rejected {
                        record: number,
                        details,
                        text,
                        text_is_truncated: record.is_truncated,
                    });
                }
            }
            if step.is_last {
                break;
            }
        }
        Ok(())
    }
}

/// Checks that this machine's clock is good enough for an import. With a wrong clock, events would be dated wrong, or
/// rejected because of a date in the future.
///
/// # Errors
/// When the clock is not set, or is far ahead of PostgreSQL's.
pub async fn check_clock(store: &dyn TrustedTimeStore, clock: &Clock) -> Result<(), ImportError> {
    let now = clock.check().map_err(|error| ImportError(error.to_string()))?;
    let database = database_time(store, clock).await;
    match database.map_err(|error| ImportError(error.to_string()))? {
        Some(database) => check_clocks(now, database),
        None => Ok(()),
    }
}

/// Refuses when this machine's clock is so far ahead of the database's that one of the two must be wrong.
fn check_clocks(own: Timestamp, database: Timestamp) -> Result<(), ImportError> {
    let ahead = own.as_millisecond() - database.as_millisecond();
    if ahead <= LARGEST_LEAD {
        return Ok(());
    }
    Err(ImportError(format!(
        "this machine's clock says {own}, and PostgreSQL's {database}; set the one that is wrong, or events are dated wrong"
    )))
}

/// Starts the thread that reads. It ends with the input, or when the receiver is gone.
fn read_ahead(
    import: &Arc<Import>,
    imports: Vec<ImportProgress>,
    clock: &Clock,
    taken: &Arc<AtomicU64>,
) -> Result<mpsc::Receiver<Result<Message, ImportError>>, ImportError> {
    let (sender, messages) = mpsc::channel(STEPS_AHEAD);
    let (import, clock, taken) = (Arc::clone(import), clock.clone(), Arc::clone(taken));
    Threads::new()
        .start("import", move || {
            if let Err(error) = import.read(&imports, &clock, &taken, &sender) {
                let _ = sender.blocking_send(Err(error));
            }
        })
        .map_err(|error| ImportError(format!("cannot start a thread: {error}")))?;
    Ok(messages)
}

/// The event in a record, or what is wrong with it.
fn check(record: &Record, arrival: Arrival) -> Result<ReceivedEvent, Vec<Violation>> {
    if let Some(problem) = &record.problem {
        let message = format!("the record {problem}");
        return Err(vec![Violation::worded("", ViolationCode::Format, message, None)]);
    }
    ReceivedEvent::from_json(&record.text, arrival).map_err(|error| match error {
        ParseError::Invalid(violations) => violations,
        ParseError::Malformed(where_) => {
            let message = format!("Malformed JSON: {where_}");
            vec![Violation::worded("", ViolationCode::MalformedJson, message, None)]
        }
    })
}

/// When each event was received; empty when all events arrive now.
fn received_at(
    events: &[ReceivedEvent],
    received: pisync_core::Timestamp,
) -> Vec<pisync_core::Timestamp> {
    if events.iter().all(|event| event.created_at.is_none()) {
        return Vec::new();
    }
    events.iter().map(|event| event.created_at.unwrap_or(received)).collect()
}

/// Writes a batch; waits while the database is away.
async fn write(writer: &mut dyn EventWriter, batch: &Arc<Batch>) -> Result<Written, StoreError> {
    let started = Instant::now();
    loop {
        match writer.write(batch).await {
            Err(
                StoreError::Unavailable(_)
                | StoreError::Transient(_)
                | StoreError::OutcomeUnknown(_),
            ) if started.elapsed() < PATIENCE => {
                tokio::time::sleep(RETRY).await;
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name of an input that makes the reading thread panic.
    pub(super) const BREAKS_THE_READER: &str = "breaks-the-reader";

    #[tokio::test]
    async fn a_reader_that_panics_ends_the_import_with_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let target = crate::store::Target::Sqlite(folder.path().join("pisync.db"));
        let clock = Clock::system();
        let migrator = crate::store::migrations::Migrator::new(&target, "/nonexistent".as_ref());
        migrator.await.unwrap().up(clock.now()).await.unwrap();
        let store = crate::store::open(&target).await.unwrap();
        let import = Import {
            source: Source::File(BREAKS_THE_READER.into()),
            format: None,
            rejected: folder.path().join("rejected"),
            again: false,
            max_clock_skew_seconds: 0,
            id: [0; 32],
        };
        let ended = import.run(&*store, &clock, || false, |_| ()).await;
        let error = ended.unwrap_err().to_string();
        assert!(error.contains("ended before the end of the input"), "{error}");
    }

    #[test]
    fn a_clock_far_ahead_of_the_databases_is_refused() {
        let at =
            |millisecond| Timestamp::from_millisecond(1_795_348_800_000 + millisecond).unwrap();
        for behind in [-400 * 24 * LARGEST_LEAD, 0, LARGEST_LEAD] {
            assert!(check_clocks(at(behind), at(0)).is_ok(), "{behind}");
        }
        let error = check_clocks(at(LARGEST_LEAD + 1), at(0)).unwrap_err().to_string();
        assert!(error.contains("PostgreSQL's 2026-11-22T12:00:00.000Z"), "{error}");
    }
}
