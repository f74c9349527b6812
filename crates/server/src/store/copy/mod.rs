//! Copies an entire database into another one, whichever store each is in. `tables` lists what is copied, in a form of
//! rows that is the same for both stores. `sides` says what each store must do; `run` copies and compares.
//!
//! The source is read as of one moment, beside its servers. The destination is filled where nobody sees it. It appears
//! complete, or not at all.

mod checksum;
mod run;
mod sides;
mod tables;

pub use run::{Copied, CopyError, CopyProgress, copy};
pub(super) use sides::{BATCH_ROWS, CopyReader, CopyWriter, RowStream, Selection, Sums};
pub(super) use tables::{Column, Kind, REBUILT, Row, Rows, SYNC_EVENTS, TABLES, Table, Value};
