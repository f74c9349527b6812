//! What `pisync journal` reports about a journal. `survey` and `salvage` fill it in, and the command line shows it. It
//! contains no logic.

use std::{ops::Range, path::PathBuf};

/// The contents of an ingest journal.
#[derive(Debug)]
pub struct JournalReport {
    /// The last record that is in the tables.
    pub applied: u64,
    /// Its files that exist.
    pub files: Vec<JournalFileReport>,
    /// Acknowledged events that are in the journal alone and can be read.
    pub unapplied_events: usize,
    /// What is missing, in words; `None` when nothing is missing.
    pub damage: Option<String>,
    /// The version of records that this program cannot read, if there are any.
    pub newer_version: Option<u16>,
}

/// The contents of one file of an ingest journal.
#[derive(Debug)]
pub struct JournalFileReport {
    /// The path of the file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// Stretches of complete records that are not in the tables. Each has the numbers of its first and last record, its
    /// number of events, and its bytes in the file.
    pub records: Vec<JournalStretch>,
    /// How many complete records are in the tables already.
    pub applied_records: usize,
    /// Complete records of another database.
    pub foreign_records: usize,
    /// Stretches that are neither a record nor empty. Older records that are in the tables leave such remains.
    pub other: Vec<Range<usize>>,
}

/// Consecutive records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalStretch {
    /// The number of the first record.
    pub first: u64,
    /// The number of the last record.
    pub last: u64,
    /// How many events they hold.
    pub events: usize,
    /// Their bytes in the file.
    pub bytes: Range<usize>,
}

/// The result of a salvage.
#[derive(Debug, Default)]
pub struct JournalSalvage {
    /// What is missing, in words. `None` when nothing is missing; nothing was changed then.
    pub damage: Option<String>,
    /// Acknowledged events that are in the journal and will be applied at the next start.
    pub events: usize,
    /// Where the damaged files are kept.
    pub kept: Vec<PathBuf>,
    /// The file with the events that could be read in damaged stretches. Nobody knows whether they are as they were.
    pub doubtful: Option<PathBuf>,
}
