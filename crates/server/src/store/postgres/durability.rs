//! Ensures that a commit is durable: the settings and tables that an acknowledgement relies on. `connect` secures every
//! session before its first statement. The writer repeats this from time to time, and checks its tables. No event may
//! be acknowledged on a session that was not secured.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio_postgres::{Client, Error, SimpleQueryMessage};

use crate::store::StoreError;

/// What was already warned of. A process warns once, however many sessions and stores it opens.
static WARNED_OF_COMMITS: AtomicBool = AtomicBool::new(false);
static WARNED_OF_SERVER: AtomicBool = AtomicBool::new(false);

/// Commits a record of the write-ahead log that changes nothing. Its commit waits for the disk and for the standbys
/// like every other. The log is ordered, so everything that was committed before is safe once it returns. Seeing a row
/// is not enough: if a commit's wait for a standby was ended, its row is visible, but a failover loses it.
pub(super) const CONFIRM: &str = "select pg_logical_emit_message(true, 'pisync', '')";

/// The routine of PostgreSQL in which a commit warns that it did not wait for its standby to the end. The warning's
/// text is translated; this name is not.
const UNREPLICATED: &str = "SyncRepWaitForLSN";

/// Whether a warning says that the commit before it may not be replicated.
pub(super) fn is_unreplicated(notice: &tokio_postgres::error::DbError) -> bool {
    notice.routine() == Some(UNREPLICATED)
}

/// Makes commits of the session durable: sets `synchronous_commit` to `on`, or leaves the stronger `remote_apply`. This
/// overrides the role, the database, the URL and the server, and later changes of those. For settings that a session
/// cannot change, it only warns.
pub(super) async fn secure(client: &Client) -> Result<(), Error> {
    // Two statements, so that the first sees the setting as it was.
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

/// Fails when a table that holds acknowledged events is unlogged: a crash would empty it, and it is not replicated.
pub(super) async fn check_tables(client: &Client) -> Result<(), StoreError> {
    const UNLOGGED: &str = "
        select string_agg(format('alter table %s set logged', found.oid::regclass), '; ')
          from pg_class found
         where found.relpersistence <> 'p'
           and (
                   found.oid in (
                       'devices'::regclass, 'device_jobs'::regclass, 'device_days'::regclass,
                       'fleet_hours'::regclass, 'group_changes'::regclass,
                       'device_day_groups'::regclass, 'group_days'::regclass,
                       'group_hours'::regclass, 'roll_up_state'::regclass, 'event_keys'::regclass,
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
