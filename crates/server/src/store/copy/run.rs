//! Copies a database table by table, and compares the copy with what was read. `pisync copy` calls it. It must never
//! change the source, nor a destination that is not empty.

use std::{collections::BTreeMap, path::Path};

use pisync_core::Timestamp;

use super::{
    checksum::{Checksum, cut_times},
    sides::{CopyReader, CopyWriter, Selection, Sums},
    tables::{Column, Rows, TABLES, Table, Value},
};
use crate::store::{
    StoreError, Target,
    migrations::{MigrationError, Migrator},
    postgres, sqlite,
};

/// The progress of a copy.
#[derive(Debug, Clone, Copy)]
pub enum CopyProgress {
    /// A table is begun.
    Table {
        /// Its name.
        name: &'static str,
        /// Whether the table is being compared rather than copied.
        comparing: bool,
        /// How many rows it has; for sums, about how many.
        rows: u64,
    },
    /// This many more rows of the table are done.
    Rows(u64),
    /// All rows of the table are done; this is their number.
    Done(u64),
}

/// What was copied.
#[derive(Debug)]
pub struct Copied {
    /// Rows by the names of their tables.
    pub rows: BTreeMap<&'static str, u64>,
    /// Tables and columns of the source that are not PiSync's. They were not copied.
    pub unknown: Vec<String>,
}

/// Why nothing was copied. The destination is as it was, except that it may have got an empty schema.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Source and destination are the same.
    #[error("{0} cannot be copied to itself; name another database with --to")]
    Same(String),
    /// The source is not a database that can be copied.
    #[error("{0}")]
    Source(String),
    /// The destination is not empty.
    #[error("{0} is not empty: {1} has rows; name a database that has not been used yet")]
    NotEmpty(String, &'static str),
    /// A side failed.
    #[error("{database}: {error}")]
    Store {
        /// The name of that side's database.
        database: String,
        /// The store's error.
        error: StoreError,
    },
    /// The destination's schema belongs to another program, is newer, or cannot be made.
    #[error("{database}: {error}")]
    Migration {
        /// The destination.
        database: String,
        /// What is wrong.
        error: MigrationError,
    },
    /// The rows that were written differ from those that were read.
    #[error(
        "the copy of the table {table} differs from it ({read} rows were read, {found} are there); nothing was kept of the copy"
    )]
    Differs {
        /// The table.
        table: &'static str,
        /// Number of rows in the source.
        read: u64,
        /// Number of rows in the destination.
        found: u64,
    },
}

/// Copies everything from one database, as it is at this moment, into an empty one, and compares the two. `now` is that
/// moment. Servers may continue to use the source.
///
/// # Errors
/// When the source is incomplete, the destination is not empty or is in use, or the two differ in the end.
pub async fn copy(
    from: &Target,
    to: &Target,
    now: Timestamp,
    report: &mut (dyn FnMut(CopyProgress) + Send),
) -> Result<Copied, CopyError> {
    if is_same(from, to) {
        return Err(CopyError::Same(from.to_string()));
    }
    check_source(from).await?;
    let source = open_source(from).await.map_err(at(from))?;
    let unknown = source.unknown().await.map_err(at(from))?;
    let mut destination = open_destination(to, now).await?;

    let sides = Sides { from, to, sums: destination.sums(now) };
    let mut copied = BTreeMap::new();
    for table in TABLES {
        let digest = sides.copy_table(table, &*source, &mut *destination, report).await?;
        copied.insert(table.name, digest);
    }
    drop(source);
    for table in TABLES {
        sides.compare(table, copied[table.name], &*destination, report).await?;
    }
    destination.finish(sides.sums).await.map_err(at(to))?;
    let rows = copied.into_iter().map(|(name, digest)| (name, digest.rows)).collect();
    Ok(Copied { rows, unknown })
}

/// The names of both sides, and which events the sums are of.
struct Sides<'a> {
    from: &'a Target,
    to: &'a Target,
    sums: Sums,
}

impl Sides<'_> {
    async fn copy_table(
        &self,
        table: &'static Table,
        source: &dyn CopyReader,
        destination: &mut dyn CopyWriter,
        report: &mut (dyn FnMut(CopyProgress) + Send),
    ) -> Result<Checksum, CopyError> {
        let expected = source.count(table).await.map_err(at(self.from))?;
        report(CopyProgress::Table { name: table.name, comparing: false, rows: expected });
        let mut last_id = 0;
        if table.rows == Rows::Numbered {
            // Set before there are rows: a server that starts meanwhile gets higher ids.
            last_id = source.last_id(table).await.map_err(at(self.from))?;
            destination.set_last_id(table, last_id).await.map_err(at(self.to))?;
        }
        let columns = kept_columns(table, destination);
        let selection = Selection { table, columns: columns.clone(), sums: self.sums };
        let time_step = destination.time_step();
        let mut checksum = Checksum::default();
        let mut stream = source.rows(selection);
        while let Some(mut rows) = stream.next().await.map_err(at(self.from))? {
            for row in &mut rows {
                cut_times(row, &columns, time_step);
                checksum.add(row);
                if let (Rows::Numbered, Some(Value::Integer(id))) = (table.rows, row.first()) {
                    last_id = last_id.max(*id);
                }
            }
            let count = rows.len() as u64;
            destination.write(table, &columns, rows).await.map_err(at(self.to))?;
            report(CopyProgress::Rows(count));
        }
        if table.rows == Rows::Numbered {
            // Other programs may have written ids that the database never assigned.
            destination.set_last_id(table, last_id).await.map_err(at(self.to))?;
        }
        // Events that were not aggregated yet may have added days and hours.
        if table.rows != Rows::Sums && checksum.rows != expected {
            let (read, found) = (expected, checksum.rows);
            return Err(CopyError::Differs { table: table.name, read, found });
        }
        report(CopyProgress::Done(checksum.rows));
        Ok(checksum)
    }

    /// Reads what was written, and compares it with what was read.
    async fn compare(
        &self,
        table: &'static Table,
        copied: Checksum,
        destination: &dyn CopyWriter,
        report: &mut (dyn FnMut(CopyProgress) + Send),
    ) -> Result<(), CopyError> {
        report(CopyProgress::Table { name: table.name, comparing: true, rows: copied.rows });
        let columns = kept_columns(table, destination);
        let mut found = Checksum::default();
        let mut stream = destination.rows(Selection { table, columns, sums: Sums::Stored });
        while let Some(rows) = stream.next().await.map_err(at(self.to))? {
            rows.iter().for_each(|row| found.add(row));
            report(CopyProgress::Rows(rows.len() as u64));
        }
        if found != copied {
            let (read, found) = (copied.rows, found.rows);
            return Err(CopyError::Differs { table: table.name, read, found });
        }
        report(CopyProgress::Done(found.rows));
        Ok(())
    }
}

/// The columns that the destination can hold. SQLite lacks some.
fn kept_columns(table: &'static Table, destination: &dyn CopyWriter) -> Vec<&'static Column> {
    table.columns.iter().filter(|column| destination.keeps(table, column)).collect()
}

/// Adds the name of the database to an error.
fn at(target: &Target) -> impl Fn(StoreError) -> CopyError {
    move |error| CopyError::Store { database: target.to_string(), error }
}

fn is_same(from: &Target, to: &Target) -> bool {
    match (from, to) {
        (Target::Sqlite(from), Target::Sqlite(to)) => sqlite::files::is_same_file(from, to),
        // One server under two names is noticed later, because the destination is not empty.
        (Target::Postgres(from), Target::Postgres(to)) => from.to_string() == to.to_string(),
        _ => false,
    }
}

/// Checks that the source has this version's schema. It is never migrated here, because others may be using it.
async fn check_source(from: &Target) -> Result<(), CopyError> {
    if let Target::Sqlite(path) = from
        && !path.is_file()
    {
        return Err(CopyError::Source(format!(
            "no database at {}; name the file of one behind --from",
            path.display()
        )));
    }
    let mut migrator = migrator(from).await?;
    let wrong = |error| CopyError::Migration { database: from.to_string(), error };
    let pending = migrator.check().await.map_err(wrong)?;
    let status = migrator.status().await.map_err(wrong)?;
    if status.iter().all(|migration| migration.applied_at.is_none()) {
        return Err(CopyError::Source(format!(
            "{from} is not a PiSync database; name another with --from"
        )));
    }
    if !pending.is_empty() {
        return Err(CopyError::Source(format!(
            "{from} has pending migrations: {}; run `pisync migrate up` on it first",
            pending.join(", ")
        )));
    }
    Ok(())
}

/// Applies PiSync's own migrations alone. Users' migrations are in one store's SQL; `migrate up` runs them later.
async fn migrator(target: &Target) -> Result<Migrator, CopyError> {
    Migrator::new(target, Path::new(""))
        .await
        .map_err(|error| CopyError::Migration { database: target.to_string(), error })
}

async fn open_source(from: &Target) -> Result<Box<dyn CopyReader>, StoreError> {
    Ok(match from {
        Target::Sqlite(path) => {
            sqlite::journal_commands::apply_journal(path)?;
            Box::new(sqlite::copy::SqliteCopyReader::open(path)?)
        }
        Target::Postgres(target) => {
            Box::new(postgres::copy::PostgresCopyReader::open(target).await?)
        }
    })
}

/// An empty database with the newest schema. Nobody else uses it until it is filled.
async fn open_destination(to: &Target, now: Timestamp) -> Result<Box<dyn CopyWriter>, CopyError> {
    let refused = |table| CopyError::NotEmpty(to.to_string(), table);
    match to {
        Target::Sqlite(path) => {
            let place = sqlite::copy::Place::claim(path).map_err(at(to))?;
            if path.exists() {
                migrator(to)
                    .await?
                    .check()
                    .await
                    .map_err(|error| CopyError::Migration { database: to.to_string(), error })?;
                if let Some(table) = place.first_filled_table().map_err(at(to))? {
                    return Err(refused(table));
                }
            }
            migrate(&Target::Sqlite(place.path().to_owned()), now).await?;
            Ok(Box::new(sqlite::copy::SqliteCopyWriter::open(place).map_err(at(to))?))
        }
        Target::Postgres(target) => {
            if let Some(table) = postgres::copy::first_filled_table(target).await.map_err(at(to))? {
                // A database that is newer or belongs to another program has a better message.
                migrator(to)
                    .await?
                    .check()
                    .await
                    .map_err(|error| CopyError::Migration { database: to.to_string(), error })?;
                return Err(refused(table));
            }
            migrate(to, now).await?;
            let opened = postgres::copy::PostgresCopyWriter::open(target, now).await;
            match opened.map_err(at(to))? {
                Ok(writer) => Ok(Box::new(writer)),
                Err(table) => Err(refused(table)),
            }
        }
    }
}

async fn migrate(target: &Target, now: Timestamp) -> Result<(), CopyError> {
    let migrated = migrator(target).await?.up(now).await;
    migrated
        .map(|_| ())
        .map_err(|error| CopyError::Migration { database: target.to_string(), error })
}
