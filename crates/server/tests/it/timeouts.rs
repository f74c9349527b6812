//! Clients that are slow, break off, or send many requests on one connection.

use std::time::Duration;

use pisync::config::http::Timeouts;
use serde_json::{Value, json};

use crate::support::http::event;
use crate::support::server::TestServer;

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
