//! Decimal numbers of a sync event, kept as scaled integers. Sums and output are therefore exactly what was sent. They
//! are parsed once at the edge, and never stored outside their range.

use std::fmt;

use crate::{
    ViolationCode,
    decimal::{self, Scaled},
};

/// Why a number is refused. [`fmt::Display`] gives the words that follow the quoted field name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberError {
    /// Not a number.
    NotANumber,
    /// A fraction where an integer is required.
    NotAnInteger,
    /// Below zero.
    Negative,
    /// Above this bound, given as decimal text.
    TooLarge(&'static str),
}

impl fmt::Display for NumberError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotANumber => formatter.write_str("must be a number"),
            Self::NotAnInteger => formatter.write_str("must be an integer"),
            Self::Negative => formatter.write_str("must be greater than or equal to 0"),
            Self::TooLarge(most) => write!(formatter, "must be less than or equal to {most}"),
        }
    }
}

impl NumberError {
    /// Which kind of rule is broken.
    #[must_use]
    pub fn code(self) -> ViolationCode {
        match self {
            Self::NotANumber | Self::NotAnInteger => ViolationCode::Type,
            Self::Negative | Self::TooLarge(_) => ViolationCode::Range,
        }
    }
}

/// Reads `text` scaled by `10^scale` into `0..=most`. `most_text` is that bound as unscaled decimal text.
pub(crate) fn parse_bounded(
    text: &str,
    scale: u32,
    most: i64,
    most_text: &'static str,
) -> Result<Scaled, NumberError> {
    let scaled = decimal::parse_scaled(text, scale).ok_or(NumberError::NotANumber)?;
    if scaled.value < 0 {
        return Err(NumberError::Negative);
    }
    if scaled.value > most {
        return Err(NumberError::TooLarge(most_text));
    }
    Ok(scaled)
}

/// Writes a non-negative number that is scaled by `10^scale`, without trailing zeros.
fn write_scaled(formatter: &mut fmt::Formatter<'_>, value: i64, scale: usize) -> fmt::Result {
    let digits = format!("{value:0>width$}", width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    write!(formatter, "{whole}{point}{fraction}")
}

/// A speed from 0 to 99,999,999.99 Mbps in hundredths. The range is that of the Node service's `numeric(10,2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mbps(i64);

impl Mbps {
    pub(crate) const MAX_HUNDREDTHS: i64 = 9_999_999_999;

    /// Reads decimal text, rounding to two decimals half away from zero, then checks the range.
    ///
    /// # Errors
    /// When it is not a number, or is outside the range after rounding.
    pub fn parse(text: &str) -> Result<Self, NumberError> {
        parse_bounded(text, 2, Self::MAX_HUNDREDTHS, "99999999.99").map(|scaled| Self(scaled.value))
    }

    /// Accepts a stored value; `None` outside the range.
    #[must_use]
    pub fn from_hundredths(hundredths: i64) -> Option<Self> {
        (0..=Self::MAX_HUNDREDTHS).contains(&hundredths).then_some(Self(hundredths))
    }

    /// The speed in hundredths of Mbps.
    #[must_use]
    pub fn hundredths(self) -> i64 {
        self.0
    }
}

/// The shortest exact decimal digits.
impl fmt::Display for Mbps {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(formatter, self.0, 2)
    }
}

/// Ten digits fit a double well enough that two decimals come out unchanged.
#[expect(clippy::cast_precision_loss, reason = "at most 34 bits")]
impl From<Mbps> for f64 {
    fn from(speed: Mbps) -> Self {
        speed.0 as Self / 100.0
    }
}

/// The duration of a sync: 0 to 31,536,000 seconds (a year), in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SyncDuration(i64);

impl SyncDuration {
    pub(crate) const MAX_MILLISECONDS: i64 = 31_536_000_000;

    /// Reads decimal seconds, rounding to three decimals half away from zero, then checks the range.
    ///
    /// # Errors
    /// When it is not a number, or is outside the range after rounding.
    pub fn parse(text: &str) -> Result<Self, NumberError> {
        parse_bounded(text, 3, Self::MAX_MILLISECONDS, "31536000").map(|scaled| Self(scaled.value))
    }

    /// Accepts a stored value; `None` outside the range.
    #[must_use]
    pub fn from_milliseconds(milliseconds: i64) -> Option<Self> {
        (0..=Self::MAX_MILLISECONDS).contains(&milliseconds).then_some(Self(milliseconds))
    }

    /// The duration in milliseconds.
    #[must_use]
    pub fn milliseconds(self) -> i64 {
        self.0
    }
}

/// Seconds, as the shortest exact decimal digits.
impl fmt::Display for SyncDuration {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(formatter, self.0, 3)
    }
}

/// Seconds.
#[expect(clippy::cast_precision_loss, reason = "at most 35 bits")]
impl From<SyncDuration> for f64 {
    fn from(duration: SyncDuration) -> Self {
        duration.0 as Self / 1000.0
    }
}
