//! What Express and its body parser took besides the usual: other spellings of paths, compressed bodies, other
//! encodings of text. Devices in the field rely on it and cannot be changed. Recorded with Express 5 and, where
//! that differs, Express 4; `node_wire` has what they are answered.

use std::io::Write as _;

use pisync::{config::http::AuthMode, store::Scope};
use reqwest::{Method, header::HeaderValue};
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, Client, event, send, success, with},
    server::TestServer,
    store::{TestDatabase, key_request},
};

both_stores!(
    other_spellings_of_paths_are_served,
    an_empty_array_is_empty_metadata,
    compressed_events_are_stored,
);

/// Each of the Node service's endpoints but `/`, in spellings that Express took.
const SPELLINGS: [(&str, &str, &[&str]); 6] = [
    ("POST", "/api/sync-event", &["/api/sync-event/", "/API/Sync-Event", "/Api/SYNC-EVENT/"]),
    (
        "GET",
        "/api/device/Pi-7/sync-history",
        &[
            "/api/device/Pi-7/sync-history/",
            "/API/Device/Pi-7/Sync-History",
            "/api/device/%50i-7/SYNC-HISTORY/",
        ],
    ),
    (
        "GET",
        "/api/devices/repeated-failures",
        &["/api/devices/repeated-failures/", "/api/Devices/Repeated-Failures"],
    ),
    ("GET", "/api/stats", &["/api/stats/", "/API/STATS", "/Api/Stats/"]),
    ("GET", "/health", &["/health/", "/Health", "/HEALTH/"]),
    ("GET", "/api", &["/api/", "/API", "/Api/"]),
];

/// All other spellings, with their method and the usual one.
fn spellings() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    SPELLINGS
        .into_iter()
        .flat_map(|(method, path, others)| others.iter().map(move |other| (method, path, *other)))
}

async fn ask(client: &Client, method: &str, path: &str) -> Answer {
    let request = client.request(method.parse().unwrap(), path);
    send(if method == "POST" { request.json(&event("Pi-7")) } else { request }).await
}

async fn other_spellings_of_paths_are_served(server: &TestServer) {
    server.store(&event("Pi-7")).await;
    server.store(&event("pi-7")).await;
    for (method, path, other) in spellings().filter(|(method, ..)| *method == "GET") {
        let usual = ask(server, method, path).await.json(200);
        assert_eq!(ask(server, method, other).await.json(200), usual, "{other}");
        let head = send(server.request(Method::HEAD, other)).await;
        assert_eq!(head.status, 200, "HEAD {other}");
    }
    let mut stored = 1;
    for (method, _, other) in spellings().filter(|(method, ..)| *method == "POST") {
        ask(server, method, other).await.data(201);
        stored += 1;
        // The device's own letters and the query stay as they are.
        let history = server.get("/API/device/Pi-7/sync-history/?LIMIT=1&limit=2").await.data(200);
        assert_eq!(history["pagination"]["total_events"], stored);
        assert_eq!(history["pagination"]["limit"], 2);
    }
    let small = server.get("/api/device/pi-7/Sync-History/").await.data(200);
    assert_eq!(small["pagination"]["total_events"], 1);
    let complaints = server.get("/Api/Stats/?window=1h").await.complaints();
    assert_eq!(complaints, ["\"window\" must be one of [24h, 7d, 30d]"]);
}

/// PHP has one kind of array, and writes an empty one as a list.
async fn an_empty_array_is_empty_metadata(server: &TestServer) {
    for text in ["[]", "[ ]"] {
        let body = event("php").to_string().replacen('{', &format!("{{\"metadata\":{text},"), 1);
        let stored = server.report_text(body).await.data(201);
        assert_eq!(stored["metadata"], json!({}));
    }
    let dated = with(success("php", at(-60)), &json!({"metadata": [], "clock": "unsynced"}));
    assert_eq!(server.store(&dated).await["metadata"], json!({"device_timestamp": at(-60)}));
    let history = server.get("/api/device/php/sync-history").await.data(200);
    let kept: Vec<&Value> = history["sync_history"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| &event["metadata"])
        .collect();
    assert!(kept.contains(&&json!({})), "{kept:?}");
    let batch = json!([with(event("php"), &json!({"metadata": []}))]);
    assert_eq!(server.post("/api/sync-events", &batch).await.data(200)["accepted"], 1);
    let refused = server.report(&with(event("php"), &json!({"metadata": [1]}))).await;
    assert_eq!(refused.complaints(), ["\"metadata\" must be of type object"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_spelling_opens_nothing() {
    let server = TestServer::start_with(TestDatabase::sqlite(), |settings| {
        settings.http.auth = AuthMode::Required;
    })
    .await;
    let (_, ingest) = server.database.make_key(key_request(Scope::Ingest)).await;
    let (_, read) = server.database.make_key(key_request(Scope::Read)).await;
    let (ingest, read) = (server.with_key(&ingest), server.with_key(&read));
    let began = std::time::Instant::now();
    while read.get("/api/stats").await.status == 401
        || ask(&ingest, "POST", "/api/sync-event").await.status == 401
    {
        assert!(began.elapsed().as_secs() < 30, "the keys are not known");
    }
    for (method, path, other) in spellings() {
        for client in [&*server, &server.with_key("psk_wrong"), &ingest, &read] {
            let usual = ask(client, method, path).await.status;
            assert_eq!(ask(client, method, other).await.status, usual, "{method} {other}");
        }
        let expected = if path == "/health" { 200 } else { 401 };
        assert_eq!(ask(&server, method, other).await.status, expected, "{method} {other}");
    }
    // Endpoints that the Node service did not have are known by one spelling, to proxies' rules as well.
    for path in [
        "/API/Keys",
        "/api/keys/",
        "/api/Audit",
        "/api/device/Pi-7/",
        "/Metrics",
        "/api/sync-events/",
    ] {
        assert_eq!(server.get(path).await.error(404), "Route not found", "{path}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_spelling_is_counted_measured_and_protected_as_the_usual_one() {
    let server = TestServer::on_sqlite(|settings| {
        (settings.sync_per_minute, settings.api_per_minute) = (50, 60);
        settings.cors_origins = vec![HeaderValue::from_static("https://fleet.example")];
    })
    .await;
    for (method, path, other) in spellings() {
        let usual = ask(&server, method, path).await;
        let answer = ask(&server, method, other).await;
        let policy = |answer: &Answer| answer.headers.get("content-security-policy").cloned();
        assert_eq!(policy(&answer), policy(&usual), "{other}");
        assert!(answer.headers.contains_key("x-request-id"), "{other}");
        let left = |answer: &Answer| -> Option<i32> {
            Some(answer.headers.get("ratelimit-remaining")?.to_str().unwrap().parse().unwrap())
        };
        assert_eq!(left(&answer), left(&usual).map(|left| left - 1), "{other}");
        assert_eq!(answer.headers.get("ratelimit-limit"), usual.headers.get("ratelimit-limit"));
        let put = send(server.request(Method::PUT, other)).await;
        put.error(405);
        assert_eq!(
            put.headers.get("allow"),
            send(server.request(Method::PUT, path)).await.headers.get("allow"),
            "{other}"
        );
        let preflight =
            server.request(Method::OPTIONS, other).header("origin", "https://fleet.example");
        let preflight = send(preflight.header("access-control-request-method", method)).await;
        assert_eq!(preflight.header("access-control-allow-origin"), "https://fleet.example");
        assert_eq!(preflight.headers.get_all("x-request-id").iter().count(), 1, "layers run once");
    }
    let metrics = server.get("/metrics").await;
    for line in metrics.text().lines().filter(|line| line.starts_with("http_requests_total")) {
        let route = line.split("route=\"").nth(1).unwrap().split('"').next().unwrap();
        assert!(!route.ends_with('/') && route == route.to_lowercase(), "{line}");
        assert_ne!(route, "unmatched", "{line}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_targets_that_express_took_and_no_others() {
    let server = TestServer::on_sqlite(|_| {}).await;
    server.store(&event("a/b")).await;
    for (target, status) in [
        ("http://localhost/API/Stats/", 200),
        ("/health/?", 200),
        ("/api/device/a%2Fb/Sync-History/", 200),
        ("/api/device/%ff/Sync-History/", 400),
        ("//health", 404),
        ("/health//", 404),
        ("/api//stats", 404),
        ("/api/./stats/", 404),
        ("/he%61lth", 404),
        ("/api%2Fstats", 404),
        ("/api/stats%2F", 404),
        // Refused for the empty name, as the usual spelling is.
        ("/api/device//sync-history", 400),
        ("/api/device/a/b/sync-history/", 404),
    ] {
        let mut connection = server.connect().await;
        connection.write(format!("GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, status, "{target}: {}", answer.body);
    }
    server.stop().await;
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn deflate(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 3).unwrap()
}

/// The answer to one event whose body is compressed like this.
async fn report_as(client: &Client, encoding: &str, body: Vec<u8>) -> Answer {
    let request = client.request(Method::POST, "/api/sync-event");
    let request = request.header("content-type", "application/json");
    send(request.header("content-encoding", encoding).body(body)).await
}

async fn compressed_events_are_stored(server: &TestServer) {
    let text = with(event("pi"), &json!({"metadata": {"a": [1, 2]}})).to_string();
    let body = text.as_bytes();
    let mut stored = 0;
    for (encoding, body) in [
        ("gzip", gzip(body)),
        ("GZIP", gzip(body)),
        ("x-gzip", gzip(body)),
        ("deflate", deflate(body)),
        ("zstd", zstd(body)),
        ("identity", body.to_vec()),
        ("gzip", [gzip(&body[..20]), gzip(&body[20..])].concat()),
        ("gzip", gzip(format!("\u{feff}{text}").as_bytes())),
    ] {
        let data = report_as(server, encoding, body).await.data(201);
        assert_eq!(data["metadata"], json!({"a": [1, 2]}), "{encoding}");
        stored += 1;
    }
    let refused = report_as(server, "gzip", gzip(b"{}")).await.details();
    assert_eq!(refused.as_array().unwrap().len(), 4);
    let total = server.get("/api/stats").await.data(200)["total_sync_events"].take();
    assert_eq!(total, stored);
}

type Compress = fn(&[u8]) -> Vec<u8>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_events_are_bounded_and_named_for_what_is_wrong_with_them() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let text = event("pi").to_string();
    let padded = |bytes: usize| format!("{text}{}", " ".repeat(bytes - text.len())).into_bytes();
    let compress: [Compress; 3] = [gzip, deflate, zstd];
    for (encoding, compress) in ["gzip", "deflate", "zstd"].into_iter().zip(compress) {
        // Counted once decompressed, as a plain body is.
        report_as(&server, encoding, compress(&padded(65_536))).await.data(201);
        for bytes in [65_537, 50 << 20] {
            let answer = report_as(&server, encoding, compress(&padded(bytes))).await;
            let too_large = "The request's body is larger than 65536 bytes";
            assert_eq!(answer.error(413), too_large, "{encoding}");
        }
        let whole = compress(text.as_bytes());
        let cut = report_as(&server, encoding, whole[..whole.len() - 9].to_vec()).await;
        let ended_early = "The request's body cannot be read: it ended early";
        assert_eq!(cut.error(400), ended_early, "{encoding}");
        let plain = report_as(&server, encoding, text.clone().into_bytes()).await.error(400);
        assert!(plain.starts_with("The request's body cannot be read: "), "{encoding}: {plain}");
        let garbage = [whole, b"garbage".repeat(10)].concat();
        let error = report_as(&server, encoding, garbage).await.error(400);
        assert!(error.starts_with("The request's body cannot be read: "), "{encoding}: {error}");
        let broken = report_as(&server, encoding, compress(b"{\"a\"")).await.error(400);
        assert!(broken.starts_with("Malformed JSON: EOF"), "{encoding}: {broken}");
    }
    // It may not be larger than what it holds for nothing, either.
    let noise = vec![b'x'; 1 << 20];
    assert_eq!(report_as(&server, "gzip", noise).await.status, 413);
    let expected = "Unsupported media type: Content-Encoding may be gzip, deflate or zstd";
    for encoding in ["br", "compress", "gzip, identity", "gzip, gzip", "", "zip"] {
        let answer = report_as(&server, encoding, gzip(text.as_bytes())).await;
        assert_eq!(answer.error(415), expected, "{encoding:?}");
    }
    // Said twice, it may be meant twice.
    let request = server.request(Method::POST, "/api/sync-event");
    let request = request.header("content-type", "application/json");
    let request = request.header("content-encoding", "gzip").header("content-encoding", "zstd");
    assert_eq!(send(request.body(gzip(text.as_bytes()))).await.error(415), expected);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encodings_of_text_that_are_declared_are_read() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let report = async |content_type: &str, body: Vec<u8>| {
        let request = server.request(Method::POST, "/api/sync-event");
        send(request.header("content-type", content_type).body(body)).await
    };
    let text = event("Ger\u{e4}t \u{1f600}").to_string();
    let utf16 =
        |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_le_bytes).collect() };
    for (charset, body) in [
        ("", text.clone().into_bytes()),
        (";", text.clone().into_bytes()),
        ("; charset=", text.clone().into_bytes()),
        ("; charset=utf-8", text.clone().into_bytes()),
        (";charset=\"UTF-8\"", text.clone().into_bytes()),
        (" ; charset=utf8; x=y", text.clone().into_bytes()),
        ("; charset=utf-16", utf16(&text)),
        ("; charset=UTF-16LE", utf16(&format!("\u{feff}{text}"))),
    ] {
        let stored = report(&format!("application/json{charset}"), body).await.data(201);
        assert_eq!(stored["device_id"], "Ger\u{e4}t \u{1f600}", "{charset}");
    }
    for charset in ["iso-8859-1", "windows-1252", "utf-32"] {
        let answer =
            report(&format!("application/json; charset={charset}"), text.clone().into()).await;
        assert_eq!(
            answer.error(415),
            "Unsupported media type: send UTF-8, with Content-Type: application/json; charset=utf-8",
            "{charset}"
        );
    }
    let wrong = report("application/json; charset=utf-16", b"{} ".to_vec()).await.error(400);
    assert!(wrong.contains("it is not the UTF-16 that it is declared to be"), "{wrong}");
    let batch = server.request(Method::POST, "/api/sync-events");
    let batch = batch.header("content-type", "application/json; charset=utf-16").body(utf16("[]"));
    assert_eq!(send(batch).await.status, 415);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ways_to_send_a_body() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let body = event("pi").to_string();
    let length = body.len();
    let chunks = format!("5\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n", &body[..5], length - 5, &body[5..]);
    let begin =
        "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    for request in [
        format!("{begin}content-length: {length}\r\n\r\n{body}"),
        format!("\r\n{begin}content-length: {length}\r\n\r\n{body}"),
        format!("{begin}transfer-encoding: chunked\r\n\r\n{chunks}"),
    ] {
        let mut connection = server.connect().await;
        connection.write(&request).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 201, "{request}: {}", answer.body);
    }
    // Who waits for leave gets it.
    let mut connection = server.connect().await;
    let head = format!("{begin}content-length: {length}\r\nexpect: 100-continue\r\n\r\n");
    connection.write(head).await;
    assert_eq!(connection.answer().await.status, 100);
    connection.write(&body).await;
    assert_eq!(connection.answer().await.status, 201);
    server.stop().await;
}
