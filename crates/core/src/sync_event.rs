//! A device's report of one sync run, and how it is read from JSON.
//!
//! The fast path is a single strict pass of serde over the body, borrowing from it. Only a body that
//! fails it is read again by the lenient reader, which accepts what the Node service accepted (numeric
//! strings, other date forms) and otherwise names every wrong field at once.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    DeviceId, EventId, JobName, Timestamp, Violation, ViolationCode,
    decimal::{self, Scaled},
    lenient,
};

/// The largest count that a report may hold, 2³¹ − 1: what the Node service's integer columns take.
pub const MAX_COUNT: u32 = i32::MAX.unsigned_abs();
/// The most bytes that a report may say it moved, 2⁵³ − 1: what a JSON number holds exactly.
pub const MAX_BYTES_SYNCED: u64 = (1 << 53) - 1;
/// The longest metadata, in bytes of its JSON text.
pub const MAX_METADATA_BYTES: usize = 4096;

/// Where metadata has the date that a device without a trustworthy clock gave.
const DEVICE_TIMESTAMP: &str = "device_timestamp";
/// How metadata begins into which that was put.
const DATED: &str = "{\"device_timestamp\":\"";
/// By how much that makes it longer: the beginning but for its brace, the date, and `",`.
const DATED_BYTES: usize = DATED.len() - 1 + "2025-06-17T10:30:00.000Z\",".len();

/// One validated sync report.
#[derive(Debug, Clone, PartialEq)]
pub struct SyncEvent {
    /// Who reports.
    pub device_id: DeviceId,
    /// What the device calls this event; with it, sending the event again changes nothing.
    pub event_id: Option<EventId>,
    /// When the device says it ran; when it arrived, if the device does not trust its clock.
    pub timestamp: Timestamp,
    /// Files transferred, at most [`MAX_COUNT`].
    pub total_files_synced: u32,
    /// Errors met, at most [`MAX_COUNT`]; more than none makes this a failed sync.
    pub total_errors: u32,
    /// Measured speed, if one was measured.
    pub internet_speed: Option<Mbps>,
    /// Which of the device's jobs this was.
    pub job: Option<JobName>,
    /// How long it took.
    pub duration: Option<SyncDuration>,
    /// Bytes moved, at most [`MAX_BYTES_SYNCED`].
    pub bytes_synced: Option<u64>,
    /// Whatever else the device wants kept.
    pub metadata: Option<Metadata>,
}

impl SyncEvent {
    /// A failed sync is one with errors.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.total_errors > 0
    }

    /// Reads one event from a JSON body.
    ///
    /// # Errors
    /// [`ParseError::Malformed`] when the body is not JSON, else [`ParseError::Invalid`] with every
    /// wrong field.
    pub fn from_json(body: &[u8], arrival: Arrival) -> Result<Self, ParseError> {
        std::str::from_utf8(body)
            .ok()
            // A derived reader would also take an array for a struct.
            .filter(|text| text.trim_ascii_start().starts_with('{'))
            .and_then(|text| serde_json::from_str::<StrictWire>(text).ok())
            .and_then(|wire| wire.validate(arrival))
            .map_or_else(|| lenient::read_sync_event(body, arrival), Ok)
    }

    /// What a device without a trustworthy clock reports is dated by its arrival; the device's own
    /// date is kept in the metadata.
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

/// Whether a device trusts its clock. Raspberry Pis have no battery for theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceClock {
    Synced,
    Unsynced,
}

impl DeviceClock {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text {
            "synced" => Some(Self::Synced),
            "unsynced" => Some(Self::Unsynced),
            _ => None,
        }
    }
}

/// Why a body is no sync event.
#[derive(Debug, Clone, PartialEq)]
pub enum ParseError {
    /// Not JSON at all; says where it stops being JSON.
    Malformed(String),
    /// JSON, with these fields wrong.
    Invalid(Vec<Violation>),
}

/// The wire format as agents and scripts send it when they send it right.
#[derive(Deserialize)]
struct StrictWire<'a> {
    device_id: &'a str,
    event_id: Option<&'a str>,
    timestamp: &'a str,
    clock: Option<&'a str>,
    total_files_synced: u32,
    total_errors: u32,
    #[serde(borrow)]
    internet_speed: Option<&'a RawValue>,
    job: Option<&'a str>,
    #[serde(borrow)]
    duration_seconds: Option<&'a RawValue>,
    bytes_synced: Option<u64>,
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
}

impl StrictWire<'_> {
    /// `None` sends the body to the lenient reader, which knows the words.
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

/// Why a number is refused. [`fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberError {
    /// Not a number.
    NotANumber,
    /// A fraction where a whole number is due.
    NotAnInteger,
    /// Below zero.
    Negative,
    /// Above this, as it reads in decimal.
    TooLarge(&'static str),
}

impl fmt::Display for NumberError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotANumber => formatter.write_str("must be a number"),
            Self::NotAnInteger => formatter.write_str("must be an integer"),
            Self::Negative => formatter.write_str("must be greater than or equal to 0"),
            Self::TooLarge(most) => write!(formatter, "must be less than or equal to {most}"),
        }
    }
}

impl NumberError {
    /// Which kind of rule is broken.
    #[must_use]
    pub fn code(self) -> ViolationCode {
        match self {
            Self::NotANumber | Self::NotAnInteger => ViolationCode::Type,
            Self::Negative | Self::TooLarge(_) => ViolationCode::Range,
        }
    }
}

/// Reads `text` scaled by `10^scale` into `0..=most`; `most_text` is that bound as it reads unscaled.
pub(crate) fn parse_bounded(
    text: &str,
    scale: u32,
    most: i64,
    most_text: &'static str,
) -> Result<Scaled, NumberError> {
    let scaled = decimal::parse_scaled(text, scale).ok_or(NumberError::NotANumber)?;
    if scaled.value < 0 {
        return Err(NumberError::Negative);
    }
    if scaled.value > most {
        return Err(NumberError::TooLarge(most_text));
    }
    Ok(scaled)
}

/// A speed from 0 to 99,999,999.99 Mbps in hundredths, the Node service's `numeric(10,2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mbps(i64);

impl Mbps {
    const MAX_HUNDREDTHS: i64 = 9_999_999_999;

    /// Reads decimal text, rounding to two decimals half away from zero, then checks the range.
    ///
    /// # Errors
    /// When it is no number, or outside the range once rounded.
    pub fn parse(text: &str) -> Result<Self, NumberError> {
        parse_bounded(text, 2, Self::MAX_HUNDREDTHS, "99999999.99").map(|scaled| Self(scaled.value))
    }

    /// A stored value; `None` outside the range.
    #[must_use]
    pub fn from_hundredths(hundredths: i64) -> Option<Self> {
        (0..=Self::MAX_HUNDREDTHS).contains(&hundredths).then_some(Self(hundredths))
    }

    /// The speed in hundredths of Mbps.
    #[must_use]
    pub fn hundredths(self) -> i64 {
        self.0
    }
}

/// Ten integer digits fit a double exactly enough that two decimals come out as they went in.
#[expect(clippy::cast_precision_loss, reason = "at most 34 bits")]
impl From<Mbps> for f64 {
    fn from(speed: Mbps) -> Self {
        speed.0 as Self / 100.0
    }
}

/// How long a sync took: 0 to 31,536,000 seconds (a year) in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SyncDuration(i64);

impl SyncDuration {
    const MAX_MILLISECONDS: i64 = 31_536_000_000;

    /// Reads decimal seconds, rounding to three decimals half away from zero, then checks the range.
    ///
    /// # Errors
    /// When it is no number, or outside the range once rounded.
    pub fn parse(text: &str) -> Result<Self, NumberError> {
        parse_bounded(text, 3, Self::MAX_MILLISECONDS, "31536000").map(|scaled| Self(scaled.value))
    }

    /// A stored value; `None` outside the range.
    #[must_use]
    pub fn from_milliseconds(milliseconds: i64) -> Option<Self> {
        (0..=Self::MAX_MILLISECONDS).contains(&milliseconds).then_some(Self(milliseconds))
    }

    /// The duration in milliseconds.
    #[must_use]
    pub fn milliseconds(self) -> i64 {
        self.0
    }
}

/// Seconds.
#[expect(clippy::cast_precision_loss, reason = "at most 35 bits")]
impl From<SyncDuration> for f64 {
    fn from(duration: SyncDuration) -> Self {
        duration.0 as Self / 1000.0
    }
}

/// A JSON object of at most [`MAX_METADATA_BYTES`], kept as the text that was sent.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Metadata(Box<RawValue>);

/// What is said of text with half a surrogate pair in it, such as `\ud800` alone: no encoding can hold that.
pub const HALF_SURROGATE: &str = "must be valid Unicode text";

/// Why metadata is refused. [`fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataError {
    /// JSON, but no object.
    NotAnObject,
    /// More text than is kept.
    TooLong,
    /// Half a surrogate pair, which no JSON reader gives back.
    HalfSurrogate,
    /// A number that no double holds.
    HugeNumber,
    /// Deeper than JSON readers go.
    TooDeep,
    /// Something else that cannot be read back.
    Unreadable,
}

impl fmt::Display for MetadataError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotAnObject => "must be of type object",
            Self::TooLong => {
                return write!(
                    formatter,
                    "must be at most {MAX_METADATA_BYTES} bytes of JSON text"
                );
            }
            Self::HalfSurrogate => HALF_SURROGATE,
            Self::HugeNumber => "must not hold numbers beyond 1.8e308",
            Self::TooDeep => "must not be nested more than 127 levels deep",
            Self::Unreadable => "must be JSON that can be read back",
        })
    }
}

impl MetadataError {
    /// Which kind of rule is broken.
    #[must_use]
    pub fn code(self) -> ViolationCode {
        match self {
            Self::NotAnObject => ViolationCode::Type,
            Self::TooLong => ViolationCode::Length,
            Self::HugeNumber => ViolationCode::Range,
            Self::HalfSurrogate | Self::TooDeep | Self::Unreadable => ViolationCode::Format,
        }
    }

    /// What keeps `text`, which is JSON, from being read in full as an object. The reader tells only in words,
    /// which a test holds against these.
    fn of(text: &str, error: &serde_json::Error) -> Self {
        let words = error.to_string();
        let says = |part| words.contains(part);
        match () {
            () if !text.trim_ascii_start().starts_with('{') => Self::NotAnObject,
            () if says("surrogate") || says("hex escape") => Self::HalfSurrogate,
            () if says("number out of range") => Self::HugeNumber,
            () if says("recursion limit") => Self::TooDeep,
            () => Self::Unreadable,
        }
    }
}

impl Metadata {
    /// Checks and keeps `text`.
    ///
    /// # Errors
    /// When it is too long or not a JSON object. An empty array is taken for an empty object.
    pub fn new(text: &str) -> Result<Self, MetadataError> {
        if text.len() > MAX_METADATA_BYTES {
            return Err(MetadataError::TooLong);
        }
        // PHP writes an empty object so: it has one kind of array for both.
        if text.strip_prefix('[').is_some_and(|rest| rest.trim_ascii_start() == "]") {
            return Ok(Self::empty());
        }
        Self::object(text)
    }

    /// Checks and keeps what a server has kept before, dated or as it was sent.
    ///
    /// # Errors
    /// When it is longer than either may be, or not a JSON object.
    pub fn kept(text: &str) -> Result<Self, MetadataError> {
        Self::dated(text).or_else(|_| Self::new(text))
    }

    /// Checks and keeps what a server has dated by an event's arrival: it may be longer by that than what
    /// devices send.
    pub(crate) fn dated(text: &str) -> Result<Self, MetadataError> {
        if !text.starts_with(DATED) || text.len() > MAX_METADATA_BYTES + DATED_BYTES {
            return Err(MetadataError::TooLong);
        }
        Self::object(text)
    }

    fn object(text: &str) -> Result<Self, MetadataError> {
        // Read in full, so that what history gives back can be read by whoever asks for it.
        serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text)
            .and_then(|_| RawValue::from_string(text.to_owned()))
            .map(Self)
            .map_err(|error| MetadataError::of(text, &error))
    }

    /// `metadata` with the date that the device gave as `device_timestamp`, unless the device has put
    /// something there itself.
    fn with_device_timestamp(metadata: Option<Self>, timestamp: Timestamp) -> Self {
        let sent = metadata.as_ref().map_or("{}", Self::as_str);
        let fields = serde_json::from_str::<serde_json::Map<_, _>>(sent).unwrap_or_default();
        let (Some(rest), false) = (sent.strip_prefix('{'), fields.contains_key(DEVICE_TIMESTAMP))
        else {
            return metadata.unwrap_or_else(Self::empty);
        };
        let comma = if fields.is_empty() { "" } else { "," };
        let text = format!("{DATED}{timestamp}\"{comma}{rest}");
        RawValue::from_string(text).map_or_else(|_| metadata.unwrap_or_else(Self::empty), Self)
    }

    fn empty() -> Self {
        Self(serde_json::value::to_raw_value(&serde_json::Map::new()).unwrap_or_default())
    }

    /// A copy as raw JSON.
    #[must_use]
    pub fn to_raw_value(&self) -> Box<RawValue> {
        self.0.clone()
    }

    /// The JSON text as it was sent.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.get()
    }
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}
