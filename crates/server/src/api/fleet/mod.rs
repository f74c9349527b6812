//! The fleet as a whole.

pub(super) mod stats;
