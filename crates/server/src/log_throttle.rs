//! Limits how often one kind of event is logged. The HTTP layer and ingest use it. One line stands for many events and
//! must say how many were skipped.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Allows one line per interval. Many threads may call it at once.
#[derive(Debug)]
pub(crate) struct OnePerInterval {
    started: Instant,
    /// In milliseconds.
    interval: u64,
    /// The earliest time of the next line, in milliseconds after `started`.
    due: AtomicU64,
    /// Events skipped since the last line.
    suppressed: AtomicU64,
}

impl OnePerInterval {
    /// One line in `interval`.
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            started: Instant::now(),
            interval: milliseconds(interval),
            due: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
        }
    }

    /// Whether this event is logged. The value is the number of events skipped since the last line.
    pub(crate) fn due(&self) -> Option<u64> {
        self.due_at(milliseconds(self.started.elapsed()))
    }

    fn due_at(&self, now: u64) -> Option<u64> {
        let due = self.due.load(Ordering::Relaxed);
        let next = now.saturating_add(self.interval);
        // If several threads come at once, one of them wins.
        if now >= due
            && self.due.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            return Some(self.suppressed.swap(0, Ordering::Relaxed));
        }
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        None
    }
}

/// Allows some lines per interval. It is for events that anybody can cause as often as they like, but whose first few
/// deserve a line.
#[derive(Debug)]
pub(crate) struct FewPerInterval {
    started: Instant,
    /// In milliseconds.
    interval: u64,
    most: u64,
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    /// The end of the window, in milliseconds after `started`.
    end: u64,
    lines: u64,
    /// Events skipped since the last line.
    suppressed: u64,
}

/// A permitted line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PermittedLine {
    /// Events skipped since the previous line.
    pub(crate) suppressed: u64,
    /// True if no further line is allowed in this interval.
    pub(crate) is_last: bool,
}

impl FewPerInterval {
    /// 20 lines in 10 s; messages name these numbers. It is enough to find out what is wrong with a device.
    pub(crate) fn usual() -> Self {
        Self::new(20, Duration::from_secs(10))
    }

    /// `most` lines per `interval`.
    fn new(most: u64, interval: Duration) -> Self {
        Self {
            started: Instant::now(),
            interval: milliseconds(interval),
            most,
            window: Mutex::default(),
        }
    }

    /// The line for this event, if it may be logged.
    pub(crate) fn due(&self) -> Option<PermittedLine> {
        self.due_at(milliseconds(self.started.elapsed()))
    }

    fn due_at(&self, now: u64) -> Option<PermittedLine> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= window.end {
            window.end = now.saturating_add(self.interval);
            window.lines = 0;
        }
        if window.lines == self.most {
            window.suppressed += 1;
            return None;
        }
        window.lines += 1;
        let suppressed = std::mem::take(&mut window.suppressed);
        Some(PermittedLine { suppressed, is_last: window.lines == self.most })
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
        let line = OnePerInterval::new(Duration::from_secs(10));
        assert_eq!(line.due_at(0), Some(0));
        assert_eq!([line.due_at(1), line.due_at(9_999)], [None, None]);
        assert_eq!(line.due_at(10_000), Some(2));
        assert_eq!(line.due_at(10_001), None);
        assert_eq!(line.due_at(60_000), Some(1));
    }

    #[test]
    fn a_few_lines_stand_for_those_behind_them() {
        let few = FewPerInterval::new(2, Duration::from_secs(10));
        let line = |suppressed, is_last| Some(PermittedLine { suppressed, is_last });
        assert_eq!([few.due_at(5), few.due_at(6)], [line(0, false), line(0, true)]);
        assert_eq!([few.due_at(7), few.due_at(10_004)], [None, None]);
        assert_eq!([few.due_at(10_005), few.due_at(10_006)], [line(2, false), line(0, true)]);
        assert_eq!([few.due_at(10_007), few.due_at(90_000)], [None, line(1, false)]);
    }
}
