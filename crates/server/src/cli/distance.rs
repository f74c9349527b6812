//! How far away a time is, as it is typed: so many minutes, hours, days or weeks. The commands that take the end of something
//! call it, each with the units that it promises.

/// The units, with their milliseconds.
const UNITS: [(char, i64); 4] =
    [('m', 60_000), ('h', 60 * 60_000), ('d', 24 * 60 * 60_000), ('w', 7 * 24 * 60 * 60_000)];

/// The milliseconds of `typed`, a number and one of `units`; `None` when it is something else.
pub(super) fn milliseconds(typed: &str, units: &str) -> Option<i64> {
    UNITS.into_iter().filter(|(unit, _)| units.contains(*unit)).find_map(|(unit, milliseconds)| {
        let count: u32 = typed.strip_suffix(unit)?.parse().ok()?;
        Some(i64::from(count).saturating_mul(milliseconds))
    })
}
