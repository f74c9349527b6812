//! Finding out whether an input was imported before, and how far. An input is known by its records, not by its
//! name: it may have been moved, compressed, or have grown since.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicU64},
};

use sha2::{Digest as _, Sha256};

use super::{
    ImportError,
    csv::ColumnNames,
    input::Source,
    records::{Format, Record, Records},
};
use crate::store::{Digest, ImportProgress};

/// Records that are read before it is decided whether an input looks new. So many of sync events are hardly
/// ever the same in two inputs, unless one is the other's beginning.
const HEAD_RECORDS: u64 = 100;

/// What the records taken so far are known by.
#[derive(Clone, Default)]
pub(super) struct Fingerprint {
    sum: Sha256,
    pub(super) records: u64,
    head: Option<Digest>,
}

impl Fingerprint {
    pub(super) fn take(&mut self, record: &Record) {
        self.sum.update((record.text.len() as u64).to_le_bytes());
        self.sum.update(&record.text);
        self.records += 1;
        if self.records == HEAD_RECORDS {
            self.head = Some(self.digest());
        }
    }

    pub(super) fn digest(&self) -> Digest {
        self.sum.clone().finalize().into()
    }

    /// Of the first records, or of all when they are not as many.
    pub(super) fn head(&self) -> Digest {
        self.head.unwrap_or_else(|| self.digest())
    }

    /// The import that has taken exactly these records; of several, one that is not finished.
    fn find<'a>(&self, imports: &'a [ImportProgress]) -> Option<&'a ImportProgress> {
        let mut candidates = imports.iter().filter(|import| import.records == self.records);
        candidates.clone().next()?;
        let digest = self.digest();
        let mut matching = candidates.by_ref().filter(|import| import.digest == digest);
        let first = matching.next()?;
        Some(if first.finished {
            matching.find(|import| !import.finished).unwrap_or(first)
        } else {
            first
        })
    }

    /// How many records to read until every import that begins like this one can be told from it.
    fn longest(&self, imports: &[ImportProgress]) -> Option<u64> {
        let head = self.head?;
        let begin_alike = imports.iter().filter(|import| import.head == head);
        begin_alike.map(|import| import.records).filter(|records| *records > self.records).max()
    }
}

/// The records that are still to be imported.
pub(super) struct Rest {
    records: Records,
    /// Read already.
    kept: VecDeque<Record>,
    /// What comes after those.
    failed: Option<ImportError>,
    /// Of what was taken, by this import and those before.
    pub(super) fingerprint: Fingerprint,
    /// The import that is gone on with.
    pub(super) resumed: Option<ImportProgress>,
}

impl Rest {
    /// Opens a source and passes over what one of `imports` has taken of it already.
    pub(super) fn open(
        source: &Source,
        format: Option<Format>,
        imports: &[ImportProgress],
        taken: &Arc<AtomicU64>,
    ) -> Result<Self, ImportError> {
        let mut records = Records::open(source, format, taken)?;
        let mut fingerprint = Fingerprint::default();
        let (mut kept, mut resumed) = (VecDeque::new(), None);
        let mut failed = None;
        while !imports.is_empty() && fingerprint.records < HEAD_RECORDS {
            match records.next() {
                Ok(Some(record)) => {
                    fingerprint.take(&record);
                    kept.push_back(record);
                    resumed = fingerprint.find(imports).or(resumed);
                }
                Ok(None) => break,
                // What comes before is imported all the same.
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let Some(longest) = fingerprint.longest(imports) else {
            let taken_before = resumed.map_or(0, |import| import.records);
            let mut fingerprint = Fingerprint::default();
            for record in kept.drain(..usize::try_from(taken_before).unwrap_or(0)) {
                fingerprint.take(&record);
            }
            return Ok(Self { records, kept, failed, fingerprint, resumed: resumed.cloned() });
        };
        let mut is_broken = false;
        while fingerprint.records < longest {
            let record = match records.next() {
                Ok(Some(record)) => record,
                Ok(None) => break,
                // What comes before is imported all the same, when the input is read a second time.
                Err(_) if source.can_be_reopened() => {
                    is_broken = true;
                    break;
                }
                Err(error) => return Err(error),
            };
            fingerprint.take(&record);
            resumed = fingerprint.find(imports).or(resumed);
        }
        let taken_before = resumed.map_or(0, |import| import.records);
        if taken_before < fingerprint.records || is_broken {
            // It only began like another: back to where they part.
            if !source.can_be_reopened() {
                return Err(ImportError(format!(
                    "{} begins like an input that was imported before and goes on differently, so that it must be read twice: save it to a file and import that",
                    source.name()
                )));
            }
            drop(records);
            records = Records::open(source, format, taken)?;
            fingerprint = Fingerprint::default();
            while fingerprint.records < taken_before {
                let Some(record) = records.next()? else { break };
                fingerprint.take(&record);
            }
        }
        let kept = VecDeque::new();
        Ok(Self { records, kept, failed: None, fingerprint, resumed: resumed.cloned() })
    }

    /// The next record; `None` at the end. It counts as taken once [`Self::take`] is told of it.
    pub(super) fn next(&mut self) -> Result<Option<Record>, ImportError> {
        if let Some(record) = self.kept.pop_front() {
            return Ok(Some(record));
        }
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.records.next(),
        }
    }

    /// Takes a record into what the import is known by.
    pub(super) fn take(&mut self, record: &Record) {
        self.fingerprint.take(record);
    }

    /// What is special about the columns of CSV.
    pub(super) fn column_names(&self) -> &ColumnNames {
        &self.records.column_names
    }
}
