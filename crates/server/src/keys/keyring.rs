//! The API keys that a running server knows, by their hashes. Requests are checked without asking the database. One
//! task polls the database, so that a key made or revoked elsewhere takes effect within a second. A request with an
//! unknown key makes the server read the database before it is refused.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use pisync_core::{DeviceId, GroupName, Timestamp};
use tokio::time::Instant;

use crate::store::{ApiKey, KeyHash, KeyStore, Keys, Scope, StoreError};

/// How often to check for changed keys. Two checks, one of them slow, fit in a second.
pub const REFRESH_INTERVAL: Duration = Duration::from_millis(400);

/// How long one check may take.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(5);

/// The shortest interval between reads that requests with unknown keys cause. A client that makes up keys with valid
/// checksums can cause only this many reads of one row.
const LOOK_UP_INTERVAL: Duration = Duration::from_millis(50);

/// How long such a request waits. Reading the keys of a large fleet takes some ten milliseconds.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(2);

/// The precision of a key's last use, in milliseconds: an hour. Each key is written at most once per hour.
const USE_GRAIN: i64 = 60 * 60 * 1000;

/// A key in the form that requests are checked against.
#[derive(Debug)]
pub struct Key {
    /// The key's id.
    pub id: i64,
    hash: KeyHash,
    /// The scope that the key grants.
    pub scope: Scope,
    /// The only device that the key may report for.
    pub device_id: Option<String>,
    /// The only group whose devices the key may report for.
    pub group: Option<GroupName>,
    expires_at: Option<Timestamp>,
    revoked: bool,
    /// The start of the hour of its last use, in milliseconds; `i64::MIN` if it was never used.
    last_used: AtomicI64,
    /// True if the database has that value.
    use_is_noted: AtomicBool,
}

impl Key {
    fn new(stored: &ApiKey, last_used: i64, use_is_noted: bool) -> Self {
        let group = stored.group.as_deref().and_then(|group| GroupName::new(group).ok());
        let has_wrong_group = group.is_none() && stored.group.is_some();
        Self {
            id: stored.id,
            hash: stored.hash,
            scope: stored.scope,
            device_id: stored.device_id.clone(),
            group,
            expires_at: stored.expires_at,
            // Foreign SQL may have written a group that is none. Such a key must not report for all of them.
            revoked: stored.revoked_at.is_some() || has_wrong_group,
            last_used: AtomicI64::new(last_used),
            use_is_noted: AtomicBool::new(use_is_noted),
        }
    }

    /// True if the key was revoked.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.revoked
    }

    /// True if the key has expired by `now`.
    #[must_use]
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|expires_at| expires_at <= now)
    }

    /// Whether the key may report for a device, as far as memory tells. The check of its group needs the database.
    #[must_use]
    pub fn may_report_for(&self, device_id: &DeviceId) -> bool {
        self.device_id.as_ref().is_none_or(|own| own == device_id.as_str())
    }

    /// Records a use of the key.
    pub fn used(&self, now: Timestamp) {
        let hour = now.as_millisecond() - now.as_millisecond().rem_euclid(USE_GRAIN);
        if self.last_used.load(Ordering::Relaxed) < hour {
            self.last_used.fetch_max(hour, Ordering::Relaxed);
            self.use_is_noted.store(false, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct Known {
    version: Option<i64>,
    by_hash: HashMap<KeyHash, Arc<Key>>,
}

/// All keys that the server knows.
#[derive(Debug, Default)]
pub struct Keyring {
    known: RwLock<Known>,
    /// Held during a read of the database, so that a later read is adopted later. Versions do not give the order of two
    /// reads: a promoted standby or a restored file may lack changes.
    refreshing: tokio::sync::Mutex<LastLook>,
}

/// The last read of the database that a request with an unknown key caused.
#[derive(Debug, Default)]
struct LastLook {
    began: Option<Instant>,
    /// How it ended. `None` if it was abandoned because its client disconnected or it took too long.
    has_succeeded: Option<bool>,
}

impl Keyring {
    /// The key with this hash, in any state.
    ///
    /// The time of the search depends on the hash, not on the key. It reveals nothing about a key to anybody who cannot
    /// find a key with a similar hash.
    #[must_use]
    pub fn find(&self, hash: &KeyHash) -> Option<Arc<Key>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).by_hash.get(hash).cloned()
    }

    /// The current state of a key that a request started with; `None` if it was deleted.
    #[must_use]
    pub fn current(&self, key: &Key) -> Option<Arc<Key>> {
        self.find(&key.hash)
    }

    /// True if an admin key is valid at `now`.
    #[must_use]
    pub fn has_admin(&self, now: Timestamp) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known
            .by_hash
            .values()
            .any(|key| key.scope == Scope::Admin && !key.is_revoked() && !key.has_expired(now))
    }

    /// Reloads the keys from the database.
    ///
    /// # Errors
    /// When the database cannot be read. The known keys then stay.
    pub async fn refresh<S: KeyStore + ?Sized>(&self, store: &S) -> Result<(), StoreError> {
        let _refreshing = self.refreshing.lock().await;
        self.take_over(store).await
    }

    /// Adopts a state of the database from after this call. Concurrent calls share one read, and its failure.
    ///
    /// # Errors
    /// When the database cannot be read, or does not answer in time. A valid key may then be unknown.
    pub async fn look_up<S: KeyStore + ?Sized>(&self, store: &S) -> Result<(), StoreError> {
        let away = || StoreError::Unavailable("the keys cannot be read".to_owned());
        let asked = Instant::now();
        let look = async {
            let mut last = self.refreshing.lock().await;
            if let Some(began) = last.began {
                if let Some(has_succeeded) = last.has_succeeded.filter(|_| began > asked) {
                    return if has_succeeded { Ok(()) } else { Err(away()) };
                }
                tokio::time::sleep_until(began + LOOK_UP_INTERVAL).await;
            }
            *last = LastLook { began: Some(Instant::now()), has_succeeded: None };
            let taken = self.take_over(store).await;
            last.has_succeeded = Some(taken.is_ok());
            taken
        };
        tokio::time::timeout(LOOK_UP_TIMEOUT, look).await.unwrap_or_else(|_| Err(away()))
    }

    /// Reads the keys if they have changed. The caller holds `refreshing`.
    async fn take_over<S: KeyStore + ?Sized>(&self, store: &S) -> Result<(), StoreError> {
        let version = store.keys_version().await?;
        let is_current = |known: &Known| known.version == Some(version);
        if !is_current(&self.known.read().unwrap_or_else(PoisonError::into_inner)) {
            let keys = store.keys().await?;
            self.replace(&keys);
        }
        Ok(())
    }

    fn replace(&self, keys: &Keys) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let by_hash = keys
            .keys
            .iter()
            .map(|stored| {
                let noted = stored.last_used.map_or(i64::MIN, Timestamp::as_millisecond);
                let seen = known
                    .by_hash
                    .get(&stored.hash)
                    .map_or(i64::MIN, |key| key.last_used.load(Ordering::Relaxed));
                (stored.hash, Arc::new(Key::new(stored, noted.max(seen), seen <= noted)))
            })
            .collect();
        *known = Known { version: Some(keys.version), by_hash };
    }

    /// Writes to the database which keys were used since the last call.
    ///
    /// # Errors
    /// When the database cannot be written. The next call tries again.
    pub async fn note_uses<S: KeyStore + ?Sized>(&self, store: &S) -> Result<(), StoreError> {
        let unnoted: Vec<Arc<Key>> = {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            let is_unnoted = |key: &&Arc<Key>| !key.use_is_noted.load(Ordering::Relaxed);
            known.by_hash.values().filter(is_unnoted).cloned().collect()
        };
        let used: Vec<(i64, Timestamp)> = unnoted
            .iter()
            .filter_map(|key| {
                key.use_is_noted.store(true, Ordering::Relaxed);
                let hour = Timestamp::from_millisecond(key.last_used.load(Ordering::Relaxed))?;
                Some((key.id, hour))
            })
            .collect();
        if used.is_empty() {
            return Ok(());
        }
        let result = store.keys_used(&used).await;
        if result.is_err() {
            for key in &unnoted {
                key.use_is_noted.store(false, Ordering::Relaxed);
            }
        }
        result
    }
}

/// Keeps `keyring` current for as long as the server runs. While the database is away the known keys stay valid:
/// nothing can be read or stored meanwhile anyway.
pub async fn follow<S: KeyStore + ?Sized>(keyring: Arc<Keyring>, store: Arc<S>) {
    loop {
        tokio::time::sleep(REFRESH_INTERVAL).await;
        let round = async {
            keyring.refresh(&*store).await?;
            keyring.note_uses(&*store).await
        };
        match tokio::time::timeout(REFRESH_TIMEOUT, round).await {
            Ok(Ok(())) => {}
            // Ingest logs once that the database is away.
            Ok(Err(error)) => tracing::debug!(%error, "cannot look for changed keys"),
            Err(_) => tracing::warn!("looking for changed keys takes too long"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use async_trait::async_trait;

    use super::*;
    use crate::store::{Actor, NewKey, Revocation};

    /// A database that counts how often it is read.
    #[derive(Default)]
    struct Counted {
        looks: AtomicU32,
        is_away: AtomicBool,
    }

    #[async_trait]
    impl KeyStore for Counted {
        async fn keys_version(&self) -> Result<i64, StoreError> {
            let looks = self.looks.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(1)).await;
            if self.is_away.load(Ordering::Relaxed) {
                return Err(StoreError::Unavailable("away".to_owned()));
            }
            Ok(looks.into())
        }

        async fn keys(&self) -> Result<Keys, StoreError> {
            Ok(Keys { version: 0, keys: Vec::new() })
        }

        async fn keys_used(&self, _: &[(i64, Timestamp)]) -> Result<(), StoreError> {
            Ok(())
        }

        async fn create_key(&self, _: &NewKey, _: &Actor) -> Result<i64, StoreError> {
            Err(StoreError::Stopped)
        }

        async fn revoke_key(&self, _: i64, _: &Actor) -> Result<Revocation, StoreError> {
            Err(StoreError::Stopped)
        }
    }

    /// Foreign SQL may write anything. What is no group must not become none, which stands for all groups.
    #[test]
    fn a_key_of_a_group_that_cannot_be_opens_nothing() {
        let key = |group: Option<&str>| {
            let stored = ApiKey {
                id: 1,
                hash: [0; 32],
                hint: String::new(),
                name: None,
                scope: Scope::Ingest,
                device_id: None,
                group: group.map(str::to_owned),
                created_at: Timestamp::MIN,
                expires_at: None,
                revoked_at: None,
                last_used: None,
            };
            Key::new(&stored, i64::MIN, true)
        };
        for (group, opens) in [(None, true), (Some("school"), true), (Some(""), false)] {
            let key = key(group);
            assert_eq!(key.is_revoked(), !opens, "{group:?}");
            assert_eq!(key.group.as_ref().map(GroupName::as_str), group.filter(|_| opens));
        }
    }

    #[tokio::test]
    async fn unknown_keys_share_looks_at_the_database() {
        let (keyring, store) = (Arc::new(Keyring::default()), Arc::new(Counted::default()));
        let began = Instant::now();
        let mut waiting = tokio::task::JoinSet::new();
        for request in 0..5_000_u64 {
            let (keyring, store) = (Arc::clone(&keyring), Arc::clone(&store));
            waiting.spawn(async move {
                tokio::time::sleep(Duration::from_micros(request * 100)).await;
                keyring.look_up(&*store).await
            });
        }
        while let Some(looked) = waiting.join_next().await {
            looked.unwrap().unwrap();
        }
        // The calls came during half a second.
        let most = began.elapsed().as_millis() / LOOK_UP_INTERVAL.as_millis() + 2;
        let looks = store.looks.load(Ordering::Relaxed);
        assert!(looks > 2 && u128::from(looks) <= most, "{looks} looks of {most}");
    }

    #[tokio::test]
    async fn a_database_that_is_away_is_told_and_asked_again() {
        let (keyring, store) = (Keyring::default(), Counted::default());
        store.is_away.store(true, Ordering::Relaxed);
        let (first, second) = tokio::join!(keyring.look_up(&store), keyring.look_up(&store));
        assert!(matches!(first, Err(StoreError::Unavailable(_))), "{first:?}");
        assert!(matches!(second, Err(StoreError::Unavailable(_))), "{second:?}");
        store.is_away.store(false, Ordering::Relaxed);
        keyring.look_up(&store).await.unwrap();
        // A client that disconnects meanwhile leaves no other call without a result.
        let looked = tokio::time::timeout(Duration::from_millis(1), keyring.look_up(&store)).await;
        assert!(looked.is_err());
        keyring.look_up(&store).await.unwrap();
    }
}
