//! One wrong field of a request, in the shape and wording that the Node service's clients know.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::Value;

/// Longest text that is echoed back in [`Violation::value`], in characters. An answer must not grow
/// with what was sent.
const ECHO_LIMIT: usize = 256;

/// What kind of rule was broken: the stable word for programs and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ViolationCode {
    /// A field is not there.
    Required,
    /// JSON of another type.
    Type,
    /// A number or a time beyond its bounds.
    Range,
    /// Of the right type, and not of the right form.
    Format,
    /// Too long, or empty.
    Length,
    /// A time that has not come.
    Future,
    /// A field or a parameter that nobody reads: a misspelt one must not look obeyed.
    UnknownField,
    /// Right by itself, and contradicts another field or another value of the same one.
    Conflict,
    /// Not JSON at all: a line of a batch.
    MalformedJson,
}

impl ViolationCode {
    /// All of them, in the order in which they are documented.
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

    /// The word.
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

/// A field that was refused, why, and what was sent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Violation {
    /// The field's name as in the request; empty when the whole body is meant.
    pub field: Cow<'static, str>,
    /// Says what is expected, for instance `"total_errors" must be an integer`.
    pub message: String,
    /// What was sent, shortened; absent when nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<Value>,
    /// Which kind of rule it breaks.
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

    /// A violation of the whole body, or of a whole event in it, whose message reads `"value" <rule>`.
    #[must_use]
    pub fn of_whole(code: ViolationCode, rule: &str, value: Option<Value>) -> Self {
        Self::worded("", code, format!("\"value\" {rule}"), value)
    }

    /// A violation with a message of its own.
    #[must_use]
    pub fn worded(
        field: impl Into<Cow<'static, str>>,
        code: ViolationCode,
        message: impl Into<String>,
        value: Option<Value>,
    ) -> Self {
        Self { field: field.into(), message: message.into(), value: value.map(shorten), code }
    }

    /// The field is required and was not sent.
    #[must_use]
    pub fn required(field: &'static str) -> Self {
        Self::of(field, ViolationCode::Required, "is required", None)
    }
}

/// Bounds what is echoed: long texts are cut, large structures named instead of repeated.
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
