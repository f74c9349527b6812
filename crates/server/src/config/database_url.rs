//! Database URLs, read here rather than by the driver, so that a message names the part that is wrong.
//! Called by `config` for `DATABASE_URL` and for the two ends of a copy.
//!
//! No message repeats a value: where a special character was not percent-encoded, what looks like a host, a
//! port or a parameter is a piece of the password.

use std::{net::Ipv6Addr, path::PathBuf, time::Duration};

use tokio_postgres::config::{ChannelBinding, Config, TargetSessionAttrs};

use super::{ConfigError, wrong};
use crate::store::{PostgresTarget, SslMode, Target};

/// What may stand behind the `?`.
const PARAMETERS: &str = "application_name, channel_binding, connect_timeout, dbname, host, hostaddr, keepalives, \
     keepalives_idle, keepalives_interval, keepalives_retries, load_balance_hosts, options, password, port, sslmode, \
     sslnegotiation, sslrootcert, target_session_attrs, tcp_user_timeout, user";

/// Reads the database URL that stands in `setting`.
pub(super) fn parse(setting: &str, url: &str) -> Result<Target, ConfigError> {
    if let Some(path) = url.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() {
            return wrong(format!(
                "{setting}: sqlite: needs a path, for instance sqlite:data/pisync.db"
            ));
        }
        if path.contains("://") {
            return wrong(format!("{setting}: behind sqlite: stands a path, and not another URL"));
        }
        return Ok(Target::Sqlite(path.into()));
    }
    let scheme = ["postgres://", "postgresql://"];
    let Some(rest) = scheme.iter().find_map(|scheme| url.strip_prefix(scheme)) else {
        return wrong(format!("{setting} must begin with postgres:// or sqlite:"));
    };
    let target = PostgresUrl::default().read(rest);
    target
        .map(|target| Target::Postgres(Box::new(target)))
        .map_err(|problem| ConfigError(format!("{setting}: {problem}")))
}

/// What has been read of a URL.
#[derive(Default)]
struct PostgresUrl {
    config: Config,
    hosts: Vec<String>,
    ports: Vec<u16>,
    ssl_mode: Option<SslMode>,
    ssl_root_cert: Option<PathBuf>,
}

/// What is wrong with a part, in words that name it.
type Problem = String;

impl PostgresUrl {
    fn read(mut self, url: &str) -> Result<PostgresTarget, Problem> {
        let (rest, query) = url.split_once('?').unwrap_or((url, ""));
        let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
        if name.contains('@') || query.contains('@') {
            return Err("there is an @ behind the host: in the user's name, the password and elsewhere, / must be \
                        written as %2F, ? as %3F and @ as %40"
                .into());
        }
        let hosts = match authority.rsplit_once('@') {
            Some((user, hosts)) => {
                self.read_user(user)?;
                hosts
            }
            None => {
                refuse_password_without_host(authority)?;
                authority
            }
        };
        self.read_hosts(hosts)?;
        if name.contains('/') {
            return Err("the database's name holds a /, which must be written as %2F".into());
        }
        if !name.is_empty() {
            self.config.dbname(decode_text("database's name", name)?);
        }
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let Some((name, value)) = parameter.split_once('=') else {
                return Err(
                    "behind the ? there is a parameter without a value: write NAME=VALUE, and a ? \
                            elsewhere as %3F"
                        .into(),
                );
            };
            self.read_parameter(name, value)?;
        }
        self.finish()
    }

    fn read_user(&mut self, user: &str) -> Result<(), Problem> {
        let (user, password) = match user.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (user, None),
        };
        if !user.is_empty() {
            self.config.user(decode_text("user's name", user)?);
        }
        if let Some(password) = password.filter(|password| !password.is_empty()) {
            self.config.password(decode("password", password)?);
        }
        Ok(())
    }

    /// Reads `host:port,host:port`, or nothing when a parameter names the hosts.
    fn read_hosts(&mut self, hosts: &str) -> Result<(), Problem> {
        if hosts.is_empty() {
            return Ok(());
        }
        for host in hosts.split(',') {
            let (host, port) = split_host(host)?;
            self.hosts.push(decode_host(host)?);
            self.ports.push(match port {
                Some(port) => read_port(port)?,
                None => 5432,
            });
        }
        Ok(())
    }

    fn read_parameter(&mut self, name: &str, value: &str) -> Result<(), Problem> {
        // A host's name may be a list, in which the commas are not encoded.
        let list = || value.split(',');
        match name {
            "sslmode" => {
                self.ssl_mode = Some(match value {
                    "disable" => SslMode::Disable,
                    "allow" | "prefer" => SslMode::Prefer,
                    "require" => SslMode::Require,
                    "verify-ca" => SslMode::VerifyCa,
                    "verify-full" => SslMode::VerifyFull,
                    _ => {
                        return one_of(
                            name,
                            "disable, allow, prefer, require, verify-ca or verify-full",
                        );
                    }
                });
            }
            "sslrootcert" if value.is_empty() => {
                return Err("sslrootcert names no file".into());
            }
            // The system's are the default; who names them wants them to be used, as with libpq.
            "sslrootcert" if value == "system" => {
                self.ssl_mode.get_or_insert(SslMode::VerifyFull);
            }
            "sslrootcert" => self.ssl_root_cert = Some(decode_text(name, value)?.into()),
            "host" | "port" | "hostaddr" if name != "hostaddr" && !self.hosts_are_free(name) => {
                return Err(format!("{name} is named twice, before the ? and behind it"));
            }
            "host" => {
                for host in list() {
                    self.hosts.push(decode_host(host)?);
                }
            }
            "port" => {
                for port in list() {
                    self.ports.push(read_port(port)?);
                }
            }
            "hostaddr" => {
                for address in list() {
                    let address = decode_text(name, address)?.parse();
                    self.config.hostaddr(address.map_err(|_| "hostaddr must be an IP address")?);
                }
            }
            "user" => {
                self.config.user(decode_text(name, value)?);
            }
            "password" => {
                self.config.password(decode(name, value)?);
            }
            "dbname" => {
                self.config.dbname(decode_text(name, value)?);
            }
            "options" => {
                self.config.options(decode_text(name, value)?);
            }
            "application_name" => {
                self.config.application_name(decode_text(name, value)?);
            }
            "connect_timeout" => {
                if let Some(timeout) = seconds(name, value)? {
                    self.config.connect_timeout(timeout);
                }
            }
            "tcp_user_timeout" => match value.parse() {
                Ok(0) => {}
                Ok(timeout) => {
                    self.config.tcp_user_timeout(Duration::from_millis(timeout));
                }
                Err(_) => return Err(format!("{name} must be a number of milliseconds")),
            },
            "keepalives" => match value {
                "0" | "1" => {
                    self.config.keepalives(value == "1");
                }
                _ => return one_of(name, "0 or 1"),
            },
            "keepalives_idle" => {
                if let Some(idle) = seconds(name, value)? {
                    self.config.keepalives_idle(idle);
                }
            }
            "keepalives_interval" => {
                if let Some(interval) = seconds(name, value)? {
                    self.config.keepalives_interval(interval);
                }
            }
            "keepalives_retries" => match value.parse() {
                Ok(retries) => {
                    self.config.keepalives_retries(retries);
                }
                Err(_) => return Err(format!("{name} must be a number")),
            },
            "target_session_attrs" => match value {
                "any" => {}
                "read-write" | "primary" => {
                    self.config.target_session_attrs(TargetSessionAttrs::ReadWrite);
                }
                _ => return one_of(name, "any, read-write or primary, for PiSync writes"),
            },
            "channel_binding" => {
                self.config.channel_binding(match value {
                    "disable" => ChannelBinding::Disable,
                    "prefer" => ChannelBinding::Prefer,
                    "require" => ChannelBinding::Require,
                    _ => return one_of(name, "disable, prefer or require"),
                });
            }
            "sslnegotiation" if value != "postgres" => return one_of(name, "postgres"),
            // Of several hosts one takes writes, whichever is asked first.
            "load_balance_hosts" if !["disable", "random"].contains(&value) => {
                return one_of(name, "disable or random");
            }
            "sslnegotiation" | "load_balance_hosts" => {}
            _ => return Err(unknown(name)),
        }
        Ok(())
    }

    /// Whether the hosts or the ports have not been named before the `?`.
    fn hosts_are_free(&self, name: &str) -> bool {
        if name == "host" { self.hosts.is_empty() } else { self.ports.is_empty() }
    }

    fn finish(mut self) -> Result<PostgresTarget, Problem> {
        let addresses = self.config.get_hostaddrs().len();
        if self.hosts.is_empty() && addresses == 0 {
            return Err("it names no host: postgres://USER:PASSWORD@HOST:PORT/DATABASE".into());
        }
        if !self.hosts.is_empty() && addresses > 0 && addresses != self.hosts.len() {
            return Err("hostaddr must name as many addresses as there are hosts".into());
        }
        let hosts = self.hosts.len().max(addresses);
        if self.ports.len() > 1 && self.ports.len() != hosts {
            return Err("port must be one for all hosts, or one for each".into());
        }
        for host in &self.hosts {
            self.config.host(host);
        }
        for port in &self.ports {
            self.config.port(*port);
        }
        if self.config.get_dbname().is_none() {
            self.config.dbname("pisync");
        }
        Ok(PostgresTarget {
            config: self.config,
            ssl_mode: self.ssl_mode.unwrap_or(SslMode::Prefer),
            ssl_root_cert: self.ssl_root_cert,
        })
    }
}

/// Splits a host from its port, if it has one.
fn split_host(text: &str) -> Result<(&str, Option<&str>), Problem> {
    if let Some(bracketed) = text.strip_prefix('[') {
        let Some((address, rest)) = bracketed.split_once(']') else {
            return Err("the host's [ has no ]: an IPv6 address is written as [::1]".into());
        };
        if address.parse::<Ipv6Addr>().is_err() {
            return Err("in the host's brackets there is no IPv6 address".into());
        }
        return match rest.strip_prefix(':') {
            Some(port) => Ok((address, Some(port))),
            None if rest.is_empty() => Ok((address, None)),
            None => Err("behind the host's ] there must be a port, such as [::1]:5432".into()),
        };
    }
    match text.split_once(':') {
        Some((_, port)) if port.contains(':') => Err(
            "the host holds several colons: an IPv6 address stands in brackets, such as [::1]:5432, and a colon in \
             the password is written as %3A"
                .into(),
        ),
        Some((host, port)) => Ok((host, Some(port))),
        None => Ok((text, None)),
    }
}

/// Without an @, `USER:PASSWORD` is read as a host and a port.
fn refuse_password_without_host(hosts: &str) -> Result<(), Problem> {
    let is_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    for host in hosts.split(',').filter(|host| host.parse::<Ipv6Addr>().is_err()) {
        let Some((name, port)) = host.split_once(':') else { continue };
        if !name.is_empty() && !name.starts_with('[') && !port.is_empty() && !is_port(port) {
            return Err(
                "there is no @: a user and a password must be followed by @HOST, as in \
                 postgres://USER:PASSWORD@HOST/DATABASE; without them, a number from 1 to 65535 follows the host's colon, \
                 and an IPv6 address stands in brackets"
                    .into(),
            );
        }
    }
    Ok(())
}

fn decode_host(host: &str) -> Result<String, Problem> {
    if host.is_empty() {
        return Err("a host's name is empty".into());
    }
    let host = decode_text("host", host)?;
    if !is_host(&host) {
        return Err("a host is neither a name, an address nor the folder of a socket".into());
    }
    Ok(host)
}

/// Whether `text` may be a host: what else a connection is described by, a password perhaps, has no place there.
pub(super) fn is_host(text: &str) -> bool {
    let is_foreign = |character: char| character.is_whitespace() || "=@".contains(character);
    text.starts_with('/') || !text.contains(is_foreign)
}

fn read_port(text: &str) -> Result<u16, Problem> {
    text.parse()
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| "the port must be a number from 1 to 65535".into())
}

/// A number of seconds; none, which is the default, when it is not above zero.
fn seconds(name: &str, value: &str) -> Result<Option<Duration>, Problem> {
    let seconds: i64 =
        value.parse().map_err(|_| format!("{name} must be a whole number of seconds"))?;
    Ok(u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs))
}

fn one_of(name: &str, values: &str) -> Result<(), Problem> {
    Err(format!("{name} must be {values}"))
}

/// What to say of a parameter that there is not.
fn unknown(name: &str) -> Problem {
    let instead = match name {
        "ssl" => "write sslmode=require, or sslmode=disable, instead of ssl",
        "schema" | "currentSchema" | "search_path" => {
            return format!(
                "{name} is no parameter of PostgreSQL: for tables in another schema, write \
                 options=-c%20search_path%3DNAME"
            );
        }
        "sslcert" | "sslkey" | "sslpassword" => {
            return format!("{name}: client certificates are not supported; a password is");
        }
        "pgbouncer" => {
            "pgbouncer is no parameter of PostgreSQL: leave it out, and use the pooler's session mode"
        }
        _ => "",
    };
    if !instead.is_empty() {
        return instead.into();
    }
    let is_plain = name.len() <= 40
        && name.chars().all(|character| character.is_ascii_alphabetic() || character == '_');
    if is_plain {
        format!("there is no parameter {name}; there are {PARAMETERS}")
    } else {
        format!(
            "behind the ? there is a parameter that is not known; there are {PARAMETERS} (a ? or & elsewhere must be \
             written as %3F or %26)"
        )
    }
}

/// Takes percent-encoding back.
fn decode(part: &str, text: &str) -> Result<Vec<u8>, Problem> {
    let mut rest = text;
    while let Some((_, behind)) = rest.split_once('%') {
        if !behind
            .as_bytes()
            .get(..2)
            .is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
        {
            return Err(format!(
                "in the {part} there is a % without two hexadecimal digits behind it: a % itself must be written as %25"
            ));
        }
        rest = behind;
    }
    let decoded: Vec<u8> = percent_encoding::percent_decode_str(text).collect();
    if decoded.contains(&0) {
        return Err(format!("the {part} holds a NUL (%00)"));
    }
    Ok(decoded)
}

fn decode_text(part: &str, text: &str) -> Result<String, Problem> {
    String::from_utf8(decode(part, text)?)
        .map_err(|_| format!("the {part} is not UTF-8 once its percent-encoding is decoded"))
}

#[cfg(test)]
mod tests {
    use tokio_postgres::config::Host;

    use super::*;

    fn read(url: &str) -> Result<PostgresTarget, String> {
        match parse("DATABASE_URL", url) {
            Ok(Target::Postgres(target)) => Ok(*target),
            Ok(other) => panic!("{url}: {other}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn every_part_that_can_be_wrong_is_named_and_the_password_is_not() {
        // What is wrong, and what the message must hold. `hunter` is the password in all of them.
        for (url, named) in [
            ("postgres://u:hunter@h/db?schema=app", "schema is no parameter"),
            ("postgres://u:hunter@h/db?currentSchema=app", "options=-c%20search_path%3DNAME"),
            ("postgres://u:hunter@h/db?ssl=true", "sslmode=require"),
            ("postgres://u:hunter@h/db?sslcert=x.pem", "client certificates"),
            ("postgres://u:hunter@h/db?pgbouncer=true", "session mode"),
            ("postgres://u:hunter@h/db?sslmod=require", "no parameter sslmod;"),
            ("postgres://u:hunter@h/db?sslmode", "without a value"),
            ("postgres://u:hunter@h/db?sslmode=on", "sslmode must be disable"),
            ("postgres://u:hunter@h/db?sslrootcert=", "sslrootcert names no file"),
            ("postgres://u:hunter@h/db?sslrootcert=%2", "in the sslrootcert there is a %"),
            ("postgres://u:hunter@h/db?sslnegotiation=direct", "sslnegotiation must be"),
            ("postgres://u:hunter@h/db?connect_timeout=5s", "connect_timeout must be"),
            ("postgres://u:hunter@h/db?tcp_user_timeout=x", "tcp_user_timeout must be"),
            ("postgres://u:hunter@h/db?keepalives=yes", "keepalives must be 0 or 1"),
            ("postgres://u:hunter@h/db?keepalives_idle=x", "keepalives_idle must be"),
            ("postgres://u:hunter@h/db?keepalives_interval=x", "keepalives_interval must be"),
            ("postgres://u:hunter@h/db?keepalives_retries=x", "keepalives_retries must be"),
            (
                "postgres://u:hunter@h/db?target_session_attrs=standby",
                "target_session_attrs must be",
            ),
            ("postgres://u:hunter@h/db?channel_binding=x", "channel_binding must be"),
            ("postgres://u:hunter@h/db?load_balance_hosts=x", "load_balance_hosts must be"),
            ("postgres://u:hunter@h/db?hostaddr=h", "hostaddr must be an IP address"),
            ("postgres://u:hunter@h/db?hostaddr=::1,::2", "hostaddr must name as many"),
            ("postgres://u:hunter@h/db?host=i", "host is named twice"),
            ("postgres://u:hunter@h:1/db?port=2", "port is named twice"),
            ("postgres://u:hunter@/db", "names no host"),
            ("postgres://u:hunter@:5432/db", "a host's name is empty"),
            ("postgres://u:hunter@a,,b/db", "a host's name is empty"),
            ("postgres://u:hunter@a,/db", "a host's name is empty"),
            ("postgres:///db?host=", "a host's name is empty"),
            ("postgres:///db?host=a,b,c&port=1,2", "port must be one for all hosts"),
            ("postgres://u:hunter@h:x/db", "the port must be"),
            ("postgres://u:hunter@h:/db", "the port must be"),
            ("postgres://u:hunter@h:0/db", "the port must be"),
            ("postgres://u:hunter@h:65536/db", "the port must be"),
            ("postgres://u:hunter@a:1,b:-1/db", "the port must be"),
            ("postgres://u:hunter@::1/db", "stands in brackets"),
            ("postgres://u:hunter@[::1/db", "has no ]"),
            ("postgres://u:hunter@[h]/db", "no IPv6 address"),
            ("postgres://u:hunter@[::1]5432/db", "behind the host's ]"),
            ("postgres://u:hunter@h%zz/db", "in the host there is a %"),
            ("postgres://u%:hunter@h/db", "in the user's name there is a %"),
            ("postgres://u%ff:hunter@h/db", "the user's name is not UTF-8"),
            ("postgres://u:%hunter@h/db", "in the password there is a %"),
            ("postgres://u:hunter%00@h/db", "the password holds a NUL"),
            ("postgres://u:hunter@h/d%b", "in the database's name there is a %"),
            ("postgres://u:hunter@h/d/b", "the database's name holds a /"),
            // A password that is not encoded.
            ("postgres://u:hunter/x@h/db", "/ must be written as %2F"),
            ("postgres://u:hunter?x@h/db", "? as %3F"),
            ("postgres://u:x?hunter=x@h/db", "? as %3F"),
            ("postgres://u:x@?hunter", "without a value"),
            ("postgres://u:x@h/db?hunter2=x", "a parameter that is not known"),
            ("postgres://u:hunter", "a user and a password must be followed by @HOST"),
            ("postgres://u:hunter/db", "a user and a password must be followed by @HOST"),
            ("postgres://u:hunter?x=y", "a user and a password must be followed by @HOST"),
            ("postgres://u:hun,ter", "a user and a password must be followed by @HOST"),
            ("postgres://u:hunter:hunter", "a user and a password must be followed by @HOST"),
            ("postgres://u:1234567/db", "a user and a password must be followed by @HOST"),
            ("postgres://hunter:x:y@h:1:2/db", "a colon in the password"),
        ] {
            let error = read(url).unwrap_err();
            assert!(error.starts_with("DATABASE_URL: ") && error.contains(named), "{url}: {error}");
            assert!(!error.contains("hunter"), "{url}: {error}");
        }
        for url in ["mysql://u:hunter@h/db", "h:5432/hunter", "sqlite:"] {
            let error = parse("--from", url).unwrap_err().to_string();
            assert!(error.starts_with("--from") && !error.contains("hunter"), "{url}: {error}");
        }
    }

    #[test]
    fn what_is_right_is_read() {
        let target = read(
            "postgresql://a%40b:p%3Aq%25%FF@[::1]:6432,h,%2Frun%2Fpg/my%20db?connect_timeout=7&\
             application_name=x%26y&options=-c%20search_path%3Dapp&target_session_attrs=primary&\
             sslmode=require&keepalives_idle=9&tcp_user_timeout=1500",
        )
        .unwrap();
        let config = &target.config;
        assert_eq!(config.get_user(), Some("a@b"));
        assert_eq!(config.get_password(), Some(&b"p:q%\xff"[..]));
        let hosts = ["::1", "h"].map(|name| Host::Tcp(name.into()));
        assert_eq!(config.get_hosts()[..2], hosts);
        assert_eq!(config.get_hosts()[2], Host::Unix("/run/pg".into()));
        assert_eq!(config.get_ports(), [6432, 5432, 5432]);
        assert_eq!(config.get_dbname(), Some("my db"));
        assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(7)));
        assert_eq!(config.get_application_name(), Some("x&y"));
        assert_eq!(config.get_options(), Some("-c search_path=app"));
        assert_eq!(config.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
        assert_eq!(config.get_keepalives_idle(), Duration::from_secs(9));
        assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_millis(1500)));
        assert_eq!(target.ssl_mode, SslMode::Require);

        let target = read("postgres:///?host=/run/pg,h&port=1,2&user=u&password=a%2Bb").unwrap();
        assert_eq!(target.config.get_ports(), [1, 2]);
        assert_eq!(target.config.get_password(), Some(&b"a+b"[..]));
        assert_eq!(target.config.get_dbname(), Some("pisync"));
        // An @ in the password need not be encoded, since no host has one.
        let target = read("postgres://u:p@q#r@h/db").unwrap();
        assert_eq!(target.config.get_password(), Some(&b"p@q#r"[..]));
        // Zero waits for ever in libpq; a server must not.
        let target = read("postgres://h?connect_timeout=0&sslrootcert=system").unwrap();
        assert_eq!(target.config.get_connect_timeout(), None);
        assert_eq!((target.ssl_mode, target.ssl_root_cert), (SslMode::VerifyFull, None));
    }
}
