//! Taking over a database that the Node PiSync made: its tables become ours, with every device and event.
//! The command line calls this; a server that meets such a database leaves it alone.
//!
//! All of it is one transaction, so there is nothing in between: whatever happens, the database is the Node
//! service's as it was, or ours with everything in it. The Node service must be stopped meanwhile in any
//! case, so steps that can be resumed would not shorten the time without it; they would only leave, after a
//! power cut, a database that neither program can use.

use pisync_core::Timestamp;

pub use super::postgres::take_over::{Estimate, Progress, Rehearsal, Survey, TakeOverError};
use super::{Target, postgres::take_over::PostgresTakeOver};

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
