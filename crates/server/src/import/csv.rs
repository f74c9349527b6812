//! CSV into JSON: each line becomes the object that a client would have sent, so that both are checked by the
//! same rules.
//!
//! A cell in quotation marks may go on over several lines, and a mark that somebody forgot to close would take in
//! whatever follows. So several lines are one record only when that is beyond doubt; else the first of them is a
//! record that is wrong, and the next line is looked at by itself.

use std::collections::VecDeque;

use pisync_core::event_stream::{MAX_BEGINNING_BYTES, MAX_EVENT_BYTES};
use serde_json::{Number, Value, value::RawValue};

use super::{ImportError, records::Record};

/// Columns that hold text.
const TEXTS: [&str; 6] = ["device_id", "event_id", "timestamp", "job", "clock", "created_at"];
const NUMBERS: [&str; 5] =
    ["total_files_synced", "total_errors", "internet_speed", "duration_seconds", "bytes_synced"];
/// JSON text.
const METADATA: &str = "metadata";
/// What exports have besides and the database gives anew.
const PASSED_OVER: [&str; 2] = ["id", "updated_at"];
/// Without these no line is an event.
const REQUIRED: [&str; 4] = ["device_id", "timestamp", "total_files_synced", "total_errors"];

/// What others put between cells, and what it is called.
const OTHER_SEPARATORS: [(char, &str); 3] =
    [(';', "semicolons"), ('\t', "tabs"), ('|', "vertical bars")];

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The longest line, or lines, of one record. What is not shorter is too long.
const MAX_RECORD: usize = MAX_EVENT_BYTES + 1;

/// Cuts CSV into records.
pub(super) struct CsvCutter {
    /// What was read and is not cut yet.
    text: Vec<u8>,
    place: Place,
    /// What each column holds, once the first line is there.
    columns: Option<Columns>,
    row: Row,
    /// How the line begins that is too long.
    long_beginning: Vec<u8>,
}

/// Where the text that is not cut yet begins.
#[derive(Clone, Copy)]
enum Place {
    /// At the beginning, before the byte order mark if there is one.
    Start,
    /// At the beginning of a line.
    Line,
    /// Within a line that is too long and of which only the beginning is kept.
    LongLine,
    /// Within NUL bytes.
    Nuls,
}

/// What a first line says.
#[derive(Default)]
struct Columns {
    /// What each column holds; `None` for what is not known.
    known: Vec<Option<&'static str>>,
    names: ColumnNames,
}

/// What is special about the names of columns.
#[derive(Debug, Clone, Default)]
pub struct ColumnNames {
    /// Those that nobody knows.
    pub ignored: Vec<String>,
    /// Those that are known, but for capital letters.
    pub capital: Vec<String>,
}

/// What begins at the beginning of a line, and how many bytes it has.
#[derive(Clone, Copy)]
enum Line {
    /// No record.
    Blank(usize),
    /// A record, which is in the row, without the end of its last line.
    Record(usize),
    /// A line in which a quotation mark is opened that is not closed, without its end.
    Unclosed(usize),
    /// One that is too long.
    Long,
    /// NUL bytes.
    Nuls,
}

impl CsvCutter {
    pub(super) fn new() -> Self {
        Self {
            text: Vec::new(),
            place: Place::Start,
            columns: None,
            row: Row::default(),
            long_beginning: Vec::new(),
        }
    }

    /// What is special about the names of columns, once the first line is there.
    pub(super) fn column_names(&self) -> Option<&ColumnNames> {
        self.columns.as_ref().map(|columns| &columns.names)
    }

    /// Takes the next bytes.
    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        found: &mut VecDeque<Record>,
    ) -> Result<(), ImportError> {
        self.text.extend_from_slice(bytes);
        self.cut(false, found)
    }

    /// Says that nothing follows.
    pub(super) fn finish(&mut self, found: &mut VecDeque<Record>) -> Result<(), ImportError> {
        self.cut(true, found)?;
        if self.columns.is_none() {
            return Err(ImportError("it holds nothing".to_owned()));
        }
        Ok(())
    }

    /// Cuts what is there. `is_all` says that nothing follows.
    fn cut(&mut self, is_all: bool, found: &mut VecDeque<Record>) -> Result<(), ImportError> {
        let text = std::mem::take(&mut self.text);
        let mut rest = &text[..];
        loop {
            let used = match self.place {
                Place::Start if rest.len() < BYTE_ORDER_MARK.len() && !is_all => break,
                Place::Line if rest.is_empty() => break,
                Place::LongLine | Place::Nuls if rest.is_empty() && !is_all => break,
                Place::Start => {
                    self.place = Place::Line;
                    if rest.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 }
                }
                Place::Line => match self.line(rest, is_all) {
                    Some(line) => self.take(line, rest, is_all, found)?,
                    None => break,
                },
                Place::LongLine => match rest.iter().position(|byte| ends_line(*byte)) {
                    None if !is_all => rest.len(),
                    end => {
                        self.place = Place::Line;
                        self.columns.as_ref().ok_or_else(no_events)?;
                        found.push_back(Record::too_long(&self.long_beginning));
                        end.unwrap_or(rest.len())
                    }
                },
                Place::Nuls => match rest.iter().position(|byte| *byte != 0) {
                    None if !is_all => rest.len(),
                    end => {
                        self.place = Place::Line;
                        self.columns.as_ref().ok_or_else(no_events)?;
                        // At the end they may yet become lines.
                        found.push_back(Record { may_be_cut_off: end.is_none(), ..Record::nuls() });
                        end.unwrap_or(rest.len())
                    }
                },
            };
            rest = &rest[used..];
        }
        self.text = rest.to_vec();
        Ok(())
    }

    /// Takes what begins at the beginning of a line, and tells how many bytes are done with.
    fn take(
        &mut self,
        line: Line,
        rest: &[u8],
        is_all: bool,
        found: &mut VecDeque<Record>,
    ) -> Result<usize, ImportError> {
        let is_last = |used: usize| is_all && used == rest.len();
        Ok(match line {
            Line::Blank(used) => used,
            Line::Long => {
                self.place = Place::LongLine;
                self.long_beginning = rest[..rest.len().min(MAX_BEGINNING_BYTES)].to_vec();
                0
            }
            Line::Nuls => {
                self.place = Place::Nuls;
                0
            }
            Line::Unclosed(used) => {
                self.columns.as_ref().ok_or_else(no_events)?;
                let record =
                    Record::wrong("has a quotation mark that is not closed", &rest[..used]);
                found.push_back(Record { may_be_cut_off: is_last(used), ..record });
                used
            }
            Line::Record(used) => {
                if let Some(columns) = &self.columns {
                    let is_short = self.row.cells.len() < columns.known.len();
                    let record = columns.record(&self.row);
                    found.push_back(Record { may_be_cut_off: is_last(used) && is_short, ..record });
                } else {
                    self.columns = Some(Columns::read(&self.row, &rest[..used])?);
                }
                used
            }
        })
    }

    /// What begins with `rest`, which is not empty; `None` when more must be read before that can be told.
    fn line(&mut self, rest: &[u8], is_all: bool) -> Option<Line> {
        if rest[0] == 0 {
            return Some(Line::Nuls);
        }
        let end = rest.iter().position(|byte| ends_line(*byte));
        let length = end.unwrap_or(rest.len());
        if length >= MAX_RECORD {
            return Some(Line::Long);
        }
        if end.is_none() && !is_all {
            return None;
        }
        let line = &rest[..length];
        if line.iter().all(|byte| is_blank(*byte)) {
            // Its end belongs to it, unless that is a NUL byte, which is reported.
            let has_end = rest.get(length).is_some_and(|byte| *byte != 0);
            return Some(Line::Blank(length + usize::from(has_end)));
        }
        if self.row.read(line) != Reading::Open {
            return Some(Line::Record(length));
        }
        let reach = rest.len().min(MAX_RECORD);
        // Where the text ends, the record does only if nothing follows.
        let ends_within = |end: usize| end < reach || (is_all && reach == rest.len());
        match self.row.read(&rest[..reach]) {
            Reading::Closed { end } if ends_within(end) => {
                let columns = self.columns.as_ref();
                let is_one = columns.is_none_or(|columns| columns.is_one(&self.row, &rest[..end]));
                Some(if is_one { Line::Record(end) } else { Line::Unclosed(length) })
            }
            Reading::Closed { .. } | Reading::Open if !is_all && reach < MAX_RECORD => None,
            _ => Some(Line::Unclosed(length)),
        }
    }
}

/// A NUL byte ends a line too: after a power cut a file may have some where the end of its last line was to be.
fn ends_line(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r' | 0)
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// The cells of one record.
#[derive(Default)]
struct Row {
    /// One after the other.
    bytes: Vec<u8>,
    cells: Vec<Cell>,
}

struct Cell {
    /// Where it ends.
    end: usize,
    /// It goes on over several lines.
    has_lines: bool,
}

/// What came of reading a record.
#[derive(PartialEq, Eq)]
enum Reading {
    /// It ends before this place, with a line or with the text.
    Closed { end: usize },
    /// The text ends in quotation marks.
    Open,
    /// Several lines with something behind a closing quotation mark: most likely that mark was to open a cell.
    Doubtful,
}

impl Row {
    /// Reads the record with which `text` begins. Blanks around cells, outside of quotation marks, mean nothing.
    fn read(&mut self, text: &[u8]) -> Reading {
        self.bytes.clear();
        self.cells.clear();
        let mut position = 0;
        let mut has_lines = false;
        loop {
            let blanks = text[position..].iter().take_while(|byte| is_blank(**byte)).count();
            let start = position + blanks;
            let mut cell = Cell { end: 0, has_lines: false };
            let unquoted = if text.get(start) == Some(&b'"') {
                let Some(closing) = self.quoted(&text[start + 1..], &mut cell.has_lines) else {
                    return Reading::Open;
                };
                has_lines |= cell.has_lines;
                start + 1 + closing + 1
            } else {
                start
            };
            let behind = &text[unquoted..];
            let length = behind.iter().position(|byte| *byte == b',' || ends_line(*byte));
            let length = length.unwrap_or(behind.len());
            // Behind a closing quotation mark there is nothing else, usually.
            let plain = behind[..length].trim_ascii_end();
            if unquoted > start && !plain.is_empty() && has_lines {
                return Reading::Doubtful;
            }
            self.bytes.extend_from_slice(plain);
            cell.end = self.bytes.len();
            self.cells.push(cell);
            position = unquoted + length;
            if text.get(position) != Some(&b',') {
                return Reading::Closed { end: position };
            }
            position += 1;
        }
    }

    /// Reads on up to the closing quotation mark and tells where it is; `None` when there is none.
    fn quoted(&mut self, text: &[u8], has_lines: &mut bool) -> Option<usize> {
        let mut position = 0;
        loop {
            let here = text.get(position..)?;
            let length = here.iter().position(|byte| *byte == b'"')?;
            let part = &here[..length];
            *has_lines |= part.iter().any(|byte| ends_line(*byte));
            self.bytes.extend_from_slice(part);
            position += length;
            // Two of them stand for one.
            if text.get(position + 1) != Some(&b'"') {
                return Some(position);
            }
            self.bytes.push(b'"');
            position += 2;
        }
    }

    fn cells(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.cells
            .iter()
            .map(move |cell| &self.bytes[std::mem::replace(&mut start, cell.end)..cell.end])
    }

    /// All of it, for whoever looks what is wrong.
    fn text(&self) -> Vec<u8> {
        self.cells().collect::<Vec<_>>().join(&b',')
    }
}

impl Columns {
    /// Reads the first line.
    fn read(row: &Row, line: &[u8]) -> Result<Self, ImportError> {
        let mut columns = Self::default();
        for cell in row.cells() {
            let name = std::str::from_utf8(cell).map_err(|_| no_events())?.trim();
            let is_name = |known: &&'static str| known.eq_ignore_ascii_case(name);
            let column = TEXTS.into_iter().chain(NUMBERS).chain([METADATA]).find(is_name);
            if let Some(column) = column {
                if columns.known.contains(&Some(column)) {
                    return Err(ImportError(format!("there are two columns {column}")));
                }
                if column != name {
                    columns.names.capital.push(name.to_owned());
                }
            } else if !PASSED_OVER.iter().any(is_name) {
                columns.names.ignored.push(name.to_owned());
            }
            columns.known.push(column);
        }
        let is_missing = |column: &&str| !columns.known.contains(&Some(*column));
        let missing: Vec<_> = REQUIRED.into_iter().filter(is_missing).collect();
        if missing.is_empty() {
            return Ok(columns);
        }
        if let Some(separator) = other_separator(line) {
            return Err(ImportError(format!(
                "its cells are separated by {separator}; PiSync reads cells that are separated by commas"
            )));
        }
        if missing.len() == REQUIRED.len() {
            return Err(no_events());
        }
        let missing = missing.join(", ");
        Err(ImportError(format!("its first line does not name the columns {missing}")))
    }

    /// Whether several lines are certainly one record.
    fn is_one(&self, row: &Row, text: &[u8]) -> bool {
        let may_have_lines = |(column, (place, cell)): (&Option<&str>, (&Cell, &[u8]))| {
            !place.has_lines
                || match *column {
                    // Whatever it is, it is passed over.
                    None => true,
                    Some(METADATA) => serde_json::from_slice::<&RawValue>(cell).is_ok(),
                    Some(_) => false,
                }
        };
        let cells = row.cells.iter().zip(row.cells());
        let mut lines = text.split(|byte| ends_line(*byte)).skip(1);
        row.cells.len() == self.known.len()
            && !text.contains(&0)
            && self.known.iter().zip(cells).all(may_have_lines)
            && !lines.any(|line| self.could_be_event(line))
    }

    /// Whether a line, taken by itself, has what an event must have.
    fn could_be_event(&self, line: &[u8]) -> bool {
        let mut row = Row::default();
        if row.read(line) == Reading::Open {
            row.cells.push(Cell { end: row.bytes.len(), has_lines: false });
        }
        let has = self.known.iter().zip(row.cells()).filter(|(column, cell)| match **column {
            Some("device_id") => !cell.is_empty(),
            Some("timestamp") => cell.first().is_some_and(u8::is_ascii_digit),
            Some("total_files_synced" | "total_errors") => {
                serde_json::from_slice::<Number>(cell).is_ok()
            }
            _ => false,
        });
        has.count() == REQUIRED.len()
    }

    /// A line as the JSON object that a client would have sent. An empty cell is an absent field.
    fn record(&self, row: &Row) -> Record {
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
            text.push_str(&format!("\"{column}\":{}", value(column, cell)));
        }
        text.push('}');
        Record::event(text.into_bytes())
    }
}

/// What stands between the cells of a first line instead of commas, when it names columns that way.
fn other_separator(line: &[u8]) -> Option<&'static str> {
    let line = String::from_utf8_lossy(line);
    let names_columns = |separator: char| {
        let mut names = line.split(separator).map(|name| name.trim().trim_matches('"'));
        names.any(|name| REQUIRED.iter().any(|column| column.eq_ignore_ascii_case(name)))
    };
    let found = OTHER_SEPARATORS
        .into_iter()
        .find(|(separator, _)| line.contains(*separator) && names_columns(*separator));
    found.map(|(_, name)| name)
}

fn no_events() -> ImportError {
    ImportError(format!(
        "it holds no sync events: expected one JSON object per line, a JSON array, or CSV whose first line names the columns {} and perhaps others",
        REQUIRED.join(", ")
    ))
}

/// A cell as JSON. What should be a number or an object and is none becomes text, and is refused as such.
fn value(column: &str, cell: &str) -> String {
    let is_number = || NUMBERS.contains(&column) && serde_json::from_str::<Number>(cell).is_ok();
    let is_object = || column == METADATA && serde_json::from_str::<&RawValue>(cell).is_ok();
    if is_number() || is_object() { cell.to_owned() } else { Value::from(cell).to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: &str = "timestamp,device_id,total_errors,total_files_synced,extra,metadata,id\n";

    /// Cuts `text`, a few bytes at a time.
    fn cut(text: &[u8], step: usize) -> Result<(Vec<Record>, Columns), ImportError> {
        let (mut cutter, mut found) = (CsvCutter::new(), VecDeque::new());
        for part in text.chunks(step) {
            cutter.push(part, &mut found)?;
        }
        cutter.finish(&mut found)?;
        Ok((found.into(), cutter.columns.unwrap()))
    }

    /// What is told of a record: its text or what is wrong with it.
    fn told(record: &Record) -> String {
        let text = String::from_utf8_lossy(&record.text);
        let end = if record.may_be_cut_off { " (cut off)" } else { "" };
        match &record.problem {
            Some(problem) => format!("{problem}: {text}{end}"),
            None => format!("{text}{end}"),
        }
    }

    /// The records of lines behind the first, which are the same however the text arrives.
    fn records(lines: &[u8]) -> Vec<String> {
        let whole = [HEADER.as_bytes(), lines].concat();
        let all: Vec<Vec<String>> = [1, 7, 10_000]
            .into_iter()
            .map(|step| {
                let (records, columns) = cut(&whole, step).unwrap();
                assert_eq!(columns.names.ignored, ["extra"]);
                records.iter().map(told).collect()
            })
            .collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
        all.into_iter().next().unwrap()
    }

    #[test]
    fn lines_become_objects() {
        assert_eq!(
            records(
                b"2025-06-17,pi,0,1,x,,7\r\n\"2025\",\"a \"\"b\"\", c\",-1, 2,,\"{\"\"a\"\":1}\"\n\n \t\r\rz,,,,,,\n"
            ),
            [
                r#"{"timestamp":"2025-06-17","device_id":"pi","total_errors":0,"total_files_synced":1}"#,
                r#"{"timestamp":"2025","device_id":"a \"b\", c","total_errors":-1,"total_files_synced":2,"metadata":{"a":1}}"#,
                r#"{"timestamp":"z"}"#,
            ]
        );
    }

    #[test]
    fn blanks_around_cells_mean_nothing() {
        assert_eq!(
            records(b" 2025 ,\tpi one , 0,1 , \" x\" , \"{}\"\t,7\n2025,\" pi \",0,1\n"),
            [
                r#"{"timestamp":"2025","device_id":"pi one","total_errors":0,"total_files_synced":1,"metadata":{}}"#,
                r#"{"timestamp":"2025","device_id":" pi ","total_errors":0,"total_files_synced":1}"#,
            ]
        );
    }

    #[test]
    fn cells_may_have_several_lines() {
        let expected = |metadata| {
            let event =
                r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1"#;
            format!("{event}{metadata}}}")
        };
        let text = "1,pi,0,1,\"a \"\"note\"\",\r\n\n2,of,lines\",,7\n1,pi,0,1,,\"{\n\"\"a\"\":\n1}\",\n1,pi,0,1,x,,7\n";
        let metadata = ",\"metadata\":{\n\"a\":\n1}";
        assert_eq!(records(text.as_bytes()), [expected(""), expected(metadata), expected("")]);
    }

    #[test]
    fn a_quotation_mark_that_is_not_closed_costs_its_line_alone() {
        let unclosed = |line: &str| format!("has a quotation mark that is not closed: {line}");
        let event = r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1}"#;
        for bad in [
            "1,pi,0,1,\"x",
            "1,\"pi,0,1,x",
            "\"1,pi,0,1",
            "1,pi,0,1,,\"{\"\"a\"\":1}",
            "1,pi,0,1,\"\"\"\"\"x",
        ] {
            for others in [
                "1,pi,0,1,x,,7\n",
                "1,\"pi\",0,1\n",
                "1,pi,0,1,\"x\",,7\n",
                "1,pi,0,1,x\",,7\n",
                "1,pi,0,1,\"\",\"{}\",7\n",
            ] {
                let text = format!("{others}{bad}\n{others}{others}");
                let found = records(text.as_bytes());
                assert_eq!(found.len(), 4, "{text}: {found:?}");
                assert_eq!(found[1], unclosed(bad), "{text}");
                for index in [0, 2, 3] {
                    assert!(
                        found[index].starts_with(&event[..event.len() - 1]),
                        "{text}: {found:?}"
                    );
                }
            }
        }
        // Text far away makes no difference.
        let text = format!("1,pi,0,1,\"x\n{}1,pi,0,1,\"x\",,\n", "1,pi,0,1\n".repeat(20_000));
        let found = records_of(text.as_bytes(), 60_000);
        assert_eq!(found.len(), 20_002);
        assert_eq!(found[0], unclosed("1,pi,0,1,\"x"));
        assert!(found[1..].iter().all(|told| told == event));
        // Nor does the end, except that it may be where the input breaks off.
        assert_eq!(records(b"1,pi,0,1,\"x\n"), [unclosed("1,pi,0,1,\"x")]);
        assert_eq!(records(b"1,pi,0,1,\"x"), [unclosed("1,pi,0,1,\"x") + " (cut off)"]);
    }

    fn records_of(lines: &[u8], step: usize) -> Vec<String> {
        let (records, _) = cut(&[HEADER.as_bytes(), lines].concat(), step).unwrap();
        records.iter().map(told).collect()
    }

    #[test]
    fn each_line_that_is_too_long_or_too_wide_is_told_of() {
        let long = "x".repeat(MAX_EVENT_BYTES * 2);
        let lines = format!("{long}\n\"{long}\n{long}\n2025,,,,,,,1\n2025,pi,0,1\n\"{long}\n");
        let found = records_of(lines.as_bytes(), 1000);
        let starts = [
            "is longer than 65536 bytes, the most that a record may have: ",
            "is longer than 65536 bytes, the most that a record may have: ",
            "is longer than 65536 bytes, the most that a record may have: ",
            "has more cells than the first line: 2025",
            "{\"timestamp\"",
            "is longer than 65536 bytes, the most that a record may have: ",
        ];
        assert_eq!(found.len(), starts.len());
        for (told, start) in found.iter().zip(starts) {
            assert!(told.starts_with(start), "{told}");
        }
        assert!(cut(long.as_bytes(), 1000).is_err());
    }

    #[test]
    fn nul_bytes_keep_no_line_out() {
        let event = r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1}"#;
        let nuls = "is a run of NUL bytes, as a power cut leaves them: ";
        let cut_off = format!("{nuls} (cut off)");
        for (lines, expected) in [
            (&b"1,pi,0,1\n\0\0\0\0"[..], vec![event, &cut_off]),
            (b"1,pi,0,1\0\0\0", vec![event, &cut_off]),
            (b"1,pi,0,1\n1,p\0\0", vec![event, r#"{"timestamp":"1","device_id":"p"}"#, &cut_off]),
            (
                b"1,pi,0,1\n\0\0\x001,pi,0,1\n \0\n\0\n1,pi,0,1\n",
                vec![event, nuls, event, nuls, nuls, event],
            ),
            (
                b"1,pi,0,1,\"x\0\0\"\n1,pi,0,1\n",
                vec![
                    "has a quotation mark that is not closed: 1,pi,0,1,\"x",
                    nuls,
                    "has a quotation mark that is not closed: \"",
                    event,
                ],
            ),
        ] {
            assert_eq!(records(lines), expected, "{lines:?}");
        }
    }

    #[test]
    fn a_last_line_that_is_short_may_be_cut_off() {
        let cut_off =
            |lines: &str| records(lines.as_bytes()).pop().unwrap().ends_with(" (cut off)");
        assert!(cut_off("2025,pi,0"));
        assert!(!cut_off("2025,pi,0\n"));
        assert!(!cut_off("2025,pi,0,1,,,"));
    }

    #[test]
    fn a_first_line_must_name_the_columns() {
        for (text, expected) in [
            ("", "it holds nothing"),
            ("\u{feff}\n", "it holds nothing"),
            ("\u{0}\u{1}\n", "it holds no sync events"),
            ("hello\nworld\n", "it holds no sync events"),
            ("\"device_id,timestamp,total_files_synced,total_errors\n", "it holds no sync events"),
            ("device_id;timestamp;total_files_synced;total_errors\n", "separated by semicolons"),
            ("note, or remark;Device_ID;\"timestamp\"\n", "separated by semicolons"),
            ("device_id\ttimestamp\ttotal_files_synced\ttotal_errors", "separated by tabs"),
            ("device_id|timestamp\n", "separated by vertical bars"),
            ("device_id,timestamp\n", "the columns total_files_synced, total_errors"),
            ("device_id,device_id\n", "there are two columns device_id"),
            ("device_id,DEVICE_ID\n", "there are two columns device_id"),
        ] {
            for step in [1, 4, 1000] {
                let Err(error) = cut(text.as_bytes(), step) else { panic!("{text}") };
                assert!(error.to_string().contains(expected), "{text}: {error}");
            }
        }
        assert!(cut(b"\xff\xfe\x00\x01", 2).is_err());
        let (_, columns) = cut(HEADER.as_bytes(), 3).unwrap();
        assert_eq!(columns.names.ignored, ["extra"]);
        let capitals = "\u{feff}Timestamp, DEVICE_ID ,\"total_errors\",Total_Files_Synced,ID,Extra\r\n1,pi,0,1,5,x";
        let (records, columns) = cut(capitals.as_bytes(), 2).unwrap();
        assert_eq!(columns.names.capital, ["Timestamp", "DEVICE_ID", "Total_Files_Synced"]);
        assert_eq!(columns.names.ignored, ["Extra"]);
        let expected =
            r#"{"timestamp":"1","device_id":"pi","total_errors":0,"total_files_synced":1}"#;
        assert_eq!(records.iter().map(told).collect::<Vec<_>>(), [expected]);
    }

    /// A line that is an event by itself, of a device whose name nobody else has.
    fn event_line() -> impl Strategy<Value = String> {
        let note = prop_oneof![
            "[a-z ;']{0,6}",
            "[a-z ,\"\n]{0,6}".prop_map(|text| format!("\"{}\"", text.replace('"', "\"\""))),
            "[a-z]{1,3}\"[a-z]{0,3}",
        ];
        let metadata =
            prop_oneof![Just(""), Just("{}"), Just("\"{\"\"a\"\":\n1}\""), Just("\"\n{}\"")];
        (note, metadata).prop_map(|(note, metadata)| format!("2025,DEVICE,0,1,{note},{metadata},"))
    }

    /// A line that is none, or perhaps is one.
    fn other_line() -> impl Strategy<Value = String> {
        prop_oneof!["[ab1,\" ]{0,12}", "2025,x,[01],1,[ab\",]{0,8}", Just("\0\0".to_owned())]
    }

    proptest! {
        /// Whatever stands between them, each line that is an event becomes a record, once; and chunks make no
        /// difference.
        #[test]
        fn no_event_vanishes(
            lines in prop::collection::vec((event_line(), prop::option::of(other_line())), 1..8),
            step in 1usize..40,
        ) {
            let mut text = HEADER.to_owned();
            for (number, (event, other)) in lines.iter().enumerate() {
                text += &event.replace("DEVICE", &format!("pi-{number}"));
                text.push('\n');
                if let Some(other) = other {
                    text += other;
                    text.push('\n');
                }
            }
            let (records, _) = cut(text.as_bytes(), 1 << 20).unwrap();
            for number in 0..lines.len() {
                let start = format!("{{\"timestamp\":\"2025\",\"device_id\":\"pi-{number}\",");
                let is_it = |record: &&Record| record.problem.is_none() && record.text.starts_with(start.as_bytes());
                prop_assert_eq!(records.iter().filter(is_it).count(), 1, "pi-{} of {:?}", number, text);
            }
            let (chunked, _) = cut(text.as_bytes(), step).unwrap();
            prop_assert_eq!(records.iter().map(told).collect::<Vec<_>>(), chunked.iter().map(told).collect::<Vec<_>>());
        }

        /// Whatever arrives: no panic, and each line that is not blank is in a record.
        #[test]
        fn no_line_vanishes(text in "[a1,\"\r\n\0 ]{0,60}", step in 1usize..9) {
            let whole = format!("{HEADER}{text}\n");
            let (records, _) = cut(whole.as_bytes(), step).unwrap();
            // Cells of a column that is passed over are no part of a record's text: so the lines are counted.
            let (mut rows, mut cutter, mut found) = (0, CsvCutter::new(), VecDeque::new());
            cutter.push(HEADER.as_bytes(), &mut found).unwrap();
            let mut rest = format!("{text}\n").into_bytes();
            while !rest.is_empty() {
                let used = match cutter.line(&rest, true).unwrap() {
                    Line::Blank(used) => { prop_assert!(rest[..used].trim_ascii().is_empty()); used }
                    Line::Nuls => { rows += 1; rest.iter().take_while(|byte| **byte == 0).count() }
                    Line::Record(used) | Line::Unclosed(used) => { rows += 1; used }
                    Line::Long => unreachable!("the text is short"),
                };
                prop_assert!(used > 0);
                rest.drain(..used);
            }
            prop_assert_eq!(records.len(), rows);
        }
    }
}
