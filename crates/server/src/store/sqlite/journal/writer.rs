//! Writes the journal: records are appended to one of its two files. The journal appender calls it. `append` must not
//! return before the record is on the disk.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use pisync_core::{SyncEvent, Timestamp};

use super::{
    place::{GROWTH_BYTES, JournalState, set_aside, unusable},
    record::{self, Record},
    survey::{FileSurvey, Survey},
};
use crate::{
    permissions::{self, PRIVATE},
    store::{StoreError, sqlite::paths::sync_folder},
};

/// A file of this length is full. Writing then switches to the other file, as soon as that one is free.
pub(super) const FILE_BYTES: u64 = 4 << 20;

/// A database's journal. There is one per database. Only the process that has claimed the database writes it.
#[derive(Debug)]
pub(in super::super) struct Journal {
    /// The column `ingest_state.journal`.
    identity: i64,
    pub(super) files: [JournalFile; 2],
    /// The index of the file that is being written.
    current: usize,
    last_number: u64,
    /// Whether the next record overwrites one whose write failed. That record may be on the disk all the same.
    retries: bool,
    record: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct JournalFile {
    path: PathBuf,
    /// Opened or created when it is first needed.
    pub(super) file: Option<File>,
    /// The file's length.
    bytes: u64,
    /// The position of the next record.
    pub(super) end: u64,
    /// The last record's number; 0 before the first record.
    last_number: u64,
    /// Whether the file begins with a record or a mark. A file in use without one counts as emptied.
    is_marked: bool,
}

impl Journal {
    /// Opens the journal of the database at `database`. `state` is what the database's tables say. Answers the records
    /// that are not in the tables, in order.
    ///
    /// # Errors
    /// When acknowledged records are missing or damaged, or were written by a newer version. The message says what to
    /// do, and nothing is changed.
    pub(in super::super) fn open(
        database: &Path,
        state: JournalState,
    ) -> Result<(Self, Vec<Record>), StoreError> {
        let JournalState { identity, applied, .. } = state;
        let survey = Survey::read(database, state).map_err(|error| unusable(database, &error))?;
        survey.check()?;
        let failed = |error: io::Error| unusable(database, &error);
        let [first, second] = &survey.files;
        let files =
            [JournalFile::open(first).map_err(failed)?, JournalFile::open(second).map_err(failed)?];
        let records = survey.into_unapplied();
        let last_number = records.last().map_or(applied, |record| record.number);
        let current = usize::from(files[1].last_number > files[0].last_number);
        let journal =
            Self { identity, files, current, last_number, retries: false, record: Vec::new() };
        Ok((journal, records))
    }

    /// Creates the missing files, and marks the empty ones. The watch can then notice when a file is gone, and the next
    /// start when one was emptied.
    pub(in super::super) fn create_files(&mut self) -> io::Result<()> {
        for journal in &mut self.files {
            let file = match &journal.file {
                Some(file) => file,
                None => journal.file.insert(create(&journal.path)?),
            };
            if !journal.is_marked {
                record::encode_begun(&mut self.record, self.identity, self.last_number)?;
                file.write_all_at(&self.record, 0)?;
                file.sync_all()?;
                journal.is_marked = true;
            }
        }
        Ok(())
    }

    /// Writes events to the disk, with ids from `first_id` on. Answers their record's number and length. Records up to
    /// `applied` are in the tables, durably.
    ///
    /// # Errors
    /// When the write fails. The next record then overwrites this one. After a crash before that, this record may be
    /// found all the same.
    pub(in super::super) fn append<'a>(
        &mut self,
        first_id: i64,
        received: Timestamp,
        events: impl Iterator<Item = &'a SyncEvent>,
        applied: u64,
    ) -> io::Result<(u64, usize)> {
        let number = self.last_number + 1;
        record::encode(&mut self.record, self.identity, number, first_id, received, events)?;
        let [current, other] = [self.current, 1 - self.current];
        if self.files[current].last_number <= applied {
            self.files[current].end = 0;
        } else if !self.retries
            && self.files[current].end >= FILE_BYTES
            && self.files[other].last_number <= applied
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
    /// Continues a file. A file with nothing of this database is renamed instead of overwritten.
    fn open(found: &FileSurvey) -> io::Result<Self> {
        let path = found.path.clone();
        let none =
            |path| Self { path, file: None, bytes: 0, end: 0, last_number: 0, is_marked: false };
        if !found.exists {
            return Ok(none(path));
        }
        if found.is_strange() {
            let aside = set_aside(&path)?;
            tracing::warn!(
                file = %aside.display(),
                "the ingest journal has no event of this database in it; the file was renamed"
            );
            return Ok(none(path));
        }
        if let Some(bytes) = found.torn_tail() {
            tracing::warn!(
                file = %path.display(),
                bytes,
                "the ingest journal ends with a record that is not whole: either it was interrupted while it was written, and its events were not acknowledged, or the disk has damaged it"
            );
        }
        let file = OpenOptions::new().write(true).open(&path)?;
        let (end, last_number) = found.end();
        // A full disk may have cut its last growth short.
        let bytes = found.bytes - found.bytes % GROWTH_BYTES;
        let is_marked = !found.is_empty();
        Ok(Self { path, file: Some(file), bytes, end, last_number, is_marked })
    }

    fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let end = self.end + record.len() as u64;
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(create(&self.path)?),
        };
        if end > self.bytes {
            let bytes = end.next_multiple_of(GROWTH_BYTES);
            // A new file keeps its mark until the first record overwrites it.
            let from = self.bytes.max(record::HEADER_BYTES as u64);
            let growth = usize::try_from(bytes - from).map_err(io::Error::other)?;
            file.write_all_at(&vec![0; growth], from)?;
            file.sync_all()?;
            self.bytes = bytes;
        }
        file.write_all_at(record, self.end)?;
        file.sync_data()?;
        self.end = end;
        Ok(())
    }
}

/// Creates a file that survives a power cut. Only its owner may read the events.
fn create(path: &Path) -> io::Result<File> {
    match permissions::create_for_server(path, PRIVATE) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).open(path)?;
    sync_folder(path)?;
    Ok(file)
}
