//! `GET /api/devices` and `GET|PATCH|DELETE /api/device/{id}`.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, column, event, failure, keys, send, success, with},
    server::TestServer,
};

both_stores!(
    a_device_and_its_jobs,
    names_and_groups_are_set_and_cleared,
    changes_that_are_refused_change_nothing,
    searching,
    groups,
    every_order,
    pages,
    wrong_parameters,
    cursors_of_awkward_ids,
    a_removed_device_starts_anew,
    devices_that_are_not_there,
);

/// The names of a device's fields in a list.
const FIELDS: [&str; 23] = [
    "avg_internet_speed",
    "consecutive_failures",
    "device_id",
    "device_registered",
    "expected",
    "failed_syncs",
    "first_sync",
    "group",
    "last_failed_sync",
    "last_seen",
    "last_success",
    "last_sync",
    "name",
    "next_due",
    "problems",
    "status",
    "status_since",
    "success_rate",
    "successful_syncs",
    "tags",
    "total_errors",
    "total_files_synced",
    "total_syncs",
];

/// Those of them that a sweep finds.
const SWEPT: [&str; 4] = ["next_due", "problems", "status", "status_since"];

async fn listed(server: &TestServer, query: &str) -> Vec<Value> {
    let data = server.get(&format!("/api/devices?{query}")).await.data(200);
    column(&data["devices"], "device_id")
}

async fn change(server: &TestServer, device: &str, change: Value) -> Value {
    server.patch(&format!("/api/device/{device}"), &change).await.data(200)
}

async fn a_device_and_its_jobs(server: &TestServer) {
    server.store(&with(success("pi", at(-30)), &json!({"internet_speed": 8.5}))).await;
    server.clock.set(at(5));
    let nightly = json!({"job": "nightly", "total_errors": 3});
    server.store(&with(success("pi", at(-20)), &nightly)).await;
    let answer = server.get("/api/device/pi").await;
    assert_eq!(answer.json(200)["message"], "Device retrieved successfully");
    let unnamed = json!({
        "total_syncs": 1,
        "total_files_synced": 1,
        "total_errors": 0,
        "avg_internet_speed": 8.5,
        "first_sync": at(-30),
        "last_sync": at(-30),
        "last_success": at(-30),
        "last_failed_sync": null,
        "failed_syncs": 0,
        "successful_syncs": 1,
        "success_rate": 100.0,
        "consecutive_failures": 0,
    });
    let nightly = json!({
        "total_syncs": 1,
        "total_files_synced": 1,
        "total_errors": 3,
        "avg_internet_speed": null,
        "first_sync": at(-20),
        "last_sync": at(-20),
        "last_success": null,
        "last_failed_sync": at(-20),
        "failed_syncs": 1,
        "successful_syncs": 0,
        "success_rate": 0.0,
        "consecutive_failures": 1,
    });
    let mut found = answer.data(200);
    // A sweep may have come meanwhile.
    for field in [&SWEPT[..], &["effective_policy"]].concat() {
        assert!(found.as_object_mut().unwrap().remove(field).is_some(), "{field}");
    }
    for job in found["jobs"].as_array_mut().unwrap() {
        for field in ["status", "next_due"] {
            assert!(job.as_object_mut().unwrap().remove(field).is_some(), "{field}");
        }
    }
    let set = json!({"expected": false, "run_started": null});
    assert_eq!(
        found,
        json!({
            "device_id": "pi",
            "name": null,
            "group": null,
            "tags": [],
            "note": null,
            "expected": null,
            "paused": false,
            "paused_until": null,
            "paused_by": [],
            "policy": {},
            "device_registered": at(0),
            "last_seen": at(5),
            "total_syncs": 2,
            "total_files_synced": 2,
            "total_errors": 3,
            "avg_internet_speed": 8.5,
            "first_sync": at(-30),
            "last_sync": at(-20),
            "last_success": at(-30),
            "last_failed_sync": at(-20),
            "failed_syncs": 1,
            "successful_syncs": 1,
            "success_rate": 50.0,
            "consecutive_failures": 1,
            "jobs": [
                with(with(unnamed, &set), &json!({"job": null, "last_seen": at(0)})),
                with(with(nightly, &set), &json!({"job": "nightly", "last_seen": at(5)})),
            ],
        })
    );
    let list = server.get("/api/devices").await;
    assert_eq!(list.json(200)["message"], "Devices retrieved successfully");
    let listed = list.data(200)["devices"][0].take();
    assert_eq!(keys(&listed), FIELDS);
    for field in FIELDS.iter().filter(|field| !SWEPT.contains(field)) {
        assert_eq!(listed[field], found[field], "{field}");
    }
}

async fn names_and_groups_are_set_and_cleared(server: &TestServer) {
    server.store(&event("pi")).await;
    let named = async |name: Value, group: Value| {
        let device = server.get("/api/device/pi").await.data(200);
        assert_eq!((&device["name"], &device["group"]), (&name, &group));
        device
    };
    let answer = server.patch("/api/device/pi", &json!({"name": "Library, north wall"})).await;
    assert_eq!(answer.json(200)["message"], "Device updated successfully");
    assert_eq!(answer.data(200), named(json!("Library, north wall"), Value::Null).await);
    change(server, "pi", json!({"group": "Schule 17 / Süd"})).await;
    named(json!("Library, north wall"), json!("Schule 17 / Süd")).await;
    change(server, "pi", json!({})).await;
    named(json!("Library, north wall"), json!("Schule 17 / Süd")).await;
    change(server, "pi", json!({"name": null})).await;
    named(Value::Null, json!("Schule 17 / Süd")).await;
    let longest = json!({"name": "ü".repeat(255), "group": "😀".repeat(100)});
    change(server, "pi", longest.clone()).await;
    named(longest["name"].clone(), longest["group"].clone()).await;
    // Reports leave them alone.
    server.store(&event("pi")).await;
    named(longest["name"].clone(), longest["group"].clone()).await;
    change(server, "pi", json!({"name": null, "group": null})).await;
    named(Value::Null, Value::Null).await;
}

async fn changes_that_are_refused_change_nothing(server: &TestServer) {
    server.store(&event("pi")).await;
    change(server, "pi", json!({"name": "kept", "group": "kept"})).await;
    let patch = async |body: Value| -> Answer { server.patch("/api/device/pi", &body).await };
    for (body, expected) in [
        (json!({"name": 7}), vec!["\"name\" must be a string"]),
        (json!({"name": ""}), vec!["\"name\" is not allowed to be empty"]),
        (json!({"group": "a\nb"}), vec!["\"group\" must not contain control characters"]),
        (
            json!({"group": "x".repeat(101)}),
            vec!["\"group\" length must be less than or equal to 100 characters long"],
        ),
        (json!([]), vec!["\"value\" must be of type object"]),
        (
            json!({"name": "x".repeat(256), "group": [], "nmae": "x", "label": ["a"]}),
            vec![
                "\"name\" length must be less than or equal to 255 characters long",
                "\"group\" must be a string",
                "\"label\" is not allowed",
                "\"nmae\" is not allowed",
            ],
        ),
        // One good field does not save another.
        (json!({"name": "new", "group": false}), vec!["\"group\" must be a string"]),
    ] {
        assert_eq!(patch(body).await.complaints(), expected);
    }
    let unknown = patch(json!({"device_id": "other"})).await.details();
    let message = "\"device_id\" is not allowed";
    assert_eq!(unknown, json!([{"field": "device_id", "message": message, "value": "other"}]));
    let request = server.request(Method::PATCH, "/api/device/pi");
    let request = request.header("content-type", "application/json").body("{\"name\":");
    assert!(send(request).await.error(400).starts_with("Malformed JSON: "));
    let request = server.request(Method::PATCH, "/api/device/pi").body("{}");
    send(request).await.error(415);
    let device = server.get("/api/device/pi").await.data(200);
    assert_eq!((&device["name"], &device["group"]), (&json!("kept"), &json!("kept")));
}

async fn searching(server: &TestServer) {
    for (device, name) in
        [("pi-1", None), ("PI-2", Some("Library")), ("cam_7", Some("100% Müller")), ("camx7", None)]
    {
        server.store(&event(device)).await;
        change(server, device, json!({"name": name})).await;
    }
    for (query, expected) in [
        ("pi", vec!["PI-2", "pi-1"]),
        ("I-2", vec!["PI-2"]),
        ("LIBR", vec!["PI-2"]),
        // Neither per cent sign nor underscore stands for anything else.
        ("%25", vec!["cam_7"]),
        ("m_7", vec!["cam_7"]),
        ("m%C3%BCller", vec!["cam_7"]),
        ("%5C", vec![]),
        ("nothing", vec![]),
    ] {
        assert_eq!(listed(server, &format!("q={query}")).await, expected, "{query}");
    }
    let data = server.get("/api/devices?q=cam&limit=1").await.data(200);
    let cursor = data["pagination"]["next_cursor"].as_str().unwrap();
    assert_eq!(
        data["pagination"],
        json!({"limit": 1, "offset": 0, "total": 2, "next_cursor": cursor, "total_devices": 2})
    );
    let next = format!("q=cam&limit=1&cursor={cursor}");
    let both = [listed(server, "q=cam&limit=1").await, listed(server, &next).await].concat();
    assert_eq!(both, listed(server, "q=cam").await);
}

async fn groups(server: &TestServer) {
    for (device, group) in
        [("a", Some("north")), ("b", Some("North")), ("c", Some("north")), ("d", None)]
    {
        server.store(&event(device)).await;
        change(server, device, json!({"group": group})).await;
    }
    assert_eq!(listed(server, "group=north").await, ["a", "c"]);
    assert_eq!(listed(server, "group=North").await, ["b"]);
    assert!(listed(server, "group=nort").await.is_empty());
    // Those in no group.
    assert_eq!(listed(server, "group=").await, ["d"]);
    assert!(listed(server, "group=&q=a").await.is_empty());
    assert_eq!(listed(server, "group=north&q=c").await, ["c"]);
    let data = server.get("/api/devices?group=north&offset=1").await.data(200);
    assert_eq!(column(&data["devices"], "device_id"), ["c"]);
    assert_eq!(
        data["pagination"],
        json!({"limit": 50, "offset": 1, "total": 2, "next_cursor": null, "total_devices": 2})
    );
}

async fn every_order(server: &TestServer) {
    // Registered in the order c, a, b, d; last heard from in the order d, c, b, a.
    for (second, event) in [
        (1, failure("c", at(-50))),
        (2, success("a", at(-40))),
        (3, success("b", at(-10))),
        (4, success("d", at(-60))),
        (5, failure("c", at(-30))),
        (6, success("c", at(-70))),
        (7, failure("b", at(-20))),
        (8, failure("a", at(-35))),
        (9, failure("a", at(-33))),
        (10, failure("a", at(-32))),
    ] {
        server.clock.set(at(second));
        server.store(&event).await;
    }
    change(server, "a", json!({"name": "Z"})).await;
    change(server, "c", json!({"name": "A"})).await;
    change(server, "d", json!({"name": "A"})).await;
    for (sort, expected) in [
        ("device_id", "a b c d"),
        ("-device_id", "d c b a"),
        // Ties go by device_id, and what is missing comes last, both ways.
        ("name", "c d a b"),
        ("-name", "a c d b"),
        ("device_registered", "c a b d"),
        ("-device_registered", "d b a c"),
        ("last_seen", "d c b a"),
        ("-last_seen", "a b c d"),
        ("last_sync", "d a c b"),
        ("-last_sync", "b c a d"),
        ("last_success", "c d a b"),
        ("-last_success", "b a d c"),
        ("total_syncs", "d b c a"),
        ("-total_syncs", "a c b d"),
        ("failed_syncs", "d b c a"),
        ("-failed_syncs", "a c b d"),
        ("consecutive_failures", "b d c a"),
        ("-consecutive_failures", "a c b d"),
    ] {
        let expected: Vec<_> = expected.split(' ').collect();
        assert_eq!(listed(server, &format!("sort={sort}")).await, expected, "{sort}");
        let page = listed(server, &format!("sort={sort}&limit=2&offset=1")).await;
        assert_eq!(page, expected[1..3], "{sort}");
    }
    assert_eq!(listed(server, "").await, ["a", "b", "c", "d"]);
}

async fn pages(server: &TestServer) {
    let names: Vec<_> = (0..60).map(|device| format!("pi-{device:02}")).collect();
    for name in &names {
        server.store(&event(name)).await;
    }
    assert_eq!(listed(server, "").await, names[..50]);
    assert_eq!(listed(server, "limit=1000").await, names);
    assert_eq!(listed(server, "limit=7&offset=55").await, names[55..]);
    assert!(listed(server, "offset=60").await.is_empty());
    let data = server.get("/api/devices?limit=7&offset=55").await.data(200);
    assert_eq!(
        data["pagination"],
        json!({"limit": 7, "offset": 55, "total": 60, "next_cursor": null, "total_devices": 60})
    );
}

/// Every page follows the one before, whatever devices are called; a place that no list can have is refused.
async fn cursors_of_awkward_ids(server: &TestServer) {
    let ids = ["a\\u0000b", "a'b", "a\"b", "a%b", "\u{1F600}"];
    for device in ids {
        server.store(&event(device)).await;
    }
    for sort in ["device_id", "-last_seen", "device_registered"] {
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let page =
                server.get(&format!("/api/devices?sort={sort}&limit=1{cursor}")).await.data(200);
            found.push(page["devices"][0]["device_id"].as_str().unwrap().to_owned());
            let Some(next) = page["pagination"]["next_cursor"].as_str() else { break };
            cursor = format!("&cursor={next}");
        }
        found.sort();
        let mut expected = ids.map(str::to_owned).to_vec();
        expected.sort();
        assert_eq!(found, expected, "{sort}");
    }
    let refused = async |list: &str, place: String| {
        let hex: String = place.bytes().map(|byte| format!("{byte:02x}")).collect();
        let answer = server.get(&format!("/api/devices?sort={list}&cursor={hex}")).await;
        assert_eq!(answer.status, 400, "{place}");
    };
    for number in [i64::MAX, i64::MAX - 1, i64::MIN, 253_402_300_800_000_001] {
        for sort in ["device_registered", "-device_registered"] {
            refused(sort, format!("[\"{sort}\",[{number}],\"a\"]")).await;
        }
    }
    refused("device_id", "[\"device_id\",[],\"a\\u0000\"]".to_owned()).await;
    refused("name", "[\"name\",[\"a\\u0000\"],\"a\"]".to_owned()).await;
}

async fn wrong_parameters(server: &TestServer) {
    let get = async |query: &str| server.get(&format!("/api/devices?{query}")).await.complaints();
    let sorts = "device_id, -device_id, name, -name, device_registered, -device_registered, \
        last_seen, -last_seen, last_sync, -last_sync, last_success, -last_success, total_syncs, \
        -total_syncs, failed_syncs, -failed_syncs, consecutive_failures, -consecutive_failures, \
        status, -status, status_since, -status_since";
    let mut complaints = get("sort=size&q=&group=%00&limit=1001&offset=-1").await;
    complaints.sort();
    assert_eq!(
        complaints,
        [
            "\"group\" must not contain control characters".to_owned(),
            "\"limit\" must be less than or equal to 1000".to_owned(),
            "\"offset\" must be greater than or equal to 0".to_owned(),
            "\"q\" is not allowed to be empty".to_owned(),
            format!("\"sort\" must be one of [{sorts}]"),
        ]
    );
    assert_eq!(get("sort=name&sort=name").await, ["\"sort\" must be given only once"]);
}

async fn a_removed_device_starts_anew(server: &TestServer) {
    for second in [-3, -2, -1] {
        server.store(&failure("pi/1", at(second))).await;
    }
    server.store(&event("other")).await;
    change(server, "pi%2F1", json!({"name": "Old", "group": "old"})).await;
    assert_eq!(
        server.delete("/api/device/pi%2F1").await.json(200),
        json!({
            "success": true,
            "message": "Device deleted successfully",
            "data": {"device_id": "pi/1", "deleted_events": 3},
        })
    );
    for path in ["/api/device/pi%2F1", "/api/device/pi%2F1/sync-history"] {
        assert_eq!(server.get(path).await.error(404), "Device not found");
    }
    assert_eq!(server.delete("/api/device/pi%2F1").await.error(404), "Device not found");
    assert_eq!(listed(server, "").await, ["other"]);
    let stats = server.get("/api/stats").await.data(200);
    assert_eq!((&stats["total_failures"], &stats["total_sync_events"]), (&json!(0), &json!(1)));

    server.clock.set(at(10));
    server.store(&failure("pi/1", at(0))).await;
    let device = server.get("/api/device/pi%2F1").await.data(200);
    let expected = json!({
        "name": null, "group": null, "device_registered": at(10), "total_syncs": 1,
        "consecutive_failures": 1,
    });
    assert_eq!(with(device.clone(), &expected), device);
    let history = server.get("/api/device/pi%2F1/sync-history").await.data(200);
    assert_eq!(history["pagination"]["total_events"], 1);
}

async fn devices_that_are_not_there(server: &TestServer) {
    let path = "/api/device/nobody";
    assert_eq!(server.get(path).await.error(404), "Device not found");
    assert_eq!(server.patch(path, &json!({"name": "x"})).await.error(404), "Device not found");
    assert_eq!(server.patch(path, &json!({})).await.error(404), "Device not found");
    assert_eq!(server.delete(path).await.error(404), "Device not found");
    assert!(listed(server, "").await.is_empty(), "a change does not make a device");
    let path = "/api/device/a%0Ab";
    let complaint = "\"device_id\" must not contain control characters";
    assert_eq!(server.get(path).await.complaints(), [complaint]);
    assert_eq!(server.patch(path, &json!({})).await.complaints(), [complaint]);
    assert_eq!(server.delete(path).await.complaints(), [complaint]);
}
