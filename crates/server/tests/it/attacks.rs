//! What an attacker would try, and what must come back. Keys, and what is served without one, are in `keys`.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use pisync::net::ConnectionSettings;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::{
    support::{
        http::{column, event, send, with},
        program::Program,
        server::TestServer,
    },
    tls::{Bare, impatient},
};

both_stores!(
    sql_is_text,
    odd_json_is_refused_or_kept_as_it_is,
    bodies_that_stall_keep_no_event_out,
);

/// A connection on which little is taken in before it is read.
async fn narrow_connection(server: &TestServer) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    socket.connect(server.address()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_nobody_takes_hold_what_they_may() {
    let server = TestServer::on_sqlite(|http| http.answer_bytes = 12 << 20).await;
    // Two pages of 4 MiB, more than the system takes off the server's hands.
    let large = with(event("pi"), &json!({"metadata": {"note": "x".repeat(4_000)}}));
    let batch =
        async |events: Vec<Value>| server.post("/api/sync-events", &Value::from(events)).await;
    batch(vec![large; 2_000]).await.data(200);
    let all_wrong = async || batch([vec![json!({}); 9_000], vec![event("late")]].concat()).await;
    let (page, stream) = ("/api/device/pi/sync-history?limit=1000", "/api/device/pi/sync-history");
    for (path, accept) in [(page, "application/json"), (stream, "text/csv")] {
        let mut stalled = Vec::new();
        loop {
            let answer = server.get(page).await;
            if answer.status == 503 {
                assert_eq!(answer.header("retry-after"), "2");
                break;
            }
            assert_eq!(answer.status, 200);
            let mut connection = narrow_connection(&server).await;
            let request =
                format!("GET {path} HTTP/1.1\r\nhost: localhost\r\naccept: {accept}\r\n\r\n");
            connection.write_all(request.as_bytes()).await.unwrap();
            // The answer has begun, or it is refused.
            assert_eq!(timeout(PATIENCE, connection.read_u8()).await.unwrap().unwrap(), b'H');
            stalled.push(connection);
            assert!(stalled.len() < 12, "{accept} is not counted");
        }
        // What is small goes on, and what is refused has left nothing behind.
        server.store(&event("other")).await;
        batch(vec![event("other"); 100]).await.data(200);
        assert_eq!(all_wrong().await.status, 503);
        server.get("/api/device/late").await.error(404);
        drop(stalled);
        let began = Instant::now();
        while server.get(page).await.status != 200 {
            assert!(began.elapsed() < PATIENCE, "{accept} is never given back");
        }
    }
    let data = all_wrong().await.data(200);
    assert_eq!((&data["accepted"], &data["rejected"]), (&json!(1), &json!(9_000)));
    server.stop().await;
}

/// No test may take longer for one thing.
const PATIENCE: Duration = Duration::from_secs(30);

const SQL: [&str; 8] = [
    "'; drop table sync_events; --",
    "\"; drop table devices; --",
    "' or '1'='1",
    "') on conflict do nothing; delete from devices; --",
    "$1",
    "?1 :limit",
    "\\'; select pg_sleep(10); --",
    "%_%\u{2019}",
];

async fn sql_is_text(server: &TestServer) {
    for (number, sql) in SQL.iter().enumerate() {
        let encoded =
            percent_encoding::utf8_percent_encode(sql, percent_encoding::NON_ALPHANUMERIC);
        let sent = with(
            event(sql),
            &json!({"job": sql, "metadata": {"note": sql, *sql: [sql]}, "unknown": sql}),
        );
        let stored = server.store(&sent).await;
        assert_eq!((&stored["device_id"], &stored["job"]), (&json!(sql), &json!(sql)));
        let change = json!({"name": sql, "group": sql});
        let device = server.patch(&format!("/api/device/{encoded}"), &change).await.data(200);
        assert_eq!((&device["name"], &device["group"]), (&json!(sql), &json!(sql)));
        let path = format!("/api/device/{encoded}/sync-history?job={encoded}");
        let history = server.get(&path).await.data(200);
        assert_eq!(history["sync_history"][0]["metadata"]["note"], *sql);
        for query in ["q", "group"] {
            let found = server.get(&format!("/api/devices?{query}={encoded}")).await.data(200);
            assert_eq!(column(&found["devices"], "device_id"), [json!(sql)], "{query}={sql}");
        }
        for (path, parameter) in [
            ("/api/devices", "sort"),
            ("/api/devices", "limit"),
            ("/api/devices", "offset"),
            ("/api/devices/repeated-failures", "threshold"),
            ("/api/devices/repeated-failures", "consecutive"),
            ("/api/device/x/sync-history", "startDate"),
            ("/api/audit", "before"),
            ("/api/audit", "cursor"),
            ("/api/keys", "cursor"),
        ] {
            let details = server.get(&format!("{path}?{parameter}={encoded}")).await.details();
            assert_eq!(column(&details, "field"), [parameter], "{path}: {details}");
            assert_eq!(column(&details, "value"), [*sql], "{path}: {details}");
        }
        let key =
            server.post("/api/keys", &json!({"scope": "ingest", "name": sql, "group": sql})).await;
        key.data(201);
        // All of it is still there.
        let stats = server.get("/api/stats").await.data(200);
        assert_eq!(stats["total_sync_events"], number + 1, "{sql}");
    }
    let keys = server.get("/api/keys").await.data(200);
    assert_eq!(column(&keys["keys"], "name"), SQL.map(|sql| json!(sql)));
    let before = server.get("/api/devices").await.data(200)["pagination"]["total_devices"].take();
    assert_eq!(before, SQL.len());
    for sql in SQL {
        let encoded =
            percent_encoding::utf8_percent_encode(sql, percent_encoding::NON_ALPHANUMERIC);
        let gone = server.delete(&format!("/api/device/{encoded}")).await.data(200);
        assert_eq!(gone["deleted_events"], 1);
    }
}

/// Batches, compressed or not, of which half arrives, and nothing more: they may use up what is there for such, never what
/// events need that arrive whole.
async fn bodies_that_stall_keep_no_event_out(server: &TestServer) {
    let many_events = format!("[{}", format!("{},", event("pi-stalling")).repeat(3_000));
    for (head, half) in
        [("content-encoding: gzip\r\n", vec![0; 200_000]), ("", many_events.into_bytes())]
    {
        let head = format!(
            "POST /api/sync-events HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{head}content-length: {}\r\n\r\n",
            half.len() + 10
        );
        let mut stalled = Vec::new();
        // One more at a time, until there is room for no other.
        let refused = loop {
            assert!(stalled.len() < 1_000, "nothing bounds what stalls");
            let mut connection = server.connect().await;
            connection.write(&head).await;
            connection.write(&half).await;
            match connection.answer_within(Duration::from_millis(30)).await {
                Some(answer) => break answer,
                None => stalled.push(connection),
            }
        };
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.head.contains("retry-after: "), "{refused:?}");
        server.store(&event("pi-whole")).await;
        let batch = json!([event("pi-whole"), event("pi-whole")]);
        assert_eq!(server.post("/api/sync-events", &batch).await.data(200)["accepted"], 2);
    }
}

async fn odd_json_is_refused_or_kept_as_it_is(server: &TestServer) {
    let whole = |fields: &str| {
        let event = event("pi").to_string();
        format!("{},{fields}}}", event.strip_suffix('}').unwrap())
    };
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    // Depth: neither the stack nor the database notices.
    for depth in [1_000, 30_000] {
        for field in ["metadata", "unknown", "device_id"] {
            let text = whole(&format!("\"{field}\":{}", nested(depth)));
            let answer = server.report_text(text).await;
            // What is unknown is ignored, however deep.
            let expected = if field == "unknown" { 201 } else { 400 };
            assert_eq!(answer.status, expected, "{field}: {}", answer.text());
        }
        assert_eq!(server.report_text(nested(depth)).await.status, 400);
    }
    // Size.
    let long = "x".repeat(70_000);
    assert_eq!(server.report_text(whole(&format!("\"unknown\":\"{long}\""))).await.status, 413);
    assert_eq!(server.report_text(" ".repeat(70_000)).await.status, 413);
    let metadata = format!("\"metadata\":{{\"a\":\"{}\"}}", "x".repeat(5_000));
    server.report_text(whole(&metadata)).await.details();
    // The same field twice: nobody may read one and store the other.
    for field in ["\"device_id\":\"other\"", "\"total_errors\":5"] {
        let answer = server.report_text(whole(field)).await;
        assert!(matches!(answer.status, 201 | 400), "{}", answer.text());
        if answer.status == 201 {
            let stored = answer.data(201);
            let path = format!("/api/device/{}", stored["device_id"].as_str().unwrap());
            server.get(&path).await.data(200);
        }
    }
    // Numbers beyond all bounds, and half characters.
    let digits = "9".repeat(400);
    for value in
        [&digits, "1e999999", "-1e999999", "1e-999999", "0.1e1000000000000", "18446744073709551616"]
    {
        for field in ["total_files_synced", "total_errors", "bytes_synced", "duration_seconds"] {
            let object = with(event("pi"), &json!({field: "NUMBER"})).to_string();
            let answer = server.report_text(object.replace("\"NUMBER\"", value)).await;
            assert!(matches!(answer.status, 201 | 400), "{field}={value}: {}", answer.text());
            if answer.status == 201 {
                assert!(value == "1e-999999", "{field}={value} was taken: {}", answer.text());
            }
        }
    }
    for text in [r"\ud800", r"\udc00\ud800", r"\ud800x", r"\u0000", r"a\u0000b", r"\u001b[31m"] {
        for field in ["device_id", "job", "timestamp"] {
            let object = with(event("pi"), &json!({field: "TEXT"})).to_string();
            let answer = server.report_text(object.replace("TEXT", text)).await;
            assert_eq!(answer.status, 400, "{field}={text}: {}", answer.text());
        }
    }
    assert_eq!(server.report_text(b"{\"device_id\":\"\xff\"}".to_vec()).await.status, 400);
    let metadata = whole(r#""metadata":{"a":"\u0000","b":"\ud83d\ude00"}"#);
    let answer = server.report_text(metadata).await;
    assert!(matches!(answer.status, 201 | 400), "{}", answer.text());
    // It lives.
    server.store(&event("alive")).await;
    let history = server.get("/api/device/alive/sync-history").await.data(200);
    assert_eq!(history["pagination"]["total_events"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_in_other_encodings_are_refused_unread() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for encoding in ["br", "compress", "gzip, gzip", "identity, gzip"] {
        // A bomb need not be one: nobody looks.
        let request = server.request(Method::POST, "/api/sync-event");
        let request = request.header("content-type", "application/json");
        let request = request.header("content-encoding", encoding).body(vec![0x1f; 1000]);
        let answer = send(request).await;
        assert!(answer.error(415).contains("Content-Encoding"), "{encoding}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_is_never_taken_for_two() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let post =
        "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    let smuggled = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let event = event("pi").to_string();
    let chunked = format!("{:x}\r\n{event}\r\n0\r\n\r\n", event.len());
    let both = 5 + smuggled.len();
    for (framing, status) in [
        // The body by one header ends where by the other a request begins. Chunks go before a length
        // (RFC 9112, 6.3), and the connection ends with it: what follows is nobody's request.
        (
            format!(
                "content-length: {both}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"
            ),
            400,
        ),
        (
            format!("transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n{chunked}{smuggled}"),
            201,
        ),
        (format!("content-length: 4\r\ncontent-length: 5\r\n\r\n{{}}  {smuggled}"), 400),
        (format!("transfer-encoding: xchunked\r\n\r\n{chunked}{smuggled}"), 400),
        (format!("transfer-encoding: chunked, identity\r\n\r\n{chunked}{smuggled}"), 400),
        (format!("transfer-encoding : chunked\r\n\r\n{chunked}{smuggled}"), 400),
        (format!("content-length: +2\r\n\r\n{{}}{smuggled}"), 400),
        (format!("content-length: 2,2\r\n\r\n{{}}{smuggled}"), 400),
    ] {
        let mut connection = server.connect().await;
        connection.write(format!("{post}{framing}")).await;
        let received = connection.rest().await;
        assert_eq!(received.matches("HTTP/1.1 ").count(), 1, "{framing}: {received}");
        assert!(received.starts_with(&format!("HTTP/1.1 {status}")), "{framing}: {received}");
        assert!(received.contains("connection: close"), "{framing}: {received}");
    }
    assert_eq!(server.get("/api/stats").await.data(200)["total_sync_events"], 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_is_sent_becomes_a_header() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for path in [
        "/api/device/x%0d%0aset-cookie:%20a=b",
        "/api/device/x%0aset-cookie:%20a=b/sync-history",
        "/nothing%0d%0aset-cookie:%20a=b",
        "/api/devices?q=%0d%0aset-cookie:%20a=b",
        "/api-docs/%0d%0aset-cookie:%20a=b",
        "/api-docs?x=%0d%0aset-cookie:a=b",
    ] {
        let answer = server.get(path).await;
        assert!((300..500).contains(&answer.status), "{path}: {}", answer.status);
        assert!(!answer.headers.contains_key("set-cookie"), "{path}");
        let location = answer.headers.get("location");
        assert!(location.is_none_or(|location| location == "/api-docs/"), "{path}: {location:?}");
    }
    for head in [
        "GET /health HTTP/1.1\r\nhost: localhost\r\nx-request-id: a\nset-cookie: a=b\r\n\r\n",
        "GET /health HTTP/1.1\r\nhost: localhost\r\nx-request-id: a\rset-cookie: a=b\r\n\r\n",
        "GET /health HTTP/1.1\r\nhost: localhost\r\nx-request-id: a\0b\r\n\r\n",
        "GET /health\nset-cookie:a=b HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ] {
        let mut connection = server.connect().await;
        connection.write(head).await;
        connection.finish_writing().await;
        let received = connection.rest().await;
        assert!(!received.to_ascii_lowercase().contains("set-cookie"), "{head}: {received}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_path_leads_out_of_the_static_files() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for path in [
        "/api-docs/../Cargo.toml",
        "/api-docs/..%2f..%2fCargo.toml",
        "/api-docs/%2e%2e/%2e%2e/etc/passwd",
        "/api-docs/%252e%252e%252fetc/passwd",
        "/api-docs/..\\..\\Cargo.toml",
        "/api-docs/....//....//etc/passwd",
        "/api-docs//etc/passwd",
        "/api-docs/%00",
        "/api-docs/index.html%00.css",
        "/api-docs/%c0%ae%c0%ae/etc/passwd",
        "//etc/passwd",
        "/../../etc/passwd",
        "/.env",
        "/data/pisync.db",
        "/logs/combined.log",
    ] {
        let mut connection = server.connect().await;
        connection.write(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
        let answer = connection.answer().await;
        assert!(matches!(answer.status, 400 | 404), "{path}: {}", answer.status);
        assert!(!answer.body.contains("root:") && !answer.body.contains("[package]"), "{path}");
    }
    server.stop().await;
}

/// Sends byte after byte, never a whole head, until the server hangs up; tells how long that took.
async fn trickle(server: &TestServer) -> Duration {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let began = Instant::now();
    loop {
        if stream.write_all(b"a").await.is_err() {
            return began.elapsed();
        }
        // Else there is an answer to what is no head, or nothing yet.
        if let Ok(Ok(0) | Err(_)) =
            timeout(Duration::from_millis(20), stream.read(&mut [0; 1024])).await
        {
            return began.elapsed();
        }
        assert!(began.elapsed().as_secs() < 30, "it is never cut off");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slowloris() {
    let server = TestServer::on_sqlite(|settings| settings.timeouts = impatient()).await;
    let server = std::sync::Arc::new(server);
    let mut attackers = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let server = std::sync::Arc::clone(&server);
        attackers.spawn(async move { trickle(&server).await });
    }
    // Meanwhile everybody else is served.
    while let Ok(None) = timeout(Duration::ZERO, async { attackers.try_join_next() }).await {
        server.store(&event("pi")).await;
    }
    for took in attackers.join_all().await {
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
    std::sync::Arc::into_inner(server).unwrap().stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_take_the_answer_is_cut_off() {
    let settings = ConnectionSettings { max_connections: 0, timeouts: impatient(), tls: None };
    let server = Bare::start(settings).await;
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    // More than any buffer between the two holds.
    let requests = 64;
    let request = "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(requests);
    stream.write_all(request.as_bytes()).await.unwrap();
    // Writing on shows when the other end has gone.
    let began = Instant::now();
    while stream.write_all(b"\r\n").await.is_ok() {
        assert!(began.elapsed().as_secs() < 30, "it is never cut off");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut received = Vec::new();
    let _ = stream.read_to_end(&mut received).await;
    assert!(received.len() < requests << 20, "everything was sent");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_bound_wait() {
    let settings = ConnectionSettings {
        max_connections: 2,
        timeouts: pisync::config::http::Timeouts::default(),
        tls: None,
    };
    let server = Bare::start(settings).await;
    let ask = async || {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
        stream.write_all(b"HEAD / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        stream
    };
    let answered = async |stream: &mut TcpStream, within: Duration| {
        timeout(within, stream.read(&mut [0; 1024])).await.is_ok()
    };
    let patience = Duration::from_secs(30);
    let (mut one, mut two) = (ask().await, ask().await);
    assert!(answered(&mut one, patience).await && answered(&mut two, patience).await);
    let mut three = ask().await;
    assert!(!answered(&mut three, Duration::from_millis(300)).await);
    drop(one);
    assert!(answered(&mut three, patience).await);
    drop((two, three));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_beyond_the_bound_are_told_to_come_back() {
    let server = TestServer::on_sqlite(|settings| settings.max_requests = 2).await;
    let head = "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                expect: 100-continue\r\n";
    let event = event("pi").to_string();
    // Two bodies that are on their way.
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut connection = server.connect().await;
        connection.write(format!("{head}content-length: {}\r\n\r\n", event.len())).await;
        assert_eq!(connection.answer().await.status, 100);
        slow.push(connection);
    }
    let answer = server.get("/api/stats").await;
    assert_eq!(answer.error(503), "The server is overloaded, please try again later");
    assert!(answer.headers.contains_key("retry-after"));
    // How the server is can be asked all the same.
    server.get("/health/ready").await.json(200);
    for mut connection in slow {
        connection.write(&event).await;
        assert_eq!(connection.answer().await.status, 201);
    }
    server.get("/api/stats").await.data(200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_writes_lines_into_the_log() {
    for environment in ["development", "production"] {
        let program =
            Program::new().with("PORT", 0).with("APP_ENV", environment).with("LOG_LEVEL", "trace");
        let serving = program.serve(&[]);
        let client = &serving.client;
        let forged = "x\n2026-01-01T00:00:00Z  INFO pisync: FORGED\r\n{\"message\":\"FORGED\"}";
        client.report(&event(forged)).await.details();
        client.report(&with(event("pi"), &json!({"job": forged}))).await.details();
        client.report(&with(event("pi"), &json!({"metadata": {"note": forged}}))).await.data(201);
        client.post("/api/keys", &json!({"scope": "read", "name": forged})).await.details();
        let encoded =
            percent_encoding::utf8_percent_encode(forged, percent_encoding::NON_ALPHANUMERIC);
        client.get(&format!("/api/device/{encoded}")).await.details();
        client.get(&format!("/{encoded}")).await.error(404);
        client.get(&format!("/api/devices?q={encoded}&sort={encoded}")).await.details();
        let request = client.request(Method::GET, "/nothing").header("user-agent", "FORGED");
        send(request.header("x-request-id", "FORGED FORGED")).await.error(404);
        let said = serving.stop().stdout;
        for line in said.lines().filter(|line| line.contains("FORGED")) {
            // In one piece, within the path of a request.
            assert!(line.contains("%0A2026") && line.contains("request refused"), "{line}");
        }
        // Each line is JSON, which this reads; what is in them is the server's own.
        for line in program.log("combined.log") {
            assert_ne!(line["message"], "FORGED", "{line}");
        }
    }
}

/// Connections that a fleet behind a lossy network leaves behind.
const IDLE: usize = 10_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_idle_connections() {
    let program = Program::new().with("PORT", 0).with("LOG_DIR", "none");
    let serving = program.serve(&[]);
    let mut idle = Command::new(std::env::current_exe().unwrap())
        .args(["attacks::hold_idle_connections", "--exact", "--ignored", "--nocapture"])
        .env("IDLE_ADDRESS", serving.address().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(idle.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("holding")), "it cannot hold so many");
    let measured = async |name: &str| -> f64 {
        let metrics = serving.client.get("/metrics").await;
        let line =
            metrics.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap().parse().unwrap()
    };
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let expected = IDLE as f64;
    let began = Instant::now();
    while measured("process_open_fds").await < expected {
        assert!(began.elapsed().as_secs() < 20, "they are not all taken in");
    }
    // Devices report as ever.
    for number in 0..50 {
        let began = Instant::now();
        serving.client.store(&event(&format!("pi-{number}"))).await;
        assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    }
    let memory = measured("process_resident_memory_bytes").await;
    assert!(memory < 400e6, "{memory} bytes");
    drop(idle.stdin.take());
    assert!(idle.wait().unwrap().success());
    serving.stop();
}

/// The other end of the test above, in a process of its own: each end needs a file for each connection.
#[test]
#[ignore = "ten_thousand_idle_connections runs it"]
fn hold_idle_connections() {
    let address = std::env::var("IDLE_ADDRESS").unwrap();
    let limit = rlimit::increase_nofile_limit(IDLE as u64 + 200).unwrap();
    assert!(limit > IDLE as u64 + 50, "only {limit} open files are allowed; raise ulimit -Hn");
    let connections: Vec<_> =
        (0..IDLE).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    println!("\nholding {}", connections.len());
    // Until whoever asked for them has seen enough.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_forwarding_header_buys_nothing() {
    // Without a trusted proxy it is not believed: neither for the limits nor for who is at home.
    let server = TestServer::on_sqlite(|settings| settings.api_per_minute = 3).await;
    let ask = async |forged: &str| -> Value {
        let request = server.request(Method::GET, "/api/stats").header("x-forwarded-for", forged);
        json!(send(request).await.status)
    };
    for forged in ["127.0.0.1", "::1", "192.0.2.1", "192.0.2.2", "unknown"] {
        assert_eq!(ask(forged).await, 401, "{forged}");
    }
    // Nor does it cost the user at home anything; but whoever guesses keys has one account, whatever is forged.
    server.get("/api/stats").await.data(200);
    for (forged, expected) in [("::1", 401), ("192.0.2.1", 401), ("192.0.2.2", 429)] {
        let guess = server.with_key("psk_guess").request(Method::GET, "/api/stats");
        let answer = send(guess.header("x-forwarded-for", forged)).await;
        assert_eq!(answer.status, expected, "{forged}");
    }
    server.stop().await;
}
