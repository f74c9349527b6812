//! The policy of a route: who may ask, what is counted, and what a browser may do with the response. Each route
//! declares its policy where it is defined (`api::wire::routes`). Admission, authorization, rate limits and security
//! headers look it up here. Nothing here may know the path of a route.

use std::collections::HashMap;

use axum::http::{HeaderValue, Method};

use crate::{middleware::security_headers::API_CONTENT_POLICY, store::Scope};

/// Who may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Everybody.
    Anyone,
    /// Requests with a key that grants this scope.
    Scope(Scope),
}

/// The rate limit for requests without a key. Requests with a key have one limit for all counted routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RateClass {
    /// No limit: cheap and frequent requests, or files that a browser loads together. They are answered even when the
    /// server is overloaded.
    Uncounted,
    /// The limit of all other routes.
    General,
    /// The limit of sync reports.
    Sync,
}

/// The policy of one method of one route. Errors are JSON on every route.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RoutePolicy {
    pub(crate) access: Access,
    pub(crate) rate: RateClass,
    /// True if a link on a foreign page may open it. The response must then reveal nothing about the fleet.
    pub(crate) opens_from_links: bool,
    /// The Content-Security-Policy of its responses.
    pub(crate) content_policy: &'static HeaderValue,
}

impl RoutePolicy {
    /// JSON for admins, unless the operation declares another scope in the OpenAPI document.
    pub(crate) const API: Self = Self {
        access: Access::Scope(Scope::Admin),
        rate: RateClass::General,
        opens_from_links: false,
        content_policy: &API_CONTENT_POLICY,
    };

    /// Sync reports.
    pub(crate) const SYNC: Self = Self { rate: RateClass::Sync, ..Self::API };

    /// Frequent requests that are cheap to answer.
    pub(crate) const UNCOUNTED: Self = Self { rate: RateClass::Uncounted, ..Self::API };

    /// Responses to unknown routes or methods. They reveal nothing.
    const UNMATCHED: Self = Self { access: Access::Anyone, ..Self::API };

    /// The same policy with another access rule.
    pub(crate) fn with_access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// True if everybody may ask, without a limit.
    pub(crate) fn is_open(&self) -> bool {
        self.access == Access::Anyone && self.rate == RateClass::Uncounted
    }
}

/// The policies of all routes.
#[derive(Debug, Default)]
pub(crate) struct Policies(HashMap<String, Vec<(Method, RoutePolicy)>>);

impl Policies {
    pub(crate) fn declare(&mut self, route: &str, method: Method, policy: RoutePolicy) {
        self.0.entry(route.to_owned()).or_default().push((method, policy));
    }

    pub(crate) fn merge(&mut self, other: Self) {
        for (route, mut methods) in other.0 {
            self.0.entry(route).or_default().append(&mut methods);
        }
    }

    /// The policy of a route and method; `route` is empty when no route matches. An undeclared route requires an admin
    /// key.
    pub(crate) fn of(&self, route: &str, method: &Method) -> RoutePolicy {
        if route.is_empty() {
            return RoutePolicy::UNMATCHED;
        }
        let Some(methods) = self.0.get(route) else {
            return RoutePolicy::API;
        };
        let method = if *method == Method::HEAD { &Method::GET } else { method };
        let declared = methods.iter().find(|(declared, _)| declared == method);
        declared.map_or(RoutePolicy::UNMATCHED, |(_, policy)| *policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_that_was_never_declared_is_for_admins() {
        let mut policies = Policies::default();
        let everybody = RoutePolicy::UNCOUNTED.with_access(Access::Anyone);
        policies.declare("/open", Method::GET, everybody);
        for method in [Method::GET, Method::HEAD] {
            assert!(policies.of("/open", &method).is_open());
        }
        assert_eq!(policies.of("/forgotten", &Method::GET).access, Access::Scope(Scope::Admin));
        // The response is 404 or 405, and the request is counted.
        for (route, method) in [("", Method::GET), ("/open", Method::DELETE)] {
            let policy = policies.of(route, &method);
            assert_eq!((policy.access, policy.rate), (Access::Anyone, RateClass::General));
        }
    }
}
