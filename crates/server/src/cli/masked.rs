//! Error messages without the passwords and keys that were typed. A database's URL that stands in the wrong place, or in the
//! wrong setting, would be shown by whatever says that it is wrong there. `cli` passes its messages through here.

use std::ffi::OsString;

use crate::notify::secrets::SecretsKey;

/// What stands for the rest of a URL.
const HIDDEN: &str = "[hidden]";

/// Schemes of URLs that may hold a password although it is not between a colon and an @.
const SCHEMES: [&str; 2] = ["postgres", "postgresql"];

/// The flag of the key under which secrets are stored.
const SECRETS_KEY: &str = "--secrets-key";

/// What is shorter is no secret, and most likely a part of every message.
const LEAST_KEY: usize = 6;

/// Texts that are not shown, and what is shown instead, the longest first.
#[derive(Debug, Default)]
pub(super) struct Masks(Vec<(String, String)>);

impl Masks {
    /// Those of everything that was typed, or that a setting was set to.
    pub(super) fn of(words: &[OsString]) -> Self {
        let mut masks = Vec::new();
        let mut is_key = false;
        for word in words {
            let word = word.to_string_lossy();
            let is_key_itself = is_key && !word.starts_with("--") && word.len() >= LEAST_KEY;
            let found =
                if is_key_itself { Some((&*word, HIDDEN.to_owned())) } else { find_secret(&word) };
            is_key = word == SECRETS_KEY;
            let Some((secret, shown)) = found else { continue };
            // A message may name the part before a comma or an equals sign, where the text was cut.
            let cuts = secret.match_indices([',', '=']).map(|(end, _)| end).chain([secret.len()]);
            for part in cuts.map(|end| secret[..end].trim_end()) {
                if part.len() > shown.len().saturating_sub(HIDDEN.len()) {
                    let quoted = format!("{part:?}");
                    masks.push((quoted.trim_matches('"').to_owned(), shown.clone()));
                    masks.push((part.to_owned(), shown.clone()));
                }
            }
        }
        masks.sort_by_key(|(secret, _)| std::cmp::Reverse(secret.len()));
        Self(masks)
    }

    /// A message as it may be shown.
    pub(super) fn mask(&self, message: &str) -> String {
        let mut masked = message.to_owned();
        for (secret, shown) in &self.0 {
            masked = masked.replace(secret, shown);
        }
        masked
    }
}

/// The part of a word that may hold a password, and what to show in its place.
fn find_secret(word: &str) -> Option<(&str, String)> {
    let lower = word.to_ascii_lowercase();
    if let Some(key) = find_key(word) {
        return Some((key, HIDDEN.to_owned()));
    }
    if let Some(scheme_end) = word.find("://") {
        let in_scheme = |letter: char| letter.is_ascii_alphanumeric() || "+-.".contains(letter);
        let scheme = word[..scheme_end].rsplit(|letter| !in_scheme(letter)).next()?;
        // What looks like a flag is none of the scheme.
        let scheme = scheme.trim_start_matches('-');
        let url = &word[scheme_end - scheme.len()..];
        let is_database = SCHEMES.contains(&scheme.to_ascii_lowercase().as_str());
        if is_database || url.contains('@') || lower.contains("password=") {
            return Some((url, format!("{scheme}://{HIDDEN}")));
        }
        return None;
    }
    if let Some(start) = lower.find("password=") {
        let name = &word[start..start + "password=".len()];
        return Some((&word[start..], format!("{name}{HIDDEN}")));
    }
    // USER:PASSWORD@HOST without a scheme.
    let value = match word.strip_prefix("--").and_then(|flag| flag.split_once('=')) {
        Some((_, value)) => value,
        None => word,
    };
    let (before, _) = value.rsplit_once('@')?;
    before.contains(':').then(|| (value, HIDDEN.to_owned()))
}

/// The part of a word that is meant as the key under which secrets are stored, or could be it in a wrong place.
fn find_key(word: &str) -> Option<&str> {
    let value = match word.strip_prefix("--").and_then(|flag| flag.split_once('=')) {
        Some((_, value)) => value,
        None => word,
    };
    let is_meant = word.starts_with(SECRETS_KEY) && word.contains('=') && value.len() >= LEAST_KEY;
    (is_meant || SecretsKey::parse(value).is_ok()).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_hidden_wherever_it_was_typed() {
        for (word, message, expected) in [
            ("postgres://u:secret@h/db", "'postgres://u:secret@h/db'", "'postgres://[hidden]'"),
            ("PostgreSQL://u:secret", "PostgreSQL://u:secret!", "PostgreSQL://[hidden]!"),
            (
                "--port=postgres://u:secret@h",
                "port postgres://u:secret@h",
                "port postgres://[hidden]",
            ),
            ("--postgres://u:se=cret@h", "'--postgres://u:se'", "'--postgres://[hidden]'"),
            ("--db-host=postgres://u:se,cret@h", "\"postgres://u:se\"", "\"postgres://[hidden]\""),
            ("mysql://u:secret@h", "mysql://u:secret@h", "mysql://[hidden]"),
            ("postgres://u:se\"cret@h", "\"postgres://u:se\\\"cret@h\"", "\"postgres://[hidden]\""),
            ("--x=u:secret@h", "x=u:secret@h", "x=[hidden]"),
            ("DB_PASSWORD=secret", "'DB_PASSWORD=secret'", "'DB_PASSWORD=[hidden]'"),
            ("host=h password=secret", "'host=h password=secret'", "'host=h password=[hidden]'"),
            ("https://h/?password=secret", "https://h/?password=secret", "https://[hidden]"),
        ] {
            assert_eq!(Masks::of(&[word.into()]).mask(message), expected, "{word}");
        }
    }

    #[test]
    fn keys_of_secrets_are_hidden() {
        let key = "Tm90IGEga2V5LCBidXQgMzIgYnl0ZXMgb2YgdGV4dCE=";
        for (words, message, expected) in [
            (&["--secrets-key=mistyped"][..], "'mistyped'", "'[hidden]'"),
            (&["--secrets-key", "mistyped"], "'mistyped'", "'[hidden]'"),
            (&["serve", "--port", key], key, "[hidden]"),
            (&[&format!("--host={key}")], key, "[hidden]"),
            (&["--secrets-key", "--port=x"], "port x", "port x"),
        ] {
            let words: Vec<_> = words.iter().map(OsString::from).collect();
            assert_eq!(Masks::of(&words).mask(message), expected, "{words:?}");
        }
    }

    #[test]
    fn the_rest_is_shown() {
        for word in [
            "serv",
            "https://fleet.example/",
            "--port=x",
            "a@b",
            "12:30",
            "sqlite:x.db",
            "://",
            "é://x",
        ] {
            let message = format!("unexpected {word}");
            assert_eq!(Masks::of(&[word.into()]).mask(&message), message);
        }
        // An empty password is no reason to mask every place.
        assert_eq!(Masks::of(&["password=".into()]).mask("password=, abc"), "password=, abc");
    }
}
