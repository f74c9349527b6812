//! Classifies PostgreSQL's errors. Every SQLSTATE that decides what happens next must stand in the one table here. Code
//! that runs a statement calls [`class_of`], [`is_connection_lost`] or [`store_error`].

use std::{error::Error, fmt};

use tokio_postgres::error::{DbError, Severity};

use crate::store::{OtherGroup, StoreError};

/// PostgreSQL's errors, by what can be done about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ErrorClass {
    /// The session has ended. The outcome of a commit in flight is unknown.
    ConnectionLost,
    /// The statement failed and the next one would fail, too: a full disk, no more connections, a standby.
    Unavailable,
    /// The transaction was rolled back for a passing reason. The same transaction may succeed at once.
    Transient,
    /// The database, or a rule of its owner, refused the data. It will be refused again.
    Rejected,
    /// A mistake of ours, a foreign schema, a damaged table.
    Failed,
}

/// The class of a SQLSTATE. `ends_session` tells whether the error's severity was FATAL or PANIC. PostgreSQL then
/// closes the connection, whatever the code is.
fn class_of_code(code: &str, ends_session: bool) -> ErrorClass {
    use ErrorClass::{ConnectionLost, Failed, Rejected, Transient, Unavailable};
    if ends_session {
        return ConnectionLost;
    }
    match code {
        // statement_completion_unknown: a pooler or proxy has lost the answer to a commit.
        "40003" => ConnectionLost,
        // PostgreSQL ended an idle session, an idle transaction, or a transaction that took too long.
        "25P03" | "25P04" | "57P05" => ConnectionLost,
        // Shutdown by an administrator, shutdown after a crash, or not started yet; or the database was dropped.
        "57P01" | "57P02" | "57P03" | "57P04" => ConnectionLost,
        // query_canceled: a person or a time-out cancelled the statement. It is rolled back, and the session lives.
        "57014" => Transient,
        // object_in_use, lock_not_available.
        "55006" | "55P03" => Transient,
        // The server has become a standby, or its owner made it read-only.
        "25006" => Unavailable,
        // with_check_option_violation.
        "44000" => Rejected,
        _ => match code.get(..2) {
            // Connection exceptions.
            Some("08") => ConnectionLost,
            // Deadlocks, serialization failures and other rollbacks.
            Some("40") => Transient,
            // Lack of disk space, memory or connections; objects not in the required state; other interventions by an
            // operator; errors of the operating system.
            Some("53" | "55" | "57" | "58") => Unavailable,
            // Data exceptions; constraints; `raise exception` in an owner's trigger.
            Some("22" | "23" | "P0") => Rejected,
            _ => Failed,
        },
    }
}

fn ends_session(error: &DbError) -> bool {
    match error.parsed_severity() {
        Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
        // PostgreSQL before 9.6, or another program that speaks its protocol.
        None => matches!(error.severity(), "FATAL" | "PANIC"),
    }
}

/// What can be done about an error. An error without a SQLSTATE comes from the driver: the connection broke, or its
/// bytes made no sense. That may have happened after a commit, so the connection counts as lost.
pub(super) fn class_of(error: &tokio_postgres::Error) -> ErrorClass {
    let Some(answered) = error.as_db_error() else { return ErrorClass::ConnectionLost };
    if is_raised(error) {
        return ErrorClass::Rejected;
    }
    match class_of_code(answered.code().code(), ends_session(answered)) {
        // A function of the owner failed. It fails for this data, but perhaps not for other data.
        ErrorClass::Failed if answered.where_().is_some() => ErrorClass::Rejected,
        class => class,
    }
}

/// Whether a rule of the database's owner, such as a trigger, has refused with `raise`. It may use any code, which then
/// says nothing about the database. The name is that of PostgreSQL's own function for `raise`.
pub(super) fn is_raised(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| error.routine() == Some("exec_stmt_raise"))
}

/// Whether the connection cannot be used any more, and the outcome of a commit in flight is unknown.
pub(super) fn is_connection_lost(error: &tokio_postgres::Error) -> bool {
    class_of(error) == ErrorClass::ConnectionLost
}

/// Whether a working server has refused a session, because the password, the database's name or a setting is wrong. The
/// severity is FATAL for any reason, so only the code tells.
pub(super) fn is_refusal(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        Some(code) => {
            let class = class_of_code(code.code(), false);
            matches!(class, ErrorClass::Failed | ErrorClass::Rejected)
                && !code.code().starts_with("XX")
        }
        // Certificates are wrong, or TLS is required but not available.
        None => error.to_string().starts_with("error performing TLS handshake"),
    }
}

/// Converts an error for the rest of the program.
#[expect(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
pub(super) fn store_error(error: tokio_postgres::Error) -> StoreError {
    let text = describe(&error);
    match class_of(&error) {
        // The driver could not read or write a value. That says nothing about the database.
        ErrorClass::ConnectionLost if error.as_db_error().is_none() && !is_broken(&error) => {
            StoreError::Failed(text)
        }
        ErrorClass::ConnectionLost | ErrorClass::Unavailable => unavailable(&text),
        ErrorClass::Transient => StoreError::Transient(text),
        ErrorClass::Rejected => StoreError::Rejected(text),
        ErrorClass::Failed => StoreError::Failed(text),
    }
}

/// PostgreSQL is away, or cannot do anything for now.
pub(super) fn unavailable(why: &str) -> StoreError {
    StoreError::Unavailable(format!("the database is unavailable: {why}"))
}

/// Why a batch was not written, or is not known to be written.
pub(super) enum WriteError {
    /// The driver or PostgreSQL reported an error.
    Sql(tokio_postgres::Error),
    /// Another transaction may have come between two of our statements; then a retry succeeds. If the retry fails, the
    /// database refuses the data.
    Conflict(&'static str),
    /// Fewer rows were written than were sent.
    Dropped { table: &'static str, written: u64, sent: usize },
    /// Devices are not in the groups that they must be in.
    OtherGroup(OtherGroup),
    /// We refuse to store it. Nothing was committed.
    Refused(String),
    /// The commit was carried out, but may not be replicated.
    Unreplicated,
    /// A mistake of ours, or an answer that does not fit the query. While a commit is in flight the batch is in doubt,
    /// as if the connection had been lost.
    Impossible(String),
}

impl WriteError {
    /// Whether a commit in flight may have taken effect despite this error.
    pub(super) fn leaves_doubt(&self) -> bool {
        match self {
            Self::Sql(error) => is_connection_lost(error),
            Self::Conflict(_) | Self::Dropped { .. } | Self::OtherGroup(_) | Self::Refused(_) => {
                false
            }
            Self::Unreplicated | Self::Impossible(_) => true,
        }
    }
}

impl From<tokio_postgres::Error> for WriteError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<OtherGroup> for WriteError {
    fn from(error: OtherGroup) -> Self {
        Self::OtherGroup(error)
    }
}

impl fmt::Display for WriteError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sql(error) => formatter.write_str(&describe(error)),
            Self::Conflict(what) => formatter.write_str(what),
            Self::Dropped { table, written, sent } => write!(
                formatter,
                "a trigger on {table} drops rows without an error: {written} of {sent} were written"
            ),
            Self::OtherGroup(error) => error.fmt(formatter),
            Self::Unreplicated => formatter
                .write_str("somebody ended the wait of a commit for its synchronous standby"),
            Self::Refused(what) | Self::Impossible(what) => formatter.write_str(what),
        }
    }
}

impl From<WriteError> for StoreError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Sql(error) => store_error(error),
            refused @ (WriteError::Conflict(_) | WriteError::Dropped { .. }) => {
                Self::Rejected(refused.to_string())
            }
            WriteError::OtherGroup(error) => error.into(),
            unreplicated @ WriteError::Unreplicated => Self::Unavailable(unreplicated.to_string()),
            WriteError::Refused(what) | WriteError::Impossible(what) => Self::Failed(what),
        }
    }
}

/// Whether the driver met a broken connection.
fn is_broken(error: &tokio_postgres::Error) -> bool {
    error.is_closed() || error.source().is_some_and(<dyn Error>::is::<std::io::Error>)
}

/// An error with all its causes, in one line. The driver's own text omits the causes.
pub(super) fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    // PostgreSQL's details and hints are separate lines.
    text.replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    use super::{
        ErrorClass::{self, ConnectionLost, Failed, Rejected, Transient, Unavailable},
        class_of_code,
    };

    /// Each SQLSTATE that PostgreSQL may answer to our statements, and its expected class.
    const CLASSES: [(&str, &str, ErrorClass); 46] = [
        ("08000", "connection_exception", ConnectionLost),
        ("08003", "connection_does_not_exist", ConnectionLost),
        ("08006", "connection_failure", ConnectionLost),
        ("08P01", "protocol_violation", ConnectionLost),
        ("0A000", "feature_not_supported: a cached plan that a migration made stale", Failed),
        ("21000", "cardinality_violation", Failed),
        ("22001", "string_data_right_truncation", Rejected),
        ("22003", "numeric_value_out_of_range", Rejected),
        ("22008", "datetime_field_overflow", Rejected),
        ("22021", "character_not_in_repertoire", Rejected),
        ("22P05", "untranslatable_character", Rejected),
        ("23502", "not_null_violation", Rejected),
        ("23503", "foreign_key_violation", Rejected),
        ("23505", "unique_violation", Rejected),
        ("23514", "check_violation", Rejected),
        ("25006", "read_only_sql_transaction", Unavailable),
        ("25P02", "in_failed_sql_transaction", Failed),
        ("25P03", "idle_in_transaction_session_timeout", ConnectionLost),
        ("25P04", "transaction_timeout", ConnectionLost),
        ("26000", "invalid_sql_statement_name: behind a pooler", Failed),
        ("40001", "serialization_failure", Transient),
        ("40002", "transaction_integrity_constraint_violation", Transient),
        ("40003", "statement_completion_unknown", ConnectionLost),
        ("40P01", "deadlock_detected", Transient),
        ("42501", "insufficient_privilege", Failed),
        ("42703", "undefined_column", Failed),
        ("42P01", "undefined_table", Failed),
        ("44000", "with_check_option_violation", Rejected),
        ("53100", "disk_full", Unavailable),
        ("53200", "out_of_memory", Unavailable),
        ("53300", "too_many_connections", Unavailable),
        ("54000", "program_limit_exceeded: transaction ids are used up", Failed),
        ("55000", "object_not_in_prerequisite_state", Unavailable),
        ("55006", "object_in_use", Transient),
        ("55P03", "lock_not_available: lock_timeout", Transient),
        ("57014", "query_canceled: pg_cancel_backend or statement_timeout", Transient),
        ("57P01", "admin_shutdown: pg_terminate_backend or a stop", ConnectionLost),
        ("57P02", "crash_shutdown", ConnectionLost),
        ("57P03", "cannot_connect_now", ConnectionLost),
        ("57P04", "database_dropped", ConnectionLost),
        ("57P05", "idle_session_timeout", ConnectionLost),
        ("58030", "io_error", Unavailable),
        ("P0001", "raise_exception in a trigger", Rejected),
        ("P0004", "assert_failure in a trigger", Rejected),
        ("XX000", "internal_error", Failed),
        ("XX001", "data_corrupted", Failed),
    ];

    #[test]
    fn each_sqlstate_has_the_class_that_was_chosen_for_it() {
        for (code, name, class) in CLASSES {
            assert_eq!(class_of_code(code, false), class, "{code} {name}");
            assert_eq!(class_of_code(code, true), ConnectionLost, "{code} {name}, FATAL");
        }
    }

    #[test]
    fn a_code_that_nobody_has_heard_of_is_a_failure() {
        for code in ["", "0", "ZZZZZ", "é"] {
            assert_eq!(class_of_code(code, false), Failed, "{code}");
        }
    }
}
