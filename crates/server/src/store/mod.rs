//! Where devices, events and figures are kept. The rest of the program sees one trait of coarse
//! methods, each its own transaction; the two implementations are private to this module. Nothing
//! here knows HTTP or reads a clock.

mod backup;
mod batch;
mod copy;
mod deletion;
mod history;
mod imports;
mod journal;
mod keys;
pub mod migrations;
mod postgres;
mod retention;
mod sqlite;
mod step_size;
pub mod take_over;
mod target;
mod trusted_time;
mod verify;
mod window;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pisync_core::{DeviceId, Timestamp};
use tokio::sync::mpsc;

pub use backup::{BackedUp, Restored, backup, restore};
pub use batch::{
    Batch, Conflict, Duplicate, FailureStreak, GroupClaim, Observations, OtherGroup, Written,
};
pub use copy::{Copied, CopyError, CopyProgress, copy};
pub use deletion::{DeletionStep, DeviceDeletions};
pub use history::{EventPage, HistoryPosition, HistoryQuery, StoredEvent, SyncHistory};
pub use imports::{Digest, ImportProgress, ImportStep};
pub use journal::{
    JournalFileReport, JournalReport, JournalSalvage, JournalStretch, inspect_journal,
    salvage_journal,
};
pub use keys::{
    Actor, ApiKey, AuditEntry, KeyHash, KeyStore, Keys, NewKey, Revocation, Scope, Via,
};
pub use retention::Retention;
pub use target::{PostgresTarget, SslMode, Target};
pub use trusted_time::TrustedTime;
pub(crate) use trusted_time::{LARGEST_STEP, NOTABLE_DIFFERENCE, Standing};
pub use verify::{FigureDifference, JobDifference, SumDifference, Sums, Verified};
pub use window::Window;

/// What can go wrong in a store, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is away, busy or full, or is not fit to be used as it is: nothing was changed, and trying again
    /// later may work. The text says which: a database that answers is not called unavailable.
    #[error("{0}")]
    Unavailable(String),
    /// The database is there and gave this transaction up for a passing reason, such as a deadlock, a cancelled
    /// statement or a lock that others hold. Nothing was changed, and trying again may work at once.
    #[error("the database gave the transaction up: {0}")]
    Transient(String),
    /// The connection died while a transaction was being committed, so it may or may not have been.
    /// Writing the same batch again finds out first.
    #[error("the connection was lost during a commit: {0}")]
    OutcomeUnknown(String),
    /// PostgreSQL has carried the change out, and warns that it may not be on the synchronous standby: somebody, or a
    /// time-out, has ended the wait of its commit. Should the standby take over, the change may be missing.
    #[error(
        "the change was made on this database server, but may not be replicated: the wait of its commit for the \
         synchronous standby was ended; see to the standby, and look whether the change is there before you repeat it"
    )]
    Unreplicated,
    /// The database refused the data itself; nothing was changed, and trying again won't help.
    #[error("the database refused the data: {0}")]
    Rejected(String),
    /// Devices are not in the groups that they must be in; nothing was changed.
    #[error(transparent)]
    OtherGroup(#[from] OtherGroup),
    /// So much is being read that this had no turn. Nothing is wrong with the database.
    #[error("{0}")]
    Busy(String),
    /// A read took too long and was given up, so that others have their turn.
    #[error("{0}")]
    TooSlow(String),
    /// Whatever writes has come to its end; only a restart of the process helps.
    #[error("the writer has stopped")]
    Stopped,
    /// Anything else: a bug, a foreign schema, a damaged file.
    #[error("{0}")]
    Failed(String),
}

/// Everything the program keeps. Each method is one transaction.
#[async_trait]
pub trait Store: KeyStore + DeviceDeletions + Send + Sync {
    /// Asks the database for a sign of life.
    async fn ping(&self) -> Result<(), StoreError>;

    /// Something to write batches through, which are in the tables when it returns.
    fn event_writer(&self) -> Box<dyn EventWriter>;

    /// What ingest writes through; there is one per server. When it returns, events survive a power cut and
    /// every later read finds them, but what is learnt of their devices may come later, as `observations`.
    async fn ingest_writer(
        &self,
        observations: mpsc::UnboundedSender<Observations>,
    ) -> Result<Box<dyn EventWriter>, StoreError>;

    /// A device's figures and one page of its events; `None` for an unknown device.
    async fn sync_history(&self, query: &HistoryQuery) -> Result<Option<SyncHistory>, StoreError>;

    /// One page of a device's events and nothing else; `None` for an unknown device. Long lists are
    /// read page by page, so that no read keeps the database from clearing up behind it.
    async fn events(&self, query: &HistoryQuery) -> Result<Option<EventPage>, StoreError>;

    /// Devices that failed repeatedly, worst first.
    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError>;

    /// The whole fleet's figures. `active_since` bounds `active_devices`.
    async fn fleet_stats(&self, active_since: Timestamp) -> Result<FleetStats, StoreError>;

    /// What the whole fleet's events within `window` add up to; the times and the streak are left out.
    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError>;

    /// One page of devices.
    async fn devices(&self, query: &DeviceQuery) -> Result<Page<Device>, StoreError>;

    /// One device and its jobs; `None` when unknown.
    async fn device(&self, device_id: &DeviceId) -> Result<Option<DeviceWithJobs>, StoreError>;

    /// Changes what people say of a device, and says in the audit log who did; false when it is
    /// unknown.
    async fn update_device(
        &self,
        device_id: &DeviceId,
        change: &DeviceChange,
        by: &Actor,
    ) -> Result<bool, StoreError>;

    /// Forgets some thousand event ids received before `before`; tells whether there may be more.
    async fn forget_event_ids(&self, before: Timestamp) -> Result<bool, StoreError>;

    /// Recounts the figures and days of one page of devices, those after the device `after`, from their raw
    /// events, as of one moment. With `repair` it then writes what the events add up to, each device in a short
    /// transaction of its own; the answer still tells what was found. Where old events are no longer kept,
    /// nothing is repaired. Events dated so far after `now` that a clock must have been wrong change no streak. Safe
    /// beside running servers.
    async fn verify(
        &self,
        after: Option<&str>,
        now: Timestamp,
        repair: bool,
    ) -> Result<Verified, StoreError>;

    /// Counts the jobs again whose last events are dated, or were received, so far after `now` that a clock must have
    /// been wrong then: what is reported later would be hidden behind them for good. Such events are set aside. Counts
    /// the jobs again, too, whose events that were set aside are no longer dated so far ahead. Answers how many have changed.
    async fn recount_misdated(&self, now: Timestamp) -> Result<u64, StoreError>;

    /// Recounts the sums of the fleet's hours from all folded events, as of one moment: some second for a
    /// million of them. Once old events were dropped, sums can only be found to be too small.
    async fn verify_hours(&self) -> Result<Vec<SumDifference>, StoreError>;

    /// Writes what was recounted in the place of an hour's sums; false, and nothing is changed, when they
    /// are no longer what was found.
    async fn repair_hour(&self, seen: &SumDifference) -> Result<bool, StoreError>;

    /// Moves the time on by which old events and event ids are deleted, given what the clock says and for how long
    /// this server has run since it last did.
    async fn trust_time(&self, now: Timestamp, ran: Duration) -> Result<TrustedTime, StoreError>;

    /// The time that was believed last, which `trust_time` moves on; `None` before a server has.
    async fn trusted_time(&self) -> Result<Option<TrustedTime>, StoreError>;

    /// The database's own clock; `None` on SQLite, which goes by the server's.
    async fn database_time(&self) -> Result<Option<Timestamp>, StoreError>;

    /// Does what must be done from time to time, such as making partitions ahead of need.
    async fn maintain(&self, now: Timestamp) -> Result<(), StoreError>;

    /// Folds a small number of stored events into the sums by day and hour, and tells whether there is
    /// more to do at once. Reads are right whenever this is done; they are quicker after it.
    async fn fold_events(&self, now: Timestamp) -> Result<bool, StoreError>;

    /// Drops some events that were received too long ago and are folded, and tells whether to go on at
    /// once. Sums, totals and streaks stay.
    async fn drop_old_events(
        &self,
        now: Timestamp,
        retention: &Retention,
    ) -> Result<bool, StoreError>;

    /// One page of the ids of all devices, or those of a group, in byte-wise order, beginning after the
    /// device `after`; empty behind the last.
    async fn device_ids(
        &self,
        group: Option<&str>,
        after: Option<&str>,
    ) -> Result<Vec<DeviceId>, StoreError>;

    /// All imports there have been.
    async fn imports(&self) -> Result<Vec<ImportProgress>, StoreError>;

    /// Waits until a thread has ended that the store cannot do without, and tells which and how: from then on
    /// the store is of no use.
    async fn thread_end(&self) -> String {
        // A store without threads.
        std::future::pending().await
    }

    /// Has a thread of the store panic, as a mistake of ours would.
    #[cfg(test)]
    fn break_writer(&self) {}

    /// Leaves everything in order at the end; nothing may be written afterwards.
    async fn close(&self) -> Result<(), StoreError>;

    /// How busy the connections for reading are.
    fn pool_usage(&self) -> PoolUsage;
}

/// Writes batches of events. One task owns it.
#[async_trait]
pub trait EventWriter: Send {
    /// Stores a batch in one transaction, figures included, and returns once it is committed. None may be in flight.
    ///
    /// # Errors
    /// After any error but [`StoreError::OutcomeUnknown`] nothing of the batch is stored. After that
    /// one, writing the same batch (the same `Arc`) again stores it exactly once.
    ///
    /// [`StoreError::OtherGroup`] when a batch's [`GroupClaim`]s do not hold in that transaction: nobody can have moved or
    /// deleted a device in between. Only [`Store::event_writer`]s look at claims.
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError>;

    /// Pipelines a batch: it is stored behind those in flight. False when that cannot be done now, and nothing has
    /// happened: then it can be written, once none is in flight.
    fn send(&mut self, _batch: &Arc<Batch>) -> bool {
        false
    }

    /// Waits for the batch that was sent first. `None` when it is not known to be stored: once none is in flight,
    /// writing the same batch (the same `Arc`) stores it exactly once. The future may be dropped and
    /// another one asked for.
    async fn sent(&mut self) -> Option<Written> {
        None
    }

    /// Whether writing could work now; connects again if need be.
    async fn probe(&mut self) -> Result<(), StoreError>;

    /// Does what is left to do for what was written.
    async fn finish(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// What a device, or a fleet, adds up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Syncs reported.
    pub total_syncs: i64,
    /// Syncs with errors.
    pub failed_syncs: i64,
    /// Sum of files.
    pub total_files_synced: i64,
    /// Sum of errors.
    pub total_errors: i64,
    /// Sum of the measured speeds, hundredths of Mbps.
    pub speed_sum: i64,
    /// How many syncs measured one.
    pub speed_count: i64,
    /// Earliest sync by its own date.
    pub first_sync: Option<Timestamp>,
    /// Latest sync by its own date.
    pub last_sync: Option<Timestamp>,
    /// Latest sync without errors.
    pub last_success: Option<Timestamp>,
    /// Latest sync with errors.
    pub last_failure: Option<Timestamp>,
    /// The worst streak among the jobs.
    pub consecutive_failures: i64,
    /// When the server last received an event.
    pub last_seen: Option<Timestamp>,
}

impl Figures {
    /// Syncs without errors.
    #[must_use]
    pub fn successful_syncs(&self) -> i64 {
        self.total_syncs - self.failed_syncs
    }

    /// Share of syncs without errors, 0 to 1, not rounded; `None` before the first sync.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people to read")]
    pub fn success_ratio(&self) -> Option<f64> {
        (self.total_syncs > 0).then(|| self.successful_syncs() as f64 / self.total_syncs as f64)
    }

    /// Mean of the measured speeds in Mbps, rounded to 2 decimals; `None` when none was measured, and 0
    /// only when all were 0.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "rounded to hundredths of a mean")]
    pub fn avg_internet_speed(&self) -> Option<f64> {
        (self.speed_count > 0).then(|| {
            let hundredths = (self.speed_sum as f64 / self.speed_count as f64).round();
            // A slow line is not one that carries nothing.
            if self.speed_sum > 0 { hundredths.max(1.0) / 100.0 } else { hundredths / 100.0 }
        })
    }
}

/// A device and its figures over all jobs.
#[derive(Debug, Clone)]
pub struct Device {
    /// What it calls itself.
    pub device_id: String,
    /// What people call it.
    pub name: Option<String>,
    /// Which group people put it in.
    pub group: Option<String>,
    /// When it was first seen.
    pub created_at: Timestamp,
    /// Zeros and nothing while it has not reported.
    pub figures: Figures,
}

/// A device with the figures of each of its jobs.
#[derive(Debug)]
pub struct DeviceWithJobs {
    /// The device and its sums.
    pub device: Device,
    /// Each job's name (`None` for events that name no job) and figures, by name.
    pub jobs: Vec<(Option<String>, Figures)>,
}

/// One page of a longer list.
#[derive(Debug)]
pub struct Page<T> {
    /// What is on the page.
    pub items: Vec<T>,
    /// How many there are on all pages.
    pub total: u64,
}

/// Which devices failed repeatedly.
#[derive(Debug, Clone)]
pub struct FailureQuery {
    /// At least so many failures.
    pub threshold: u32,
    /// Count the current streak instead of failures.
    pub consecutive: bool,
    /// Only devices that failed within it, and only failures in it; of all time when `None`.
    pub window: Option<Window>,
    /// At most so many devices; all when `None`.
    pub limit: Option<u32>,
    /// After so many.
    pub offset: u64,
}

/// The whole fleet.
#[derive(Debug)]
pub struct FleetStats {
    /// Registered devices, those that never reported included.
    pub total_devices: u64,
    /// Devices from which something was received since the given instant.
    pub active_devices: u64,
    /// Sums over all devices; the times and the streak are not meaningful here.
    pub figures: Figures,
    /// The ten devices with the latest syncs.
    pub recent_devices: Vec<Device>,
}

/// Which devices to list, and in which order.
#[derive(Debug, Clone)]
pub struct DeviceQuery {
    /// Part of the device id or name, whatever the case of ASCII letters.
    pub search: Option<String>,
    /// Only of this group.
    pub group: Option<String>,
    /// By what.
    pub sort: DeviceSort,
    /// Largest or latest first.
    pub descending: bool,
    /// At most so many.
    pub limit: u32,
    /// After so many.
    pub offset: u64,
}

/// What a list of devices can be sorted by. Ties go by device id; what is missing comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceSort {
    /// Byte by byte.
    DeviceId,
    /// What people call it.
    Name,
    /// First seen.
    CreatedAt,
    /// Last received from.
    LastSeen,
    /// Latest sync by its own date.
    LastSync,
    /// Latest sync without errors.
    LastSuccess,
    /// Syncs reported.
    TotalSyncs,
    /// Syncs with errors.
    FailedSyncs,
    /// Current streak.
    ConsecutiveFailures,
}

impl DeviceSort {
    /// What to sort devices `d` by, in either store's SQL; and, when that is a figure, the sum over
    /// `device_jobs` that must be joined as `f.key`.
    fn expressions(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::DeviceId => ("d.device_id", None),
            Self::Name => ("d.name", None),
            Self::CreatedAt => ("d.created_at", None),
            Self::LastSeen => ("f.key", Some("max(last_received)")),
            Self::LastSync => ("f.key", Some("max(last_sync)")),
            Self::LastSuccess => ("f.key", Some("max(last_success)")),
            Self::TotalSyncs => ("f.key", Some("sum(total_syncs)")),
            Self::FailedSyncs => ("f.key", Some("sum(failed_syncs)")),
            Self::ConsecutiveFailures => ("f.key", Some("max(consecutive_failures)")),
        }
    }
}

/// What to change about a device: `None` leaves a field alone, `Some(None)` empties it.
#[derive(Debug, Clone, Default)]
pub struct DeviceChange {
    /// What people call it.
    pub name: Option<Option<String>>,
    /// Its group.
    pub group: Option<Option<String>>,
}

/// Connections for reading.
#[derive(Debug, Clone, Copy)]
pub struct PoolUsage {
    /// The most there can be.
    pub max: usize,
    /// In use right now.
    pub in_use: usize,
    /// Requests that wait for one.
    pub waiting: usize,
}

/// Opens the store that `target` names, whose schema must be current (see [`migrations`]).
///
/// # Errors
/// When it cannot be opened; the message says what to do.
pub async fn open(target: &Target) -> Result<Arc<dyn Store>, StoreError> {
    match target {
        Target::Sqlite(path) => Ok(Arc::new(sqlite::SqliteStore::open(path)?)),
        Target::Postgres(postgres) => {
            Ok(Arc::new(postgres::PostgresStore::connect(postgres).await?))
        }
    }
}

/// Creates the PostgreSQL database that `target` names; false when there was nothing to create. An
/// SQLite file is made by the first migration.
///
/// # Errors
/// When PostgreSQL cannot be reached or refuses.
pub async fn create_database(target: &Target) -> Result<bool, StoreError> {
    match target {
        Target::Sqlite(_) => Ok(false),
        Target::Postgres(postgres) => postgres::create_database(postgres).await,
    }
}

/// Keeps others from changing the same SQLite file under a running server, for as long as it lives.
/// PostgreSQL looks after itself.
#[derive(Debug)]
pub struct Claim(Option<sqlite::files::Claim>);

impl Claim {
    /// Checks that what was claimed is still what is opened by its name.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self) -> Result<(), StoreError> {
        self.0.as_ref().map_or(Ok(()), sqlite::files::Claim::check)
    }
}

/// Claims `target` for this process.
///
/// # Errors
/// When another process holds it.
pub fn claim(target: &Target) -> Result<Claim, StoreError> {
    match target {
        Target::Sqlite(path) => sqlite::files::Claim::take(path).map(Some).map(Claim),
        Target::Postgres(_) => Ok(Claim(None)),
    }
}

/// Whether a server on this machine has claimed `target`. PostgreSQL looks after itself.
#[must_use]
pub fn is_claimed(target: &Target) -> bool {
    match target {
        Target::Sqlite(path) => sqlite::files::is_claimed(path),
        Target::Postgres(_) => false,
    }
}

/// Checks that `path` may be written to: it is no file of the database itself.
///
/// # Errors
/// When it is one.
pub fn check_output(target: &Target, path: &std::path::Path) -> Result<(), StoreError> {
    match target {
        Target::Sqlite(database) => sqlite::files::check_is_not_ours(database, path),
        Target::Postgres(_) => Ok(()),
    }
}

/// Returns once everything that a server has acknowledged by now is where other processes look for it. On
/// SQLite a running server sees to that within a second, and what one has left behind that was killed is seen
/// to here.
///
/// # Errors
/// When that is not possible.
pub fn apply_journal(target: &Target) -> Result<(), StoreError> {
    match target {
        Target::Sqlite(path) => sqlite::apply_journal(path),
        Target::Postgres(_) => Ok(()),
    }
}

/// The most devices on a page of [`Store::device_ids`].
const DEVICE_IDS: u32 = 1_000;

/// The pattern for `like … escape '\'` that finds `text` anywhere, taken literally.
fn like_pattern(text: &str) -> String {
    let mut pattern = String::from("%");
    for character in text.chars() {
        if matches!(character, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern.push('%');
    pattern
}
