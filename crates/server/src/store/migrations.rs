//! Changes of the database's schema, forth and back. Plain SQL in pairs of files named
//! `YYYY-MM-DD-NN-name.up.sql` and `.down.sql`: those embedded in the program, one set per store, and
//! those of the users' own from a folder, which run after them.
//!
//! Each runs in a transaction of its own, under a lock of the database, so that two servers starting
//! together are safe. What was applied stands in the table `pisync_migrations` with a checksum.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use pisync_core::Timestamp;
use sha2::{Digest, Sha256};

use super::{StoreError, Target, postgres::PostgresMigrations, sqlite::SqliteMigrations};

/// The file name that the Node service's own migration left in its table `migrations`.
pub(super) const NODE_MIGRATION: &str = "001_create_devices_and_sync_events_tables.js";

macro_rules! embedded {
    ($folder:literal: $($name:literal),+ $(,)?) => {
        &[$((
            $name,
            include_str!(concat!("../../migrations/", $folder, "/", $name, ".up.sql")),
            include_str!(concat!("../../migrations/", $folder, "/", $name, ".down.sql")),
        )),+]
    };
}

type EmbeddedMigrations = &'static [(&'static str, &'static str, &'static str)];

const SQLITE: EmbeddedMigrations = embedded!(
    "sqlite":
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
);
const POSTGRES: EmbeddedMigrations = embedded!(
    "postgres":
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
);

/// Takes back a take-over: the `down` of the first migration where that has moved the Node service's rows
/// into its tables.
const GIVE_BACK: &str = include_str!("../../migrations/node-service/give-back.sql");

/// The program's own migrations for PostgreSQL.
pub(super) fn embedded_for_postgres() -> Vec<Migration> {
    embedded(POSTGRES)
}

fn embedded(migrations: EmbeddedMigrations) -> Vec<Migration> {
    let migration = |(name, up, down): &(&str, &str, &str)| Migration {
        name: (*name).to_owned(),
        source: Source::Embedded,
        up: (*up).to_owned(),
        down: (*down).to_owned(),
    };
    migrations.iter().map(migration).collect()
}

/// Where a migration comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Part of the program.
    Embedded,
    /// A pair of files in `MIGRATIONS_DIR`.
    User,
}

impl Source {
    /// Reads what [`Self::as_str`] wrote.
    pub(super) fn parse(text: &str) -> Self {
        if text == Self::User.as_str() { Self::User } else { Self::Embedded }
    }

    /// As it is stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::User => "user",
        }
    }
}

/// One change of the schema.
#[derive(Debug, Clone)]
pub struct Migration {
    /// `YYYY-MM-DD-NN-name`.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
    /// The SQL that makes the change.
    pub up: String,
    /// The SQL that takes it back.
    pub down: String,
}

impl Migration {
    /// SHA-256 of both directions, in hexadecimal.
    #[must_use]
    pub fn checksum(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update(&self.up);
        hasher.update([0]);
        hasher.update(&self.down);
        hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What taking it back loses for good, as its `down` file says in lines `-- loses: …`.
    pub fn losses(&self) -> impl Iterator<Item = &str> {
        self.down.lines().filter_map(|line| line.strip_prefix("-- loses:")).map(str::trim)
    }
}

/// A migration that the database has seen.
#[derive(Debug, Clone)]
pub struct Applied {
    /// Its name.
    pub name: String,
    /// Where it came from.
    pub source: Source,
    /// Its checksum when it was applied.
    pub checksum: String,
    /// Migrations that one command applied share a number.
    pub batch: i64,
    /// When.
    pub applied_at: Timestamp,
}

/// What a database holds before anything is done to it.
#[derive(Debug)]
pub(super) enum Contents {
    /// Ours, or nothing yet.
    Ours(Ours),
    /// The Node service's tables.
    NodeService,
    /// Somebody else's table of one of our names.
    Foreign(&'static str),
}

/// What is known of a database of ours.
#[derive(Debug, Default)]
pub(super) struct Ours {
    /// The migrations applied so far, in that order.
    pub applied: Vec<Applied>,
    /// Whether its first rows were the Node service's, whose tables the first migration then gives back.
    pub taken_over: bool,
}

/// What the runner needs of a store.
#[async_trait]
pub(super) trait MigrationDatabase: Send {
    /// Looks without changing anything.
    async fn contents(&mut self) -> Result<Contents, StoreError>;

    /// Whether the schema may be changed: what was acknowledged and is not in the tables yet must be known to
    /// find its way into those of this version.
    fn may_change(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Runs a migration's `up` and records it, in one transaction under the lock; false when another
    /// process has applied it meanwhile.
    async fn apply(
        &mut self,
        migration: &Migration,
        batch: i64,
        now: Timestamp,
    ) -> Result<bool, StoreError>;

    /// Runs a migration's `down` and forgets it, likewise; false when it is no longer applied.
    async fn revert(&mut self, migration: &Migration) -> Result<bool, StoreError>;
}

/// Why migrations do not run.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// See [`NODE_MIGRATION`].
    #[error(
        "this database was made by the Node PiSync and is left untouched: take it over with `pisync migrate up`, after a backup and a rehearsal with `pisync migrate up --dry-run` (see docs/coming-from-node.md)"
    )]
    NodeService,
    /// Not a database of ours.
    #[error(
        "the table {0} exists, but PiSync did not make it; use a database of its own, for instance another DB_NAME"
    )]
    Foreign(&'static str),
    /// Made by a later version.
    #[error(
        "the database is newer than this program: it has the migrations {}; run the newer version, or roll them back with it", .0.join(", ")
    )]
    Newer(Vec<String>),
    /// An applied migration's text has changed since.
    #[error(
        "the migration {0} was edited after it was applied; put its files back as they were and write a new migration instead"
    )]
    Edited(String),
    /// A user's migration cannot be rolled back without its file.
    #[error("the files of the applied migration {0} are missing from the migrations folder")]
    Missing(String),
    /// A file in the folder is not what it should be.
    #[error("{0}")]
    BadFile(String),
    /// Running one failed; it left nothing behind.
    #[error("migration {name} failed and was undone: {error}")]
    Run {
        /// Which.
        name: String,
        /// What the database said.
        error: StoreError,
    },
    /// The database cannot be reached or opened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// One line of `pisync migrate status`.
#[derive(Debug)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
    /// When it was applied; `None` while it is pending.
    pub applied_at: Option<Timestamp>,
    /// What is wrong with it, if anything.
    pub problem: Option<&'static str>,
}

/// Runs migrations on one database.
pub struct Migrator {
    known: Vec<Migration>,
    database: Box<dyn MigrationDatabase>,
}

impl Migrator {
    /// Prepares to work on `target`, with the users' migrations from `folder` if it exists.
    ///
    /// # Errors
    /// When the folder has files that are not pairs of migrations, or PostgreSQL cannot be reached.
    pub async fn new(target: &Target, folder: &Path) -> Result<Self, MigrationError> {
        let (embedded, database): (_, Box<dyn MigrationDatabase>) = match target {
            Target::Sqlite(path) => (embedded(SQLITE), Box::new(SqliteMigrations::new(path))),
            Target::Postgres(postgres) => {
                let database = PostgresMigrations::connect(postgres).await?;
                (embedded_for_postgres(), Box::new(database))
            }
        };
        let users = read_folder(folder)?;
        let is_taken = |user: &&Migration| embedded.iter().any(|own| own.name == user.name);
        if let Some(taken) = users.iter().find(is_taken) {
            // It would count as applied without ever having run.
            return Err(MigrationError::BadFile(format!(
                "{}: PiSync has a migration of this name itself; give yours another",
                folder.join(&taken.name).display()
            )));
        }
        let known = embedded.into_iter().chain(users).collect();
        Ok(Self { known, database })
    }

    /// What is applied, in that order, then what is pending.
    ///
    /// # Errors
    /// When the database is not ours or cannot be read. Edited and missing migrations are no errors
    /// here but [`Status::problem`]s.
    pub async fn status(&mut self) -> Result<Vec<Status>, MigrationError> {
        let applied = self.ours().await?.applied;
        let pending = self.pending(&applied);
        let describe = |applied: &Applied| Status {
            name: applied.name.clone(),
            source: applied.source,
            applied_at: Some(applied.applied_at),
            problem: match self.find(applied) {
                Some(known) if known.checksum() != applied.checksum => Some("edited since"),
                Some(_) => None,
                None if applied.source == Source::Embedded => Some("from a newer version"),
                None => Some("files missing"),
            },
        };
        let waiting = pending.iter().map(|migration| Status {
            name: migration.name.clone(),
            source: migration.source,
            applied_at: None,
            problem: None,
        });
        Ok(applied.iter().map(describe).chain(waiting).collect())
    }

    /// The names of the migrations that are still to run.
    ///
    /// # Errors
    /// When the database is not ours, newer than this program, or has edited migrations.
    pub async fn check(&mut self) -> Result<Vec<String>, MigrationError> {
        let applied = self.checked().await?.applied;
        Ok(self.pending(&applied).into_iter().map(|migration| migration.name).collect())
    }

    /// Applies what is pending and returns the names.
    ///
    /// # Errors
    /// As [`Self::check`], or when one fails; those before it stay applied.
    pub async fn up(&mut self, now: Timestamp) -> Result<Vec<String>, MigrationError> {
        let applied = self.checked().await?.applied;
        let batch = applied.iter().map(|applied| applied.batch).max().unwrap_or(0) + 1;
        let mut done = Vec::new();
        for migration in self.pending(&applied) {
            self.database.may_change()?;
            let result = self.database.apply(&migration, batch, now).await;
            if result.map_err(|error| failure(&migration.name, error))? {
                done.push(migration.name);
            }
        }
        Ok(done)
    }

    /// The last `count` applied migrations, latest first: what [`Self::down`] would take back.
    ///
    /// # Errors
    /// As [`Self::check`], or when a user's migration among them has no files any more.
    pub async fn last(&mut self, count: usize) -> Result<Vec<Migration>, MigrationError> {
        let ours = self.checked().await?;
        self.files_of(&ours, |_| true, count)
    }

    /// All migrations that the last `up` applied, latest first.
    ///
    /// # Errors
    /// As [`Self::last`].
    pub async fn last_batch(&mut self) -> Result<Vec<Migration>, MigrationError> {
        let ours = self.checked().await?;
        let batch = ours.applied.last().map(|last| last.batch);
        self.files_of(&ours, |applied| Some(applied.batch) == batch, usize::MAX)
    }

    /// Takes migrations back in the order given and returns the names.
    ///
    /// # Errors
    /// When one fails; those before it stay taken back.
    pub async fn down(&mut self, migrations: &[Migration]) -> Result<Vec<String>, MigrationError> {
        let mut done = Vec::new();
        for migration in migrations {
            self.database.may_change()?;
            let result = self.database.revert(migration).await;
            if result.map_err(|error| failure(&migration.name, error))? {
                done.push(migration.name.clone());
            }
        }
        Ok(done)
    }

    async fn ours(&mut self) -> Result<Ours, MigrationError> {
        match self.database.contents().await? {
            Contents::Ours(ours) => Ok(ours),
            Contents::NodeService => Err(MigrationError::NodeService),
            Contents::Foreign(table) => Err(MigrationError::Foreign(table)),
        }
    }

    /// What is applied, when all of it is known and unchanged.
    async fn checked(&mut self) -> Result<Ours, MigrationError> {
        let ours = self.ours().await?;
        let applied = &ours.applied;
        let newer: Vec<_> = applied
            .iter()
            .filter(|applied| applied.source == Source::Embedded && self.find(applied).is_none())
            .map(|applied| applied.name.clone())
            .collect();
        if !newer.is_empty() {
            return Err(MigrationError::Newer(newer));
        }
        for applied in applied {
            if self.find(applied).is_some_and(|known| known.checksum() != applied.checksum) {
                return Err(MigrationError::Edited(applied.name.clone()));
            }
        }
        Ok(ours)
    }

    fn pending(&self, applied: &[Applied]) -> Vec<Migration> {
        let is_applied = |known: &Migration| {
            applied.iter().any(|one| one.source == known.source && one.name == known.name)
        };
        self.known.iter().filter(|known| !is_applied(known)).cloned().collect()
    }

    fn find(&self, applied: &Applied) -> Option<&Migration> {
        self.known.iter().find(|known| known.source == applied.source && known.name == applied.name)
    }

    /// The latest `count` applied migrations that are `wanted`, latest first, up to one that is not.
    fn files_of(
        &self,
        ours: &Ours,
        wanted: impl Fn(&Applied) -> bool,
        count: usize,
    ) -> Result<Vec<Migration>, MigrationError> {
        let latest = ours.applied.iter().enumerate().rev();
        let latest = latest.take_while(|(_, applied)| wanted(applied)).take(count);
        let with_files = latest.map(|(position, applied)| {
            let known = self.find(applied).cloned();
            let known = known.ok_or_else(|| MigrationError::Missing(applied.name.clone()))?;
            if position == 0 && ours.taken_over {
                return Ok(Migration { down: GIVE_BACK.to_owned(), ..known });
            }
            Ok(known)
        });
        with_files.collect()
    }
}

fn failure(name: &str, error: StoreError) -> MigrationError {
    match error {
        unavailable @ StoreError::Unavailable(_) => MigrationError::Store(unavailable),
        error => MigrationError::Run { name: name.to_owned(), error },
    }
}

/// Makes an empty pair of files for a migration of the user's own and returns their paths.
///
/// # Errors
/// When the name has other characters than letters, digits and hyphens, or a file cannot be made.
pub fn create_pair(
    folder: &Path,
    name: &str,
    now: Timestamp,
) -> Result<[PathBuf; 2], MigrationError> {
    let plain = |character: char| character.is_ascii_alphanumeric() || character == '-';
    if name.is_empty() || !name.chars().all(plain) {
        return Err(MigrationError::BadFile(format!(
            "{name:?} is no name for a migration: use letters, digits and hyphens, for instance add-site-column"
        )));
    }
    let date = &now.to_string()[..10];
    let taken = read_folder(folder)?;
    let number = (1..100)
        .map(|number| format!("{date}-{number:02}-"))
        .find(|prefix| !taken.iter().any(|migration| migration.name.starts_with(prefix)))
        .ok_or_else(|| MigrationError::BadFile(format!("99 migrations on {date} are enough")))?;
    let cannot = |path: &Path, error: std::io::Error| {
        MigrationError::BadFile(format!("cannot create {}: {error}", path.display()))
    };
    std::fs::create_dir_all(folder).map_err(|error| cannot(folder, error))?;
    let files = [
        (format!("{number}{name}.up.sql"), "-- What this migration changes.\n"),
        (
            format!("{number}{name}.down.sql"),
            "-- Takes it back. If that loses data, say what, in a line of this form:\n-- loses: nothing\n",
        ),
    ];
    let mut paths = [PathBuf::new(), PathBuf::new()];
    for (path, (file, text)) in paths.iter_mut().zip(files) {
        *path = folder.join(file);
        // Only where there is nothing yet, not even a link.
        std::fs::File::create_new(&*path)
            .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
            .map_err(|error| cannot(path, error))?;
    }
    Ok(paths)
}

/// The users' migrations in `folder`, by name; none when there is no such folder.
fn read_folder(folder: &Path) -> Result<Vec<Migration>, MigrationError> {
    let bad = |path: &Path, why: &dyn std::fmt::Display| {
        MigrationError::BadFile(format!("{}: {why}", path.display()))
    };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(bad(folder, &error)),
    };
    // By name, each direction's text.
    let mut texts: BTreeMap<String, HashMap<&'static str, String>> = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(|error| bad(folder, &error))?.path();
        let Some(file) = path.file_name().and_then(|file| file.to_str()) else { continue };
        // Other files, such as a README, may stand beside.
        if !file.ends_with(".sql") {
            continue;
        }
        let Some((name, direction)) = parse_file_name(file) else {
            return Err(bad(
                &path,
                &"not named like a migration: YYYY-MM-DD-NN-name.up.sql or .down.sql",
            ));
        };
        let text = std::fs::read_to_string(&path).map_err(|error| bad(&path, &error))?;
        texts.entry(name.to_owned()).or_default().insert(direction, text);
    }
    texts
        .into_iter()
        .map(|(name, mut directions)| {
            let mut take = |direction: &str| {
                directions.remove(direction).ok_or_else(|| {
                    bad(&folder.join(&name), &format!("{name}.{direction}.sql is missing"))
                })
            };
            let (up, down) = (take("up")?, take("down")?);
            Ok(Migration { name, source: Source::User, up, down })
        })
        .collect()
}

/// Splits `YYYY-MM-DD-NN-name.up.sql` into name and direction.
fn parse_file_name(file: &str) -> Option<(&str, &'static str)> {
    let (name, direction) = match file.strip_suffix(".up.sql") {
        Some(name) => (name, "up"),
        None => (file.strip_suffix(".down.sql")?, "down"),
    };
    let form = "0000-00-00-00-";
    let fits = name.len() > form.len()
        && form.bytes().zip(name.bytes()).all(|(form, byte)| match form {
            b'0' => byte.is_ascii_digit(),
            other => byte == other,
        });
    fits.then_some((name, direction))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_embedded_file_is_listed_and_every_down_says_what_it_loses() {
        for (folder, listed) in [("sqlite", SQLITE), ("postgres", POSTGRES)] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(folder);
            let on_disk: Vec<_> =
                read_folder(&path).unwrap().into_iter().map(|migration| migration.name).collect();
            let names: Vec<_> = listed.iter().map(|(name, ..)| *name).collect();
            assert_eq!(names, on_disk);
            for (name, _, down) in listed {
                assert!(down.contains("-- loses: "), "{name}");
            }
        }
    }

    #[test]
    fn file_names() {
        assert_eq!(parse_file_name("2026-11-22-01-a-b.up.sql"), Some(("2026-11-22-01-a-b", "up")));
        for file in
            ["x.up.sql", "2026-11-22-01-.up.sql", "2026-11-22-x1-a.up.sql", "2026-11-22-01-a.sql"]
        {
            assert_eq!(parse_file_name(file), None, "{file}");
        }
    }
}
