//! Writing the journal: records are appended to one of its two files, and are on the disk when that returns.

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

/// A file that is as long as this is left for the other one, as soon as that is free.
pub(super) const FILE_BYTES: u64 = 4 << 20;

/// A database's journal. There is one per database, and only whoever has claimed the database writes it.
#[derive(Debug)]
pub(in super::super) struct Journal {
    /// `ingest_state.journal`.
    identity: i64,
    pub(super) files: [JournalFile; 2],
    /// Which of them is being written.
    current: usize,
    last_number: u64,
    /// Whether the next record takes the place of one that failed, which may be there all the same.
    retries: bool,
    record: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct JournalFile {
    path: PathBuf,
    /// Made when it is first needed.
    pub(super) file: Option<File>,
    /// How long it is.
    bytes: u64,
    /// Where the next record goes.
    pub(super) end: u64,
    /// The last record's number; 0 before the first.
    last_number: u64,
    /// Whether it begins with a record or a mark, without which a file in use counts as emptied.
    is_marked: bool,
}

impl Journal {
    /// Opens the journal of the database at `database`, whose tables say `state`. Answers the records that are not
    /// in the tables, in order.
    ///
    /// # Errors
    /// When acknowledged records are missing or damaged, or were written by a newer version: the message says
    /// what to do, and nothing is changed.
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

    /// Makes the files that are not there, and marks those that are empty. Whoever watches them can then tell when one
    /// is gone, and the next start when one was emptied.
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

    /// Puts events on the disk, whose ids begin at `first_id`, and answers their record's number and length.
    /// Records up to `applied` are in the tables, and that is on the disk, too.
    ///
    /// # Errors
    /// When that fails: then the next record takes the place of this one. A crash before that may find it
    /// written all the same.
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
    /// Goes on with a file. One in which nothing is this database's is renamed rather than written over.
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
        // A full disk may have kept it from growing by as much as it should.
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
            // A new file keeps its mark until the first record takes its place.
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

/// Makes a file that is still there after a power cut. Events are nobody else's to read.
fn create(path: &Path) -> io::Result<File> {
    match permissions::create_for_server(path, PRIVATE) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).open(path)?;
    sync_folder(path)?;
    Ok(file)
}
