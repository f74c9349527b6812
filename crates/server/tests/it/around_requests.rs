//! What happens around every request, whatever it asks for: routing, ids, headers, limits, time-outs,
//! measurements, documentation.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use flate2::read::GzDecoder;
use pisync::config::http::{AuthMode, Timeouts};
use reqwest::{Method, StatusCode, header::HeaderValue};
use serde_json::{Value, json};

use crate::{
    node_wire::HELMET,
    support::{
        events::at,
        http::{Answer, event, failure, send, with},
        server::TestServer,
    },
};

/// Every route, its methods, and a path to it.
const ROUTES: [(&str, &str, &[&str]); 19] = [
    ("/", "/", &["GET", "HEAD"]),
    ("/api", "/api", &["GET", "HEAD"]),
    ("/api/sync-event", "/api/sync-event", &["POST"]),
    ("/api/sync-events", "/api/sync-events", &["POST"]),
    ("/api/device/{device_id}", "/api/device/pi", &["DELETE", "GET", "HEAD", "PATCH"]),
    ("/api/device/{device_id}/sync-history", "/api/device/pi/sync-history", &["GET", "HEAD"]),
    ("/api/devices", "/api/devices", &["GET", "HEAD"]),
    ("/api/devices/repeated-failures", "/api/devices/repeated-failures", &["GET", "HEAD"]),
    ("/api/stats", "/api/stats", &["GET", "HEAD"]),
    ("/api/keys", "/api/keys", &["GET", "HEAD", "POST"]),
    ("/api/key/{key_id}", "/api/key/1", &["DELETE"]),
    ("/api/audit", "/api/audit", &["GET", "HEAD"]),
    ("/health", "/health", &["GET", "HEAD"]),
    ("/health/live", "/health/live", &["GET", "HEAD"]),
    ("/health/ready", "/health/ready", &["GET", "HEAD"]),
    ("/metrics", "/metrics", &["GET", "HEAD"]),
    ("/api-docs", "/api-docs", &["GET", "HEAD"]),
    ("/api-docs/openapi.json", "/api-docs/openapi.json", &["GET", "HEAD"]),
    ("/api-docs/{*rest}", "/api-docs/swagger-ui.css", &["GET", "HEAD"]),
];

fn method(name: &str) -> Method {
    name.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_methods_are_answered_405_with_allow() {
    let server = TestServer::on_sqlite(|_| {}).await;
    server.store(&event("pi")).await;
    for (route, path, allowed) in ROUTES {
        for name in ["GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"] {
            if allowed.contains(&name) {
                continue;
            }
            let answer = send(server.request(method(name), path)).await;
            assert_eq!(answer.status, 405, "{name} {route}: {}", answer.text());
            assert_eq!(answer.error(405), "Method not allowed", "{name} {route}");
            let allow: BTreeSet<_> = answer.header("allow").split(',').map(str::trim).collect();
            assert_eq!(allow, allowed.iter().copied().collect(), "{name} {route}");
        }
        // Who asks is told, too.
        let answer = send(server.request(Method::OPTIONS, path)).await;
        assert_eq!((answer.status, answer.body.len()), (204, 0), "{route}");
        let allow: BTreeSet<_> = answer.header("allow").split(',').map(str::trim).collect();
        assert_eq!(allow, allowed.iter().copied().collect(), "{route}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_routes_above_are_all_there_are() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let documented = server.get("/api").await.json(200)["endpoints"].take();
    let documented: BTreeSet<_> = documented.as_object().unwrap().keys().cloned().collect();
    let tested = ROUTES
        .iter()
        .filter(|(route, ..)| !route.starts_with("/api-docs"))
        .flat_map(|(route, _, methods)| methods.iter().map(move |method| (method, route)))
        .filter(|(method, _)| **method != "HEAD")
        .map(|(method, route)| format!("{method} {route}"))
        .collect();
    assert_eq!(documented, tested);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_paths_are_answered_404() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for name in ["GET", "POST", "DELETE", "OPTIONS", "BREW"] {
        for path in [
            "/nothing",
            "/api/sync-events/",
            "/API/Keys",
            "/api/device",
            "/api/device/pi/",
            "/api/device/pi/other",
            "/health/live/",
            "/metrics/",
            "//health",
            "/api//stats",
            "/api/sync%2Devent",
            "/api%2Fstats",
            "/favicon.ico",
            "/.env",
            "/api/device/a/b/sync-history",
        ] {
            let answer = send(server.request(method(name), path).body("{}")).await;
            assert_eq!(answer.error(404), "Route not found", "{name} {path}");
        }
    }
    for path in ["/api-docs/nothing.js", "/api-docs/../Cargo.toml", "/api-docs/%2e%2e/x"] {
        let mut connection = server.connect().await;
        connection.write(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.body.contains("Route not found"), "{path}: {}", answer.body);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn head_is_get_without_a_body() {
    let server = TestServer::on_sqlite(|_| {}).await;
    server.store(&event("pi")).await;
    for (route, path, allowed) in ROUTES {
        if !allowed.contains(&"HEAD") || route == "/metrics" {
            continue;
        }
        let get = server.get(path).await;
        let head = send(server.request(Method::HEAD, path)).await;
        assert_eq!(head.status, get.status, "{route}");
        assert!(head.body.is_empty(), "{route}");
        for name in ["content-type", "content-length"] {
            assert_eq!(head.headers.get(name), get.headers.get(name), "{name} of {route}");
        }
    }
    let missing = send(server.request(Method::HEAD, "/api/device/nobody")).await;
    assert_eq!((missing.status, missing.body.len()), (404, 0));
    server.stop().await;
}

/// Answers of every kind that a server with these settings gives.
async fn one_of_each(server: &TestServer) -> Vec<(String, Answer)> {
    let mut answers = Vec::new();
    let report = async |text: &str| server.report_text(text.to_owned()).await;
    answers.push(("stored".to_owned(), report(&event("pi").to_string()).await));
    answers.push(("wrong field".to_owned(), report("{}").await));
    answers.push(("malformed".to_owned(), report("{").await));
    answers.push(("too large".to_owned(), report(&" ".repeat(70_000)).await));
    let undeclared = send(server.request(Method::POST, "/api/sync-event").body("{}")).await;
    answers.push(("undeclared".to_owned(), undeclared));
    for (route, path, allowed) in ROUTES {
        if allowed.contains(&"GET") {
            answers.push((route.to_owned(), server.get(path).await));
        }
        answers.push((format!("PUT {route}"), send(server.request(Method::PUT, path)).await));
    }
    for path in [
        "/nothing",
        "/api/device/nobody",
        "/api/devices?limit=x",
        "/api-docs/",
        "/api-docs/nothing",
    ] {
        answers.push((path.to_owned(), server.get(path).await));
    }
    let statuses: BTreeSet<_> = answers.iter().map(|(_, answer)| answer.status).collect();
    assert_eq!(statuses, BTreeSet::from([200, 201, 303, 400, 404, 405, 413, 415]));
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn security_headers_are_on_every_answer() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for (what, answer) in one_of_each(&server).await {
        for (name, value) in HELMET {
            assert_eq!(answer.header(name), value, "{name} of {what}");
        }
        let policy = answer.header("content-security-policy");
        if what.starts_with("/api-docs") {
            assert!(policy.contains("script-src 'self';"), "{what}: {policy}");
        } else {
            let expected =
                "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
            assert_eq!(policy, expected, "{what}");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_has_an_id_of_its_own() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let answers = one_of_each(&server).await;
    let ids: BTreeSet<_> =
        answers.iter().map(|(_, answer)| answer.header("x-request-id")).collect();
    assert_eq!(ids.len(), answers.len());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clients_request_id_is_kept_when_it_is_sane() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let id_for = async |path: &str, id: HeaderValue| -> Vec<u8> {
        let request = server.request(Method::GET, path).header("x-request-id", id);
        send(request).await.headers["x-request-id"].as_bytes().to_vec()
    };
    let longest = "x".repeat(64);
    for id in ["1", "b5e4c1f0-7d3a-4f59-9a80-3a5d7a8b9c0d", "A.b_c:9-", &longest] {
        for path in ["/health", "/api/stats", "/nothing", "/api/device/nobody"] {
            let kept = id_for(path, HeaderValue::from_str(id).unwrap()).await;
            assert_eq!(kept, id.as_bytes(), "{path}");
        }
    }
    let too_long = "x".repeat(65);
    for id in ["", "two words", "a,b", "<script>", "a\"b", "a/b", "ü", &too_long] {
        let made = id_for("/api/stats", HeaderValue::from_bytes(id.as_bytes()).unwrap()).await;
        assert_ne!(made, id.as_bytes());
        assert!(made.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-'), "{made:?}");
    }
    server.stop().await;
}

const PAGE: &str = "https://fleet.example";

fn cross_origin_headers(answer: &Answer) -> Vec<String> {
    let names = answer.headers.keys().map(|name| name.as_str().to_owned());
    names.filter(|name| name.starts_with("access-control-")).collect()
}

/// An answer to a page of `origin`.
async fn from_page(server: &TestServer, origin: &str, method: Method, path: &str) -> Answer {
    send(server.request(method, path).header("origin", origin)).await
}

/// What a browser asks before it sends JSON.
async fn preflight(server: &TestServer, origin: &str) -> Answer {
    let request = server.request(Method::OPTIONS, "/api/sync-event").header("origin", origin);
    let request = request.header("access-control-request-method", "POST");
    send(request.header("access-control-request-headers", "content-type")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_other_origins_are_closed_out_by_default() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for origin in [PAGE, "null"] {
        let answer = preflight(&server, origin).await;
        assert_eq!(answer.status, 204);
        assert!(cross_origin_headers(&answer).is_empty());
        for path in ["/api/stats", "/nothing", "/api-docs/openapi.json"] {
            let answer = from_page(&server, origin, Method::GET, path).await;
            assert!(cross_origin_headers(&answer).is_empty(), "{path}");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_configured_origins_may_call() {
    let server = TestServer::on_sqlite(|settings| {
        settings.cors_origins =
            vec![HeaderValue::from_static(PAGE), HeaderValue::from_static("http://localhost:8080")];
        (settings.sync_per_minute, settings.api_per_minute) = (2, 5);
    })
    .await;
    for origin in [PAGE, "http://localhost:8080"] {
        let answer = preflight(&server, origin).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("access-control-allow-origin"), origin);
        let methods = answer.header("access-control-allow-methods");
        for method in ["GET", "POST", "PATCH", "DELETE"] {
            assert!(methods.contains(method), "{methods}");
        }
        assert!(answer.header("access-control-allow-headers").contains("content-type"));
        assert!(answer.headers.contains_key("x-request-id"));
    }
    // Nobody else, however alike.
    for origin in
        ["https://elsewhere.example", "http://fleet.example", "https://fleet.example:444", "null"]
    {
        let answer = preflight(&server, origin).await;
        assert!(!answer.headers.contains_key("access-control-allow-origin"), "{origin}");
    }
    // Preflights are not counted, nor what pages elsewhere try: the first five requests come after them. Then the
    // page is told, too.
    let foreign = from_page(&server, "https://elsewhere.example", Method::GET, "/api/stats").await;
    foreign.error(401);
    assert!(!foreign.headers.contains_key("access-control-allow-origin"));
    for (path, status) in [
        ("/api/stats", 200),
        ("/nothing", 404),
        ("/api/stats", 200),
        ("/api/stats", 200),
        ("/api/stats", 200),
        ("/api/stats", 429),
    ] {
        let answer = from_page(&server, PAGE, Method::GET, path).await;
        assert_eq!(answer.status, status, "{path}");
        assert_eq!(answer.header("access-control-allow-origin"), PAGE);
        let vary = answer.headers.get_all("vary");
        assert!(vary.iter().any(|name| name == "origin"), "caches must keep origins apart");
        assert!(!answer.headers.contains_key("access-control-allow-credentials"));
        let exposed = answer.header("access-control-expose-headers");
        for name in ["retry-after", "x-request-id", "ratelimit-remaining"] {
            assert!(exposed.contains(name), "{exposed}");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_answers_are_compressed_for_who_asks() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for device in 0..100 {
        server.store(&event(&format!("pi-{device}"))).await;
    }
    let path = "/api/devices?limit=1000";
    let plain = server.get(path).await;
    assert!(!plain.headers.contains_key("content-encoding"));
    for (asked, encoding) in
        [("gzip", "gzip"), ("br", ""), ("gzip, deflate, br", "gzip"), ("gzip;q=0, identity", "")]
    {
        let answer = send(server.request(Method::GET, path).header("accept-encoding", asked)).await;
        assert_eq!(answer.status, 200);
        if encoding.is_empty() {
            assert_eq!(answer.body, plain.body);
            continue;
        }
        assert_eq!(answer.header("content-encoding"), encoding, "{asked}");
        assert!(answer.header("vary").contains("accept-encoding"));
        assert_eq!(answer.header("content-type"), "application/json");
        assert!(answer.body.len() * 5 < plain.body.len(), "{asked}: {}", answer.body.len());
    }
    for client in [
        reqwest::Client::builder().no_proxy().no_brotli(),
        reqwest::Client::builder().no_proxy().no_gzip(),
    ] {
        let response = client.build().unwrap().get(server.url(path)).send().await.unwrap();
        assert_eq!(response.bytes().await.unwrap(), plain.body);
    }
    // The hot path's answer is too short to gain anything.
    let request = server.request(Method::POST, "/api/sync-event").json(&event("pi"));
    let answer = send(request.header("accept-encoding", "gzip, br")).await;
    assert!(!answer.headers.contains_key("content-encoding"));
    server.stop().await;
}

/// Asserts that a request was refused for being one too many, and gives the seconds to wait.
fn too_many(answer: &Answer, limit: u32) -> u32 {
    let error = "Too many requests from this IP, please try again later";
    assert_eq!(answer.error(429), error);
    assert_eq!(answer.header("ratelimit-limit"), limit.to_string());
    assert_eq!(answer.header("ratelimit-remaining"), "0");
    assert_eq!(answer.header("ratelimit-reset"), "60");
    assert_eq!(answer.header("ratelimit-policy"), format!("{limit};w=60"));
    assert!(answer.headers.contains_key("x-request-id"));
    answer.header("retry-after").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_requests_a_minute() {
    let server = TestServer::on_sqlite(|settings| {
        (settings.sync_per_minute, settings.api_per_minute) = (2, 3);
    })
    .await;
    server.report(&event("pi")).await.data(201);
    // What is refused counts, too.
    server.report(&json!({})).await.details();
    let wait = too_many(&server.report(&event("pi")).await, 2);
    assert!((1..=30).contains(&wait), "{wait}");
    // The rest of the API has an account of its own, for all of it together.
    for (request, remaining) in [
        (server.request(Method::GET, "/api/stats"), "2"),
        (server.request(Method::GET, "/nothing"), "1"),
        (server.request(Method::GET, "/api/sync-event"), "0"),
    ] {
        let answer = send(request).await;
        assert_ne!(answer.status, 429);
        assert_eq!(answer.header("ratelimit-remaining"), remaining);
    }
    for path in ["/", "/api", "/api/devices", "/nothing"] {
        let wait = too_many(&server.get(path).await, 3);
        assert!((1..=20).contains(&wait), "{wait}");
    }
    too_many(&server.delete("/api/device/pi").await, 3);
    for _ in 0..5 {
        for path in [
            "/health",
            "/health/live",
            "/health/ready",
            "/metrics",
            "/api-docs/",
            "/api-docs/openapi.json",
            "/api-docs/swagger-ui.css",
        ] {
            let answer = server.get(path).await;
            assert_eq!(answer.status, 200, "{path}");
            assert!(!answer.headers.contains_key("ratelimit-limit"), "{path}");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_limit_at_all() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for _ in 0..100 {
        let answer = server.get("/api/stats").await;
        assert_eq!(answer.status, 200);
        assert!(!answer.headers.contains_key("ratelimit-limit"));
    }
    server.stop().await;
}

/// The status of a request that a proxy says it passes on.
async fn passed_on(server: &TestServer, header: &'static str, value: &str) -> u16 {
    send(server.request(Method::GET, "/api/stats").header(header, value)).await.status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trusted_proxy_is_believed() {
    let server = TestServer::on_sqlite(|settings| {
        settings.api_per_minute = 1;
        settings.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
        settings.auth = AuthMode::Off;
    })
    .await;
    let x = "x-forwarded-for";
    assert_eq!(passed_on(&server, x, "192.0.2.1").await, 200);
    assert_eq!(passed_on(&server, x, "192.0.2.1").await, 429);
    assert_eq!(passed_on(&server, x, "192.0.2.2").await, 200);
    // What stands before the client's own address is the client's word.
    assert_eq!(passed_on(&server, x, "192.0.2.99, 192.0.2.1").await, 429);
    assert_eq!(passed_on(&server, x, "192.0.2.1, 192.0.2.3").await, 200);
    // Through another trusted proxy.
    assert_eq!(passed_on(&server, x, "192.0.2.3, 127.0.0.9").await, 429);
    assert_eq!(passed_on(&server, "forwarded", "for=192.0.2.4;proto=https").await, 200);
    assert_eq!(passed_on(&server, "forwarded", "for=\"192.0.2.4:4711\"").await, 429);
    // The proxy itself.
    assert_eq!(server.get("/api/stats").await.status, 200);
    assert_eq!(server.get("/api/stats").await.status, 429);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anybody_else_is_not_believed() {
    let server = TestServer::on_sqlite(|settings| {
        settings.api_per_minute = 1;
        settings.trusted_proxies = vec!["192.0.2.0/24".parse().unwrap()];
        settings.auth = AuthMode::Off;
    })
    .await;
    assert_eq!(passed_on(&server, "x-forwarded-for", "203.0.113.1").await, 200);
    assert_eq!(passed_on(&server, "x-forwarded-for", "203.0.113.2").await, 429);
    assert_eq!(passed_on(&server, "forwarded", "for=203.0.113.3").await, 429);
    server.stop().await;
}

/// A server with little patience for one of the two.
async fn impatient(adjust: impl FnOnce(&mut Timeouts)) -> TestServer {
    TestServer::on_sqlite(|settings| adjust(&mut settings.timeouts)).await
}

const LITTLE: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sends_no_head_is_cut_off() {
    let server = impatient(|timeouts| (timeouts.head, timeouts.idle) = (LITTLE, LITTLE)).await;
    for start in ["", "GET /heal", "GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: "] {
        let mut connection = server.connect().await;
        connection.write(start).await;
        let last_words = connection.rest().await;
        assert!(!last_words.contains("200 OK"), "{start}: {last_words}");
    }
    // Also who has been answered and says nothing more.
    let mut connection = server.connect().await;
    connection.write("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    assert_eq!(connection.answer().await.status, 200);
    assert_eq!(connection.rest().await, "");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_body_is_answered_408() {
    let server = impatient(|timeouts| timeouts.body = LITTLE).await;
    let head =
        "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    for body in [
        "content-length: 100\r\n\r\n{\"device_id\"",
        "transfer-encoding: chunked\r\n\r\n3\r\n{\"d\r\n",
    ] {
        let mut connection = server.connect().await;
        connection.write(format!("{head}{body}")).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 408);
        let error = "The request's body did not arrive in time";
        let json: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(json, json!({"success": false, "error": error, "code": "body_timeout"}));
        assert!(answer.head.contains("\r\nconnection: close\r\n"), "{}", answer.head);
        assert_eq!(connection.rest().await, "");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_ends_early_is_not_stored() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let head =
        "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    let event = event("pi").to_string();
    // The JSON is complete; what it was announced as is not.
    for framing in [
        format!("content-length: {}\r\n\r\n{event}", event.len() + 1),
        format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n{event}\r\n", event.len()),
    ] {
        let mut connection = server.connect().await;
        connection.write(format!("{head}{framing}")).await;
        connection.finish_writing().await;
        let last_words = connection.rest().await;
        assert!(!last_words.contains("201 Created"), "{last_words}");
    }
    // Nobody is left to answer.
    let mut connection = server.connect().await;
    connection.write(format!("{head}content-length: 1000\r\n\r\n{event}")).await;
    drop(connection);
    assert_eq!(server.get("/api/stats").await.data(200)["total_sync_events"], 0);
    let database = server.stop().await;
    let again = TestServer::start(database).await;
    assert_eq!(again.get("/api/stats").await.data(200)["total_sync_events"], 0);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_carries_many_requests() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let post = |headers: &str, body: &str| {
        format!("POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n{body}")
    };
    let event = event("pi").to_string();
    let length = format!("content-length: {}\r\n", event.len());
    let declared = format!("content-type: application/json\r\n{length}");
    let chunked = format!(
        "{:x}\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n",
        10,
        &event[..10],
        event.len() - 10,
        &event[10..]
    );
    let requests = [
        (post(&declared, &event), 201),
        (post("content-type: application/json\r\ntransfer-encoding: chunked\r\n", &chunked), 201),
        // Bodies that nobody reads must not be taken for the next request.
        (post(&length, &event), 415),
        (post(&declared, &event).replace("/api/sync-event", "/nothing"), 404),
        (post(&declared, &event).replace("POST", "PUT"), 405),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(), 200),
        (post(&declared, &event.replace("pi", "!\u{7f}")), 400),
        (post(&declared, &event), 201),
    ];
    let mut connection = server.connect().await;
    for (request, status) in &requests {
        connection.write(request).await;
        assert_eq!(connection.answer().await.status, *status, "{request}");
    }
    // All at once, before any answer.
    let mut connection = server.connect().await;
    connection.write(requests.clone().map(|(request, _)| request).concat()).await;
    for (request, status) in &requests {
        assert_eq!(connection.answer().await.status, *status, "{request}");
    }
    assert_eq!(server.get("/api/stats").await.data(200)["total_sync_events"], 6);
    server.stop().await;
}

/// The value of a sample in Prometheus' text.
#[track_caller]
fn sample(metrics: &str, name: &str) -> f64 {
    let lines: Vec<_> =
        metrics.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).collect();
    assert_eq!(lines.len(), 1, "{name} in\n{metrics}");
    lines[0].parse().unwrap()
}

/// A server that has seen a bit of everything, and what it measured.
async fn measured() -> (TestServer, String) {
    let server = TestServer::on_sqlite(|_| {}).await;
    for second in [-3, -2] {
        server.store(&with(event("ok"), &json!({"timestamp": at(second)}))).await;
    }
    server.store(&event("also-ok")).await;
    server.store(&failure("failing", at(-1))).await;
    server.report(&json!({})).await.details();
    for device in ["ok", "failing", "nobody", "%00"] {
        server.get(&format!("/api/device/{device}")).await;
    }
    for number in 0..20 {
        server.get(&format!("/{number}")).await.error(404);
        let method = method(&format!("METHOD{number}"));
        send(server.request(method, "/api/stats")).await.error(405);
    }
    let answer = server.get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    (server, answer.text().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn measurements_add_up() {
    let (server, metrics) = measured().await;
    let requests = |method: &str, route: &str, status: u16| {
        let name = "http_requests_total";
        sample(
            &metrics,
            &format!("{name}{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}}"),
        )
    };
    assert_eq!(requests("POST", "/api/sync-event", 201), 4.0);
    assert_eq!(requests("POST", "/api/sync-event", 400), 1.0);
    assert_eq!(requests("GET", "/api/device/{device_id}", 200), 2.0);
    assert_eq!(requests("GET", "/api/device/{device_id}", 404), 1.0);
    assert_eq!(requests("GET", "/api/device/{device_id}", 400), 1.0);
    assert_eq!(requests("GET", "unmatched", 404), 20.0);
    assert_eq!(requests("OTHER", "/api/stats", 405), 20.0);
    for (name, expected) in [
        ("http_request_duration_seconds_count{method=\"POST\",route=\"/api/sync-event\"}", 5.0),
        (
            "http_request_duration_seconds_bucket{method=\"POST\",route=\"/api/sync-event\",le=\"+Inf\"}",
            5.0,
        ),
        ("pisync_sync_events_total{result=\"ok\"}", 3.0),
        ("pisync_sync_events_total{result=\"failed\"}", 1.0),
        ("pisync_ingest_batch_events_count", 4.0),
        ("pisync_ingest_batch_events_sum", 4.0),
        ("pisync_ingest_batch_duration_seconds_count", 4.0),
        ("pisync_ingest_queue_events", 0.0),
        ("pisync_devices", 3.0),
        ("pisync_active_devices", 3.0),
        ("pisync_sync_success_ratio", 0.75),
        ("pisync_database_connections{state=\"waiting\"}", 0.0),
    ] {
        assert_eq!(sample(&metrics, name), expected, "{name}");
    }
    let version = format!("pisync_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(sample(&metrics, &version), 1.0);
    for name in [
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_start_time_seconds",
        "pisync_database_connections{state=\"max\"}",
    ] {
        assert!(sample(&metrics, name) >= 1.0, "{name}");
    }
    // Whatever is asked for, there are only so many labels.
    for label in ["/0", "/19", "METHOD", "nobody"] {
        assert!(!metrics.contains(label), "{label}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_has_nothing_to_find_fault_with() {
    let program = Path::new("/usr/bin/promtool");
    assert!(
        program.exists(),
        "{} is missing: run ./scripts/test, which sees to it",
        program.display()
    );
    let (server, metrics) = measured().await;
    let mut promtool = Command::new(program)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.status.success() && said.is_empty(), "{said}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_is_served() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let served = server.get("/api-docs/openapi.json").await.json(200);
    let made: Value = serde_json::from_str(&pisync::api::openapi_json().unwrap()).unwrap();
    assert_eq!(served, made);
    server.stop().await;
}

#[test]
fn docs_openapi_json_is_current() {
    let path: PathBuf =
        [env!("CARGO_MANIFEST_DIR"), "..", "..", "docs", "openapi.json"].iter().collect();
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == pisync::api::openapi_json().unwrap(),
        "docs/openapi.json is out of date: run `cargo run -- openapi > docs/openapi.json`"
    );
}

/// The values of an attribute in a page.
fn attributes<'a>(page: &'a str, name: &str) -> Vec<&'a str> {
    page.split(&format!(" {name}=\""))
        .skip(1)
        .map(|rest| rest.split_once('"').expect("the closing quote").0)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documentation_needs_nothing_from_elsewhere() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let redirect = server.get("/api-docs").await;
    assert!(StatusCode::from_u16(redirect.status).unwrap().is_redirection());
    assert_eq!(redirect.header("location"), "/api-docs/");
    let page = server.get("/api-docs/").await;
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").starts_with("text/html"));
    let policy = page.header("content-security-policy");
    for source in policy.split(';').flat_map(|directive| directive.split_whitespace().skip(1)) {
        let is_own = ["'none'", "'self'", "data:"].contains(&source);
        assert!(is_own || source.starts_with("'sha256-"), "{policy}");
    }
    let html = page.text();
    assert!(!html.contains("//"), "{html}");
    // The policy forbids scripts in the page itself.
    assert_eq!(html.matches("<script").count(), attributes(html, "src").len(), "{html}");
    assert_eq!(page.header("cache-control"), "no-cache");
    let files = [attributes(html, "src"), attributes(html, "href")].concat();
    assert!(files.len() >= 4, "{files:?}");
    let mut bytes = 0;
    for file in files {
        let file = file.trim_start_matches("./");
        let media_type = match file.rsplit_once('.').unwrap().1 {
            "js" => "text/javascript",
            "css" => "text/css",
            "png" => "image/png",
            other => panic!("what is {other}?"),
        };
        let answer = server.get(&format!("/api-docs/{file}")).await;
        assert_eq!(answer.status, 200, "{file}");
        assert!(answer.header("content-type").starts_with(media_type), "{file}: {answer:?}");
        assert!(!answer.body.is_empty(), "{file}");
        // Its name has its hash in it: a browser loads it once, and compressed.
        assert_eq!(answer.header("cache-control"), "public, max-age=31536000, immutable", "{file}");
        let request = server.request(Method::GET, &format!("/api-docs/{file}"));
        let compressed = send(request.header("accept-encoding", "br, gzip")).await;
        bytes += compressed.body.len();
        if media_type.starts_with("text/") && answer.body.len() > 512 {
            assert_eq!(compressed.header("content-encoding"), "gzip", "{file}");
            assert_eq!(compressed.header("vary"), "accept-encoding", "{file}");
            let mut plain = Vec::new();
            GzDecoder::new(&*compressed.body).read_to_end(&mut plain).unwrap();
            assert_eq!(plain, answer.body, "{file}");
        }
        // The plain name may stand for another version after an upgrade.
        let parts: Vec<_> = file.split('.').collect();
        let [stem @ .., _hash, extension] = &parts[..] else { panic!("{file}") };
        let plain = format!("/api-docs/{}.{extension}", stem.join("."));
        let current = server.get(&plain).await;
        assert_eq!(current.body, answer.body, "{plain}");
        assert_eq!(current.header("cache-control"), "no-cache", "{plain}");
        let etag = current.header("etag").to_owned();
        let request = server.request(Method::GET, &plain).header("if-none-match", etag);
        let unchanged = send(request).await;
        assert_eq!((unchanged.status, unchanged.body.len()), (304, 0), "{plain}");
    }
    assert!(bytes < 700 << 10, "the page loads {bytes} bytes");
    let initializer = server.get("/api-docs/swagger-initializer.js").await;
    assert!(initializer.text().contains("\"/api-docs/openapi.json\""), "{}", initializer.text());
    assert!(!initializer.text().contains("://"), "{}", initializer.text());
    server.stop().await;
}
