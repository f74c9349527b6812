//! `GET /api/device/{id}/sync-history`: pages, cursors, ranges of time, jobs, ids that are awkward in a
//! path, and the same events as CSV and NDJSON.

use std::{collections::BTreeSet, io::Read};

use pisync::store::Scope;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
};

use crate::{
    ingest::until,
    support::{
        events::{at, batch_at, now, success as stored_success},
        http::{Answer, column, event, failure, send, success, with},
        server::TestServer,
        store::key_request,
    },
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
    pages_follow_one_another_by_cursors_while_events_arrive,
    a_cursor_goes_with_everything_else,
    csv_and_ndjson_have_the_same_events,
    a_stream_takes_the_same_parameters,
    streams_are_refused_as_pages_are,
    a_long_history_is_streamed,
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
    let cursor = all["pagination"]["next_cursor"].as_str().unwrap();
    assert_eq!(
        all["pagination"],
        json!({"limit": 50, "offset": 0, "total": 60, "total_events": 60, "next_cursor": cursor})
    );
    assert_eq!(found(server, "limit=1000").await, newest_first);
    let mut paged = Vec::new();
    for offset in [0, 25, 50, 75] {
        let page = history(server, &format!("limit=25&offset={offset}")).await;
        let pagination = &page["pagination"];
        assert_eq!((&pagination["limit"], &pagination["offset"]), (&json!(25), &json!(offset)));
        assert_eq!(pagination["total_events"], 60);
        assert_eq!(pagination["next_cursor"].is_string(), offset < 50);
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
    assert_eq!(
        page["pagination"],
        json!({"limit": 1, "offset": 1, "total": 2, "total_events": 2, "next_cursor": null})
    );
    let late = "job=nightly&startDate=2026-11-22T11:59:58Z";
    assert_eq!(found(server, late).await, ids[3..]);
}

async fn figures_are_over_all_events_whatever_the_query(server: &TestServer) {
    for (second, speed) in [(-30, Some(10.0)), (-20, Some(20.01)), (-10, None)] {
        server.store(&with(success("pi", at(second)), &json!({"internet_speed": speed}))).await;
    }
    server.store(&failure("pi", at(-5))).await;
    // An old failure that is reported late.
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
        "last_failed_sync": at(-5),
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
    let query = "limit=0&offset=-1&cursor=7&startDate=soon&endDate=2026-02-30&job=";
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
                "field": "cursor",
                "message": "\"cursor\" must be a next_cursor of this list",
                "value": "7",
            },
            {
                "field": "startDate",
                "message": "\"startDate\" must be in ISO 8601 date format",
                "value": "soon",
            },
            {
                "field": "endDate",
                "message": "\"endDate\" must be a day that the calendar has",
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
        ("cursor=", "\"cursor\" must be a next_cursor of this list"),
        (
            "cursor=000637C1A3AA9E00000000000000019C",
            "\"cursor\" must be a next_cursor of this list",
        ),
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

/// One page, and the cursor to the next.
async fn page_after(
    server: &TestServer,
    cursor: Option<&str>,
    query: &str,
) -> (Vec<Value>, Option<String>) {
    let cursor = cursor.map_or_else(String::new, |cursor| format!("cursor={cursor}&"));
    let page = history(server, &format!("{cursor}{query}")).await;
    let next = page["pagination"]["next_cursor"].as_str().map(str::to_owned);
    (column(&page["sync_history"], "id"), next)
}

async fn pages_follow_one_another_by_cursors_while_events_arrive(server: &TestServer) {
    // Many of one instant, so that pages begin and end among them.
    let seconds: Vec<_> = [-9, -7, -7, -7, -7, -8, -7, -3, -3].into();
    let mut stored = store_at(server, seconds.iter().copied()).await;
    let place = |id: &Value| seconds[stored.iter().position(|one| one == id).unwrap()];
    let mut expected = stored.clone();
    expected.sort_by_key(|id| std::cmp::Reverse((place(id), id.as_i64())));
    for limit in [1, 2, 3, 8, 9, 10] {
        let (mut found, mut cursor) = (Vec::new(), None);
        loop {
            let (ids, next) =
                page_after(server, cursor.as_deref(), &format!("limit={limit}")).await;
            assert!(ids.len() == limit || next.is_none());
            found.extend(ids);
            cursor = next;
            if cursor.is_none() {
                break;
            }
            // Before and at what was read already: pages to come are not moved by it.
            stored.extend(store_at(server, [-1, -3]).await);
        }
        found.retain(|id| expected.contains(id));
        assert_eq!(found, expected, "{limit}");
        let unique: BTreeSet<_> = found.iter().map(Value::as_i64).collect();
        assert_eq!(unique.len(), found.len());
    }
}

async fn a_cursor_goes_with_everything_else(server: &TestServer) {
    let of = |job: &str, second| with(success("pi", at(second)), &json!({"job": job}));
    let mut ids = Vec::new();
    for second in -12..0 {
        let job = if second % 2 == 0 { "even" } else { "odd" };
        ids.push(server.store(&of(job, second)).await["id"].take());
    }
    let even: Vec<_> = ids.iter().step_by(2).rev().cloned().collect();
    let (first, cursor) = page_after(server, None, "limit=2&job=even").await;
    assert_eq!(first, even[..2]);
    let cursor = cursor.as_deref();
    assert_eq!(page_after(server, cursor, "job=even").await, (even[2..].to_vec(), None));
    let (ids_found, next) = page_after(server, cursor, "job=even&limit=1&offset=1").await;
    assert_eq!((ids_found, next.is_some()), (even[3..4].to_vec(), true));
    let range = "startDate=2026-11-22T11:59:49Z&endDate=2026-11-22T11:59:54Z&job=even";
    assert_eq!(page_after(server, cursor, range).await, (even[2..5].to_vec(), None));
    // The range ends before the cursor, or begins after it.
    let early = "endDate=2026-11-22T11:59:49Z&job=even";
    assert_eq!(page_after(server, cursor, early).await, (even[5..].to_vec(), None));
    let late = "startDate=2026-11-22T11:59:57Z";
    assert_eq!(page_after(server, cursor, late).await, (Vec::new(), None));
    // The total is that of all pages.
    let page = history(server, &format!("cursor={}&job=even&limit=1", cursor.unwrap())).await;
    assert_eq!(page["pagination"]["total_events"], 6);
    // Whatever else it may say, a cursor of the right form is a place.
    for anywhere in ["0".repeat(32), "f".repeat(32), format!("7{}", "f".repeat(31))] {
        history(server, &format!("cursor={anywhere}")).await;
    }
}

/// A device's history as another format.
async fn streamed(server: &TestServer, accept: &str, query: &str) -> Answer {
    let path = format!("/api/device/pi/sync-history?{query}");
    send(server.request(Method::GET, &path).header("accept", accept)).await
}

/// The records of a CSV file, read as RFC 4180 has it.
fn read_csv(text: &str) -> Vec<Vec<String>> {
    let (mut records, mut record, mut cell) = (Vec::new(), Vec::new(), String::new());
    let mut characters = text.chars().peekable();
    let mut quoted = false;
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                cell.push('"');
                characters.next();
            }
            '"' => quoted = !quoted,
            ',' if !quoted => record.push(std::mem::take(&mut cell)),
            '\r' if !quoted => {
                assert_eq!(characters.next(), Some('\n'));
                record.push(std::mem::take(&mut cell));
                records.push(std::mem::take(&mut record));
            }
            character => cell.push(character),
        }
    }
    assert!(!quoted && cell.is_empty() && record.is_empty(), "the last line has no end");
    records
}

async fn csv_and_ndjson_have_the_same_events(server: &TestServer) {
    let full = with(
        success("pi", at(-10)),
        &json!({
            "internet_speed": 45.67, "job": "=1+1, \"quoted\"", "duration_seconds": 73.25,
            "bytes_synced": 9_007_199_254_740_991_i64,
            "metadata": {"b": "line\nbreak", "a": "\"x\", é"},
        }),
    );
    server.store(&full).await;
    server.store(&failure("pi", at(-20))).await;
    let expected = history(server, "").await["sync_history"].take();

    let answer = streamed(server, "application/x-ndjson", "").await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/x-ndjson"));
    assert!(answer.text().ends_with('\n'));
    let lines: Vec<Value> =
        answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(json!(lines), expected);

    let answer = streamed(server, "text/csv", "").await;
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (200, "text/csv; charset=utf-8; header=present")
    );
    let vary: Vec<_> = answer.headers.get_all("vary").iter().collect();
    assert!(vary.iter().any(|name| *name == "accept"), "{vary:?}");
    let records = read_csv(answer.text());
    let names = &records[0];
    assert_eq!(records.len(), 3);
    for (record, event) in records[1..].iter().zip(expected.as_array().unwrap()) {
        assert_eq!(record.len(), names.len());
        for (name, cell) in names.iter().zip(record) {
            let expected = match &event[name] {
                Value::Null => String::new(),
                Value::String(text) => text.clone(),
                other if name == "metadata" => {
                    assert_eq!(&serde_json::from_str::<Value>(cell).unwrap(), other);
                    continue;
                }
                other => other.to_string(),
            };
            assert_eq!(*cell, expected, "{name}");
        }
        for name in event.as_object().unwrap().keys() {
            assert!(names.contains(name), "{name} is not in the CSV");
        }
    }
}

async fn a_stream_takes_the_same_parameters(server: &TestServer) {
    let mut newest_first = store_at(server, -9..0).await;
    newest_first.reverse();
    let ids = async |query: &str| -> Vec<Value> {
        let answer = streamed(server, "application/x-ndjson", query).await;
        assert_eq!(answer.status, 200);
        let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].take();
        answer.text().lines().map(id).collect()
    };
    assert_eq!(ids("").await, newest_first);
    assert_eq!(ids("limit=4").await, newest_first[..4]);
    assert_eq!(ids("limit=4&offset=3").await, newest_first[3..7]);
    assert_eq!(ids("offset=7").await, newest_first[7..]);
    assert_eq!(ids("startDate=2026-11-22T11:59:58Z").await, newest_first[..2]);
    assert!(ids("job=other").await.is_empty());
    let (_, cursor) = page_after(server, None, "limit=5").await;
    assert_eq!(ids(&format!("cursor={}", cursor.unwrap())).await, newest_first[5..]);
    let empty = streamed(server, "text/csv", "job=other").await;
    assert_eq!(read_csv(empty.text()).len(), 1, "names alone");
}

async fn streams_are_refused_as_pages_are(server: &TestServer) {
    for accept in ["text/csv", "application/x-ndjson"] {
        assert_eq!(streamed(server, accept, "").await.error(404), "Device not found");
        let wrong = streamed(server, accept, "limit=0").await;
        assert_eq!(wrong.complaints(), ["\"limit\" must be greater than or equal to 1"]);
    }
}

/// Stores so many events, which are hard to compress: 4 KiB each.
pub(crate) async fn store_long_history(server: &TestServer, events: i64) {
    let store = pisync::store::open(&server.database.target).await.unwrap();
    let mut writer = store.event_writer();
    let mut number = 1_u64;
    let mut noise = |_| {
        // Hard to compress.
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        format!("{number:016x}")
    };
    for batch in 0..events / 500 {
        let event = |second| {
            let noise: String = (0..250).map(&mut noise).collect();
            let metadata = pisync_core::Metadata::new(&format!("{{\"noise\":\"{noise}\"}}"));
            let event = stored_success("pi", at(-batch * 500 - second));
            pisync_core::SyncEvent { metadata: Some(metadata.unwrap()), ..event }
        };
        let batch = (0..500).map(event).collect();
        writer.write(&batch_at(now(), batch)).await.unwrap();
    }
}

/// Far more events than fit between server and client: whoever streams has not read the last ones yet
/// when the first ones arrive. So an event that is stored in the meantime, and is older than all of
/// them, is still in the answer.
async fn a_long_history_is_streamed(server: &TestServer) {
    const EVENTS: i64 = 7_000;
    store_long_history(server, EVENTS).await;
    // HTTP/1.0, which has no chunks, may be a proxy's and needs a key.
    let (_, key) = server.database.make_key(key_request(Scope::Read)).await;
    until(async || server.with_key(&key).get("/api/stats").await.status == 200).await;
    for (oldest, encoding) in ["identity", "gzip"].into_iter().enumerate() {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 << 10).unwrap();
        let mut connection = socket.connect(server.address()).await.unwrap();
        let request = format!(
            "GET /api/device/pi/sync-history HTTP/1.0\r\nhost: pisync\r\naccept: text/csv\r\n\
             accept-encoding: {encoding}\r\nauthorization: Bearer {key}\r\n\r\n"
        );
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0; 32 << 10];
        connection.read_exact(&mut answer).await.unwrap();
        let id = server.store(&success("pi", at(-1_000_000 - oldest as i64))).await["id"].take();
        connection.read_to_end(&mut answer).await.unwrap();

        let end = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        let (head, body) = answer.split_at(end);
        assert!(head.starts_with(b"HTTP/1.0 200"));
        let mut text = String::new();
        if encoding == "gzip" {
            assert!(body.len() < 22_000_000, "{} bytes are not compressed", body.len());
            flate2::read::GzDecoder::new(body).read_to_string(&mut text).unwrap();
        } else {
            text = String::from_utf8(body.to_vec()).unwrap();
        }
        let records = read_csv(&text);
        assert_eq!(records.len(), EVENTS as usize + 1 + oldest + 1, "{encoding}");
        let last = records.last().unwrap();
        assert_eq!(last[0], id.to_string(), "{encoding}: everything was read beforehand");
    }
}
