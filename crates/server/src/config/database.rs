//! Which database: as it is typed, and the target that `store` opens. Every command that needs a database flattens these
//! arguments. No message shows a password.

use std::{net::Ipv6Addr, path::PathBuf};

use clap::Args;

use super::{ConfigError, Secret, database_url, given, wrong};
use crate::store::{PostgresTarget, SslMode, Target};

/// Which database.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Database")]
pub struct DatabaseArgs {
    /// Where the database is: postgres://user:password@host:port/database (several hosts separated by
    /// commas; sslmode and sslrootcert as in libpq), or sqlite:PATH. Goes before DB_* and DATA_DIR
    #[arg(long, env = "DATABASE_URL", global = true, value_name = "URL")]
    database_url: Option<Secret>,
    /// PostgreSQL host, or several separated by commas [default: localhost, if any DB_* is set]
    #[arg(long, env = "DB_HOST", global = true)]
    db_host: Option<String>,
    /// PostgreSQL port, or one per host [default: 5432]
    #[arg(long, env = "DB_PORT", global = true)]
    db_port: Option<String>,
    /// PostgreSQL database [default: pisync]
    #[arg(long, env = "DB_NAME", global = true)]
    db_name: Option<String>,
    /// PostgreSQL user [default: postgres]
    #[arg(long, env = "DB_USER", global = true)]
    db_user: Option<String>,
    /// PostgreSQL password
    #[arg(long, env = "DB_PASSWORD", global = true)]
    db_password: Option<Secret>,
    /// Folder of the SQLite file pisync.db, which is used when nothing says PostgreSQL
    #[arg(long, env = "DATA_DIR", global = true, default_value = "data")]
    data_dir: PathBuf,
}

/// Two databases: one to copy, and one to copy it to.
#[derive(Debug, Clone, Args)]
pub struct CopyArgs {
    /// The database to copy: sqlite:PATH or postgres://user:password@host:port/database
    #[arg(long, env = "COPY_FROM", value_name = "URL")]
    from: Secret,
    /// The database to copy it to, which must be empty
    #[arg(long, env = "COPY_TO", value_name = "URL")]
    to: Secret,
}

impl CopyArgs {
    /// Where from and where to.
    ///
    /// # Errors
    /// When one of them names no database.
    pub fn targets(&self) -> Result<(Target, Target), ConfigError> {
        Ok((database_url::parse("--from", &self.from.0)?, database_url::parse("--to", &self.to.0)?))
    }
}

/// Users' own migrations.
#[derive(Debug, Clone, Args)]
pub struct MigrationArgs {
    /// Folder of your own migrations, which run after PiSync's; need not exist
    #[arg(
        long,
        env = "MIGRATIONS_DIR",
        global = true,
        default_value = "migrations",
        help_heading = "Database"
    )]
    pub migrations_dir: PathBuf,
}

impl DatabaseArgs {
    /// The argument that goes before all others.
    pub(crate) const URL: &str = "database_url";

    /// Arguments that are not read where there is a URL.
    pub(crate) const IGNORED_BESIDE_URL: [&str; 6] =
        ["db_host", "db_port", "db_name", "db_user", "db_password", "data_dir"];

    /// The database that is meant.
    ///
    /// # Errors
    /// When the settings do not name one.
    pub fn target(&self) -> Result<Target, ConfigError> {
        if let Some(url) = given(self.database_url.as_ref().map(|secret| &secret.0)) {
            return database_url::parse("DATABASE_URL", url);
        }
        let [host, port, name, user] = [&self.db_host, &self.db_port, &self.db_name, &self.db_user]
            .map(|value| given(value.as_ref()));
        let password = given(self.db_password.as_ref().map(|secret| &secret.0));
        if [host, port, name, user, password].iter().all(Option::is_none) {
            return Ok(Target::Sqlite(self.data_dir.join("pisync.db")));
        }
        let mut config = tokio_postgres::Config::new();
        for host in host.unwrap_or("localhost").split(',') {
            config.host(db_host(host.trim())?);
        }
        for port in port.unwrap_or("5432").split(',') {
            match port.trim().parse() {
                Ok(port @ 1..) => config.port(port),
                _ => {
                    return wrong(format!(
                        "DB_PORT: {port:?} is no port, which is a number from 1 to 65535"
                    ));
                }
            };
        }
        if config.get_ports().len() > 1 && config.get_ports().len() != config.get_hosts().len() {
            return wrong("DB_PORT must be one port for all of DB_HOST, or one for each");
        }
        config.dbname(name.unwrap_or("pisync")).user(user.unwrap_or("postgres"));
        if let Some(password) = password {
            config.password(password);
        }
        let (ssl_mode, ssl_root_cert) = (SslMode::Prefer, None);
        Ok(Target::Postgres(Box::new(PostgresTarget { config, ssl_mode, ssl_root_cert })))
    }
}

/// One of the hosts of `DB_HOST`.
fn db_host(host: &str) -> Result<&str, ConfigError> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() {
        return wrong("DB_HOST: a host's name is empty");
    }
    // What looks like a host may have a password in it: it is not shown.
    if bare.contains(':') && bare.parse::<Ipv6Addr>().is_err() || !database_url::is_host(bare) {
        return wrong(
            "DB_HOST: a host is neither a name nor an address; a port belongs into DB_PORT, a URL into DATABASE_URL",
        );
    }
    Ok(bare)
}
