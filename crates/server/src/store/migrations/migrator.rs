//! Runs migrations on one database. Servers at their start and `pisync migrate` call it. It must change nothing in a
//! database that is newer, edited, or not ours.

use std::path::Path;

use pisync_core::Timestamp;

use super::{
    embedded::{GIVE_BACK, embedded_for_postgres, embedded_for_sqlite},
    folder::read_folder,
    migration::{Applied, Contents, Migration, MigrationDatabase, MigrationError, Ours, Source},
};
use crate::store::{StoreError, Target, postgres::PostgresMigrations, sqlite::SqliteMigrations};

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
    /// Prepares to work on `target`. The users' migrations come from `folder`, if it exists.
    ///
    /// # Errors
    /// When the folder has files that are not pairs of migrations, or PostgreSQL cannot be reached.
    pub async fn new(target: &Target, folder: &Path) -> Result<Self, MigrationError> {
        let (embedded, database): (_, Box<dyn MigrationDatabase>) = match target {
            Target::Sqlite(path) => (embedded_for_sqlite(), Box::new(SqliteMigrations::new(path))),
            Target::Postgres(postgres) => {
                let database = PostgresMigrations::connect(postgres).await?;
                (embedded_for_postgres(), Box::new(database))
            }
        };
        let users = read_folder(folder)?;
        let is_taken = |user: &&Migration| embedded.iter().any(|own| own.name == user.name);
        if let Some(taken) = users.iter().find(is_taken) {
            // Otherwise it would count as applied without ever having run.
            return Err(MigrationError::BadFile(format!(
                "{}: PiSync has a migration of this name itself; give yours another",
                folder.join(&taken.name).display()
            )));
        }
        let known = embedded.into_iter().chain(users).collect();
        Ok(Self { known, database })
    }

    /// The applied migrations in order, then the pending ones.
    ///
    /// # Errors
    /// When the database is not ours or cannot be read. Edited and missing migrations are reported as
    /// [`Status::problem`], not as errors.
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

    /// The names of the pending migrations.
    ///
    /// # Errors
    /// When the database is not ours, is newer than this program, or has edited migrations.
    pub async fn check(&mut self) -> Result<Vec<String>, MigrationError> {
        let applied = self.checked().await?.applied;
        Ok(self.pending(&applied).into_iter().map(|migration| migration.name).collect())
    }

    /// Applies the pending migrations and answers their names.
    ///
    /// # Errors
    /// The errors of [`Self::check`], or when a migration fails. Those before it stay applied.
    pub async fn up(&mut self, now: Timestamp) -> Result<Vec<String>, MigrationError> {
        let applied = self.checked().await?.applied;
        let batch = applied.iter().map(|applied| applied.batch).max().unwrap_or(0) + 1;
        let mut done = Vec::new();
        let mut before: Vec<_> = applied.iter().map(|applied| applied.name.clone()).collect();
        for migration in self.pending(&applied) {
            self.database.may_change()?;
            let result = self.database.apply(&migration, &before, batch, now).await;
            if result.map_err(|error| failure(&migration.name, error))? {
                done.push(migration.name.clone());
            }
            before.push(migration.name);
        }
        Ok(done)
    }

    /// The last `count` applied migrations, latest first: what [`Self::down`] would roll back.
    ///
    /// # Errors
    /// The errors of [`Self::check`], or when a user's migration among them has no files any more.
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

    /// Rolls migrations back in the given order and answers their names.
    ///
    /// # Errors
    /// When a migration fails. Those before it stay rolled back.
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

    /// The applied migrations, if all of them are known and unchanged.
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

    /// The latest `count` applied migrations, latest first, up to the first that is not `wanted`.
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
