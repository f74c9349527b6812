//! Copies a database table by table, and compares the copy with what was read. `pisync copy` calls it.

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

/// How far copying has come.
#[derive(Debug, Clone, Copy)]
pub enum CopyProgress {
    /// A table is begun.
    Table {
        /// Its name.
        name: &'static str,
        /// Whether it is being compared, rather than copied.
        comparing: bool,
        /// How many rows it has; of sums, about so many.
        rows: u64,
    },
    /// So many more rows of it are done.
    Rows(u64),
    /// All of them are done: so many.
    Done(u64),
}

/// What was copied.
#[derive(Debug)]
pub struct Copied {
    /// Rows by the names of their tables.
    pub rows: BTreeMap<&'static str, u64>,
    /// Tables and columns of the source that are not PiSync's, and were not copied.
    pub left_out: Vec<String>,
}

/// Why nothing was copied: the destination is as it was, but for an empty schema that it may have got.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// There and back are the same.
    #[error("{0} cannot be copied to itself")]
    Same(String),
    /// The source is not a database that can be copied.
    #[error("{0}")]
    Source(String),
    /// There is something in the destination.
    #[error("{0} is not empty: {1} has rows; name a database that has not been used yet")]
    NotEmpty(String, &'static str),
    /// A side failed, with what it is called.
    #[error("{database}: {error}")]
    Store {
        /// Which.
        database: String,
        /// What it said.
        error: StoreError,
    },
    /// The destination's schema is somebody else's, newer, or cannot be made.
    #[error("{database}: {error}")]
    Migration {
        /// Which.
        database: String,
        /// What is wrong.
        error: MigrationError,
    },
    /// What was written is not what was read.
    #[error(
        "the copy of the table {table} differs from it ({read} rows were read, {found} are there); nothing was kept of the copy"
    )]
    Differs {
        /// Which.
        table: &'static str,
        /// Rows of the source.
        read: u64,
        /// Rows of the destination.
        found: u64,
    },
}

/// Copies everything from one database, as it is at this moment, into an empty one, and compares the two.
/// `now` is that moment. Servers may go on using the source.
///
/// # Errors
/// When the source is not whole, the destination is not empty or is in use, or the two differ in the end.
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
    let left_out = source.left_out().await.map_err(at(from))?;
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
    Ok(Copied { rows, left_out })
}

/// What both ends are called, and what is agreed between them.
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
            // Before there are rows: a server that starts meanwhile gets its ids from behind them.
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
            // Other programs may have written ids that the database never gave.
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

/// The columns that can be copied: SQLite has no place for some.
fn kept_columns(table: &'static Table, destination: &dyn CopyWriter) -> Vec<&'static Column> {
    table.columns.iter().filter(|column| destination.keeps(table, column)).collect()
}

/// Says at which end it happened.
fn at(target: &Target) -> impl Fn(StoreError) -> CopyError {
    move |error| CopyError::Store { database: target.to_string(), error }
}

fn is_same(from: &Target, to: &Target) -> bool {
    match (from, to) {
        (Target::Sqlite(from), Target::Sqlite(to)) => sqlite::files::is_same_file(from, to),
        // One server under two names is found out by the destination's not being empty.
        (Target::Postgres(from), Target::Postgres(to)) => from.to_string() == to.to_string(),
        _ => false,
    }
}

/// Nothing is migrated that others are using: the source must be of this version.
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
        return Err(CopyError::Source(format!("{from} is not a PiSync database")));
    }
    if !pending.is_empty() {
        return Err(CopyError::Source(format!(
            "{from} has pending migrations: {}; run `pisync migrate up` on it first",
            pending.join(", ")
        )));
    }
    Ok(())
}

/// With PiSync's own migrations alone: users' are in one store's SQL, and `migrate up` runs them later.
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

/// An empty database with the newest schema, which nobody else is going to use until it is filled.
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
                // Somebody else's database, or a newer one, has a better message.
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
