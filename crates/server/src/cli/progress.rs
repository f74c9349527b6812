//! Shows how far a long command is: a bar on a terminal, and a line every few seconds elsewhere. Both go to standard error,
//! and have no colours.

use std::{
    io::{self, IsTerminal, Write, stderr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// How often a line says how far it is, where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// The bar that is on the terminal.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn shown() -> Option<ProgressBar> {
    BAR.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn show(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// Writes lines to standard error, above the bar if there is one.
pub(super) struct AboveBar;

impl Write for AboveBar {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let write = || stderr().write_all(lines);
        match shown() {
            Some(bar) => bar.suspend(write)?,
            None => write()?,
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// See the module.
pub(super) struct Progress {
    /// On a terminal.
    bar: Option<ProgressBar>,
    /// Bytes there are, or whatever [`Self::update`] is told; unknown for a pipe.
    total: Option<u64>,
    /// What is counted.
    unit: String,
    started: Instant,
    said: Instant,
}

impl Progress {
    /// Of so many bytes altogether, if that is known.
    pub(super) fn new(total: Option<u64>) -> Self {
        let now = Instant::now();
        let bar = stderr().is_terminal().then(|| bar(total));
        show(bar.clone());
        Self { bar, total, unit: "events".to_owned(), started: now, said: now }
    }

    /// Counts something else than events.
    pub(super) fn counting(self, unit: String) -> Self {
        Self { unit, ..self }
    }

    /// So many bytes are read or written by now, and so many events.
    pub(super) fn update(&mut self, bytes: u64, events: u64) {
        let (rate, unit) = (rate(events, self.started.elapsed()), &self.unit);
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{events} {unit}, {rate}/s"));
            bar.set_position(bytes);
        } else if self.said.elapsed() >= LINE_INTERVAL {
            self.said = Instant::now();
            eprintln!("{events} {unit}, {rate}/s{}", self.left(bytes));
        }
    }

    /// The part that is done and how long the rest will take, if that can be told.
    fn left(&self, bytes: u64) -> String {
        let Some(total) = self.total.filter(|total| (1..=*total).contains(&bytes)) else {
            return String::new();
        };
        let elapsed = u128::from(total - bytes) * self.started.elapsed().as_millis();
        let seconds = (elapsed / u128::from(bytes)).div_ceil(1000).max(1);
        format!(", {} %, {seconds} s left", percent(bytes, total))
    }

    /// Says something else.
    pub(super) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Takes the bar away, and tells how long it took.
    pub(super) fn finish(self) -> Duration {
        show(None);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.started.elapsed()
    }
}

fn bar(total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{wide_bar} {done:>3} %  {msg}  {eta} left"),
        None => (ProgressBar::new_spinner(), "{spinner} {msg}  {elapsed}"),
    };
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    // indicatif's own `percent` rounds, so it would say 100 too early.
    let done = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
        // When it cannot be written, a number is missing on a screen.
        let _ = write!(text, "{}", percent(state.pos(), state.len().unwrap_or_default()));
    };
    bar.with_style(style.with_key("done", done))
}

/// Per cent, rounded down. While this is shown the command is still at work, if only at committing what it has
/// read, so it never says 100.
fn percent(done: u64, total: u64) -> u64 {
    let percent = u128::from(done) * 100 / u128::from(total.max(1));
    u64::try_from(percent).unwrap_or(u64::MAX).min(99)
}

/// Events a second.
pub(super) fn rate(events: u64, took: Duration) -> u64 {
    let milliseconds = took.as_millis().max(1);
    u64::try_from(u128::from(events) * 1000 / milliseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_under_way_is_never_said_to_be_done() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(0, 1_000), 0);
        assert_eq!(percent(499, 1_000), 49);
        assert_eq!(percent(999, 1_000), 99);
        assert_eq!(percent(1_000, 1_000), 99);
        assert_eq!(percent(u64::MAX, u64::MAX), 99);
        let mut progress = Progress::new(Some(1_000));
        progress.started -= Duration::from_secs(1);
        assert_eq!(progress.left(1_000), ", 99 %, 1 s left");
        assert_eq!(progress.left(500), ", 50 %, 1 s left");
    }
}
