//! What the writer does when a write fails. It tries again, writes the batch in another way, or resolves a batch in
//! doubt. Only the writer calls it. A batch in doubt must never be written again before its outcome is known.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_postgres::{Error, error::SqlState};

use super::{DEDUPLICATING_BATCHES, LOCK_TIMEOUT, PostgresEventWriter, RETRIES};
use crate::store::{
    Batch, StoreError, Written,
    postgres::{
        batch_columns::EventColumns,
        connection::Backend,
        durability,
        errors::{ErrorClass, WriteError, class_of, is_raised, store_error},
        transactions::{Session, resolve},
    },
};

/// A batch whose answer was lost.
pub(super) struct InDoubt {
    pub(super) batch: Arc<Batch>,
    pub(super) ids: Vec<i64>,
    /// The process that may still be storing it.
    pub(super) backend: Backend,
}

impl PostgresEventWriter {
    /// Finds out whether an attempt whose outcome was lost has stored a batch, and answers the result.
    pub(super) async fn find_stored(
        &mut self,
        in_doubt: &InDoubt,
    ) -> Result<Option<Written>, StoreError> {
        let session = self.session()?;
        let Session { connection, statements, .. } = &*session;
        let client = &connection.client;
        let InDoubt { batch, ids, backend } = in_doubt;
        // The process may still be working on what was sent to it.
        if !backend.end(client).await.map_err(store_error)? {
            return Err(StoreError::Unavailable("a session that was lost does not end".into()));
        }
        let events = EventColumns::new(batch, &batch.order(), ids);
        if !events.are_stored(client, statements).await.map_err(store_error)? {
            return Ok(None);
        }
        let kept = events.find_keys(client, statements).await.map_err(store_error)?;
        client.batch_execute(durability::CONFIRM).await.map_err(store_error)?;
        connection.check_replicated()?;
        Ok(Some(resolve(batch, ids, &batch.repeats(), &kept)))
    }

    /// Remembers that `session` may store `batch` under `ids`. The session cannot be used any more.
    pub(super) fn leave_in_doubt(
        &mut self,
        batch: &Arc<Batch>,
        ids: Vec<i64>,
        session: &Arc<Session>,
    ) {
        session.connection.close();
        self.session.take_if(|current| Arc::ptr_eq(current, session));
        // Nobody will ask for other batches that were given up.
        let nobody_asks = |in_doubt: &mut InDoubt| Arc::strong_count(&in_doubt.batch) == 1;
        let given_up = self.in_doubt.extract_if(.., nobody_asks);
        self.abandoned.extend(given_up.map(|in_doubt| in_doubt.backend));
        self.in_doubt.push(InDoubt { batch: Arc::clone(batch), ids, backend: session.backend });
    }

    /// Gives the session up. PostgreSQL may still be working in it.
    pub(super) fn abandon_session(&mut self) {
        if let Some(session) = self.session.take() {
            session.connection.close();
            self.abandoned.push(session.backend);
        }
    }

    /// Decides what to do about a failed transaction. `Ok` means to try again.
    pub(super) async fn recover(
        &mut self,
        error: WriteError,
        attempt: u32,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        if error.leaves_doubt() {
            self.abandon_session();
            // Only the first statement shows that a restarted server has closed an idle connection.
            let may_have_been_idle = attempt == 0 && matches!(error, WriteError::Sql(_));
            return if may_have_been_idle { Ok(()) } else { Err(error.into()) };
        }
        if std::mem::take(&mut self.transaction.open)
            && let Some(session) = &self.session
        {
            let rollback = session.connection.client.batch_execute("rollback");
            if !matches!(tokio::time::timeout_at(deadline, rollback).await, Ok(Ok(()))) {
                self.abandon_session();
            }
        }
        let retries = match &error {
            WriteError::Sql(error) => self.classify(error),
            WriteError::Conflict(_) => RETRIES,
            WriteError::Dropped { .. }
            | WriteError::OtherGroup(_)
            | WriteError::Refused(_)
            | WriteError::Unreplicated
            | WriteError::Impossible(_) => 0,
        };
        // An attempt that the deadline ends while it waits for a lock would leave the batch in doubt.
        let has_time = deadline.saturating_duration_since(Instant::now()) > LOCK_TIMEOUT;
        if attempt < retries && has_time { Ok(()) } else { Err(error.into()) }
    }

    /// Learns from PostgreSQL's error how to write the batch. Answers how many retries are worth trying.
    pub(super) fn classify(&mut self, error: &Error) -> u32 {
        let Some(code) = error.code().filter(|_| !is_raised(error)) else { return 0 };
        self.disk_full = *code == SqlState::DISK_FULL;
        if class_of(error) == ErrorClass::Transient {
            RETRIES
        } else if *code == SqlState::FOREIGN_KEY_VIOLATION {
            // A device was deleted behind our back, perhaps after a deadlock between the deletion and this batch. It
            // must be registered again.
            self.last_seen.clear();
            RETRIES
        } else if *code == SqlState::UNIQUE_VIOLATION && names(error, "event_keys_pkey") {
            self.deduplicating_batches = DEDUPLICATING_BATCHES;
            RETRIES
        } else if *code == SqlState::CHECK_VIOLATION && names_no_constraint(error) {
            // The month's partition is missing: somebody has dropped or detached it.
            if std::mem::take(&mut self.months).is_empty() { 0 } else { RETRIES }
        } else if *code == SqlState::FEATURE_NOT_SUPPORTED
            || *code == SqlState::INVALID_SQL_STATEMENT_NAME
            || *code == SqlState::READ_ONLY_SQL_TRANSACTION
        {
            // A statement outlived a migration, or the server has become a standby.
            self.abandon_session();
            1
        } else {
            0
        }
    }
}

/// A row without a partition violates a check that has no name.
fn names_no_constraint(error: &Error) -> bool {
    error.as_db_error().is_some_and(|error| error.constraint().is_none())
}

/// Whether the error concerns this constraint.
fn names(error: &Error, constraint: &str) -> bool {
    error.as_db_error().is_some_and(|error| error.constraint() == Some(constraint))
}
