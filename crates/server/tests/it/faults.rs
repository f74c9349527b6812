//! What surrounds a server fails, or comes all at once: it says so in time, keeps what it has acknowledged and
//! goes on by itself.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use pisync::store::{self, Target};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
};

use crate::{
    ingest::{
        Reporters, assert_unavailable, mixed_events, report_all, stored_ids, timed, until,
        until_ready,
    },
    support::{
        http::{Client, event, with},
        postgres::PostgresServer,
        program::{Installed, Program, url},
        server::TestServer,
        small_disk::SmallDisk,
        store::{TestDatabase, assert_right, differences},
    },
};

both_stores!(five_thousand_report_at_the_same_moment);

/// A program without rate limits, with its data there.
fn program(target: &Target) -> Program {
    Program::new()
        .with("DATABASE_URL", url(target))
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0)
}

/// A measurement that the server gives of itself.
async fn measured(client: &Client, name: &str) -> f64 {
    let answer = client.get("/metrics").await;
    let line = answer.text().lines().find(|line| line.starts_with(name));
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// Runs a server on a disk that becomes full under load, and gives what was acknowledged.
async fn fill_the_disk_under(program: &Program, disk: &SmallDisk) {
    let serving = program.serve(&[]);
    let client = &serving.client;
    let reporters = Reporters::start(client);
    reporters.wait_for(50).await;
    assert!(!stored_ids(client, "pi").await.is_empty());
    disk.fill();
    until_ready(client, 503).await;
    // Long enough to be found full again and again. Each refusal is looked at by the reporters.
    let refused = "pisync_sync_events_refused_total{reason=\"unavailable\"}";
    let before = measured(client, refused).await;
    until(async || measured(client, refused).await > before + 1000.0).await;
    assert_unavailable(&client.report(&event("pi")).await);
    // What is stored can be read all the same.
    assert!(!stored_ids(client, "pi").await.is_empty());

    disk.make_room();
    reporters.wait_for(50).await;
    until_ready(client, 200).await;
    let acknowledged = reporters.stop().await;
    assert_eq!(stored_ids(client, "pi").await, acknowledged);
    serving.stop();

    let log = program.log("combined.log");
    let count = |message: &str| {
        let text = |line: &&Value| line["message"].as_str().unwrap().starts_with(message);
        log.iter().filter(text).count()
    };
    assert_eq!(program.log("error.log").len(), 1, "{log:#?}");
    assert_eq!(count("the database is unavailable"), 1, "{log:#?}");
    assert_eq!(count("the database is back"), 1, "{log:#?}");
    assert!((1..10).contains(&count("request refused for now")), "{log:#?}");
    program.run(&["verify"]).success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_sqlite() {
    let disk = SmallDisk::new(16);
    let program = program(&Target::Sqlite(disk.path().join("pisync.db"))).with_small_disk(&disk);
    fill_the_disk_under(&program, &disk).await;
    let copy = program.path("copy.db");
    std::fs::copy(disk.seen_from_here("pisync.db"), &copy).unwrap();
    assert_eq!(integrity(&copy), "ok");
}

/// A start that fails tells what is in the way, and what to do about it.
#[test]
fn starts_that_cannot_be() {
    let disk = SmallDisk::new(1);
    let data = disk.path().join("data");
    let program = program(&Target::Sqlite(data.join("pisync.db"))).with_small_disk(&disk);
    disk.fill();
    let ended = program.run(&["serve"]);
    assert!(ended.failure().contains("; make room on its disk"), "{ended:?}");

    let program = Program::new().with("PORT", 0).with_file("pisync.db", &"no database".repeat(99));
    let ended = program.with("DATA_DIR", ".").run(&["serve"]);
    assert!(ended.failure().contains("bring back a backup with `pisync restore`"), "{ended:?}");

    let program = Program::new().with("PORT", 0).with_file("data", "no folder");
    let ended = program.run(&["serve"]);
    assert!(ended.failure().contains("; set DATA_DIR or DATABASE_URL to a place"), "{ended:?}");
}

fn integrity(file: &Path) -> String {
    let connection = rusqlite::Connection::open(file).unwrap();
    connection.query_row("pragma integrity_check", [], |row| row.get(0)).unwrap()
}

/// The tables are on it; a full disk under its write-ahead log stops PostgreSQL itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_postgresql() {
    let disk = SmallDisk::new(32);
    let postgres = PostgresServer::with_small_disk(&disk);
    let target = Target::Postgres(Box::new(postgres.create_database_on(&disk, "pisync").await));
    fill_the_disk_under(&program(&target), &disk).await;
}

/// Clients that report much and hang up before they have an answer.
fn be_hasty(client: &Client, stopped: &Arc<AtomicBool>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let much = with(event("hasty"), &json!({"metadata": {"text": "x".repeat(4000)}}));
    // Fewer than fill the queue, which would be another refusal.
    for _ in 0..16 {
        let (client, stopped, much) = (client.clone(), Arc::clone(stopped), much.clone());
        tasks.spawn(async move {
            while !stopped.load(Ordering::SeqCst) {
                let request = client.request(Method::POST, "/api/sync-event").json(&much);
                // What comes of it is nobody's concern any more.
                let _ = request.timeout(Duration::from_millis(50)).send().await;
            }
        });
    }
    tasks
}

/// Its processes are stopped where they are: connections stay open, and nobody answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_that_does_not_answer() {
    let postgres = PostgresServer::dedicated();
    let target = Target::Postgres(Box::new(postgres.create_database("pisync").await));
    let program = program(&target);
    let serving = program.serve(&[]);
    let client = &serving.client;
    let reporters = Reporters::start(client);
    reporters.wait_for(50).await;
    let memory = "process_resident_memory_bytes";
    let before = measured(client, memory).await;

    postgres.pause();
    let hurry_ended = Arc::new(AtomicBool::new(false));
    let hasty = be_hasty(client, &hurry_ended);
    until_ready(client, 503).await;
    // Whoever comes before it is noticed waits as long as a batch may take, which is 10 s.
    let (answer, took) = timed(client.report(&event("pi"))).await;
    assert_unavailable(&answer);
    assert!(took < Duration::from_secs(15), "{took:?}");
    for _ in 0..5 {
        let (answer, took) = timed(client.report(&event("pi"))).await;
        assert_unavailable(&answer);
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
    assert_eq!(client.get("/health/ready").await.status, 503);
    let grown = measured(client, memory).await - before;
    // As many events as find room in the queue, and what handling them leaves behind.
    assert!(grown < f64::from(100 << 20), "{grown}");
    println!("while PostgreSQL was paused: {:.0} MiB more", grown / f64::from(1 << 20));

    postgres.resume();
    hurry_ended.store(true, Ordering::SeqCst);
    hasty.join_all().await;
    reporters.wait_for(50).await;
    until_ready(client, 200).await;
    let acknowledged = reporters.stop().await;
    let stored = stored_ids(client, "pi").await;
    assert!(acknowledged.is_subset(&stored));
    // Who was answered 503 after the commit was sent: at most what was in flight.
    assert!(stored.len() - acknowledged.len() <= 17, "{} more", stored.len() - acknowledged.len());
    serving.stop();
    program.run(&["verify"]).success();
}

/// As many as a large fleet has, each on a connection of its own.
const FLEET: usize = 5_000;

async fn five_thousand_report_at_the_same_moment(installed: &Installed) {
    let limit = rlimit::increase_nofile_limit(rlimit::INFINITY).unwrap();
    assert!(limit > FLEET as u64 + 500, "the tests may open {limit} files alone: ulimit -Hn 8192");
    let serving = installed.program.serve(&[]);
    let (start, started) = watch::channel(None);
    let mut devices = JoinSet::new();
    for number in 0..FLEET {
        let mut connection = TcpStream::connect(serving.address()).await.unwrap();
        let mut started = started.clone();
        devices.spawn(async move {
            let body = event(&format!("pi-{number}")).to_string();
            let request = format!(
                "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                 content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            let began: Instant = started.wait_for(Option::is_some).await.unwrap().unwrap();
            connection.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            connection.read_to_string(&mut answer).await.unwrap();
            (answer, began.elapsed())
        });
    }
    start.send(Some(Instant::now())).unwrap();
    let mut durations = Vec::new();
    let mut ids = BTreeSet::new();
    for (answer, took) in devices.join_all().await {
        assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
        let body: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        ids.insert(body["data"]["id"].as_i64().unwrap());
        durations.push(took);
    }
    durations.sort();
    println!(
        "{FLEET} connections at once on {}: all answered after {:?}, p50 {:?}, p99 {:?}",
        if installed.is_postgres() { "PostgreSQL" } else { "SQLite" },
        durations[FLEET - 1],
        durations[FLEET / 2],
        durations[FLEET * 99 / 100]
    );
    assert_eq!(ids.len(), FLEET);
    let stats = serving.client.get("/api/stats").await.data(200);
    assert_eq!(
        (&stats["total_devices"], &stats["total_sync_events"]),
        (&json!(FLEET), &json!(FLEET))
    );
    serving.stop();
    installed.program.run(&["verify"]).success();
}

/// The same devices report to both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_on_one_postgresql() {
    let database = TestDatabase::postgres().await;
    let target = database.target.clone();
    let first = TestServer::start(database).await;
    let second = TestServer::start(TestDatabase::elsewhere(target.clone())).await;
    let store = store::open(&target).await.unwrap();
    let reports = |server: &TestServer| {
        let client = Client::clone(server);
        tokio::spawn(async move { report_all(&client, mixed_events()).await })
    };
    let (left, right) = (reports(&first), reports(&second));
    while !left.is_finished() || !right.is_finished() {
        // Looking while both write finds nothing by halves.
        assert_right(&differences(&*store, false).await);
    }
    let (left, right) = (left.await.unwrap(), right.await.unwrap());
    assert!(left.iter().chain(&right).all(|answer| answer.status == 201));
    assert_right(&differences(&*store, false).await);
    let stats = first.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], left.len() + right.len());
    second.stop().await;
    first.stop().await.remove().await;
}
