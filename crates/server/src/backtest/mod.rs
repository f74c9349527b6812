//! Backtests: a fleet in simulated time. The program's own sweeps, incidents and API run over a temporary database, and the
//! clock stands wherever the course of events has come to. There is no second implementation of any rule. The events come
//! from a scenario, or from what a store has kept.

mod comparison;
mod course;
mod history;
mod receivers;
mod replay;
pub mod scenario;
mod scenario_reader;

pub use comparison::Comparison;
pub use course::{BacktestError, run};
pub use history::{History, HistoryRange};
pub use receivers::{ReplayedChannel, SentItem, SentMessage};
pub use replay::{Replayed, replay};
pub use scenario::{Expected, Scenario};
pub use scenario_reader::ScenarioError;
