//! The fleet as a whole, its groups, what is set for them, what is wrong with it, who is told of it, and the statistics. `api`
//! merges the routes.

pub(crate) mod channels;
pub(super) mod groups;
pub(super) mod incidents;
pub(crate) mod level;
pub(super) mod notifications;
pub(super) mod routes;
pub(super) mod stats;
pub(super) mod whole;
pub(crate) mod windows;
