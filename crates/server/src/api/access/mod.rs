//! Who may use the API, and who has changed what: for admins.

pub(super) mod audit;
pub(super) mod keys;
