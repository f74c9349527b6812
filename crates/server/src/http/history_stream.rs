//! A device's history as CSV or NDJSON, streamed page by page: memory stays the same however long the
//! history is, and between two pages no connection to the database is held.

use axum::{
    body::Body,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;

use super::{SharedState, error::ApiError};
use crate::{
    event_format::{Format, HistoryEvent},
    store::{EventPage, HistoryQuery, StoreError},
};

/// Events that are read at a time. With the largest metadata they are 2 MiB; usually 100 KiB.
const PAGE: u32 = 500;

/// The format that the client wants rather than JSON.
pub(super) fn wanted(headers: &HeaderMap) -> Option<Format> {
    // Of equals, one that is named goes before a wildcard, which JSON answers, and the first
    // before those after it.
    let mut best = (0.0, false, None);
    let lines = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    for range in lines.flat_map(|line| line.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default().to_ascii_lowercase();
        let (named, format) = match media_type.as_str() {
            "text/csv" => (true, Some(Format::Csv)),
            "application/x-ndjson" | "application/ndjson" => (true, Some(Format::Ndjson)),
            "application/json" => (true, None),
            "*/*" | "application/*" => (false, None),
            _ => continue,
        };
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.trim().parse().ok());
        let weight: f64 = weight.unwrap_or(1.0);
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

/// Answers with all events that `query` finds, or `limit` of them.
///
/// # Errors
/// When the device is unknown or its first page cannot be read. Afterwards an error cuts the answer
/// off, which the client sees.
pub(super) async fn respond(
    state: SharedState,
    query: HistoryQuery,
    limit: Option<u32>,
    format: Format,
) -> Result<Response, ApiError> {
    let mut pages = Pages { state, query, left: limit, format };
    let first = pages.read().await?.ok_or(ApiError::NotFound("Device"))?;
    let stream = stream::try_unfold(Some((pages, Some(first))), async |step| {
        let Some((mut pages, read)) = step else { return Ok(None) };
        let (page, is_first) = match read {
            Some(page) => (page, true),
            // A device that has been deleted meanwhile has no more events.
            None => match pages.read().await? {
                Some(page) => (page, false),
                None => return Ok(None),
            },
        };
        let more = pages.go_on_after(&page);
        let text = pages.text(page, is_first)?;
        Ok::<_, StoreError>(Some((Bytes::from(text), more.then_some((pages, None)))))
    });
    Ok(([(header::CONTENT_TYPE, media_type(format))], Body::from_stream(stream)).into_response())
}

/// The pages still to come.
struct Pages {
    state: SharedState,
    query: HistoryQuery,
    /// Events still to send; all of them when `None`.
    left: Option<u32>,
    format: Format,
}

impl Pages {
    async fn read(&mut self) -> Result<Option<EventPage>, StoreError> {
        self.query.limit = self.left.map_or(PAGE, |left| left.min(PAGE));
        let page = self.state.store.events(&self.query).await;
        page.inspect_err(|error| tracing::warn!(%error, "a history cannot be read on"))
    }

    /// Makes the next page follow `page`; false when that was the last.
    fn go_on_after(&mut self, page: &EventPage) -> bool {
        let sent = u32::try_from(page.events.len()).unwrap_or(u32::MAX);
        self.left = self.left.map(|left| left.saturating_sub(sent));
        self.query.after = page.next;
        self.query.offset = 0;
        page.next.is_some() && self.left != Some(0)
    }

    fn text(&self, page: EventPage, is_first: bool) -> Result<String, StoreError> {
        let mut text = String::new();
        if is_first {
            text.push_str(self.format.heading());
        }
        let device_id = self.query.device_id.as_str();
        for event in page.events {
            let event = HistoryEvent::new(device_id, event);
            self.format.write(&mut text, &event).map_err(StoreError::Failed)?;
        }
        Ok(text)
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
            ("text/csv;q=0.2, application/x-ndjson;q=0.3", Some(Format::Ndjson)),
            ("application/x-ndjson, application/json", Some(Format::Ndjson)),
            ("application/*, application/x-ndjson", Some(Format::Ndjson)),
        ] {
            assert_eq!(wanted(accept), expected, "{accept}");
        }
    }
}
