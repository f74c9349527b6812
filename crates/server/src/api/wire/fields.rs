//! Reads the fields of a JSON object. It serves every request body except reports, which `pisync_core` reads, and what is
//! stored of channels. Each field is read by its rule, and every invalid field is named at once.

use pisync_core::{
    TimestampError, Violation, ViolationCode,
    text::{TextError, check_text},
};
use serde_json::{Map, Value};

use crate::api::wire::{error::ApiError, extract::read_object};

/// Why a text is not valid for a field.
#[derive(Debug)]
pub(crate) struct Rule {
    code: ViolationCode,
    /// The words that follow the quoted field name.
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

/// An unknown choice. The words list the known ones.
impl From<String> for Rule {
    fn from(words: String) -> Self {
        Self { code: ViolationCode::Format, words }
    }
}

impl From<(ViolationCode, String)> for Rule {
    fn from((code, words): (ViolationCode, String)) -> Self {
        Self { code, words }
    }
}

/// A reader of texts that have 1 to `most` characters and no control characters.
pub(crate) fn text(most: usize) -> impl FnOnce(&str) -> Result<String, TextError> {
    move |text| check_text(text, most).map(|()| text.to_owned())
}

/// The unread fields, and the violations of those already read.
#[derive(Debug)]
pub(crate) struct Fields {
    fields: Map<String, Value>,
    violations: Vec<Violation>,
    /// Whether a violation says nothing of the value that was sent.
    hides_values: bool,
}

impl Fields {
    /// Parses the fields of a body.
    pub(crate) fn of(body: &[u8]) -> Result<Self, ApiError> {
        Ok(Self::new(read_object(body)?))
    }

    /// The fields of an object.
    pub(crate) fn new(fields: Map<String, Value>) -> Self {
        Self { fields, violations: Vec::new(), hides_values: false }
    }

    /// The fields of an object in which any value may be a secret, also that of a misspelt field. None is repeated.
    pub(crate) fn of_secrets(fields: Map<String, Value>) -> Self {
        Self { hides_values: true, ..Self::new(fields) }
    }

    /// A field that is not read yet.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field)
    }

    /// Takes a field that is no text, to be read by the caller.
    pub(crate) fn take(&mut self, field: &str) -> Option<Value> {
        self.fields.remove(field)
    }

    /// Takes a whole number for the text that it would be.
    pub(crate) fn number_as_text(&mut self, field: &str) {
        if let Some(value) = self.fields.get_mut(field)
            && let Some(number) = value.as_i64()
        {
            *value = number.to_string().into();
        }
    }

    /// Takes all fields that are not read yet, to be read by the caller.
    pub(crate) fn take_rest(&mut self) -> Map<String, Value> {
        std::mem::take(&mut self.fields)
    }

    /// Records violations that the caller has found.
    pub(crate) fn add(&mut self, violations: Vec<Violation>) {
        self.violations.extend(violations);
    }

    /// A required text.
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

    /// An optional text. Null is the same as absent.
    pub(crate) fn optional<T, E: Into<Rule>>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        self.nullable(field, read).flatten()
    }

    /// A text or null. Null is `Some(None)`, and absent is `None`.
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

    /// Records a violation of a field.
    pub(crate) fn refuse(
        &mut self,
        field: &'static str,
        code: ViolationCode,
        rule: &str,
        value: Option<Value>,
    ) {
        let value = value.filter(|_| !self.hides_values);
        self.violations.push(Violation::of(field, code, rule, value));
    }

    /// Fails if a field was invalid or unknown. A misspelt field must not appear to work.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let violations = self.into_violations();
        if violations.is_empty() { Ok(()) } else { Err(violations.into()) }
    }

    /// The violations of all fields, unknown ones included.
    pub(crate) fn into_violations(mut self) -> Vec<Violation> {
        for (field, value) in self.fields {
            let rule = "is not allowed";
            let code = ViolationCode::UnknownField;
            let value = Some(value).filter(|_| !self.hides_values);
            self.violations.push(Violation::of(field, code, rule, value));
        }
        self.violations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(fields.required("a", text(5)), None);
        assert_eq!(fields.required("b", text(5)), None);
        assert_eq!(fields.required("missing", text(5)), None);
        assert_eq!(fields.optional("c", text(5)), None);
        assert_eq!(fields.optional("d", text(5)), None);
        assert_eq!(fields.nullable("e", text(5)), Some(None));
        assert_eq!(fields.nullable("absent", text(5)), None);
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
    fn no_secret_is_repeated() {
        let Value::Object(fields) =
            serde_json::json!({"a": "s3cret", "b": null, "c": 7, "s3cret": "s3cret"})
        else {
            panic!("it is an object")
        };
        let mut fields = Fields::of_secrets(fields);
        assert_eq!(fields.required("a", text(5)), None);
        assert_eq!(fields.required("b", text(5)), None);
        assert_eq!(fields.optional("c", text(5)), None);
        let violations = fields.into_violations();
        assert_eq!(violations.len(), 4);
        assert!(violations.iter().all(|violation| violation.value.is_none()), "{violations:?}");
    }

    #[test]
    fn what_is_right_is_read() {
        let mut fields = Fields::of(br#"{"a": "one", "b": "two"}"#).unwrap();
        assert_eq!(fields.required("a", text(5)).as_deref(), Some("one"));
        assert_eq!(fields.nullable("b", text(5)), Some(Some("two".to_owned())));
        assert!(codes(fields).is_empty());
    }
}
