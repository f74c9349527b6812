//! The receivers of a backtest's messages: webhooks that answer at once. What is to be told, and when, is decided by the
//! program's own outbox and dispatcher. Nothing leaves the machine.

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
        Actor, Attempt, ChannelCreation, FrozenText, IncidentEvent, Lane, MessageFacts,
        MessageText, NewChannel, NewConfig, OutgoingMessage, Store, Via,
    },
};

/// What the server is called that sends.
const HOLDER: &str = "backtest";

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
    ) -> Result<Vec<MessageEntry>, BacktestError> {
        let courier = Hand(Arc::clone(&self.received));
        dispatch_once(store, &courier, clock, HOLDER).await?;
        let received =
            std::mem::take(&mut *self.received.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(received
            .into_iter()
            .map(|(channel, message)| MessageEntry {
                at: Instant(now),
                channel,
                items: message
                    .items
                    .iter()
                    .filter_map(|(incident, what)| {
                        let (scope, subject, kind) = self.incidents.get(incident)?.clone();
                        let event = what.as_str().to_owned();
                        Some(MessageItem { event, scope, subject, kind })
                    })
                    .collect(),
            })
            .collect())
    }
}

/// Makes a webhook that gets what no route matches. It leads nowhere.
pub(super) async fn create_receiver(
    store: &dyn Store,
    name: &str,
    now: Timestamp,
) -> Result<(), BacktestError> {
    let channel = NewChannel {
        name: name.to_owned(),
        kind: "webhook".to_owned(),
        config: NewConfig { public: json!({}), secrets: None },
        is_enabled: true,
        is_default: Some(true),
        template: None,
    };
    let by = Actor { via: Via::CommandLine, address: None, at: now };
    match store.create_channel(&channel, &by).await? {
        ChannelCreation::Created(_) => Ok(()),
        other => {
            Err(BacktestError::Server(format!("the channel {name} cannot be made: {other:?}")))
        }
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
