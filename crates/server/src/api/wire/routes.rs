//! Declares the routes of a resource, each with its handler, documentation and policy. The resources call it. The
//! required scope is the operation's `security` in the OpenAPI document, so the document cannot contradict the server.

use std::convert::Infallible;

use axum::{
    Router,
    extract::Request,
    http::Method,
    response::IntoResponse,
    routing::{MethodRouter, Route},
};
use serde_json::Value;
use tower::{Layer, Service};
use utoipa::openapi::{OpenApi as Document, PathItem, path::Operation};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use crate::{
    api::SharedState,
    middleware::route_policy::{Access, Policies, RoutePolicy},
    store::Scope,
};

/// The name of the key scheme in the OpenAPI document.
pub(crate) const SECURITY_SCHEME: &str = "key";

/// Routes with their document and policies.
#[derive(Default)]
pub(crate) struct Routes {
    router: OpenApiRouter<SharedState>,
    policies: Policies,
}

impl Routes {
    /// No routes yet, and the outline of the document.
    pub(crate) fn within(document: Document) -> Self {
        Self { router: OpenApiRouter::with_openapi(document), policies: Policies::default() }
    }

    /// Routes of one resource that share a policy.
    pub(crate) fn new(operations: UtoipaMethodRouter<SharedState>, policy: RoutePolicy) -> Self {
        Self::default().and(operations, policy)
    }

    /// Adds the operations that `utoipa_axum::routes!` collects. Each one declares its own scope.
    pub(crate) fn and(
        mut self,
        operations: UtoipaMethodRouter<SharedState>,
        policy: RoutePolicy,
    ) -> Self {
        for (path, item) in &operations.1.paths {
            for (method, operation) in self::operations(item) {
                let security = serde_json::to_value(&operation.security).unwrap_or_default();
                self.policies.declare(path, method, policy.with_access(declared_access(&security)));
            }
        }
        self.router = self.router.routes(operations);
        self
    }

    /// Adds a GET route that is not in the document.
    pub(crate) fn and_undocumented(
        mut self,
        path: &str,
        handler: MethodRouter<SharedState>,
        policy: RoutePolicy,
    ) -> Self {
        self.policies.declare(path, Method::GET, policy);
        self.router = self.router.route(path, handler);
        self
    }

    pub(crate) fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        self.policies.merge(other.policies);
        self
    }

    /// Puts a layer around the routes added so far.
    pub(crate) fn layer<L>(mut self, layer: L) -> Self
    where
        L: Layer<Route> + Clone + Send + Sync + 'static,
        L::Service: Service<Request, Error = Infallible> + Clone + Send + Sync + 'static,
        <L::Service as Service<Request>>::Response: IntoResponse + 'static,
        <L::Service as Service<Request>>::Future: Send + 'static,
    {
        self.router = self.router.layer(layer);
        self
    }

    /// The router, the document and the policies.
    pub(crate) fn into_parts(self) -> (Router<SharedState>, Document, Policies) {
        let (router, document) = self.router.split_for_parts();
        (router, document, self.policies)
    }
}

/// The operations of a path, by method.
pub(crate) fn operations(item: &PathItem) -> impl Iterator<Item = (Method, &Operation)> {
    [
        (Method::GET, &item.get),
        (Method::POST, &item.post),
        (Method::PUT, &item.put),
        (Method::PATCH, &item.patch),
        (Method::DELETE, &item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_ref()?)))
}

/// The same, mutable.
pub(crate) fn operations_mut(
    item: &mut PathItem,
) -> impl Iterator<Item = (Method, &mut Operation)> {
    [
        (Method::GET, &mut item.get),
        (Method::POST, &mut item.post),
        (Method::PUT, &mut item.put),
        (Method::PATCH, &mut item.patch),
        (Method::DELETE, &mut item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// The access that an operation declares: `[{}]` is everybody, `[{"key": ["read"]}]` is a scope. Anything else requires
/// an admin key.
fn declared_access(security: &Value) -> Access {
    if *security == serde_json::json!([{}]) {
        return Access::Anyone;
    }
    let scope = security[0][SECURITY_SCHEME][0].as_str().and_then(|scope| scope.parse().ok());
    Access::Scope(scope.unwrap_or(Scope::Admin))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_declares_no_scope_is_for_admins() {
        assert_eq!(declared_access(&json!([{}])), Access::Anyone);
        assert_eq!(declared_access(&json!([{"key": ["read"]}])), Access::Scope(Scope::Read));
        for odd in [json!(null), json!([]), json!([{"key": []}]), json!([{"other": ["read"]}])] {
            assert_eq!(declared_access(&odd), Access::Scope(Scope::Admin), "{odd}");
        }
    }
}
