//! API keys: what both stores keep of each key and its rights. The API, the command line and the keyring call it. A key
//! itself must never be stored, only its hash.

use std::str::FromStr;

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, Timestamp};
use serde_json::{Value, json};

use super::{Actor, StoreError};

/// The SHA-256 of a key.
///
/// A fast hash is right here, unlike for passwords. A key is 256 random bits: there is no list of likely keys, and
/// trying all of them is hopeless at any speed. A fast hash also keeps the check of each request to some hundred
/// nanoseconds.
pub type KeyHash = [u8; 32];

/// What a key permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Reporting sync runs, and nothing else.
    Ingest,
    /// Reading everything but keys and the audit log.
    Read,
    /// What `Read` permits, and what an operator does: naming, grouping and pausing devices, the roster, policies,
    /// windows, acknowledging.
    Operate,
    /// Everything.
    Admin,
}

impl Scope {
    /// All scopes, narrowest first.
    pub const ALL: [Self; 4] = [Self::Ingest, Self::Read, Self::Operate, Self::Admin];

    /// The form that is typed and stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }

    /// Whether a key of this scope permits what needs the scope `needed`.
    #[must_use]
    pub fn opens(self, needed: Self) -> bool {
        self == needed || self == Self::Admin || self == Self::Operate && needed == Self::Read
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|scope| scope.as_str() == text);
        found.ok_or_else(|| format!("must be one of [{}]", Self::ALL.map(Self::as_str).join(", ")))
    }
}

/// A key to be made.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// The hash of the key.
    pub hash: KeyHash,
    /// The key's first characters.
    pub hint: String,
    /// The name that people gave it.
    pub name: Option<String>,
    /// What it permits.
    pub scope: Scope,
    /// The only device that it may report for.
    pub device_id: Option<DeviceId>,
    /// The only group whose devices it may report for. A new device is put into that group.
    pub group: Option<GroupName>,
    /// The time from which on it permits nothing.
    pub expires_at: Option<Timestamp>,
}

impl NewKey {
    /// The details of its line in the audit log.
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
    /// Its number, which identifies it everywhere.
    pub id: i64,
    /// The hash of the key.
    pub hash: KeyHash,
    /// The key's first characters.
    pub hint: String,
    /// The name that people gave it.
    pub name: Option<String>,
    /// What it permits.
    pub scope: Scope,
    /// The only device that it may report for.
    pub device_id: Option<String>,
    /// The only group whose devices it may report for.
    pub group: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// The time from which on it permits nothing.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
    /// When it was last used, to the hour.
    pub last_used: Option<Timestamp>,
}

impl ApiKey {
    /// Whether it permits anything at `now`.
    #[must_use]
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|expires_at| expires_at > now)
    }
}

/// All keys, as of one version.
#[derive(Debug)]
pub struct Keys {
    /// A number that changes whenever a key is made or revoked, and never returns to an earlier value. Versions have no
    /// order: two of them do not tell which is later.
    pub version: i64,
    /// All keys, including revoked and expired ones, oldest first.
    pub keys: Vec<ApiKey>,
}

/// The result of revoking a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Revocation {
    /// The key permits nothing from now on.
    Revoked,
    /// It was revoked before.
    Already,
    /// There is no such key.
    Unknown,
}

/// Reads a stored scope. An unknown one permits next to nothing.
pub(super) fn stored_scope(text: &str) -> Scope {
    text.parse().unwrap_or(Scope::Ingest)
}

/// API keys. Each method is one transaction.
#[async_trait]
pub trait KeyStore: Send + Sync {
    /// Stores a new key and answers its number.
    async fn create_key(&self, key: &NewKey, by: &Actor) -> Result<i64, StoreError>;

    /// Revokes a key.
    async fn revoke_key(&self, id: i64, by: &Actor) -> Result<Revocation, StoreError>;

    /// The current [`Keys::version`].
    async fn keys_version(&self) -> Result<i64, StoreError>;

    /// All keys.
    async fn keys(&self) -> Result<Keys, StoreError>;

    /// Notes when keys were last used. It never sets a time back.
    async fn keys_used(&self, used: &[(i64, Timestamp)]) -> Result<(), StoreError>;
}
