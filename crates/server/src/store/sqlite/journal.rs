//! The ingest journal: two files beside the database in which events are on the disk, in the order of their
//! ids, before they are in its tables.
//!
//! A record is a batch: a header, then each event as a line of JSON. Records are numbered without gaps, and
//! `ingest_state.settled` says which of them are in the tables already; what is left after that one is what a
//! crash has left to do. A file is written from its beginning again once all its records are settled, so old
//! records may follow the newest: they have lower numbers, and reading stops there, as it does at a record
//! that was only half written.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use pisync_core::{DeviceId, EventId, JobName, Mbps, Metadata, SyncDuration, SyncEvent, Timestamp};

/// What the files' names end in.
const ENDINGS: [&str; 2] = [".ingest-1", ".ingest-2"];

/// A file that is as long as this gives way to the other one, as soon as that is free.
const FILE_BYTES: u64 = 4 << 20;

/// A file grows by this much, filled with zeros: syncing what overwrites them changes nothing but data, and
/// costs the disk one write instead of several.
const GROWTH_BYTES: u64 = 1 << 20;

/// Length of what follows the header (4 bytes), checksum (4), number (8), first id (8), when the events were
/// received (8); integers are little-endian.
const HEADER_BYTES: usize = 32;

/// Events that were accepted together.
#[derive(Debug)]
pub(super) struct Record {
    /// One more than that of the record before.
    pub(super) number: u64,
    /// The first event's id; the others follow it.
    pub(super) first_id: i64,
    /// When they were received.
    pub(super) received: Timestamp,
    /// At least one.
    pub(super) events: Vec<SyncEvent>,
}

/// An event in the journal; see [`SyncEvent`] for what the fields are, in the units of the tables.
type Line<Text> = (
    Text,         // device_id
    Option<Text>, // event_id
    i64,          // timestamp
    u32,          // total_files_synced
    u32,          // total_errors
    Option<i64>,  // internet_speed
    Option<Text>, // job
    Option<i64>,  // duration
    Option<u64>,  // bytes_synced
    Option<Text>, // metadata
);

/// See the module. There is one per database, and only whoever has claimed the database writes it.
#[derive(Debug)]
pub(super) struct Journal {
    /// `ingest_state.journal`.
    identity: i64,
    files: [JournalFile; 2],
    /// Which of them is being written.
    current: usize,
    last_number: u64,
    /// Whether the next record takes the place of one that failed, which may be there all the same.
    retries: bool,
    record: Vec<u8>,
}

#[derive(Debug)]
struct JournalFile {
    path: PathBuf,
    /// Made when it is first needed.
    file: Option<File>,
    /// How long it is.
    bytes: u64,
    /// Where the next record goes.
    end: u64,
    /// The last record's number; 0 before the first.
    last_number: u64,
}

impl Journal {
    /// Opens the journal of the database at `database`, whose `ingest_state` says whose journal it is and
    /// how much of it is `settled`. Answers the records that are not, in order.
    pub(super) fn open(
        database: &Path,
        identity: i64,
        settled: u64,
    ) -> io::Result<(Self, Vec<Record>)> {
        let mut records = Vec::new();
        let mut files = paths(database).map(|path| JournalFile {
            path,
            file: None,
            bytes: 0,
            end: 0,
            last_number: 0,
        });
        for file in &mut files {
            let contents = match fs::read(&file.path) {
                Ok(contents) => contents,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            file.file = Some(OpenOptions::new().write(true).open(&file.path)?);
            file.bytes = contents.len() as u64;
            let mut rest = contents.as_slice();
            while let Some((record, length)) = read_record(rest, identity, file.last_number)? {
                file.last_number = record.number;
                rest = &rest[length..];
                if record.number > settled {
                    records.push(record);
                }
            }
            file.end = (contents.len() - rest.len()) as u64;
        }
        records.sort_unstable_by_key(|record| record.number);
        let follows = |(record, number): &(&Record, u64)| record.number == *number;
        let whole = records.iter().zip(settled + 1..).take_while(follows).count();
        if whole < records.len() {
            // Each record was on the disk before the next was begun.
            tracing::error!(
                after = settled + whole as u64,
                next = records[whole].number,
                "records are missing in the ingest journal: the disk has lost acknowledged events"
            );
        }
        let last_number = records.last().map_or(settled, |record| record.number);
        let current = usize::from(files[1].last_number > files[0].last_number);
        let journal =
            Self { identity, files, current, last_number, retries: false, record: Vec::new() };
        Ok((journal, records))
    }

    /// Puts events on the disk, whose ids begin at `first_id`, and answers their record's number and length. Records up
    /// to `settled` are in the tables, and that is on the disk, too.
    ///
    /// # Errors
    /// When that fails: then the next record takes the place of this one. A crash before that may find it
    /// written all the same.
    pub(super) fn append<'a>(
        &mut self,
        first_id: i64,
        received: Timestamp,
        events: impl Iterator<Item = &'a SyncEvent>,
        settled: u64,
    ) -> io::Result<(u64, usize)> {
        let number = self.last_number + 1;
        self.record.clear();
        self.record.extend([0; HEADER_BYTES]);
        for event in events {
            serde_json::to_writer(&mut self.record, &line(event))?;
            self.record.push(b'\n');
        }
        let length = u32::try_from(self.record.len() - HEADER_BYTES).map_err(io::Error::other)?;
        self.record[..4].copy_from_slice(&length.to_le_bytes());
        self.record[8..16].copy_from_slice(&number.to_le_bytes());
        self.record[16..24].copy_from_slice(&first_id.to_le_bytes());
        self.record[24..32].copy_from_slice(&received.as_millisecond().to_le_bytes());
        let checksum = checksum(self.identity, &self.record);
        self.record[4..8].copy_from_slice(&checksum.to_le_bytes());

        let [current, other] = [self.current, 1 - self.current];
        if self.files[current].last_number <= settled {
            self.files[current].end = 0;
        } else if !self.retries
            && self.files[current].end >= FILE_BYTES
            && self.files[other].last_number <= settled
        {
            self.files[other].end = 0;
            self.current = other;
        }
        self.retries = true;
        self.files[self.current].append(&self.record)?;
        self.retries = false;
        self.files[self.current].last_number = number;
        self.last_number = number;
        Ok((number, self.record.len()))
    }
}

impl JournalFile {
    fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let end = self.end + record.len() as u64;
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(create(&self.path)?),
        };
        if end > self.bytes {
            let bytes = end.next_multiple_of(GROWTH_BYTES);
            let growth = usize::try_from(bytes - self.bytes).map_err(io::Error::other)?;
            file.write_all_at(&vec![0; growth], self.bytes)?;
            file.sync_all()?;
            self.bytes = bytes;
        }
        file.write_all_at(record, self.end)?;
        file.sync_data()?;
        self.end = end;
        Ok(())
    }
}

/// Whether the database has a journal: none is left when a server has stopped properly.
pub(super) fn exists(database: &Path) -> bool {
    paths(database).iter().any(|path| path.exists())
}

/// Removes the journal of a database, all of which is settled or to be given up.
pub(super) fn remove(database: &Path) -> io::Result<()> {
    for path in paths(database) {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn paths(database: &Path) -> [PathBuf; 2] {
    ENDINGS.map(|ending| {
        let mut path = database.as_os_str().to_owned();
        path.push(ending);
        path.into()
    })
}

/// Makes a file that is still there after a power cut.
fn create(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(file)
}

/// The record at the beginning of `bytes`, if it is whole and follows the record with the number `last`, and
/// its length.
fn read_record(bytes: &[u8], identity: i64, last: u64) -> io::Result<Option<(Record, usize)>> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let [length, found] = [half_word(header, 0), half_word(header, 4)];
    let length = HEADER_BYTES + length as usize;
    let Some(record) = bytes.get(..length).filter(|_| length > HEADER_BYTES) else {
        return Ok(None);
    };
    let number = word(header, 8);
    if last != 0 && number != last + 1 || checksum(identity, record) != found {
        return Ok(None);
    }
    let lines = serde_json::Deserializer::from_slice(&record[HEADER_BYTES..]).into_iter();
    let events: Option<Vec<_>> = lines.map(|line| line.ok().and_then(event)).collect();
    let received = Timestamp::from_millisecond(word(header, 24).cast_signed());
    match (events, received) {
        (Some(events), Some(received)) => {
            let first_id = word(header, 16).cast_signed();
            Ok(Some((Record { number, first_id, received, events }, length)))
        }
        // It is as it was written, so another version has written it.
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "this version cannot read what another one has acknowledged; start that one, and stop it properly",
        )),
    }
}

/// The four bytes at `at` of a header.
fn half_word(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|index| header[at + index]))
}

/// The eight bytes at `at` of a header.
fn word(header: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| header[at + index]))
}

/// CRC-32 of whose journal it is and of a record, apart from its length and the checksum itself.
fn checksum(identity: i64, record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&identity.to_le_bytes());
    hasher.update(&record[8..]);
    hasher.finalize()
}

fn line(event: &SyncEvent) -> Line<&str> {
    (
        event.device_id.as_str(),
        event.event_id.as_ref().map(EventId::as_str),
        event.timestamp.as_millisecond(),
        event.total_files_synced,
        event.total_errors,
        event.internet_speed.map(Mbps::hundredths),
        event.job.as_ref().map(JobName::as_str),
        event.duration.map(SyncDuration::milliseconds),
        event.bytes_synced,
        event.metadata.as_ref().map(Metadata::as_str),
    )
}

/// What [`line`] has written; `None` for anything else.
fn event(line: Line<String>) -> Option<SyncEvent> {
    /// `None` for a value that is there and cannot be read.
    fn read<T, V>(value: Option<T>, read: impl FnOnce(T) -> Option<V>) -> Option<Option<V>> {
        match value {
            None => Some(None),
            Some(value) => read(value).map(Some),
        }
    }
    let (device_id, event_id, timestamp, files, errors, speed, job, duration, bytes, metadata) =
        line;
    Some(SyncEvent {
        device_id: DeviceId::new(&device_id).ok()?,
        event_id: read(event_id, |text| EventId::new(&text).ok())?,
        timestamp: Timestamp::from_millisecond(timestamp)?,
        total_files_synced: files,
        total_errors: errors,
        internet_speed: read(speed, Mbps::from_hundredths)?,
        job: read(job, |text| JobName::new(&text).ok())?,
        duration: read(duration, SyncDuration::from_milliseconds)?,
        bytes_synced: bytes,
        metadata: read(metadata, |text| Metadata::kept(&text).ok())?,
    })
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const IDENTITY: i64 = -7;

    struct Place {
        _folder: TempDir,
        database: PathBuf,
    }

    impl Place {
        fn make() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let database = folder.path().join("test.db");
            Self { _folder: folder, database }
        }

        fn open(&self, settled: u64) -> (Journal, Vec<Record>) {
            Journal::open(&self.database, IDENTITY, settled).unwrap()
        }

        /// The numbers of the records that are found.
        fn found(&self, settled: u64) -> Vec<u64> {
            self.open(settled).1.iter().map(|record| record.number).collect()
        }

        fn path(&self, file: usize) -> PathBuf {
            paths(&self.database)[file].clone()
        }
    }

    fn time(millisecond: i64) -> Timestamp {
        Timestamp::from_millisecond(millisecond).unwrap()
    }

    fn plain() -> SyncEvent {
        SyncEvent {
            device_id: DeviceId::new("pi").unwrap(),
            event_id: None,
            timestamp: time(-1),
            total_files_synced: 0,
            total_errors: 0,
            internet_speed: None,
            job: None,
            duration: None,
            bytes_synced: None,
            metadata: None,
        }
    }

    fn full() -> SyncEvent {
        SyncEvent {
            device_id: DeviceId::new("Gerät \"1\"").unwrap(),
            event_id: Some(EventId::new("run-1").unwrap()),
            timestamp: time(1_795_348_800_123),
            total_files_synced: i32::MAX.unsigned_abs(),
            total_errors: 1,
            internet_speed: Mbps::from_hundredths(9_999_999_999),
            job: Some(JobName::new("nightly\\backup").unwrap()),
            duration: SyncDuration::from_milliseconds(31_536_000_000),
            bytes_synced: Some((1 << 53) - 1),
            metadata: Some(Metadata::new("{ \"a\":\n\"\\u0000\"}").unwrap()),
        }
    }

    /// Appends one event of about so many bytes.
    fn append(journal: &mut Journal, bytes: usize, settled: u64) -> u64 {
        let text = format!("{{\"x\":\"{}\"}}", "x".repeat(bytes.min(4_000)));
        let event = SyncEvent { metadata: Some(Metadata::new(&text).unwrap()), ..plain() };
        let count = (bytes / 4_000).max(1);
        let events = std::iter::repeat_n(&event, count);
        journal.append(1, time(0), events, settled).unwrap().0
    }

    #[test]
    fn events_come_back_as_they_were() {
        let place = Place::make();
        let (mut journal, none) = place.open(0);
        assert!(none.is_empty() && !exists(&place.database));
        journal.append(5, time(7), [plain(), full()].iter(), 0).unwrap();
        journal.append(7, time(8), [full()].iter(), 0).unwrap();
        let (mut journal, found) = place.open(0);
        let what = |record: &Record| (record.number, record.first_id, record.received);
        assert_eq!(found.iter().map(what).collect::<Vec<_>>(), [(1, 5, time(7)), (2, 7, time(8))]);
        assert_eq!(found[0].events, [plain(), full()]);
        assert_eq!(found[1].events, [full()]);
        // It goes on where it was.
        assert_eq!(append(&mut journal, 1, 0), 3);
        assert_eq!(place.found(0), [1, 2, 3]);
        assert_eq!(place.found(2), [3]);
        remove(&place.database).unwrap();
        assert!(!exists(&place.database));
        remove(&place.database).unwrap();
    }

    #[test]
    fn a_record_that_is_not_whole_ends_it() {
        let place = Place::make();
        let (mut journal, _) = place.open(0);
        append(&mut journal, 100, 0);
        let first = journal.files[0].end;
        append(&mut journal, 100, 0);
        let contents = fs::read(place.path(0)).unwrap();
        let end = usize::try_from(journal.files[0].end).unwrap();
        for broken in (usize::try_from(first).unwrap()..end).step_by(7) {
            let mut torn = contents.clone();
            torn[broken..end].fill(0);
            fs::write(place.path(0), &torn).unwrap();
            assert_eq!(place.found(0), [1], "{broken}");
            torn.truncate(broken);
            fs::write(place.path(0), &torn).unwrap();
            assert_eq!(place.found(0), [1], "{broken}");
        }
        // The next record takes its place.
        let (mut journal, _) = place.open(0);
        assert_eq!(append(&mut journal, 10, 0), 2);
        assert_eq!(place.found(0), [1, 2]);
    }

    #[test]
    fn another_databases_journal_is_none() {
        let place = Place::make();
        append(&mut place.open(0).0, 1, 0);
        assert!(Journal::open(&place.database, IDENTITY + 1, 0).unwrap().1.is_empty());
    }

    #[test]
    fn what_is_settled_is_written_over() {
        let place = Place::make();
        let (mut journal, _) = place.open(0);
        for number in 1..=3 {
            assert_eq!(append(&mut journal, 1_000 * number, 0), number as u64);
        }
        // Longer and shorter than what was there.
        assert_eq!(append(&mut journal, 1_500, 3), 4);
        assert_eq!(place.found(3), [4]);
        assert_eq!(append(&mut journal, 1, 3), 5);
        assert_eq!(place.found(3), [4, 5]);
        assert_eq!(append(&mut journal, 1, 5), 6);
        assert_eq!(place.found(5), [6]);
        assert_eq!(fs::metadata(place.path(0)).unwrap().len(), GROWTH_BYTES);
        assert!(!place.path(1).exists());
    }

    #[test]
    fn the_files_take_turns() {
        let place = Place::make();
        let (mut journal, _) = place.open(0);
        let large = usize::try_from(FILE_BYTES).unwrap() / 4;
        let mut settled = 0;
        for number in 1..=60 {
            assert_eq!(append(&mut journal, large, settled), number);
            assert_eq!(place.found(settled), (settled + 1..=number).collect::<Vec<_>>());
            // Never all of it.
            settled = number.saturating_sub(3);
        }
        for file in 0..2 {
            let bytes = fs::metadata(place.path(file)).unwrap().len();
            assert!((FILE_BYTES..3 * FILE_BYTES).contains(&bytes), "{bytes}");
        }
        // While nothing is settled, the file grows.
        for number in 61..=90 {
            assert_eq!(append(&mut journal, large, settled), number);
        }
        assert_eq!(place.found(settled), (settled + 1..=90).collect::<Vec<_>>());
    }

    #[test]
    fn one_that_failed_is_followed_by_another_in_its_place() {
        let place = Place::make();
        let (mut journal, _) = place.open(0);
        let large = usize::try_from(FILE_BYTES).unwrap();
        append(&mut journal, large, 0);
        append(&mut journal, large, 0);
        // As if the disk had refused: the file is open for reading alone.
        let file = journal.files[1].file.replace(File::open(place.path(1)).unwrap());
        let event = plain();
        journal.append(9, time(0), std::iter::once(&event), 0).unwrap_err();
        journal.files[1].file = file;
        // Not into the other file, although that is free now: what failed might be found in this one.
        let length = journal.files[1].end;
        assert_eq!(append(&mut journal, 1, 1), 3);
        assert!(journal.files[1].end > length);
        assert_eq!(place.found(1), [2, 3]);
        assert_eq!(append(&mut journal, 1, 1), 4);
        assert!(journal.files[0].end < length);
        assert_eq!(place.found(1), [2, 3, 4]);
    }

    #[test]
    fn what_cannot_be_read_is_not_passed_over() {
        let place = Place::make();
        let (mut journal, _) = place.open(0);
        append(&mut journal, 1, 0);
        let mut contents = fs::read(place.path(0)).unwrap();
        let end = usize::try_from(journal.files[0].end).unwrap();
        contents[HEADER_BYTES] = b'{';
        let sum = checksum(IDENTITY, &contents[..end]).to_le_bytes();
        contents[4..8].copy_from_slice(&sum);
        fs::write(place.path(0), contents).unwrap();
        let error = Journal::open(&place.database, IDENTITY, 0).unwrap_err();
        assert!(error.to_string().contains("another one has acknowledged"), "{error}");
    }
}
