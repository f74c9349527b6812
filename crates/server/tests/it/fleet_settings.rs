//! What people set for devices, groups and the fleet through the API: the roster, tags, notes, pauses, policies and windows.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, column, event, keys, send, with},
    server::TestServer,
    store::{Fixture, TestDatabase},
};

both_stores!(
    what_is_set_for_a_device,
    putting_a_device_on_the_roster,
    policies_are_merged_and_replaced,
    wrong_fields_are_all_named,
    a_roster_in_every_format,
    a_wrong_row_stores_nothing,
    groups_and_the_fleet,
    windows_are_kept,
    local_times_belong_to_the_time_zone,
    wrong_windows,
    what_a_sweep_has_found_is_shown,
    what_nothing_is_expected_for_is_explained,
    pauses_and_passed_over_times_are_explained,
    changes_are_in_the_audit_log,
);

async fn device(server: &TestServer, device: &str) -> Value {
    server.get(&format!("/api/device/{device}")).await.data(200)
}

/// A device without what a sweep finds, which may come at any moment.
fn unswept(mut device: Value) -> Value {
    for field in ["status", "status_since", "next_due", "problems"] {
        assert!(device.as_object_mut().unwrap().remove(field).is_some(), "{field}");
    }
    for job in device["jobs"].as_array_mut().unwrap() {
        job.as_object_mut().unwrap().remove("status");
        job.as_object_mut().unwrap().remove("next_due");
    }
    device
}

async fn change(server: &TestServer, path: &str, body: Value) -> Value {
    server.patch(path, &body).await.data(200)
}

/// Sends a roster as text of some type.
async fn put_roster(server: &TestServer, media_type: &str, body: &str) -> Answer {
    let request = server.request(Method::PUT, "/api/devices").header("content-type", media_type);
    send(request.body(body.to_owned())).await
}

async fn what_is_set_for_a_device(server: &TestServer) {
    server.store(&event("pi")).await;
    let before = device(server, "pi").await;
    for (field, expected) in [
        ("tags", json!([])),
        ("note", Value::Null),
        ("policy", json!({})),
        ("expected", Value::Null),
        ("paused", json!(false)),
        ("paused_until", Value::Null),
    ] {
        assert_eq!(before[field], expected, "{field}");
    }
    let built_in = json!({"value": 1800, "from": "built-in"});
    assert_eq!(before["effective_policy"]["grace_seconds"], built_in);
    let tags = json!(["süd", "indoor", "indoor", "a b"]);
    let set = json!({"tags": tags, "note": "behind the door", "expected": true, "paused": at(60)});
    let after = change(server, "/api/device/pi", set).await;
    assert_eq!(after["tags"], json!(["a b", "indoor", "süd"]));
    assert_eq!(after["note"], "behind the door");
    assert_eq!((&after["expected"], &after["paused"]), (&json!(true), &json!(true)));
    assert_eq!(after["paused_until"], json!(at(60)));
    // The pause ends by itself.
    server.clock.set(at(60));
    let over = device(server, "pi").await;
    assert_eq!((&over["paused"], &over["paused_until"]), (&json!(false), &Value::Null));
    let after = change(server, "/api/device/pi", json!({"paused": true})).await;
    assert_eq!((&after["paused"], &after["paused_until"]), (&json!(true), &Value::Null));
    let nothing =
        json!({"tags": null, "note": null, "expected": null, "paused": null, "policy": null});
    assert_eq!(unswept(change(server, "/api/device/pi", nothing).await), unswept(before));
    let excused = change(server, "/api/device/pi", json!({"expected": false})).await;
    assert_eq!(excused["expected"], false);
    let listed = server.get("/api/devices").await.data(200)["devices"][0].take();
    assert_eq!((&listed["tags"], &listed["expected"]), (&json!([]), &json!(false)));
}

async fn putting_a_device_on_the_roster(server: &TestServer) {
    let body = json!({"name": "Library", "group": "school-17", "tags": ["indoor"]});
    let answer = server.put("/api/device/pi%2F1", &body).await;
    assert_eq!(answer.json(201)["message"], "Device created successfully");
    let made = answer.data(201);
    assert_eq!(made["device_id"], "pi/1");
    assert_eq!((&made["expected"], &made["last_seen"]), (&json!(true), &Value::Null));
    assert_eq!((&made["device_registered"], &made["jobs"]), (&json!(at(0)), &json!([])));
    assert_eq!(made["total_syncs"], 0);
    // Known now: absent fields stay.
    let again = server.put("/api/device/pi%2F1", &json!({})).await;
    assert_eq!(again.json(200)["message"], "Device updated successfully");
    assert_eq!(unswept(again.data(200)), unswept(made));
    // One that was excused stays so, unless this is said or a roster lists it.
    let path = "/api/device/pi%2F1";
    for (body, expected) in [
        (json!({"expected": false}), json!(false)),
        (json!({"note": "in the cupboard"}), json!(false)),
        (json!({"expected": null}), Value::Null),
        (json!({"note": null}), json!(true)),
        (json!({"expected": false}), json!(false)),
        (json!({"expected": true}), json!(true)),
        (json!({"expected": false}), json!(false)),
    ] {
        assert_eq!(server.put(path, &body).await.data(200)["expected"], expected, "{body}");
    }
    server.put("/api/devices", &json!([{"device_id": "pi/1"}])).await.data(200);
    assert_eq!(device(server, "pi%2F1").await["expected"], true);
    server.clock.set(at(5));
    server.store(&event("pi/1")).await;
    let heard = device(server, "pi%2F1").await;
    assert_eq!((&heard["total_syncs"], &heard["last_seen"]), (&json!(1), &json!(at(5))));
    assert_eq!((&heard["name"], &heard["device_registered"]), (&json!("Library"), &json!(at(0))));
    assert_eq!(server.patch("/api/device/nobody", &json!({})).await.error(404), "Device not found");
}

async fn policies_are_merged_and_replaced(server: &TestServer) {
    server.put("/api/device/pi", &json!({"group": "school"})).await.data(201);
    let policy = json!({"expect": {"every_seconds": 600}, "grace_seconds": 60, "jobs": [{"job": "nightly"}]});
    let after = change(server, "/api/device/pi", json!({"policy": policy})).await;
    assert_eq!(after["policy"], policy);
    let merged = json!({"policy": {"grace_seconds": null, "recover_after": 2}});
    let after = change(server, "/api/device/pi", merged).await;
    let jobs = &policy["jobs"];
    let expected = json!({"expect": {"every_seconds": 600}, "recover_after": 2, "jobs": jobs});
    assert_eq!(after["policy"], expected);
    // Each field comes from the most specific level that says something.
    change(
        server,
        "/api/group/school",
        json!({"policy": {"grace_seconds": 120, "recover_after": 3}}),
    )
    .await;
    change(server, "/api/fleet", json!({"policy": {"grace_seconds": 5, "max_run_seconds": 600}}))
        .await;
    let effective = device(server, "pi").await["effective_policy"].take();
    for (field, value, from) in [
        ("expect", json!({"every_seconds": 600}), "device"),
        ("recover_after", json!(2), "device"),
        ("grace_seconds", json!(120), "group"),
        ("max_run_seconds", json!(600), "fleet"),
        ("first_report_seconds", json!(86400), "built-in"),
    ] {
        assert_eq!(effective[field], json!({"value": value, "from": from}), "{field}");
    }
    // So does each member of `severity` and `group`: what a level does not name, a lower one decides.
    let members = json!({"policy": {"severity": {"silent": "info", "failing": "critical"}, "group": {"percent": 60}}});
    change(server, "/api/device/pi", members).await;
    let one = json!({"policy": {"severity": {"silent": null}, "group": {"at_least": 9}}});
    let after = change(server, "/api/device/pi", one).await;
    assert_eq!(after["policy"]["severity"], json!({"failing": "critical"}));
    assert_eq!(after["policy"]["group"], json!({"at_least": 9, "percent": 60}));
    change(
        server,
        "/api/group/school",
        json!({"policy": {"severity": {"silent": "critical", "failing": "info"}}}),
    )
    .await;
    let effective = device(server, "pi").await["effective_policy"].take();
    assert_eq!(
        effective["severity"],
        json!({
            "silent": {"value": "critical", "from": "group"},
            "failing": {"value": "critical", "from": "device"},
        })
    );
    let replaced = server.put("/api/device/pi", &json!({"policy": {"grace_seconds": 60}})).await;
    assert_eq!(replaced.data(200)["policy"], json!({"grace_seconds": 60}));
    let replaced = server.put("/api/group/school", &json!({"policy": {}})).await;
    assert_eq!(replaced.data(200)["policy"], json!({}));
    let emptied = change(server, "/api/fleet", json!({"policy": null})).await;
    assert_eq!(emptied["policy"], json!({}));
}

async fn wrong_fields_are_all_named(server: &TestServer) {
    server.store(&event("pi")).await;
    for (path, body, expected) in [
        (
            "/api/device/pi",
            json!({"tags": ["", 7, "x".repeat(51), "a\nb"], "note": 1, "expected": "yes", "paused": at(0), "colour": "red"}),
            vec![
                "\"tags[0]\" is not allowed to be empty",
                "\"tags[1]\" must be a string",
                "\"tags[2]\" length must be less than or equal to 50 characters long",
                "\"tags[3]\" must not contain control characters",
                "\"note\" must be a string",
                "\"expected\" must be a boolean",
                "\"paused\" must be in the future",
                "\"colour\" is not allowed",
            ],
        ),
        (
            "/api/device/pi",
            json!({"paused": "9999-12-31T00:00:00Z"}),
            vec!["\"paused\" must be within 10 years"],
        ),
        (
            "/api/device/pi",
            json!({"tags": vec!["x"; 21], "paused": 7}),
            vec![
                "\"tags\" must contain less than or equal to 20 items",
                "\"paused\" must be true, false or a time in the future",
            ],
        ),
        (
            "/api/device/pi",
            json!({"policy": {"expect": {"cron": "0 2 * * *", "timezone": "Mars/Olympus"},
                   "failing": {"failures": 3, "of_last": 2}, "grace": 1}}),
            vec![
                "\"policy.grace\" is not allowed",
                "\"policy.expect.timezone\" must be an IANA time zone",
                "\"policy.failing.failures\" must be less than or equal to \"of_last\"",
            ],
        ),
        (
            "/api/group/school",
            json!({"tags": [], "paused": "soon"}),
            vec!["\"paused\" must be in ISO 8601 date format", "\"tags\" is not allowed"],
        ),
        (
            "/api/fleet",
            json!({"note": "x", "policy": 7}),
            vec!["\"policy\" must be an object", "\"note\" is not allowed"],
        ),
    ] {
        let methods = if path == "/api/fleet" { &["PATCH"][..] } else { &["PATCH", "PUT"] };
        for method in methods {
            let request = server.request(method.parse().unwrap(), path).json(&body);
            assert_eq!(send(request).await.complaints(), expected, "{method} {path}");
        }
    }
    let long = server.put(&format!("/api/group/{}", "x".repeat(101)), &json!({})).await;
    let rule = "\"name\" length must be less than or equal to 100 characters long";
    assert_eq!(long.complaints(), [rule]);
    assert_eq!(server.get("/api/groups").await.data(200)["groups"], json!([]));
}

async fn a_roster_in_every_format(server: &TestServer) {
    server.store(&event("pi-0")).await;
    let array = json!([
        {"device_id": "pi-1", "name": "Library", "group": "school", "tags": ["b", "a"], "note": "x"},
        {"device_id": "pi-0"},
    ]);
    let dry = server.put("/api/devices?dry_run=true", &array).await;
    let outcome = json!({"created": 1, "updated": 1, "unchanged": 0, "not_listed": 0});
    assert_eq!(dry.json(200)["message"], "Nothing was changed");
    assert_eq!(dry.data(200), outcome);
    assert_eq!(server.get("/api/device/pi-1").await.error(404), "Device not found");
    let stored = server.put("/api/devices", &array).await;
    assert_eq!(stored.json(200)["message"], "Roster stored successfully");
    assert_eq!(stored.data(200), outcome);
    let first = device(server, "pi-1").await;
    assert_eq!((&first["name"], &first["group"]), (&json!("Library"), &json!("school")));
    assert_eq!((&first["tags"], &first["note"]), (&json!(["a", "b"]), &json!("x")));
    assert_eq!(device(server, "pi-0").await["expected"], true);

    let lines = "{\"device_id\": \"pi-1\", \"note\": null}\n{\"device_id\": \"pi-2\"}\n";
    let stored = put_roster(server, "application/x-ndjson", lines).await.data(200);
    assert_eq!(stored, json!({"created": 1, "updated": 1, "unchanged": 0, "not_listed": 1}));
    assert_eq!(device(server, "pi-1").await["note"], Value::Null);

    // An empty cell leaves alone.
    let csv = "device_id,tags,group,name,note\npi-1,,,,\"hall, left\"\npi-3,x;y,school,Hall,\n";
    let stored = put_roster(server, "text/csv; charset=utf-8", csv).await.data(200);
    assert_eq!(stored, json!({"created": 1, "updated": 1, "unchanged": 0, "not_listed": 2}));
    let first = device(server, "pi-1").await;
    assert_eq!((&first["tags"], &first["note"]), (&json!(["a", "b"]), &json!("hall, left")));
    assert_eq!(device(server, "pi-3").await["tags"], json!(["x", "y"]));
    let again = put_roster(server, "text/csv", csv).await.data(200);
    assert_eq!(again["unchanged"], 2);

    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, csv.as_bytes()).unwrap();
    let request = server
        .request(Method::PUT, "/api/devices")
        .header("content-type", "text/csv")
        .header("content-encoding", "gzip")
        .body(encoder.finish().unwrap());
    assert_eq!(send(request).await.data(200)["unchanged"], 2);
    put_roster(server, "text/plain", csv).await.error(415);

    // As many as there may be.
    let many: Vec<_> =
        (0..10_000).map(|number| json!({"device_id": format!("n-{number}")})).collect();
    let stored = server.put("/api/devices", &json!(many)).await.data(200);
    assert_eq!(stored["created"], 10_000);
    assert_eq!(server.get("/api/devices").await.data(200)["pagination"]["total"], 10_004);
    let too_many = [many, vec![json!({"device_id": "one more"})]].concat();
    let refused = server.put("/api/devices", &json!(too_many)).await;
    assert_eq!(
        refused.error(413),
        "The roster has more than 10000 rows; send the rest in another one"
    );
}

async fn a_wrong_row_stores_nothing(server: &TestServer) {
    let mut rows: Vec<_> =
        (0..20).map(|number| json!({"device_id": format!("pi-{number}")})).collect();
    rows[17]["group"] = json!("");
    rows[18]["paused"] = json!(true);
    let answer = server.put("/api/devices", &json!(rows)).await;
    let expected = [("[17].group", "length"), ("[18].paused", "unknown_field")];
    let expected = expected.map(|(field, code)| (field.to_owned(), code.to_owned()));
    assert_eq!(answer.wrong_fields(), expected);
    let csv = "device_id,group\npi-1,a\npi-1,b\n,c\n";
    let complaints = put_roster(server, "text/csv", csv).await.complaints();
    let expected = [
        "\"[1].device_id\" must not be listed twice (line 3)",
        "\"[2].device_id\" is required (line 4)",
    ];
    assert_eq!(complaints, expected);
    let unclosed =
        put_roster(server, "text/csv", "device_id,name\npi-1,\"Library\npi-2,Hall\n").await;
    let rule = "\"[0]\" has a quotation mark that is not closed (line 2)";
    assert_eq!(unclosed.complaints(), [rule]);
    let empty = put_roster(server, "text/csv", "").await;
    assert_eq!(empty.complaints(), ["\"value\" must be CSV in UTF-8: there is nothing in it"]);
    let many: Vec<_> = (0..300).map(|_| json!({})).collect();
    assert_eq!(server.put("/api/devices", &json!(many)).await.wrong_fields().len(), 100);
    assert!(
        put_roster(server, "application/json", "[{]")
            .await
            .error(400)
            .starts_with("Malformed JSON: ")
    );
    assert_eq!(
        server.put("/api/devices", &json!({})).await.complaints(),
        ["\"value\" must be an array; send one device per line as application/x-ndjson"]
    );
    assert_eq!(server.get("/api/devices").await.data(200)["devices"], json!([]));
}

async fn groups_and_the_fleet(server: &TestServer) {
    assert_eq!(server.patch("/api/group/school", &json!({})).await.error(404), "Group not found");
    assert_eq!(server.delete("/api/group/school").await.error(404), "Group not found");
    server.put("/api/device/a", &json!({"group": "school 17/b"})).await.data(201);
    let path = "/api/group/school%2017%2Fb";
    let changed = change(server, path, json!({"paused": true, "note": "closed"})).await;
    assert_eq!(
        changed,
        json!({
            "name": "school 17/b",
            "devices": 1,
            "by_status": {"paused": 0, "never": 0, "silent": 0, "failing": 0, "degraded": 0, "ok": 0},
            "open_incidents": 0,
            "policy": {},
            "note": "closed",
            "paused": true,
            "paused_until": null,
            "paused_by": ["group"],
        })
    );
    // A device is paused by its group, whatever becomes of its own pause.
    assert_eq!(device(server, "a").await["paused"], true);
    let both = change(server, "/api/device/a", json!({"paused": at(60)})).await;
    assert_eq!(both["paused_by"], json!(["device", "group"]));
    let resumed = change(server, "/api/device/a", json!({"paused": false})).await;
    assert_eq!((&resumed["paused"], &resumed["paused_by"]), (&json!(true), &json!(["group"])));
    server.put("/api/group/another", &json!({})).await.data(200);
    let list = server.get("/api/groups").await;
    assert_eq!(list.json(200)["message"], "Groups retrieved successfully");
    let list = list.data(200);
    assert_eq!(column(&list["groups"], "name"), ["another", "school 17/b"]);
    assert_eq!(list["pagination"], json!({"limit": 50, "offset": 0, "total": 2}));
    let page = server.get("/api/groups?q=OTHER&limit=1").await.data(200);
    assert_eq!(column(&page["groups"], "name"), ["another"]);
    let page = server.get("/api/groups?offset=1").await.data(200);
    assert_eq!(column(&page["groups"], "name"), ["school 17/b"]);

    let fleet = server.get("/api/fleet").await.data(200);
    let fields = [
        "by_status",
        "channels",
        "open_incidents",
        "outages",
        "overdue",
        "paused",
        "paused_by",
        "paused_until",
        "policy",
        "swept_at",
    ];
    assert_eq!(keys(&fleet), fields);
    assert_eq!(fleet["paused_by"], json!([]));
    let paused = change(server, "/api/fleet", json!({"paused": at(3600)})).await;
    assert_eq!(paused["paused_until"], json!(at(3600)));
    let another = server.get("/api/groups?q=another").await.data(200)["groups"][0].take();
    assert_eq!(another["paused_until"], json!(at(3600)));

    assert_eq!(server.delete(path).await.data(200), json!({"name": "school 17/b", "devices": 1}));
    assert_eq!(device(server, "a").await["group"], Value::Null);
    let left = server.get("/api/groups").await.data(200);
    assert_eq!(column(&left["groups"], "name"), ["another"]);
}

fn nights() -> Value {
    json!({
        "name": "nights",
        "scope": "group",
        "key": "school-17",
        "effect": "closed",
        "timezone": "Europe/Berlin",
        "weekly": {"days": ["mon", "fri"], "start": "16:00", "end": "07:00"},
    })
}

async fn windows_are_kept(server: &TestServer) {
    // Midnight is the end of a day.
    let late =
        with(nights(), &json!({"weekly": {"days": ["mon"], "start": "16:00", "end": "24:00"}}));
    let made = server.post("/api/windows", &late).await.data(201);
    assert_eq!(made["weekly"], json!({"days": ["mon"], "start": "16:00", "end": "00:00"}));
    server.delete(&format!("/api/window/{}", made["id"])).await.data(200);
    let answer = server.post("/api/windows", &nights()).await;
    assert_eq!(answer.json(201)["message"], "Window created successfully");
    let made = answer.data(201);
    let id = made["id"].as_i64().unwrap();
    let expected = with(nights(), &json!({"id": id, "from": null, "until": null}));
    assert_eq!(made, expected);
    let list = server.get("/api/windows").await;
    assert_eq!(list.json(200)["message"], "Windows retrieved successfully");
    assert_eq!(list.data(200), json!({"windows": [expected]}));
    let holidays = json!({
        "name": "holidays",
        "scope": "fleet",
        "effect": "quiet",
        "timezone": "UTC",
        "from": at(0),
        "until": at(86_400),
    });
    let path = format!("/api/window/{id}");
    let replaced = server.put(&path, &holidays).await.data(200);
    assert_eq!(replaced, with(holidays.clone(), &json!({"id": id, "key": null, "weekly": null})));
    assert_eq!(server.get("/api/windows").await.data(200)["windows"][0], replaced);
    assert_eq!(server.delete(&path).await.data(200), json!({"id": id}));
    for answer in [server.delete(&path).await, server.put(&path, &holidays).await] {
        assert_eq!(answer.error(404), "Window not found");
    }
    let complaints = server.delete("/api/window/x").await.complaints();
    assert_eq!(complaints, ["\"window_id\" must be a positive number"]);
    // No more than this.
    let insert = match server.is_postgres() {
        true => {
            "insert into windows (name, scope, key, effect, timezone) select 'w', 'fleet', '', 'quiet', 'UTC' from generate_series(1, 1000)"
        }
        false => {
            "insert into windows (name, scope, key, effect, timezone)
                  with recursive n (i) as (select 1 union all select i + 1 from n where i < 1000)
                  select 'w', 'fleet', '', 'quiet', 'UTC' from n"
        }
    };
    server.database.execute(insert).await;
    let refused = server.post("/api/windows", &nights()).await;
    assert_eq!(refused.error(409), "There are 1000 windows already; delete some first");
    assert_eq!(refused.code(409), "conflict");
}

/// Berlin skips 02:00 to 03:00 on 29 March 2026, and has it twice on 25 October.
async fn local_times_belong_to_the_time_zone(server: &TestServer) {
    for (from, until, expected) in [
        (
            "2026-03-02T08:00",
            "2026-03-02T10:00Z",
            ["2026-03-02T07:00:00.000Z", "2026-03-02T10:00:00.000Z"],
        ),
        (
            "2026-03-29T02:30",
            "2026-03-30",
            ["2026-03-29T01:30:00.000Z", "2026-03-29T22:00:00.000Z"],
        ),
        (
            "2026-10-25T02:30",
            "2026-10-25T24:00",
            ["2026-10-25T00:30:00.000Z", "2026-10-25T23:00:00.000Z"],
        ),
        (
            "2026-10-25T02:30+01:00",
            "2026-10-26T00:00:00.5",
            ["2026-10-25T01:30:00.000Z", "2026-10-25T23:00:00.500Z"],
        ),
    ] {
        let mut window = with(nights(), &json!({"from": from, "until": until}));
        window.as_object_mut().unwrap().remove("weekly");
        let made = server.post("/api/windows", &window).await.data(201);
        assert_eq!([&made["from"], &made["until"]], expected, "{from} {until}");
    }
}

async fn wrong_windows(server: &TestServer) {
    let (without, weekly) = (json!({"weekly": null}), nights()["weekly"].clone());
    for (changes, expected) in [
        (without.clone(), vec!["\"from\" is required", "\"until\" is required"]),
        (
            with(without.clone(), &json!({"from": at(5), "until": at(5)})),
            vec!["\"until\" must be after \"from\""],
        ),
        (
            with(without.clone(), &json!({"from": "2026-01-01", "until": "2027-01-03"})),
            vec!["\"until\" must be at most 366 days after \"from\""],
        ),
        (json!({"from": at(5), "until": at(4)}), vec!["\"until\" must be after \"from\""]),
        (json!({"scope": "fleet"}), vec!["\"key\" is not allowed for the scope fleet"]),
        (json!({"key": null}), vec!["\"key\" must be a string"]),
        (
            json!({"scope": "tag", "key": "x".repeat(51)}),
            vec!["\"key\" length must be less than or equal to 50 characters long"],
        ),
        (
            json!({"scope": "school", "key": "x".repeat(256), "effect": "shut", "timezone": "CET", "name": "", "colour": 1, "until": "soon"}),
            vec![
                "\"name\" is not allowed to be empty",
                "\"scope\" must be one of [fleet, group, device, tag]",
                "\"key\" length must be less than or equal to 255 characters long",
                "\"effect\" must be one of [closed, quiet]",
                "\"timezone\" must be an IANA time zone",
                "\"until\" must be in ISO 8601 date format",
                "\"colour\" is not allowed",
            ],
        ),
        (
            json!({"weekly": {"days": [], "start": "7:00", "end": 7, "at": 1}}),
            vec![
                "\"weekly.days\" must contain at least 1 items",
                "\"weekly.start\" must be a time of day such as 16:00, from 00:00 to 23:59",
                "\"weekly.end\" must be a string",
                "\"weekly.at\" is not allowed",
            ],
        ),
        (
            json!({"scope": 7, "key": 7}),
            vec!["\"scope\" must be a string", "\"key\" must be a string"],
        ),
        (
            json!({"weekly": with(weekly.clone(), &json!({"start": "24:00", "end": "24:01"}))}),
            vec![
                "\"weekly.start\" must be a time of day such as 16:00, from 00:00 to 23:59",
                "\"weekly.end\" must be a time of day such as 07:00, from 00:00 to 24:00",
            ],
        ),
        (
            json!({"weekly": with(weekly, &json!({"days": ["mon", "Tue"]}))}),
            vec!["\"weekly.days\" must be some of [mon, tue, wed, thu, fri, sat, sun]"],
        ),
    ] {
        let complaints = server.post("/api/windows", &with(nights(), &changes)).await.complaints();
        assert_eq!(complaints, expected, "{changes}");
    }
    let complaints = server.post("/api/windows", &json!({})).await.complaints();
    let required = ["name", "scope", "effect", "timezone", "from", "until"];
    assert_eq!(complaints, required.map(|field| format!("\"{field}\" is required")));
    assert_eq!(server.get("/api/windows").await.data(200)["windows"], json!([]));
}

/// A server that does not sweep, so that it shows what a test has written.
struct WithoutSweeps(TestServer);

impl std::ops::Deref for WithoutSweeps {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.0
    }
}

impl Fixture for WithoutSweeps {
    async fn prepare(database: TestDatabase) -> Self {
        Self(TestServer::start_with(database, |settings| settings.watches_fleet = false).await)
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

async fn what_a_sweep_has_found_is_shown(server: &WithoutSweeps) {
    server.store(&with(event("pi"), &json!({"job": "nightly"}))).await;
    change(server, "/api/device/pi", json!({"group": "school"})).await;
    let problems = json!([{"kind": "silent", "job": null, "reason": "no_report", "since": at(0)}]);
    let (device_key, time, yes, no) = match server.is_postgres() {
        true => ("'pi'", "timestamptz '2026-11-22 12:00+00'", "true", "false"),
        false => ("(select id from devices where device_id = 'pi')", "1795348800000", "1", "0"),
    };
    let rows = format!(
        r#"
        delete from device_health;
        delete from job_health;
        delete from run_starts;
        delete from outages;
        delete from incidents;
        delete from group_states;
        insert into device_health values
            ({device_key}, 'school', 'silent', {time}, '{problems}', {yes}, {yes}, {no}, 1, 1, {time}, {time}, {time}, 3,
             4, {time}, {time}, {time}, 1);
        insert into job_health values
            ({device_key}, 'weekly', {yes}, 'failing', 'failures', {time}, {time}, {time}, {time}, 3, 4);
        insert into group_states values ('school', 'silent', 1, 1), ('', 'ok', 2, 2), ('', 'never', 3, 0);
        insert into run_starts values ({device_key}, 'nightly', 'run-6', {time}, {time}, {time});
        insert into outages values ({time}, {time}, 'down', 'node-1');
        insert into incidents (scope, subject, "group", kind, severity, since, opened_at)
        values ('device', 'pi', 'school', 'silent', 'warning', {time}, {time});
        "#
    );
    server.database.execute(&rows).await;
    let found = device(server, "pi").await;
    let listed = server.get("/api/devices").await.data(200)["devices"][0].take();
    let fleet = server.get("/api/fleet").await.data(200);
    let group = server.get("/api/groups").await.data(200)["groups"][0].take();
    for device in [&found, &listed] {
        assert_eq!((&device["status"], &device["status_since"]), (&json!("silent"), &json!(at(0))));
        assert_eq!((&device["problems"], &device["next_due"]), (&problems, &json!(at(0))));
    }
    for wrong in ["bad", "", "ok,", "Ok"] {
        let complaints = server.get(&format!("/api/devices?status={wrong}")).await.complaints();
        let rule = "must be some of [never, ok, degraded, failing, silent, paused]";
        assert_eq!(complaints, [format!("\"status\" {rule}")]);
    }
    let none = server.get("/api/devices?status=paused,never&tag=x&overdue=true").await.data(200);
    assert_eq!(none["devices"], json!([]));
    let jobs = &found["jobs"];
    assert_eq!(column(jobs, "job"), ["nightly", "weekly"]);
    assert_eq!(column(jobs, "status"), ["ok", "failing"]);
    assert_eq!(column(jobs, "expected"), [false, true]);
    assert_eq!((&jobs[0]["run_started"], &jobs[1]["run_started"]), (&json!(at(0)), &Value::Null));
    assert_eq!((&jobs[1]["next_due"], &jobs[1]["total_syncs"]), (&json!(at(0)), &json!(0)));
    let counts =
        json!({"paused": 0, "never": 3, "silent": 1, "failing": 0, "degraded": 0, "ok": 2});
    assert_eq!(fleet["by_status"], counts);
    assert_eq!((&fleet["overdue"], &fleet["open_incidents"]), (&json!(1), &json!(1)));
    assert_eq!(fleet["outages"][0], json!({"from": at(0), "until": at(0), "cause": "down"}));
    assert_eq!((&group["by_status"]["silent"], &group["open_incidents"]), (&json!(1), &json!(1)));
}

async fn sentences(server: &TestServer, device: &str) -> Vec<String> {
    let explained = server.get(&format!("/api/device/{device}/explain")).await.data(200);
    let sentences = explained["sentences"].as_array().unwrap().iter();
    sentences.map(|sentence| sentence.as_str().unwrap().to_owned()).collect()
}

/// Whatever the cause is, it is the one that is told.
async fn what_nothing_is_expected_for_is_explained(server: &TestServer) {
    server.store(&event("pi")).await;
    change(server, "/api/device/pi", json!({"group": "school"})).await;
    let nothing = json!({"policy": {"expect": "nothing"}});
    let inherit = json!({"policy": null});
    let jobs = json!({"policy": {"jobs": [{"job": "nightly", "expect": "nothing"}]}});
    let nightly = json!({"policy": {"expect": {"cron": "0 2 * * *", "timezone": "UTC"}}});
    for (path, set, unset, why) in [
        (
            "/api/device/pi",
            json!({"expected": false}),
            json!({"expected": null}),
            "somebody has said so",
        ),
        ("/api/device/pi", nothing.clone(), inherit.clone(), "its own policy says so"),
        ("/api/group/school", nothing.clone(), inherit.clone(), "the policy of its group says so"),
        ("/api/fleet", nothing, inherit.clone(), "the policy of the fleet says so"),
        ("/api/device/pi", jobs, inherit.clone(), "its policy says so"),
    ] {
        change(server, path, set.clone()).await;
        let last = sentences(server, "pi").await.pop().unwrap();
        assert_eq!(last, format!("Nothing is expected of it: {why}."), "{path} {set}");
        change(server, path, unset).await;
        let said = sentences(server, "pi").await.concat();
        assert!(!said.contains("Nothing is expected"), "{path} {set}: {said}");
    }
    // It is always closed.
    change(server, "/api/device/pi", nightly).await;
    let always = json!({
        "name": "always", "scope": "fleet", "effect": "closed", "timezone": "UTC",
        "weekly": {"days": ["mon", "tue", "wed", "thu", "fri", "sat", "sun"], "start": "00:00", "end": "24:00"},
    });
    server.post("/api/windows", &always).await.data(201);
    let last = sentences(server, "pi").await.pop().unwrap();
    let why = "no time of its schedule is to come that is not within a closed window, a pause or an outage";
    assert_eq!(last, format!("Nothing is expected of it: {why}."));
    // It was made known, and put on no roster.
    server.put("/api/device/new", &json!({"expected": null})).await.data(201);
    let last = sentences(server, "new").await.pop().unwrap();
    assert_eq!(last, "Nothing is expected of it: it has never reported, and is on no roster.");
}

/// Every pause that is in force is told with whose it is, and why the times of a schedule were passed over.
async fn pauses_and_passed_over_times_are_explained(server: &TestServer) {
    server.store(&event("pi")).await;
    change(server, "/api/device/pi", json!({"group": "school"})).await;
    for (path, paused) in [
        ("/api/device/pi", json!(at(60))),
        ("/api/group/school", json!(at(3600))),
        ("/api/fleet", json!(true)),
    ] {
        let method = if path == "/api/group/school" { Method::PUT } else { Method::PATCH };
        send(server.request(method, path).json(&json!({"paused": paused}))).await.data(200);
    }
    let said = sentences(server, "pi").await;
    assert_eq!(
        said[2..],
        [
            "The device itself is paused since 2026-11-22 12:00 UTC, until 2026-11-22 12:01 UTC.",
            "Its group is paused since 2026-11-22 12:00 UTC, until 2026-11-22 13:00 UTC.",
            "The whole fleet is paused since 2026-11-22 12:00 UTC, until somebody ends it.",
        ]
    );
    let facts = server.get("/api/device/pi/explain").await.data(200)["facts"].take();
    assert_eq!(column(&facts["pauses"], "by"), ["device", "group", "fleet"]);
    assert_eq!(facts["paused"]["by"], "fleet");
    change(server, "/api/device/pi", json!({"paused": false})).await;
    change(server, "/api/fleet", json!({"paused": false})).await;
    let said = sentences(server, "pi").await;
    assert_eq!(
        said[2..],
        ["Its group is paused since 2026-11-22 12:00 UTC, until 2026-11-22 13:00 UTC."]
    );

    change(server, "/api/group/school", json!({"paused": false})).await;
    let hourly =
        json!({"policy": {"expect": {"cron": "0 * * * *", "timezone": "UTC"}, "grace_seconds": 0}});
    change(server, "/api/device/pi", hourly).await;
    let afternoon = json!({
        "name": "afternoon", "scope": "device", "key": "pi", "effect": "closed", "timezone": "UTC",
        "from": "2026-11-22T12:30:00", "until": "2026-11-22T16:30:00",
    });
    server.post("/api/windows", &afternoon).await.data(201);
    let last = sentences(server, "pi").await.pop().unwrap();
    assert_eq!(
        last,
        "A report is expected at 2026-11-22 17:00 UTC (`0 * * * *`, UTC); it will be missing from 2026-11-22 17:00 UTC on. \
         That was moved, because a window is closed from 2026-11-22 12:30 UTC until 2026-11-22 16:30 UTC."
    );
}

async fn changes_are_in_the_audit_log(server: &TestServer) {
    server.put("/api/device/pi", &json!({"tags": ["b", "a"]})).await.data(201);
    let set = json!({"paused": true, "policy": {"grace_seconds": 60}, "expected": null});
    change(server, "/api/device/pi", set.clone()).await;
    server.put("/api/devices", &json!([{"device_id": "pi"}])).await.data(200);
    server.put("/api/devices?dry_run=true", &json!([{"device_id": "other"}])).await.data(200);
    server.put("/api/group/school", &json!({"note": "closed"})).await.data(200);
    server.delete("/api/group/school").await.data(200);
    change(server, "/api/fleet", json!({"paused": false})).await;
    let id = server.post("/api/windows", &nights()).await.data(201)["id"].take();
    server.delete(&format!("/api/window/{id}")).await.data(200);
    let lines = server.get("/api/audit").await.data(200)["entries"].take();
    let mut lines = lines.as_array().unwrap().clone();
    lines.reverse();
    let seen: Vec<_> = lines
        .iter()
        .map(|line| (line["action"].as_str().unwrap(), line["subject"].as_str().unwrap()))
        .collect();
    let id = id.to_string();
    let expected = [
        ("device.create", "pi"),
        ("device.update", "pi"),
        ("roster.put", ""),
        ("group.update", "school"),
        ("group.delete", "school"),
        ("fleet.update", ""),
        ("window.create", &id),
        ("window.delete", &id),
    ];
    assert_eq!(seen, expected);
    assert_eq!(lines[0]["details"], json!({"tags": ["a", "b"], "expected": true}));
    assert_eq!(lines[1]["details"], set);
    assert_eq!(
        lines[2]["details"],
        json!({"created": 0, "updated": 1, "unchanged": 0, "not_listed": 0})
    );
    assert_eq!(lines[6]["details"]["key"], "school-17");
}
