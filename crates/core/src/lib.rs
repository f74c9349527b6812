//! What a PiSync sync event *is*: validated types, the wire format that server and agent share, the rule for streaks, and the
//! rules by which a device is healthy. Nothing here does I/O, is async, or reads a clock.

pub mod decimal;
pub mod event_fields;
pub mod event_stream;
pub mod figures;
pub mod health;
pub mod metadata;
pub mod quantity;
pub mod received_event;
pub mod run_start;
pub mod sync_event;
pub mod text;
pub mod timestamp;
pub mod violation;

mod lenient;

pub use figures::{JobFigures, LONGEST_LEAD, StreakCount, later_until};
pub use metadata::Metadata;
pub use quantity::{Mbps, SyncDuration};
pub use received_event::ReceivedEvent;
pub use run_start::RunStart;
pub use sync_event::{Arrival, DeviceClock, ParseError, SyncEvent};
pub use text::{DeviceId, EventId, GroupName, JobName};
pub use timestamp::{Timestamp, TimestampError};
pub use violation::{Violation, ViolationCode};
