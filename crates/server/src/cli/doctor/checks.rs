//! The checks of `doctor` in their order: configuration, database, schema, journal, clock, folders, server. A check that has
//! no database to look at is not made, since the line above it says why.

use super::{Report, folders};
use crate::{
    cli::{
        health::{self, Health},
        settings::SettingsFile,
    },
    clock::Clock,
    config::{ListenArgs, ServeArgs, Settings},
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
    let store = database(report, &settings).await;
    clock_check(report, &clock, store.as_deref()).await;
    folders::check(report, &settings.target, serve.log_folder().as_deref());
    // It is dropped and not closed, which would apply a journal that is the server's.
    drop(store);
    server(report, serve.listen(), &settings.target).await;
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
            report.fail(CHECK, error.to_string());
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

/// The database, if it is there and its schema is that of this version.
async fn database(
    report: &mut Report<'_>,
    settings: &Settings,
) -> Option<std::sync::Arc<dyn Store>> {
    const CHECK: &str = "database";
    let target = &settings.target;
    if let Target::Sqlite(path) = target
        && path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    {
        let path = path.display();
        report.warn(CHECK, format!("no database at {path}; `pisync serve` makes one there"));
        return None;
    }
    let look = async {
        store::check_exists(target)?;
        Migrator::new(target, &settings.migrations_dir).await
    };
    let mut migrator = match look.await {
        Ok(migrator) => migrator,
        Err(error) => {
            report.fail(CHECK, error.to_string());
            return None;
        }
    };
    // An older program's database is found and read before its schema is judged.
    let status = match migrator.status().await {
        Ok(status) => status,
        Err(error) => {
            report.fail(CHECK, error.to_string());
            return None;
        }
    };
    if !schema(report, settings, &status) {
        report.ok(CHECK, format!("{target} answers"));
        return None;
    }
    journal(report, target);
    match open(target).await {
        Ok(store) => {
            report.ok(CHECK, format!("{target} answers"));
            Some(store)
        }
        Err(error) => {
            report.fail(CHECK, error.to_string());
            None
        }
    }
}

async fn open(target: &Target) -> Result<std::sync::Arc<dyn Store>, StoreError> {
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

async fn server(report: &mut Report<'_>, listen: &ListenArgs, target: &Target) {
    const CHECK: &str = "server";
    let url = listen.url();
    let health = match health::ask(listen).await {
        Ok(health) => health,
        Err(error) => return report.fail(CHECK, error),
    };
    match (health.problem(&url), health) {
        (None, _) => report.ok(CHECK, format!("{url} is ready")),
        (Some(problem), Health::Silent(_)) if !store::is_claimed(target) => {
            report.warn(CHECK, problem);
        }
        (Some(problem), _) => report.fail(CHECK, problem),
    }
}
