//! Backups of an SQLite database: into one file, and back from it. `pisync backup` and `pisync restore` call it.
//! PostgreSQL has its own tools for this, so here it is only refused, with the command to use.

use std::path::{Path, PathBuf};

use super::{BackedUp, StoreError, Target, apply_journal, migrations::Migrator, postgres, sqlite};

/// The result of restoring a backup.
#[derive(Debug)]
pub struct Restored {
    /// What the backup holds.
    pub holds: BackedUp,
    /// Migrations that a server's next start applies to it.
    pub pending: Vec<String>,
    /// Where the database that was replaced is kept.
    pub replaced: Option<PathBuf>,
}

/// Copies the database, as it is at this moment, into `file`, even while others use it. The file is checked and on the
/// disk before it gets its name. `overwrite` tells whether it may replace another file.
///
/// # Errors
/// When the file cannot be made; nothing is left behind. On PostgreSQL always, with the command to use there.
pub fn backup(target: &Target, file: &Path, overwrite: bool) -> Result<BackedUp, StoreError> {
    let database = match target {
        Target::Sqlite(database) => database,
        Target::Postgres(target) => {
            return Err(StoreError::Failed(postgres::dump_instead(target, file)));
        }
    };
    if file.is_dir() {
        return Err(StoreError::Failed(format!("{} is a folder; name a file", file.display())));
    }
    sqlite::files::check_is_not_ours(database, file)?;
    if file.exists() && !overwrite {
        return Err(sqlite::backup::exists(file));
    }
    sqlite::files::check_exists(database)?;
    apply_journal(target)?;
    let copy = sqlite::backup::Copy::make(&sqlite::files::resolve(database)?, file)?;
    let holds = copy.holds;
    copy.put_at(file, overwrite)?;
    Ok(holds)
}

/// Puts a copy of the backup `file` in the place of the database, which no server may be using. `overwrite` tells
/// whether there may be a database already. User migrations are looked for in `migrations`.
///
/// # Errors
/// When `file` is not a complete database of this version or an earlier one, or the database is in use. The database
/// then stays as it was. On PostgreSQL always, with the command to use there.
pub async fn restore(
    target: &Target,
    file: &Path,
    overwrite: bool,
    migrations: &Path,
) -> Result<Restored, StoreError> {
    let database = match target {
        Target::Sqlite(database) => database,
        Target::Postgres(target) => {
            return Err(StoreError::Failed(postgres::restore_instead(target, file)));
        }
    };
    if !file.is_file() {
        return Err(StoreError::Failed(format!(
            "there is no backup file {}; name one that `pisync backup` wrote",
            file.display()
        )));
    }
    if sqlite::files::is_same_file(file, database) {
        return Err(StoreError::Failed(format!(
            "{} is the database itself; name a file that `pisync backup` wrote",
            file.display()
        )));
    }
    if sqlite::files::holds_something(database) && !overwrite {
        return Err(sqlite::backup::exists(database));
    }
    // The replaced database is kept, and must be complete. It may be replaced because it is damaged.
    let applied = apply_journal(target);
    let claim = sqlite::claim::Claim::take(database)?;
    if let Err(error) = applied {
        tracing::warn!(%error, "the ingest journal of the database that is replaced cannot be applied");
    }
    // A symbolic link continues to lead to the same place.
    let database = claim.database();
    if let Ok(Some((lost, kept))) = sqlite::log_check::salvage(database) {
        tracing::warn!(file = %kept.display(), "{lost}; the damaged file is kept");
    }
    let copy = sqlite::backup::Copy::make(file, database)?;
    let pending = pending(copy.path(), migrations)
        .await
        .map_err(|problem| StoreError::Failed(format!("{}: {problem}", file.display())))?;
    let holds = copy.holds;
    let replaced = copy.replace(database)?;
    Ok(Restored { holds, pending, replaced })
}

/// The migrations that a server would apply to the database at `path`.
async fn pending(path: &Path, migrations: &Path) -> Result<Vec<String>, String> {
    let target = Target::Sqlite(path.to_owned());
    let mut migrator =
        Migrator::new(&target, migrations).await.map_err(|error| error.to_string())?;
    let pending = migrator.check().await.map_err(|error| error.to_string())?;
    let status = migrator.status().await.map_err(|error| error.to_string())?;
    if status.iter().all(|migration| migration.applied_at.is_none()) {
        return Err("not a PiSync database".to_owned());
    }
    Ok(pending)
}
