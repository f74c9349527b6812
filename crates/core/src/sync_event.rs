//! A device's report of one sync run, read from JSON and written as JSON. The server reads it; the agent on the device
//! writes it.
//!
//! The fast path is one strict pass of serde that borrows from the body. Only a body that fails it is read again by the
//! lenient reader. That one accepts what the Node service accepted (numeric strings, other date forms). Otherwise it
//! names every wrong field at once.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    DeviceId, EventId, JobName, Mbps, Metadata, SyncDuration, Timestamp, Violation, lenient,
};

/// The largest count in a report, 2³¹ − 1: the limit of the Node service's integer columns.
pub const MAX_COUNT: u32 = i32::MAX.unsigned_abs();
/// The largest number of bytes in a report, 2⁵³ − 1: the largest integer that every JSON reader holds exactly.
pub const MAX_BYTES_SYNCED: u64 = (1 << 53) - 1;

/// One validated sync report.
#[derive(Debug, Clone, PartialEq)]
pub struct SyncEvent {
    /// The reporting device.
    pub device_id: DeviceId,
    /// The device's own id for this event. Sending an event with the same id again changes nothing.
    pub event_id: Option<EventId>,
    /// When the sync ran, by the device's clock. If the device does not trust its clock, this is the time of arrival.
    pub timestamp: Timestamp,
    /// Files transferred, at most [`MAX_COUNT`].
    pub total_files_synced: u32,
    /// Errors met, at most [`MAX_COUNT`]. A sync with errors is a failed sync.
    pub total_errors: u32,
    /// Measured speed, if one was measured.
    pub internet_speed: Option<Mbps>,
    /// The device's job that ran.
    pub job: Option<JobName>,
    /// How long the sync took.
    pub duration: Option<SyncDuration>,
    /// Bytes moved, at most [`MAX_BYTES_SYNCED`].
    pub bytes_synced: Option<u64>,
    /// Any further data of the device.
    pub metadata: Option<Metadata>,
}

impl SyncEvent {
    /// True if the sync had errors.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.total_errors > 0
    }

    /// Reads one event from a JSON body.
    ///
    /// # Errors
    /// [`ParseError::Malformed`] when the body is not JSON. Otherwise [`ParseError::Invalid`] with every wrong field.
    pub fn from_json(body: &[u8], arrival: Arrival) -> Result<Self, ParseError> {
        std::str::from_utf8(body)
            .ok()
            // A derived reader would also accept an array as a struct.
            .filter(|text| text.trim_ascii_start().starts_with('{'))
            .and_then(|text| serde_json::from_str::<Wire<'_>>(text).ok())
            .and_then(|wire| wire.validate(arrival))
            .map_or_else(|| lenient::read_sync_event(body, arrival), Ok)
    }

    /// Writes the event as a device sends it, on one line. With [`DeviceClock::Unsynced`] the server uses the time of
    /// arrival as its date.
    ///
    /// # Errors
    /// When JSON cannot hold it. No valid event causes that.
    pub fn to_json(&self, clock: DeviceClock) -> Result<String, serde_json::Error> {
        let raw = |number: Option<String>| number.map(RawValue::from_string).transpose();
        let timestamp = self.timestamp.to_string();
        let internet_speed = raw(self.internet_speed.map(|speed| speed.to_string()))?;
        let duration_seconds = raw(self.duration.map(|duration| duration.to_string()))?;
        // Metadata is kept as it was sent, perhaps on several lines. JSON strings contain no line breaks, so only white
        // space changes.
        let metadata = self.metadata.as_ref().map(|sent| sent.as_str().replace(['\n', '\r'], " "));
        let metadata = raw(metadata)?;
        serde_json::to_string(&Wire {
            device_id: self.device_id.as_str(),
            event_id: self.event_id.as_ref().map(EventId::as_str),
            timestamp: &timestamp,
            clock: (clock == DeviceClock::Unsynced).then_some(clock.as_str()),
            total_files_synced: self.total_files_synced,
            total_errors: self.total_errors,
            internet_speed: internet_speed.as_deref(),
            job: self.job.as_ref().map(JobName::as_str),
            duration_seconds: duration_seconds.as_deref(),
            bytes_synced: self.bytes_synced,
            metadata: metadata.as_deref(),
        })
    }

    /// Dates the event by its arrival, for a device without a trustworthy clock. The device's own date is kept in the
    /// metadata.
    pub(crate) fn redate(&mut self, arrival: Arrival) {
        let metadata = self.metadata.take();
        self.metadata = Some(Metadata::with_device_timestamp(metadata, self.timestamp));
        self.timestamp = arrival.received;
    }
}

/// The server's clock when an event arrives.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Now.
    pub received: Timestamp,
    /// The latest `timestamp` to accept: now plus the allowed clock skew.
    pub latest: Timestamp,
}

/// Whether a device trusts its clock. A Raspberry Pi has no battery for its clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceClock {
    /// The device trusts its clock. Its event is dated by the event's own `timestamp`.
    Synced,
    /// The device does not trust its clock. Its event is dated by its arrival.
    Unsynced,
}

impl DeviceClock {
    /// The value on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Synced => "synced",
            Self::Unsynced => "unsynced",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        [Self::Synced, Self::Unsynced].into_iter().find(|clock| clock.as_str() == text)
    }
}

/// Why a body is not a sync event.
#[derive(Debug, Clone, PartialEq)]
pub enum ParseError {
    /// Not JSON. The text says where it stops being JSON.
    Malformed(String),
    /// JSON, but these fields are wrong.
    Invalid(Vec<Violation>),
}

/// The wire format in its strict form, as the agent and correct scripts send it.
#[derive(Deserialize, Serialize)]
struct Wire<'a> {
    device_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<&'a str>,
    timestamp: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    clock: Option<&'a str>,
    total_files_synced: u32,
    total_errors: u32,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    internet_speed: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<&'a str>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_synced: Option<u64>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a RawValue>,
}

impl Wire<'_> {
    /// Checks the ranges. `None` sends the body to the lenient reader, which produces the error messages.
    fn validate(self, arrival: Arrival) -> Option<SyncEvent> {
        fn number<T>(
            raw: Option<&RawValue>,
            read: impl Fn(&str) -> Option<T>,
        ) -> Option<Option<T>> {
            raw.map_or(Some(None), |raw| read(raw.get()).map(Some))
        }
        if self.total_files_synced > MAX_COUNT || self.total_errors > MAX_COUNT {
            return None;
        }
        if self.bytes_synced.is_some_and(|bytes| bytes > MAX_BYTES_SYNCED) {
            return None;
        }
        let mut event = SyncEvent {
            device_id: DeviceId::new(self.device_id).ok()?,
            event_id: self.event_id.map(EventId::new).transpose().ok()?,
            timestamp: Timestamp::parse_iso8601(self.timestamp)?,
            total_files_synced: self.total_files_synced,
            total_errors: self.total_errors,
            internet_speed: number(self.internet_speed, |text| Mbps::parse(text).ok())?,
            job: self.job.map(JobName::new).transpose().ok()?,
            duration: number(self.duration_seconds, |text| SyncDuration::parse(text).ok())?,
            bytes_synced: self.bytes_synced,
            metadata: self.metadata.map(|raw| Metadata::new(raw.get())).transpose().ok()?,
        };
        match self.clock.map_or(Some(DeviceClock::Synced), DeviceClock::parse)? {
            DeviceClock::Unsynced => event.redate(arrival),
            DeviceClock::Synced if event.timestamp > arrival.latest => return None,
            DeviceClock::Synced => {}
        }
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{option, prelude::*};

    use super::*;
    use crate::event_fields::EVENT_FIELDS;

    fn text(most: usize) -> impl Strategy<Value = String> {
        proptest::string::string_regex(&format!("[^\\p{{Cc}}]{{1,{most}}}")).unwrap()
    }

    prop_compose! {
        fn events()(
            device_id in text(255),
            event_id in option::of(text(64)),
            job in option::of(text(100)),
            milliseconds in 0..2_000_000_000_000_i64,
            counts in (0..=MAX_COUNT, 0..=MAX_COUNT),
            speed in option::of(0..=Mbps::MAX_HUNDREDTHS),
            duration in option::of(0..=SyncDuration::MAX_MILLISECONDS),
            bytes_synced in option::of(0..=MAX_BYTES_SYNCED),
            metadata in option::of(prop_oneof![
                Just("{}".to_owned()), Just("{\n  \"a\":\r\n [1.50, \"\\n\"]}".to_owned()),
            ]),
        ) -> SyncEvent {
            SyncEvent {
                device_id: DeviceId::new(&device_id).unwrap(),
                event_id: event_id.map(|id| EventId::new(&id).unwrap()),
                timestamp: Timestamp::from_millisecond(milliseconds).unwrap(),
                total_files_synced: counts.0,
                total_errors: counts.1,
                internet_speed: speed.and_then(Mbps::from_hundredths),
                job: job.map(|job| JobName::new(&job).unwrap()),
                duration: duration.and_then(SyncDuration::from_milliseconds),
                bytes_synced,
                metadata: metadata.map(|text| Metadata::new(&text).unwrap()),
            }
        }
    }

    proptest! {
        #[test]
        fn an_event_reads_as_it_was_written(event in events()) {
            let received = Timestamp::from_millisecond(2_000_000_000_000).unwrap();
            let arrival = Arrival { received, latest: received };
            let json = event.to_json(DeviceClock::Synced).unwrap();
            prop_assert_eq!(json.lines().count(), 1, "{}", json);
            let mut read = SyncEvent::from_json(json.as_bytes(), arrival).unwrap();
            let on_one_line = |metadata: Metadata| metadata.as_str().replace(['\n', '\r'], " ");
            let kept = read.metadata.take().map(on_one_line);
            let mut sent = event.clone();
            prop_assert_eq!(kept, sent.metadata.take().map(on_one_line));
            prop_assert_eq!(read, sent);
            let json = event.to_json(DeviceClock::Unsynced).unwrap();
            let dated = SyncEvent::from_json(json.as_bytes(), arrival).unwrap();
            prop_assert_eq!(dated.timestamp, received);
            let timestamp = event.timestamp.to_string();
            prop_assert!(dated.metadata.unwrap().as_str().contains(&timestamp));
        }
    }

    #[test]
    fn every_field_is_written_under_its_name() {
        let metadata = RawValue::from_string("{}".to_owned()).unwrap();
        let number = RawValue::from_string("1".to_owned()).unwrap();
        let wire = Wire {
            device_id: "pi",
            event_id: Some("1"),
            timestamp: "2025-06-17T10:30:00Z",
            clock: Some("synced"),
            total_files_synced: 1,
            total_errors: 0,
            internet_speed: Some(&number),
            job: Some("nightly"),
            duration_seconds: Some(&number),
            bytes_synced: Some(1),
            metadata: Some(&metadata),
        };
        let json = serde_json::to_string(&wire).unwrap();
        let places = EVENT_FIELDS.map(|field| json.find(&format!("\"{}\":", field.name)));
        assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{json}: {places:?}");
        // The strict pass accepts it.
        let received = Timestamp::from_millisecond(2_000_000_000_000).unwrap();
        let arrival = Arrival { received, latest: received };
        assert!(wire.validate(arrival).is_some());
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&json).unwrap();
        assert_eq!(object.len(), EVENT_FIELDS.len());
        // Without any required field it is refused; without any other field it is accepted.
        for field in EVENT_FIELDS {
            let mut rest = object.clone();
            rest.remove(field.name);
            let text = serde_json::to_string(&rest).unwrap();
            let read = SyncEvent::from_json(text.as_bytes(), arrival);
            assert_eq!(read.is_err(), field.is_required, "{}", field.name);
        }
    }
}
