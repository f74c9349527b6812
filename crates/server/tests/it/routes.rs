//! Which routes there are, and what every answer of any of them carries: an id, security headers, compression.

use std::collections::BTreeSet;

use reqwest::{Method, header::HeaderValue};

use crate::node_wire::HELMET;
use crate::support::http::{Answer, client_builder, event, send};
use crate::support::server::TestServer;

/// Every route, its methods, and a path to it.
const ROUTES: [(&str, &str, &[&str]); 37] = [
    ("/", "/", &["GET", "HEAD"]),
    ("/api", "/api", &["GET", "HEAD"]),
    ("/api/sync-event", "/api/sync-event", &["POST"]),
    ("/api/sync-events", "/api/sync-events", &["POST"]),
    ("/api/device/{device_id}", "/api/device/pi", &["DELETE", "GET", "HEAD", "PATCH", "PUT"]),
    ("/api/device/{device_id}/sync-history", "/api/device/pi/sync-history", &["GET", "HEAD"]),
    ("/api/device/{device_id}/explain", "/api/device/pi/explain", &["GET", "HEAD"]),
    ("/api/devices", "/api/devices", &["GET", "HEAD", "PUT"]),
    ("/api/devices/repeated-failures", "/api/devices/repeated-failures", &["GET", "HEAD"]),
    ("/api/stats", "/api/stats", &["GET", "HEAD"]),
    ("/api/groups", "/api/groups", &["GET", "HEAD"]),
    ("/api/group/{name}", "/api/group/school", &["DELETE", "PATCH", "PUT"]),
    ("/api/fleet", "/api/fleet", &["GET", "HEAD", "PATCH"]),
    ("/api/windows", "/api/windows", &["GET", "HEAD", "POST"]),
    ("/api/window/{window_id}", "/api/window/1", &["DELETE", "PUT"]),
    ("/api/channels", "/api/channels", &["GET", "HEAD", "POST"]),
    ("/api/channel/{channel_id}", "/api/channel/1", &["DELETE", "GET", "HEAD", "PATCH", "PUT"]),
    ("/api/channel/{channel_id}/rotate-secret", "/api/channel/1/rotate-secret", &["POST"]),
    ("/api/channel/{channel_id}/test", "/api/channel/1/test", &["POST"]),
    ("/api/routes", "/api/routes", &["GET", "HEAD", "PUT"]),
    ("/api/notifications", "/api/notifications", &["GET", "HEAD"]),
    ("/api/notification/{notification_id}/retry", "/api/notification/1/retry", &["POST"]),
    ("/api/keys", "/api/keys", &["GET", "HEAD", "POST"]),
    ("/api/key/{key_id}", "/api/key/1", &["DELETE"]),
    ("/api/audit", "/api/audit", &["GET", "HEAD"]),
    ("/api/sync-start", "/api/sync-start", &["POST"]),
    ("/api/incidents", "/api/incidents", &["GET", "HEAD"]),
    ("/api/incident/{incident_id}", "/api/incident/1", &["GET", "HEAD"]),
    ("/api/incident/{incident_id}/acknowledge", "/api/incident/1/acknowledge", &["DELETE", "POST"]),
    ("/health", "/health", &["GET", "HEAD"]),
    ("/health/live", "/health/live", &["GET", "HEAD"]),
    ("/health/ready", "/health/ready", &["GET", "HEAD"]),
    ("/metrics", "/metrics", &["GET", "HEAD"]),
    ("/api-docs", "/api-docs", &["GET", "HEAD"]),
    ("/api-docs/", "/api-docs/", &["GET", "HEAD"]),
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
    for path in
        ["/api-docs/nothing.js", "/api-docs/%ff", "/api-docs/../Cargo.toml", "/api-docs/%2e%2e/x"]
    {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_answers_are_compressed_for_who_asks() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for device in 0..100 {
        server.store(&event(&format!("pi-{device}"))).await;
    }
    let path = "/api/devices?limit=1000";
    let plain = server.get(path).await;
    assert!(!plain.headers.contains_key("content-encoding"));
    for (asked, encoding) in [
        ("gzip", "gzip"),
        ("br", ""),
        ("gzip, deflate, br", "gzip"),
        ("gzip;q=0, identity", ""),
        // Nobody is refused: a change would have been made by then.
        ("identity;q=0", ""),
        ("*;q=0", ""),
        ("br;q=1.0, Identity;q=0, *;q=0.0", ""),
        ("gzip;q=0.5, identity;q=0", "gzip"),
    ] {
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
    for client in [client_builder().no_proxy().no_brotli(), client_builder().no_proxy().no_gzip()] {
        let response = client.build().unwrap().get(server.url(path)).send().await.unwrap();
        assert_eq!(response.bytes().await.unwrap(), plain.body);
    }
    // The hot path's answer is too short to gain anything.
    let request = server.request(Method::POST, "/api/sync-event").json(&event("pi"));
    let answer = send(request.header("accept-encoding", "gzip, br")).await;
    assert!(!answer.headers.contains_key("content-encoding"));
    server.stop().await;
}
