//! Decompresses bodies in gzip, deflate and zstd, piece by piece from memory. The readers of bodies call it. Nothing
//! here may wait for a client. A slow client therefore cannot prolong the life of a decoder and its memory.
//!
//! The cost of a body is bounded in three ways. The window of a zstd frame is checked before it is allocated. The
//! number of frames or members is limited. So is the part of the body that produces no output.

use std::io::{self, BufRead, Read};

use axum::{
    body::Bytes,
    http::{HeaderMap, header},
};
use bytes::Buf as _;
use flate2::{Decompress, FlushDecompress, bufread::GzDecoder};
use zstd::{
    stream::raw::{Decoder as ZstdDecoder, Operation, Status},
    zstd_safe::DParameter,
};

use crate::{api::wire::error::ApiError, ingest::Permit};

/// The largest window of a zstd frame, as an exponent of 2: the 8 MiB that RFC 9659 allows in HTTP. A smaller limit
/// would exclude honest clients. A stream at the default level asks for 2 MiB, however short it is.
const WINDOW_LOG: u32 = 23;

/// The memory of a decoder besides its window, in bytes: tables, and one block of input and one of output.
const DECODER_BYTES: usize = 512 << 10;

/// The largest number of zstd frames or gzip members in one body. It equals the number of events, because a device may
/// compress each event separately and concatenate them. Each costs some microseconds, even if it is empty.
const MAX_FRAMES: usize = 10_000;

/// How much of a body may produce no output. Compressed data is hardly ever larger than the original. So a body beyond
/// this, plus twice its output, is built to waste time, with empty blocks or skippable frames. A zstd decoder reads a
/// block of 128 KiB before it returns any of it.
const ALLOWANCE: usize = 256 << 10;

/// The compression of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    /// In zlib's format, as HTTP defines it. The Node service accepted it.
    Deflate,
    Zstd,
}

impl Compression {
    /// The compression that the request declares; `None` without one.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        const EXPECTED: &str = "Content-Encoding may be gzip, deflate or zstd";
        let mut encodings = headers.get_all(header::CONTENT_ENCODING).iter();
        let Some(encoding) = encodings.next() else { return Ok(None) };
        // Two headers may mean that the body is compressed twice.
        if encodings.next().is_some() {
            return Err(ApiError::UnsupportedMediaType(EXPECTED));
        }
        match encoding.as_bytes().trim_ascii().to_ascii_lowercase().as_slice() {
            b"identity" => Ok(None),
            b"gzip" | b"x-gzip" => Ok(Some(Self::Gzip)),
            b"deflate" => Ok(Some(Self::Deflate)),
            b"zstd" => Ok(Some(Self::Zstd)),
            _ => Err(ApiError::UnsupportedMediaType(EXPECTED)),
        }
    }

    /// The largest compressed size of a body that has at most `limit` bytes decompressed.
    pub(crate) fn compressed_limit(limit: usize) -> usize {
        limit + ALLOWANCE
    }
}

/// Decompresses an entire body to at most `limit` bytes.
pub(crate) fn decompress(
    compression: Compression,
    body: Bytes,
    limit: usize,
    permit: &mut Permit,
) -> Result<Bytes, ApiError> {
    let mut decompressor = Decompressor::new(compression, body, permit)?;
    permit.reserve_bytes(limit + 1)?;
    let mut content = vec![0; limit + 1];
    let mut length = 0;
    loop {
        match decompressor.read(&mut content[length..], permit)? {
            0 => break,
            count => length += count,
        }
        if length > limit {
            return Err(ApiError::BodyTooLarge(limit));
        }
    }
    content.truncate(length);
    Ok(content.into())
}

/// Decompresses one body step by step.
pub(crate) struct Decompressor(Decoder);

enum Decoder {
    Deflate {
        input: Input,
        inflater: Box<Decompress>,
        is_over: bool,
    },
    /// `None` after the end.
    Gzip {
        member: Option<Box<GzDecoder<Input>>>,
        members: usize,
    },
    Zstd {
        input: Input,
        decoder: ZstdDecoder<'static>,
        is_amid_frame: bool,
        frames: usize,
        window: usize,
    },
}

impl Decompressor {
    /// Starts at the beginning of `body`. The decoder's memory is reserved from `permit` before it is allocated.
    pub(crate) fn new(
        compression: Compression,
        body: Bytes,
        permit: &mut Permit,
    ) -> Result<Self, ApiError> {
        permit.reserve_bytes(DECODER_BYTES)?;
        let input = Input { rest: body, allowance: ALLOWANCE };
        Ok(Self(match compression {
            Compression::Gzip => {
                Decoder::Gzip { member: Some(Box::new(GzDecoder::new(input))), members: 1 }
            }
            Compression::Deflate => {
                let inflater = Box::new(Decompress::new(true));
                Decoder::Deflate { input, inflater, is_over: false }
            }
            Compression::Zstd => {
                let mut decoder = ZstdDecoder::new().map_err(|error| unreadable(&error))?;
                decoder
                    .set_parameter(DParameter::WindowLogMax(WINDOW_LOG))
                    .map_err(|error| unreadable(&error))?;
                Decoder::Zstd { input, decoder, is_amid_frame: false, frames: 0, window: 0 }
            }
        }))
    }

    /// Writes to the beginning of `output`, and returns the number of bytes; 0 at the end.
    pub(crate) fn read(
        &mut self,
        output: &mut [u8],
        permit: &mut Permit,
    ) -> Result<usize, ApiError> {
        match &mut self.0 {
            Decoder::Deflate { input, inflater, is_over } => {
                read_deflate(input, inflater, is_over, output)
            }
            Decoder::Gzip { member, members } => read_gzip(member, members, output),
            Decoder::Zstd { input, decoder, is_amid_frame, frames, window } => loop {
                if !*is_amid_frame {
                    if input.rest.is_empty() && *frames > 0 {
                        return Ok(0);
                    }
                    count(frames)?;
                    let needed = zstd_window(&input.rest)?;
                    if needed > *window {
                        permit.reserve_bytes(needed - *window)?;
                        *window = needed;
                    }
                    decoder.reinit().map_err(|error| unreadable(&error))?;
                    *is_amid_frame = true;
                }
                let available = input.fill_buf().map_err(|error| unreadable(&error))?;
                let Status { remaining, bytes_read, bytes_written } = decoder
                    .run_on_buffers(available, output)
                    .map_err(|error| unreadable(&error))?;
                input.consume(bytes_read);
                input.came_out(bytes_written);
                *is_amid_frame = remaining > 0;
                if bytes_written > 0 {
                    return Ok(bytes_written);
                }
                if *is_amid_frame && bytes_read == 0 {
                    return Err(ended_early());
                }
            },
        }
    }
}

fn read_gzip(
    member: &mut Option<Box<GzDecoder<Input>>>,
    members: &mut usize,
    output: &mut [u8],
) -> Result<usize, ApiError> {
    while let Some(mut decoder) = member.take() {
        let read = decoder.read(output).map_err(|error| unreadable(&error))?;
        if read > 0 {
            decoder.get_mut().came_out(read);
            *member = Some(decoder);
            return Ok(read);
        }
        let input = decoder.into_inner();
        if !input.rest.is_empty() {
            count(members)?;
            *member = Some(Box::new(GzDecoder::new(input)));
        }
    }
    Ok(0)
}

fn read_deflate(
    input: &mut Input,
    inflater: &mut Decompress,
    is_over: &mut bool,
    output: &mut [u8],
) -> Result<usize, ApiError> {
    while !*is_over {
        let available = input.fill_buf().map_err(|error| unreadable(&error))?;
        let before = (inflater.total_in(), inflater.total_out());
        let status =
            inflater.decompress(available, output, FlushDecompress::None).map_err(|_| {
                ApiError::Unreadable("it is not compressed with deflate (zlib)".to_owned())
            })?;
        // Both counts fit: they are bounded by the input and the output buffer.
        let since = |total: u64, before: u64| usize::try_from(total - before).unwrap_or(0);
        let (read, written) =
            (since(inflater.total_in(), before.0), since(inflater.total_out(), before.1));
        input.consume(read);
        input.came_out(written);
        *is_over = status == flate2::Status::StreamEnd;
        if written > 0 {
            return Ok(written);
        }
        if !*is_over && read == 0 {
            return Err(ended_early());
        }
    }
    if input.rest.is_empty() {
        Ok(0)
    } else {
        Err(ApiError::Unreadable("something follows its compressed content".to_owned()))
    }
}

fn count(frames: &mut usize) -> Result<(), ApiError> {
    *frames += 1;
    if *frames > MAX_FRAMES {
        let why = format!("it consists of more than {MAX_FRAMES} compressed parts");
        return Err(ApiError::Unreadable(why));
    }
    Ok(())
}

fn unreadable(error: &io::Error) -> ApiError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return ended_early();
    }
    ApiError::Unreadable(error.to_string())
}

fn ended_early() -> ApiError {
    ApiError::Unreadable("it ended early".to_owned())
}

/// The rest of a compressed body.
struct Input {
    rest: Bytes,
    /// How many bytes may be read before more output must come.
    allowance: usize,
}

impl Input {
    /// Records that this many bytes of output came.
    fn came_out(&mut self, bytes: usize) {
        self.allowance += 2 * bytes;
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let available = self.rest.len().min(self.allowance);
        if available == 0 && !self.rest.is_empty() {
            return Err(io::Error::other("most of it decompresses to nothing"));
        }
        Ok(&self.rest[..available])
    }

    fn consume(&mut self, bytes: usize) {
        self.rest.advance(bytes);
        self.allowance -= bytes;
    }
}

/// The window size of the next zstd frame, from its header (RFC 8878, 3.1.1). It is 0 for a skippable frame.
fn zstd_window(input: &[u8]) -> Result<usize, ApiError> {
    const MAGIC: u32 = 0xFD2F_B528;
    const SKIPPABLE: u32 = 0x184D_2A50;
    let (magic, rest) = input.split_first_chunk::<4>().ok_or_else(ended_early)?;
    let magic = u32::from_le_bytes(*magic);
    if magic & 0xFFFF_FFF0 == SKIPPABLE {
        return Ok(0);
    }
    if magic != MAGIC {
        return Err(ApiError::Unreadable("it is not compressed with zstd".to_owned()));
    }
    let (descriptor, rest) = rest.split_first().ok_or_else(ended_early)?;
    let is_single_segment = descriptor & 0x20 != 0;
    let window = if is_single_segment {
        // The window is as large as the content, whose size follows the dictionary's id.
        let id_bytes = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let size_bytes = 1_usize << (descriptor >> 6);
        let size = rest.get(id_bytes..id_bytes + size_bytes).ok_or_else(ended_early)?;
        let mut padded = [0; 8];
        padded[..size_bytes].copy_from_slice(size);
        u64::from_le_bytes(padded).saturating_add(if size_bytes == 2 { 256 } else { 0 })
    } else {
        let window = *rest.first().ok_or_else(ended_early)?;
        let base = 1_u64 << (10 + (window >> 3));
        base + base / 8 * u64::from(window & 7)
    };
    match usize::try_from(window) {
        Ok(window) if window <= 1 << WINDOW_LOG => Ok(window),
        _ => Err(ApiError::UnsupportedMediaType(
            "the window of zstd may be at most 8 MiB (RFC 9659): compress at a level up to 19, without --long",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::ingest::Permit;

    fn zstd(content: &[u8]) -> Vec<u8> {
        zstd::encode_all(content, 3).unwrap()
    }

    /// Compresses with this window, whatever the content is.
    fn zstd_with_window(content: &[u8], log: u32) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
        encoder.window_log(log).unwrap();
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    /// A gzip member with these deflate blocks, which produce no output.
    fn member_of(blocks: &[u8]) -> Vec<u8> {
        let header = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        [&header[..], blocks, &[1, 0, 0, 0xff, 0xff], &[0; 8]].concat()
    }

    /// A zstd frame with this many empty blocks.
    fn frame_of(blocks: usize) -> Vec<u8> {
        let mut frame = vec![0x28, 0xB5, 0x2F, 0xFD, 0, 0];
        for _ in 1..blocks {
            frame.extend([0, 0, 0]);
        }
        frame.extend([1, 0, 0]);
        frame
    }

    const SKIPPED: [u8; 8] = [0x50, 0x2A, 0x4D, 0x18, 0, 0, 0, 0];

    fn decompress(compression: Compression, body: Vec<u8>) -> (Result<Vec<u8>, String>, usize) {
        let mut permit = Permit::alone();
        let read = || -> Result<Vec<u8>, ApiError> {
            let mut decompressor = Decompressor::new(compression, body.into(), &mut permit)?;
            let (mut content, mut chunk) = (Vec::new(), vec![0; 4_000]);
            loop {
                match decompressor.read(&mut chunk, &mut permit)? {
                    0 => return Ok(content),
                    count => content.extend_from_slice(&chunk[..count]),
                }
            }
        };
        let read = { read }();
        (read.map_err(|error| format!("{error:?}")), permit.bytes())
    }

    #[test]
    fn what_is_compressed_comes_out() {
        let content: Vec<u8> =
            (0..300_000_u32).flat_map(|number| number.wrapping_mul(number).to_le_bytes()).collect();
        for content in [&content[..], &content[..1], b""] {
            let (first, second) = content.split_at(content.len() / 3);
            for (compression, body) in [
                (Compression::Gzip, gzip(content)),
                (Compression::Gzip, [gzip(first), gzip(second)].concat()),
                (Compression::Zstd, zstd(content)),
                (Compression::Zstd, [zstd(first), SKIPPED.to_vec(), zstd(second)].concat()),
                (Compression::Zstd, [&SKIPPED[..], &zstd(content), &SKIPPED].concat()),
                (Compression::Zstd, zstd::bulk::compress(content, 3).unwrap()),
                (Compression::Zstd, zstd_with_window(content, WINDOW_LOG)),
            ] {
                let (read, _) = decompress(compression, body);
                assert!(read.unwrap() == content, "{compression:?} {}", content.len());
            }
        }
        // Each event is a member or frame of its own.
        let event = br#"{"device_id":"pi","timestamp":"2026-11-22T12:00:00Z","total_files_synced":1,"total_errors":0}"#;
        let parts = |compress: fn(&[u8]) -> Vec<u8>| compress(event).repeat(MAX_FRAMES);
        for (compression, body) in
            [(Compression::Gzip, parts(gzip)), (Compression::Zstd, parts(zstd))]
        {
            assert_eq!(decompress(compression, body).0.unwrap().len(), event.len() * MAX_FRAMES);
        }
    }

    #[test]
    fn what_is_not_is_refused() {
        for (compression, compress) in
            [(Compression::Gzip, gzip as fn(&[u8]) -> Vec<u8>), (Compression::Zstd, zstd)]
        {
            let whole = compress(&[7; 100_000]);
            for end in 0..whole.len() {
                let (read, _) = decompress(compression, whole[..end].to_vec());
                assert!(read.unwrap_err().contains("ended early"), "{compression:?} {end}");
            }
            for garbage in [&b"\n"[..], b"garbage", &[0; 40]] {
                let (read, _) = decompress(compression, [&whole[..], garbage].concat());
                assert!(read.unwrap_err().starts_with("Unreadable"), "{compression:?} {garbage:?}");
            }
        }
    }

    #[test]
    fn windows_are_bounded_and_counted_before_they_are_allocated() {
        let content = [7; 1_000];
        for log in [20, 21, WINDOW_LOG] {
            let (read, held) = decompress(Compression::Zstd, zstd_with_window(&content, log));
            assert_eq!(read.unwrap(), content);
            assert_eq!(held, DECODER_BYTES + (1 << log));
        }
        for log in WINDOW_LOG + 1..=30 {
            let (read, held) = decompress(Compression::Zstd, zstd_with_window(&content, log));
            assert!(read.unwrap_err().contains("RFC 9659"), "{log}");
            assert_eq!(held, DECODER_BYTES);
        }
        // The window is as large as the content.
        let (read, held) =
            decompress(Compression::Zstd, zstd::bulk::compress(&content, 3).unwrap());
        assert_eq!((read.unwrap().len(), held), (1_000, DECODER_BYTES + 1_000));
        let claims = [&[0x28, 0xB5, 0x2F, 0xFD, 0b1110_0000][..], &[0xff; 8]].concat();
        assert!(decompress(Compression::Zstd, claims).0.unwrap_err().contains("RFC 9659"));
    }

    #[test]
    fn what_comes_to_nothing_is_given_up_soon() {
        let skipped = [&SKIPPED[..4], &400_000_u32.to_le_bytes(), &[0; 400_000]].concat();
        for (compression, body) in [
            (Compression::Zstd, frame_of(1_000_000)),
            (Compression::Zstd, frame_of(1).repeat(300_000)),
            (Compression::Zstd, SKIPPED.repeat(300_000)),
            (Compression::Zstd, [skipped, zstd(b"x")].concat()),
            (Compression::Gzip, member_of(&[0, 0, 0, 0xff, 0xff].repeat(1_000_000))),
            (Compression::Gzip, member_of(&[]).repeat(300_000)),
        ] {
            let length = body.len();
            let (read, held) = decompress(compression, body);
            let refused = read.unwrap_err();
            assert!(
                refused.contains("decompresses to nothing") || refused.contains("10000"),
                "{compression:?} of {length}: {refused}"
            );
            assert!(held < 1 << 20, "{held}");
        }
        // A few empty blocks are accepted, because flushing writes them.
        let (read, _) = decompress(Compression::Zstd, frame_of(1_000));
        assert_eq!(read.unwrap(), b"");
    }
}
