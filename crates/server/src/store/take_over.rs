//! Takes over a database that the Node PiSync made: its tables become ours, with every device and event. The command
//! line calls this. A server that meets such a database must leave it alone.
//!
//! All of it is one transaction, so there is no state in between. Whatever happens, the database is the Node service's
//! as it was, or ours with everything in it. The Node service must be stopped meanwhile in any case, so resumable steps
//! would not shorten the time without it. After a power cut they would only leave a database that neither program can
//! use.

use pisync_core::Timestamp;

pub use super::postgres::take_over::{Estimate, Progress, Rehearsal, Survey, TakeOverError};
use super::{Target, postgres::take_over::PostgresTakeOver};

/// A database of the Node service that is to be taken over.
pub struct TakeOver(PostgresTakeOver);

impl TakeOver {
    /// Connects to `target`. `None` when the Node service did not make that database, or it was taken over before.
    /// `time_zone` is the IANA name of the time zone in which the Node service wrote its times.
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

    /// Checks everything, tries a part of the work, and changes nothing. It works beside the Node service.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn rehearse(&mut self, now: Timestamp) -> Result<Rehearsal, TakeOverError> {
        self.0.rehearse(now).await
    }

    /// Takes the database over and reports its progress. False when another process has done it meanwhile.
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

    /// Other programs that are connected. If the Node service is among them, it is still writing.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn others(&self) -> Result<Vec<String>, TakeOverError> {
        self.0.others().await
    }
}
