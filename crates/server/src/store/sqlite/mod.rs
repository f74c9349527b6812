//! The embedded store. `store` opens it; each resource is read and changed in the file of its name. An event passes
//! through `journal_writer`, `journal_appender`, `journal`, `ingest_buffer`, `apply_scheduler`, `apply` and
//! `write_connection`. Nothing outside `store` may depend on this module.

mod aggregated_events;
mod apply;
mod apply_scheduler;
mod audit;
pub(super) mod backup;
mod checkpoint;
pub(super) mod claim;
mod connection;
pub(super) mod copy;
mod deletion;
mod devices;
mod digests;
mod direct_writer;
mod event_rows;
mod events;
mod expiry;
pub(super) mod files;
mod fleet_settings;
mod groups;
mod health;
mod history;
mod ids;
mod import_steps;
mod imports;
mod incident_steps;
mod ingest_buffer;
mod ingest_state;
mod job_figures;
mod journal;
mod journal_appender;
pub(super) mod journal_commands;
mod journal_writer;
mod keys;
pub(super) mod log_check;
mod maintenance;
mod migrations;
mod misdated;
mod paths;
mod quarantine;
mod roll_ups;
mod rows;
mod stats;
mod store;
mod summaries;
mod trusted_time;
mod verify;
mod watch;
mod write_connection;
mod writer_thread;

pub use backup::BackedUp;
pub use journal::{JournalFileReport, JournalReport, JournalSalvage, JournalStretch};
pub(super) use migrations::SqliteMigrations;
pub(super) use store::SqliteStore;
