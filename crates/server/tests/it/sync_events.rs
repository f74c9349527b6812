//! `POST /api/sync-events`: many events in one request, in every form they may be sent in, and each with
//! its own result.

use std::{fmt::Write as _, io::Write as _};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, Client, column, event, keys, send, with},
    server::TestServer,
};

both_stores!(
    each_event_has_its_result,
    lines_are_events,
    compressed_bodies,
    events_sent_again_are_duplicates,
    single_and_batch_know_each_other,
    what_is_broken_stores_nothing,
    as_many_as_may_be,
    as_many_wrong_as_may_be,
    devices_without_a_clock,
);

const ARRAY: &str = "application/json";
const LINES: &str = "application/x-ndjson";

async fn deliver(client: &Client, media_type: &str, body: impl Into<reqwest::Body>) -> Answer {
    let request = client.request(Method::POST, "/api/sync-events");
    send(request.header("content-type", media_type).body(body)).await
}

async fn deliver_as(client: &Client, encoding: &str, media_type: &str, body: Vec<u8>) -> Answer {
    let request = client.request(Method::POST, "/api/sync-events");
    let request = request.header("content-type", media_type).header("content-encoding", encoding);
    send(request.body(body)).await
}

fn statuses(data: &Value) -> Vec<&str> {
    data["results"].as_array().unwrap().iter().map(|one| one["status"].as_str().unwrap()).collect()
}

fn counts(data: &Value) -> [u64; 3] {
    ["accepted", "duplicates", "rejected"].map(|count| data[count].as_u64().unwrap())
}

fn called(event_id: &str, event: Value) -> Value {
    with(event, &json!({"event_id": event_id}))
}

async fn total(server: &TestServer) -> Value {
    server.get("/api/stats").await.data(200)["total_sync_events"].take()
}

async fn each_event_has_its_result(server: &TestServer) {
    let body = json!([
        event("a"),
        with(event("b"), &json!({"total_errors": -1, "timestamp": "soon"})),
        called("x", event("b")),
        17,
        called("x", event("b")),
        with(event("a"), &json!({"device_id": ""})),
    ]);
    let data = deliver(server, ARRAY, body.to_string()).await.data(200);
    assert_eq!(keys(&data), ["accepted", "duplicates", "rejected", "results"]);
    assert_eq!(counts(&data), [2, 1, 3]);
    assert_eq!(
        statuses(&data),
        ["created", "rejected", "created", "rejected", "duplicate", "rejected"]
    );
    assert_eq!(column(&data["results"], "index"), [0, 1, 2, 3, 4, 5].map(Value::from));
    assert_eq!(keys(&data["results"][0]), ["id", "index", "status"]);
    assert_eq!(data["results"][2]["id"], data["results"][4]["id"]);
    assert_eq!(keys(&data["results"][1]), ["details", "index", "status"]);
    assert_eq!(
        column(&data["results"][1]["details"], "message"),
        [
            "\"timestamp\" must be in ISO 8601 date format",
            "\"total_errors\" must be greater than or equal to 0"
        ]
        .map(Value::from)
    );
    assert_eq!(data["results"][3]["details"][0]["message"], "\"value\" must be of type object");
    assert_eq!(total(server).await, 2);

    let data = deliver(server, ARRAY, "[]").await.data(200);
    assert_eq!((counts(&data), statuses(&data)), ([0, 0, 0], vec![]));
    let data = deliver(server, ARRAY, "[null]").await.data(200);
    assert_eq!(counts(&data), [0, 0, 1]);
}

/// What is wrong with them is more than there is memory for, and is cut to what there is.
async fn as_many_wrong_as_may_be(server: &TestServer) {
    let wrong = |value: Value| {
        let names = ["timestamp", "total_files_synced", "total_errors", "internet_speed"];
        let more = ["duration_seconds", "bytes_synced", "job", "event_id", "clock", "metadata"];
        let fields = names.iter().chain(&more).map(|name| ((*name).to_owned(), value.clone()));
        let mut event: serde_json::Map<_, _> = fields.collect();
        event.insert("device_id".to_owned(), json!("pi"));
        Value::from(event).to_string()
    };
    let good = event("pi").to_string();
    // All fields, short and as long as the bound on the body lets them be.
    for value in [json!(false), json!("x".repeat(80))] {
        let mut body = vec![wrong(value); 9_999];
        body.push(good.clone());
        let body = body.join("\n");
        assert!(body.len() < 10 << 20, "{}", body.len());
        let data = deliver(server, LINES, body).await.data(200);
        assert_eq!(counts(&data), [1, 0, 9_999]);
        let results = data["results"].as_array().unwrap();
        let fields = results[0]["details"].as_array().unwrap().len();
        assert!(fields >= 9 && results[0].get("details_omitted").is_none(), "{}", results[0]);
        let mut listed = 0;
        for result in &results[..9_999] {
            let details = result["details"].as_array().unwrap().len();
            let omitted = result["details_omitted"].as_u64().unwrap_or(0);
            assert_eq!(details as u64 + omitted, fields as u64, "{result}");
            assert_eq!(result["details"][0], results[0]["details"][0]);
            listed += details;
        }
        assert!((10_000..20_000).contains(&listed), "{listed}");
    }
    // A few wrong ones keep all of their details.
    let body = vec![wrong(json!(false)); 300].join("\n");
    let data = deliver(server, LINES, body).await.data(200);
    assert!(
        data["results"].as_array().unwrap().iter().all(|one| one.get("details_omitted").is_none())
    );
}

async fn lines_are_events(server: &TestServer) {
    let good = event("pi").to_string();
    let spread = good.replace(',', "\t,  ");
    let body =
        format!("\u{feff}{good}\r\n\n  {spread}\n{{\"device_id\":\nnot JSON\n[{good}]\n{good}");
    for media_type in [LINES, "application/x-ndjson; charset=utf-8", "application/jsonl"] {
        let data = deliver(server, media_type, body.clone()).await.data(200);
        assert_eq!(
            statuses(&data),
            ["created", "created", "rejected", "rejected", "rejected", "created"]
        );
        let problem = data["results"][3]["details"][0]["message"].as_str().unwrap();
        assert!(problem.starts_with("Malformed JSON: "), "{problem}");
    }
    assert_eq!(total(server).await, 9);
    let long = format!("{}\n{good}\n", with(event("pi"), &json!({"note": "x".repeat(64 << 10)})));
    let data = deliver(server, LINES, long).await.data(200);
    assert_eq!(statuses(&data), ["rejected", "created"]);
    let message = "\"value\" must be at most 65536 bytes of JSON text";
    assert_eq!(
        data["results"][0]["details"],
        json!([{"field": "", "message": message, "code": "length"}])
    );
    for empty in ["", "\n\n", " \r\n"] {
        assert_eq!(counts(&deliver(server, LINES, empty).await.data(200)), [0, 0, 0]);
    }
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

async fn compressed_bodies(server: &TestServer) {
    let array = json!([event("a"), event("b")]).to_string();
    let lines = format!("{}\n{}\n", event("a"), event("b"));
    for (media_type, text) in [(ARRAY, &array), (LINES, &lines)] {
        for (encoding, body) in [
            ("gzip", gzip(text.as_bytes())),
            ("x-gzip", gzip(text.as_bytes())),
            ("zstd", zstd(text.as_bytes())),
            ("identity", text.clone().into_bytes()),
            // As several writers append to one file.
            ("gzip", [gzip(&text.as_bytes()[..20]), gzip(&text.as_bytes()[20..])].concat()),
        ] {
            let data = deliver_as(server, encoding, media_type, body).await.data(200);
            assert_eq!(counts(&data), [2, 0, 0], "{encoding} {media_type}");
        }
    }
    let before = total(server).await;
    for encoding in ["br", "gzip, zstd", "compress"] {
        let answer = deliver_as(server, encoding, ARRAY, array.clone().into_bytes()).await;
        assert!(answer.error(415).contains("gzip, deflate or zstd"), "{encoding}");
    }
    // Cut off, and not compressed at all.
    for (encoding, body) in [
        ("gzip", gzip(lines.as_bytes())[..40].to_vec()),
        ("zstd", zstd(lines.as_bytes())[..40].to_vec()),
        ("gzip", lines.clone().into_bytes()),
        ("zstd", lines.clone().into_bytes()),
    ] {
        let answer = deliver_as(server, encoding, LINES, body).await;
        assert!(answer.error(400).starts_with("The request's body cannot be read: "), "{encoding}");
    }
    // 100 MiB of nothing in some kilobytes.
    let bomb = vec![b' '; 100 << 20];
    for (encoding, body) in [("gzip", gzip(&bomb)), ("zstd", zstd(&bomb))] {
        let answer = deliver_as(server, encoding, LINES, body).await;
        assert_eq!(answer.error(413), "The request's body is larger than 10485760 bytes");
    }
    assert_eq!(total(server).await, before);
}

async fn events_sent_again_are_duplicates(server: &TestServer) {
    let body = json!([called("1", event("a")), called("2", event("a")), called("1", event("b"))]);
    let first = deliver(server, ARRAY, body.to_string()).await.data(200);
    assert_eq!(counts(&first), [3, 0, 0]);
    let again = deliver(server, ARRAY, body.to_string()).await.data(200);
    assert_eq!(counts(&again), [0, 3, 0]);
    assert_eq!(column(&first["results"], "id"), column(&again["results"], "id"));
    assert_eq!(total(server).await, 3);
    let request = server.request(Method::POST, "/api/sync-events").header("idempotency-key", "x");
    let answer = send(request.json(&body)).await;
    assert!(answer.complaints()[0].starts_with("\"Idempotency-Key\" is for single events"));
}

async fn single_and_batch_know_each_other(server: &TestServer) {
    let fields = json!({"event_id": "run-1", "job": "nightly", "metadata": {"a": 1}});
    let report = with(event("pi"), &fields);
    let created = server.store(&report).await;
    assert_eq!(created["event_id"], "run-1");
    let data = deliver(server, ARRAY, json!([report]).to_string()).await.data(200);
    assert_eq!(data["results"][0], json!({"index": 0, "status": "duplicate", "id": created["id"]}));

    server.clock.set(at(3600));
    let answer = server.report(&report).await;
    assert_eq!(answer.json(200)["message"], "Sync event was processed before");
    assert_eq!(answer.data(200), with(created.clone(), &json!({"duplicate": true})));
    // The header does the same.
    let keyed = |key: &str, body: &Value| {
        send(
            server
                .request(Method::POST, "/api/sync-event")
                .header("idempotency-key", key)
                .json(body),
        )
    };
    assert_eq!(keyed("run-1", &event("pi")).await.data(200)["id"], created["id"]);
    assert_eq!(keyed("run-1", &report).await.data(200)["id"], created["id"]);
    assert_eq!(keyed("run-2", &event("pi")).await.data(201)["event_id"], "run-2");
    assert_eq!(
        keyed("run-2", &report).await.complaints(),
        ["\"Idempotency-Key\" must be the same as \"event_id\""]
    );
    assert_eq!(
        keyed(&"x".repeat(65), &event("pi")).await.complaints(),
        ["\"Idempotency-Key\" length must be less than or equal to 64 characters long"]
    );
    for (event_id, rule) in [
        (json!(""), "is not allowed to be empty"),
        (json!("x".repeat(65)), "length must be less than or equal to 64 characters long"),
        (json!("a\nb"), "must not contain control characters"),
        (json!(17), "must be a string"),
    ] {
        let answer = server.report(&with(event("pi"), &json!({"event_id": event_id}))).await;
        assert_eq!(answer.complaints(), [format!("\"event_id\" {rule}")]);
    }
    let history = server.get("/api/device/pi/sync-history").await.data(200);
    assert_eq!(column(&history["sync_history"], "event_id"), ["run-2", "run-1"].map(Value::from));
}

async fn what_is_broken_stores_nothing(server: &TestServer) {
    let good = event("pi");
    for body in [
        format!("[{good},{good}"),
        format!("[{good},]"),
        format!("[{good}] {good}"),
        format!("[{good} {good}]"),
        format!("[{good}, {{\"device_id\": }}]"),
    ] {
        let answer = deliver(server, ARRAY, body.clone()).await;
        assert!(answer.error(400).starts_with("Malformed JSON: "), "{body}");
    }
    for body in [good.to_string(), "17".into(), String::new()] {
        let complaint =
            "\"value\" must be an array; send one event per line as application/x-ndjson";
        assert_eq!(deliver(server, ARRAY, body).await.complaints(), [complaint]);
    }
    for media_type in ["text/plain", "application/xml", "text/csv"] {
        let answer = deliver(server, media_type, format!("[{good}]")).await;
        assert!(answer.error(415).contains("application/x-ndjson"), "{media_type}");
    }
    assert_eq!(total(server).await, 0);
}

async fn as_many_as_may_be(server: &TestServer) {
    let lines = |count: usize| {
        (0..count).fold(String::new(), |mut text, number| {
            let _ = writeln!(text, "{}", event(&format!("pi-{}", number % 700)));
            text
        })
    };
    let data = deliver_as(server, "zstd", LINES, zstd(lines(10_000).as_bytes())).await.data(200);
    assert_eq!(counts(&data), [10_000, 0, 0]);
    let answer = deliver(server, LINES, lines(10_001)).await;
    assert!(answer.error(413).contains("more than 10000 events"));
    assert_eq!(total(server).await, 10_000);
}

async fn devices_without_a_clock(server: &TestServer) {
    server.clock.set(at(60));
    let unsynced =
        |timestamp: &str| with(event("pi"), &json!({"clock": "unsynced", "timestamp": timestamp}));
    for (timestamp, metadata, expected) in [
        (
            "1970-01-01T00:00:07Z",
            json!(null),
            json!({"device_timestamp": "1970-01-01T00:00:07.000Z"}),
        ),
        (
            "2999-01-01",
            json!({"a": 1}),
            json!({"device_timestamp": "2999-01-01T00:00:00.000Z", "a": 1}),
        ),
        ("1970-01-01", json!({"device_timestamp": "mine"}), json!({"device_timestamp": "mine"})),
    ] {
        let data = server.store(&with(unsynced(timestamp), &json!({"metadata": metadata}))).await;
        assert_eq!(data["timestamp"], at(60).to_string());
        assert_eq!(data["metadata"], expected);
    }
    let body = json!([unsynced("2999-01-01"), with(event("pi"), &json!({"clock": "synced"}))]);
    let data = deliver(server, ARRAY, body.to_string()).await.data(200);
    assert_eq!(counts(&data), [2, 0, 0]);
    let answer = server.report(&with(event("pi"), &json!({"clock": "broken"}))).await;
    assert_eq!(answer.complaints(), ["\"clock\" must be one of [synced, unsynced]"]);
    let future = with(event("pi"), &json!({"clock": "synced", "timestamp": "2999-01-01"}));
    assert_eq!(server.report(&future).await.complaints(), ["Timestamp cannot be in the future"]);
}
