//! Migrations on both stores, applied and rolled back, and the databases that they must leave alone.

use std::path::Path;

use pisync::store::{
    self, HistoryQuery, Target,
    migrations::{EMBEDDED, Migration, MigrationError, Migrator, Source, create_pair},
};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::support::{
    events::{at, device_id, failure, now, success, write},
    node_service::{FEW_EVENTS, SCHEMA, describe},
    store::TestDatabase,
};

both_stores!(
    up_fill_down_to_nothing_and_up_again,
    up_twice_is_up_once,
    up_between_two_steps_of_down_ends_it,
    status_lists_what_is_applied_then_what_is_pending,
    users_migrations_run_after_the_programs_own,
    each_up_is_a_batch_of_its_own,
    an_edited_migration_is_noticed,
    missing_files_are_noticed_when_they_are_needed,
    a_failing_migration_leaves_nothing_behind,
    a_failing_rollback_leaves_everything,
    a_newer_database_is_left_alone,
    a_foreign_table_is_left_alone,
    files_that_are_no_migrations_are_refused,
    a_new_pair_of_files_runs,
    asking_while_another_server_migrates,
);

fn no_folder() -> &'static Path {
    Path::new("/nonexistent")
}

/// Users' migrations: name, up, down.
fn folder(migrations: &[(&str, &str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, up, down) in migrations {
        std::fs::write(folder.path().join(format!("{name}.up.sql")), up).unwrap();
        std::fs::write(folder.path().join(format!("{name}.down.sql")), down).unwrap();
    }
    folder
}

fn names(migrations: &[Migration]) -> Vec<&str> {
    migrations.iter().map(|migration| migration.name.as_str()).collect()
}

/// Each migration's name, and whether it is applied, or what is wrong with it.
async fn status(migrator: &mut Migrator) -> Vec<(String, &'static str)> {
    let describe = |applied: bool| if applied { "applied" } else { "pending" };
    let status = migrator.status().await.unwrap();
    status
        .into_iter()
        .map(|one| (one.name, one.problem.unwrap_or(describe(one.applied_at.is_some()))))
        .collect()
}

/// The program's own migrations in this `state`, before others.
fn described(state: &'static str, others: &[(&str, &'static str)]) -> Vec<(String, &'static str)> {
    let embedded = EMBEDDED.iter().map(|name| (*name, state));
    let all = embedded.chain(others.iter().copied());
    all.map(|(name, state)| (name.to_owned(), state)).collect()
}

/// The program's own migrations, and others after them.
fn and_then(others: &[&'static str]) -> Vec<&'static str> {
    [EMBEDDED, others].concat()
}

/// From the last to the first.
fn reversed(mut names: Vec<&'static str>) -> Vec<&'static str> {
    names.reverse();
    names
}

const SITES: (&str, &str, &str) =
    ("2025-01-01-01-sites", "create table sites (name text)", "drop table sites");
const RACKS: (&str, &str, &str) = (
    "2025-01-02-01-racks",
    "create table racks (site text); insert into racks select name from sites",
    "drop table racks",
);

async fn up_fill_down_to_nothing_and_up_again(database: &TestDatabase) {
    let mut migrator = database.migrator(no_folder()).await;
    let mut tables = Vec::new();
    for _ in 0..2 {
        assert_eq!(migrator.up(now()).await.unwrap(), EMBEDDED);
        let found = database.tables().await;
        assert!(found.contains(&"sync_events".to_owned()), "{found:?}");

        let store = store::open(&database.target).await.unwrap();
        store.maintain(now()).await.unwrap();
        let events = vec![failure("pi", at(0)), success("pi", at(1)), success("other", at(2))];
        let written = write(&mut *store.event_writer(), events).await;
        // Nothing is left of the round before.
        assert_eq!(written.new_devices.len(), 2);
        let query = HistoryQuery::newest(device_id("pi"), 10);
        assert_eq!(store.sync_history(&query).await.unwrap().unwrap().total_events, 2);
        drop(store);

        // Filled, and the same tables in each round.
        let found = database.tables().await;
        assert!(tables.is_empty() || tables == found, "{tables:?}, {found:?}");
        tables = found;

        let all = migrator.last(usize::MAX).await.unwrap();
        assert!(all.iter().all(|migration| migration.losses().count() > 0));
        assert_eq!(migrator.down(&all).await.unwrap(), reversed(and_then(&[])));
        assert_eq!(database.tables().await, ["pisync_migrations"]);
        assert_eq!(migrator.check().await.unwrap(), EMBEDDED);
        // There is nothing more to take back.
        assert_eq!(names(&migrator.last(1).await.unwrap()), [""; 0]);
        assert_eq!(migrator.down(&all).await.unwrap(), [""; 0]);
    }
}

async fn up_twice_is_up_once(database: &TestDatabase) {
    let mut migrator = database.migrator(no_folder()).await;
    assert_eq!(migrator.check().await.unwrap(), EMBEDDED);
    assert_eq!(migrator.up(now()).await.unwrap(), EMBEDDED);
    let tables = database.tables().await;
    for mut migrator in [migrator, database.migrator(no_folder()).await] {
        assert_eq!(migrator.check().await.unwrap(), [""; 0]);
        assert_eq!(migrator.up(at(10)).await.unwrap(), [""; 0]);
        assert_eq!(migrator.status().await.unwrap()[0].applied_at, Some(now()));
    }
    assert_eq!(database.tables().await, tables);
}

/// Each migration has the lock by itself. A server that starts meanwhile must not be rolled back half.
async fn up_between_two_steps_of_down_ends_it(database: &TestDatabase) {
    let mut going_down = database.migrator(no_folder()).await;
    going_down.up(now()).await.unwrap();
    let all = going_down.last(usize::MAX).await.unwrap();
    going_down.down(&all[..2]).await.unwrap();
    let mut going_up = database.migrator(no_folder()).await;
    assert_eq!(going_up.up(now()).await.unwrap().len(), 2);
    let error = going_down.down(&all[2..]).await.unwrap_err().to_string();
    assert!(error.contains("another process has applied"), "{error}");
    assert_eq!(going_up.check().await.unwrap(), Vec::<String>::new());
    let status = status(&mut going_up).await;
    assert!(status.iter().all(|(_, state)| *state == "applied"), "{status:?}");
    // Nothing is missing: all of it can be rolled back.
    let all = going_up.last(usize::MAX).await.unwrap();
    going_up.down(&all).await.unwrap();
    assert_eq!(database.tables().await, ["pisync_migrations"]);
}

async fn status_lists_what_is_applied_then_what_is_pending(database: &TestDatabase) {
    let folder = folder(&[RACKS, SITES]);
    let mut without = database.migrator(no_folder()).await;
    let mut with = database.migrator(folder.path()).await;
    let others = [(SITES.0, "pending"), (RACKS.0, "pending")];
    assert_eq!(status(&mut with).await, described("pending", &others));
    assert_eq!(database.tables().await, [""; 0], "status has changed something");

    without.up(now()).await.unwrap();
    assert_eq!(status(&mut with).await, described("applied", &others));
    with.up(at(5)).await.unwrap();
    let found = with.status().await.unwrap();
    let found: Vec<_> = found.iter().map(|one| (one.source, one.applied_at)).collect();
    let (embedded, user) = ((Source::Embedded, Some(now())), (Source::User, Some(at(5))));
    assert_eq!(found, [vec![embedded; EMBEDDED.len()], vec![user, user]].concat());
}

async fn users_migrations_run_after_the_programs_own(database: &TestDatabase) {
    // Older than the program's own by their names, and the first by name is written last.
    let folder = folder(&[RACKS, SITES]);
    std::fs::write(folder.path().join("README.md"), "Not a migration.").unwrap();
    let mut migrator = database.migrator(folder.path()).await;
    let expected = and_then(&[SITES.0, RACKS.0]);
    assert_eq!(migrator.up(now()).await.unwrap(), expected);
    let last = migrator.last_batch().await.unwrap();
    assert_eq!(names(&last), reversed(expected));
    assert_eq!(names(&migrator.last(2).await.unwrap()), [RACKS.0, SITES.0]);
    assert_eq!(migrator.down(&last[..1]).await.unwrap(), [RACKS.0]);
    let tables = database.tables().await;
    assert!(tables.contains(&"sites".to_owned()) && !tables.contains(&"racks".to_owned()));
    let others = [(SITES.0, "applied"), (RACKS.0, "pending")];
    assert_eq!(status(&mut migrator).await, described("applied", &others));
    assert_eq!(migrator.down(&last).await.unwrap(), reversed(and_then(&[SITES.0])));
    assert_eq!(database.tables().await, ["pisync_migrations"]);
}

async fn each_up_is_a_batch_of_its_own(database: &TestDatabase) {
    database.migrate().await;
    let folder = folder(&[RACKS]);
    // Applied before the one that its name comes after.
    database.execute("create table sites (name text)").await;
    assert_eq!(database.migrator(folder.path()).await.up(now()).await.unwrap(), [RACKS.0]);
    database.execute("drop table sites").await;
    let (name, up, down) = SITES;
    std::fs::write(folder.path().join(format!("{name}.up.sql")), up).unwrap();
    std::fs::write(folder.path().join(format!("{name}.down.sql")), down).unwrap();
    let mut migrator = database.migrator(folder.path()).await;
    assert_eq!(migrator.up(now()).await.unwrap(), [SITES.0]);
    for expected in [vec![SITES.0], vec![RACKS.0], reversed(and_then(&[]))] {
        let last = migrator.last_batch().await.unwrap();
        assert_eq!(names(&last), expected);
        migrator.down(&last).await.unwrap();
    }
    assert_eq!(names(&migrator.last_batch().await.unwrap()), [""; 0]);
}

async fn an_edited_migration_is_noticed(database: &TestDatabase) {
    let before = folder(&[SITES]);
    database.migrator(before.path()).await.up(now()).await.unwrap();
    let (name, up, down) = SITES;
    for edited in [(name, "create table sites (id text)", down), (name, up, "drop table site")] {
        let after = folder(&[edited, RACKS]);
        let mut migrator = database.migrator(after.path()).await;
        let edited = |error| matches!(error, MigrationError::Edited(found) if found == name);
        assert!(edited(migrator.check().await.unwrap_err()));
        assert!(edited(migrator.up(now()).await.unwrap_err()));
        assert!(edited(migrator.last(1).await.unwrap_err()));
        assert!(edited(migrator.last_batch().await.unwrap_err()));
        let others = [(name, "edited since"), (RACKS.0, "pending")];
        assert_eq!(status(&mut migrator).await, described("applied", &others));
    }
    assert_eq!(database.migrator(before.path()).await.check().await.unwrap(), [""; 0]);
}

async fn missing_files_are_noticed_when_they_are_needed(database: &TestDatabase) {
    let before = folder(&[SITES, RACKS]);
    database.migrator(before.path()).await.up(now()).await.unwrap();
    let after = folder(&[RACKS]);
    let mut migrator = database.migrator(after.path()).await;
    let others = [(SITES.0, "files missing"), (RACKS.0, "applied")];
    assert_eq!(status(&mut migrator).await, described("applied", &others));
    // A server starts all the same: what was applied is there.
    assert_eq!(migrator.check().await.unwrap(), [""; 0]);
    assert_eq!(migrator.up(now()).await.unwrap(), [""; 0]);
    assert_eq!(names(&migrator.last(1).await.unwrap()), [RACKS.0]);
    for needed in [migrator.last(2).await, migrator.last_batch().await] {
        let error = needed.unwrap_err();
        assert!(matches!(&error, MigrationError::Missing(name) if name == SITES.0), "{error:?}");
    }
}

async fn a_failing_migration_leaves_nothing_behind(database: &TestDatabase) {
    let broken = "2025-01-02-01-broken";
    for up in [
        "create table racks (a text); insert into racks values ('x'); insert into rack values ('x')",
        "create table racks (a text); create table racks (a text)",
        "create table racks (a text not null); insert into racks values (null)",
        "create table racks (a text); this is no SQL",
    ] {
        let folder = folder(&[SITES, (broken, up, "")]);
        let mut migrator = database.migrator(folder.path()).await;
        let error = migrator.up(now()).await.unwrap_err();
        assert!(error.to_string().contains(broken), "{error}");
        assert!(matches!(&error, MigrationError::Run { name, .. } if name == broken), "{error:?}");
        let tables = database.tables().await;
        assert!(tables.contains(&"sites".to_owned()) && !tables.contains(&"racks".to_owned()));
        let others = [(SITES.0, "applied"), (broken, "pending")];
        assert_eq!(status(&mut migrator).await, described("applied", &others));
    }
    // Once mended it runs.
    let folder = folder(&[SITES, (broken, RACKS.1, RACKS.2)]);
    assert_eq!(database.migrator(folder.path()).await.up(now()).await.unwrap(), [broken]);
}

async fn a_failing_rollback_leaves_everything(database: &TestDatabase) {
    let (name, up, _) = SITES;
    let folder = folder(&[(name, up, "drop table sites; drop table nonsense")]);
    let mut migrator = database.migrator(folder.path()).await;
    migrator.up(now()).await.unwrap();
    let tables = database.tables().await;
    let all = migrator.last_batch().await.unwrap();
    let error = migrator.down(&all).await.unwrap_err();
    assert!(matches!(&error, MigrationError::Run { name: of, .. } if of == name), "{error:?}");
    assert_eq!(database.tables().await, tables);
    assert_eq!(status(&mut migrator).await, described("applied", &[(name, "applied")]));
}

async fn a_newer_database_is_left_alone(database: &TestDatabase) {
    let newer = "2099-01-01-01-wonders";
    database.migrate().await;
    let applied_at = if database.file().is_some() { "0" } else { "now()" };
    database
        .execute(&format!(
            "insert into pisync_migrations (name, source, checksum, batch, applied_at)
             values ('{newer}', 'embedded', 'c', 2, {applied_at})"
        ))
        .await;
    let folder = folder(&[SITES]);
    let mut migrator = database.migrator(folder.path()).await;
    let is_newer = |error| matches!(error, MigrationError::Newer(names) if names == [newer]);
    assert!(is_newer(migrator.check().await.unwrap_err()));
    assert!(is_newer(migrator.up(now()).await.unwrap_err()));
    assert!(is_newer(migrator.last(1).await.unwrap_err()));
    let others = [(newer, "from a newer version"), (SITES.0, "pending")];
    assert_eq!(status(&mut migrator).await, described("applied", &others));
    assert!(!database.tables().await.contains(&"sites".to_owned()));
}

async fn a_foreign_table_is_left_alone(database: &TestDatabase) {
    database.execute("create table sync_events (a text)").await;
    // Another program's table with migrations does not make it the Node service's.
    database.execute("create table migrations (filename text)").await;
    for (name, tables) in [
        ("sync_events", vec!["migrations", "sync_events"]),
        ("devices", vec!["devices", "migrations", "sync_events"]),
    ] {
        let mut migrator = database.migrator(no_folder()).await;
        if name == "devices" {
            database.execute("create table devices (b text)").await;
        }
        let foreign = |error| matches!(error, MigrationError::Foreign(table) if table == name);
        assert!(foreign(migrator.status().await.unwrap_err()));
        assert!(foreign(migrator.check().await.unwrap_err()));
        assert!(foreign(migrator.up(now()).await.unwrap_err()));
        assert!(foreign(migrator.last(1).await.unwrap_err()));
        assert_eq!(database.tables().await, tables);
    }
}

async fn files_that_are_no_migrations_are_refused(database: &TestDatabase) {
    for (file, says) in [
        ("2025-01-01-01-sites.up.sql", "2025-01-01-01-sites.down.sql is missing"),
        ("2025-01-01-01-sites.down.sql", "2025-01-01-01-sites.up.sql is missing"),
        ("sites.up.sql", "YYYY-MM-DD-NN-name.up.sql"),
        ("2025-01-01-01-sites.sql", "YYYY-MM-DD-NN-name.up.sql"),
    ] {
        let folder = folder(&[RACKS]);
        std::fs::write(folder.path().join(file), "").unwrap();
        let Err(error) = Migrator::new(&database.target, folder.path()).await else {
            panic!("{file} was taken");
        };
        assert!(matches!(&error, MigrationError::BadFile(_)), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }
    // It would never run: the name is taken.
    let folder = folder(&[(EMBEDDED[0], SITES.1, SITES.2)]);
    let Err(error) = Migrator::new(&database.target, folder.path()).await else {
        panic!("a name of the program's own was taken");
    };
    assert!(error.to_string().contains(EMBEDDED[0]), "{error}");
}

async fn a_new_pair_of_files_runs(database: &TestDatabase) {
    let parent = TempDir::new().unwrap();
    let folder = parent.path().join("migrations");
    for (number, name) in [("01", "add-site"), ("02", "Add-Rack-2")] {
        let paths = create_pair(&folder, name, now()).unwrap();
        let expected = folder.join(format!("2026-11-22-{number}-{name}.up.sql"));
        assert_eq!(paths[0], expected);
    }
    for name in ["", "two words", "../up", "ä", "a.b"] {
        let error = create_pair(&folder, name, now()).unwrap_err();
        assert!(matches!(error, MigrationError::BadName(_)), "{error:?}");
    }
    // Also as they are, before anything is filled in.
    let mut migrator = database.migrator(&folder).await;
    assert_eq!(migrator.up(now()).await.unwrap().len(), EMBEDDED.len() + 2);
    let last = migrator.last(2).await.unwrap();
    assert_eq!(last[0].losses().collect::<Vec<_>>(), ["nothing"]);
    assert_eq!(
        migrator.down(&last).await.unwrap(),
        ["2026-11-22-02-Add-Rack-2", "2026-11-22-01-add-site"]
    );
}

/// What is being made must not be taken for somebody else's.
async fn asking_while_another_server_migrates(database: &TestDatabase) {
    let mut asking = database.migrator(no_folder()).await;
    let mut migrating = database.migrator(no_folder()).await;
    let up = tokio::spawn(async move { migrating.up(now()).await.unwrap() });
    while !up.is_finished() {
        let pending = asking.check().await.unwrap();
        let pending: Vec<_> = pending.iter().map(String::as_str).collect();
        assert!(EMBEDDED.ends_with(&pending), "{pending:?}");
    }
    assert_eq!(up.await.unwrap(), EMBEDDED);
    assert_eq!(asking.check().await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn asking_after_a_missing_file_does_not_make_it() {
    let database = TestDatabase::sqlite();
    let mut migrator = database.migrator(no_folder()).await;
    assert_eq!(status(&mut migrator).await, described("pending", &[]));
    assert_eq!(migrator.check().await.unwrap(), EMBEDDED);
    assert_eq!(names(&migrator.last(1).await.unwrap()), [""; 0]);
    let file = database.file().unwrap();
    assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 0);
    migrator.up(now()).await.unwrap();
    assert!(file.exists());
}

/// SQLite does not check while tables are rebuilt.
#[tokio::test]
async fn a_migration_that_leaves_rows_dangling_is_undone() {
    let database = TestDatabase::sqlite();
    database.migrate().await;
    let store = store::open(&database.target).await.unwrap();
    write(&mut *store.event_writer(), vec![success("pi", at(0))]).await;
    let folder = folder(&[(SITES.0, "delete from devices", "")]);
    let error = database.migrator(folder.path()).await.up(now()).await.unwrap_err();
    assert!(matches!(&error, MigrationError::Run { name, .. } if name == SITES.0), "{error:?}");
    assert!(error.to_string().contains("would refer to nothing"), "{error}");
    assert!(store.device(&device_id("pi")).await.unwrap().is_some());
}

/// Several servers start on one new database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_servers_migrate_at_once() {
    for _ in 0..4 {
        let database = TestDatabase::postgres().await;
        let folder = folder(&[SITES, RACKS]);
        let mut servers = JoinSet::new();
        for _ in 0..4 {
            let mut migrator = database.migrator(folder.path()).await;
            servers.spawn(async move { migrator.up(now()).await.unwrap() });
        }
        let mut applied = servers.join_all().await.concat();
        applied.sort();
        let expected = [&[SITES.0, RACKS.0], EMBEDDED].concat();
        assert_eq!(applied, expected, "each exactly once");
        let mut migrator = database.migrator(folder.path()).await;
        // Whoever applied which, they ran in this order.
        let others = [(SITES.0, "applied"), (RACKS.0, "applied")];
        assert_eq!(status(&mut migrator).await, described("applied", &others));
        drop(migrator);
        database.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_services_database_is_left_alone() {
    let database = TestDatabase::postgres().await;
    database.execute(&[SCHEMA, FEW_EVENTS].concat()).await;
    let before = describe(&database).await;
    assert!(before.contains("2025-06-17 10:30:00"), "{before}");

    let folder = folder(&[SITES]);
    let mut migrator = database.migrator(folder.path()).await;
    let is_node = |error| matches!(error, MigrationError::NodeService);
    assert!(is_node(migrator.status().await.unwrap_err()));
    assert!(is_node(migrator.check().await.unwrap_err()));
    assert!(is_node(migrator.up(now()).await.unwrap_err()));
    assert!(is_node(migrator.last(1).await.unwrap_err()));
    assert!(is_node(migrator.last_batch().await.unwrap_err()));
    assert_eq!(describe(&database).await, before);
    drop(migrator);
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_postgres_database_is_created_once() {
    let database = TestDatabase::postgres().await;
    let Target::Postgres(target) = &database.target else { unreachable!() };
    assert!(!store::create_database(&database.target).await.unwrap());
    // A name that must be quoted.
    let mut missing = target.clone();
    missing.config.dbname("Some \"odd\" name's");
    let missing = Target::Postgres(missing);
    assert!(Migrator::new(&missing, no_folder()).await.is_err());
    assert!(store::create_database(&missing).await.unwrap());
    assert!(!store::create_database(&missing).await.unwrap());
    Migrator::new(&missing, no_folder()).await.unwrap().up(now()).await.unwrap();
    database.remove().await;
}
