//! An instant in UTC with the precision that PiSync stores: whole milliseconds. Every date from outside is parsed here.
//! Nothing here reads a clock.

use std::{borrow::Cow, fmt};

use jiff::{ToSpan, civil, fmt::temporal::Pieces, tz::TimeZone};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::ViolationCode;

/// A UTC instant in whole milliseconds, from year 1 to year 9999. RFC 3339 can write that range and both databases can
/// hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// `0001-01-01T00:00:00.000Z`.
const MIN_MILLISECOND: i64 = -62_135_596_800_000;
/// `9999-12-30T22:00:00.999Z`, the last instant that the time library can hold.
const MAX_MILLISECOND: i64 = 253_402_207_200_999;
/// `9999-12-31T23:59:59.999Z`, the end of the four-digit years.
const END_OF_9999: i64 = 253_402_300_799_999;
const DAY_SECONDS: i64 = 24 * 60 * 60;

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

    /// Cuts `instant` to whole milliseconds. An instant outside the range becomes the nearest bound.
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
        // `from_millisecond` would refuse the milliseconds of the last second. The range of this type lies within the
        // library's, so the fallback is never used.
        let nanosecond = i32::try_from(self.0.rem_euclid(1000) * 1_000_000).unwrap_or(0);
        jiff::Timestamp::new(self.0.div_euclid(1000), nanosecond).unwrap_or(jiff::Timestamp::MAX)
    }

    /// This instant moved by `milliseconds`, clamped to the range.
    #[must_use]
    pub fn saturating_add_milliseconds(self, milliseconds: i64) -> Self {
        Self(self.0.saturating_add(milliseconds).clamp(MIN_MILLISECOND, MAX_MILLISECOND))
    }

    /// Reads an ISO 8601 date and time, as [`Self::from_iso8601`] does; `None` for anything else.
    #[must_use]
    pub fn parse_iso8601(text: &str) -> Option<Self> {
        Self::from_iso8601(text).ok()
    }

    /// Reads an ISO 8601 date and time. Bodies, queries, imports and the command line all use this rule.
    ///
    /// A time without an offset is UTC. A bare date, month or year is its first instant. Digits beyond milliseconds are
    /// cut. As in RFC 3339, an offset is at most 23:59, `-00:00` is UTC, and a leap second is accepted as the second
    /// before it. As in the Node service, `24:00` is the next midnight. Instants of the year 9999 after [`Self::MAX`]
    /// become [`Self::MAX`].
    ///
    /// # Errors
    /// What is wrong with any other text.
    pub fn from_iso8601(text: &str) -> Result<Self, TimestampError> {
        // Nearly all devices send this form. The check of offsets is only in `read_pieces`.
        if text.ends_with('Z')
            && let Ok(instant) = text.parse()
            && let Some(timestamp) = Self::from_millisecond(whole_milliseconds(instant))
        {
            return Ok(timestamp);
        }
        read_pieces(text, None)
    }

    /// The same, but a time without an offset is local time in `zone`, as people mean it who set a holiday. A local time
    /// that a clock change skips counts as much later; of one that comes twice the first counts (RFC 5545).
    ///
    /// # Errors
    /// What is wrong with any other text.
    pub fn from_iso8601_in(text: &str, zone: &TimeZone) -> Result<Self, TimestampError> {
        read_pieces(text, Some(zone))
    }
}

/// Why a text is not an instant. [`fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestampError {
    /// Not in the form of an ISO 8601 date and time.
    NotIso8601,
    /// In that form, but the calendar has no such day.
    NoSuchDay,
    /// An offset from UTC of 24 hours or more.
    Offset,
    /// Before the year 1 or after the year 9999.
    OutOfRange,
}

impl fmt::Display for TimestampError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotIso8601 => "must be in ISO 8601 date format",
            Self::NoSuchDay => "must be a day that the calendar has",
            Self::Offset => "must have an offset from UTC of at most 23:59",
            Self::OutOfRange => "must be within the years 1 to 9999",
        })
    }
}

impl TimestampError {
    /// Which kind of rule is broken.
    #[must_use]
    pub fn code(self) -> ViolationCode {
        match self {
            Self::OutOfRange => ViolationCode::Range,
            Self::NotIso8601 | Self::NoSuchDay | Self::Offset => ViolationCode::Format,
        }
    }
}

/// Reads every form, including those beyond the time library's limits: its instants end a day before its calendar. A time
/// without an offset is local time in `zone`, or UTC.
fn read_pieces(text: &str, zone: Option<&TimeZone>) -> Result<Timestamp, TimestampError> {
    let text = nanoseconds_at_most(text);
    let (text, is_day_after) = midnight_at_the_end(&text);
    let whole_date = first_day(&text);
    let pieces =
        Pieces::parse(whole_date.as_deref().unwrap_or(&text)).map_err(|_| what_is_wrong(&text))?;
    let offset = pieces.to_numeric_offset();
    // A time zone's name without an offset is ambiguous: the rules of a zone change over the years.
    if offset.is_none() && text.contains('[') {
        return Err(TimestampError::NotIso8601);
    }
    let local = pieces.date().to_datetime(pieces.time().unwrap_or(civil::Time::midnight()));
    if let (None, Some(zone)) = (offset, zone) {
        let local = if is_day_after { local.checked_add(1.day()).ok() } else { Some(local) };
        let instant = local.and_then(|local| zone.to_timestamp(local).ok());
        return instant.map(Timestamp::truncate).ok_or(TimestampError::OutOfRange);
    }
    let offset = offset.map_or(0, |offset| i64::from(offset.seconds()));
    if offset.abs() >= DAY_SECONDS {
        return Err(TimestampError::Offset);
    }
    let since_1970 = local.duration_since(civil::Date::constant(1970, 1, 1).at(0, 0, 0, 0));
    let millisecond = i64::try_from(since_1970.as_nanos().div_euclid(1_000_000))
        .map_err(|_| TimestampError::OutOfRange)?;
    let days_after = if is_day_after { DAY_SECONDS } else { 0 };
    let millisecond = millisecond + (days_after - offset) * 1000;
    if !(MIN_MILLISECOND..=END_OF_9999).contains(&millisecond) {
        return Err(TimestampError::OutOfRange);
    }
    Ok(Timestamp(millisecond.min(MAX_MILLISECOND)))
}

/// Cuts the fraction of the seconds to the nine digits that the time library reads. ISO 8601 sets no limit, and the
/// Node service accepted any number of digits.
fn nanoseconds_at_most(text: &str) -> Cow<'_, str> {
    const DIGITS: usize = 9;
    let Some(point) = text.find(['.', ',']) else { return text.into() };
    let (before, fraction) = text.split_at(point + 1);
    let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
    if digits <= DIGITS {
        return text.into();
    }
    format!("{before}{}{}", &fraction[..DIGITS], &fraction[digits..]).into()
}

/// Replaces `24:00` after a date with `00:00`. Returns true with it if it did: the time is the midnight at the end of
/// the day.
fn midnight_at_the_end(text: &str) -> (Cow<'_, str>, bool) {
    let Some(time) = text.find(['T', 't', ' ']) else { return (text.into(), false) };
    let (date, time) = (&text[..=time], &text[time + 1..]);
    let rest = time.strip_prefix("24:00").filter(|rest| {
        let rest = rest.strip_prefix(":00").unwrap_or(rest);
        let rest = rest.strip_prefix('.').map_or(rest, |digits| digits.trim_start_matches('0'));
        rest.is_empty() || rest.starts_with(['Z', 'z', '+', '-', '['])
    });
    match rest {
        Some(rest) => (format!("{date}00:00{rest}").into(), true),
        None => (text.into(), false),
    }
}

/// The first day of a bare year or month, which the Node service accepted.
fn first_day(text: &str) -> Option<String> {
    let is_form = |form: &str| has_form(text, form);
    match () {
        () if is_form("0000") => Some(format!("{text}-01-01")),
        () if is_form("0000-00") => Some(format!("{text}-01")),
        () => None,
    }
}

/// True if `text` has digits where `form` has zeros, and equals `form` elsewhere.
fn has_form(text: &str, form: &str) -> bool {
    text.len() == form.len()
        && text.bytes().zip(form.bytes()).all(|(byte, expected)| match expected {
            b'0' => byte.is_ascii_digit(),
            _ => byte == expected,
        })
}

/// Classifies a text that the time library refused. It is called only for such texts.
fn what_is_wrong(text: &str) -> TimestampError {
    let (date, time) = match text.find(['T', 't', ' ']) {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, ""),
    };
    // Years of more than four digits have a sign and six digits.
    if date.starts_with(['+', '-']) && has_form(&date[1..], "000000-00-00") {
        return TimestampError::OutOfRange;
    }
    if !["0000-00-00", "00000000", "0000-00"].into_iter().any(|form| has_form(date, form)) {
        return TimestampError::NotIso8601;
    }
    let day = first_day(date);
    if day.as_deref().unwrap_or(date).parse::<civil::Date>().is_err() {
        return TimestampError::NoSuchDay;
    }
    let offset = time.find(['+', '-']).map(|sign| &time[sign + 1..]);
    let hours =
        offset.and_then(|offset| offset.get(..2)).and_then(|hours| hours.parse::<u8>().ok());
    match hours {
        Some(24..) => TimestampError::Offset,
        _ => TimestampError::NotIso8601,
    }
}

/// Milliseconds since 1970, rounded towards the past, before 1970 too: further digits are cut.
fn whole_milliseconds(instant: jiff::Timestamp) -> i64 {
    let millisecond = instant.as_nanosecond().div_euclid(1_000_000);
    // The whole range of the time library fits.
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
        Self::from_iso8601(&text)
            .map_err(|error| de::Error::custom(format!("the time {text} {error}")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reading(text: &str) -> Option<String> {
        Timestamp::parse_iso8601(text).map(|timestamp| timestamp.to_string())
    }

    /// Berlin skips 02:00 to 03:00 on 29 March 2026, and has it twice on 25 October.
    #[test]
    fn local_times_belong_to_a_zone() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        for (text, expected) in [
            ("2026-03-02T08:00", "2026-03-02T07:00:00.000Z"),
            ("2026-07-02", "2026-07-01T22:00:00.000Z"),
            ("2026-03-29T02:30", "2026-03-29T01:30:00.000Z"),
            ("2026-10-25T02:30:00.5", "2026-10-25T00:30:00.500Z"),
            ("2026-10-25T24:00", "2026-10-25T23:00:00.000Z"),
            ("2026-03-02T08:00Z", "2026-03-02T08:00:00.000Z"),
            ("2026-03-02T08:00+05:30", "2026-03-02T02:30:00.000Z"),
        ] {
            let read = Timestamp::from_iso8601_in(text, &zone).map(|time| time.to_string());
            assert_eq!(read.as_deref(), Ok(expected), "{text}");
        }
        for text in ["soon", "2026-02-30", "2026-03-02T25:00", "2026-03-02T08:00[Europe/Berlin]"] {
            assert!(Timestamp::from_iso8601_in(text, &zone).is_err(), "{text}");
        }
    }

    #[test]
    fn reads_what_devices_send() {
        for (text, expected) in [
            ("2025-06-17T10:30:00.000Z", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T10:30:00Z", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T16:00:00+05:30", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T10:30:00.123999Z", "2025-06-17T10:30:00.123Z"),
            ("2025-06-17T10:30:00.123456789012345678Z", "2025-06-17T10:30:00.123Z"),
            ("2025-06-17T10:30:00,999999999999999999+05:30", "2025-06-17T05:00:00.999Z"),
            ("2025-06-17 10:30:00.0000000000000000000001", "2025-06-17T10:30:00.000Z"),
            ("1969-12-31T23:59:59.9999Z", "1969-12-31T23:59:59.999Z"),
            ("2025-06-17", "2025-06-17T00:00:00.000Z"),
            ("2025-06-17T10:30:00", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17 10:30", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T12:30+02:00[Europe/Berlin]", "2025-06-17T10:30:00.000Z"),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
            ("2025-06-17T10:30:00+0530", "2025-06-17T05:00:00.000Z"),
            ("2025-06-17T10:30:00.9999+05:30", "2025-06-17T05:00:00.999Z"),
            ("1969-12-31T23:59:59.9999+00:00", "1969-12-31T23:59:59.999Z"),
            ("2025-06-17T10:30:00+23:59", "2025-06-16T10:31:00.000Z"),
            ("2025-06-17T10:30:00-23:59", "2025-06-18T10:29:00.000Z"),
            ("2025-06-17T10:30:00-00:00", "2025-06-17T10:30:00.000Z"),
            ("2025-06-17T10:30:60Z", "2025-06-17T10:30:59.000Z"),
            ("2025-06-17T10:30:60+00:00", "2025-06-17T10:30:59.000Z"),
            ("2025-06-17T24:00Z", "2025-06-18T00:00:00.000Z"),
            ("2025-12-31 24:00:00.000+01:00", "2025-12-31T23:00:00.000Z"),
            ("2025-06-17T24:00:00", "2025-06-18T00:00:00.000Z"),
            ("2025-06", "2025-06-01T00:00:00.000Z"),
            ("2025", "2025-01-01T00:00:00.000Z"),
            ("+002025-06-17T10:30:00Z", "2025-06-17T10:30:00.000Z"),
            // The end of the calendar, which people write to mean "for ever".
            ("9999-12-31", "9999-12-30T22:00:00.999Z"),
            ("9999-12-31T23:59:59.999Z", "9999-12-30T22:00:00.999Z"),
            ("9999-12-31T23:59:59+00:00", "9999-12-30T22:00:00.999Z"),
        ] {
            assert_eq!(reading(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn says_what_is_wrong_with_the_rest() {
        use TimestampError::{NoSuchDay, NotIso8601, Offset, OutOfRange};
        for (text, error) in [
            ("", NotIso8601),
            ("yesterday", NotIso8601),
            ("1750000000000", NotIso8601),
            ("10:30", NotIso8601),
            ("2025-6-7", NotIso8601),
            ("2025-W25", NotIso8601),
            ("2025-06Z", NotIso8601),
            ("10000-01-01", NotIso8601),
            ("2025-06-17T25:00:00Z", NotIso8601),
            ("2025-06-17T10:60:00Z", NotIso8601),
            ("2025-06-17T10:30:61Z", NotIso8601),
            ("2025-06-17T24:00:01Z", NotIso8601),
            ("2025-06-17T24:01Z", NotIso8601),
            ("2025-06-17T10:30:00Zjunk", NotIso8601),
            ("2025-06-17T10:30:00.1234567890123Zjunk", NotIso8601),
            ("2025-06-17T10:30:00.1234567890.123Z", NotIso8601),
            ("2025.1234567890123", NotIso8601),
            (" 2025-06-17T10:30:00Z", NotIso8601),
            ("2025-06-17T12:30[Europe/Berlin]", NotIso8601),
            ("2025-06-17T10:30:00+05:60", NotIso8601),
            ("2025-06-17T10:30:00\u{2212}02:00", NotIso8601),
            ("\u{fc}", NotIso8601),
            ("2025-13-01", NoSuchDay),
            ("2025-13", NoSuchDay),
            ("2025-02-30", NoSuchDay),
            ("2025-02-29T10:30:00Z", NoSuchDay),
            ("2025-00-01", NoSuchDay),
            ("2025-06-17T10:30:00+24:00", Offset),
            ("2025-06-17T10:30:00-24:00", Offset),
            ("2025-06-17T10:30:00+25:00", Offset),
            ("2025-06-17T10:30:00+2500", Offset),
            ("2025-06-17T10:30:00-99:00", Offset),
            ("2025-06-17T10:30:00+24:00[Europe/Berlin]", Offset),
            ("0000-01-01T00:00:00Z", OutOfRange),
            ("0000-12-31", OutOfRange),
            ("0000", OutOfRange),
            ("-000001-01-01T00:00:00Z", OutOfRange),
            ("0001-01-01T00:00:00+00:01", OutOfRange),
            ("9999-12-31T23:59:59-00:01", OutOfRange),
            ("9999-12-31T24:00Z", OutOfRange),
            ("+010000-01-01T00:00:00Z", OutOfRange),
            ("+275760-09-13", OutOfRange),
        ] {
            assert_eq!(Timestamp::from_iso8601(text), Err(error), "{text}");
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

        #[test]
        fn never_panics_near_a_date(text in "[+-]?[0-9]{0,6}-?[0-9]{0,3}-?[0-9]{0,3}[T t]?[0-9:.,]{0,12}[+Z\\[-]?[0-9:]{0,6}") {
            let _ = Timestamp::parse_iso8601(&text);
        }

        /// Both ways of reading agree: `Z` takes the fast path, an offset of zero the other.
        #[test]
        fn an_offset_of_zero_is_utc(millisecond in MIN_MILLISECOND..=MAX_MILLISECOND) {
            let text = Timestamp(millisecond).to_string().replace('Z', "+00:00");
            prop_assert_eq!(Timestamp::from_iso8601(&text), Ok(Timestamp(millisecond)));
        }
    }
}
