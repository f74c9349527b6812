//! The commands with which PostgreSQL's own tools make and restore backups. `store::backup` shows them to people, who
//! copy them into a shell. They must never contain a password.

use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio_postgres::config::Host;

use crate::store::{PostgresTarget, SslMode};

/// Characters that need no encoding in a URL.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The command that makes a backup of the database.
pub(crate) fn dump_instead(target: &PostgresTarget, file: &Path) -> String {
    format!(
        "PostgreSQL is backed up with its own tool: pg_dump --format=custom --file={} --dbname={}",
        quoted(&file.to_string_lossy()),
        url(target, name(target)),
    )
}

/// The commands that restore a backup made with [`dump_instead`].
///
/// They restore into a new database, which takes the old one's name once everything is in it. `pg_restore --clean`
/// would drop what it can of a database in use, and then mix the rest with the backup. Partitions, other objects that
/// refer to our tables, and foreign extensions keep tables from being dropped. In a new database nothing is in the way.
/// All of it is one transaction, and the old database is kept. Comments on extensions are not restored, because only
/// the extension's owner, an administrator, may write them.
pub(crate) fn restore_instead(target: &PostgresTarget, file: &Path) -> String {
    let name = name(target);
    let (restored, replaced) = (format!("{name}_restored"), format!("{name}_replaced"));
    let file = quoted(&file.to_string_lossy());
    let maintenance = url(target, "postgres");
    let rename = |from: &str, to: &str| {
        quoted(&format!("alter database {} rename to {}", identifier(from), identifier(to)))
    };
    format!(
        "PostgreSQL is restored with its own tools, into a new database that then takes the name of the other, which \
         is kept as {replaced}. Stop the servers, and as a user who may create databases run: \
         createdb --maintenance-db={maintenance} --template=template0 --encoding=UTF8 {new} && \
         pg_restore --list {file} | grep -v 'COMMENT - EXTENSION' | \
         pg_restore --use-list=/dev/stdin --exit-on-error --single-transaction --no-owner --dbname={into} {file} && \
         psql --dbname={maintenance} --single-transaction --set=ON_ERROR_STOP=1 --command={} --command={}",
        rename(name, &replaced),
        rename(&restored, name),
        new = quoted(&restored),
        into = url(target, &restored),
    )
}

fn name(target: &PostgresTarget) -> &str {
    target.config.get_dbname().unwrap_or_default()
}

/// The URL of a database, as one word for a shell. It lacks the password, for which the tools ask.
fn url(target: &PostgresTarget, database: &str) -> String {
    let encoded = |text: &str| utf8_percent_encode(text, PLAIN).to_string();
    let config = &target.config;
    let ports = config.get_ports();
    let host = |(position, host): (usize, &Host)| {
        let host = match host {
            Host::Tcp(name) if name.contains(':') => format!("[{name}]"),
            Host::Tcp(name) => encoded(name),
            Host::Unix(path) => encoded(&path.to_string_lossy()),
        };
        let port = ports.get(position).or(ports.first());
        host + &port.map(|port| format!(":{port}")).unwrap_or_default()
    };
    let hosts: Vec<_> = config.get_hosts().iter().enumerate().map(host).collect();
    let user = config.get_user().map(|user| encoded(user) + "@").unwrap_or_default();
    let mode = match target.ssl_mode {
        SslMode::Disable => Some("disable"),
        // The tools do the same.
        SslMode::Prefer => None,
        SslMode::Require => Some("require"),
        SslMode::VerifyCa => Some("verify-ca"),
        SslMode::VerifyFull => Some("verify-full"),
    };
    let addresses = config.get_hostaddrs().iter().map(ToString::to_string).collect::<Vec<_>>();
    let parameters = [
        ("hostaddr", (!addresses.is_empty()).then(|| addresses.join(","))),
        ("port", if hosts.is_empty() { ports.first().map(ToString::to_string) } else { None }),
        ("sslmode", mode.map(ToOwned::to_owned)),
        ("sslrootcert", target.ssl_root_cert.as_ref().map(|path| encoded(&path.to_string_lossy()))),
        ("options", config.get_options().map(encoded)),
        ("target_session_attrs", (hosts.len() > 1).then(|| "read-write".to_owned())),
    ];
    let parameters: Vec<_> = parameters
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", value?)))
        .collect();
    let query =
        if parameters.is_empty() { String::new() } else { format!("?{}", parameters.join("&")) };
    quoted(&format!("postgresql://{user}{}/{}{query}", hosts.join(","), encoded(database)))
}

/// Quotes a name as an SQL identifier.
fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a text as one word for a shell.
fn quoted(text: &str) -> String {
    let plain =
        |character: char| character.is_ascii_alphanumeric() || "._-/:@%+".contains(character);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokio_postgres::Config;

    use super::*;

    #[test]
    fn a_url_leads_to_the_same_place_without_the_password() {
        let mut config = Config::new();
        config
            .host("::1")
            .host("db2")
            .port(5432)
            .port(6432)
            .user("a b")
            .password("secret")
            .dbname("it's")
            .options("-c search_path=x");
        let target = PostgresTarget {
            config,
            ssl_mode: SslMode::VerifyFull,
            ssl_root_cert: Some(PathBuf::from("/ca s.pem")),
        };
        let command = dump_instead(&target, Path::new("file"));
        let url = "'postgresql://a%20b@[::1]:5432,db2:6432/it%27s?sslmode=verify-full&sslrootcert=%2Fca%20s.pem\
                   &options=-c%20search_path%3Dx&target_session_attrs=read-write'";
        assert!(command.ends_with(&format!("--dbname={url}")), "{command}");
        let command = restore_instead(&target, Path::new("it's"));
        assert!(
            command.contains(r#"'alter database "it'\''s" rename to "it'\''s_replaced"'"#),
            "{command}"
        );
        assert!(!command.contains("secret"), "{command}");
    }
}
