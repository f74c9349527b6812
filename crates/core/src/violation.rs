//! One wrong field of a request, in the shape and wording that the Node service's clients know. The readers of bodies
//! and query strings make them; the API sends them. What they echo is always bounded.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::Value;

/// The longest text that is echoed in [`Violation::value`], in characters. A response must not grow with the request.
const ECHO_LIMIT: usize = 256;

/// The kind of rule that was broken: a stable word for programs and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ViolationCode {
    /// The field is missing.
    Required,
    /// JSON of another type.
    Type,
    /// A number or a time outside its range.
    Range,
    /// The right type, but not the right form.
    Format,
    /// Too long, or empty.
    Length,
    /// A time in the future.
    Future,
    /// An unknown field or parameter. A misspelt one must not appear to work.
    UnknownField,
    /// Valid by itself, but contradicts another field or another value of the same field.
    Conflict,
    /// A line of a batch that is not JSON.
    MalformedJson,
}

impl ViolationCode {
    /// All codes, in the order in which they are documented.
    pub const ALL: [Self; 9] = [
        Self::Required,
        Self::Type,
        Self::Range,
        Self::Format,
        Self::Length,
        Self::Future,
        Self::UnknownField,
        Self::Conflict,
        Self::MalformedJson,
    ];

    /// The stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Type => "type",
            Self::Range => "range",
            Self::Format => "format",
            Self::Length => "length",
            Self::Future => "future",
            Self::UnknownField => "unknown_field",
            Self::Conflict => "conflict",
            Self::MalformedJson => "malformed_json",
        }
    }
}

/// A refused field, the reason, and the sent value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Violation {
    /// The field's name as in the request; empty for the entire body.
    pub field: Cow<'static, str>,
    /// The expected value, for instance `"total_errors" must be an integer`.
    pub message: String,
    /// The sent value, shortened; absent when nothing was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<Value>,
    /// The kind of rule that was broken.
    pub code: ViolationCode,
}

impl Violation {
    /// A violation of `field` whose message reads `"field" <rule>`.
    #[must_use]
    pub fn of(
        field: impl Into<Cow<'static, str>>,
        code: ViolationCode,
        rule: &str,
        value: Option<Value>,
    ) -> Self {
        let field = field.into();
        let message = format!("\"{field}\" {rule}");
        Self::worded(field, code, message, value)
    }

    /// A violation of the entire body, or of an entire event in it. Its message reads `"value" <rule>`.
    #[must_use]
    pub fn of_whole(code: ViolationCode, rule: &str, value: Option<Value>) -> Self {
        Self::worded("", code, format!("\"value\" {rule}"), value)
    }

    /// A violation with its own message.
    #[must_use]
    pub fn worded(
        field: impl Into<Cow<'static, str>>,
        code: ViolationCode,
        message: impl Into<String>,
        value: Option<Value>,
    ) -> Self {
        Self { field: field.into(), message: message.into(), value: value.map(shorten), code }
    }

    /// The same violation of a field of a part of the body, such as `[17]`.
    #[must_use]
    pub fn within(self, part: &str) -> Self {
        let (inner, quoted) = match &*self.field {
            "" => (part.to_owned(), "\"value\"".to_owned()),
            field => (format!("{part}.{field}"), format!("\"{field}\"")),
        };
        let message = match self.message.strip_prefix(&quoted) {
            Some(rule) => format!("\"{inner}\"{rule}"),
            None => self.message,
        };
        Self { field: inner.into(), message, ..self }
    }

    /// The violation for a required field that was not sent.
    #[must_use]
    pub fn required(field: &'static str) -> Self {
        Self::of(field, ViolationCode::Required, "is required", None)
    }
}

/// Bounds the echoed value: long texts are cut, large arrays and objects are described.
fn shorten(value: Value) -> Value {
    match value {
        Value::String(text) if text.chars().nth(ECHO_LIMIT).is_some() => {
            Value::String(text.chars().take(ECHO_LIMIT).chain(['…']).collect())
        }
        Value::Array(items) if !items.is_empty() => {
            Value::String(format!("an array of {} items", items.len()))
        }
        Value::Object(fields) if !fields.is_empty() => {
            Value::String(format!("an object of {} fields", fields.len()))
        }
        other => other,
    }
}
