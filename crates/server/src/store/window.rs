//! Windows of time for which figures are requested, by the events' own dates. The API makes a [`Window`] and both
//! stores answer it. A window always covers complete hours or complete UTC days, because sums exist only for those.

use pisync_core::Timestamp;

const HOUR: i64 = 60 * 60 * 1000;
const DAY: i64 = 24 * HOUR;

/// A window of complete hours or complete days, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    from: Timestamp,
    until: Timestamp,
    whole_days: bool,
}

impl Window {
    /// The hour of `now` and the 23 hours before it.
    #[must_use]
    pub fn last_24_hours(now: Timestamp) -> Self {
        Self { whole_days: false, ..Self::ending_with(now, HOUR, 24) }
    }

    /// The day of `now` and the days before it, `days` in total.
    #[must_use]
    pub fn last_days(now: Timestamp, days: i64) -> Self {
        Self { whole_days: true, ..Self::ending_with(now, DAY, days) }
    }

    fn ending_with(now: Timestamp, unit: i64, units: i64) -> Self {
        let now = now.as_millisecond();
        let until = now - now.rem_euclid(unit) + unit;
        let instant = |millisecond: i64| {
            Timestamp::MIN.saturating_add_milliseconds(
                millisecond.saturating_sub(Timestamp::MIN.as_millisecond()),
            )
        };
        Self { from: instant(until - units * unit), until: instant(until), whole_days: false }
    }

    /// Its beginning.
    #[must_use]
    pub fn from(&self) -> Timestamp {
        self.from
    }

    /// Its end, which does not belong to it.
    #[must_use]
    pub fn until(&self) -> Timestamp {
        self.until
    }

    /// Whether sums by day can answer it.
    pub(super) fn is_whole_days(&self) -> bool {
        self.whole_days
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(window: Window) -> (String, String) {
        (window.from().to_string(), window.until().to_string())
    }

    #[test]
    fn hours_and_days_begin_on_the_clock() {
        for (now, hour, day) in [
            ("2026-11-22T12:34:56.789Z", "12", "22"),
            ("2026-11-22T12:00:00.000Z", "12", "22"),
            ("2026-11-22T12:59:59.999Z", "12", "22"),
        ] {
            let now = Timestamp::parse_iso8601(now).unwrap();
            let next: u32 = hour.parse::<u32>().unwrap() + 1;
            let expected =
                (format!("2026-11-21T{next}:00:00.000Z"), format!("2026-11-22T{next}:00:00.000Z"));
            assert_eq!(bounds(Window::last_24_hours(now)), expected);
            let tomorrow: u32 = day.parse::<u32>().unwrap() + 1;
            let until = format!("2026-11-{tomorrow}T00:00:00.000Z");
            let week = ("2026-11-16T00:00:00.000Z".to_owned(), until.clone());
            assert_eq!(bounds(Window::last_days(now, 7)), week);
            let month = ("2026-10-24T00:00:00.000Z".to_owned(), until);
            assert_eq!(bounds(Window::last_days(now, 30)), month);
        }
        let early = Timestamp::parse_iso8601("1969-12-31T23:59:59.999Z").unwrap();
        let expected =
            ("1969-12-31T00:00:00.000Z".to_owned(), "1970-01-01T00:00:00.000Z".to_owned());
        assert_eq!(bounds(Window::last_24_hours(early)), expected);
    }
}
