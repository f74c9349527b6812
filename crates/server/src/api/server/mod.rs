//! The server itself: what it is, whether it is well, its measurements and its documentation.

pub(crate) mod docs;
pub(super) mod health;
pub(super) mod metrics;
pub(super) mod welcome;
