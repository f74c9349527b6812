//! How a command ends: the exit statuses that `--help` promises, and the message that goes with all but one. Every command
//! returns a [`Failure`] when it did not do all of what was asked, and `cli::main` alone turns it into the process's end.
//! Nothing here writes anything.

use std::process::ExitCode;

use crate::{
    clock::ClockNotSet,
    config::ConfigError,
    export::ExportError,
    import::ImportError,
    keys::CreateError,
    store::{CopyError, StoreError, migrations::MigrationError, take_over::TakeOverError},
};

/// What the help of `pisync` says of them; commands that use more than the first three say so in theirs.
pub(super) const EXIT_STATUS: &str = "\
Exit status: 0 success, 1 failure, 2 wrong usage or a setting with a bad value,
3 done in part (import), 4 could not find out (verify, journal inspect,
simulate), 129, 130 or 143 ended by SIGHUP, SIGINT or SIGTERM.";

/// The exit statuses of a command that no signal has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum ExitStatus {
    /// It failed; or it was asked a question, and the answer is no.
    Failure = 1,
    /// What was typed or set makes no sense; clap ends with the same.
    Usage = 2,
    /// `import` rejected some records and stored the others.
    Partly = 3,
    /// A command that answers a question could not find the answer: 1 would say no.
    Unanswered = 4,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// Why a command did not do all of what was asked.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: ExitStatus,
    /// What happened, to what, and what to do next.
    pub(super) message: String,
}

impl Failure {
    /// What was typed or set makes no sense.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self { status: ExitStatus::Usage, message: message.into() }
    }

    /// Whether what was typed or set is why.
    pub(super) fn is_usage(&self) -> bool {
        self.status == ExitStatus::Usage
    }

    /// Some of it is done.
    pub(super) fn partly(message: impl Into<String>) -> Self {
        Self { status: ExitStatus::Partly, message: message.into() }
    }

    /// The same of a command that answers a question, and could not.
    pub(super) fn unanswered(self) -> Self {
        let status = match self.status {
            ExitStatus::Failure => ExitStatus::Unanswered,
            other => other,
        };
        Self { status, ..self }
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self { status: ExitStatus::Failure, message }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<MigrationError> for Failure {
    fn from(error: MigrationError) -> Self {
        match error {
            MigrationError::BadName(_) => Self::usage(error.to_string()),
            error => Self::from(error.to_string()),
        }
    }
}

impl From<TakeOverError> for Failure {
    fn from(error: TakeOverError) -> Self {
        match error {
            TakeOverError::UnknownTimeZone(_) => Self::usage(error.to_string()),
            error => Self::from(error.to_string()),
        }
    }
}

/// Errors that have nothing to do with what was typed.
macro_rules! failures {
    ($($error:ty),+ $(,)?) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::from(error.to_string())
            }
        }
    )+};
}

failures!(
    ClockNotSet,
    CopyError,
    CreateError,
    ExportError,
    ImportError,
    StoreError,
    serde_json::Error
);
