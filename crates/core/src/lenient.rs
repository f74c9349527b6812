//! The second reading of a body that the strict pass refused. It accepts what the Node service
//! accepted and else names every wrong field, in the Node service's words (its validator was Joi).

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use crate::{
    Arrival, DeviceId, EventId, JobName, ParseError, SyncEvent, Timestamp, Violation,
    decimal::parse_scaled,
    sync_event::{
        DeviceClock, MAX_BYTES_SYNCED, MAX_COUNT, Mbps, Metadata, MetadataError, NumberError,
        SyncDuration, parse_bounded,
    },
    text::TextError,
};

/// See [`SyncEvent::from_json`].
pub(crate) fn read_sync_event(body: &[u8], arrival: Arrival) -> Result<SyncEvent, ParseError> {
    // Some Windows tools put a byte order mark before JSON.
    let body = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    let whole = serde_json::from_slice::<&RawValue>(body)
        .map_err(|error| ParseError::Malformed(error.to_string()))?;
    let Ok(fields) = serde_json::from_str::<Fields<'_>>(whole.get()) else {
        let violation = Violation::of_whole("must be of type object", echo(whole));
        return Err(ParseError::Invalid(vec![violation]));
    };

    let mut reader = Reader { fields: &fields, violations: Vec::new() };
    let device_id = reader.required("device_id", |raw| name(raw, DeviceId::new));
    let event_id = reader.optional("event_id", |raw| name(raw, EventId::new));
    let clock = reader.optional("clock", clock).unwrap_or(DeviceClock::Synced);
    let timestamp = reader.required("timestamp", |raw| timestamp(raw, clock, arrival));
    let total_files_synced = reader.required("total_files_synced", count);
    let total_errors = reader.required("total_errors", count);
    let internet_speed = reader.optional("internet_speed", |raw| number(raw, Mbps::parse));
    let job = reader.optional("job", |raw| name(raw, JobName::new));
    let duration = reader.optional("duration_seconds", |raw| number(raw, SyncDuration::parse));
    let bytes_synced = reader.optional("bytes_synced", byte_count);
    let metadata = reader.optional("metadata", |raw| {
        Metadata::new(raw.get()).map_err(|error: MetadataError| Refusal::Rule(error.to_string()))
    });

    // The required fields are absent only when a violation says so.
    let (Some(device_id), Some(timestamp), Some(total_files_synced), Some(total_errors), true) =
        (device_id, timestamp, total_files_synced, total_errors, reader.violations.is_empty())
    else {
        return Err(ParseError::Invalid(reader.violations));
    };
    let mut event = SyncEvent {
        device_id,
        event_id,
        timestamp,
        total_files_synced,
        total_errors,
        internet_speed,
        job,
        duration,
        bytes_synced,
        metadata,
    };
    if clock == DeviceClock::Unsynced {
        event.redate(arrival);
    }
    Ok(event)
}

/// Why a field's value is refused.
enum Refusal {
    /// Words that follow the quoted field name.
    Rule(String),
    /// A whole message.
    Message(&'static str),
}

struct Reader<'a> {
    fields: &'a Fields<'a>,
    violations: Vec<Violation>,
}

impl Reader<'_> {
    fn required<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&RawValue) -> Result<T, Refusal>,
    ) -> Option<T> {
        match self.fields.get(field) {
            Some(raw) => self.keep(field, raw, read(raw)),
            None => {
                self.violations.push(Violation::required(field));
                None
            }
        }
    }

    /// An optional field may also be null.
    fn optional<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&RawValue) -> Result<T, Refusal>,
    ) -> Option<T> {
        let raw = self.fields.get(field).filter(|raw| raw.get() != "null")?;
        self.keep(field, raw, read(raw))
    }

    fn keep<T>(
        &mut self,
        field: &'static str,
        raw: &RawValue,
        result: Result<T, Refusal>,
    ) -> Option<T> {
        let violation = match result {
            Ok(value) => return Some(value),
            Err(Refusal::Rule(rule)) => Violation::of(field, &rule, echo(raw)),
            Err(Refusal::Message(message)) => Violation::worded(field, message, echo(raw)),
        };
        self.violations.push(violation);
        None
    }
}

/// What was sent, to be echoed; `None` when it cannot be held, such as `1e999`.
fn echo(raw: &RawValue) -> Option<Value> {
    serde_json::from_str(raw.get()).ok()
}

fn is_string(raw: &RawValue) -> bool {
    raw.get().starts_with('"')
}

fn name<T>(raw: &RawValue, new: fn(&str) -> Result<T, TextError>) -> Result<T, Refusal> {
    if !is_string(raw) {
        return Err(Refusal::Rule("must be a string".into()));
    }
    // A JSON string that cannot be decoded holds half a surrogate pair.
    let text: String = serde_json::from_str(raw.get())
        .map_err(|_| Refusal::Rule("must be valid Unicode text".into()))?;
    new(&text).map_err(|error| Refusal::Rule(error.to_string()))
}

fn clock(raw: &RawValue) -> Result<DeviceClock, Refusal> {
    serde_json::from_str::<String>(raw.get())
        .ok()
        .and_then(|text| DeviceClock::parse(&text))
        .ok_or_else(|| Refusal::Rule("must be one of [synced, unsynced]".into()))
}

fn timestamp(raw: &RawValue, clock: DeviceClock, arrival: Arrival) -> Result<Timestamp, Refusal> {
    if !is_string(raw) {
        return Err(Refusal::Rule("must be a valid date".into()));
    }
    let parsed = serde_json::from_str::<String>(raw.get())
        .ok()
        .and_then(|text| Timestamp::parse_iso8601(&text))
        .ok_or_else(|| Refusal::Rule("must be in ISO 8601 date format".into()))?;
    if clock == DeviceClock::Synced && parsed > arrival.latest {
        return Err(Refusal::Message("Timestamp cannot be in the future"));
    }
    Ok(parsed)
}

/// A JSON number, or a string that holds one.
fn number<T>(
    raw: &RawValue,
    parse: impl FnOnce(&str) -> Result<T, NumberError>,
) -> Result<T, Refusal> {
    let parsed = if is_string(raw) {
        match serde_json::from_str::<String>(raw.get()) {
            Ok(text) => parse(text.trim()),
            Err(_) => Err(NumberError::NotANumber),
        }
    } else {
        parse(raw.get())
    };
    parsed.map_err(|error| Refusal::Rule(error.to_string()))
}

fn integer(text: &str, most: i64, most_text: &'static str) -> Result<i64, NumberError> {
    // First the fraction, as the Node service did: -1.5 "must be an integer".
    match parse_scaled(text, 0) {
        Some(scaled) if scaled.is_fraction() => Err(NumberError::NotAnInteger),
        _ => parse_bounded(text, 0, most, most_text).map(|scaled| scaled.value),
    }
}

fn count(raw: &RawValue) -> Result<u32, Refusal> {
    number(raw, |text| {
        let value = integer(text, MAX_COUNT.into(), "2147483647")?;
        u32::try_from(value).map_err(|_| NumberError::NotANumber)
    })
}

fn byte_count(raw: &RawValue) -> Result<u64, Refusal> {
    number(raw, |text| {
        let value = integer(text, MAX_BYTES_SYNCED.cast_signed(), "9007199254740991")?;
        u64::try_from(value).map_err(|_| NumberError::NotANumber)
    })
}

/// An object's known fields, unread. Of a repeated field the last counts, as in JavaScript.
struct Fields<'a>(Vec<(&'static str, &'a RawValue)>);

const FIELDS: [&str; 11] = [
    "device_id",
    "event_id",
    "timestamp",
    "clock",
    "total_files_synced",
    "total_errors",
    "internet_speed",
    "job",
    "duration_seconds",
    "bytes_synced",
    "metadata",
];

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&RawValue> {
        self.0.iter().rev().find(|(name, _)| *name == field).map(|(_, raw)| *raw)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor;

        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = Vec<(&'static str, &'de RawValue)>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields: Self::Value = Vec::with_capacity(FIELDS.len());
                while let Some((key, raw)) = map.next_entry::<Key, &'de RawValue>()? {
                    if let Some(name) = key.0 {
                        fields.retain(|(known, _)| *known != name);
                        fields.push((name, raw));
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(ObjectVisitor).map(Fields)
    }
}

/// A key that means something to us, or not.
struct Key(Option<&'static str>);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a field name")
            }

            fn visit_bytes<E>(self, name: &[u8]) -> Result<Key, E> {
                Ok(Key(FIELDS.iter().copied().find(|field| field.as_bytes() == name)))
            }
        }

        // As bytes, because a key with half a surrogate pair is no text, yet none of our business.
        deserializer.deserialize_bytes(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn arrival() -> Arrival {
        let received = Timestamp::parse_iso8601("2026-01-01T00:00:00Z").unwrap();
        Arrival { received, latest: received }
    }

    fn read(body: &str) -> Result<SyncEvent, ParseError> {
        SyncEvent::from_json(body.as_bytes(), arrival())
    }

    fn with(field: &str, value: Value) -> String {
        let mut body = json!({
            "device_id": "pi-1", "timestamp": "2025-06-17T10:30:00Z",
            "total_files_synced": 150, "total_errors": 2,
        });
        body[field] = value;
        body.to_string()
    }

    /// The violations' fields and messages.
    fn complaints(body: &str) -> Vec<(String, String)> {
        match read(body) {
            Err(ParseError::Invalid(violations)) => violations
                .into_iter()
                .map(|violation| (violation.field.into_owned(), violation.message))
                .collect(),
            other => panic!("{body} gave {other:?}"),
        }
    }

    fn complaint(field: &str, value: Value) -> String {
        let mut all = complaints(&with(field, value));
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].0, field);
        all.remove(0).1
    }

    #[test]
    fn a_fraction_is_no_count_however_large() {
        let body = with("bytes_synced", json!("9007199254740991.4"));
        let message = "\"bytes_synced\" must be an integer".to_owned();
        assert_eq!(complaints(&body), [("bytes_synced".to_owned(), message)]);
    }

    #[test]
    fn an_array_is_no_event() {
        let body = r#"["pi-1",null,"2025-06-17T10:30:00Z",null,150,2,null,null,null,null,null]"#;
        let message = "\"value\" must be of type object".to_owned();
        assert_eq!(complaints(body), [(String::new(), message)]);
    }

    #[test]
    fn what_is_not_utf8_is_malformed_also_where_nobody_looks() {
        let mut body = with("extra", "?".into()).into_bytes();
        for byte in &mut body {
            if *byte == b'?' {
                *byte = 0xff;
            }
        }
        let result = SyncEvent::from_json(&body, arrival());
        assert!(matches!(result, Err(ParseError::Malformed(_))), "{result:?}");
    }

    #[test]
    fn a_full_event() {
        let event = read(
            r#"{"device_id":"pi-1","timestamp":"2025-06-17T10:30:00.5+02:00","total_files_synced":150,
            "total_errors":2,"internet_speed":45.678,"job":"nightly","duration_seconds":12.3456,
            "bytes_synced":9007199254740991,"metadata":{"a": [1, 2]},"extra":{"deep":[[]]}}"#,
        )
        .unwrap();
        assert_eq!(event.timestamp.to_string(), "2025-06-17T08:30:00.500Z");
        assert_eq!(event.internet_speed.unwrap().hundredths(), 4568);
        assert_eq!(event.duration.unwrap().milliseconds(), 12_346);
        assert_eq!(event.bytes_synced, Some(MAX_BYTES_SYNCED));
        assert_eq!(event.metadata.unwrap().as_str(), r#"{"a": [1, 2]}"#);
        assert_eq!(event.job.unwrap().as_str(), "nightly");
    }

    #[test]
    fn what_the_node_service_accepted() {
        for (field, value) in [
            ("timestamp", json!("2025-06-17")),
            ("total_files_synced", json!("150")),
            ("total_files_synced", json!(" 150 ")),
            ("total_files_synced", json!(150.0)),
            ("total_errors", json!("0")),
            ("internet_speed", json!("45.6")),
            ("internet_speed", json!(null)),
            ("job", json!(null)),
            ("device_id", json!("quote \" and \\ and ü")),
        ] {
            assert!(read(&with(field, value.clone())).is_ok(), "{field}: {value}");
        }
        assert!(read(&format!("\u{feff}{}", with("x", json!(1)))).is_ok());
        let twice = r#"{"device_id":"a","device_id":"b","timestamp":"2025-06-17","total_files_synced":1,"total_errors":0}"#;
        assert_eq!(read(twice).unwrap().device_id.as_str(), "b");
        let surrogate_key = with("x", json!(1)).replace("\"x\"", "\"\\ud800\"");
        assert!(read(&surrogate_key).is_ok(), "{surrogate_key}");
    }

    #[test]
    fn every_wrong_field_is_named_in_order() {
        assert_eq!(
            complaints("{}"),
            ["device_id", "timestamp", "total_files_synced", "total_errors"]
                .map(|field| (field.to_owned(), format!("\"{field}\" is required"))),
        );
        assert_eq!(
            complaints("[]"),
            [(String::new(), "\"value\" must be of type object".to_owned())]
        );
        let all_wrong = json!({
            "device_id": 7, "timestamp": 1, "total_files_synced": 1.5, "total_errors": -1,
            "internet_speed": -3, "job": "", "duration_seconds": "x", "bytes_synced": -1, "metadata": 5,
        });
        assert_eq!(complaints(&all_wrong.to_string()).len(), 9);
    }

    #[test]
    fn the_words() {
        assert_eq!(complaint("device_id", json!("")), "\"device_id\" is not allowed to be empty");
        assert_eq!(complaint("device_id", json!(7)), "\"device_id\" must be a string");
        assert_eq!(
            complaint("device_id", json!("a\u{0}b")),
            "\"device_id\" must not contain control characters"
        );
        assert_eq!(
            complaint("timestamp", json!("yesterday")),
            "\"timestamp\" must be in ISO 8601 date format"
        );
        assert_eq!(
            complaint("timestamp", json!(1_750_000_000_000_i64)),
            "\"timestamp\" must be a valid date"
        );
        assert_eq!(
            complaint("timestamp", json!("2999-01-01T00:00:00Z")),
            "Timestamp cannot be in the future"
        );
        assert_eq!(
            complaint("total_files_synced", json!(1.5)),
            "\"total_files_synced\" must be an integer"
        );
        assert_eq!(
            complaint("total_files_synced", json!(3_000_000_000_i64)),
            "\"total_files_synced\" must be less than or equal to 2147483647"
        );
        assert_eq!(
            complaint("total_errors", json!(-1)),
            "\"total_errors\" must be greater than or equal to 0"
        );
        assert_eq!(complaint("total_errors", json!("two")), "\"total_errors\" must be a number");
        assert_eq!(complaint("total_errors", json!(null)), "\"total_errors\" must be a number");
        assert_eq!(
            complaint("internet_speed", json!(1e12)),
            "\"internet_speed\" must be less than or equal to 99999999.99"
        );
        assert_eq!(complaint("metadata", json!([1])), "\"metadata\" must be of type object");
        assert_eq!(
            complaint("metadata", json!({"a": "x".repeat(5000)})),
            "\"metadata\" must be at most 4096 bytes of JSON text"
        );
    }

    #[test]
    fn numbers_beyond_a_double_and_half_surrogates_are_named() {
        let huge =
            with("internet_speed", json!(1)).replace(":1,", ":1e999,").replace(":1}", ":1e999}");
        assert_eq!(
            complaints(&huge)[0].1,
            "\"internet_speed\" must be less than or equal to 99999999.99"
        );
        let half = with("device_id", json!("X")).replace("\"X\"", r#""\ud800""#);
        assert_eq!(complaints(&half)[0].1, "\"device_id\" must be valid Unicode text");
    }

    #[test]
    fn what_is_not_json_is_malformed() {
        for body in ["", "{", "nul", "{\"a\":1}x", "{'a':1}"] {
            assert!(matches!(read(body), Err(ParseError::Malformed(_))), "{body}");
        }
        assert!(matches!(
            SyncEvent::from_json(b"\"\xff\"", arrival()),
            Err(ParseError::Malformed(_))
        ));
    }

    #[test]
    fn deep_nesting_neither_overflows_nor_stalls() {
        let bomb = "[".repeat(30_000);
        assert!(matches!(read(&bomb), Err(ParseError::Malformed(_))));
        let nested = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
        let unknown = with("x", json!(0)).replace("\"x\":0", &format!("\"x\":{nested}"));
        assert!(read(&unknown).is_ok());
        let metadata = with("metadata", json!(0)).replace(
            "\"metadata\":0",
            &format!("\"metadata\":{{\"a\":{}}}", "[".repeat(200) + &"]".repeat(200)),
        );
        assert_eq!(complaints(&metadata)[0].1, "\"metadata\" must be of type object");
    }

    /// JSON values of the kinds that a careless client sends.
    fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
            "[0-9]{1,12}".prop_map(Value::from),
            Just(json!("2025-06-17T10:30:00Z")),
            Just(json!([])),
            Just(json!({"a": 1})),
        ]
    }

    proptest! {
        #[test]
        fn bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = SyncEvent::from_json(&body, arrival());
        }

        /// Whatever the strict pass takes, the lenient reader takes to mean the same; and what is
        /// refused names at least one field.
        #[test]
        fn both_readings_agree(values in prop::collection::vec((0..FIELDS.len(), any_value()), 0..12)) {
            let mut body: Value = serde_json::from_str(&with("x", json!(1))).unwrap();
            for (field, value) in values {
                body[FIELDS[field]] = value;
            }
            let text = body.to_string();
            let both = read(&text);
            prop_assert_eq!(&both, &read_sync_event(text.as_bytes(), arrival()));
            if let Err(ParseError::Invalid(violations)) = both {
                prop_assert!(!violations.is_empty());
            }
        }

        #[test]
        fn a_valid_event_reads_back(
            device in "[^\\p{C}]{1,255}", files in 0..=MAX_COUNT, errors in 0..=MAX_COUNT,
            speed in proptest::option::of(0i64..=9_999_999_999),
        ) {
            let body = json!({
                "device_id": device, "timestamp": "2025-06-17T10:30:00.250Z",
                "total_files_synced": files, "total_errors": errors,
                "internet_speed": speed.map(|hundredths| f64::from(Mbps::from_hundredths(hundredths).unwrap())),
            });
            let event = read(&body.to_string()).unwrap();
            prop_assert_eq!(event.device_id.as_str(), device);
            prop_assert_eq!((event.total_files_synced, event.total_errors), (files, errors));
            prop_assert_eq!(event.internet_speed.map(Mbps::hundredths), speed);
        }
    }
}
