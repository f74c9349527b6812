//! Maps the columns of CSV to the fields of an event, as the first line names them. The cutter of `csv` calls it. It
//! decides whether lines in quotation marks are one record, and turns a record into JSON. It must not guess: a name
//! that is unknown is reported and its column ignored.

use pisync_core::event_fields::{EVENT_FIELDS, EventField, FieldKind};
use serde_json::{Number, Value, value::RawValue};

use crate::{
    csv_row::{Cell, Reading, Row, ends_line},
    import::{ImportError, records::Record},
};

/// When a server received the event. This column exists besides the event's own fields.
const CREATED_AT: EventField =
    EventField { name: "created_at", kind: FieldKind::Text, is_required: false };
/// Columns of exports that are not read, because the database assigns new values to both.
const NOT_READ: [&str; 2] = ["id", "updated_at"];

/// The columns that are read.
fn readable() -> impl Iterator<Item = EventField> {
    EVENT_FIELDS.into_iter().chain([CREATED_AT])
}

/// The required columns: a line without them is no event.
fn required() -> impl Iterator<Item = EventField> {
    EVENT_FIELDS.into_iter().filter(|field| field.is_required)
}

fn names(fields: &[EventField]) -> String {
    let names: Vec<_> = fields.iter().map(|field| field.name).collect();
    names.join(", ")
}

/// Separators of other CSV dialects, with their names.
const OTHER_SEPARATORS: [(char, &str); 3] =
    [(';', "semicolons"), ('\t', "tabs"), ('|', "vertical bars")];

/// The columns that a first line names.
#[derive(Default)]
pub(super) struct Columns {
    /// The field of each column; `None` for an unknown column.
    pub(super) known: Vec<Option<EventField>>,
    pub(super) names: ColumnNames,
}

/// Unusual names of columns.
#[derive(Debug, Clone, Default)]
pub struct ColumnNames {
    /// Names that are unknown.
    pub ignored: Vec<String>,
    /// Names that are known, but differ in capital letters.
    pub capital: Vec<String>,
}

impl Columns {
    /// Reads the first line.
    pub(super) fn read(row: &Row, line: &[u8]) -> Result<Self, ImportError> {
        let mut columns = Self::default();
        for cell in row.cells() {
            let name = std::str::from_utf8(cell).map_err(|_| no_events())?.trim();
            let is_name = |known: &str| known.eq_ignore_ascii_case(name);
            let column = readable().find(|field| is_name(field.name));
            if let Some(field) = column {
                if columns.known.contains(&column) {
                    return Err(ImportError(format!("there are two columns {}", field.name)));
                }
                if field.name != name {
                    columns.names.capital.push(name.to_owned());
                }
            } else if !NOT_READ.into_iter().any(is_name) {
                // It is shown on a terminal, which must not obey it.
                columns.names.ignored.push(name.escape_debug().to_string());
            }
            columns.known.push(column);
        }
        let is_missing = |field: &EventField| !columns.known.contains(&Some(*field));
        let missing: Vec<_> = required().filter(is_missing).collect();
        if missing.is_empty() {
            return Ok(columns);
        }
        if let Some(separator) = other_separator(line) {
            return Err(ImportError(format!(
                "its cells are separated by {separator}; PiSync reads cells that are separated by commas"
            )));
        }
        if missing.len() == required().count() {
            return Err(no_events());
        }
        let missing = names(&missing);
        Err(ImportError(format!(
            "its first line does not name the columns {missing}; add them to it"
        )))
    }

    /// Whether several lines are certainly one record.
    pub(super) fn is_one(&self, row: &Row, text: &[u8]) -> bool {
        let may_have_lines = |(column, (place, cell)): (&Option<EventField>, (&Cell, &[u8]))| {
            !place.has_lines
                || match column.map(|field| field.kind) {
                    // An unknown column is not read, so it may contain anything.
                    None => true,
                    Some(FieldKind::Object) => serde_json::from_slice::<&RawValue>(cell).is_ok(),
                    Some(FieldKind::Text | FieldKind::Number) => false,
                }
        };
        let cells = row.cells.iter().zip(row.cells());
        let mut lines = text.split(|byte| ends_line(*byte)).skip(1);
        row.cells.len() == self.known.len()
            && !text.contains(&0)
            && self.known.iter().zip(cells).all(may_have_lines)
            && !lines.any(|line| self.could_be_event(line))
    }

    /// Whether a line, read by itself, has everything that an event must have.
    fn could_be_event(&self, line: &[u8]) -> bool {
        let mut row = Row::default();
        if row.read(line) == Reading::Open {
            row.cells.push(Cell { end: row.bytes.len(), has_lines: false });
        }
        let is_there = |field: EventField, cell: &[u8]| match (field.name, field.kind) {
            ("timestamp", _) => cell.first().is_some_and(u8::is_ascii_digit),
            (_, FieldKind::Number) => serde_json::from_slice::<Number>(cell).is_ok(),
            (_, FieldKind::Text | FieldKind::Object) => !cell.is_empty(),
        };
        let has = self.known.iter().zip(row.cells()).filter(|(column, cell)| {
            column.is_some_and(|field| field.is_required && is_there(field, cell))
        });
        has.count() == required().count()
    }

    /// Turns a line into the JSON object that a client would have sent. An empty cell is an absent field.
    pub(super) fn record(&self, row: &Row) -> Record {
        if row.cells.len() > self.known.len() {
            return Record::wrong("has more cells than the first line", &row.text());
        }
        let mut text = String::from("{");
        for (column, cell) in self.known.iter().zip(row.cells()) {
            let Ok(cell) = std::str::from_utf8(cell) else {
                return Record::wrong("must be valid UTF-8 text", &row.text());
            };
            let Some(column) = column.filter(|_| !cell.is_empty()) else { continue };
            if text.len() > 1 {
                text.push(',');
            }
            text.push_str(&format!("\"{}\":{}", column.name, value(column.kind, cell)));
        }
        text.push('}');
        Record::event(text.into_bytes())
    }
}

/// The separator of a first line that names columns without using commas.
fn other_separator(line: &[u8]) -> Option<&'static str> {
    let line = String::from_utf8_lossy(line);
    let names_columns = |separator: char| {
        let mut names = line.split(separator).map(|name| name.trim().trim_matches('"'));
        names.any(|name| required().any(|field| field.name.eq_ignore_ascii_case(name)))
    };
    let found = OTHER_SEPARATORS
        .into_iter()
        .find(|(separator, _)| line.contains(*separator) && names_columns(*separator));
    found.map(|(_, name)| name)
}

pub(super) fn no_events() -> ImportError {
    ImportError(format!(
        "it holds no sync events: expected one JSON object per line, a JSON array, or CSV whose first line names the columns {} and perhaps others",
        names(&required().collect::<Vec<_>>())
    ))
}

/// Turns a cell into JSON. A cell that should be a number or an object, but is neither, becomes text and is refused as
/// text.
fn value(kind: FieldKind, cell: &str) -> String {
    let is_json = match kind {
        FieldKind::Text => false,
        FieldKind::Number => serde_json::from_str::<Number>(cell).is_ok(),
        FieldKind::Object => serde_json::from_str::<&RawValue>(cell).is_ok(),
    };
    if is_json { cell.to_owned() } else { Value::from(cell).to_string() }
}
