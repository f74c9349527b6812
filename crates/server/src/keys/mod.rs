//! API keys: their text form (`secret`), their form in memory (`keyring`), and their creation. The command line and the
//! API create keys here. A key in the clear is never stored or logged.

mod keyring;
mod secret;

use pisync_core::{DeviceId, GroupName, Timestamp, ViolationCode};

pub use keyring::{Key, Keyring, REFRESH_INTERVAL, follow};
pub use secret::{Secret, WrongSecret, hash};

use crate::{
    random::Randomness,
    store::{Actor, KeyStore, NewKey, Scope, StoreError},
};

/// The largest length of a key's name, in characters.
pub const MAX_NAME: usize = 100;

/// The requested properties of a new key.
#[derive(Debug, Clone)]
pub struct KeyRequest {
    /// A name for people.
    pub name: Option<String>,
    /// The scope that the key grants.
    pub scope: Scope,
    /// The only device that the key may report for.
    pub device_id: Option<DeviceId>,
    /// The only group whose devices the key may report for. A new device is added to it.
    pub group: Option<GroupName>,
    /// From this time on the key is not valid.
    pub expires_at: Option<Timestamp>,
}

impl KeyRequest {
    /// The problems of the request; empty if it is valid.
    #[must_use]
    pub fn problems(&self, now: Timestamp) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut refuse = |field, code, rule| problems.push(Problem { field, code, rule });
        let narrowed_by =
            [("device_id", self.device_id.is_some()), ("group", self.group.is_some())];
        for (field, _) in narrowed_by.iter().filter(|(_, is_set)| *is_set) {
            if self.scope != Scope::Ingest {
                refuse(*field, ViolationCode::Conflict, "is only for keys of the scope ingest");
            }
        }
        if self.device_id.is_some() && self.group.is_some() {
            refuse("group", ViolationCode::Conflict, "cannot stand beside \"device_id\"");
        }
        if self.expires_at.is_some_and(|expires_at| expires_at <= now) {
            refuse("expires_at", ViolationCode::Range, "must be in the future");
        }
        problems
    }
}

/// A problem with one field of a [`KeyRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// The field.
    pub field: &'static str,
    /// The kind of rule that was broken.
    pub code: ViolationCode,
    /// The words that follow the field's name.
    pub rule: &'static str,
}

/// Why a key was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The system gave no random bytes.
    #[error("{0}")]
    Randomness(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Creates a key. Returns its id and the key itself, which is not available afterwards.
///
/// # Errors
/// See [`CreateError`].
pub async fn create<S: KeyStore + ?Sized>(
    store: &S,
    randomness: &Randomness,
    key_request: KeyRequest,
    by: &Actor,
) -> Result<(i64, Secret), CreateError> {
    let secret = Secret::new(randomness.bytes().map_err(CreateError::Randomness)?);
    let key = NewKey {
        hash: secret.hash(),
        hint: secret.hint().to_owned(),
        name: key_request.name,
        scope: key_request.scope,
        device_id: key_request.device_id,
        group: key_request.group,
        expires_at: key_request.expires_at,
    };
    let id = store.create_key(&key, by).await?;
    Ok((id, secret))
}
