//! The ingest journal: two files beside the database. Events are on the disk there, in the order of their ids, before
//! they are in the database's tables. `journal_writer` and `journal_commands` call it. A record must be on the disk
//! before its events are acknowledged.
//!
//! A record is a batch ([`record`]). Records are numbered without gaps. `ingest_state` says up to which record the
//! journal is applied. After a crash, the records behind that one must still be applied. Once all records of a file are
//! applied, it is written from its beginning again. Old records may therefore follow the newest one; their numbers are
//! lower.
//!
//! If the last record is incomplete, a power cut has interrupted it, and its events were not acknowledged. If a later
//! record exists, or a number is missing, the disk has lost acknowledged events ([`survey`]). Nothing goes on then
//! before a person has checked it.

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
