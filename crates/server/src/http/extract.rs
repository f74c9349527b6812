//! Reading requests: bodies within their bounds of size and time, query strings and paths with every
//! wrong field named at once.

use std::{ops::RangeInclusive, time::Duration};

use axum::{
    extract::{FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body as _;
use pisync_core::{
    DeviceId, JobName, Timestamp, Violation, decimal::parse_scaled, text::check_text,
};
use serde_json::Value;
use utoipa::IntoParams;

use super::error::ApiError;
use crate::store::{HistoryPosition, Window};

/// The largest offset: what a JSON number holds exactly.
const MAX_OFFSET: u64 = (1 << 53) - 1;

/// Reads a JSON body of at most `limit` bytes, which may take so long to arrive in full.
pub(super) async fn json_body(
    request: Request,
    limit: usize,
    timeout: Duration,
) -> Result<Bytes, ApiError> {
    check_media_type(request.headers())?;
    // A body that says it is too large need not arrive; the client may be waiting for leave to send it.
    if request.body().size_hint().lower() > limit as u64 {
        return Err(ApiError::BodyTooLarge(limit));
    }
    let body = Limited::new(request.into_body(), limit);
    match tokio::time::timeout(timeout, body.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::BodyTooLarge(limit)),
        // The connection broke or the framing was wrong; nobody may be left to read the answer.
        Ok(Err(_)) => Err(ApiError::Malformed("the body ended early".to_owned())),
        Err(_) => Err(ApiError::BodyTimeout),
    }
}

fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    const EXPECTED: &str = "send JSON with Content-Type: application/json";
    let encoding = headers.get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| encoding.as_bytes() != b"identity") {
        return Err(ApiError::UnsupportedMediaType("send the body without Content-Encoding"));
    }
    let media_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .map(str::trim);
    match media_type {
        Some(json)
            if json.eq_ignore_ascii_case("application/json")
                || json.to_ascii_lowercase().ends_with("+json") =>
        {
            Ok(())
        }
        _ => Err(ApiError::UnsupportedMediaType(EXPECTED)),
    }
}

/// The path as the document describes it; [`DevicePath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
pub(super) struct DevicePathParameter {
    /// What the device calls itself.
    #[param(
        min_length = 1,
        max_length = 255,
        pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$",
        example = "pi-device-001"
    )]
    device_id: String,
}

/// The device named in the path.
pub(super) struct DevicePath(pub(super) DeviceId);

impl<S: Send + Sync> FromRequestParts<S> for DevicePath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let refuse = |rule: &str, value: Option<Value>| {
            ApiError::Validation(vec![Violation::of("device_id", rule, value)])
        };
        let Ok(Path(text)) = Path::<String>::from_request_parts(parts, state).await else {
            return Err(refuse("must be valid UTF-8", None));
        };
        DeviceId::new(&text)
            .map(Self)
            .map_err(|error| refuse(&error.to_string(), Some(Value::from(text))))
    }
}

/// A query string being read. Each method reads one parameter and remembers what is wrong with it;
/// [`Query::finish`] tells.
pub(super) struct Query {
    pairs: Vec<(String, String)>,
    violations: Vec<Violation>,
}

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let query = parts.uri.query().unwrap_or_default();
        let axum::extract::Query(pairs) =
            axum::extract::Query::try_from_uri(&parts.uri).map_err(|_| {
                let violation =
                    Violation::worded("", "the query string is not valid", Some(query.into()));
                ApiError::Validation(vec![violation])
            })?;
        Ok(Self { pairs, violations: Vec::new() })
    }
}

impl Query {
    /// Fails with everything that was wrong.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        if self.violations.is_empty() { Ok(()) } else { Err(ApiError::Validation(self.violations)) }
    }

    fn refuse<T>(&mut self, name: &'static str, rule: &str, value: impl Into<Value>) -> Option<T> {
        self.violations.push(Violation::of(name, rule, Some(value.into())));
        None
    }

    /// The parameter's text, when it is there.
    fn get(&mut self, name: &'static str) -> Option<String> {
        let mut values =
            self.pairs.iter().filter(|(key, _)| key == name).map(|(_, value)| value.clone());
        let value = values.next()?;
        if values.next().is_some() {
            return self.refuse(name, "must be given only once", value);
        }
        Some(value)
    }

    /// A whole number within `range`.
    pub(super) fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Option<u64> {
        let text = self.get(name)?;
        let Some(scaled) = parse_scaled(text.trim(), 0) else {
            return self.refuse(name, "must be a number", text);
        };
        if !scaled.exact && scaled.value.unsigned_abs() < MAX_OFFSET {
            return self.refuse(name, "must be an integer", text);
        }
        match u64::try_from(scaled.value) {
            Ok(value) if range.contains(&value) => Some(value),
            Ok(value) if value > *range.end() => {
                let rule = format!("must be less than or equal to {}", range.end());
                self.refuse(name, &rule, value)
            }
            _ => {
                let rule = format!("must be greater than or equal to {}", range.start());
                self.refuse(name, &rule, scaled.value)
            }
        }
    }

    /// `limit`, 1 to 1,000.
    pub(super) fn limit(&mut self) -> Option<u32> {
        self.integer("limit", 1..=1000).and_then(|limit| u32::try_from(limit).ok())
    }

    /// `offset`, 0 when absent.
    pub(super) fn offset(&mut self) -> u64 {
        self.integer("offset", 0..=MAX_OFFSET).unwrap_or(0)
    }

    /// An instant.
    pub(super) fn timestamp(&mut self, name: &'static str) -> Option<Timestamp> {
        let text = self.get(name)?;
        // A plus sign that was not percent-encoded arrives as a space.
        let parsed = Timestamp::parse_iso8601(&text)
            .or_else(|| Timestamp::parse_iso8601(&text.replace(' ', "+")));
        match parsed {
            Some(timestamp) => Some(timestamp),
            None => self.refuse(name, "must be in ISO 8601 date format", text),
        }
    }

    /// `true` or `false`; false when absent.
    pub(super) fn boolean(&mut self, name: &'static str) -> bool {
        match self.get(name) {
            None => false,
            Some(text) => match text.as_str() {
                "true" => true,
                "false" => false,
                _ => self.refuse(name, "must be a boolean", text).unwrap_or(false),
            },
        }
    }

    /// Text of 1 to `most` characters without control characters.
    pub(super) fn text(&mut self, name: &'static str, most: usize) -> Option<String> {
        let text = self.get(name)?;
        match check_text(&text, most) {
            Ok(()) => Some(text),
            Err(error) => self.refuse(name, &error.to_string(), text),
        }
    }

    /// Where to go on in a history.
    pub(super) fn cursor(&mut self) -> Option<HistoryPosition> {
        let text = self.get("cursor")?;
        match read_cursor(&text) {
            Some(position) => Some(position),
            None => self.refuse("cursor", "must be a next_cursor of this list", text),
        }
    }

    /// `window`: what it is called, and what it is at this instant.
    pub(super) fn window(&mut self, now: Timestamp) -> Option<(&'static str, Window)> {
        let windows = [
            ("24h", Window::last_24_hours(now)),
            ("7d", Window::last_days(now, 7)),
            ("30d", Window::last_days(now, 30)),
        ];
        self.choice("window", &windows.map(|(name, window)| (name, (name, window))))
    }

    /// The name of a job.
    pub(super) fn job(&mut self) -> Option<JobName> {
        let text = self.text("job", JobName::MAX_CHARACTERS)?;
        JobName::new(&text).ok()
    }

    /// One of the `choices`, given by name.
    pub(super) fn choice<T: Copy>(
        &mut self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let text = self.get(name)?;
        if let Some((_, value)) = choices.iter().find(|(choice, _)| *choice == text) {
            return Some(*value);
        }
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        self.refuse(name, &format!("must be one of [{}]", names.join(", ")), text)
    }
}

/// Hexadecimal digits in each half of a cursor.
const CURSOR_HALF: usize = 16;

/// A position as text that means nothing to anybody else: both numbers in hexadecimal, in full.
pub(super) fn cursor_text(position: HistoryPosition) -> String {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
