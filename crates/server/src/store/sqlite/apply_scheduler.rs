//! When the ingest buffer is applied: the journal appender and readers ask the writer thread for it here.

use std::{path::PathBuf, sync::Arc};

use super::{
    apply::apply_journal,
    ingest_buffer::{IngestBuffer, State},
    journal,
    writer_thread::{Call, WriterThread},
};
use crate::store::StoreError;

/// A server's ingest buffer, with the writer that applies it.
#[derive(Clone)]
pub(super) struct ApplyScheduler {
    pub(super) buffer: Arc<IngestBuffer>,
    pub(super) writer: WriterThread,
    pub(super) database: PathBuf,
}

impl ApplyScheduler {
    /// Returns once everything that is acknowledged by now is applied, or an attempt has failed: then whoever reads does
    /// not see what is in the journal alone.
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

    /// Has the writer apply what is in the journal, if it has not been called already.
    pub(super) fn call_writer(&self, state: &mut State) {
        if state.called {
            return;
        }
        let buffer = Arc::clone(&self.buffer);
        let call: Call = Box::new(move |writer| {
            buffer.state().called = false;
            // Whoever waits is told.
            let _ = apply_journal(writer);
        });
        // Someone else has work for it; it is called again.
        state.called = self.writer.try_send(call);
    }

    /// Removes the journal once nothing is in it alone. Nobody may write any more.
    pub(super) fn remove_journal(&self) -> Result<(), StoreError> {
        let state = self.buffer.state();
        if let Some(error) = &state.failed {
            return Err(StoreError::Unavailable(error.clone()));
        }
        journal::remove(&self.database).map_err(|error| journal::unusable(&self.database, &error))
    }
}
