//! CSV into JSON: each line becomes the object that a client would have sent, so that both are checked by the
//! same rules.

use std::collections::VecDeque;

use csv_core::{ReadRecordResult, Reader};
use pisync_core::event_stream::MAX_EVENT_BYTES;
use serde_json::{Number, Value, value::RawValue};

use super::{ImportError, records::Record};

/// The most columns. A line has some twenty.
const MAX_COLUMNS: usize = 256;

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

/// Cuts CSV into records.
pub(super) struct CsvCutter {
    reader: Reader,
    /// The cells of the line under way, one after the other.
    cells: Vec<u8>,
    filled: usize,
    /// Where each of them ends.
    ends: Vec<usize>,
    ended: usize,
    too_long: bool,
    /// What each column holds, once the first line is there; `None` for what is not known.
    columns: Option<Vec<Option<&'static str>>>,
    /// Columns that are not known.
    ignored: Vec<String>,
}

impl CsvCutter {
    pub(super) fn new() -> Self {
        Self {
            reader: Reader::new(),
            cells: vec![0; MAX_EVENT_BYTES],
            filled: 0,
            ends: vec![0; MAX_COLUMNS],
            ended: 0,
            too_long: false,
            columns: None,
            ignored: Vec::new(),
        }
    }

    /// Columns that nobody knows, once the first line is there.
    pub(super) fn ignored_columns(&self) -> Option<&[String]> {
        self.columns.is_some().then_some(&*self.ignored)
    }

    /// Takes the next bytes.
    pub(super) fn push(
        &mut self,
        mut bytes: &[u8],
        found: &mut VecDeque<Record>,
    ) -> Result<(), ImportError> {
        while !bytes.is_empty() {
            let (result, read) = self.step(bytes);
            bytes = &bytes[read..];
            if matches!(result, ReadRecordResult::Record) {
                self.complete(false, found)?;
            }
        }
        Ok(())
    }

    /// Says that nothing follows.
    pub(super) fn finish(&mut self, found: &mut VecDeque<Record>) -> Result<(), ImportError> {
        loop {
            match self.step(&[]) {
                (ReadRecordResult::Record, _) => self.complete(true, found)?,
                (ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull, _) => {}
                (ReadRecordResult::InputEmpty | ReadRecordResult::End, _) => break,
            }
        }
        if self.columns.is_none() {
            return Err(ImportError("it holds nothing".to_owned()));
        }
        Ok(())
    }

    /// Reads on until a line is whole, there is nothing more to read, or the line is too long, of which
    /// nothing is kept; tells how many bytes were read.
    fn step(&mut self, bytes: &[u8]) -> (ReadRecordResult, usize) {
        let (result, read, written, ended) = self.reader.read_record(
            bytes,
            &mut self.cells[self.filled..],
            &mut self.ends[self.ended..],
        );
        self.filled += written;
        self.ended += ended;
        if matches!(result, ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull) {
            self.too_long = true;
            (self.filled, self.ended) = (0, 0);
        }
        (result, read)
    }

    /// Takes the line that is whole.
    fn complete(&mut self, is_last: bool, found: &mut VecDeque<Record>) -> Result<(), ImportError> {
        let too_long = std::mem::take(&mut self.too_long);
        let mut start = 0;
        let cells: Vec<&[u8]> = self.ends[..self.ended]
            .iter()
            .filter(|_| !too_long)
            .map(|end| &self.cells[std::mem::replace(&mut start, *end)..*end])
            .collect();
        let record = match &self.columns {
            None if too_long => return Err(no_events()),
            None => {
                let (columns, ignored) = columns(&cells)?;
                (self.columns, self.ignored) = (Some(columns), ignored);
                None
            }
            Some(_) if too_long => Some(Record::too_long()),
            Some(columns) => {
                let is_short = cells.len() < columns.len();
                Some(Record { may_be_cut_off: is_last && is_short, ..record(columns, &cells) })
            }
        };
        found.extend(record);
        (self.filled, self.ended) = (0, 0);
        Ok(())
    }
}

/// What the columns of a first line hold, and the names of those that nobody knows.
fn columns(cells: &[&[u8]]) -> Result<(Vec<Option<&'static str>>, Vec<String>), ImportError> {
    let mut columns: Vec<Option<&'static str>> = Vec::with_capacity(cells.len());
    let mut ignored = Vec::new();
    for cell in cells {
        let name = std::str::from_utf8(cell).map_err(|_| no_events())?.trim();
        let column =
            TEXTS.into_iter().chain(NUMBERS).chain([METADATA]).find(|column| *column == name);
        if column.is_some() && columns.contains(&column) {
            return Err(ImportError(format!("there are two columns {name}")));
        }
        if column.is_none() && !PASSED_OVER.contains(&name) {
            ignored.push(name.to_owned());
        }
        columns.push(column);
    }
    let missing: Vec<_> =
        REQUIRED.into_iter().filter(|column| !columns.contains(&Some(*column))).collect();
    if missing.len() == REQUIRED.len() {
        return Err(no_events());
    }
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Err(ImportError(format!("its first line does not name the columns {missing}")));
    }
    Ok((columns, ignored))
}

fn no_events() -> ImportError {
    ImportError(format!(
        "it holds no sync events: expected one JSON object per line, a JSON array, or CSV whose first line names the columns {} and perhaps others",
        REQUIRED.join(", ")
    ))
}

/// A line as the JSON object that a client would have sent. An empty cell is an absent field.
fn record(columns: &[Option<&'static str>], cells: &[&[u8]]) -> Record {
    if cells.len() > columns.len() {
        return Record::wrong("has more cells than the first line", &cells.join(&b','));
    }
    let mut text = String::from("{");
    for (column, cell) in columns.iter().zip(cells) {
        let Ok(cell) = std::str::from_utf8(cell) else {
            return Record::wrong("must be valid UTF-8 text", &cells.join(&b','));
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

/// A cell as JSON. What should be a number or an object and is none becomes text, and is refused as such.
fn value(column: &str, cell: &str) -> String {
    let is_number = || NUMBERS.contains(&column) && serde_json::from_str::<Number>(cell).is_ok();
    let is_object = || column == METADATA && serde_json::from_str::<&RawValue>(cell).is_ok();
    if is_number() || is_object() { cell.to_owned() } else { Value::from(cell).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "timestamp,device_id,total_errors,total_files_synced,extra,metadata,id\n";

    /// Cuts `text`, a few bytes at a time.
    fn cut(text: &[u8], step: usize) -> Result<(Vec<Record>, Vec<String>), ImportError> {
        let (mut cutter, mut found) = (CsvCutter::new(), VecDeque::new());
        for part in text.chunks(step) {
            cutter.push(part, &mut found)?;
        }
        cutter.finish(&mut found)?;
        Ok((found.into(), cutter.ignored))
    }

    fn texts(lines: &str) -> Vec<String> {
        let whole = format!("{HEADER}{lines}");
        let all: Vec<Vec<String>> = [1, 7, 10_000]
            .into_iter()
            .map(|step| {
                let (records, ignored) = cut(whole.as_bytes(), step).unwrap();
                assert_eq!(ignored, ["extra"]);
                records.into_iter().map(|record| String::from_utf8(record.text).unwrap()).collect()
            })
            .collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
        all.into_iter().next().unwrap()
    }

    #[test]
    fn lines_become_objects() {
        assert_eq!(
            texts(
                "2025-06-17,pi,0,1,x,,7\r\n\"2025\",\"a \"\"b\"\", c\",-1, 2,,\"{\"\"a\"\":1}\"\n\nz"
            ),
            [
                r#"{"timestamp":"2025-06-17","device_id":"pi","total_errors":0,"total_files_synced":1}"#,
                r#"{"timestamp":"2025","device_id":"a \"b\", c","total_errors":-1,"total_files_synced": 2,"metadata":{"a":1}}"#,
                r#"{"timestamp":"z"}"#,
            ]
        );
    }

    #[test]
    fn a_line_may_be_too_long_or_too_wide() {
        let long = "x".repeat(MAX_EVENT_BYTES * 2);
        let text = format!("{HEADER}{long}\n{},,,,,,,1\n2025,pi,0,1\n", "2025");
        let (records, _) = cut(text.as_bytes(), 1000).unwrap();
        let problems: Vec<_> = records.iter().map(|record| record.problem.is_some()).collect();
        assert_eq!(problems, [true, true, false]);
        let wide = format!("{HEADER}{}\n2025,pi,0,1\n", ",".repeat(MAX_COLUMNS * 3));
        assert_eq!(cut(wide.as_bytes(), 100).unwrap().0.len(), 2);
        assert!(cut(long.as_bytes(), 1000).is_err());
    }

    #[test]
    fn a_last_line_that_is_short_may_be_cut_off() {
        let cut_off = |lines: &str| {
            let (records, _) = cut(format!("{HEADER}{lines}").as_bytes(), 9).unwrap();
            records.last().unwrap().may_be_cut_off
        };
        assert!(cut_off("2025,pi,0"));
        assert!(!cut_off("2025,pi,0\n"));
        assert!(!cut_off("2025,pi,0,1,,,"));
    }

    #[test]
    fn a_first_line_must_name_the_columns() {
        for (text, expected) in [
            ("", "it holds nothing"),
            ("\u{0}\u{1}\n", "it holds no sync events"),
            ("hello\nworld\n", "it holds no sync events"),
            ("device_id;timestamp;total_files_synced;total_errors\n", "it holds no sync events"),
            ("device_id,timestamp\n", "the columns total_files_synced, total_errors"),
            ("device_id,device_id\n", "there are two columns device_id"),
        ] {
            let Err(error) = cut(text.as_bytes(), 4) else { panic!("{text}") };
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
        assert!(cut(b"\xff\xfe\x00\x01", 2).is_err());
        let (_, ignored) = cut(HEADER.as_bytes(), 3).unwrap();
        assert_eq!(ignored, ["extra"]);
    }
}
