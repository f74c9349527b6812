//! The receivers of a backtest's messages: channels that take at once what is sent to them. What is to be told, to whom and
//! when is decided by the program's own routes, outbox and dispatcher. Nothing leaves the machine, and no secret is read.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use pisync_core::Timestamp;
use serde_json::json;

use super::{
    BacktestError,
    scenario::{Instant, MessageEntry, MessageItem},
};
use crate::{
    clock::Clock,
    notify::dispatch::{Courier, OpenChannel, dispatch_once},
    store::{
        Actor, Attempt, Channel, ChannelCreation, FrozenText, IncidentEvent, ItemKind, Lane,
        MessageFacts, MessageKind, MessageText, NewChannel, NewConfig, OutgoingMessage, Route,
        RoutesOutcome, Store, Via,
    },
};

/// What the server is called that sends.
const HOLDER: &str = "backtest";

/// A channel by which people would have been told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayedChannel {
    /// The number by which it is stored; `None` for the one that a backtest has where there are none.
    pub id: Option<i64>,
    /// What people call it.
    pub name: String,
    /// The word for its kind.
    pub kind: String,
    /// Whether anything is sent by it.
    pub is_enabled: bool,
    /// Whether it gets what no route matches.
    pub is_default: bool,
}

impl From<Channel> for ReplayedChannel {
    fn from(channel: Channel) -> Self {
        let Channel { id, name, kind, is_enabled, is_default, .. } = channel;
        Self { id: Some(id), name, kind, is_enabled, is_default }
    }
}

impl ReplayedChannel {
    /// A webhook that gets what no route matches.
    pub(super) fn unstored(name: &str) -> Self {
        Self {
            id: None,
            name: name.to_owned(),
            kind: "webhook".to_owned(),
            is_enabled: true,
            is_default: true,
        }
    }
}

/// A message that a channel has taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentMessage {
    /// When.
    pub at: Timestamp,
    /// The name of the channel.
    pub channel: String,
    /// Whether it tells of incidents or is a digest.
    pub kind: MessageKind,
    /// The group that it is about; `None` for devices in none, and for the fleet.
    pub group: Option<String>,
    /// What it tells.
    pub items: Vec<SentItem>,
}

/// What a message tells of an incident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentItem {
    /// The incident.
    pub incident: i64,
    /// What has happened.
    pub event: ItemKind,
    /// What the incident is about: a device, a group, the fleet.
    pub scope: String,
    /// Which.
    pub subject: String,
    /// The problem.
    pub kind: String,
}

impl From<SentMessage> for MessageEntry {
    fn from(message: SentMessage) -> Self {
        let items = message.items.into_iter().map(|item| {
            let SentItem { incident: _, event, scope, subject, kind } = item;
            MessageItem { event: event.as_str().to_owned(), scope, subject, kind }
        });
        Self { at: Instant(message.at), channel: message.channel, items: items.collect() }
    }
}

/// All receivers.
#[derive(Default)]
pub(super) struct Receivers {
    /// The incidents that there were: scope, subject and kind.
    incidents: HashMap<i64, (String, String, String)>,
    received: Received,
}

/// Messages that were received: the channel, and what was told.
type Received = Arc<Mutex<Vec<(String, OutgoingMessage)>>>;

impl Receivers {
    /// Takes in what became of incidents.
    pub(super) fn learn(&mut self, events: &[IncidentEvent]) {
        for event in events {
            let words = (
                event.scope.as_str().to_owned(),
                event.subject.clone(),
                event.kind.as_str().to_owned(),
            );
            self.incidents.insert(event.id, words);
        }
    }

    /// Has everything sent that is due, and answers what was received.
    pub(super) async fn receive(
        &self,
        store: &dyn Store,
        clock: &Clock,
        now: Timestamp,
    ) -> Result<Vec<SentMessage>, BacktestError> {
        let courier = Hand(Arc::clone(&self.received));
        dispatch_once(store, &courier, clock, HOLDER).await?;
        let received =
            std::mem::take(&mut *self.received.lock().unwrap_or_else(PoisonError::into_inner));
        let of = |(channel, message): (String, OutgoingMessage)| {
            // The name of a group may have slashes, too.
            let (kind, group) = message.bundle.split_once('/').unwrap_or((&message.bundle, ""));
            let items = message.items.iter().filter_map(|(incident, event)| {
                let (scope, subject, kind) = self.incidents.get(incident)?.clone();
                Some(SentItem { incident: *incident, event: *event, scope, subject, kind })
            });
            SentMessage {
                at: now,
                channel,
                kind: MessageKind::from_word(kind).unwrap_or(MessageKind::Incidents),
                group: Some(group.to_owned()).filter(|group| !group.is_empty()),
                items: items.collect(),
            }
        };
        Ok(received.into_iter().map(of).collect())
    }
}

/// Makes channels that lead nowhere, and the routes to them. The ids of `routes` are those of the channels.
pub(super) async fn create_receivers(
    store: &dyn Store,
    channels: &[ReplayedChannel],
    routes: &[Route],
    now: Timestamp,
) -> Result<(), BacktestError> {
    let by = Actor { via: Via::CommandLine, address: None, at: now };
    let mut made = HashMap::new();
    for channel in channels {
        let new = NewChannel {
            name: channel.name.clone(),
            kind: channel.kind.clone(),
            config: NewConfig { public: json!({}), secrets: None },
            is_enabled: channel.is_enabled,
            is_default: Some(channel.is_default),
            template: None,
        };
        match store.create_channel(&new, &by).await? {
            ChannelCreation::Created(id) => made.extend(channel.id.map(|stored| (stored, id))),
            other => {
                let name = &channel.name;
                let why = format!("the channel {name} cannot be made: {other:?}");
                return Err(BacktestError::Server(why));
            }
        }
    }
    if routes.is_empty() {
        return Ok(());
    }
    let routes: Vec<_> = routes
        .iter()
        .map(|route| {
            let channels = route.channels.iter().filter_map(|id| made.get(id).copied());
            Route { channels: channels.collect(), ..route.clone() }
        })
        .collect();
    let version = store.routes().await?.version;
    match store.replace_routes(version, &routes, &by).await? {
        RoutesOutcome::Replaced(_) => Ok(()),
        other => Err(BacktestError::Server(format!("the routes cannot be made: {other:?}"))),
    }
}

/// Takes messages and gives them to the receivers.
struct Hand(Received);

impl Courier for Hand {
    fn open(&self, lane: &Lane) -> Result<Box<dyn OpenChannel>, String> {
        Ok(Box::new(Receiver { name: lane.name.clone(), received: Arc::clone(&self.0) }))
    }
}

struct Receiver {
    name: String,
    received: Received,
}

#[async_trait]
impl OpenChannel for Receiver {
    fn text(&self) -> Arc<dyn MessageText> {
        Arc::new(NoText)
    }

    async fn deliver(&self, message: &OutgoingMessage) -> Attempt {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.push((self.name.clone(), message.clone()));
        Attempt::Delivered(Duration::ZERO)
    }
}

/// What is told is known without a text.
struct NoText;

impl MessageText for NoText {
    fn text(&self, _: &MessageFacts) -> FrozenText {
        FrozenText { content_type: "text/plain".to_owned(), body: Vec::new(), plain: None }
    }
}
