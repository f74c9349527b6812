//! What happens around every request, whichever handler answers it: request id, client address, admission, security
//! headers, metrics and the log. `api` puts these around its routes. Nothing here depends on what a resource contains.

pub(crate) mod accept_encoding;
pub(crate) mod admission;
pub(crate) mod assets;
pub(crate) mod auth;
pub(crate) mod client_address;
mod initiator;
pub(crate) mod node_paths;
pub(crate) mod observe;
pub(crate) mod rate_limit;
pub(crate) mod route_policy;
mod security_headers;
