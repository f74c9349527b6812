//! Backtests: a fleet in simulated time. The program's own sweeps, incidents and API run over a temporary database, and the
//! clock stands wherever the course of events has come to. There is no second implementation of any rule.

mod course;
pub mod scenario;

pub use course::{BacktestError, run};
pub use scenario::{Expected, Scenario};
