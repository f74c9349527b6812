//! What the kinds of channels share to read their fields and to show them: rules, and masks for secrets.

use pisync_core::ViolationCode;
use serde_json::Value;

pub(super) use crate::api::wire::fields::Fields;

/// Why a value is not valid: the kind of rule, and the words that follow the quoted name of the field.
pub(super) type Rule = (ViolationCode, String);

/// What stands for the hidden part of a secret.
pub(super) const MASK: char = '…';

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
}
