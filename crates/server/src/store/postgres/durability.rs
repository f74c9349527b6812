//! Whether what is committed stays: the settings and tables that an acknowledgement relies on. Every session is
//! secured before its first statement, by `connect`; the writer looks again from time to time, and at its tables.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio_postgres::{Client, Error, SimpleQueryMessage};

use crate::store::StoreError;

/// What has been warned of. A process says it once, however many sessions and stores it opens.
static WARNED_OF_COMMITS: AtomicBool = AtomicBool::new(false);
static WARNED_OF_SERVER: AtomicBool = AtomicBool::new(false);

/// Commits a record of the write-ahead log that changes nothing. Its commit waits for the disk and for the standbys
/// as every other does, and the log is in order: what was committed before is safe, too, once it returns. Seeing a
/// row is not enough: a commit whose waiting for a standby was ended is visible, and lost in a failover.
pub(super) const CONFIRM: &str = "select pg_logical_emit_message(true, 'pisync', '')";

/// Where in PostgreSQL a commit says that it did not wait for its standby to the end. The text of the warning is
/// translated, this is not.
const UNREPLICATED: &str = "SyncRepWaitForLSN";

/// Whether a warning says that the commit before it may not be replicated.
pub(super) fn is_unreplicated(notice: &tokio_postgres::error::DbError) -> bool {
    notice.routine() == Some(UNREPLICATED)
}

/// Makes commits of the session durable: `synchronous_commit` is `on` or the stronger `remote_apply` from now on,
/// whatever the role, the database, the URL or the server say, and whatever they are changed to. What the session
/// cannot set is only warned of.
pub(super) async fn secure(client: &Client) -> Result<(), Error> {
    // Two statements: the first sees the setting as it was.
    const SECURE: &str = "
        select current_setting('synchronous_commit'), current_setting('fsync'), current_setting('full_page_writes');
        select set_config(
                   'synchronous_commit',
                   case current_setting('synchronous_commit') when 'remote_apply' then 'remote_apply' else 'on' end,
                   false
               )
    ";
    let answer = client.simple_query(SECURE).await?;
    let row = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let Some(row) = row else { return Ok(()) };
    let setting = |column: usize| row.try_get(column).map(Option::unwrap_or_default);
    let (synchronous_commit, fsync, full_page_writes) = (setting(0)?, setting(1)?, setting(2)?);
    if !matches!(synchronous_commit, "on" | "remote_apply")
        && !WARNED_OF_COMMITS.swap(true, Ordering::Relaxed)
    {
        tracing::warn!(
            synchronous_commit,
            "commits were not durable by the settings of the role, the database or the server; PiSync sets \
             synchronous_commit to on for its own sessions"
        );
    }
    if (fsync == "off" || full_page_writes == "off")
        && !WARNED_OF_SERVER.swap(true, Ordering::Relaxed)
    {
        tracing::warn!(
            fsync,
            full_page_writes,
            "PostgreSQL does not write durably: a power cut may lose acknowledged events or damage the database; \
             set fsync and full_page_writes to on in postgresql.conf"
        );
    }
    Ok(())
}

/// Fails when a table that acknowledged events are in is emptied by a crash, and not replicated.
pub(super) async fn check_tables(client: &Client) -> Result<(), StoreError> {
    const UNLOGGED: &str = "
        select string_agg(format('alter table %s set logged', found.oid::regclass), '; ')
          from pg_class found
         where found.relpersistence <> 'p'
           and (
                   found.oid in (
                       'devices'::regclass, 'device_jobs'::regclass, 'device_days'::regclass,
                       'fleet_hours'::regclass, 'roll_up_state'::regclass, 'event_keys'::regclass,
                       'sync_events'::regclass
                   )
                or found.oid in (select inhrelid from pg_inherits where inhparent = 'sync_events'::regclass)
               )
    ";
    let failed = super::errors::store_error;
    let found = client.query_one(UNLOGGED, &[]).await.map_err(failed)?;
    match found.try_get::<_, Option<String>>(0).map_err(failed)? {
        None => Ok(()),
        Some(remedy) => Err(StoreError::Unavailable(format!(
            "tables that a crash of PostgreSQL empties cannot hold acknowledged events; run: {remedy}"
        ))),
    }
}
