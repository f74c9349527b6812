//! The log of imports in SQLite. `import` reads it through `ImportLog`. Nothing here writes; `import_steps` does.

use async_trait::async_trait;
use rusqlite::Connection;

use super::{import_steps::import, store::SqliteStore};
use crate::store::{ImportLog, ImportProgress, StoreError};

#[async_trait]
impl ImportLog for SqliteStore {
    async fn imports(&self) -> Result<Vec<ImportProgress>, StoreError> {
        self.read(imports).await
    }
}

/// All imports.
fn imports(connection: &Connection) -> rusqlite::Result<Vec<ImportProgress>> {
    const IMPORTS: &str = "
        select id, name, head, records, digest, rejected, finished, updated_at from imports
    ";
    let mut select = connection.prepare(IMPORTS)?;
    select.query_map([], import)?.collect()
}
