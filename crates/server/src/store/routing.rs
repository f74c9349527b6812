//! Which channels are told of which incidents, and how soon. The outbox asks it whenever an incident changes. Routes are read
//! here as they are stored; the API checks them before.

use jiff::ToSpan as _;
use pisync_core::{
    Timestamp,
    health::{IncidentScope, ProblemKind, Severity, time_zone},
};

use super::{Route, RouteDigest, RouteMatch};

/// How incidents reach people.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Routing {
    /// The channels that are enabled, by id.
    pub(super) channels: Vec<RoutedChannel>,
    /// In their order.
    pub(super) routes: Vec<Route>,
}

/// A channel that is enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RoutedChannel {
    pub(super) id: i64,
    pub(super) name: String,
    /// Whether it gets what no route matches.
    pub(super) is_default: bool,
}

/// How soon, and how often, somebody is told. In milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Timing {
    /// How long a message waits for others.
    pub(super) wait: i64,
    /// How long two messages about one group are apart at least.
    pub(super) interval: i64,
    /// After what time somebody is told again of what is still open.
    pub(super) remind: Option<i64>,
}

impl Timing {
    /// What counts where no route matches.
    pub(super) const BUILT_IN: Self = Self {
        wait: Route::WAIT_SECONDS as i64 * 1000,
        interval: Route::INTERVAL_SECONDS as i64 * 1000,
        remind: None,
    };
}

/// What an incident is about, as far as routes ask for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct About<'a> {
    pub(super) scope: IncidentScope,
    pub(super) subject: &'a str,
    pub(super) group: &'a str,
    pub(super) kind: ProblemKind,
    pub(super) severity: Severity,
    /// Of the device; those of groups and of the fleet have none.
    pub(super) tags: &'a [String],
}

impl Routing {
    /// Reads channels and routes as they are stored. What foreign SQL made wrong is left out.
    pub(super) fn stored(channels: Vec<(i64, String, bool)>, routes: &[String]) -> Self {
        let channels = channels
            .into_iter()
            .map(|(id, name, is_default)| RoutedChannel { id, name, is_default })
            .collect();
        let routes = routes
            .iter()
            .filter_map(|text| Route::from_json(&serde_json::from_str(text).ok()?))
            .collect();
        Self { channels, routes }
    }

    /// Whether anybody can be told of anything.
    pub(super) fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// Whether routes ask for the tags of devices.
    pub(super) fn asks_for_tags(&self) -> bool {
        self.routes.iter().any(|route| !route.matching.tags.is_empty())
    }

    /// The channels that are told of an incident, each once. Of several routes to a channel, the first one counts. That a channel
    /// does not work is told by others.
    pub(super) fn targets(&self, about: About<'_>) -> Vec<(i64, Timing)> {
        let mut targets: Vec<(i64, Timing)> = Vec::new();
        let mut is_matched = false;
        for route in &self.routes {
            if !matches(route, about) {
                continue;
            }
            is_matched = true;
            for channel in &route.channels {
                let can_tell = self.can_tell(about).any(|enabled| enabled.id == *channel);
                if can_tell && !targets.iter().any(|(known, _)| known == channel) {
                    targets.push((*channel, Timing::of(route)));
                }
            }
            if route.stops {
                break;
            }
        }
        if !is_matched {
            let defaults = self.can_tell(about).filter(|channel| channel.is_default);
            targets.extend(defaults.map(|channel| (channel.id, Timing::BUILT_IN)));
        }
        targets
    }

    /// The channels that are enabled, but for the one that an incident is about.
    fn can_tell(&self, about: About<'_>) -> impl Iterator<Item = &RoutedChannel> {
        let is_about =
            move |name: &str| about.scope == IncidentScope::Channel && about.subject == name;
        self.channels.iter().filter(move |channel| !is_about(&channel.name))
    }

    /// After what time a channel is told again of an incident; `None` when it is not.
    pub(super) fn reminder(&self, about: About<'_>, channel: i64) -> Option<i64> {
        let mut targets = self.targets(about).into_iter();
        targets.find(|(target, _)| *target == channel)?.1.remind
    }

    /// The shortest time after which anybody is told again; `None` when nobody is.
    pub(super) fn shortest_reminder(&self) -> Option<i64> {
        self.routes.iter().filter_map(|route| Timing::of(route).remind).min()
    }

    /// The channels that get a digest, and when its last time was, at `now` or before.
    pub(super) fn digests(&self, now: Timestamp) -> Vec<(i64, Timestamp)> {
        let mut digests: Vec<(i64, Timestamp)> = Vec::new();
        for route in &self.routes {
            let Some(last) = route.digest.as_ref().and_then(|digest| last_time(digest, now)) else {
                continue;
            };
            for channel in &route.channels {
                if !self.channels.iter().any(|enabled| enabled.id == *channel) {
                    continue;
                }
                match digests.iter_mut().find(|(known, _)| known == channel) {
                    Some((_, known)) => *known = last.max(*known),
                    None => digests.push((*channel, last)),
                }
            }
        }
        digests
    }
}

impl Timing {
    fn of(route: &Route) -> Self {
        let milliseconds = |seconds: u32| i64::from(seconds) * 1000;
        Self {
            wait: milliseconds(route.wait_seconds),
            interval: milliseconds(route.interval_seconds),
            remind: route.remind_seconds.map(milliseconds),
        }
    }
}

fn matches(route: &Route, about: About<'_>) -> bool {
    let RouteMatch { groups, tags, kinds, scopes, severity_at_least } = &route.matching;
    (groups.is_empty() || groups.iter().any(|group| group == about.group))
        && (tags.is_empty() || about.tags.iter().any(|tag| tags.contains(tag)))
        && (kinds.is_empty() || kinds.contains(&about.kind))
        && (scopes.is_empty() || scopes.contains(&about.scope))
        && about.severity >= *severity_at_least
}

/// The last time of a digest, at `now` or before. A time that a clock change skips counts an hour later.
fn last_time(digest: &RouteDigest, now: Timestamp) -> Option<Timestamp> {
    let zone = time_zone(&digest.timezone)?;
    let mut day = now.to_jiff().to_zoned(zone.clone()).date();
    // Some day of a week is one of its days.
    for _ in 0..8 {
        if digest.days.is_empty() || digest.days.contains(&day.weekday()) {
            let local = zone.to_ambiguous_zoned(day.to_datetime(digest.at));
            let at = Timestamp::truncate(local.compatible().ok()?.timestamp());
            if at <= now {
                return Some(at);
            }
        }
        day = day.checked_sub(1.day()).ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NO_TAGS: &[String] = &[];

    fn about<'a>(group: &'a str, severity: Severity) -> About<'a> {
        About {
            scope: IncidentScope::Device,
            subject: "pi",
            group,
            kind: ProblemKind::Silent,
            severity,
            tags: NO_TAGS,
        }
    }

    /// Routes with what is given, and else with what counts when nothing is said.
    fn routing(routes: &[Value]) -> Routing {
        let stored = |given: &Value| {
            let mut route = json!({
                "match": {
                    "groups": [], "tags": [], "kinds": [], "scopes": [], "severity_at_least": "info",
                },
                "wait_seconds": 60, "interval_seconds": 300, "remind_seconds": null, "digest": null,
                "stop": false,
            });
            for (name, value) in given.as_object().unwrap() {
                match (&mut route[name], value) {
                    (Value::Object(fields), Value::Object(given)) => {
                        fields.extend(given.clone());
                    }
                    (field, value) => *field = value.clone(),
                }
            }
            route.to_string()
        };
        let routes: Vec<_> = routes.iter().map(stored).collect();
        let channels = [(1, true), (2, false), (3, true)];
        let named = channels.map(|(id, is_default)| (id, format!("channel-{id}"), is_default));
        Routing::stored(named.to_vec(), &routes)
    }

    fn ids(routing: &Routing, about: About<'_>) -> Vec<i64> {
        routing.targets(about).into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn every_matching_route_applies_and_the_defaults_where_none_does() {
        let school = json!({"match": {"groups": ["school"]}, "channels": [2, 9]});
        let critical = json!({
            "match": {"severity_at_least": "critical"}, "channels": [2, 3], "wait_seconds": 0,
            "interval_seconds": 10, "remind_seconds": 60,
        });
        let both = routing(&[school.clone(), critical.clone()]);
        assert_eq!(ids(&both, about("other", Severity::Warning)), [1, 3]);
        assert_eq!(ids(&both, about("school", Severity::Warning)), [2]);
        assert_eq!(ids(&both, about("school", Severity::Critical)), [2, 3]);
        // The first route to a channel decides how soon.
        let targets = both.targets(about("school", Severity::Critical));
        assert_eq!(targets[0].1, Timing::BUILT_IN);
        let fast = Timing { wait: 0, interval: 10_000, remind: Some(60_000) };
        assert_eq!(targets[1].1, fast);
        let mut last = school;
        last["stop"] = json!(true);
        assert_eq!(ids(&routing(&[last, critical]), about("school", Severity::Critical)), [2]);
        assert_eq!(ids(&routing(&[]), about("", Severity::Info)), [1, 3]);
        assert_eq!(both.shortest_reminder(), Some(60_000));
    }

    #[test]
    fn a_route_may_ask_for_tags_kinds_and_scopes() {
        let of = |matches: Value| routing(&[json!({"match": matches, "channels": [2]})]);
        let tags = ["indoor".to_owned()];
        let tagged = About { tags: &tags, ..about("", Severity::Info) };
        assert_eq!(ids(&of(json!({"tags": ["indoor", "wall"]})), tagged), [2]);
        assert_eq!(ids(&of(json!({"tags": ["wall"]})), tagged), [1, 3]);
        assert_eq!(ids(&of(json!({"kinds": ["failing"]})), tagged), [1, 3]);
        assert_eq!(ids(&of(json!({"scopes": ["device"], "kinds": ["silent"]})), tagged), [2]);
        assert!(of(json!({"tags": ["wall"]})).asks_for_tags());
    }

    #[test]
    fn a_channel_is_not_told_of_itself() {
        let of = |scope, subject| About { scope, subject, ..about("", Severity::Critical) };
        for routing in [routing(&[]), routing(&[json!({"match": {}, "channels": [1, 3]})])] {
            assert_eq!(ids(&routing, of(IncidentScope::Channel, "channel-1")), [3]);
            assert_eq!(ids(&routing, of(IncidentScope::Device, "channel-1")), [1, 3]);
        }
    }

    #[test]
    fn a_digest_is_due_at_its_local_time_of_its_days() {
        let digest = json!({"at": "07:00", "days": ["mon"], "timezone": "Europe/Berlin"});
        let weekly = routing(&[json!({"match": {}, "channels": [2], "digest": digest})]);
        let at = |text: &str| Timestamp::parse_iso8601(text).unwrap();
        // Monday, 23 March; from the 29th on, Berlin is two hours ahead of UTC.
        for (now, last) in [
            ("2026-03-23T06:00:00Z", "2026-03-23T06:00:00Z"),
            ("2026-03-23T05:59:59Z", "2026-03-16T06:00:00Z"),
            ("2026-03-29T12:00:00Z", "2026-03-23T06:00:00Z"),
            ("2026-03-30T05:00:00Z", "2026-03-30T05:00:00Z"),
        ] {
            assert_eq!(weekly.digests(at(now)), [(2, at(last))], "{now}");
        }
    }
}
