//! How far imports have come. It is written in the transactions that store their events, so that an import
//! that was interrupted can go on without storing any event twice.

use std::sync::Arc;

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::StoreError;

/// The imports that there have been.
#[async_trait]
pub trait ImportLog: Send + Sync {
    /// All of them.
    async fn imports(&self) -> Result<Vec<ImportProgress>, StoreError>;
}

/// A SHA-256.
pub type Digest = [u8; 32];

/// An import, and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportProgress {
    /// Random.
    pub id: Digest,
    /// What the input was called.
    pub name: String,
    /// Over the input's first records, by which it is recognised.
    pub head: Digest,
    /// Records taken so far, those that were rejected included.
    pub records: u64,
    /// Over all of these.
    pub digest: Digest,
    /// How many of them were rejected.
    pub rejected: u64,
    /// Whether the input had come to its end.
    pub finished: bool,
    /// When this was noted.
    pub at: Timestamp,
}

/// How far an import comes with a batch, and what it knows of imports.
#[derive(Debug, Clone)]
pub struct ImportStep {
    /// How far it comes.
    pub progress: ImportProgress,
    /// How far it had come before: records, and the digest over them. `None` before its first step.
    pub before: Option<(u64, Digest)>,
    /// The ids of all imports that there were when it began.
    pub known: Arc<[Digest]>,
}

/// Another import stores the same records at the same time.
#[derive(Debug, thiserror::Error)]
#[error(
    "another import of the same records runs beside this one, or has run since this one began; when none is running, the same command goes on after what is stored"
)]
pub(super) struct SameImport;

impl ImportStep {
    /// Checks that nobody else is importing the same records. `stored` are the imports with the same head, and this one;
    /// they must stay as they are until the transaction ends. `has_events` says whether the step stores any.
    pub(super) fn check<'a>(
        &self,
        stored: impl IntoIterator<Item = &'a ImportProgress>,
        has_events: bool,
    ) -> Result<(), SameImport> {
        let mut before = None;
        for import in stored {
            if import.id == self.progress.id {
                before = Some((import.records, import.digest));
            } else if !self.known.contains(&import.id) {
                return Err(SameImport);
            }
        }
        // Noting the same again does no harm.
        let is_noted = before == Some((self.progress.records, self.progress.digest));
        if before == self.before || is_noted && !has_events { Ok(()) } else { Err(SameImport) }
    }
}
