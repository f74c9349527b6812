//! Finds who caused a request: a program, the user, one of the server's own pages, or a foreign web page. Browsers tell
//! in `Origin`, `Sec-Fetch-*` and `Referer`. `auth` calls it for requests without a key. A foreign page can reach a
//! server on the user's machine, but must not be served and must not cost the user anything.

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header, uri::Authority},
};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// Who caused a request, as far as its headers tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Initiator {
    /// No sign of a foreign page.
    Trusted,
    /// The user, by a link on a foreign page, or the page itself by opening a window. The page cannot read that window.
    Navigation,
    /// A foreign page.
    CrossSite,
}

impl Initiator {
    /// Classifies `request`. Pages of `origins` are welcome as well.
    pub(crate) fn of(request: &Request, origins: &[HeaderValue]) -> Self {
        let headers = request.headers();
        let host = host(request.uri(), headers);
        let mut pages = headers.get_all(header::ORIGIN).iter().map(HeaderValue::as_bytes);
        if let Some(first) = pages.next() {
            return if pages.next().is_some() {
                // Browsers send exactly one.
                Self::CrossSite
            } else if is_configured(first, origins)
                || is_own(first, host) && fetch_site(headers) != Site::Other
            {
                Self::Trusted
            } else {
                Self::CrossSite
            };
        }
        match fetch_site(headers) {
            Site::Own => Self::Trusted,
            Site::Other if opens_a_window(request) => Self::Navigation,
            Site::Other => Self::CrossSite,
            // Browsers before 2020 (Safari: 2023) do not send `Sec-Fetch-Site`. They send Referer only if the page
            // allows it.
            Site::Unknown => {
                let mut referers = headers.get_all(header::REFERER).iter();
                let is_welcome = |referer: &HeaderValue| {
                    let page = origin_of(referer.as_bytes());
                    page.is_empty() || is_own(page, host) || is_configured(page, origins)
                };
                if referers.all(is_welcome) {
                    Self::Trusted
                } else if opens_a_window_as_it_was(request) {
                    Self::Navigation
                } else {
                    Self::CrossSite
                }
            }
        }
    }
}

/// The meaning of `Sec-Fetch-Site`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Site {
    /// Absent: a program, or an old browser.
    Unknown,
    /// One of the server's own pages, or an address that the user typed.
    Own,
    /// Another page. It may be of the same site, which includes every port of this machine.
    Other,
}

fn fetch_site(headers: &HeaderMap) -> Site {
    let mut site = Site::Unknown;
    for value in headers.get_all(SEC_FETCH_SITE) {
        if !matches!(value.as_bytes(), b"same-origin" | b"none") {
            return Site::Other;
        }
        site = Site::Own;
    }
    site
}

/// True if the response opens a window of its own, not a frame or an image in a page.
fn opens_a_window(request: &Request) -> bool {
    let is = |name, value: &str| request.headers().get(name).is_some_and(|sent| sent == value);
    is_read(request.method()) && is(SEC_FETCH_MODE, "navigate") && is(SEC_FETCH_DEST, "document")
}

/// The same for a browser without those headers. Such a browser asks for HTML only for windows and frames.
fn opens_a_window_as_it_was(request: &Request) -> bool {
    let accept = request.headers().get(header::ACCEPT).map(HeaderValue::as_bytes);
    is_read(request.method()) && accept.is_some_and(|accept| accept.starts_with(b"text/html"))
}

fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

/// The host and port that the request was sent to.
fn host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a [u8]> {
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes);
    host.or_else(|| uri.authority().map(Authority::as_str).map(str::as_bytes))
}

/// The origin at the beginning of a URL: `scheme://host:port`.
fn origin_of(url: &[u8]) -> &[u8] {
    let after_scheme = url.windows(3).position(|window| window == b"://").map_or(0, |at| at + 3);
    let length = url[after_scheme..].iter().position(|byte| b"/?#".contains(byte));
    length.map_or(url, |length| &url[..after_scheme + length])
}

/// True if an origin is the server's own, with any scheme. Behind a TLS proxy the scheme is https.
fn is_own(origin: &[u8], host: Option<&[u8]>) -> bool {
    let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
    authority.is_some() && authority == host
}

fn is_configured(origin: &[u8], origins: &[HeaderValue]) -> bool {
    origins.iter().any(|configured| configured.as_bytes() == origin)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn initiator(method: Method, headers: &[(&'static str, &'static str)]) -> Initiator {
        let origins = [HeaderValue::from_static("https://fleet.example")];
        let mut request = Request::new(Body::empty());
        *request.method_mut() = method;
        for (name, value) in [&("host", "localhost:3000")].into_iter().chain(headers) {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        Initiator::of(&request, &origins)
    }

    #[test]
    fn who_is_welcome() {
        for headers in [
            &[][..],
            &[("origin", "http://localhost:3000")],
            &[("origin", "https://localhost:3000")],
            &[("origin", "https://fleet.example")],
            &[("origin", "https://fleet.example"), ("sec-fetch-site", "cross-site")],
            &[("origin", "http://localhost:3000"), ("sec-fetch-site", "same-origin")],
            &[("sec-fetch-site", "same-origin"), ("sec-fetch-mode", "cors")],
            &[("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate")],
            &[("referer", "http://localhost:3000/api-docs/")],
            &[("referer", "http://localhost:3000")],
            &[("referer", "https://fleet.example/devices?x=1#y")],
            &[("referer", "")],
        ] {
            for method in [Method::GET, Method::POST] {
                assert_eq!(initiator(method, headers), Initiator::Trusted, "{headers:?}");
            }
        }
    }

    #[test]
    fn pages_elsewhere() {
        for headers in [
            &[("origin", "https://evil.example")][..],
            &[("origin", "null")],
            &[("origin", "")],
            &[("origin", "localhost:3000")],
            &[("origin", "http://localhost:8080")],
            &[("origin", "http://fleet.example")],
            &[("origin", "http://localhost:3000"), ("origin", "https://evil.example")],
            &[("origin", "http://localhost:3000"), ("sec-fetch-site", "same-site")],
            &[("origin", "https://evil.example"), ("sec-fetch-site", "same-origin")],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site")],
            &[("sec-fetch-site", "Same-Origin")],
            &[("sec-fetch-site", "")],
            &[("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")],
            &[("sec-fetch-site", "cross-site"), ("referer", "http://localhost:3000/")],
            // A frame, and a request that claims to be a window but is not.
            &[
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "iframe"),
            ],
            &[
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "no-cors"),
                ("sec-fetch-dest", "document"),
            ],
            &[("referer", "https://evil.example/")],
            &[("referer", "https://evil.example/http://localhost:3000/")],
            &[("referer", "http://localhost:3000.evil.example/")],
            &[("referer", "http://localhost:8080/")],
            &[("referer", "https://evil.example?x"), ("accept", "image/webp,*/*")],
        ] {
            for method in [Method::GET, Method::POST] {
                assert_eq!(initiator(method, headers), Initiator::CrossSite, "{headers:?}");
            }
        }
    }

    #[test]
    fn links_elsewhere() {
        for headers in [
            &[
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "document"),
            ][..],
            &[
                ("sec-fetch-site", "same-site"),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "document"),
                ("referer", "http://localhost:8080/"),
            ],
            &[("referer", "https://evil.example/"), ("accept", "text/html,*/*;q=0.8")],
        ] {
            assert_eq!(initiator(Method::GET, headers), Initiator::Navigation, "{headers:?}");
            // A form sent by a page is not a link.
            assert_eq!(initiator(Method::POST, headers), Initiator::CrossSite, "{headers:?}");
        }
    }
}
