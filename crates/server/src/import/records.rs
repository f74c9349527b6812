//! An input cut into records, each the JSON text of one event, in bounded memory whatever is read.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicU64},
};

use clap::ValueEnum;
use pisync_core::event_stream::{self, EventSplitter, MAX_EVENT_BYTES, Piece, StreamError};

use super::{
    ImportError,
    csv::CsvCutter,
    input::{Input, Source},
};

/// How much is cut at a time, in bytes.
const CHUNK: usize = 64 << 10;

/// How records follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A JSON object per line.
    Ndjson,
    /// A JSON array of objects.
    Json,
    /// Lines of cells, named by the first.
    Csv,
}

/// One record.
pub(super) struct Record {
    /// JSON text; of what is none, what was read of it.
    pub(super) text: Vec<u8>,
    /// Why it is no event, whatever its text.
    pub(super) problem: Option<String>,
    /// Nothing follows it, not even the end of its line: when it is broken, the input was cut off.
    pub(super) may_be_cut_off: bool,
}

impl Record {
    pub(super) fn event(text: Vec<u8>) -> Self {
        Self { text, problem: None, may_be_cut_off: false }
    }

    pub(super) fn wrong(problem: &str, text: &[u8]) -> Self {
        Self { text: text.to_vec(), problem: Some(problem.to_owned()), may_be_cut_off: false }
    }

    pub(super) fn too_long() -> Self {
        Self::wrong(&format!("must be at most {MAX_EVENT_BYTES} bytes"), &[])
    }
}

enum Cutter {
    Json(EventSplitter),
    Csv(Box<CsvCutter>),
    /// The input has come to its end.
    Done,
}

/// The records of an input.
pub(super) struct Records {
    input: Input,
    cutter: Cutter,
    chunk: Vec<u8>,
    /// Cut and not taken yet.
    found: VecDeque<Record>,
    is_array: bool,
    /// Columns of CSV that nobody knows.
    pub(super) ignored_columns: Vec<String>,
}

impl Records {
    /// Opens a source. Without a `format`, its first character tells.
    pub(super) fn open(
        source: &Source,
        format: Option<Format>,
        taken: &Arc<AtomicU64>,
    ) -> Result<Self, ImportError> {
        let mut input = source.open(taken)?;
        let mut chunk = vec![0; CHUNK];
        let (start, first) = loop {
            let count = input.read(&mut chunk)?;
            if count == 0 {
                return Err(ImportError(format!("{} is empty", source.name())));
            }
            if let Some(first) = first_character(&chunk[..count]) {
                break (count, first);
            }
        };
        let format = format.unwrap_or(match first {
            b'{' => Format::Ndjson,
            b'[' => Format::Json,
            _ => Format::Csv,
        });
        let cutter = match format {
            Format::Ndjson => Cutter::Json(EventSplitter::new(event_stream::Format::Lines)),
            Format::Json => Cutter::Json(EventSplitter::new(event_stream::Format::Array)),
            Format::Csv => Cutter::Csv(Box::new(CsvCutter::new())),
        };
        let is_array = format == Format::Json;
        let mut records = Self {
            input,
            cutter,
            chunk,
            found: VecDeque::new(),
            is_array,
            ignored_columns: Vec::new(),
        };
        records.cut(start)?;
        while let Cutter::Csv(cutter) = &records.cutter {
            if let Some(ignored) = cutter.ignored_columns() {
                records.ignored_columns = ignored.to_vec();
                break;
            }
            let count = records.input.read(&mut records.chunk)?;
            records.cut(count)?;
        }
        Ok(records)
    }

    /// The next record; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Record>, ImportError> {
        while self.found.is_empty() && !matches!(self.cutter, Cutter::Done) {
            let count = self.input.read(&mut self.chunk)?;
            self.cut(count)?;
        }
        Ok(self.found.pop_front())
    }

    /// Cuts the first bytes of the chunk; none is the end.
    fn cut(&mut self, count: usize) -> Result<(), ImportError> {
        let (bytes, found) = (&self.chunk[..count], &mut self.found);
        let mut take = |piece: Piece<'_>| -> Result<(), StreamError> {
            found.push_back(match piece {
                Piece::Event(text) => Record::event(text.to_vec()),
                Piece::TooLong => Record::too_long(),
            });
            Ok(())
        };
        let result = match (&mut self.cutter, count) {
            (Cutter::Json(cutter), 1..) => cutter.push(bytes, &mut take).map_err(broken),
            (Cutter::Csv(cutter), 1..) => cutter.push(bytes, found),
            (cutter, 0) => match std::mem::replace(cutter, Cutter::Done) {
                Cutter::Json(cutter) => {
                    let result = cutter.finish(&mut take).map_err(broken);
                    if let Some(last) = found.back_mut() {
                        last.may_be_cut_off = !self.is_array && !is_json(&last.text);
                    }
                    result
                }
                Cutter::Csv(mut cutter) => cutter.finish(found),
                Cutter::Done => Ok(()),
            },
            (Cutter::Done, _) => Ok(()),
        };
        let name = || self.input.source.name();
        result.map_err(|error| ImportError(format!("cannot import {}: {error}", name())))
    }
}

fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
fn broken(error: StreamError) -> ImportError {
    ImportError(match error {
        StreamError::NotAnArray => "it is no JSON array".to_owned(),
        StreamError::Broken { .. } => format!("the JSON array is broken: {error}"),
    })
}

/// The first byte that is neither white space nor a part of a byte order mark.
fn first_character(bytes: &[u8]) -> Option<u8> {
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    bytes.iter().copied().find(|byte| !byte.is_ascii_whitespace())
}
