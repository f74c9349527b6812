//! What commands have to say beside what was asked for: warnings and errors go to standard error, in short lines.

use std::{fs, os::unix::fs::PermissionsExt};

use crate::support::{http::event, program::Program};

const DATABASE: &str = "data/pisync.db";

/// A program with a database, which others may read.
async fn program() -> Program {
    let program = Program::new().with("PORT", 0);
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.stop();
    fs::set_permissions(program.path(DATABASE), fs::Permissions::from_mode(0o644)).unwrap();
    program
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn warnings_are_seen_and_do_not_disturb_the_output() {
    let program = program().await;
    program.run(&["backup", "copy.db"]).success();
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.signal("KILL");
    serving.wait();
    fs::write(program.path(DATABASE), "no database any more").unwrap();
    // What was acknowledged last is lost with the file, which must not pass in silence.
    let restored = program.run(&["restore", "copy.db", "--force"]);
    assert_eq!(restored.code(), 0, "{restored:?}");
    assert!(restored.stdout.starts_with("restored SQLite "), "{restored:?}");
    let is_log_line = |line: &str| {
        ["pisync: warning: ", "pisync: error: "].iter().any(|start| line.starts_with(start))
    };
    assert!(!restored.stderr.is_empty(), "{restored:?}");
    assert!(restored.stderr.lines().all(is_log_line), "{restored:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_level_is_the_one_that_is_set() {
    let told = "pisync: info: others might open this file (its mode was 0644); now its owner alone may file=";
    let quiet = program().await;
    quiet.run(&["migrate", "down", "--yes"]).success();
    let talkative = program().await.with("LOG_LEVEL", "info");
    let said = talkative.run(&["migrate", "down", "--yes"]);
    assert_eq!(said.code(), 0, "{said:?}");
    assert!(said.stdout.starts_with("rolled back "), "{said:?}");
    assert!(said.stderr.starts_with(told), "{said:?}");
    // A flag goes before the variable, and stands anywhere.
    let flagged = program().await.with("LOG_LEVEL", "error");
    let said = flagged.run(&["migrate", "down", "--yes", "--log-level", "info"]);
    assert!(said.stderr.starts_with(told), "{said:?}");
    let wrong = flagged.run(&["migrate", "status", "--log-level", "loud"]);
    assert_eq!(wrong.code(), 2, "{wrong:?}");
}
