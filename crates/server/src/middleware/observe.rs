//! The outermost layer around every request: its id, security headers, metrics and log line. `api` adds it to the
//! router. Every response passes through it, so a handler must not do any of this itself.

use std::{
    any::Any,
    convert::Infallible,
    net::IpAddr,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header},
    response::{IntoResponse, Response},
};
use futures_util::{
    FutureExt,
    future::{self, BoxFuture},
};
use tower::{Layer, Service, ServiceExt as _};

use crate::{
    api::{
        SharedState,
        wire::{
            error::{ApiError, ErrorDetail},
            large,
        },
    },
    clock::Clock,
    log_throttle::{FewPerInterval, OnePerInterval, PermittedLine},
    middleware::{
        admission::{self, Admission, Foreign},
        client_address::{self, Client, Peer},
        rate_limit::Rate,
        route_policy::RoutePolicy,
        security_headers,
    },
};

/// The header with the request's id.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest request id that is accepted from a client.
const MAX_REQUEST_ID: usize = 64;

/// A longer request is logged as slow.
const SLOW: Duration = Duration::from_secs(1);

/// While the database is away every request is refused, so one line per interval is enough.
const REFUSED_EVERY: Duration = Duration::from_secs(10);

/// The interval of lines about requests from foreign web pages. One page can send any number of them.
const FOREIGN_EVERY: Duration = Duration::from_secs(10);

/// The interval of lines about batches with rejected events. Metrics count all of them.
const REJECTED_EVERY: Duration = Duration::from_secs(10);

/// The number of client error statuses, 400 to 499.
const CLIENT_ERRORS: usize = 100;

/// The route label of requests that match no route. The number of labels must not grow with what clients ask for.
const UNMATCHED: &str = "unmatched";

/// Makes request ids from the start time and a running number. Ids of two runs or two nodes are rarely equal.
pub(crate) struct RequestIds {
    prefix: String,
    next: AtomicU64,
}

impl RequestIds {
    pub(crate) fn new(clock: &Clock) -> Self {
        // The process id separates nodes that start at the same time on one machine.
        let start = clock.now().as_millisecond() ^ (i64::from(std::process::id()) << 40);
        Self { prefix: format!("{start:012x}"), next: AtomicU64::new(1) }
    }

    /// The client's own id if it is valid, otherwise a new one.
    fn of(&self, headers: &HeaderMap) -> HeaderValue {
        let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        if let Some(id) = headers.get(REQUEST_ID)
            && (1..=MAX_REQUEST_ID).contains(&id.len())
            && id.as_bytes().iter().copied().all(sane)
        {
            return id.clone();
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        HeaderValue::try_from(format!("{}-{number:x}", self.prefix))
            .unwrap_or(HeaderValue::from_static("none"))
    }
}

/// Limits for log lines that many requests can cause.
pub(crate) struct LogThrottles {
    /// Requests that are refused for now (503).
    refusals: OnePerInterval,
    /// Refused requests that a third party made this machine's own user send.
    foreign: OnePerInterval,
    /// Batches with rejected events. A device that sends one usually sends them all day.
    rejections: OnePerInterval,
    /// Client errors, by status minus 400. Each status has its own limit, so that requests without a key cannot use up
    /// the lines about devices that report something wrong.
    client_errors: [FewPerInterval; CLIENT_ERRORS],
    /// Slow requests, which a client may cause on purpose.
    slow: FewPerInterval,
}

impl LogThrottles {
    pub(crate) fn new() -> Self {
        Self {
            refusals: OnePerInterval::new(REFUSED_EVERY),
            foreign: OnePerInterval::new(FOREIGN_EVERY),
            rejections: OnePerInterval::new(REJECTED_EVERY),
            client_errors: std::array::from_fn(|_| FewPerInterval::usual()),
            slow: FewPerInterval::usual(),
        }
    }

    /// The line for a request refused with `status`, if it may be logged.
    fn client_error(&self, status: StatusCode) -> Option<PermittedLine> {
        let lines = usize::from(status.as_u16()).checked_sub(400);
        lines.and_then(|status| self.client_errors.get(status))?.due()
    }
}

/// The rejected events of a batch, for the log. The response to the batch itself is a 200.
#[derive(Debug, Clone)]
pub(crate) struct RejectedEvents {
    /// The number of rejected events.
    pub(crate) rejected: usize,
    /// The number of accepted events.
    pub(crate) taken: usize,
    /// The errors of the first rejected events.
    pub(crate) reasons: String,
}

/// The outermost layer.
#[derive(Clone)]
pub(crate) struct ObserveLayer(pub(crate) SharedState);

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe { inner, state: Arc::clone(&self.0) }
    }
}

/// A service instead of an async function. The function's future would hold several copies of the request until the
/// response. With hundreds of connections those exceed the CPU's caches.
#[derive(Clone)]
pub(crate) struct Observe<S> {
    inner: S,
    state: SharedState,
}

impl<S> Service<Request> for Observe<S>
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let state = Arc::clone(&self.state);
        let seen = Seen::new(&state, &mut request);
        let admission = if state.admits_within_cors {
            Admission { rate: None, entry: Ok(None), is_foreign: false, has_unknown_key: false }
        } else {
            admission::admit(&state, &seen.policy, &mut request)
        };
        if admission.has_unknown_key {
            let answering = answer_new_key(state, self.inner.clone(), seen, request);
            return Box::pin(answering.map(Ok));
        }
        let Admission { rate, entry, is_foreign, .. } = admission;
        match entry {
            Ok(slot) => {
                // A panic fails one request, not the process.
                let answering = AssertUnwindSafe(self.inner.call(request)).catch_unwind();
                Box::pin(async move {
                    let answered = answering
                        .await
                        .unwrap_or_else(|panic| Ok(panicked(panic.as_ref()).into_response()));
                    answered.map(|response| {
                        let response = seen.complete(&state, response, rate, is_foreign);
                        large::hold(response, slot)
                    })
                })
            }
            Err(error) => {
                let response = seen.complete(&state, error.into_response(), rate, is_foreign);
                Box::pin(future::ready(Ok(response)))
            }
        }
    }
}

/// Answers a request whose key may have been made a moment ago.
async fn answer_new_key<S>(
    state: SharedState,
    inner: S,
    seen: Seen,
    mut request: Request,
) -> Response
where
    S: Service<Request, Response = Response, Error = Infallible>,
{
    let admission = admission::admit_new_key(&state, &seen.policy, &mut request).await;
    let Admission { rate, entry, is_foreign, .. } = admission;
    match entry {
        Ok(slot) => {
            let answering = AssertUnwindSafe(inner.oneshot(request)).catch_unwind();
            let Ok(response) = answering
                .await
                .unwrap_or_else(|panic| Ok(panicked(panic.as_ref()).into_response()));
            large::hold(seen.complete(&state, response, rate, is_foreign), slot)
        }
        Err(error) => seen.complete(&state, error.into_response(), rate, is_foreign),
    }
}

/// What is needed of a request after its handler has consumed it.
struct Seen {
    started: Instant,
    request_id: HeaderValue,
    method: &'static str,
    version: Version,
    path: Box<str>,
    matched: Option<MatchedPath>,
    policy: RoutePolicy,
    client: Option<IpAddr>,
}

impl Seen {
    /// Reads the request, and stores the client's address in it.
    fn new(state: &SharedState, request: &mut Request) -> Self {
        let headers = request.headers();
        let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
        let client =
            peer.map(|peer| client_address::resolve(peer, headers, &state.trusted_proxies));
        let matched = request.extensions().get::<MatchedPath>().cloned();
        let route = matched.as_ref().map_or("", MatchedPath::as_str);
        let seen = Self {
            started: Instant::now(),
            request_id: state.request_ids.of(headers),
            method: method_name(request.method()),
            version: request.version(),
            // A copy, because the URI would keep the entire read buffer alive.
            path: request.uri().path().into(),
            policy: state.policies.of(route, request.method()),
            matched,
            client,
        };
        if let Some(client) = client {
            request.extensions_mut().insert(Client(client));
        }
        seen
    }

    /// Finishes the response: metrics, log line, headers.
    fn complete(
        self,
        state: &SharedState,
        mut response: Response,
        rate: Option<Rate>,
        is_foreign: bool,
    ) -> Response {
        let duration = self.started.elapsed();
        let status = response.status();
        let route = self.matched.as_ref().map_or(UNMATCHED, MatchedPath::as_str);
        state.metrics.answered(self.method, route, status.as_u16(), duration);
        let detail = response.extensions_mut().remove::<ErrorDetail>();
        let rejected = response.extensions_mut().remove::<RejectedEvents>();
        let is_foreign = is_foreign || response.extensions_mut().remove::<Foreign>().is_some();
        let line = Line {
            method: self.method,
            path: &self.path,
            status,
            duration,
            client: self.client,
            detail,
            rejected,
            is_foreign,
            request_id: &self.request_id,
        };
        line.log(&state.log_throttles);
        let headers = response.headers_mut();
        if is_foreign && status.is_client_error() && self.version < Version::HTTP_2 {
            // A foreign page must not keep connections open.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        security_headers::write(headers, self.policy.content_policy);
        if let Some(rate) = rate {
            rate.write(headers);
        }
        headers.insert(REQUEST_ID, self.request_id);
        response
    }
}

fn panicked(panic: &(dyn Any + Send)) -> ApiError {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    ApiError::Internal(format!("a handler panicked: {}", text.unwrap_or_default()))
}

/// The log line of one request.
struct Line<'a> {
    method: &'static str,
    path: &'a str,
    status: StatusCode,
    duration: Duration,
    client: Option<IpAddr>,
    detail: Option<ErrorDetail>,
    rejected: Option<RejectedEvents>,
    is_foreign: bool,
    request_id: &'a HeaderValue,
}

impl Line<'_> {
    fn log(&self, throttles: &LogThrottles) {
        macro_rules! line {
            ($level:ident, $message:literal $(, $field:ident = $value:expr)*) => {
                tracing::$level!(
                    method = self.method,
                    path = self.path,
                    status = self.status.as_u16(),
                    milliseconds = u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
                    client = self.client.map(tracing::field::display),
                    request_id = self.request_id.to_str().unwrap_or_default(),
                    error = self.detail.as_ref().map(|detail| detail.0.as_str()),
                    $($field = $value,)*
                    $message
                )
            };
        }
        if let Some(RejectedEvents { rejected, taken, reasons }) = &self.rejected
            && let Some(suppressed) = throttles.rejections.due()
        {
            line!(
                warn,
                "events of a batch were rejected; further such batches are not logged for 10 s, pisync_sync_events_rejected_total counts their events",
                rejected = rejected,
                taken = taken,
                reasons = reasons.as_str(),
                batches_suppressed = suppressed
            );
        } else if self.status == StatusCode::SERVICE_UNAVAILABLE {
            // Expected while the database is away, which has its own error line.
            if let Some(suppressed) = throttles.refusals.due() {
                line!(
                    warn,
                    "request refused for now; further refusals are not logged for 10 s",
                    suppressed = suppressed
                );
            } else {
                line!(debug, "request refused for now");
            }
        } else if self.is_foreign && self.status.is_client_error() {
            if let Some(suppressed) = throttles.foreign.due() {
                line!(
                    info,
                    "request of a web page elsewhere, or through a proxy, refused; further such refusals are not logged for 10 s",
                    suppressed = suppressed
                );
            } else {
                line!(debug, "request of a web page elsewhere, or through a proxy, refused");
            }
        } else if self.status.is_server_error() {
            line!(error, "request failed");
        } else if self.duration >= SLOW {
            match throttles.slow.due() {
                Some(PermittedLine { suppressed: 0, is_last: false }) => {
                    line!(warn, "slow request");
                }
                Some(PermittedLine { suppressed, .. }) => line!(
                    warn,
                    "slow request; more than 20 within 10 s are counted, in suppressed and by http_request_duration_seconds",
                    suppressed = suppressed
                ),
                None => line!(debug, "slow request"),
            }
        } else if self.status.is_client_error() {
            match throttles.client_error(self.status) {
                Some(PermittedLine { suppressed: 0, is_last: false }) => {
                    line!(info, "request refused");
                }
                Some(PermittedLine { suppressed, .. }) => line!(
                    info,
                    "request refused; more than 20 of this status within 10 s are counted, in suppressed and by http_requests_total",
                    suppressed = suppressed
                ),
                None => line!(debug, "request refused"),
            }
        } else {
            line!(debug, "request answered");
        }
    }
}

/// The method as a label. Unknown methods share one, because a client can invent any number.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "OTHER",
    }
}
