//! Quarantines acknowledged events that cannot be stored as they are, in files beside the database. `pisync import`
//! reads these files. `apply` and `journal_commands` call it. It must only append to a file.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use pisync_core::{EventId, JobName, Metadata, SyncEvent, Timestamp};
use serde_json::{Value, json};

use super::paths::{DOUBTFUL_EVENTS, REFUSED_EVENTS, beside};
use crate::{
    permissions::{self, PRIVATE},
    store::{Batch, StoreError},
};

/// Keeps an acknowledged event that the tables refuse in a file. It can be imported from there once the reason is gone.
pub(super) fn quarantine(
    database: &Path,
    batch: &Batch,
    position: usize,
    refused: &dyn std::fmt::Display,
) {
    let path = beside(database, REFUSED_EVENTS);
    let line = import_line(batch, position);
    let file = path.display();
    match append_lines(&path, std::slice::from_ref(&line)) {
        Ok(()) => tracing::error!(
            error = %refused,
            device_id = %batch.events[position].device_id,
            %file,
            "the database refuses an event that was acknowledged; it is kept in a file, for `pisync import`"
        ),
        Err(error) => tracing::error!(
            error = %refused,
            event = %line,
            %file,
            "the database refuses an event that was acknowledged, and it cannot be kept: {error}"
        ),
    }
}

/// Keeps events from a damaged stretch of the journal in a file, as `pisync import` reads it. Answers the file's path.
/// Nobody knows whether the events are as they were, or when they were received.
pub(super) fn keep_doubtful(
    database: &Path,
    events: Vec<SyncEvent>,
) -> Result<PathBuf, StoreError> {
    let path = beside(database, DOUBTFUL_EVENTS);
    let batch = Batch::new(Timestamp::MIN, events);
    let lines: Vec<_> = (0..batch.events.len())
        .map(|position| {
            let mut line = import_line(&batch, position);
            if let Some(fields) = line.as_object_mut() {
                fields.remove("created_at");
            }
            line
        })
        .collect();
    append_lines(&path, &lines)
        .map_err(|error| StoreError::Failed(format!("cannot write {}: {error}", path.display())))?;
    Ok(path)
}

/// Appends lines to a file and syncs it. Creates a missing file.
fn append_lines(path: &Path, lines: &[Value]) -> std::io::Result<()> {
    let mut file = permissions::append(path, PRIVATE)?;
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// An event as `pisync import` reads it.
#[expect(clippy::cast_precision_loss, reason = "at most 35 bits")]
fn import_line(batch: &Batch, position: usize) -> Value {
    let event = &batch.events[position];
    json!({
        "device_id": event.device_id.as_str(),
        "event_id": event.event_id.as_ref().map(EventId::as_str),
        "timestamp": event.timestamp,
        "total_files_synced": event.total_files_synced,
        "total_errors": event.total_errors,
        "internet_speed": event.internet_speed.map(|speed| speed.hundredths() as f64 / 100.0),
        "job": event.job.as_ref().map(JobName::as_str),
        "duration_seconds": event.duration.map(|took| took.milliseconds() as f64 / 1000.0),
        "bytes_synced": event.bytes_synced,
        "metadata": event.metadata.as_ref().map(Metadata::to_raw_value),
        "created_at": batch.received_at(position),
    })
}
