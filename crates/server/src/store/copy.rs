//! A whole database copied into another, whichever store each is in. Here alone is said what there is to
//! copy, in a form of rows that is the same for both stores, and here alone the two sides are compared;
//! the stores only read and write such rows.
//!
//! The source is read as of one moment, beside its servers. The destination is filled out of everybody's
//! sight and appears as a whole, or not at all: there is no half a copy to go on with or to clear away.

use std::{collections::BTreeMap, path::Path};

use async_trait::async_trait;
use pisync_core::Timestamp;
use sha2::{Digest, Sha256};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    StoreError, Target,
    migrations::{MigrationError, Migrator},
    postgres, sqlite,
};

/// Rows that are passed on at a time: one COPY on PostgreSQL, one turn of a thread on SQLite, and some
/// megabytes at the most, for metadata is at most 4 KiB.
pub(super) const BATCH_ROWS: usize = 4_096;

/// Batches that may wait between reading and writing, so that neither waits for each step of the other.
const WAITING_BATCHES: usize = 2;

/// How a column's values look in a [`Row`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An integer.
    Integer,
    /// An integer that PostgreSQL keeps in 32 bits.
    Integer32,
    /// A text.
    Text,
    /// Bytes.
    Bytes,
    /// Microseconds since 2000-01-01T00:00Z, as PostgreSQL counts them.
    Time,
    /// Days since 1970-01-01.
    Day,
    /// A decimal fraction, in units of this many decimals.
    Decimal(u32),
    /// 1 for yes, 0 for no.
    Boolean,
}

/// A column, by its name on PostgreSQL.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

/// A table, which has the same name in both stores.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) columns: &'static [Column],
    pub(super) rows: Rows,
}

/// What kind of rows a table has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// Nothing special.
    Plain,
    /// Their first column is an id that is never given twice.
    Numbered,
    /// Sums of events, which are to be in step with what is folded.
    Sums,
    /// There is one, which migrations have made.
    Single,
}

const fn table(name: &'static str, rows: Rows, columns: &'static [Column]) -> Table {
    Table { name, columns, rows }
}

const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind }
}

/// Everything that is copied, in an order in which each row finds what it refers to.
///
/// Left out are `pisync_migrations`, which the destination has of its own; `pisync_take_over`, for the copy
/// was never the Node service's; how far events are folded,
/// which the stores count differently (see [`Sums`]); and when the end of old events was announced, which
/// only concerns servers that are running.
pub(super) const TABLES: &[Table] = &[
    table(
        "devices",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("device_id", Kind::Text),
            column("created_at", Kind::Time),
            column("updated_at", Kind::Time),
            column("name", Kind::Text),
            column("group", Kind::Text),
        ],
    ),
    table(
        "device_jobs",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("job", Kind::Text),
            column("total_syncs", Kind::Integer),
            column("failed_syncs", Kind::Integer),
            column("total_files_synced", Kind::Integer),
            column("total_errors", Kind::Integer),
            column("speed_sum", Kind::Integer),
            column("speed_count", Kind::Integer),
            column("first_sync", Kind::Time),
            column("last_sync", Kind::Time),
            column("last_success", Kind::Time),
            column("last_failure", Kind::Time),
            column("consecutive_failures", Kind::Integer),
            column("last_received", Kind::Time),
            column("set_aside_until", Kind::Time),
        ],
    ),
    table(
        SYNC_EVENTS,
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("device_id", Kind::Text),
            column("timestamp", Kind::Time),
            column("total_files_synced", Kind::Integer32),
            column("total_errors", Kind::Integer32),
            column("internet_speed", Kind::Decimal(2)),
            column("created_at", Kind::Time),
            column("updated_at", Kind::Time),
            column("job", Kind::Text),
            column("duration_seconds", Kind::Decimal(3)),
            column("bytes_synced", Kind::Integer),
            column("metadata", Kind::Text),
            column("event_id", Kind::Text),
        ],
    ),
    table(
        "device_days",
        Rows::Sums,
        &[
            column("device_id", Kind::Text),
            column("day", Kind::Day),
            column("total_syncs", Kind::Integer),
            column("failed_syncs", Kind::Integer),
            column("total_files_synced", Kind::Integer),
            column("total_errors", Kind::Integer),
            column("speed_sum", Kind::Integer),
            column("speed_count", Kind::Integer),
        ],
    ),
    table(
        "fleet_hours",
        Rows::Sums,
        &[
            column("hour", Kind::Time),
            column("total_syncs", Kind::Integer),
            column("failed_syncs", Kind::Integer),
            column("total_files_synced", Kind::Integer),
            column("total_errors", Kind::Integer),
            column("speed_sum", Kind::Integer),
            column("speed_count", Kind::Integer),
        ],
    ),
    table(
        "roll_up_state",
        Rows::Single,
        &[column("raw_since", Kind::Time), column("streaks_since", Kind::Time)],
    ),
    table(
        "event_keys",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("event_id", Kind::Text),
            column("id", Kind::Integer),
            column("timestamp", Kind::Time),
            column("created_at", Kind::Time),
        ],
    ),
    table(
        "api_keys",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("hash", Kind::Bytes),
            column("hint", Kind::Text),
            column("name", Kind::Text),
            column("scope", Kind::Text),
            column("device_id", Kind::Text),
            column("group", Kind::Text),
            column("created_at", Kind::Time),
            column("expires_at", Kind::Time),
            column("revoked_at", Kind::Time),
            column("last_used", Kind::Time),
        ],
    ),
    table(
        "device_deletions",
        Rows::Plain,
        &[
            column("device_id", Kind::Text),
            column("received_until", Kind::Time),
            column("requested_at", Kind::Time),
            column("via", Kind::Text),
            column("key_id", Kind::Integer),
            column("address", Kind::Text),
            column("deleted_events", Kind::Integer),
        ],
    ),
    table("api_key_changes", Rows::Single, &[column("version", Kind::Integer)]),
    table(
        "audit_log",
        Rows::Numbered,
        &[
            column("id", Kind::Integer),
            column("at", Kind::Time),
            column("via", Kind::Text),
            column("key_id", Kind::Integer),
            column("address", Kind::Text),
            column("action", Kind::Text),
            column("subject", Kind::Text),
            column("details", Kind::Text),
        ],
    ),
    table(
        "imports",
        Rows::Plain,
        &[
            column("id", Kind::Bytes),
            column("name", Kind::Text),
            column("head", Kind::Bytes),
            column("records", Kind::Integer),
            column("digest", Kind::Bytes),
            column("rejected", Kind::Integer),
            column("finished", Kind::Boolean),
            column("updated_at", Kind::Time),
        ],
    ),
];

pub(super) const SYNC_EVENTS: &str = "sync_events";

/// What stands in a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    /// A number, or whatever [`Kind`] says it counts.
    Integer(i64),
    Text(String),
    Bytes(Vec<u8>),
}

/// A row's values, in the order of the columns that were asked for.
pub(super) type Row = Vec<Value>;

/// Of which events the sums by day and hour are to be. SQLite tells what is folded by ids, PostgreSQL by
/// receipt: so the source adds up what the destination is going to regard as folded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sums {
    /// Of those that are folded, as they are stored.
    Stored,
    /// Of all events.
    Everything,
    /// Of the events received until then.
    ReceivedUntil(Timestamp),
}

/// What to read.
#[derive(Debug, Clone)]
pub(super) struct Selection {
    pub(super) table: &'static Table,
    pub(super) columns: Vec<&'static Column>,
    pub(super) sums: Sums,
}

/// Rows on their way from where they are read. Whoever drops this ends the reading.
pub(super) struct RowStream {
    batches: mpsc::Receiver<Vec<Row>>,
    reading: JoinHandle<Result<(), StoreError>>,
}

impl RowStream {
    /// Begins what `read` starts, with the sender that it is given.
    pub(super) fn start(
        read: impl FnOnce(mpsc::Sender<Vec<Row>>) -> JoinHandle<Result<(), StoreError>>,
    ) -> Self {
        let (sender, batches) = mpsc::channel(WAITING_BATCHES);
        Self { batches, reading: read(sender) }
    }

    /// The next rows; `None` after the last, and not to be called again then.
    async fn next(&mut self) -> Result<Option<Vec<Row>>, StoreError> {
        if let Some(rows) = self.batches.recv().await {
            return Ok(Some(rows));
        }
        let ended = (&mut self.reading).await;
        ended
            .map_err(|error| StoreError::Failed(format!("reading failed: {error}")))?
            .map(|()| None)
    }
}

/// Reads a database as it is at one moment.
#[async_trait]
pub(super) trait CopyReader: Send + Sync {
    /// Tables and columns that are not PiSync's.
    async fn left_out(&self) -> Result<Vec<String>, StoreError>;

    /// How many rows a table has.
    async fn count(&self, table: &'static Table) -> Result<u64, StoreError>;

    /// The highest id that a row of a numbered table ever had, or any number between that and the next.
    async fn last_id(&self, table: &'static Table) -> Result<i64, StoreError>;

    /// A table's rows, in any order.
    fn rows(&self, selection: Selection) -> RowStream;
}

/// Fills a new database, and shows it at the end.
#[async_trait]
pub(super) trait CopyWriter: Send + Sync {
    /// Whether the store has this column.
    fn keeps(&self, table: &'static Table, column: &'static Column) -> bool;

    /// The smallest difference between two times, in microseconds.
    fn time_step(&self) -> i64;

    /// Of which events it needs the sums.
    fn sums(&self, now: Timestamp) -> Sums;

    /// Gives no id up to this one to anybody.
    async fn set_last_id(&self, table: &'static Table, id: i64) -> Result<(), StoreError>;

    /// A table's rows as they were written, in any order.
    fn rows(&self, selection: Selection) -> RowStream;

    /// Adds rows.
    async fn write(
        &mut self,
        table: &'static Table,
        columns: &[&'static Column],
        rows: Vec<Row>,
    ) -> Result<(), StoreError>;

    /// Shows everybody what was written, whose sums are of the events that `sums` says.
    async fn finish(self: Box<Self>, sums: Sums) -> Result<(), StoreError>;
}

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
        // Events that were not folded yet may have added days and hours.
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

/// Cuts times to what the destination can tell apart, as the server does with what it shows.
fn cut_times(row: &mut Row, columns: &[&Column], step: i64) {
    for (value, column) in row.iter_mut().zip(columns) {
        if let (Value::Integer(time), Kind::Time) = (value, column.kind) {
            *time = time.saturating_sub(time.rem_euclid(step));
        }
    }
}

/// What a table's rows add up to, in whatever order they come: how many there are, and the sum of what
/// SHA-256 makes of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Checksum {
    rows: u64,
    sum: u128,
}

impl Checksum {
    fn add(&mut self, row: &[Value]) {
        let mut hasher = Sha256::new();
        let mut bytes = |tag: u8, bytes: &[u8]| {
            hasher.update([tag]);
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for value in row {
            match value {
                Value::Null => bytes(0, &[]),
                Value::Integer(number) => bytes(1, &number.to_le_bytes()),
                Value::Text(text) => bytes(2, text.as_bytes()),
                Value::Bytes(blob) => bytes(3, blob),
            }
        }
        let digest = hasher.finalize();
        let mut half = [0; 16];
        half.iter_mut().zip(digest.iter()).for_each(|(to, from)| *to = *from);
        self.rows += 1;
        self.sum = self.sum.wrapping_add(u128::from_le_bytes(half));
    }
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
        return Err(CopyError::Source(format!("there is no database file {}", path.display())));
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
            sqlite::apply_journal(path)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_count_whatever_their_order_and_each_value_counts() {
        let checksum = |rows: &[Row]| {
            let mut checksum = Checksum::default();
            rows.iter().for_each(|row| checksum.add(row));
            checksum
        };
        let row = |left: &str, right: &str| {
            vec![Value::Text(left.to_owned()), Value::Text(right.to_owned())]
        };
        let (one, two) = (row("a", "bc"), row("ab", "c"));
        assert_eq!(checksum(&[one.clone(), two.clone()]), checksum(&[two.clone(), one.clone()]));
        assert_ne!(checksum(std::slice::from_ref(&one)), checksum(&[two]));
        // Two equal rows do not cancel each other out.
        assert_ne!(checksum(&[one.clone(), one.clone()]).sum, checksum(&[]).sum);
        let with = |value| checksum(&[vec![value]]).sum;
        let values = [
            with(Value::Null),
            with(Value::Integer(0)),
            with(Value::Text("\0".repeat(8))),
            with(Value::Bytes(vec![0; 8])),
        ];
        for (position, value) in values.iter().enumerate() {
            assert!(!values[..position].contains(value), "{position}");
        }
    }

    #[test]
    fn times_are_cut_towards_the_past() {
        let columns = [&column("timestamp", Kind::Time), &column("id", Kind::Integer)];
        let cut = |time: i64, step: i64| {
            let mut row = vec![Value::Integer(time), Value::Integer(1_999)];
            cut_times(&mut row, &columns, step);
            assert_eq!(row[1], Value::Integer(1_999));
            row.swap_remove(0)
        };
        assert_eq!(cut(1_999, 1_000), Value::Integer(1_000));
        assert_eq!(cut(-1, 1_000), Value::Integer(-1_000));
        assert_eq!(cut(1_999, 1), Value::Integer(1_999));
    }
}
