//! Names the database that is meant. `config` parses it from the settings; `open` and the migrations use it. It must
//! never show a password.

use std::{fmt, path::PathBuf};

/// A database to work on.
#[derive(Debug, Clone)]
pub enum Target {
    /// A file of our own.
    Sqlite(PathBuf),
    /// A PostgreSQL server.
    Postgres(Box<PostgresTarget>),
}

/// How to reach PostgreSQL. `Debug` and `Display` never show the password.
#[derive(Clone)]
pub struct PostgresTarget {
    /// Hosts, user, password and database.
    pub config: tokio_postgres::Config,
    /// How the connection is encrypted.
    pub ssl_mode: SslMode,
    /// A file of root certificates to trust instead of the system's.
    pub ssl_root_cert: Option<PathBuf>,
}

/// libpq's `sslmode`, with libpq's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Never encrypt.
    Disable,
    /// Encrypt when the server can. The server's identity is not checked.
    Prefer,
    /// Always encrypt. The server's identity is checked only if a root certificate is given.
    Require,
    /// Always encrypt, and the server's certificate must be signed by a trusted root.
    VerifyCa,
    /// Always encrypt, and the certificate must also name the host.
    VerifyFull,
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(formatter, "SQLite {}", path.display()),
            Self::Postgres(postgres) => write!(formatter, "PostgreSQL {postgres}"),
        }
    }
}

impl fmt::Display for PostgresTarget {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        use tokio_postgres::config::Host;
        let ports = self.config.get_ports();
        for (position, host) in self.config.get_hosts().iter().enumerate() {
            if position > 0 {
                formatter.write_str(",")?;
            }
            match host {
                // The colons of an IPv6 address must be distinguishable from the port's.
                Host::Tcp(name) if name.contains(':') => write!(formatter, "[{name}]")?,
                Host::Tcp(name) => formatter.write_str(name)?,
                Host::Unix(path) => write!(formatter, "{}", path.display())?,
            }
            // One port may apply to all hosts.
            if let Some(port) = ports.get(position).or(ports.first()) {
                write!(formatter, ":{port}")?;
            }
        }
        write!(formatter, "/{}", self.config.get_dbname().unwrap_or_default())
    }
}

impl fmt::Debug for PostgresTarget {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PostgresTarget({self}, {:?})", self.ssl_mode)
    }
}
