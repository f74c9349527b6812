//! Decides when the ingest buffer is applied. The journal appender and readers ask the writer thread for it here. It
//! must not queue a second request while one waits, and must reach the writer also when its queue is full.

use std::{path::PathBuf, sync::Arc};

use super::{
    apply::apply_if_wanted,
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

    /// Asks the writer to apply the journal before its next call.
    pub(super) fn call_writer(&self, state: &mut State) {
        state.is_wanted = true;
        if state.called {
            return;
        }
        let buffer = Arc::clone(&self.buffer);
        let call: Call = Box::new(move |writer| {
            buffer.state().called = false;
            // Somebody may have asked again while the writer applied the journal before this call.
            apply_if_wanted(writer);
        });
        // If this fails, the writer's queue is full, and the next call in it is enough.
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
