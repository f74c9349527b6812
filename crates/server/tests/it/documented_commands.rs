//! The commands of README.md and `docs/`, run as somebody runs them who copies them from the page. A page's blocks of
//! `sh` run in their order, in one folder, beside one server; a block of `json` behind one is its answer. Before a block
//! of `sh stopped` the server is stopped. Blocks of `shell` are for people: they install packages, start a server that
//! goes on, or need a service manager. They are only looked through for mistakes of the shell's grammar.

use std::{
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use pisync_core::Timestamp;
use reqwest::Method;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::support::{
    documents::{pages, text},
    http::Client,
    node_service::{FEW_EVENTS, SCHEMA},
    postgres::PostgresServer,
    program::{Program, Serving, url},
    store::TestDatabase,
};

/// Where the pages say that the server is.
const DOCUMENTED_SERVER: &str = "http://localhost:3000";

/// The PostgreSQL database of the pages.
const DOCUMENTED_DATABASE: &str = "postgres://pisync:PASSWORD@localhost/pisync";

/// A block of code.
struct Block {
    /// What stands behind the backticks.
    kind: String,
    line: usize,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let (mut blocks, mut open): (Vec<Block>, Option<(usize, Block)>) = (Vec::new(), None);
    for (number, line) in page.lines().enumerate() {
        let indentation = line.len() - line.trim_start().len();
        match (&mut open, line.trim_start().strip_prefix("```")) {
            (None, Some(kind)) => {
                let (kind, line) = (kind.to_owned(), number + 1);
                open = Some((indentation, Block { kind, line, text: String::new() }));
            }
            (None, None) => {}
            (Some(_), Some(_)) => blocks.extend(open.take().map(|(_, block)| block)),
            (Some((indentation, block)), None) => {
                block.text += line.get(*indentation..).unwrap_or_default();
                block.text.push('\n');
            }
        }
    }
    assert!(open.is_none(), "a block has no end");
    blocks
}

/// A folder in which a page's commands are run.
struct Reader {
    program: Program,
    serving: Option<Serving>,
    /// What stands for the database of the pages.
    database: String,
}

impl Reader {
    fn new(database: String) -> Self {
        let program = Program::new();
        let home = program.path("").display().to_string();
        std::fs::create_dir(program.path("bin")).unwrap();
        symlink(env!("CARGO_BIN_EXE_pisync"), program.path("bin/pisync")).unwrap();
        let search = std::env::var("PATH").unwrap();
        let program = program
            .with("HOME", &home)
            .with("PATH", format!("{home}/bin:{search}"))
            .with("PORT", 0)
            .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
            .with("RATE_LIMIT_API_PER_MINUTE", 0)
            // Without the meter of its progress.
            .with_file(".curlrc", "silent\nshow-error\n");
        Self { program, serving: None, database }
    }

    fn client(&mut self) -> &Client {
        &self.serving.get_or_insert_with(|| self.program.serve(&[])).client
    }

    /// Runs a block, and gives what it prints.
    fn run(&mut self, block: &Block, place: &str) -> String {
        let mut script = format!("set -e\n{}", block.text);
        if block.kind.ends_with(" stopped") {
            if let Some(serving) = self.serving.take() {
                serving.stop();
            }
        } else {
            let server = self.client().url("");
            script = script.replace(DOCUMENTED_SERVER, &server);
        }
        script = script.replace(DOCUMENTED_DATABASE, &self.database);
        let ended = self.program.shell(&script);
        assert_eq!(ended.code(), 0, "{place}: {ended:?}");
        ended.stdout
    }

    /// Runs all blocks of a page; tells how many there are.
    fn read(&mut self, page: &str) -> usize {
        let blocks = blocks(&text(page));
        let mut run = 0;
        for (block, next) in blocks.iter().zip(blocks.iter().skip(1).map(Some).chain([None])) {
            if !["sh", "sh stopped"].contains(&&*block.kind) {
                continue;
            }
            let place = format!("{page}:{}", block.line);
            let said = self.run(block, &place);
            match next.filter(|next| next.kind == "json") {
                Some(expected) => {
                    let answer = said.lines().find(|line| line.starts_with('{')).expect(&place);
                    assert_eq!(answered(answer), answered(&expected.text), "{place}");
                }
                None => assert!(!said.contains(r#""success":false"#), "{place}: {said}"),
            }
            run += 1;
        }
        run
    }

    /// Stops the server in the proper way.
    fn close(mut self) {
        if let Some(serving) = self.serving.take() {
            serving.stop();
        }
    }
}

/// An answer without the times that are other ones in each run.
fn answered(text: &str) -> Value {
    fn forget_now(value: &mut Value) {
        match value {
            Value::String(text) => {
                let is_time = Timestamp::parse_iso8601(text).is_some();
                // Events of the pages are older.
                if is_time && text.as_str() > "2026" {
                    "now".clone_into(text);
                }
            }
            Value::Array(items) => items.iter_mut().for_each(forget_now),
            Value::Object(fields) => fields.values_mut().for_each(forget_now),
            _ => {}
        }
    }
    let mut value = serde_json::from_str(text).expect(text);
    forget_now(&mut value);
    value
}

/// Pages whose commands need more than a server on SQLite; each has a test of its own.
const ON_POSTGRES: [&str; 3] =
    ["docs/postgresql.md", "docs/backup-and-moving.md", "docs/coming-from-node.md"];

/// Its commands measure for many minutes.
const BENCHMARKS: &str = "docs/benchmarks.md";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_work_on_sqlite() {
    let mut run = 0;
    for page in pages() {
        if !ON_POSTGRES.contains(&&*page) && page != BENCHMARKS {
            let mut reader = Reader::new("none".to_owned());
            run += reader.read(&page);
            reader.close();
        }
    }
    assert!(run > 20, "only {run} blocks were found");
}

/// The name of a database that does not exist yet, and its URL.
fn missing_database(name: &str) -> String {
    let target = crate::support::postgres::postgres_target(PostgresServer::shared().config(name));
    url(&pisync::store::Target::Postgres(Box::new(target)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_the_page_on_postgresql_work() {
    let mut reader = Reader::new(missing_database("documented"));
    assert!(reader.read("docs/postgresql.md") > 0);
    reader.close();
    PostgresServer::shared().drop_database("documented").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_the_page_on_moving_work() {
    let mut reader = Reader::new(missing_database("documented_copy"));
    // Something to move.
    reader.client().store(&crate::support::http::event("pi")).await;
    assert!(reader.read("docs/backup-and-moving.md") > 0);
    reader.close();
    PostgresServer::shared().drop_database("documented_copy").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_the_page_on_the_node_service_work() {
    let database = TestDatabase::postgres().await;
    database.execute(SCHEMA).await;
    database.execute(FEW_EVENTS).await;
    let mut reader = Reader::new("none".to_owned());
    let settings = format!("DATABASE_URL={}\n", url(&database.target));
    reader.program = reader.program.with_file(".env", &settings);
    assert!(reader.read("docs/coming-from-node.md") > 0);
    // The last command has given the database back.
    assert!(database.tables().await.contains(&"migrations".to_owned()));
    reader.close();
    database.remove().await;
}

/// The shell takes them, at least.
#[test]
fn commands_for_people_have_no_slips() {
    let mut found = 0;
    for page in pages() {
        for block in blocks(&text(&page)) {
            if ["shell", "sh", "sh stopped"].contains(&&*block.kind) {
                let output =
                    Command::new("sh").args(["-n", "-c", &block.text]).output().expect("a shell");
                assert!(output.status.success(), "{page}:{}: {output:?}", block.line);
                found += 1;
            } else {
                let known = ["", "json", "python", "js", "ini", "nginx", "yaml", "text", "sql"];
                let is_script = block.kind.starts_with("sh save=");
                assert!(is_script || known.contains(&&*block.kind), "{page}: {:?}", block.kind);
            }
        }
    }
    assert!(found > 40, "only {found} blocks were found");
}

/// A server in front of the real one that is overloaded at first.
#[derive(Clone)]
struct Overloaded {
    server: Client,
    bodies: Arc<Mutex<Vec<Bytes>>>,
}

/// Refuses the first request and passes the others on.
async fn overloaded_at_first(
    State(state): State<Overloaded>,
    uri: axum::http::Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let is_first = {
        let mut bodies = state.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        bodies.push(body.clone());
        bodies.len() == 1
    };
    if is_first {
        return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "3")]).into_response();
    }
    let request = state.server.request(Method::POST, uri.path()).body(body);
    let kind = headers.get(header::CONTENT_TYPE).cloned().expect("a content type");
    let answer = request.header(header::CONTENT_TYPE, kind).send().await.expect("an answer");
    let status = answer.status();
    (status, answer.bytes().await.expect("a body")).into_response()
}

/// Runs a script that reports one event, against a server that is overloaded at first. It must wait as long as it was
/// told and send the same event again; then the event is stored once.
async fn reports_once(block: &Block, run: &str, devices: impl Fn() -> String) {
    let mut reader = Reader::new("none".to_owned());
    let server = reader.client().clone();
    let state = Overloaded { server: server.clone(), bodies: Arc::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(overloaded_at_first).with_state(state.clone());
    let task = tokio::spawn(async move { axum::serve(listener, router).await });

    reader.program = reader.program.with("PISYNC_URL", &front).with_file("script", &block.text);
    let began = Instant::now();
    let line = run.to_owned();
    let (ended, reader) =
        tokio::task::spawn_blocking(move || (reader.program.shell(&line), reader)).await.unwrap();
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(began.elapsed() >= Duration::from_secs(3), "it did not wait: {ended:?}");
    let bodies = std::mem::take(&mut *state.bodies.lock().unwrap());
    assert_eq!(bodies.len(), 2, "{ended:?}");
    assert_eq!(bodies[0], bodies[1], "not the same event");
    let history = server.get(&format!("/api/device/{}/sync-history", devices())).await.data(200);
    assert_eq!(history["sync_history"].as_array().map(Vec::len), Some(1), "{history}");
    assert!(history["sync_history"][0]["event_id"].is_string(), "{history}");
    task.abort();
    reader.close();
}

fn script(kind: &str) -> Block {
    let blocks = blocks(&text("docs/reporting.md"));
    blocks.into_iter().find(|block| block.kind == kind).expect(kind)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shell_script_reports_once() {
    assert!(Path::new("/usr/bin/rsync").exists(), "no rsync here: run ./scripts/test");
    let run = "mkdir from && echo 1 > from/1 && sh script from/ to/ && ls to/1 && ! ls pisync-spool.ndjson";
    let name = || {
        let output = Command::new("uname").arg("-n").stdin(Stdio::null()).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    reports_once(&script("sh save=sync-and-report"), run, name).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_script_reports_once() {
    reports_once(&script("python"), "python3 script", || "pi-device-002".to_owned()).await;
}

/// Where there is Node: the tests do not need it otherwise, and Debian's may be too old.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_script_reports_once() {
    let version = Command::new("node").arg("--version").output();
    let is_there = version.is_ok_and(|version| {
        let text = String::from_utf8_lossy(&version.stdout).into_owned();
        let major = text.trim_start_matches('v').split('.').next().map(str::parse::<u32>);
        matches!(major, Some(Ok(18..)))
    });
    if is_there {
        let run = "mv script report.mjs && node report.mjs";
        reports_once(&script("js"), run, || "pi-device-003".to_owned()).await;
    }
}
