//! Finds the client's address when proxies are in between; `observe` calls it. A forwarding header counts only as far
//! as its proxies are trusted, because anybody can send one.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderName, header};
use ipnet::{IpNet, Ipv4Net};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The other end of the connection, which may be a proxy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// The sender of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Client(pub(crate) IpAddr);

/// Networks of trusted proxies. An IPv4 address has two spellings, and an IPv6 socket sees the mapped one
/// (`::ffff:10.0.0.1`). All addresses compared here are in their IPv4 spelling.
pub(crate) struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    pub(crate) fn new(networks: &[IpNet]) -> Self {
        Self(networks.iter().copied().map(canonical).collect())
    }

    /// True if `address`, in its canonical spelling, is in one of the networks.
    fn contain(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// Converts a network of mapped IPv4 addresses, such as `::ffff:10.0.0.0/104`, to an IPv4 network. A larger one
/// (`::/0`) stays unchanged: trust in IPv6 addresses does not include IPv4.
fn canonical(network: IpNet) -> IpNet {
    const MAPPED_PREFIX: u8 = 96;
    let IpAddr::V4(address) = network.network().to_canonical() else { return network };
    let length = match network {
        IpNet::V4(_) => return network,
        IpNet::V6(network) => network.prefix_len().checked_sub(MAPPED_PREFIX),
    };
    length
        .and_then(|length| Ipv4Net::new(address, length).ok())
        .map_or(network, |network| IpNet::V4(network.trunc()))
}

/// The client's address in its canonical spelling. It is the peer, unless that is a trusted proxy. Then it is the last
/// untrusted address in the forwarding header. `X-Forwarded-For` has priority over `Forwarded`. A proxy must remove the
/// header that it does not write itself.
pub(crate) fn resolve(peer: IpAddr, headers: &HeaderMap, trusted: &TrustedProxies) -> IpAddr {
    let peer = peer.to_canonical();
    if !trusted.contain(peer) {
        return peer;
    }
    let hops = if headers.contains_key(X_FORWARDED_FOR) {
        hops(headers, &X_FORWARDED_FOR, whole)
    } else {
        hops(headers, &header::FORWARDED, forwarded_for)
    };
    let mut client = peer;
    // From the nearest hop outwards. Each hop is reported by the one before.
    for hop in hops.into_iter().rev() {
        let Some(address) = hop else { break };
        client = address;
        if !trusted.contain(client) {
            break;
        }
    }
    client
}

/// The addresses in a header of comma-separated hops; `None` for a hop that is not an address.
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

/// A hop of `X-Forwarded-For` consists of the address only.
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

/// Reads an address with or without a port or brackets.
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
        client_behind(&["127.0.0.1/32", "10.0.0.0/8"], peer, name, values)
    }

    fn client_behind(
        trusted: &[&str],
        peer: &str,
        name: &HeaderName,
        values: &[&'static str],
    ) -> String {
        let trusted: Vec<_> = trusted.iter().map(|network| network.parse().unwrap()).collect();
        let trusted = TrustedProxies::new(&trusted);
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

    /// The spelling does not matter for the trusted proxy, the peer or the hops.
    #[test]
    fn an_ipv4_address_is_the_same_in_both_spellings() {
        let x = &X_FORWARDED_FOR;
        let f = &header::FORWARDED;
        for trusted in [
            "10.0.0.0/8",
            "::ffff:10.0.0.0/104",
            "::ffff:0a00:0000/104",
            // Bits after the prefix are ignored.
            "::ffff:10.1.2.3/104",
        ] {
            for peer in ["10.0.0.1", "::ffff:10.0.0.1", "::ffff:a00:1"] {
                let client = |name: &HeaderName, values: &[&'static str]| {
                    client_behind(&[trusted, "::ffff:192.0.2.7/128"], peer, name, values)
                };
                for hop in ["1.2.3.4", "::ffff:1.2.3.4", "[::ffff:1.2.3.4]:80", "[::ffff:102:304]"]
                {
                    assert_eq!(client(x, &[hop]), "1.2.3.4", "{trusted} {peer} {hop}");
                }
                // Through another proxy, in any spelling.
                assert_eq!(client(x, &["1.2.3.4, ::ffff:10.9.9.9"]), "1.2.3.4");
                assert_eq!(client(x, &["1.2.3.4, 192.0.2.7, 10.9.9.9"]), "1.2.3.4");
                assert_eq!(client(x, &["1.2.3.4, 192.0.2.8"]), "192.0.2.8");
                assert_eq!(client(f, &["for=\"[::ffff:1.2.3.4]\""]), "1.2.3.4");
                assert_eq!(client(f, &["for=\"[::ffff:1.2.3.4]:4711\";proto=https"]), "1.2.3.4");
                assert_eq!(client(f, &["for=1.2.3.4, for=\"[::ffff:10.9.9.9]\""]), "1.2.3.4");
            }
            assert_eq!(client_behind(&[trusted], "11.0.0.1", x, &["1.2.3.4"]), "11.0.0.1");
            assert_eq!(client_behind(&[trusted], "::1", x, &["1.2.3.4"]), "::1");
        }
    }

    #[test]
    fn networks_in_their_ipv4_spelling() {
        for (network, expected) in [
            ("::ffff:10.0.0.1/128", "10.0.0.1/32"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:0.0.0.0/96", "0.0.0.0/0"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            // None of these is IPv4.
            ("::/0", "::/0"),
            ("::ffff:0.0.0.0/95", "::ffff:0.0.0.0/95"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::1/128", "::1/128"),
        ] {
            assert_eq!(canonical(network.parse().unwrap()), expected.parse().unwrap(), "{network}");
        }
    }
}
