//! An instant in UTC with the precision that PiSync stores: whole milliseconds.

use std::fmt;

use jiff::{civil, tz::TimeZone};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A UTC instant in whole milliseconds, from year 1 to year 9999 (what RFC 3339 can write and both
/// databases can hold).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// `0001-01-01T00:00:00.000Z`.
const MIN_MILLISECOND: i64 = -62_135_596_800_000;
/// `9999-12-30T22:00:00.999Z`, the last instant that the time library can hold.
const MAX_MILLISECOND: i64 = 253_402_207_200_999;

impl Timestamp {
    /// The earliest instant, `0001-01-01T00:00:00.000Z`.
    pub const MIN: Self = Self(MIN_MILLISECOND);
    /// The latest instant, `9999-12-30T22:00:00.999Z`.
    pub const MAX: Self = Self(MAX_MILLISECOND);

    /// The instant `millisecond` milliseconds after 1970-01-01T00:00Z; `None` outside the range.
    #[must_use]
    pub fn from_millisecond(millisecond: i64) -> Option<Self> {
        (MIN_MILLISECOND..=MAX_MILLISECOND).contains(&millisecond).then_some(Self(millisecond))
    }

    /// Cuts `instant` to whole milliseconds; an instant outside the range becomes the nearest bound.
    #[must_use]
    pub fn truncate(instant: jiff::Timestamp) -> Self {
        Self(whole_milliseconds(instant).clamp(MIN_MILLISECOND, MAX_MILLISECOND))
    }

    /// Milliseconds since 1970-01-01T00:00Z.
    #[must_use]
    pub fn as_millisecond(self) -> i64 {
        self.0
    }

    /// The same instant as the time library's type.
    #[must_use]
    pub fn to_jiff(self) -> jiff::Timestamp {
        // Not by `from_millisecond`, which refuses the last second's milliseconds. The range above lies
        // within the library's, so the fallback is never taken.
        let nanosecond = i32::try_from(self.0.rem_euclid(1000) * 1_000_000).unwrap_or(0);
        jiff::Timestamp::new(self.0.div_euclid(1000), nanosecond).unwrap_or(jiff::Timestamp::MAX)
    }

    /// This instant moved by `milliseconds`, staying within the range.
    #[must_use]
    pub fn saturating_add_milliseconds(self, milliseconds: i64) -> Self {
        Self(self.0.saturating_add(milliseconds).clamp(MIN_MILLISECOND, MAX_MILLISECOND))
    }

    /// Reads an ISO 8601 date and time. Without an offset it is read as UTC; a bare date is its
    /// midnight. Digits beyond milliseconds are cut.
    #[must_use]
    pub fn parse_iso8601(text: &str) -> Option<Self> {
        let instant = text.parse().ok().or_else(|| without_offset(text))?;
        Self::from_millisecond(whole_milliseconds(instant))
    }
}

/// Reads a date and time that has no offset as UTC.
fn without_offset(text: &str) -> Option<jiff::Timestamp> {
    // The time library passes over a time zone's name, which would make its local time UTC.
    if text.contains('[') {
        return None;
    }
    text.parse::<civil::DateTime>()
        .ok()?
        .to_zoned(TimeZone::UTC)
        .ok()
        .map(|zoned| zoned.timestamp())
}

/// Milliseconds since 1970, cut towards the past also before 1970: digits are dropped, never rounded.
fn whole_milliseconds(instant: jiff::Timestamp) -> i64 {
    let millisecond = instant.as_nanosecond().div_euclid(1_000_000);
    // The time library's whole range fits.
    i64::try_from(millisecond).unwrap_or(i64::MAX)
}

/// RFC 3339 in UTC with milliseconds, for instance `2025-06-17T10:30:00.000Z`.
impl fmt::Display for Timestamp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:.3}", self.to_jiff())
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse_iso8601(&text)
            .ok_or_else(|| de::Error::custom(format!("not an ISO 8601 date and time: {text}")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reading(text: &str) -> Option<String> {
        Timestamp::parse_iso8601(text).map(|timestamp| timestamp.to_string())
    }

    #[test]
    fn reads_what_devices_send() {
        for (text, expected) in [
            ("2025-06-17T10:30:00.000Z", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T10:30:00Z", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T16:00:00+05:30", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T10:30:00.123999Z", "2025-06-17T10:30:00.123Z"),
            ("1969-12-31T23:59:59.9999Z", "1969-12-31T23:59:59.999Z"),
            ("2025-06-17", "2025-06-17T00:00:00.000Z"),
            ("2025-06-17T10:30:00", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17 10:30", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T12:30+02:00[Europe/Berlin]", "2025-06-17T10:30:00.000Z"),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
        ] {
            assert_eq!(reading(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "",
            "yesterday",
            "1750000000000",
            "2025-13-01",
            "2025-02-30",
            "10:30",
            "2025-06-17T25:00:00Z",
            "0000-01-01T00:00:00Z",
            "-000001-01-01T00:00:00Z",
            "2025-06-17T10:30:00Zjunk",
            "2025-06-17T12:30[Europe/Berlin]",
        ] {
            assert_eq!(reading(text), None, "{text}");
        }
    }

    #[test]
    fn the_bounds_are_what_they_say() {
        let text = |millisecond| Timestamp::from_millisecond(millisecond).map(|at| at.to_string());
        assert_eq!(text(MIN_MILLISECOND).as_deref(), Some("0001-01-01T00:00:00.000Z"));
        assert_eq!(text(MAX_MILLISECOND).as_deref(), Some("9999-12-30T22:00:00.999Z"));
        assert_eq!(text(MAX_MILLISECOND - 1).as_deref(), Some("9999-12-30T22:00:00.998Z"));
        assert_eq!(text(MIN_MILLISECOND - 1), None);
        assert_eq!(text(MAX_MILLISECOND + 1), None);
    }

    proptest! {
        #[test]
        fn writing_and_reading_gives_the_same(millisecond in MIN_MILLISECOND..=MAX_MILLISECOND) {
            let timestamp = Timestamp::from_millisecond(millisecond);
            prop_assert_eq!(timestamp.and_then(|at| Timestamp::parse_iso8601(&at.to_string())), timestamp);
        }

        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = Timestamp::parse_iso8601(&text);
        }
    }
}
