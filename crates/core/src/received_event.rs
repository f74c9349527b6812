//! A sync event with the time at which a server received it. Exports write it and imports read it; devices never send
//! it.

use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use crate::{
    Arrival, DeviceClock, Metadata, ParseError, SyncEvent, Timestamp, Violation, ViolationCode,
};

const FIELD: &str = "created_at";

/// 1970-01-01, where a clock that was never set begins. No server received anything before.
const EARLIEST_MILLISECOND: i64 = 0;

/// A sync event that a server may have received before.
#[derive(Debug, Clone, PartialEq)]
pub struct ReceivedEvent {
    /// The reported event.
    pub event: SyncEvent,
    /// When it was received; `None` if it arrives now.
    pub created_at: Option<Timestamp>,
}

impl ReceivedEvent {
    /// Reads one event from JSON as [`SyncEvent::from_json`] does, as of the moment at which it was received. That
    /// moment is its `created_at`, or `arrival` without one.
    ///
    /// # Errors
    /// Those of [`SyncEvent::from_json`]. A wrong `created_at` is named after the other wrong fields.
    pub fn from_json(body: &[u8], arrival: Arrival) -> Result<Self, ParseError> {
        let (created_at, violation) = match created_at(body, arrival) {
            Ok(created_at) => (created_at, None),
            Err(violation) => (None, Some(violation)),
        };
        let moment = created_at.map_or(arrival, |at| arrival.moved(at));
        let mut event = SyncEvent::from_json(body, moment);
        if event.is_err() && created_at.is_some() {
            event = with_dated_metadata(body, moment).map_or(event, Ok);
        }
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

    /// Writes the event on one line, as [`Self::from_json`] reads it.
    ///
    /// # Errors
    /// Those of [`SyncEvent::to_json`].
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        let mut line = self.event.to_json(DeviceClock::Synced)?;
        if let Some(at) = self.created_at {
            // The line ends with the object's brace.
            line.truncate(line.len() - 1);
            line.push_str(&format!(",\"{FIELD}\":\"{at}\"}}"));
        }
        Ok(line)
    }
}

impl Arrival {
    /// The same clock skew at another moment.
    fn moved(self, received: Timestamp) -> Self {
        let skew = self.latest.as_millisecond() - self.received.as_millisecond();
        Self { received, latest: received.saturating_add_milliseconds(skew) }
    }
}

/// Reads an event whose metadata is longer than a device may send, because a server added a date to it.
fn with_dated_metadata(body: &[u8], moment: Arrival) -> Option<SyncEvent> {
    #[derive(Deserialize)]
    struct Wire<'a> {
        #[serde(borrow)]
        metadata: &'a RawValue,
    }
    let text = std::str::from_utf8(body).ok()?;
    let metadata = serde_json::from_str::<Wire<'_>>(text).ok()?.metadata.get();
    let dated = Metadata::dated(metadata).ok()?;
    let rest = text.replacen(metadata, "null", 1);
    let mut event = SyncEvent::from_json(rest.as_bytes(), moment).ok()?;
    // Only valid if the replaced text was the metadata and not an equal text elsewhere.
    event.metadata.is_none().then_some(())?;
    event.metadata = Some(dated);
    Some(event)
}

/// The event's `created_at`, if it has one. A body that is not a JSON object has none; the reader of the event reports
/// that.
fn created_at(body: &[u8], arrival: Arrival) -> Result<Option<Timestamp>, Violation> {
    #[derive(Deserialize)]
    struct Wire<'a> {
        #[serde(borrow)]
        created_at: Option<&'a RawValue>,
    }
    let value: Option<Value> = match serde_json::from_slice::<Wire<'_>>(body) {
        Ok(wire) => wire.created_at.and_then(|raw| serde_json::from_str(raw.get()).ok()),
        // The last of a repeated field counts.
        Err(_) => serde_json::from_slice::<Map<String, Value>>(body)
            .ok()
            .and_then(|mut fields| fields.remove(FIELD)),
    };
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let (code, rule) = match value.as_str().map(Timestamp::from_iso8601) {
        None => (ViolationCode::Type, "must be a valid date".to_owned()),
        Some(Err(error)) => (error.code(), error.to_string()),
        Some(Ok(at)) if at > arrival.latest => {
            (ViolationCode::Future, "cannot be in the future".to_owned())
        }
        Some(Ok(at)) if at.as_millisecond() < EARLIEST_MILLISECOND => {
            (ViolationCode::Range, "must not be before 1970".to_owned())
        }
        Some(Ok(at)) => return Ok(Some(at)),
    };
    Err(Violation::of(FIELD, code, &rule, Some(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_fields::EVENT_FIELDS;
    use crate::metadata::MAX_METADATA_BYTES;

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
        // A device that does not trust its clock gets this date as well.
        let unsynced = read("2030-01-01", &format!("{at},\"clock\":\"unsynced\"")).unwrap();
        assert_eq!(unsynced.event.timestamp, time("2025-06-01"));
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        let fields = r#","event_id":"1","internet_speed":1.25,"job":"nightly","duration_seconds":2.5,
            "bytes_synced":3,"metadata":{"a": 1.50}"#;
        let now = read("2025-05-31", fields).unwrap();
        let before =
            read("2025-05-31", &format!("{fields},\"created_at\":\"2025-06-01\"")).unwrap();
        for event in [now, before] {
            let line = event.to_json().unwrap();
            assert_eq!(line.lines().count(), 1, "{line}");
            let written: Map<String, Value> = serde_json::from_str(&line).unwrap();
            // The clock is no field of a stored event: its dates tell.
            for field in EVENT_FIELDS.iter().filter(|field| field.name != "clock") {
                assert!(written.contains_key(field.name), "{} is not in {line}", field.name);
            }
            assert_eq!(written.contains_key(FIELD), event.created_at.is_some());
            let latest = event.event.timestamp.saturating_add_milliseconds(i64::from(u32::MAX));
            let arrival = Arrival { received: latest, latest };
            assert_eq!(ReceivedEvent::from_json(line.as_bytes(), arrival), Ok(event));
        }
    }

    #[test]
    fn without_a_receipt_it_arrives_now() {
        for more in ["", r#","created_at":null"#] {
            assert_eq!(read("2025-12-31", more).unwrap().created_at, None);
        }
        assert_eq!(complaints(read("2026-01-02", "")), ["Timestamp cannot be in the future"]);
    }

    #[test]
    fn metadata_that_a_server_has_dated_may_be_longer() {
        let filler = "x".repeat(MAX_METADATA_BYTES - r#"{"a":""}"#.len());
        let sent = format!(r#","clock":"unsynced","metadata":{{"a":"{filler}"}}"#);
        let kept = read("2024-01-01", &sent).unwrap().event.metadata.unwrap();
        assert!(kept.as_str().len() > MAX_METADATA_BYTES);
        let metadata = format!(",\"metadata\":{}", kept.as_str());
        let received = format!("{metadata},\"created_at\":\"2025-06-02\"");
        assert_eq!(read("2025-06-01", &received).unwrap().event.metadata, Some(kept));
        // A device may not send it in this form.
        let complaint = "\"metadata\" must be at most 4096 bytes of JSON text";
        assert_eq!(complaints(read("2025-06-01", &metadata)), [complaint]);
        let longer = received.replacen('x', "xxx", 1);
        assert_eq!(complaints(read("2025-06-01", &longer)), [complaint]);
        let other = received.replacen("device_timestamp", "another_timestamp", 1);
        assert_eq!(complaints(read("2025-06-01", &other)), [complaint]);
    }

    #[test]
    fn a_wrong_receipt_is_named() {
        for (value, rule) in [
            ("7", "must be a valid date"),
            ("{}", "must be a valid date"),
            (r#""yesterday""#, "must be in ISO 8601 date format"),
            (r#""2025-06-01T00:00:00-24:00""#, "must have an offset from UTC of at most 23:59"),
            (r#""0000-01-01""#, "must be within the years 1 to 9999"),
            (r#""9999-12-31""#, "cannot be in the future"),
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
