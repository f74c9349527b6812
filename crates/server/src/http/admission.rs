//! Whether a request is let in: by who asks, and by how often. One step, so that it costs the hot path no
//! layer of its own: `observe` takes it, unless pages of other origins may call. Then it stands within
//! CORS: such a page can read why it is refused, and what browsers ask beforehand needs no key.

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{SharedState, auth::Verdict, client_address::Client, error::ApiError};

/// The step as a middleware.
pub(super) async fn layer(
    State(state): State<SharedState>,
    request: Request,
    next: Next,
) -> Response {
    let matched = request.extensions().get::<MatchedPath>().cloned();
    admit(&state, matched.as_ref().map_or("", MatchedPath::as_str), request, next).await
}

/// Lets a request for `route` in, or says why not.
pub(super) async fn admit(
    state: &SharedState,
    route: &str,
    mut request: Request,
    next: Next,
) -> Response {
    let Verdict { key, result } = state.gate.check(&request, route);
    let client = request.extensions().get::<Client>().copied();
    // Who is refused is counted, too.
    let rate = client.and_then(|client| state.limits.check(request.method(), route, client.0));
    if let Some(key) = key {
        request.extensions_mut().insert(key);
    }
    let too_many = rate.as_ref().and_then(|rate| rate.retry_after);
    let mut response = match (too_many, result) {
        (Some(seconds), _) => ApiError::TooManyRequests(seconds).into_response(),
        (None, Err(error)) => error.into_response(),
        (None, Ok(())) => next.run(request).await,
    };
    if let Some(rate) = rate {
        rate.write(response.headers_mut());
    }
    response
}
