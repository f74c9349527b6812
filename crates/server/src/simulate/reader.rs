//! Asks a server for what it tells: one answer, or all pages of a list. `compare` and the beginning of a simulation read
//! through it. A request is repeated like any other: see `sender::insist`.

use std::{sync::Arc, time::Duration};

use axum::http::Method;
use serde_json::Value;

use super::{
    SimulateError,
    client::{Connection, Servers},
    event::Milliseconds,
    load::Load,
    sender::{insist, read},
};

/// Rows on a page.
const PAGE: usize = 1_000;

/// Asks a server for JSON.
pub(super) struct Reader {
    connection: Connection,
    load: Load,
    patience: Duration,
}

impl Reader {
    pub(super) fn new(servers: &Arc<Servers>, patience: Duration) -> Self {
        Self { connection: Connection::new(servers, 0), load: Load::default(), patience }
    }

    /// The answer's `data`.
    pub(super) async fn data(&mut self, path: &str) -> Result<Value, SimulateError> {
        Ok(self.json(path).await?["data"].take())
    }

    async fn json(&mut self, path: &str) -> Result<Value, SimulateError> {
        let Self { connection, load, patience } = self;
        let answer = insist(connection, load, *patience, &Method::GET, path, None).await?;
        if answer.status.as_u16() == 400 {
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            return Err(SimulateError::Failed(format!("GET {path} is refused: {text}")));
        }
        read(&answer.body)
    }

    /// The server's time.
    pub(super) async fn now(&mut self) -> Result<Milliseconds, SimulateError> {
        let health = self.json("/health").await?;
        let time = health["timestamp"].as_str().and_then(pisync_core::Timestamp::parse_iso8601);
        time.map(pisync_core::Timestamp::as_millisecond).ok_or_else(|| {
            let address = self.connection.address().as_str();
            SimulateError::Failed(format!("what answers at {address} is not PiSync; look at --url"))
        })
    }

    /// All pages of a list. `path` already has a query.
    pub(super) async fn pages(
        &mut self,
        path: &str,
        list: &str,
        mut each: impl FnMut(&Value),
    ) -> Result<Value, SimulateError> {
        let mut next = String::new();
        let mut read = 0;
        loop {
            let page = self.data(&format!("{path}&limit={PAGE}{next}")).await?;
            let items = page[list].as_array().map(Vec::as_slice).unwrap_or_default();
            items.iter().for_each(&mut each);
            read += items.len();
            next = match &page["pagination"]["next_cursor"] {
                Value::String(cursor) => format!("&cursor={cursor}"),
                // This list has no cursors, or it is the last page.
                _ if next.starts_with("&cursor") || items.len() < PAGE => return Ok(page),
                _ => format!("&offset={read}"),
            };
        }
    }
}
