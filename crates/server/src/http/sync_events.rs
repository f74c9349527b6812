//! `POST /api/sync-events`: many events in one request, each with its own result.
//!
//! The body is read as it arrives: decompressed, cut into events, each of them checked. What is
//! bounded is counted after decompression.

use std::{io, pin::Pin, time::Duration};

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use futures_util::TryStreamExt;
use pisync_core::{
    Arrival, ParseError, SyncEvent, Violation, ViolationCode,
    event_stream::{EventSplitter, Format, MAX_EVENT_BYTES, Piece, StreamError},
};
use serde::Serialize;
use tokio::{
    io::{AsyncBufRead, AsyncRead, AsyncReadExt, BufReader},
    time::{Instant, timeout_at},
};
use tokio_util::io::StreamReader;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    SharedState, auth,
    envelope::Success,
    error::{AnyTime, ApiError, FieldError, WithBody, in_short},
    observe::RejectedEvents,
    sync_event::{IDEMPOTENCY_KEY, NewSyncEvent},
};
use crate::{
    ingest::{Ingest, Receipt, Room},
    store::Scope,
};

/// The most events in one request.
const MAX_EVENTS: usize = 10_000;

/// The largest body, in bytes once decompressed.
const BODY_LIMIT: usize = 10 << 20;

/// How much is read at a time.
const CHUNK: usize = 16 << 10;

/// A body may take so many times as long as a small one: 10 MiB over a link that carries 64 KiB in the
/// time of one.
const TIMES_AS_LONG: u32 = 20;

/// The memory that a rejected event's violation takes until it is answered, in bytes, roughly.
const VIOLATION_BYTES: usize = 512;

/// Rejected events whose reasons the log gets.
const REASONS_LOGGED: usize = 3;

pub(super) fn router() -> OpenApiRouter<SharedState> {
    OpenApiRouter::new().routes(routes!(create_sync_events))
}

/// What became of a batch.
#[derive(Serialize, ToSchema)]
struct BatchResult {
    /// Events that were stored.
    #[schema(example = 1)]
    accepted: usize,
    /// Events that had been reported before, under the same `event_id`.
    #[schema(example = 0)]
    duplicates: usize,
    /// Events that were wrong and not stored.
    #[schema(example = 1)]
    rejected: usize,
    /// One for each event, in order.
    results: Vec<EventResult>,
}

/// What became of one event.
#[derive(Serialize, ToSchema)]
#[serde(tag = "status", rename_all = "lowercase")]
enum EventResult {
    Created {
        /// Position among the events sent, from 0.
        index: usize,
        id: i64,
    },
    Duplicate {
        index: usize,
        /// The first event's id.
        id: i64,
    },
    Rejected {
        index: usize,
        /// Every wrong field.
        details: Vec<FieldError>,
    },
}

/// Report many sync runs
///
/// A JSON array of events, or one event per line (`application/x-ndjson`), at most 10,000 and 10 MiB;
/// `Content-Encoding` may be gzip or zstd, and the bounds count after decompression. The events that are
/// right are stored in one transaction, and the answer tells of each one what became of it. An array or a
/// compressed stream that is broken is refused as a whole; of NDJSON, only the lines that are. Give each
/// event an `event_id`, so that the request can be sent again when its answer was lost.
#[utoipa::path(
    post,
    path = "/api/sync-events",
    tag = "Sync events",
    security(("key" = ["ingest"])),
    request_body(
        description = "The events. `Content-Encoding` gzip and zstd are understood.",
        content(
            (Vec<NewSyncEvent> = "application/json"),
            (String = "application/x-ndjson", example =
                "{\"device_id\":\"pi-device-001\",\"event_id\":\"run-1\",\"timestamp\":\"2025-06-17T10:30:00Z\",\"total_files_synced\":150,\"total_errors\":0}\n\
                 {\"device_id\":\"pi-device-001\",\"event_id\":\"run-2\",\"timestamp\":\"2025-06-17T11:30:00Z\",\"total_files_synced\":3,\"total_errors\":1}\n"),
        ),
    ),
    responses(
        (status = 200, description = "Each event's result.", body = Success<BatchResult>),
        WithBody,
        AnyTime,
    ),
)]
async fn create_sync_events(
    State(state): State<SharedState>,
    request: Request,
) -> Result<Response, ApiError> {
    let headers = request.headers();
    if let Some(key) = headers.get(IDEMPOTENCY_KEY) {
        let rule = "is for single events: give each event an \"event_id\"";
        let value = Some(String::from_utf8_lossy(key.as_bytes()).into());
        return Err(ApiError::Validation(vec![Violation::of("Idempotency-Key", rule, value)]));
    }
    let key = auth::key_of(&request);
    let format = format(headers)?;
    let encoding = Encoding::of(headers)?;
    let mut reading = Reading::new(&state.ingest, state.arrival()?, format);
    reading.read(encoding.decode(request.into_body()), state.body_timeout).await.inspect_err(
        |error| {
            if matches!(error, ApiError::Overloaded) {
                state
                    .ingest
                    .count_refused(&crate::ingest::IngestError::Overloaded, reading.valid());
            }
        },
    )?;
    let Reading { events, room, rejected, .. } = reading;
    // The body may have taken minutes.
    let key = state.gate.look_again(key.as_ref(), Scope::Ingest)?;
    // One event that the key may not report is a mistake about all of them.
    let group = auth::check_report(key.as_deref(), events.iter().map(|event| &event.device_id))?;
    let taken = events.len();
    let receipts = state.ingest.submit_many(events, group, room).await?;
    let noted = note_rejected(&state, taken, &rejected);
    let result = Success::new("Sync events processed", BatchResult::new(receipts, rejected));
    let mut response = result.with_status(StatusCode::OK);
    if let Some(noted) = noted {
        response.extensions_mut().insert(noted);
    }
    Ok(response)
}

/// Counts what was rejected, and says for the log what was wrong with the first few.
fn note_rejected(
    state: &SharedState,
    taken: usize,
    rejected: &[(usize, Vec<Violation>)],
) -> Option<RejectedEvents> {
    if rejected.is_empty() {
        return None;
    }
    for (_, violations) in rejected {
        state.metrics.rejected(violations);
    }
    let reasons: Vec<_> = rejected
        .iter()
        .take(REASONS_LOGGED)
        .map(|(index, violations)| format!("event {index}: {}", in_short(violations)))
        .collect();
    Some(RejectedEvents { rejected: rejected.len(), taken, reasons: reasons.join("; ") })
}

impl BatchResult {
    fn new(receipts: Vec<Receipt>, rejected: Vec<(usize, Vec<Violation>)>) -> Self {
        let total = receipts.len() + rejected.len();
        let mut result = Self {
            accepted: 0,
            duplicates: 0,
            rejected: rejected.len(),
            results: Vec::with_capacity(total),
        };
        let mut receipts = receipts.into_iter();
        let mut rejected = rejected.into_iter().peekable();
        for index in 0..total {
            let event = if let Some((_, violations)) = rejected.next_if(|(at, _)| *at == index) {
                let details = violations.into_iter().map(FieldError::from).collect();
                EventResult::Rejected { index, details }
            } else {
                match receipts.next() {
                    Some(Receipt::Created { id, .. }) => {
                        result.accepted += 1;
                        EventResult::Created { index, id }
                    }
                    Some(Receipt::Duplicate { id, .. }) => {
                        result.duplicates += 1;
                        EventResult::Duplicate { index, id }
                    }
                    None => break,
                }
            };
            result.results.push(event);
        }
        result
    }
}

/// How the events follow each other, by what the request says of its body.
fn format(headers: &HeaderMap) -> Result<Format, ApiError> {
    let media_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .map(|media_type| media_type.trim().to_ascii_lowercase());
    match media_type.as_deref() {
        Some("application/json") => Ok(Format::Array),
        Some("application/x-ndjson" | "application/ndjson" | "application/jsonl") => {
            Ok(Format::Lines)
        }
        _ => Err(ApiError::UnsupportedMediaType(
            "send a JSON array with Content-Type: application/json, or one event per line with application/x-ndjson",
        )),
    }
}

/// How the body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Identity,
    Gzip,
    Zstd,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let Some(encoding) = headers.get(header::CONTENT_ENCODING) else {
            return Ok(Self::Identity);
        };
        match encoding.as_bytes().trim_ascii().to_ascii_lowercase().as_slice() {
            b"identity" => Ok(Self::Identity),
            b"gzip" | b"x-gzip" => Ok(Self::Gzip),
            b"zstd" => Ok(Self::Zstd),
            _ => Err(ApiError::UnsupportedMediaType("Content-Encoding may be gzip or zstd")),
        }
    }

    fn decode(self, body: Body) -> Pin<Box<dyn AsyncRead + Send>> {
        let raw = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
        match self {
            Self::Identity => Box::pin(raw),
            Self::Gzip => {
                let mut decoder = GzipDecoder::new(buffered(raw));
                decoder.multiple_members(true);
                Box::pin(decoder)
            }
            Self::Zstd => {
                let mut decoder = ZstdDecoder::new(buffered(raw));
                decoder.multiple_members(true);
                Box::pin(decoder)
            }
        }
    }
}

/// Decoders call for input more often than the network brings it.
fn buffered(raw: impl AsyncBufRead + Send) -> impl AsyncBufRead + Send {
    BufReader::with_capacity(CHUNK, raw)
}

/// A body being read.
struct Reading {
    arrival: Arrival,
    format: Format,
    events: Vec<SyncEvent>,
    /// With their positions among all events.
    rejected: Vec<(usize, Vec<Violation>)>,
    room: Room,
}

impl Reading {
    fn new(ingest: &Ingest, arrival: Arrival, format: Format) -> Self {
        let room = ingest.room();
        Self { arrival, format, events: Vec::new(), rejected: Vec::new(), room }
    }

    fn valid(&self) -> usize {
        self.events.len()
    }

    /// Reads to the end. No piece of the body may take longer than `patience` to arrive.
    async fn read(
        &mut self,
        mut body: Pin<Box<dyn AsyncRead + Send>>,
        patience: Duration,
    ) -> Result<(), ApiError> {
        let deadline = Instant::now() + patience * TIMES_AS_LONG;
        let mut splitter = EventSplitter::new(self.format);
        let mut chunk = vec![0; CHUNK];
        let mut length = 0;
        loop {
            let soon = deadline.min(Instant::now() + patience);
            let count = match timeout_at(soon, body.read(&mut chunk)).await {
                Err(_) => return Err(ApiError::BodyTimeout),
                // The connection broke, or what arrives is not compressed as it says.
                Ok(Err(error)) => {
                    return Err(ApiError::Unreadable(error.to_string()));
                }
                Ok(Ok(count)) => count,
            };
            if count == 0 {
                return splitter.finish(&mut |piece| self.take(piece));
            }
            length += count;
            if length > BODY_LIMIT {
                return Err(ApiError::BodyTooLarge(BODY_LIMIT));
            }
            splitter.push(&chunk[..count], &mut |piece| self.take(piece))?;
        }
    }

    /// Reads one event.
    fn take(&mut self, piece: Piece<'_>) -> Result<(), ApiError> {
        let index = self.events.len() + self.rejected.len();
        if index >= MAX_EVENTS {
            return Err(ApiError::TooManyEvents(MAX_EVENTS));
        }
        let violations = match piece {
            Piece::TooLong => {
                let rule = format!("must be at most {MAX_EVENT_BYTES} bytes of JSON text");
                vec![Violation::of_whole(&rule, None).coded(ViolationCode::Length)]
            }
            Piece::Event(text) => match SyncEvent::from_json(text, self.arrival) {
                Ok(event) => {
                    self.room.take(&event)?;
                    self.events.push(event);
                    return Ok(());
                }
                Err(ParseError::Invalid(violations)) => violations,
                Err(ParseError::Malformed(where_)) if self.format == Format::Lines => {
                    let message = format!("Malformed JSON: {where_}");
                    let violation = Violation::worded("", message, None);
                    vec![violation.coded(ViolationCode::MalformedJson)]
                }
                Err(ParseError::Malformed(where_)) => {
                    return Err(ApiError::Malformed(format!("event {index}: {where_}")));
                }
            },
        };
        self.room.take_bytes(violations.len() * VIOLATION_BYTES)?;
        self.rejected.push((index, violations));
        Ok(())
    }
}

impl From<StreamError> for ApiError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::NotAnArray => {
                let rule = "must be an array; send one event per line as application/x-ndjson";
                let violation = Violation::of_whole(rule, None).coded(ViolationCode::Type);
                Self::Validation(vec![violation])
            }
            StreamError::Broken { .. } => Self::Malformed(error.to_string()),
        }
    }
}
