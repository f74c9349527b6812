//! Channels, by which people are told of incidents, and the routes that choose them. The API and the command line call it
//! through `notify::manage`, and both stores implement it. To a store the secrets of a channel are opaque bytes, which it
//! gets encrypted and never shows.

use std::{collections::BTreeSet, fmt, sync::Arc};

use async_trait::async_trait;
use pisync_core::Timestamp;
use serde_json::{Value, json};

use super::{Actor, Route, StoreError};

/// The most channels that there may be.
pub const MOST_CHANNELS: u32 = 200;

/// Encrypts the secrets of the channel with this id. An error says why that is not possible.
pub type Seal = Arc<dyn Fn(i64) -> Result<Vec<u8>, String> + Send + Sync>;

/// Encrypts the stored secrets of a channel anew. An error says why that is not possible.
pub type Reseal = Arc<dyn Fn(i64, &[u8]) -> Result<Vec<u8>, String> + Send + Sync>;

/// Channels and routes. Each method is one transaction, and each change counts up the version of both and leaves a line in
/// the audit log.
#[async_trait]
pub trait Channels: Send + Sync {
    /// All channels, by id.
    async fn channels(&self) -> Result<ChannelList, StoreError>;

    /// Stores a new channel.
    async fn create_channel(
        &self,
        channel: &NewChannel,
        by: &Actor,
    ) -> Result<ChannelCreation, StoreError>;

    /// Changes a channel as it was found in `version` of the list.
    async fn update_channel(
        &self,
        id: i64,
        version: i64,
        update: &ChannelUpdate,
        by: &Actor,
    ) -> Result<ChannelOutcome, StoreError>;

    /// Deletes a channel with what waits to be sent by it, and takes it out of the routes. A route that has no other channel
    /// goes with it. Answers how much has waited; `None` when the channel is unknown.
    async fn delete_channel(&self, id: i64, by: &Actor) -> Result<Option<u64>, StoreError>;

    /// All routes, in their order.
    async fn routes(&self) -> Result<RouteList, StoreError>;

    /// Replaces all routes, if they are still those of `version`.
    async fn replace_routes(
        &self,
        version: i64,
        routes: &[Route],
        by: &Actor,
    ) -> Result<RoutesOutcome, StoreError>;

    /// Encrypts the secrets of all channels anew. When one cannot be, nothing is changed.
    async fn reseal_channels(&self, reseal: &Reseal, by: &Actor) -> Result<Resealed, StoreError>;
}

/// All channels at one moment.
#[derive(Debug)]
pub struct ChannelList {
    /// The number of the last change of any channel or route.
    pub version: i64,
    /// The channels, by id.
    pub channels: Vec<Channel>,
}

/// A channel as it is stored. Foreign SQL may have written it, so words are not taken for granted.
#[derive(Clone)]
pub struct Channel {
    /// Its id.
    pub id: i64,
    /// What people call it.
    pub name: String,
    /// The word for its kind.
    pub kind: String,
    /// What may be shown of it: a JSON object.
    pub config: Value,
    /// What may not, encrypted; `None` when there is nothing of that kind.
    pub secrets: Option<Vec<u8>>,
    /// Whether anything is sent by it.
    pub is_enabled: bool,
    /// Whether it gets what no route matches.
    pub is_default: bool,
    /// The template of its messages.
    pub template: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// How many attempts have failed since the last one that did not.
    pub failures: i64,
    /// Since when they fail.
    pub failing_since: Option<Timestamp>,
    /// Why the last of them failed.
    pub last_error: Option<String>,
    /// How many notifications wait to be sent by it.
    pub waiting: u64,
}

/// Shows which channel it is, and nothing of how to reach it.
impl fmt::Debug for Channel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Channel({} {:?}, {})", self.id, self.name, self.kind)
    }
}

/// The columns of a channel `c`, as both stores read them.
pub(super) const CHANNEL_COLUMNS: &str = "
    c.id, c.name, c.kind, c.config, c.secrets, c.is_enabled, c.is_default, c.template, c.created_at,
    c.failures, c.failing_since, c.last_error,
    (select count(*) from notifications n where n.channel = c.id and n.state = 'pending')
";

/// The public part of a channel as it is stored. Foreign SQL may have written text that is no JSON.
pub(super) fn stored_config(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| json!({}))
}

/// What a channel is told about its service.
#[derive(Clone)]
pub struct NewConfig {
    /// What may be shown of it: a JSON object.
    pub public: Value,
    /// What makes its secrets, encrypted; `None` when it has none.
    pub secrets: Option<Seal>,
}

/// A channel to be stored.
#[derive(Clone)]
pub struct NewChannel {
    /// What people call it. No other channel may have this name.
    pub name: String,
    /// The word for its kind.
    pub kind: String,
    /// What it is told.
    pub config: NewConfig,
    /// Whether anything is sent by it.
    pub is_enabled: bool,
    /// Whether it gets what no route matches; `None`: if it is the first.
    pub is_default: Option<bool>,
    /// The template of its messages.
    pub template: Option<String>,
}

impl NewChannel {
    /// The details of its line in the audit log. No secret is among them.
    pub(super) fn details(&self, is_default: bool) -> Value {
        json!({
            "name": self.name,
            "kind": self.kind,
            "config": self.config.public,
            "enabled": self.is_enabled,
            "default": is_default,
            "has_template": self.template.is_some(),
        })
    }
}

/// What a channel is to be from now on. Its kind stays.
#[derive(Clone)]
pub struct ChannelUpdate {
    /// What people call it.
    pub name: String,
    /// What it is told; `None` leaves that alone.
    pub config: Option<NewConfig>,
    /// Whether anything is sent by it.
    pub is_enabled: bool,
    /// Whether it gets what no route matches.
    pub is_default: bool,
    /// The template of its messages.
    pub template: Option<String>,
    /// Why it is changed.
    pub reason: UpdateReason,
}

/// Why a channel is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateReason {
    /// Somebody has set something that has no part in whether it works.
    Setting,
    /// Somebody has set where or how it sends, or has enabled it. Its failures are forgotten, and it is tried at once.
    Repair,
    /// Its signing secret is replaced.
    Rotation,
}

impl ChannelUpdate {
    /// What its line in the audit log calls it.
    pub(super) fn action(&self) -> &'static str {
        match self.reason {
            UpdateReason::Setting | UpdateReason::Repair => "channel.update",
            UpdateReason::Rotation => "channel.rotate",
        }
    }

    /// The details of its line in the audit log. No secret is among them.
    pub(super) fn details(&self) -> Value {
        json!({
            "name": self.name,
            "config": self.config.as_ref().map(|config| &config.public),
            "enabled": self.is_enabled,
            "default": self.is_default,
            "has_template": self.template.is_some(),
        })
    }
}

/// What became of a channel that was to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelCreation {
    /// It is stored under this id.
    Created(i64),
    /// Another channel has its name.
    NameTaken,
    /// There are [`MOST_CHANNELS`] already.
    TooMany,
    /// Its secrets cannot be encrypted, and why.
    NotSealed(String),
}

/// What became of a change of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelOutcome {
    /// It is done.
    Changed,
    /// There is no such channel.
    Unknown,
    /// Channels or routes were changed since that version.
    Stale,
    /// Another channel has its name.
    NameTaken,
    /// Its secrets cannot be encrypted, and why.
    NotSealed(String),
}

/// All routes at one moment.
#[derive(Debug, Clone)]
pub struct RouteList {
    /// The number of the last change of any channel or route.
    pub version: i64,
    /// The routes, in their order.
    pub routes: Vec<Route>,
}

/// What became of a change of the routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoutesOutcome {
    /// They are replaced, and this is the version now.
    Replaced(i64),
    /// Channels or routes were changed since that version.
    Stale,
    /// There are no channels with these ids.
    UnknownChannels(BTreeSet<i64>),
}

/// The ids in `routes` that are not in `known`.
pub(super) fn unknown_channels(routes: &[Route], known: &BTreeSet<i64>) -> BTreeSet<i64> {
    let named = routes.iter().flat_map(|route| route.channels.iter().copied());
    named.filter(|id| !known.contains(id)).collect()
}

/// A route as it is stored; `None` when foreign SQL made it something else.
pub(super) fn stored_route(text: &str) -> Option<Route> {
    Route::from_json(&serde_json::from_str(text).ok()?)
}

/// What became of secrets that were to be encrypted anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resealed {
    /// All are, those of so many channels.
    All(u64),
    /// None is, since those of a channel cannot be.
    Refused {
        /// The id of the channel.
        channel: i64,
        /// Why.
        why: String,
    },
}
