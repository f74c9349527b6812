//! Starts a server's ingest journal, and is ingest's way to the thread that appends to it. `events` calls it. It must
//! not report a batch as stored before the appender has answered.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use super::{
    apply::{RESERVED_IDS, apply_journal},
    apply_scheduler::ApplyScheduler,
    checkpoint::copy_log,
    connection::{SERVING_BUSY_TIMEOUT, open_for_requests, store_error},
    ingest_buffer::{IngestBuffer, JournaledBatch, State},
    ingest_state::{self, set_journal_in_use},
    journal::{Journal, unusable},
    journal_appender::{JournalAppender, Reply},
    write_connection::WriteConnection,
    writer_thread::WriterThread,
};
use crate::store::{Batch, EventWriter, Observations, StoreError, Written};

/// Batches that may be in flight before the first of them is in the journal.
const BATCHES_IN_FLIGHT: usize = 2;

/// Continues the journal of the database at `database`, whose writer is `writer`. What applying learns of devices goes
/// to `observations`.
pub(super) async fn start(
    database: &Path,
    writer: WriterThread,
    observations: mpsc::UnboundedSender<Observations>,
) -> Result<(ApplyScheduler, JournalWriter), StoreError> {
    let found = writer.call(|writer| ingest_state::read(&writer.connection)).await?.journal;
    let (mut journal, records) = Journal::open(database, found)?;
    journal.create_files().map_err(|error| unusable(database, &error))?;
    writer
        .call(|writer| {
            set_journal_in_use(&writer.connection, true)?;
            // A copy or mount of the database's file alone must show this, too.
            copy_log(&writer.connection)
        })
        .await?;
    let keys = open_for_requests(database).map_err(store_error)?;
    keys.pragma_update(None, "query_only", true).map_err(store_error)?;

    let mut state = State::new(found.applied);
    let mut last_id = 0;
    for record in records {
        let accepted = JournaledBatch::from(record);
        last_id = last_id.max(accepted.ids().last().unwrap_or(0));
        state.accept(accepted);
    }
    let reserved = writer.call(move |writer| writer.reserve_ids(RESERVED_IDS, last_id)).await?;
    (state.next_id, state.last_reserved_id) = reserved.into_inner();
    let buffer = Arc::new(IngestBuffer::new(state, observations));
    let shared = Arc::clone(&buffer);
    let use_buffer = move |writer: &mut WriteConnection| {
        writer.use_buffer(&shared);
        writer.connection.busy_timeout(SERVING_BUSY_TIMEOUT)
    };
    writer.call(use_buffer).await?;

    let scheduler = ApplyScheduler { buffer, writer, database: database.to_owned() };
    let (requests, waiting) = sync_channel(BATCHES_IN_FLIGHT);
    let appender = JournalAppender {
        scheduler: scheduler.clone(),
        journal,
        keys,
        devices: HashMap::new(),
        devices_epoch: 0,
    };
    scheduler
        .writer
        .threads()
        .start("sqlite-journal", move || appender.work(&waiting))
        .map_err(|error| StoreError::Failed(format!("cannot start a thread: {error}")))?;
    // What a killed server has left was acknowledged long ago. If it cannot be applied now, the appender tries again.
    if let Err(stopped @ StoreError::Stopped) = scheduler.writer.call(apply_journal).await {
        return Err(stopped);
    }
    let writer = scheduler.writer.clone();
    Ok((scheduler, JournalWriter { writer, requests, replies: VecDeque::new() }))
}

/// Ingest's way to the journal.
pub(super) struct JournalWriter {
    writer: WriterThread,
    requests: SyncSender<(Arc<Batch>, Reply)>,
    /// The answers for the batches in flight, the oldest first.
    replies: VecDeque<oneshot::Receiver<Result<Written, StoreError>>>,
}

#[async_trait]
impl EventWriter for JournalWriter {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        self.writer.presence().check()?;
        let (reply, result) = oneshot::channel();
        // No batch is in flight, so this does not block.
        self.requests.send((Arc::clone(batch), reply)).map_err(|_| StoreError::Stopped)?;
        result.await.map_err(|_| StoreError::Stopped)?
    }

    fn send(&mut self, batch: &Arc<Batch>) -> bool {
        if self.writer.presence().is_lost() {
            return false;
        }
        let (reply, result) = oneshot::channel();
        let is_sent = self.requests.try_send((Arc::clone(batch), reply)).is_ok();
        if is_sent {
            self.replies.push_back(result);
        }
        is_sent
    }

    async fn sent(&mut self) -> Option<Written> {
        let result = self.replies.front_mut()?.await;
        self.replies.pop_front();
        result.ok()?.ok()
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.writer
            .call(|writer| {
                apply_journal(writer)?;
                writer.probe()
            })
            .await
    }

    async fn finish(&mut self) -> Result<(), StoreError> {
        self.writer.call(apply_journal).await
    }
}
