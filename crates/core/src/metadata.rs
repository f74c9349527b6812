//! The metadata of a sync event: a JSON object that the device sends for its own purposes. It is kept as the text that
//! was sent. The server adds only the date of a device without a trustworthy clock.

use std::fmt;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::{Timestamp, ViolationCode};

/// The longest metadata, in bytes of its JSON text.
pub const MAX_METADATA_BYTES: usize = 4096;

/// The field of metadata that keeps the date given by a device without a trustworthy clock.
const DEVICE_TIMESTAMP: &str = "device_timestamp";
/// The beginning of metadata to which that date was added.
const DATED: &str = "{\"device_timestamp\":\"";
/// The added length: the beginning without its brace, the date, and `",`.
const DATED_BYTES: usize = DATED.len() - 1 + "2025-06-17T10:30:00.000Z\",".len();

/// A JSON object of at most [`MAX_METADATA_BYTES`], kept as the text that was sent.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Metadata(Box<RawValue>);

/// The rule that is broken by half a surrogate pair, such as `\ud800` alone. No Unicode encoding can hold it.
pub const HALF_SURROGATE: &str = "must be valid Unicode text";

/// Why metadata is refused. [`fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataError {
    /// JSON, but not an object.
    NotAnObject,
    /// Longer than [`MAX_METADATA_BYTES`].
    TooLong,
    /// Half a surrogate pair, which JSON readers refuse.
    HalfSurrogate,
    /// A number that does not fit a double.
    HugeNumber,
    /// Nested deeper than JSON readers allow.
    TooDeep,
    /// Anything else that cannot be read back.
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

    /// Classifies the error of reading `text`, which is JSON, as an object. The reader reports the cause only in words;
    /// a test compares its words with these.
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
    /// When it is too long or not a JSON object. An empty array is accepted as an empty object.
    pub fn new(text: &str) -> Result<Self, MetadataError> {
        if text.len() > MAX_METADATA_BYTES {
            return Err(MetadataError::TooLong);
        }
        // PHP has one kind of array, so it writes an empty object as `[]`.
        if text.strip_prefix('[').is_some_and(|rest| rest.trim_ascii_start() == "]") {
            return Ok(Self::empty());
        }
        Self::object(text)
    }

    /// Checks and keeps metadata that a server stored before, with or without an added date.
    ///
    /// # Errors
    /// When it is longer than its kind may be, or not a JSON object.
    pub fn kept(text: &str) -> Result<Self, MetadataError> {
        Self::dated(text).or_else(|_| Self::new(text))
    }

    /// Checks and keeps metadata to which a server added the device's date. It may be longer than what devices send, by
    /// the length of that date.
    pub(crate) fn dated(text: &str) -> Result<Self, MetadataError> {
        if !text.starts_with(DATED) || text.len() > MAX_METADATA_BYTES + DATED_BYTES {
            return Err(MetadataError::TooLong);
        }
        Self::object(text)
    }

    fn object(text: &str) -> Result<Self, MetadataError> {
        // Parsed in full, so that every client can read what a history returns.
        serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text)
            .and_then(|_| RawValue::from_string(text.to_owned()))
            .map(Self)
            .map_err(|error| MetadataError::of(text, &error))
    }

    /// Adds the device's date to `metadata` as `device_timestamp`, unless the device has set that field itself.
    pub(crate) fn with_device_timestamp(metadata: Option<Self>, timestamp: Timestamp) -> Self {
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

    /// The JSON text as it was sent, including a date that the server added.
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
