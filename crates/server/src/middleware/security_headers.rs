//! Security headers for browsers; `observe` writes them to every response. They are what Helmet sent for the Node
//! service, plus a Content-Security-Policy, which that service had switched off.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

static HEADERS: [(HeaderName, HeaderValue); 11] = [
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (HeaderName::from_static("origin-agent-cluster"), HeaderValue::from_static("?1")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (
        header::STRICT_TRANSPORT_SECURITY,
        HeaderValue::from_static("max-age=31536000; includeSubDomains"),
    ),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_DNS_PREFETCH_CONTROL, HeaderValue::from_static("off")),
    (HeaderName::from_static("x-download-options"), HeaderValue::from_static("noopen")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("SAMEORIGIN")),
    (
        HeaderName::from_static("x-permitted-cross-domain-policies"),
        HeaderValue::from_static("none"),
    ),
    (header::X_XSS_PROTECTION, HeaderValue::from_static("0")),
];

/// JSON is not a page: it may load nothing, and nobody may frame it.
pub(crate) static API_CONTENT_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// Writes the headers. `content_policy` is the Content-Security-Policy of the route.
pub(crate) fn write(headers: &mut HeaderMap, content_policy: &HeaderValue) {
    headers.reserve(HEADERS.len() + 2);
    for (name, value) in &HEADERS {
        headers.insert(name.clone(), value.clone());
    }
    headers.insert(header::CONTENT_SECURITY_POLICY, content_policy.clone());
}
