//! The program as its users meet it: commands, settings, exit codes, the log, and how it starts and
//! stops.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

use pisync::store::{Target, migrations::EMBEDDED};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{
    events::at,
    http::{column, event, failure, send, success, try_send, with},
    node_service::{FEW_EVENTS, SCHEMA, describe},
    postgres::PostgresServer,
    program::{Installed, Program, url},
    server::unused_address,
    store::TestDatabase,
};

both_stores!(
    migrations_forth_and_back,
    a_rollback_takes_back_what_the_last_up_applied,
    database_setup,
    pending_migrations_at_the_start,
    what_was_acknowledged_before_the_signal_is_stored,
    the_log_tells_what_matters,
    debug_tells_of_every_event,
    an_inner_error_is_in_the_log_alone,
);

/// What `migrate status` says of each migration, by name.
fn status(program: &Program) -> Vec<(String, String)> {
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
fn embedded(state: &str) -> Vec<(String, String)> {
    EMBEDDED.iter().map(|name| pair(name, state)).collect()
}

/// What is said when all of the program's own migrations are applied.
fn all_applied() -> String {
    EMBEDDED.iter().map(|name| format!("applied   {name}\n")).collect()
}

async fn migrations_forth_and_back(installed: &Installed) {
    let Installed { program, database } = installed;
    if installed.is_postgres() {
        assert_eq!(status(program), embedded("pending"));
    }
    let up = program.run(&["migrate", "up"]);
    assert_eq!(up.success(), all_applied());
    assert_eq!(status(program), embedded("applied"));
    let again = program.run(&["migrate", "up"]);
    assert_eq!(again.success(), "nothing to do: every migration is applied\n");

    let [first, second, third, fourth, others @ .., deletions, _, newest] = EMBEDDED else {
        panic!("there are fewer migrations: {EMBEDDED:?}")
    };
    program.run(&["migrate", "down"]).success();
    assert_eq!(status(program).last(), Some(&pair(newest, "pending")));
    program.run(&["migrate", "down"]).success();
    // Which devices are being deleted: none.
    program.run(&["migrate", "down", "--yes"]).success();
    assert!(status(program).contains(&pair(deletions, "pending")));
    // They lose nothing.
    let down = program.run(&["migrate", "down", &others.len().to_string()]);
    let lines = others.iter().rev().map(|name| format!("taken back {name}\n"));
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
    assert_eq!(down.success(), format!("taken back {fourth}\n"));
    let down = program.run(&["migrate", "down", "99", "--yes"]);
    assert_eq!(
        down.success(),
        format!("taken back {third}\ntaken back {second}\ntaken back {first}\n")
    );
    assert!(!database.tables().await.contains(&"sync_events".to_owned()));
    assert_eq!(status(program), embedded("pending"));
    let nothing = program.run(&["migrate", "down"]);
    assert_eq!(nothing.success(), "nothing to do: no migration is applied\n");
    program.run(&["migrate", "up"]).success();
}

async fn a_rollback_takes_back_what_the_last_up_applied(installed: &Installed) {
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
    assert_eq!(rollback.success(), format!("taken back {}\ntaken back {}\n", names[1], names[0]));
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

async fn what_was_acknowledged_before_the_signal_is_stored(installed: &Installed) {
    for signal in ["TERM", "INT"] {
        let serving = installed.program.serve(&[]);
        let mut reporters = JoinSet::new();
        let (acknowledged, mut counted) = tokio::sync::mpsc::unbounded_channel();
        for _ in 0..8 {
            let (client, acknowledged) = (serving.client.clone(), acknowledged.clone());
            reporters.spawn(async move {
                loop {
                    let request = client.request(Method::POST, "/api/sync-event");
                    let Ok(answer) = try_send(request.json(&event(signal))).await else { return };
                    if answer.status != 201 {
                        answer.error(503);
                        return;
                    }
                    acknowledged.send(answer.data(201)["id"].as_i64().unwrap()).unwrap();
                }
            });
        }
        drop(acknowledged);
        let (mut ids, mut signalled) = (BTreeSet::new(), Instant::now());
        while let Some(id) = counted.recv().await {
            assert!(ids.insert(id));
            if ids.len() == 40 {
                signalled = Instant::now();
                serving.signal(signal);
            }
        }
        reporters.join_all().await;
        let ended = serving.wait();
        // After that a supervisor would kill it.
        assert!(signalled.elapsed() < Duration::from_secs(30));
        assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{ended:?}");
        assert!(ended.stdout.contains("stopped; everything that was accepted is stored"));

        let serving = installed.program.serve(&[]);
        let path = format!("/api/device/{signal}/sync-history?limit=1000");
        let history = serving.client.get(&path).await.data(200)["sync_history"].take();
        let stored: BTreeSet<_> =
            column(&history, "id").iter().map(|id| id.as_i64().unwrap()).collect();
        assert!(ids.len() >= 40 && ids.is_subset(&stored));
        serving.stop();
        installed.program.run(&["verify"]).success();
    }
}

/// The lines of a log with this message.
pub(crate) fn lines<'a>(log: &'a [Value], message: &str) -> Vec<&'a Value> {
    log.iter().filter(|line| line["message"] == message).collect()
}

/// Has a server see the usual things, and gives its combined log.
async fn usual_day(program: &Program) -> Vec<Value> {
    let serving = program.serve(&[]);
    let client = &serving.client;
    client.store(&success("pi-1", at(-10_000_000))).await;
    for second in [5, 4, 3, 2] {
        client.store(&failure("pi-2", at(-10_000_000 - second))).await;
    }
    let request = client.request(Method::POST, "/api/sync-event").json(&json!({}));
    send(request.header("x-request-id", "refused-1")).await.details();
    let request = client.request(Method::GET, "/api/device/nobody");
    send(request.header("x-request-id", "refused-2")).await.error(404);
    serving.stop();
    assert_eq!(program.names_in("logs"), ["combined.log", "error.log"]);
    let log = program.log("combined.log");
    for line in &log {
        let timestamp = line["timestamp"].as_str().unwrap();
        assert!(timestamp.starts_with("20") && timestamp.ends_with('Z'), "{line}");
        let level = line["level"].as_str().unwrap();
        assert!(["ERROR", "WARN", "INFO", "DEBUG"].contains(&level), "{line}");
        assert!(line["message"].is_string(), "{line}");
    }
    log
}

async fn the_log_tells_what_matters(installed: &Installed) {
    let log = usual_day(&installed.program).await;
    let devices: Vec<_> = lines(&log, "new device").iter().map(|line| &line["device_id"]).collect();
    assert_eq!(devices, ["pi-1", "pi-2"]);
    // Once, when the third failure comes; not again with the fourth, with which it may be learnt.
    let failing = lines(&log, "a device keeps failing");
    assert_eq!(failing.len(), 1, "{log:?}");
    let expected = json!({"level": "WARN", "device_id": "pi-2"});
    assert_eq!(&with(failing[0].clone(), &expected), failing[0]);
    assert!([3, 4].contains(&failing[0]["consecutive_failures"].as_i64().unwrap()), "{failing:?}");
    let refused = lines(&log, "request refused");
    for (line, expected) in refused.iter().zip([
        json!({
            "level": "INFO", "method": "POST", "path": "/api/sync-event", "status": 400,
            "request_id": "refused-1", "client": "127.0.0.1",
        }),
        json!({
            "level": "INFO", "method": "GET", "path": "/api/device/nobody", "status": 404,
            "request_id": "refused-2",
        }),
    ]) {
        assert_eq!(&with((*line).clone(), &expected), *line);
    }
    assert_eq!(refused.len(), 2, "{log:?}");
    // A line for each event would be most of the log.
    assert!(lines(&log, "sync event stored").is_empty());
    assert!(lines(&log, "request answered").is_empty());
    assert!(installed.program.log("error.log").is_empty());
}

async fn debug_tells_of_every_event(installed: &Installed) {
    let program = Program::new()
        .with("DATABASE_URL", url(&installed.database.target))
        .with("PORT", 0)
        .with("LOG_LEVEL", "debug");
    let log = usual_day(&program).await;
    let stored: Vec<_> =
        lines(&log, "sync event stored").iter().map(|line| &line["device_id"]).collect();
    assert_eq!(stored, ["pi-1", "pi-2", "pi-2", "pi-2", "pi-2"]);
    let answered = lines(&log, "request answered");
    assert_eq!(answered.iter().filter(|line| line["status"] == 201).count(), 5);
}

async fn an_inner_error_is_in_the_log_alone(installed: &Installed) {
    let serving = installed.program.serve(&[]);
    installed.database.execute("alter table device_jobs rename to elsewhere").await;
    let request = serving.client.request(Method::GET, "/api/stats");
    let answer = send(request.header("x-request-id", "unlucky")).await;
    assert_eq!(answer.error(500), "Internal server error");
    assert!(!format!("{answer:?}").contains("device_jobs"));
    serving.stop();
    for name in ["combined.log", "error.log"] {
        let log = installed.program.log(name);
        let failed = lines(&log, "request failed");
        assert_eq!(failed.len(), 1, "{log:?}");
        let expected = json!({"level": "ERROR", "status": 500, "request_id": "unlucky"});
        assert_eq!(&with(failed[0].clone(), &expected), failed[0]);
        assert!(failed[0]["error"].as_str().unwrap().contains("device_jobs"), "{log:?}");
    }
    assert_eq!(installed.program.log("error.log").len(), 1);
}

/// Every variable that a server reads, but for the Node service's names and those without effect yet.
pub(crate) const VARIABLES: [&str; 26] = [
    "AUTH",
    "RATE_LIMIT_KEY_PER_MINUTE",
    "MAX_CONNECTIONS",
    "MAX_CONCURRENT_REQUESTS",
    "TLS_CERT",
    "TLS_KEY",
    "PORT",
    "HOST",
    "APP_ENV",
    "LOG_LEVEL",
    "LOG_DIR",
    "DATABASE_URL",
    "DB_HOST",
    "DB_PORT",
    "DB_NAME",
    "DB_USER",
    "DB_PASSWORD",
    "DATA_DIR",
    "RATE_LIMIT_SYNC_PER_MINUTE",
    "RATE_LIMIT_API_PER_MINUTE",
    "TRUSTED_PROXIES",
    "CORS_ORIGINS",
    "MAX_CLOCK_SKEW_SECONDS",
    "EVENT_ID_RETENTION_DAYS",
    "MIGRATIONS_DIR",
    "AUTO_MIGRATE",
];

#[test]
fn help() {
    let program = VARIABLES
        .iter()
        .fold(Program::new(), |program, name| program.with(name, "postgres://u:s3cret-word@h"));
    let general = program.run(&["--help"]);
    for text in ["serve", "migrate", "db", "openapi", ".env", "Examples:", "Exit status:"] {
        assert!(general.success().contains(text), "{text}: {general:?}");
    }
    let serve = program.run(&["serve", "--help"]);
    for name in VARIABLES {
        assert!(serve.success().contains(&format!("[env: {name}]")), "{name}: {serve:?}");
    }
    assert!(!serve.stdout.contains("s3cret-word"));
    assert!(!general.stdout.contains("s3cret-word"));
    for command in [
        &["migrate", "--help"][..],
        &["db", "setup", "--help"],
        &["import", "--help"],
        &["export", "--help"],
    ] {
        let help = program.run(command);
        assert!(help.success().contains("[env: DATABASE_URL]"), "{help:?}");
    }
    let copy =
        Program::new().with("COPY_TO", "postgres://pi:s3cret-word@db").run(&["copy", "--help"]);
    assert!(copy.success().contains("[env: COPY_TO]"), "{copy:?}");
    assert!(!copy.stdout.contains("s3cret-word"));
    let version = program.run(&["--version"]);
    assert_eq!(version.success(), format!("pisync {}\n", env!("CARGO_PKG_VERSION")));
    let document = Program::new().run(&["openapi"]);
    assert_eq!(document.success(), pisync::api::openapi_json().unwrap());
    assert!(program.names_in(".").is_empty(), "asking for help leaves nothing behind");
}

#[test]
fn wrong_usage_ends_with_2() {
    for (arguments, expected) in [
        (&["--nonsense"][..], "unexpected argument '--nonsense'"),
        (&["nonsense"], "unrecognized subcommand 'nonsense'"),
        (&["migrate"], "Usage: pisync migrate"),
        (&["migrate", "down", "x"], "invalid value 'x'"),
        (&["serve", "--port", "65536"], "invalid value '65536' for '--port <PORT>'"),
        (&["serve", "--log-level", "loud"], "expected error, warn, info, debug or trace"),
        (&["serve", "--app-env", "test"], "development, production"),
        (&["serve", "--max-clock-skew-seconds", "86401"], "invalid value '86401'"),
        (&["serve", "--auto-migrate", "maybe"], "invalid value 'maybe'"),
    ] {
        let program = Program::new();
        let ended = program.run(arguments);
        assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
        assert!(ended.stderr.contains(expected), "{ended:?}");
        assert!(program.names_in(".").is_empty());
    }
    let ended = Program::new().with("PORT", "http").run(&[]);
    assert_eq!(ended.code(), 2);
    assert!(ended.stderr.contains("invalid value 'http' for '--port <PORT>'"), "{ended:?}");
}

#[test]
fn wrong_settings_are_told_in_one_line() {
    for (name, value, expected) in [
        ("CORS_ORIGINS", "*", "CORS_ORIGINS: \"*\" is no origin such as https://fleet.example"),
        ("TRUSTED_PROXIES", "10.0.0.0/8,proxy", "TRUSTED_PROXIES: \"proxy\" is neither an address"),
        (
            "DATABASE_URL",
            "mysql://localhost",
            "DATABASE_URL must begin with postgres:// or sqlite:",
        ),
        ("DATABASE_URL", "sqlite:", "DATABASE_URL: sqlite: needs a path"),
        ("DB_PORT", "five", "DB_PORT: \"five\" is no port"),
        ("AUTH", "maybe", "AUTH=maybe: expected auto, off or required"),
        ("HOST", "no such host", "HOST is neither an address nor the name of a host"),
    ] {
        let program = Program::new().with("PORT", 0).with(name, value);
        let ended = program.run(&[]);
        assert!(ended.wrong_usage().starts_with(expected), "{name}={value}: {ended:?}");
    }
    // What makes sense, and cannot be had.
    for (name, value, expected) in [
        ("HOST", "nowhere.invalid", "cannot listen on nowhere.invalid:0: "),
        ("LOG_DIR", "file/logs", "cannot write file/logs/combined.log: "),
        ("DATA_DIR", "file/data", "cannot create file/data: "),
    ] {
        let program = Program::new().with_file("file", "").with("PORT", 0).with(name, value);
        let ended = program.run(&[]);
        assert!(ended.failure().starts_with(expected), "{name}={value}: {ended:?}");
    }
}

#[test]
fn without_a_folder_for_logs() {
    let program = Program::new().with("PORT", 0).with("LOG_DIR", "none");
    let ended = program.serve(&[]).stop();
    assert!(ended.stdout.contains("stopped; everything that was accepted is stored"));
    assert_eq!(program.names_in("."), ["data"]);
}

#[test]
fn production_logs_json_to_the_console() {
    for name in ["NODE_ENV", "APP_ENV"] {
        let program = Program::new().with("PORT", 0).with(name, "production");
        let ended = program.serve(&[]).stop();
        let console: Vec<Value> =
            ended.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        // Each takes the time for itself.
        let timeless = |line: &Value| with(line.clone(), &json!({"timestamp": null}));
        let file: Vec<_> = program.log("combined.log").iter().map(timeless).collect();
        assert_eq!(console.iter().map(timeless).collect::<Vec<_>>(), file);
        assert!(console.len() >= 3);
    }
}

#[test]
fn two_servers_cannot_share_a_sqlite_file() {
    let program = Program::new().with("PORT", 0);
    let first = program.serve(&[]);
    for arguments in [&["serve"][..], &["migrate", "down", "--yes"], &["migrate", "rollback"]] {
        let refused = program.run(arguments);
        let expected = "data/pisync.db is in use by a running PiSync server; stop that one first";
        assert!(refused.failure().starts_with(expected), "{arguments:?}: {refused:?}");
    }
    // Looking does no harm.
    assert_eq!(status(&program), embedded("applied"));
    first.stop();
    program.serve(&[]).stop();
    // Nor does a server that was killed leave the file locked.
    let killed = program.serve(&[]);
    killed.signal("KILL");
    assert_eq!(killed.wait().status.code(), None);
    program.serve(&[]).stop();
}

#[test]
fn a_port_in_use() {
    // Its folder goes with it, and a server whose files are gone does not end well.
    let program = Program::new().with("PORT", 0);
    let first = program.serve(&[]);
    let address = first.address();
    let second = Program::new().with("PORT", address.port());
    let refused = second.run(&[]);
    let expected = format!("cannot listen on {address}: Address already in use");
    assert!(refused.failure().starts_with(&expected), "{refused:?}");
    assert!(refused.stderr.contains("set HOST and PORT to others"), "{refused:?}");
    assert!(!second.path("data").exists());
    first.stop();
}

/// The settings of a Node service, in a file as its users have it.
pub(crate) fn node_settings(target: &Target) -> String {
    let Target::Postgres(target) = target else { panic!("the Node service had PostgreSQL only") };
    let config = &target.config;
    format!(
        "# Server\nPORT={}\nNODE_ENV=development\n\n# Database\nDB_HOST=localhost\nDB_PORT={}\n\
         DB_NAME={}\nDB_USER={}\nDB_PASSWORD=s3cret-word\n\nLOG_LEVEL=http\n",
        unused_address().port(),
        config.get_ports()[0],
        config.get_dbname().unwrap(),
        config.get_user().unwrap(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_services_settings_are_understood() {
    let database = TestDatabase::postgres().await;
    let settings = node_settings(&database.target);
    let program = Program::new().with_file(".env", &settings);
    let serving = program.serve(&[]);
    assert!(settings.contains(&format!("PORT={}\n", serving.address().port())));
    serving.client.store(&event("pi")).await;
    assert!(database.tables().await.contains(&"sync_events".to_owned()));
    let ended = serving.stop();
    let log = program.log("combined.log");
    // The tests' shared server does without fsync, which is warned of.
    let is_ours = |line: &&Value| line["target"] != "pisync::store::postgres::durability";
    assert!(log.iter().filter(is_ours).all(|line| line["level"] == "INFO"), "{log:?}");
    assert!(!format!("{ended:?}{log:?}").contains("s3cret-word"));
    assert_eq!(program.names_in("."), [".env", "logs"]);
    database.remove().await;
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

/// Everything that is left in a folder, as text.
fn all_text(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        text += &if path.is_dir() {
            all_text(&path)
        } else {
            String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned()
        };
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_appear_nowhere() {
    let closed = unused_address();
    let open = PostgresServer::shared().config("postgres").get_ports()[0];
    let secret = "s3cret-word";
    for (name, value) in [
        ("DATABASE_URL", format!("postgres://pisync:{secret}@{closed}/pisync")),
        ("DATABASE_URL", format!("postgres://pisync:{secret}@{closed}/pisync?sslmode=require")),
        ("DATABASE_URL", format!("postgres://nobody:{secret}@127.0.0.1:{open}/missing")),
        ("DATABASE_URL", format!("postgres://pisync:{secret}@127.0.0.1:{open}/x?sslmode=require")),
        ("DATABASE_URL", format!("postgres://pisync:{secret}@127.0.0.1:port/pisync")),
        ("DATABASE_URL", format!("postgres://pisync:50%{secret}@{closed}/pisync")),
        ("DATABASE_URL", format!("postgres://pisync:a/{secret}@{closed}/pisync")),
        ("DATABASE_URL", format!("postgres://pisync:a?{secret}@{closed}/pisync")),
        ("DATABASE_URL", format!("postgres://pisync:a?sslmode={secret}@{closed}/pisync")),
        ("DATABASE_URL", format!("postgres://pisync:a@{closed}/pisync?password={secret}&x=1")),
        ("DATABASE_URL", format!("mysql://pisync:{secret}@{closed}/pisync")),
        ("DB_PASSWORD", secret.to_owned()),
    ] {
        let program = Program::new().with(name, &value).with("LOG_LEVEL", "trace").with("PORT", 0);
        let program = program.with("DB_HOST", "127.0.0.1").with("DB_PORT", closed.port());
        for arguments in [&["serve"][..], &["db", "setup"], &["migrate", "status"]] {
            let ended = program.run(arguments);
            assert!([1, 2].contains(&ended.code()) && ended.stderr.lines().count() == 1);
            let said = format!("{ended:?}{}", all_text(program.path("").as_path()));
            assert!(!said.contains(secret), "{value} {arguments:?}: {said}");
        }
    }
    // And when all is well.
    let database = TestDatabase::postgres().await;
    let program = Program::new()
        .with(
            "DATABASE_URL",
            url(&database.target).replace("pisync@", &format!("pisync:{secret}@")),
        )
        .with("LOG_LEVEL", "trace")
        .with("PORT", 0);
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    let said = format!("{:?}{}", serving.stop(), all_text(program.path("").as_path()));
    assert!(said.contains("sync event stored") && !said.contains(secret), "{said}");
    database.remove().await;
}
