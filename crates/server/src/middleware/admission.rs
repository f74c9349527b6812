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
        wire::{
            error::{ApiError, KeyFault},
            large,
        },
    },
    middleware::{
        auth::Verdict,
        client_address::Client,
        rate_limit::Rate,
        route_policy::{RateClass, RoutePolicy},
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
    let policy = state.policies.of(route, request.method());
    let mut admission = admit(&state, &policy, &mut request);
    if admission.is_of_unknown_key() {
        admission = admit_new_key(&state, &policy, &mut request, admission).await;
    }
    let Admission { rate, entry, is_foreign } = admission;
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

impl Admission {
    /// Whether all that speaks against the request is that nobody knows its key.
    pub(crate) fn is_of_unknown_key(&self) -> bool {
        matches!(self.entry, Err(ApiError::WrongKey(KeyFault::Unknown)))
    }
}

/// On an answer: others had this machine's own user send the request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Foreign;

/// Looks at a request for a route with this policy. The request then carries its key.
pub(crate) fn admit(state: &SharedState, policy: &RoutePolicy, request: &mut Request) -> Admission {
    let verdict = state.gate.check(request, policy);
    conclude(state, policy, request, verdict)
}

/// Looks again at a request that was refused because nobody knows its key: that may have been made a moment ago, beside
/// this server. Meanwhile the request counts as one that is being answered.
pub(crate) async fn admit_new_key(
    state: &SharedState,
    policy: &RoutePolicy,
    request: &mut Request,
    refused: Admission,
) -> Admission {
    let Some(_slot) = state.slots.take() else {
        return Admission { entry: Err(ApiError::Overloaded), ..refused };
    };
    if let Err(error) = state.gate.look_up_keys(&*state.store).await {
        return Admission { entry: Err(error.into()), ..refused };
    }
    match state.gate.check(request, policy) {
        // It was counted before; now it may say that the key is revoked.
        Verdict { key: None, result: Err(error), .. } => Admission { entry: Err(error), ..refused },
        verdict => conclude(state, policy, request, verdict),
    }
}

fn conclude(
    state: &SharedState,
    policy: &RoutePolicy,
    request: &mut Request,
    verdict: Verdict,
) -> Admission {
    let Verdict { key, result, is_foreign } = verdict;
    // How load balancers ask whether a server is there.
    let is_options = *request.method() == Method::OPTIONS;
    // Who is refused is counted, too: keys cannot be guessed at leisure. But nobody else uses up what the user has.
    let (rate, whom) = match &key {
        _ if is_options => (None, ""),
        None if is_foreign => (None, ""),
        Some(key) => (state.limits.check_key(policy.rate, key.id), "with this key"),
        None => {
            let client = request.extensions().get::<Client>();
            let rate = client.and_then(|client| state.limits.check(policy.rate, client.0));
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
        (None, Ok(())) if policy.rate == RateClass::Uncounted || is_options => Ok(None),
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
