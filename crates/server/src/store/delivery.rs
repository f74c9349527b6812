//! Messages on their way: which are due, who sends them, and what became of each attempt. `notify::dispatch` calls it once a
//! second, and both stores implement it. Each channel has one lane: its messages are sent in their order, by one server at a
//! time. The text of a message is made once, in the transaction in which it begins to be told.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pisync_core::{
    Timestamp,
    health::{IncidentScope, ProblemKind, Severity, WindowTimes},
};
use serde_json::Value;

use super::{
    Actor, Count, FleetSettings, Incident, IncidentEvent, ItemKind, StateCounts, StoreError,
    WindowEffect, routing::About,
};

/// For how long a server may send without renewing its lease, in milliseconds: 25 s. An attempt takes 15 s at most.
pub(super) const LEASED: i64 = 25_000;

/// The most incidents that a message tells of. The rest is counted.
pub const MOST_ITEMS: usize = 50;

/// The most members of an incident that a message names.
pub const MOST_MEMBERS: usize = 20;

/// For how long messages are kept that were sent, failed or dropped, in milliseconds: 90 days.
pub(super) const NOTIFICATIONS_KEPT: i64 = 90 * 24 * 60 * 60 * 1000;

/// How many messages are deleted for their age at a time.
pub(super) const DELETED_AT_ONCE: i64 = 1_000;

/// A channel that fails for this long is an incident, in milliseconds: an hour.
pub(super) const FAILING_FOR_LONG: i64 = 60 * 60 * 1000;

/// How late a digest may begin, in milliseconds: an hour. Later, it waits for its next time.
pub(super) const DIGEST_WITHIN: i64 = 60 * 60 * 1000;

/// Until when a channel waits after so many failures in a row, in seconds; the last one counts for all further ones.
const RETRIES: [u64; 10] = [5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 28_800];

/// How long a channel waits whose secrets cannot be read, in milliseconds: 2 minutes.
pub(super) const LOCKED_FOR: i64 = 2 * 60 * 1000;

/// After so many refusals a message is given up. The last attempt is made with its plain text.
pub const REFUSALS: u64 = 3;

/// Messages on their way.
#[async_trait]
pub trait Delivery: Send + Sync {
    /// Gives back the channels that were leased when a server ended in the middle of sending. Whoever sends calls it before the
    /// first message. It does nothing where other servers may be sending: their leases end by themselves.
    async fn forget_leases(&self) -> Result<(), StoreError>;

    /// The channels that have a message to be sent at `now`, and that nobody else is sending to.
    async fn due_channels(&self, now: Timestamp) -> Result<Vec<i64>, StoreError>;

    /// Takes a channel for 25 s, or renews that. `None` when another server has it, or is changing it at this moment, and when
    /// it is gone, disabled, or waits. The latter does not count for its holder, who has waited.
    async fn lease_channel(
        &self,
        channel: i64,
        holder: &str,
        now: Timestamp,
    ) -> Result<Option<Lane>, StoreError>;

    /// Has a channel wait that cannot be used now, through nobody's fault: its secrets cannot be read.
    async fn postpone_channel(
        &self,
        lane: &Lane,
        why: &str,
        now: Timestamp,
    ) -> Result<(), StoreError>;

    /// Gives a channel back.
    async fn release_channel(&self, lane: &Lane) -> Result<(), StoreError>;

    /// The next message of a channel that is due at `now`. Its text is made if it has none yet.
    async fn next_message(
        &self,
        lane: &Lane,
        settings: &Arc<FleetSettings>,
        text: &Arc<dyn MessageText>,
        now: Timestamp,
    ) -> Result<Option<OutgoingMessage>, StoreError>;

    /// Notes what became of an attempt. False when another server has had the channel since; then nothing is noted. An attempt
    /// counts that took longer than the lease, or whose channel was disabled meanwhile: the receiver may have the message.
    async fn end_attempt(
        &self,
        lane: &Lane,
        message: &OutgoingMessage,
        outcome: &Attempt,
        now: Timestamp,
    ) -> Result<bool, StoreError>;

    /// Adds reminders of what is still open, and digests whose time has come.
    async fn add_reminders(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<(), StoreError>;

    /// Makes incidents of channels that have failed for an hour, and ends them. `None` when another server is at it.
    async fn reconcile_channels(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Vec<IncidentEvent>>, StoreError>;

    /// Deletes some messages that ended 90 days ago; true when more are left.
    async fn drop_old_notifications(&self, now: Timestamp) -> Result<bool, StoreError>;

    /// One page of messages, newest first.
    async fn notifications(
        &self,
        query: &NotificationQuery,
    ) -> Result<NotificationPage, StoreError>;

    /// Sends a message again that was given up.
    async fn retry_notification(&self, id: i64, by: &Actor) -> Result<RetryOutcome, StoreError>;
}

/// Makes the text of a channel's messages.
pub trait MessageText: Send + Sync {
    /// The text of a message.
    fn text(&self, facts: &MessageFacts) -> FrozenText;
}

/// A channel while somebody sends to it.
#[derive(Clone, PartialEq, Eq)]
pub struct Lane {
    /// The channel.
    pub channel: i64,
    /// What people call it.
    pub name: String,
    /// What kind it is.
    pub kind: String,
    /// What may be shown of its settings: a JSON object.
    pub config: String,
    /// What may not, encrypted.
    pub secrets: Option<Vec<u8>>,
    /// How people want its messages.
    pub template: Option<String>,
    /// Who sends. No two servers have the same name.
    pub holder: String,
    /// Until when nobody else does.
    pub leased_until: Timestamp,
    /// How many attempts have failed since the last one that did not.
    pub failures: u64,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { channel, name, kind, holder, failures, .. } = self;
        formatter
            .debug_struct("Lane")
            .field("channel", channel)
            .field("name", name)
            .field("kind", kind)
            .field("holder", holder)
            .field("failures", failures)
            .finish_non_exhaustive()
    }
}

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// Incidents that changed.
    Incidents,
    /// How the fleet is, at a time of day.
    Digest,
}

impl MessageKind {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Incidents => "incidents",
            Self::Digest => "digest",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Incidents, Self::Digest].into_iter().find(|kind| kind.as_str() == word)
    }
}

/// What is known when the text of a message is made.
#[derive(Debug, Clone)]
pub struct MessageFacts {
    /// The id by which the receiver knows it.
    pub message_id: String,
    /// What it is about.
    pub kind: MessageKind,
    /// The group; empty for none, and for the fleet.
    pub group: String,
    /// When.
    pub at: Timestamp,
    /// At most [`MOST_ITEMS`]; incidents of the fleet first, then those of groups, the worst first.
    pub items: Vec<ItemFacts>,
    /// How many there are.
    pub items_total: u64,
    /// How many devices are in which state; of a digest.
    pub states: Option<StateCounts>,
}

/// What is told of an incident.
#[derive(Debug, Clone)]
pub struct ItemFacts {
    /// What has happened.
    pub what: ItemKind,
    /// The incident as it is.
    pub incident: Incident,
    /// Some of its members, by id; at most [`MOST_MEMBERS`].
    pub members: Vec<String>,
    /// How many there are.
    pub members_total: i64,
}

/// A text, as it is sent in every attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrozenText {
    /// The media type of `body`.
    pub content_type: String,
    /// What is sent.
    pub body: Vec<u8>,
    /// What is sent instead when the receiver does not understand it.
    pub plain: Option<Vec<u8>>,
}

/// A message with its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingMessage {
    /// Its number.
    pub id: i64,
    /// The id by which the receiver knows it.
    pub message_id: String,
    /// What it is about, and the group: messages of one bundle belong together.
    pub bundle: String,
    /// What is sent.
    pub text: FrozenText,
    /// How often the receiver did not want it.
    pub refusals: u64,
    /// What is told: incidents, and what happened to them.
    pub items: Vec<(i64, ItemKind)>,
}

/// What became of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Attempt {
    /// The receiver has it. Nothing is sent to it for this long.
    Delivered(Duration),
    /// The channel does not work. It is tried again after this time, if the receiver has said one.
    ChannelFailed {
        /// What went wrong, without any secret.
        error: String,
        /// What the receiver asked for.
        retry_after: Option<Duration>,
        /// A part of the waiting time, from 0.8 to 1.2, so that servers do not try at the same time.
        spread: f64,
    },
    /// The receiver does not want this message. The next one may work.
    Refused(String),
    /// The receiver wants no messages any more.
    Disabled(String),
}

/// After what time a channel is tried again.
pub(super) fn retry_after(failures: u64, asked: Option<Duration>, spread: f64) -> Duration {
    /// What a receiver may ask for at most: an hour.
    const LONGEST_ASKED: Duration = Duration::from_secs(3_600);
    /// And at least: a second, so that a limit of requests costs little time. One that asks for no more and then fails again
    /// would get a request each second for as long as it fails, so from the third time on it is a minute.
    const SHORTEST_ASKED: Duration = Duration::from_secs(1);
    const SHORTEST_ASKED_AGAIN: Duration = Duration::from_secs(60);
    const AGAIN: u64 = 3;
    let place = usize::try_from(failures.saturating_sub(1)).unwrap_or(usize::MAX);
    let own = RETRIES[place.min(RETRIES.len() - 1)];
    let own = Duration::from_secs(own).mul_f64(spread.clamp(0.8, 1.2));
    let shortest = if failures < AGAIN { SHORTEST_ASKED } else { SHORTEST_ASKED_AGAIN };
    asked.map_or(own, |asked| asked.clamp(shortest, LONGEST_ASKED))
}

/// Which messages to list.
#[derive(Debug, Clone)]
pub struct NotificationQuery {
    /// Only those to this channel.
    pub channel: Option<i64>,
    /// Only those in this state.
    pub state: Option<NotificationState>,
    /// Only those with a smaller number.
    pub before: Option<i64>,
    /// The most messages.
    pub limit: u32,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotificationState {
    /// It waits.
    Pending,
    /// The receiver has it.
    Sent,
    /// It was given up.
    Failed,
    /// There was nothing left to tell.
    Dropped,
}

impl NotificationState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pending, Self::Sent, Self::Failed, Self::Dropped];

    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Sent => "sent",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        }
    }
}

/// One page of messages.
#[derive(Debug)]
pub struct NotificationPage {
    /// Newest first.
    pub notifications: Vec<Notification>,
    /// How many there are on all pages.
    pub total: Count,
    /// The number of the last one, when more follow.
    pub next: Option<i64>,
}

/// A message.
#[derive(Debug, Clone)]
pub struct Notification {
    /// Its number.
    pub id: i64,
    /// The id by which the receiver knows it.
    pub message_id: String,
    /// The channel.
    pub channel: i64,
    /// What the channel is called.
    pub channel_name: String,
    /// What it is about. Foreign SQL may have written it.
    pub kind: String,
    /// The group; empty for none.
    pub group: String,
    /// What became of it.
    pub state: String,
    /// When it was begun.
    pub created_at: Timestamp,
    /// When it is, or was, to be sent.
    pub due_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// How many attempts there were.
    pub attempts: i64,
    /// When the last one was.
    pub last_attempt_at: Option<Timestamp>,
    /// What went wrong.
    pub last_error: Option<String>,
    /// Incidents, and what is told of them.
    pub items: Vec<(i64, String)>,
}

/// What became of a wish to send a message again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryOutcome {
    /// It will be sent.
    Done,
    /// It was not given up.
    NotFailed,
    /// There is no such message.
    Unknown,
}

/// What a message that is due would tell, before its text is made.
pub(super) struct DueItem {
    pub(super) facts: ItemFacts,
    /// The group of the incident.
    pub(super) group: String,
    /// The tags of the device that it is about.
    pub(super) tags: Vec<String>,
    /// Whether that device is silent.
    pub(super) is_silent: bool,
}

/// What is told now, what waits for the end of a quiet time, and what is not told any more.
#[derive(Default)]
pub(super) struct Sorted {
    pub(super) told: Vec<ItemFacts>,
    /// Incidents, what is told of them, and until when they wait.
    pub(super) held: Vec<(i64, ItemKind, Timestamp)>,
    /// Reminders that nobody needs since they began to wait.
    pub(super) outdated: Vec<(i64, ItemKind)>,
}

/// Sorts out what a quiet time holds back: all but the ends of incidents, and on channels for people those, too.
pub(super) fn sort_out(
    items: Vec<DueItem>,
    lane_kind: &str,
    settings: &FleetSettings,
    now: Timestamp,
) -> Sorted {
    let mut sorted = Sorted::default();
    for item in items {
        let incident = &item.facts.incident;
        if item.facts.what == ItemKind::Reminder && !may_remind(incident, item.is_silent, now) {
            sorted.outdated.push((incident.id, item.facts.what));
            continue;
        }
        let passes = item.facts.what == ItemKind::Resolved && lane_kind == "webhook";
        let until = if passes { None } else { quiet_until(&item, settings, now) };
        match until {
            Some(until) => sorted.held.push((item.facts.incident.id, item.facts.what, until)),
            None => sorted.told.push(item.facts),
        }
    }
    sorted.told.sort_by_key(|item| {
        let place = |words: &[&str], word: &str| {
            words.iter().position(|known| *known == word).unwrap_or(words.len())
        };
        (
            item.what == ItemKind::Resolved,
            place(&["fleet", "channel", "group", "device"], &item.incident.scope),
            place(&["critical", "warning", "info"], &item.incident.severity),
            item.incident.opened_at,
            item.incident.id,
        )
    });
    sorted
}

/// Until when nobody is told of an incident.
fn quiet_until(item: &DueItem, settings: &FleetSettings, now: Timestamp) -> Option<Timestamp> {
    let incident = &item.facts.incident;
    let device = if incident.scope == "device" { incident.subject.as_str() } else { "" };
    settings
        .windows_of(WindowEffect::Quiet, device, &item.group, &item.tags)
        .filter_map(|window| WindowTimes::open_until(&window.times, now))
        .max()
}

/// What routes ask of an incident that is stored. `None` when foreign SQL has written it.
pub(super) fn about<'a>(
    incident: &'a Incident,
    group: &'a str,
    tags: &'a [String],
) -> Option<About<'a>> {
    Some(About {
        scope: IncidentScope::from_word(&incident.scope)?,
        subject: &incident.subject,
        group,
        kind: ProblemKind::from_word(&incident.kind)?,
        severity: Severity::from_word(&incident.severity)?,
        tags,
    })
}

/// Whether somebody is to be told again of an incident that is open. `is_hidden` is whether the device is silent, so that its
/// failures say nothing more.
pub(super) fn needs_reminder(
    incident: &Incident,
    told_at: Timestamp,
    remind: i64,
    is_hidden: bool,
    now: Timestamp,
) -> bool {
    may_remind(incident, is_hidden, now) && told_at.saturating_add_milliseconds(remind) <= now
}

/// Whether a reminder of an incident would say anything that people do not know.
fn may_remind(incident: &Incident, is_hidden: bool, now: Timestamp) -> bool {
    let is_failing = incident.kind == ProblemKind::Failing.as_str();
    incident.resolved_at.is_none()
        && !incident.is_flapping()
        && incident.acknowledged(now).is_none()
        && !(is_hidden && is_failing)
}

/// What an entry of a timeline says of a message.
pub(super) fn told_details(lane: &Lane, what: ItemKind) -> Value {
    serde_json::json!({ "channel": lane.name, "event": what.as_str() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_tried_again_ever_later() {
        let own = |failures| retry_after(failures, None, 1.0).as_secs();
        assert_eq!([1, 2, 3, 10, 11, 1_000].map(own), [5, 30, 120, 28_800, 28_800, 28_800]);
        assert_eq!(retry_after(1, None, 9.0), Duration::from_secs(6));
        let asked = |failures, seconds| {
            retry_after(failures, Some(Duration::from_secs(seconds)), 1.0).as_secs()
        };
        assert_eq!([0, 7, 90, 7_200].map(|seconds| asked(2, seconds)), [1, 7, 90, 3_600]);
        // Who always asks for a second is not asked each second.
        assert_eq!([0, 7, 90, 7_200].map(|seconds| asked(3, seconds)), [60, 60, 90, 3_600]);
    }

    #[test]
    fn a_lane_does_not_show_its_secrets() {
        let lane = Lane {
            channel: 1,
            name: "ops".to_owned(),
            kind: "slack".to_owned(),
            config: r#"{"url":"hidden"}"#.to_owned(),
            secrets: Some(b"hidden".to_vec()),
            template: Some("hidden".to_owned()),
            holder: "a".to_owned(),
            leased_until: Timestamp::from_millisecond(0).unwrap(),
            failures: 0,
        };
        let shown = format!("{lane:?}");
        assert!(shown.contains("ops") && !shown.contains("hidden"), "{shown}");
        assert!(!shown.contains("104, 105"), "{shown}");
    }
}
