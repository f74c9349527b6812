//! What is said of things that are wrong: the message names the culprit and what would be right, and events that
//! are not stored leave a trace in metrics and log.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::now,
    http::{Client, event, send, with},
    program::{Installed, Program},
    server::TestServer,
};

both_stores!(
    many_devices_do_not_fill_the_log,
    rejected_events_are_counted_and_logged,
    an_event_id_that_is_used_again_for_another_event_is_counted_and_logged,
    the_same_event_sent_again_is_no_conflict,
);

const ARRAY: &str = "application/json";
const LINES: &str = "application/x-ndjson";

async fn deliver(client: &Client, media_type: &str, body: impl Into<reqwest::Body>) -> Value {
    let request = client.request(Method::POST, "/api/sync-events");
    send(request.header("content-type", media_type).body(body)).await.data(200)
}

/// Whoever reaches the server can send as many requests that are refused as they like.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_requests_do_not_fill_the_log() {
    let program = Program::new().with("PORT", 0);
    let serving = program.serve(&[]);
    for number in 0..200 {
        let answer = serving.client.get(&format!("/nowhere/{number}")).await;
        assert!([404, 429].contains(&answer.status), "{}", answer.status);
    }
    serving.client.report_text("{").await;
    let metrics = serving.client.get("/metrics").await;
    assert!(metrics.text().contains("pisync_sync_success_ratio NaN\n"), "no sync, no ratio");
    serving.stop();
    let log = program.log("combined.log");
    let refused = lines(&log, "request refused");
    let nowhere: Vec<_> = refused.iter().filter(|line| line["status"] == 404).copied().collect();
    assert_few(&nowhere, "request refused");
    // They leave the lines of others to them.
    assert_eq!(refused.iter().filter(|line| line["status"] == 400).count(), 1, "{refused:?}");
}

/// One batch may bring thousands of them.
async fn many_devices_do_not_fill_the_log(installed: &Installed) {
    let serving = installed.program.serve(&[]);
    let failing = |number: usize| report(&format!("pi-{number}"), &json!({"total_errors": 1}));
    let batch: String = (0..600).map(|number| failing(number / 3).to_string() + "\n").collect();
    assert_eq!(deliver(&serving.client, LINES, batch).await["accepted"], 600);
    serving.stop();
    let log = installed.program.log("combined.log");
    assert_few(&lines(&log, "new device"), "new device");
    assert_few(&lines(&log, "a device keeps failing"), "a device keeps failing");
}

/// Of 200 lines, those that a few intervals let through.
fn assert_few(lines: &[&Value], message: &str) {
    // A slow machine may take more than one interval.
    assert!((20..=100).contains(&lines.len()), "{}", lines.len());
    assert!(lines[..19].iter().all(|line| line["message"] == message), "{lines:?}");
    let last = lines[19]["message"].as_str().unwrap();
    assert!(last.contains("more than 20 ") && last.contains(" within 10 s"), "{last}");
}

/// The samples of a metric that are not 0, each with the rest of its line.
async fn samples(client: &Client, name: &str) -> Vec<String> {
    let metrics = client.get("/metrics").await;
    let of_name = metrics.text().lines().filter_map(|line| line.strip_prefix(name));
    of_name.filter(|rest| !rest.ends_with(" 0")).map(str::to_owned).collect()
}

fn lines<'a>(log: &'a [Value], message: &str) -> Vec<&'a Value> {
    let says =
        |line: &&Value| line["message"].as_str().is_some_and(|text| text.starts_with(message));
    log.iter().filter(says).collect()
}

/// A report of the present: these servers have the machine's clock.
fn report(device: &str, fields: &Value) -> Value {
    with(with(event(device), &json!({"timestamp": "2025-06-17T10:30:00Z"})), fields)
}

async fn rejected_events_are_counted_and_logged(installed: &Installed) {
    let serving = installed.program.serve(&[]);
    let client = &serving.client;
    let wrong = [
        json!({}),
        report("pi", &json!({"device_id": 7, "total_errors": -1})),
        report("pi", &json!({"total_files_synced": 3_000_000_000_u32})),
        report("pi", &json!({"timestamp": "2025-06-17T10:30:00+25:00"})),
        report("pi", &json!({"device_id": "x".repeat(256)})),
        report("pi", &json!({"timestamp": "2999-01-01T00:00:00Z"})),
        report("pi", &json!({"metadata": {"filler": "x".repeat(70_000)}})),
    ];
    let request = client.request(Method::POST, "/api/sync-events").header("x-request-id", "bad-1");
    let data = send(request.json(&wrong)).await.data(200);
    assert_eq!((&data["accepted"], &data["rejected"]), (&json!(0), &json!(7)), "{data}");
    // Of the next within 10 s there is no line, but they are counted; so are single ones.
    let body = format!("{}\nno JSON\n", report("pi", &json!({})));
    assert_eq!(deliver(client, LINES, body).await["rejected"], 1);
    client.report(&json!({"device_id": "pi"})).await.details();
    client.report_text("{").await.error(400);
    let mut counted = samples(client, "pisync_sync_events_rejected_total").await;
    counted.sort();
    assert_eq!(
        counted,
        [
            "{reason=\"format\"} 1",
            "{reason=\"future\"} 1",
            "{reason=\"length\"} 2",
            "{reason=\"malformed_json\"} 2",
            "{reason=\"range\"} 1",
            "{reason=\"required\"} 2",
            "{reason=\"type\"} 1",
        ]
    );
    serving.stop();
    let log = installed.program.log("combined.log");
    let said = lines(&log, "events of a batch were rejected");
    // A slow machine may take longer than those 10 s.
    assert!((1..=2).contains(&said.len()), "{log:?}");
    let expected = json!({
        "level": "WARN", "path": "/api/sync-events", "status": 200, "request_id": "bad-1",
        "rejected": 7, "taken": 0,
        "reasons": "event 0: \"device_id\" is required, \"timestamp\" is required, \"total_files_synced\" is required, \"total_errors\" is required; event 1: \"device_id\" must be a string, \"total_errors\" must be greater than or equal to 0; event 2: \"total_files_synced\" must be less than or equal to 2147483647",
    });
    assert_eq!(&with(said[0].clone(), &expected), said[0]);
    // A request that is refused as a whole says why, too.
    let refused = lines(&log, "request refused");
    assert_eq!(refused.len(), 2, "{log:?}");
    assert!(refused[0]["error"].as_str().unwrap().starts_with("\"timestamp\" is required"));
    assert!(refused[1]["error"].as_str().unwrap().starts_with("EOF while parsing"));
}

const CONFLICTS: &str = "pisync_sync_event_id_conflicts_total";

async fn an_event_id_that_is_used_again_for_another_event_is_counted_and_logged(
    installed: &Installed,
) {
    let serving = installed.program.serve(&[]);
    let client = &serving.client;
    let first = report("pi", &json!({"event_id": "1"}));
    let stored = client.store(&first).await;
    // At once, when SQLite has it in its journal alone.
    let other = with(first.clone(), &json!({"total_errors": 1, "job": "nightly"}));
    let answer = client.report(&other).await.data(200);
    assert_eq!(answer, with(stored.clone(), &json!({"duplicate": true})), "the contract stays");
    assert_eq!(samples(client, CONFLICTS).await, [" 1"]);
    // Once it is in the tables, which a reader waits for.
    client.get("/api/device/pi/sync-history").await.data(200);
    for (number, fields) in [
        json!({"timestamp": "2025-06-17T10:30:01Z"}),
        json!({"total_files_synced": 2}),
        json!({"internet_speed": 1.5}),
        json!({"duration_seconds": 1}),
        json!({"bytes_synced": 0}),
        json!({"metadata": {}}),
    ]
    .iter()
    .enumerate()
    {
        client.report(&with(first.clone(), fields)).await.data(200);
        assert_eq!(samples(client, CONFLICTS).await, [format!(" {}", number + 2)], "{fields}");
    }
    // Within a batch, whose first is stored with it; and in a batch against what is stored.
    let batch = json!([
        report("pi", &json!({"event_id": "2"})),
        report("pi", &json!({"event_id": "2", "total_errors": 5})),
        with(first.clone(), &json!({"total_errors": 5})),
    ]);
    let data = deliver(client, ARRAY, batch.to_string()).await;
    assert_eq!((&data["accepted"], &data["duplicates"]), (&json!(1), &json!(2)));
    assert_eq!(samples(client, CONFLICTS).await, [" 9"]);
    let total = client.get("/api/stats").await.data(200)["total_sync_events"].take();
    assert_eq!(total, 2);
    serving.stop();
    let log = installed.program.log("combined.log");
    let said = lines(&log, "an event_id was used again for another event");
    assert!(!said.is_empty(), "{log:?}");
    let expected = json!({
        "level": "WARN", "device_id": "pi", "event_id": "1", "stored_id": stored["id"],
        "differs_in": "total_errors, job", "suppressed": 0,
    });
    assert_eq!(&with(said[0].clone(), &expected), said[0]);
}

async fn the_same_event_sent_again_is_no_conflict(server: &TestServer) {
    let full = json!({
        "event_id": "full", "internet_speed": 45.678, "job": "nightly", "duration_seconds": 1.5,
        "bytes_synced": 7, "metadata": {"b": 1, "a": [1.0, "\u{fc}"]},
    });
    let plain = json!({"event_id": "plain"});
    // What is dated by its arrival arrives at another time when it is sent again.
    let unsynced = json!({"event_id": "unsynced", "clock": "unsynced", "metadata": {"a": 1}});
    let sent = [full, plain, unsynced].map(|fields| with(event("pi"), &fields));
    for event in &sent {
        server.store(event).await;
    }
    server.clock.set(now().saturating_add_milliseconds(3_600_000));
    for event in &sent {
        server.report(event).await.data(200);
    }
    server.get("/api/device/pi/sync-history").await.data(200);
    let again = sent[0].to_string().replace(r#"{"a":[1.0,"#, r#"{ "a" : [1.0, "#);
    for body in [again.replace("45.678", "\"45.68\""), sent[1].to_string(), sent[2].to_string()] {
        server.report_text(body).await.data(200);
    }
    assert!(samples(server, CONFLICTS).await.is_empty());
    let other = with(sent[2].clone(), &json!({"timestamp": "2025-06-17T10:30:00Z"}));
    server.report(&other).await.data(200);
    assert_eq!(samples(server, CONFLICTS).await, [" 1"]);
}

/// The usual event with this raw JSON for a field.
fn raw(field: &str, value: &str) -> String {
    with(event("pi"), &json!({ field: "RAW" })).to_string().replace("\"RAW\"", value)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_fields_are_named_for_what_is_wrong_with_them() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for (field, value, rule) in [
        (
            "timestamp",
            r#""2025-06-17T10:30:00+25:00""#,
            "must have an offset from UTC of at most 23:59",
        ),
        (
            "timestamp",
            r#""2025-06-17T10:30:00+24:00""#,
            "must have an offset from UTC of at most 23:59",
        ),
        ("timestamp", r#""2025-02-30""#, "must be a day that the calendar has"),
        ("timestamp", r#""0000-01-01T00:00:00Z""#, "must be within the years 1 to 9999"),
        ("timestamp", r#""+010000-01-01T00:00:00Z""#, "must be within the years 1 to 9999"),
        ("timestamp", r#""10000-01-01T00:00:00Z""#, "must be in ISO 8601 date format"),
        ("timestamp", r#""2025-06-17T10:30:61Z""#, "must be in ISO 8601 date format"),
        ("timestamp", r#""\ud800""#, "must be valid Unicode text"),
        ("timestamp", "null", "must be a valid date"),
        ("device_id", r#""\ud800""#, "must be valid Unicode text"),
        ("device_id", "null", "must be a string"),
        ("event_id", r#""\udc00""#, "must be valid Unicode text"),
        ("job", r#""""#, "is not allowed to be empty"),
        ("clock", r#""\ud800""#, "must be valid Unicode text"),
        ("clock", "true", "must be one of [synced, unsynced]"),
        ("total_errors", r#""\ud800""#, "must be valid Unicode text"),
        ("total_errors", "true", "must be a number"),
        ("total_errors", "1e999", "must be less than or equal to 2147483647"),
        ("total_errors", "1e-1", "must be an integer"),
        ("internet_speed", "-1e999", "must be greater than or equal to 0"),
        ("duration_seconds", "31536000.001", "must be less than or equal to 31536000"),
        ("bytes_synced", "9007199254740992", "must be less than or equal to 9007199254740991"),
        ("metadata", r#"{"a":"\ud800"}"#, "must be valid Unicode text"),
        ("metadata", r#"{"\udfff":1}"#, "must be valid Unicode text"),
        ("metadata", r#"{"a":"\ud800\u0041"}"#, "must be valid Unicode text"),
        ("metadata", r#"{"a":[1e400]}"#, "must not hold numbers beyond 1.8e308"),
        ("metadata", "[1]", "must be of type object"),
        ("metadata", r#""{}""#, "must be of type object"),
    ] {
        let body = raw(field, value);
        let expected = format!("\"{field}\" {rule}");
        assert_eq!(
            server.report_text(body.clone()).await.complaints(),
            std::slice::from_ref(&expected),
            "{body}"
        );
        // The same rules hold in a batch.
        let data = deliver(&server, ARRAY, format!("[{body}]")).await;
        assert_eq!(data["results"][0]["details"][0]["message"], expected, "{body}");
    }
    for timestamp in ["9999-12-31", "9999-12-31T23:59:59.999Z", "9999-12-31T00:00:00+00:00"] {
        let body = raw("timestamp", &format!("{timestamp:?}"));
        assert_eq!(
            server.report_text(body).await.complaints(),
            ["Timestamp cannot be in the future"]
        );
    }
    server.stop().await;
}

/// Also where people send the fields.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_surrogate_is_named_in_every_body() {
    let server = TestServer::on_sqlite(|_| {}).await;
    server.store(&event("pi")).await;
    for (method, path) in [(Method::POST, "/api/keys"), (Method::PATCH, "/api/device/pi")] {
        let send_text = async |body: &'static str| {
            let request = server.request(method.clone(), path);
            send(request.header("content-type", "application/json").body(body)).await
        };
        let answer =
            send_text(r#"{"scope":"read","group":["\udc00"],"name":"\ud800\u0041"}"#).await;
        let rule = "must be valid Unicode text";
        let expected = [format!("\"group\" {rule}"), format!("\"name\" {rule}")];
        assert_eq!(answer.complaints(), expected, "{path}");
        // What is no JSON is called so.
        for malformed in [r#"{"name":"\ud800"#, r#"{"name":"\u12"}"#, r#"{"name":1e999}"#] {
            let error = send_text(malformed).await.error(400);
            assert!(error.starts_with("Malformed JSON: "), "{path} {malformed}: {error}");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bodies_are_named_for_what_is_wrong_with_them() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for (body, message) in [
        (&b""[..], "there is nothing in it"),
        (b" \r\n", "there is nothing in it"),
        (b"{\"device_id\":\"M\xfcller\"}", "it is not UTF-8: byte 0xfc after 15 bytes; send UTF-8"),
        (b"\xff\xfe{\0}\0", "it is UTF-16; send UTF-8"),
        (b"{\"a\":1", "EOF while parsing an object at line 1 column 6"),
        (b"{\"a\":1}}", "trailing characters at line 1 column 8"),
    ] {
        let message = format!("Malformed JSON: {message}");
        assert_eq!(server.report_text(body.to_vec()).await.error(400), message);
        let request = server.request(Method::PATCH, "/api/device/pi");
        let request = request.header("content-type", "application/json").body(body.to_vec());
        assert_eq!(send(request).await.error(400), message, "PATCH");
        // Of lines, each has what is wrong with it; blank ones are passed over.
        if !body.trim_ascii().is_empty() {
            let data = deliver(&server, LINES, body.to_vec()).await;
            assert_eq!(data["results"][0]["details"][0]["message"], message);
        }
    }
    let complaint = "\"value\" must be an array; send one event per line as application/x-ndjson";
    let request = server.request(Method::POST, "/api/sync-events").json(&event("pi"));
    assert_eq!(send(request).await.complaints(), [complaint]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_headers_are_named_for_what_is_wrong_with_them() {
    let server = TestServer::on_sqlite(|_| {}).await;
    for (keys, rule) in [
        (&[&b"M\xfcller"[..]][..], "must be ASCII text"),
        (&["\u{fc}".as_bytes()], "must be ASCII text"),
        (&[b""], "is not allowed to be empty"),
        (&[b"a\tb"], "must not contain control characters"),
        (&[b"a", b"b"], "must be given only once"),
        (&[b"a", b"a"], "must be given only once"),
    ] {
        let mut request = server.request(Method::POST, "/api/sync-event").json(&event("pi"));
        for key in keys {
            request = request.header("idempotency-key", *key);
        }
        let expected = format!("\"Idempotency-Key\" {rule}");
        assert_eq!(send(request).await.complaints(), [expected]);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_paths_and_queries_are_named_for_what_is_wrong_with_them() {
    let server = TestServer::on_sqlite(|_| {}).await;
    server.store(&event("pi")).await;
    for (target, message) in [
        ("/api/device/%ff/sync-history", "\"device_id\" must be valid UTF-8"),
        ("/api/device/%00/sync-history", "\"device_id\" must not contain control characters"),
        ("/api/device/pi/sync-history?job=%ff", "\"job\" must be valid UTF-8"),
        ("/api/device/pi/sync-history?job=a&job=a", "\"job\" must be given only once"),
        ("/api/device/pi/sync-history?limit=", "\"limit\" must be a number"),
        ("/api/device/pi/sync-history?limit=1.5", "\"limit\" must be an integer"),
        (
            "/api/device/pi/sync-history?startDate=2025-06-17T10:30:00%2B25:00",
            "\"startDate\" must have an offset from UTC of at most 23:59",
        ),
        (
            "/api/device/pi/sync-history?endDate=2025-02-30",
            "\"endDate\" must be a day that the calendar has",
        ),
        (
            "/api/device/pi/sync-history?endDate=%2B010000-01-01",
            "\"endDate\" must be within the years 1 to 9999",
        ),
        ("/api/device/pi/sync-history?cursor=0", "\"cursor\" must be a next_cursor of this list"),
    ] {
        assert_eq!(server.get(target).await.complaints(), [message], "{target}");
    }
    // "For ever", as people write it.
    for end in ["9999-12-31", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59%2B00:00"] {
        let target = format!("/api/device/pi/sync-history?startDate=0001-01-01&endDate={end}");
        let data = server.get(&target).await.data(200);
        assert_eq!(data["pagination"]["total_events"], 1, "{end}");
    }
    server.stop().await;
}
