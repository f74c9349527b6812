//! What servers inside the test process write into the log. Tests run side by side, so each looks for lines with a
//! time in them that no other test has.

use std::{
    io,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use tracing_subscriber::{filter::LevelFilter, fmt::MakeWriter};

static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Lines;

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Appender<'a>;

    fn make_writer(&'a self) -> Appender<'a> {
        Appender(LINES.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Appender<'a>(MutexGuard<'a, Vec<u8>>);

impl io::Write for Appender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps lines from now on.
pub(crate) fn listen() {
    static LISTENS: OnceLock<()> = OnceLock::new();
    LISTENS.get_or_init(|| {
        tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(LevelFilter::INFO)
            .with_writer(Lines)
            .init();
    });
}

/// The lines with `text` in them.
pub(crate) fn lines_with(text: &str) -> Vec<String> {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    let lines = String::from_utf8_lossy(&lines).into_owned();
    lines.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
}
