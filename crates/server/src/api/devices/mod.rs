//! The devices of the fleet, their histories, and which of them keep failing.

pub(super) mod history;
mod history_stream;
pub(super) mod list;
pub(super) mod one;
pub(super) mod repeated_failures;
