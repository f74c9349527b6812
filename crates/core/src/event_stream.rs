//! Splits a stream of many events into single events while it arrives. The stream is a JSON array, or one JSON value
//! per line (NDJSON). The batch endpoint and the import call it. It never buffers more than one event, whatever is
//! sent.
//!
//! The splitter finds the ends of values by counting brackets outside strings; it does not parse values. An event that
//! is not JSON is refused later, by [`crate::SyncEvent::from_json`].

use std::fmt;

/// The largest single event, in bytes of its JSON text. The limit of a body with one event is the same.
pub const MAX_EVENT_BYTES: usize = 64 << 10;

/// The number of bytes kept from a longer event.
pub const MAX_BEGINNING_BYTES: usize = 1 << 10;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// How events are separated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `[{…}, {…}]`
    Array,
    /// One per line. Blank lines are skipped.
    Lines,
}

/// A value found in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// The text of one value.
    Event(&'a [u8]),
    /// The first bytes of a value longer than [`MAX_EVENT_BYTES`], so that a person can find it in the input. It holds
    /// at most [`MAX_BEGINNING_BYTES`]; the rest is dropped.
    TooLong(&'a [u8]),
}

/// Why a stream is not an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamError {
    /// It does not begin with `[`.
    NotAnArray,
    /// The array is malformed at this offset.
    Broken {
        /// What was expected instead.
        expected: &'static str,
        /// Bytes read before the error.
        offset: u64,
    },
}

impl fmt::Display for StreamError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnArray => formatter.write_str("not an array"),
            Self::Broken { expected, offset } => {
                write!(formatter, "expected {expected} after {offset} bytes")
            }
        }
    }
}

/// The position of the splitter between or inside values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Only this many bytes of the byte order mark have been read.
    Mark { read: usize },
    /// After the byte order mark (if any) and white space.
    Start,
    /// After `[`.
    First,
    /// After a comma.
    Next,
    /// Within a value.
    Value(Value),
    /// After a value.
    After,
    /// After `]`.
    End,
}

/// What ends a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    /// The closing of its outermost bracket.
    Brackets { depth: u32, in_string: bool, escaped: bool },
    /// The closing quotation mark.
    String { escaped: bool },
    /// The next comma, bracket or white space, which is not part of the value.
    Word,
    /// The end of the line.
    Line,
}

/// Splits one stream. See the module's documentation.
#[derive(Debug)]
pub struct EventSplitter {
    format: Format,
    state: State,
    /// The first part of a value whose end has not arrived.
    pending: Vec<u8>,
    too_long: bool,
    offset: u64,
}

impl EventSplitter {
    /// Creates a splitter at the beginning of a stream.
    #[must_use]
    pub fn new(format: Format) -> Self {
        Self {
            format,
            state: State::Mark { read: 0 },
            pending: Vec::new(),
            too_long: false,
            offset: 0,
        }
    }

    /// The number of buffered bytes of an unfinished value, at most [`MAX_EVENT_BYTES`].
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    /// Reads the next bytes and calls `each` with every value that they complete. It stops at the first error of
    /// `each`.
    ///
    /// # Errors
    /// A malformed stream, or the error of `each`.
    pub fn push<E: From<StreamError>>(
        &mut self,
        mut bytes: &[u8],
        each: &mut impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(&byte) = bytes.first() {
            match self.state {
                State::Value(value) => {
                    let (taken, state) = self.continue_value(value, bytes);
                    let (here, rest) = bytes.split_at(taken);
                    if state == State::After {
                        self.complete(here, each)?;
                    } else {
                        self.keep(here);
                    }
                    self.state = state;
                    self.offset += taken as u64;
                    bytes = rest;
                }
                State::Mark { read } if BYTE_ORDER_MARK.get(read) == Some(&byte) => {
                    self.state = State::Mark { read: read + 1 };
                    self.offset += 1;
                    bytes = &bytes[1..];
                }
                State::Mark { read } => self.state = self.after_mark(read)?,
                state => {
                    self.state = self.between_values(state, byte)?;
                    // The first byte of a value belongs to it.
                    if !matches!(self.state, State::Value(_)) {
                        self.offset += 1;
                        bytes = &bytes[1..];
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends the stream: nothing follows.
    ///
    /// # Errors
    /// An array that is not closed, or the error of `each` for the last line.
    pub fn finish<E: From<StreamError>>(
        mut self,
        each: &mut impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if let State::Mark { read } = self.state {
            self.state = self.after_mark(read)?;
        }
        match (self.format, self.state) {
            (Format::Array, State::End) | (Format::Lines, State::Start | State::After) => Ok(()),
            (Format::Lines, _) => self.complete(&[], each),
            (Format::Array, State::Start) => Err(StreamError::NotAnArray.into()),
            (Format::Array, _) => Err(self.broken("the end of the array").into()),
        }
    }

    /// The state after `read` bytes of the byte order mark when the next byte does not continue it. An incomplete mark
    /// is not a mark. Its bytes belong to the first line, which is then not JSON.
    fn after_mark(&mut self, read: usize) -> Result<State, StreamError> {
        let part = &BYTE_ORDER_MARK[..read];
        Ok(match self.format {
            _ if part.is_empty() || part == BYTE_ORDER_MARK => State::Start,
            Format::Array => return Err(StreamError::NotAnArray),
            Format::Lines => {
                self.keep(part);
                State::Value(Value::Line)
            }
        })
    }

    /// The state after a byte outside values. If it is [`State::Value`], the byte is the first of that value.
    fn between_values(&self, state: State, byte: u8) -> Result<State, StreamError> {
        let is_space = matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        Ok(match (state, byte) {
            _ if is_space => state,
            _ if self.format == Format::Lines => State::Value(Value::Line),
            (State::Start, b'[') => State::First,
            (State::Start, _) => return Err(StreamError::NotAnArray),
            (State::First | State::After, b']') => State::End,
            (State::After, b',') => State::Next,
            (State::After, _) => return Err(self.broken("a comma or the end of the array")),
            (State::End, _) => return Err(self.broken("nothing more")),
            (_, b'{' | b'[') => {
                State::Value(Value::Brackets { depth: 0, in_string: false, escaped: false })
            }
            (_, b'"') => State::Value(Value::String { escaped: true }),
            (_, b',' | b']' | b'}') => return Err(self.broken("a value")),
            _ => State::Value(Value::Word),
        })
    }

    /// Continues inside a value. Returns how many of `bytes` belong to it, and the state after them.
    fn continue_value(&self, mut value: Value, bytes: &[u8]) -> (usize, State) {
        for (position, &byte) in bytes.iter().enumerate() {
            match &mut value {
                Value::Line if byte == b'\n' => return (position, State::After),
                Value::Line => {}
                Value::Word
                    if matches!(byte, b',' | b']' | b'}' | b' ' | b'\t' | b'\n' | b'\r') =>
                {
                    return (position, State::After);
                }
                Value::Word => {}
                // The opening quotation mark counts as escaped, so it does not end the string.
                Value::String { escaped } => match byte {
                    _ if *escaped => *escaped = false,
                    b'\\' => *escaped = true,
                    b'"' => return (position + 1, State::After),
                    _ => {}
                },
                Value::Brackets { depth, in_string, escaped } => match byte {
                    _ if *escaped => *escaped = false,
                    b'\\' if *in_string => *escaped = true,
                    b'"' => *in_string = !*in_string,
                    _ if *in_string => {}
                    b'{' | b'[' => *depth = depth.saturating_add(1),
                    b'}' | b']' => {
                        *depth = depth.saturating_sub(1);
                        if *depth == 0 {
                            return (position + 1, State::After);
                        }
                    }
                    _ => {}
                },
            }
        }
        (bytes.len(), State::Value(value))
    }

    /// Buffers a part of a value.
    fn keep(&mut self, part: &[u8]) {
        if self.too_long {
            return;
        }
        if self.pending.len() + part.len() > MAX_EVENT_BYTES {
            self.too_long = true;
            let beginning = self.pending.iter().chain(part).take(MAX_BEGINNING_BYTES);
            self.pending = beginning.copied().collect();
        } else {
            self.pending.extend_from_slice(part);
        }
    }

    /// Passes a value to `each`. `part` is the last part of it.
    fn complete<E>(
        &mut self,
        part: &[u8],
        each: &mut impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.pending.is_empty() && !self.too_long && part.len() <= MAX_EVENT_BYTES {
            return each(Piece::Event(part));
        }
        self.keep(part);
        if std::mem::take(&mut self.too_long) {
            let result = each(Piece::TooLong(&self.pending));
            self.pending.clear();
            return result;
        }
        let result = each(Piece::Event(&self.pending));
        self.pending.clear();
        result
    }

    fn broken(&self, expected: &'static str) -> StreamError {
        StreamError::Broken { expected, offset: self.offset }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value as Json;

    use super::*;

    /// The pieces of `text` when it arrives in chunks of `size` bytes.
    fn split(format: Format, text: &[u8], size: usize) -> Result<Vec<String>, StreamError> {
        let mut pieces = Vec::new();
        let mut each = |piece: Piece<'_>| {
            pieces.push(match piece {
                Piece::Event(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                Piece::TooLong(_) => "too long".to_owned(),
            });
            Ok::<_, StreamError>(())
        };
        let mut splitter = EventSplitter::new(format);
        for chunk in text.chunks(size) {
            splitter.push(chunk, &mut each)?;
        }
        splitter.finish(&mut each)?;
        Ok(pieces)
    }

    #[test]
    fn arrays() {
        for (text, expected) in [
            ("[]", vec![]),
            ("\u{feff} [ ] ", vec![]),
            ("[{}]", vec!["{}"]),
            (
                r#" [ {"a":"]},{\""} ,[1,[2]], "x\",", 1e5,null ] "#,
                vec![r#"{"a":"]},{\""}"#, "[1,[2]]", r#""x\",""#, "1e5", "null"],
            ),
        ] {
            for size in 1..text.len() + 1 {
                let pieces = split(Format::Array, text.as_bytes(), size);
                assert_eq!(
                    pieces.as_deref(),
                    Ok(&expected.iter().map(ToString::to_string).collect::<Vec<_>>()[..]),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn broken_arrays() {
        for text in [
            "[",
            "[1",
            "[1,",
            "[1,]",
            "[,1]",
            "[1 2]",
            "[1]]",
            "[1]x",
            "[{]",
            "[}",
            "[\"",
            "[{\"a\":\"}]",
        ] {
            assert!(
                matches!(split(Format::Array, text.as_bytes(), 1), Err(StreamError::Broken { .. })),
                "{text}"
            );
        }
        for text in ["", " ", "{}", "1", "\u{feff}", "x["] {
            assert_eq!(
                split(Format::Array, text.as_bytes(), 1),
                Err(StreamError::NotAnArray),
                "{text}"
            );
        }
    }

    #[test]
    fn lines() {
        for (text, expected) in [
            ("", vec![]),
            ("\n\r\n \n", vec![]),
            ("{}", vec!["{}"]),
            ("\u{feff}{\"a\":1}\r\n\n  {\"b\": 2}\nx", vec!["{\"a\":1}\r", "{\"b\": 2}", "x"]),
        ] {
            for size in 1..text.len() + 1 {
                let pieces = split(Format::Lines, text.as_bytes(), size).unwrap();
                assert_eq!(pieces, expected, "{text:?}");
            }
        }
    }

    #[test]
    fn a_part_of_a_byte_order_mark_is_none() {
        for text in [&b"\xef[1]"[..], b"\xef\xbb[1]", b"\xef\xbb", b" \xef\xbb\xbf[1]"] {
            for size in 1..=text.len() {
                assert_eq!(split(Format::Array, text, size), Err(StreamError::NotAnArray));
                let lines = split(Format::Lines, text, size).unwrap();
                let line = String::from_utf8_lossy(text.trim_ascii_start());
                assert_eq!(lines, [line], "{text:?} in chunks of {size}");
            }
        }
    }

    #[test]
    fn long_values_are_not_kept() {
        let long = "x".repeat(MAX_EVENT_BYTES + 1);
        let longest = "x".repeat(MAX_EVENT_BYTES);
        for size in [1000, usize::MAX >> 1] {
            let lines =
                split(Format::Lines, format!("{long}\n{longest}\n1").as_bytes(), size).unwrap();
            assert_eq!(lines, ["too long", &longest, "1"]);
            let array = split(Format::Array, format!("[\"{long}\",1]").as_bytes(), size).unwrap();
            assert_eq!(array, ["too long", "1"]);
        }
    }

    fn json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<i64>().prop_map(Json::from),
            ".{0,12}".prop_map(Json::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
                prop::collection::hash_map(".{0,4}", inner, 0..4)
                    .prop_map(|fields| Json::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_values_in_any_chunks(values in prop::collection::vec(json(), 0..6), size in 1usize..40) {
            let expected: Vec<String> = values.iter().map(ToString::to_string).collect();
            let array = Json::from(values).to_string();
            prop_assert_eq!(split(Format::Array, array.as_bytes(), size), Ok(expected.clone()));
            let lines = expected.join("\n");
            prop_assert_eq!(split(Format::Lines, lines.as_bytes(), size), Ok(expected));
        }

        /// No input panics, and the size of the chunks does not change the result.
        #[test]
        fn chunks_make_no_difference(text in r#"[\[\]{}",\\ a1\n]{0,24}"#, size in 1usize..8) {
            for format in [Format::Array, Format::Lines] {
                let whole = split(format, text.as_bytes(), usize::MAX >> 1);
                prop_assert_eq!(split(format, text.as_bytes(), size), whole);
            }
        }
    }
}
