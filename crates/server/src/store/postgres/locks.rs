//! The numbers of PiSync's advisory locks: "pisync" and a number for the purpose. Another program is unlikely to use
//! them. They must never change: servers of two versions may share a database.

/// Held while migrations run.
pub(super) const MIGRATION_LOCK: i64 = 0x7069_7379_6e63_0001;

/// Held while a partition is made.
pub(super) const PARTITION_LOCK: i64 = 0x7069_7379_6e63_0002;

/// Held while events are aggregated.
pub(super) const ROLL_UP_LOCK: i64 = 0x7069_7379_6e63_0003;

/// Held while a month is detached and dropped.
pub(super) const EXPIRY_LOCK: i64 = 0x7069_7379_6e63_0004;

/// Held while devices are evaluated, and while incidents are made from what was found.
pub(super) const SWEEP_LOCK: i64 = 0x7069_7379_6e63_0005;
