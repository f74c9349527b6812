//! How a key looks: `psk_`, 43 characters of base 62 that carry 256 random bits, and 6 that check the
//! rest. The prefix lets secret scanners find keys in places where they should not be, the checksum
//! spares them false alarms and tells a typo from a stranger's key, and 53 characters of letters and
//! digits are one word to every terminal.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::store::KeyHash;

const PREFIX: &str = "psk_";

/// 62^43 is a little more than 2^256.
const BODY: usize = 43;

/// 62^6 is more than 2^32.
const CHECKSUM: usize = 6;

const LENGTH: usize = PREFIX.len() + BODY + CHECKSUM;

/// Characters of a key that are kept to tell it from others: 24 of its 256 bits.
const HINT: usize = PREFIX.len() + 4;

const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A key, in the clear: shown once, when it is made.
pub struct Secret(String);

/// Why a text cannot be a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrongSecret {
    /// It does not look like one.
    NotAKey,
    /// It looks like one that was copied wrongly.
    Mistyped,
}

impl Secret {
    /// The key that these random bytes make.
    #[must_use]
    pub fn new(random: [u8; 32]) -> Self {
        let mut text = String::with_capacity(LENGTH);
        text.push_str(PREFIX);
        push_base62(&mut text, random, BODY);
        let checksum = checksum(&text);
        text.push_str(&checksum);
        Self(text)
    }

    /// The key itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its first characters, by which people tell keys apart.
    #[must_use]
    pub fn hint(&self) -> &str {
        &self.0[..HINT]
    }

    /// What is kept of it.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        hash(self.0.as_bytes())
    }
}

/// Never shows the key.
impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}…", self.hint())
    }
}

/// The hash by which a key is known. Its 53 bytes fit one block of SHA-256.
#[must_use]
pub fn hash(key: &[u8]) -> KeyHash {
    Sha256::digest(key).into()
}

impl WrongSecret {
    /// What is wrong with a text that no key is known by; `None` when it could be one.
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

/// Writes a number, most significant byte first, as so many digits.
fn push_base62(text: &mut String, mut number: [u8; 32], digits: usize) {
    let start = text.len();
    for _ in 0..digits {
        let mut remainder = 0_u16;
        for byte in &mut number {
            let value = (remainder << 8) | u16::from(*byte);
            // The remainder before was less than 62, so the quotient is a byte.
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
