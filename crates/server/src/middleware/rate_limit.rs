//! Rate limits per address and per key, in requests per minute. `admission` calls it. The governor crate counts, with a
//! leaky bucket that holds a minute's requests. This module decides what is counted and writes the headers; memory must
//! stay bounded.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    num::NonZeroU32,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    state::keyed::DashMapStateStore,
};

use crate::middleware::route_policy::RateClass;

/// The number of addresses that are counted separately, which take some 10 MiB. When there are more, addresses share
/// [`BUCKETS`] counters. Memory stays bounded even if a client uses made-up addresses.
const MAX_ADDRESSES: usize = 100_000;
const BUCKETS: u128 = 65_536;

/// Idle addresses are removed after this many requests.
const TIDY_EVERY: u32 = 4_096;

/// The limits of one server.
pub(crate) struct RateLimits {
    sync: Option<Limit>,
    api: Option<Limit>,
    key: Option<Limit>,
}

impl RateLimits {
    /// Limits in requests per minute, per address and per key; 0 means no limit.
    pub(crate) fn new(sync_per_minute: u32, api_per_minute: u32, key_per_minute: u32) -> Self {
        let [sync, api, key] = [sync_per_minute, api_per_minute, key_per_minute].map(Limit::new);
        Self { sync, api, key }
    }

    /// Counts a request with a key, independent of its address. An entire fleet may share a key, and a school may share
    /// an address.
    pub(crate) fn check_key(&self, class: RateClass, key_id: i64) -> Option<Rate> {
        let limit = self.key.as_ref().filter(|_| class != RateClass::Uncounted);
        limit.map(|limit| limit.check_account(u128::from(key_id.cast_unsigned())))
    }

    /// Counts a request without a key; `None` if it is not limited.
    pub(crate) fn check(&self, class: RateClass, client: IpAddr) -> Option<Rate> {
        let limit = match class {
            RateClass::Uncounted => return None,
            RateClass::Sync => &self.sync,
            RateClass::General => &self.api,
        };
        limit.as_ref().map(|limit| limit.check(client))
    }
}

type Limiter = RateLimiter<u128, DashMapStateStore<u128>, DefaultClock, StateInformationMiddleware>;

struct Limit {
    per_minute: NonZeroU32,
    limiter: Limiter,
    clock: DefaultClock,
    requests: AtomicU32,
    crowded: AtomicBool,
    hasher: RandomState,
}

impl Limit {
    fn new(per_minute: u32) -> Option<Self> {
        let per_minute = NonZeroU32::new(per_minute)?;
        let limiter = RateLimiter::keyed(Quota::per_minute(per_minute))
            .with_middleware::<StateInformationMiddleware>();
        Some(Self {
            per_minute,
            limiter,
            clock: DefaultClock::default(),
            requests: AtomicU32::new(0),
            crowded: AtomicBool::new(false),
            hasher: RandomState::new(),
        })
    }

    fn check(&self, client: IpAddr) -> Rate {
        self.check_account(key(client))
    }

    fn check_account(&self, mut key: u128) -> Rate {
        if self.requests.fetch_add(1, Ordering::Relaxed) % TIDY_EVERY == TIDY_EVERY - 1 {
            self.limiter.retain_recent();
            self.crowded.store(self.limiter.len() > MAX_ADDRESSES, Ordering::Relaxed);
        }
        if self.crowded.load(Ordering::Relaxed) {
            key = u128::from(self.hasher.hash_one(key)) % BUCKETS;
        }
        let limit = self.per_minute.get();
        match self.limiter.check_key(&key) {
            Ok(snapshot) => {
                let remaining = snapshot.remaining_burst_capacity();
                Rate { limit, remaining, retry_after: None }
            }
            Err(not_until) => {
                let wait = not_until.wait_time_from(self.clock.now());
                let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                Rate { limit, remaining: 0, retry_after: Some(seconds.max(1)) }
            }
        }
    }
}

/// The counted part of an address: an IPv4 address, or the /64 of an IPv6 address. A customer gets a whole /64, so
/// addresses within it cost nothing.
fn key(client: IpAddr) -> u128 {
    match client.to_canonical() {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits() & !u128::from(u64::MAX),
    }
}

/// The state of a limit after a request.
pub(crate) struct Rate {
    limit: u32,
    remaining: u32,
    /// Seconds until the next request is allowed; `None` if this one is allowed.
    pub(crate) retry_after: Option<u64>,
}

impl Rate {
    /// Writes the headers of draft-ietf-httpapi-ratelimit-headers-06, as the Node service did.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        // The bucket refills evenly, so the missing part needs the same part of a minute.
        let missing = u64::from(self.limit - self.remaining.min(self.limit));
        let reset = (missing * 60).div_ceil(u64::from(self.limit));
        let policy = format!("{};w=60", self.limit);
        let number = |name, value: u64| (HeaderName::from_static(name), HeaderValue::from(value));
        headers.extend([
            number("ratelimit-limit", self.limit.into()),
            number("ratelimit-remaining", self.remaining.into()),
            number("ratelimit-reset", reset),
        ]);
        if let Ok(policy) = HeaderValue::try_from(policy) {
            headers.insert(HeaderName::from_static("ratelimit-policy"), policy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn counts_by_address_and_by_kind() {
        let limits = RateLimits::new(2, 1, 3);
        let client = address("192.0.2.1");
        let post = |client| limits.check(RateClass::Sync, client).unwrap();
        assert_eq!(post(client).remaining, 1);
        assert_eq!(post(client).remaining, 0);
        assert!(post(client).retry_after.is_some_and(|seconds| (1..=30).contains(&seconds)));
        assert!(post(address("192.0.2.2")).retry_after.is_none());
        let get = |class| limits.check(class, client);
        assert!(get(RateClass::General).unwrap().retry_after.is_none());
        assert!(get(RateClass::General).unwrap().retry_after.is_some());
        assert!(get(RateClass::Uncounted).is_none());
        assert!(RateLimits::new(0, 0, 0).check(RateClass::General, client).is_none());
    }

    #[test]
    fn counts_by_key() {
        let limits = RateLimits::new(1, 1, 3);
        let count = |class, id| limits.check_key(class, id);
        for remaining in [2, 1, 0] {
            assert_eq!(count(RateClass::General, 1).unwrap().remaining, remaining);
        }
        assert!(count(RateClass::Sync, 1).unwrap().retry_after.is_some());
        assert!(count(RateClass::General, 2).unwrap().retry_after.is_none());
        assert!(count(RateClass::Uncounted, 1).is_none());
    }

    #[test]
    fn ipv6_counts_by_network() {
        assert_eq!(key(address("2001:db8::1")), key(address("2001:db8::ffff:1")));
        assert_ne!(key(address("2001:db8::1")), key(address("2001:db8:0:1::1")));
        assert_ne!(key(address("192.0.2.1")), key(address("192.0.2.2")));
        // Mapped IPv4 addresses all lie in one /64, but each is a separate customer.
        assert_eq!(key(address("::ffff:192.0.2.1")), key(address("192.0.2.1")));
        assert_ne!(key(address("::ffff:192.0.2.1")), key(address("::ffff:192.0.2.2")));
    }

    #[test]
    fn made_up_addresses_do_not_fill_the_memory() {
        let limit = Limit::new(1).unwrap();
        for number in 0..400_000_u128 {
            limit.check(IpAddr::V6((number << 64).into()));
        }
        assert!(limit.limiter.len() < MAX_ADDRESSES + 65_536 + 2 * TIDY_EVERY as usize);
    }
}
