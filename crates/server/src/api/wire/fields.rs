//! Reading the fields of a JSON object: the body of every request but reports, which `pisync_core` reads. Each field is
//! read by its rule, and every wrong one is named at once.

use pisync_core::{TimestampError, Violation, ViolationCode, text::TextError};
use serde_json::{Map, Value};

use crate::api::wire::{error::ApiError, extract::read_object};

/// Why a text is not what a field wants.
#[derive(Debug)]
pub(crate) struct Rule {
    code: ViolationCode,
    /// Words that follow the quoted field name.
    words: String,
}

impl From<TextError> for Rule {
    fn from(error: TextError) -> Self {
        Self { code: error.code(), words: error.to_string() }
    }
}

impl From<TimestampError> for Rule {
    fn from(error: TimestampError) -> Self {
        Self { code: error.code(), words: error.to_string() }
    }
}

/// A choice that there is not; says which there are.
impl From<String> for Rule {
    fn from(words: String) -> Self {
        Self { code: ViolationCode::Format, words }
    }
}

/// The fields that are still to be read, and what is wrong with those that were.
#[derive(Debug)]
pub(crate) struct Fields {
    fields: Map<String, Value>,
    violations: Vec<Violation>,
}

impl Fields {
    /// The fields of a body.
    pub(crate) fn of(body: &[u8]) -> Result<Self, ApiError> {
        Ok(Self { fields: read_object(body)?, violations: Vec::new() })
    }

    /// A text that must be there.
    pub(crate) fn required<T, E: Into<Rule>>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        if !self.fields.contains_key(field) {
            self.violations.push(Violation::required(field));
        }
        match self.nullable(field, read)? {
            Some(value) => Some(value),
            None => {
                self.refuse(field, ViolationCode::Type, "must be a string", Some(Value::Null));
                None
            }
        }
    }

    /// A text; null is as good as none.
    pub(crate) fn optional<T, E: Into<Rule>>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        self.nullable(field, read).flatten()
    }

    /// A text or null, which is told from none: `Some(None)`.
    pub(crate) fn nullable<T, E: Into<Rule>>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<Option<T>> {
        let value = self.fields.remove(field)?;
        let Rule { code, words } = match &value {
            Value::Null => return Some(None),
            Value::String(text) => match read(text) {
                Ok(read) => return Some(Some(read)),
                Err(rule) => rule.into(),
            },
            _ => Rule { code: ViolationCode::Type, words: "must be a string".to_owned() },
        };
        self.refuse(field, code, &words, Some(value));
        None
    }

    /// Remembers that something is wrong with a field.
    pub(crate) fn refuse(
        &mut self,
        field: &'static str,
        code: ViolationCode,
        rule: &str,
        value: Option<Value>,
    ) {
        self.violations.push(Violation::of(field, code, rule, value));
    }

    /// Says whether all that was read was right, and nothing else was sent: a misspelt field must not look obeyed.
    pub(crate) fn finish(mut self) -> Result<(), ApiError> {
        for (field, value) in self.fields {
            let rule = "is not allowed";
            let code = ViolationCode::UnknownField;
            self.violations.push(Violation::of(field, code, rule, Some(value)));
        }
        if self.violations.is_empty() { Ok(()) } else { Err(self.violations.into()) }
    }
}

#[cfg(test)]
mod tests {
    use pisync_core::text::check_text;

    use super::*;

    fn short(text: &str) -> Result<String, TextError> {
        check_text(text, 5).map(|()| text.to_owned())
    }

    fn codes(fields: Fields) -> Vec<(String, &'static str)> {
        let Err(ApiError::Validation(violations)) = fields.finish() else { return Vec::new() };
        violations
            .into_iter()
            .map(|violation| (violation.field.into_owned(), violation.code.as_str()))
            .collect()
    }

    #[test]
    fn every_wrong_field_is_named_once() {
        let body = br#"{"a": 1, "b": null, "c": "too long", "d": null, "e": null, "z": 7}"#;
        let mut fields = Fields::of(body).unwrap();
        assert_eq!(fields.required("a", short), None);
        assert_eq!(fields.required("b", short), None);
        assert_eq!(fields.required("missing", short), None);
        assert_eq!(fields.optional("c", short), None);
        assert_eq!(fields.optional("d", short), None);
        assert_eq!(fields.nullable("e", short), Some(None));
        assert_eq!(fields.nullable("absent", short), None);
        let expected = [
            ("a", "type"),
            ("b", "type"),
            ("missing", "required"),
            ("c", "length"),
            ("z", "unknown_field"),
        ];
        assert_eq!(codes(fields), expected.map(|(field, code)| (field.to_owned(), code)));
    }

    #[test]
    fn what_is_right_is_read() {
        let mut fields = Fields::of(br#"{"a": "one", "b": "two"}"#).unwrap();
        assert_eq!(fields.required("a", short).as_deref(), Some("one"));
        assert_eq!(fields.nullable("b", short), Some(Some("two".to_owned())));
        assert!(codes(fields).is_empty());
    }
}
