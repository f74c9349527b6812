//! Takes over the Node service's tables in one transaction. `store::take_over` calls it. `survey` checks them, `copy`
//! fills ours, and `run` does both in order. Nothing may be left in between: all of it commits, or nothing.

mod copy;
mod report;
mod run;
mod survey;

pub use report::{Estimate, Progress, Rehearsal, Survey, TakeOverError};
pub(in crate::store) use run::PostgresTakeOver;
