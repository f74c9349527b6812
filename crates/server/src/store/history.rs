//! A device's history: what to read of it, and what comes back.

use pisync_core::{DeviceId, JobName, Timestamp};
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

/// Metadata as it was stored; text that is no JSON (foreign SQL can write it) is given as a string.
pub(super) fn stored_metadata(text: String) -> Option<Box<RawValue>> {
    RawValue::from_string(text).or_else(|_| RawValue::from_string("\"not JSON\"".to_owned())).ok()
}
