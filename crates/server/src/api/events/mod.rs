//! Reports of devices: one event per request, or many. `api` merges the routes.

pub(super) mod many;
pub(super) mod one;
pub(super) mod start;
