//! The format of a record of the ingest journal on the disk, in the current version and every earlier one. The other
//! files of `journal` call it. It must not do I/O: bytes in, records out.
//!
//! A record is a header and then each event as one line of JSON. Integers are little-endian.
//!
//! | bytes | version 2 | version 1 |
//! | --- | --- | --- |
//! | 0–3 | `PiSJ` | length of the lines |
//! | 4–5 | version | checksum, to byte 7 |
//! | 6–7 | 0 | |
//! | 8–11 | length of the lines | number, to byte 15 |
//! | 12–15 | checksum | |
//! | 16–23 | number | id of the first event |
//! | 24–31 | id of the first event | `received_at` |
//! | 32–39 | `received_at` | – |
//! | 40–47 | whose journal: `ingest_state.journal` | – |
//!
//! Version 1 was written until 2026-11-25. Later versions keep bytes 0 to 15 and the extent of the checksum as they are
//! in version 2. An older program can therefore tell a newer record from a damaged one.

use pisync_core::{DeviceId, EventId, JobName, Mbps, Metadata, SyncDuration, SyncEvent, Timestamp};

/// The current version.
pub(super) const VERSION: u16 = 2;

/// The first bytes of a record since version 2. As the length of a record of version 1 they would mean 1.2 GB.
const MAGIC: [u8; 4] = *b"PiSJ";

/// Length of a header.
pub(super) const HEADER_BYTES: usize = 48;
const HEADER_BYTES_1: usize = 32;

/// The maximum length of a record's lines, in bytes. A longer one is not a valid length. 10,000 events of the largest
/// size, 64 KiB each as JSON text, would already be ten times as much as a request may hold.
const MOST_LINES_BYTES: usize = 256 << 20;

/// Events that were acknowledged together.
#[derive(Debug)]
pub(in super::super) struct Record {
    /// The number of the record before, plus one.
    pub(in super::super) number: u64,
    /// The first event's id. The ids of the others follow without gaps.
    pub(in super::super) first_id: i64,
    /// The `received_at` of all events.
    pub(in super::super) received: Timestamp,
    /// Empty in a mark for lost records; see [`encode_lost`].
    pub(in super::super) events: Vec<SyncEvent>,
}

/// An event in the journal. For the fields see [`SyncEvent`]; their units are those of the tables.
type Line<Text> = (
    Text,         // device_id
    Option<Text>, // event_id
    i64,          // timestamp
    u32,          // total_files_synced
    u32,          // total_errors
    Option<i64>,  // internet_speed
    Option<Text>, // job
    Option<i64>,  // duration
    Option<u64>,  // bytes_synced
    Option<Text>, // metadata
);

/// What was found at a position of a file.
#[derive(Debug)]
pub(super) enum Found {
    /// A complete record, and its length with the header.
    Record(Record, usize),
    /// A complete record of another database, and its length.
    Foreign(usize),
    /// A complete record that this version cannot read.
    Newer {
        /// The version in which it was written.
        version: u16,
    },
    /// No complete record.
    Nothing,
}

/// Encodes a record of the journal `journal` into `buffer`, and replaces the buffer's contents.
pub(super) fn encode<'a>(
    buffer: &mut Vec<u8>,
    journal: i64,
    number: u64,
    first_id: i64,
    received: Timestamp,
    events: impl Iterator<Item = &'a SyncEvent>,
) -> std::io::Result<()> {
    buffer.clear();
    buffer.extend([0; HEADER_BYTES]);
    for event in events {
        serde_json::to_writer(&mut *buffer, &line(event))?;
        buffer.push(b'\n');
    }
    let length = u32::try_from(buffer.len() - HEADER_BYTES).map_err(std::io::Error::other)?;
    buffer[..4].copy_from_slice(&MAGIC);
    buffer[4..6].copy_from_slice(&VERSION.to_le_bytes());
    buffer[8..12].copy_from_slice(&length.to_le_bytes());
    buffer[16..24].copy_from_slice(&number.to_le_bytes());
    buffer[24..32].copy_from_slice(&first_id.to_le_bytes());
    buffer[32..40].copy_from_slice(&received.as_millisecond().to_le_bytes());
    buffer[40..48].copy_from_slice(&journal.to_le_bytes());
    let checksum = checksum(buffer);
    buffer[12..16].copy_from_slice(&checksum.to_le_bytes());
    Ok(())
}

/// Encodes a mark that stands for lost records (`pisync journal salvage`). It is a record without events that has the
/// number of the last lost record. In the place of an event's id it has the number of the first.
pub(super) fn encode_lost(
    buffer: &mut Vec<u8>,
    journal: i64,
    lost: std::ops::Range<u64>,
) -> std::io::Result<()> {
    let (first, last) = (lost.start.cast_signed(), lost.end.saturating_sub(1));
    encode(buffer, journal, last, first, Timestamp::MIN, std::iter::empty())
}

/// Encodes a mark for the beginning of a new file. The mark shows that nobody has emptied the file. It is a record
/// without events and has the number of the last record in the tables. The next record overwrites it.
pub(super) fn encode_begun(buffer: &mut Vec<u8>, journal: i64, last: u64) -> std::io::Result<()> {
    encode_lost(buffer, journal, last..last + 1)
}

impl Record {
    /// The records that it stands for: itself, or the lost records.
    pub(super) fn numbers(&self) -> std::ops::RangeInclusive<u64> {
        let is_mark = self.events.is_empty();
        if is_mark {
            self.first_id.cast_unsigned()..=self.number
        } else {
            self.number..=self.number
        }
    }
}

/// What is found at the beginning of `bytes`, in the journal `journal`.
pub(super) fn decode(bytes: &[u8], journal: i64) -> Found {
    if bytes.starts_with(&MAGIC) { decode_2(bytes, journal) } else { decode_1(bytes, journal) }
}

/// The next position at or after `from` where a record may begin.
pub(super) fn next_candidate(bytes: &[u8], from: usize) -> Option<usize> {
    let step = bytes.get(from..)?.windows(HEADER_BYTES_1).position(may_begin_record)?;
    Some(from + step)
}

/// A record of version 1 has no magic bytes. It begins with a length, and its number is below 2^32.
fn may_begin_record(window: &[u8]) -> bool {
    window.starts_with(&MAGIC)
        || (window[12..16] == [0; 4] && window[8..12] != [0; 4] && window[..4] != [0; 4])
}

/// Whether a record begins here, complete or not. A record of version 1 is not recognised.
pub(super) fn is_begun(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

fn decode_2(bytes: &[u8], journal: i64) -> Found {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Found::Nothing };
    let length = u32::from_le_bytes(array(header, 8)) as usize;
    let Some(record) = bytes
        .get(..HEADER_BYTES + length)
        .filter(|_| length <= MOST_LINES_BYTES)
        .filter(|record| checksum(record) == u32::from_le_bytes(array(header, 12)))
    else {
        return Found::Nothing;
    };
    let version = u16::from_le_bytes(array(header, 4));
    if version != VERSION {
        return Found::Newer { version };
    }
    if i64::from_le_bytes(array(header, 40)) != journal {
        return Found::Foreign(record.len());
    }
    let events = read_lines(&record[HEADER_BYTES..]);
    let received = Timestamp::from_millisecond(i64::from_le_bytes(array(header, 32)));
    match (events, received) {
        (Some(events), Some(received)) => {
            let number = u64::from_le_bytes(array(header, 16));
            let first_id = i64::from_le_bytes(array(header, 24));
            Found::Record(Record { number, first_id, received, events }, record.len())
        }
        // The checksum proves that the record is as it was written.
        _ => Found::Newer { version },
    }
}

fn decode_1(bytes: &[u8], journal: i64) -> Found {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES_1>() else { return Found::Nothing };
    let length = u32::from_le_bytes(array(header, 0)) as usize;
    let Some(record) = bytes
        .get(..HEADER_BYTES_1 + length)
        .filter(|_| length > 0 && length <= MOST_LINES_BYTES)
        .filter(|record| checksum_1(journal, record) == u32::from_le_bytes(array(header, 4)))
    else {
        return Found::Nothing;
    };
    let events = read_lines(&record[HEADER_BYTES_1..]);
    let received = Timestamp::from_millisecond(i64::from_le_bytes(array(header, 24)));
    match (events, received) {
        (Some(events), Some(received)) => {
            let number = u64::from_le_bytes(array(header, 8));
            let first_id = i64::from_le_bytes(array(header, 16));
            Found::Record(Record { number, first_id, received, events }, record.len())
        }
        _ => Found::Newer { version: 1 },
    }
}

/// The events of a record; `None` when one of the lines is not an event.
fn read_lines(lines: &[u8]) -> Option<Vec<SyncEvent>> {
    let lines = serde_json::Deserializer::from_slice(lines).into_iter();
    lines.map(|line| line.ok().and_then(event)).collect()
}

/// The events that can be read in a stretch of a file with a damaged record. They may differ from what was written.
pub(super) fn legible_events(bytes: &[u8]) -> Vec<SyncEvent> {
    let from_bracket = |line: &[u8]| -> Option<SyncEvent> {
        // The first line follows the header.
        let begins = line.windows(2).position(|two| two == b"[\"")?;
        serde_json::from_slice(&line[begins..]).ok().and_then(event)
    };
    bytes.split(|byte| *byte == b'\n').filter_map(from_bracket).collect()
}

fn array<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|index| header[at + index])
}

/// CRC-32 of a record, without the checksum itself.
pub(super) fn checksum(record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..12]);
    hasher.update(&record[16..]);
    hasher.finalize()
}

/// CRC-32 of the journal's identity and of a record, without its length and the checksum itself.
fn checksum_1(journal: i64, record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&journal.to_le_bytes());
    hasher.update(&record[8..]);
    hasher.finalize()
}

fn line(event: &SyncEvent) -> Line<&str> {
    (
        event.device_id.as_str(),
        event.event_id.as_ref().map(EventId::as_str),
        event.timestamp.as_millisecond(),
        event.total_files_synced,
        event.total_errors,
        event.internet_speed.map(Mbps::hundredths),
        event.job.as_ref().map(JobName::as_str),
        event.duration.map(SyncDuration::milliseconds),
        event.bytes_synced,
        event.metadata.as_ref().map(Metadata::as_str),
    )
}

/// Reads what [`line`] has written; `None` for anything else.
fn event(line: Line<String>) -> Option<SyncEvent> {
    /// `None` for a value that exists and cannot be read.
    fn read<T, V>(value: Option<T>, read: impl FnOnce(T) -> Option<V>) -> Option<Option<V>> {
        match value {
            None => Some(None),
            Some(value) => read(value).map(Some),
        }
    }
    let (device_id, event_id, timestamp, files, errors, speed, job, duration, bytes, metadata) =
        line;
    Some(SyncEvent {
        device_id: DeviceId::new(&device_id).ok()?,
        event_id: read(event_id, |text| EventId::new(&text).ok())?,
        timestamp: Timestamp::from_millisecond(timestamp)?,
        total_files_synced: files,
        total_errors: errors,
        internet_speed: read(speed, Mbps::from_hundredths)?,
        job: read(job, |text| JobName::new(&text).ok())?,
        duration: read(duration, SyncDuration::from_milliseconds)?,
        bytes_synced: bytes,
        metadata: read(metadata, |text| Metadata::kept(&text).ok())?,
    })
}

/// A record as version 1 wrote it, for tests of upgrades.
#[cfg(test)]
pub(super) fn encode_1(
    journal: i64,
    number: u64,
    first_id: i64,
    received: Timestamp,
    events: &[SyncEvent],
) -> Vec<u8> {
    let mut record = vec![0; HEADER_BYTES_1];
    for event in events {
        serde_json::to_writer(&mut record, &line(event)).unwrap();
        record.push(b'\n');
    }
    let length = u32::try_from(record.len() - HEADER_BYTES_1).unwrap();
    record[..4].copy_from_slice(&length.to_le_bytes());
    record[8..16].copy_from_slice(&number.to_le_bytes());
    record[16..24].copy_from_slice(&first_id.to_le_bytes());
    record[24..32].copy_from_slice(&received.as_millisecond().to_le_bytes());
    let checksum = checksum_1(journal, &record);
    record[4..8].copy_from_slice(&checksum.to_le_bytes());
    record
}
