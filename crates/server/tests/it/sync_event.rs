//! `POST /api/sync-event`: what is taken, what is refused and in which words, and that what was taken
//! comes back from history as it was.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, Client, RawAnswer, column, event, keys, send, with},
    server::TestServer,
};

both_stores!(
    optional_fields_are_echoed,
    metadata_comes_back_as_it_was_sent,
    speeds_are_rounded_half_away_from_zero,
    largest_values_are_kept_exactly,
    the_edge_of_the_allowed_skew,
    offsets_and_fractions,
    refused_events_leave_no_trace,
    names_in_any_script,
);

const REQUIRED: [&str; 7] = [
    "created_at",
    "device_id",
    "id",
    "internet_speed",
    "timestamp",
    "total_errors",
    "total_files_synced",
];

/// The largest body, in bytes.
const BODY_LIMIT: usize = 64 << 10;

/// The newest event in a device's history.
async fn newest(server: &TestServer, device: &str) -> Value {
    let path = format!("/api/device/{device}/sync-history?limit=1");
    server.get(&path).await.data(200)["sync_history"][0].take()
}

async fn optional_fields_are_echoed(server: &TestServer) {
    assert_eq!(keys(&server.store(&event("pi")).await), REQUIRED);
    let nothing = json!({
        "internet_speed": null, "job": null, "duration_seconds": null, "bytes_synced": null,
        "metadata": null,
    });
    assert_eq!(keys(&server.store(&with(event("pi"), &nothing)).await), REQUIRED);
    assert_eq!(keys(&newest(server, "pi").await), [&REQUIRED[..], &["updated_at"]].concat());

    let fields = json!({
        "internet_speed": 45.6, "job": "nightly", "duration_seconds": 12.3456,
        "bytes_synced": 1_048_576, "metadata": {"firmware": "1.2.3"},
    });
    let data = server.store(&with(event("pi"), &fields)).await;
    let expected = with(fields, &json!({"duration_seconds": 12.346}));
    assert_eq!(with(data.clone(), &expected), data);
    assert_eq!(keys(&data).len(), REQUIRED.len() + 4);
    // History tells the same.
    let stored = newest(server, "pi").await;
    assert_eq!(with(stored.clone(), &data), stored);

    // Each alone.
    for field in ["job", "duration_seconds", "bytes_synced", "metadata"] {
        let data = server.store(&with(event("pi"), &json!({field: expected[field]}))).await;
        assert_eq!(data[field], expected[field]);
        assert_eq!(keys(&data).len(), REQUIRED.len() + 1, "{data}");
    }
}

async fn metadata_comes_back_as_it_was_sent(server: &TestServer) {
    for metadata in [
        "{}",
        // Spaces, the order of fields, repeated fields, the way that numbers and characters are
        // written: all of it is the device's.
        r#"{ "z" : 1.50, "a": [1e2,  -0], "z": null, "\u00fc": "ü\n\"\\ \ud83d\ude00" }"#,
    ] {
        let body =
            event("pi").to_string().replacen('{', &format!(r#"{{"metadata": {metadata},"#), 1);
        let answer = server.report_text(body).await;
        answer.data(201);
        let as_sent = format!(r#""metadata":{metadata}"#);
        assert!(answer.text().contains(&as_sent), "{}", answer.text());
        let history = server.get("/api/device/pi/sync-history?limit=1").await;
        history.data(200);
        assert!(history.text().contains(&as_sent), "{}", history.text());
    }
    let filled = |length: usize| json!({"text": "x".repeat(length - r#"{"text":""}"#.len())});
    server.store(&with(event("pi"), &json!({"metadata": filled(4096)}))).await;
    for (metadata, complaint) in [
        (filled(4097), "\"metadata\" must be at most 4096 bytes of JSON text"),
        (json!([1]), "\"metadata\" must be of type object"),
        (json!("{}"), "\"metadata\" must be of type object"),
    ] {
        let answer = server.report(&with(event("pi"), &json!({"metadata": metadata}))).await;
        assert_eq!(answer.complaints(), [complaint]);
    }
}

async fn speeds_are_rounded_half_away_from_zero(server: &TestServer) {
    for (text, expected) in [
        // As decimal text: the nearest double is a little less than 1.005.
        ("1.005", 1.01),
        ("\"1.005\"", 1.01),
        ("1.0049999", 1.0),
        ("0.005", 0.01),
        ("0.004", 0.0),
        ("-0.0", 0.0),
        ("1e1", 10.0),
        ("99999999.994", 99_999_999.99),
    ] {
        let body =
            event("pi").to_string().replacen('{', &format!(r#"{{"internet_speed":{text},"#), 1);
        assert_eq!(server.report_text(body).await.data(201)["internet_speed"], expected, "{text}");
        assert_eq!(newest(server, "pi").await["internet_speed"], expected, "{text}");
    }
    for (speed, rule) in [
        (json!(99_999_999.995), "must be less than or equal to 99999999.99"),
        (json!(-0.01), "must be greater than or equal to 0"),
        (json!("fast"), "must be a number"),
        (json!(""), "must be a number"),
        (json!(true), "must be a number"),
    ] {
        let answer = server.report(&with(event("pi"), &json!({"internet_speed": speed}))).await;
        assert_eq!(answer.complaints(), [format!("\"internet_speed\" {rule}")]);
    }
}

async fn largest_values_are_kept_exactly(server: &TestServer) {
    let largest = json!({
        "total_files_synced": i32::MAX, "total_errors": i32::MAX, "internet_speed": 99_999_999.99,
        "duration_seconds": 31_536_000.0, "bytes_synced": (1_i64 << 53) - 1,
    });
    let data = server.store(&with(event("pi"), &largest)).await;
    assert_eq!(with(data.clone(), &largest), data);
    let stored = newest(server, "pi").await;
    assert_eq!(with(stored.clone(), &largest), stored);
    let beyond = json!({"duration_seconds": 31_536_000.001, "bytes_synced": 1_i64 << 53});
    assert_eq!(
        server.report(&with(event("pi"), &beyond)).await.complaints(),
        [
            "\"duration_seconds\" must be less than or equal to 31536000",
            "\"bytes_synced\" must be less than or equal to 9007199254740991",
        ]
    );
}

async fn the_edge_of_the_allowed_skew(server: &TestServer) {
    let edge = at(300);
    let beyond = edge.saturating_add_milliseconds(1);
    server.store(&with(event("pi"), &json!({"timestamp": edge}))).await;
    let late = with(event("pi"), &json!({"timestamp": beyond}));
    assert_eq!(server.report(&late).await.complaints(), ["Timestamp cannot be in the future"]);
    // Time goes on, and what was the future is not.
    server.clock.set(at(0).saturating_add_milliseconds(1));
    let data = server.store(&late).await;
    assert_eq!(data["timestamp"], json!(beyond));
    assert_eq!(data["created_at"], "2026-11-22T12:00:00.001Z");
}

async fn offsets_and_fractions(server: &TestServer) {
    for (sent, stored) in [
        ("2025-06-17T16:00:00+05:30", "2025-06-17T10:30:00.000Z"),
        ("2025-06-17T02:30:00-08:00", "2025-06-17T10:30:00.000Z"),
        ("2025-06-17T10:30:00", "2025-06-17T10:30:00.000Z"),
        ("2025-06-17", "2025-06-17T00:00:00.000Z"),
        ("2025-06-17T10:30:00.123999Z", "2025-06-17T10:30:00.123Z"),
        ("1969-12-31T23:59:59.9999Z", "1969-12-31T23:59:59.999Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
    ] {
        let device = format!("pi-{sent}").replace('+', " ");
        let data = server.store(&with(event(&device), &json!({"timestamp": sent}))).await;
        assert_eq!(data["timestamp"], stored, "{sent}");
        let path = device.replace(' ', "%20");
        assert_eq!(newest(server, &path).await["timestamp"], stored, "{sent}");
    }
}

async fn refused_events_leave_no_trace(server: &TestServer) {
    for refused in [json!({"total_errors": -1}), json!({"timestamp": "2999-01-01"})] {
        server.report(&with(event("pi"), &refused)).await.details();
    }
    server.report_text("{").await.error(400);
    assert_eq!(server.get("/api/device/pi").await.error(404), "Device not found");
    assert_eq!(server.get("/api/stats").await.data(200)["total_devices"], 0);
}

async fn names_in_any_script(server: &TestServer) {
    for device in
        ["Schule Müller", "π-1", "設備", "a'b\"c\\d", "%s %_", "😀", " ", &"ü".repeat(255)]
    {
        let fields = json!({"job": device.chars().take(100).collect::<String>()});
        let data = server.store(&with(event(device), &fields)).await;
        assert_eq!(data["device_id"], device);
        assert_eq!(data["job"], fields["job"]);
    }
    let devices = server.get("/api/devices").await.data(200);
    assert_eq!(devices["pagination"]["total_devices"], 8);
    assert!(column(&devices["devices"], "device_id").contains(&json!("設備")));
}

/// What does not reach the store needs no second store to be tested on.
async fn server() -> TestServer {
    TestServer::on_sqlite(|_| {}).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_wrong_field_is_named_at_once() {
    let server = server().await;
    let wrong = json!({
        "device_id": "x".repeat(256), "timestamp": {}, "total_files_synced": null,
        "total_errors": "two", "internet_speed": [1, 2], "job": "j".repeat(101),
        "duration_seconds": -0.5, "bytes_synced": 1.5, "metadata": 5,
    });
    let details = server.report(&wrong).await.details();
    assert_eq!(
        details,
        json!([
            {
                "field": "device_id",
                "message": "\"device_id\" length must be less than or equal to 255 characters long",
                "value": "x".repeat(256),
            },
            {"field": "timestamp", "message": "\"timestamp\" must be a valid date", "value": {}},
            {
                "field": "total_files_synced",
                "message": "\"total_files_synced\" must be a number",
                "value": null,
            },
            {
                "field": "total_errors",
                "message": "\"total_errors\" must be a number",
                "value": "two",
            },
            {
                "field": "internet_speed",
                "message": "\"internet_speed\" must be a number",
                "value": "an array of 2 items",
            },
            {
                "field": "job",
                "message": "\"job\" length must be less than or equal to 100 characters long",
                "value": "j".repeat(101),
            },
            {
                "field": "duration_seconds",
                "message": "\"duration_seconds\" must be greater than or equal to 0",
                "value": -0.5,
            },
            {
                "field": "bytes_synced",
                "message": "\"bytes_synced\" must be an integer",
                "value": 1.5,
            },
            {"field": "metadata", "message": "\"metadata\" must be of type object", "value": 5},
        ])
    );
    // An answer does not grow with what was sent.
    let long = server.report(&with(event("pi"), &json!({"device_id": "x".repeat(50_000)}))).await;
    let echo = long.details()[0]["value"].as_str().unwrap().chars().count();
    assert_eq!(echo, 257, "256 characters and a sign that there was more");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_json_than_an_object() {
    let server = server().await;
    for body in ["[]", "[{}]", "null", "7", "\"text\"", "true"] {
        let details = server.report_text(body).await.details();
        assert_eq!(column(&details, "field"), [""], "{body}");
        assert_eq!(column(&details, "message"), ["\"value\" must be of type object"], "{body}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_that_is_no_json_or_hardly() {
    let server = server().await;
    let body = event("pi").to_string();
    for malformed in ["", " ", "{", "{}x", "{'a': 1}", "nul", "{\"a\": 01}", "<event/>"] {
        let error = server.report_text(malformed).await.error(400);
        assert!(error.starts_with("Malformed JSON: "), "{malformed}: {error}");
    }
    for bytes in [&b"\xff\xfe{}"[..], b"{\"device_id\": \"\xff\"}", b"\0"] {
        let error = server.report_text(bytes.to_vec()).await.error(400);
        assert!(error.starts_with("Malformed JSON: "), "{error}");
    }
    // A byte order mark, as Windows tools write it, and spaces around.
    server.report_text(format!("\u{feff}{body}")).await.data(201);
    server.report_text(format!("\r\n\t {body} \n")).await.data(201);
    // Of a repeated field the last counts, as in JavaScript.
    let repeated = body.replacen('{', r#"{"device_id":"first","total_errors":-1,"#, 1);
    assert_eq!(server.report_text(repeated).await.data(201)["device_id"], "pi");
    // Unknown fields may hold whatever JSON can.
    for unknown in [r#""\ud800":1"#, r#""x":"\ud800""#, r#""x":1e999"#, r#""x":"\u0000""#] {
        server.report_text(body.replacen('{', &format!("{{{unknown},"), 1)).await.data(201);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_characters_and_half_characters() {
    let server = server().await;
    for field in ["device_id", "job"] {
        for (text, rule) in [
            (r"\u0000", "must not contain control characters"),
            (r"pi\n1", "must not contain control characters"),
            (r"pi\u007f", "must not contain control characters"),
            (r"pi\u0085", "must not contain control characters"),
            (r"pi\ud800", "must be valid Unicode text"),
            (r"\udc00\ud800", "must be valid Unicode text"),
        ] {
            let mut event = event("pi");
            event[field] = json!("TEXT");
            let body = event.to_string().replace("TEXT", text);
            assert_eq!(
                server.report_text(body).await.complaints(),
                [format!("\"{field}\" {rule}")],
                "{text}"
            );
        }
    }
    // JSON has no raw control characters in its strings.
    let raw = event("TEXT").to_string().replace("TEXT", "pi\u{0}");
    assert!(server.report_text(raw).await.error(400).starts_with("Malformed JSON: "));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deep_nesting_is_read_or_refused() {
    let server = server().await;
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    let body = |field: &str, json: &str| {
        event("pi").to_string().replacen('{', &format!(r#"{{"{field}":{json},"#), 1)
    };
    server.report_text(body("x", &nested(30_000))).await.data(201);
    assert!(server.report_text("[".repeat(60_000)).await.error(400).starts_with("Malformed"));
    let metadata = format!(r#"{{"a":{}}}"#, nested(1000));
    assert_eq!(
        server.report_text(body("metadata", &metadata)).await.complaints(),
        ["\"metadata\" must not be nested more than 127 levels deep"]
    );
    server.stop().await;
}

/// An event whose body has so many bytes.
fn body_of(bytes: usize) -> String {
    let body = event("pi").to_string();
    let filler = bytes - body.len() - r#""filler":"","#.len();
    body.replacen('{', &format!(r#"{{"filler":"{}","#, "x".repeat(filler)), 1)
}

/// A report whose head and body are the test's own, on a connection of its own.
async fn report_raw(client: &Client, head: &str, body: &[u8]) -> RawAnswer {
    let mut connection = client.connect().await;
    let request = format!(
        "POST /api/sync-event HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{head}\r\n"
    );
    connection.write([request.as_bytes(), body].concat()).await;
    connection.answer().await
}

fn chunked(body: &str) -> Vec<u8> {
    let mut chunks = String::new();
    for chunk in body.as_bytes().chunks(10_000) {
        let text = std::str::from_utf8(chunk).unwrap();
        chunks += &format!("{:x}\r\n{text}\r\n", chunk.len());
    }
    (chunks + "0\r\n\r\n").into_bytes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_body_and_one_byte_more() {
    let server = server().await;
    let too_large = "The request's body is larger than 65536 bytes";
    server.report_text(body_of(BODY_LIMIT)).await.data(201);
    let answer = server.report_text(body_of(BODY_LIMIT + 1)).await;
    assert_eq!(answer.error(413), too_large);
    assert_eq!(answer.header("connection"), "close");
    // Refused by what it says of itself, before it is sent.
    let answer = report_raw(&server, "content-length: 1000000000000\r\n", b"").await;
    assert_eq!(answer.status, 413);
    assert!(answer.body.contains(too_large), "{}", answer.body);
    let head = "transfer-encoding: chunked\r\n";
    let answer = report_raw(&server, head, &chunked(&body_of(BODY_LIMIT))).await;
    assert_eq!(answer.status, 201, "{}", answer.body);
    let answer = report_raw(&server, head, &chunked(&body_of(BODY_LIMIT + 1))).await;
    assert_eq!(answer.status, 413);
    assert!(answer.head.contains("connection: close\r\n"), "{}", answer.head);
    server.stop().await;
}

/// The answer to an event that is declared to be this.
async fn report_as(server: &TestServer, headers: &[(&'static str, &str)]) -> Answer {
    let mut request = server.request(Method::POST, "/api/sync-event").body(event("pi").to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(request).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_body_must_be_declared_as_json() {
    let server = server().await;
    for media_type in [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/json;charset=UTF-8",
        "application/vnd.fleet+json",
    ] {
        report_as(&server, &[("content-type", media_type)]).await.data(201);
    }
    let expected = "Unsupported media type: send JSON with Content-Type: application/json";
    assert_eq!(report_as(&server, &[]).await.error(415), expected);
    for media_type in ["text/plain", "application/x-www-form-urlencoded", "json", "", "text/json"] {
        let answer = report_as(&server, &[("content-type", media_type)]).await;
        assert_eq!(answer.error(415), expected, "{media_type}");
    }
    server.stop().await;
}
