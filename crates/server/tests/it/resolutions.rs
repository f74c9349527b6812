//! Why incidents end: each cause, for a device, a group and the fleet. What is said must be what has happened, because people
//! read it as an answer.

use std::sync::Arc;

use pisync::{
    backtest::{self, Scenario},
    store,
};
use serde_json::{Value, json};

use crate::support::store::{TestDatabase, TestStore};

both_stores!(silence_of_a_group, failures_of_a_group, silence_of_the_fleet, problems_of_a_device,);

/// A time of the day on which everything happens.
fn at(time: &str) -> String {
    format!("2026-03-02T{time}:00Z")
}

/// A request at a time.
fn request(time: &str, method: &str, path: &str, body: Value) -> Value {
    let mut step = json!({"at": at(time), "request": {"method": method, "path": path}});
    step["request"]["body"] = body;
    step
}

/// A change at a time.
fn patch(time: &str, path: &str, body: Value) -> Value {
    request(time, "PATCH", path, body)
}

/// The same change of each device.
fn patch_each(time: &str, devices: &[String], body: &Value) -> Vec<Value> {
    let path = |device| format!("/api/device/{device}");
    devices.iter().map(|device| patch(time, &path(device), body.clone())).collect()
}

fn delete_each(time: &str, devices: &[String]) -> Vec<Value> {
    let path = |device| format!("/api/device/{device}");
    devices.iter().map(|device| request(time, "DELETE", &path(device), Value::Null)).collect()
}

/// Devices report.
fn report(time: &str, devices: &[String], event: &Value) -> Value {
    let mut report = json!({"device_ids": devices, "total_errors": 0});
    for (field, value) in event.as_object().unwrap() {
        report[field] = value.clone();
    }
    json!({"at": at(time), "report": report})
}

/// Devices report from 09:00 on every hour.
fn hourly(devices: &[String], event: &Value) -> Value {
    let mut step = report("09:00", devices, event);
    step["repeat"] = json!({"every_seconds": 3600, "until": at("12:00")});
    step
}

fn devices(prefix: &str, number: usize) -> Vec<String> {
    (0..number).map(|number| format!("{prefix}{number}")).collect()
}

/// Why the incidents of a subject ended, in simulated time until 12:30.
async fn ends(
    fixture: &TestStore,
    groups: &Value,
    steps: Vec<Value>,
    (scope, subject): (&str, &str),
) -> Vec<String> {
    let mut steps = steps;
    // In the order of their times; those of the same time as they are given.
    steps.sort_by_key(|step| step["at"].as_str().unwrap().to_owned());
    let scenario = Scenario::from_value(json!({
        "id": "resolutions", "title": "Why an incident ends.",
        "start": at("08:59"), "end": at("12:30"), "groups": groups, "steps": steps,
    }))
    .unwrap();
    let database = match fixture.is_postgres() {
        true => TestDatabase::postgres().await,
        false => TestDatabase::sqlite(),
    };
    database.migrate().await;
    let store: Arc<_> = store::open(&database.target).await.unwrap();
    let came = backtest::run(&scenario, &store, |_| {}).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    database.remove().await;
    came.incidents
        .into_iter()
        .filter(|incident| incident.what == "resolved")
        .filter(|incident| incident.scope == scope && incident.subject == subject)
        .map(|incident| incident.resolution.unwrap())
        .collect()
}

/// What happens, and why the incident then ends.
type Case = (&'static str, Vec<Value>, &'static str);

async fn silence_of_a_group(fixture: &TestStore) {
    let (six, ten) = (devices("d", 6), devices("d", 10));
    let nothing = json!({"policy": {"expect": "nothing"}});
    let window = json!({
        "name": "closed", "scope": "group", "key": "g", "effect": "closed", "timezone": "UTC",
        "from": "2026-03-02T10:00:00", "until": "2026-03-02T20:00:00",
    });
    let mut one_is_heard = patch_each("11:00", &six[1..], &json!({"paused": true}));
    one_is_heard.push(report("11:00", &six[..1], &json!({})));
    // All of them are silent from 10:30 on.
    let cases: Vec<Case> = vec![
        ("they report", vec![report("11:00", &six, &json!({}))], "recovered"),
        (
            "nothing is expected of the group",
            vec![patch("11:00", "/api/group/g", nothing.clone())],
            "policy",
        ),
        ("nothing is expected of the fleet", vec![patch("11:00", "/api/fleet", nothing)], "policy"),
        (
            "nothing is expected of each",
            patch_each("11:00", &six, &json!({"expected": false})),
            "policy",
        ),
        (
            "they are expected later",
            vec![patch(
                "11:00",
                "/api/group/g",
                json!({"policy": {"expect": {"every_seconds": 86400}}}),
            )],
            "policy",
        ),
        ("the group is closed", vec![request("11:00", "POST", "/api/windows", window)], "policy"),
        (
            "the group is paused",
            vec![patch("11:00", "/api/group/g", json!({"paused": true}))],
            "paused",
        ),
        (
            "the fleet is paused",
            vec![patch("11:00", "/api/fleet", json!({"paused": true}))],
            "paused",
        ),
        ("most are paused", one_is_heard, "paused"),
        (
            "the group is deleted",
            vec![request("11:00", "DELETE", "/api/group/g", Value::Null)],
            "deleted",
        ),
        (
            "the group has another name",
            patch_each("11:00", &six, &json!({"group": "h"})),
            "deleted",
        ),
        ("they are deleted", delete_each("11:00", &six), "deleted"),
    ];
    for (what, cause, expected) in cases {
        let steps = [vec![report("09:00", &six, &json!({}))], cause].concat();
        let ends = ends(fixture, &json!({"g": six}), steps, ("group", "g")).await;
        assert_eq!(ends, [expected], "{what}");
    }
    // Four of ten are silent, and three of ten are enough.
    let cases: Vec<Case> = vec![
        (
            "the share is raised",
            vec![patch("11:10", "/api/group/g", json!({"policy": {"group": {"percent": 100}}}))],
            "policy",
        ),
        (
            "the fleet's share is raised",
            vec![patch("11:10", "/api/fleet", json!({"policy": {"group": {"percent": 100}}}))],
            "policy",
        ),
        ("the share falls", vec![report("11:10", &ten[..3], &json!({}))], "recovered"),
        ("three are paused", patch_each("11:10", &ten[..3], &json!({"paused": true})), "paused"),
        ("they are moved", patch_each("11:10", &ten[..4], &json!({"group": "h"})), "policy"),
    ];
    for (what, cause, expected) in cases {
        let start = vec![
            patch(
                "08:59",
                "/api/fleet",
                json!({"policy": {"group": {"at_least": 2, "percent": 30}}}),
            ),
            report("09:00", &ten[..4], &json!({})),
            hourly(&ten[4..], &json!({})),
        ];
        let steps = [start, cause].concat();
        let ends = ends(fixture, &json!({"g": ten}), steps, ("group", "g")).await;
        assert_eq!(ends, [expected], "{what}");
    }
}

async fn failures_of_a_group(fixture: &TestStore) {
    let six = devices("d", 6);
    let late = six
        .iter()
        .map(|device| {
            let event = json!({"device_id": device, "timestamp": at("09:15"), "total_errors": 0});
            json!({"at": at("10:00"), "batch": [event]})
        })
        .collect();
    let rule = |rule: Value| json!({"policy": {"failing": rule}});
    let cases: Vec<Case> = vec![
        ("a run succeeds", vec![report("10:00", &six, &json!({}))], "recovered"),
        ("a success comes late", late, "late_report"),
        (
            "more failures are needed",
            vec![patch("10:00", "/api/group/g", rule(json!({"in_a_row": 10})))],
            "policy",
        ),
        (
            "they are needed in the whole fleet",
            vec![patch("10:00", "/api/fleet", rule(json!({"in_a_row": 10})))],
            "policy",
        ),
        (
            "the group is paused",
            vec![patch("10:00", "/api/group/g", json!({"paused": true}))],
            "paused",
        ),
        (
            "the group is deleted",
            vec![request("10:00", "DELETE", "/api/group/g", Value::Null)],
            "deleted",
        ),
    ];
    for (what, cause, expected) in cases {
        let failed = json!({"total_errors": 1});
        let start = ["09:00", "09:10", "09:20"].map(|time| report(time, &six, &failed)).to_vec();
        let ends = ends(fixture, &json!({"g": six}), [start, cause].concat(), ("group", "g")).await;
        assert_eq!(ends[..1], [expected], "{what}: {ends:?}");
    }
}

async fn silence_of_the_fleet(fixture: &TestStore) {
    let (a, b, c) = (devices("a", 20), devices("b", 20), devices("c", 20));
    let both = [a.clone(), b.clone()].concat();
    let two_groups = json!({"a": a, "b": b});
    let pause = |path| patch("11:00", path, json!({"paused": true}));
    let nothing = json!({"policy": {"expect": "nothing"}});
    let cases: Vec<Case> = vec![
        ("they report", vec![report("11:00", &both, &json!({}))], "recovered"),
        ("nothing is expected", vec![patch("11:00", "/api/fleet", nothing)], "policy"),
        ("the fleet is paused", vec![pause("/api/fleet")], "paused"),
        ("all groups are paused", vec![pause("/api/group/a"), pause("/api/group/b")], "paused"),
        ("they are deleted", delete_each("11:00", &both), "deleted"),
    ];
    for (what, cause, expected) in cases {
        let steps = [vec![report("09:00", &both, &json!({}))], cause].concat();
        let ends = ends(fixture, &two_groups, steps, ("fleet", "fleet")).await;
        assert_eq!(ends, [expected], "{what}");
    }
    // 24 of 60 are silent, and three of ten are enough.
    let share = |time, percent: u32| {
        patch(time, "/api/fleet", json!({"policy": {"group": {"percent": percent}}}))
    };
    let silent = [&a[..], &b[..4]].concat();
    let steps = vec![
        share("08:59", 30),
        report("09:00", &silent, &json!({})),
        hourly(&[&b[4..], &c[..]].concat(), &json!({})),
        share("11:10", 100),
    ];
    let groups = json!({"a": a, "b": b, "c": c});
    assert_eq!(ends(fixture, &groups, steps, ("fleet", "fleet")).await, ["policy"]);
}

async fn problems_of_a_device(fixture: &TestStore) {
    let d = vec!["d".to_owned()];
    let of = |body| patch("11:10", "/api/device/d", body);
    let policy = |policy: Value| json!({"policy": policy});
    let silent = || vec![report("09:00", &d, &json!({}))];
    // One of its jobs is missed, while it goes on with another one.
    let jobs = json!({"expect": {"every_seconds": 3600}, "jobs": [{"job": "n", "expect": {"every_seconds": 3600}}]});
    let missed = || {
        vec![
            report("09:00", &d, &json!({"job": "n"})),
            hourly(&d, &json!({"job": "other"})),
            patch("09:01", "/api/device/d", policy(jobs.clone())),
        ]
    };
    // One of its jobs fails, and another one does not.
    let failing = || {
        let failed = json!({"job": "n", "total_errors": 1});
        let mut steps = ["09:00", "09:10", "09:20"].map(|time| report(time, &d, &failed)).to_vec();
        steps.push(hourly(&d, &json!({"job": "other"})));
        steps
    };
    let of_job = json!({"job": "n"});
    let cases: Vec<(&str, Vec<Value>, Value, &str)> = vec![
        ("it reports", silent(), report("11:10", &d, &json!({})), "recovered"),
        ("nothing is expected", silent(), of(policy(json!({"expect": "nothing"}))), "policy"),
        (
            "it is expected later",
            silent(),
            of(policy(json!({"expect": {"every_seconds": 86400}}))),
            "policy",
        ),
        ("somebody excuses it", silent(), of(json!({"expected": false})), "policy"),
        ("it is paused", silent(), of(json!({"paused": true})), "paused"),
        (
            "it is deleted",
            silent(),
            request("11:10", "DELETE", "/api/device/d", Value::Null),
            "deleted",
        ),
        ("the job reports", missed(), report("11:10", &d, &of_job), "recovered"),
        ("the job is not expected any more", missed(), of(policy(json!({"jobs": null}))), "policy"),
        ("the job succeeds", failing(), report("11:10", &d, &of_job), "recovered"),
        (
            "more failures are needed",
            failing(),
            of(policy(json!({"failing": {"in_a_row": 10}}))),
            "policy",
        ),
    ];
    for (what, start, cause, expected) in cases {
        let steps = [start, vec![cause]].concat();
        let ends = ends(fixture, &json!({}), steps, ("device", "d")).await;
        assert_eq!(ends[..1], [expected], "{what}: {ends:?}");
    }
}
