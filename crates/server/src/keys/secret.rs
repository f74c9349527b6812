//! The text form of an API key: `psk_`, 43 base-62 characters with 256 random bits, and a checksum of 6 characters. The
//! prefix lets secret scanners find leaked keys. The checksum avoids their false alarms, and distinguishes a typo from
//! an unknown key. Letters and digits alone make the key one word in every terminal.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::store::KeyHash;

const PREFIX: &str = "psk_";

/// 62^43 is a little more than 2^256.
const BODY: usize = 43;

/// 62^6 is more than 2^32.
const CHECKSUM: usize = 6;

const LENGTH: usize = PREFIX.len() + BODY + CHECKSUM;

/// The number of characters kept to tell keys apart: 24 of the 256 bits.
const HINT: usize = PREFIX.len() + 4;

const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A key in the clear. It is shown once, when it is created.
pub struct Secret(String);

/// Why a text cannot be a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrongSecret {
    /// It does not have the form of a key.
    NotAKey,
    /// It has the form of a key, but its checksum is wrong.
    Mistyped,
}

impl Secret {
    /// Makes a key from random bytes.
    #[must_use]
    pub fn new(random: [u8; 32]) -> Self {
        let mut text = String::with_capacity(LENGTH);
        text.push_str(PREFIX);
        push_base62(&mut text, random, BODY);
        let checksum = checksum(&text);
        text.push_str(&checksum);
        Self(text)
    }

    /// The key in the clear.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its first characters, by which people tell keys apart.
    #[must_use]
    pub fn hint(&self) -> &str {
        &self.0[..HINT]
    }

    /// The hash that is stored.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        hash(self.0.as_bytes())
    }
}

/// Shows only the hint, never the key.
impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}…", self.hint())
    }
}

/// The hash that identifies a key. Its 53 bytes fit one block of SHA-256.
#[must_use]
pub fn hash(key: &[u8]) -> KeyHash {
    Sha256::digest(key).into()
}

impl WrongSecret {
    /// Why an unknown text cannot be a key; `None` if it could be one.
    #[must_use]
    pub fn of(text: &[u8]) -> Option<Self> {
        let Some(text) = std::str::from_utf8(text).ok().filter(|text| text.starts_with(PREFIX))
        else {
            return Some(Self::NotAKey);
        };
        let body = text.get(..PREFIX.len() + BODY);
        let matches = body.is_some_and(|body| checksum(body) == text[body.len()..]);
        (!matches).then_some(Self::Mistyped)
    }
}

fn checksum(text: &str) -> String {
    let mut digits = String::with_capacity(CHECKSUM);
    let mut number = [0; 32];
    number[28..].copy_from_slice(&crc32fast::hash(text.as_bytes()).to_be_bytes());
    push_base62(&mut digits, number, CHECKSUM);
    digits
}

/// Appends a number, given most significant byte first, as exactly `digits` base-62 digits.
fn push_base62(text: &mut String, mut number: [u8; 32], digits: usize) {
    let start = text.len();
    for _ in 0..digits {
        let mut remainder = 0_u16;
        for byte in &mut number {
            let value = (remainder << 8) | u16::from(*byte);
            // The previous remainder is less than 62, so the quotient fits a byte.
            *byte = u8::try_from(value / 62).unwrap_or(u8::MAX);
            remainder = value % 62;
        }
        text.insert(start, char::from(DIGITS[usize::from(remainder)]));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_is_one_word_that_says_what_it_is() {
        for random in [[0; 32], [0xff; 32], [7; 32]] {
            let secret = Secret::new(random);
            let text = secret.as_str();
            assert_eq!(text.len(), LENGTH);
            assert!(text.starts_with("psk_"), "{text}");
            assert!(text[4..].bytes().all(|byte| byte.is_ascii_alphanumeric()), "{text}");
            assert_eq!(WrongSecret::of(text.as_bytes()), None);
            assert!(!format!("{secret:?}").contains(text));
        }
        let zero = Secret::new([0; 32]);
        assert_eq!(&zero.as_str()[..47], "psk_0000000000000000000000000000000000000000000");
    }

    #[test]
    fn strangers_and_typos_are_told_apart() {
        for text in ["", "psk", "sk_0123", "Bearer x", "ghp_0123456789"] {
            assert_eq!(WrongSecret::of(text.as_bytes()), Some(WrongSecret::NotAKey), "{text}");
        }
        assert_eq!(WrongSecret::of(b"psk_\xff"), Some(WrongSecret::NotAKey));
        for text in ["psk_", "psk_ä", "psk_0"] {
            assert_eq!(WrongSecret::of(text.as_bytes()), Some(WrongSecret::Mistyped), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_two_keys_are_alike_and_every_typo_is_noticed(
            random: [u8; 32],
            other: [u8; 32],
            position in 4_usize..LENGTH,
            digit in 0_usize..62,
        ) {
            let secret = Secret::new(random);
            prop_assert_eq!(random == other, secret.as_str() == Secret::new(other).as_str());
            let mut typo = secret.as_str().as_bytes().to_vec();
            prop_assume!(typo[position] != DIGITS[digit]);
            typo[position] = DIGITS[digit];
            prop_assert_eq!(WrongSecret::of(&typo), Some(WrongSecret::Mistyped));
            typo.pop();
            prop_assert_eq!(WrongSecret::of(&typo), Some(WrongSecret::Mistyped));
        }
    }

    #[test]
    fn every_digit_is_used() {
        let text: String =
            (0..=255).map(|byte| Secret::new([byte; 32]).as_str()[4..].to_owned()).collect();
        assert_eq!(text.bytes().collect::<BTreeSet<_>>().len(), 62);
    }
}
