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
    csv_row::{Reading, Row},
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

/// Where a row stands.
struct Place {
    /// Its number from 0, as an index.
    name: String,
    /// Of CSV, its line, as editors count them.
    line: Option<usize>,
}

impl Place {
    /// A violation of this row.
    fn of(&self, violation: Violation) -> Violation {
        let violation = violation.within(&self.name);
        match self.line {
            Some(line) => in_line(violation, line),
            None => violation,
        }
    }
}

/// A violation that says in which line it is.
fn in_line(mut violation: Violation, line: usize) -> Violation {
    violation.message += &format!(" (line {line})");
    violation
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
    /// Counts a row, and answers its place.
    fn next(&mut self, line: Option<usize>) -> Result<Place, RosterError> {
        if self.count >= MOST_ROSTER_ROWS {
            return Err(RosterError::TooManyRows);
        }
        self.count += 1;
        Ok(Place { name: format!("[{}]", self.count - 1), line })
    }

    fn refuse(&mut self, row: &Place, violations: Vec<Violation>) {
        // Of more, nobody is told.
        if self.violations.len() < MOST_DETAILS {
            let violations = violations.into_iter();
            self.violations.extend(violations.map(|violation| row.of(violation)));
        }
    }

    /// Reads one device.
    fn take(&mut self, row: &Place, object: Map<String, Value>) {
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
        let row = self.next(None)?;
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
            Err(how) => {
                return Err(RosterError::Malformed(format!("row {}: {how}", row.name)));
            }
        }
        Ok(())
    }
}

fn read_json(body: &[u8], format: Format, rows: &mut Rows) -> Result<(), RosterError> {
    let mut splitter = EventSplitter::new(format);
    splitter.push(body, &mut |piece| rows.take_json(piece, format))?;
    splitter.finish(&mut |piece| rows.take_json(piece, format))
}

/// Reads line by line: no field of a device may have several, so that a quotation mark is closed in its line or not at all.
fn read_csv(body: &[u8], rows: &mut Rows) -> Result<(), RosterError> {
    let mut names: Option<Vec<String>> = None;
    let mut row = Row::default();
    for (number, line) in lines(csv_text(body)?).enumerate().map(|(index, line)| (index + 1, line))
    {
        let read = read_line(&mut row, line);
        let cells = || row.cells().map(String::from_utf8_lossy);
        let Some(names) = &names else {
            if cells().all(|cell| cell.is_empty()) && read.is_ok() {
                continue;
            }
            read.map_err(|rule| wrong_csv(rule, Some(number)))?;
            let found: Vec<_> = cells().map(|name| name.trim().to_owned()).collect();
            check_columns(&found)?;
            names = Some(found);
            continue;
        };
        // A line of commas, as spreadsheets leave behind, is no device.
        if read.is_ok() && cells().all(|cell| cell.is_empty()) {
            continue;
        }
        let place = rows.next(Some(number))?;
        let rule = match read {
            Err(rule) => Some(rule.to_owned()),
            Ok(()) if row.cells.len() != names.len() => {
                Some(format!("must have {} cells, and has {}", names.len(), row.cells.len()))
            }
            Ok(()) => None,
        };
        if let Some(rule) = rule {
            rows.refuse(&place, vec![Violation::of_whole(ViolationCode::Format, &rule, None)]);
            continue;
        }
        let filled = names.iter().zip(cells()).filter(|(_, cell)| !cell.is_empty());
        let object = filled.map(|(name, cell)| {
            let value = match name.as_str() {
                "tags" => {
                    let tags = cell.split(';').map(str::trim).filter(|tag| !tag.is_empty());
                    tags.map(Value::from).collect()
                }
                _ => Value::from(&*cell),
            };
            (name.clone(), value)
        });
        rows.take(&place, object.collect());
    }
    match names {
        Some(_) => Ok(()),
        None => Err(wrong_csv("must begin with a line that names its columns", None)),
    }
}

/// Reads the cells of a line, or says what is wrong with it.
fn read_line(row: &mut Row, line: &str) -> Result<(), &'static str> {
    match row.read(line.as_bytes()) {
        // A NUL byte ends a record.
        Reading::Closed { end } if end < line.len() => Err("must not contain NUL bytes"),
        Reading::Closed { .. } if row.has_text_behind_quotes => {
            Err("has text behind a quotation mark that ends its cell")
        }
        Reading::Closed { .. } => Ok(()),
        Reading::Open | Reading::Doubtful => Err("has a quotation mark that is not closed"),
    }
}

/// The lines of a text, however they end.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let Some(end) = text.find(['\n', '\r']) else {
            rest = None;
            return Some(text);
        };
        let ending = if text[end..].starts_with("\r\n") { 2 } else { 1 };
        rest = Some(&text[end + ending..]);
        Some(&text[..end])
    })
}

/// The text of a body that is CSV, without a byte order mark.
fn csv_text(body: &[u8]) -> Result<&str, RosterError> {
    json_text(body).map_err(|how| {
        let line = std::str::from_utf8(body).err().map(|error| {
            let before = &body[..error.valid_up_to()];
            1 + before.iter().filter(|byte| **byte == b'\n').count()
        });
        wrong_csv(&format!("must be CSV in UTF-8: {how}"), line)
    })
}

/// What is wrong with CSV as a whole.
fn wrong_csv(rule: &str, line: Option<usize>) -> RosterError {
    let violation = Violation::of_whole(ViolationCode::Format, rule, None);
    RosterError::Invalid(vec![match line {
        Some(line) => in_line(violation, line),
        None => violation,
    }])
}

/// The first line must name each column once, and `device_id` among them.
fn check_columns(names: &[String]) -> Result<(), RosterError> {
    let mut violations = Vec::new();
    for (position, name) in names.iter().enumerate() {
        let mut refuse = |code, rule: &str| {
            violations.push(Violation::of(name.clone(), code, rule, None));
        };
        if !COLUMNS.contains(&name.as_str()) {
            let rule = format!("is not a column of a roster: these are [{}]", COLUMNS.join(", "));
            refuse(ViolationCode::UnknownField, &rule);
        } else if names[..position].contains(name) {
            refuse(ViolationCode::Conflict, "must be named only once");
        }
    }
    if !names.iter().any(|name| name == "device_id") {
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
        assert_eq!(
            wrong(csv, RosterFormat::Csv),
            ["\"[0]\" must have 2 cells, and has 1 (line 2)"]
        );
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

    #[test]
    fn what_is_wrong_with_csv_is_said_of_its_line() {
        let header = "device_id,name,tags\r\n";
        let unclosed = "has a quotation mark that is not closed";
        for (lines, expected) in [
            ("a,\"Library,x\r\nb,Hall,\r\n", format!("\"[0]\" {unclosed} (line 2)")),
            ("a,Library,\r\n\r\nb,\"Hall", format!("\"[1]\" {unclosed} (line 4)")),
            // The mark that opens another cell does not close this one.
            ("a,\"Library,\rb,\"Hall\",\r", format!("\"[0]\" {unclosed} (line 2)")),
            ("a,\"two\nlines\",\n", format!("\"[0]\" {unclosed} (line 2)")),
            (
                "a,\"Library,\"x\n",
                "\"[0]\" has text behind a quotation mark that ends its cell (line 2)".to_owned(),
            ),
            ("a,b\0c,\n", "\"[0]\" must not contain NUL bytes (line 2)".to_owned()),
            (",Hall,\n", "\"[0].device_id\" is required (line 2)".to_owned()),
            ("a,,\na,,\n", "\"[1].device_id\" must not be listed twice (line 3)".to_owned()),
            ("a,,x;x\u{1},", "\"[0]\" must have 3 cells, and has 4 (line 2)".to_owned()),
            (
                "a,,x;x\u{1}",
                "\"[0].tags[1]\" must not contain control characters (line 2)".to_owned(),
            ),
        ] {
            let found = wrong(&format!("{header}{lines}"), RosterFormat::Csv);
            assert_eq!(found[0], expected, "{lines:?}");
        }
        // What follows an unclosed mark is read by itself.
        let two = wrong(&format!("{header}a,\"x\nb,\"y\n"), RosterFormat::Csv);
        let expected =
            [(0, 2), (1, 3)].map(|(row, line)| format!("\"[{row}]\" {unclosed} (line {line})"));
        assert_eq!(two[..2], expected);
        for (text, expected) in [
            (&b""[..], "\"value\" must be CSV in UTF-8: there is nothing in it"),
            (b"\n \n,,\n", "\"value\" must begin with a line that names its columns"),
            (b"device_id,\"name\n", "\"value\" has a quotation mark that is not closed (line 1)"),
            (
                b"device_id\na\nb\xff\n",
                "\"value\" must be CSV in UTF-8: it is not UTF-8: byte 0xff after 13 bytes; send UTF-8 (line 3)",
            ),
        ] {
            match read_roster(text, RosterFormat::Csv) {
                Err(RosterError::Invalid(violations)) => {
                    assert_eq!(violations[0].message, expected);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
