//! API keys: how they look (`secret`), how a running server holds them (`keyring`), and how they are made,
//! by the command line and the API alike.

mod keyring;
mod secret;

use pisync_core::{DeviceId, Timestamp, ViolationCode};

pub use keyring::{Key, Keyring, REFRESH_INTERVAL, follow};
pub use secret::{Secret, WrongSecret, hash};

use crate::{
    random::Randomness,
    store::{Actor, KeyStore, NewKey, Scope, StoreError},
};

/// The most characters that people may call a key by.
pub const MAX_NAME: usize = 100;

/// A key that somebody wants.
#[derive(Debug, Clone)]
pub struct KeyWish {
    /// What people call it.
    pub name: Option<String>,
    /// What it is to open.
    pub scope: Scope,
    /// The only device that it may report for.
    pub device_id: Option<DeviceId>,
    /// The only group whose devices it may report for; a new device is put in it.
    pub group: Option<String>,
    /// From when on it opens nothing.
    pub expires_at: Option<Timestamp>,
}

impl KeyWish {
    /// What is wrong with the wish.
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

/// What is wrong with a field of a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// The field.
    pub field: &'static str,
    /// The kind of rule that it breaks.
    pub code: ViolationCode,
    /// The words that follow its name.
    pub rule: &'static str,
}

/// Why a key was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// There is no randomness.
    #[error("{0}")]
    Randomness(String),
    /// It cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes a key: its number, and itself, which is known to nobody after this.
///
/// # Errors
/// See [`CreateError`].
pub async fn create<S: KeyStore + ?Sized>(
    store: &S,
    randomness: &Randomness,
    wish: KeyWish,
    by: &Actor,
) -> Result<(i64, Secret), CreateError> {
    let secret = Secret::new(randomness.bytes().map_err(CreateError::Randomness)?);
    let key = NewKey {
        hash: secret.hash(),
        hint: secret.hint().to_owned(),
        name: wish.name,
        scope: wish.scope,
        device_id: wish.device_id,
        group: wish.group,
        expires_at: wish.expires_at,
    };
    let id = store.create_key(&key, by).await?;
    Ok((id, secret))
}
