//! The SQL that answers a scan's requests from the indexes of `device_summaries`, `device_states` and `devices`. It is the same for both
//! stores but for what [`Dialect`] names. The stores bind the parameters and read the rows.

use std::collections::HashMap;

use super::{
    Device, DeviceQuery, DeviceSort, GroupFilter,
    device_states::StateOrder,
    devices::like_pattern,
    ordered_scan::{Direction, KeyPart, Part, Place, Request},
    summaries::SummaryOrder,
};

/// Up to this many devices of a group are sorted in memory. A larger group is found in the order of the entire fleet,
/// where its devices are frequent enough.
pub(super) const SORTED_IN_MEMORY: u32 = 5_000;

/// Devices that a filter finds are counted up to this number.
pub(super) const COUNTED: u32 = 10_000;

/// What differs between the stores.
pub(super) struct Dialect {
    /// Begins the number of a parameter.
    pub(super) placeholder: char,
    /// Compares texts without regard to the case of ASCII letters.
    pub(super) like: &'static str,
    /// Joins a row `s` of `device_summaries` or `device_states` with its device `d`.
    pub(super) device_of_row: &'static str,
    /// When a device `d` was first seen, as a number.
    pub(super) created_at: &'static str,
    /// A parameter with such a number, as `d.created_at` is stored.
    pub(super) time: fn(&str) -> String,
    /// What names a device `d`, and the column in which other tables have the same.
    pub(super) device: (&'static str, &'static str),
    /// The condition of the index of overdue devices.
    pub(super) is_overdue: &'static str,
}

/// A statement and its parameters.
#[derive(Debug)]
pub(super) struct Statement {
    pub(super) sql: String,
    pub(super) parameters: Vec<KeyPart>,
    placeholder: char,
}

impl Statement {
    fn new(dialect: &Dialect) -> Self {
        Self { sql: String::new(), parameters: Vec::new(), placeholder: dialect.placeholder }
    }

    /// Adds a parameter, and answers how the text names it.
    fn bind(&mut self, value: KeyPart) -> String {
        self.parameters.push(value);
        format!("{}{}", self.placeholder, self.parameters.len())
    }
}

/// Which devices of a list to leave out.
#[derive(Debug, Clone, Default)]
pub(super) struct Filter {
    /// A pattern for the id or the name.
    search: Option<String>,
    group: Option<GroupFilter>,
    tag: Option<String>,
    /// The states, if not all of them are meant.
    states: Vec<&'static str>,
    is_overdue: bool,
    /// The smallest first part of the key.
    least: Option<i64>,
}

impl Filter {
    pub(super) fn of(query: &DeviceQuery) -> Self {
        Self {
            search: query.search.as_deref().map(like_pattern),
            group: query.group.clone(),
            tag: query.tag.clone(),
            states: query.states.iter().map(|state| state.as_str()).collect(),
            is_overdue: query.is_overdue,
            least: None,
        }
    }

    /// Only devices with at least this number.
    pub(super) fn at_least(least: i64) -> Self {
        Self { least: Some(least), ..Self::default() }
    }

    pub(super) fn is_none(&self) -> bool {
        self.search.is_none() && !self.has_index()
    }

    /// Whether an index finds the devices.
    pub(super) fn has_index(&self) -> bool {
        self.group.is_some() || self.tag.is_some() || !self.states.is_empty() || self.is_overdue
    }

    /// Whether a changed device belongs to the list, by the first part of its key.
    pub(super) fn takes(&self, place: &Place) -> bool {
        let first = place.key.as_ref().and_then(|key| key.first());
        self.least.is_none_or(|least| first >= Some(&KeyPart::Number(least)))
    }

    /// The condition on devices `d`, which follows another one.
    pub(super) fn condition(&self, dialect: &Dialect, statement: &mut Statement) {
        if let Some(search) = &self.search {
            let pattern = statement.bind(KeyPart::Text(search.clone()));
            let like = dialect.like;
            statement.sql.push_str(&format!(
                r" and (d.device_id {like} {pattern} escape '\' or d.name {like} {pattern} escape '\')"
            ));
        }
        match &self.group {
            Some(GroupFilter::Named(group)) => {
                let group = statement.bind(KeyPart::Text(group.to_string()));
                statement.sql.push_str(&format!(r#" and d."group" = {group}"#));
            }
            Some(GroupFilter::Ungrouped) => statement.sql.push_str(r#" and d."group" is null"#),
            None => {}
        }
        let (device, column) = dialect.device;
        if let Some(tag) = &self.tag {
            let tag = statement.bind(KeyPart::Text(tag.clone()));
            statement.sql.push_str(&format!(
                " and {device} in (select t.{column} from device_tags t where t.tag = {tag})"
            ));
        }
        if !self.states.is_empty() {
            let states: Vec<_> = self
                .states
                .iter()
                .map(|state| statement.bind(KeyPart::Text((*state).to_owned())))
                .collect();
            statement.sql.push_str(&format!(
                " and {device} in (select h.{column} from device_health h where h.state in ({}))",
                states.join(", ")
            ));
        }
        if self.is_overdue {
            statement.sql.push_str(&format!(
                " and {device} in (select h.{column} from device_health h where {})",
                dialect.is_overdue
            ));
        }
    }
}

/// What a scan goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    DeviceId,
    Name,
    CreatedAt,
    Summary(SummaryOrder),
    State(StateOrder),
}

impl Order {
    pub(super) fn of(sort: DeviceSort) -> Self {
        Self::Summary(match sort {
            DeviceSort::DeviceId => return Self::DeviceId,
            DeviceSort::Name => return Self::Name,
            DeviceSort::CreatedAt => return Self::CreatedAt,
            DeviceSort::Status => return Self::State(StateOrder::Urgency),
            DeviceSort::StatusSince => return Self::State(StateOrder::Since),
            DeviceSort::LastSeen => SummaryOrder::LastSeen,
            DeviceSort::LastSync => SummaryOrder::LastSync,
            DeviceSort::LastSuccess => SummaryOrder::LastSuccess,
            DeviceSort::TotalSyncs => SummaryOrder::TotalSyncs,
            DeviceSort::FailedSyncs => SummaryOrder::FailedSyncs,
            DeviceSort::ConsecutiveFailures => SummaryOrder::ConsecutiveFailures,
        })
    }

    /// The columns to sort by, and what to read of them.
    fn columns(self, dialect: &Dialect) -> (Vec<String>, Vec<String>) {
        let of_row = |columns: &[&str]| {
            let columns: Vec<_> = columns.iter().map(|column| format!("s.{column}")).collect();
            (columns.clone(), columns)
        };
        match self {
            Self::DeviceId => (Vec::new(), Vec::new()),
            Self::Name => (vec!["d.name".to_owned()], vec!["d.name".to_owned()]),
            Self::CreatedAt => {
                (vec!["d.created_at".to_owned()], vec![dialect.created_at.to_owned()])
            }
            Self::Summary(order) => of_row(order.columns()),
            Self::State(order) => of_row(order.columns()),
        }
    }

    /// The table `s` that has the order, if it is not `devices` itself.
    fn table(self) -> Option<&'static str> {
        match self {
            Self::DeviceId | Self::Name | Self::CreatedAt => None,
            Self::Summary(_) => Some("device_summaries"),
            Self::State(_) => Some("device_states"),
        }
    }
}

/// The statement that answers a request: a device id and the parts of its key.
pub(super) fn places(
    order: Order,
    direction: Direction,
    filter: &Filter,
    request: &Request,
    dialect: &Dialect,
) -> Statement {
    if let (Order::State(_), Request::Block { key: None, after, limit }) = (order, request) {
        return without_state(after.as_deref(), *limit, filter, dialect);
    }
    let mut statement = Statement::new(dialect);
    let (columns, read) = order.columns(dialect);
    let id = if order.table().is_some() { "s.device_id" } else { "d.device_id" };
    let from = match order.table() {
        Some(table) if filter.is_none() => format!("{table} s"),
        Some(table) => format!("{table} s join devices d on {}", dialect.device_of_row),
        None => "devices d".to_owned(),
    };
    let read = [&[id.to_owned()][..], &read].concat().join(", ");
    statement.sql = format!("select {read} from {from} where true");
    let value = |statement: &mut Statement, part: &KeyPart| {
        let bound = statement.bind(part.clone());
        if order == Order::CreatedAt { (dialect.time)(&bound) } else { bound }
    };
    let (less, down) = match direction {
        Direction::Ascending => (">", "asc"),
        Direction::Descending => ("<", "desc"),
    };
    let (key, limit) = match request {
        Request::Block { key, limit, .. } | Request::Beyond { key, limit } => (key, limit),
    };
    let is_block = matches!(request, Request::Block { .. });
    match key {
        Some(key) => {
            for_key(&mut statement, &columns, key, is_block, less, value);
        }
        None if is_block => {
            if let Some(column) = columns.first() {
                statement.sql.push_str(&format!(" and {column} is null"));
            }
        }
        None => {}
    }
    if let (Some(least), Some(first)) = (filter.least, columns.first()) {
        let bound = statement.bind(KeyPart::Number(least));
        statement.sql.push_str(&format!(" and {first} >= {bound}"));
        if least > 0 {
            // The indexes of failures have only what is above 0.
            statement.sql.push_str(&format!(" and {first} > 0"));
        }
    }
    if !is_block && columns.len() == 1 {
        statement.sql.push_str(&format!(" and {} is not null", columns[0]));
    }
    // Without a key, the ids themselves have the direction of the list.
    let (behind, of_ids) = if columns.is_empty() { (less, down) } else { (">", "asc") };
    if let Request::Block { after: Some(after), .. } = request {
        let after = statement.bind(KeyPart::Text(after.clone()));
        statement.sql.push_str(&format!(" and {id} {behind} {after}"));
    }
    filter.condition(dialect, &mut statement);
    let by = if is_block {
        format!("{id} {of_ids}")
    } else {
        columns.iter().map(|column| format!("{column} {down}")).collect::<Vec<_>>().join(", ")
    };
    let limit = statement.bind(KeyPart::Number(limit.cast_signed()));
    statement.sql.push_str(&format!(" order by {by} limit {limit}"));
    statement
}

/// The statement that finds devices that no sweep has evaluated yet. It is the end of a list by states. There are few of them,
/// so that it looks at every device.
fn without_state(after: Option<&str>, limit: u64, filter: &Filter, dialect: &Dialect) -> Statement {
    let mut statement = Statement::new(dialect);
    statement.sql = format!(
        "select d.device_id from devices d where not exists (select 1 from device_states s where {})",
        dialect.device_of_row
    );
    if let Some(after) = after {
        let after = statement.bind(KeyPart::Text(after.to_owned()));
        statement.sql.push_str(&format!(" and d.device_id > {after}"));
    }
    filter.condition(dialect, &mut statement);
    let limit = statement.bind(KeyPart::Number(limit.cast_signed()));
    statement.sql.push_str(&format!(" order by d.device_id limit {limit}"));
    statement
}

/// The statement that finds all places in a list by states, where an index finds the devices of `filter`.
pub(super) fn indexed_states(order: StateOrder, filter: &Filter, dialect: &Dialect) -> Statement {
    let mut statement = Statement::new(dialect);
    let columns: Vec<_> = order.columns().iter().map(|column| format!("s.{column}")).collect();
    statement.sql = format!(
        "select d.device_id, {} from devices d left join device_states s on {} where true",
        columns.join(", "),
        dialect.device_of_row
    );
    filter.condition(dialect, &mut statement);
    statement
}

/// The condition on the key: equal to `key`, or behind it.
fn for_key(
    statement: &mut Statement,
    columns: &[String],
    key: &[KeyPart],
    is_equal: bool,
    less: &str,
    value: impl Fn(&mut Statement, &KeyPart) -> String,
) {
    if columns.is_empty() {
        return;
    }
    let values: Vec<_> = key.iter().map(|part| value(statement, part)).collect();
    let operator = if is_equal { "=" } else { less };
    let (columns, values) = (columns.join(", "), values.join(", "));
    statement.sql.push_str(&format!(" and ({columns}) {operator} ({values})"));
}

/// Counts the devices that `filter` finds, up to one more than `most`.
pub(super) fn count(filter: &Filter, most: u32, dialect: &Dialect) -> Statement {
    let mut statement = Statement::new(dialect);
    statement.sql = "select count(*) from (select 1 from devices d where true".to_owned();
    filter.condition(dialect, &mut statement);
    let limit = statement.bind(KeyPart::Number(i64::from(most) + 1));
    statement.sql.push_str(&format!(" limit {limit}) found"));
    statement
}

/// Selects `columns` from devices `d`, and whatever `joins` adds, where `filter` holds.
pub(super) fn filtered(
    columns: &str,
    joins: &str,
    filter: &Filter,
    group_by: &str,
    dialect: &Dialect,
) -> Statement {
    let mut statement = Statement::new(dialect);
    statement.sql = format!("select {columns} from {joins} where true");
    filter.condition(dialect, &mut statement);
    statement.sql.push_str(&format!(" group by {group_by}"));
    statement
}

impl Part {
    /// The part of a list that `query` asks for.
    pub(super) fn of(query: &DeviceQuery) -> Self {
        Self {
            direction: if query.descending { Direction::Descending } else { Direction::Ascending },
            after: query.after.clone(),
            offset: query.offset,
            limit: Some(query.limit),
        }
    }
}

/// The devices at these places, in their order. A device that is gone meanwhile is left out.
pub(super) fn in_order(places: &[Place], devices: Vec<Device>) -> Vec<Device> {
    let found = devices.into_iter().map(|device| (device.device_id.clone(), device));
    let mut found: HashMap<_, _> = found.collect();
    places.iter().filter_map(|place| found.remove(&place.device_id)).collect()
}

/// A device's place in `order`, which is not by states. `key` is asked only for orders by a figure.
pub(super) fn place(
    order: Order,
    device_id: String,
    name: Option<String>,
    created_at: i64,
    key: impl FnOnce(SummaryOrder) -> Option<Vec<KeyPart>>,
) -> Place {
    let key = match order {
        Order::DeviceId => Some(Vec::new()),
        Order::Name => name.map(|name| vec![KeyPart::Text(name)]),
        Order::CreatedAt => Some(vec![KeyPart::Number(created_at)]),
        Order::Summary(order) => key(order),
        Order::State(_) => None,
    };
    Place { key, device_id }
}
