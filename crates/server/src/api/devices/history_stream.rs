//! Streams a device's history as CSV or NDJSON, page by page; `history` calls it. Memory stays constant however long
//! the history is. Between two pages it must not hold a database connection. The key is checked again before each page:
//! a client whose key is revoked gets no more.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, Version, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{StreamExt, future, stream};

use crate::{
    api::{
        SharedState,
        wire::{
            error::ApiError,
            large::{ENCODER_BYTES, Held},
            weights::weighted,
        },
    },
    event_format::{Format, HistoryEvent},
    keys::Key,
    store::{EventPage, HistoryQuery, Scope, StoreError},
};

/// The number of events per page. A page takes 2 MiB with the largest metadata, and usually 100 KiB.
const PAGE: u32 = 500;

/// The largest text of a page. Metadata of 4 KiB may consist of quotation marks, which CSV doubles.
const PAGE_BYTES: usize = PAGE as usize * (9 << 10);

/// How long to wait for memory. The first page waits as long as for a database connection. Later pages wait as long as
/// for a client that must read.
const PATIENCE_AT_FIRST: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);

/// The format that the client prefers over JSON, if any.
pub(crate) fn wanted(headers: &HeaderMap) -> Option<Format> {
    // Among equal weights a named type wins over a wildcard, and an earlier type over a later one. A wildcard selects
    // JSON.
    let mut best = (0.0, false, None);
    for (media_type, weight) in weighted(headers, header::ACCEPT) {
        let (named, format) = match media_type.to_ascii_lowercase().as_str() {
            "text/csv" => (true, Some(Format::Csv)),
            "application/x-ndjson" | "application/ndjson" => (true, Some(Format::Ndjson)),
            "application/json" => (true, None),
            "*/*" | "application/*" => (false, None),
            _ => continue,
        };
        if weight > best.0 || (weight == best.0 && named && !best.1 && weight > 0.0) {
            best = (weight, named, format);
        }
    }
    best.2
}

fn media_type(format: Format) -> &'static str {
    match format {
        Format::Csv => "text/csv; charset=utf-8; header=present",
        Format::Ndjson => "application/x-ndjson",
    }
}

/// A request for a stream.
pub(crate) struct StreamRequest {
    /// The key that the request was admitted with.
    pub(crate) key: Option<Arc<Key>>,
    pub(crate) query: HistoryQuery,
    /// The most events; `None` for all of them.
    pub(crate) limit: Option<u32>,
    pub(crate) format: Format,
    /// The HTTP version.
    pub(crate) version: Version,
}

/// Streams all requested events.
///
/// # Errors
/// When the device is unknown or its first page cannot be read. A later error cuts off the response, so that no client
/// takes it for complete.
pub(crate) async fn respond(
    state: SharedState,
    request: StreamRequest,
) -> Result<Response, ApiError> {
    let StreamRequest { key, query, limit, format, version } = request;
    let mut pages = Pages { state, key, query, left: limit, format, version, at_end: false };
    // The encoder that compresses the response lives as long as the response.
    let encoder = pages.state.large_answers.reserve(ENCODER_BYTES)?;
    let memory = pages.memory(PATIENCE_AT_FIRST).await.ok_or(ApiError::Overloaded)?;
    let first = pages.read().await?.ok_or(ApiError::NotFound("Device"))?;
    let text = memory.with(pages.text(first, format.heading().to_owned())?);
    let next = if pages.at_end { Step::End } else { Step::Read(pages) };
    let first = stream::once(future::ready(Ok(text)));
    let rest = stream::try_unfold(next, async |step| match step {
        Step::End => Ok(None),
        Step::Break(error) => {
            // Gives the connection a chance to send the last piece before the error closes it.
            tokio::task::yield_now().await;
            Err(error)
        }
        Step::Read(mut pages) => match pages.read_on().await {
            Ok(text) if !pages.at_end => Ok(Some((text, Step::Read(pages)))),
            Ok(text) => Ok(Some((text, Step::End))),
            Err(error) => {
                let last_words = pages.broken_off(&error);
                // In HTTP/1.0 a response ends when the connection closes, for whatever reason. Only its text can show
                // that it is incomplete.
                let is_http_10 = pages.version < Version::HTTP_11;
                let last_words = Bytes::from(last_words);
                Ok(Some((last_words, if is_http_10 { Step::End } else { Step::Break(error) })))
            }
        },
    });
    let body = Body::from_stream(first.chain(rest));
    let mut response = ([(header::CONTENT_TYPE, media_type(format))], body).into_response();
    if let Some(encoder) = encoder {
        response.extensions_mut().insert(encoder);
    }
    Ok(response)
}

/// The next step of a response.
enum Step {
    Read(Pages),
    /// Cut it off.
    Break(BrokenOff),
    End,
}

/// Why a response is cut off, as a message for the client.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BrokenOff(&'static str);

/// The remaining pages.
struct Pages {
    state: SharedState,
    key: Option<Arc<Key>>,
    query: HistoryQuery,
    /// The number of events still to send; `None` for all of them.
    left: Option<u32>,
    format: Format,
    version: Version,
    /// True if the last page has been read.
    at_end: bool,
}

impl Pages {
    /// The text of the next page, if the client may still read it.
    async fn read_on(&mut self) -> Result<Bytes, BrokenOff> {
        // Nothing is held while it waits.
        let memory = self.memory(PATIENCE).await;
        let memory =
            memory.ok_or(BrokenOff("other answers that are not taken hold too much memory"))?;
        if let Err(why) = self.state.gate.look_again(self.key.as_ref(), Scope::Read) {
            let key_id = self.key.as_ref().map(|key| key.id);
            tracing::info!(
                key_id,
                ?why,
                "a history was cut off, because its key is no longer valid for it"
            );
            return Err(BrokenOff("the key no longer opens this"));
        }
        let unreadable = |_| BrokenOff("the database cannot be read");
        let page = self.read().await.map_err(unreadable)?;
        let page = page.ok_or(BrokenOff("the device was deleted"))?;
        Ok(memory.with(self.text(page, String::new()).map_err(unreadable)?))
    }

    /// Reserves memory for the next page.
    async fn memory(&self, patience: Duration) -> Option<Held> {
        self.state.large_answers.wait_for(PAGE_BYTES, patience).await
    }

    /// Reads the next page.
    async fn read(&mut self) -> Result<Option<EventPage>, StoreError> {
        self.query.limit = self.left.map_or(PAGE, |left| left.min(PAGE));
        let page = self.state.store.events(&self.query).await;
        page.inspect_err(
            |error| tracing::warn!(%error, "the next page of a history cannot be read"),
        )
    }

    /// Appends `page` to `text`, and moves on to the page after it.
    fn text(&mut self, page: EventPage, mut text: String) -> Result<String, StoreError> {
        let sent = u32::try_from(page.events.len()).unwrap_or(u32::MAX);
        self.left = self.left.map(|left| left.saturating_sub(sent));
        self.query.after = page.next;
        self.query.offset = 0;
        self.at_end = page.next.is_none() || self.left == Some(0);
        let device_id = self.query.device_id.as_str();
        for event in page.events {
            let event = HistoryEvent::new(device_id, event);
            self.format.write(&mut text, &event).map_err(StoreError::Failed)?;
        }
        Ok(text)
    }

    /// The last text of a response that is cut off. It is an incomplete line, which no reader accepts as an event.
    fn broken_off(&self, why: &BrokenOff) -> String {
        match self.format {
            Format::Csv => format!("\"broken off: {why}"),
            Format::Ndjson => format!("{{\"broken_off\":\"{why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(accept: &str) -> Option<Format> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, accept.parse().unwrap());
        super::wanted(&headers)
    }

    #[test]
    fn the_format_that_is_wanted_most() {
        assert_eq!(super::wanted(&HeaderMap::new()), None);
        for (accept, expected) in [
            ("*/*", None),
            ("application/json", None),
            ("text/html,application/xhtml+xml,*/*;q=0.8", None),
            ("image/png", None),
            ("text/csv", Some(Format::Csv)),
            ("TEXT/CSV; header=present", Some(Format::Csv)),
            ("text/csv, */*", Some(Format::Csv)),
            ("*/*, text/csv", Some(Format::Csv)),
            ("*/*, text/csv;q=0.9", None),
            ("application/json;q=0.5, text/csv", Some(Format::Csv)),
            ("application/json, text/csv", None),
            ("text/csv;q=0", None),
            ("text/csv;Q=0", None),
            ("text/csv;q=0.2, application/x-ndjson;q=0.3", Some(Format::Ndjson)),
            ("application/x-ndjson, application/json", Some(Format::Ndjson)),
            ("application/*, application/x-ndjson", Some(Format::Ndjson)),
        ] {
            assert_eq!(wanted(accept), expected, "{accept}");
        }
    }
}
