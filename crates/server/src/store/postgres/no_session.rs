//! Explains why there is no session, in words for the person who runs the server. `connect`, `session` and `hosts` call
//! it. A message must never show the password.

use std::{error::Error as _, fmt, io, time::Duration};

use tokio_postgres::error::SqlState;

use super::errors::{describe, is_refusal};

/// Why there is no session.
pub(super) enum NoSession {
    /// The host did not answer in time.
    Silent(Duration),
    /// The driver or PostgreSQL reported an error.
    Error(tokio_postgres::Error),
    /// A session is possible, but cannot be used for now.
    Unfit(String),
    /// A session is possible, but is not used until somebody has corrected what is wrong.
    Refused(String),
}

impl NoSession {
    pub(super) fn is_missing_database(&self) -> bool {
        matches!(self, Self::Error(error) if error.code() == Some(&SqlState::INVALID_CATALOG_NAME))
    }

    /// Whether PostgreSQL works, but something in it or in the settings must be changed.
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Unfit(_) => false,
            Self::Refused(_) => true,
            Self::Error(error) => is_refusal(error) || advice(error).is_some(),
        }
    }
}

impl From<tokio_postgres::Error> for NoSession {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Error(error)
    }
}

impl fmt::Display for NoSession {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent(timeout) => {
                write!(formatter, "does not answer within {} s", timeout.as_secs_f64())
            }
            Self::Unfit(reason) | Self::Refused(reason) => formatter.write_str(reason),
            Self::Error(error) => {
                formatter.write_str(&describe(error))?;
                match advice(error).or_else(|| advice_when_away(error)) {
                    Some(advice) => write!(formatter, "; {advice}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// What to do when nobody listens where PostgreSQL should be. It may come back by itself, so this is no refusal.
fn advice_when_away(error: &tokio_postgres::Error) -> Option<&'static str> {
    let cause = error.source()?.downcast_ref::<io::Error>()?;
    let is_nobody_there =
        matches!(cause.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
    is_nobody_there.then_some(
        "start PostgreSQL there, or set DB_HOST and DB_PORT, or DATABASE_URL, to where it listens",
    )
}

/// What to do about an error that prevents a session.
fn advice(error: &tokio_postgres::Error) -> Option<&'static str> {
    let Some(code) = error.code() else {
        let missing = std::error::Error::source(error)
            .is_some_and(|cause| cause.to_string() == "password missing");
        return missing.then_some(
            "PostgreSQL asks for a password: set DB_PASSWORD, or put it into DATABASE_URL",
        );
    };
    if *code == SqlState::INVALID_CATALOG_NAME {
        return Some(
            "create it with `pisync db setup`, or name another with DB_NAME or DATABASE_URL",
        );
    }
    if *code == SqlState::INVALID_PASSWORD || *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION
    {
        return Some(
            "check DB_USER and DB_PASSWORD, or those in DATABASE_URL, and the server's pg_hba.conf",
        );
    }
    None
}
