//! Reads query strings, independent of any request. Each parameter has its rule, and every invalid one is named at
//! once. Handlers get it through `Query` of the module `extract`. Fuzz targets call it directly.

use std::ops::RangeInclusive;

use percent_encoding::percent_decode_str;
use pisync_core::{
    JobName, Timestamp, TimestampError, Violation, ViolationCode,
    decimal::parse_scaled,
    text::{TextError, check_text},
};
use serde_json::Value;

use crate::store::{HistoryPosition, KeyPart, Place, Window};

/// The largest offset: the largest integer that every JSON reader holds exactly.
pub const MAX_OFFSET: u64 = (1 << 53) - 1;

/// A query string being read. Each method reads one parameter and records its violations. [`QueryString::finish`]
/// returns them.
#[derive(Debug)]
pub struct QueryString {
    pairs: Vec<Pair>,
    /// The names of all parameters that were read, present or not.
    known: Vec<&'static str>,
    violations: Vec<Violation>,
}

/// One parameter as it was sent.
#[derive(Debug)]
struct Pair {
    name: String,
    value: String,
    /// True if the entire value is UTF-8. Invalid bytes became replacement characters.
    is_text: bool,
}

impl Pair {
    fn read(text: &str) -> Self {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        let [name, value] = [name, value].map(|part| {
            // HTML forms write a space as a plus sign.
            let bytes: Vec<u8> = percent_decode_str(&part.replace('+', " ")).collect();
            String::from_utf8(bytes)
                .map_err(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
        });
        let is_text = value.is_ok();
        let [name, value] = [name, value].map(|part| part.unwrap_or_else(|lossy| lossy));
        Self { name, value, is_text }
    }
}

impl QueryString {
    /// Parses the text after the question mark. Nothing is invalid until a parameter is read.
    #[must_use]
    pub fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(Pair::read).collect();
        Self { pairs, known: Vec::new(), violations: Vec::new() }
    }

    /// Fails if a parameter was invalid or unknown. A misspelt parameter must not appear to work.
    ///
    /// # Errors
    /// All violations.
    pub fn finish(mut self) -> Result<(), Vec<Violation>> {
        for Pair { name, value, .. } in &self.pairs {
            if self.violations.len() >= MAX_NAMED {
                break;
            }
            let is_told = |violation: &Violation| violation.field == name.as_str();
            if !self.known.contains(&name.as_str()) && !self.violations.iter().any(is_told) {
                let violation = Violation::of(
                    in_short(name),
                    ViolationCode::UnknownField,
                    "is not allowed",
                    Some(value.as_str().into()),
                );
                self.violations.push(violation);
            }
        }
        self.finish_ignoring_others()
    }

    /// Fails if a parameter was invalid, as [`Self::finish`] does, but ignores unknown ones. The Node service ignored
    /// them, so its clients may send them.
    ///
    /// # Errors
    /// All violations.
    pub fn finish_ignoring_others(self) -> Result<(), Vec<Violation>> {
        if self.violations.is_empty() { Ok(()) } else { Err(self.violations) }
    }

    fn refuse<T>(
        &mut self,
        name: &'static str,
        code: ViolationCode,
        rule: &str,
        value: impl Into<Value>,
    ) -> Option<T> {
        self.violations.push(Violation::of(name, code, rule, Some(value.into())));
        None
    }

    /// The parameter's text, if it is present.
    fn get(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        let mut given = self.pairs.iter().filter(|pair| pair.name == name);
        let first = given.next()?;
        let (value, is_text, again) = (first.value.clone(), first.is_text, given.next().is_some());
        if again {
            return self.refuse(name, ViolationCode::Conflict, "must be given only once", value);
        }
        if !is_text {
            return self.refuse(name, ViolationCode::Format, "must be valid UTF-8", value);
        }
        Some(value)
    }

    /// An integer within `range`.
    pub fn integer(&mut self, name: &'static str, range: RangeInclusive<u64>) -> Option<u64> {
        let text = self.get(name)?;
        let Some(scaled) = parse_scaled(text.trim(), 0) else {
            return self.refuse(name, ViolationCode::Type, "must be a number", text);
        };
        if scaled.is_fraction() {
            return self.refuse(name, ViolationCode::Type, "must be an integer", text);
        }
        match u64::try_from(scaled.value) {
            Ok(value) if range.contains(&value) => Some(value),
            Ok(value) if value > *range.end() => {
                let rule = format!("must be less than or equal to {}", range.end());
                self.refuse(name, ViolationCode::Range, &rule, as_sent(&text))
            }
            _ => {
                let rule = format!("must be greater than or equal to {}", range.start());
                self.refuse(name, ViolationCode::Range, &rule, as_sent(&text))
            }
        }
    }

    /// `limit`, 1 to 1,000.
    pub fn limit(&mut self) -> Option<u32> {
        self.integer("limit", 1..=1000).and_then(|limit| u32::try_from(limit).ok())
    }

    /// `offset`, 0 when absent.
    pub fn offset(&mut self) -> u64 {
        self.integer("offset", 0..=MAX_OFFSET).unwrap_or(0)
    }

    /// An instant.
    pub fn timestamp(&mut self, name: &'static str) -> Option<Timestamp> {
        let text = self.get(name)?;
        let parsed = match (Timestamp::from_iso8601(&text), text.rsplit_once(' ')) {
            // A plus sign that was not percent-encoded arrives as a space.
            (Err(TimestampError::NotIso8601), Some((time, offset))) => {
                Timestamp::from_iso8601(&format!("{time}+{offset}"))
            }
            (parsed, _) => parsed,
        };
        match parsed {
            Ok(timestamp) => Some(timestamp),
            Err(error) => self.refuse(name, error.code(), &error.to_string(), text),
        }
    }

    /// `true` or `false`; false when absent.
    pub fn boolean(&mut self, name: &'static str) -> bool {
        match self.get(name) {
            None => false,
            Some(text) => match text.as_str() {
                "true" => true,
                "false" => false,
                _ => self
                    .refuse(name, ViolationCode::Type, "must be a boolean", text)
                    .unwrap_or(false),
            },
        }
    }

    /// Text of 1 to `most` characters without control characters.
    pub fn text(&mut self, name: &'static str, most: usize) -> Option<String> {
        let text = self.get(name)?;
        match check_text(&text, most) {
            Ok(()) => Some(text),
            Err(error) => self.refuse(name, error.code(), &error.to_string(), text),
        }
    }

    /// A name, as `read` parses it.
    pub fn name<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&str) -> Result<T, TextError>,
    ) -> Option<T> {
        let text = self.get(name)?;
        match read(&text) {
            Ok(read) => Some(read),
            Err(error) => self.refuse(name, error.code(), &error.to_string(), text),
        }
    }

    /// The position in a history to continue from.
    pub fn cursor(&mut self) -> Option<HistoryPosition> {
        self.cursor_of(read_cursor)
    }

    /// The position in a list sorted by id: the id of the last row of the previous page.
    pub fn id_cursor(&mut self) -> Option<i64> {
        self.cursor_of(|text| text.parse().ok().filter(|id| *id > 0))
    }

    /// The place in a sorted list to continue from. `list` names the order, and `is_of_list` knows its keys.
    pub(crate) fn place(
        &mut self,
        list: &str,
        is_of_list: impl FnOnce(&Place) -> bool,
    ) -> Option<Place> {
        self.cursor_of(|text| read_place(list, text).filter(is_of_list))
    }

    fn cursor_of<T>(&mut self, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        const RULE: &str = "must be a next_cursor of this list";
        let text = self.get("cursor")?;
        match read(&text) {
            Some(position) => Some(position),
            None => self.refuse("cursor", ViolationCode::Format, RULE, text),
        }
    }

    /// The parameter `window`: its name, and its time span at `now`.
    pub fn window(&mut self, now: Timestamp) -> Option<(&'static str, Window)> {
        let windows = [
            ("24h", Window::last_24_hours(now)),
            ("7d", Window::last_days(now, 7)),
            ("30d", Window::last_days(now, 30)),
        ];
        self.choice("window", &windows.map(|(name, window)| (name, (name, window))))
    }

    /// The name of a job.
    pub fn job(&mut self) -> Option<JobName> {
        let text = self.text("job", JobName::MAX_CHARACTERS)?;
        JobName::new(&text).ok()
    }

    /// One of `choices`, by name.
    pub fn choice<T: Copy>(&mut self, name: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let text = self.get(name)?;
        if let Some((_, value)) = choices.iter().find(|(choice, _)| *choice == text) {
            return Some(*value);
        }
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let rule = format!("must be one of [{}]", names.join(", "));
        self.refuse(name, ViolationCode::Format, &rule, text)
    }

    /// Some of `choices`, by name, with commas between them.
    pub fn choices<T: Copy>(
        &mut self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Option<Vec<T>> {
        let text = self.get(name)?;
        let find = |word: &str| choices.iter().find(|(choice, _)| *choice == word);
        let found: Option<Vec<T>> =
            text.split(',').map(|word| find(word.trim()).map(|(_, value)| *value)).collect();
        if found.is_some() {
            return found;
        }
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let rule = format!("must be some of [{}]", names.join(", "));
        self.refuse(name, ViolationCode::Format, &rule, text)
    }
}

/// How many unknown parameters are named. No endpoint has as many known ones, and each name is compared with all
/// others.
const MAX_NAMED: usize = 64;

/// The longest parameter name that is echoed, in characters.
const ECHOED_NAME: usize = 64;

/// The beginning of an unknown name. A response must not grow with the request.
fn in_short(name: &str) -> String {
    name.chars().take(ECHOED_NAME).collect()
}

/// A number of any size, as it was sent.
fn as_sent(number: &str) -> Value {
    serde_json::from_str(number).unwrap_or_else(|_| number.into())
}

/// The number of hexadecimal digits in each half of a cursor.
const CURSOR_HALF: usize = 16;

/// An opaque text for a position: both numbers as hexadecimal digits of full length.
#[must_use]
pub fn cursor_text(position: HistoryPosition) -> String {
    let HistoryPosition { microsecond, id } = position;
    format!("{:016x}{:016x}", microsecond.cast_unsigned(), id.cast_unsigned())
}

fn read_cursor(text: &str) -> Option<HistoryPosition> {
    let digits = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 2 * CURSOR_HALF || !text.bytes().all(digits) {
        return None;
    }
    let (microsecond, id) = text.split_at(CURSOR_HALF);
    let half = |text: &str| u64::from_str_radix(text, 16).ok().map(u64::cast_signed);
    Some(HistoryPosition { microsecond: half(microsecond)?, id: half(id)? })
}

/// An opaque text for a place in the list with this name.
pub(crate) fn place_text(list: &str, place: &Place) -> String {
    let json = serde_json::json!([list, place.key, place.device_id]).to_string();
    json.bytes().fold(String::with_capacity(2 * json.len()), |mut text, byte| {
        let digits = [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16));
        text.extend(digits.into_iter().flatten());
        text
    })
}

fn read_place(list: &str, text: &str) -> Option<Place> {
    let digit = |byte: &u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(digit(high)? << 4 | digit(low)?));
    let json: Vec<u8> = bytes.collect::<Option<_>>()?;
    let (name, key, device_id): (String, _, String) = serde_json::from_slice(&json).ok()?;
    let place = Place { key, device_id };
    // PostgreSQL takes no text with a zero in it.
    let has_zero = |part: &KeyPart| matches!(part, KeyPart::Text(text) if text.contains('\0'));
    let is_storable = !place.device_id.contains('\0') && !place.key.iter().flatten().any(has_zero);
    (rest.is_empty() && name == list && is_storable).then_some(place)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_fraction_is_no_integer_however_large() {
        for text in ["0.5", "9007199254740991.4", "-1.5"] {
            let mut query = QueryString::parse(&format!("offset={text}"));
            assert_eq!(query.offset(), 0);
            let violations = query.finish().unwrap_err();
            assert_eq!(violations[0].message, "\"offset\" must be an integer", "{text}");
        }
    }

    #[test]
    fn a_time_that_is_refused_says_why() {
        let complaint = |text: &str| {
            let mut query = QueryString::parse(&format!("endDate={text}"));
            assert_eq!(query.timestamp("endDate"), None, "{text}");
            query.finish().unwrap_err().remove(0).message
        };
        for (text, rule) in [
            ("x", "must be in ISO 8601 date format"),
            ("2025-06-17%20x", "must be in ISO 8601 date format"),
            ("2025-02-30", "must be a day that the calendar has"),
            ("2025-06-17T10:30:00%2B25:00", "must have an offset from UTC of at most 23:59"),
            ("2025-06-17T10:30:00+25:00", "must have an offset from UTC of at most 23:59"),
            ("0000-01-01", "must be within the years 1 to 9999"),
            ("%2B010000-01-01", "must be within the years 1 to 9999"),
            ("%ff", "must be valid UTF-8"),
            ("2025&endDate=2026", "must be given only once"),
        ] {
            assert_eq!(complaint(text), format!("\"endDate\" {rule}"), "{text}");
        }
        for text in
            ["9999-12-31", "9999-12-31T23:59:59.999Z", "2025-06-17+10:30:00+02:00", "2025-06"]
        {
            let mut query = QueryString::parse(&format!("endDate={text}"));
            assert!(query.timestamp("endDate").is_some(), "{text}");
            assert_eq!(query.finish(), Ok(()));
        }
    }

    #[test]
    fn what_nobody_reads_is_refused_once_by_name() {
        let read = || {
            let mut query = QueryString::parse("limit=5&limti=6&limti=7&=&a%ff=1");
            assert_eq!(query.limit(), Some(5));
            query
        };
        let violations = read().finish().unwrap_err();
        let fields: Vec<_> = violations.iter().map(|violation| &*violation.field).collect();
        assert_eq!(fields, ["limti", "", "a\u{fffd}"]);
        for violation in violations {
            assert_eq!(violation.code, ViolationCode::UnknownField);
        }
        assert_eq!(read().finish_ignoring_others(), Ok(()));
        // The response is bounded, however many and however long they are.
        let many: String = (0..2_000).map(|number| format!("{number:0>500}=x&")).collect();
        let violations = QueryString::parse(&many).finish().unwrap_err();
        assert_eq!(violations.len(), MAX_NAMED);
        assert!(violations.iter().all(|violation| violation.field.len() <= ECHOED_NAME));
    }

    #[test]
    fn a_number_out_of_range_is_given_back_as_it_was_sent() {
        for (text, value) in [("-1", json!(-1)), ("1e20", json!(1e20)), ("007000", json!("007000"))]
        {
            let mut query = QueryString::parse(&format!("limit={text}"));
            assert_eq!(query.limit(), None);
            assert_eq!(query.finish().unwrap_err()[0].value, Some(value));
        }
    }

    proptest! {
        #[test]
        fn a_cursor_reads_as_it_was_written(microsecond: i64, id: i64) {
            let position = HistoryPosition { microsecond, id };
            prop_assert_eq!(read_cursor(&cursor_text(position)), Some(position));
        }

        #[test]
        fn any_other_text_is_no_cursor(text in ".{0,40}") {
            let read = read_cursor(&text).map(cursor_text);
            prop_assert!(read.is_none_or(|read| read == text));
        }
    }
}
