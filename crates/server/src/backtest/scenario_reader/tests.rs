//! Tests of reading scenarios: whatever is wrong is named, with its place.

use serde_json::json;

use super::*;

/// A scenario that says everything which one can say.
fn whole() -> Value {
    let at = |hour: u32| format!("2026-03-02T{hour:02}:00:00Z");
    json!({
        "id": "x", "title": "Everything.", "from": "nobody", "start": at(0), "end": at(12),
        "groups": {"school": ["a", "b"]},
        "setup": [{"method": "PATCH", "path": "/api/fleet", "body": {"policy": {}}}],
        "channels": ["W"],
        "steps": [
            {
                "at": at(1), "report": {"device_ids": ["a", "c"], "job": "j", "total_errors": 0},
                "repeat": {"every_seconds": 3600, "until": at(5)},
            },
            {"at": at(2), "batch": [{"device_id": "a", "timestamp": at(0), "total_errors": 1, "event_id": "r"}]},
            {"at": at(2), "start": {"device_id": "a", "job": "j", "run_id": "r", "timestamp": at(2), "clock": "synced"}},
            {"at": at(3), "request": {"method": "PATCH", "path": "/api/device/a", "body": {"paused": true}}},
            {"at": at(4), "server": "stop"},
            {"at": at(12), "database": "away"},
        ],
        "expect": {
            "states": [
                {"at": at(0), "device_id": "a", "state": "ok"},
                {"at": at(12), "device_ids": ["a", "b"], "state": "silent"},
            ],
            "incidents": [{
                "at": at(5), "what": "resolved", "scope": "group", "subject": "", "kind": "silent",
                "since": at(1), "resolution": "recovered", "members": 0,
            }],
            "messages": [{
                "at": at(5), "channel": "W",
                "items": [{"event": "opened", "scope": "device", "subject": "a", "kind": "failing"}],
            }],
        },
    })
}

fn wrong(scenario: Value) -> Vec<Violation> {
    Scenario::from_value(scenario).err().unwrap_or_default()
}

fn messages(scenario: Value) -> Vec<String> {
    wrong(scenario).into_iter().map(|violation| violation.message).collect()
}

/// What JSON calls a place, as people read it: `/steps/3/at` is `steps[3].at`.
fn place(pointer: &str) -> String {
    let mut place = String::new();
    for part in pointer.split('/').skip(1) {
        match part.parse::<usize>() {
            Ok(index) => place += &format!("[{index}]"),
            Err(_) if place.is_empty() => place += part,
            Err(_) => place += &format!(".{part}"),
        }
    }
    place
}

/// The places of all values in a scenario, but for the bodies of requests.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let children: Vec<_> = match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), value)).collect(),
        Value::Array(items) => {
            items.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
        }
        _ => Vec::new(),
    };
    for (name, value) in children {
        let pointer = format!("{at}/{name}");
        if name != "body" {
            pointers(value, &pointer, found);
            found.push(pointer);
        }
    }
}

fn all_pointers() -> Vec<String> {
    let mut found = Vec::new();
    pointers(&whole(), "", &mut found);
    assert!(found.len() > 80, "{}", found.len());
    found
}

#[test]
fn what_is_right_is_read() {
    let read = Scenario::from_value(whole()).unwrap();
    assert_eq!(read.steps.len(), 6);
    assert_eq!(
        (&read.channels[..], &read.groups["school"][..]),
        (&["W".to_owned()][..], &["a".to_owned(), "b".to_owned()][..])
    );
    let Action::Report(report) = &read.steps[0].action else { panic!("{:?}", read.steps[0]) };
    assert_eq!(report.device_ids, ["a", "c"]);
    assert!(!report.event.contains_key("device_ids"));
    assert_eq!(read.steps[0].repeat.unwrap().every_seconds, 3600);
    assert_eq!(read.expect.incidents[0].members, Some(0));
    let least = json!({
        "id": "x", "title": "Nothing.", "start": "2026-03-02", "end": "2026-03-03", "steps": [],
    });
    assert_eq!(Scenario::from_value(least).unwrap().expect, Expected::default());
}

#[test]
fn a_value_of_another_type_is_named_wherever_it_stands() {
    for pointer in all_pointers() {
        let mut scenario = whole();
        *scenario.pointer_mut(&pointer).unwrap() = json!(true);
        let place = place(&pointer);
        let found = wrong(scenario);
        assert!(found.iter().any(|violation| violation.field == place), "{place}: {found:?}");
    }
    assert_eq!(messages(json!([])), ["\"value\" must be an object"]);
}

#[test]
fn a_field_that_nobody_reads_is_named_wherever_it_stands() {
    for pointer in all_pointers().iter().map(String::as_str).chain([""]) {
        let mut scenario = whole();
        // A group may have any name.
        let Some(Value::Object(object)) = scenario.pointer_mut(pointer) else { continue };
        if pointer == "/groups" {
            continue;
        }
        object.insert("colour".to_owned(), json!("red"));
        let place = place(&format!("{pointer}/colour"));
        let found = messages(scenario);
        assert_eq!(found, [format!("\"{place}\" is not allowed")]);
    }
}

#[test]
fn a_field_that_is_missing_is_named() {
    for pointer in [
        "/id",
        "/title",
        "/start",
        "/end",
        "/steps",
        "/setup/0/method",
        "/setup/0/path",
        "/steps/0/at",
        "/steps/0/report/device_ids",
        "/steps/0/repeat/every_seconds",
        "/steps/0/repeat/until",
        "/steps/1/batch/0/device_id",
        "/steps/2/start/device_id",
        "/steps/3/request/path",
        "/expect/states/0/at",
        "/expect/states/0/state",
        "/expect/incidents/0/at",
        "/expect/incidents/0/what",
        "/expect/incidents/0/scope",
        "/expect/incidents/0/subject",
        "/expect/incidents/0/kind",
        "/expect/messages/0/at",
        "/expect/messages/0/channel",
        "/expect/messages/0/items",
        "/expect/messages/0/items/0/event",
    ] {
        let mut scenario = whole();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        scenario.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name);
        assert_eq!(messages(scenario), [format!("\"{}\" is required", place(pointer))]);
    }
}

#[test]
fn what_makes_no_sense_is_named() {
    let channels = "must be one of \"channels\": [W]";
    for (pointer, value, expected) in [
        ("/end", json!("2026-03-02T00:00:00Z"), "must be after \"start\""),
        ("/start", json!("yesterday"), "must be in ISO 8601 date format"),
        ("/id", json!(""), "is not allowed to be empty"),
        ("/groups/school/1", json!("a"), "must not be named twice"),
        ("/groups/school/1", json!(""), "is not allowed to be empty"),
        ("/setup/0/method", json!("patch"), "must be one of [GET, POST, PUT, PATCH, DELETE]"),
        ("/setup/0/path", json!("api/fleet"), "must be a path such as /api/device/a"),
        ("/steps/0/at", json!("2026-03-01T23:59:59Z"), "must not be before \"start\""),
        ("/steps/5/at", json!("2026-03-02T12:00:01Z"), "must not be after \"end\""),
        (
            "/steps/4/at",
            json!("2026-03-02T02:59:00Z"),
            "must not be before that of the step before",
        ),
        ("/steps/0/report/device_ids/1", json!("a"), "must not be named twice"),
        ("/steps/0/report/device_ids", json!([]), "must contain at least 1 items"),
        ("/steps/0/report/total_errors", json!(-1), "must be greater than or equal to 0"),
        (
            "/steps/0/report/event_id",
            json!("r"),
            "is not allowed in what is repeated: the server would store it once",
        ),
        ("/steps/0/report/device_id", json!("d"), "is not allowed beside \"device_ids\""),
        ("/steps/0/repeat/every_seconds", json!(0), "must be a whole number from 1 to 31536000"),
        ("/steps/0/repeat/until", json!("2026-03-02T00:30:00Z"), "must not be before \"at\""),
        ("/steps/0/repeat/until", json!("2026-03-03T00:00:00Z"), "must not be after \"end\""),
        ("/steps/1/batch", json!([]), "must contain at least 1 items"),
        ("/steps/1/batch/0/timestamp", json!("then"), "must be in ISO 8601 date format"),
        ("/steps/2/start/run_id", json!(""), "is not allowed to be empty"),
        ("/steps/4/server", json!("halt"), "must be one of [stop, start]"),
        ("/steps/5/database", json!("gone"), "must be one of [away, back]"),
        (
            "/steps/4",
            json!({"at": "2026-03-02T04:00:00Z"}),
            "must have one of [report, batch, start, request, server, database]",
        ),
        (
            "/steps/4",
            json!({"at": "2026-03-02T04:00:00Z", "server": "stop", "database": "away"}),
            "must have one of [report, batch, start, request, server, database]",
        ),
        (
            "/expect/states/0/state",
            json!("dead"),
            "must be one of [paused, never, silent, failing, degraded, ok]",
        ),
        (
            "/expect/states/0/device_ids",
            json!(["b"]),
            "must have either \"device_id\" or \"device_ids\"",
        ),
        ("/expect/states/0/at", json!("2026-03-04"), "must not be after \"end\""),
        ("/expect/states/1/device_ids/1", json!("a"), "must not be named twice"),
        (
            "/expect/incidents/0/what",
            json!("ended"),
            "must be one of [opened, reopened, flapping, resolved]",
        ),
        (
            "/expect/incidents/0/scope",
            json!("school"),
            "must be one of [device, group, fleet, channel]",
        ),
        ("/expect/incidents/0/kind", json!("late"), "must be one of [silent, failing]"),
        (
            "/expect/incidents/0/resolution",
            json!("healed"),
            "must be one of [recovered, late_report, policy, paused, deleted, merged]",
        ),
        ("/expect/incidents/0/members", json!(-1), "must be a whole number from 0 on"),
        ("/expect/messages/0/channel", json!("X"), channels),
        ("/expect/messages/0/at", json!("2026-03-01"), "must not be before \"start\""),
        (
            "/expect/messages/0/items/0/event",
            json!("closed"),
            "must be one of [opened, reopened, reminder, flapping, resolved]",
        ),
    ] {
        let mut scenario = whole();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let parent = scenario.pointer_mut(parent).unwrap();
        match name.parse::<usize>() {
            Ok(index) => parent[index] = value,
            Err(_) => parent[name] = value,
        }
        // A step, or an entry, may be wrong as a whole.
        let place = match pointer {
            "/expect/states/0/device_ids" => "expect.states[0]".to_owned(),
            _ => place(pointer),
        };
        let found = messages(scenario);
        assert!(found.contains(&format!("\"{place}\" {expected}")), "{pointer}: {found:?}");
    }
    let mut twice = whole();
    twice["groups"]["another"] = json!(["b"]);
    twice["groups"][""] = json!([]);
    twice["channels"] = json!(["W", "W"]);
    twice["expect"]["incidents"][0]["what"] = json!("opened");
    let found = messages(twice);
    for expected in [
        "\"groups.\" is not the name of a group: it is not allowed to be empty",
        "\"groups.school[1]\" must not be named twice",
        "\"channels[1]\" must not be named twice",
        "\"expect.incidents[0].resolution\" is only for what is resolved",
    ] {
        assert!(found.iter().any(|message| message == expected), "{expected}: {found:?}");
    }
}

#[test]
fn everything_that_is_wrong_is_told_up_to_a_limit() {
    let mut scenario = whole();
    scenario["title"] = json!(7);
    scenario["steps"][2]["start"]["colour"] = json!("red");
    scenario["expect"]["states"][0]["state"] = json!("dead");
    let text = scenario.to_string();
    let told = Scenario::read(text.as_bytes()).unwrap_err().to_string();
    let expected = "\"title\" must be a string\n  \"steps[2].start.colour\" is not allowed\n  \"expect.states[0].state\" must be one of ";
    assert!(told.starts_with(expected), "{told}");
    scenario["steps"] = json!(vec![json!({}); 120]);
    let told = Scenario::read(scenario.to_string().as_bytes()).unwrap_err().to_string();
    assert_eq!(told.lines().count(), MOST_TOLD + 1);
    assert!(told.lines().last().unwrap().starts_with("  and 1"), "{told}");
    for (text, expected) in [
        ("{\"id\": }", "it is not JSON: expected value at line 1 column 8"),
        ("", "it is not JSON: there is nothing in it"),
    ] {
        assert_eq!(Scenario::read(text.as_bytes()).unwrap_err().to_string(), expected);
    }
}
