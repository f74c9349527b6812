//! What happens around every request, whichever handler answers it: its id, who asks, whether the request is let in,
//! security headers, measurements and the log. `api` puts it around its routes.

pub(crate) mod admission;
pub(crate) mod assets;
pub(crate) mod auth;
pub(crate) mod client_address;
pub(crate) mod node_paths;
pub(crate) mod observe;
pub(crate) mod rate_limit;
pub(crate) mod route_policy;
mod security_headers;
mod sender;
