//! What `device_days` has beside the sums: the range of speeds, durations and bytes. Both stores build their statements
//! from the list of columns here. Days that were aggregated before these columns existed have nulls until
//! `pisync verify --repair` has filled them. Nothing here runs SQL.

/// The largest sum of bytes that is stored. Devices report up to 2^53 bytes a run, so that a thousand runs could exceed
/// what a column holds; a sum stays at this limit.
pub(super) const MOST_BYTES: i64 = (1 << 62) - 1;

/// The largest values of a single event: the speed in hundredths of Mbps, the duration in milliseconds, and the bytes. What
/// foreign SQL wrote beyond counts as unknown; a sum of such numbers would fail.
pub(super) const MOST_SPEED: i64 = 9_999_999_999;
pub(super) const MOST_DURATION: i64 = 31_536_000_000;
pub(super) const MOST_EVENT_BYTES: i64 = (1 << 53) - 1;

/// The columns, in the order of [`DayDetails`].
pub(super) const COLUMNS: [&str; 6] =
    ["speed_min", "speed_max", "duration_sum", "duration_count", "duration_max", "bytes_sum"];

/// The columns, with commas between.
pub(super) fn names() -> String {
    COLUMNS.join(", ")
}

/// The columns of events that are to be subtracted. A range cannot be: it stays until the day is counted again.
pub(super) fn negative() -> &'static str {
    "cast(null as bigint), cast(null as bigint), -duration_sum, -duration_count, cast(null as bigint), -bytes_sum"
}

/// The part of an upsert that adds to the columns of an existing row, which the statement calls `stored`. `least` and
/// `greatest` are the names of the store's functions. A day that is not filled stays so.
pub(super) fn add_to_stored(least: &str, greatest: &str) -> String {
    let range = |column: &str, function: &str| {
        format!(
            "{column} = case when stored.duration_count is null then null
                 else {function}(coalesce(stored.{column}, excluded.{column}),
                                 coalesce(excluded.{column}, stored.{column})) end"
        )
    };
    [
        range("speed_min", least),
        range("speed_max", greatest),
        "duration_sum = stored.duration_sum + excluded.duration_sum".to_owned(),
        "duration_count = stored.duration_count + excluded.duration_count".to_owned(),
        range("duration_max", greatest),
        format!(
            "bytes_sum = {greatest}(0, {least}(stored.bytes_sum + excluded.bytes_sum, {MOST_BYTES}))"
        ),
    ]
    .join(", ")
}

/// What the rows of a day add up to, each under the name of its column, given SQL that adds up a column. Rows of
/// `device_days` that are not filled make the result null.
pub(super) fn added_up(sum: impl Fn(&str) -> String) -> String {
    let whole = |column: &str, value: String| {
        format!("case when count(duration_count) = count(*) then {value} end as {column}")
    };
    COLUMNS
        .map(|column| {
            let value = match column {
                "speed_min" => format!("min({column})"),
                "speed_max" | "duration_max" => format!("max({column})"),
                _ => sum(column),
            };
            whole(column, value)
        })
        .join(", ")
}

/// The details of a device's day, or of some of its events. Speeds are in hundredths of Mbps, durations in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DayDetails {
    /// The lowest measured speed; `None` when none was measured.
    pub speed_min: Option<i64>,
    /// The highest measured speed.
    pub speed_max: Option<i64>,
    /// How long the runs took together, as far as that is known.
    pub duration_sum: i64,
    /// The number of runs whose duration is known.
    pub duration_count: i64,
    /// The longest run; `None` when no duration is known.
    pub duration_max: Option<i64>,
    /// The bytes of all runs together, up to 2^62 - 1.
    pub bytes_sum: i64,
}

impl DayDetails {
    /// The details of a single event.
    pub(super) fn of_event(speed: Option<i64>, duration: Option<i64>, bytes: Option<i64>) -> Self {
        let known = |value: Option<i64>, most| value.filter(|value| (0..=most).contains(value));
        let (speed, duration) = (known(speed, MOST_SPEED), known(duration, MOST_DURATION));
        Self {
            speed_min: speed,
            speed_max: speed,
            duration_sum: duration.unwrap_or_default(),
            duration_count: i64::from(duration.is_some()),
            duration_max: duration,
            bytes_sum: known(bytes, MOST_EVENT_BYTES).unwrap_or_default(),
        }
    }

    /// Adds those of other events.
    pub(super) fn add(&mut self, other: &Self) {
        self.speed_min = self.speed_min.into_iter().chain(other.speed_min).min();
        self.speed_max = self.speed_max.max(other.speed_max);
        self.duration_sum = self.duration_sum.saturating_add(other.duration_sum);
        self.duration_count = self.duration_count.saturating_add(other.duration_count);
        self.duration_max = self.duration_max.max(other.duration_max);
        self.bytes_sum = self.bytes_sum.saturating_add(other.bytes_sum).min(MOST_BYTES);
    }

    /// Reads the columns of a day; `None` when the day is not filled. `column` reads the column with a number from 0 on.
    pub(super) fn read<E>(
        column: impl Fn(usize) -> Result<Option<i64>, E>,
    ) -> Result<Option<Self>, E> {
        let Some(duration_count) = column(3)? else { return Ok(None) };
        Ok(Some(Self {
            speed_min: column(0)?,
            speed_max: column(1)?,
            duration_sum: column(2)?.unwrap_or_default(),
            duration_count,
            duration_max: column(4)?,
            bytes_sum: column(5)?.unwrap_or_default(),
        }))
    }

    /// The values, in the order of [`COLUMNS`].
    pub(super) fn values(&self) -> [Option<i64>; COLUMNS.len()] {
        [
            self.speed_min,
            self.speed_max,
            Some(self.duration_sum),
            Some(self.duration_count),
            self.duration_max,
            Some(self.bytes_sum),
        ]
    }

    /// Each value with the name of its column.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, Option<i64>)> {
        COLUMNS.into_iter().zip(self.values())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_read_as_they_are_written_and_a_sum_of_bytes_stays_at_its_limit() {
        let mut day = DayDetails::of_event(Some(450), None, Some(i64::MAX));
        day.add(&DayDetails::of_event(Some(-1), Some(1500), Some(7)));
        day.add(&DayDetails::of_event(Some(20), Some(10), None));
        assert_eq!(day.bytes_sum, 7);
        day.add(&DayDetails { bytes_sum: MOST_BYTES - 1, ..DayDetails::default() });
        let expected = DayDetails {
            speed_min: Some(20),
            speed_max: Some(450),
            duration_sum: 1510,
            duration_count: 2,
            duration_max: Some(1500),
            bytes_sum: MOST_BYTES,
        };
        assert_eq!(day, expected);
        let values = day.values();
        assert_eq!(DayDetails::read(|column| Ok::<_, ()>(values[column])), Ok(Some(day)));
        assert_eq!(DayDetails::read(|_| Ok::<_, ()>(None)), Ok(None));
    }
}
