//! Surveys the files of an ingest journal, whatever has happened to them. It finds complete records at any position,
//! and stretches that are no record. Opening, salvage and `pisync journal` call it. It changes nothing.

use std::{
    fmt, fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use pisync_core::SyncEvent;

use super::{
    place::{GROWTH_BYTES, JournalState, paths},
    record::{self, Found, Record},
};
use crate::store::{JournalFileReport, JournalReport, JournalStretch, StoreError};

/// The contents of both files.
#[derive(Debug)]
pub(in super::super) struct Survey {
    pub(super) database: PathBuf,
    /// What the tables say about the journal.
    pub(super) state: JournalState,
    pub(in super::super) files: [FileSurvey; 2],
}

/// The contents of one file.
#[derive(Debug)]
pub(in super::super) struct FileSurvey {
    pub(in super::super) path: PathBuf,
    pub(in super::super) exists: bool,
    /// The file's length.
    pub(in super::super) bytes: u64,
    /// Complete records, in the order of their positions.
    pub(in super::super) records: Vec<Placed>,
    /// Stretches that are neither a record nor all zeros. They include the remains of older, longer records.
    pub(in super::super) other: Vec<Range<usize>>,
    /// Complete records of another database.
    pub(in super::super) foreign: usize,
    /// The version of a record that this program cannot read.
    pub(in super::super) newer: Option<u16>,
    contents: Vec<u8>,
}

/// A record and its position.
#[derive(Debug)]
pub(in super::super) struct Placed {
    pub(in super::super) at: Range<usize>,
    pub(in super::super) record: Record,
}

/// Acknowledged records that are missing.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Damage {
    /// The numbers of the missing records, as ranges.
    pub(in super::super) missing: Vec<Range<u64>>,
    /// Stretches of the files that are no record and stand before a later record.
    pub(in super::super) places: Vec<(PathBuf, Range<usize>)>,
    /// Files that were changed by something other than a crash: cut off, or overwritten from their beginning.
    pub(in super::super) spoilt: Vec<PathBuf>,
    /// Files that a server had when it ended, and that are missing now or hold nothing of it.
    pub(in super::super) gone: Vec<PathBuf>,
}

impl Survey {
    /// Reads the journal of the database at `database`. `state` is what the database's tables say. Changes nothing.
    pub(in super::super) fn read(database: &Path, state: JournalState) -> io::Result<Self> {
        let [first, second] = paths(database);
        let read = |path| FileSurvey::read(path, state.identity);
        Ok(Self { database: database.to_owned(), state, files: [read(first)?, read(second)?] })
    }

    /// The highest number of a record; 0 when there is none.
    pub(in super::super) fn last_number(&self) -> u64 {
        self.records().map(|record| record.number).max().unwrap_or(0)
    }

    /// The complete records that are not in the tables, in order.
    pub(in super::super) fn into_unapplied(self) -> Vec<Record> {
        let applied = self.state.applied;
        let records = self.files.into_iter().flat_map(|file| file.records);
        let mut records: Vec<_> =
            records.map(|placed| placed.record).filter(|record| record.number > applied).collect();
        records.sort_by_key(|record| record.number);
        // An interrupted salvage leaves some records in both files.
        records.dedup_by_key(|record| record.number);
        records
    }

    /// The contents, for a person to read.
    pub(in super::super) fn report(&self) -> JournalReport {
        let applied = self.state.applied;
        let files = self.files.iter().filter(|file| file.exists);
        JournalReport {
            applied,
            files: files.map(|file| file.report(applied)).collect(),
            unapplied_events: self
                .records()
                .filter(|record| record.number > applied)
                .map(|record| record.events.len())
                .sum(),
            damage: self.damage().map(|damage| damage.to_string()),
            newer_version: self.newer_version(),
        }
    }

    fn records(&self) -> impl Iterator<Item = &Record> {
        self.files.iter().flat_map(|file| &file.records).map(|placed| &placed.record)
    }

    /// Which records outside the tables are missing, and where they may have been.
    pub(in super::super) fn damage(&self) -> Option<Damage> {
        let applied = self.state.applied;
        let mut there: Vec<_> = self.records().map(Record::numbers).collect();
        there.sort_unstable_by_key(|numbers| *numbers.start());
        let mut missing = Vec::new();
        let mut expected = applied + 1;
        for numbers in there {
            if *numbers.start() > expected {
                missing.push(expected..*numbers.start());
            }
            expected = expected.max(numbers.end() + 1);
        }
        let paths_of = |is_wrong: &dyn Fn(&FileSurvey) -> bool| -> Vec<PathBuf> {
            let wrong = self.files.iter().filter(|file| is_wrong(file));
            wrong.map(|file| file.path.clone()).collect()
        };
        let spoilt = paths_of(&FileSurvey::is_spoilt);
        let gone = paths_of(&|file| self.state.in_use && file.is_empty());
        if missing.is_empty() && spoilt.is_empty() && gone.is_empty() {
            return None;
        }
        let mut places = Vec::new();
        for file in &self.files {
            let unapplied = |placed: &&Placed| placed.record.number > applied;
            let Some(last) = file.records.iter().rfind(unapplied) else { continue };
            let before = file.other.iter().filter(|place| place.end <= last.at.start);
            places.extend(before.map(|place| (file.path.clone(), place.clone())));
        }
        Some(Damage { missing, places, spoilt, gone })
    }

    /// Checks that everything that was acknowledged and is not in the tables can be read.
    ///
    /// # Errors
    /// When it cannot; the message says what to do.
    pub(in super::super) fn check(&self) -> Result<(), StoreError> {
        if let Some(version) = self.newer_version() {
            return Err(StoreError::Failed(format!(
                "the ingest journal beside {} has events in format {version}, which this version of PiSync cannot read; start the newer version and stop it properly, then go on with this one",
                self.database.display()
            )));
        }
        match self.damage() {
            None => Ok(()),
            Some(damage) => Err(StoreError::Failed(format!(
                "the ingest journal beside {} is damaged: {damage}; nothing was changed. `pisync journal inspect` shows what is left, and `pisync journal salvage` stores it and keeps the damaged files",
                self.database.display()
            ))),
        }
    }

    /// The events in the damaged stretches, as far as they can be read.
    pub(super) fn doubtful_events(&self, damage: &Damage) -> Vec<SyncEvent> {
        let of_file = |(path, place): &(PathBuf, Range<usize>)| {
            let file = self.files.iter().find(|file| file.path == *path);
            file.map(|file| file.legible_events(place)).unwrap_or_default()
        };
        damage.places.iter().flat_map(of_file).collect()
    }

    /// The version of records that are too new for this program.
    pub(in super::super) fn newer_version(&self) -> Option<u16> {
        self.files.iter().find_map(|file| file.newer)
    }
}

impl FileSurvey {
    fn read(path: PathBuf, identity: i64) -> io::Result<Self> {
        let (exists, contents) = match fs::read(&path) {
            Ok(contents) => (true, contents),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (false, Vec::new()),
            Err(error) => return Err(error),
        };
        let mut file = Self {
            path,
            exists,
            bytes: contents.len() as u64,
            records: Vec::new(),
            other: Vec::new(),
            foreign: 0,
            newer: None,
            contents,
        };
        file.find_records(identity);
        Ok(file)
    }

    fn find_records(&mut self, identity: i64) {
        let mut contents = std::mem::take(&mut self.contents);
        // A file is filled with zeros before it is written. A mark for lost records may end with some zeros.
        let filled = contents.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        contents.truncate(filled + record::HEADER_BYTES);
        // The start of the stretch that has been no record so far.
        let (mut at, mut begun) = (0, 0);
        while let Some(place) = record::next_candidate(&contents, at) {
            let length = match record::decode(&contents[place..], identity) {
                Found::Record(record, length) => {
                    self.records.push(Placed { at: place..place + length, record });
                    length
                }
                Found::Foreign(length) => {
                    self.foreign += 1;
                    length
                }
                Found::Newer { version } => {
                    self.newer = Some(version);
                    at = place + 1;
                    continue;
                }
                Found::Nothing => {
                    at = place + 1;
                    continue;
                }
            };
            self.note_other(&contents, begun..place);
            at = place + length;
            begun = at;
        }
        self.note_other(&contents, begun..contents.len());
        self.contents = contents;
    }

    fn note_other(&mut self, contents: &[u8], place: Range<usize>) {
        if contents[place.clone()].iter().any(|byte| *byte != 0) {
            self.other.push(place);
        }
    }

    fn report(&self, applied: u64) -> JournalFileReport {
        let mut records: Vec<JournalStretch> = Vec::new();
        let mut applied_records = 0;
        for Placed { at, record } in &self.records {
            if record.number <= applied {
                applied_records += usize::from(!record.events.is_empty());
                continue;
            }
            match records.last_mut() {
                Some(stretch)
                    if stretch.last + 1 == record.number && stretch.bytes.end == at.start =>
                {
                    stretch.last = record.number;
                    stretch.events += record.events.len();
                    stretch.bytes.end = at.end;
                }
                _ => records.push(JournalStretch {
                    first: record.number,
                    last: record.number,
                    events: record.events.len(),
                    bytes: at.clone(),
                }),
            }
        }
        JournalFileReport {
            path: self.path.clone(),
            bytes: self.bytes,
            records,
            applied_records,
            foreign_records: self.foreign,
            other: self.other.clone(),
        }
    }

    /// Whether the file has neither a record of this database nor the beginning of one. A server that has the file open
    /// never leaves it like that.
    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty() && (self.foreign > 0 || !record::is_begun(&self.contents))
    }

    /// Whether the file is as the server of this or another database has created it, before the first record.
    fn is_new(&self) -> bool {
        self.records.len() + self.foreign == 1
            && record::is_begun(&self.contents)
            && self.contents.iter().skip(record::HEADER_BYTES).all(|byte| *byte == 0)
    }

    /// Whether the file holds something, but nothing of this database.
    pub(super) fn is_strange(&self) -> bool {
        self.records.is_empty() && (self.foreign > 0 || !self.other.is_empty())
    }

    /// The position of the next record, and the number of the last one.
    pub(super) fn end(&self) -> (u64, u64) {
        let last = self.records.iter().max_by_key(|placed| placed.record.number);
        last.map_or((0, 0), |placed| (placed.at.end as u64, placed.record.number))
    }

    /// Whether something other than a crash has changed the file. A crash leaves complete records and at most one
    /// incomplete record. The incomplete one is in a part that was filled with zeros before. The file begins with a
    /// mark or with zeros.
    fn is_spoilt(&self) -> bool {
        let length = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let step = usize::try_from(GROWTH_BYTES).unwrap_or(usize::MAX);
        let grown = length - length % step;
        let is_cut = self.contents.iter().skip(grown).any(|byte| *byte != 0) && !self.is_new();
        let is_garbage = self.is_empty()
            && self.foreign == 0
            && self.contents.iter().take(record::HEADER_BYTES).any(|byte| *byte != 0);
        is_cut || is_garbage
    }

    /// The length of an incomplete record behind the last complete one, which a power cut has interrupted.
    pub(super) fn torn_tail(&self) -> Option<usize> {
        let end = usize::try_from(self.end().0).ok()?;
        let behind = self.contents.get(end..)?;
        let is_whole = self.records.iter().any(|placed| placed.at.start == end);
        (record::is_begun(behind) && !is_whole)
            .then(|| behind.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1))
    }

    /// The events in a stretch that is no complete record, as far as they can be read.
    fn legible_events(&self, place: &Range<usize>) -> Vec<SyncEvent> {
        self.contents.get(place.clone()).map(record::legible_events).unwrap_or_default()
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let records: Vec<String> = self
            .missing
            .iter()
            .map(|numbers| match numbers.end - numbers.start {
                1 => numbers.start.to_string(),
                _ => format!("{} to {}", numbers.start, numbers.end - 1),
            })
            .collect();
        let noun = match self.missing.as_slice() {
            [numbers] if numbers.end - numbers.start == 1 => "record",
            _ => "records",
        };
        if records.is_empty() {
            write!(formatter, "acknowledged events may be missing")?;
        } else {
            write!(formatter, "acknowledged events are missing ({noun} {})", records.join(", "))?;
        }
        for path in &self.gone {
            let how = if path.exists() { "was emptied or replaced" } else { "is gone" };
            write!(formatter, ", and {} {how}", path.display())?;
        }
        for path in &self.spoilt {
            write!(formatter, ", and {} was cut off or written over", path.display())?;
        }
        for (path, place) in &self.places {
            write!(
                formatter,
                ", and bytes {} to {} of {} are no record",
                place.start,
                place.end - 1,
                path.display()
            )?;
        }
        Ok(())
    }
}
