//! What a server is to be, as `app` takes it: checked, and without defaults that are still open. `serve` makes it of what
//! was typed, tests make it by themselves.

use std::path::PathBuf;

use super::http::HttpSettings;
use crate::store::{Retention, Target};

/// The settings of a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The database.
    pub target: Target,
    /// The directory of users' own migrations. It need not exist.
    pub migrations_dir: PathBuf,
    /// Whether to run pending migrations at the start.
    pub auto_migrate: bool,
    /// Whether the server finds out how its fleet is doing.
    pub watches_fleet: bool,
    /// For how many days event ids are remembered.
    pub event_id_retention_days: u32,
    /// How long single events are kept; `None` keeps them for ever.
    pub retention: Option<Retention>,
    /// Settings of the API.
    pub http: HttpSettings,
}
