//! What holds of any text that is read as a number or a date. The fuzz target and the replay of its
//! corpus both call [`check`].

use pisync_core::{
    Timestamp,
    decimal::{Scaled, parse_scaled},
};

/// Longer texts are read but not compared: the plain arithmetic below writes out every zero.
const LONGEST_COMPARED: usize = 1000;

/// Panics when the text is read as it must not be.
pub(crate) fn check(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    for scale in [0, 2, 3] {
        let scaled = parse_scaled(text, scale);
        if text.len() <= LONGEST_COMPARED {
            assert_eq!(scaled, plainly_scaled(text, scale as usize), "{text:?} at {scale}");
        }
    }
    if let Some(timestamp) = Timestamp::parse_iso8601(text) {
        check_date(text, timestamp);
    }
}

fn check_date(text: &str, timestamp: Timestamp) {
    assert!((Timestamp::MIN..=Timestamp::MAX).contains(&timestamp), "{text:?}");
    let written = timestamp.to_string();
    assert_eq!(written.len(), "2025-06-17T10:30:00.000Z".len(), "{text:?}");
    assert_eq!(Timestamp::parse_iso8601(&written), Some(timestamp), "{text:?}");
    // A time zone's name may follow an offset, but must not be passed over in its stead.
    if let Some((date, _zone)) = text.split_once('[') {
        assert_eq!(Timestamp::parse_iso8601(date), Some(timestamp), "{text:?}");
        assert_eq!(Timestamp::parse_iso8601(&format!("{date}Z")), None, "{text:?} has no offset");
    }
}

/// Moves the decimal point through the written digits.
fn plainly_scaled(text: &str, scale: usize) -> Option<Scaled> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mut digits = format!("{whole}{fraction}");
    let exponent_digits = exponent.map(|text| text.strip_prefix(['+', '-']).unwrap_or(text));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(&digits) || !exponent_digits.is_none_or(is_number) {
        return None;
    }

    // No text is long enough to see the difference between this exponent and a larger one.
    let far = LONGEST_COMPARED + 100;
    let shift = exponent_digits.map_or(0, |digits| digits.parse().unwrap_or(far).min(far));
    let mut point = whole.len();
    if exponent.is_some_and(|exponent| exponent.starts_with('-')) {
        digits.insert_str(0, &"0".repeat(shift));
    } else {
        point += shift;
    }
    point += scale;
    digits.push_str(&"0".repeat(point.saturating_sub(digits.len())));

    let (whole, rest) = digits.split_at(point);
    let whole = whole.trim_start_matches('0');
    let sign = if text.starts_with('-') { -1 } else { 1 };
    if whole.len() > 18 {
        let value = if sign < 0 { i64::MIN } else { i64::MAX };
        return Some(Scaled { value, exact: false });
    }
    let value = format!("0{whole}").parse::<i64>().expect("at most 18 digits")
        + i64::from(rest.as_bytes().first().is_some_and(|digit| *digit >= b'5'));
    Some(Scaled { value: sign * value, exact: rest.bytes().all(|digit| digit == b'0') })
}
