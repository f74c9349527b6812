//! What tests stand on: databases to work in, events to store, and the naive truth to compare with.

pub(crate) mod documents;
pub(crate) mod driven;
pub(crate) mod events;
pub(crate) mod fleet;
pub(crate) mod http;
pub(crate) mod locked_server;
pub(crate) mod log;
pub(crate) mod node_service;
pub(crate) mod pgbouncer;
pub(crate) mod postgres;
pub(crate) mod program;
pub(crate) mod proxy;
pub(crate) mod receiver;
pub(crate) mod server;
pub(crate) mod small_disk;
#[macro_use]
pub(crate) mod store;
