//! Decides when the ingest buffer is applied. The journal appender and readers ask the writer thread for it here. It
//! must not queue a second request while one waits.

use std::{path::PathBuf, sync::Arc};

use super::{
    apply::apply_journal,
    ingest_buffer::{IngestBuffer, State},
    journal,
    writer_thread::{Call, WriterThread},
};
use crate::store::StoreError;

/// A server's ingest buffer, and the writer that applies it.
#[derive(Clone)]
pub(super) struct ApplyScheduler {
    pub(super) buffer: Arc<IngestBuffer>,
    pub(super) writer: WriterThread,
    pub(super) database: PathBuf,
}

impl ApplyScheduler {
    /// Returns once everything that is acknowledged by now is applied, or an attempt has failed. After a failure,
    /// readers do not see the events that are in the journal alone.
    pub(super) async fn wait_until_applied(&self) {
        let mut attempts = self.buffer.attempts();
        let wanted = self.buffer.state().last;
        loop {
            attempts.mark_unchanged();
            {
                let mut state = self.buffer.state();
                if state.applied >= wanted || state.failed.is_some() {
                    return;
                }
                self.call_writer(&mut state);
            }
            // The sender lives as long as `self`.
            let _ = attempts.changed().await;
        }
    }

    /// Asks the writer to apply the journal, unless it has been asked already.
    pub(super) fn call_writer(&self, state: &mut State) {
        if state.called {
            return;
        }
        let buffer = Arc::clone(&self.buffer);
        let call: Call = Box::new(move |writer| {
            buffer.state().called = false;
            // The waiters learn the result from the buffer.
            let _ = apply_journal(writer);
        });
        // If this fails, the writer's queue is full; it is asked again later.
        state.called = self.writer.try_send(call);
    }

    /// Removes the journal if all of it is applied. Nobody may write any more.
    pub(super) fn remove_journal(&self) -> Result<(), StoreError> {
        let state = self.buffer.state();
        if let Some(error) = &state.failed {
            return Err(StoreError::Unavailable(error.clone()));
        }
        journal::remove(&self.database).map_err(|error| journal::unusable(&self.database, &error))
    }
}
