//! Checkpoints: a separate thread copies the write-ahead log into the database's file, beside the writer.
//! `writer_thread` starts it. It must not make events wait.
//!
//! SQLite itself would do it within the commit that fills the log, and every event would wait for it. Here the writer
//! copies only the pages that were added meanwhile. After that the log is empty and starts from its beginning.

use std::{
    path::Path,
    sync::mpsc::{self, Receiver, SyncSender},
};

use rusqlite::Connection;

use super::connection::{CHECKPOINT_PAGES, open_for_checkpoints};
use crate::{store::StoreError, threads::Threads};

/// When the log has grown to this many times [`CHECKPOINT_PAGES`], the writer itself copies it. Events then wait, but
/// the log does not grow for ever.
const LONGEST_LOG: u32 = 4;

/// A long read can keep the log from starting again. The log is then checked again each time it has grown by this
/// fraction of [`CHECKPOINT_PAGES`].
const AGAIN_AFTER: u32 = 4;

/// How many pages may be left for the writer to copy; they take a few milliseconds. Each pass leaves fewer pages than
/// the one before, because fewer are added while it runs.
const REST_PAGES: i64 = 500;

/// The maximum number of passes beside the writer. If the disk is slower than the writer, the rest does not become
/// smaller.
const PASSES: usize = 8;

/// Makes `connection`, the writer's, report the length of its log to a thread that copies it. `copy_rest` makes the
/// writer copy the rest; it answers false once there is no writer. The thread ends with the connection.
pub(super) fn checkpoint_beside(
    connection: &mut Connection,
    path: &Path,
    copy_rest: impl Fn() -> bool + Send + 'static,
    threads: &Threads,
) -> Result<(), StoreError> {
    let failed = |error: &dyn std::fmt::Display| {
        StoreError::Failed(format!("cannot prepare checkpoints: {error}"))
    };
    let checkpoints = open_for_checkpoints(path).map_err(|error| failed(&error))?;
    let (filled, requests) = mpsc::sync_channel(1);
    threads
        .start("sqlite-checkpoint", move || copy_when_filled(&checkpoints, &requests, &copy_rest))
        .map_err(|error| failed(&error))?;
    watch_log(connection, filled).map_err(|error| failed(&error))
}

/// Checks the log's length after each commit.
fn watch_log(connection: &mut Connection, filled: SyncSender<()>) -> rusqlite::Result<()> {
    let (mut longest, mut due) = (0, CHECKPOINT_PAGES);
    connection.wal_hook(Some(move |log: &mut rusqlite::hooks::Wal, pages: i32| {
        let pages = pages.unsigned_abs();
        if pages < longest {
            // The log has started again from its beginning.
            due = CHECKPOINT_PAGES;
        }
        longest = pages;
        if pages < due {
            return Ok(());
        }
        due = pages.saturating_add(CHECKPOINT_PAGES / AGAIN_AFTER);
        // One waiting request is enough.
        let _ = filled.try_send(());
        // An error here would fail a transaction that is already committed. Without one, the log merely stays as long
        // as it is.
        if pages >= LONGEST_LOG * CHECKPOINT_PAGES {
            let _ = log.checkpoint();
        }
        Ok(())
    }))
}

fn copy_when_filled(
    connection: &Connection,
    requests: &Receiver<()>,
    copy_rest: &dyn Fn() -> bool,
) {
    while requests.recv().is_ok() {
        for _ in 0..PASSES {
            match copy_log(connection).and_then(|()| pages_left(connection)) {
                Ok(left) if left > REST_PAGES => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "the write-ahead log cannot be copied into the database file and grows; check the disk: the next attempt follows");
                    break;
                }
            }
        }
        if !copy_rest() {
            return;
        }
    }
}

/// How many pages of the log are not copied yet.
fn pages_left(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("pragma wal_checkpoint(noop)", [], |row| {
        Ok(row.get::<_, i64>(1)? - row.get::<_, i64>(2)?)
    })
}

/// Copies the pages that no reader needs from the log. It waits for nobody.
pub(super) fn copy_log(connection: &Connection) -> rusqlite::Result<()> {
    connection.query_row("pragma wal_checkpoint(passive)", [], |_| Ok(()))
}

#[cfg(test)]
mod tests {
    use std::{
        path::PathBuf,
        time::{Duration, Instant},
    };

    use tempfile::TempDir;

    use super::*;
    use crate::store::sqlite::{connection::open_for_writing, writer_thread::WriterThread};

    /// A database with a table to fill.
    struct Database {
        _folder: TempDir,
        path: PathBuf,
        writer: WriterThread,
    }

    impl Database {
        fn make() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("test.db");
            let connection = open_for_writing(&path).unwrap();
            connection.execute_batch("create table filler (bytes blob)").unwrap();
            let writer = WriterThread::start(connection, &path).unwrap();
            Self { _folder: folder, path, writer }
        }

        /// Commits some bytes and answers how many pages the log holds.
        async fn fill(&self, bytes: u32) -> u32 {
            let pages = self.writer.call(move |writer| {
                let connection = &writer.connection;
                connection.execute("insert into filler values (zeroblob(?1))", [bytes])?;
                connection.query_row("pragma wal_checkpoint(noop)", [], |row| row.get(1))
            });
            pages.await.unwrap()
        }

        /// Fills until the log has started again.
        async fn fill_until_it_begins_anew(&self) {
            let began = Instant::now();
            loop {
                let pages = self.fill(1_000).await;
                if pages < 100 {
                    return;
                }
                assert!(began.elapsed() < Duration::from_secs(60), "the log holds {pages} pages");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    #[tokio::test]
    async fn a_full_log_begins_anew() {
        let database = Database::make();
        while database.fill(1 << 20).await < CHECKPOINT_PAGES {}
        database.fill_until_it_begins_anew().await;
    }

    /// While somebody still reads, the log grows and events go on.
    #[tokio::test]
    async fn a_long_read_only_delays_it() {
        let database = Database::make();
        let reader = Connection::open(&database.path).unwrap();
        reader.execute_batch("begin; select count(*) from filler;").unwrap();
        while database.fill(1 << 20).await < CHECKPOINT_PAGES + CHECKPOINT_PAGES / 8 {}
        reader.execute_batch("commit").unwrap();
        while database.fill(1 << 20).await < CHECKPOINT_PAGES + CHECKPOINT_PAGES / AGAIN_AFTER {}
        database.fill_until_it_begins_anew().await;
    }
}
