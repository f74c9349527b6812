//! Devices: the list, one device, its history, and repeated failures. `api` merges the routes.

pub(super) mod explain;
pub(super) mod history;
mod history_stream;
pub(super) mod list;
pub(super) mod one;
pub(super) mod repeated_failures;
