//! The error type of the HTTP API, and the only place that turns it into a response. Handlers and the middleware return
//! it. The text of an internal error must never be sent.

use std::borrow::Cow;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use pisync_core::{Violation, ViolationCode};
use serde::Serialize;
use serde_json::Value;
use utoipa::{IntoResponses, PartialSchema, ToSchema, openapi};

use crate::{
    ingest::IngestError,
    store::{Scope, StoreError},
};

/// `Retry-After` in seconds when the server is overloaded.
const RETRY_WHEN_OVERLOADED: u32 = 2;

/// `Retry-After` in seconds when the database is away.
pub(crate) const RETRY_WHEN_AWAY: u32 = 5;

/// `Retry-After` in seconds when the clock is not set. NTP sets it within a minute after the network comes up.
const RETRY_WHEN_CLOCK_NOT_SET: u32 = 60;

/// Every error response of the API.
#[derive(Debug)]
pub(crate) enum ApiError {
    /// 400: these fields are invalid.
    Validation(Vec<Violation>),
    /// 400: the body is not JSON. The text says where.
    Malformed(String),
    /// 400: the body ended early or is not compressed as declared. The text says what is wrong.
    Unreadable(String),
    /// 401: no key. The text says what to send.
    KeyNeeded(&'static str),
    /// 401: a key that is not valid, and why.
    WrongKey(KeyFault),
    /// 403: the key does not have this scope.
    WrongScope(Scope),
    /// 403: the key is for other devices.
    OtherDevice,
    /// 404: the named thing does not exist.
    NotFound(&'static str),
    /// 405.
    MethodNotAllowed,
    /// 409: the request contradicts what is there, or needs it in another state. The text says how.
    Conflict(String),
    /// 408: the body did not arrive in time.
    BodyTimeout,
    /// 413: the body is larger than this many bytes.
    BodyTooLarge(usize),
    /// 413: the body holds more than this many events.
    TooManyEvents(usize),
    /// 413: the roster has more than this many rows.
    TooManyRows(usize),
    /// 415: the text says what is expected.
    UnsupportedMediaType(&'static str),
    /// 429: the next request is allowed after this many seconds.
    TooManyRequests {
        seconds: u64,
        /// What is counted, as words for the message.
        whom: &'static str,
    },
    /// 503: the server is overloaded.
    Overloaded,
    /// 503: the database is away.
    DatabaseAway,
    /// 503: the change was made, but may be lost if a standby is promoted.
    Unreplicated,
    /// 503: the query takes too long.
    TooSlow,
    /// 503: the server's clock is not set.
    ClockNotSet,
    /// 500: the text is for the log and is never sent.
    Internal(String),
}

/// Why a key is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyFault {
    SeveralHeaders,
    NotBearer,
    NotAKey,
    Mistyped,
    Unknown,
    Revoked,
    Expired,
}

impl KeyFault {
    fn code(self) -> ErrorCode {
        match self {
            Self::SeveralHeaders | Self::NotBearer | Self::NotAKey | Self::Mistyped => {
                ErrorCode::KeyMalformed
            }
            Self::Unknown => ErrorCode::KeyUnknown,
            Self::Revoked => ErrorCode::KeyRevoked,
            Self::Expired => ErrorCode::KeyExpired,
        }
    }

    fn message(self) -> &'static str {
        match self {
            Self::SeveralHeaders => "There is more than one Authorization header",
            Self::NotBearer => "Keys are sent as Authorization: Bearer psk_\u{2026}",
            Self::NotAKey => "This is no key: keys begin with psk_",
            Self::Mistyped => "This key is mistyped: its checksum does not fit",
            Self::Unknown => "This key is not known here",
            Self::Revoked => "This key was revoked",
            Self::Expired => "This key has expired",
        }
    }
}

/// The kind of error, as a stable word for programs. The message beside it is for people and may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ErrorCode {
    ValidationFailed,
    MalformedJson,
    UnreadableBody,
    KeyRequired,
    KeyMalformed,
    KeyUnknown,
    KeyRevoked,
    KeyExpired,
    ScopeMissing,
    OtherDevice,
    NotFound,
    MethodNotAllowed,
    Conflict,
    BodyTimeout,
    TooLarge,
    UnsupportedMediaType,
    RateLimited,
    Overloaded,
    TooSlow,
    DatabaseAway,
    NotReplicated,
    ClockNotSet,
    Internal,
}

/// The text about an error for the log: the cause of a 500, or what was wrong with a request.
#[derive(Debug, Clone)]
pub(crate) struct ErrorDetail(pub(crate) String);

/// An error response.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({
    "success": false,
    "error": "Validation failed",
    "code": "validation_failed",
    "details": [{
        "field": "total_errors",
        "message": "\"total_errors\" must be an integer",
        "value": 1.5,
        "code": "type",
    }],
}))]
pub(crate) struct ErrorBody {
    /// Always false.
    success: bool,
    /// What is wrong, for people to read.
    error: String,
    code: ErrorCode,
    /// Every invalid field; absent when no field is invalid.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    details: Vec<FieldError>,
}

/// An invalid field.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FieldError {
    /// The field's name; empty for the entire body.
    #[schema(value_type = String)]
    field: Cow<'static, str>,
    /// The expected value.
    message: String,
    /// The sent value, shortened; absent when nothing was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Value>,
    #[schema(value_type = DetailCode)]
    code: ViolationCode,
}

/// The kind of rule that a field breaks, as a stable word for programs.
struct DetailCode;

impl PartialSchema for DetailCode {
    fn schema() -> openapi::RefOr<openapi::schema::Schema> {
        openapi::ObjectBuilder::new()
            .schema_type(openapi::schema::Type::String)
            .description(Some(
                "What kind of rule the field breaks, in one stable word for programs.",
            ))
            .enum_values(Some(ViolationCode::ALL.map(ViolationCode::as_str)))
            .into()
    }
}

impl ToSchema for DetailCode {}

/// The longest text about a refused request in the log, in characters.
const LOGGED_LENGTH: usize = 300;

/// Describes violations on one line of the log.
pub(crate) fn in_short(violations: &[Violation]) -> String {
    let messages: Vec<_> = violations.iter().map(|violation| violation.message.as_str()).collect();
    cut(&messages.join(", "))
}

/// The beginning of a text, because a client may have made it long.
fn cut(text: &str) -> String {
    match text.char_indices().nth(LOGGED_LENGTH) {
        Some((end, _)) => format!("{}\u{2026}", &text[..end]),
        None => text.to_owned(),
    }
}

impl From<Violation> for FieldError {
    fn from(violation: Violation) -> Self {
        let Violation { field, message, value, code } = violation;
        Self { field, message, value, code }
    }
}

/// The errors that any request may get.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum AnyTime {
    /// No key, or a key that is unknown, expired or revoked.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// The key has another scope, or is for other devices.
    #[response(status = 403)]
    Forbidden(ErrorBody),
    /// Too many requests from this address or with this key. `Retry-After` says when to try again.
    #[response(status = 429)]
    TooManyRequests(ErrorBody),
    /// An internal error. The log contains it under the request id.
    #[response(status = 500)]
    Internal(ErrorBody),
    /// The server is overloaded, the database is away, or the clock is not set. `Retry-After` says when to try again.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

/// The additional errors of a request with a JSON body.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum WithBody {
    /// Malformed JSON, or invalid fields, which `details` lists.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// The body did not arrive in time.
    #[response(status = 408)]
    Timeout(ErrorBody),
    /// The body is too large.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body is not declared to be JSON.
    #[response(status = 415)]
    UnsupportedMediaType(ErrorBody),
}

/// The additional errors of a request with query parameters.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum WithQuery {
    /// Invalid parameters, which `details` lists.
    #[response(status = 400)]
    Invalid(ErrorBody),
}

/// The additional errors of a request that may contradict what is there.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum WithConflict {
    /// The request contradicts what is there.
    #[response(status = 409)]
    Conflict(ErrorBody),
}

/// The additional errors of a request about a device.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum OfDevice {
    /// No such device.
    #[response(status = 404)]
    NotFound(ErrorBody),
}

/// The additional errors of a request about an incident.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum OfIncident {
    /// No such incident.
    #[response(status = 404)]
    NotFound(ErrorBody),
}

/// The additional errors of sending a notification again.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum OfFailedNotification {
    /// No such notification.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// It was not given up.
    #[response(status = 409)]
    Conflict(ErrorBody),
}

/// The additional errors of a change of something that may be over.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes answers, is never made")]
pub(crate) enum OfOpenIncident {
    /// No such incident.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The incident is resolved already.
    #[response(status = 409)]
    Conflict(ErrorBody),
}

impl ApiError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Validation(_) | Self::Malformed(_) | Self::Unreadable(_) => {
                StatusCode::BAD_REQUEST
            }
            Self::KeyNeeded(_) | Self::WrongKey(_) => StatusCode::UNAUTHORIZED,
            Self::WrongScope(_) | Self::OtherDevice => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge(_) | Self::TooManyEvents(_) | Self::TooManyRows(_) => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            Self::UnsupportedMediaType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooManyRequests { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Overloaded
            | Self::DatabaseAway
            | Self::Unreplicated
            | Self::TooSlow
            | Self::ClockNotSet => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn code(&self) -> ErrorCode {
        match self {
            Self::Validation(_) => ErrorCode::ValidationFailed,
            Self::Malformed(_) => ErrorCode::MalformedJson,
            Self::Unreadable(_) => ErrorCode::UnreadableBody,
            Self::KeyNeeded(_) => ErrorCode::KeyRequired,
            Self::WrongKey(fault) => fault.code(),
            Self::WrongScope(_) => ErrorCode::ScopeMissing,
            Self::OtherDevice => ErrorCode::OtherDevice,
            Self::NotFound(_) => ErrorCode::NotFound,
            Self::MethodNotAllowed => ErrorCode::MethodNotAllowed,
            Self::Conflict(_) => ErrorCode::Conflict,
            Self::BodyTimeout => ErrorCode::BodyTimeout,
            Self::BodyTooLarge(_) | Self::TooManyEvents(_) | Self::TooManyRows(_) => {
                ErrorCode::TooLarge
            }
            Self::UnsupportedMediaType(_) => ErrorCode::UnsupportedMediaType,
            Self::TooManyRequests { .. } => ErrorCode::RateLimited,
            Self::Overloaded => ErrorCode::Overloaded,
            Self::TooSlow => ErrorCode::TooSlow,
            Self::DatabaseAway => ErrorCode::DatabaseAway,
            Self::Unreplicated => ErrorCode::NotReplicated,
            Self::ClockNotSet => ErrorCode::ClockNotSet,
            Self::Internal(_) => ErrorCode::Internal,
        }
    }

    /// The `WWW-Authenticate` header (RFC 6750).
    fn challenge(&self) -> Option<HeaderValue> {
        let challenge = match self {
            Self::KeyNeeded(_) => r#"Bearer realm="pisync""#,
            Self::WrongKey(_) => r#"Bearer realm="pisync", error="invalid_token""#,
            Self::WrongScope(_) | Self::OtherDevice => {
                r#"Bearer realm="pisync", error="insufficient_scope""#
            }
            _ => return None,
        };
        Some(HeaderValue::from_static(challenge))
    }

    fn retry_after(&self) -> Option<HeaderValue> {
        match self {
            Self::TooManyRequests { seconds, .. } => Some(HeaderValue::from(*seconds)),
            Self::Overloaded | Self::TooSlow => Some(HeaderValue::from(RETRY_WHEN_OVERLOADED)),
            Self::DatabaseAway => Some(HeaderValue::from(RETRY_WHEN_AWAY)),
            Self::ClockNotSet => Some(HeaderValue::from(RETRY_WHEN_CLOCK_NOT_SET)),
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let code = self.code();
        let retry_after = self.retry_after();
        let challenge = self.challenge();
        let closes =
            matches!(self, Self::BodyTimeout | Self::BodyTooLarge(_) | Self::TooManyEvents(_));
        let mut details = Vec::new();
        let mut log = None;
        let error = match self {
            Self::Validation(violations) => {
                log = Some(ErrorDetail(in_short(&violations)));
                details = violations.into_iter().map(FieldError::from).collect();
                "Validation failed".to_owned()
            }
            Self::Malformed(where_) => {
                log = Some(ErrorDetail(cut(&where_)));
                format!("Malformed JSON: {where_}")
            }
            Self::Unreadable(why) => {
                log = Some(ErrorDetail(cut(&why)));
                format!("The request's body cannot be read: {why}")
            }
            Self::KeyNeeded(what) => what.to_owned(),
            Self::WrongKey(fault) => fault.message().to_owned(),
            Self::WrongScope(scope) => {
                format!("This key does not open this: a key of the scope {} does", scope.as_str())
            }
            Self::OtherDevice => "This key is for other devices".to_owned(),
            Self::NotFound(what) => format!("{what} not found"),
            Self::MethodNotAllowed => "Method not allowed".to_owned(),
            Self::Conflict(how) => how,
            Self::BodyTimeout => "The request's body did not arrive in time".to_owned(),
            Self::BodyTooLarge(most) => {
                format!("The request's body is larger than {most} bytes")
            }
            Self::TooManyEvents(most) => {
                format!("The request holds more than {most} events; send the rest in another one")
            }
            Self::TooManyRows(most) => {
                format!("The roster has more than {most} rows; send the rest in another one")
            }
            Self::UnsupportedMediaType(expected) => format!("Unsupported media type: {expected}"),
            Self::TooManyRequests { whom, .. } => {
                format!("Too many requests {whom}, please try again later")
            }
            Self::Overloaded => "The server is overloaded, please try again later".to_owned(),
            Self::DatabaseAway => {
                "The database is temporarily unavailable, please try again later".to_owned()
            }
            Self::Unreplicated => {
                "The change was made on this database server, but may not be replicated to its standby; look whether it is there before you repeat it"
                    .to_owned()
            }
            Self::ClockNotSet => {
                "The server's clock is not set, so it cannot date events; please try again later"
                    .to_owned()
            }
            Self::TooSlow => {
                "This takes too long: ask for less at a time, or page with \"cursor\" instead of \"offset\"".to_owned()
            }
            Self::Internal(detail) => {
                log = Some(ErrorDetail(detail));
                "Internal server error".to_owned()
            }
        };
        let body = ErrorBody { success: false, error, code, details };
        let mut response = (status, Json(body)).into_response();
        if let Some(retry_after) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, retry_after);
        }
        if let Some(challenge) = challenge {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        if closes {
            // Closing the connection saves reading the rest of the body.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(log) = log {
            response.extensions_mut().insert(log);
        }
        response
    }
}

impl From<Vec<Violation>> for ApiError {
    fn from(violations: Vec<Violation>) -> Self {
        Self::Validation(violations)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_)
            | StoreError::Transient(_)
            | StoreError::OutcomeUnknown(_) => Self::DatabaseAway,
            StoreError::Unreplicated => Self::Unreplicated,
            StoreError::OtherGroup(_) => Self::OtherDevice,
            StoreError::Busy(_) => Self::Overloaded,
            StoreError::TooSlow(_) => Self::TooSlow,
            StoreError::Rejected(_) | StoreError::Failed(_) | StoreError::Stopped => {
                Self::Internal(error.to_string())
            }
        }
    }
}

impl From<IngestError> for ApiError {
    fn from(error: IngestError) -> Self {
        match error {
            IngestError::Overloaded => Self::Overloaded,
            IngestError::Unavailable => Self::DatabaseAway,
            IngestError::OtherGroup => Self::OtherDevice,
            IngestError::Failed(detail) => Self::Internal(detail),
        }
    }
}
