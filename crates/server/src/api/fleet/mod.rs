//! The fleet as a whole, its groups, what is set for them, what is wrong with it, and the statistics. `api` merges the routes.

pub(super) mod groups;
pub(super) mod incidents;
pub(crate) mod level;
pub(super) mod stats;
pub(super) mod whole;
pub(crate) mod windows;
