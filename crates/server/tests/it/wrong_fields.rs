//! A body with several fields of a wrong type: all of them are named at once, whatever the others are. It is tried for every
//! route that changes something of the fleet, for each two of its fields, and for all of them.

use std::collections::BTreeSet;

use pisync::notify::secrets::SecretsKey;
use serde_json::{Value, json};

use crate::support::{
    fleet::Row,
    http::{event, send},
    server::TestServer,
    store::{Fixture, TestDatabase},
};

both_stores!(every_wrong_field_is_named);

/// A server that sweeps nothing away, and can store secrets.
struct Still(TestServer);

impl std::ops::Deref for Still {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.0
    }
}

impl Fixture for Still {
    async fn prepare(database: TestDatabase) -> Self {
        let key = database.file().is_none().then(|| SecretsKey::parse(&"0f".repeat(32)).unwrap());
        let start = TestServer::start_with(database, |settings| {
            settings.watches_fleet = false;
            settings.secrets_key = key;
        });
        Self(start.await)
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

/// Every route with a body about the fleet, and a right body.
fn requests() -> Vec<(&'static str, &'static str, Value)> {
    let policy = json!({
        "expect": {"cron": "0 2 * * *", "timezone": "Europe/Berlin"},
        "grace_seconds": 60,
        "failing": {"failures": 1, "of_last": 2},
        "recover_after": 1,
        "max_run_seconds": 60,
        "first_report_seconds": 60,
        "severity": {"silent": "info", "failing": "info"},
        "group": {"at_least": 2, "percent": 1},
        "jobs": [{
            "job": "nightly", "expect": {"every_seconds": 60}, "grace_seconds": 60,
            "failing": {"in_a_row": 1}, "recover_after": 1, "max_run_seconds": 60,
        }],
    });
    let level = json!({"policy": policy, "paused": false, "note": "x"});
    let mut device = level.clone();
    for (field, value) in [
        ("name", json!("x")),
        ("group", json!("x")),
        ("tags", json!(["x"])),
        ("expected", json!(true)),
    ] {
        device[field] = value;
    }
    let window = json!({
        "name": "x", "scope": "group", "key": "x", "effect": "closed", "timezone": "UTC",
        "from": "2026-01-01", "until": "2026-01-02",
        "weekly": {"days": ["mon"], "start": "00:00", "end": "24:00"},
    });
    let routes = json!({"version": 0, "routes": [{
        "match": {
            "groups": ["x"], "tags": ["x"], "kinds": ["silent"], "scopes": ["group"],
            "severity_at_least": "info",
        },
        "channels": [], "wait_seconds": 0, "interval_seconds": 0, "remind_seconds": 300,
        "digest": {"at": "07:00", "days": ["mon"], "timezone": "UTC"}, "stop": true,
    }]});
    let webhook = json!({
        "name": "x", "kind": "webhook", "enabled": true, "default": true, "template": "x",
        "url": "https://hooks.example/x", "signing_secret": "whsec_c2lnbmluZ19zZWNyZXRfb2ZfdGhlX3Rlc3Qh",
        "headers": {"x-token": "x"},
    });
    let ntfy = json!({
        "name": "x", "kind": "ntfy", "enabled": true, "default": true, "template": "x",
        "server": "https://ntfy.example", "topic": "x", "token": "x",
    });
    let telegram = json!({
        "name": "x", "kind": "telegram", "enabled": true, "default": true, "template": "x",
        "bot_token": "123456:abcdefgh", "chat_id": "1", "thread_id": 1,
    });
    let mail = json!({
        "name": "x", "kind": "email", "enabled": true, "default": true, "template": "x",
        "to": "ada@example.com",
    });
    let roster = json!([{"device_id": "x", "name": "x", "group": "x", "tags": ["x"], "note": "x"}]);
    let mut requests = vec![
        ("PUT", "/api/devices", roster),
        ("POST", "/api/windows", window.clone()),
        ("PUT", "/api/window/1", window),
        ("POST", "/api/channels", webhook),
        ("POST", "/api/channels", telegram),
        ("POST", "/api/channels", mail),
        ("POST", "/api/channels", ntfy.clone()),
        ("PUT", "/api/routes", routes),
        ("POST", "/api/incident/1/acknowledge", json!({"note": "x", "until": "2032-01-01"})),
        (
            "POST",
            "/api/sync-start",
            json!({"device_id": "pi", "job": "x", "run_id": "x", "timestamp": "2026-01-01", "clock": "synced"}),
        ),
        ("PATCH", "/api/fleet", json!({"policy": policy, "paused": false})),
    ];
    for method in ["PUT", "PATCH"] {
        requests.push((method, "/api/device/pi", device.clone()));
        requests.push((method, "/api/group/school", level.clone()));
        requests.push((method, "/api/channel/1", ntfy.clone()));
    }
    requests
}

/// The places of all fields, as JSON pointers.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let pointer = format!("{at}/{name}");
                // Which fields a channel has depends on its kind, and what headers there are is its own matter.
                if name != "kind" {
                    found.push(pointer.clone());
                }
                if name != "headers" {
                    pointers(value, &pointer, found);
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate().filter(|(_, item)| item.is_object()) {
                pointers(item, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

/// What an answer calls a place.
fn name(pointer: &str) -> String {
    let mut name = String::new();
    for part in pointer.split('/').skip(1) {
        match part.parse::<usize>() {
            Ok(index) => name += &format!("[{index}]"),
            Err(_) if name.is_empty() => name += part,
            Err(_) => name += &format!(".{part}"),
        }
    }
    name
}

/// Sends a body in which the fields at these places are wrong, and looks whether each of them is named.
async fn check(server: &TestServer, (method, path, body): (&str, &str, &Value), wrong: &[&str]) {
    let mut body = body.clone();
    for pointer in wrong {
        *body.pointer_mut(pointer).unwrap() = json!([[7]]);
    }
    let request = server.request(method.parse().unwrap(), path).json(&body);
    let named = send(request).await.wrong_fields();
    for pointer in wrong {
        let name = name(pointer);
        // Of a list, the item may be named.
        let is_named =
            named.iter().any(|(field, _)| *field == name || field.starts_with(&format!("{name}[")));
        assert!(
            is_named,
            "{method} {path}: {name} is not named when {wrong:?} are wrong: {named:?}"
        );
    }
}

/// The path, of the one channel that is left where it names a channel.
async fn with_channel(server: &TestServer, path: &str) -> String {
    if !path.starts_with("/api/channel/") {
        return path.to_owned();
    }
    let id = server.database.number("(select id from channels where kind = 'ntfy')").await;
    format!("/api/channel/{id}")
}

async fn every_wrong_field_is_named(server: &Still) {
    server.store(&event("pi")).await;
    server.put("/api/group/school", &json!({})).await.data(200);
    let incident = Row::of_group(1, "school").sql(&server.database);
    server.database.execute(&incident).await;
    // Each body is right as it is. Those that make something make what the others change.
    for (method, path, body) in requests() {
        let path = with_channel(server, path).await;
        let request = server.request(method.parse().unwrap(), &path).json(&body);
        let answer = send(request).await;
        // There is no server for mail, and other channels with this name, and other routes by now.
        let is_right = answer.status < 300 || answer.status == 409 || body["kind"] == "email";
        assert!(is_right, "{method} {path}: {}", answer.text());
        if method == "POST" && path == "/api/channels" {
            server.database.execute("delete from channels where kind <> 'ntfy'").await;
        }
    }
    let mut tried = BTreeSet::new();
    for (method, path, body) in requests() {
        let path = with_channel(server, path).await;
        let mut all = Vec::new();
        pointers(&body, "", &mut all);
        let request = (method, path.as_str(), &body);
        let outermost: Vec<_> = all
            .iter()
            .map(String::as_str)
            .filter(|one| !all.iter().any(|other| one.starts_with(&format!("{other}/"))))
            .collect();
        check(server, request, &outermost).await;
        for (place, first) in all.iter().enumerate() {
            for second in &all[place..] {
                let is_inside = |one: &str, other: &str| one.starts_with(&format!("{other}/"));
                if !is_inside(first, second) && !is_inside(second, first) {
                    check(server, request, &[first, second]).await;
                }
            }
        }
        tried.insert((method, path));
    }
    assert!(tried.len() >= 14, "{tried:?}");
}

/// Whoever adds a route with a body about the fleet adds it here.
#[test]
fn no_route_is_left_out() {
    let document: Value = serde_json::from_str(&pisync::api::openapi_json().unwrap()).unwrap();
    let tried: BTreeSet<_> = requests()
        .into_iter()
        .map(|(method, path, _)| {
            let path = path
                .replace("/device/pi", "/device/{device_id}")
                .replace("/group/school", "/group/{name}")
                .replace("/window/1", "/window/{window_id}")
                .replace("/channel/1", "/channel/{channel_id}")
                .replace("/incident/1", "/incident/{incident_id}");
            (method.to_lowercase(), path)
        })
        .collect();
    let mut documented = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            // Reports are those of the Node service, and keys are nothing of the fleet: both have tests of their own.
            let is_other = path.starts_with("/api/sync-event") || path.starts_with("/api/key");
            if operation.get("requestBody").is_some() && !is_other {
                documented.insert((method.clone(), path.clone()));
            }
        }
    }
    assert_eq!(tried, documented);
}
