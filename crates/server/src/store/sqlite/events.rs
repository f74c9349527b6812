//! Events in SQLite: it opens the two writers and reads the history. `ingest`, `import`, the API and exports call it
//! through `EventStore`. The work is in `journal_writer`, `direct_writer` and `history`.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{
    connection::Cost, direct_writer::SqliteEventWriter, history, journal_writer,
    store::SqliteStore, watch::Watch,
};
use crate::store::{
    EventPage, EventStore, EventWriter, HistoryQuery, Observations, StoreError, SyncHistory,
};

#[async_trait]
impl EventStore for SqliteStore {
    fn event_writer(&self) -> Box<dyn EventWriter> {
        Box::new(SqliteEventWriter::new(self.writer.clone()))
    }

    async fn ingest_writer(
        &self,
        observations: mpsc::UnboundedSender<Observations>,
    ) -> Result<Box<dyn EventWriter>, StoreError> {
        let (scheduler, writer) =
            journal_writer::start(&self.path, self.writer.clone(), observations).await?;
        let presence = Arc::clone(self.writer.presence());
        let watch = Watch::start(&self.path, self.identity, presence, self.writer.threads())?;
        let is_first = self.watch.set(watch).is_ok() && self.ingest.set(scheduler).is_ok();
        if !is_first {
            let twice = "the database has an ingest writer already";
            return Err(StoreError::Failed(twice.to_owned()));
        }
        Ok(Box::new(writer))
    }

    async fn sync_history(&self, query: &HistoryQuery) -> Result<Option<SyncHistory>, StoreError> {
        let query = query.clone();
        self.read_events(Cost::Long, move |connection| history::sync_history(connection, &query))
            .await
    }

    async fn events(&self, query: &HistoryQuery) -> Result<Option<EventPage>, StoreError> {
        let query = query.clone();
        self.read_events(Cost::Long, move |connection| history::events(connection, &query)).await
    }
}
