//! Telling people about incidents: what is told (`message`), how each kind of receiver is told (`channels`, `template`),
//! which addresses may be reached (`targets`), and what carries the message there (`sender`, `smtp`). The API and the command
//! line set channels up through `manage`, which keeps their secrets by `secrets`. `dispatch` sends what is due. Nothing here
//! may show a secret, in whatever answer, line or error.

pub mod channels;
pub mod courier;
pub mod dispatch;
pub(crate) mod heartbeat;
pub mod manage;
pub mod message;
pub mod secrets;
pub mod sender;
pub mod smtp;
pub mod targets;
pub mod template;

use std::fmt;

/// A value that is never shown. Its [`fmt::Debug`] hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Hidden<T>(T);

impl<T> Hidden<T> {
    /// Hides `value`.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The value, for whoever sends it.
    pub fn reveal(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Hidden<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("[hidden]")
    }
}

/// Replaces secrets in a text that somebody else wrote: an answer may repeat the address that it was asked at. A secret
/// that the text's end cuts off counts too.
pub(crate) fn redact(text: &str, secrets: &[String]) -> String {
    const SHOWN: &str = "[hidden]";
    /// Shorter pieces are words that anybody may write.
    const LEAST: usize = 4;
    let mut secrets: Vec<&str> =
        secrets.iter().map(String::as_str).filter(|secret| secret.len() >= LEAST).collect();
    // A short one may be part of a long one.
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    let mut shown = text.to_owned();
    for secret in &secrets {
        shown = shown.replace(secret, SHOWN);
    }
    let cut_off = secrets.iter().filter_map(|secret| {
        let ends = (LEAST..secret.len()).rev().filter(|end| secret.is_char_boundary(*end));
        ends.map(|end| &secret[..end]).find(|begin| shown.ends_with(begin))
    });
    if let Some(longest) = cut_off.map(str::len).max() {
        shown.truncate(shown.len() - longest);
        shown.push_str(SHOWN);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_redacted_also_where_a_text_is_cut() {
        let secrets = ["/services/T00/B00/abcdefgh".to_owned(), "abcdefgh".to_owned(), "x".into()];
        let text = "Cannot POST /services/T00/B00/abcdefgh, x";
        assert_eq!(redact(text, &secrets), "Cannot POST [hidden], x");
        assert_eq!(redact("token abcdefgh!", &secrets), "token [hidden]!");
        assert_eq!(redact("Cannot POST /services/T00/B0", &secrets), "Cannot POST [hidden]");
        assert_eq!(redact("it ends in abcd", &secrets), "it ends in [hidden]");
        assert_eq!(redact("it ends in abc", &secrets), "it ends in abc");
        assert_eq!(redact("", &secrets), "");
    }

    #[test]
    fn a_hidden_value_is_not_shown() {
        let hidden = Hidden::new("whsec_secret".to_owned());
        assert_eq!(format!("{hidden:?} {:#?}", Some(&hidden)).matches("secret").count(), 0);
        assert_eq!(hidden.reveal(), "whsec_secret");
    }
}
