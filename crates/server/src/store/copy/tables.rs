//! Lists what is copied: the tables and columns that both stores have, and the form of their rows on the way. `run` and
//! both stores use it. Tables of sums must be listed with all sums.

/// How a column's values look in a [`Row`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Kind {
    /// An integer.
    Integer,
    /// An integer that PostgreSQL stores in 32 bits.
    Integer32,
    /// A text.
    Text,
    /// Bytes.
    Bytes,
    /// Microseconds since 2000-01-01T00:00Z, as PostgreSQL counts them.
    Time,
    /// Days since 1970-01-01.
    Day,
    /// A decimal fraction, as an integer in units of its last decimal. The number of decimals is given.
    Decimal(u32),
    /// 1 for yes, 0 for no.
    Boolean,
}

/// A column, by its name on PostgreSQL.
#[derive(Debug)]
pub(in crate::store) struct Column {
    pub(in crate::store) name: &'static str,
    pub(in crate::store) kind: Kind,
}

/// A table, which has the same name in both stores.
#[derive(Debug)]
pub(in crate::store) struct Table {
    pub(in crate::store) name: &'static str,
    pub(in crate::store) columns: &'static [Column],
    pub(in crate::store) rows: Rows,
}

/// What is special about a table's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Rows {
    /// Nothing special.
    Plain,
    /// Their first column is an id that is never assigned twice.
    Numbered,
    /// Sums of events, which must match what is aggregated.
    Sums,
    /// There is one row, which migrations have made.
    Single,
}

const fn table(name: &'static str, rows: Rows, columns: &'static [Column]) -> Table {
    Table { name, columns, rows }
}

pub(super) const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind }
}

/// Tables that are not copied but made anew from the others.
pub(in crate::store) const REBUILT: &[&str] = &[
    "device_summaries",
    "device_counts",
    "stale_summaries",
    "fleet_totals",
    "device_digest",
    "device_states",
];

/// Everything that is copied, in an order in which each row finds the rows that it refers to.
///
/// Some tables are not copied. The destination has its own `pisync_migrations`. `pisync_take_over` does not apply,
/// because the copy was never the Node service's. The stores count differently how far events are aggregated (see
/// [`super::Sums`]). The announcement that old events end concerns only running servers.
pub(in crate::store) const TABLES: &[Table] = &[
    table(
        "devices",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("device_id", Kind::Text),
            column("created_at", Kind::Time),
            column("updated_at", Kind::Time),
            column("name", Kind::Text),
            column("group", Kind::Text),
        ],
    ),
    table(
        "device_jobs",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("job", Kind::Text),
            column("total_syncs", Kind::Integer),
            column("failed_syncs", Kind::Integer),
            column("total_files_synced", Kind::Integer),
            column("total_errors", Kind::Integer),
            column("speed_sum", Kind::Integer),
            column("speed_count", Kind::Integer),
            column("first_sync", Kind::Time),
            column("last_sync", Kind::Time),
            column("last_success", Kind::Time),
            column("last_failure", Kind::Time),
            column("consecutive_failures", Kind::Integer),
            column("last_received", Kind::Time),
            column("set_aside_until", Kind::Time),
        ],
    ),
    table(
        SYNC_EVENTS,
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("device_id", Kind::Text),
            column("timestamp", Kind::Time),
            column("total_files_synced", Kind::Integer32),
            column("total_errors", Kind::Integer32),
            column("internet_speed", Kind::Decimal(2)),
            column("created_at", Kind::Time),
            column("updated_at", Kind::Time),
            column("job", Kind::Text),
            column("duration_seconds", Kind::Decimal(3)),
            column("bytes_synced", Kind::Integer),
            column("metadata", Kind::Text),
            column("event_id", Kind::Text),
        ],
    ),
    table(
        "device_days",
        Rows::Sums,
        &[
            column("device_id", Kind::Text),
            column("day", Kind::Day),
            column("total_syncs", Kind::Integer),
            column("failed_syncs", Kind::Integer),
            column("total_files_synced", Kind::Integer),
            column("total_errors", Kind::Integer),
            column("speed_sum", Kind::Integer),
            column("speed_count", Kind::Integer),
            column("speed_min", Kind::Integer),
            column("speed_max", Kind::Integer),
            column("duration_sum", Kind::Integer),
            column("duration_count", Kind::Integer),
            column("duration_max", Kind::Integer),
            column("bytes_sum", Kind::Integer),
        ],
    ),
    table(
        "group_changes",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("device_id", Kind::Text),
            column("changed_at", Kind::Time),
            column("changed_id", Kind::Integer),
            column("former_group", Kind::Text),
        ],
    ),
    table(
        "device_day_groups",
        Rows::Sums,
        &[
            column("device_id", Kind::Text),
            column("day", Kind::Day),
            column("group", Kind::Text),
            column("runs", Kind::Integer),
            column("failed_runs", Kind::Integer),
        ],
    ),
    table(
        "group_days",
        Rows::Sums,
        &[
            column("group", Kind::Text),
            column("day", Kind::Day),
            column("runs", Kind::Integer),
            column("failed_runs", Kind::Integer),
            column("most_failing", Kind::Integer),
            column("most_silent", Kind::Integer),
            column("most_degraded", Kind::Integer),
        ],
    ),
    table(
        "group_hours",
        Rows::Sums,
        &[
            column("group", Kind::Text),
            column("hour", Kind::Time),
            column("runs", Kind::Integer),
            column("failed_runs", Kind::Integer),
            column("most_failing", Kind::Integer),
            column("most_silent", Kind::Integer),
            column("most_degraded", Kind::Integer),
        ],
    ),
    table(
        "fleet_hours",
        Rows::Sums,
        &[
            column("hour", Kind::Time),
            column("total_syncs", Kind::Integer),
            column("failed_syncs", Kind::Integer),
            column("total_files_synced", Kind::Integer),
            column("total_errors", Kind::Integer),
            column("speed_sum", Kind::Integer),
            column("speed_count", Kind::Integer),
        ],
    ),
    table(
        "roll_up_state",
        Rows::Single,
        &[
            column("raw_since", Kind::Time),
            column("streaks_since", Kind::Time),
            column("group_hours_since", Kind::Time),
        ],
    ),
    table(
        "event_keys",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("event_id", Kind::Text),
            column("id", Kind::Integer),
            column("timestamp", Kind::Time),
            column("created_at", Kind::Time),
        ],
    ),
    table(
        "api_keys",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("hash", Kind::Bytes),
            column("hint", Kind::Text),
            column("name", Kind::Text),
            column("scope", Kind::Text),
            column("device_id", Kind::Text),
            column("group", Kind::Text),
            column("created_at", Kind::Time),
            column("expires_at", Kind::Time),
            column("revoked_at", Kind::Time),
            column("last_used", Kind::Time),
        ],
    ),
    table(
        "device_deletions",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("received_until", Kind::Time),
            column("requested_at", Kind::Time),
            column("via", Kind::Text),
            column("key_id", Kind::Integer),
            column("address", Kind::Text),
            column("deleted_events", Kind::Integer),
        ],
    ),
    table("api_key_changes", Rows::Single, &[column("version", Kind::Integer)]),
    table(
        "audit_log",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("at", Kind::Time),
            column("via", Kind::Text),
            column("key_id", Kind::Integer),
            column("address", Kind::Text),
            column("action", Kind::Text),
            column("subject", Kind::Text),
            column("details", Kind::Text),
        ],
    ),
    table(
        "imports",
        Rows::Plain,
        &[
            column("id", Kind::Bytes),
            column("name", Kind::Text),
            column("head", Kind::Bytes),
            column("records", Kind::Integer),
            column("digest", Kind::Bytes),
            column("rejected", Kind::Integer),
            column("finished", Kind::Boolean),
            column("updated_at", Kind::Time),
        ],
    ),
    table(
        "device_settings",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("policy", Kind::Text),
            column("policy_since", Kind::Time),
            column("paused_from", Kind::Time),
            column("paused_until", Kind::Time),
            column("expected_from", Kind::Time),
            column("is_excused", Kind::Boolean),
            column("note", Kind::Text),
        ],
    ),
    table(
        "device_tags",
        Rows::Plain,
        &[column("device_id", Kind::Text), column("tag", Kind::Text)],
    ),
    table(
        "groups",
        Rows::Plain,
        &[
            column("name", Kind::Text),
            column("policy", Kind::Text),
            column("policy_since", Kind::Time),
            column("paused_from", Kind::Time),
            column("paused_until", Kind::Time),
            column("note", Kind::Text),
        ],
    ),
    table(
        "fleet_state",
        Rows::Single,
        &[
            column("policy", Kind::Text),
            column("policy_since", Kind::Time),
            column("paused_from", Kind::Time),
            column("paused_until", Kind::Time),
            column("version", Kind::Integer),
            column("swept_at", Kind::Time),
            column("alive_at", Kind::Time),
            column("stopped_at", Kind::Time),
        ],
    ),
    table(
        "fleet_changes",
        Rows::Plain,
        &[column("version", Kind::Integer), column("scope", Kind::Text), column("key", Kind::Text)],
    ),
    table(
        "outages",
        Rows::Plain,
        &[
            column("from_at", Kind::Time),
            column("until_at", Kind::Time),
            column("cause", Kind::Text),
            column("node", Kind::Text),
        ],
    ),
    table(
        "windows",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("name", Kind::Text),
            column("scope", Kind::Text),
            column("key", Kind::Text),
            column("effect", Kind::Text),
            column("timezone", Kind::Text),
            column("weekly", Kind::Text),
            column("starts_at", Kind::Time),
            column("ends_at", Kind::Time),
        ],
    ),
    table(
        "device_health",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("group", Kind::Text),
            column("state", Kind::Text),
            column("since", Kind::Time),
            column("problems", Kind::Text),
            column("is_expected", Kind::Boolean),
            column("is_overdue", Kind::Boolean),
            column("is_behind", Kind::Boolean),
            column("silent_after", Kind::Integer),
            column("grace", Kind::Integer),
            column("due_at", Kind::Time),
            column("late_at", Kind::Time),
            column("check_at", Kind::Time),
            column("patience", Kind::Integer),
            column("behind_after", Kind::Integer),
            column("next_due", Kind::Time),
            column("waiting_since", Kind::Time),
            column("heard_at", Kind::Time),
            column("policy_version", Kind::Integer),
        ],
    ),
    table(
        "unreconciled_devices",
        Rows::Plain,
        &[
            column("group", Kind::Text),
            column("device_id", Kind::Text),
            column("state", Kind::Text),
        ],
    ),
    table(
        "job_health",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("job", Kind::Text),
            column("is_expected", Kind::Boolean),
            column("state", Kind::Text),
            column("reason", Kind::Text),
            column("since", Kind::Time),
            column("next_due", Kind::Time),
            column("waiting_since", Kind::Time),
            column("heard_at", Kind::Time),
            column("seen_failures", Kind::Integer),
            column("seen_failed", Kind::Integer),
        ],
    ),
    table(
        "group_states",
        Rows::Plain,
        &[
            column("group", Kind::Text),
            column("state", Kind::Text),
            column("devices", Kind::Integer),
            column("expected", Kind::Integer),
        ],
    ),
    table(
        "state_changes",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("at", Kind::Time),
            column("device_id", Kind::Text),
            column("from", Kind::Text),
            column("to", Kind::Text),
            column("reason", Kind::Text),
        ],
    ),
    table(
        "run_starts",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("job", Kind::Text),
            column("run_id", Kind::Text),
            column("received_at", Kind::Time),
            column("timestamp", Kind::Time),
            column("due_at", Kind::Time),
        ],
    ),
    table(
        "incidents",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("scope", Kind::Text),
            column("subject", Kind::Text),
            column("group", Kind::Text),
            column("kind", Kind::Text),
            column("severity", Kind::Text),
            column("since", Kind::Time),
            column("opened_at", Kind::Time),
            column("resolved_at", Kind::Time),
            column("resolution", Kind::Text),
            column("acknowledged_at", Kind::Time),
            column("acknowledged_by", Kind::Text),
            column("acknowledged_until", Kind::Time),
            column("acknowledged_note", Kind::Text),
            column("reopened", Kind::Integer),
            column("reopenings", Kind::Text),
            column("flapping_since", Kind::Time),
            column("calm_at", Kind::Time),
            column("next_at", Kind::Time),
            column("summary", Kind::Text),
        ],
    ),
    table(
        "incident_members",
        Rows::Plain,
        &[
            column("incident", Kind::Integer),
            column("device_id", Kind::Text),
            column("jobs", Kind::Text),
            column("joined_at", Kind::Time),
            column("left_at", Kind::Time),
            column("presumed", Kind::Boolean),
        ],
    ),
    table(
        "incident_entries",
        Rows::Plain,
        &[
            column("incident", Kind::Integer),
            column("id", Kind::Integer),
            column("at", Kind::Time),
            column("what", Kind::Text),
            column("by", Kind::Text),
            column("details", Kind::Text),
        ],
    ),
    table(
        "channels",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("name", Kind::Text),
            column("kind", Kind::Text),
            column("config", Kind::Text),
            column("secrets", Kind::Bytes),
            column("is_enabled", Kind::Boolean),
            column("is_default", Kind::Boolean),
            column("template", Kind::Text),
            column("created_at", Kind::Time),
            column("failures", Kind::Integer),
            column("failing_since", Kind::Time),
            column("last_error", Kind::Text),
            column("next_send_at", Kind::Time),
            column("lease", Kind::Text),
            column("leased_until", Kind::Time),
        ],
    ),
    table(
        "routes",
        Rows::Plain,
        &[column("position", Kind::Integer32), column("route", Kind::Text)],
    ),
    table(
        "notify_state",
        Rows::Single,
        &[column("id", Kind::Integer32), column("version", Kind::Integer)],
    ),
    table(
        "notifications",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("channel", Kind::Integer),
            column("kind", Kind::Text),
            column("group", Kind::Text),
            column("state", Kind::Text),
            column("created_at", Kind::Time),
            column("due_at", Kind::Time),
            column("frozen_at", Kind::Time),
            column("content_type", Kind::Text),
            column("body", Kind::Bytes),
            column("plain", Kind::Bytes),
            column("attempts", Kind::Integer),
            column("refusals", Kind::Integer),
            column("last_attempt_at", Kind::Time),
            column("last_error", Kind::Text),
            column("ended_at", Kind::Time),
        ],
    ),
    table(
        "notification_items",
        Rows::Plain,
        &[
            column("notification", Kind::Integer),
            column("incident", Kind::Integer),
            column("what", Kind::Text),
            column("at", Kind::Time),
        ],
    ),
];

pub(in crate::store) const SYNC_EVENTS: &str = "sync_events";

/// A value of a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum Value {
    Null,
    /// A number, or what its [`Kind`] counts.
    Integer(i64),
    Text(String),
    Bytes(Vec<u8>),
}

/// A row's values, in the order of the requested columns.
pub(in crate::store) type Row = Vec<Value>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Sums;

    #[test]
    fn tables_of_sums_are_copied_with_all_sums() {
        for name in ["device_jobs", "device_days", "fleet_hours"] {
            let table = TABLES.iter().find(|table| table.name == name).unwrap();
            let columns: Vec<_> = table.columns.iter().map(|column| column.name).collect();
            let has_sums = columns.windows(Sums::COUNT).any(|columns| columns == Sums::COLUMNS);
            assert!(has_sums, "{name}: {columns:?}");
        }
    }
}
