//! Spares the log a line for each of many events of a kind: one in a while stands for all, and says how many.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Lets one line through in each interval. May be asked by many threads at once.
#[derive(Debug)]
pub(crate) struct Seldom {
    started: Instant,
    /// Milliseconds.
    interval: u64,
    /// When the next line may come, in milliseconds after the start.
    due: AtomicU64,
    /// Events since the last line that had none.
    passed_over: AtomicU64,
}

impl Seldom {
    /// One line in `interval`.
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            started: Instant::now(),
            interval: milliseconds(interval),
            due: AtomicU64::new(0),
            passed_over: AtomicU64::new(0),
        }
    }

    /// Whether this event gets a line; then says how many had none since the last.
    pub(crate) fn due(&self) -> Option<u64> {
        self.due_at(milliseconds(self.started.elapsed()))
    }

    fn due_at(&self, now: u64) -> Option<u64> {
        let due = self.due.load(Ordering::Relaxed);
        let next = now.saturating_add(self.interval);
        // Of several at once, one.
        if now >= due
            && self.due.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            return Some(self.passed_over.swap(0, Ordering::Relaxed));
        }
        self.passed_over.fetch_add(1, Ordering::Relaxed);
        None
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_stands_for_those_without() {
        let seldom = Seldom::new(Duration::from_secs(10));
        assert_eq!(seldom.due_at(0), Some(0));
        assert_eq!([seldom.due_at(1), seldom.due_at(9_999)], [None, None]);
        assert_eq!(seldom.due_at(10_000), Some(2));
        assert_eq!(seldom.due_at(10_001), None);
        assert_eq!(seldom.due_at(60_000), Some(1));
    }
}
