//! A sync event and when a server received it: what exports hold, and what imports read back.

use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use crate::{Arrival, ParseError, SyncEvent, Timestamp, Violation};

const FIELD: &str = "created_at";

/// No server received anything before: 1970-01-01, where a clock that was never set begins.
const EARLIEST_MILLISECOND: i64 = 0;

/// A sync event that a server may have received before.
#[derive(Debug, Clone, PartialEq)]
pub struct ReceivedEvent {
    /// What was reported.
    pub event: SyncEvent,
    /// When it was received; `None` for one that arrives now.
    pub created_at: Option<Timestamp>,
}

impl ReceivedEvent {
    /// Reads one event from JSON as [`SyncEvent::from_json`] does, by the clock of the moment at which it
    /// was received: that is its `created_at`, or else `arrival`.
    ///
    /// # Errors
    /// As that one has them. A `created_at` that is wrong is named after the other wrong fields.
    pub fn from_json(body: &[u8], arrival: Arrival) -> Result<Self, ParseError> {
        let (created_at, violation) = match created_at(body, arrival) {
            Ok(created_at) => (created_at, None),
            Err(violation) => (None, Some(violation)),
        };
        let event = SyncEvent::from_json(body, created_at.map_or(arrival, |at| arrival.moved(at)));
        match (event, violation) {
            (Ok(event), None) => Ok(Self { event, created_at }),
            (Ok(_), Some(violation)) => Err(ParseError::Invalid(vec![violation])),
            (Err(ParseError::Invalid(mut violations)), violation) => {
                violations.extend(violation);
                Err(ParseError::Invalid(violations))
            }
            (Err(error), _) => Err(error),
        }
    }
}

impl Arrival {
    /// The same at another moment, with the same clock skew allowed.
    fn moved(self, received: Timestamp) -> Self {
        let skew = self.latest.as_millisecond() - self.received.as_millisecond();
        Self { received, latest: received.saturating_add_milliseconds(skew) }
    }
}

/// The event's `created_at`, if it has one. What is no JSON object has none: whoever reads the event says
/// so.
fn created_at(body: &[u8], arrival: Arrival) -> Result<Option<Timestamp>, Violation> {
    #[derive(Deserialize)]
    struct Wire<'a> {
        #[serde(borrow)]
        created_at: Option<&'a RawValue>,
    }
    let value: Option<Value> = match serde_json::from_slice::<Wire<'_>>(body) {
        Ok(wire) => wire.created_at.and_then(|raw| serde_json::from_str(raw.get()).ok()),
        // Of a repeated field the last counts.
        Err(_) => serde_json::from_slice::<Map<String, Value>>(body)
            .ok()
            .and_then(|mut fields| fields.remove(FIELD)),
    };
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let rule = match value.as_str().map(Timestamp::parse_iso8601) {
        None => "must be a valid date",
        Some(None) => "must be in ISO 8601 date format",
        Some(Some(at)) if at > arrival.latest => "cannot be in the future",
        Some(Some(at)) if at.as_millisecond() < EARLIEST_MILLISECOND => "must not be before 1970",
        Some(Some(at)) => return Ok(Some(at)),
    };
    Err(Violation::of(FIELD, rule, Some(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        Timestamp::parse_iso8601(text).unwrap()
    }

    fn read(timestamp: &str, more: &str) -> Result<ReceivedEvent, ParseError> {
        let received = time("2026-01-01T00:00:00Z");
        let arrival = Arrival { received, latest: received.saturating_add_milliseconds(300_000) };
        let text = format!(
            r#"{{"device_id":"pi","timestamp":"{timestamp}","total_files_synced":1,"total_errors":0{more}}}"#
        );
        ReceivedEvent::from_json(text.as_bytes(), arrival)
    }

    fn complaints(result: Result<ReceivedEvent, ParseError>) -> Vec<String> {
        match result {
            Err(ParseError::Invalid(violations)) => {
                violations.into_iter().map(|violation| violation.message).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_event_is_judged_by_the_moment_at_which_it_was_received() {
        let at = r#","created_at":"2025-06-01T00:00:00Z""#;
        let read_at = |timestamp| read(timestamp, at);
        assert_eq!(read_at("2025-05-31").unwrap().created_at, Some(time("2025-06-01")));
        assert!(read_at("2025-06-01T00:05:00Z").is_ok());
        let future = ["Timestamp cannot be in the future"];
        assert_eq!(complaints(read_at("2025-06-01T00:05:00.001Z")), future);
        // A device that does not trust its clock is dated by it, too.
        let unsynced = read("2030-01-01", &format!("{at},\"clock\":\"unsynced\"")).unwrap();
        assert_eq!(unsynced.event.timestamp, time("2025-06-01"));
    }

    #[test]
    fn without_a_receipt_it_arrives_now() {
        for more in ["", r#","created_at":null"#] {
            assert_eq!(read("2025-12-31", more).unwrap().created_at, None);
        }
        assert_eq!(complaints(read("2026-01-02", "")), ["Timestamp cannot be in the future"]);
    }

    #[test]
    fn a_wrong_receipt_is_named() {
        for (value, rule) in [
            ("7", "must be a valid date"),
            ("{}", "must be a valid date"),
            (r#""yesterday""#, "must be in ISO 8601 date format"),
            (r#""2026-01-01T00:05:01Z""#, "cannot be in the future"),
            (r#""1969-12-31T23:59:59Z""#, "must not be before 1970"),
        ] {
            let found = complaints(read("2025-01-01", &format!(",\"created_at\":{value}")));
            assert_eq!(found, [format!("\"created_at\" {rule}")]);
        }
        let both = complaints(read("soon", r#","created_at":1"#));
        assert_eq!(both.len(), 2, "{both:?}");
        let twice = r#","created_at":7,"created_at":"2025-06-01""#;
        assert_eq!(read("2025-01-01", twice).unwrap().created_at, Some(time("2025-06-01")));
        let broken = ReceivedEvent::from_json(
            b"{\"created_at\"",
            Arrival { received: Timestamp::MIN, latest: Timestamp::MAX },
        );
        assert!(matches!(broken, Err(ParseError::Malformed(_))));
    }
}
