//! `GET /api/device/{id}/sync-history`: pages, ranges of time, jobs, and ids that are awkward in a path.

use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, column, event, failure, success, with},
    server::TestServer,
};

both_stores!(
    pages_follow_one_another,
    newest_first_and_of_one_instant_the_latest_stored,
    both_ends_of_a_range_are_in_it,
    a_bare_date_is_its_midnight,
    a_plus_sign_may_come_unencoded,
    only_one_jobs_events,
    figures_are_over_all_events_whatever_the_query,
    awkward_device_ids,
    unknown_devices,
    every_wrong_parameter_is_named_at_once,
);

async fn history(server: &TestServer, query: &str) -> Value {
    server.get(&format!("/api/device/pi/sync-history?{query}")).await.data(200)
}

/// The ids of the events that a query finds.
async fn found(server: &TestServer, query: &str) -> Vec<Value> {
    column(&history(server, query).await["sync_history"], "id")
}

/// Stores a success at each of these seconds and gives the ids.
async fn store_at(server: &TestServer, seconds: impl IntoIterator<Item = i64>) -> Vec<Value> {
    let mut ids = Vec::new();
    for second in seconds {
        ids.push(server.store(&success("pi", at(second))).await["id"].take());
    }
    ids
}

async fn pages_follow_one_another(server: &TestServer) {
    let mut newest_first = store_at(server, -60..0).await;
    newest_first.reverse();
    let all = history(server, "").await;
    assert_eq!(column(&all["sync_history"], "id"), newest_first[..50]);
    assert_eq!(all["pagination"], json!({"limit": 50, "offset": 0, "total_events": 60}));
    assert_eq!(found(server, "limit=1000").await, newest_first);
    let mut paged = Vec::new();
    for offset in [0, 25, 50, 75] {
        let page = history(server, &format!("limit=25&offset={offset}")).await;
        assert_eq!(page["pagination"], json!({"limit": 25, "offset": offset, "total_events": 60}));
        paged.extend(column(&page["sync_history"], "id"));
    }
    assert_eq!(paged, newest_first);
    assert_eq!(found(server, "limit=1&offset=59").await, newest_first[59..]);
    assert!(found(server, "offset=9007199254740991").await.is_empty());
}

async fn newest_first_and_of_one_instant_the_latest_stored(server: &TestServer) {
    let ids = store_at(server, [-5, -3, -5, -4, -3, -5]).await;
    let expected: Vec<_> = [4, 1, 3, 5, 2, 0].map(|stored| ids[stored].clone()).into();
    assert_eq!(found(server, "").await, expected);
    // Also across the edge of a page.
    assert_eq!(found(server, "limit=1").await, expected[..1]);
    assert_eq!(found(server, "limit=3&offset=1").await, expected[1..4]);
    assert_eq!(found(server, "limit=3&offset=4").await, expected[4..]);
}

async fn both_ends_of_a_range_are_in_it(server: &TestServer) {
    let ids = store_at(server, [-4, -3, -2, -1]).await;
    let ids =
        |range: std::ops::Range<usize>| -> Vec<_> { ids[range].iter().rev().cloned().collect() };
    for (from, until, expected) in [
        (Some("2026-11-22T11:59:57Z"), Some("2026-11-22T11:59:58Z"), ids(1..3)),
        (Some("2026-11-22T11:59:57.000Z"), None, ids(1..4)),
        (None, Some("2026-11-22T11:59:58Z"), ids(0..3)),
        (Some("2026-11-22T11:59:57.001Z"), Some("2026-11-22T11:59:57.999Z"), ids(0..0)),
        (Some("2026-11-22T12:59:57+01:00"), Some("2026-11-22T11:59:57"), ids(1..2)),
        // Backwards is empty, not wrong.
        (Some("2026-11-22T11:59:58Z"), Some("2026-11-22T11:59:57Z"), ids(0..0)),
    ] {
        let named = [("startDate", from), ("endDate", until)];
        let query: Vec<_> = named
            .iter()
            .filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?)))
            .collect();
        let data = history(server, &query.join("&")).await;
        assert_eq!(column(&data["sync_history"], "id"), expected, "{query:?}");
        // Counts what this query can page to.
        assert_eq!(data["pagination"]["total_events"], expected.len(), "{query:?}");
    }
}

async fn a_bare_date_is_its_midnight(server: &TestServer) {
    let mut ids = Vec::new();
    for time in ["2025-06-16T23:59:59.999Z", "2025-06-17T00:00:00Z", "2025-06-17T00:00:00.001Z"] {
        let event = with(event("pi"), &json!({"timestamp": time}));
        ids.push(server.store(&event).await["id"].take());
    }
    assert_eq!(found(server, "startDate=2025-06-17").await, [ids[2].clone(), ids[1].clone()]);
    assert_eq!(found(server, "endDate=2025-06-17").await, [ids[1].clone(), ids[0].clone()]);
    assert_eq!(found(server, "startDate=2025-06-17&endDate=2025-06-17").await, ids[1..2]);
}

/// In a query string a plus sign means a space, and yet everybody forgets to encode it.
async fn a_plus_sign_may_come_unencoded(server: &TestServer) {
    let ids = store_at(server, [-2, -1]).await;
    for plus in ["+", "%2B", "%20"] {
        let from = format!("startDate=2026-11-22T13:59:59{plus}02:00");
        assert_eq!(found(server, &from).await, ids[1..], "{plus}");
    }
    // A space may also stand before the time of day.
    for space in ["+", "%20"] {
        let from = format!("startDate=2026-11-22{space}11:59:59");
        assert_eq!(found(server, &from).await, ids[1..], "{space}");
    }
}

async fn only_one_jobs_events(server: &TestServer) {
    let mut ids = Vec::new();
    for (second, job) in
        [(-4, Some("nightly")), (-3, None), (-2, Some("c++ & Größe")), (-1, Some("nightly"))]
    {
        let event = with(success("pi", at(second)), &json!({"job": job}));
        ids.push(server.store(&event).await["id"].take());
    }
    assert_eq!(found(server, "job=nightly").await, [ids[3].clone(), ids[0].clone()]);
    assert_eq!(found(server, "job=c%2B%2B%20%26%20Gr%C3%B6%C3%9Fe").await, ids[2..3]);
    assert!(found(server, "job=Nightly").await.is_empty());
    let page = history(server, "job=nightly&limit=1&offset=1").await;
    assert_eq!(column(&page["sync_history"], "id"), ids[..1]);
    assert_eq!(page["pagination"], json!({"limit": 1, "offset": 1, "total_events": 2}));
    let late = "job=nightly&startDate=2026-11-22T11:59:58Z";
    assert_eq!(found(server, late).await, ids[3..]);
}

async fn figures_are_over_all_events_whatever_the_query(server: &TestServer) {
    for (second, speed) in [(-30, Some(10.0)), (-20, Some(20.01)), (-10, None)] {
        server.store(&with(success("pi", at(second)), &json!({"internet_speed": speed}))).await;
    }
    server.store(&failure("pi", at(-5))).await;
    // Late news of an old failure.
    server.store(&failure("pi", at(-40))).await;
    server.store(&failure("another", at(-1))).await;
    let expected = json!({
        "total_syncs": 5,
        "total_files_synced": 3,
        "total_errors": 2,
        // Of two measurements, 15.005.
        "avg_internet_speed": 15.01,
        "first_sync": at(-40),
        "last_sync": at(-5),
        "last_success": at(-10),
        "failed_syncs": 2,
        "successful_syncs": 3,
        "success_rate": 60.0,
        "consecutive_failures": 1,
    });
    for query in ["", "limit=1", "offset=100", "startDate=2030-01-01", "job=none"] {
        assert_eq!(history(server, query).await["stats"], expected, "{query}");
    }
}

async fn awkward_device_ids(server: &TestServer) {
    for (device, path) in [
        ("school/17/pi", "school%2F17%2Fpi"),
        ("100%", "100%25"),
        ("%2F", "%252F"),
        ("a+b c", "a+b%20c"),
        ("?#&;=", "%3F%23%26%3B%3D"),
        ("Schule Müller", "Schule%20M%C3%BCller"),
        ("設備", "%E8%A8%AD%E5%82%99"),
        ("sync-history", "sync-history"),
        ("😀\"'", "%F0%9F%98%80%22%27"),
        ("a\\b", "a%5Cb"),
    ] {
        server.store(&event(device)).await;
        let data = server.get(&format!("/api/device/{path}/sync-history")).await.data(200);
        assert_eq!(data["device_id"], device);
        assert_eq!(data["stats"]["total_syncs"], 1, "{device}");
        assert_eq!(column(&data["sync_history"], "device_id"), [device]);
        assert_eq!(server.get(&format!("/api/device/{path}")).await.data(200)["device_id"], device);
    }
}

/// A request whose path goes over the wire as it stands here: clients resolve dots before they send.
async fn get_raw(server: &TestServer, path: &str) -> (u16, Value) {
    let mut connection = server.connect().await;
    connection.write(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
    let answer = connection.answer().await;
    (answer.status, serde_json::from_str(&answer.body).unwrap())
}

async fn unknown_devices(server: &TestServer) {
    server.store(&event("pi")).await;
    for path in ["nobody", "PI", "pi%20", "p%25", "%F0%9F%98%80"] {
        let path = format!("/api/device/{path}/sync-history");
        assert_eq!(server.get(&path).await.error(404), "Device not found", "{path}");
    }
    for (path, rule) in [
        ("", "is not allowed to be empty"),
        ("%00", "must not contain control characters"),
        ("pi%0A", "must not contain control characters"),
        ("%FF", "must be valid UTF-8"),
    ] {
        let answer = server.get(&format!("/api/device/{path}/sync-history")).await;
        assert_eq!(answer.complaints(), [format!("\"device_id\" {rule}")], "{path}");
    }
    let long = server.get(&format!("/api/device/{}/sync-history", "x".repeat(256))).await;
    let rule = "length must be less than or equal to 255 characters long";
    assert_eq!(long.complaints(), [format!("\"device_id\" {rule}")]);
    server.store(&event("..")).await;
    let (status, body) = get_raw(server, "/api/device/../sync-history").await;
    assert_eq!((status, &body["data"]["device_id"]), (200, &json!("..")));
}

async fn every_wrong_parameter_is_named_at_once(server: &TestServer) {
    let get = async |query: &str| -> Answer {
        server.get(&format!("/api/device/pi/sync-history?{query}")).await
    };
    let query = "limit=0&offset=-1&startDate=soon&endDate=2026-02-30&job=";
    assert_eq!(
        get(query).await.details(),
        json!([
            {
                "field": "limit",
                "message": "\"limit\" must be greater than or equal to 1",
                "value": 0,
            },
            {
                "field": "offset",
                "message": "\"offset\" must be greater than or equal to 0",
                "value": -1,
            },
            {
                "field": "startDate",
                "message": "\"startDate\" must be in ISO 8601 date format",
                "value": "soon",
            },
            {
                "field": "endDate",
                "message": "\"endDate\" must be in ISO 8601 date format",
                "value": "2026-02-30",
            },
            {"field": "job", "message": "\"job\" is not allowed to be empty", "value": ""},
        ])
    );
    for (query, complaint) in [
        ("limit=1001", "\"limit\" must be less than or equal to 1000"),
        ("limit=", "\"limit\" must be a number"),
        ("limit", "\"limit\" must be a number"),
        ("limit=1.5", "\"limit\" must be an integer"),
        ("limit=99999999999999999999", "\"limit\" must be less than or equal to 1000"),
        ("limit=1&limit=2", "\"limit\" must be given only once"),
        ("offset=9007199254740992", "\"offset\" must be less than or equal to 9007199254740991"),
        ("offset=-99999999999999999999", "\"offset\" must be greater than or equal to 0"),
        ("startDate=", "\"startDate\" must be in ISO 8601 date format"),
        ("job=a%00b", "\"job\" must not contain control characters"),
    ] {
        assert_eq!(get(query).await.complaints(), [complaint], "{query}");
    }
    // What nobody asks about is nobody's business.
    server.store(&event("pi")).await;
    for query in ["page=2", "limit=1e1&offset=%200%20", "&&=", "x=%FF"] {
        get(query).await.data(200);
    }
}
