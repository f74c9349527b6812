//! Decides how much background work to do in one step, from the time that the last step took. Both stores call it for
//! background work. It reads no clock.

use std::{
    ops::RangeInclusive,
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

/// A size that grows while steps are quick and shrinks when they are slow.
pub(super) struct StepSize {
    size: AtomicI64,
    range: RangeInclusive<i64>,
    /// The target time of a step. A step that takes more than twice as long is too large. One that takes less than half
    /// is too small.
    target: Duration,
}

impl StepSize {
    /// Begins with the smallest size of `range`.
    pub(super) fn new(range: RangeInclusive<i64>, target: Duration) -> Self {
        Self { size: AtomicI64::new(*range.start()), range, target }
    }

    pub(super) fn get(&self) -> i64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Notes how long a full step took.
    pub(super) fn learn(&self, took: Duration) {
        let size = self.get();
        let next = if took > self.target * 2 {
            size / 2
        } else if took < self.target / 2 {
            size.saturating_mul(2)
        } else {
            size
        };
        let next = next.clamp(*self.range.start(), *self.range.end());
        self.size.store(next, Ordering::Relaxed);
    }
}
