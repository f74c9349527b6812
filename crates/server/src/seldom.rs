//! Spares the log a line for each of many events of a kind: one in a while stands for all, and says how many.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
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

/// Lets some lines through in each interval. For what anybody may cause as often as they like, and of which the first
/// few are worth a line of their own.
#[derive(Debug)]
pub(crate) struct FewPerInterval {
    started: Instant,
    /// Milliseconds.
    interval: u64,
    most: u64,
    window: Mutex<FewWindow>,
}

#[derive(Debug, Default)]
struct FewWindow {
    /// When it ends, in milliseconds after the start.
    end: u64,
    lines: u64,
    /// Events since the last line that had none.
    passed_over: u64,
}

/// A line that may be written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OfFew {
    /// Events since the line before that had none.
    pub(crate) passed_over: u64,
    /// Nothing more is let through in this interval.
    pub(crate) is_last: bool,
}

impl FewPerInterval {
    /// 20 lines in 10 s, which messages name: enough for people who look for what is wrong with a device.
    pub(crate) fn usual() -> Self {
        Self::new(20, Duration::from_secs(10))
    }

    /// So many lines in `interval`.
    fn new(most: u64, interval: Duration) -> Self {
        Self {
            started: Instant::now(),
            interval: milliseconds(interval),
            most,
            window: Mutex::default(),
        }
    }

    /// The line that this event gets, if it gets one.
    pub(crate) fn due(&self) -> Option<OfFew> {
        self.due_at(milliseconds(self.started.elapsed()))
    }

    fn due_at(&self, now: u64) -> Option<OfFew> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= window.end {
            window.end = now.saturating_add(self.interval);
            window.lines = 0;
        }
        if window.lines == self.most {
            window.passed_over += 1;
            return None;
        }
        window.lines += 1;
        let passed_over = std::mem::take(&mut window.passed_over);
        Some(OfFew { passed_over, is_last: window.lines == self.most })
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

    #[test]
    fn a_few_lines_stand_for_those_behind_them() {
        let few = FewPerInterval::new(2, Duration::from_secs(10));
        let line = |passed_over, is_last| Some(OfFew { passed_over, is_last });
        assert_eq!([few.due_at(5), few.due_at(6)], [line(0, false), line(0, true)]);
        assert_eq!([few.due_at(7), few.due_at(10_004)], [None, None]);
        assert_eq!([few.due_at(10_005), few.due_at(10_006)], [line(2, false), line(0, true)]);
        assert_eq!([few.due_at(10_007), few.due_at(90_000)], [None, line(1, false)]);
    }
}
