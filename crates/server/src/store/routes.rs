//! Routes: which incidents are told by which channels, and when. The API reads them from requests, what adds messages reads
//! them from the store, where each is a JSON object.

use jiff::civil::{Time, Weekday};
use pisync_core::{
    Timestamp,
    health::{
        IncidentScope, ProblemKind, Severity, WEEKDAYS, time_zone,
        window::{time_of_day, weekday},
    },
};
use serde_json::{Value, json};

/// The most routes that there may be.
pub const MOST_ROUTES: usize = 100;

/// Which incidents are told by which channels. Every route that matches an incident applies, up to one that stops.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Which incidents it is for.
    pub matching: RouteMatch,
    /// The ids of the channels. Without any, nobody is told.
    pub channels: Vec<i64>,
    /// How long a message waits for others to go with it.
    pub wait_seconds: u32,
    /// The least time between two messages about the same group.
    pub interval_seconds: u32,
    /// How often people are reminded of what is open; `None`: never.
    pub remind_seconds: Option<u32>,
    /// When people are told of everything that is open at once, besides.
    pub digest: Option<RouteDigest>,
    /// Whether no further route applies to what it matches.
    pub stops: bool,
}

/// Which incidents a route is for: those that match all of it. An empty list matches everything.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteMatch {
    /// Groups, by their names.
    pub groups: Vec<String>,
    /// Tags of devices.
    pub tags: Vec<String>,
    /// Kinds of incidents.
    pub kinds: Vec<ProblemKind>,
    /// What incidents are about.
    pub scopes: Vec<IncidentScope>,
    /// The least severity.
    pub severity_at_least: Severity,
}

/// The times of a digest.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteDigest {
    /// The local time of day.
    pub at: Time,
    /// On which days.
    pub days: Vec<Weekday>,
    /// The IANA time zone, as it was given.
    pub timezone: String,
}

impl Route {
    /// How long messages wait when nothing else is said.
    pub const WAIT_SECONDS: u32 = 60;

    /// The least time between messages when nothing else is said.
    pub const INTERVAL_SECONDS: u32 = 300;

    /// As it is answered and stored.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let RouteMatch { groups, tags, kinds, scopes, severity_at_least } = &self.matching;
        let kinds: Vec<_> = kinds.iter().map(|kind| kind.as_str()).collect();
        let scopes: Vec<_> = scopes.iter().map(|scope| scope.as_str()).collect();
        json!({
            "match": {
                "groups": groups,
                "tags": tags,
                "kinds": kinds,
                "scopes": scopes,
                "severity_at_least": severity_at_least.as_str(),
            },
            "channels": self.channels,
            "wait_seconds": self.wait_seconds,
            "interval_seconds": self.interval_seconds,
            "remind_seconds": self.remind_seconds,
            "digest": self.digest.as_ref().map(RouteDigest::to_json),
            "stop": self.stops,
        })
    }

    /// Reads what [`Self::to_json`] wrote; `None` when foreign SQL made it something else.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        fn list<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
            value.as_array()?.iter().map(read).collect()
        }
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let number = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let matching = &value["match"];
        Some(Self {
            matching: RouteMatch {
                groups: list(&matching["groups"], text)?,
                tags: list(&matching["tags"], text)?,
                kinds: list(&matching["kinds"], |kind| ProblemKind::from_word(kind.as_str()?))?,
                scopes: list(&matching["scopes"], |scope| {
                    IncidentScope::from_word(scope.as_str()?)
                })?,
                severity_at_least: Severity::from_word(matching["severity_at_least"].as_str()?)?,
            },
            channels: list(&value["channels"], Value::as_i64)?,
            wait_seconds: number(&value["wait_seconds"])?,
            interval_seconds: number(&value["interval_seconds"])?,
            remind_seconds: match &value["remind_seconds"] {
                Value::Null => None,
                seconds => Some(number(seconds)?),
            },
            digest: match &value["digest"] {
                Value::Null => None,
                digest => Some(RouteDigest::from_json(digest)?),
            },
            stops: value["stop"].as_bool()?,
        })
    }
}

impl RouteDigest {
    /// Its next time after `after`. A time that a clock change skips counts an hour later.
    #[must_use]
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        let zone = time_zone(&self.timezone)?;
        let mut day = after.to_jiff().to_zoned(zone.clone()).date();
        // Some day of a week is one of its days, and today's may be over.
        for _ in 0..8 {
            if self.days.is_empty() || self.days.contains(&day.weekday()) {
                let local = zone.to_ambiguous_zoned(day.to_datetime(self.at));
                let at = Timestamp::truncate(local.compatible().ok()?.timestamp());
                if at > after {
                    return Some(at);
                }
            }
            day = day.tomorrow().ok()?;
        }
        None
    }

    fn to_json(&self) -> Value {
        let days = WEEKDAYS.iter().filter(|(_, day)| self.days.contains(day));
        let days: Vec<_> = days.map(|(name, _)| *name).collect();
        let at = self.at.strftime("%H:%M").to_string();
        json!({ "at": at, "days": days, "timezone": self.timezone })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let days = value["days"].as_array()?.iter();
        let timezone = value["timezone"].as_str()?;
        time_zone(timezone)?;
        Some(Self {
            at: time_of_day(value["at"].as_str()?)?,
            days: days.map(|name| weekday(name.as_str()?)).collect::<Option<_>>()?,
            timezone: timezone.to_owned(),
        })
    }
}

/// The routes that are left when a channel goes. One that has no other channel goes with it: what it matches is told by the
/// routes behind it.
pub(super) fn without_channel(routes: Vec<Route>, channel: i64) -> Vec<Route> {
    let rest = |mut route: Route| {
        let before = route.channels.len();
        route.channels.retain(|id| *id != channel);
        (before == 0 || !route.channels.is_empty()).then_some(route)
    };
    routes.into_iter().filter_map(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(channels: &[i64]) -> Route {
        Route {
            matching: RouteMatch {
                groups: vec!["school-17".to_owned()],
                tags: Vec::new(),
                kinds: vec![ProblemKind::Silent],
                scopes: vec![IncidentScope::Group, IncidentScope::Fleet],
                severity_at_least: Severity::Warning,
            },
            channels: channels.to_vec(),
            wait_seconds: 0,
            interval_seconds: 300,
            remind_seconds: Some(86_400),
            digest: Some(RouteDigest {
                at: time_of_day("07:00").unwrap(),
                days: vec![Weekday::Monday, Weekday::Sunday],
                timezone: "Europe/Berlin".to_owned(),
            }),
            stops: true,
        }
    }

    #[test]
    fn what_is_stored_is_read_again() {
        let full = route(&[3, 4]);
        assert_eq!(Route::from_json(&full.to_json()), Some(full.clone()));
        let plain = Route { remind_seconds: None, digest: None, ..full.clone() };
        assert_eq!(Route::from_json(&plain.to_json()), Some(plain));
        let fields = full.to_json();
        for field in fields.as_object().unwrap().keys() {
            let mut odd = fields.clone();
            odd[field] = json!("odd");
            assert_eq!(Route::from_json(&odd), None, "{field}");
        }
    }

    #[test]
    fn the_next_digest_is_at_its_local_time_of_one_of_its_days() {
        let of = |days: &[Weekday]| RouteDigest {
            at: time_of_day("02:30").unwrap(),
            days: days.to_vec(),
            timezone: "Europe/Berlin".to_owned(),
        };
        let at = |text: &str| Timestamp::parse_iso8601(text).unwrap();
        // Berlin skips 02:00 to 03:00 on Sunday, 29 March 2026.
        for (days, after, next) in [
            (&[][..], "2026-03-28T01:29:59Z", "2026-03-28T01:30:00Z"),
            (&[], "2026-03-28T01:30:00Z", "2026-03-29T01:30:00Z"),
            (&[], "2026-03-29T01:30:00Z", "2026-03-30T00:30:00Z"),
            (&[Weekday::Monday], "2026-03-23T01:30:00Z", "2026-03-30T00:30:00Z"),
            (&[Weekday::Monday, Weekday::Friday], "2026-03-24T00:00:00Z", "2026-03-27T01:30:00Z"),
        ] {
            assert_eq!(of(days).next_after(at(after)), Some(at(next)), "{days:?} {after}");
        }
    }

    #[test]
    fn a_route_goes_with_its_last_channel() {
        let routes = vec![route(&[3]), route(&[3, 4]), route(&[]), route(&[5])];
        let left = without_channel(routes, 3);
        let channels: Vec<_> = left.iter().map(|route| route.channels.clone()).collect();
        assert_eq!(channels, [vec![4], vec![], vec![5]]);
    }
}
