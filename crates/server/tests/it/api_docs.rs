//! `/api-docs`: Swagger UI and the document that it shows, without anything from elsewhere.

use std::io::Read;
use std::path::PathBuf;

use flate2::read::GzDecoder;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::support::http::send;
use crate::support::server::TestServer;

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
