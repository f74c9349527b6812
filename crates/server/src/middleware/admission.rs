//! Decides whether a request is admitted: by its sender, its rate, and the number of requests in flight. It is one step
//! instead of a layer, to save the hot path the cost. `observe` calls it, unless pages of other origins may call the
//! API. Then it runs inside the CORS layer. Such a page can read why it is refused, and a preflight request needs no
//! key.

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

/// Runs the step as a middleware, for the case with CORS.
pub(crate) async fn layer(
    State(state): State<SharedState>,
    mut request: Request,
    next: Next,
) -> Response {
    let matched = request.extensions().get::<MatchedPath>().cloned();
    let route = matched.as_ref().map_or("", MatchedPath::as_str);
    let policy = state.policies.of(route, request.method());
    let mut admission = admit(&state, &policy, &mut request);
    if admission.has_unknown_key {
        admission = admit_new_key(&state, &policy, &mut request).await;
    }
    let Admission { rate, entry, is_foreign, .. } = admission;
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

/// The decision about a request.
pub(crate) struct Admission {
    /// The rate to report in every response; `None` if the request is not counted.
    pub(crate) rate: Option<Rate>,
    /// The slot to hold until the response has been sent, or why the request is refused.
    pub(crate) entry: Result<Option<Slot>, ApiError>,
    /// True if a third party made this machine's own user send it.
    pub(crate) is_foreign: bool,
    /// True if the request's key may have been made a moment ago: [`admit_new_key`] tells.
    pub(crate) has_unknown_key: bool,
}

/// Requests with unknown keys that may wait for a look at the database at a time. Each waits for some 50 ms. They take no
/// slots: made-up keys must not keep out anybody else.
pub(crate) const MOST_LOOK_UPS: usize = 256;

/// Marks a response: a third party made this machine's own user send the request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Foreign;

/// Checks a request against its route's policy. The request then carries its key. One with an unknown key is not counted
/// yet: [`admit_new_key`] counts it against its key or its address.
pub(crate) fn admit(state: &SharedState, policy: &RoutePolicy, request: &mut Request) -> Admission {
    let verdict = state.gate.check(request, policy);
    if is_of_unknown_key(&verdict) {
        let Verdict { result, is_foreign, .. } = verdict;
        let entry = result.map(|()| None);
        return Admission { rate: None, entry, is_foreign, has_unknown_key: true };
    }
    conclude(state, policy, request, verdict)
}

/// Checks a request with an unknown key again, once the database was asked. The key may have been made a moment ago,
/// without this server's knowledge.
pub(crate) async fn admit_new_key(
    state: &SharedState,
    policy: &RoutePolicy,
    request: &mut Request,
) -> Admission {
    let looked = match state.look_ups.take() {
        Some(_place) => state.gate.look_up_keys(&*state.store).await.map_err(ApiError::from),
        None => Err(ApiError::Overloaded),
    };
    let mut verdict = state.gate.check(request, policy);
    if let Err(error) = looked
        && is_of_unknown_key(&verdict)
    {
        // The key may be good.
        verdict.result = Err(error);
    }
    conclude(state, policy, request, verdict)
}

fn is_of_unknown_key(verdict: &Verdict) -> bool {
    matches!(verdict.result, Err(ApiError::WrongKey(KeyFault::Unknown)))
}

fn conclude(
    state: &SharedState,
    policy: &RoutePolicy,
    request: &mut Request,
    verdict: Verdict,
) -> Admission {
    let Verdict { key, result, is_foreign } = verdict;
    // Load balancers use OPTIONS to check whether a server is there.
    let is_options = *request.method() == Method::OPTIONS;
    // Refused requests are counted too, so that nobody can guess keys quickly. A request that a third party caused must
    // not use up the user's limit.
    let (rate, whom) = match &key {
        _ if is_options => (None, ""),
        None if is_foreign => (None, ""),
        Some(key) => (state.limits.check_key(policy.rate, key.id), "with this key"),
        None => {
            // Metrics are not counted, guesses of their key are.
            let is_refused = result.is_err() && policy.rate == RateClass::Uncounted;
            let class = if is_refused { RateClass::General } else { policy.rate };
            let client = request.extensions().get::<Client>();
            let rate = client.and_then(|client| state.limits.check(class, client.0));
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
        // Health and metrics must be answered even when the server is overloaded.
        (None, Ok(())) if policy.rate == RateClass::Uncounted || is_options => Ok(None),
        (None, Ok(())) => state.slots.take().map(Some).ok_or(ApiError::Overloaded),
    };
    Admission { rate, entry, is_foreign, has_unknown_key: false }
}

/// The limit of requests in flight.
pub(crate) struct Slots {
    most: usize,
    taken: Arc<AtomicUsize>,
}

/// A slot of one request, until it is dropped.
pub(crate) struct Slot(Arc<AtomicUsize>);

impl Slots {
    /// Allows `most` requests; 0 means no limit.
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
