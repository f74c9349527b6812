//! API keys: what both stores keep of who may do what. The keys themselves are kept nowhere, only their hashes.

use std::str::FromStr;

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, Timestamp};
use serde_json::{Value, json};

use super::{Actor, StoreError};

/// The SHA-256 of a key.
///
/// A fast hash is right here, unlike for passwords: a key is 256 random bits, so there is no list of
/// likely ones to try, and trying them all is hopeless at any speed. It also lets every request be
/// checked for some hundred nanoseconds.
pub type KeyHash = [u8; 32];

/// What a key opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Reporting sync runs, and nothing else.
    Ingest,
    /// Reading everything but keys and the audit log.
    Read,
    /// Everything.
    Admin,
}

impl Scope {
    /// All of them, narrowest first.
    pub const ALL: [Self; 3] = [Self::Ingest, Self::Read, Self::Admin];

    /// As it is typed and stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }

    /// Whether a key of this scope opens what asks for `needed`.
    #[must_use]
    pub fn opens(self, needed: Self) -> bool {
        self == needed || self == Self::Admin
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|scope| scope.as_str() == text);
        found.ok_or_else(|| "must be one of [ingest, read, admin]".to_owned())
    }
}

/// A key to be made.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Of the key.
    pub hash: KeyHash,
    /// Its first characters.
    pub hint: String,
    /// What people call it.
    pub name: Option<String>,
    /// What it opens.
    pub scope: Scope,
    /// The only device that it may report for.
    pub device_id: Option<DeviceId>,
    /// The only group whose devices it may report for; a new device is put in it.
    pub group: Option<GroupName>,
    /// From when on it opens nothing.
    pub expires_at: Option<Timestamp>,
}

impl NewKey {
    /// What the audit log says of it.
    pub(super) fn details(&self) -> Value {
        json!({
            "hint": self.hint,
            "name": self.name,
            "scope": self.scope.as_str(),
            "device_id": self.device_id.as_ref().map(DeviceId::as_str),
            "group": self.group,
            "expires_at": self.expires_at,
        })
    }
}

/// A key as it is kept.
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// Its number, by which it is named everywhere.
    pub id: i64,
    /// Of the key.
    pub hash: KeyHash,
    /// Its first characters.
    pub hint: String,
    /// What people call it.
    pub name: Option<String>,
    /// What it opens.
    pub scope: Scope,
    /// The only device that it may report for.
    pub device_id: Option<String>,
    /// The only group whose devices it may report for.
    pub group: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// From when on it opens nothing.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
    /// When it was last used, to the hour.
    pub last_used: Option<Timestamp>,
}

impl ApiKey {
    /// Whether it opens anything at `now`.
    #[must_use]
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|expires_at| expires_at > now)
    }
}

/// All keys, as of one version.
#[derive(Debug)]
pub struct Keys {
    /// Another whenever a key is made or revoked, and never one that there has been. Of two, neither is known to
    /// be the later.
    pub version: i64,
    /// Revoked and expired ones included, oldest first.
    pub keys: Vec<ApiKey>,
}

/// What came of revoking a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Revocation {
    /// It opens nothing from now on.
    Revoked,
    /// It was revoked before.
    Already,
    /// There is no such key.
    Unknown,
}

/// A scope as it is stored; an unknown one opens next to nothing.
pub(super) fn stored_scope(text: &str) -> Scope {
    text.parse().unwrap_or(Scope::Ingest)
}

/// API keys. Each method is one transaction.
#[async_trait]
pub trait KeyStore: Send + Sync {
    /// Keeps a new key and gives its number.
    async fn create_key(&self, key: &NewKey, by: &Actor) -> Result<i64, StoreError>;

    /// Makes a key open nothing any more.
    async fn revoke_key(&self, id: i64, by: &Actor) -> Result<Revocation, StoreError>;

    /// What [`Keys::version`] is by now.
    async fn keys_version(&self) -> Result<i64, StoreError>;

    /// All keys.
    async fn keys(&self) -> Result<Keys, StoreError>;

    /// Notes when keys were last used; never sets one back.
    async fn keys_used(&self, used: &[(i64, Timestamp)]) -> Result<(), StoreError>;
}
