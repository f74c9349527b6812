//! Reads a roster: devices, one a row, as a JSON array, as NDJSON, or as CSV. `PUT /api/devices` and `pisync device import`
//! call it. It names what is wrong in every row, up to a limit.

use std::collections::HashSet;

use pisync_core::{
    DeviceId, Violation, ViolationCode,
    event_stream::{EventSplitter, Format, MAX_EVENT_BYTES, Piece, StreamError},
    text::json_text,
};
use serde_json::{Map, Value};

use crate::{
    api::{
        devices::change::described,
        wire::{error::ApiError, fields::Fields},
    },
    store::{MOST_ROSTER_ROWS, RosterRow},
};

/// The most wrong fields that are named.
const MOST_DETAILS: usize = 100;

/// The columns of a roster in CSV.
const COLUMNS: [&str; 5] = ["device_id", "name", "group", "tags", "note"];

/// How the rows of a roster are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RosterFormat {
    /// A JSON array of objects.
    Array,
    /// One JSON object per line.
    Lines,
    /// A line of names, and a line of cells for each device. Tags are separated by semicolons. An empty cell leaves a
    /// field alone.
    Csv,
}

/// Why a roster is not accepted.
#[derive(Debug)]
pub(crate) enum RosterError {
    /// There are too many rows.
    TooManyRows,
    /// It is not in its format. The text says where.
    Malformed(String),
    /// These fields are wrong.
    Invalid(Vec<Violation>),
}

impl From<RosterError> for ApiError {
    fn from(error: RosterError) -> Self {
        match error {
            RosterError::TooManyRows => Self::TooManyRows(MOST_ROSTER_ROWS),
            RosterError::Malformed(how) => Self::Malformed(how),
            RosterError::Invalid(violations) => Self::Validation(violations),
        }
    }
}

impl From<StreamError> for RosterError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::NotAnArray => {
                let rule = "must be an array; send one device per line as application/x-ndjson";
                Self::Invalid(vec![Violation::of_whole(ViolationCode::Type, rule, None)])
            }
            StreamError::Broken { .. } => Self::Malformed(error.to_string()),
        }
    }
}

/// Reads a roster.
pub(crate) fn read_roster(
    body: &[u8],
    format: RosterFormat,
) -> Result<Vec<RosterRow>, RosterError> {
    let mut rows = Rows::default();
    match format {
        RosterFormat::Array => read_json(body, Format::Array, &mut rows)?,
        RosterFormat::Lines => read_json(body, Format::Lines, &mut rows)?,
        RosterFormat::Csv => read_csv(body, &mut rows)?,
    }
    if rows.violations.is_empty() {
        Ok(rows.rows)
    } else {
        rows.violations.truncate(MOST_DETAILS);
        Err(RosterError::Invalid(rows.violations))
    }
}

/// The rows that were read.
#[derive(Default)]
struct Rows {
    /// How many there were, right and wrong.
    count: usize,
    rows: Vec<RosterRow>,
    listed: HashSet<DeviceId>,
    violations: Vec<Violation>,
}

impl Rows {
    /// Counts a row, and answers its name.
    fn next(&mut self) -> Result<String, RosterError> {
        if self.count >= MOST_ROSTER_ROWS {
            return Err(RosterError::TooManyRows);
        }
        self.count += 1;
        Ok(format!("[{}]", self.count - 1))
    }

    fn refuse(&mut self, row: &str, violations: Vec<Violation>) {
        // Of more, nobody is told.
        if self.violations.len() < MOST_DETAILS {
            let violations = violations.into_iter();
            self.violations.extend(violations.map(|violation| violation.within(row)));
        }
    }

    /// Reads one device.
    fn take(&mut self, row: &str, object: Map<String, Value>) {
        let mut fields = Fields::new(object);
        let device_id = fields.required("device_id", DeviceId::new);
        let change = described(&mut fields);
        if let Some(device_id) = &device_id
            && !self.listed.insert(device_id.clone())
        {
            let sent = Some(Value::from(device_id.as_str()));
            let rule = "must not be listed twice";
            fields.refuse("device_id", ViolationCode::Conflict, rule, sent);
        }
        let violations = fields.into_violations();
        match device_id {
            Some(device_id) if violations.is_empty() => {
                self.rows.push(RosterRow { device_id, change });
            }
            _ => self.refuse(row, violations),
        }
    }

    fn take_json(&mut self, piece: Piece<'_>, format: Format) -> Result<(), RosterError> {
        let row = self.next()?;
        let text = match piece {
            Piece::Event(text) => text,
            Piece::TooLong(_) => {
                let rule = format!("must be at most {MAX_EVENT_BYTES} bytes of JSON text");
                self.refuse(&row, vec![Violation::of_whole(ViolationCode::Length, &rule, None)]);
                return Ok(());
            }
        };
        let parsed = json_text(text)
            .and_then(|text| serde_json::from_str(text).map_err(|error| error.to_string()));
        match parsed {
            Ok(Value::Object(object)) => self.take(&row, object),
            Ok(value) => {
                let rule = "must be of type object";
                let violation = Violation::of_whole(ViolationCode::Type, rule, Some(value));
                self.refuse(&row, vec![violation]);
            }
            Err(how) if format == Format::Lines => {
                let message = format!("Malformed JSON: {how}");
                let code = ViolationCode::MalformedJson;
                self.refuse(&row, vec![Violation::worded("", code, message, None)]);
            }
            Err(how) => return Err(RosterError::Malformed(format!("row {row}: {how}"))),
        }
        Ok(())
    }
}

fn read_json(body: &[u8], format: Format, rows: &mut Rows) -> Result<(), RosterError> {
    let mut splitter = EventSplitter::new(format);
    splitter.push(body, &mut |piece| rows.take_json(piece, format))?;
    splitter.finish(&mut |piece| rows.take_json(piece, format))
}

fn read_csv(body: &[u8], rows: &mut Rows) -> Result<(), RosterError> {
    let text = json_text(body).map_err(RosterError::Malformed)?;
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let malformed = |error: &csv::Error| RosterError::Malformed(error.to_string());
    let columns = reader.headers().map_err(|error| malformed(&error))?.clone();
    let names: Vec<_> = columns.iter().map(str::trim).collect();
    check_columns(&names)?;
    for record in reader.records() {
        let record = record.map_err(|error| malformed(&error))?;
        // A line of commas, as spreadsheets leave behind, is no device.
        if record.iter().all(str::is_empty) {
            continue;
        }
        let row = rows.next()?;
        if record.len() != names.len() {
            let rule = format!("must have {} cells, and has {}", names.len(), record.len());
            rows.refuse(&row, vec![Violation::of_whole(ViolationCode::Format, &rule, None)]);
            continue;
        }
        let cells = names.iter().zip(&record).filter(|(_, cell)| !cell.is_empty());
        let object = cells.map(|(name, cell)| {
            let value = match *name {
                "tags" => {
                    let tags = cell.split(';').map(str::trim).filter(|tag| !tag.is_empty());
                    tags.map(Value::from).collect()
                }
                _ => Value::from(cell),
            };
            ((*name).to_owned(), value)
        });
        rows.take(&row, object.collect());
    }
    Ok(())
}

/// The first line must name each column once, and `device_id` among them.
fn check_columns(names: &[&str]) -> Result<(), RosterError> {
    let mut violations = Vec::new();
    for (position, name) in names.iter().enumerate() {
        let mut refuse = |code, rule: &str| {
            violations.push(Violation::of((*name).to_owned(), code, rule, None));
        };
        if !COLUMNS.contains(name) {
            let rule = format!("is not a column of a roster: these are [{}]", COLUMNS.join(", "));
            refuse(ViolationCode::UnknownField, &rule);
        } else if names[..position].contains(name) {
            refuse(ViolationCode::Conflict, "must be named only once");
        }
    }
    if !names.contains(&"device_id") {
        violations.push(Violation::required("device_id"));
    }
    violations.truncate(MOST_DETAILS);
    if violations.is_empty() { Ok(()) } else { Err(RosterError::Invalid(violations)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(body: &str, format: RosterFormat) -> Vec<String> {
        let rows = read_roster(body.as_bytes(), format).unwrap();
        rows.iter().map(|row| row.device_id.to_string()).collect()
    }

    fn wrong(body: &str, format: RosterFormat) -> Vec<String> {
        match read_roster(body.as_bytes(), format) {
            Err(RosterError::Invalid(violations)) => {
                violations.into_iter().map(|violation| violation.message).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_format_is_read() {
        let csv =
            "\u{feff}device_id,tags,name\r\na,b;a; ;b,\"Library, \"\"north\"\"\"\r\n,,\r\nb,,\r\n";
        let rows = read_roster(csv.as_bytes(), RosterFormat::Csv).unwrap();
        assert_eq!(rows[0].change.tags.as_ref().unwrap(), &["a", "b"]);
        assert_eq!(rows[0].change.name, Some(Some("Library, \"north\"".to_owned())));
        assert_eq!((&rows[1].change.tags, &rows[1].change.name), (&None, &None));
        assert_eq!(rows.len(), 2);
        let array = r#"[{"device_id": "a"}, {"device_id": "b", "name": null}]"#;
        assert_eq!(ids(array, RosterFormat::Array), ["a", "b"]);
        let lines = "{\"device_id\": \"a\"}\n\n{\"device_id\": \"b\"}";
        assert_eq!(ids(lines, RosterFormat::Lines), ["a", "b"]);
        assert!(ids("[]", RosterFormat::Array).is_empty());
    }

    #[test]
    fn every_wrong_row_is_named() {
        let array =
            r#"[{"device_id": "a"}, 7, {"group": ""}, {"device_id": "a", "tags": ["x", 1]}]"#;
        let expected = [
            "\"[1]\" must be of type object",
            "\"[2].device_id\" is required",
            "\"[2].group\" is not allowed to be empty",
            "\"[3].tags[1]\" must be a string",
            "\"[3].device_id\" must not be listed twice",
        ];
        assert_eq!(wrong(array, RosterFormat::Array), expected);
        let lines = "{\"device_id\": \"a\"}\n{";
        assert!(wrong(lines, RosterFormat::Lines)[0].starts_with("Malformed JSON: "));
        let csv = "device_id,group\na\nb,c\n";
        assert_eq!(wrong(csv, RosterFormat::Csv), ["\"[0]\" must have 2 cells, and has 1"]);
        let expected = [
            "\"colour\" is not a column of a roster: these are [device_id, name, group, tags, note]",
            "\"name\" must be named only once",
            "\"device_id\" is required",
        ];
        assert_eq!(wrong("colour,name,name\n", RosterFormat::Csv), expected);
        let many: String = (0..300).map(|_| "{}\n").collect();
        assert_eq!(wrong(&many, RosterFormat::Lines).len(), 100);
        let rows: String =
            (0..=MOST_ROSTER_ROWS).map(|row| format!("{{\"device_id\":\"{row}\"}}\n")).collect();
        let error = read_roster(rows.as_bytes(), RosterFormat::Lines).unwrap_err();
        assert!(matches!(error, RosterError::TooManyRows), "{error:?}");
    }
}
