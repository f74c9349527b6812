//! What the Node PiSync's clients are used to, call by call as it was recorded from that service. Only
//! numbers have changed: they are JSON numbers now. Where the service hung or took nonsense, these
//! tests say what is answered instead.

use pisync::config::http::HttpSettings;
use serde_json::{Value, json};

use crate::support::{
    http::{column, event, keys, send, with},
    server::TestServer,
};

both_stores!(
    an_event_with_all_fields,
    a_speed_that_was_not_measured,
    a_speed_is_rounded_and_an_unknown_field_ignored,
    a_negative_speed_is_refused,
    what_no_column_holds_is_refused,
    a_bare_date_and_numbers_as_text,
    wrong_counts,
    nothing_at_all,
    wrong_types_and_dates,
    what_never_got_an_answer,
    history,
    history_of_an_unknown_device,
    history_with_wrong_parameters,
    repeated_failures,
    repeated_failures_with_a_wrong_threshold,
    stats,
    welcome,
    health,
);

const PROCESSED: &str = "Sync event processed successfully";

fn full_event() -> Value {
    json!({
        "device_id": "pi-device-001", "timestamp": "2025-06-17T10:30:00.000Z",
        "total_files_synced": 150, "total_errors": 2, "internet_speed": 45.6,
    })
}

/// What is answered to the usual event with these fields in place of its own.
async fn stored(server: &TestServer, fields: &Value) -> Value {
    server.store(&with(full_event(), fields)).await
}

/// The one detail of the answer to the usual event with this field in place of its own.
async fn refused(server: &TestServer, field: &str, value: Value) -> String {
    let details = server.report(&with(full_event(), &json!({ field: value }))).await.details();
    assert_eq!(details.as_array().unwrap().len(), 1, "{details}");
    assert_eq!(keys(&details[0]), ["field", "message", "value"]);
    assert_eq!((&details[0]["field"], &details[0]["value"]), (&json!(field), &value));
    details[0]["message"].as_str().unwrap().to_owned()
}

async fn an_event_with_all_fields(server: &TestServer) {
    let answer = server.report(&full_event()).await.json(201);
    let id = answer["data"]["id"].as_i64().unwrap();
    assert!(id > 0);
    assert_eq!(
        answer,
        json!({
            "success": true,
            "message": PROCESSED,
            "data": {
                "id": id,
                "device_id": "pi-device-001",
                "timestamp": "2025-06-17T10:30:00.000Z",
                "total_files_synced": 150,
                "total_errors": 2,
                "internet_speed": 45.6,
                "created_at": "2026-11-22T12:00:00.000Z",
            },
        })
    );
}

async fn a_speed_that_was_not_measured(server: &TestServer) {
    let mut without = full_event();
    without.as_object_mut().unwrap().remove("internet_speed");
    for event in [without, with(full_event(), &json!({"internet_speed": null}))] {
        let data = server.store(&event).await;
        assert!(keys(&data).contains(&"internet_speed"), "{data}");
        assert_eq!(data["internet_speed"], Value::Null);
    }
}

async fn a_speed_is_rounded_and_an_unknown_field_ignored(server: &TestServer) {
    let data =
        stored(server, &json!({"internet_speed": 45.678, "extra": {"any": ["thing"]}})).await;
    assert_eq!(data["internet_speed"], 45.68);
    assert!(!keys(&data).contains(&"extra"), "{data}");
}

async fn a_negative_speed_is_refused(server: &TestServer) {
    let message = refused(server, "internet_speed", json!(-3)).await;
    assert_eq!(message, "\"internet_speed\" must be greater than or equal to 0");
}

async fn what_no_column_holds_is_refused(server: &TestServer) {
    let message = refused(server, "internet_speed", json!(1e12)).await;
    assert_eq!(message, "\"internet_speed\" must be less than or equal to 99999999.99");
    for field in ["total_files_synced", "total_errors"] {
        let message = refused(server, field, json!(3_000_000_000_u32)).await;
        assert_eq!(message, format!("\"{field}\" must be less than or equal to 2147483647"));
    }
}

async fn a_bare_date_and_numbers_as_text(server: &TestServer) {
    let fields = json!({
        "timestamp": "2025-06-17", "total_files_synced": "150", "total_errors": "0",
    });
    let data = stored(server, &fields).await;
    assert_eq!(data["timestamp"], "2025-06-17T00:00:00.000Z");
    assert_eq!(data["total_files_synced"], 150);
    assert_eq!(data["total_errors"], 0);
}

async fn wrong_counts(server: &TestServer) {
    let fields = json!({
        "timestamp": "2025-06-17T16:00:00+05:30", "total_files_synced": 1.5, "total_errors": -1,
    });
    assert_eq!(
        server.report(&with(full_event(), &fields)).await.json(400),
        json!({
            "success": false,
            "error": "Validation failed",
            "code": "validation_failed",
            "details": [
                {
                    "field": "total_files_synced",
                    "message": "\"total_files_synced\" must be an integer",
                    "code": "type",
                    "value": 1.5,
                },
                {
                    "field": "total_errors",
                    "message": "\"total_errors\" must be greater than or equal to 0",
                    "code": "range",
                    "value": -1,
                },
            ],
        })
    );
}

async fn nothing_at_all(server: &TestServer) {
    let required =
        |field: &str| json!({"field": field, "message": format!("\"{field}\" is required")});
    let fields = ["device_id", "timestamp", "total_files_synced", "total_errors"];
    assert_eq!(server.report(&json!({})).await.details(), json!(fields.map(required)));
}

async fn wrong_types_and_dates(server: &TestServer) {
    for (field, value, message) in [
        ("device_id", json!(""), "\"device_id\" is not allowed to be empty"),
        ("device_id", json!(7), "\"device_id\" must be a string"),
        ("timestamp", json!("yesterday"), "\"timestamp\" must be in ISO 8601 date format"),
        ("timestamp", json!(1_750_000_000_000_i64), "\"timestamp\" must be a valid date"),
        ("timestamp", json!("2999-01-01T00:00:00.000Z"), "Timestamp cannot be in the future"),
    ] {
        assert_eq!(refused(server, field, value).await, message);
    }
    let details = server.report(&json!([])).await.details();
    assert_eq!(column(&details, "field"), [""]);
    assert_eq!(column(&details, "message"), ["\"value\" must be of type object"]);
}

async fn what_never_got_an_answer(server: &TestServer) {
    let error = server.report_text(r#"{"device_id": "pi","#).await.error(400);
    assert!(error.starts_with("Malformed JSON: "), "{error}");
    assert_eq!(server.get("/no/such/path").await.error(404), "Route not found");
}

async fn history(server: &TestServer) {
    let event = server.store(&full_event()).await;
    let answer = server.get("/api/device/pi-device-001/sync-history?limit=10").await.json(200);
    assert_eq!(
        answer,
        json!({
            "success": true,
            "message": "Sync history retrieved successfully",
            "data": {
                "device_id": "pi-device-001",
                "stats": {
                    "total_syncs": 1,
                    "total_files_synced": 150,
                    "total_errors": 2,
                    "avg_internet_speed": 45.6,
                    "first_sync": "2025-06-17T10:30:00.000Z",
                    "last_sync": "2025-06-17T10:30:00.000Z",
                    "last_success": null,
                    "last_failed_sync": "2025-06-17T10:30:00.000Z",
                    "failed_syncs": 1,
                    "successful_syncs": 0,
                    "success_rate": 0.0,
                    "consecutive_failures": 1,
                },
                "sync_history": [{
                    "id": event["id"],
                    "device_id": "pi-device-001",
                    "timestamp": "2025-06-17T10:30:00.000Z",
                    "total_files_synced": 150,
                    "total_errors": 2,
                    "internet_speed": 45.6,
                    "created_at": "2026-11-22T12:00:00.000Z",
                    "updated_at": "2026-11-22T12:00:00.000Z",
                }],
                "pagination": {
                    "limit": 10, "offset": 0, "total": 1, "total_events": 1, "next_cursor": null,
                },
            },
        })
    );
}

/// The Node service's Swagger page promised 404; it answered 200 with zeros.
async fn history_of_an_unknown_device(server: &TestServer) {
    assert_eq!(server.get("/api/device/nobody/sync-history").await.error(404), "Device not found");
}

async fn history_with_wrong_parameters(server: &TestServer) {
    for (query, expected) in [
        ("limit=0", vec!["\"limit\" must be greater than or equal to 1"]),
        ("limit=5000", vec!["\"limit\" must be less than or equal to 1000"]),
        (
            "limit=abc&offset=-1&startDate=x",
            vec![
                "\"limit\" must be a number",
                "\"offset\" must be greater than or equal to 0",
                "\"startDate\" must be in ISO 8601 date format",
            ],
        ),
    ] {
        let answer = server.get(&format!("/api/device/pi/sync-history?{query}")).await;
        assert_eq!(answer.complaints(), expected, "{query}");
    }
}

async fn repeated_failures(server: &TestServer) {
    server.store(&full_event()).await;
    server.store(&event("pi-that-works")).await;
    assert_eq!(
        server.get("/api/devices/repeated-failures?threshold=1").await.json(200),
        json!({
            "success": true,
            "message": "Devices with repeated failures retrieved successfully",
            "data": {
                "threshold": 1,
                "total_devices": 1,
                "devices": [{
                    "device_id": "pi-device-001",
                    "total_failed_syncs": 1,
                    "consecutive_failures": 1,
                    "last_failed_sync": "2025-06-17T10:30:00.000Z",
                    "last_success": null,
                    "device_registered": "2026-11-22T12:00:00.000Z",
                    "last_seen": "2026-11-22T12:00:00.000Z",
                }],
                "pagination": {"limit": null, "offset": 0, "total": 1, "next_cursor": null},
            },
        })
    );
    let data = server.get("/api/devices/repeated-failures").await.data(200);
    let pagination = json!({"limit": null, "offset": 0, "total": 0, "next_cursor": null});
    assert_eq!(
        data,
        json!({"threshold": 3, "total_devices": 0, "devices": [], "pagination": pagination})
    );
}

async fn repeated_failures_with_a_wrong_threshold(server: &TestServer) {
    let answer = server.get("/api/devices/repeated-failures?threshold=0").await;
    let complaint = "\"threshold\" must be greater than or equal to 1";
    assert_eq!(answer.details(), json!([{"field": "threshold", "message": complaint, "value": 0}]));
}

async fn stats(server: &TestServer) {
    server.store(&full_event()).await;
    assert_eq!(
        server.get("/api/stats").await.json(200),
        json!({
            "success": true,
            "message": "System statistics retrieved successfully",
            "data": {
                "total_devices": 1,
                "total_sync_events": 1,
                "total_failures": 1,
                "total_files_synced": 150,
                "total_errors": 2,
                "overall_success_rate": 0.0,
                "avg_internet_speed": 45.6,
                "active_devices_24h": 1,
                "recent_devices": [{
                    "device_id": "pi-device-001",
                    "total_syncs": 1,
                    "total_files_synced": 150,
                    "total_errors": 2,
                    "failed_syncs": 1,
                    "last_sync": "2025-06-17T10:30:00.000Z",
                    "last_failed_sync": "2025-06-17T10:30:00.000Z",
                }],
            },
        })
    );
}

async fn welcome(server: &TestServer) {
    for path in ["/", "/api"] {
        let body = server.get(path).await.json(200);
        assert_eq!(keys(&body), ["documentation", "endpoints", "message", "success", "version"]);
        assert_eq!(body["success"], true);
        assert_eq!(body["message"], "Welcome to PiSync Backend API");
        assert_eq!(body["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(body["documentation"], "/api-docs");
        for endpoint in [
            "POST /api/sync-event",
            "GET /api/device/{device_id}/sync-history",
            "GET /api/devices/repeated-failures",
            "GET /api/stats",
            "GET /health",
        ] {
            let summary = body["endpoints"][endpoint].as_str().unwrap_or_default();
            assert!(!summary.is_empty(), "{endpoint} in {body}");
        }
    }
}

/// Not in the envelope. The Node service gave the port as text.
async fn health(server: &TestServer) {
    let expected = json!({
        "status": "OK", "port": server.address().port(), "timestamp": "2026-11-22T12:00:00.000Z",
    });
    for path in ["/health", "/health/live", "/health/ready"] {
        assert_eq!(server.get(path).await.json(200), expected, "{path}");
    }
}

/// What Helmet sent.
pub(super) const HELMET: [(&str, &str); 11] = [
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("origin-agent-cluster", "?1"),
    ("referrer-policy", "no-referrer"),
    ("strict-transport-security", "max-age=31536000; includeSubDomains"),
    ("x-content-type-options", "nosniff"),
    ("x-dns-prefetch-control", "off"),
    ("x-download-options", "noopen"),
    ("x-frame-options", "SAMEORIGIN"),
    ("x-permitted-cross-domain-policies", "none"),
    ("x-xss-protection", "0"),
];

/// The limits that a server has when nothing else is set.
fn default_limits(settings: &mut HttpSettings) {
    (settings.sync_per_minute, settings.api_per_minute) = (50, 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_headers_of_any_answer() {
    let server = TestServer::on_sqlite(default_limits).await;
    let answers = [
        (server.report(&full_event()).await, Some("50"), Some("49")),
        (server.report(&json!({})).await, Some("50"), Some("48")),
        (server.get("/api/stats").await, Some("20"), Some("19")),
        (server.get("/no/such/path").await, Some("20"), Some("18")),
        (server.get("/health").await, None, None),
    ];
    for (answer, limit, remaining) in &answers {
        for (name, value) in HELMET {
            assert_eq!(answer.header(name), value, "{name}");
        }
        // CORS was open to everybody; now it is closed.
        assert!(!answer.headers.contains_key("access-control-allow-origin"));
        // Express said what it was.
        assert!(!answer.headers.contains_key("x-powered-by"));
        let (Some(limit), Some(remaining)) = (limit, remaining) else {
            assert!(answer.headers.keys().all(|name| !name.as_str().starts_with("ratelimit")));
            continue;
        };
        assert_eq!(answer.header("ratelimit-limit"), *limit);
        assert_eq!(answer.header("ratelimit-remaining"), *remaining);
        assert_eq!(answer.header("ratelimit-policy"), format!("{limit};w=60"));
        let reset: u32 = answer.header("ratelimit-reset").parse().unwrap();
        assert!((1..=60).contains(&reset), "{reset}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cross_origin_requests_are_refused_without_a_key() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let request = server.request(reqwest::Method::GET, "/api/stats");
    let answer = send(request.header("origin", "https://elsewhere.example")).await;
    answer.error(401);
    assert!(answer.headers.keys().all(|name| !name.as_str().starts_with("access-control")));
    server.stop().await;
}
