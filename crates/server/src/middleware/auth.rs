//! Authorization: the route's policy names the scope, and the request brings the key. `admission` calls it. It checks
//! keys in memory and asks the database only about a key that may have just been made.

use std::{convert::Infallible, net::IpAddr, sync::Arc};

use axum::{
    extract::{FromRequestParts, Request},
    http::{HeaderMap, HeaderName, HeaderValue, Uri, Version, header, request::Parts},
};
use pisync_core::{DeviceId, GroupName, Timestamp};

use crate::{
    api::{
        SharedState,
        wire::error::{ApiError, KeyFault},
    },
    clock::Clock,
    config::http::AuthMode,
    keys::{self, Key, Keyring, WrongSecret},
    middleware::{
        client_address::{Client, Peer},
        initiator::Initiator,
        route_policy::{Access, RoutePolicy},
    },
    store::{Actor, Scope, Store, StoreError, Via},
};

/// Who is admitted without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keyless {
    Nobody,
    /// Requests from this machine, without anything in between.
    Local,
    Everybody,
}

/// The decision about a request, before limits.
pub(crate) struct Verdict {
    /// The request's key, if it is valid.
    pub(crate) key: Option<Arc<Key>>,
    pub(crate) result: Result<(), ApiError>,
    /// True if a third party made this machine's own user send it. It must then not cost that user anything.
    pub(crate) is_foreign: bool,
}

impl Verdict {
    fn without_key(result: Result<(), ApiError>) -> Self {
        Self { key: None, result, is_foreign: false }
    }
}

/// The authorization of one server.
pub(crate) struct Gate {
    keyless: Keyless,
    keyring: Arc<Keyring>,
    clock: Clock,
    /// Origins whose pages may call the API.
    origins: Vec<HeaderValue>,
}

impl Gate {
    pub(crate) fn new(
        mode: AuthMode,
        listens_to: IpAddr,
        keyring: Arc<Keyring>,
        clock: Clock,
        origins: Vec<HeaderValue>,
    ) -> Self {
        let keyless = match mode {
            AuthMode::Off => Keyless::Everybody,
            AuthMode::Auto if listens_to.to_canonical().is_loopback() => Keyless::Local,
            AuthMode::Auto | AuthMode::Required => Keyless::Nobody,
        };
        Self { keyless, keyring, clock, origins }
    }

    /// Reloads the keys.
    pub(crate) async fn refresh(&self, store: &dyn Store) -> Result<(), StoreError> {
        self.keyring.refresh(store).await
    }

    /// Reloads the keys for a request with an unknown key. It is slowed down so that made-up keys cannot load the
    /// database: see [`Keyring::look_up`].
    pub(crate) async fn look_up_keys(&self, store: &dyn Store) -> Result<(), StoreError> {
        self.keyring.look_up(store).await
    }

    /// How a request without a key was admitted, for the audit log.
    fn keyless_via(&self) -> Via {
        if self.keyless == Keyless::Local { Via::Local } else { Via::Open }
    }

    /// Checks a request against its route's policy.
    pub(crate) fn check(&self, request: &Request, policy: &RoutePolicy) -> Verdict {
        if self.keyless == Keyless::Everybody {
            return Verdict::without_key(Ok(()));
        }
        let headers = request.headers();
        if !headers.contains_key(header::AUTHORIZATION) {
            return self.check_keyless(request, policy);
        }
        let Access::Scope(scope) = policy.access else {
            return Verdict::without_key(Ok(()));
        };
        let now = self.clock.now();
        match self.identify(headers, now) {
            Ok(key) => {
                key.used(now);
                let opens = key.scope.opens(scope);
                let result = if opens { Ok(()) } else { Err(ApiError::WrongScope(scope)) };
                Verdict { key: Some(key), result, is_foreign: false }
            }
            Err(fault) => Verdict::without_key(Err(ApiError::WrongKey(fault))),
        }
    }

    /// Checks a request without a key.
    fn check_keyless(&self, request: &Request, policy: &RoutePolicy) -> Verdict {
        if policy.is_open() {
            return Verdict::without_key(Ok(()));
        }
        let initiator = Initiator::of(request, &self.origins);
        let is_local = self.keyless == Keyless::Local;
        let refusal = if is_local { why_not_local(request) } else { Some(ASK) };
        // Requests through a proxy, or to a foreign name that resolves to this machine, come from the user's own
        // address.
        let is_foreign = initiator != Initiator::Trusted || is_local && refusal.is_some();
        let result = match (policy.access, refusal, initiator) {
            (Access::Anyone, ..) => Ok(()),
            (_, Some(why), _) => Err(why),
            (_, None, Initiator::Trusted) => Ok(()),
            (_, None, Initiator::Navigation) if policy.opens_from_links => Ok(()),
            (_, None, Initiator::Navigation) => Err(
                "A key is needed: a link on a page elsewhere leads here. Open this address by hand, or send Authorization: Bearer psk_\u{2026}",
            ),
            (_, None, Initiator::CrossSite) => Err(
                "A key is needed: this request was made by a web page elsewhere. Send Authorization: Bearer psk_\u{2026}",
            ),
        };
        Verdict { key: None, result: result.map_err(ApiError::KeyNeeded), is_foreign }
    }

    /// The key in the request's header, if it is valid.
    fn identify(&self, headers: &HeaderMap, now: Timestamp) -> Result<Arc<Key>, KeyFault> {
        let secret = secret(headers)?;
        let key = self.keyring.find(&keys::hash(secret));
        let key = key.ok_or_else(|| match WrongSecret::of(secret) {
            Some(WrongSecret::NotAKey) => KeyFault::NotAKey,
            Some(WrongSecret::Mistyped) => KeyFault::Mistyped,
            None => KeyFault::Unknown,
        })?;
        check_valid(&key, now)?;
        Ok(key)
    }

    /// Checks again the key that a request was admitted with, if there is one, and returns its current state. While a
    /// body arrived or a response was sent, it may have been revoked, expired or narrowed.
    pub(crate) fn look_again(
        &self,
        key: Option<&Arc<Key>>,
        scope: Scope,
    ) -> Result<Option<Arc<Key>>, ApiError> {
        let Some(key) = key else { return Ok(None) };
        let key = self.keyring.current(key).ok_or(ApiError::WrongKey(KeyFault::Unknown))?;
        check_valid(&key, self.clock.now()).map_err(ApiError::WrongKey)?;
        if key.scope.opens(scope) { Ok(Some(key)) } else { Err(ApiError::WrongScope(scope)) }
    }
}

/// Checks that a key is valid at `now`.
fn check_valid(key: &Key, now: Timestamp) -> Result<(), KeyFault> {
    if key.is_revoked() {
        return Err(KeyFault::Revoked);
    }
    if key.has_expired(now) {
        return Err(KeyFault::Expired);
    }
    Ok(())
}

/// The text of the key in the request's header.
fn secret(headers: &HeaderMap) -> Result<&[u8], KeyFault> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(KeyFault::SeveralHeaders);
    };
    let bytes = value.as_bytes();
    let (scheme, rest) = bytes.split_at_checked(BEARER.len()).unwrap_or((bytes, b""));
    if scheme.eq_ignore_ascii_case(BEARER) {
        Ok(rest.trim_ascii())
    } else {
        Err(KeyFault::NotBearer)
    }
}

const BEARER: &[u8] = b"Bearer ";

/// The message for a request without a key.
const ASK: &str = "A key is needed: send it as Authorization: Bearer psk_\u{2026}";

/// Why a request without a key does not count as local. Each sign of a proxy, or of a foreign name that resolves to
/// this machine, is a reason.
fn why_not_local(request: &Request) -> Option<&'static str> {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip().to_canonical());
    if !peer.is_some_and(|peer| peer.is_loopback()) {
        return Some(ASK);
    }
    let headers = request.headers();
    if headers.keys().any(is_forwarding) {
        return Some(
            "A key is needed: this request came through a proxy. Send Authorization: Bearer psk_\u{2026}",
        );
    }
    // By default nginx speaks HTTP/1.0 to its upstream and sends the upstream's name as Host.
    if request.version() < Version::HTTP_11 {
        return Some(
            "A key is needed: HTTP/1.0 may be a proxy's. Send Authorization: Bearer psk_\u{2026}",
        );
    }
    if !has_local_host(request.uri(), headers) {
        return Some(
            "A key is needed: only requests to localhost are served without one. Send Authorization: Bearer psk_\u{2026}",
        );
    }
    None
}

/// Headers by which a proxy shows itself.
fn is_forwarding(name: &HeaderName) -> bool {
    let name = name.as_str();
    name.starts_with("x-forwarded")
        || matches!(
            name,
            "forwarded"
                | "via"
                | "x-real-ip"
                | "x-client-ip"
                | "x-cluster-client-ip"
                | "x-original-forwarded-for"
                | "x-envoy-external-address"
                | "true-client-ip"
                | "cf-connecting-ip"
                | "fastly-client-ip"
        )
}

/// True if every host name in the request is this machine. A web page can bypass the same-origin policy with a foreign
/// name that resolves to this machine (DNS rebinding).
fn has_local_host(uri: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes);
    let named = uri.authority().map(|authority| authority.as_str().as_bytes());
    let mut count = 0;
    let local = hosts.by_ref().chain(named).all(|host| {
        count += 1;
        is_local(host)
    });
    local && count > 0
}

/// True if `host`, with or without a port, is this machine.
fn is_local(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').unwrap_or((rest, "?")),
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let port = port.strip_prefix(':').unwrap_or(port);
    port.bytes().all(|byte| byte.is_ascii_digit())
        && (name.eq_ignore_ascii_case("localhost")
            || name.parse().is_ok_and(|address: IpAddr| address.to_canonical().is_loopback()))
}

/// The key that a request was admitted with; `None` without one.
pub(crate) fn key_of(request: &Request) -> Option<Arc<Key>> {
    request.extensions().get::<Arc<Key>>().cloned()
}

/// The key that a request was admitted with, for a handler that does not take the entire request.
pub(crate) struct WithKey(pub(crate) Option<Arc<Key>>);

impl<S: Send + Sync> FromRequestParts<S> for WithKey {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self(parts.extensions.get::<Arc<Key>>().cloned()))
    }
}

/// The group of the key, in which reported devices must be; `None` if the key has no group. The transaction that stores
/// the events checks the group. This function checks the device of a key for one device.
pub(crate) fn check_report<'a>(
    key: Option<&Key>,
    device_ids: impl IntoIterator<Item = &'a DeviceId>,
) -> Result<Option<GroupName>, ApiError> {
    let Some(key) = key else { return Ok(None) };
    if device_ids.into_iter().all(|device_id| key.may_report_for(device_id)) {
        Ok(key.group.clone())
    } else {
        Err(ApiError::OtherDevice)
    }
}

/// The author of a change, for the audit log.
pub(crate) struct By(pub(crate) Actor);

impl FromRequestParts<SharedState> for By {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &SharedState) -> Result<Self, ApiError> {
        let key = parts.extensions.get::<Arc<Key>>();
        Ok(Self(Actor {
            via: key.map_or_else(|| state.gate.keyless_via(), |key| Via::Key(key.id)),
            address: parts.extensions.get::<Client>().map(|client| client.0),
            at: state.clock.now(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_local() {
        for host in [
            "localhost",
            "LOCALHOST:3000",
            "127.0.0.1",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]",
            "[::1]:3000",
            "[::ffff:127.0.0.1]:3000",
            "[::ffff:7f00:1]",
        ] {
            assert!(is_local(host.as_bytes()), "{host}");
        }
        for host in [
            "",
            "pisync",
            "localhost.example",
            "localhost:x",
            "localhost@evil",
            "127.0.0.1.nip.io",
            "192.168.0.2",
            "0.0.0.0",
            "[::]",
            "[::ffff:192.168.0.2]",
            "[::1",
            "localhost:80@evil",
            "::2",
            "xn--localhost",
            "\u{7f}",
        ] {
            assert!(!is_local(host.as_bytes()), "{host}");
        }
    }
}
