//! What `pisync journal` says of a journal.

use std::{ops::Range, path::PathBuf};

/// What is in an ingest journal.
#[derive(Debug)]
pub struct JournalReport {
    /// The last record that is in the tables.
    pub applied: u64,
    /// Its files that exist.
    pub files: Vec<JournalFileReport>,
    /// Acknowledged events that are in the journal alone and can be read.
    pub unapplied_events: usize,
    /// What is missing, in words; `None` when nothing is.
    pub damage: Option<String>,
    /// In which format there are records that this version cannot read.
    pub newer_version: Option<u16>,
}

/// What is in one file of an ingest journal.
#[derive(Debug)]
pub struct JournalFileReport {
    /// The file.
    pub path: PathBuf,
    /// How long it is.
    pub bytes: u64,
    /// Stretches of whole records that are not in the tables: the first and last record's number, how many events
    /// they hold, and the bytes of the file where they stand.
    pub records: Vec<JournalStretch>,
    /// How many whole records are in the tables already.
    pub applied_records: usize,
    /// Whole records of another database.
    pub foreign_records: usize,
    /// Stretches that are no record and not empty. What was written before, and is in the tables, leaves such
    /// remains.
    pub other: Vec<Range<usize>>,
}

/// Records that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalStretch {
    /// The first one's number.
    pub first: u64,
    /// The last one's number.
    pub last: u64,
    /// How many events they hold.
    pub events: usize,
    /// Where they stand.
    pub bytes: Range<usize>,
}

/// What came of a salvage.
#[derive(Debug, Default)]
pub struct JournalSalvage {
    /// What is missing, in words; `None` when nothing is, and then nothing was changed.
    pub damage: Option<String>,
    /// Acknowledged events that are in the journal and go into the tables with the next start.
    pub events: usize,
    /// Where the damaged files are kept.
    pub kept: Vec<PathBuf>,
    /// Where events are that could be read in damaged stretches: nobody knows whether they are as they were.
    pub doubtful: Option<PathBuf>,
}
