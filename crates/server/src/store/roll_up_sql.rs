//! SQL about the tables of sums that both stores build alike: how the rows of each table follow from events, to which group
//! an event belongs, and what a table has too much or too little. Nothing here runs SQL.

use super::{
    Sums,
    day_details::{self, MOST_BYTES},
};

/// What differs between the stores.
pub(super) struct Dialect {
    /// The column that names a device in all tables but `devices`.
    pub(super) device: &'static str,
    /// The same column of `devices`.
    pub(super) device_key: &'static str,
    /// The day of a row of `sync_events`.
    pub(super) day: &'static str,
    /// The full hour of a row of `sync_events`.
    pub(super) hour: &'static str,
    /// The date of a row of `sync_events`, by which it is not to be looked for in the order of devices.
    pub(super) date: &'static str,
    /// Joins the events of the days in `touched`.
    pub(super) join_events_of_touched: &'static str,
    /// The condition that an event is aggregated.
    pub(super) aggregated: &'static str,
    /// The condition that an event is not aggregated yet.
    pub(super) not_aggregated: &'static str,
    /// The name of the function that answers the smaller of two values.
    pub(super) least: &'static str,
    /// Follows a sum, so that it is an integer of 64 bits.
    pub(super) integer: &'static str,
    /// The runs and the failed runs of some events.
    pub(super) event_runs: &'static str,
    /// The sums of some events, in the order of [`Sums::COLUMNS`].
    pub(super) event_sums: fn() -> String,
    /// The details of some events, in the order of [`day_details::COLUMNS`].
    pub(super) event_details: fn() -> String,
    /// Adds up a column of bytes. The result may exceed [`MOST_BYTES`].
    pub(super) bytes_total: fn(&str) -> String,
}

/// The end of an upsert that adds runs to a row, which the statement calls `stored`.
pub(super) const ADD_RUNS: &str = "
    do update set runs = stored.runs + excluded.runs, failed_runs = stored.failed_runs + excluded.failed_runs
";

/// How the rows of a table follow from events.
pub(super) struct TableOfSums {
    pub(super) name: &'static str,
    /// The columns of the key.
    pub(super) key: String,
    /// The key of an event.
    pub(super) of_event: String,
    /// The columns behind the key.
    pub(super) columns: String,
    /// Their values, to be subtracted.
    pub(super) negative: String,
    /// Their values for some events.
    pub(super) event_sums: String,
    /// Their values for some rows, each under the name of its column.
    added_up: String,
    /// Which events count.
    counted: String,
}

impl TableOfSums {
    /// The positions of the columns of the key, for `group by`.
    pub(super) fn key_positions(&self) -> String {
        let columns = self.key.split(", ").count();
        (1..=columns).map(|position| position.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// Selects what the events add up to that match `condition`.
    pub(super) fn of_events(&self, condition: &str) -> String {
        let Self { of_event, event_sums, counted, .. } = self;
        let positions = self.key_positions();
        format!(
            "select {of_event}, {event_sums}
               from sync_events
              where {condition} and {counted}
              group by {positions}"
        )
    }
}

impl Dialect {
    /// The table of this name.
    pub(super) fn table(&self, name: &'static str) -> TableOfSums {
        let Self { device, day, hour, integer, .. } = *self;
        let sum = |column: &str| format!("sum({column}){integer} as {column}");
        let sums = |key: String, of_event| TableOfSums {
            name,
            key,
            of_event,
            columns: Sums::names(),
            negative: Sums::negative(),
            event_sums: (self.event_sums)(),
            added_up: Sums::sql(sum),
            counted: "true".to_owned(),
        };
        let runs = |key: String, of_event, counted: &str| TableOfSums {
            name,
            key,
            of_event,
            columns: "runs, failed_runs".to_owned(),
            negative: "-runs, -failed_runs".to_owned(),
            event_sums: self.event_runs.to_owned(),
            added_up: [sum("runs"), sum("failed_runs")].join(", "),
            counted: counted.to_owned(),
        };
        let group = self.group_of_event();
        match name {
            "device_days" => {
                let days = sums(format!("{device}, day"), format!("{device}, {day}"));
                let of_days = |column: &str| match column {
                    "bytes_sum" => {
                        let total = (self.bytes_total)(column);
                        format!("{}({total}, {MOST_BYTES}){integer}", self.least)
                    }
                    _ => format!("sum({column}){integer}"),
                };
                TableOfSums {
                    columns: format!("{}, {}", days.columns, day_details::names()),
                    negative: format!("{}, {}", days.negative, day_details::negative()),
                    event_sums: format!("{}, {}", days.event_sums, (self.event_details)()),
                    added_up: format!("{}, {}", days.added_up, day_details::added_up(of_days)),
                    ..days
                }
            }
            "device_day_groups" => runs(
                format!(r#"{device}, day, "group""#),
                format!("{device}, {day}, {group}"),
                &self.has_moved(),
            ),
            "group_days" => runs(r#""group", day"#.to_owned(), format!("{group}, {day}"), "true"),
            "group_hours" => runs(
                r#""group", hour"#.to_owned(),
                format!("{group}, {hour}"),
                "timestamp >= (select group_hours_since from roll_up_state)",
            ),
            _ => sums("hour".to_owned(), hour.to_owned()),
        }
    }

    /// SQL for the rows of a table, as if exactly the events received up to `until` were aggregated; without `until`, all
    /// events. It adds the events that are not aggregated yet to the stored rows. It subtracts aggregated events that were
    /// received later than `until`. Ranges of values cannot be subtracted from: days with later events are counted again,
    /// as long as all events are kept.
    pub(super) fn as_of(&self, table: &'static str, until: Option<&str>) -> String {
        let sums = self.sums_as_of(table, until);
        if !["group_days", "group_hours"].contains(&table) {
            return sums;
        }
        // What sweeps have noted does not follow from events.
        let key = self.table(table).key;
        format!(
            "(
                select sums.*, coalesce(noted.most_failing, 0) as most_failing,
                       coalesce(noted.most_silent, 0) as most_silent,
                       coalesce(noted.most_degraded, 0) as most_degraded
                  from {sums} sums
                  left join {table} noted using ({key})
            )"
        )
    }

    fn sums_as_of(&self, table: &'static str, until: Option<&str>) -> String {
        const ALL_KEPT: &str = "(select raw_since is null from roll_up_state)";
        let table = self.table(table);
        let Self { device, day, aggregated, not_aggregated, .. } = *self;
        let TableOfSums { name, key, columns, negative, event_sums, added_up, .. } = &table;
        let positions = table.key_positions();
        let stored = |condition: &str| format!("select {key}, {columns} from {name} {condition}");
        let added_up = |parts: &[String]| {
            let parts = parts.join(" union all ");
            format!("select {key}, {added_up} from ({parts}) parts group by {positions}")
        };
        let Some(until) = until else {
            return format!("({})", added_up(&[stored(""), table.of_events(not_aggregated)]));
        };
        let not_aggregated = format!("{not_aggregated} and created_at <= {until}");
        let later = format!("{aggregated} and created_at > {until}");
        let subtracted = |condition: &str| {
            let events = table.of_events(condition);
            format!(
                "select * from (
                     with later ({key}, {columns}) as ({events}) select {key}, {negative} from later
                 ) subtracted"
            )
        };
        if *name != "device_days" {
            let parts = [stored(""), table.of_events(&not_aggregated), subtracted(&later)];
            return format!("({})", added_up(&parts));
        }
        const TOUCHED: &str = "(select * from touched)";
        let join = self.join_events_of_touched;
        let counted_again = format!(
            "select touched.{device}, touched.day, {event_sums}
               from touched {join}
              where created_at <= {until}
              group by 1, 2"
        );
        let parts = [
            stored(&format!("where ({device}, day) not in {TOUCHED}")),
            table.of_events(&format!("{not_aggregated} and ({device}, {day}) not in {TOUCHED}")),
            counted_again,
            subtracted(&format!("{later} and not {ALL_KEPT}")),
        ];
        format!(
            "(
                with touched ({device}, day) as materialized (
                    select distinct {device}, {day} from sync_events where {later} and {ALL_KEPT}
                )
                {}
            )",
            added_up(&parts)
        )
    }

    /// SQL for the group to which a row of `sync_events` belongs: the former group of the first move after the event, or
    /// the device's group now. A move says by time what came before it. What SQLite had aggregated by then is recognized
    /// by its id, so that a clock that was ahead changes no group's past. Both only rise from move to move, so each index
    /// finds the first one.
    pub(super) fn group_of_event(&self) -> String {
        let Self { device, device_key, least, .. } = *self;
        let first_move = |column: &str, of_event: &str| {
            format!(
                "coalesce(
                     (select id
                        from group_changes later
                       where later.{device} = sync_events.{device} and later.{column} > sync_events.{of_event}
                       order by later.{column}, later.id
                       limit 1),
                     9223372036854775807)"
            )
        };
        let (by_time, by_id) =
            (first_move("changed_at", "created_at"), first_move("changed_id", "id"));
        format!(
            r#"coalesce(
                (select former_group from group_changes move where move.id = {least}({by_time}, {by_id})),
                (select "group" from devices where devices.{device_key} = sync_events.{device}),
                '')"#
        )
    }

    /// SQL for the group in which a device was at first, given SQL that names the device.
    pub(super) fn first_group_of(&self, device: &str) -> String {
        let column = self.device;
        format!(
            r#"coalesce(
                (select former_group
                   from group_changes move
                  where move.{column} = {device}
                  order by move.changed_id, move.id
                  limit 1),
                (select "group" from devices where devices.{} = {device}),
                '')"#,
            self.device_key
        )
    }

    /// The condition that a row of `sync_events` counts in `device_day_groups`.
    fn has_moved(&self) -> String {
        let device = self.device;
        let (group, first) =
            (self.group_of_event(), self.first_group_of(&format!("sync_events.{device}")));
        format!("{device} in (select {device} from group_changes) and {group} <> {first}")
    }

    /// The statement that adds the events of `source`, the rest of a `from` clause with a condition, to
    /// `device_day_groups`, or subtracts them with the `sign` "-". The source is called `sync_events`.
    pub(super) fn add_day_groups_of(&self, source: &str, sign: &str) -> String {
        let Self { device, day, event_runs, .. } = *self;
        let (group, first) =
            (self.group_of_event(), self.first_group_of(&format!("sync_events.{device}")));
        format!(
            r#"insert into device_day_groups as stored ({device}, day, "group", runs, failed_runs)
               with counted ({device}, day, of_group, first_group, runs, failed_runs) as materialized (
                   select {device}, {day}, {group} as of_group, {first} as first_group, {event_runs}
                     from {source} and {device} in (select {device} from group_changes)
                    group by 1, 2, 3, 4
               )
               select {device}, day, of_group, {sign}runs, {sign}failed_runs
                 from counted
                where of_group <> first_group
                order by 1, 2, 3
                   on conflict ({device}, day, "group") {ADD_RUNS}"#
        )
    }

    /// SQL for the days of devices with the group to which they belong: of_group, day, runs, failed_runs. `condition`
    /// chooses `days` by their device.
    pub(super) fn group_days_of(&self, condition: &str) -> String {
        let first = self.first_group_of(&format!("days.{}", self.device));
        format!(
            r#"select {first} as of_group, day, total_syncs as runs, failed_syncs as failed_runs
                 from device_days days {condition}
                union all
               select {first}, day, -runs, -failed_runs from device_day_groups days {condition}
                union all
               select "group", day, runs, failed_runs from device_day_groups days {condition}"#
        )
    }

    /// What a table of groups must have, by the events that are aggregated and, for `group_days`, by the days of devices.
    /// Of hours, only those from `since` on are compared, which is SQL.
    pub(super) fn derived(&self, table: DerivedTable, since: Option<&str>) -> Derived {
        let Self { aggregated, date, integer, .. } = *self;
        let table = self.table(table.name());
        let expected = if table.name == "group_days" {
            format!(
                "select of_group, day, sum(runs){integer}, sum(failed_runs){integer}
                   from ({}) days
                  group by 1, 2",
                self.group_days_of("")
            )
        } else {
            let from = since.map(|since| format!(" and {date} >= {since}"));
            table.of_events(&format!("{aggregated}{}", from.unwrap_or_default()))
        };
        let compared = since.map(|since| format!("where hour >= {since}")).unwrap_or_default();
        Derived { table, expected, compared, integer }
    }
}

/// The tables of groups, in the order in which they are repaired: days are made from the days of devices that moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DerivedTable {
    /// The days of devices that moved.
    DayGroups,
    /// The days of groups.
    Days,
    /// The hours of groups.
    Hours,
}

impl DerivedTable {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::DayGroups, Self::Days, Self::Hours];

    fn name(self) -> &'static str {
        match self {
            Self::DayGroups => "device_day_groups",
            Self::Days => "group_days",
            Self::Hours => "group_hours",
        }
    }
}

/// A table of groups, and what it must have.
pub(super) struct Derived {
    table: TableOfSums,
    expected: String,
    /// Which rows are compared.
    compared: String,
    integer: &'static str,
}

impl Derived {
    /// The number of columns of a row.
    pub(super) fn columns(&self) -> usize {
        self.table.key.split(", ").count() + 2
    }

    /// SQL for the rows that differ: their keys, and what must be added to their runs and failed runs.
    pub(super) fn differences(&self) -> String {
        let Self { table: TableOfSums { name, key, .. }, expected, compared, integer } = self;
        format!(
            "with expected ({key}, runs, failed_runs) as ({expected})
             select {key}, sum(runs){integer} as runs, sum(failed_runs){integer} as failed_runs
               from (
                   select {key}, runs, failed_runs from expected
                   union all
                   select {key}, -runs, -failed_runs from {name} {compared}
               ) differences
              group by {key}
             having sum(runs) <> 0 or sum(failed_runs) <> 0"
        )
    }

    /// The statement that adds to rows. `source` has a row's values, or selects rows.
    pub(super) fn correct(&self, source: &str) -> String {
        let TableOfSums { name, key, .. } = &self.table;
        format!(
            "insert into {name} as stored ({key}, runs, failed_runs) {source}
                 on conflict ({key}) {ADD_RUNS}"
        )
    }

    /// The columns of the key.
    pub(super) fn key(&self) -> &str {
        &self.table.key
    }
}
