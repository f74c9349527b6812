//! Whether a request is let in: by who asks, by how often, and by how many are being answered. One step, so
//! that it costs the hot path no layer of its own: `observe` takes it, unless pages of other origins may
//! call. Then it stands within CORS: such a page can read why it is refused, and what browsers ask
//! beforehand needs no key.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{
    api::{
        SharedState,
        wire::{error::ApiError, large},
    },
    middleware::{
        auth::Verdict,
        client_address::Client,
        rate_limit::{self, Rate},
    },
};

/// The step as a middleware.
pub(crate) async fn layer(
    State(state): State<SharedState>,
    mut request: Request,
    next: Next,
) -> Response {
    let matched = request.extensions().get::<MatchedPath>().cloned();
    let route = matched.as_ref().map_or("", MatchedPath::as_str);
    let Admission { rate, entry, is_foreign } = admit(&state, route, &mut request);
    let mut response = match entry {
        Ok(slot) => large::hold(next.run(request).await, slot),
        Err(error) => error.into_response(),
    };
    if is_foreign {
        response.extensions_mut().insert(Foreign);
    }
    if let Some(rate) = rate {
        rate.write(response.headers_mut());
    }
    response
}

/// What is to happen with a request.
pub(crate) struct Admission {
    /// For the answer, whatever it is.
    pub(crate) rate: Option<Rate>,
    /// What to hold until the request is answered, and the answer taken, or why it is not let in.
    pub(crate) entry: Result<Option<Slot>, ApiError>,
    /// Whether others had this machine's own user send it.
    pub(crate) is_foreign: bool,
}

/// On an answer: others had this machine's own user send the request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Foreign;

/// Looks at a request for `route`, which is empty when there is none such. The request then carries its key.
pub(crate) fn admit(state: &SharedState, route: &str, request: &mut Request) -> Admission {
    let Verdict { key, result, is_foreign } = state.gate.check(request, route);
    let method = request.method();
    // How load balancers ask whether a server is there.
    let is_options = *method == Method::OPTIONS;
    // Who is refused is counted, too: keys cannot be guessed at leisure. But nobody else uses up what the user has.
    let (rate, whom) = match &key {
        None if is_foreign => (None, ""),
        Some(key) => (state.limits.check_key(method, route, key.id), "with this key"),
        None => {
            let client = request.extensions().get::<Client>();
            let rate = client.and_then(|client| state.limits.check(method, route, client.0));
            (rate, "from this IP")
        }
    };
    if let Some(key) = key {
        request.extensions_mut().insert(key);
    }
    let too_many = rate.as_ref().and_then(|rate| rate.retry_after);
    let entry = match (too_many, result) {
        (Some(seconds), _) => Err(ApiError::TooManyRequests { seconds, whom }),
        (None, Err(error)) => Err(error),
        // What says how the server is must be heard when it is overloaded, too.
        (None, Ok(())) if rate_limit::is_free(route) || is_options => Ok(None),
        (None, Ok(())) => state.slots.take().map(Some).ok_or(ApiError::Overloaded),
    };
    Admission { rate, entry, is_foreign }
}

/// Requests that may be answered at a time.
pub(crate) struct Slots {
    most: usize,
    taken: Arc<AtomicUsize>,
}

/// One of them, until it is dropped.
pub(crate) struct Slot(Arc<AtomicUsize>);

impl Slots {
    /// So many; 0 is no limit.
    pub(crate) fn new(most: usize) -> Self {
        Self { most: if most == 0 { usize::MAX } else { most }, taken: Arc::default() }
    }

    fn take(&self) -> Option<Slot> {
        let taken = self.taken.fetch_add(1, Ordering::Relaxed);
        let slot = Slot(Arc::clone(&self.taken));
        (taken < self.most).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back() {
        let slots = Slots::new(2);
        let taken = [slots.take(), slots.take()];
        assert!(taken.iter().all(Option::is_some));
        assert!(slots.take().is_none() && slots.take().is_none());
        drop(taken);
        assert!(slots.take().is_some());
        assert_eq!(slots.taken.load(Ordering::Relaxed), 0);
        assert!(Slots::new(0).take().is_some());
    }
}
