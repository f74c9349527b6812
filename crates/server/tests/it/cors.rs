//! Cross-origin requests (CORS): pages of configured origins may call, others may not.

use std::collections::BTreeSet;

use reqwest::{Method, header::HeaderValue};
use serde_json::Value;

use crate::support::http::{Answer, keys, send};
use crate::support::server::TestServer;

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
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
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
        let document: Value = serde_json::from_str(&pisync::api::openapi_json().unwrap()).unwrap();
        let responses = &document["paths"]["/api/stats"]["get"]["responses"];
        let declared: BTreeSet<_> = ["200", "401", "429"]
            .into_iter()
            .flat_map(|status| keys(&responses[status]["headers"]))
            .map(str::to_ascii_lowercase)
            .collect();
        assert_eq!(exposed.split(',').map(str::to_owned).collect::<BTreeSet<_>>(), declared);
    }
    server.stop().await;
}
