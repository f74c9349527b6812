//! Figures of the entire fleet. `api` merges the routes.

pub(super) mod stats;
