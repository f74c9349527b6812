//! Times at which devices are not expected to report, or at which nobody is to be told: holidays, nights, weekends. They are
//! local times of a time zone. A time that a clock change skips counts an hour later, and of one that comes twice the first
//! counts, as RFC 5545 has it. A window that goes over midnight belongs to the day on which it begins.

use jiff::{
    ToSpan,
    civil::{Date, Time, Weekday},
    tz::TimeZone,
};
use serde_json::{Value, json};

use super::deadline::Interval;
use crate::Timestamp;

/// The longest that a window without weekdays may be, in milliseconds: 366 days.
pub const LONGEST_WINDOW: i64 = 366 * 24 * 60 * 60 * 1000;

/// The times of a window.
#[derive(Debug, Clone)]
pub struct WindowTimes {
    /// The time zone of `weekly`.
    pub zone: TimeZone,
    /// Its first instant; `None` for a weekly window without a beginning.
    pub from: Option<Timestamp>,
    /// Its end; `None` for a weekly window without an end.
    pub until: Option<Timestamp>,
    /// On which days, and from when to when; `None` for the whole time from `from` to `until`.
    pub weekly: Option<Weekly>,
}

/// The part of some weekdays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weekly {
    /// The days on which it begins.
    pub days: Vec<Weekday>,
    /// When it begins.
    pub start: Time,
    /// When it ends: the next day, unless this is after `start`.
    pub end: Time,
}

/// The weekdays and the words that stand for them.
pub const WEEKDAYS: [(&str, Weekday); 7] = [
    ("mon", Weekday::Monday),
    ("tue", Weekday::Tuesday),
    ("wed", Weekday::Wednesday),
    ("thu", Weekday::Thursday),
    ("fri", Weekday::Friday),
    ("sat", Weekday::Saturday),
    ("sun", Weekday::Sunday),
];

/// The weekday that a word stands for.
#[must_use]
pub fn weekday(name: &str) -> Option<Weekday> {
    WEEKDAYS.iter().find(|(known, _)| *known == name).map(|(_, day)| *day)
}

/// The end of a part of a day: a [`time_of_day`], or `24:00`, which is the midnight behind it.
#[must_use]
pub fn end_of_part(text: &str) -> Option<Time> {
    if text == "24:00" { Some(Time::midnight()) } else { time_of_day(text) }
}

/// A time of day as `HH:MM`, from `00:00` to `23:59`. `24:00` is none: nobody could tell which of two midnights it is.
#[must_use]
pub fn time_of_day(text: &str) -> Option<Time> {
    let (hour, minute) = text.split_once(':')?;
    let number = |digits: &str| {
        (digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| digits.parse::<i8>().ok())
            .flatten()
    };
    Time::new(number(hour)?, number(minute)?, 0, 0).ok()
}

impl WindowTimes {
    /// The intervals of this window that touch `span`, in their order.
    #[must_use]
    pub fn touching(&self, span: Interval) -> Vec<Interval> {
        let whole = Interval {
            from: self.from.unwrap_or(Timestamp::MIN),
            until: self.until.unwrap_or(Timestamp::MAX),
        };
        if !whole.touches(&span) {
            return Vec::new();
        }
        let Some(weekly) = &self.weekly else { return vec![whole] };
        let local_date = |at: Timestamp| at.to_jiff().to_zoned(self.zone.clone()).date();
        // It may have begun the day before.
        let Ok(mut day) = local_date(span.from).checked_sub(1.day()) else { return Vec::new() };
        let last = local_date(span.until);
        let mut touching = Vec::new();
        while day <= last {
            if weekly.days.contains(&day.weekday())
                && let Some(interval) = weekly.on(day, &self.zone)
            {
                // Cut to the time in which the window exists at all.
                let interval = Interval {
                    from: interval.from.max(whole.from),
                    until: interval.until.min(whole.until),
                };
                if interval.from <= interval.until && interval.touches(&span) {
                    touching.push(interval);
                }
            }
            let Ok(next) = day.tomorrow() else { break };
            day = next;
        }
        touching
    }

    /// Until when the window lasts that is open at `now`. Its end no longer belongs to it.
    #[must_use]
    pub fn open_until(&self, now: Timestamp) -> Option<Timestamp> {
        let ends = self.touching(Interval { from: now, until: now });
        ends.into_iter().map(|interval| interval.until).filter(|until| *until > now).max()
    }
}

impl Weekly {
    /// As JSON: `{"days": ["mon"], "start": "16:00", "end": "07:00"}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let names = WEEKDAYS.iter().filter(|(_, day)| self.days.contains(day));
        let days: Vec<_> = names.map(|(name, _)| *name).collect();
        let time = |time: Time| time.strftime("%H:%M").to_string();
        json!({ "days": days, "start": time(self.start), "end": time(self.end) })
    }

    /// Reads what [`Self::to_json`] wrote; `None` when foreign SQL made it something else.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        let days = value.get("days")?.as_array()?.iter();
        let days = days.map(|name| weekday(name.as_str()?)).collect::<Option<Vec<_>>>()?;
        let time = |name: &str| time_of_day(value.get(name)?.as_str()?);
        Some(Self { days, start: time("start")?, end: time("end")? })
    }

    /// The window that begins on a day.
    fn on(&self, day: Date, zone: &TimeZone) -> Option<Interval> {
        let last_day = if self.end > self.start { day } else { day.tomorrow().ok()? };
        let instant = |day: Date, time: Time| {
            zone.to_ambiguous_zoned(day.to_datetime(time))
                .compatible()
                .ok()
                .map(|zoned| Timestamp::truncate(zoned.timestamp()))
        };
        Some(Interval { from: instant(day, self.start)?, until: instant(last_day, self.end)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        Timestamp::parse_iso8601(&format!("2026-{text}Z")).unwrap()
    }

    fn nights(days: &[Weekday], start: &str, end: &str) -> WindowTimes {
        WindowTimes {
            zone: TimeZone::get("Europe/Berlin").unwrap(),
            from: None,
            until: None,
            weekly: Some(Weekly {
                days: days.to_vec(),
                start: start.parse().unwrap(),
                end: end.parse().unwrap(),
            }),
        }
    }

    fn touching(window: &WindowTimes, from: &str, until: &str) -> Vec<(Timestamp, Timestamp)> {
        let span = Interval { from: at(from), until: at(until) };
        window.touching(span).iter().map(|one| (one.from, one.until)).collect()
    }

    const WORKDAYS: [Weekday; 5] =
        [Weekday::Monday, Weekday::Tuesday, Weekday::Wednesday, Weekday::Thursday, Weekday::Friday];

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_on_which_it_begins() {
        let nights = nights(&WORKDAYS, "16:00", "07:00");
        // Monday, 2 March.
        let monday = (at("03-02T15:00"), at("03-03T06:00"));
        assert_eq!(touching(&nights, "03-02T16:00", "03-02T17:00"), [monday]);
        assert_eq!(touching(&nights, "03-03T05:00", "03-03T05:30"), [monday]);
        assert_eq!(touching(&nights, "03-03T06:01", "03-03T14:59"), []);
        // Friday's goes into Saturday, and Sunday has none.
        let friday = (at("03-06T15:00"), at("03-07T06:00"));
        assert_eq!(touching(&nights, "03-06T20:00", "03-08T22:00"), [friday]);
        assert_eq!(touching(&nights, "03-09T00:00", "03-09T05:00"), []);
        assert_eq!(nights.open_until(at("03-07T05:59")), Some(at("03-07T06:00")));
        assert_eq!(nights.open_until(at("03-07T06:00")), None);
    }

    #[test]
    fn only_an_end_may_be_midnight_by_two_names() {
        let time = |hour, minute| Some(Time::constant(hour, minute, 0, 0));
        for (text, of_day, end) in [
            ("00:00", time(0, 0), time(0, 0)),
            ("23:59", time(23, 59), time(23, 59)),
            ("24:00", None, time(0, 0)),
            ("24:01", None, None),
            ("7:00", None, None),
            ("07:60", None, None),
            ("07:00:00", None, None),
            ("+7:00", None, None),
            ("", None, None),
        ] {
            assert_eq!((time_of_day(text), end_of_part(text)), (of_day, end), "{text}");
        }
    }

    #[test]
    fn equal_times_are_a_whole_day() {
        let sundays = nights(&[Weekday::Sunday], "00:00", "00:00");
        let sunday = (at("03-07T23:00"), at("03-08T23:00"));
        assert_eq!(touching(&sundays, "03-08T12:00", "03-08T12:00"), [sunday]);
        assert_eq!(touching(&sundays, "03-09T12:00", "03-09T12:00"), []);
    }

    /// Berlin skips 02:00 to 03:00 on 29 March, and has it twice on 25 October.
    #[test]
    fn clock_changes_move_the_ends_as_calendars_do() {
        let skipped = nights(&[Weekday::Sunday], "02:30", "05:00");
        let window = (at("03-29T01:30"), at("03-29T03:00"));
        assert_eq!(touching(&skipped, "03-29T00:00", "03-29T12:00"), [window]);
        let window = (at("10-25T00:30"), at("10-25T04:00"));
        assert_eq!(touching(&skipped, "10-25T00:00", "10-25T12:00"), [window]);
    }

    #[test]
    fn weekdays_count_only_within_the_time_of_the_window() {
        let mut window = nights(&WORKDAYS, "16:00", "07:00");
        window.from = Some(at("03-02T20:00"));
        window.until = Some(at("03-03T18:00"));
        let both = [(at("03-02T20:00"), at("03-03T06:00")), (at("03-03T15:00"), at("03-03T18:00"))];
        assert_eq!(touching(&window, "03-01T00:00", "03-30T00:00"), both);
        window.weekly = None;
        let whole = [(at("03-02T20:00"), at("03-03T18:00"))];
        assert_eq!(touching(&window, "03-03T00:00", "03-03T00:01"), whole);
        assert_eq!(touching(&window, "03-03T18:01", "03-04T00:01"), []);
    }
}
