//! `Accept-Encoding` before it decides how an answer is compressed. An answer is never refused for how it is encoded: a
//! change would be made, and then look as if it had failed.

use axum::{
    extract::Request,
    http::{HeaderValue, header},
};

use crate::api::wire::weights::weighted;

/// Takes out what refuses answers as they are (`identity;q=0`, `*;q=0`). RFC 9110, section 12.5.3, lets a server send
/// them all the same.
pub(crate) async fn allow_identity(mut request: Request) -> Request {
    let items = weighted(request.headers(), header::ACCEPT_ENCODING);
    let is_refusal = |(name, weight): &(&str, f64)| {
        *weight <= 0.0 && (name.eq_ignore_ascii_case("identity") || *name == "*")
    };
    let (refusals, others): (Vec<_>, Vec<_>) = items.partition(is_refusal);
    if refusals.is_empty() {
        return request;
    }
    let others: Vec<_> = others.iter().map(|(name, weight)| format!("{name};q={weight}")).collect();
    // No header at all would mean any encoding.
    let others = if others.is_empty() { "identity".to_owned() } else { others.join(", ") };
    if let Ok(others) = HeaderValue::try_from(others) {
        request.headers_mut().insert(header::ACCEPT_ENCODING, others);
    }
    request
}
