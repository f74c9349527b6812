//! What a server is to be: as it is typed, and the settings that `app` takes. `serve`, `doctor` and `health` read it. Values that
//! make no sense end here, with the name of their setting.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use axum::http::{HeaderValue, Uri};
use clap::{Args, ValueEnum};
use ipnet::IpNet;
use url::Url;

use super::{
    ANY_NUMBER, ClockSkewArgs, ConfigError, DatabaseArgs, LogLevelArgs, MigrationArgs, NotifyArgs,
    Secret, SecretsArgs, database_url, given,
    http::{ANSWER_BYTES, AuthMode, HttpSettings, Timeouts, TlsFiles},
    items, number,
    settings::Settings,
    wrong,
};
use crate::{
    logs::{LogLevel, LogSettings},
    notify::{Hidden, targets::read_url},
    store::Retention,
};

/// What `LOG_DIR` says for no files at all: being empty, it would be as good as not set.
const NO_LOG_DIR: &str = "none";

/// Where a server listens, for itself and for those who ask it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct ListenArgs {
    /// TCP port
    #[arg(long, env = "PORT", default_value_t = 3000, value_parser = number::<u16>(0..=65_535))]
    port: u16,
    /// Address or host name to listen on; 0.0.0.0 or :: for every interface
    #[arg(long, env = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// PEM file of the certificate (and those that vouch for it) to speak HTTPS with; read again when it
    /// changes
    #[arg(long, env = "TLS_CERT", value_name = "FILE")]
    tls_cert: Option<String>,
}

impl ListenArgs {
    /// The host and the port to listen on.
    #[must_use]
    pub fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// The same for a client on this machine: every interface is also this machine's own.
    #[must_use]
    pub fn reachable(&self) -> (&str, u16) {
        let host = match self.host.parse() {
            Ok(IpAddr::V4(address)) if address.is_unspecified() => "127.0.0.1",
            Ok(IpAddr::V6(address)) if address.is_unspecified() => "::1",
            _ => &self.host,
        };
        (host, self.port)
    }

    /// The server's URL for a client on this machine.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.certificate().is_some() { "https" } else { "http" };
        match self.reachable() {
            (host, port) if host.contains(':') => format!("{scheme}://[{host}]:{port}"),
            (host, port) => format!("{scheme}://{host}:{port}"),
        }
    }

    /// The file of the server's certificate, if it speaks TLS.
    #[must_use]
    pub fn certificate(&self) -> Option<&Path> {
        given(self.tls_cert.as_ref()).map(Path::new)
    }

    /// Checks what clap cannot.
    ///
    /// # Errors
    /// When HOST can be no host.
    pub fn check(&self) -> Result<(), ConfigError> {
        // A path would be a socket's, which only PostgreSQL has.
        if database_url::is_host(&self.host) && !self.host.is_empty() && !self.host.contains('/') {
            return Ok(());
        }
        wrong("HOST is neither an address nor the name of a host, such as 0.0.0.0")
    }
}

/// Everything about a running server.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct ServeArgs {
    #[command(flatten)]
    listen: ListenArgs,
    /// PEM file of the certificate's private key
    #[arg(long, env = "TLS_KEY", value_name = "FILE")]
    tls_key: Option<String>,
    /// What the server is used for: decides how the console log looks [default: development]
    #[arg(long, env = "APP_ENV")]
    app_env: Option<AppEnv>,
    /// The Node service's name for APP_ENV
    #[arg(long, env = "NODE_ENV", hide = true)]
    node_env: Option<String>,
    /// Whether this server watches the fleet: off leaves it to the others of the same database
    #[arg(long, env = "FLEET", default_value = "on")]
    fleet: Fleet,
    #[command(flatten)]
    clock_skew: ClockSkewArgs,
    /// How long a device may send an event again, under the same event_id, without it being stored twice
    #[arg(
        long,
        env = "EVENT_ID_RETENTION_DAYS",
        default_value_t = 90,
        value_name = "DAYS",
        value_parser = number::<u32>(1..=*ANY_NUMBER.end())
    )]
    event_id_retention_days: u32,
    /// Whom to ask for a key: auto (everybody, except, when HOST is this machine alone, its own users),
    /// off (nobody) or required (everybody)
    #[arg(long, env = "AUTH", default_value = "auto", value_name = "WHEN")]
    auth: String,
    /// Days for which events are kept one by one; 0 keeps them for ever. Totals, streaks and windows
    /// count them all the same
    #[arg(
        long,
        env = "RETENTION_DAYS",
        default_value_t = 0,
        value_name = "DAYS",
        value_parser = number::<u32>(ANY_NUMBER)
    )]
    retention_days: u32,

    /// Requests a minute from one address to POST /api/sync-event and /api/sync-events; 0 is no limit
    #[arg(
        long,
        env = "RATE_LIMIT_SYNC_PER_MINUTE",
        default_value_t = 50,
        value_name = "REQUESTS",
        value_parser = number::<u32>(ANY_NUMBER),
        help_heading = "Limits"
    )]
    rate_limit_sync_per_minute: u32,
    /// Requests a minute from one address to the rest of the API; 0 is no limit
    #[arg(
        long,
        env = "RATE_LIMIT_API_PER_MINUTE",
        default_value_t = 20,
        value_name = "REQUESTS",
        value_parser = number::<u32>(ANY_NUMBER),
        help_heading = "Limits"
    )]
    rate_limit_api_per_minute: u32,
    /// Requests a minute with one key, whatever its address; 0 is no limit
    #[arg(
        long,
        env = "RATE_LIMIT_KEY_PER_MINUTE",
        default_value_t = 12_000,
        value_name = "REQUESTS",
        value_parser = number::<u32>(ANY_NUMBER),
        help_heading = "Limits"
    )]
    rate_limit_key_per_minute: u32,
    /// Connections at a time; beyond, new ones wait until another ends; 0 is as many as the
    /// system allows open files
    #[arg(
        long,
        env = "MAX_CONNECTIONS",
        default_value_t = 16_384,
        value_name = "CONNECTIONS",
        value_parser = number::<usize>(ANY_NUMBER),
        help_heading = "Limits"
    )]
    max_connections: usize,
    /// Requests being answered at a time; beyond, 503; 0 is no limit
    #[arg(
        long,
        env = "MAX_CONCURRENT_REQUESTS",
        default_value_t = 10_000,
        value_name = "REQUESTS",
        value_parser = number::<usize>(ANY_NUMBER),
        help_heading = "Limits"
    )]
    max_concurrent_requests: usize,
    /// Proxies (addresses or networks, separated by commas) whose X-Forwarded-For or Forwarded is believed
    #[arg(long, env = "TRUSTED_PROXIES", value_name = "ADDRESSES", help_heading = "Limits")]
    trusted_proxies: Option<String>,
    /// Origins (separated by commas) whose web pages may call the API, for instance https://fleet.example
    #[arg(long, env = "CORS_ORIGINS", value_name = "ORIGINS", help_heading = "Limits")]
    cors_origins: Option<String>,

    /// Folder of combined.log and error.log; none for the console alone
    #[arg(long, env = "LOG_DIR", default_value = "logs", help_heading = "Logs")]
    log_dir: String,

    #[command(flatten)]
    notify: NotifyArgs,
    /// Address to which this server posts each minute while it looks after the fleet
    #[arg(long, env = "HEARTBEAT_URL", value_name = "URL", help_heading = "Notifications")]
    heartbeat_url: Option<Secret>,
    #[command(flatten)]
    secrets: SecretsArgs,

    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
    /// Run pending migrations at the start; if false, a server on PostgreSQL refuses to start with
    /// pending ones
    #[arg(
        long,
        env = "AUTO_MIGRATE",
        default_value_t = true,
        action = clap::ArgAction::Set,
        value_name = "BOOL",
        help_heading = "Database"
    )]
    auto_migrate: bool,
}

/// Whether a server finds out how its fleet is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fleet {
    /// It does.
    On,
    /// It leaves it to others.
    Off,
}

/// Development or production.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AppEnv {
    /// Lines for people on the console.
    Development,
    /// JSON lines on the console.
    Production,
}

impl ServeArgs {
    /// Where to listen.
    #[must_use]
    pub fn listen(&self) -> &ListenArgs {
        &self.listen
    }

    /// The folder of the log files; `None` for the console alone.
    #[must_use]
    pub fn log_folder(&self) -> Option<PathBuf> {
        given(Some(&self.log_dir)).filter(|dir| *dir != NO_LOG_DIR).map(PathBuf::from)
    }

    /// What to log.
    #[must_use]
    pub fn log_settings(&self, level: &LogLevelArgs) -> LogSettings {
        let node_env = match self.node_env.as_deref() {
            Some("production") => AppEnv::Production,
            _ => AppEnv::Development,
        };
        LogSettings {
            level: level.log_level.unwrap_or(LogLevel::INFO),
            dir: self.log_folder(),
            json_console: self.app_env.unwrap_or(node_env) == AppEnv::Production,
        }
    }

    /// How long to keep events; for ever when `None`.
    fn retention(&self) -> Result<Option<Retention>, ConfigError> {
        if self.retention_days == 0 {
            return Ok(None);
        }
        let retention = Retention::new(self.retention_days, self.clock_skew.max_clock_skew_seconds);
        retention.map(Some).ok_or_else(|| {
            ConfigError(format!(
                "RETENTION_DAYS={}: must be 0 to keep events for ever, or at least {}: the last 24 hours are counted event by event",
                self.retention_days,
                Retention::fewest_days(self.clock_skew.max_clock_skew_seconds),
            ))
        })
    }

    /// What the server is to be.
    ///
    /// # Errors
    /// When settings make no sense: it names all of them.
    pub fn settings(&self) -> Result<Settings, ConfigError> {
        /// What a setting says, or `None` and one more problem.
        fn noted<T>(problems: &mut Vec<String>, read: Result<T, ConfigError>) -> Option<T> {
            read.map_err(|problem| problems.push(problem.0)).ok()
        }
        let mut problems = Vec::new();
        let host = noted(&mut problems, self.listen.check());
        let auth = noted(&mut problems, self.auth());
        let tls = noted(&mut problems, self.tls());
        let trusted_proxies = noted(&mut problems, self.trusted_proxies());
        let cors_origins = noted(&mut problems, self.cors_origins());
        let public_url = noted(&mut problems, self.notify.public_url());
        let secrets_key = noted(&mut problems, self.secrets.key());
        let sender = noted(&mut problems, self.notify.sender());
        let heartbeat_url = noted(&mut problems, self.heartbeat_url());
        let target = noted(&mut problems, self.database.target());
        let retention = noted(&mut problems, self.retention());
        let (
            Some(()),
            Some(auth),
            Some(tls),
            Some(trusted_proxies),
            Some(cors_origins),
            Some(public_url),
            Some(secrets_key),
            Some(sender),
            Some(heartbeat_url),
            Some(target),
            Some(retention),
        ) = (
            host,
            auth,
            tls,
            trusted_proxies,
            cors_origins,
            public_url,
            secrets_key,
            sender,
            heartbeat_url,
            target,
            retention,
        )
        else {
            return wrong(problems.join("; "));
        };
        Ok(Settings {
            target,
            migrations_dir: self.migrations.migrations_dir.clone(),
            auto_migrate: self.auto_migrate,
            watches_fleet: self.fleet == Fleet::On,
            public_url,
            secrets_key,
            sender,
            heartbeat_url,
            event_id_retention_days: self.event_id_retention_days,
            retention,
            http: HttpSettings {
                auth,
                max_clock_skew_seconds: self.clock_skew.max_clock_skew_seconds,
                sync_per_minute: self.rate_limit_sync_per_minute,
                api_per_minute: self.rate_limit_api_per_minute,
                key_per_minute: self.rate_limit_key_per_minute,
                max_connections: self.max_connections,
                max_requests: self.max_concurrent_requests,
                answer_bytes: ANSWER_BYTES,
                tls,
                trusted_proxies,
                cors_origins,
                timeouts: Timeouts::default(),
            },
        })
    }

    fn heartbeat_url(&self) -> Result<Option<Hidden<Url>>, ConfigError> {
        let Some(text) = given(self.heartbeat_url.as_ref().map(|url| &url.0)) else {
            return Ok(None);
        };
        match read_url(text) {
            Ok(url) => Ok(Some(Hidden::new(url))),
            Err(rule) => wrong(format!("HEARTBEAT_URL {rule}")),
        }
    }

    fn auth(&self) -> Result<AuthMode, ConfigError> {
        match self.auth.as_str() {
            "" | "auto" => Ok(AuthMode::Auto),
            "off" => Ok(AuthMode::Off),
            "required" => Ok(AuthMode::Required),
            other => wrong(format!("AUTH={other}: expected auto, off or required")),
        }
    }

    fn tls(&self) -> Result<Option<TlsFiles>, ConfigError> {
        match (self.listen.certificate(), given(self.tls_key.as_ref())) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => {
                Ok(Some(TlsFiles { certificate: certificate.into(), key: key.into() }))
            }
            (Some(_), None) => wrong("TLS_CERT is set, but TLS_KEY is not; set both or neither"),
            (None, Some(_)) => wrong("TLS_KEY is set, but TLS_CERT is not; set both or neither"),
        }
    }

    fn trusted_proxies(&self) -> Result<Vec<IpNet>, ConfigError> {
        let network = |item: &str| {
            let read = item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from));
            read.or_else(|_| {
                wrong(format!(
                    "TRUSTED_PROXIES: {item:?} is neither an address nor a network such as 10.0.0.0/8"
                ))
            })
        };
        items(self.trusted_proxies.as_ref()).map(network).collect()
    }

    fn cors_origins(&self) -> Result<Vec<HeaderValue>, ConfigError> {
        let read = |item: &str| match origin(item) {
            Some(origin) => Ok(origin),
            None => wrong(format!(
                "CORS_ORIGINS: {item:?} is no origin such as https://fleet.example (no path, no *)"
            )),
        };
        items(self.cors_origins.as_ref()).map(read).collect()
    }
}

/// An origin as browsers send it: scheme, host and port, nothing behind.
fn origin(text: &str) -> Option<HeaderValue> {
    let uri: Uri = text.parse().ok()?;
    let (scheme, authority) = (uri.scheme_str()?, uri.authority()?);
    let exact = format!("{scheme}://{authority}");
    let names_user = authority.as_str().contains('@');
    (exact == text && !names_user).then(|| HeaderValue::try_from(exact).ok())?
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::store::{SslMode, Target};

    #[derive(Parser)]
    struct TestCli {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn parse(arguments: &[&str]) -> ServeArgs {
        TestCli::try_parse_from([&["pisync"], arguments].concat()).unwrap().serve
    }

    fn target(arguments: &[&str]) -> String {
        match parse(arguments).settings() {
            Ok(settings) => settings.target.to_string(),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn nothing_given_means_sqlite() {
        assert_eq!(target(&[]), "SQLite data/pisync.db");
        assert_eq!(target(&["--data-dir", "/srv"]), "SQLite /srv/pisync.db");
        assert_eq!(target(&["--db-host", "", "--database-url", ""]), "SQLite data/pisync.db");
        assert_eq!(target(&["--database-url", "sqlite:x.db"]), "SQLite x.db");
        assert_eq!(target(&["--database-url", "sqlite:///x.db"]), "SQLite /x.db");
    }

    #[test]
    fn addresses_for_links_are_checked() {
        let public_url =
            |text| parse(&["--public-url", text]).settings().map(|settings| settings.public_url);
        for (text, expected) in [
            ("", None),
            ("https://fleet.example", Some("https://fleet.example")),
            ("http://10.0.0.5:3000/", Some("http://10.0.0.5:3000")),
            ("https://example.org/pisync/", Some("https://example.org/pisync")),
        ] {
            assert_eq!(public_url(text), Ok(expected.map(str::to_owned)), "{text}");
        }
        for text in [
            "fleet.example",
            "ftp://fleet.example",
            "https://pi:s3cret@fleet.example",
            "https://fleet.example/?a=b",
            "https://fleet.example/#a",
            "https://",
        ] {
            let error = public_url(text).unwrap_err().to_string();
            assert_eq!(error, "PUBLIC_URL is no address such as https://fleet.example", "{text}");
        }
    }

    #[test]
    fn keys_of_secrets_are_checked_and_never_shown() {
        let arguments = parse(&["--secrets-key", "s3cret"]);
        assert!(!format!("{arguments:?}").contains("s3cret"));
        let error = arguments.settings().unwrap_err().to_string();
        assert!(error.starts_with("SECRETS_KEY must be 32 bytes"), "{error}");
        assert!(!error.contains("s3cret"), "{error}");
        let settings = parse(&["--secrets-key", &"0f".repeat(32)]).settings().unwrap();
        assert!(settings.secrets_key.is_some());
        assert!(!format!("{settings:?}").contains("0f0f"), "{settings:?}");
        assert_eq!(parse(&["--secrets-key", ""]).settings().unwrap().secrets_key, None);
    }

    #[test]
    fn events_are_kept_for_ever_or_long_enough() {
        let settings = |arguments: &[&str]| parse(arguments).settings();
        assert!(settings(&[]).unwrap().retention.is_none());
        assert!(settings(&["--retention-days", "2"]).unwrap().retention.is_some());
        let refused = settings(&["--retention-days", "1"]).unwrap_err().to_string();
        assert!(refused.contains("at least 2"), "{refused}");
        let skewed = ["--retention-days", "2", "--max-clock-skew-seconds", "86400"];
        assert!(settings(&skewed).unwrap().retention.is_some());
    }

    #[test]
    fn any_of_the_node_services_settings_means_postgresql() {
        assert_eq!(target(&["--db-name", "fleet"]), "PostgreSQL localhost:5432/fleet");
        assert_eq!(
            target(&["--db-host", "a,b", "--db-port", "5432,5433", "--db-password", "p@ss"]),
            "PostgreSQL a:5432,b:5433/pisync"
        );
        assert_eq!(target(&["--db-host", "[::1]"]), "PostgreSQL [::1]:5432/pisync");
        for bad in ["x", "0", "65536", "5432,5433"] {
            assert!(target(&["--db-port", bad]).starts_with("error: DB_PORT"), "{bad}");
        }
        for bad in ["a,,b", "a:secret", "postgres://a", "a password=secret", "u@a", "a=secret"] {
            let error = target(&["--db-host", bad]);
            assert!(error.starts_with("error: DB_HOST"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn urls_and_their_tls() {
        let url = "postgres://u:hunter2@a,b:5433/db?sslmode=verify-full&sslrootcert=%2Fca.pem&connect_timeout=3";
        assert_eq!(target(&["--database-url", url]), "PostgreSQL a:5432,b:5433/db");
        let arguments = parse(&["--database-url", url, "--db-password", "hunter2"]);
        assert!(!format!("{arguments:?}").contains("hunter2"), "{arguments:?}");
        let Ok(Target::Postgres(postgres)) = arguments.database.target() else { panic!() };
        assert_eq!(postgres.ssl_mode, SslMode::VerifyFull);
        assert_eq!(postgres.ssl_root_cert, Some(PathBuf::from("/ca.pem")));
        assert!(!format!("{postgres:?}").contains("hunter2"));
        for bad in ["mysql://x", "postgres://u@h/db?sslmode=maybe", "postgres://h/db?typo=1"] {
            assert!(target(&["--database-url", bad]).starts_with("error: DATABASE_URL"), "{bad}");
        }
    }

    #[test]
    fn lists() {
        let settings = parse(&[
            "--trusted-proxies",
            "127.0.0.1, 10.0.0.0/8,::1",
            "--cors-origins",
            "https://fleet.example,http://localhost:8080",
        ])
        .settings()
        .unwrap();
        assert_eq!(settings.http.trusted_proxies.len(), 3);
        assert_eq!(settings.http.cors_origins.len(), 2);
        for bad in [
            ["--trusted-proxies", "proxy"],
            ["--cors-origins", "*"],
            ["--cors-origins", "https://fleet.example/"],
            ["--cors-origins", "https://user:password@fleet.example"],
            ["--auth", "maybe"],
        ] {
            assert!(parse(&bad).settings().is_err(), "{bad:?}");
        }
    }
}
