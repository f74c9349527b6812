//! Tests of what the journal gives back, whatever has happened to its files. Files are cut, flipped, emptied, exchanged
//! and removed. No acknowledged record may be dropped without a message.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
};

use pisync_core::{DeviceId, EventId, JobName, Mbps, Metadata, SyncDuration, SyncEvent, Timestamp};
use tempfile::TempDir;

use super::{
    place::{GROWTH_BYTES, paths},
    salvage::Salvaged,
    writer::FILE_BYTES,
    *,
};

const IDENTITY: i64 = -7;

fn state(identity: i64, applied: u64) -> JournalState {
    JournalState { identity, applied, in_use: false }
}

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

    fn open(&self, applied: u64) -> (Journal, Vec<Record>) {
        Journal::open(&self.database, state(IDENTITY, applied)).unwrap()
    }

    /// The error of opening the journal.
    fn refusal(&self, applied: u64) -> String {
        Journal::open(&self.database, state(IDENTITY, applied)).unwrap_err().to_string()
    }

    /// The numbers of the records that are found.
    fn found(&self, applied: u64) -> Vec<u64> {
        self.open(applied).1.iter().map(|record| record.number).collect()
    }

    fn path(&self, file: usize) -> PathBuf {
        paths(&self.database)[file].clone()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.database.parent().unwrap()).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries.map(|entry| name(entry).into_string().unwrap()).collect();
        names.sort_unstable();
        names
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

/// Appends one event of about this many bytes.
fn append(journal: &mut Journal, bytes: usize, applied: u64) -> u64 {
    let text = format!("{{\"x\":\"{}\"}}", "x".repeat(bytes.min(4_000)));
    let event = SyncEvent { metadata: Some(Metadata::new(&text).unwrap()), ..plain() };
    let count = (bytes / 4_000).max(1);
    let events = std::iter::repeat_n(&event, count);
    journal.append(1, time(0), events, applied).unwrap().0
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
    // Writing continues at the same position.
    assert_eq!(append(&mut journal, 1, 0), 3);
    assert_eq!(place.found(0), [1, 2, 3]);
    assert_eq!(place.found(2), [3]);
    remove(&place.database).unwrap();
    assert!(!exists(&place.database));
    remove(&place.database).unwrap();
}

/// A power cut leaves an incomplete record with none behind it. Such a record was not acknowledged.
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
        // A crash does not make a file shorter.
        torn.truncate(broken);
        fs::write(place.path(0), &torn).unwrap();
        assert!(place.refusal(0).contains("was cut off"), "{broken}");
        torn.resize(contents.len(), 0);
        fs::write(place.path(0), &torn).unwrap();
    }
    // The next record overwrites it.
    let (mut journal, _) = place.open(0);
    assert_eq!(append(&mut journal, 10, 0), 2);
    assert_eq!(place.found(0), [1, 2]);
}

/// Whichever bit is flipped or whichever part is cut out, the records behind it are not dropped without a message.
#[test]
fn damage_before_a_whole_record_stops_the_start() {
    for version in [1, record::VERSION] {
        let place = Place::make();
        let mut ends = Vec::new();
        if version == 1 {
            let mut contents = Vec::new();
            for number in 1..=4 {
                contents.extend(record::encode_1(IDENTITY, number, 1, time(0), &[full()]));
                ends.push(contents.len());
            }
            contents.resize(1 << 20, 0);
            fs::write(place.path(0), contents).unwrap();
        } else {
            let (mut journal, _) = place.open(0);
            for _ in 0..4 {
                journal.append(1, time(0), std::iter::once(&full()), 0).unwrap();
                ends.push(usize::try_from(journal.files[0].end).unwrap());
            }
        }
        assert_eq!(place.found(0), [1, 2, 3, 4]);
        let contents = fs::read(place.path(0)).unwrap();
        for bit in (0..ends[2] * 8).step_by(53) {
            let mut flipped = contents.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(place.path(0), &flipped).unwrap();
            let number = ends.iter().position(|end| bit / 8 < *end).unwrap() + 1;
            let said = place.refusal(0);
            let missing = format!("acknowledged events are missing (record {number})");
            assert!(said.contains(&missing) && said.contains("salvage"), "{bit}: {said}");
            // Records that are in the tables already may be damaged.
            assert_eq!(place.found(3), [4], "{bit}");
        }
        for end in (1..ends[2]).step_by(29) {
            let cut = [&contents[end..], &vec![0; end]].concat();
            fs::write(place.path(0), &cut).unwrap();
            let begin = ends.iter().position(|one| *one >= end).unwrap();
            assert!(place.refusal(0).contains("are missing"), "{end}");
            assert_eq!(place.found(begin as u64 + 1).len(), 3 - begin, "{end}");
        }
        // A file that is gone.
        fs::remove_file(place.path(0)).unwrap();
        let rest = [&contents[ends[1]..], &vec![0; ends[1]]].concat();
        fs::write(place.path(1), rest).unwrap();
        assert!(place.refusal(0).contains("are missing (records 1 to 2)"));
    }
}

#[test]
fn salvage_keeps_what_is_whole_and_says_what_is_not() {
    let place = Place::make();
    let (mut journal, _) = place.open(0);
    let mut ends = Vec::new();
    for number in 0..5 {
        journal.append(1 + 2 * number, time(0), [full(), plain()].iter(), 0).unwrap();
        ends.push(usize::try_from(journal.files[0].end).unwrap());
    }
    let whole = salvage(&place.database, state(IDENTITY, 0)).unwrap().result;
    assert!(whole.damage.is_none() && whole.events == 10 && whole.kept.is_empty());
    let mut contents = fs::read(place.path(0)).unwrap();
    contents[ends[1] - 3] ^= 4;
    contents[ends[2] - 3] = b'{';
    fs::write(place.path(0), &contents).unwrap();
    let Salvaged { result: salvaged, doubtful } =
        salvage(&place.database, state(IDENTITY, 0)).unwrap();
    assert!(salvaged.damage.unwrap().contains("are missing (records 2 to 3)"));
    assert_eq!((salvaged.events, salvaged.kept.len()), (6, 1));
    // One of each that is damaged, and the other as it may have been.
    assert_eq!(doubtful, [full(), full()]);
    assert_eq!(fs::read(&salvaged.kept[0]).unwrap(), contents);
    let (mut journal, found) = place.open(0);
    let events = |record: &Record| (record.number, record.first_id, record.events.len());
    assert_eq!(
        found.iter().map(events).collect::<Vec<_>>(),
        [(1, 1, 2), (3, 2, 0), (4, 7, 2), (5, 9, 2)]
    );
    // The mark continues to stand for the lost records.
    append(&mut journal, 1, 0);
    assert_eq!(place.found(0), [1, 3, 4, 5, 6]);
    let again = salvage(&place.database, state(IDENTITY, 0)).unwrap().result;
    assert!(again.damage.is_none());
    // It was killed before the second file was removed.
    let rest = [&contents[ends[2]..], &vec![0; ends[2]]].concat();
    fs::write(place.path(1), rest).unwrap();
    assert_eq!(place.found(0), [1, 3, 4, 5, 6]);
}

#[test]
fn what_version_1_wrote_is_read() {
    let place = Place::make();
    let mut contents = record::encode_1(IDENTITY, 8, 5, time(7), &[plain(), full()]);
    contents.extend(record::encode_1(IDENTITY, 9, 7, time(8), &[full()]));
    contents.resize(1 << 20, 0);
    fs::write(place.path(1), contents).unwrap();
    let (mut journal, found) = place.open(7);
    assert_eq!(found[0].events, [plain(), full()]);
    assert_eq!((found[1].number, found[1].first_id, found[1].received), (9, 7, time(8)));
    // Both versions in one file.
    assert_eq!(append(&mut journal, 1, 7), 10);
    assert_eq!(place.found(7), [8, 9, 10]);
}

#[test]
fn another_databases_journal_is_not_written_over() {
    let place = Place::make();
    append(&mut place.open(0).0, 1, 0);
    let (mut journal, records) = Journal::open(&place.database, state(IDENTITY + 1, 0)).unwrap();
    assert!(records.is_empty());
    journal.append(1, time(0), std::iter::once(&plain()), 0).unwrap();
    assert_eq!(place.names(), ["test.db.ingest-1", "test.db.ingest-1.aside-1"]);
    // A file without any mark was not a journal.
    let mut garbage = b"what is this?".to_vec();
    garbage.resize(1 << 20, 0);
    fs::write(place.path(1), garbage).unwrap();
    let said = Journal::open(&place.database, state(IDENTITY + 1, 0)).unwrap_err().to_string();
    assert!(said.contains("may be missing") && said.contains("written over"), "{said}");
    salvage(&place.database, state(IDENTITY + 1, 0)).unwrap();
    Journal::open(&place.database, state(IDENTITY + 1, 0)).unwrap();
}

#[test]
fn what_is_applied_is_written_over() {
    let place = Place::make();
    let (mut journal, _) = place.open(0);
    for number in 1..=3 {
        assert_eq!(append(&mut journal, 1_000 * number, 0), number as u64);
    }
    // Longer and shorter than the record before.
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
    let mut applied = 0;
    for number in 1..=60 {
        assert_eq!(append(&mut journal, large, applied), number);
        assert_eq!(place.found(applied), (applied + 1..=number).collect::<Vec<_>>());
        // Never the entire record.
        applied = number.saturating_sub(3);
    }
    for file in 0..2 {
        let bytes = fs::metadata(place.path(file)).unwrap().len();
        assert!((FILE_BYTES..3 * FILE_BYTES).contains(&bytes), "{bytes}");
    }
    // While nothing is applied, the file grows.
    for number in 61..=90 {
        assert_eq!(append(&mut journal, large, applied), number);
    }
    assert_eq!(place.found(applied), (applied + 1..=90).collect::<Vec<_>>());
}

#[test]
fn one_that_failed_is_followed_by_another_in_its_place() {
    let place = Place::make();
    let (mut journal, _) = place.open(0);
    let large = usize::try_from(FILE_BYTES).unwrap();
    append(&mut journal, large, 0);
    append(&mut journal, large, 0);
    // As if the disk had refused the write: the file is open only for reading.
    let file = journal.files[1].file.replace(File::open(place.path(1)).unwrap());
    let event = plain();
    journal.append(9, time(0), std::iter::once(&event), 0).unwrap_err();
    journal.files[1].file = file;
    // The retry does not use the other file, although that is free now. The failed record might be found in this file.
    let length = journal.files[1].end;
    assert_eq!(append(&mut journal, 1, 1), 3);
    assert!(journal.files[1].end > length);
    assert_eq!(place.found(1), [2, 3]);
    assert_eq!(append(&mut journal, 1, 1), 4);
    assert!(journal.files[0].end < length);
    assert_eq!(place.found(1), [2, 3, 4]);
}

/// A complete record that cannot be read: it is as it was written, so a newer version has written it.
#[test]
fn what_a_newer_version_wrote_is_not_passed_over() {
    let place = Place::make();
    let (mut journal, _) = place.open(0);
    append(&mut journal, 1, 0);
    append(&mut journal, 1, 0);
    let contents = fs::read(place.path(0)).unwrap();
    let end = usize::try_from(journal.files[0].end).unwrap() / 2;
    for (at, byte) in [(4, 3), (record::HEADER_BYTES, b'{')] {
        let mut newer = contents.clone();
        newer[at] = byte;
        let checksum = record::checksum(&newer[..end]).to_le_bytes();
        newer[12..16].copy_from_slice(&checksum);
        fs::write(place.path(0), newer).unwrap();
        let said = place.refusal(0);
        assert!(said.contains("start the newer version"), "{said}");
        assert!(salvage(&place.database, state(IDENTITY, 0)).is_err());
    }
}
