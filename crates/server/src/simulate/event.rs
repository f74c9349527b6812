//! One report of a simulated device, and the line of JSON that is sent for it. `runs` makes events; `sender` sends them,
//! and `compare` expects them in histories. Text here must need no escapes in JSON.

use std::fmt::Write as _;

use pisync_core::Timestamp;
use serde_json::{Map, Value, json};

use super::fleet::Fleet;

/// A time or a span in milliseconds. Times count from 1970, as `timestamp` does.
pub(super) type Milliseconds = i64;

pub(super) const SECOND: Milliseconds = 1_000;
pub(super) const MINUTE: Milliseconds = 60 * SECOND;
pub(super) const HOUR: Milliseconds = 60 * MINUTE;
pub(super) const DAY: Milliseconds = 24 * HOUR;

/// How a device writes its date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dated {
    /// To the millisecond.
    Exactly,
    /// As a bare date, which means its midnight. Many runs then have one date.
    ByDay,
    /// The device does not trust its clock, so the server dates the report by its arrival.
    ByArrival,
}

/// Why a run failed or was slow, as the device tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Note {
    DiskFull,
    SlowLink,
    Certificate,
    Unlucky,
}

impl Note {
    fn text(self) -> &'static str {
        match self {
            Self::DiskFull => "no space left on device",
            Self::SlowLink => "timed out",
            Self::Certificate => "certificate has expired",
            Self::Unlucky => "connection reset",
        }
    }
}

/// One report. It is made again from the seed whenever it is needed, so few of them are in memory at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// Which of its device's reports, in the order of the runs.
    pub(super) number: u32,
    pub(super) job: u8,
    /// By the device's clock.
    pub(super) timestamp: Milliseconds,
    pub(super) dated: Dated,
    pub(super) files: u32,
    pub(super) errors: u32,
    /// Hundredths of Mbps.
    pub(super) speed: Option<u32>,
    pub(super) duration: Milliseconds,
    pub(super) bytes: u64,
    pub(super) note: Option<Note>,
    /// When it is delivered, in simulated time.
    pub(super) due: Milliseconds,
    /// It was kept while the device could not report.
    pub(super) is_late: bool,
    /// Its answer gets lost on the device's side, so the device sends it once more so much later.
    pub(super) again_after: Option<Milliseconds>,
}

impl Event {
    /// Its date, unless the server dates it.
    pub(super) fn date(&self) -> Option<Milliseconds> {
        match self.dated {
            Dated::Exactly => Some(self.timestamp),
            Dated::ByDay => Some(self.timestamp - self.timestamp.rem_euclid(DAY)),
            Dated::ByArrival => None,
        }
    }

    /// Appends the JSON that device `device` sends, without a line break.
    pub(super) fn write(&self, fleet: &Fleet, device: u32, line: &mut String) {
        // Writing to a string never fails.
        let _ = self.try_write(fleet, device, line);
    }

    fn try_write(&self, fleet: &Fleet, device: u32, line: &mut String) -> std::fmt::Result {
        line.push_str("{\"device_id\":\"");
        fleet.write_device_id(device, line);
        write!(line, "\",\"event_id\":\"{}\",\"timestamp\":\"", event_id(self.number))?;
        let timestamp = text(self.timestamp);
        line.push_str(match self.dated {
            Dated::ByDay => timestamp.get(..10).unwrap_or(&timestamp),
            Dated::Exactly | Dated::ByArrival => &timestamp,
        });
        let (files, errors) = (self.files, self.errors);
        write!(line, "\",\"total_files_synced\":{files},\"total_errors\":{errors}")?;
        if let Some(speed) = self.speed {
            write!(line, ",\"internet_speed\":{}.{:02}", speed / 100, speed % 100)?;
        }
        if let Some(job) = fleet.job(self.job) {
            write!(line, ",\"job\":\"{job}\"")?;
        }
        write!(
            line,
            ",\"duration_seconds\":{}.{:03}",
            self.duration / 1_000,
            self.duration % 1_000
        )?;
        write!(line, ",\"bytes_synced\":{}", self.bytes)?;
        if self.dated == Dated::ByArrival {
            line.push_str(",\"clock\":\"unsynced\"");
        }
        if let Some(note) = self.note {
            write!(line, ",\"metadata\":{{\"error\":\"{}\"}}", note.text())?;
        }
        line.push('}');
        Ok(())
    }

    /// What a history must show of it, but for the server's own fields.
    #[expect(clippy::cast_precision_loss, reason = "a duration has at most 32 bits")]
    pub(super) fn shown(
        &self,
        fleet: &Fleet,
        device: u32,
        id: i64,
        date: Milliseconds,
    ) -> Map<String, Value> {
        let metadata = match (self.note, self.dated) {
            (Some(note), Dated::ByArrival) => {
                Some(json!({"error": note.text(), "device_timestamp": text(self.timestamp)}))
            }
            (Some(note), _) => Some(json!({"error": note.text()})),
            (None, Dated::ByArrival) => Some(json!({"device_timestamp": text(self.timestamp)})),
            (None, _) => None,
        };
        let fields = [
            ("id", Some(json!(id))),
            ("device_id", Some(json!(fleet.device_id(device)))),
            ("event_id", Some(json!(event_id(self.number)))),
            ("timestamp", Some(json!(text(date)))),
            ("total_files_synced", Some(json!(self.files))),
            ("total_errors", Some(json!(self.errors))),
            ("internet_speed", Some(json!(self.speed.map(|speed| f64::from(speed) / 100.0)))),
            ("job", fleet.job(self.job).map(|job| json!(job))),
            ("duration_seconds", Some(json!(self.duration as f64 / 1_000.0))),
            ("bytes_synced", Some(json!(self.bytes))),
            ("metadata", metadata),
        ];
        let given = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        given.collect()
    }
}

/// What a device calls its report with this number.
fn event_id(number: u32) -> String {
    format!("run-{number}")
}

/// A time as PiSync writes it.
pub(super) fn text(time: Milliseconds) -> String {
    Timestamp::from_millisecond(time).map_or_else(|| time.to_string(), |time| time.to_string())
}
