//! Access to the API, for admins: its keys and its audit log. `api` merges the routes.

pub(super) mod audit;
pub(super) mod keys;
