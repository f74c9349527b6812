//! Both sides of copying a database, in PostgreSQL, with COPY in both directions. `store::copy` calls it. It reads in
//! one snapshot, and fills an empty database in one transaction. Nothing may be visible before that transaction
//! commits.

use std::{collections::HashSet, error::Error as StdError, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::{BufMut, BytesMut};
use futures_util::{TryStreamExt, pin_mut};
use jiff::civil::Date;
use pisync_core::Timestamp;
use tokio::sync::mpsc;
use tokio_postgres::{
    Client, Error,
    binary_copy::{BinaryCopyInWriter, BinaryCopyOutRow, BinaryCopyOutStream},
    error::SqlState,
    types::{FromSql, IsNull, ToSql, Type, to_sql_checked},
};

use super::{
    aggregated_events::DIALECT,
    connect::Connector,
    connection::Connection,
    errors::{is_connection_lost, store_error},
    health,
    partitions::{self, Partition},
    roll_ups, summaries,
    trusted_time::database_time,
};
use crate::store::{
    PostgresTarget, StoreError,
    copy::{
        BATCH_ROWS, Column, CopyReader, CopyWriter, Kind, REBUILT, Row, RowStream, Rows,
        SYNC_EVENTS, Selection, Sums, TABLES, Table, Value,
    },
};

/// A copy may take any time.
const NO_TIME_LIMITS: &str = "
    set statement_timeout = 0; set idle_in_transaction_session_timeout = 0
";

/// How long to wait for others that use the tables to be filled.
const LOCK_TIMEOUT: &str = "set local lock_timeout = '3s'";

/// How often to check whether servers use the database, and the pause in between. A connection that was just closed is
/// still visible for a moment.
const LOOKS: u32 = 7;
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// 2000-01-01 in days since 1970-01-01. PostgreSQL counts days from there.
const YEAR_2000_DAYS: i64 = 10_957;

/// 2000-01-01T00:00Z in milliseconds since 1970.
const YEAR_2000: i64 = 946_684_800_000;

/// Reads a database that servers may be using.
pub(crate) struct PostgresCopyReader {
    connection: Arc<Connection>,
}

impl PostgresCopyReader {
    pub(crate) async fn open(target: &PostgresTarget) -> Result<Self, StoreError> {
        // The first read fixes the snapshot.
        const BEGIN: &str = "
            begin isolation level repeatable read read only; select from roll_up_state
        ";
        let connection = Connector::new(target)?.connect().await?;
        let statements = format!("{NO_TIME_LIMITS}; {BEGIN}");
        connection.client.batch_execute(&statements).await.map_err(store_error)?;
        Ok(Self { connection: Arc::new(connection) })
    }
}

#[async_trait]
impl CopyReader for PostgresCopyReader {
    async fn unknown(&self) -> Result<Vec<String>, StoreError> {
        unknown(&self.connection.client).await.map_err(store_error)
    }

    async fn count(&self, table: &'static Table) -> Result<u64, StoreError> {
        count(&self.connection.client, table).await.map_err(store_error)
    }

    async fn last_id(&self, table: &'static Table) -> Result<i64, StoreError> {
        last_id(&self.connection.client, table).await.map_err(store_error)
    }

    fn rows(&self, selection: Selection) -> RowStream {
        rows(&self.connection, selection)
    }
}

/// The first table with rows in the database, even if another program made it.
pub(crate) async fn first_filled_table(
    target: &PostgresTarget,
) -> Result<Option<&'static str>, StoreError> {
    let connection = Connector::new(target)?.connect().await?;
    first_filled(&connection.client).await.map_err(store_error)
}

/// Fills an empty database. Other writers wait until the transaction ends.
pub(crate) struct PostgresCopyWriter {
    connection: Arc<Connection>,
    /// Months whose partition is known to exist.
    months: HashSet<Date>,
    /// The present by PostgreSQL's clock.
    database_time: Timestamp,
}

impl PostgresCopyWriter {
    /// Opens a database with the newest schema. Answers the name of a table instead if that table is not empty.
    pub(crate) async fn open(
        target: &PostgresTarget,
        now: Timestamp,
    ) -> Result<Result<Self, &'static str>, StoreError> {
        let mut connection = Connector::new(target)?.connect().await?;
        connection.client.batch_execute(NO_TIME_LIMITS).await.map_err(store_error)?;
        refuse_servers(&connection.client).await?;
        let database_time = database_time(&connection.client).await.map_err(store_error)?;
        partitions::ensure_ahead(&mut connection.client, now.min(database_time)).await?;
        lock_tables(&connection.client).await?;
        if let Some(table) = first_filled(&connection.client).await.map_err(store_error)? {
            return Ok(Err(table));
        }
        Ok(Ok(Self { connection: Arc::new(connection), months: HashSet::new(), database_time }))
    }

    /// Makes the partitions for these events.
    async fn make_partitions(
        &mut self,
        columns: &[&'static Column],
        rows: &[Row],
    ) -> Result<(), Error> {
        let Some(position) = columns.iter().position(|column| column.name == "created_at") else {
            return Ok(());
        };
        for row in rows {
            let Some(Value::Integer(microsecond)) = row.get(position) else { continue };
            let millisecond = microsecond.div_euclid(1_000) + YEAR_2000;
            let Some(received) = Timestamp::from_millisecond(millisecond) else { continue };
            let month = partitions::month_of(received);
            if self.months.insert(month)
                && let Some(partition) = Partition::of(month)
            {
                partitions::create_within(&self.connection.client, &partition).await?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl CopyWriter for PostgresCopyWriter {
    fn keeps(&self, _table: &'static Table, _column: &'static Column) -> bool {
        true
    }

    fn rows(&self, selection: Selection) -> RowStream {
        rows(&self.connection, selection)
    }

    fn time_step(&self) -> i64 {
        1
    }

    /// Events received later than this are aggregated by servers, like those they receive. The earlier clock decides,
    /// because with a clock that is ahead these events would have to wait a long time.
    fn sums(&self, now: Timestamp) -> Sums {
        Sums::ReceivedUntil(roll_ups::final_until(now.min(self.database_time)))
    }

    async fn set_last_id(&self, table: &'static Table, id: i64) -> Result<(), StoreError> {
        const SET: &str = "
            select setval(
                       pg_get_serial_sequence($1, 'id')::regclass,
                       greatest($2::bigint, 1), $2::bigint > 0)
        ";
        let client = &self.connection.client;
        client.execute(SET, &[&table.name, &id]).await.map(|_| ()).map_err(store_error)
    }

    async fn write(
        &mut self,
        table: &'static Table,
        columns: &[&'static Column],
        rows: Vec<Row>,
    ) -> Result<(), StoreError> {
        if table.name == SYNC_EVENTS {
            self.make_partitions(columns, &rows).await.map_err(store_error)?;
        }
        let client = &self.connection.client;
        let written = match table.rows {
            Rows::Single => update(client, table, columns, &rows).await,
            _ => copy_in(client, table, columns, &rows).await,
        };
        written.map_err(store_error)
    }

    async fn finish(self: Box<Self>, sums: Sums) -> Result<(), StoreError> {
        const WATERMARK: &str = "update roll_up_state set folded_until = $1";
        let client = &self.connection.client;
        if let Sums::ReceivedUntil(until) = sums {
            client.execute(WATERMARK, &[&until.to_jiff()]).await.map_err(store_error)?;
        }
        client.batch_execute(&summaries::rebuild_statements()).await.map_err(store_error)?;
        client.batch_execute(&roll_ups::recount_totals_statement()).await.map_err(store_error)?;
        client.batch_execute(&health::rebuild_states_statement()).await.map_err(store_error)?;
        client.batch_execute("commit").await.map_err(|error| {
            if is_connection_lost(&error) {
                return StoreError::OutcomeUnknown(
                    "look with `pisync verify` whether everything is there, or nothing".to_owned(),
                );
            }
            store_error(error)
        })?;
        self.connection.confirm_change()?;
        // Queries are planned by statistics. With them, the next servers need not wait for autovacuum.
        client.batch_execute("analyze").await.map_err(store_error)
    }
}

/// Fails while servers are connected. They may have reserved ids, which would then be assigned twice.
async fn refuse_servers(client: &Client) -> Result<(), StoreError> {
    const SESSIONS: &str = "
        select count(*)
          from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid()
           and application_name = current_setting('application_name')
    ";
    for look in 1..=LOOKS {
        let row = client.query_one(SESSIONS, &[]).await.map_err(store_error)?;
        if row.try_get::<_, i64>(0).map_err(store_error)? == 0 {
            return Ok(());
        }
        if look < LOOKS {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
    }
    Err(StoreError::Failed(
        "it is in use by a running PiSync server; stop that one first".to_owned(),
    ))
}

/// Begins the transaction and locks all tables against other writers.
async fn lock_tables(client: &Client) -> Result<(), StoreError> {
    let names: Vec<_> = TABLES.iter().map(|table| table.name).collect();
    let statements = format!(
        "begin; {LOCK_TIMEOUT}; lock table {} in exclusive mode; set local lock_timeout = 0",
        names.join(", ")
    );
    client.batch_execute(&statements).await.map_err(|error| {
        if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return StoreError::Failed(
                "somebody else is using its tables; wait for it or stop it first".to_owned(),
            );
        }
        store_error(error)
    })
}

async fn first_filled(client: &Client) -> Result<Option<&'static str>, Error> {
    const EXISTS: &str = "select to_regclass($1) is not null";
    for table in TABLES.iter().filter(|table| table.rows != Rows::Single) {
        let has_rows = format!("select exists (select from {})", table.name);
        if client.query_one(EXISTS, &[&table.name]).await?.try_get::<_, bool>(0)?
            && client.query_one(&has_rows, &[]).await?.try_get::<_, bool>(0)?
        {
            return Ok(Some(table.name));
        }
    }
    Ok(None)
}

/// Tables and columns that are not PiSync's.
async fn unknown(client: &Client) -> Result<Vec<String>, Error> {
    const COLUMNS: &str = "
        select t.relname::text, a.attname::text
          from pg_class t
          join pg_attribute a on a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped
         where t.relnamespace = (select relnamespace from pg_class where oid = 'devices'::regclass)
           and t.relkind in ('r', 'p') and not t.relispartition
           and t.relname not in ('pisync_migrations', 'pisync_take_over', 'trusted_time')
         order by 1, a.attnum
    ";
    let mut known = HashSet::from([
        ("fleet_state", "id"),
        ("roll_up_state", "id"),
        ("roll_up_state", "folded_until"),
        ("roll_up_state", "summarized_until"),
        ("roll_up_state", "announced_at"),
        ("roll_up_state", "digest_day"),
        ("roll_up_state", "group_repairs"),
        ("roll_up_state", "digest_device"),
    ]);
    for table in TABLES {
        known.extend(table.columns.iter().map(|column| (table.name, column.name)));
    }
    let mut found = Vec::new();
    for row in client.query(COLUMNS, &[]).await? {
        let (table, column): (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
        if REBUILT.contains(&table) {
            continue;
        }
        if !TABLES.iter().any(|known| known.name == table) {
            found.push(format!("the table {table}"));
        } else if !known.contains(&(table, column)) {
            found.push(format!("the column {column} of {table}"));
        }
    }
    found.dedup();
    Ok(found)
}

async fn count(client: &Client, table: &Table) -> Result<u64, Error> {
    let count = format!("select count(*) from {}", table.name);
    client.query_one(&count, &[]).await?.try_get::<_, i64>(0).map(i64::cast_unsigned)
}

async fn last_id(client: &Client, table: &Table) -> Result<i64, Error> {
    const SEQUENCE: &str = "select pg_get_serial_sequence($1, 'id')";
    let sequence: String = client.query_one(SEQUENCE, &[&table.name]).await?.try_get(0)?;
    let last = format!("select case when is_called then last_value else 0 end from {sequence}");
    client.query_one(&last, &[]).await?.try_get(0)
}

fn rows(connection: &Arc<Connection>, selection: Selection) -> RowStream {
    let connection = Arc::clone(connection);
    RowStream::start(move |sender| {
        tokio::spawn(async move {
            send_rows(&connection.client, &selection, &sender).await.map_err(store_error)
        })
    })
}

async fn send_rows(
    client: &Client,
    selection: &Selection,
    sender: &mpsc::Sender<Vec<Row>>,
) -> Result<(), Error> {
    let types: Vec<_> = selection.columns.iter().map(|column| read_type(column)).collect();
    let stream = client.copy_out(&copy_out(selection)).await?;
    let stream = BinaryCopyOutStream::new(stream, &types);
    pin_mut!(stream);
    let mut batch = Vec::with_capacity(BATCH_ROWS);
    while let Some(row) = stream.try_next().await? {
        batch.push(read(&row, types.len())?);
        if batch.len() == BATCH_ROWS {
            let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH_ROWS));
            if sender.send(full).await.is_err() {
                // The receiver is gone, so the rest is not needed.
                return Ok(());
            }
        }
    }
    if !batch.is_empty() {
        let _ = sender.send(batch).await;
    }
    Ok(())
}

fn copy_out(selection: &Selection) -> String {
    let expressions: Vec<_> = selection
        .columns
        .iter()
        .map(|column| {
            let name = format!(r#"t."{}""#, column.name);
            match column.kind {
                Kind::Integer | Kind::Integer32 => format!("{name}::bigint"),
                Kind::Boolean => format!("{name}::integer::bigint"),
                Kind::Text => format!("{name}::text"),
                Kind::Bytes | Kind::Time => name,
                Kind::Day => format!("({name} - date '1970-01-01')::bigint"),
                Kind::Decimal(scale) => format!("({name} * {})::bigint", 10_i64.pow(scale)),
            }
        })
        .collect();
    let table = match selection.sums {
        _ if selection.table.rows != Rows::Sums => selection.table.name.to_owned(),
        Sums::Stored => selection.table.name.to_owned(),
        Sums::Everything => DIALECT.as_of(selection.table.name, None),
        Sums::ReceivedUntil(until) => {
            DIALECT.as_of(selection.table.name, Some(&format!("'{until}'")))
        }
    };
    let expressions = expressions.join(", ");
    // SQLite accepts a line of the audit log only behind all others, so they are sent in order.
    let order = if selection.table.name == "audit_log" { " order by t.id" } else { "" };
    format!("copy (select {expressions} from {table} t{order}) to stdout (format binary)")
}

/// The form in which a column's values arrive: see [`copy_out`].
fn read_type(column: &Column) -> Type {
    match column.kind {
        Kind::Text => Type::TEXT,
        Kind::Bytes => Type::BYTEA,
        Kind::Time => Type::TIMESTAMPTZ,
        Kind::Integer | Kind::Integer32 | Kind::Day | Kind::Decimal(_) | Kind::Boolean => {
            Type::INT8
        }
    }
}

fn read(row: &BinaryCopyOutRow, columns: usize) -> Result<Row, Error> {
    (0..columns).map(|position| row.try_get(position)).collect()
}

impl FromSql<'_> for Value {
    fn from_sql(ty: &Type, raw: &[u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(match *ty {
            Type::TEXT => Self::Text(str::from_utf8(raw)?.to_owned()),
            Type::BYTEA => Self::Bytes(raw.to_owned()),
            // A time is sent as the number that was read for it.
            _ => Self::Integer(i64::from_be_bytes(raw.try_into()?)),
        })
    }

    fn from_sql_null(_: &Type) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self::Null)
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::TEXT | Type::BYTEA | Type::TIMESTAMPTZ | Type::INT8)
    }
}

async fn copy_in(
    client: &Client,
    table: &Table,
    columns: &[&'static Column],
    rows: &[Row],
) -> Result<(), Error> {
    let names: Vec<_> = columns.iter().map(|column| format!(r#""{}""#, column.name)).collect();
    let copy = format!("copy {} ({}) from stdin (format binary)", table.name, names.join(", "));
    // `Cell` writes each value as its column's kind requires.
    let types = vec![Type::UNKNOWN; columns.len()];
    let writer = BinaryCopyInWriter::new(client.copy_in(&copy).await?, &types);
    pin_mut!(writer);
    for row in rows {
        writer.as_mut().write_raw(cells(row, columns)).await?;
    }
    writer.finish().await.map(|_| ())
}

async fn update(
    client: &Client,
    table: &Table,
    columns: &[&'static Column],
    rows: &[Row],
) -> Result<(), Error> {
    let changes: Vec<_> = columns
        .iter()
        .enumerate()
        .map(|(position, column)| format!(r#""{}" = ${}"#, column.name, position + 1))
        .collect();
    let update = format!("update {} set {}", table.name, changes.join(", "));
    for row in rows {
        let cells: Vec<_> = cells(row, columns).collect();
        let values: Vec<&(dyn ToSql + Sync)> =
            cells.iter().map(|cell| cell as &(dyn ToSql + Sync)).collect();
        client.execute(&update, &values).await?;
    }
    Ok(())
}

fn cells<'a>(
    row: &'a Row,
    columns: &'a [&'static Column],
) -> impl ExactSizeIterator<Item = Cell<'a>> {
    row.iter().zip(columns).map(|(value, column)| Cell { value, kind: column.kind })
}

/// A value with the kind of the column that it is written to.
#[derive(Debug)]
struct Cell<'a> {
    value: &'a Value,
    kind: Kind,
}

impl ToSql for Cell<'_> {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        match (self.value, self.kind) {
            (Value::Null, _) => return Ok(IsNull::Yes),
            (Value::Text(text), _) => out.put_slice(text.as_bytes()),
            (Value::Bytes(bytes), _) => out.put_slice(bytes),
            (Value::Integer(number), Kind::Integer32) => out.put_i32(i32::try_from(*number)?),
            (Value::Integer(number), Kind::Day) => {
                out.put_i32(i32::try_from(number - YEAR_2000_DAYS)?);
            }
            (Value::Integer(number), Kind::Boolean) => out.put_u8((*number != 0).into()),
            (Value::Integer(number), Kind::Decimal(scale)) => put_numeric(*number, scale, out),
            (Value::Integer(number), _) => out.put_i64(*number),
        }
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// Writes `units`, an amount with `scale` decimals (at most 4), in the form of PostgreSQL's `numeric_send`. That form
/// is the number of digits in base 10,000, the weight of the first digit, the sign, the number of decimals, and the
/// digits.
fn put_numeric(units: i64, scale: u32, out: &mut BytesMut) {
    const BASE: u64 = 10_000;
    let sign: i16 = if units < 0 { 0x4000 } else { 0 };
    let (units, unit) = (units.unsigned_abs(), 10_u64.pow(scale));
    // Digits in base 10,000; the least significant one comes first.
    let mut digits = vec![units % unit * (BASE / unit)];
    let mut whole = units / unit;
    while whole > 0 {
        digits.push(whole % BASE);
        whole /= BASE;
    }
    let count = digits.len() as i16;
    for header in [count, count - 2, sign, scale as i16] {
        out.put_i16(header);
    }
    for digit in digits.iter().rev() {
        out.put_i16(*digit as i16);
    }
}
