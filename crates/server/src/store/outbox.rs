//! The outbox: which messages come of changed incidents. Items are added to the open bundle of a channel and a group, in the
//! transaction that changes the incidents, so that nothing is told that did not happen, and nothing is forgotten. Both stores
//! read [`OutboxFacts`], call [`bundle_writes`], and write what it answers. `delivery` sends what is due.
//!
//! Whoever was told that an incident opened is told that it ended. What nobody was told of drops out when it ends.

use std::collections::BTreeMap;

use pisync_core::{Timestamp, health::Resolution};

use super::{
    incident_steps::{IncidentChange, IncidentEvent},
    routing::{About, Routing, Timing},
};

/// What is known of the messages about the incidents of one group.
#[derive(Debug, Default)]
pub(super) struct OutboxFacts {
    /// Bundles whose text is not made yet: those of the group, and those that have items of the changed incidents.
    pub(super) open: Vec<OpenBundle>,
    /// Of the changed incidents: which channels were told that they opened, and not that they ended.
    pub(super) told: Vec<(i64, i64)>,
    /// When the text of the last bundle of a channel and the group was made, by channel.
    pub(super) last: Vec<(i64, Timestamp)>,
    /// The channels that were told of open incidents of the group besides the changed ones.
    pub(super) others: Vec<i64>,
    /// The tags of the devices that changed incidents are about, by device, if any route asks for them.
    pub(super) tags: Vec<(String, Vec<String>)>,
}

/// A bundle to which items may be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OpenBundle {
    pub(super) id: i64,
    pub(super) channel: i64,
    pub(super) group: String,
    /// Incidents, and what is told of them.
    pub(super) items: Vec<(i64, ItemKind)>,
}

/// What is told of an incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ItemKind {
    /// It is new.
    Opened,
    /// It had ended, and is open again.
    Reopened,
    /// It is still open.
    Reminder,
    /// It is open again, as so often; nothing more is told until it is calm.
    Flapping,
    /// It has ended.
    Resolved,
}

impl ItemKind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Opened, Self::Reopened, Self::Reminder, Self::Flapping, Self::Resolved];

    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Reopened => "reopened",
            Self::Reminder => "reminder",
            Self::Flapping => "flapping",
            Self::Resolved => "resolved",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

    fn of(change: IncidentChange) -> Self {
        match change {
            IncidentChange::Opened => Self::Opened,
            IncidentChange::Reopened => Self::Reopened,
            IncidentChange::Flapping => Self::Flapping,
            IncidentChange::Resolved => Self::Resolved,
        }
    }
}

/// A change of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BundleWrite {
    /// `None` for one that is to be made.
    pub(super) id: Option<i64>,
    pub(super) channel: i64,
    pub(super) group: String,
    /// When a new one is due. One that waits for the end of a quiet time is looked at again then, because what is added may
    /// not wait.
    pub(super) due_at: Timestamp,
    /// When one that exists is due at last: it says nothing but that all is over.
    pub(super) due_by: Option<Timestamp>,
    pub(super) added: Vec<(i64, ItemKind)>,
    pub(super) removed: Vec<(i64, ItemKind)>,
    /// Whether nothing is left in it.
    pub(super) is_dropped: bool,
}

/// A bundle while it is worked on.
struct Bundle {
    id: Option<i64>,
    channel: i64,
    group: String,
    /// When the first of what was added is to be told.
    due_at: Option<Timestamp>,
    /// When it is due if it says nothing but that all is over.
    closes_at: Option<Timestamp>,
    before: Vec<(i64, ItemKind)>,
    items: Vec<(i64, ItemKind)>,
}

/// What becomes of the bundles of a group when its incidents change. `group` is empty for the devices in none, and for the fleet.
pub(super) fn bundle_writes(
    facts: &OutboxFacts,
    routing: &Routing,
    group: &str,
    events: &[IncidentEvent],
    now: Timestamp,
) -> Vec<BundleWrite> {
    let mut bundles: Vec<Bundle> = facts
        .open
        .iter()
        .map(|open| Bundle {
            id: Some(open.id),
            channel: open.channel,
            group: open.group.clone(),
            due_at: None,
            closes_at: None,
            before: open.items.clone(),
            items: open.items.clone(),
        })
        .collect();
    for event in events {
        if event.what == IncidentChange::Resolved {
            end(&mut bundles, facts, routing, group, event, now);
        } else {
            begin(&mut bundles, facts, routing, group, event, now);
        }
    }
    bundles.into_iter().filter_map(|bundle| bundle.write(now)).collect()
}

/// Takes up an incident that is open now.
fn begin(
    bundles: &mut Vec<Bundle>,
    facts: &OutboxFacts,
    routing: &Routing,
    group: &str,
    event: &IncidentEvent,
    now: Timestamp,
) {
    let item = (event.id, ItemKind::of(event.what));
    for (channel, timing) in routing.targets(about(facts, group, event)) {
        let is_told = facts.told.contains(&(event.id, channel));
        let ended = bundles.iter_mut().find(|bundle| {
            bundle.channel == channel && bundle.items.contains(&(event.id, ItemKind::Resolved))
        });
        if let Some(bundle) = ended
            && is_told
        {
            // Its end was not told yet: to the receiver it has never ended.
            bundle.items.retain(|one| *one != (event.id, ItemKind::Resolved));
            if event.what != IncidentChange::Flapping {
                continue;
            }
        }
        let due_at = due(facts, channel, timing, now);
        bundle_of(bundles, channel, group, due_at).add(item);
    }
}

/// What routes ask of an incident.
fn about<'a>(facts: &'a OutboxFacts, group: &'a str, event: &'a IncidentEvent) -> About<'a> {
    let tags = facts.tags.iter().find(|(device, _)| *device == event.subject);
    About {
        scope: event.scope,
        subject: &event.subject,
        group,
        kind: event.kind,
        severity: event.severity,
        tags: tags.map_or(&[], |(_, tags)| tags),
    }
}

/// Takes up the end of an incident.
fn end(
    bundles: &mut Vec<Bundle>,
    facts: &OutboxFacts,
    routing: &Routing,
    group: &str,
    event: &IncidentEvent,
    now: Timestamp,
) {
    for bundle in bundles.iter_mut() {
        bundle.items.retain(|(incident, _)| *incident != event.id);
    }
    // What another incident has taken over goes on there.
    if event.resolution == Some(Resolution::Merged) {
        return;
    }
    let targets = routing.targets(about(facts, group, event));
    let told = facts.told.iter().filter(|(incident, _)| *incident == event.id);
    for (_, channel) in told {
        // Who would not be told any more that it opened is told that it ended.
        let target = targets.iter().find(|(target, _)| target == channel);
        let timing = target.map_or(Timing::BUILT_IN, |(_, timing)| *timing);
        // A message that says that all is well again does not wait for its turn.
        let can_close = !facts.others.contains(channel);
        let closes_at = now.saturating_add_milliseconds(timing.wait);
        let tells_more = |bundle: &Bundle| {
            bundle.channel == *channel
                && bundle.group == group
                && bundle.items.iter().any(|(_, what)| *what != ItemKind::Resolved)
        };
        let due_at = if can_close && !bundles.iter().any(tells_more) {
            closes_at
        } else {
            due(facts, *channel, timing, now)
        };
        let bundle = bundle_of(bundles, *channel, group, due_at);
        bundle.closes_at = can_close.then_some(closes_at);
        bundle.add((event.id, ItemKind::Resolved));
    }
}

/// When a new bundle is due.
fn due(facts: &OutboxFacts, channel: i64, timing: Timing, now: Timestamp) -> Timestamp {
    let soonest = now.saturating_add_milliseconds(timing.wait);
    let last = facts.last.iter().find(|(known, _)| *known == channel);
    last.map_or(soonest, |(_, last)| soonest.max(last.saturating_add_milliseconds(timing.interval)))
}

fn bundle_of<'a>(
    bundles: &'a mut Vec<Bundle>,
    channel: i64,
    group: &str,
    due_at: Timestamp,
) -> &'a mut Bundle {
    let is_it = |bundle: &Bundle| bundle.channel == channel && bundle.group == group;
    let place = bundles.iter().position(is_it).unwrap_or_else(|| {
        bundles.push(Bundle {
            id: None,
            channel,
            group: group.to_owned(),
            due_at: None,
            closes_at: None,
            before: Vec::new(),
            items: Vec::new(),
        });
        bundles.len() - 1
    });
    let bundle = &mut bundles[place];
    bundle.due_at = Some(bundle.due_at.map_or(due_at, |known| known.min(due_at)));
    bundle
}

impl Bundle {
    fn add(&mut self, item: (i64, ItemKind)) {
        if !self.items.contains(&item) {
            self.items.push(item);
        }
    }

    fn write(self, now: Timestamp) -> Option<BundleWrite> {
        let differ = |left: &[(i64, ItemKind)], right: &[(i64, ItemKind)]| {
            left.iter().filter(|item| !right.contains(item)).copied().collect::<Vec<_>>()
        };
        let added = differ(&self.items, &self.before);
        let removed = differ(&self.before, &self.items);
        if added.is_empty() && removed.is_empty() {
            return None;
        }
        Some(BundleWrite {
            id: self.id,
            channel: self.channel,
            group: self.group,
            due_at: self.due_at.unwrap_or(now),
            due_by: self.closes_at.filter(|_| {
                self.id.is_some() && self.items.iter().all(|(_, what)| *what == ItemKind::Resolved)
            }),
            is_dropped: self.id.is_some() && self.items.is_empty(),
            added,
            removed,
        })
    }
}

/// The id by which a receiver knows a message. After a backup was restored, another message with the same number has another
/// time, so that nobody takes it for one that was sent before.
pub(super) fn message_id(id: i64, created_at: Timestamp) -> String {
    format!("msg_{:x}_{id}", created_at.as_millisecond())
}

/// The incidents of the events, by the group in whose bundles they are told: those of the fleet are in that of no group.
pub(super) fn by_group(events: &[(String, IncidentEvent)]) -> BTreeMap<String, Vec<IncidentEvent>> {
    let mut groups: BTreeMap<String, Vec<IncidentEvent>> = BTreeMap::new();
    for (group, event) in events {
        groups.entry(group.clone()).or_default().push(event.clone());
    }
    groups
}

#[cfg(test)]
mod tests {
    use pisync_core::health::{IncidentScope, ProblemKind, Severity};

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_millisecond(1_772_442_000_000 + second * 1000).unwrap()
    }

    fn event(id: i64, what: IncidentChange) -> IncidentEvent {
        IncidentEvent {
            id,
            what,
            scope: IncidentScope::Device,
            subject: format!("d{id}"),
            kind: ProblemKind::Silent,
            severity: Severity::Warning,
            since: at(0),
            resolution: (what == IncidentChange::Resolved).then_some(Resolution::Recovered),
            members: 1,
        }
    }

    /// Channel 1 is the only one, and gets everything.
    fn writes(facts: &OutboxFacts, events: &[IncidentEvent]) -> Vec<BundleWrite> {
        let routing = Routing::stored(vec![(1, "ops".to_owned(), true)], &[]);
        bundle_writes(facts, &routing, "school", events, at(0))
    }

    fn open(items: &[(i64, ItemKind)]) -> Vec<OpenBundle> {
        vec![OpenBundle { id: 5, channel: 1, group: "school".to_owned(), items: items.to_vec() }]
    }

    #[test]
    fn what_changes_together_is_told_together() {
        let events = [event(1, IncidentChange::Opened), event(2, IncidentChange::Reopened)];
        let [write] = &writes(&OutboxFacts::default(), &events)[..] else { panic!() };
        assert_eq!((write.id, write.due_at), (None, at(60)));
        assert_eq!(write.added, [(1, ItemKind::Opened), (2, ItemKind::Reopened)]);
        // The bundle that is open takes up what comes later.
        let facts = OutboxFacts { open: open(&[(1, ItemKind::Opened)]), ..OutboxFacts::default() };
        let [write] = &writes(&facts, &events)[..] else { panic!() };
        assert_eq!((write.id, &write.added[..]), (Some(5), &[(2, ItemKind::Reopened)][..]));
        // Messages about one group are some minutes apart.
        let facts = OutboxFacts { last: vec![(1, at(-30))], ..OutboxFacts::default() };
        assert_eq!(writes(&facts, &events)[0].due_at, at(270));
    }

    #[test]
    fn what_nobody_was_told_of_drops_out_with_its_end() {
        let facts = OutboxFacts {
            open: open(&[(1, ItemKind::Opened), (2, ItemKind::Opened)]),
            ..OutboxFacts::default()
        };
        let [write] = &writes(&facts, &[event(1, IncidentChange::Resolved)])[..] else { panic!() };
        assert_eq!((&write.removed[..], write.is_dropped), (&[(1, ItemKind::Opened)][..], false));
        let both = [event(1, IncidentChange::Resolved), event(2, IncidentChange::Resolved)];
        let [write] = &writes(&facts, &both)[..] else { panic!() };
        assert!(write.is_dropped && write.added.is_empty());
    }

    #[test]
    fn whoever_was_told_that_it_opened_is_told_that_it_ended() {
        let told = OutboxFacts { told: vec![(1, 1), (1, 7)], ..OutboxFacts::default() };
        let ended = writes(&told, &[event(1, IncidentChange::Resolved)]);
        let channels: Vec<_> = ended.iter().map(|write| (write.channel, write.due_at)).collect();
        assert_eq!(channels, [(1, at(60)), (7, at(60))], "also who would not be told any more");
        // While others are open, the message waits for its turn.
        let facts = OutboxFacts {
            told: vec![(1, 1)],
            last: vec![(1, at(-30))],
            others: vec![1],
            ..OutboxFacts::default()
        };
        assert_eq!(writes(&facts, &[event(1, IncidentChange::Resolved)])[0].due_at, at(270));
        let facts = OutboxFacts { others: Vec::new(), ..facts };
        assert_eq!(writes(&facts, &[event(1, IncidentChange::Resolved)])[0].due_at, at(60));
        let merged = IncidentEvent {
            resolution: Some(Resolution::Merged),
            ..event(1, IncidentChange::Resolved)
        };
        assert_eq!(writes(&facts, &[merged]), []);
    }

    #[test]
    fn what_is_added_to_a_bundle_says_when_it_is_to_be_told() {
        let facts = OutboxFacts {
            open: open(&[(2, ItemKind::Opened)]),
            told: vec![(1, 1)],
            last: vec![(1, at(-30))],
            ..OutboxFacts::default()
        };
        // The bundle of another incident is not told earlier than people want it.
        let events = [event(1, IncidentChange::Resolved)];
        let [write] = &writes(&facts, &events)[..] else { panic!() };
        assert_eq!((write.id, write.due_at), (Some(5), at(270)));
        let facts = OutboxFacts { last: vec![(1, at(-900))], ..facts };
        let [write] = &writes(&facts, &events)[..] else { panic!() };
        assert_eq!((write.id, write.due_at), (Some(5), at(60)));
    }

    #[test]
    fn a_channel_is_not_told_of_itself() {
        let of_channel = |subject: &str| IncidentEvent {
            scope: IncidentScope::Channel,
            subject: subject.to_owned(),
            ..event(1, IncidentChange::Opened)
        };
        let facts = OutboxFacts::default();
        assert_eq!(writes(&facts, &[of_channel("ops")]), []);
        assert_eq!(writes(&facts, &[of_channel("other")]).len(), 1);
        let device =
            IncidentEvent { subject: "ops".to_owned(), ..event(1, IncidentChange::Opened) };
        assert_eq!(writes(&facts, &[device]).len(), 1);
    }

    #[test]
    fn that_all_is_over_waits_for_no_interval() {
        let facts = OutboxFacts {
            open: open(&[(2, ItemKind::Opened)]),
            told: vec![(1, 1)],
            last: vec![(1, at(-30))],
            ..OutboxFacts::default()
        };
        let ends = |ids: &[i64], facts: &OutboxFacts| {
            let events: Vec<_> =
                ids.iter().map(|id| event(*id, IncidentChange::Resolved)).collect();
            let [write] = &writes(facts, &events)[..] else { panic!() };
            (write.id, write.due_by)
        };
        assert_eq!(ends(&[1, 2], &facts), (Some(5), Some(at(60))));
        // Something else is to be told, or is still open.
        assert_eq!(ends(&[1], &facts), (Some(5), None));
        let facts = OutboxFacts { others: vec![1], ..facts };
        assert_eq!(ends(&[1, 2], &facts), (Some(5), None));
    }

    #[test]
    fn an_end_waits_as_long_as_its_route_says() {
        let route = serde_json::json!({
            "match": {
                "groups": ["school"], "tags": [], "kinds": [], "scopes": [], "severity_at_least": "info",
            },
            "channels": [1], "wait_seconds": 5, "interval_seconds": 90, "remind_seconds": null,
            "digest": null, "stop": false,
        });
        let channels = vec![(1, "ops".to_owned(), true), (7, "desk".to_owned(), true)];
        let routing = Routing::stored(channels, &[route.to_string()]);
        let ended = [event(1, IncidentChange::Resolved)];
        let dues = |facts: &OutboxFacts| {
            let writes = bundle_writes(facts, &routing, "school", &ended, at(0));
            writes.iter().map(|write| (write.channel, write.due_at)).collect::<Vec<_>>()
        };
        // No route leads to the other one any more.
        let facts = OutboxFacts { told: vec![(1, 1), (1, 7)], ..OutboxFacts::default() };
        assert_eq!(dues(&facts), [(1, at(5)), (7, at(60))]);
        let last = vec![(1, at(-30)), (7, at(-30))];
        let facts = OutboxFacts { last, others: vec![1, 7], ..facts };
        assert_eq!(dues(&facts), [(1, at(60)), (7, at(270))]);
    }

    #[test]
    fn an_end_that_was_not_told_is_taken_back() {
        let facts = OutboxFacts {
            open: open(&[(1, ItemKind::Resolved)]),
            told: vec![(1, 1)],
            ..OutboxFacts::default()
        };
        let [write] = &writes(&facts, &[event(1, IncidentChange::Reopened)])[..] else { panic!() };
        assert!(write.is_dropped && write.added.is_empty(), "{write:?}");
        let [write] = &writes(&facts, &[event(1, IncidentChange::Flapping)])[..] else { panic!() };
        assert_eq!(write.added, [(1, ItemKind::Flapping)]);
        assert!(!write.is_dropped);
    }
}
