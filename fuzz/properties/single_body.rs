//! What holds of any body of `POST /api/sync-event`. The fuzz target and the replay of its corpus both
//! call [`check`].

use std::{collections::HashMap, fmt::Write as _};

use pisync_core::{
    Arrival, DeviceId, EventId, JobName, Metadata, ParseError, SyncEvent, Timestamp,
    decimal::parse_scaled,
    metadata::MAX_METADATA_BYTES,
    sync_event::{MAX_BYTES_SYNCED, MAX_COUNT},
};
use serde_json::value::RawValue;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// How the metadata of an event without a trusted clock begins, once the server has dated it.
const DEVICE_TIMESTAMP: &str = "{\"device_timestamp\":\"";

/// Panics when `body` is read as it must not be.
pub(crate) fn check(body: &[u8]) {
    let arrival = arrival();
    let read = SyncEvent::from_json(body, arrival);
    if !body.starts_with(BYTE_ORDER_MARK) {
        // The mark keeps the strict pass off: both readers agree.
        let leniently = SyncEvent::from_json(&[BYTE_ORDER_MARK, body].concat(), arrival);
        assert_eq!(leniently, read, "the lenient reading differs from the strict one");
    }
    let json =
        serde_json::from_slice::<&RawValue>(body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body));
    match read {
        Ok(event) => {
            assert!(
                json.is_ok_and(|json| json.get().starts_with('{')),
                "accepted what is no JSON object"
            );
            check_bounds(&event, arrival);
            check_counts(body);
            check_written(event, arrival);
        }
        Err(ParseError::Malformed(message)) => {
            assert!(json.is_err(), "JSON was called malformed");
            assert!(!message.is_empty());
        }
        Err(ParseError::Invalid(violations)) => {
            assert!(json.is_ok(), "what is no JSON was read");
            assert!(!violations.is_empty(), "refused without a word");
            for violation in violations {
                assert!(!violation.message.is_empty());
                let echo = violation.value.map_or(String::new(), |value| value.to_string());
                // 256 characters and an ellipsis, of which an escaped one takes up to six.
                assert!(echo.chars().count() <= 6 * 257 + 2, "a long echo: {echo}");
            }
        }
    }
}

fn arrival() -> Arrival {
    let received = Timestamp::parse_iso8601("2026-01-01T00:00:00Z").expect("a date");
    Arrival { received, latest: received.saturating_add_milliseconds(300_000) }
}

/// Every bound that [`SyncEvent`]'s fields document.
fn check_bounds(event: &SyncEvent, arrival: Arrival) {
    check_name(event.device_id.as_str(), DeviceId::MAX_CHARACTERS);
    if let Some(event_id) = &event.event_id {
        check_name(event_id.as_str(), EventId::MAX_CHARACTERS);
    }
    if let Some(job) = &event.job {
        check_name(job.as_str(), JobName::MAX_CHARACTERS);
    }
    assert!((Timestamp::MIN..=arrival.latest).contains(&event.timestamp));
    assert!(event.total_files_synced <= MAX_COUNT);
    assert!(event.total_errors <= MAX_COUNT);
    assert!(event.bytes_synced.is_none_or(|bytes| bytes <= MAX_BYTES_SYNCED));
    assert!(
        event.internet_speed.is_none_or(|speed| (0..=9_999_999_999).contains(&speed.hundredths()))
    );
    assert!(event.duration.is_none_or(|time| (0..=31_536_000_000).contains(&time.milliseconds())));
    if let Some(metadata) = &event.metadata {
        let text = metadata.as_str();
        let fields = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text);
        assert!(fields.is_ok(), "metadata that cannot be read: {text}");
        assert!(
            text.len() <= MAX_METADATA_BYTES || is_dated_by_arrival(event, arrival),
            "long metadata"
        );
    }
}

/// The counts of an accepted event were sent as whole numbers, as such or in strings.
fn check_counts(body: &[u8]) {
    let body = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
    // An object with half a surrogate pair for a key is no map, though it can be an event.
    let Ok(fields) = serde_json::from_slice::<HashMap<String, &RawValue>>(body) else { return };
    for name in ["total_files_synced", "total_errors", "bytes_synced"] {
        let Some(raw) = fields.get(name).map(|raw| raw.get()).filter(|raw| *raw != "null") else {
            continue;
        };
        let text = serde_json::from_str::<String>(raw).unwrap_or_else(|_| raw.to_owned());
        let number = parse_scaled(text.trim(), 0);
        assert!(number.is_some_and(|number| number.exact), "{name}: {raw}");
    }
}

fn check_name(name: &str, most: usize) {
    assert!((1..=most).contains(&name.chars().count()), "{name:?}");
    assert!(!name.chars().any(char::is_control), "{name:?}");
}

/// Whether the device does not trust its clock, and its own date was put into the metadata, which
/// makes that longer by the name and the date.
fn is_dated_by_arrival(event: &SyncEvent, arrival: Arrival) -> bool {
    let added = DEVICE_TIMESTAMP.len() + arrival.received.to_string().len() + "\",".len();
    event.timestamp == arrival.received
        && event.metadata.as_ref().map(Metadata::as_str).is_some_and(|text| {
            text.starts_with(DEVICE_TIMESTAMP) && text.len() <= MAX_METADATA_BYTES + added
        })
}

/// An accepted event that is written as JSON is the same event when it is read.
fn check_written(mut event: SyncEvent, arrival: Arrival) {
    if event.metadata.as_ref().is_some_and(|metadata| metadata.as_str().len() > MAX_METADATA_BYTES)
    {
        event.metadata = None;
    }
    let json = written(&event);
    assert_eq!(SyncEvent::from_json(json.as_bytes(), arrival), Ok(event), "{json}");
}

fn written(event: &SyncEvent) -> String {
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let mut json = format!(
        "{{\"device_id\":{},\"timestamp\":\"{}\",\"total_files_synced\":{},\"total_errors\":{}",
        text(event.device_id.as_str()),
        event.timestamp,
        event.total_files_synced,
        event.total_errors,
    );
    let mut field = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            write!(json, ",\"{name}\":{value}").expect("a string takes all");
        }
    };
    field("event_id", event.event_id.as_ref().map(|event_id| text(event_id.as_str())));
    field("job", event.job.as_ref().map(|job| text(job.as_str())));
    field("bytes_synced", event.bytes_synced.map(|bytes| bytes.to_string()));
    field("internet_speed", event.internet_speed.map(|speed| decimal(speed.hundredths(), 2)));
    field("duration_seconds", event.duration.map(|time| decimal(time.milliseconds(), 3)));
    field("metadata", event.metadata.as_ref().map(|metadata| metadata.as_str().to_owned()));
    json.push('}');
    json
}

/// `scaled` divided by `10^decimals`.
fn decimal(scaled: i64, decimals: usize) -> String {
    let divisor = 10_i64.pow(u32::try_from(decimals).expect("few"));
    format!("{}.{:0decimals$}", scaled / divisor, scaled % divisor)
}
