//! The ingest journal: two files beside the database in which events are on the disk, in the order of their
//! ids, before they are in its tables.
//!
//! A record is a batch ([`record`]). Records are numbered without gaps, and `ingest_state` says up to which
//! of them the journal is applied; the records after that one are what a crash has left to do. A file is
//! written from its beginning again once all its records are applied, so old records may follow the newest:
//! they have lower numbers.
//!
//! A record that is not whole, with no later one anywhere, is one that a power cut interrupted: nobody was
//! told that it is stored. When a later one is there, or a number is missing, the disk has lost what was
//! acknowledged ([`survey`]); then nothing goes on before a person has looked.

mod place;
mod record;
mod report;
mod salvage;
mod survey;
mod writer;

pub(super) use place::{JournalState, exists, remove, set_all_aside, unusable};
pub(super) use record::Record;
pub use report::{JournalFileReport, JournalReport, JournalSalvage, JournalStretch};
pub(super) use salvage::salvage;
pub(super) use survey::Survey;
pub(super) use writer::Journal;

#[cfg(test)]
mod tests;
