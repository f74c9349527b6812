//! What a server is to be, as `app` takes it: checked, and without defaults that are still open. `serve` makes it of what
//! was typed, tests make it by themselves.

use std::path::PathBuf;

use reqwest::Url;

use super::http::HttpSettings;
use crate::{
    notify::{Hidden, secrets::SecretsKey, sender::SenderSettings},
    store::{Retention, Target},
};

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
    /// The address at which people reach this server, without a slash at the end, for links in messages.
    pub public_url: Option<String>,
    /// The key under which the secrets of channels are stored; `None` for the file beside an SQLite database.
    pub secrets_key: Option<SecretsKey>,
    /// How messages are sent.
    pub sender: SenderSettings,
    /// Who is told that this server lives.
    pub heartbeat_url: Option<Hidden<Url>>,
    /// For how many days event ids are remembered.
    pub event_id_retention_days: u32,
    /// How long single events are kept; `None` keeps them for ever.
    pub retention: Option<Retention>,
    /// Settings of the API.
    pub http: HttpSettings,
}
