//! The PiSync server. `cli` reads what was typed, `app` wires the rest: HTTP in front, ingest and
//! store behind, and nothing looks back.

pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
mod env_file;
pub mod event_format;
pub mod export;
pub mod http;
pub mod import;
pub mod ingest;
pub mod keys;
pub mod logs;
pub mod maintenance;
pub mod metrics;
mod permissions;
pub mod random;
mod seldom;
pub mod store;
mod temporary;
mod threads;
