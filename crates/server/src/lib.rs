//! The PiSync server. `cli` parses the command line and `app` connects the other modules. Requests pass through `net`,
//! `middleware` and `api`; events then pass through `ingest` to `store`.

pub mod api;
pub mod app;
pub mod backtest;
mod build_info;
pub mod cli;
pub mod clock;
pub mod config;
mod csv_row;
pub mod event_format;
pub mod export;
pub mod fleet;
pub mod import;
mod incident_format;
pub mod ingest;
pub mod keys;
mod log_throttle;
pub mod logs;
pub mod maintenance;
pub mod metrics;
mod middleware;
pub mod net;
pub mod notify;
mod permissions;
pub mod random;
pub mod simulate;
pub mod store;
mod temporary;
mod threads;
mod tls_trust;
