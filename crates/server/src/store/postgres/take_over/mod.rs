//! Taking over the Node service's tables in one transaction. `survey` looks at them, `copy` fills ours, and `run` does both
//! in order.

mod copy;
mod report;
mod run;
mod survey;

pub use report::{Estimate, Progress, Rehearsal, Survey, TakeOverError};
pub(in crate::store) use run::PostgresTakeOver;
