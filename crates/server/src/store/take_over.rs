//! Taking over a database that the Node PiSync made: its tables become ours, with every device and event.
//! The command line calls this; a server that meets such a database leaves it alone.
//!
//! All of it is one transaction, so there is nothing in between: whatever happens, the database is the Node
//! service's as it was, or ours with everything in it. The Node service must be stopped meanwhile in any
//! case, so steps that can be resumed would not shorten the time without it; they would only leave, after a
//! power cut, a database that neither program can use.

use std::time::Duration;

use jiff::civil::Date;
use pisync_core::Timestamp;

use super::{StoreError, Target, postgres::PostgresTakeOver};

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
    /// What is unusual, each with how often it was found, and what becomes of it.
    pub odd: Vec<(u64, &'static str)>,
    /// Indexes that the Node service did not make: they go with its tables.
    pub own_indexes: Vec<String>,
    /// What must be put right before the database can be taken over, in words.
    pub obstacles: Vec<String>,
}

/// What taking over takes, judged by doing a part of it.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    /// How long.
    pub time: Duration,
    /// Bytes of disk for the new tables; the old ones go at the end.
    pub bytes: u64,
}

/// What a rehearsal finds out.
#[derive(Debug)]
pub struct Rehearsal {
    /// What is there.
    pub survey: Survey,
    /// What to expect; `None` when there are obstacles.
    pub estimate: Option<Estimate>,
    /// Other programs that are connected, and would have to be stopped.
    pub others: Vec<String>,
}

/// How far it is.
#[derive(Debug)]
pub enum Progress<'a> {
    /// The tables are locked and looked through.
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
    Folding,
}

/// Why a database is not taken over. In every case but [`Self::OutcomeUnknown`] it is as it was.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// PostgreSQL does not know it.
    #[error(
        "unknown time zone {0:?}: give --source-timezone a name such as UTC, Europe/Berlin or Asia/Kolkata"
    )]
    UnknownTimeZone(String),
    /// See [`Survey::obstacles`].
    #[error(
        "the Node service's database cannot be taken over as it is: {}; nothing was changed", .0.join("; ")
    )]
    Obstacles(Vec<String>),
    /// Somebody writes, or could at any moment.
    #[error(
        "the Node service seems to be running, for somebody else is connected to its database: {}; stop it, close other programs, and run this again; nothing was changed", .0.join(", ")
    )]
    InUse(Vec<String>),
    /// Somebody reads, such as `pg_dump`.
    #[error(
        "the tables are in use by {}; wait for it to end, or end it, and run this again; nothing was changed", .0.join(", ")
    )]
    Locked(Vec<String>),
    /// The connection was lost during the commit.
    #[error(
        "the connection was lost at the very end: run `pisync migrate up` again, which finds out whether the database was taken over"
    )]
    OutcomeUnknown,
    /// It failed on the way.
    #[error("taking over failed and was undone, the database is as it was: {0}")]
    Failed(StoreError),
    /// The database cannot be reached.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A database of the Node service that is to be taken over.
pub struct TakeOver(PostgresTakeOver);

impl TakeOver {
    /// Connects to `target`; `None` when the Node service did not make that database, or it is taken over.
    /// `time_zone` is the one in which the Node service wrote its times, by its IANA name.
    ///
    /// # Errors
    /// When PostgreSQL cannot be reached or does not know the time zone.
    pub async fn open(target: &Target, time_zone: &str) -> Result<Option<Self>, TakeOverError> {
        match target {
            Target::Sqlite(_) => Ok(None),
            Target::Postgres(target) => {
                Ok(PostgresTakeOver::open(target, time_zone).await?.map(Self))
            }
        }
    }

    /// The time zone in which times are read, as PostgreSQL spells it.
    #[must_use]
    pub fn time_zone(&self) -> &str {
        self.0.time_zone()
    }

    /// Looks at everything, tries a part of the work, and changes nothing. Works beside the Node service.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn rehearse(&mut self, now: Timestamp) -> Result<Rehearsal, TakeOverError> {
        self.0.rehearse(now).await
    }

    /// Takes the database over, and says on the way how far it is. False when another process has done it
    /// meanwhile.
    ///
    /// # Errors
    /// See [`TakeOverError`].
    pub async fn run(
        &mut self,
        now: Timestamp,
        report: &mut (dyn FnMut(&Progress<'_>) + Send),
    ) -> Result<bool, TakeOverError> {
        self.0.run(now, report).await
    }

    /// Other programs that are connected: should the Node service be among them, it writes on.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn others(&self) -> Result<Vec<String>, TakeOverError> {
        self.0.others().await
    }
}
