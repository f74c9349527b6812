//! Reads requests: bodies within their limits of size and time, paths, and query strings. Handlers use these
//! extractors. [`crate::api::wire::query`] reads the parameters of a query string.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use pisync_core::{DeviceId, Violation, ViolationCode, metadata::HALF_SURROGATE, text::json_text};
use serde_json::{Map, Value, value::RawValue};
use tokio::time::{Instant, timeout_at};
use utoipa::IntoParams;

use crate::{
    api::{
        SharedState,
        wire::{
            charset::Charset,
            decompress::{Compression, decompress},
            error::ApiError,
            query::QueryString,
        },
    },
    ingest::Permit,
};

/// Each further stretch of this size gives a large body as much time again as a small body has.
const STRETCH_BYTES: usize = 64 << 10;

/// A body that is still arriving.
pub(crate) struct Arriving {
    body: Body,
    began: Instant,
    /// How long the next piece, and each stretch, may take.
    patience: Duration,
    /// The largest multiple of `patience` for the entire body, if enough data comes.
    times: u32,
    received: usize,
}

impl Arriving {
    /// A body that must arrive completely within `timeout`.
    pub(crate) fn within(body: Body, timeout: Duration) -> Self {
        Self::in_pieces(body, timeout, 1)
    }

    /// A body of which no piece, and no 64 KiB, may take longer than `patience`. The entire body may take `times` as
    /// long. A client that sends a byte now and then therefore cannot hold reserved memory for long.
    pub(crate) fn in_pieces(body: Body, patience: Duration, times: u32) -> Self {
        Self { body, began: Instant::now(), patience, times, received: 0 }
    }

    /// The deadline for more data than has arrived so far.
    fn deadline(&self) -> Instant {
        let stretches = u32::try_from(self.received / STRETCH_BYTES).unwrap_or(u32::MAX);
        self.began + self.patience * stretches.saturating_add(1).min(self.times)
    }

    /// True if nothing more will come.
    pub(crate) fn has_ended(&self) -> bool {
        self.body.is_end_stream()
    }

    /// The next piece; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let soon = self.deadline().min(Instant::now() + self.patience);
            let frame = match timeout_at(soon, self.body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(None) => return Ok(None),
                // The connection broke or the framing was wrong. The client may not be there to read the response.
                Ok(Some(Err(_))) => return Err(ApiError::Unreadable("it ended early".to_owned())),
                Err(_) => return Err(ApiError::BodyTimeout),
            };
            if let Ok(piece) = frame.into_data()
                && !piece.is_empty()
            {
                self.received += piece.len();
                return Ok(Some(piece));
            }
        }
    }

    /// The entire body, of at most `limit` bytes. The memory that it holds while it arrives is reserved from `permit`.
    pub(crate) async fn collect(
        mut self,
        limit: usize,
        permit: &mut Permit,
    ) -> Result<Bytes, ApiError> {
        // A body that is declared too large need not arrive. The client may be waiting for `100 Continue`.
        if self.body.size_hint().lower() > limit as u64 {
            return Err(ApiError::BodyTooLarge(limit));
        }
        let Some(mut piece) = self.next().await? else { return Ok(Bytes::new()) };
        if piece.len() <= limit && self.has_ended() {
            return Ok(piece);
        }
        // The pieces are copied, because even a small one would keep an entire buffer of the connection alive.
        let mut whole = Vec::new();
        loop {
            let length = whole.len() + piece.len();
            if length > limit {
                return Err(ApiError::BodyTooLarge(limit));
            }
            if length > whole.capacity() {
                let capacity = length.next_power_of_two().min(limit);
                permit.reserve_bytes(capacity - whole.capacity())?;
                whole.reserve_exact(capacity - whole.len());
            }
            whole.extend_from_slice(&piece);
            match self.next().await? {
                Some(next) => piece = next,
                None => return Ok(whole.into()),
            }
        }
    }
}

/// A JSON body that is still to be read. The rest of its request has been dropped.
pub(crate) struct JsonBody {
    body: Result<Arriving, ApiError>,
    charset: Charset,
    /// Its compression, and the state that limits the number of decoders.
    compressed: Option<(Compression, SharedState)>,
    limit: usize,
    permit: Permit,
}

impl JsonBody {
    /// A body of at most `limit` decompressed bytes.
    pub(crate) fn of(request: Request, limit: usize, state: &SharedState) -> Self {
        let (mut charset, mut compressed) = (Charset::Utf8, None);
        let body = Declared::of(request.headers()).and_then(|declared| {
            charset = declared.charset;
            compressed = declared.compression.map(|compression| (compression, Arc::clone(state)));
            if request.body().size_hint().lower() > most(limit, compressed.is_some()) as u64 {
                return Err(ApiError::BodyTooLarge(limit));
            }
            Ok(Arriving::within(request.into_body(), state.body_timeout))
        });
        Self { body, charset, compressed, limit, permit: state.ingest.permit() }
    }

    /// Reads the body. The result is UTF-8, or declared as such.
    pub(crate) async fn read(self) -> Result<Bytes, ApiError> {
        let Self { body, charset, compressed, limit, mut permit } = self;
        let collected = body?.collect(most(limit, compressed.is_some()), &mut permit).await;
        let body = collected.map_err(|error| match error {
            ApiError::BodyTooLarge(_) => ApiError::BodyTooLarge(limit),
            other => other,
        })?;
        permit.has_arrived();
        let body = match compressed {
            None => body,
            Some((compression, state)) => {
                let _turn = state.decoders.acquire().await.map_err(|_| ApiError::Overloaded)?;
                decompress(compression, body, limit, &mut permit)?
            }
        };
        charset.to_utf8(body)
    }
}

/// The largest number of bytes to receive for a body of at most `limit` decompressed bytes.
fn most(limit: usize, is_compressed: bool) -> usize {
    if is_compressed { Compression::compressed_limit(limit) } else { limit }
}

/// The fields of a body that is a JSON object.
pub(crate) fn read_object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let text = json_text(body).map_err(ApiError::Malformed)?;
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(value) => {
            let rule = "must be of type object";
            Err(vec![Violation::of_whole(ViolationCode::Type, rule, Some(value))].into())
        }
        Err(error) => Err(undecodable_fields(text)
            .map_or_else(|| ApiError::Malformed(error.to_string()), ApiError::Validation)),
    }
}

/// The fields whose text contains half a surrogate pair and cannot be decoded; `None` without any. Such a text is
/// well-formed JSON nevertheless.
fn undecodable_fields(text: &str) -> Option<Vec<Violation>> {
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
    let wrong = fields.into_iter().filter(|(_, value)| {
        value.get().contains("\\u") && serde_json::from_str::<Value>(value.get()).is_err()
    });
    let wrong: Vec<_> = wrong
        .map(|(field, _)| Violation::of(field, ViolationCode::Format, HALF_SURROGATE, None))
        .collect();
    (!wrong.is_empty()).then_some(wrong)
}

/// What a request declares about its JSON body.
struct Declared {
    compression: Option<Compression>,
    charset: Charset,
}

impl Declared {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let media_type = headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .map(str::trim);
        let is_json = media_type.is_some_and(|media_type| {
            media_type.eq_ignore_ascii_case("application/json")
                || media_type.to_ascii_lowercase().ends_with("+json")
        });
        if !is_json {
            return Err(ApiError::UnsupportedMediaType(
                "send JSON with Content-Type: application/json",
            ));
        }
        Ok(Self { compression: Compression::of(headers)?, charset: Charset::of(headers)? })
    }
}

/// The path in the OpenAPI document; [`DevicePath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
pub(crate) struct DevicePathParameter {
    /// The device's name for itself.
    #[param(
        min_length = 1,
        max_length = 255,
        pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$",
        example = "pi-device-001"
    )]
    device_id: String,
}

/// The device id in the path.
pub(crate) struct DevicePath(pub(crate) DeviceId);

impl<S: Send + Sync> FromRequestParts<S> for DevicePath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let refuse = |code, rule: &str, value: Option<Value>| {
            ApiError::Validation(vec![Violation::of("device_id", code, rule, value)])
        };
        let Ok(Path(text)) = Path::<String>::from_request_parts(parts, state).await else {
            return Err(refuse(ViolationCode::Format, "must be valid UTF-8", None));
        };
        DeviceId::new(&text)
            .map(Self)
            .map_err(|error| refuse(error.code(), &error.to_string(), Some(Value::from(text))))
    }
}

/// Reads the number in a path. `parameter` is its name in the path's template, such as `key_id`.
///
/// # Errors
/// [`ApiError::Validation`], when it is not a positive number.
pub(crate) async fn id_in_path<S: Send + Sync>(
    parts: &mut Parts,
    state: &S,
    parameter: &'static str,
) -> Result<i64, ApiError> {
    let text = Path::<String>::from_request_parts(parts, state).await.ok().map(|path| path.0);
    let id = text.as_ref().and_then(|text| text.parse().ok()).filter(|id| *id > 0);
    id.ok_or_else(|| {
        let rule = "must be a positive number";
        let value = text.map(Value::from);
        ApiError::Validation(vec![Violation::of(parameter, ViolationCode::Format, rule, value)])
    })
}

/// A request's query string, not yet read.
pub(crate) struct Query(pub(crate) QueryString);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self(QueryString::parse(parts.uri.query().unwrap_or_default())))
    }
}

/// A request without query parameters. Endpoints that the Node service did not have refuse unknown parameters.
pub(crate) struct NoQuery;

impl<S: Send + Sync> FromRequestParts<S> for NoQuery {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let query = QueryString::parse(parts.uri.query().unwrap_or_default());
        query.finish().map(|()| Self).map_err(ApiError::from)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt as _, stream};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A body that arrives in pieces of this size.
    fn body(length: usize, piece: usize) -> Body {
        let pieces =
            vec![b'x'; length].chunks(piece).map(Bytes::copy_from_slice).collect::<Vec<_>>();
        Body::from_stream(stream::iter(pieces).map(Ok::<_, Infallible>))
    }

    #[tokio::test]
    async fn a_body_holds_what_is_counted() {
        for (length, piece) in [(0, 1), (1, 1), (60_000, 1), (60_000, 7_000), (64 << 10, 64 << 10)]
        {
            let mut permit = Permit::alone();
            let arriving = Arriving::within(body(length, piece), PATIENCE);
            let whole = arriving.collect(64 << 10, &mut permit).await.unwrap();
            assert_eq!(whole.len(), length);
            assert!(permit.bytes() >= length && permit.bytes() <= 64 << 10, "{}", permit.bytes());
        }
        // A body that arrives in one piece, as most do, reserves nothing.
        let mut permit = Permit::alone();
        let whole = Arriving::within(Body::from("whole"), PATIENCE).collect(5, &mut permit).await;
        assert_eq!((whole.unwrap().len(), permit.bytes()), (5, 0));
    }

    /// Pieces come in time, but with too little data.
    #[tokio::test]
    async fn a_body_that_trickles_is_given_up() {
        const PATIENCE: Duration = Duration::from_millis(200);
        for (piece, all_of_it) in [(1, false), (STRETCH_BYTES, true)] {
            let pieces = stream::repeat(Bytes::from(vec![b'x'; piece])).then(|bytes| async {
                tokio::time::sleep(PATIENCE / 20).await;
                Ok::<_, Infallible>(bytes)
            });
            let began = Instant::now();
            let mut arriving = Arriving::in_pieces(Body::from_stream(pieces), PATIENCE, 10);
            let error = loop {
                if let Err(error) = arriving.next().await {
                    break error;
                }
            };
            assert!(matches!(error, ApiError::BodyTimeout), "{error:?}");
            assert_eq!(began.elapsed() >= PATIENCE * 10, all_of_it, "{:?}", began.elapsed());
        }
    }

    #[tokio::test]
    async fn bodies_under_way_are_bounded_together() {
        let one = Permit::alone();
        let mut held = Vec::new();
        let refused = loop {
            let mut permit = one.new_sibling();
            let arriving = Arriving::within(body(1 << 20, 1 << 16), PATIENCE);
            match arriving.collect(1 << 20, &mut permit).await {
                Ok(_) => held.push(permit),
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, ApiError::Overloaded), "{refused:?}");
        assert_eq!(held.len(), 24);
        // A body that ends releases its memory for the next one.
        drop(held.pop());
        let arriving = Arriving::within(body(1 << 20, 1 << 16), PATIENCE);
        assert!(arriving.collect(1 << 20, &mut one.new_sibling()).await.is_ok());
        drop(held);
        let too_large =
            Arriving::within(body(6, 1), PATIENCE).collect(5, &mut one.new_sibling()).await;
        assert!(matches!(too_large, Err(ApiError::BodyTooLarge(5))));
    }
}
