//! The checks of `doctor` in their order: configuration, database, schema, journal, clock, folders, server. A check that has
//! no database to look at is not made, since the line above it says why.

use std::{net::SocketAddr, sync::Arc};

use super::{Report, folders};
use crate::{
    app,
    cli::{
        health::{self, Health},
        listen,
        settings::SettingsFile,
    },
    clock::Clock,
    config::{ListenArgs, ServeArgs, Settings, http::AuthMode},
    keys::Keyring,
    maintenance,
    net::Tls,
    store::{
        self, Store, StoreError, Target,
        migrations::{Migrator, Status},
    },
};

pub(super) async fn all(report: &mut Report<'_>, serve: &ServeArgs, settings_file: &SettingsFile) {
    let Some(settings) = configuration(report, serve, settings_file) else { return };
    let clock = Clock::system();
    let database = database(report, &settings).await;
    clock_check(report, &clock, database.store()).await;
    folders::check(report, &settings.target, serve.log_folder().as_deref());
    let has_admin = has_admin(&database, &clock).await;
    // It is dropped and not closed, which would apply a journal that is the server's.
    drop(database);
    server(report, serve.listen(), &settings, has_admin).await;
}

/// What is known of the database.
enum Database {
    /// It can be used.
    Open(Arc<dyn Store>),
    /// There is none, or nothing is in it: the next start makes the tables.
    New,
    /// It is not as it should be; the report says why.
    Unusable,
}

impl Database {
    fn store(&self) -> Option<&dyn Store> {
        match self {
            Self::Open(store) => Some(&**store),
            Self::New | Self::Unusable => None,
        }
    }
}

/// Whether there is an admin key that opens something; `None` when that cannot be known.
async fn has_admin(database: &Database, clock: &Clock) -> Option<bool> {
    match database {
        Database::Open(store) => {
            let keyring = Keyring::default();
            keyring.refresh(&**store).await.ok()?;
            Some(keyring.has_admin(clock.now()))
        }
        Database::New => Some(false),
        Database::Unusable => None,
    }
}

/// The settings, if they make sense.
fn configuration(
    report: &mut Report<'_>,
    serve: &ServeArgs,
    settings_file: &SettingsFile,
) -> Option<Settings> {
    const CHECK: &str = "configuration";
    let settings = match serve.settings() {
        Ok(settings) => settings,
        Err(error) => {
            report.fail(CHECK, settings_file.with_origin(error.to_string()));
            return None;
        }
    };
    for warning in &settings_file.warnings {
        report.warn(CHECK, warning);
    }
    for name in &settings_file.unknown {
        report.warn(CHECK, format!("no command reads the setting {name} of .env; is it misspelt?"));
    }
    if settings_file.is_readable_by_others() {
        report.warn(CHECK, "others may read .env, which holds a password: chmod 600 .env");
    }
    if let Some(files) = settings.http.tls.clone()
        && let Err(error) = Tls::load(files)
    {
        report.fail(CHECK, error);
    }
    report.ok(CHECK, format!("{} at {}", settings.target, serve.listen().url()));
    Some(settings)
}

/// The database, which can be used if it is there and its schema is that of this version.
async fn database(report: &mut Report<'_>, settings: &Settings) -> Database {
    const CHECK: &str = "database";
    let target = &settings.target;
    let look = async {
        if store::exists(target)? {
            Migrator::new(target, &settings.migrations_dir).await.map(Some)
        } else {
            Ok(None)
        }
    };
    let mut migrator = match look.await {
        Ok(Some(migrator)) => migrator,
        Ok(None) => {
            if let Target::Sqlite(path) = target {
                let path = path.display();
                report
                    .warn(CHECK, format!("no database at {path}; `pisync serve` makes one there"));
            }
            return Database::New;
        }
        Err(error) => {
            report.fail(CHECK, error.to_string());
            return Database::Unusable;
        }
    };
    // An older program's database is found and read before its schema is judged.
    let status = match migrator.status().await {
        Ok(status) => status,
        Err(error) => {
            report.fail(CHECK, error.to_string());
            return Database::Unusable;
        }
    };
    if !schema(report, settings, &status) {
        report.ok(CHECK, format!("{target} answers"));
        let is_new = status.iter().all(|line| line.applied_at.is_none());
        return if is_new { Database::New } else { Database::Unusable };
    }
    journal(report, target);
    match open(target).await {
        Ok(store) => {
            report.ok(CHECK, format!("{target} answers"));
            Database::Open(store)
        }
        Err(error) => {
            report.fail(CHECK, error.to_string());
            Database::Unusable
        }
    }
}

async fn open(target: &Target) -> Result<Arc<dyn Store>, StoreError> {
    let store = store::open(target).await?;
    store.ping().await?;
    Ok(store)
}

/// Whether the schema is that of this version.
fn schema(report: &mut Report<'_>, settings: &Settings, status: &[Status]) -> bool {
    const CHECK: &str = "schema";
    let with_problems: Vec<_> = status
        .iter()
        .filter_map(|line| Some(format!("{} ({})", line.name, line.problem?)))
        .collect();
    if !with_problems.is_empty() {
        let list = with_problems.join(", ");
        report.fail(
            CHECK,
            format!(
                "applied migrations that are not as they were: {list}; see `pisync migrate status`"
            ),
        );
        return false;
    }
    let pending: Vec<_> = status
        .iter()
        .filter(|line| line.applied_at.is_none())
        .map(|line| line.name.as_str())
        .collect();
    if pending.is_empty() {
        report.ok(CHECK, format!("all {} migrations are applied", status.len()));
        return true;
    }
    let list = pending.join(", ");
    if settings.auto_migrate || matches!(settings.target, Target::Sqlite(_)) {
        report.warn(CHECK, format!("pending migrations, which the next start applies: {list}"));
    } else {
        report.fail(CHECK, format!("pending migrations: {list}; run `pisync migrate up`"));
    }
    false
}

/// SQLite's ingest journal. Beside a running server its files change while they are read.
fn journal(report: &mut Report<'_>, target: &Target) {
    const CHECK: &str = "ingest journal";
    if !matches!(target, Target::Sqlite(_)) || store::is_claimed(target) {
        return;
    }
    match store::inspect_journal(target) {
        Err(error) => report.fail(CHECK, error.to_string()),
        Ok(found) => match (found.damage, found.newer_version) {
            (Some(damage), _) => {
                report.fail(CHECK, format!("{damage}; see `pisync journal inspect`"));
            }
            (None, Some(version)) => report.fail(
                CHECK,
                format!("it is in format {version}, of a newer PiSync; run that version"),
            ),
            (None, None) => report.ok(
                CHECK,
                format!("events that the next start applies: {}", found.unapplied_events),
            ),
        },
    }
}

async fn clock_check(report: &mut Report<'_>, clock: &Clock, store: Option<&dyn Store>) {
    const CHECK: &str = "clock";
    let now = match clock.check() {
        Ok(now) => now,
        Err(error) => return report.fail(CHECK, error.to_string()),
    };
    let doubt = match store {
        Some(store) => maintenance::doubt(store, clock).await,
        None => Ok(None),
    };
    match doubt {
        Ok(None) => report.ok(CHECK, format!("it says {now}")),
        Ok(Some(doubt)) => report.warn(CHECK, doubt),
        Err(error) => {
            report.warn(CHECK, format!("it cannot be compared with the database's: {error}"));
        }
    }
}

/// The server of this configuration: may it listen where it should, and how is it?
async fn server(
    report: &mut Report<'_>,
    listen: &ListenArgs,
    settings: &Settings,
    has_admin: Option<bool>,
) {
    const CHECK: &str = "server";
    let url = listen.url();
    let health = match health::ask(listen).await {
        Ok(health) => health,
        Err(error) => return report.fail(CHECK, error),
    };
    if let Some(address) = address(report, listen, &health).await {
        admin_key(report, settings.http.auth, address, has_admin);
    }
    match (health.problem(&url), health) {
        (None, _) => report.ok(CHECK, format!("{url} is ready")),
        (Some(problem), Health::Silent(_)) if !store::is_claimed(&settings.target) => {
            report.warn(CHECK, problem);
        }
        (Some(problem), _) => report.fail(CHECK, problem),
    }
}

/// The address that decides who may do what. Where no server answers, it is listened on for a moment, which tells more
/// than any rule would: whether the host is this machine's, and whether the port is free and not for root alone.
async fn address(
    report: &mut Report<'_>,
    listen: &ListenArgs,
    health: &Health,
) -> Option<SocketAddr> {
    const CHECK: &str = "address";
    let addresses = match health {
        Health::Silent(_) => listen::listen(listen).await.and_then(|listeners| {
            listeners.addresses().map_err(|error| format!("cannot listen: {error}"))
        }),
        Health::Ready | Health::Unready | Health::Foreign(_) => listen::addresses(listen).await,
    };
    match addresses {
        Ok(addresses) => {
            if matches!(health, Health::Silent(_)) {
                let (host, port) = listen.address();
                report.ok(CHECK, format!("a server can listen on {host}:{port}"));
            }
            app::most_reachable(&addresses)
        }
        Err(problem) => {
            report.fail(CHECK, problem);
            None
        }
    }
}

/// A server that other machines can reach does not start without an admin key.
fn admin_key(
    report: &mut Report<'_>,
    auth: AuthMode,
    address: SocketAddr,
    has_admin: Option<bool>,
) {
    let Some(has_admin) = has_admin else { return };
    if let Err(error) = app::check_admin_key(auth, address, has_admin) {
        report.fail("API keys", error.to_string());
    }
}
