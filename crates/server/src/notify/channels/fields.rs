//! Reads a channel's fields from a request or from the store. Every wrong field is named at once. No value is repeated: in
//! the wrong field, too, it may be a secret.

use pisync_core::{Violation, ViolationCode};
use serde_json::{Map, Value};

/// Why a value is not valid: the kind of rule, and the words that follow the quoted name of the field.
pub(super) type Rule = (ViolationCode, String);

/// What stands for the hidden part of a secret.
pub(super) const MASK: char = '…';

/// The fields that are not read yet, and what was wrong with the others.
pub(super) struct Fields {
    fields: Map<String, Value>,
    violations: Vec<Violation>,
}

impl Fields {
    pub(super) fn new(fields: Map<String, Value>) -> Self {
        Self { fields, violations: Vec::new() }
    }

    /// A text that must be there.
    pub(super) fn required<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, Rule>,
    ) -> Option<T> {
        match self.fields.get(field) {
            None => {
                self.violations.push(Violation::required(field));
                None
            }
            Some(Value::Null) => {
                self.fields.remove(field);
                self.refuse(field, (ViolationCode::Type, "must be a string".to_owned()));
                None
            }
            Some(_) => self.optional(field, read),
        }
    }

    /// A text that may be absent or null.
    pub(super) fn optional<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&str) -> Result<T, Rule>,
    ) -> Option<T> {
        let read = match self.take(field)? {
            Value::String(text) => read(&text),
            _ => Err((ViolationCode::Type, "must be a string".to_owned())),
        };
        read.map_err(|rule| self.refuse(field, rule)).ok()
    }

    /// A field of any type; `None` when it is absent or null.
    pub(super) fn take(&mut self, field: &str) -> Option<Value> {
        self.fields.remove(field).filter(|value| !value.is_null())
    }

    /// Takes a whole number for the text that it would be.
    pub(super) fn number_as_text(&mut self, field: &str) {
        if let Some(value) = self.fields.get_mut(field)
            && let Some(number) = value.as_i64()
        {
            *value = number.to_string().into();
        }
    }

    /// Notes that a field is wrong.
    pub(super) fn refuse(&mut self, field: &'static str, (code, words): Rule) {
        self.violations.push(Violation::of(field, code, &words, None));
    }

    /// Hands on what was read, unless something was wrong or is not known.
    pub(super) fn finish<T>(self, read: Option<T>) -> Result<T, Vec<Violation>> {
        let Self { fields, mut violations } = self;
        for (field, _) in fields {
            let code = ViolationCode::UnknownField;
            violations.push(Violation::of(field, code, "is not allowed", None));
        }
        match read {
            Some(read) if violations.is_empty() => Ok(read),
            _ => Err(violations),
        }
    }
}

/// A broken rule about a text's form.
pub(super) fn wrong_form<T>(words: &str) -> Result<T, Rule> {
    Err((ViolationCode::Format, words.to_owned()))
}

/// A secret as it is shown: its last four characters, or fewer of a short one, which four would give away.
pub(super) fn mask(secret: &str) -> String {
    let length = secret.chars().count();
    let shown = (length / 4).min(4);
    std::iter::once(MASK).chain(secret.chars().skip(length - shown)).collect()
}

/// A secret field's value, masked: of a text its end, of an object each of its texts.
pub(super) fn masked(value: &Value) -> Value {
    match value {
        Value::String(secret) => mask(secret).into(),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.clone(), masked(value))).collect()
        }
        other => other.clone(),
    }
}

/// Whether somebody has sent back what [`masked`] had shown.
pub(super) fn is_masked(value: &Value) -> bool {
    match value {
        Value::String(text) => text.starts_with(MASK),
        Value::Object(fields) => fields.values().any(is_masked),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn short(text: &str) -> Result<String, Rule> {
        if text.len() <= 3 { Ok(text.to_owned()) } else { wrong_form("is too long") }
    }

    #[test]
    fn a_mask_gives_little_away() {
        for (secret, shown) in [
            ("https://hooks.example/x7Qa", "…x7Qa"),
            ("0123456789abcdef", "…cdef"),
            ("0123456789ab", "…9ab"),
            ("abcd", "…d"),
            ("abc", "…"),
            ("", "…"),
            ("geheimnisvolläöüß", "…äöüß"),
        ] {
            assert_eq!(mask(secret), shown);
        }
        let headers = json!({"x-token": "0123456789abcdef"});
        assert_eq!(masked(&headers), json!({"x-token": "…cdef"}));
        assert!(is_masked(&masked(&headers)) && !is_masked(&headers));
    }

    #[test]
    fn every_wrong_field_is_named_and_no_value_repeated() {
        let Value::Object(fields) =
            json!({"a": "s3cret", "b": null, "d": 1, "e": null, "s3cret": "s3cret"})
        else {
            panic!("it is an object")
        };
        let mut fields = Fields::new(fields);
        assert_eq!(fields.required("a", short), None);
        assert_eq!(fields.required("b", short), None);
        assert_eq!(fields.required("c", short), None);
        assert_eq!(fields.optional("d", short), None);
        assert_eq!(fields.optional("e", short), None);
        let violations = fields.finish(Some(())).unwrap_err();
        let messages: Vec<_> =
            violations.iter().map(|violation| violation.message.as_str()).collect();
        assert_eq!(
            messages,
            [
                "\"a\" is too long",
                "\"b\" must be a string",
                "\"c\" is required",
                "\"d\" must be a string",
                "\"s3cret\" is not allowed",
            ]
        );
        assert!(violations.iter().all(|violation| violation.value.is_none()));
    }
}
