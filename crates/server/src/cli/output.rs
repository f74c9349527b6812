//! Writes lines for whoever typed a command, and the document of `--json`. The macros of `cli` call it. The reader may be gone
//! by then. That must not end a command in the middle of its work, as the standard library's macros would.

use std::{
    fmt,
    io::{ErrorKind, Write, stderr, stdout},
    sync::atomic::{AtomicBool, Ordering},
};

use clap::Args;
use serde_json::Value;

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

/// The option `--json`. With it, standard output holds one document for programs, and lines for people go to standard
/// error.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct JsonArgs {
    /// Write one JSON document to standard output, and what people read to standard error
    #[arg(long, global = true)]
    json: bool,
}

impl JsonArgs {
    /// Whether there is to be a document.
    pub(super) fn is_asked_for(self) -> bool {
        self.json
    }

    /// A line for people.
    pub(super) fn say(self, line: fmt::Arguments<'_>) {
        if self.json {
            error_line(line);
        } else {
            text(format_args!("{line}\n"));
        }
    }

    /// Keeps a part of the document, if one is asked for.
    pub(super) fn keep(self, parts: &mut Vec<Value>, part: impl FnOnce() -> Value) {
        if self.json {
            parts.push(part());
        }
    }

    /// The document, if one is asked for. The names of its fields are promised by docs/operations.md.
    pub(super) fn document(self, document: impl FnOnce() -> Value) {
        if self.json {
            text(format_args!("{}\n", document()));
        }
    }
}

/// Whether lines are missing on standard output.
pub(super) fn is_incomplete() -> bool {
    FAILED.load(Ordering::Relaxed)
}
