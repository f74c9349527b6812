//! What taking over a database of the Node service finds and reports. The other files of `take_over` fill it in; the
//! command line shows it. It contains no logic.

use std::time::Duration;

use jiff::civil::Date;
use pisync_core::Timestamp;

use crate::store::StoreError;

/// What the Node service's database holds.
#[derive(Debug, Default)]
pub struct Survey {
    /// Registered devices.
    pub devices: u64,
    /// Events.
    pub events: u64,
    /// Dates of the first and the last event, as the devices say.
    pub dated: Option<(Timestamp, Timestamp)>,
    /// When the first and the last event were received.
    pub received: Option<(Timestamp, Timestamp)>,
    /// Months in which events were received.
    pub months: u64,
    /// Size of the tables with their indexes.
    pub bytes: u64,
    /// Unusual data: each kind with its number, and what becomes of it.
    pub odd: Vec<(u64, &'static str)>,
    /// Indexes that the Node service did not make. They are dropped with its tables.
    pub own_indexes: Vec<String>,
    /// Obstacles that must be removed before the database can be taken over, in words.
    pub obstacles: Vec<String>,
}

/// The expected cost of taking over, judged from a part of it.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    /// How long.
    pub time: Duration,
    /// Bytes of disk space for the new tables. The old ones are dropped at the end.
    pub bytes: u64,
}

/// The result of a rehearsal.
#[derive(Debug)]
pub struct Rehearsal {
    /// What the database contains.
    pub survey: Survey,
    /// The expected cost; `None` when there are obstacles.
    pub estimate: Option<Estimate>,
    /// Other connected programs that would have to be stopped.
    pub others: Vec<String>,
}

/// The progress of taking over.
#[derive(Debug)]
pub enum Progress<'a> {
    /// The tables are locked and checked.
    Found(&'a Survey),
    /// The events received in a month are copied.
    Copied {
        /// Its first day.
        month: Date,
        /// Its events.
        events: u64,
        /// Those of all months so far.
        so_far: u64,
    },
    /// Figures are being counted.
    Counting,
    /// Events are being summed up by day and hour.
    Aggregating,
}

/// Why a database was not taken over. Except after [`Self::OutcomeUnknown`], it is as it was.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// PostgreSQL does not know the time zone.
    #[error(
        "unknown time zone {0:?}: give --source-timezone a name such as UTC, Europe/Berlin or Asia/Kolkata"
    )]
    UnknownTimeZone(String),
    /// See [`Survey::obstacles`].
    #[error(
        "the Node service's database cannot be taken over as it is: {}; nothing was changed", .0.join("; ")
    )]
    Obstacles(Vec<String>),
    /// Another program writes, or could write at any moment.
    #[error(
        "the Node service seems to be running, for somebody else is connected to its database: {}; stop it, close other programs, and run this again; nothing was changed", .0.join(", ")
    )]
    InUse(Vec<String>),
    /// Another program reads, such as `pg_dump`.
    #[error(
        "the tables are in use by {}; wait for it to end, or end it, and run this again; nothing was changed", .0.join(", ")
    )]
    Locked(Vec<String>),
    /// The connection was lost during the commit.
    #[error(
        "the connection was lost at the very end: run `pisync migrate up` again, which finds out whether the database was taken over"
    )]
    OutcomeUnknown,
    /// A step failed.
    #[error("taking over failed and was undone, the database is as it was: {0}")]
    Failed(StoreError),
    /// The database cannot be reached.
    #[error(transparent)]
    Store(#[from] StoreError),
}
