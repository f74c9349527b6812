//! A device's history: what to read of it, and what a read answers. The API and exports make a [`HistoryQuery`]; both
//! stores answer it. Events may have been written by foreign SQL, so nothing here may take their ranges for granted.

use pisync_core::{DeviceId, JobName, Mbps, Metadata, SyncDuration, SyncEvent, Timestamp};
use serde_json::value::RawValue;

use super::Figures;

/// Which of a device's events to list.
#[derive(Debug, Clone)]
pub struct HistoryQuery {
    /// The device.
    pub device_id: DeviceId,
    /// Only events of this job.
    pub job: Option<JobName>,
    /// Not before this `timestamp`.
    pub from: Option<Timestamp>,
    /// Not after this `timestamp`.
    pub until: Option<Timestamp>,
    /// Only events behind this position.
    pub after: Option<HistoryPosition>,
    /// The maximum number of events.
    pub limit: u32,
    /// How many events to skip.
    pub offset: u64,
    /// Oldest first instead of newest first. `after` is then a position in that order.
    pub oldest_first: bool,
}

impl HistoryQuery {
    /// The device's newest events, at most `limit`.
    #[must_use]
    pub fn newest(device_id: DeviceId, limit: u32) -> Self {
        Self {
            device_id,
            job: None,
            from: None,
            until: None,
            after: None,
            limit,
            offset: 0,
            oldest_first: false,
        }
    }

    /// The position to begin after. Without one, the position before all events.
    pub(super) fn start(&self) -> HistoryPosition {
        let first = if self.oldest_first {
            HistoryPosition::BEFORE_OLDEST
        } else {
            HistoryPosition::BEFORE_NEWEST
        };
        self.after.unwrap_or(first)
    }

    /// The SQL that differs between the two orders, for either store: the operator for what lies behind a position, and
    /// the direction.
    pub(super) fn order(&self) -> (&'static str, &'static str) {
        if self.oldest_first { (">", "asc") } else { ("<", "desc") }
    }
}

/// An event's position in a history, by `timestamp`, then by id. It stays the same while other events arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryPosition {
    /// Microseconds since 1970. Foreign SQL can have written more digits into PostgreSQL than PiSync does.
    pub microsecond: i64,
    /// The event's id.
    pub id: i64,
}

impl HistoryPosition {
    /// Before the newest possible event, when the newest come first.
    const BEFORE_NEWEST: Self = Self { microsecond: i64::MAX, id: i64::MAX };
    /// Before the oldest possible event.
    const BEFORE_OLDEST: Self = Self { microsecond: i64::MIN, id: i64::MIN };
}

/// A page of a device's history, with its figures.
#[derive(Debug)]
pub struct SyncHistory {
    /// The figures over everything that the device ever reported.
    pub figures: Figures,
    /// Newest first by `timestamp`, then by id.
    pub events: Vec<StoredEvent>,
    /// The last event's position, when more events follow.
    pub next: Option<HistoryPosition>,
    /// How many events the query can page to, whatever its `after` is.
    pub total_events: u64,
    /// Events received before this may be gone; `None` while all are kept.
    pub raw_since: Option<Timestamp>,
}

/// A page of a device's events.
#[derive(Debug)]
pub struct EventPage {
    /// The events in the requested order.
    pub events: Vec<StoredEvent>,
    /// The last event's position, when more events follow.
    pub next: Option<HistoryPosition>,
}

/// An event as it is kept. Foreign SQL may have written it, so ranges are not taken for granted.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    /// Unique over all devices.
    pub id: i64,
    /// The device's own id for it.
    pub event_id: Option<String>,
    /// When the device says it ran.
    pub timestamp: Timestamp,
    /// Files transferred.
    pub total_files_synced: i64,
    /// Errors met.
    pub total_errors: i64,
    /// Hundredths of Mbps.
    pub internet_speed: Option<i64>,
    /// Which of the device's jobs.
    pub job: Option<String>,
    /// Milliseconds.
    pub duration: Option<i64>,
    /// Bytes moved.
    pub bytes_synced: Option<i64>,
    /// The JSON text that was sent.
    pub metadata: Option<Box<RawValue>>,
    /// When the server received it.
    pub created_at: Timestamp,
    /// When the row was last changed; PiSync never changes one.
    pub updated_at: Timestamp,
}

impl StoredEvent {
    /// The fields in which `event`, which came under the same id, differs. Empty when it is the same report, sent
    /// again.
    #[must_use]
    pub fn differences(&self, event: &SyncEvent) -> Vec<&'static str> {
        let metadata = event.metadata.as_ref().map(Metadata::as_str);
        let (kept, sent) = (self.metadata.as_deref().map(RawValue::get), metadata);
        // An event that is dated by its arrival has another date each time. The device's own date is in the metadata.
        let is_dated_by_arrival = is_dated_by_arrival(kept) && is_dated_by_arrival(sent);
        let comparisons = [
            ("timestamp", is_dated_by_arrival || self.timestamp == event.timestamp),
            ("total_files_synced", self.total_files_synced == i64::from(event.total_files_synced)),
            ("total_errors", self.total_errors == i64::from(event.total_errors)),
            ("internet_speed", self.internet_speed == event.internet_speed.map(Mbps::hundredths)),
            ("job", self.job.as_deref() == event.job.as_ref().map(JobName::as_str)),
            ("duration_seconds", self.duration == event.duration.map(SyncDuration::milliseconds)),
            ("bytes_synced", self.bytes_synced == event.bytes_synced.map(u64::cast_signed)),
            ("metadata", is_same_json(kept, sent)),
        ];
        comparisons.into_iter().filter(|(_, same)| !same).map(|(field, _)| field).collect()
    }
}

/// Whether metadata has the date that was given by a device without a trustworthy clock.
fn is_dated_by_arrival(metadata: Option<&str>) -> bool {
    metadata.is_some_and(|text| text.contains("\"device_timestamp\""))
}

/// Whether two texts mean the same. A program that rewrites JSON may change spaces and the order of fields.
fn is_same_json(left: Option<&str>, right: Option<&str>) -> bool {
    let (Some(left), Some(right)) = (left, right) else { return left == right };
    let read = |text| serde_json::from_str::<serde_json::Value>(text).ok();
    left == right || read(left).is_some_and(|left| Some(left) == read(right))
}

/// Metadata as it was stored. Text that is no JSON, which foreign SQL can write, is answered as a string.
pub(super) fn stored_metadata(text: String) -> Option<Box<RawValue>> {
    RawValue::from_string(text).or_else(|_| RawValue::from_string("\"not JSON\"".to_owned())).ok()
}

#[cfg(test)]
mod tests {
    use pisync_core::{Arrival, event_fields::EVENT_FIELDS};

    use super::*;

    /// A field that is added to events must be compared, too.
    #[test]
    fn every_field_of_an_event_is_compared() {
        let body = r#"{"device_id": "pi", "event_id": "1", "timestamp": "2025-06-17T10:30:00.000Z",
            "total_files_synced": 1, "total_errors": 2, "internet_speed": 3, "job": "nightly",
            "duration_seconds": 4, "bytes_synced": 5, "metadata": {"tool": "rsync"}}"#;
        let now = Timestamp::parse_iso8601("2025-06-17T10:31:00.000Z").unwrap();
        let event =
            SyncEvent::from_json(body.as_bytes(), Arrival { received: now, latest: now }).unwrap();
        let other = StoredEvent {
            id: 1,
            event_id: Some("1".to_owned()),
            timestamp: now,
            total_files_synced: 0,
            total_errors: 0,
            internet_speed: None,
            job: None,
            duration: None,
            bytes_synced: None,
            metadata: None,
            created_at: now,
            updated_at: now,
        };
        let names: Vec<_> = EVENT_FIELDS
            .into_iter()
            .map(|field| field.name)
            // An event is found by the first two. Of the clock, the dates tell.
            .filter(|name| !["device_id", "event_id", "clock"].contains(name))
            .collect();
        assert_eq!(other.differences(&event), names);
    }
}
