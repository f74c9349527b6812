//! The PiSync server. `cli` reads what was typed and `app` wires the rest: `net`, `middleware` and `api` in front, `ingest`
//! and `store` behind.

pub mod api;
pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod event_format;
pub mod export;
pub mod import;
pub mod ingest;
pub mod keys;
pub mod logs;
pub mod maintenance;
pub mod metrics;
mod middleware;
pub mod net;
mod permissions;
pub mod random;
mod seldom;
pub mod store;
mod temporary;
mod threads;
