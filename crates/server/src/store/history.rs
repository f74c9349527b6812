//! A device's history: what to read of it, and what comes back.

use pisync_core::{DeviceId, JobName, Mbps, Metadata, SyncDuration, SyncEvent, Timestamp};
use serde_json::value::RawValue;

use super::Figures;

/// Which of a device's events to list.
#[derive(Debug, Clone)]
pub struct HistoryQuery {
    /// Whose.
    pub device_id: DeviceId,
    /// Only this job's.
    pub job: Option<JobName>,
    /// Not before this `timestamp`.
    pub from: Option<Timestamp>,
    /// Not after this `timestamp`.
    pub until: Option<Timestamp>,
    /// Only what comes after this event.
    pub after: Option<HistoryPosition>,
    /// At most so many.
    pub limit: u32,
    /// After so many.
    pub offset: u64,
    /// Oldest first instead of newest first; `after` is then a place in that order.
    pub oldest_first: bool,
}

impl HistoryQuery {
    /// The device's newest events, so many of them.
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

    /// The position to begin after: before everything, when none was given.
    pub(super) fn start(&self) -> HistoryPosition {
        let first = if self.oldest_first {
            HistoryPosition::BEFORE_OLDEST
        } else {
            HistoryPosition::BEFORE_NEWEST
        };
        self.after.unwrap_or(first)
    }

    /// What differs between the orders, in either store's SQL: how what comes behind a position compares
    /// to it, and the direction.
    pub(super) fn order(&self) -> (&'static str, &'static str) {
        if self.oldest_first { (">", "asc") } else { ("<", "desc") }
    }
}

/// An event's place in a history, by `timestamp`, then by id. It stays where it is while others arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryPosition {
    /// Since 1970: foreign SQL can have written more digits into PostgreSQL than PiSync does.
    pub microsecond: i64,
    /// The event's.
    pub id: i64,
}

impl HistoryPosition {
    /// Before the newest event that can be, when those come first.
    const BEFORE_NEWEST: Self = Self { microsecond: i64::MAX, id: i64::MAX };
    /// Before the oldest.
    const BEFORE_OLDEST: Self = Self { microsecond: i64::MIN, id: i64::MIN };
}

/// A page of a device's history, with its figures.
#[derive(Debug)]
pub struct SyncHistory {
    /// Over everything the device ever reported.
    pub figures: Figures,
    /// Newest first by `timestamp`, then by id.
    pub events: Vec<StoredEvent>,
    /// The last event's position, when there are more after it.
    pub next: Option<HistoryPosition>,
    /// How many events the query can page to, wherever it begins.
    pub total_events: u64,
    /// Events received before this may be gone; `None` while all are kept.
    pub raw_since: Option<Timestamp>,
}

/// A page of a device's events.
#[derive(Debug)]
pub struct EventPage {
    /// In the order that was asked for.
    pub events: Vec<StoredEvent>,
    /// The last event's position, when there are more after it.
    pub next: Option<HistoryPosition>,
}

/// An event as it is kept. Foreign SQL may have written it, so ranges are not taken for granted.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    /// Unique over all devices.
    pub id: i64,
    /// What the device calls it.
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
    /// The fields in which `event`, which came under the same id, says something else. None when it is the same
    /// report, sent again.
    #[must_use]
    pub fn differences(&self, event: &SyncEvent) -> Vec<&'static str> {
        let metadata = event.metadata.as_ref().map(Metadata::as_str);
        let (kept, sent) = (self.metadata.as_deref().map(RawValue::get), metadata);
        // What is dated by its arrival has another date each time; the device's own date is in the metadata.
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

/// Whether metadata has the date that a device without a trustworthy clock gave.
fn is_dated_by_arrival(metadata: Option<&str>) -> bool {
    metadata.is_some_and(|text| text.contains("\"device_timestamp\""))
}

/// Whether two texts mean the same: whoever writes JSON anew may put spaces and fields elsewhere.
fn is_same_json(left: Option<&str>, right: Option<&str>) -> bool {
    let (Some(left), Some(right)) = (left, right) else { return left == right };
    let read = |text| serde_json::from_str::<serde_json::Value>(text).ok();
    left == right || read(left).is_some_and(|left| Some(left) == read(right))
}

/// Metadata as it was stored; text that is no JSON (foreign SQL can write it) is given as a string.
pub(super) fn stored_metadata(text: String) -> Option<Box<RawValue>> {
    RawValue::from_string(text).or_else(|_| RawValue::from_string("\"not JSON\"".to_owned())).ok()
}
