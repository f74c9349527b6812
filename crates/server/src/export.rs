//! Writing stored events out, device by device, oldest first, in the order in which importing them again gives
//! them the same places in a history. Events are read in pages, each a short read of its own: memory stays
//! the same however many there are, and what arrives meanwhile may be in it or not.

use std::io::{self, Write};

use pisync_core::{DeviceId, Timestamp};

use crate::{
    event_format::{Format, HistoryEvent},
    store::{HistoryQuery, Store, StoreError},
};

/// Events that are read at a time. With the largest metadata they are 4 MiB; usually 200 KiB.
const PAGE: u32 = 1_000;

/// Which events to write, and how.
#[derive(Debug)]
pub struct Export {
    /// How events follow each other.
    pub format: Format,
    /// Only this device's.
    pub device: Option<DeviceId>,
    /// Only those of this group's devices.
    pub group: Option<String>,
    /// Only those dated then or later.
    pub from: Option<Timestamp>,
    /// Only those dated then or earlier.
    pub until: Option<Timestamp>,
}

/// Why an export has ended early.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// What it is written to takes no more.
    #[error("cannot write: {0}")]
    Write(#[from] io::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is nobody whose events are meant.
    #[error("{0}")]
    Nobody(String),
}

impl Export {
    /// Writes events to `output` and tells how many they were. `watch` hears of it after each page.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub async fn run(
        &self,
        store: &dyn Store,
        output: &mut impl Write,
        mut watch: impl FnMut(u64),
    ) -> Result<u64, ExportError> {
        let mut events = 0;
        output.write_all(self.format.heading().as_bytes())?;
        if let Some(device_id) = &self.device {
            if !self.write_device(store, device_id, output, &mut events, &mut watch).await? {
                return Err(ExportError::Nobody(format!("there is no device {device_id}")));
            }
            return Ok(events);
        }
        let mut after: Option<DeviceId> = None;
        loop {
            let last = after.as_ref().map(DeviceId::as_str);
            let devices = store.device_ids(self.group.as_deref(), last).await?;
            for device_id in &devices {
                // One that is deleted meanwhile has no events any more.
                self.write_device(store, device_id, output, &mut events, &mut watch).await?;
            }
            match (devices.into_iter().next_back(), &self.group) {
                (None, Some(group)) if after.is_none() => {
                    return Err(ExportError::Nobody(format!("no device is in the group {group}")));
                }
                (None, _) => return Ok(events),
                (last, _) => after = last,
            }
        }
    }

    /// Writes a device's events; false when there is no such device.
    async fn write_device(
        &self,
        store: &dyn Store,
        device_id: &DeviceId,
        output: &mut impl Write,
        events: &mut u64,
        watch: &mut impl FnMut(u64),
    ) -> Result<bool, ExportError> {
        let mut query = HistoryQuery {
            from: self.from,
            until: self.until,
            oldest_first: true,
            ..HistoryQuery::newest(device_id.clone(), PAGE)
        };
        let mut text = String::new();
        loop {
            let Some(page) = store.events(&query).await? else { return Ok(query.after.is_some()) };
            text.clear();
            *events += page.events.len() as u64;
            for event in page.events {
                let event = HistoryEvent::new(device_id.as_str(), event);
                self.format.write(&mut text, &event).map_err(StoreError::Failed)?;
            }
            output.write_all(text.as_bytes())?;
            watch(*events);
            match page.next {
                Some(next) => query.after = Some(next),
                None => return Ok(true),
            }
        }
    }
}
