//! Cuts an input into records, each the JSON text of one event. `resume` and the importing thread call it. Memory must
//! stay bounded, whatever the input contains.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicU64},
};

use clap::ValueEnum;
use pisync_core::event_stream::{self, EventSplitter, MAX_EVENT_BYTES, Piece, StreamError};

use super::{
    ImportError,
    csv::{ColumnNames, CsvCutter},
    input::{Input, Source},
};

/// How many bytes are cut at a time.
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
    /// The JSON text. For a record that is no JSON, the text that was read.
    pub(super) text: Vec<u8>,
    /// Why the record is not an event, whatever its text says.
    pub(super) problem: Option<String>,
    /// Whether the text is only the beginning of the record.
    pub(super) is_truncated: bool,
    /// Whether nothing follows the record, not even the end of its line. If it is broken, the input was cut off.
    pub(super) may_be_cut_off: bool,
}

impl Record {
    pub(super) fn event(text: Vec<u8>) -> Self {
        Self { text, problem: None, is_truncated: false, may_be_cut_off: false }
    }

    pub(super) fn wrong(problem: &str, text: &[u8]) -> Self {
        let problem = Some(problem.to_owned());
        Self { text: text.to_vec(), problem, is_truncated: false, may_be_cut_off: false }
    }

    /// A record of which only the beginning was kept.
    pub(super) fn too_long(beginning: &[u8]) -> Self {
        let problem =
            format!("is longer than {MAX_EVENT_BYTES} bytes, the most that a record may have");
        Self { is_truncated: true, ..Self::wrong(&problem, beginning) }
    }

    /// NUL bytes where records should be. Their number does not matter.
    pub(super) fn nuls() -> Self {
        Self::wrong("is a run of NUL bytes, as a power cut leaves them", &[])
    }
}

enum Cutter {
    /// Lines of JSON. `in_nuls` tells whether the last bytes were NUL bytes.
    Lines {
        splitter: EventSplitter,
        in_nuls: bool,
    },
    Array(EventSplitter),
    Csv(Box<CsvCutter>),
    /// The input has ended.
    Done,
}

/// The records of an input.
pub(super) struct Records {
    input: Input,
    cutter: Cutter,
    chunk: Vec<u8>,
    /// Records that are cut and not taken yet.
    found: VecDeque<Record>,
    /// The error that follows those records.
    failed: Option<ImportError>,
    /// Unusual names of CSV columns.
    pub(super) column_names: ColumnNames,
}

impl Records {
    /// Opens a source. Without a `format`, its first character decides.
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
            if let Some(encoding) = other_encoding(&chunk[..count]) {
                return Err(ImportError(format!("cannot import {}: {encoding}", source.name())));
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
            Format::Ndjson => Cutter::Lines {
                splitter: EventSplitter::new(event_stream::Format::Lines),
                in_nuls: false,
            },
            Format::Json => Cutter::Array(EventSplitter::new(event_stream::Format::Array)),
            Format::Csv => Cutter::Csv(Box::new(CsvCutter::new())),
        };
        let mut records = Self {
            input,
            cutter,
            chunk,
            found: VecDeque::new(),
            failed: None,
            column_names: ColumnNames::default(),
        };
        records.cut(start);
        while let Cutter::Csv(cutter) = &records.cutter {
            if let Some(names) = cutter.column_names() {
                records.column_names = names.clone();
                break;
            }
            records.read();
        }
        match records.failed.take() {
            Some(error) if records.found.is_empty() => Err(error),
            failed => Ok(Self { failed, ..records }),
        }
    }

    /// The next record; `None` at the end. The records before a broken place come first, then the error.
    pub(super) fn next(&mut self) -> Result<Option<Record>, ImportError> {
        while self.found.is_empty() {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if matches!(self.cutter, Cutter::Done) {
                return Ok(None);
            }
            self.read();
        }
        Ok(self.found.pop_front())
    }

    /// Reads the next chunk and cuts it.
    fn read(&mut self) {
        match self.input.read(&mut self.chunk) {
            Ok(count) => self.cut(count),
            Err(error) => self.fail(error),
        }
    }

    fn fail(&mut self, error: ImportError) {
        self.cutter = Cutter::Done;
        self.failed = Some(error);
    }

    /// Cuts the first `count` bytes of the chunk; 0 means the end.
    fn cut(&mut self, count: usize) {
        let (bytes, found) = (&self.chunk[..count], &mut self.found);
        let result = match (&mut self.cutter, count) {
            (Cutter::Lines { splitter, in_nuls }, 1..) => lines(splitter, in_nuls, bytes, found),
            (Cutter::Array(splitter), 1..) => splitter.push(bytes, &mut taking(found)),
            (Cutter::Csv(cutter), 1..) => cutter.push(bytes, found),
            (cutter, 0) => match std::mem::replace(cutter, Cutter::Done) {
                Cutter::Lines { splitter, in_nuls } => last_line(splitter, in_nuls, found),
                Cutter::Array(splitter) => splitter.finish(&mut taking(found)),
                Cutter::Csv(mut cutter) => cutter.finish(found),
                Cutter::Done => Ok(()),
            },
            (Cutter::Done, _) => Ok(()),
        };
        if let Err(error) = result {
            let name = self.input.source.name();
            self.fail(ImportError(format!("cannot import {name}: {error}")));
        }
    }
}

/// Appends each piece to the records that were found.
fn taking(found: &mut VecDeque<Record>) -> impl FnMut(Piece<'_>) -> Result<(), ImportError> {
    move |piece| {
        found.push_back(match piece {
            Piece::Event(text) => Record::event(text.to_vec()),
            Piece::TooLong(beginning) => Record::too_long(beginning),
        });
        Ok(())
    }
}

/// Cuts lines. A NUL byte ends a line too. After a power cut a file may contain NUL bytes where the end of its last
/// line should be. Lines that were added later follow them.
fn lines(
    splitter: &mut EventSplitter,
    in_nuls: &mut bool,
    mut bytes: &[u8],
    found: &mut VecDeque<Record>,
) -> Result<(), ImportError> {
    while let Some(first) = bytes.first() {
        let is_nul = |byte: &u8| *byte == 0;
        let end = bytes.iter().position(|byte| is_nul(byte) != is_nul(first));
        let (here, behind) = bytes.split_at(end.unwrap_or(bytes.len()));
        match (is_nul(first), std::mem::replace(in_nuls, is_nul(first))) {
            (true, false) => splitter.push(b"\n", &mut taking(found))?,
            (true, true) => {}
            (false, was_in_nuls) => {
                if was_in_nuls {
                    found.push_back(Record::nuls());
                }
                splitter.push(here, &mut taking(found))?;
            }
        }
        bytes = behind;
    }
    Ok(())
}

/// Cuts the rest at the end of the input.
fn last_line(
    splitter: EventSplitter,
    in_nuls: bool,
    found: &mut VecDeque<Record>,
) -> Result<(), ImportError> {
    if in_nuls {
        // NUL bytes at the end of the input may yet be overwritten with lines.
        found.push_back(Record { may_be_cut_off: true, ..Record::nuls() });
        return Ok(());
    }
    let before = found.len();
    splitter.finish(&mut taking(found))?;
    for last in found.range_mut(before..) {
        last.may_be_cut_off = !is_json(&last.text);
    }
    Ok(())
}

fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
}

impl From<StreamError> for ImportError {
    fn from(error: StreamError) -> Self {
        Self(match error {
            StreamError::NotAnArray => "it is no JSON array".to_owned(),
            StreamError::Broken { .. } => format!("the JSON array is broken: {error}"),
        })
    }
}

/// What the text probably is, if it begins like another encoding or like a compressed file.
fn other_encoding(bytes: &[u8]) -> Option<String> {
    const PACKED: [(&[u8], &str); 3] =
        [(b"PK\x03\x04", "zip"), (b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2")];
    if let Some((_, name)) = PACKED.into_iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Some(format!(
            "it is packed with {name}; unpack it first, or pack it with gzip or zstd"
        ));
    }
    let is_utf16 = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => true,
        // Without a byte order mark: in ASCII text every other byte is NUL.
        [first, 0, second, 0, ..] | [0, first, 0, second, ..] => *first != 0 && *second != 0,
        _ => false,
    };
    let advice = "it is UTF-16 text; convert it first: iconv -f UTF-16 -t UTF-8 FILE > NEW-FILE";
    is_utf16.then(|| advice.to_owned())
}

/// The first byte that is neither white space nor part of a byte order mark.
fn first_character(bytes: &[u8]) -> Option<u8> {
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    bytes.iter().copied().find(|byte| !byte.is_ascii_whitespace())
}
