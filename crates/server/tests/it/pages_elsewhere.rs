//! What a web page elsewhere, opened in the browser of a server's own user, gets and costs: nothing. It reaches a
//! server on that machine, and its requests come from the same address as the user's.

use pisync::config::http::AuthMode;
use reqwest::Method;
use serde_json::json;

use crate::{
    browser::visit,
    support::{
        http::{Answer, Client, event, send},
        program::Program,
        server::TestServer,
        store::key_request,
    },
};

type Headers = &'static [(&'static str, &'static str)];

/// What pages elsewhere leave on their requests: those of browsers that say who sends, and of older ones.
const FOREIGN: [Headers; 8] = [
    &[("origin", "https://evil.example")],
    &[("origin", "null"), ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "cors")],
    &[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")],
    &[("sec-fetch-site", "same-site"), ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "script")],
    &[
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-dest", "iframe"),
    ],
    // A socket.
    &[("origin", "https://evil.example"), ("connection", "upgrade"), ("upgrade", "websocket")],
    &[("referer", "https://evil.example/page")],
    // A name elsewhere that leads here.
    &[("host", "evil.example")],
];

/// A link on a page elsewhere that the user follows.
const LINK: Headers = &[
    ("sec-fetch-site", "cross-site"),
    ("sec-fetch-mode", "navigate"),
    ("sec-fetch-dest", "document"),
    ("sec-fetch-user", "?1"),
];

/// Requests that one page can have made, with or without an answer that tells something.
const REQUESTS: [(&str, &str); 9] = [
    ("GET", "/api/stats"),
    ("GET", "/api/devices"),
    ("HEAD", "/api/device/pi/sync-history"),
    ("GET", "/metrics"),
    ("GET", "/nothing"),
    ("GET", "/api/sync-event"),
    ("OPTIONS", "/api/sync-event"),
    ("POST", "/api/sync-event"),
    ("POST", "/api/sync-events"),
];

async fn ask(client: &Client, method: &str, path: &str, headers: Headers) -> Answer {
    let mut request = client.request(method.parse().unwrap(), path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    if method == "POST" {
        // As a form can.
        request = request.header("content-type", "text/plain").body(event("pi").to_string());
    }
    send(request).await
}

async fn limited(auth: AuthMode) -> TestServer {
    TestServer::on_sqlite(|settings| {
        settings.auth = auth;
        (settings.sync_per_minute, settings.api_per_minute) = (3, 3);
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_use_up_no_limit_of_the_user() {
    let server = limited(AuthMode::Auto).await;
    for headers in FOREIGN {
        for (method, path) in REQUESTS {
            let answer = ask(&server, method, path, headers).await;
            // What may be asked at a path is no secret and costs nothing: health checks ask with OPTIONS.
            let is_expected = method == "OPTIONS" || (401..=405).contains(&answer.status);
            assert!(is_expected, "{} {method} {path}", answer.status);
            assert!(!answer.headers.contains_key("ratelimit-remaining"), "{method} {path}");
        }
    }
    for path in ["/", "/api/stats"] {
        for _ in 0..5 {
            ask(&server, "GET", path, LINK).await;
        }
    }
    // What a proxy passes on that nobody has named comes from the same address, too.
    for _ in 0..5 {
        let passed = server.request(Method::GET, "/api/stats").header("x-forwarded-for", "1.2.3.4");
        assert_eq!(send(passed).await.status, 401);
    }
    // The user still has all of it.
    for remaining in ["2", "1", "0"] {
        for answer in [server.get("/api/stats").await, server.report(&event("pi")).await] {
            assert!(matches!(answer.status, 200 | 201), "{}", answer.text());
            assert_eq!(answer.header("ratelimit-remaining"), remaining);
        }
    }
    server.get("/api/stats").await.error(429);
    let database = server.stop().await;
    assert_eq!(database.number("(select count(*) from sync_events)").await, 3);
}

/// Keys must not be guessed at leisure, whatever else stands on the request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_guesses_keys_is_counted_all_the_same() {
    for auth in [AuthMode::Auto, AuthMode::Required] {
        let server = limited(auth).await;
        let guess = || server.with_key("psk_guess");
        for headers in FOREIGN.into_iter().take(3) {
            assert_eq!(ask(&guess(), "GET", "/api/stats", headers).await.status, 401);
        }
        assert_eq!(ask(&guess(), "GET", "/api/stats", FOREIGN[0]).await.status, 429);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_key_they_are_served_nothing() {
    let server = TestServer::on_sqlite(|_| {}).await;
    server.store(&event("pi")).await;
    let reads = [
        "/",
        "/api",
        "/api/stats",
        "/api/devices",
        "/api/devices/repeated-failures",
        "/api/device/pi",
        "/api/device/pi/sync-history",
        "/api/keys",
        "/api/audit",
        "/metrics",
    ];
    for headers in FOREIGN {
        for path in reads {
            let refused = ask(&server, "GET", path, headers).await;
            let said = refused.error(401);
            assert!(said.contains("A key is needed"), "{path} {headers:?}: {said}");
        }
    }
    for path in reads {
        let answer = ask(&server, "GET", path, LINK).await;
        if path == "/" {
            // The way in.
            assert_eq!(answer.status, 200, "{path}");
        } else {
            assert!(answer.error(401).contains("a link on a page elsewhere"), "{path}");
        }
        // By hand, from a bookmark, and from pages of our own.
        let own: [Headers; 2] = [
            &[("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate")],
            &[("sec-fetch-site", "same-origin"), ("sec-fetch-mode", "cors")],
        ];
        for headers in own {
            assert_eq!(ask(&server, "GET", path, headers).await.status, 200, "{path}");
        }
    }
    assert_eq!(ask(&server, "GET", "/api-docs/", LINK).await.status, 200);
    // A key says who asks.
    let (_, key) = server.database.make_key(key_request(pisync::store::Scope::Read)).await;
    let reader = server.with_key(&key);
    while reader.get("/api/stats").await.status == 401 {
        tokio::time::sleep(pisync::keys::REFRESH_INTERVAL / 20).await;
    }
    for headers in FOREIGN {
        assert_eq!(ask(&reader, "GET", "/api/stats", headers).await.status, 200, "{headers:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_hold_no_connection() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for path in ["/api/stats", "/nothing"] {
        let mut connection = server.connect().await;
        let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n");
        connection.write(format!("{head}sec-fetch-site: cross-site\r\n\r\n")).await;
        let last_words = connection.rest().await;
        assert!(last_words.contains("connection: close"), "{last_words}");
        // The user's own goes on.
        let mut connection = server.connect().await;
        for _ in 0..2 {
            connection.write(format!("{head}\r\n")).await;
            connection.answer().await;
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_fill_no_log() {
    let program = Program::new().with("PORT", 0);
    let serving = program.serve(&[]);
    for _ in 0..10 {
        for headers in FOREIGN {
            ask(&serving.client, "GET", "/api/stats", headers).await;
            ask(&serving.client, "GET", "/nothing", headers).await;
        }
    }
    serving.client.get("/api/device/nobody").await.error(404);
    serving.stop();
    let log = program.log("combined.log");
    let refusals = |text: &str| {
        let says = |line: &&serde_json::Value| line["message"].as_str().unwrap().contains(text);
        log.iter().filter(says).count()
    };
    // One in 10 s, however slow this machine is.
    let lines = refusals("web page elsewhere");
    assert!((1..=6).contains(&lines), "{lines} lines");
    assert_eq!(refusals("request refused"), 1, "{log:?}");
    assert_eq!(refusals("Too many"), 0);
}

/// What a real browser sends is what the others take it for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_real_browser() {
    let server = limited(AuthMode::Auto).await;
    let url = server.url("");
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let pictures: String = (0..10).map(|n| format!("<img src='{url}/api/stats?{n}'>")).collect();
    let text = format!(
        "<body>{pictures}<iframe src='{url}/'></iframe><script>
           let sent = Array.from({{length: 10}}, (_, n) =>
               fetch('{url}/api/sync-event?' + n, {{method: 'POST', mode: 'no-cors', body: '{}'}})
                   .catch(error => error));
           Promise.all(sent).then(() => document.body.id = 'all-sent');
         </script>",
        json!({})
    );
    std::fs::write(&page, text).unwrap();
    let (shown, console) = visit(&format!("file://{}", page.display())).await;
    assert!(shown.contains("id=\"all-sent\""), "{shown}\n{console}");
    // Typed by hand, as the next one is, it is the first request that counts.
    let (shown, _) = visit(&format!("{url}/api/stats")).await;
    assert!(shown.contains("total_devices"), "{shown}");
    let answer = server.get("/api/stats").await;
    assert_eq!(answer.header("ratelimit-remaining"), "1");
    assert_eq!(server.report(&event("pi")).await.header("ratelimit-remaining"), "2");
    server.stop().await;
}
