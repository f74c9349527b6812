//! Names of devices, their groups, their jobs and their events. They are made once at the edge. All other code relies on them having
//! no control characters and a bounded length.

use std::{borrow::Borrow, fmt, sync::Arc};

use serde::{Serialize, Serializer};

use crate::ViolationCode;

/// Why a text is not a valid name. [`fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextError {
    /// The text is empty.
    Empty,
    /// More characters than the given limit.
    TooLong(usize),
    /// A control character. It could forge log lines, and PostgreSQL refuses NUL.
    ControlCharacter,
}

impl fmt::Display for TextError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => formatter.write_str("is not allowed to be empty"),
            Self::TooLong(most) => {
                write!(formatter, "length must be less than or equal to {most} characters long")
            }
            Self::ControlCharacter => formatter.write_str("must not contain control characters"),
        }
    }
}

impl TextError {
    /// Which kind of rule is broken.
    #[must_use]
    pub fn code(self) -> ViolationCode {
        match self {
            Self::Empty | Self::TooLong(_) => ViolationCode::Length,
            Self::ControlCharacter => ViolationCode::Format,
        }
    }
}

/// Checks that `text` has 1 to `most` characters and no control character.
///
/// # Errors
/// The first broken rule.
pub fn check_text(text: &str, most: usize) -> Result<(), TextError> {
    if text.is_empty() {
        return Err(TextError::Empty);
    }
    // A text has at least as many bytes as characters, so only longer texts need counting.
    if text.len() > most && text.chars().nth(most).is_some() {
        return Err(TextError::TooLong(most));
    }
    if text.chars().any(char::is_control) {
        return Err(TextError::ControlCharacter);
    }
    Ok(())
}

/// The text of a JSON body, without the byte order mark that some Windows tools write.
///
/// # Errors
/// When the body is empty or is not UTF-8. The message says where, and names UTF-16 if it looks like that.
pub fn json_text(body: &[u8]) -> Result<&str, String> {
    let body = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    match std::str::from_utf8(body) {
        Ok(text) if text.trim_ascii().is_empty() => Err("there is nothing in it".to_owned()),
        Ok(text) => Ok(text),
        Err(error) => Err(not_utf8(body, error.valid_up_to())),
    }
}

/// The message for a body that stops being UTF-8 after `at` bytes.
fn not_utf8(body: &[u8], at: usize) -> String {
    match body {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "it is UTF-16; send UTF-8".to_owned(),
        _ => {
            let byte = body.get(at).copied().unwrap_or_default();
            format!("it is not UTF-8: byte {byte:#04x} after {at} bytes; send UTF-8")
        }
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $most:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The limit of its length, in characters.
            pub const MAX_CHARACTERS: usize = $most;

            /// Checks and copies `text`.
            ///
            /// # Errors
            /// When it is empty, too long or has a control character.
            pub fn new(text: &str) -> Result<Self, TextError> {
                check_text(text, Self::MAX_CHARACTERS)?;
                Ok(Self(text.into()))
            }

            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

name! {
    /// A device's name for itself: 1 to 255 characters, no control characters. Cheap to clone.
    DeviceId, 255
}

name! {
    /// The name of a device's job: 1 to 100 characters, no control characters.
    JobName, 100
}

name! {
    /// The group that people put a device in: 1 to 100 characters, no control characters.
    GroupName, 100
}

name! {
    /// A device's own id for one event: 1 to 64 characters, no control characters. It is unique among the device's
    /// events, so sending the event again changes nothing.
    EventId, 64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_in_characters() {
        assert!(DeviceId::new(&"ü".repeat(255)).is_ok());
        assert_eq!(DeviceId::new(&"ü".repeat(256)), Err(TextError::TooLong(255)));
        assert_eq!(DeviceId::new(""), Err(TextError::Empty));
        assert_eq!(JobName::new(&"j".repeat(101)), Err(TextError::TooLong(100)));
    }

    #[test]
    fn control_characters_are_refused() {
        for text in ["\0", "pi\n1", "pi\u{7f}", "pi\u{85}"] {
            assert_eq!(DeviceId::new(text), Err(TextError::ControlCharacter), "{text:?}");
        }
        assert!(DeviceId::new("Schule Müller / Gerät 7").is_ok());
    }
}
