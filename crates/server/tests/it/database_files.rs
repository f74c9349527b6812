//! SQLite's files: whatever path leads to a database, it is one database with one lock and one journal; and a
//! server notices when its files are taken away.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    ingest::{Reporters, assert_unavailable, stored_ids, until, until_ready},
    support::{
        http::{Client, event},
        program::{Program, Serving},
    },
};

const DATABASE: &str = "data/pisync.db";

fn program() -> Program {
    Program::new()
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0)
}

/// Reports this many events in one batch.
async fn report(client: &Client, count: usize) {
    let batch: Vec<_> = std::iter::repeat_n(event("pi"), count).collect();
    let answer = client.post("/api/sync-events", &json!(batch)).await.data(200);
    assert_eq!(answer["accepted"], count);
}

/// How many events a program finds in the database at this path.
fn exported(program: &Program, path: &str) -> usize {
    let url = format!("sqlite:{path}");
    let ended = program.run(&["export", "--format", "ndjson", "--database-url", &url]);
    ended.success().lines().count()
}

/// By every path, a second server is refused, and a command finds what the first has acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_is_one_whatever_path_leads_to_it() {
    let program = program();
    let serving = program.serve(&[]);
    symlink("data", program.path("folder")).unwrap();
    fs::create_dir(program.path("elsewhere")).unwrap();
    symlink("../data/pisync.db", program.path("elsewhere/link.db")).unwrap();
    symlink("link.db", program.path("elsewhere/chain.db")).unwrap();
    let paths = ["folder/pisync.db", "elsewhere/link.db", "elsewhere/chain.db"];
    let mut stored = 0;
    for path in paths {
        let second = program.run(&["serve", "--database-url", &format!("sqlite:{path}")]);
        let expected = format!("{path} is in use by a running PiSync server");
        assert!(second.failure().starts_with(&expected), "{second:?}");
        report(&serving.client, 20).await;
        stored += 20;
        assert_eq!(exported(&program, path), stored, "{path}");
    }
    // There is no lock that could be deleted, and nothing stands beside a link.
    let names = program.names_in("data");
    assert!(!names.iter().any(|name| name.ends_with(".lock")), "{names:?}");
    assert_eq!(program.names_in("elsewhere"), ["chain.db", "link.db"]);

    report(&serving.client, 20).await;
    serving.signal("KILL");
    serving.wait();
    // What is in the journal alone is found by another path too.
    let serving = program.serve(&["--database-url", "sqlite:elsewhere/chain.db"]);
    let stats = serving.client.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], stored + 20);
    let second = program.run(&["serve"]);
    assert!(second.failure().starts_with("data/pisync.db is in use by"), "{second:?}");
    let second = program.run(&["migrate", "down", "--yes"]);
    assert!(second.failure().starts_with("data/pisync.db is in use by"), "{second:?}");
    serving.stop();
    assert_eq!(program.names_in("elsewhere"), ["chain.db", "link.db"]);
    assert_eq!(exported(&program, DATABASE), stored + 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restoring_through_a_link_leaves_the_link() {
    let program = program();
    let serving = program.serve(&[]);
    report(&serving.client, 3).await;
    program.run(&["backup", "copy.db"]).success();
    report(&serving.client, 2).await;
    serving.stop();
    symlink(DATABASE, program.path("link.db")).unwrap();
    let url = ["--database-url", "sqlite:link.db"];
    program.run(&["restore", "copy.db", "--force", url[0], url[1]]).success();
    assert!(fs::symlink_metadata(program.path("link.db")).unwrap().is_symlink());
    assert_eq!(exported(&program, DATABASE), 3);
    assert_eq!(exported(&program, "data/pisync.db.replaced"), 5);
}

/// A disk that is not mounted is not taken for a new database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_to_a_missing_disk_is_refused() {
    let program = program();
    fs::create_dir(program.path("data")).unwrap();
    symlink("../disk/pisync.db", program.path(DATABASE)).unwrap();
    for arguments in [&["serve"][..], &["migrate", "up"], &["key", "list"]] {
        let refused = program.run(arguments);
        assert!(refused.failure().contains("is the disk mounted?"), "{refused:?}");
    }
    assert_eq!(program.names_in("."), ["data", "logs"]);
    fs::create_dir(program.path("disk")).unwrap();
    let serving = program.serve(&[]);
    report(&serving.client, 1).await;
    assert_eq!(program.names_in("data"), ["pisync.db"]);
    assert!(program.names_in("disk").contains(&"pisync.db-wal".to_owned()));
    serving.stop();
    assert_eq!(exported(&program, DATABASE), 1);
}

/// Each name of a file would have a log of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_with_two_names_is_refused() {
    let program = program();
    let mut serving = program.serve(&[]);
    report(&serving.client, 1).await;
    fs::hard_link(program.path(DATABASE), program.path("data/other.db")).unwrap();
    serving.wait_for("the database file has another name (a hard link)");
    let other = ["--database-url", "sqlite:data/other.db"];
    for arguments in [&["serve"][..], &["verify"], &["backup", "copy.db"]] {
        let refused = program.run(&[arguments, &other].concat());
        let expected = "data/other.db has 2 names (hard links)";
        assert!(refused.refusal().contains(expected), "{refused:?}");
    }
    report(&serving.client, 1).await;
    serving.stop();
    assert!(program.run(&["serve"]).failure().contains("has 2 names"));
    fs::remove_file(program.path("data/other.db")).unwrap();
    assert_eq!(exported(&program, DATABASE), 2);
}

/// A restore that is killed in the middle leaves a second name, which the next claim takes away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_was_killed_is_no_second_name() {
    let program = program();
    let serving = program.serve(&[]);
    report(&serving.client, 1).await;
    serving.stop();
    let replaced = program.path("data/pisync.db.replaced");
    fs::hard_link(program.path(DATABASE), &replaced).unwrap();
    assert_eq!(exported(&program, DATABASE), 1);
    let serving = program.serve(&[]);
    assert!(!replaced.exists());
    report(&serving.client, 1).await;
    serving.stop();
}

/// Mounted somewhere else, as into a container, a folder leads to the same lock; a file alone has no log there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mounted_database_is_the_same() {
    let program = program();
    for folder in ["folder", "alone"] {
        fs::create_dir(program.path(folder)).unwrap();
    }
    let program = program.with_file("alone/pisync.db", "");
    let serving = program.serve(&[]);
    report(&serving.client, 5).await;
    let unshare = if crate::support::postgres::is_root() { "-m" } else { "-rm" };
    let mount = "mount --bind data folder && mount --bind data/pisync.db alone/pisync.db && exec \"$0\" \"$@\"";
    let program = program.run_by(&["unshare", unshare, "sh", "-c", mount]);
    for path in ["folder/pisync.db", "alone/pisync.db"] {
        let second = program.run(&["serve", "--database-url", &format!("sqlite:{path}")]);
        assert!(second.failure().contains("in use by a running PiSync server"), "{second:?}");
    }
    assert_eq!(exported(&program, "folder/pisync.db"), 5);
    let refused = program.run(&["export", "--database-url", "sqlite:alone/pisync.db"]);
    assert!(refused.failure().contains("in use by a server that reaches it by"), "{refused:?}");
    report(&serving.client, 1).await;
    serving.stop();
}

/// How often the log says something that begins like this.
fn said(program: &Program, message: &str) -> usize {
    let begins = |line: &&serde_json::Value| line["message"].as_str().unwrap().starts_with(message);
    program.log("combined.log").iter().filter(begins).count()
}

/// Does something to the files in a folder.
type TakeAway = fn(&Path);

const AWAY: &str = "the database's files are not where they were";

/// Waits until events are refused, which takes a second at most once the server has looked.
async fn until_refused(serving: &Serving) {
    let began = Instant::now();
    until(async || serving.client.report(&event("asking")).await.status == 503).await;
    // A slow machine may need longer to answer.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_unavailable(&serving.client.report(&event("asking")).await);
    until_ready(&serving.client, 503).await;
    assert_unavailable(&serving.client.get("/api/stats").await);
}

/// What is taken away for good: the server says so once and acknowledges nothing more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_into_files_that_are_gone() {
    let take_away: [(&str, TakeAway); 5] = [
        ("the folder", |folder| fs::remove_dir_all(folder).unwrap()),
        ("the database", |folder| fs::remove_file(folder.join("pisync.db")).unwrap()),
        ("the log", |folder| fs::remove_file(folder.join("pisync.db-wal")).unwrap()),
        ("the log's index", |folder| fs::remove_file(folder.join("pisync.db-shm")).unwrap()),
        ("another in its place", |folder| {
            fs::write(folder.join("new.db"), "").unwrap();
            fs::rename(folder.join("new.db"), folder.join("pisync.db")).unwrap();
        }),
    ];
    for (what, take_away) in take_away {
        let program = program();
        let serving = program.serve(&[]);
        report(&serving.client, 1).await;
        take_away(&program.path("data"));
        until_refused(&serving).await;
        assert_eq!(said(&program, AWAY), 1, "{what}");
        assert_eq!(serving.client.get("/health/live").await.status, 200);
        serving.signal("TERM");
        // What was last acknowledged is gone with the files.
        let ended = serving.wait();
        assert_eq!(ended.code(), 1, "{what}: {ended:?}");
        assert!(!ended.stdout.contains("everything that was accepted is stored"), "{what}");
    }
}

/// The ingest journal is a file like the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_into_a_journal_that_is_gone() {
    let program = program();
    let serving = program.serve(&[]);
    report(&serving.client, 1).await;
    serving.signal("KILL");
    serving.wait();
    serve_and_lose_the_journal(&program).await;
    // Neither is it missed when it has just been made.
    serve_and_lose_the_journal(&self::program()).await;
}

async fn serve_and_lose_the_journal(program: &Program) {
    let serving = program.serve(&[]);
    let others = ["pisync.db", "pisync.db-shm", "pisync.db-wal"];
    let names = program.names_in("data");
    let journal: Vec<_> = names.iter().filter(|name| !others.contains(&name.as_str())).collect();
    assert!(!journal.is_empty());
    for name in journal {
        fs::remove_file(program.path("data").join(name)).unwrap();
    }
    until_refused(&serving).await;
    serving.signal("TERM");
    serving.wait();
}

/// What comes back is gone on with, and nothing that was acknowledged is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_come_back_are_gone_on_with() {
    let program = program();
    let serving = program.serve(&[]);
    let reporters = Reporters::start(&serving.client);
    reporters.wait_for(50).await;
    let (here, there) = (program.path("data"), program.path("moved"));
    fs::rename(&here, &there).unwrap();
    until_ready(&serving.client, 503).await;
    until_refused(&serving).await;
    // A stranger's folder in its place is left alone.
    fs::create_dir(&here).unwrap();
    until_refused(&serving).await;
    assert_eq!(program.names_in("data"), Vec::<String>::new());
    fs::remove_dir(&here).unwrap();
    fs::rename(&there, &here).unwrap();
    until_ready(&serving.client, 200).await;
    reporters.wait_for(50).await;
    let acknowledged = reporters.stop().await;
    assert_eq!(stored_ids(&serving.client, "pi").await, acknowledged);
    assert_eq!(said(&program, AWAY), 1);
    assert_eq!(said(&program, "the database's files are where they were"), 1);
    serving.stop();
    program.run(&["verify"]).success();
}

/// Another process may keep everybody out for longer than a request would wait: it reads a large log after a crash, or
/// copies it into the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_waits_for_another_process() {
    let program = program();
    program.run(&["migrate", "up"]).success();
    let other = rusqlite::Connection::open(program.path(DATABASE)).unwrap();
    let keep_all_out = "pragma locking_mode = exclusive; update ingest_state set settled = 0";
    other.execute_batch(keep_all_out).unwrap();
    let (mut starting, since) = (program.start(&["serve"]), Instant::now());
    while since.elapsed() < Duration::from_secs(7) {
        assert!(!starting.has_ended(), "{:?}", starting.wait());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(other);
    starting.wait_for("PiSync is ready on http");
}
