//! The program's own migrations. `migrator` runs them. Each is a pair of files in `migrations/sqlite` and one in
//! `migrations/postgres`. Their names must stand here and nowhere else.

use super::migration::{Migration, Source};

/// A migration in one store's SQL.
#[derive(Debug)]
struct Files {
    up: &'static str,
    down: &'static str,
}

/// A migration in both stores' SQL.
#[derive(Debug)]
struct Embedded {
    name: &'static str,
    sqlite: Files,
    postgres: Files,
}

macro_rules! files {
    ($folder:literal, $name:literal) => {
        Files {
            up: include_str!(concat!("../../../migrations/", $folder, "/", $name, ".up.sql")),
            down: include_str!(concat!("../../../migrations/", $folder, "/", $name, ".down.sql")),
        }
    };
}

macro_rules! embedded {
    ($($name:literal),+ $(,)?) => {
        /// The names of the program's own migrations, in the order in which they run.
        pub const EMBEDDED: &[&str] = &[$($name),+];

        const MIGRATIONS: &[Embedded] = &[$(Embedded {
            name: $name,
            sqlite: files!("sqlite", $name),
            postgres: files!("postgres", $name),
        }),+];
    };
}

embedded!(
    "2026-11-22-01-sync-events",
    "2026-11-22-02-event-keys-and-roll-ups",
    "2026-11-22-03-keys",
    "2026-11-22-04-imports",
    "2026-11-23-05-ingest-journal",
    "2026-11-23-06-failed-events",
    "2026-11-25-07-ingest-progress",
    "2026-11-25-08-streaks-of-equal-dates",
    "2026-11-25-08-trusted-time",
    "2026-11-25-10-audit-log",
    "2026-11-25-12-streaks-in-one-statement",
    "2026-11-25-13-device-deletions",
    "2026-11-25-14-journal-in-use",
    "2026-11-25-15-set-aside-events",
    "2026-11-26-16-device-summaries",
    "2026-11-27-17-groups-and-days",
    "2026-11-28-18-fleet-health",
    "2026-11-29-19-device-states",
    "2026-11-30-20-notifications",
    "2026-12-01-21-unreconciled-devices",
);

/// Rolls a take-over back: the `down` of the first migration, in a database whose first rows were the Node service's.
/// It moves the rows back into the tables of the Node service.
pub(super) const GIVE_BACK: &str = include_str!("../../../migrations/node-service/give-back.sql");

/// The program's own migrations for SQLite.
pub(super) fn embedded_for_sqlite() -> Vec<Migration> {
    embedded(|migration| &migration.sqlite)
}

/// The program's own migrations for PostgreSQL.
pub(in crate::store) fn embedded_for_postgres() -> Vec<Migration> {
    embedded(|migration| &migration.postgres)
}

fn embedded(of_store: fn(&Embedded) -> &Files) -> Vec<Migration> {
    let migration = |migration: &Embedded| {
        let Files { up, down } = *of_store(migration);
        Migration {
            name: migration.name.to_owned(),
            source: Source::Embedded,
            up: up.to_owned(),
            down: down.to_owned(),
        }
    };
    MIGRATIONS.iter().map(migration).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::migrations::folder::read_folder;

    #[test]
    fn every_file_belongs_to_a_migration_and_every_down_says_what_it_loses() {
        for (folder, embedded) in
            [("sqlite", embedded_for_sqlite()), ("postgres", embedded_for_postgres())]
        {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(folder);
            let on_disk: Vec<_> =
                read_folder(&path).unwrap().into_iter().map(|migration| migration.name).collect();
            assert_eq!(on_disk, EMBEDDED);
            for migration in embedded {
                assert!(migration.losses().next().is_some(), "{}", migration.name);
            }
        }
    }
}
