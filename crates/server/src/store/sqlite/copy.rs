//! Both sides of copying a database, in SQLite. `store::copy` calls it. Reading is one long read transaction. Filling
//! writes a new file, which must not get its name before it is complete.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use pisync_core::Timestamp;
use rusqlite::{
    Connection, OptionalExtension, Row as SqliteRow, params, params_from_iter,
    types::{Type, Value as SqliteValue, ValueRef},
};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    aggregated_events::DIALECT,
    backup::Copy,
    claim,
    connection::{open_existing, open_for_writing, store_error},
    health, roll_ups, summaries,
};
use crate::store::{
    StoreError,
    copy::{
        BATCH_ROWS, Column, CopyReader, CopyWriter, Kind, REBUILT, Row, RowStream, Rows,
        SYNC_EVENTS, Selection, Sums, TABLES, Table, Value,
    },
};

/// 2000-01-01T00:00Z in milliseconds since 1970.
const YEAR_2000: i64 = 946_684_800_000;

const DAY_MILLISECONDS: i64 = 86_400_000;

/// Reads a file that servers may be using.
pub(crate) struct SqliteCopyReader {
    connection: SharedConnection,
}

/// Used by one task at a time. It is shared because its work runs on other threads.
type SharedConnection = Arc<Mutex<Connection>>;

impl SqliteCopyReader {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let path = claim::find(path)?;
        let open = || -> rusqlite::Result<Connection> {
            let connection = open_existing(&path)?;
            connection.pragma_update(None, "query_only", true)?;
            // The first read fixes the snapshot.
            connection.execute_batch("begin; select count(*) from roll_up_state;")?;
            Ok(connection)
        };
        let connection = open().map_err(store_error)?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)) })
    }
}

#[async_trait]
impl CopyReader for SqliteCopyReader {
    async fn unknown(&self) -> Result<Vec<String>, StoreError> {
        run(&self.connection, unknown).await
    }

    async fn count(&self, table: &'static Table) -> Result<u64, StoreError> {
        run(&self.connection, move |connection| count(connection, table)).await
    }

    async fn last_id(&self, table: &'static Table) -> Result<i64, StoreError> {
        run(&self.connection, move |connection| last_id(connection, table)).await
    }

    fn rows(&self, selection: Selection) -> RowStream {
        rows(&self.connection, selection)
    }
}

/// The place where a new database will be. Nobody else uses it meanwhile.
pub(crate) struct Place {
    claim: claim::Claim,
    new: Copy,
}

impl Place {
    pub(crate) fn claim(database: &Path) -> Result<Self, StoreError> {
        if database.is_dir() {
            return Err(StoreError::Failed("it is a folder; name a file".to_owned()));
        }
        let claim = claim::Claim::take(database)?;
        Ok(Self { new: Copy::empty(claim.database())?, claim })
    }

    /// The file to fill.
    pub(crate) fn path(&self) -> &Path {
        self.new.path()
    }

    /// The first table with rows in a database that is there already.
    pub(crate) fn first_filled_table(&self) -> Result<Option<&'static str>, StoreError> {
        const EXISTS: &str = "select exists (select 1 from sqlite_schema where name = ?1)";
        let look = || -> rusqlite::Result<Option<&'static str>> {
            let connection = open_existing(self.claim.database())?;
            for table in TABLES.iter().filter(|table| table.rows != Rows::Single) {
                let has_rows = format!("select exists (select 1 from {})", table.name);
                if connection.query_row(EXISTS, [table.name], |row| row.get(0))?
                    && connection.query_row(&has_rows, [], |row| row.get(0))?
                {
                    return Ok(Some(table.name));
                }
            }
            Ok(None)
        };
        look().map_err(store_error)
    }
}

/// Fills a new file.
pub(crate) struct SqliteCopyWriter {
    connection: SharedConnection,
    place: Place,
    /// Statements that recreate the indexes of events. Each index is built in one go at the end.
    indexes: Vec<String>,
}

impl SqliteCopyWriter {
    /// Begins to fill `place`, whose file has been migrated.
    pub(crate) fn open(place: Place) -> Result<Self, StoreError> {
        let connection = open_for_writing(place.path())?;
        let begin = || -> rusqlite::Result<Vec<String>> {
            // An unfinished file is thrown away for any reason, so it need not survive a crash.
            connection.pragma_update(None, "journal_mode", "off")?;
            connection.pragma_update(None, "synchronous", "off")?;
            connection.pragma_update(None, "locking_mode", "exclusive")?;
            // An index is sorted in temporary files, however many events there are.
            connection.pragma_update(None, "temp_store", "file")?;
            connection.execute_batch("begin immediate")?;
            take_indexes(&connection)
        };
        let indexes = begin().map_err(store_error)?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)), place, indexes })
    }
}

#[async_trait]
impl CopyWriter for SqliteCopyWriter {
    fn keeps(&self, table: &'static Table, column: &'static Column) -> bool {
        matches!(place_of(table, column), ColumnPlace::Own(_) | ColumnPlace::DeviceNumber)
    }

    fn rows(&self, selection: Selection) -> RowStream {
        rows(&self.connection, selection)
    }

    fn time_step(&self) -> i64 {
        1_000
    }

    fn sums(&self, _now: Timestamp) -> Sums {
        Sums::Everything
    }

    async fn set_last_id(&self, table: &'static Table, id: i64) -> Result<(), StoreError> {
        run(&self.connection, move |connection| {
            connection.execute("delete from sqlite_sequence where name = ?1", [table.name])?;
            let set = "insert into sqlite_sequence (name, seq) values (?1, ?2)";
            connection.execute(set, params![table.name, id]).map(|_| ())
        })
        .await
    }

    async fn write(
        &mut self,
        table: &'static Table,
        columns: &[&'static Column],
        rows: Vec<Row>,
    ) -> Result<(), StoreError> {
        let columns = columns.to_vec();
        run(&self.connection, move |connection| write(connection, table, &columns, rows)).await
    }

    async fn finish(self: Box<Self>, _sums: Sums) -> Result<(), StoreError> {
        let Self { connection, place, indexes } = *self;
        run(&connection, move |connection| {
            for index in &indexes {
                connection.execute_batch(index)?;
            }
            // All events are aggregated, and the next event gets the next id.
            let watermark = last_id(connection, events_table())?;
            connection.execute("update roll_up_state set folded_id = ?1", [watermark])?;
            summaries::rebuild(connection)?;
            health::rebuild_states(connection)?;
            roll_ups::recount_totals(connection)?;
            connection.execute_batch("commit; pragma optimize = 0x10002;")
        })
        .await?;
        // Nobody else has the connection: reading back has ended.
        drop(connection);
        tokio::task::spawn_blocking(move || place.new.take_empty_place(place.claim.database()))
            .await
            .map_err(|error| StoreError::Failed(format!("writing failed: {error}")))?
    }
}

/// Runs `work` on a thread that may block.
async fn run<T: Send + 'static>(
    connection: &SharedConnection,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
) -> Result<T, StoreError> {
    let connection = Arc::clone(connection);
    let task = tokio::task::spawn_blocking(move || {
        work(&connection.lock().unwrap_or_else(PoisonError::into_inner)).map_err(store_error)
    });
    task.await.map_err(|error| StoreError::Failed(format!("a statement failed: {error}")))?
}

/// Where SQLite stores what PostgreSQL stores in a column.
enum ColumnPlace {
    /// In a column of this name.
    Own(&'static str),
    /// SQLite stores devices as a number, in the column `device`.
    DeviceNumber,
    /// Not stored. This is the closest expression, over a row of the table `t`.
    Derived(&'static str),
}

fn place_of(table: &Table, column: &Column) -> ColumnPlace {
    match (table.name, column.name) {
        (
            "device_jobs"
            | "sync_events"
            | "device_days"
            | "event_keys"
            | "group_changes"
            | "device_day_groups"
            | "device_settings"
            | "device_tags"
            | "device_health"
            | "unreconciled_devices"
            | "job_health"
            | "run_starts",
            "device_id",
        ) => ColumnPlace::DeviceNumber,
        ("devices", "updated_at") => ColumnPlace::Derived(
            "ifnull((select max(last_received) from device_jobs where device = t.id), t.created_at)",
        ),
        ("sync_events", "updated_at") => ColumnPlace::Derived("t.created_at"),
        ("sync_events", "duration_seconds") => ColumnPlace::Own("duration"),
        ("event_keys", "timestamp") => ColumnPlace::Derived(
            "ifnull((select timestamp from sync_events where id = t.id), t.created_at)",
        ),
        _ => ColumnPlace::Own(column.name),
    }
}

fn events_table() -> &'static Table {
    TABLES.iter().find(|table| table.name == SYNC_EVENTS).unwrap_or(&TABLES[0])
}

/// Tables and columns that are not PiSync's.
fn unknown(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    const COLUMNS: &str = r"
        select t.name, c.name
          from sqlite_schema t
          join pragma_table_info(t.name) c
         where t.type = 'table' and t.name not like 'sqlite\_%' escape '\'
           and t.name not in ('pisync_migrations', 'pisync_probe', 'ingest_state', 'trusted_time')
         order by t.name, c.cid
    ";
    let mut known = HashSet::from([
        ("fleet_state", "id"),
        ("roll_up_state", "id"),
        ("roll_up_state", "folded_id"),
        ("roll_up_state", "summarized_id"),
        ("roll_up_state", "summarized_device"),
        ("roll_up_state", "digest_day"),
        ("roll_up_state", "group_repairs"),
        ("roll_up_state", "digest_device"),
    ]);
    for table in TABLES {
        for column in table.columns {
            match place_of(table, column) {
                ColumnPlace::Own(name) => known.insert((table.name, name)),
                ColumnPlace::DeviceNumber => known.insert((table.name, "device")),
                ColumnPlace::Derived(_) => false,
            };
        }
    }
    let mut found = Vec::new();
    let mut select = connection.prepare(COLUMNS)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let (table, column): (String, String) = (row.get(0)?, row.get(1)?);
        if REBUILT.contains(&table.as_str()) {
            continue;
        }
        if !TABLES.iter().any(|known| known.name == table) {
            found.push(format!("the table {table}"));
        } else if !known.contains(&(table.as_str(), column.as_str())) {
            found.push(format!("the column {column} of {table}"));
        }
    }
    found.dedup();
    Ok(found)
}

fn count(connection: &Connection, table: &Table) -> rusqlite::Result<u64> {
    let count = format!("select count(*) from {}", table.name);
    connection.query_row(&count, [], |row| row.get::<_, i64>(0)).map(i64::cast_unsigned)
}

fn last_id(connection: &Connection, table: &Table) -> rusqlite::Result<i64> {
    const LAST: &str = "select seq from sqlite_sequence where name = ?1";
    let last = connection.query_row(LAST, [table.name], |row| row.get(0)).optional()?;
    Ok(last.unwrap_or(0))
}

fn rows(connection: &SharedConnection, selection: Selection) -> RowStream {
    let connection = Arc::clone(connection);
    RowStream::start(move |sender| -> JoinHandle<Result<(), StoreError>> {
        tokio::task::spawn_blocking(move || {
            let connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
            send_rows(&connection, &selection, &sender).map_err(|error| match error {
                ReadError::Sqlite(error) => store_error(error),
                ReadError::NamelessDevice => StoreError::Failed(format!(
                    "{} has rows of devices that are not registered; delete those rows, or insert the devices",
                    selection.table.name
                )),
            })
        })
    })
}

enum ReadError {
    Sqlite(rusqlite::Error),
    /// SQL that ignored the foreign keys has left it.
    NamelessDevice,
}

impl From<rusqlite::Error> for ReadError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn send_rows(
    connection: &Connection,
    selection: &Selection,
    sender: &mpsc::Sender<Vec<Row>>,
) -> Result<(), ReadError> {
    let mut select = connection.prepare(&select(selection))?;
    let mut found = select.query([])?;
    let mut batch = Vec::with_capacity(BATCH_ROWS);
    while let Some(row) = found.next()? {
        batch.push(read(row, selection)?);
        if batch.len() == BATCH_ROWS {
            let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH_ROWS));
            if sender.blocking_send(full).is_err() {
                // The receiver is gone, so the rest is not needed.
                return Ok(());
            }
        }
    }
    if !batch.is_empty() {
        let _ = sender.blocking_send(batch);
    }
    Ok(())
}

fn select(selection: &Selection) -> String {
    let expressions: Vec<_> = selection
        .columns
        .iter()
        .map(|column| match place_of(selection.table, column) {
            ColumnPlace::Own(name) => format!(r#"t."{name}""#),
            ColumnPlace::DeviceNumber => {
                "(select device_id from devices where id = t.device)".to_owned()
            }
            ColumnPlace::Derived(expression) => expression.to_owned(),
        })
        .collect();
    let table = match selection.sums {
        _ if selection.table.rows != Rows::Sums => selection.table.name.to_owned(),
        Sums::Stored => selection.table.name.to_owned(),
        Sums::Everything => DIALECT.as_of(selection.table.name, None),
        Sums::ReceivedUntil(until) => {
            DIALECT.as_of(selection.table.name, Some(&until.as_millisecond().to_string()))
        }
    };
    format!("select {} from {table} as t", expressions.join(", "))
}

fn read(row: &SqliteRow<'_>, selection: &Selection) -> Result<Row, ReadError> {
    let mut values = Vec::with_capacity(selection.columns.len());
    for (position, column) in selection.columns.iter().enumerate() {
        let value = match row.get_ref(position)? {
            ValueRef::Null
                if matches!(place_of(selection.table, column), ColumnPlace::DeviceNumber) =>
            {
                return Err(ReadError::NamelessDevice);
            }
            ValueRef::Null => Value::Null,
            ValueRef::Integer(number) => Value::Integer(match column.kind {
                Kind::Time => number
                    .checked_sub(YEAR_2000)
                    .and_then(|milliseconds| milliseconds.checked_mul(1_000))
                    .ok_or(rusqlite::Error::IntegralValueOutOfRange(position, number))?,
                Kind::Day => number.div_euclid(DAY_MILLISECONDS),
                _ => number,
            }),
            ValueRef::Text(_) => Value::Text(row.get(position)?),
            ValueRef::Blob(bytes) => Value::Bytes(bytes.to_vec()),
            ValueRef::Real(_) => {
                let name = column.name.to_owned();
                return Err(rusqlite::Error::InvalidColumnType(position, name, Type::Real).into());
            }
        };
        values.push(value);
    }
    Ok(values)
}

fn write(
    connection: &Connection,
    table: &Table,
    columns: &[&'static Column],
    rows: Vec<Row>,
) -> rusqlite::Result<()> {
    let mut statement = connection.prepare_cached(&write_statement(table, columns))?;
    for row in rows {
        let values = row.into_iter().zip(columns).map(|(value, column)| stored(value, column));
        statement.execute(params_from_iter(values.collect::<rusqlite::Result<Vec<_>>>()?))?;
    }
    Ok(())
}

fn write_statement(table: &Table, columns: &[&'static Column]) -> String {
    let places = columns.iter().enumerate().map(|(position, column)| {
        let number = position + 1;
        match place_of(table, column) {
            ColumnPlace::Own(name) => (format!(r#""{name}""#), format!("?{number}")),
            ColumnPlace::DeviceNumber => (
                "device".to_owned(),
                format!("(select id from devices where device_id = ?{number})"),
            ),
            // This store does not keep the column.
            ColumnPlace::Derived(_) => (String::new(), String::new()),
        }
    });
    if table.rows == Rows::Single {
        let changes: Vec<_> = places.map(|(name, value)| format!("{name} = {value}")).collect();
        return format!("update {} set {}", table.name, changes.join(", "));
    }
    let (names, values): (Vec<_>, Vec<_>) = places.unzip();
    format!("insert into {} ({}) values ({})", table.name, names.join(", "), values.join(", "))
}

fn stored(value: Value, column: &Column) -> rusqlite::Result<SqliteValue> {
    Ok(match value {
        Value::Null => SqliteValue::Null,
        Value::Integer(number) => SqliteValue::Integer(match column.kind {
            Kind::Time => {
                let millisecond = number.div_euclid(1_000) + YEAR_2000;
                Timestamp::from_millisecond(millisecond).map(Timestamp::as_millisecond).ok_or_else(
                    || {
                        let problem =
                            format!("a time in {} is outside of the years 1 to 9999", column.name);
                        rusqlite::Error::ToSqlConversionFailure(problem.into())
                    },
                )?
            }
            Kind::Day => number * DAY_MILLISECONDS,
            _ => number,
        }),
        Value::Text(text) => SqliteValue::Text(text),
        Value::Bytes(bytes) => SqliteValue::Blob(bytes),
    })
}

/// Drops the indexes of events, and answers the statements that recreate them. An index that is built from all rows is
/// sorted first, and then written from start to end.
fn take_indexes(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    const INDEXES: &str = "
        select name, sql from sqlite_schema where type = 'index' and tbl_name = ?1 and sql is not null
    ";
    let mut select = connection.prepare(INDEXES)?;
    let indexes: Vec<(String, String)> = select
        .query_map([SYNC_EVENTS], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (name, _) in &indexes {
        connection.execute_batch(&format!(r#"drop index "{name}""#))?;
    }
    Ok(indexes.into_iter().map(|(_, sql)| sql).collect())
}
