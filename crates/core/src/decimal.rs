//! Exact decimal arithmetic on a number's text. The numeric types of events call it; it never goes through a binary
//! float. `1.005` rounds to `1.01` here, as a person expects. A float would round it to `1.00`.

/// A decimal number, scaled by a power of ten and rounded to an integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scaled {
    /// The value times `10^scale`, rounded half away from zero. It saturates at the bounds of `i64`.
    pub value: i64,
    /// True if neither rounding nor saturation lost anything.
    pub exact: bool,
}

impl Scaled {
    /// True if the number has a fraction at this scale. A saturated value answers false, because its error is its size.
    #[must_use]
    pub fn is_fraction(self) -> bool {
        !self.exact && !matches!(self.value, i64::MIN | i64::MAX)
    }
}

/// A value with more digits saturates. A number of 19 digits exceeds every range that PiSync uses.
const MAX_DIGITS: i64 = 18;

/// Reads `text` as a decimal number (`[+-]digits[.digits][e[+-]digits]`) and scales it by
/// `10^scale`, rounding half away from zero. `None` when it is not a number.
#[must_use]
pub fn parse_scaled(text: &str, scale: u32) -> Option<Scaled> {
    let (negative, unsigned) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
        Some(at) => (&unsigned[..at], parse_exponent(&unsigned[at + 1..])?),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }

    let mut digits = whole.bytes().chain(fraction.bytes()).map(|byte| byte - b'0');
    let length = whole.len() + fraction.len();
    // The number of digits before the decimal point after scaling. It may be negative.
    let kept =
        saturating_i64(whole.len()).saturating_add(exponent).saturating_add(i64::from(scale));

    let leading_zeros = saturating_i64(digits.clone().take_while(|digit| *digit == 0).count());
    if leading_zeros == saturating_i64(length) {
        return Some(Scaled { value: 0, exact: true });
    }
    if kept.saturating_sub(leading_zeros) > MAX_DIGITS {
        let value = if negative { i64::MIN } else { i64::MAX };
        return Some(Scaled { value, exact: false });
    }

    let mut value: i64 = 0;
    for _ in 0..kept.max(0) {
        value = value * 10 + i64::from(digits.next().unwrap_or(0));
    }
    let mut exact = true;
    if kept >= 0 {
        if let Some(first_dropped) = digits.next() {
            exact = first_dropped == 0 && digits.all(|digit| digit == 0);
            value += i64::from(first_dropped >= 5);
        }
    } else {
        exact = false;
    }
    Some(Scaled { value: if negative { -value } else { value }, exact })
}

/// Reads an exponent. An exponent that does not fit saturates.
fn parse_exponent(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // The text has the form of an integer, so parsing fails only when it is too large.
    let magnitude = digits.parse::<i64>().unwrap_or(i64::MAX / 4).min(i64::MAX / 4);
    Some(if text.starts_with('-') { -magnitude } else { magnitude })
}

fn saturating_i64(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exact(value: i64) -> Option<Scaled> {
        Some(Scaled { value, exact: true })
    }

    fn rounded(value: i64) -> Option<Scaled> {
        Some(Scaled { value, exact: false })
    }

    #[test]
    fn rounds_half_away_from_zero_by_the_text() {
        assert_eq!(parse_scaled("1.005", 2), rounded(101));
        assert_eq!(parse_scaled("-1.005", 2), rounded(-101));
        assert_eq!(parse_scaled("1.00499999999999999999", 2), rounded(100));
        assert_eq!(parse_scaled("45.678", 2), rounded(4568));
        assert_eq!(parse_scaled("0.004", 2), rounded(0));
        assert_eq!(parse_scaled("0.005", 2), rounded(1));
        assert_eq!(parse_scaled("99999999.995", 2), rounded(10_000_000_000));
    }

    #[test]
    fn understands_exponents_and_zeros() {
        assert_eq!(parse_scaled("1e2", 0), exact(100));
        assert_eq!(parse_scaled("150.0", 0), exact(150));
        assert_eq!(parse_scaled("1.5e-1", 2), exact(15));
        assert_eq!(parse_scaled("5e-3", 2), rounded(1));
        assert_eq!(parse_scaled("5e-4", 2), rounded(0));
        assert_eq!(parse_scaled("0e999999999999999999999", 2), exact(0));
        assert_eq!(parse_scaled("1e999999999999999999999", 2), rounded(i64::MAX));
        assert_eq!(parse_scaled("-1e400", 2), rounded(i64::MIN));
        assert_eq!(parse_scaled("1e-999999999999999999999", 2), rounded(0));
        assert_eq!(parse_scaled("000000000000000000000000000001", 0), exact(1));
    }

    #[test]
    fn knows_fractions_at_any_size() {
        for text in ["0.5", "-1.5", "9007199254740991.4", "999999999999999999.9"] {
            assert!(parse_scaled(text, 0).unwrap().is_fraction(), "{text}");
        }
        for text in ["0", "-0.0", "150.0", "1e17", "1e18", "-1e400"] {
            assert!(!parse_scaled(text, 0).unwrap().is_fraction(), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_number() {
        for text in ["", "-", "+", ".", "e5", "1e", "1e+", "0x10", "1_000", "NaN", "1,5", " 1", "١"]
        {
            assert_eq!(parse_scaled(text, 2), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "[-+0-9.eE]{0,40}", scale in 0u32..6) {
            let _ = parse_scaled(&text, scale);
        }

        #[test]
        fn agrees_with_integer_arithmetic(hundredths in -10_000_000_000i64..10_000_000_000) {
            let sign = if hundredths < 0 { "-" } else { "" };
            let text = format!("{sign}{}.{:02}", hundredths.abs() / 100, hundredths.abs() % 100);
            prop_assert_eq!(parse_scaled(&text, 2), exact(hundredths));
            let tenths_rounded = (hundredths.abs() + 5) / 10 * hundredths.signum();
            prop_assert_eq!(parse_scaled(&text, 1).map(|scaled| scaled.value), Some(tenths_rounded));
        }
    }
}
