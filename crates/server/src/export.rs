//! Exports stored events for the command line, device by device, oldest first. Importing them in this order gives the
//! same order in histories. Events are read in pages, each in a short read, so memory stays constant. An event that
//! arrives meanwhile may be missing.

use std::io::{self, Write};

use pisync_core::{DeviceId, GroupName, Timestamp};

use crate::{
    event_format::{Format, HistoryEvent},
    store::{HistoryQuery, Store, StoreError},
};

/// The number of events per page. A page takes 4 MiB with the largest metadata, and usually 200 KiB.
const PAGE: u32 = 1_000;

/// Which events to export, and their format.
#[derive(Debug)]
pub struct Export {
    /// The output format.
    pub format: Format,
    /// Only events of this device.
    pub device: Option<DeviceId>,
    /// Only events of devices in this group.
    pub group: Option<GroupName>,
    /// Only events dated at this time or later.
    pub from: Option<Timestamp>,
    /// Only events dated at this time or earlier.
    pub until: Option<Timestamp>,
}

/// Why an export ended early.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The output cannot be written.
    #[error("cannot write: {0}")]
    Write(#[from] io::Error),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The device does not exist, or the group has no devices.
    #[error("{0}")]
    Nobody(String),
}

impl Export {
    /// Writes events to `output` and returns their number. Calls `watch` with the number so far after each page.
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
            let devices = store.device_ids(self.group.as_ref(), last).await?;
            for device_id in &devices {
                // A device that was deleted meanwhile has no events.
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

    /// Writes the events of a device. Returns false if the device does not exist.
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
