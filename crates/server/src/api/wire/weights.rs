//! Headers by which a client says what it prefers, such as `Accept` and `Accept-Encoding` (RFC 9110, 12.4.2). What the
//! items mean is for the caller to know.

use axum::http::{HeaderMap, HeaderName};

/// The items of a header on all its lines, each with its weight: 1 unless it says another one.
pub(crate) fn weighted(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = (&str, f64)> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(|item| {
        let mut parts = item.split(';').map(str::trim);
        let value = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| {
            // The parameter's name has no case.
            let weight = part.strip_prefix("q=").or_else(|| part.strip_prefix("Q="))?;
            weight.trim().parse().ok()
        });
        (value, weight.unwrap_or(1.0))
    })
}
