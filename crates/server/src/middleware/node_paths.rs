//! The Node service's paths in the spellings that Express accepted: any case, and a slash at the end. The router asks
//! here about unknown paths. A respelled request is routed again from the start, so keys, limits, headers and metrics
//! see only the canonical spelling.
//!
//! Only the Node service's own paths are listed. A proxy's rule for `/api/keys` may cover only that spelling, so newer
//! endpoints have no other one.

use axum::http::{Uri, uri::PathAndQuery};

/// The Node service's paths, except `/` and the documentation. A segment in braces matches anything.
const PATHS: [&str; 6] = [
    "/api",
    "/api/device/{device_id}/sync-history",
    "/api/devices/repeated-failures",
    "/api/stats",
    "/api/sync-event",
    "/health",
];

/// The same target with the canonical path; `None` if it is not a spelling of a Node path.
pub(crate) fn respell(uri: &Uri) -> Option<Uri> {
    let mut target = canonical(uri.path())?;
    if let Some(query) = uri.query() {
        target.push('?');
        target.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(target).ok()?);
    Uri::from_parts(parts).ok()
}

/// The canonical form of `path`. Nothing is decoded, and only one slash at the end is ignored, as in Express.
fn canonical(path: &str) -> Option<String> {
    let path = path.strip_suffix('/').unwrap_or(path);
    PATHS.iter().find_map(|known| follow(known, path))
}

/// `known` with the parameters of `path`, if both have the same segments.
fn follow(known: &str, path: &str) -> Option<String> {
    let mut found = String::with_capacity(path.len());
    let (mut known, mut sent) = (known.split('/'), path.split('/'));
    loop {
        match (known.next(), sent.next()) {
            (None, None) => break,
            (Some(expected), Some(segment)) => {
                let is_parameter = expected.starts_with('{');
                if is_parameter && !segment.is_empty() {
                    found.push_str(segment);
                } else if expected.eq_ignore_ascii_case(segment) {
                    found.push_str(expected);
                } else {
                    return None;
                }
                found.push('/');
            }
            _ => return None,
        }
    }
    found.pop();
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_that_express_took() {
        for (sent, expected) in [
            ("/api/sync-event/", "/api/sync-event"),
            ("/API/Sync-Event", "/api/sync-event"),
            ("/Api/SYNC-event/", "/api/sync-event"),
            ("/api/", "/api"),
            ("/HEALTH/", "/health"),
            ("/api/Device/Pi-7/Sync-History/", "/api/device/Pi-7/sync-history"),
            ("/api/device/A%2fb%/sync-history/", "/api/device/A%2fb%/sync-history"),
            ("/api/device/SYNC-HISTORY/SYNC-HISTORY", "/api/device/SYNC-HISTORY/sync-history"),
            ("/api/device/../sync-history/", "/api/device/../sync-history"),
        ] {
            assert_eq!(canonical(sent).as_deref(), Some(expected), "{sent}");
        }
    }

    #[test]
    fn what_express_did_not_take() {
        for sent in [
            "",
            "/",
            "//",
            "*",
            "//api",
            "/api//",
            "/api//stats",
            "/api/stats//",
            "/api/./stats",
            "/api/../health",
            "/he%61lth",
            "/api%2Fstats",
            "/api/stats%2F",
            "/health;a",
            "/api/device//sync-history",
            "/api/device/a/b/sync-history",
            "/api/device/pi/",
            "/API/Keys",
            "/api/sync-events/",
            "/{device_id}",
            // Letters that are equal to ASCII letters only in some languages.
            "/api/\u{17f}tats",
        ] {
            assert_eq!(canonical(sent), None, "{sent}");
        }
    }

    #[test]
    fn the_rest_of_a_target_stays() {
        for (sent, expected) in [
            ("/HEALTH?a=B&a=/C/", "/health?a=B&a=/C/"),
            ("http://Pi.example:80/API/Stats/?x", "http://Pi.example:80/api/stats?x"),
            ("/health/?", "/health?"),
        ] {
            let uri: Uri = sent.parse().unwrap();
            assert_eq!(respell(&uri).unwrap().to_string(), expected);
        }
    }
}
