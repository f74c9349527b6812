//! The server itself: welcome, health, metrics and documentation. `api` merges the routes.

pub(crate) mod docs;
pub(super) mod health;
pub(super) mod metrics;
pub(super) mod welcome;
