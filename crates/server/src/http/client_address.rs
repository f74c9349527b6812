//! Who is really asking when a proxy stands between. A forwarding header counts only as far as the
//! proxies that wrote it are trusted; anybody can send one.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderName, header};
use ipnet::IpNet;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Who sent a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client(pub(super) IpAddr);

/// The client's address: the peer, or, when that is a trusted proxy, the last address in the
/// forwarding header that is not one. `X-Forwarded-For` goes before `Forwarded`; a proxy must strip
/// the one that it does not write itself.
pub(super) fn resolve(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let peer = peer.to_canonical();
    let is_trusted = |address: IpAddr| trusted.iter().any(|net| net.contains(&address));
    if trusted.is_empty() || !is_trusted(peer) {
        return peer;
    }
    let hops = if headers.contains_key(X_FORWARDED_FOR) {
        hops(headers, &X_FORWARDED_FOR, whole)
    } else {
        hops(headers, &header::FORWARDED, forwarded_for)
    };
    let mut client = peer;
    // From the nearest hop outwards; each is vouched for by the one before.
    for hop in hops.into_iter().rev() {
        let Some(address) = hop else { break };
        client = address;
        if !is_trusted(client) {
            break;
        }
    }
    client
}

/// The addresses in a header of comma-separated hops; `None` for what is no address.
fn hops(
    headers: &HeaderMap,
    name: &HeaderName,
    pick: impl Fn(&str) -> Option<&str>,
) -> Vec<Option<IpAddr>> {
    headers
        .get_all(name)
        .iter()
        .map(|value| value.to_str().unwrap_or_default())
        .flat_map(|value| value.split(','))
        .map(|hop| pick(hop.trim()).and_then(parse_address))
        .collect()
}

/// A hop of `X-Forwarded-For` is nothing but the address.
#[expect(clippy::unnecessary_wraps, reason = "stands beside `forwarded_for`")]
fn whole(hop: &str) -> Option<&str> {
    Some(hop)
}

/// The `for` parameter of one hop of `Forwarded` (RFC 7239).
fn forwarded_for(hop: &str) -> Option<&str> {
    hop.split(';').find_map(|parameter| {
        let (name, value) = parameter.trim().split_once('=')?;
        name.eq_ignore_ascii_case("for").then(|| value.trim_matches('"'))
    })
}

/// An address with or without a port or brackets.
fn parse_address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse::<IpAddr>()
        .or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()))
        .ok()
        .map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn client(peer: &str, name: &HeaderName, values: &[&'static str]) -> String {
        let trusted = ["127.0.0.1/32".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name, HeaderValue::from_static(value));
        }
        resolve(peer.parse().unwrap(), &headers, &trusted).to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let x = &X_FORWARDED_FOR;
        assert_eq!(client("203.0.113.9", x, &["1.2.3.4"]), "203.0.113.9");
        assert_eq!(client("127.0.0.1", x, &["1.2.3.4"]), "1.2.3.4");
        assert_eq!(client("::ffff:127.0.0.1", x, &["1.2.3.4"]), "1.2.3.4");
        assert_eq!(client("127.0.0.1", x, &["9.9.9.9, 1.2.3.4, 10.1.1.1"]), "1.2.3.4");
        assert_eq!(client("127.0.0.1", x, &["9.9.9.9", "1.2.3.4:5678"]), "1.2.3.4");
        assert_eq!(client("127.0.0.1", x, &["1.2.3.4, nonsense"]), "127.0.0.1");
        assert_eq!(client("127.0.0.1", x, &["1.2.3.4, nonsense, 10.0.0.2"]), "10.0.0.2");
        assert_eq!(client("127.0.0.1", x, &[]), "127.0.0.1");
        assert_eq!(client("127.0.0.1", x, &["10.0.0.7"]), "10.0.0.7");
    }

    #[test]
    fn forwarded_is_understood() {
        let f = &header::FORWARDED;
        assert_eq!(
            client("10.0.0.1", f, &["for=192.0.2.60;proto=http;by=203.0.113.43"]),
            "192.0.2.60"
        );
        assert_eq!(
            client("10.0.0.1", f, &["For=\"[2001:db8:cafe::17]:4711\""]),
            "2001:db8:cafe::17"
        );
        assert_eq!(client("10.0.0.1", f, &["for=1.1.1.1, for=unknown"]), "10.0.0.1");
    }
}
