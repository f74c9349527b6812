//! Where devices, events and figures are kept. The rest of the program sees one trait per resource, whose methods are
//! coarse: each is its own transaction. The two implementations are private to this module. Nothing here knows HTTP
//! or reads a clock.
//!
//! Dependencies go one way: what resources are (`model`, `devices`, `events`, ...), then the two stores, then what chooses
//! between them (`open`, `migrations`, `copy`, `backup`, `journal`, `take_over`).

mod actor;
mod audit;
mod backup;
mod batch;
mod channels;
mod copy;
mod day_details;
mod deletion;
mod delivery;
mod device_list;
mod device_states;
mod devices;
mod error;
mod events;
mod figure_columns;
mod fleet_changes;
mod fleet_settings;
mod fleet_views;
mod group_runs;
mod health;
mod history;
mod imports;
mod incident_steps;
mod incidents;
mod journal;
mod keys;
mod maintenance;
pub mod migrations;
mod model;
mod open;
mod ordered_scan;
mod outbox;
mod postgres;
mod retention;
mod roll_up_sql;
mod routes;
mod routing;
mod run_starts;
mod sqlite;
mod stats;
mod step_size;
mod summaries;
mod sums;
pub mod take_over;
mod target;
mod trusted_time;
mod verify;
mod window;

use async_trait::async_trait;

pub use actor::{Actor, Via};
pub use audit::{AuditEntry, AuditLog};
pub use backup::{Restored, backup, restore};
pub use batch::{Batch, Conflict, Duplicate, FailureStreak, GroupClaim, Observations, Written};
pub use channels::{
    Channel, ChannelCreation, ChannelList, ChannelOutcome, ChannelUpdate, Channels, MOST_CHANNELS,
    NewChannel, NewConfig, Reseal, Resealed, RouteList, RoutesOutcome, Seal, UpdateReason,
};
pub use copy::{Copied, CopyError, CopyProgress, copy};
pub use day_details::DayDetails;
pub use deletion::{DeletionStep, DeviceDeletions};
pub use delivery::{
    Attempt, Delivery, FrozenText, ItemFacts, Lane, MOST_ITEMS, MOST_MEMBERS, MessageFacts,
    MessageKind, MessageText, Notification, NotificationPage, NotificationQuery, NotificationState,
    OutgoingMessage, REFUSALS, RetryOutcome,
};
pub use devices::{DeviceQuery, DeviceSort, DeviceStore, GroupFilter};
pub use error::{OtherGroup, StoreError};
pub use events::{EventStore, EventWriter};
pub use fleet_changes::{
    DeviceChange, FleetChanges, LevelChange, MOST_ROSTER_ROWS, MOST_WINDOWS, NewWindow,
    PauseChange, PolicyUpdate, RosterOutcome, RosterRow,
};
pub use fleet_settings::{
    DeviceSettings, ExcludedTime, FleetSettings, FleetSettingsStore, FleetWindow, LevelSettings,
    Pauses, WindowEffect, WindowScope,
};
pub use fleet_views::{
    DeviceDetailView, DeviceView, FleetView, FleetViews, GroupQuery, GroupView, HealthView,
    JobView, OutageView, StateCounts,
};
pub(crate) use health::LARGEST_LAG;
pub use health::{
    Beat, DEVICES_PER_STEP, Evaluations, Examination, HealthStore, Outage, OutageCause,
    SettingsChange, StateChange,
};
pub use history::{EventPage, HistoryPosition, HistoryQuery, StoredEvent, SyncHistory};
pub use imports::{Digest, ImportLog, ImportProgress, ImportStep};
pub use incident_steps::{FLEET, IncidentChange, IncidentEvent, IncidentSteps, Reconciled};
pub use incidents::{
    AcknowledgeOutcome, Acknowledgement, HealthCounts, INCIDENT_KINDS, Incident, IncidentDetail,
    IncidentEntry, IncidentMember, IncidentPage, IncidentQuery, Incidents, NewAcknowledgement,
    TIMELINE,
};
pub use journal::{inspect_journal, salvage_journal};
pub use keys::{ApiKey, KeyHash, KeyStore, Keys, NewKey, Revocation, Scope};
pub use maintenance::{Maintenance, RollUps};
pub use model::{Count, Device, DeviceWithJobs, Figures, Freshness, Page, PoolUsage};
pub use open::{
    Claim, apply_journal, check_exists, check_output, claim, create_database, exists, is_claimed,
    open,
};
pub use ordered_scan::{KeyPart, Place};
pub use outbox::ItemKind;
pub use retention::Retention;
pub use routes::{MOST_ROUTES, Route, RouteDigest, RouteMatch};
pub use run_starts::{MOST_STARTS, RunKey, RunStarts, StartedRun};
pub use sqlite::{BackedUp, JournalFileReport, JournalReport, JournalSalvage, JournalStretch};
pub use stats::{FailureQuery, FleetStats, StatsStore};
pub use sums::Sums;
pub use target::{PostgresTarget, SslMode, Target};
pub(crate) use trusted_time::{LARGEST_STEP, NOTABLE_DIFFERENCE, Standing};
pub use trusted_time::{TrustedTime, TrustedTimeStore};
pub use verify::{
    FigureDifference, JobDifference, StateDifferences, SumDifference, SummaryDifferences,
    Verification, Verified,
};
pub use window::Window;

/// An open database: everything that the program keeps, with one trait per resource. The methods of this trait concern
/// the connection to the database, whatever is in it.
#[async_trait]
pub trait Store:
    DeviceStore
    + DeviceDeletions
    + EventStore
    + StatsStore
    + FleetSettingsStore
    + FleetChanges
    + FleetViews
    + HealthStore
    + IncidentSteps
    + Incidents
    + Delivery
    + Channels
    + RunStarts
    + KeyStore
    + AuditLog
    + ImportLog
    + RollUps
    + Verification
    + TrustedTimeStore
    + Maintenance
{
    /// Checks that the database answers.
    async fn ping(&self) -> Result<(), StoreError>;

    /// How busy the connections for reading are.
    fn pool_usage(&self) -> PoolUsage;

    /// Waits until a thread has ended that the store cannot work without, and answers which one and how. After that the
    /// store cannot be used.
    async fn thread_end(&self) -> String {
        // This store has no threads.
        std::future::pending().await
    }

    /// Makes a thread of the store panic, as a mistake of ours would.
    #[cfg(test)]
    fn break_writer(&self) {}

    /// Leaves everything in order at the end. Nothing may be written afterwards.
    async fn close(&self) -> Result<(), StoreError>;
}
