//! The fleet as a whole, its groups, what is set for them, and the statistics. `api` merges the routes.

pub(super) mod groups;
pub(crate) mod level;
pub(super) mod stats;
pub(super) mod whole;
pub(crate) mod windows;
