//! Devices: the list, the roster, one device, its history, and repeated failures. `api` merges the routes.

pub(crate) mod change;
pub(super) mod explain;
pub(super) mod history;
mod history_stream;
pub(super) mod list;
pub(super) mod one;
pub(super) mod repeated_failures;
pub(super) mod roster;
pub(crate) mod roster_rows;
