//! Reads one record of CSV: its cells, and whether its quotation marks are closed. The import of events and the reader of
//! rosters call it. It knows no columns, and must not read beyond the text that it is given.

/// A NUL byte ends a line too. After a power cut a file may contain NUL bytes where the end of its last line should be.
pub(crate) fn ends_line(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r' | 0)
}

pub(crate) fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// The cells of one record.
#[derive(Default)]
pub(crate) struct Row {
    /// The text of the cells, one after the other.
    pub(crate) bytes: Vec<u8>,
    pub(crate) cells: Vec<Cell>,
    /// Whether a cell goes on behind its closing quotation mark.
    pub(crate) has_text_behind_quotes: bool,
}

pub(crate) struct Cell {
    /// Where the cell ends in `bytes`.
    pub(crate) end: usize,
    /// Whether the cell continues over several lines.
    pub(crate) has_lines: bool,
}

/// The result of reading a record.
#[derive(PartialEq, Eq)]
pub(crate) enum Reading {
    /// The record ends before this position, at the end of a line or of the text.
    Closed { end: usize },
    /// The text ends inside quotation marks.
    Open,
    /// The record has several lines, and text behind a closing quotation mark. That mark was probably meant to open a
    /// cell.
    Doubtful,
}

impl Row {
    /// Reads the record at the beginning of `text`. Blanks around cells, outside of quotation marks, are ignored.
    pub(crate) fn read(&mut self, text: &[u8]) -> Reading {
        self.bytes.clear();
        self.cells.clear();
        self.has_text_behind_quotes = false;
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
            // Usually there is nothing behind a closing quotation mark.
            let plain = behind[..length].trim_ascii_end();
            if unquoted > start && !plain.is_empty() {
                self.has_text_behind_quotes = true;
                if has_lines {
                    return Reading::Doubtful;
                }
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

    /// Reads up to the closing quotation mark and answers its position; `None` when there is none.
    fn quoted(&mut self, text: &[u8], has_lines: &mut bool) -> Option<usize> {
        let mut position = 0;
        loop {
            let here = text.get(position..)?;
            let length = here.iter().position(|byte| *byte == b'"')?;
            let part = &here[..length];
            *has_lines |= part.iter().any(|byte| ends_line(*byte));
            self.bytes.extend_from_slice(part);
            position += length;
            // Two quotation marks stand for one.
            if text.get(position + 1) != Some(&b'"') {
                return Some(position);
            }
            self.bytes.push(b'"');
            position += 2;
        }
    }

    pub(crate) fn cells(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.cells
            .iter()
            .map(move |cell| &self.bytes[std::mem::replace(&mut start, cell.end)..cell.end])
    }

    /// The entire text, for error messages.
    pub(crate) fn text(&self) -> Vec<u8> {
        self.cells().collect::<Vec<_>>().join(&b',')
    }
}
