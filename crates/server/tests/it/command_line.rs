//! The program as its users meet it: wrong usage, settings, starting and stopping, and passwords that nobody sees.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    migrate_command::{embedded, status},
    support::{
        http::{column, event, try_send},
        node_service::node_settings,
        postgres::PostgresServer,
        program::{Installed, Program, url},
        server::unused_address,
        store::TestDatabase,
    },
};

both_stores!(what_was_acknowledged_before_the_signal_is_stored);

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
        ("HOST", "http://127.0.0.1", "HOST is neither an address nor the name of a host"),
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
