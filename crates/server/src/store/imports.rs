//! How far imports have come. `import` calls it. Progress is written in the transactions that store the events. An
//! interrupted import can therefore continue without storing any event twice.

use std::sync::Arc;

use async_trait::async_trait;
use pisync_core::Timestamp;

use super::StoreError;

/// The log of imports.
#[async_trait]
pub trait ImportLog: Send + Sync {
    /// All imports.
    async fn imports(&self) -> Result<Vec<ImportProgress>, StoreError>;
}

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// An import, and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportProgress {
    /// A random id.
    pub id: Digest,
    /// What the input was called.
    pub name: String,
    /// The digest of the input's first records, by which it is recognised.
    pub head: Digest,
    /// Records taken so far, including those that were rejected.
    pub records: u64,
    /// The digest of all of these.
    pub digest: Digest,
    /// How many of them were rejected.
    pub rejected: u64,
    /// Whether the import reached the end of the input.
    pub finished: bool,
    /// When this was noted.
    pub at: Timestamp,
}

/// The progress that an import makes with a batch, and what it knows of other imports.
#[derive(Debug, Clone)]
pub struct ImportStep {
    /// The progress after the batch.
    pub progress: ImportProgress,
    /// The progress before the batch: the number of records and their digest. `None` before its first step.
    pub before: Option<(u64, Digest)>,
    /// The ids of all imports that existed when this one began.
    pub known: Arc<[Digest]>,
}

/// Another import stores the same records at the same time.
#[derive(Debug, thiserror::Error)]
#[error(
    "another import of the same records runs beside this one, or has run since this one began; when none is running, the same command goes on after what is stored"
)]
pub(super) struct SameImport;

impl ImportStep {
    /// Checks that nobody else is importing the same records. `stored` are the imports with the same head, and this
    /// one. They must not change until the transaction ends. `has_events` tells whether the step stores any events.
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
        // Noting the same progress again does no harm.
        let is_noted = before == Some((self.progress.records, self.progress.digest));
        if before == self.before || is_noted && !has_events { Ok(()) } else { Err(SameImport) }
    }
}
