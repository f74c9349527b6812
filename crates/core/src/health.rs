//! Whether a device does what is expected of it, as pure functions of what is known: what its policy is, when its next report
//! is due, by when it is silent, and whether too many of its runs have failed. Nothing here reads a clock or a database.

pub mod deadline;
pub mod incident;
pub mod policy;
pub mod resolve;
pub mod schedule;
pub mod state;
pub mod window;

pub use deadline::{Cause, Deadline, Exclusions, Interval, MovedBy, Waiting, deadline};
pub use incident::{IncidentScope, Resolution, Tally, Threshold};
pub use policy::{Expect, FailingRule, JobPolicy, Policy, PolicyChange, Rules, Severity};
pub use resolve::{Decided, EffectivePolicy, EffectiveRules, Level, Levels};
pub use schedule::{CronError, CronSchedule, Schedule, time_zone};
pub use state::{
    DeviceFacts, EndError, Expectation, FARTHEST_END, Health, JobFacts, JobHealth, JobReports,
    OpenRun, Outcome, Pause, Problem, ProblemKind, Reason, State, check_end, evaluate,
    needs_outcomes, waiting_since,
};
pub use window::{WEEKDAYS, Weekly, WindowTimes};
