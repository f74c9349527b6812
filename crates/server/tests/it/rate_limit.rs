//! So many requests a minute from an address, and whose address it is behind a proxy.

use pisync::config::http::AuthMode;
use reqwest::Method;
use serde_json::json;

use crate::support::http::{Answer, event, send};
use crate::support::server::TestServer;

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
