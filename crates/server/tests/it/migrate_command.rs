//! `pisync migrate` and `pisync db`: what they say of migrations, and what a server does with pending ones.

use pisync::store::migrations::EMBEDDED;

use crate::support::{
    http::event,
    node_service::{FEW_EVENTS, SCHEMA, describe, node_settings},
    postgres::PostgresServer,
    program::{Installed, Program, url},
    store::TestDatabase,
};

both_stores!(
    migrations_are_applied_and_rolled_back,
    a_rollback_takes_what_the_last_up_applied,
    database_setup,
    pending_migrations_at_the_start,
);

/// What `migrate status` says of each migration, by name.
pub(crate) fn status(program: &Program) -> Vec<(String, String)> {
    let ended = program.run(&["migrate", "status"]);
    let mut lines = ended.success().lines();
    assert!(lines.next().unwrap().contains("SQL"), "names the database first: {ended:?}");
    lines
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            ((*words.last().unwrap()).to_owned(), words[0].to_owned())
        })
        .collect()
}

fn pair(name: &str, state: &str) -> (String, String) {
    (name.to_owned(), state.to_owned())
}

/// All of the program's own migrations in this state.
pub(crate) fn embedded(state: &str) -> Vec<(String, String)> {
    EMBEDDED.iter().map(|name| pair(name, state)).collect()
}

/// What is said when all of the program's own migrations are applied.
fn all_applied() -> String {
    EMBEDDED.iter().map(|name| format!("applied   {name}\n")).collect()
}

async fn migrations_are_applied_and_rolled_back(installed: &Installed) {
    let Installed { program, database } = installed;
    if installed.is_postgres() {
        assert_eq!(status(program), embedded("pending"));
    }
    let up = program.run(&["migrate", "up"]);
    assert_eq!(up.success(), all_applied());
    assert_eq!(status(program), embedded("applied"));
    let again = program.run(&["migrate", "up"]);
    assert_eq!(again.success(), "nothing to do: every migration is applied\n");

    let [
        first,
        second,
        third,
        fourth,
        others @ ..,
        deletions,
        _,
        _,
        _,
        groups,
        health,
        states,
        notifications,
        newest,
    ] = EMBEDDED
    else {
        panic!("there are fewer migrations: {EMBEDDED:?}")
    };
    // What is derived from other tables is no loss. Who is told: nobody.
    program.run(&["migrate", "down"]).success();
    assert!(status(program).contains(&pair(newest, "pending")));
    program.run(&["migrate", "down", "--yes"]).success();
    assert!(status(program).contains(&pair(notifications, "pending")));
    program.run(&["migrate", "down"]).success();
    assert!(status(program).contains(&pair(states, "pending")));
    // What people have set, and in which groups devices were: nothing, and in none.
    for lossy in [health, groups] {
        program.run(&["migrate", "down", "--yes"]).success();
        assert!(status(program).contains(&pair(lossy, "pending")));
    }
    program.run(&["migrate", "down", "3"]).success();
    // Which devices are being deleted: none.
    program.run(&["migrate", "down", "--yes"]).success();
    assert!(status(program).contains(&pair(deletions, "pending")));
    // They lose nothing.
    let down = program.run(&["migrate", "down", &others.len().to_string()]);
    let lines = others.iter().rev().map(|name| format!("rolled back {name}\n"));
    assert_eq!(down.success(), lines.collect::<String>());
    let tables = database.tables().await;
    assert!(tables.contains(&"sync_events".to_owned()));
    for arguments in
        [&["migrate", "down"][..], &["migrate", "down", "99"], &["migrate", "rollback"]]
    {
        let refused = program.run(arguments);
        assert_eq!(refused.code(), 1);
        let expected = format!("  {fourth}: which files were imported, and how far\n");
        assert!(refused.stderr.contains(&expected), "{refused:?}");
        for expected in [
            format!("  {third}: every API key and the audit log\n"),
            format!("  {second}: figures by day and hour of events"),
            format!("  {first}: every device and every sync event\n"),
        ] {
            let all = arguments != ["migrate", "down"];
            assert_eq!(refused.stderr.contains(&expected), all, "{refused:?}");
        }
        assert!(refused.stderr.ends_with("nothing was done; go on with --yes\n"), "{refused:?}");
        assert_eq!(database.tables().await, tables);
    }
    let down = program.run(&["migrate", "down", "--yes"]);
    assert_eq!(down.success(), format!("rolled back {fourth}\n"));
    let down = program.run(&["migrate", "down", "99", "--yes"]);
    assert_eq!(
        down.success(),
        format!("rolled back {third}\nrolled back {second}\nrolled back {first}\n")
    );
    assert!(!database.tables().await.contains(&"sync_events".to_owned()));
    assert_eq!(status(program), embedded("pending"));
    let nothing = program.run(&["migrate", "down"]);
    assert_eq!(nothing.success(), "nothing to do: no migration is applied\n");
    program.run(&["migrate", "up"]).success();
}

async fn a_rollback_takes_what_the_last_up_applied(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["migrate", "up"]).success();
    for name in ["add-sites", "add-rooms"] {
        let ended = program.run(&["migrate", "new", name]);
        let files: Vec<_> = ended.success().lines().collect();
        assert_eq!(files.len(), 2, "{ended:?}");
        assert!(files[0].ends_with(&format!("-{name}.up.sql")), "{ended:?}");
        assert!(files[1].ends_with(&format!("-{name}.down.sql")), "{ended:?}");
        let table = name.trim_start_matches("add-");
        std::fs::write(program.path(files[0]), format!("create table {table} (id integer)"))
            .unwrap();
        std::fs::write(program.path(files[1]), format!("drop table {table}")).unwrap();
    }
    let names: Vec<_> =
        status(program).into_iter().skip(EMBEDDED.len()).map(|(name, _)| name).collect();
    assert_eq!(names.len(), 2);
    assert!(
        names[0].ends_with("-01-add-sites") && names[1].ends_with("-02-add-rooms"),
        "{names:?}"
    );

    let up = program.run(&["migrate", "up"]);
    assert_eq!(up.success(), format!("applied   {}\napplied   {}\n", names[0], names[1]));
    assert!(database.tables().await.contains(&"sites".to_owned()));
    // Their files say nothing of losses.
    let rollback = program.run(&["migrate", "rollback"]);
    assert_eq!(rollback.success(), format!("rolled back {}\nrolled back {}\n", names[1], names[0]));
    let mut expected = embedded("applied");
    expected.extend(names.iter().map(|name| pair(name, "pending")));
    assert_eq!(status(program), expected);
    assert!(!database.tables().await.contains(&"sites".to_owned()));

    for bad in ["", "two words", "../up", "größe"] {
        let failure = program.run(&["migrate", "new", bad]);
        assert!(failure.wrong_usage().contains("is no name for a migration"), "{failure:?}");
    }
    assert_eq!(program.names_in("migrations").len(), 4);
    // A statement that is wrong is told with the name of its migration, and leaves nothing behind.
    let broken = format!("{}.up.sql", names[1]);
    std::fs::write(program.path("migrations").join(broken), "create table rooms (id nonsense(")
        .unwrap();
    let failure = program.run(&["migrate", "up"]);
    let problem = format!("migration {} failed and was undone: ", names[1]);
    assert!(failure.failure().starts_with(&problem), "{failure:?}");
    assert!(!database.tables().await.contains(&"rooms".to_owned()));
}

async fn database_setup(installed: &Installed) {
    let Installed { program, database } = installed;
    let ready = format!("{} is ready\n", database.target);
    let first = program.run(&["db", "setup"]);
    assert_eq!(first.success(), format!("{}{ready}", all_applied()));
    let second = program.run(&["db", "setup"]);
    assert_eq!(second.success(), ready);
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.stop();
}

async fn pending_migrations_at_the_start(installed: &Installed) {
    let Installed { program, database } = installed;
    if installed.is_postgres() {
        let refused = program.run(&["serve", "--auto-migrate", "false"]);
        let expected =
            format!("pending migrations: {}; run `pisync migrate up`", EMBEDDED.join(", "));
        assert!(refused.failure().starts_with(&expected), "{refused:?}");
        assert!(database.tables().await.is_empty());
        program.run(&["migrate", "up"]).success();
    }
    let serving = program.serve(&["--auto-migrate", "false"]);
    serving.client.store(&event("pi")).await;
    serving.stop();
    // A pending migration of the user's own.
    let program = Program::new()
        .with("DATABASE_URL", url(&database.target))
        .with("AUTO_MIGRATE", false)
        .with("PORT", 0);
    program.run(&["migrate", "new", "add-sites"]).success();
    if installed.is_postgres() {
        let refused = program.run(&[]);
        assert!(refused.failure().contains("-01-add-sites;"), "{refused:?}");
    }
    let serving = program.serve(&["--auto-migrate", "true"]);
    serving.client.get("/health/ready").await.json(200);
    serving.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn setup_creates_a_missing_database() {
    let name = "made_by_setup";
    let server = PostgresServer::shared();
    let port = server.config(name).get_ports()[0];
    let database = format!("PostgreSQL 127.0.0.1:{port}/{name}");
    let program = Program::new()
        .with("DB_HOST", "127.0.0.1")
        .with("DB_PORT", port)
        .with("DB_NAME", name)
        .with("DB_USER", "pisync")
        .with("PORT", 0);
    // A server does not make a database: the name may be a typo.
    let refused = program.run(&[]);
    assert!(refused.failure().contains("\"made_by_setup\" does not exist"), "{refused:?}");
    assert!(refused.failure().contains("pisync db setup"), "{refused:?}");
    let setup = program.run(&["db", "setup"]);
    let expected = format!("created {database}\n{}{database} is ready\n", all_applied());
    assert_eq!(setup.success(), expected);
    let again = program.run(&["db", "setup"]);
    assert_eq!(again.success(), format!("{database} is ready\n"));
    program.serve(&[]).stop();
    server.drop_database(name).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_leaves_a_node_services_database_alone() {
    let database = TestDatabase::postgres().await;
    database.execute(&[SCHEMA, FEW_EVENTS].concat()).await;
    let (tables, before) = (database.tables().await, describe(&database).await);
    let program = Program::new().with_file(".env", &node_settings(&database.target));
    for arguments in
        [&[][..], &["db", "setup"], &["migrate", "status"], &["migrate", "down", "--yes"]]
    {
        let refused = program.run(arguments);
        let expected = "this database was made by the Node PiSync and is left untouched: take it over with `pisync migrate up`";
        assert!(refused.failure().starts_with(expected), "{arguments:?}: {refused:?}");
    }
    assert_eq!((database.tables().await, describe(&database).await), (tables, before));
    database.remove().await;
}
