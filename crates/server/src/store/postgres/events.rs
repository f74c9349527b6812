//! Events in PostgreSQL: it opens their writer and reads their history. `ingest`, `import`, the API and exports call it
//! through `EventStore`. The work is in `writer` and `history`.

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{history, store::PostgresStore, writer::PostgresEventWriter};
use crate::store::{
    EventPage, EventStore, EventWriter, HistoryQuery, Observations, StoreError, SyncHistory,
};

#[async_trait]
impl EventStore for PostgresStore {
    fn event_writer(&self) -> Box<dyn EventWriter> {
        Box::new(PostgresEventWriter::new(self.connector.clone()))
    }

    async fn ingest_writer(
        &self,
        _observations: mpsc::UnboundedSender<Observations>,
    ) -> Result<Box<dyn EventWriter>, StoreError> {
        Ok(Box::new(PostgresEventWriter::new(self.connector.clone()).ready().await?))
    }

    async fn sync_history(&self, query: &HistoryQuery) -> Result<Option<SyncHistory>, StoreError> {
        self.call_long(async |connection| history::sync_history(connection, query).await).await
    }

    async fn events(&self, query: &HistoryQuery) -> Result<Option<EventPage>, StoreError> {
        self.call_long(async |connection| history::events(connection, query).await).await
    }
}
