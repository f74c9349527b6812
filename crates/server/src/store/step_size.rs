//! How much background work to do at a time, learnt from how long the last step took.

use std::{
    ops::RangeInclusive,
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

/// A size that grows while steps are quick and shrinks when they are slow.
pub(super) struct StepSize {
    size: AtomicI64,
    range: RangeInclusive<i64>,
    /// A step that takes more than twice as long is too large, one of less than half too small.
    target: Duration,
}

impl StepSize {
    /// Begins with the smallest of `range`.
    pub(super) fn new(range: RangeInclusive<i64>, target: Duration) -> Self {
        Self { size: AtomicI64::new(*range.start()), range, target }
    }

    pub(super) fn get(&self) -> i64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Takes note that a full step took so long.
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
