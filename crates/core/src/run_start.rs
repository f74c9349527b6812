//! A device's word that a run has begun, read from JSON. The server reads it. Its fields follow the rules of a sync event,
//! except that a field without a meaning is refused.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::{
    Arrival, DeviceClock, DeviceId, EventId, JobName, ParseError, Timestamp, Violation,
    ViolationCode,
    lenient::{self, Fields, Reader, echo, name},
    text::json_text,
};

/// The names of the fields.
const FIELDS: [&str; 5] = ["device_id", "job", "run_id", "timestamp", "clock"];

/// The most unknown fields that are named.
const MOST_NAMED: usize = 64;

/// The longest unknown name that is echoed, in characters.
const ECHOED_NAME: usize = 64;

/// One validated start of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunStart {
    /// The device.
    pub device_id: DeviceId,
    /// Which of its jobs has begun.
    pub job: Option<JobName>,
    /// The `event_id` that the run's report will carry.
    pub run_id: Option<EventId>,
    /// When it began, by the device's clock. If the device does not trust its clock, this is the time of arrival.
    pub timestamp: Option<Timestamp>,
}

impl RunStart {
    /// Reads a start from a JSON body.
    ///
    /// # Errors
    /// [`ParseError::Malformed`] when the body is not JSON. Otherwise [`ParseError::Invalid`] with every wrong field.
    pub fn from_json(body: &[u8], arrival: Arrival) -> Result<Self, ParseError> {
        let malformed = |error: serde_json::Error| ParseError::Malformed(error.to_string());
        let text = json_text(body).map_err(ParseError::Malformed)?;
        let whole = serde_json::from_str::<&RawValue>(text).map_err(malformed)?;
        if !whole.get().starts_with('{') {
            let rule = "must be of type object";
            let violation = Violation::of_whole(ViolationCode::Type, rule, echo(whole));
            return Err(ParseError::Invalid(vec![violation]));
        }
        // The last of a repeated field counts, as in JavaScript.
        let sent =
            serde_json::from_str::<BTreeMap<String, &RawValue>>(whole.get()).map_err(malformed)?;

        let known = FIELDS.into_iter().filter_map(|field| Some((field, *sent.get(field)?)));
        let fields = Fields(known.collect());
        let mut reader = Reader { fields: &fields, violations: Vec::new() };
        let device_id = reader.required("device_id", |raw| name(raw, DeviceId::new));
        let job = reader.optional("job", |raw| name(raw, JobName::new));
        let run_id = reader.optional("run_id", |raw| name(raw, EventId::new));
        let clock = reader.optional("clock", lenient::clock).unwrap_or(DeviceClock::Synced);
        let timestamp = reader.optional("timestamp", |raw| lenient::timestamp(raw, clock, arrival));
        let mut violations = reader.violations;
        let unknown = sent.iter().filter(|(field, _)| !FIELDS.contains(&field.as_str()));
        violations.extend(unknown.take(MOST_NAMED).map(|(field, raw)| {
            let field: String = field.chars().take(ECHOED_NAME).collect();
            let rule = "is not allowed";
            Violation::of(field, ViolationCode::UnknownField, rule, echo(raw))
        }));
        // The device is absent only if there is a violation for it.
        let (Some(device_id), true) = (device_id, violations.is_empty()) else {
            return Err(ParseError::Invalid(violations));
        };
        let timestamp = match clock {
            DeviceClock::Synced => timestamp,
            DeviceClock::Unsynced => Some(arrival.received),
        };
        Ok(Self { device_id, job, run_id, timestamp })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival() -> Arrival {
        let received = Timestamp::parse_iso8601("2026-03-02T10:00:00Z").unwrap();
        Arrival { received, latest: received.saturating_add_milliseconds(300_000) }
    }

    fn read(body: &str) -> Result<RunStart, ParseError> {
        RunStart::from_json(body.as_bytes(), arrival())
    }

    /// Each wrong field with the code of what is wrong with it.
    fn wrong(body: &str) -> Vec<(String, &'static str)> {
        match read(body) {
            Err(ParseError::Invalid(violations)) => violations
                .into_iter()
                .map(|violation| (violation.field.into_owned(), violation.code.as_str()))
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_right_is_read() {
        let start = read(r#"{"device_id": "pi"}"#).unwrap();
        assert_eq!(start.device_id.as_str(), "pi");
        assert_eq!((start.job, start.run_id, start.timestamp), (None, None, None));
        let start = read(
            r#"{"device_id": "pi", "job": "nightly", "run_id": "r1", "timestamp": "2026-03-02T11:00:00+01:00",
                "clock": "synced"}"#,
        )
        .unwrap();
        assert_eq!(start.job.unwrap().as_str(), "nightly");
        assert_eq!(start.run_id.unwrap().as_str(), "r1");
        assert_eq!(start.timestamp, Some(arrival().received));
        let start =
            read(r#"{"device_id": "pi", "job": null, "run_id": null, "timestamp": null}"#).unwrap();
        assert_eq!((start.job, start.run_id, start.timestamp), (None, None, None));
        // A clock that nobody trusts.
        for timestamp in ["null", r#""2099-01-01""#, r#""1970-01-01""#] {
            let body =
                format!(r#"{{"device_id": "pi", "clock": "unsynced", "timestamp": {timestamp}}}"#);
            assert_eq!(read(&body).unwrap().timestamp, Some(arrival().received), "{timestamp}");
        }
    }

    #[test]
    fn every_wrong_field_is_named() {
        let body = r#"{"job": "", "run_id": 7, "timestamp": "2026-03-02T10:05:01Z", "clock": "?", "event_id": "x"}"#;
        let expected = [
            ("device_id", "required"),
            ("job", "length"),
            ("run_id", "type"),
            ("clock", "format"),
            ("timestamp", "future"),
            ("event_id", "unknown_field"),
        ];
        assert_eq!(wrong(body), expected.map(|(field, code)| (field.to_owned(), code)));
        let run_id = "x".repeat(65);
        let body = format!(r#"{{"device_id": "\ud800", "run_id": "{run_id}"}}"#);
        let expected = [("device_id", "format"), ("run_id", "length")];
        assert_eq!(wrong(&body), expected.map(|(field, code)| (field.to_owned(), code)));
        assert_eq!(wrong("[]"), [(String::new(), "type")]);
        for body in ["", "{", "{\"device_id\": \"pi\"} x"] {
            assert!(matches!(read(body), Err(ParseError::Malformed(_))), "{body}");
        }
    }
}
