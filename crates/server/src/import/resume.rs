//! Finds out whether an input was imported before, and how far. The importing thread calls it. An input is identified
//! by its records and never by its name: it may have been moved, compressed, or have grown since.

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

/// Records that are read before an input counts as new. Two inputs hardly ever begin with the same 100 sync events,
/// unless one is the beginning of the other.
const HEAD_RECORDS: u64 = 100;

/// Identifies the records that were taken so far.
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

    /// The digest of the first [`HEAD_RECORDS`] records, or of all when there are fewer.
    pub(super) fn head(&self) -> Digest {
        self.head.unwrap_or_else(|| self.digest())
    }

    /// The import that has taken exactly these records. Of several, one that is not finished.
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

    /// How many records to read until this input can be told from every import that begins alike.
    fn longest(&self, imports: &[ImportProgress]) -> Option<u64> {
        let head = self.head?;
        let begin_alike = imports.iter().filter(|import| import.head == head);
        begin_alike.map(|import| import.records).filter(|records| *records > self.records).max()
    }
}

/// The records that are still to be imported.
pub(super) struct Rest {
    records: Records,
    /// Records that were read already.
    kept: VecDeque<Record>,
    /// The error that follows those records.
    failed: Option<ImportError>,
    /// The fingerprint of what this import and earlier ones have taken.
    pub(super) fingerprint: Fingerprint,
    /// The import that is continued.
    pub(super) resumed: Option<ImportProgress>,
}

impl Rest {
    /// Opens a source and skips what one of `imports` has already taken of it.
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
                // The records before the error are imported all the same.
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
                // The records before the error are imported all the same, when the input is read a second time.
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
            // The input only began like another: read it again, up to where the two differ.
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

    /// The next record; `None` at the end. It counts as taken only after [`Self::take`].
    pub(super) fn next(&mut self) -> Result<Option<Record>, ImportError> {
        if let Some(record) = self.kept.pop_front() {
            return Ok(Some(record));
        }
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.records.next(),
        }
    }

    /// Adds a record to the fingerprint.
    pub(super) fn take(&mut self, record: &Record) {
        self.fingerprint.take(record);
    }

    /// Unusual names of CSV columns.
    pub(super) fn column_names(&self) -> &ColumnNames {
        &self.records.column_names
    }
}
