//! The courier of a server: opens the secrets of a channel, makes the text of its messages, and sends them. `dispatch` decides
//! what is sent, and when. A lane with secrets that cannot be opened waits.

use std::sync::Arc;

use async_trait::async_trait;
use pisync_core::{Timestamp, health::ProblemKind};
use serde_json::Value;

use super::{
    channels::{self, ChannelConfig, ChannelKind, Delivery, Verdict},
    dispatch::{Courier, OpenChannel},
    message::{Message, MessageEvent, MessageItem, MessageKind},
    secrets::Secrets,
    sender::Sender,
};
use crate::{
    clock::Clock,
    store::{
        self, Attempt, FrozenText, ItemFacts, ItemKind, Lane, MessageFacts, MessageText,
        OutgoingMessage, REFUSALS,
    },
};

/// The courier of a server.
pub struct SystemCourier {
    /// What carries messages.
    pub sender: Sender,
    /// What opens the secrets of channels.
    pub secrets: Secrets,
    /// Where people reach this server.
    pub base_url: Option<String>,
    /// What dates signatures.
    pub clock: Clock,
}

impl SystemCourier {
    /// The settings of a channel, with its secrets in clear text.
    ///
    /// # Errors
    /// Why they cannot be read.
    pub fn config(
        &self,
        channel: i64,
        kind: &str,
        config: &Value,
        secrets: Option<&[u8]>,
    ) -> Result<ChannelConfig, String> {
        let kind = ChannelKind::from_word(kind).ok_or("its kind is unknown to this version")?;
        let secrets = match secrets {
            Some(sealed) => self.secrets.opener().open(channel, sealed).ok_or(
                "it is locked: its secrets were stored under another key; set SECRETS_KEY to that one, or set its secrets anew",
            )?,
            None => b"{}".to_vec(),
        };
        ChannelConfig::from_stored(kind, config, &secrets).ok_or_else(|| {
            "its settings in the database are not what this version wrote".to_owned()
        })
    }
}

impl Courier for SystemCourier {
    fn open(&self, lane: &Lane) -> Result<Box<dyn OpenChannel>, String> {
        let config = serde_json::from_str(&lane.config).unwrap_or(Value::Null);
        let config = self.config(lane.channel, &lane.kind, &config, lane.secrets.as_deref())?;
        Ok(Box::new(SystemChannel {
            text: Arc::new(ChannelText {
                config,
                template: lane.template.clone(),
                base_url: self.base_url.clone(),
            }),
            sender: self.sender.clone(),
            clock: self.clock.clone(),
        }))
    }
}

struct SystemChannel {
    text: Arc<ChannelText>,
    sender: Sender,
    clock: Clock,
}

#[async_trait]
impl OpenChannel for SystemChannel {
    fn text(&self) -> Arc<dyn MessageText> {
        Arc::clone(&self.text) as Arc<dyn MessageText>
    }

    async fn deliver(&self, message: &OutgoingMessage) -> Attempt {
        let text = &message.text;
        // The last attempt at a message that was refused.
        let plain = text.plain.as_deref().filter(|_| message.refusals + 1 >= REFUSALS);
        let at = self.clock.now();
        let attempt = channels::Attempt {
            id: &message.message_id,
            content_type: &text.content_type,
            body: plain.unwrap_or(&text.body),
            is_plain: plain.is_some(),
            at,
        };
        let config = &self.text.config;
        match config.deliver(&attempt, &self.sender).await {
            Delivery::Delivered { .. } => Attempt::Delivered(config.kind().spacing()),
            Delivery::Failed { error, retry_after, verdict, .. } => match verdict {
                Verdict::Channel => {
                    Attempt::ChannelFailed { error, retry_after, spread: spread(message.id, at) }
                }
                Verdict::Message => Attempt::Refused(error),
                Verdict::Disable => Attempt::Disabled(error),
            },
        }
    }
}

/// From 0.8 to 1.2, so that what failed at the same time is not tried again at the same time.
fn spread(message: i64, at: Timestamp) -> f64 {
    let mixed = message.wrapping_mul(7_919).wrapping_add(at.as_millisecond()).rem_euclid(401);
    f64::from(800 + i32::try_from(mixed).unwrap_or(200)) / 1000.0
}

struct ChannelText {
    config: ChannelConfig,
    template: Option<String>,
    base_url: Option<String>,
}

impl MessageText for ChannelText {
    fn text(&self, facts: &MessageFacts) -> FrozenText {
        let message = message(facts, self.base_url.clone());
        let rendered = self.config.render(&message, self.template.as_deref());
        FrozenText {
            content_type: rendered.content_type,
            body: rendered.body,
            plain: rendered.plain,
        }
    }
}

/// What is told, as data.
fn message(facts: &MessageFacts, base_url: Option<String>) -> Message {
    Message {
        kind: match facts.kind {
            store::MessageKind::Incidents => MessageKind::Incidents,
            store::MessageKind::Digest => MessageKind::Digest,
        },
        at: facts.at,
        group: Some(facts.group.clone()).filter(|group| !group.is_empty()),
        items: facts.items.iter().map(|item| item_of(item, facts.at)).collect(),
        items_total: facts.items_total,
        states: facts.states,
        base_url,
    }
}

fn item_of(item: &ItemFacts, now: Timestamp) -> MessageItem {
    let incident = &item.incident;
    let count = |name: &str| incident.summary[name].as_i64().unwrap_or(0);
    let presumed =
        if incident.kind == ProblemKind::Silent.as_str() { count("presumed") } else { 0 };
    let end = incident.resolved_at.unwrap_or(now);
    let lasted = (end.as_millisecond() - incident.since.as_millisecond()) / 1000;
    let is_over = item.what == ItemKind::Resolved;
    MessageItem {
        event: match item.what {
            ItemKind::Opened => MessageEvent::Opened,
            ItemKind::Reopened => MessageEvent::Reopened,
            ItemKind::Reminder => MessageEvent::Reminder,
            ItemKind::Flapping => MessageEvent::Flapping,
            ItemKind::Resolved => MessageEvent::Resolved,
        },
        id: incident.id,
        scope: incident.scope.clone(),
        subject: incident.subject.clone(),
        kind: incident.kind.clone(),
        severity: incident.severity.clone(),
        since: incident.since,
        resolution: incident.resolution.clone().filter(|_| is_over),
        lasted_seconds: is_over.then_some(lasted),
        affected: count(&incident.kind) + presumed,
        judged: count("judged"),
        last_heard: incident.summary["last_heard"].as_i64().and_then(Timestamp::from_millisecond),
        members: item.members.clone(),
        members_total: item.members_total,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_spread_within_a_fifth() {
        let at = |millisecond| Timestamp::from_millisecond(millisecond).unwrap();
        let spreads: Vec<f64> = (0..1_000).map(|number| spread(number, at(number * 13))).collect();
        assert!(spreads.iter().all(|spread| (0.8..=1.2).contains(spread)));
        let least = spreads.iter().copied().fold(2.0, f64::min);
        let most = spreads.iter().copied().fold(0.0, f64::max);
        assert!(least < 0.85 && most > 1.15, "{least} {most}");
    }
}
