//! The production store. `store` opens it; each resource is read and changed in the file of its name. An event passes
//! through `writer`, `transactions` and `statements`. Nothing outside `store` may depend on this module.

mod aggregated_events;
mod audit;
mod batch_columns;
mod claims;
mod connect;
mod connection;
pub(super) mod copy;
mod deletion;
mod devices;
mod digests;
mod dump;
mod durability;
mod errors;
mod events;
mod expiry;
mod fleet_settings;
mod groups;
mod health;
mod history;
mod hosts;
mod imports;
mod incident_steps;
mod keys;
mod locks;
mod maintenance;
mod migrations;
mod misdated;
mod no_session;
mod partitions;
mod roll_ups;
mod rows;
mod session;
mod statements;
mod stats;
mod store;
mod summaries;
pub(super) mod take_over;
mod tls;
mod transactions;
mod trusted_time;
mod verify;
mod writer;

pub(super) use dump::{dump_instead, restore_instead};
pub(super) use migrations::{PostgresMigrations, create_database};
pub(super) use store::PostgresStore;
