//! Reads a body again that the strict pass refused. [`SyncEvent::from_json`] calls it. It accepts what the Node service
//! accepted; otherwise it names every wrong field in that service's words (its validator was Joi).

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use crate::{
    Arrival, DeviceClock, DeviceId, EventId, JobName, Mbps, Metadata, ParseError, SyncDuration,
    SyncEvent, Timestamp, Violation, ViolationCode,
    decimal::parse_scaled,
    event_fields::EVENT_FIELDS,
    metadata::{HALF_SURROGATE, MetadataError},
    quantity::{NumberError, parse_bounded},
    sync_event::{MAX_BYTES_SYNCED, MAX_COUNT},
    text::{TextError, json_text},
};

/// Reads one event; see [`SyncEvent::from_json`].
pub(crate) fn read_sync_event(body: &[u8], arrival: Arrival) -> Result<SyncEvent, ParseError> {
    let text = json_text(body).map_err(ParseError::Malformed)?;
    let whole = serde_json::from_str::<&RawValue>(text)
        .map_err(|error| ParseError::Malformed(error.to_string()))?;
    let Ok(fields) = serde_json::from_str::<Fields<'_>>(whole.get()) else {
        let violation =
            Violation::of_whole(ViolationCode::Type, "must be of type object", echo(whole));
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
        Metadata::new(raw.get())
            .map_err(|error: MetadataError| Refusal::Rule(error.code(), error.to_string()))
    });

    // A required field is absent only if there is a violation for it.
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
pub(crate) enum Refusal {
    /// The words that follow the quoted field name.
    Rule(ViolationCode, String),
    /// The time is in the future.
    Future,
}

/// Reads fields by their rules, and collects what is wrong with them.
pub(crate) struct Reader<'a> {
    pub(crate) fields: &'a Fields<'a>,
    pub(crate) violations: Vec<Violation>,
}

impl Reader<'_> {
    pub(crate) fn required<T>(
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
    pub(crate) fn optional<T>(
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
            Err(Refusal::Rule(code, rule)) => Violation::of(field, code, &rule, echo(raw)),
            Err(Refusal::Future) => {
                let message = "Timestamp cannot be in the future";
                Violation::worded(field, ViolationCode::Future, message, echo(raw))
            }
        };
        self.violations.push(violation);
        None
    }
}

/// The sent value, to be echoed. `None` when no JSON value can hold it, such as `1e999`.
pub(crate) fn echo(raw: &RawValue) -> Option<Value> {
    serde_json::from_str(raw.get()).ok()
}

fn is_string(raw: &RawValue) -> bool {
    raw.get().starts_with('"')
}

pub(crate) fn name<T>(raw: &RawValue, new: fn(&str) -> Result<T, TextError>) -> Result<T, Refusal> {
    if !is_string(raw) {
        return Err(Refusal::Rule(ViolationCode::Type, "must be a string".into()));
    }
    new(&unicode(raw)?).map_err(|error| Refusal::Rule(error.code(), error.to_string()))
}

/// The text of a JSON string. Decoding fails only on half a surrogate pair.
fn unicode(raw: &RawValue) -> Result<String, Refusal> {
    serde_json::from_str(raw.get())
        .map_err(|_| Refusal::Rule(ViolationCode::Format, HALF_SURROGATE.into()))
}

pub(crate) fn clock(raw: &RawValue) -> Result<DeviceClock, Refusal> {
    let text = if is_string(raw) { unicode(raw)? } else { String::new() };
    DeviceClock::parse(&text).ok_or_else(|| {
        Refusal::Rule(ViolationCode::Format, "must be one of [synced, unsynced]".into())
    })
}

pub(crate) fn timestamp(
    raw: &RawValue,
    clock: DeviceClock,
    arrival: Arrival,
) -> Result<Timestamp, Refusal> {
    if !is_string(raw) {
        return Err(Refusal::Rule(ViolationCode::Type, "must be a valid date".into()));
    }
    let parsed = Timestamp::from_iso8601(&unicode(raw)?)
        .map_err(|error| Refusal::Rule(error.code(), error.to_string()))?;
    if clock == DeviceClock::Synced && parsed > arrival.latest {
        return Err(Refusal::Future);
    }
    Ok(parsed)
}

/// A JSON number, or a string that holds one.
fn number<T>(
    raw: &RawValue,
    parse: impl FnOnce(&str) -> Result<T, NumberError>,
) -> Result<T, Refusal> {
    let parsed = if is_string(raw) { parse(unicode(raw)?.trim()) } else { parse(raw.get()) };
    parsed.map_err(|error| Refusal::Rule(error.code(), error.to_string()))
}

fn integer(text: &str, most: i64, most_text: &'static str) -> Result<i64, NumberError> {
    // The fraction is checked first, as the Node service did: -1.5 "must be an integer".
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

/// The known fields of an object, not yet parsed. The last of a repeated field counts, as in JavaScript.
pub(crate) struct Fields<'a>(pub(crate) Vec<(&'static str, &'a RawValue)>);

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
                let mut fields: Self::Value = Vec::with_capacity(EVENT_FIELDS.len());
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

/// The name of a known field; `None` for every other key.
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
                let known = EVENT_FIELDS.iter().find(|field| field.name.as_bytes() == name);
                Ok(Key(known.map(|field| field.name)))
            }
        }

        // As bytes: a key with half a surrogate pair is not valid text, but unknown keys must not fail.
        deserializer.deserialize_bytes(KeyVisitor)
    }
}

#[cfg(test)]
mod tests;
