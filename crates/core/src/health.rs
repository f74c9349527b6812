//! Whether a device does what is expected of it, as pure functions of what is known: when its next report is due, and by
//! when it is silent. Nothing here reads a clock or a database.

pub mod deadline;
pub mod schedule;

pub use deadline::{Cause, Deadline, Exclusions, Interval, MovedBy, Waiting, deadline};
pub use schedule::{CronError, CronSchedule, Schedule};
