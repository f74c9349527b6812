//! For how long runs are counted by group and hour. Both stores use it. Nothing here runs SQL.

use pisync_core::Timestamp;

/// The length of an hour.
pub(super) const HOUR_MILLISECONDS: i64 = 60 * 60 * 1000;

/// For how many hours runs are kept by group and hour: 14 days. By group and day they are kept for ever.
const KEPT_HOURS: i64 = 14 * 24;

/// The first hour whose runs by group can be counted. All events that are dated from `complete_since` on are kept.
pub(super) fn first_countable_hour(complete_since: Timestamp, now: Timestamp) -> Timestamp {
    let into_hour = now.as_millisecond().rem_euclid(HOUR_MILLISECONDS);
    let kept = now.saturating_add_milliseconds(-into_hour - KEPT_HOURS * HOUR_MILLISECONDS);
    let past_hour = complete_since.as_millisecond().rem_euclid(HOUR_MILLISECONDS);
    let rest = if past_hour == 0 { 0 } else { HOUR_MILLISECONDS - past_hour };
    kept.max(complete_since.saturating_add_milliseconds(rest))
}

/// From which hour on hours are kept, given from which on they have been, and the first that can be counted; in
/// milliseconds since 1970. A clock that was ahead must not keep hours uncounted until its time comes.
pub(super) fn kept_since(since: i64, countable: i64, now: Timestamp) -> i64 {
    let now = now.as_millisecond();
    let next_hour = now - now.rem_euclid(HOUR_MILLISECONDS) + HOUR_MILLISECONDS;
    since.min(next_hour).max(countable)
}

/// How many past hours could be counted and are not.
pub(super) fn uncounted_hours(since: i64, countable: i64, now: Timestamp) -> u64 {
    let end = since.min(now.as_millisecond());
    (end.saturating_sub(countable).max(0) / HOUR_MILLISECONDS).cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_are_kept_for_two_weeks_or_as_long_as_events() {
        let at = |text: &str| Timestamp::parse_iso8601(text).unwrap();
        let now = at("2026-11-22T12:30:00Z");
        let first = |complete_since| first_countable_hour(complete_since, now);
        assert_eq!(first(Timestamp::MIN), at("2026-11-08T12:00:00Z"));
        assert_eq!(first(at("2026-11-20T10:00:00Z")), at("2026-11-20T10:00:00Z"));
        assert_eq!(first(at("2026-11-20T10:00:00.001Z")), at("2026-11-20T11:00:00Z"));

        let kept = |since: &str| {
            let countable = first(Timestamp::MIN).as_millisecond();
            let since = kept_since(at(since).as_millisecond(), countable, now);
            (Timestamp::from_millisecond(since).unwrap(), uncounted_hours(since, countable, now))
        };
        assert_eq!(kept("1970-01-01"), (at("2026-11-08T12:00:00Z"), 0));
        assert_eq!(kept("2026-11-10T12:00:00Z"), (at("2026-11-10T12:00:00Z"), 48));
        // The migration leaves the hour that is not over.
        assert_eq!(kept("2026-11-22T13:00:00Z"), (at("2026-11-22T13:00:00Z"), 14 * 24));
        // A clock was a year ahead.
        assert_eq!(kept("2027-11-22T13:00:00Z"), (at("2026-11-22T13:00:00Z"), 14 * 24));
    }
}
