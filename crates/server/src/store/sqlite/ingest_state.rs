//! Reads and writes the table `ingest_state`: which ingest journal belongs to the database, how far it is applied, and
//! whether it is in use. `apply`, the journal's modules and the write connection call it. Progress must be written in
//! the transaction that stores the events.

use rusqlite::{Connection, Row, params};

use super::journal::JournalState;

/// How far events are applied to the tables.
pub(super) struct IngestState {
    /// The journal that they come from.
    pub(super) journal: JournalState,
    /// How many events of the next record, which is not complete in the tables, are stored or quarantined.
    pub(super) applied_events: usize,
}

/// How far the journal is applied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Through {
    /// The last record that is completely applied.
    pub(super) record: u64,
    /// How many events of the next record are applied.
    pub(super) events: usize,
}

/// Reads how far events are applied to the tables.
pub(super) fn read(connection: &Connection) -> rusqlite::Result<IngestState> {
    const STATE: &str = "select journal, settled, journal_in_use, settled_events from ingest_state";
    connection.prepare_cached(STATE)?.query_row([], |row| {
        Ok(IngestState {
            journal: journal_state(row)?,
            applied_events: usize::try_from(row.get::<_, u32>(3)?).unwrap_or(usize::MAX),
        })
    })
}

/// Notes whether both files of the journal must exist from now on.
pub(super) fn set_journal_in_use(connection: &Connection, in_use: bool) -> rusqlite::Result<()> {
    const SET: &str = "update ingest_state set journal_in_use = ?1 where journal_in_use <> ?1";
    connection.execute(SET, [in_use]).map(drop)
}

/// Whether [`read`] can be called. The tables of older versions lack some of the columns.
pub(super) fn is_current(connection: &Connection) -> rusqlite::Result<bool> {
    const EXISTS: &str = "
        select exists (
                   select 1 from pragma_table_info('ingest_state') where name = 'journal_in_use'
               )
    ";
    connection.query_row(EXISTS, [], |row| row.get(0))
}

/// Reads the columns `journal`, `settled` and `journal_in_use` of `ingest_state`, in this order.
pub(super) fn journal_state(row: &Row<'_>) -> rusqlite::Result<JournalState> {
    Ok(JournalState {
        identity: row.get(0)?,
        applied: row.get::<_, i64>(1)?.cast_unsigned(),
        in_use: row.get(2)?,
    })
}

/// Notes how far the journal is applied.
pub(super) fn record_applied(connection: &Connection, through: Through) -> rusqlite::Result<()> {
    connection
        .prepare_cached("update ingest_state set settled = ?1, settled_events = ?2")?
        .execute(params![
            through.record.cast_signed(),
            u32::try_from(through.events).unwrap_or(u32::MAX)
        ])
        .map(drop)
}
