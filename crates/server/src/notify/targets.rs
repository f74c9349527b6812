//! Which addresses messages may be sent to. An administrator of PiSync may name any URL, and must not reach through it
//! what only this machine reaches: every address that a name leads to is checked, and exactly the checked ones are used.
//! A literal address in a URL is checked without a resolver.

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};

/// The longest URL. Services' own have some 200 characters.
const MAX_URL: usize = 2_000;

/// Looks a name up. Tests pass their own.
pub type Lookup =
    dyn Fn(String) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>> + Send + Sync;

/// The addresses that may be reached.
#[derive(Clone)]
pub struct Targets {
    allowed: Arc<[IpNet]>,
    lookup: Arc<Lookup>,
}

impl Targets {
    /// Public addresses, and those in `allowed` (`NOTIFY_ALLOW`).
    #[must_use]
    pub fn new(allowed: &[IpNet]) -> Self {
        Self::with_lookup(allowed, |name| {
            Box::pin(async move {
                let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
                Ok(found.map(|address| address.ip()).collect())
            })
        })
    }

    /// The same with another resolver.
    pub fn with_lookup(
        allowed: &[IpNet],
        lookup: impl Fn(String) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self { allowed: allowed.into(), lookup: Arc::new(lookup) }
    }

    /// Checks where a URL leads at present. Where it leads when something is sent is checked then again. A name that
    /// nobody knows at present is not refused.
    ///
    /// # Errors
    /// When it leads to an address that may not be reached.
    pub async fn check(&self, url: &Url) -> Result<(), Refusal> {
        self.check_literal(url)?;
        match url.host() {
            Some(url::Host::Domain(name)) => match (self.lookup)(name.to_owned()).await {
                Ok(addresses) => {
                    addresses.into_iter().try_for_each(|address| self.check_address(address))
                }
                Err(_) => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// Checks the address in a URL, if its host is one.
    ///
    /// # Errors
    /// When the address may not be reached.
    pub fn check_literal(&self, url: &Url) -> Result<(), Refusal> {
        match url.host() {
            Some(url::Host::Ipv4(address)) => self.check_address(address.into()),
            Some(url::Host::Ipv6(address)) => self.check_address(address.into()),
            Some(url::Host::Domain(_)) | None => Ok(()),
        }
    }

    /// Checks an address.
    ///
    /// # Errors
    /// When it may not be reached.
    pub fn check_address(&self, address: IpAddr) -> Result<(), Refusal> {
        if let IpAddr::V6(whole) = address {
            // Another spelling of an IPv4 address, which leads to that one.
            if let Some(inner) = whole.to_ipv4_mapped() {
                if self.allows(inner.into()) {
                    return Ok(());
                }
                self.check_address(inner.into())?;
            }
            // A translator at 64:ff9b::/96 leads to the IPv4 address within.
            if NAT64.contains(&whole) {
                self.check_plain(address)?;
                let [.., a, b, c, d] = whole.octets();
                return self.check_plain(Ipv4Addr::new(a, b, c, d).into());
            }
        }
        self.check_plain(address)
    }

    fn check_plain(&self, address: IpAddr) -> Result<(), Refusal> {
        match special(address) {
            Some((network, what)) if !self.allows(address) => {
                Err(Refusal { address, network, what })
            }
            _ => Ok(()),
        }
    }

    fn allows(&self, address: IpAddr) -> bool {
        self.allowed.iter().any(|network| network.contains(&address))
    }
}

impl fmt::Debug for Targets {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Targets").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

/// The HTTP client connects to exactly the addresses that this gives it.
impl Resolve for Targets {
    fn resolve(&self, name: Name) -> Resolving {
        let targets = self.clone();
        Box::pin(async move {
            let addresses = (targets.lookup)(name.as_str().to_owned()).await?;
            for address in &addresses {
                targets.check_address(*address)?;
            }
            // The client fills in the port.
            let addresses = addresses.into_iter().map(|address| SocketAddr::new(address, 0));
            Ok(Box::new(addresses) as Addrs)
        })
    }
}

/// An address that may not be reached. The words follow the quoted name of the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("leads to {address}, {what}; allow it with NOTIFY_ALLOW={network}")]
pub struct Refusal {
    address: IpAddr,
    network: IpNet,
    what: &'static str,
}

/// Reads the URL of a receiver. The error's words follow the quoted name of the field.
///
/// # Errors
/// When it is none, is not for HTTP, or holds a user name or a password.
pub fn read_url(text: &str) -> Result<Url, &'static str> {
    if text.len() > MAX_URL {
        return Err("length must be less than or equal to 2000 characters long");
    }
    // The parser drops line breaks and tabs wherever they stand.
    if text.chars().any(|letter| letter.is_control() || letter.is_whitespace()) {
        return Err("must be a URL without spaces and control characters");
    }
    let url = Url::parse(text).map_err(|_| "must be a URL, such as https://example.com/hook")?;
    if !["http", "https"].contains(&url.scheme()) {
        return Err("must begin with https:// or http://");
    }
    // `https://@host` has an empty one.
    let authority = text.split_once("://").map_or("", |(_, rest)| rest);
    let authority = authority.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    if !url.username().is_empty() || url.password().is_some() || authority.contains('@') {
        return Err("must not hold a user name or a password");
    }
    if url.fragment().is_some() {
        return Err("must not hold a #");
    }
    Ok(url)
}

/// Where a translator between IPv6 and IPv4 is reached (RFC 6052).
const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96);

/// Networks that are not reached through the public Internet, from the registries of special-purpose addresses of IANA
/// (RFC 6890 and its updates).
const SPECIAL_V4: [(Ipv4Net, &str); 16] = [
    (v4([0, 0, 0, 0], 8), "an address of this machine"),
    (v4([10, 0, 0, 0], 8), "a private address"),
    (v4([100, 64, 0, 0], 10), "a carrier's private address"),
    (v4([127, 0, 0, 0], 8), "a loopback address"),
    (v4([169, 254, 0, 0], 16), "a link-local address"),
    (v4([172, 16, 0, 0], 12), "a private address"),
    (v4([192, 0, 0, 0], 24), "a reserved address"),
    (v4([192, 0, 2, 0], 24), "a documentation address"),
    (v4([192, 88, 99, 0], 24), "a reserved address"),
    (v4([192, 168, 0, 0], 16), "a private address"),
    (v4([198, 18, 0, 0], 15), "a benchmarking address"),
    (v4([198, 51, 100, 0], 24), "a documentation address"),
    (v4([203, 0, 113, 0], 24), "a documentation address"),
    (v4([224, 0, 0, 0], 4), "a multicast address"),
    (v4([240, 0, 0, 0], 4), "a reserved address"),
    (v4([255, 255, 255, 255], 32), "a broadcast address"),
];

const SPECIAL_V6: [(Ipv6Net, &str); 16] = [
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 128), "an address of this machine"),
    (v6([0, 0, 0, 0, 0, 0, 0, 1], 128), "a loopback address"),
    (v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96), "a mapped IPv4 address"),
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 96), "a reserved address"),
    (NAT64, "a translated (NAT64) address"),
    // RFC 2765.
    (v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96), "a translated (SIIT) address"),
    (v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48), "a translated (NAT64) address"),
    (v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64), "a reserved address"),
    (v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), "a documentation address"),
    // Teredo and others: tunnels that lead to IPv4 addresses.
    (v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23), "a reserved address"),
    (v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16), "a tunnelled (6to4) address"),
    (v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20), "a documentation address"),
    (v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7), "a private address"),
    (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), "a link-local address"),
    (v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10), "a private address"),
    (v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), "a multicast address"),
];

/// The special network in which an address lies, the smallest if there are several, and what it is.
fn special(address: IpAddr) -> Option<(IpNet, &'static str)> {
    match address {
        IpAddr::V4(address) => SPECIAL_V4
            .iter()
            .filter(|(network, _)| network.contains(&address))
            .max_by_key(|(network, _)| network.prefix_len())
            .map(|(network, what)| (IpNet::V4(*network), *what)),
        IpAddr::V6(address) => SPECIAL_V6
            .iter()
            .filter(|(network, _)| network.contains(&address))
            .max_by_key(|(network, _)| network.prefix_len())
            .map(|(network, what)| (IpNet::V6(*network), *what)),
    }
}

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(allowed: &[&str]) -> Targets {
        let allowed: Vec<IpNet> = allowed.iter().map(|network| network.parse().unwrap()).collect();
        Targets::new(&allowed)
    }

    fn refused(allowed: &[&str], address: &str) -> Option<String> {
        let checked = targets(allowed).check_address(address.parse().unwrap());
        checked.err().map(|refusal| refusal.to_string())
    }

    #[test]
    fn the_refusal_says_what_it_is_and_how_to_allow_it() {
        for (address, words) in [
            (
                "10.0.0.5",
                "leads to 10.0.0.5, a private address; allow it with NOTIFY_ALLOW=10.0.0.0/8",
            ),
            (
                "192.168.1.7",
                "leads to 192.168.1.7, a private address; allow it with NOTIFY_ALLOW=192.168.0.0/16",
            ),
            (
                "169.254.169.254",
                "leads to 169.254.169.254, a link-local address; allow it with NOTIFY_ALLOW=169.254.0.0/16",
            ),
            ("::1", "leads to ::1, a loopback address; allow it with NOTIFY_ALLOW=::1/128"),
            (
                "::ffff:127.0.0.1",
                "leads to 127.0.0.1, a loopback address; allow it with NOTIFY_ALLOW=127.0.0.0/8",
            ),
            (
                "::ffff:8.8.8.8",
                "leads to ::ffff:8.8.8.8, a mapped IPv4 address; allow it with NOTIFY_ALLOW=::ffff:0.0.0.0/96",
            ),
            ("fd12::1", "leads to fd12::1, a private address; allow it with NOTIFY_ALLOW=fc00::/7"),
        ] {
            assert_eq!(refused(&[], address).as_deref(), Some(words));
        }
    }

    #[test]
    fn only_public_addresses_may_be_reached() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.168.255.255",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.9",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "64:ff9b::7f00:1",
            "::ffff:0:7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::1",
            "100::1",
            "2001:db8::1",
            "2001::1",
            "2002:7f00:1::1",
            "3fff::1",
            "fc00::1",
            "fdff::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:1.1.1.1",
        ] {
            assert!(refused(&[], address).is_some(), "{address}");
        }
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.167.255.255",
            "192.169.0.0",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450::1",
            "2001:4860::8888",
        ] {
            assert_eq!(refused(&[], address), None);
        }
    }

    #[test]
    fn what_is_allowed_may_be_reached_and_nothing_beside_it() {
        assert_eq!(refused(&["10.0.0.0/8"], "10.1.2.3"), None);
        assert_eq!(refused(&["10.0.0.0/8"], "::ffff:10.1.2.3"), None);
        assert!(refused(&["10.0.0.0/24"], "10.1.2.3").is_some());
        assert!(refused(&["10.0.0.0/8"], "127.0.0.1").is_some());
        // The mapped spelling of an address is no way around the address itself.
        assert_eq!(refused(&["::ffff:0:0/96"], "::ffff:8.8.8.8"), None);
        assert!(refused(&["::ffff:0:0/96"], "::ffff:10.1.2.3").is_some());
        assert!(refused(&["::/0"], "::ffff:127.0.0.1").is_some());
        assert_eq!(refused(&["::/0"], "fd00::1"), None);
        assert_eq!(refused(&["64:ff9b::/96"], "64:ff9b::808:808"), None);
        assert!(refused(&["64:ff9b::/96"], "64:ff9b::a00:1").unwrap().contains("10.0.0.1"));
        assert_eq!(refused(&["64:ff9b::/96", "10.0.0.0/8"], "64:ff9b::a00:1"), None);
    }

    #[tokio::test]
    async fn a_url_is_checked_by_what_its_host_leads_to() {
        let known =
            |name: String| -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>> {
                Box::pin(async move {
                    match name.as_str() {
                        "public.test" => Ok(vec!["1.1.1.1".parse().unwrap()]),
                        "both.test" => {
                            Ok(vec!["1.1.1.1".parse().unwrap(), "10.0.0.5".parse().unwrap()])
                        }
                        _ => Err(io::Error::other("no such name")),
                    }
                })
            };
        let targets = Targets::with_lookup(&[], known);
        for (url, is_refused) in [
            ("https://public.test/x", false),
            ("https://both.test/x", true),
            ("https://unknown.test/x", false),
            ("https://1.1.1.1/x", false),
            // Spellings of addresses that clients know.
            ("http://127.0.0.1:80/", true),
            ("http://127.1/", true),
            ("http://2130706433/", true),
            ("http://0x7f.0.0.1/", true),
            ("http://0177.0.0.1/", true),
            ("http://[::1]/", true),
            ("http://[::ffff:127.0.0.1]/", true),
            ("http://[::ffff:7f00:1]/", true),
            ("http://①②⑦.0.0.1/", true),
        ] {
            let url = read_url(url).unwrap();
            assert_eq!(targets.check(&url).await.is_err(), is_refused, "{url}");
            let resolved = match url.domain() {
                Some(name) => targets.resolve(name.parse().unwrap()).await.is_ok(),
                None => continue,
            };
            assert_eq!(resolved, url.domain() == Some("public.test"), "{url}");
        }
    }

    #[test]
    fn only_urls_for_http_without_a_user_are_read() {
        for url in [
            "ftp://example.com/",
            "file:///etc/passwd",
            "javascript:alert(1)",
            "gopher://h/",
            "example.com",
            "//example.com/",
            "",
            "https://",
            "https://u@example.com/",
            "https://u:p@example.com/",
            "https://@example.com/",
            "https://:@example.com/",
            "https://example.com/#x",
            "https://exa\nmple.com/",
            "https://example.com/a b",
            "\thttps://example.com/",
            "https://[::1",
            "http:\\\\u@example.com",
        ] {
            assert!(read_url(url).is_err(), "{url}");
        }
        assert!(read_url(&format!("https://example.com/{}", "x".repeat(2_000))).is_err());
        for url in
            ["https://example.com/a@b?c=@", "http://example.com:8080", "HTTPS://EXAMPLE.com/x"]
        {
            assert!(read_url(url).is_ok(), "{url}");
        }
    }
}
