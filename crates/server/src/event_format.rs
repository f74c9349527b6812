//! The output form of stored events: the fields in responses, and events as CSV and JSON lines. The streamed history
//! and the export both use it, so that they write the same. It must write every field of an event.

use std::fmt::Write as _;

use clap::ValueEnum;
use pisync_core::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::store::StoredEvent;

/// The header line of the CSV form (RFC 4180).
const CSV_HEADER: &str = "id,device_id,event_id,timestamp,total_files_synced,total_errors,internet_speed,\
     job,duration_seconds,bytes_synced,metadata,created_at,updated_at\r\n";

/// How events are written one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A JSON object per line.
    Ndjson,
    /// Lines of cells, named by the first.
    Csv,
}

impl Format {
    /// The text before the first event.
    #[must_use]
    pub fn heading(self) -> &'static str {
        match self {
            Self::Ndjson => "",
            Self::Csv => CSV_HEADER,
        }
    }

    /// Appends one event to `text`.
    ///
    /// # Errors
    /// When the event cannot be serialized. The message says why.
    pub fn write(self, text: &mut String, event: &HistoryEvent) -> Result<(), String> {
        match self {
            Self::Csv => write_csv(text, event).map_err(|error| error.to_string()),
            Self::Ndjson => {
                let line = serde_json::to_string(event).map_err(|error| error.to_string())?;
                // Metadata is kept as it was sent, perhaps on several lines. JSON strings contain no line breaks, so
                // only white space changes.
                text.push_str(&line.replace(['\n', '\r'], " "));
                text.push('\n');
                Ok(())
            }
        }
    }
}

/// One reported sync.
#[derive(Serialize, ToSchema)]
pub struct HistoryEvent {
    #[schema(example = 1)]
    pub(crate) id: i64,
    #[schema(example = "pi-device-001")]
    pub(crate) device_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "8d1ef3f2-20c0-4c5b-9f7a-3c1f3f3f4b11")]
    pub(crate) event_id: Option<String>,
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:00.000Z")]
    pub(crate) timestamp: Timestamp,
    #[schema(example = 150)]
    pub(crate) total_files_synced: i64,
    #[schema(example = 2)]
    pub(crate) total_errors: i64,
    /// Mbps.
    #[schema(example = 45.6)]
    pub(crate) internet_speed: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "nightly-backup")]
    pub(crate) job: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 73.25)]
    pub(crate) duration_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 104857600)]
    pub(crate) bytes_synced: Option<i64>,
    /// As it was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub(crate) metadata: Option<Box<RawValue>>,
    /// When the server received it.
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    pub(crate) created_at: Timestamp,
    #[schema(value_type = String, format = DateTime, example = "2025-06-17T10:30:02.417Z")]
    pub(crate) updated_at: Timestamp,
}

impl HistoryEvent {
    pub(crate) fn new(device_id: &str, event: StoredEvent) -> Self {
        Self {
            id: event.id,
            device_id: device_id.to_owned(),
            event_id: event.event_id,
            timestamp: event.timestamp,
            total_files_synced: event.total_files_synced,
            total_errors: event.total_errors,
            internet_speed: event.internet_speed.map(in_mbps),
            job: event.job,
            duration_seconds: event.duration.map(in_seconds),
            bytes_synced: event.bytes_synced,
            metadata: event.metadata,
            created_at: event.created_at,
            updated_at: event.updated_at,
        }
    }
}

/// Converts hundredths of Mbps to Mbps.
#[expect(clippy::cast_precision_loss, reason = "at most 34 bits")]
pub(crate) fn in_mbps(hundredths: i64) -> f64 {
    hundredths as f64 / 100.0
}

/// Converts milliseconds to seconds.
#[expect(clippy::cast_precision_loss, reason = "at most 35 bits")]
pub(crate) fn in_seconds(milliseconds: i64) -> f64 {
    milliseconds as f64 / 1000.0
}

/// Writes one line. Cells that a spreadsheet would read as formulas stay unchanged: any prefix would be read back as
/// part of the cell.
fn write_csv(text: &mut String, event: &HistoryEvent) -> std::fmt::Result {
    write!(text, "{},", event.id)?;
    write_cell(text, &event.device_id);
    text.push(',');
    write_cell(text, event.event_id.as_deref().unwrap_or_default());
    write!(text, ",{},{},{},", event.timestamp, event.total_files_synced, event.total_errors)?;
    write_number(text, event.internet_speed)?;
    write_cell(text, event.job.as_deref().unwrap_or_default());
    text.push(',');
    write_number(text, event.duration_seconds)?;
    write_number(text, event.bytes_synced)?;
    write_cell(text, event.metadata.as_ref().map_or("", |metadata| metadata.get()));
    write!(text, ",{},{}\r\n", event.created_at, event.updated_at)
}

/// Writes a number, or nothing, and a comma.
fn write_number(text: &mut String, number: Option<impl std::fmt::Display>) -> std::fmt::Result {
    match number {
        Some(number) => write!(text, "{number},"),
        None => text.write_char(','),
    }
}

/// Writes text, with quotes where they are needed. White space at either end needs them, because readers may strip it.
fn write_cell(text: &mut String, cell: &str) {
    if cell.contains(['"', ',', '\r', '\n']) || cell.trim_ascii() != cell {
        text.push('"');
        text.push_str(&cell.replace('"', "\"\""));
        text.push('"');
    } else {
        text.push_str(cell);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_that_need_quotes_have_them() {
        let cell = |cell: &str| {
            let mut text = String::new();
            write_cell(&mut text, cell);
            text
        };
        assert_eq!(cell("plain text"), "plain text");
        assert_eq!(cell("a,b"), "\"a,b\"");
        assert_eq!(cell("say \"hi\""), "\"say \"\"hi\"\"\"");
        assert_eq!(cell("two\r\nlines"), "\"two\r\nlines\"");
        assert_eq!(cell("=1+1"), "=1+1");
        assert_eq!(cell(" spaced"), "\" spaced\"");
        assert_eq!(cell("spaced\t"), "\"spaced\t\"");
    }

    #[test]
    fn a_line_is_one_line() {
        let time = Timestamp::parse_iso8601("2025-06-17").unwrap();
        let event = StoredEvent {
            id: 1,
            event_id: None,
            timestamp: time,
            total_files_synced: 1,
            total_errors: 0,
            internet_speed: None,
            job: None,
            duration: None,
            bytes_synced: None,
            metadata: RawValue::from_string("{\n \"a\":\r\n\"\\n\"}".to_owned()).ok(),
            created_at: time,
            updated_at: time,
        };
        let mut text = String::new();
        Format::Ndjson.write(&mut text, &HistoryEvent::new("pi", event)).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains(r#""metadata":{  "a":  "\n"}"#), "{text}");
    }
}
