//! What Express and its body parser took besides the usual: other spellings of paths, compressed bodies, other
//! encodings of text. Devices in the field rely on it and cannot be changed. Recorded with Express 5 and, where
//! that differs, Express 4; `node_wire` has what they are answered.

use pisync::{http::AuthMode, store::Scope};
use reqwest::{Method, header::HeaderValue};
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, Client, event, send, success, with},
    server::TestServer,
    store::{TestDatabase, wish},
};

both_stores!(other_spellings_of_paths_are_served, an_empty_array_is_empty_metadata,);

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
    let (_, ingest) = server.database.make_key(wish(Scope::Ingest)).await;
    let (_, read) = server.database.make_key(wish(Scope::Read)).await;
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
