//! Sends what is due: each second, one lane for each channel, all of them side by side, so that a channel that does not answer
//! delays nobody else. A lane is leased. Whoever dies with it has its messages sent by another server, under the same ids and
//! with the same bytes.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use crate::{
    clock::Clock,
    metrics::Metrics,
    random::Randomness,
    store::{Attempt, FleetSettings, Lane, MessageText, OutgoingMessage, Store, StoreError},
};

/// How often it is looked for messages that are due.
pub const DISPATCH_INTERVAL: Duration = Duration::from_secs(1);

/// How many channels may ask the database at the same time. PostgreSQL has 8 connections for everything but ingest, and whoever
/// waits for one for 5 s gives up: 200 channels would leave none to others, nor to one another.
const TURNS: usize = 3;

/// How often it is tried again to note what became of an attempt, a second apart. A lease lasts 25 s, of which an attempt takes 15
/// at most.
const NOTE_AGAIN: u32 = 10;

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

/// Sends what is due for as long as the server runs. `holder` is what this server is called, and no other one.
pub(crate) async fn dispatch(
    store: Arc<dyn Store>,
    courier: Arc<dyn Courier>,
    clock: Clock,
    metrics: Arc<Metrics>,
    holder: String,
) {
    let sending = Sending {
        store: &*store,
        courier: &*courier,
        clock: &clock,
        metrics: Some(&metrics),
        holder: &holder,
        turns: Semaphore::new(TURNS),
    };
    // Looking and sending go on side by side: while the database does not answer, those who were sent something may.
    let (tell, told) = mpsc::channel(1);
    tokio::join!(look(&*store, &clock, tell), sending.send_to_all(told));
}

/// Channels that have something to be sent, and the settings by which messages are made.
type Work = (Vec<i64>, Arc<FleetSettings>);

/// Looks for messages that are due.
async fn look(store: &dyn Store, clock: &Clock, tell: mpsc::Sender<Work>) {
    let mut ticks = tokio::time::interval(DISPATCH_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut is_first = true;
    loop {
        ticks.tick().await;
        // A clock that is not set would send everything, or nothing.
        let Ok(now) = clock.check() else { continue };
        let work = async {
            if is_first {
                store.forget_leases().await?;
            }
            let due = store.due_channels(now).await?;
            let settings = match due[..] {
                [] => None,
                _ => Some(Arc::new(store.fleet_settings().await?)),
            };
            Ok::<_, StoreError>((due, settings))
        };
        match work.await {
            Ok((due, settings)) => {
                is_first = false;
                if let Some(settings) = settings
                    && tell.send((due, settings)).await.is_err()
                {
                    return;
                }
            }
            Err(error) => log_failure(&error, None),
        }
    }
}

fn log_failure(error: &StoreError, channel: Option<i64>) {
    if let StoreError::Unavailable(error) = error {
        // Ingest logs that already.
        tracing::debug!(error, channel, "messages wait while the database is away");
    } else {
        tracing::warn!(%error, channel, "sending messages failed; it will be tried again");
    }
}

/// What a server is called among those that send. Its address and its process may have the same numbers as another's: in
/// containers they always have.
///
/// # Errors
/// When the system gives no random numbers.
pub(crate) fn holder_name(node: &str, randomness: &Randomness) -> Result<String, String> {
    let [a, b, c, d, ..] = randomness.bytes()?;
    Ok(format!("{node} {:08x}", u32::from_be_bytes([a, b, c, d])))
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
    let turns = Semaphore::new(TURNS);
    let sending = Sending { store, courier, clock, metrics: None, holder, turns };
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
    /// Permits to ask the database.
    turns: Semaphore,
}

impl Sending<'_> {
    /// Sends to the channels that it is told of, to all of them at once.
    async fn send_to_all(&self, mut told: mpsc::Receiver<Work>) {
        let mut lanes = FuturesUnordered::new();
        let mut busy = BTreeSet::new();
        loop {
            tokio::select! {
                Some(channel) = lanes.next() => {
                    busy.remove(&channel);
                }
                work = told.recv() => {
                    let Some((due, settings)) = work else { return };
                    for channel in due {
                        if busy.insert(channel) {
                            let settings = Arc::clone(&settings);
                            lanes.push(async move {
                                self.send_to(channel, &settings).await;
                                channel
                            });
                        }
                    }
                }
            }
        }
    }

    async fn send_to(&self, channel: i64, settings: &Arc<FleetSettings>) {
        if let Err(error) = self.try_send_to(channel, settings).await {
            log_failure(&error, Some(channel));
        }
    }

    /// Sends what is due to a channel, until nothing is left, it does not work, or it asks for a pause.
    async fn try_send_to(
        &self,
        channel: i64,
        settings: &Arc<FleetSettings>,
    ) -> Result<(), StoreError> {
        let mut held: Option<Lane> = None;
        loop {
            let turn = self.turn().await;
            // Renewed for each attempt.
            let now = self.clock.now();
            let Some(lane) = self.store.lease_channel(channel, self.holder, now).await? else {
                // Somebody may be changing the channel. What is held is not kept from anybody until then.
                return match held {
                    Some(lane) => self.store.release_channel(&lane).await,
                    None => Ok(()),
                };
            };
            let sent = match self.courier.open(&lane) {
                Ok(open) => self.send_one(turn, &lane, &*open, settings).await,
                Err(why) => {
                    let _turn = turn;
                    tracing::warn!(channel = lane.name, why, "a channel cannot be used");
                    self.store.postpone_channel(&lane, &why, now).await.map(|()| None)
                }
            };
            match sent {
                Ok(Some(pause)) if pause <= SHORT_PAUSE => tokio::time::sleep(pause).await,
                Ok(_) => return self.release(&lane).await,
                Err(error) => {
                    // If that is not possible either, the lease ends by itself.
                    let _ = self.release(&lane).await;
                    return Err(error);
                }
            }
            held = Some(lane);
        }
    }

    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.acquire().await.ok()
    }

    async fn release(&self, lane: &Lane) -> Result<(), StoreError> {
        let _turn = self.turn().await;
        self.store.release_channel(lane).await
    }

    /// Sends one message. Answers the pause before the next one; `None` when there is none to be sent now.
    async fn send_one(
        &self,
        turn: Option<SemaphorePermit<'_>>,
        lane: &Lane,
        open: &dyn OpenChannel,
        settings: &Arc<FleetSettings>,
    ) -> Result<Option<Duration>, StoreError> {
        let now = self.clock.now();
        let message = self.store.next_message(lane, settings, &open.text(), now).await?;
        let Some(message) = message else { return Ok(None) };
        // This server may have stood still, and another one may be sending.
        if self.clock.now() >= lane.leased_until {
            return Ok(Some(Duration::ZERO));
        }
        drop(turn);
        let attempt = open.deliver(&message).await;
        let is_noted = self.end_attempt(lane, &message, &attempt).await?;
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

    /// Notes what became of an attempt, also when the database is away for some seconds: what is not noted is sent again.
    async fn end_attempt(
        &self,
        lane: &Lane,
        message: &OutgoingMessage,
        attempt: &Attempt,
    ) -> Result<bool, StoreError> {
        let mut tries = 0;
        loop {
            let turn = self.turn().await;
            match self.store.end_attempt(lane, message, attempt, self.clock.now()).await {
                // Nothing was changed.
                Err(StoreError::Unavailable(_) | StoreError::Transient(_))
                    if tries < NOTE_AGAIN =>
                {
                    tries += 1;
                    drop(turn);
                    tokio::time::sleep(DISPATCH_INTERVAL).await;
                }
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_with_the_same_numbers_have_names_of_their_own() {
        let name = || holder_name("0.0.0.0:3000 (1)", &Randomness::system()).unwrap();
        let (one, other) = (name(), name());
        assert!(one.starts_with("0.0.0.0:3000 (1) ") && other.starts_with("0.0.0.0:3000 (1) "));
        assert_ne!(one, other);
    }
}
