//! Reading requests: bodies within their bounds of size and time, paths, and query strings, which
//! [`super::query`] understands.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body as _;
use pisync_core::{DeviceId, Violation, text::json_text};
use serde_json::{Map, Value};
use utoipa::IntoParams;

use super::{error::ApiError, query::QueryString};

/// A JSON body that is still to be read. The rest of its request has been let go.
pub(super) struct JsonBody {
    body: Result<Body, ApiError>,
    limit: usize,
    timeout: Duration,
}

impl JsonBody {
    /// A body of at most `limit` bytes, which may take so long to arrive in full.
    pub(super) fn of(request: Request, limit: usize, timeout: Duration) -> Self {
        let body = check_media_type(request.headers()).and_then(|()| {
            // A body that says it is too large need not arrive; the client may be waiting for leave to send it.
            if request.body().size_hint().lower() > limit as u64 {
                return Err(ApiError::BodyTooLarge(limit));
            }
            Ok(request.into_body())
        });
        Self { body, limit, timeout }
    }

    /// Reads it.
    pub(super) async fn read(self) -> Result<Bytes, ApiError> {
        let Self { body, limit, timeout } = self;
        match tokio::time::timeout(timeout, Limited::new(body?, limit).collect()).await {
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::BodyTooLarge(limit)),
            // The connection broke or the framing was wrong; nobody may be left to read the answer.
            Ok(Err(_)) => Err(ApiError::Unreadable("it ended early".to_owned())),
            Err(_) => Err(ApiError::BodyTimeout),
        }
    }
}

/// The fields of a body that is a JSON object.
pub(super) fn read_object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let text = json_text(body).map_err(ApiError::Malformed)?;
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(value) => {
            let violation = Violation::of_whole("must be of type object", Some(value));
            Err(ApiError::Validation(vec![violation]))
        }
        Err(error) => Err(ApiError::Malformed(error.to_string())),
    }
}

fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    const EXPECTED: &str = "send JSON with Content-Type: application/json";
    let encoding = headers.get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| encoding.as_bytes() != b"identity") {
        return Err(ApiError::UnsupportedMediaType("send the body without Content-Encoding"));
    }
    let media_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .map(str::trim);
    match media_type {
        Some(json)
            if json.eq_ignore_ascii_case("application/json")
                || json.to_ascii_lowercase().ends_with("+json") =>
        {
            Ok(())
        }
        _ => Err(ApiError::UnsupportedMediaType(EXPECTED)),
    }
}

/// The path as the document describes it; [`DevicePath`] reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes the path, is never made")]
pub(super) struct DevicePathParameter {
    /// What the device calls itself.
    #[param(
        min_length = 1,
        max_length = 255,
        pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$",
        example = "pi-device-001"
    )]
    device_id: String,
}

/// The device named in the path.
pub(super) struct DevicePath(pub(super) DeviceId);

impl<S: Send + Sync> FromRequestParts<S> for DevicePath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let refuse = |rule: &str, value: Option<Value>| {
            ApiError::Validation(vec![Violation::of("device_id", rule, value)])
        };
        let Ok(Path(text)) = Path::<String>::from_request_parts(parts, state).await else {
            return Err(refuse("must be valid UTF-8", None));
        };
        DeviceId::new(&text)
            .map(Self)
            .map_err(|error| refuse(&error.to_string(), Some(Value::from(text))))
    }
}

/// A request's query string, to be read.
pub(super) struct Query(pub(super) QueryString);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self(QueryString::parse(parts.uri.query().unwrap_or_default())))
    }
}
