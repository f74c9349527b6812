//! Lines for whoever has typed a command. The terminal or the reader of a pipe may be gone by then: that must not end
//! a command in the middle of its work, as the standard library's macros of these names would.

use std::{
    fmt,
    io::{ErrorKind, Write, stderr, stdout},
    sync::atomic::{AtomicBool, Ordering},
};

/// Whether something could not be written to standard output for which somebody may be waiting.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Text on standard output.
pub(super) fn text(text: fmt::Arguments<'_>) {
    let mut output = stdout().lock();
    let written = output.write_fmt(text).and_then(|()| output.flush());
    // Whoever closes a pipe has seen enough.
    if written.is_err_and(|error| error.kind() != ErrorKind::BrokenPipe) {
        FAILED.store(true, Ordering::Relaxed);
    }
}

/// A line on standard error, where there is one.
pub(super) fn error_line(text: fmt::Arguments<'_>) {
    let _ = writeln!(stderr().lock(), "{text}");
}

/// Whether lines are missing on standard output.
pub(super) fn is_incomplete() -> bool {
    FAILED.load(Ordering::Relaxed)
}
