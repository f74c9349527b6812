//! Sends what is due: each second, one lane for each channel, all of them side by side, so that a channel that does not answer
//! delays nobody else. A lane is leased. Whoever dies with it has its messages sent by another server, under the same ids and
//! with the same bytes.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream::FuturesUnordered};

use crate::{
    clock::Clock,
    metrics::Metrics,
    store::{Attempt, FleetSettings, Lane, MessageText, OutgoingMessage, Store, StoreError},
};

/// How often it is looked for messages that are due.
pub const DISPATCH_INTERVAL: Duration = Duration::from_secs(1);

/// A channel that asks for a pause of up to this is not given back in between.
const SHORT_PAUSE: Duration = Duration::from_secs(1);

/// Carries messages to receivers.
#[async_trait]
pub trait Courier: Send + Sync {
    /// What sends to a channel.
    ///
    /// # Errors
    /// Why nothing can be sent to it now.
    fn open(&self, lane: &Lane) -> Result<Box<dyn OpenChannel>, String>;
}

/// A channel to which something can be sent.
#[async_trait]
pub trait OpenChannel: Send + Sync {
    /// What makes the text of its messages.
    fn text(&self) -> Arc<dyn MessageText>;

    /// Sends a message once.
    async fn deliver(&self, message: &OutgoingMessage) -> Attempt;
}

/// Sends what is due for as long as the server runs. `holder` is what this server is called.
pub(crate) async fn dispatch(
    store: Arc<dyn Store>,
    courier: Arc<dyn Courier>,
    clock: Clock,
    metrics: Arc<Metrics>,
    holder: String,
) {
    let mut lanes = FuturesUnordered::new();
    let mut busy = BTreeSet::new();
    let mut ticks = tokio::time::interval(DISPATCH_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Some(channel) = lanes.next() => {
                busy.remove(&channel);
            }
            _ = ticks.tick() => {
                // A clock that is not set would send everything, or nothing.
                let Ok(now) = clock.check() else { continue };
                let due = store.due_channels(now).await;
                let settings = match &due {
                    Ok(due) if due.iter().any(|channel| !busy.contains(channel)) => {
                        store.fleet_settings().await.map(Arc::new)
                    }
                    Ok(_) => continue,
                    Err(_) => Err(StoreError::Failed(String::new())),
                };
                let (due, settings) = match (due, settings) {
                    (Ok(due), Ok(settings)) => (due, settings),
                    (Err(error), _) | (_, Err(error)) => {
                        tracing::debug!(%error, "messages wait while the database is away");
                        continue;
                    }
                };
                for channel in due {
                    if busy.insert(channel) {
                        let sending = Sending {
                            store: &*store,
                            courier: &*courier,
                            clock: &clock,
                            metrics: Some(&metrics),
                            holder: &holder,
                        };
                        let settings = Arc::clone(&settings);
                        lanes.push(async move {
                            sending.send_to(channel, &settings).await;
                            channel
                        });
                    }
                }
            }
        }
    }
}

/// Sends everything that is due at the clock's present, channel after channel. A backtest calls it at each instant.
///
/// # Errors
/// Those of the store.
pub async fn dispatch_once(
    store: &dyn Store,
    courier: &dyn Courier,
    clock: &Clock,
    holder: &str,
) -> Result<(), StoreError> {
    let sending = Sending { store, courier, clock, metrics: None, holder };
    let due = store.due_channels(clock.now()).await?;
    if due.is_empty() {
        return Ok(());
    }
    let settings = Arc::new(store.fleet_settings().await?);
    for channel in due {
        sending.try_send_to(channel, &settings).await?;
    }
    Ok(())
}

struct Sending<'a> {
    store: &'a dyn Store,
    courier: &'a dyn Courier,
    clock: &'a Clock,
    metrics: Option<&'a Metrics>,
    holder: &'a str,
}

impl Sending<'_> {
    async fn send_to(&self, channel: i64, settings: &Arc<FleetSettings>) {
        if let Err(error) = self.try_send_to(channel, settings).await {
            // The lease ends by itself, and the messages are sent again.
            tracing::debug!(%error, channel, "messages wait while the database is away");
        }
    }

    /// Sends what is due to a channel, until nothing is left, it does not work, or it asks for a pause.
    async fn try_send_to(
        &self,
        channel: i64,
        settings: &Arc<FleetSettings>,
    ) -> Result<(), StoreError> {
        loop {
            // Renewed for each attempt.
            let now = self.clock.now();
            let Some(lane) = self.store.lease_channel(channel, self.holder, now).await? else {
                return Ok(());
            };
            let pause = match self.courier.open(&lane) {
                Ok(open) => self.send_one(&lane, &*open, settings).await?,
                Err(why) => {
                    self.store.postpone_channel(&lane, &why, now).await?;
                    tracing::warn!(channel = lane.name, why, "a channel cannot be used");
                    None
                }
            };
            match pause {
                Some(pause) if pause <= SHORT_PAUSE => tokio::time::sleep(pause).await,
                _ => return self.store.release_channel(&lane).await,
            }
        }
    }

    /// Sends one message. Answers the pause before the next one; `None` when there is none to be sent now.
    async fn send_one(
        &self,
        lane: &Lane,
        open: &dyn OpenChannel,
        settings: &Arc<FleetSettings>,
    ) -> Result<Option<Duration>, StoreError> {
        let now = self.clock.now();
        let message = self.store.next_message(lane, settings, &open.text(), now).await?;
        let Some(message) = message else { return Ok(None) };
        let attempt = open.deliver(&message).await;
        let is_noted = self.store.end_attempt(lane, &message, &attempt, self.clock.now()).await?;
        let (name, id) = (&lane.name, &message.message_id);
        let (result, pause) = match &attempt {
            Attempt::Delivered(pause) => {
                tracing::info!(channel = name, message = id, "message sent");
                ("sent", Some(*pause))
            }
            Attempt::ChannelFailed { error, .. } => {
                tracing::warn!(channel = name, message = id, error, "a channel does not work");
                ("failed", None)
            }
            Attempt::Refused(error) => {
                tracing::warn!(channel = name, message = id, error, "a message was refused");
                ("refused", None)
            }
            Attempt::Disabled(error) => {
                tracing::warn!(channel = name, error, "a channel wants no messages any more");
                ("disabled", None)
            }
        };
        if let Some(metrics) = self.metrics {
            metrics.notified(&lane.kind, result);
        }
        // Another server has the channel by now.
        Ok(pause.filter(|_| is_noted))
    }
}
