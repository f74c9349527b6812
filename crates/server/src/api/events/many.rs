//! `POST /api/sync-events`: many events in one request, each with its own result.
//!
//! A body is split into events and each one is checked while it arrives. A compressed body is decompressed only after
//! it has arrived, so that a slow client does not hold a decoder. Its limits apply to the decompressed content.

use axum::{
    body::Bytes,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use pisync_core::{
    Arrival, ParseError, SyncEvent, Violation, ViolationCode,
    event_stream::{EventSplitter, Format, MAX_EVENT_BYTES, Piece, StreamError},
};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        events::one::{IDEMPOTENCY_KEY, NewSyncEvent},
        wire::{
            charset::Charset,
            decompress::{Compression, Decompressor},
            envelope::Success,
            error::{AnyTime, ApiError, FieldError, WithBody, in_short},
            extract::{Arriving, NoQuery},
            routes::Routes,
        },
    },
    ingest::{Ingest, Permit, Receipt},
    middleware::{auth, observe::RejectedEvents, route_policy::RoutePolicy},
    store::Scope,
};

/// The largest number of events in one request.
const MAX_EVENTS: usize = 10_000;

/// The largest body, in decompressed bytes.
const BODY_LIMIT: usize = 10 << 20;

/// How many bytes are decompressed at a time, before other tasks get a turn.
const CHUNK: usize = 64 << 10;

/// How many bodies are decompressed at a time. Their decoders take at most 8.5 MiB each and leave room for events
/// within the queue's limits. No decoder waits for a client, so a waiting body gets its turn after some tenths of a
/// second.
pub(crate) const DECODERS: usize = 3;

/// A large body may take this many times as long as a small one. That is enough for 10 MiB over a link that carries 64
/// KiB in the time of a small body.
const TIMES_AS_LONG: u32 = 20;

/// The memory of a rejected event's violation until the response is sent, in bytes, roughly.
const VIOLATION_BYTES: usize = 512;

/// The largest number of violations besides the first one of each event. Together with 10,000 first ones they take 7
/// MiB. The queue's limits always have room for that.
const FURTHER_VIOLATIONS: usize = 4_000;

/// Bytes of an event's result in the response, without its violations.
const RESULT_BYTES: usize = 80;

/// The number of rejected events whose reasons are logged.
const REASONS_LOGGED: usize = 3;

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(create_sync_events), RoutePolicy::SYNC)
}

/// The results of a batch.
#[derive(Serialize, ToSchema)]
struct BatchResult {
    /// The number of stored events.
    #[schema(example = 1)]
    accepted: usize,
    /// The number of events that had been reported before with the same `event_id`.
    #[schema(example = 0)]
    duplicates: usize,
    /// The number of invalid events, which were not stored.
    #[schema(example = 1)]
    rejected: usize,
    /// One result per event, in the order of the request.
    results: Vec<EventResult>,
}

/// The result of one event.
#[derive(Serialize, ToSchema)]
#[serde(tag = "status", rename_all = "lowercase")]
enum EventResult {
    Created {
        /// The position of the event in the request, from 0.
        index: usize,
        id: i64,
    },
    Duplicate {
        index: usize,
        /// The id of the event that was stored first.
        id: i64,
    },
    Rejected {
        index: usize,
        /// Every invalid field, except those counted in `details_omitted`.
        details: Vec<FieldError>,
        /// The number of further invalid fields that are not listed. A batch with very many of them lists only the
        /// first one of each event. Absent when all are listed.
        #[serde(skip_serializing_if = "Option::is_none")]
        details_omitted: Option<usize>,
    },
}

/// Report many sync runs
///
/// The body is a JSON array of events, or one event per line (`application/x-ndjson`). It may hold at most 10,000
/// events and 10 MiB. `Content-Encoding` may be gzip, deflate or zstd; the limits apply after decompression.
///
/// All valid events are stored in one transaction, and the response gives the result of each event. A malformed array
/// or compressed stream is refused as a whole. In NDJSON only the malformed lines are rejected.
///
/// Give each event an `event_id`, so that the request can be sent again if its response is lost. If a batch has
/// thousands of invalid fields, the response lists the first one of each event and counts the others in
/// `details_omitted`.
#[utoipa::path(
    post,
    path = "/api/sync-events",
    tag = "Sync events",
    security(("key" = ["ingest"])),
    request_body(
        description = "The events. `Content-Encoding` gzip, deflate and zstd are understood.",
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
    _: NoQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let headers = request.headers();
    if let Some(key) = headers.get(IDEMPOTENCY_KEY) {
        let rule = "is for single events: give each event an \"event_id\"";
        let value = Some(String::from_utf8_lossy(key.as_bytes()).into());
        let code = ViolationCode::UnknownField;
        return Err(vec![Violation::of("Idempotency-Key", code, rule, value)].into());
    }
    let key = auth::key_of(&request);
    let format = format(headers)?;
    if Charset::of(headers)? != Charset::Utf8 {
        return Err(ApiError::UnsupportedMediaType("send UTF-8"));
    }
    let compression = Compression::of(headers)?;
    let body = Arriving::in_pieces(request.into_body(), state.body_timeout, TIMES_AS_LONG);
    let mut reading = Reading::new(&state.ingest, state.arrival()?, format);
    let read = match compression {
        None => reading.read(body).await,
        Some(compression) => reading.read_compressed(&state, compression, body).await,
    };
    read.inspect_err(|error| {
        if matches!(error, ApiError::Overloaded) {
            state.ingest.count_refused(&crate::ingest::IngestError::Overloaded, reading.valid());
        }
    })?;
    let Reading { events, permit, rejected, .. } = reading;
    // The key is checked again, because the body may have taken minutes to arrive.
    let key = state.gate.look_again(key.as_ref(), Scope::Ingest)?;
    // One event that the key may not report fails the entire batch.
    let group = auth::check_report(key.as_deref(), events.iter().map(|event| &event.device_id))?;
    let taken = events.len();
    // Before anything is stored, so that a refused batch can be sent again.
    let further: usize = rejected.iter().map(Rejected::bytes).sum();
    let held = state.large_answers.reserve((taken + rejected.len()) * RESULT_BYTES + further)?;
    let receipts = state.ingest.submit_many(events, group, permit).await?;
    let noted = note_rejected(&state, taken, &rejected);
    let result = Success::new("Sync events processed", BatchResult::new(receipts, rejected));
    let mut response = result.with_status(StatusCode::OK);
    if let Some(noted) = noted {
        response.extensions_mut().insert(noted);
    }
    if let Some(held) = held {
        response.extensions_mut().insert(held);
    }
    Ok(response)
}

/// Counts the rejected events, and describes the first few for the log.
fn note_rejected(
    state: &SharedState,
    taken: usize,
    rejected: &[Rejected],
) -> Option<RejectedEvents> {
    if rejected.is_empty() {
        return None;
    }
    for one in rejected {
        state.metrics.rejected(&one.violations);
    }
    let reasons: Vec<_> = rejected
        .iter()
        .take(REASONS_LOGGED)
        .map(|one| format!("event {}: {}", one.index, in_short(&one.violations)))
        .collect();
    Some(RejectedEvents { rejected: rejected.len(), taken, reasons: reasons.join("; ") })
}

impl BatchResult {
    fn new(receipts: Vec<Receipt>, rejected: Vec<Rejected>) -> Self {
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
            let event = if let Some(one) = rejected.next_if(|one| one.index == index) {
                let details = one.violations.into_iter().map(FieldError::from).collect();
                let details_omitted = (one.omitted > 0).then_some(one.omitted);
                EventResult::Rejected { index, details, details_omitted }
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

/// The format of the body, from its Content-Type.
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

/// An invalid event.
struct Rejected {
    /// Its position among all events.
    index: usize,
    violations: Vec<Violation>,
    /// The number of violations that are not kept.
    omitted: usize,
}

impl Rejected {
    /// The size of its violations in the response, roughly.
    fn bytes(&self) -> usize {
        self.violations.len() * VIOLATION_BYTES
    }
}

/// The state of reading a body.
struct Reading {
    arrival: Arrival,
    format: Format,
    events: Vec<SyncEvent>,
    rejected: Vec<Rejected>,
    /// The number of kept violations besides the first one of each event.
    further: usize,
    permit: Permit,
}

impl Reading {
    fn new(ingest: &Ingest, arrival: Arrival, format: Format) -> Self {
        let permit = ingest.permit();
        Self { arrival, format, events: Vec::new(), rejected: Vec::new(), further: 0, permit }
    }

    fn valid(&self) -> usize {
        self.events.len()
    }

    /// Reads a body while it arrives.
    async fn read(&mut self, mut body: Arriving) -> Result<(), ApiError> {
        let mut splitter = EventSplitter::new(self.format);
        let mut length = 0;
        // For the beginning of an event whose end has not arrived.
        let mut held = self.permit.new_sibling();
        let mut counted = 0;
        while let Some(piece) = body.next().await? {
            if body.has_ended() {
                held.has_arrived();
                self.permit.has_arrived();
            }
            self.push(&mut splitter, &mut length, &piece)?;
            let pending = splitter.pending_bytes();
            if pending > counted {
                held.reserve_bytes(pending - counted)?;
                counted = pending;
            }
        }
        splitter.finish(&mut |piece| self.take(piece))
    }

    /// Reads a compressed body after it has arrived.
    async fn read_compressed(
        &mut self,
        state: &SharedState,
        compression: Compression,
        body: Arriving,
    ) -> Result<(), ApiError> {
        let mut held = self.permit.new_sibling();
        let body = body.collect(Compression::compressed_limit(BODY_LIMIT), &mut held).await?;
        held.has_arrived();
        self.permit.has_arrived();
        let _turn = state.decoders.acquire().await.map_err(|_| ApiError::Overloaded)?;
        self.decompress(compression, body, &mut held).await
    }

    async fn decompress(
        &mut self,
        compression: Compression,
        body: Bytes,
        held: &mut Permit,
    ) -> Result<(), ApiError> {
        let mut decompressor = Decompressor::new(compression, body, held)?;
        let mut splitter = EventSplitter::new(self.format);
        let mut chunk = vec![0; CHUNK];
        let mut length = 0;
        loop {
            let count = decompressor.read(&mut chunk, held)?;
            if count == 0 {
                return splitter.finish(&mut |piece| self.take(piece));
            }
            self.push(&mut splitter, &mut length, &chunk[..count])?;
            // The work may be long for one core, and nothing else here waits.
            tokio::task::yield_now().await;
        }
    }

    /// Splits the next bytes of the body. `length` counts the bytes so far.
    fn push(
        &mut self,
        splitter: &mut EventSplitter,
        length: &mut usize,
        bytes: &[u8],
    ) -> Result<(), ApiError> {
        *length += bytes.len();
        if *length > BODY_LIMIT {
            return Err(ApiError::BodyTooLarge(BODY_LIMIT));
        }
        splitter.push(bytes, &mut |piece| self.take(piece))
    }

    /// Reads one event.
    fn take(&mut self, piece: Piece<'_>) -> Result<(), ApiError> {
        let index = self.events.len() + self.rejected.len();
        if index >= MAX_EVENTS {
            return Err(ApiError::TooManyEvents(MAX_EVENTS));
        }
        let mut violations = match piece {
            Piece::TooLong(_) => {
                let rule = format!("must be at most {MAX_EVENT_BYTES} bytes of JSON text");
                vec![Violation::of_whole(ViolationCode::Length, &rule, None)]
            }
            Piece::Event(text) => match SyncEvent::from_json(text, self.arrival) {
                Ok(event) => {
                    self.permit.reserve(&event)?;
                    self.events.push(event);
                    return Ok(());
                }
                Err(ParseError::Invalid(violations)) => violations,
                Err(ParseError::Malformed(where_)) if self.format == Format::Lines => {
                    let message = format!("Malformed JSON: {where_}");
                    vec![Violation::worded("", ViolationCode::MalformedJson, message, None)]
                }
                Err(ParseError::Malformed(where_)) => {
                    return Err(ApiError::Malformed(format!("event {index}: {where_}")));
                }
            },
        };
        let further = violations.len().saturating_sub(1);
        let omitted = if self.further + further > FURTHER_VIOLATIONS { further } else { 0 };
        violations.truncate(violations.len() - omitted);
        self.further += further - omitted;
        let rejected = Rejected { index, violations, omitted };
        self.permit.reserve_bytes(rejected.bytes())?;
        self.rejected.push(rejected);
        Ok(())
    }
}

impl From<StreamError> for ApiError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::NotAnArray => {
                let rule = "must be an array; send one event per line as application/x-ndjson";
                Self::Validation(vec![Violation::of_whole(ViolationCode::Type, rule, None)])
            }
            StreamError::Broken { .. } => Self::Malformed(error.to_string()),
        }
    }
}
