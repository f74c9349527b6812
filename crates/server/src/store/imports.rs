//! How far imports have come. It is written in the transactions that store their events, so that an import
//! that was interrupted can go on without storing any event twice.

use pisync_core::Timestamp;

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
