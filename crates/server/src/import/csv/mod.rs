//! Turns CSV into JSON. Each line becomes the object that a client would have sent, so that both are checked by the
//! same rules. `records` calls it. Its memory must stay bounded.
//!
//! A cell in quotation marks may contain line breaks. If somebody forgot to close a quotation mark, it would swallow
//! the lines that follow. Several lines are therefore one record only when that is certain. Otherwise the first line is
//! a wrong record, and the next line is read by itself.

mod columns;

use std::collections::VecDeque;

pub use self::columns::ColumnNames;
use self::columns::{Columns, no_events};
use super::{ImportError, records::Record};
use crate::csv_row::{Reading, Row, ends_line, is_blank};
use pisync_core::event_stream::{MAX_BEGINNING_BYTES, MAX_EVENT_BYTES};

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The maximum length of one record, in one or several lines. A record must be shorter than this.
const MAX_RECORD: usize = MAX_EVENT_BYTES + 1;

/// Cuts CSV into records.
pub(super) struct CsvCutter {
    /// Text that was read and is not cut yet.
    text: Vec<u8>,
    place: Place,
    /// The columns, once the first line was read.
    columns: Option<Columns>,
    row: Row,
    /// The beginning of a line that is too long.
    long_beginning: Vec<u8>,
}

/// Where the text that is not cut yet begins.
#[derive(Clone, Copy)]
enum Place {
    /// At the beginning, before the byte order mark if there is one.
    Start,
    /// At the beginning of a line.
    Line,
    /// Within a line that is too long. Only its beginning is kept.
    LongLine,
    /// Within NUL bytes.
    Nuls,
}

/// What was found at the beginning of a line, and its length in bytes.
#[derive(Clone, Copy)]
enum Line {
    /// No record.
    Blank(usize),
    /// A record, which is in the row. The length excludes the end of its last line.
    Record(usize),
    /// A line that opens a quotation mark and does not close it. The length excludes the end of the line.
    Unclosed(usize),
    /// A line that is too long.
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

    /// Unusual names of columns, once the first line was read.
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

    /// Ends the input.
    pub(super) fn finish(&mut self, found: &mut VecDeque<Record>) -> Result<(), ImportError> {
        self.cut(true, found)?;
        if self.columns.is_none() {
            return Err(ImportError("it holds nothing".to_owned()));
        }
        Ok(())
    }

    /// Cuts the text that is there. `is_all` says that nothing follows.
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
                        // NUL bytes at the end of the input may yet be overwritten with lines.
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

    /// Handles what was found at the beginning of a line, and answers how many bytes were used.
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

    /// Finds what `rest` begins with; `rest` is not empty. `None` when more text is needed to decide.
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
            // The line's end belongs to it, unless that is a NUL byte, which is reported.
            let has_end = rest.get(length).is_some_and(|byte| *byte != 0);
            return Some(Line::Blank(length + usize::from(has_end)));
        }
        if self.row.read(line) != Reading::Open {
            return Some(Line::Record(length));
        }
        let reach = rest.len().min(MAX_RECORD);
        // A record that ends with the text is complete only if nothing follows.
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

#[cfg(test)]
mod tests;
