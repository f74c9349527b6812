//! What holds of any body of `POST /api/sync-events`, whatever pieces it arrives in. The fuzz target
//! and the replay of its corpus both call [`check`].

use pisync_core::event_stream::{EventSplitter, Format, MAX_EVENT_BYTES, Piece, StreamError};
use serde_json::value::RawValue;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// A tilde in the input stands for so many, so that small inputs reach the limit and step over it.
const STRETCHED: usize = MAX_EVENT_BYTES - 4;
/// Tildes that are stretched; more would only take time.
const STRETCHES: usize = 3;

/// Panics when the stream is cut as it must not be.
pub(crate) fn check(input: &[u8]) {
    let stream = stretch(input);
    for format in [Format::Array, Format::Lines] {
        let whole = split(format, &stream, usize::MAX);
        // Byte by byte takes too long where the stream was stretched.
        let sizes: &[usize] =
            if stream.len() > STRETCHED { &[4093, 65_521] } else { &[1, 2, 3, 13] };
        for &size in sizes {
            assert_eq!(split(format, &stream, size), whole, "{format:?} in chunks of {size}");
        }
        match format {
            Format::Array => check_array(&stream, whole),
            Format::Lines => assert_eq!(whole, (lines(&stream), Ok(()))),
        }
    }
}

fn stretch(input: &[u8]) -> Vec<u8> {
    let mut stream = Vec::with_capacity(input.len());
    let mut left = STRETCHES;
    for &byte in input {
        let times = if byte == b'~' && left > 0 { STRETCHED } else { 1 };
        left -= usize::from(times > 1);
        stream.extend(std::iter::repeat_n(byte, times));
    }
    stream
}

/// What was handed over, `None` for what was too long, and how it ended.
type Pieces = (Vec<Option<Vec<u8>>>, Result<(), StreamError>);

/// What comes out when the stream arrives in chunks of `size` bytes.
fn split(format: Format, stream: &[u8], size: usize) -> Pieces {
    let mut pieces = Vec::new();
    let mut each = |piece: Piece<'_>| {
        pieces.push(match piece {
            Piece::Event(bytes) => {
                assert!(!bytes.is_empty() && bytes.len() <= MAX_EVENT_BYTES);
                Some(bytes.to_vec())
            }
            Piece::TooLong(_) => None,
        });
        Ok::<_, StreamError>(())
    };
    let mut splitter = EventSplitter::new(format);
    for chunk in stream.chunks(size) {
        if let Err(error) = splitter.push(chunk, &mut each) {
            return (pieces, Err(error));
        }
        assert!(splitter.pending_bytes() <= MAX_EVENT_BYTES, "more is kept than one event");
    }
    let end = splitter.finish(&mut each);
    (pieces, end)
}

/// The plain truth about lines.
fn lines(stream: &[u8]) -> Vec<Option<Vec<u8>>> {
    stream
        .strip_prefix(BYTE_ORDER_MARK)
        .unwrap_or(stream)
        .split(|byte| *byte == b'\n')
        .map(|line| {
            let spaces = line.iter().take_while(|byte| b" \t\r".contains(byte)).count();
            &line[spaces..]
        })
        .filter(|line| !line.is_empty())
        .map(kept)
        .collect()
}

fn kept(value: &[u8]) -> Option<Vec<u8>> {
    (value.len() <= MAX_EVENT_BYTES).then(|| value.to_vec())
}

/// What serde_json takes for an array is cut into the same values, and where it does not, the splitter
/// says so or one of its pieces is no JSON.
fn check_array(stream: &[u8], (pieces, end): Pieces) {
    let text = stream.strip_prefix(BYTE_ORDER_MARK).unwrap_or(stream);
    if let Ok(values) = serde_json::from_slice::<Vec<&RawValue>>(text) {
        let values: Vec<_> = values.iter().map(|value| kept(value.get().as_bytes())).collect();
        assert_eq!((pieces, end), (values, Ok(())));
    } else if end.is_ok() {
        let is_json = |piece: &Option<Vec<u8>>| {
            piece.as_ref().is_some_and(|text| serde_json::from_slice::<&RawValue>(text).is_ok())
        };
        assert!(!pieces.iter().all(is_json), "what is no array gave nothing but JSON");
    }
}
