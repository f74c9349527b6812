//! What to use for backups: PostgreSQL's own tools, which know it better.

use std::path::Path;

use tokio_postgres::config::Host;

use crate::store::PostgresTarget;

/// The command that makes a backup of the database.
pub(crate) fn dump_instead(target: &PostgresTarget, file: &Path) -> String {
    format!(
        "PostgreSQL is backed up with its own tool: pg_dump --format=custom --file={}{} {}",
        quoted(&file.to_string_lossy()),
        connection(target),
        database(target),
    )
}

/// The command that restores what [`dump_instead`]'s has written.
pub(crate) fn restore_instead(target: &PostgresTarget, file: &Path) -> String {
    format!(
        "PostgreSQL is restored with its own tool, while no server runs: pg_restore --clean --if-exists --no-owner{} --dbname={} {}",
        connection(target),
        database(target),
        quoted(&file.to_string_lossy()),
    )
}

/// Options that say where to connect, but for the password, which the tools ask for.
fn connection(target: &PostgresTarget) -> String {
    let host = target.config.get_hosts().first().map(|host| match host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.to_string_lossy().into_owned(),
    });
    let options = [
        ("host", host),
        ("port", target.config.get_ports().first().map(ToString::to_string)),
        ("username", target.config.get_user().map(ToOwned::to_owned)),
    ];
    let given = options.into_iter().filter_map(|(name, value)| Some((name, value?)));
    given.map(|(name, value)| format!(" --{name}={}", quoted(&value))).collect()
}

fn database(target: &PostgresTarget) -> String {
    quoted(target.config.get_dbname().unwrap_or_default())
}

/// As one word of a shell.
fn quoted(text: &str) -> String {
    let plain =
        |character: char| character.is_ascii_alphanumeric() || "._-/:@%+".contains(character);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
