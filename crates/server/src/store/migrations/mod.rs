//! Changes of the database's schema: plain SQL in pairs of files named `YYYY-MM-DD-NN-name.up.sql` and `.down.sql`. The
//! program's own are embedded, one set per store. Users' own migrations come from a folder and run after them.
//!
//! Each runs in a transaction of its own, under a lock of the database. Two servers may therefore start together. The
//! table `pisync_migrations` records what was applied, with a checksum.

mod embedded;
mod folder;
mod migration;
mod migrator;

pub use embedded::EMBEDDED;
pub(super) use embedded::embedded_for_postgres;
pub use folder::create_pair;
pub use migration::{Applied, Migration, MigrationError, Source};
pub(super) use migration::{
    Contents, MigrationDatabase, NODE_MIGRATION, Ours, may_apply, may_revert,
};
pub use migrator::{Migrator, Status};
