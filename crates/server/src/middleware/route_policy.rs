//! What a route needs and how its answers are sent: who may ask, what is counted, and what a browser may do with the
//! answer. Each route declares it where it is defined (`api::wire::routes`); admission, authentication, rate limits and
//! security headers look it up here. Nothing here knows the path of a route.

use std::collections::HashMap;

use axum::http::{HeaderValue, Method};

use crate::{middleware::security_headers::API_CONTENT_POLICY, store::Scope};

/// Who may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Everybody.
    Anyone,
    /// Who has a key that opens this scope.
    Scope(Scope),
}

/// Which rate limit counts a request without a key. Requests with a key have one limit for all routes that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RateClass {
    /// None: what is asked often and costs little, or what a browser loads in one go. It is also answered by a server
    /// that has too much to do.
    Uncounted,
    /// That of everything else.
    General,
    /// That of reports.
    Sync,
}

/// The policy of one method of one route. An error is answered in JSON on every route.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RoutePolicy {
    pub(crate) access: Access,
    pub(crate) rate: RateClass,
    /// Whether a link on a page elsewhere may open it: it tells nothing of the fleet by itself.
    pub(crate) opens_from_links: bool,
    /// The Content-Security-Policy of its answers.
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

    /// What devices report.
    pub(crate) const SYNC: Self = Self { rate: RateClass::Sync, ..Self::API };

    /// Asked often, and cheap to answer.
    pub(crate) const UNCOUNTED: Self = Self { rate: RateClass::Uncounted, ..Self::API };

    /// Answers that there is no such route, or no such method: they tell nothing.
    const UNMATCHED: Self = Self { access: Access::Anyone, ..Self::API };

    /// The same for somebody else.
    pub(crate) fn with_access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// Whether everybody may ask, as often as they like.
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

    /// The policy of a route, which is empty when none matches. A route that was never declared is for admins.
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
        // The answer is 404 or 405, and is counted.
        for (route, method) in [("", Method::GET), ("/open", Method::DELETE)] {
            let policy = policies.of(route, &method);
            assert_eq!((policy.access, policy.rate), (Access::Anyone, RateClass::General));
        }
    }
}
