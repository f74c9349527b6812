//! Quarantines acknowledged events that cannot be stored as they are, in files beside the database. `pisync import`
//! reads these files. `apply` and `journal_commands` call it. It must only append to a file.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use pisync_core::{ReceivedEvent, SyncEvent};

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
    let event = ReceivedEvent {
        event: batch.events[position].clone(),
        created_at: Some(batch.received_at(position)),
    };
    let file = path.display();
    match append(&path, std::slice::from_ref(&event)) {
        Ok(()) => tracing::error!(
            error = %refused,
            device_id = %event.event.device_id,
            %file,
            "the database refuses an event that was acknowledged; it is kept in a file, for `pisync import`"
        ),
        Err(error) => tracing::error!(
            error = %refused,
            event = event.to_json().unwrap_or_else(|_| format!("{event:?}")),
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
    let events: Vec<_> =
        events.into_iter().map(|event| ReceivedEvent { event, created_at: None }).collect();
    append(&path, &events)
        .map_err(|error| StoreError::Failed(format!("cannot write {}: {error}", path.display())))?;
    Ok(path)
}

/// Appends events to a file, a line each, and syncs it. Creates a missing file.
fn append(path: &Path, events: &[ReceivedEvent]) -> std::io::Result<()> {
    let mut text = String::new();
    for event in events {
        text += &event.to_json()?;
        text.push('\n');
    }
    let mut file = permissions::append(path, PRIVATE)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
