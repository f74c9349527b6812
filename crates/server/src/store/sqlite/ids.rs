//! The ids of rows. SQLite counts them in `sqlite_sequence` and never assigns one twice (`autoincrement`). The writer
//! reserves ids for a server's events here. This module also explains what to do when none are left. Another program
//! may have given a row the highest possible id. SQLite then reports a full disk, and our arithmetic must not overflow.

use std::{fmt, ops::RangeInclusive};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, params};

/// No ids are left in a table, so no row that needs one can be added.
#[derive(Debug)]
pub(super) struct NoIdsLeft {
    table: String,
    /// The highest id that was ever assigned, according to SQLite.
    used: i64,
    /// The row with the highest id, if it still exists.
    highest: Option<i64>,
}

impl fmt::Display for NoIdsLeft {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, used, highest } = self;
        write!(formatter, "no ids are left in {table}: ")?;
        match highest {
            Some(id) => write!(
                formatter,
                "a row has the id {id}; stop PiSync, give it and others like it the next ids after the other rows', also where they are referred to, and then run"
            )?,
            None => write!(
                formatter,
                "sqlite_sequence says that the id {used} was given; stop PiSync, and then run"
            )?,
        }
        write!(
            formatter,
            " `update sqlite_sequence set seq = (select max(id) from {table}) where name = '{table}'`"
        )?;
        if table == "audit_log" {
            formatter.write_str(" (how to change a row there is in docs/security.md)")?;
        }
        Ok(())
    }
}

impl std::error::Error for NoIdsLeft {}

impl From<NoIdsLeft> for rusqlite::Error {
    fn from(error: NoIdsLeft) -> Self {
        Self::ToSqlConversionFailure(error.into())
    }
}

/// Whether an error says that no ids are left.
pub(super) fn are_used_up(error: &rusqlite::Error) -> bool {
    matches!(error, rusqlite::Error::ToSqlConversionFailure(error) if error.is::<NoIdsLeft>())
}

/// Reserves `count` ids of events above `at_least`, and above all that were ever assigned or reserved by any program.
/// Rows that other programs insert without an id get higher ones from then on.
pub(super) fn reserve(
    transaction: &Transaction<'_>,
    count: i64,
    at_least: i64,
) -> rusqlite::Result<RangeInclusive<i64>> {
    const RAISE: &str = "update sqlite_sequence set seq = ?1 where name = 'sync_events'";
    const BEGIN: &str = "insert into sqlite_sequence (name, seq) values ('sync_events', ?1)";
    let first = first_of(transaction, count, at_least)?;
    let last = first + (count - 1);
    if transaction.prepare_cached(RAISE)?.execute([last])? == 0 {
        transaction.execute(BEGIN, [last])?;
    }
    Ok(first..=last)
}

/// The first of `count` ids of events above `at_least`, and above all that were ever assigned or reserved.
pub(super) fn first_of(
    transaction: &Transaction<'_>,
    count: i64,
    at_least: i64,
) -> rusqlite::Result<i64> {
    // Other programs may have written a value of any type there; it is read as a number.
    const USED: &str = "
        select ifnull(max(cast(seq as integer)), (select ifnull(max(id), 0) from sync_events))
          from sqlite_sequence
         where name = 'sync_events'
    ";
    let used: i64 = transaction.prepare_cached(USED)?.query_row([], |row| row.get(0))?;
    let used = used.max(at_least).max(0);
    if used.checked_add(count.max(1)).is_none() {
        return Err(no_ids_left(transaction, "sync_events", used)?.into());
    }
    Ok(used + 1)
}

/// Another id for an event whose own, `id`, another program has taken. It is the next id above all others. If there is
/// none, it is an unused id above `id`. SQLite cannot choose it, because a failure there would roll the entire
/// transaction back.
pub(super) fn next_or_free(transaction: &Transaction<'_>, id: i64) -> rusqlite::Result<i64> {
    const FREE: &str = "
        select id + 1
          from sync_events taken
         where id between ?1 and ?2
           and not exists (select 1 from sync_events where id = taken.id + 1)
         order by id
         limit 1
    ";
    match first_of(transaction, 1, 0) {
        Err(error) if are_used_up(&error) => {
            transaction.query_row(FREE, params![id, i64::MAX - 1], |row| row.get(0))
        }
        next => next,
    }
}

/// SQLite reports a full disk as well when a table has no ids left. This finds out whether that is so, and names the
/// table.
pub(super) fn explain(connection: &Connection, error: rusqlite::Error) -> rusqlite::Error {
    const USED_UP: &str = "
        select name, cast(seq as integer)
          from sqlite_sequence
         where cast(seq as integer) = ?1
         order by name
         limit 1
    ";
    if error.sqlite_error_code() != Some(ErrorCode::DiskFull) {
        return error;
    }
    let found = || -> rusqlite::Result<Option<NoIdsLeft>> {
        let found = connection
            .query_row(USED_UP, [i64::MAX], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        found.map(|(table, used): (String, i64)| no_ids_left(connection, &table, used)).transpose()
    };
    match found() {
        Ok(Some(used_up)) => used_up.into(),
        // The first error is the one that matters.
        Ok(None) | Err(_) => error,
    }
}

fn no_ids_left(connection: &Connection, table: &str, used: i64) -> rusqlite::Result<NoIdsLeft> {
    // The names of tables come from SQLite itself.
    let highest: Option<i64> =
        connection.query_row(&format!("select max(id) from \"{table}\""), [], |row| row.get(0))?;
    // A lower id has not raised the counter.
    let highest = highest.filter(|highest| *highest >= used);
    Ok(NoIdsLeft { table: table.to_owned(), used, highest })
}
