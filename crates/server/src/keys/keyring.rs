//! The keys that a running server knows, by their hashes: a request is checked without asking the
//! database. One task follows the database, so that a key that is made or revoked anywhere counts here
//! within a second. A request with a key that is not known yet has the database looked at before it is refused.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use pisync_core::{DeviceId, Timestamp};
use tokio::time::Instant;

use crate::store::{ApiKey, KeyHash, KeyStore, Keys, Scope, StoreError};

/// How often to look whether keys have changed: two looks, of which one may be slow, make a second.
pub const REFRESH_INTERVAL: Duration = Duration::from_millis(400);

/// How long one look may take.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(5);

/// How far apart looks are that requests with unknown keys ask for. Whoever makes up keys with a right checksum has the
/// database read one row so often, however many requests there are.
const LOOK_UP_INTERVAL: Duration = Duration::from_millis(50);

/// How long such a request waits. Reading the keys of a large fleet takes some ten milliseconds.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(2);

/// How coarsely a key's last use is noted, in milliseconds: an hour. Each key is written at most so often.
const USE_GRAIN: i64 = 60 * 60 * 1000;

/// A key, as requests are checked against it.
#[derive(Debug)]
pub struct Key {
    /// Its number.
    pub id: i64,
    hash: KeyHash,
    /// What it opens.
    pub scope: Scope,
    /// The only device that it may report for.
    pub device_id: Option<String>,
    /// The only group whose devices it may report for.
    pub group: Option<String>,
    expires_at: Option<Timestamp>,
    revoked: bool,
    /// The start of the hour in which it was last used, in milliseconds; the smallest number when never.
    last_used: AtomicI64,
    /// Whether the database knows of that.
    use_is_noted: AtomicBool,
}

impl Key {
    fn new(stored: &ApiKey, last_used: i64, use_is_noted: bool) -> Self {
        Self {
            id: stored.id,
            hash: stored.hash,
            scope: stored.scope,
            device_id: stored.device_id.clone(),
            group: stored.group.clone(),
            expires_at: stored.expires_at,
            revoked: stored.revoked_at.is_some(),
            last_used: AtomicI64::new(last_used),
            use_is_noted: AtomicBool::new(use_is_noted),
        }
    }

    /// Whether it was revoked.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.revoked
    }

    /// Whether it has expired by `now`.
    #[must_use]
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|expires_at| expires_at <= now)
    }

    /// Whether it may report for a device, as far as that is known without asking the database.
    #[must_use]
    pub fn may_report_for(&self, device_id: &DeviceId) -> bool {
        self.device_id.as_ref().is_none_or(|own| own == device_id.as_str())
    }

    /// Remembers that it was used.
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

/// Every key that the server knows.
#[derive(Debug, Default)]
pub struct Keyring {
    known: RwLock<Known>,
    /// Held while the database is asked: what was read later is taken over later. Versions do not tell which of
    /// two came first, since a standby that takes over, or a file that is put back, may lack changes.
    refreshing: tokio::sync::Mutex<LastLook>,
}

/// The last look at the database that a request with an unknown key asked for.
#[derive(Debug, Default)]
struct LastLook {
    began: Option<Instant>,
    /// How it ended; `None` when it was given up, since its client has gone or it took too long.
    has_succeeded: Option<bool>,
}

impl Keyring {
    /// The key with this hash, whatever its state.
    ///
    /// Looking it up takes a time that depends on the hash, not on the key: nobody can tell from it what a
    /// key begins with without knowing one that hashes so.
    #[must_use]
    pub fn find(&self, hash: &KeyHash) -> Option<Arc<Key>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).by_hash.get(hash).cloned()
    }

    /// A key as it is by now, for a request that began with it; `None` when it is gone.
    #[must_use]
    pub fn current(&self, key: &Key) -> Option<Arc<Key>> {
        self.find(&key.hash)
    }

    /// Whether there is a key that opens everything at `now`.
    #[must_use]
    pub fn has_admin(&self, now: Timestamp) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known
            .by_hash
            .values()
            .any(|key| key.scope == Scope::Admin && !key.is_revoked() && !key.has_expired(now))
    }

    /// Takes over what has changed in the database.
    ///
    /// # Errors
    /// When it cannot be asked; what was known stays known.
    pub async fn refresh<S: KeyStore + ?Sized>(&self, store: &S) -> Result<(), StoreError> {
        let _refreshing = self.refreshing.lock().await;
        self.take_over(store).await
    }

    /// Takes over what the database holds at some moment after this call. Calls that come together share one look, and
    /// its failure.
    ///
    /// # Errors
    /// When the database cannot be asked, or does not answer in time: then a key may be good, and yet not known.
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

    /// Tells the database which keys were used since it was last told.
    ///
    /// # Errors
    /// When it cannot be told; it will be with the next call.
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

/// Keeps `keyring` current for as long as the server runs. While the database is away the keys stay what
/// they were: nothing can be read or stored meanwhile.
pub async fn follow<S: KeyStore + ?Sized>(keyring: Arc<Keyring>, store: Arc<S>) {
    loop {
        tokio::time::sleep(REFRESH_INTERVAL).await;
        let round = async {
            keyring.refresh(&*store).await?;
            keyring.note_uses(&*store).await
        };
        match tokio::time::timeout(REFRESH_TIMEOUT, round).await {
            Ok(Ok(())) => {}
            // Ingest tells of a database that is away, once.
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

    /// A database that counts how often it is looked at.
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
        // They came for half a second.
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
        // Somebody who has gone meanwhile leaves nobody without an answer.
        let looked = tokio::time::timeout(Duration::from_millis(1), keyring.look_up(&store)).await;
        assert!(looked.is_err());
        keyring.look_up(&store).await.unwrap();
    }
}
