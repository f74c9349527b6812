//! A month of a fleet of 1,000 devices in 20 schools, with everything that goes wrong in one: outages of the server and of its
//! database, a dark school, wrong clocks, late reports, flapping, changed policies, a pause, deletions, and a day on which nobody
//! gets through. Exactly the expected states and incidents come of it, on both stores, in whatever order the reports of a second
//! arrive.

use std::sync::Arc;

use pisync::{
    backtest::{self, Scenario},
    store,
};
use serde_json::{Value, json};

use crate::support::store::TestDatabase;

const SCHOOLS: usize = 20;
const DEVICES: usize = 50;

/// They report at these times of each day.
const TIMES: [&str; 2] = ["00:05", "12:05"];

fn school(number: usize) -> String {
    format!("school-{number:02}")
}

fn device(school: usize, number: usize) -> String {
    format!("school-{school:02}-d{number:02}")
}

/// A time of March 2026.
fn at(day: usize, time: &str) -> String {
    format!("2026-03-{day:02}T{time}:00Z")
}

/// The month's steps, and what must come of them.
#[derive(Default)]
struct Month {
    steps: Vec<Value>,
    states: Vec<Value>,
    incidents: Vec<Value>,
}

impl Month {
    fn step(&mut self, at: String, mut step: Value) {
        step["at"] = at.into();
        self.steps.push(step);
    }

    fn patch(&mut self, at: String, path: &str, body: &Value) {
        self.step(at, json!({"request": {"method": "PATCH", "path": path, "body": body}}));
    }

    /// One device reports one run.
    fn report(&mut self, received: String, device: &str, dated: &str, total_errors: u32) {
        let event = json!({"device_id": device, "timestamp": dated, "total_errors": total_errors});
        self.step(received, json!({"batch": [event]}));
    }

    fn state(&mut self, at: &str, devices: &[String], state: &str) {
        self.states.push(json!({"at": at, "device_ids": devices, "state": state}));
    }

    fn opened(&mut self, at: &str, (scope, subject, kind): (&str, &str, &str), members: usize) {
        self.incidents.push(json!({
            "at": at, "what": "opened", "scope": scope, "subject": subject, "kind": kind,
            "members": members,
        }));
    }

    fn resolved(&mut self, at: &str, (scope, subject, kind): (&str, &str, &str), why: &str) {
        self.incidents.push(json!({
            "at": at, "what": "resolved", "scope": scope, "subject": subject, "kind": kind,
            "resolution": why,
        }));
    }
}

fn all_of(school: usize) -> Vec<String> {
    (0..DEVICES).map(|number| device(school, number)).collect()
}

/// Whether a device reports at one of the usual times.
fn is_usual(day: usize, time: &str, school: usize, number: usize) -> bool {
    let is_night = time == TIMES[0];
    // Half days since the beginning of the month: 2 × day for the night, and 1 more for noon.
    let half = 2 * day + usize::from(!is_night);
    match (school, number) {
        // Nobody gets through.
        _ if half == 2 * 28 + 1 => false,
        // Its clock is wrong.
        (2, 10) => !(2 * 6..2 * 8).contains(&half),
        // It has no network.
        (3, 20) => half != 2 * 12,
        // Its runs fail.
        (3, 21) => !(2 * 13..=2 * 14).contains(&half),
        // It is too slow.
        (4, 30) => day != 18,
        // Its policy asks for one report a day.
        (5, _) => half < 2 * 20 || is_night,
        // The power is off.
        (7, _) => !(2 * 8 + 1..2 * 10).contains(&half),
        // It breaks, and is deleted.
        (8, 40) => half < 2 * 24,
        // It is away for repair.
        (9, 5) => !(2 * 15 + 1..=2 * 17).contains(&half),
        // They send several reports at once.
        (13, 3 | 4) => half != 2 * 26 + 1,
        _ => true,
    }
}

/// A generator of numbers that is the same in each run.
struct Numbers(u64);

impl Numbers {
    fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(0x5851_f42d);
            let place = (self.0 >> 33) % (end as u64 + 1);
            items.swap(end, usize::try_from(place).unwrap());
        }
    }
}

/// The month. With a seed, the reports of each second come in another order, and in several batches.
fn month(seed: Option<u64>) -> Scenario {
    let mut month = Month::default();
    usual_reports(&mut month, seed);
    outages(&mut month);
    wrong_clock(&mut month);
    dark_school(&mut month);
    late_reports(&mut month);
    pause(&mut month);
    flapping(&mut month);
    policies(&mut month);
    deletion(&mut month);
    several_at_once(&mut month, seed);
    nobody_gets_through(&mut month);

    // The order of steps at the same instant is that in which they stand.
    month.steps.sort_by_key(|step| step["at"].to_string());
    let groups: serde_json::Map<_, _> =
        (0..SCHOOLS).map(|number| (school(number), json!(all_of(number)))).collect();
    let scenario = json!({
        "id": "month", "title": "A month of 1,000 devices.",
        "start": at(1, "00:00"), "end": at(31, "00:00"),
        "groups": groups,
        "setup": [{"method": "PATCH", "path": "/api/fleet", "body": {
            "policy": {"expect": {"every_seconds": 12 * 3600}, "grace_seconds": 3600}
        }}],
        "steps": month.steps,
        "expect": {"states": month.states, "incidents": month.incidents},
    });
    Scenario::from_value(scenario).unwrap()
}

fn usual_reports(month: &mut Month, seed: Option<u64>) {
    let mut numbers = Numbers(seed.unwrap_or_default());
    for day in 1..=30 {
        for time in TIMES {
            let mut devices = Vec::new();
            for school in 0..SCHOOLS {
                let usual = (0..DEVICES).filter(|number| is_usual(day, time, school, *number));
                devices.extend(usual.map(|number| device(school, number)));
            }
            let size = if seed.is_some() {
                numbers.shuffle(&mut devices);
                300
            } else {
                devices.len().max(1)
            };
            for devices in devices.chunks(size) {
                let report = json!({"report": {"device_ids": devices, "total_errors": 0}});
                month.step(at(day, time), report);
            }
        }
    }
    let everybody: Vec<_> = (0..SCHOOLS).flat_map(all_of).collect();
    month.state(&at(1, TIMES[0]), &everybody, "ok");
}

/// What the server could not hear makes nobody silent.
fn outages(month: &mut Month) {
    month.step(at(3, "11:00"), json!({"server": "stop"}));
    month.step(at(3, "13:00"), json!({"server": "start"}));
    month.step(at(5, "12:00"), json!({"database": "away"}));
    month.step(at(5, "12:30"), json!({"database": "back"}));
}

/// It reports in time, but dates its reports three days back. Its last right date is that of the 5th, 00:05.
fn wrong_clock(month: &mut Month) {
    let name = device(2, 10);
    for day in [6, 7] {
        for time in TIMES {
            month.report(at(day, time), &name, &at(day - 3, time), 0);
        }
    }
    month.state(&at(6, "12:05"), std::slice::from_ref(&name), "degraded");
    month.state(&at(8, "00:05"), &[name], "ok");
}

fn dark_school(month: &mut Month) {
    let incident = ("group", "school-07", "silent");
    month.state(&at(8, "13:05"), &all_of(7), "silent");
    month.opened(&at(8, "13:05"), incident, DEVICES);
    month.state(&at(10, "00:05"), &all_of(7), "ok");
    month.resolved(&at(10, "00:05"), incident, "recovered");
}

/// One device is silent until its reports come late. Of another one, a success comes late, so that fewer than three runs have
/// failed in a row.
fn late_reports(month: &mut Month) {
    let silent = device(3, 20);
    let incident = ("device", silent.as_str(), "silent");
    month.state(&at(12, "01:05"), std::slice::from_ref(&silent), "silent");
    month.opened(&at(12, "01:05"), incident, 1);
    month.report(at(12, "09:00"), &silent, &at(12, "00:05"), 0);
    month.state(&at(12, "09:00"), std::slice::from_ref(&silent), "ok");
    month.resolved(&at(12, "09:00"), incident, "recovered");

    let failing = device(3, 21);
    let incident = ("device", failing.as_str(), "failing");
    for (day, time) in [(13, TIMES[0]), (13, TIMES[1]), (14, TIMES[0])] {
        month.report(at(day, time), &failing, &at(day, time), 1);
    }
    month.state(&at(13, "00:05"), std::slice::from_ref(&failing), "degraded");
    month.state(&at(14, "00:05"), std::slice::from_ref(&failing), "failing");
    month.opened(&at(14, "00:05"), incident, 1);
    month.report(at(14, "06:00"), &failing, &at(13, "20:00"), 0);
    month.state(&at(14, "06:00"), std::slice::from_ref(&failing), "degraded");
    month.resolved(&at(14, "06:00"), incident, "late_report");
    month.state(&at(14, "12:05"), std::slice::from_ref(&failing), "ok");
}

fn pause(month: &mut Month) {
    let name = device(9, 5);
    let path = format!("/api/device/{name}");
    month.patch(at(15, "06:00"), &path, &json!({"paused": true}));
    month.state(&at(15, "06:00"), std::slice::from_ref(&name), "paused");
    month.patch(at(17, "06:00"), &path, &json!({"paused": false}));
    month.state(&at(17, "06:00"), std::slice::from_ref(&name), "ok");
}

/// For a day it is asked for a report each hour, and takes longer. The third reopening is the last that anybody hears of, until
/// it has been well for three hours.
fn flapping(month: &mut Month) {
    let name = device(4, 30);
    let path = format!("/api/device/{name}");
    let incident = ("device", name.as_str(), "silent");
    let hourly = json!({"policy": {"expect": {"every_seconds": 3600}, "grace_seconds": 1800}});
    month.patch(at(17, "23:59"), &path, &hourly);
    let reports = ["00:00", "01:40", "03:20", "05:00", "06:40", "08:20", "10:00", "11:00", "12:00"];
    for time in reports.into_iter().chain(["13:00"]) {
        month.report(at(18, time), &name, &at(18, time), 0);
    }
    let silences = ["01:30", "03:10", "04:50", "06:30", "08:10", "09:50"];
    for (index, (silent, ok)) in silences.into_iter().zip(&reports[1..]).enumerate() {
        month.state(&at(18, silent), std::slice::from_ref(&name), "silent");
        month.state(&at(18, ok), std::slice::from_ref(&name), "ok");
        let what = ["opened", "reopened", "reopened", "flapping"].get(index);
        if let Some(what) = what {
            month.incidents.push(json!({
                "at": at(18, silent), "what": what, "scope": "device", "subject": name,
                "kind": "silent",
            }));
        }
        if index < 3 {
            month.resolved(&at(18, ok), incident, "recovered");
        }
    }
    month.resolved(&at(18, "13:00"), incident, "recovered");
    month.patch(at(18, "13:01"), &path, &json!({"policy": null}));
}

/// One school is asked for fewer reports, and sends fewer. Another one is asked for more than it sends for a day.
fn policies(month: &mut Month) {
    let daily = json!({"policy": {"expect": {"every_seconds": 86_400}, "grace_seconds": 7200}});
    month.patch(at(20, "06:00"), "/api/group/school-05", &daily);
    let path = "/api/group/school-06";
    let often = json!({"policy": {"expect": {"every_seconds": 6 * 3600}}});
    month.patch(at(21, "06:00"), path, &often);
    let incident = ("group", "school-06", "silent");
    month.state(&at(21, "19:05"), &all_of(6), "silent");
    month.opened(&at(21, "19:05"), incident, DEVICES);
    month.state(&at(22, "00:05"), &all_of(6), "ok");
    month.resolved(&at(22, "00:05"), incident, "recovered");
    month.patch(at(22, "06:00"), path, &json!({"policy": null}));
}

fn deletion(month: &mut Month) {
    let name = device(8, 40);
    let incident = ("device", name.as_str(), "silent");
    month.state(&at(24, "01:05"), std::slice::from_ref(&name), "silent");
    month.opened(&at(24, "01:05"), incident, 1);
    let path = format!("/api/device/{name}");
    month.step(at(24, "10:00"), json!({"request": {"method": "DELETE", "path": path}}));
    month.resolved(&at(24, "10:00"), incident, "deleted");
}

/// Two devices send four reports in one second. The dates decide, not the order in which they come.
fn several_at_once(month: &mut Month, seed: Option<u64>) {
    let (well, failing) = (device(13, 3), device(13, 4));
    let mut reports = Vec::new();
    for (minute, of_well, of_failing) in [(1, 1, 0), (2, 1, 1), (3, 1, 1), (4, 0, 1)] {
        let dated = at(26, &format!("12:0{minute}"));
        reports.push((well.clone(), dated.clone(), of_well));
        reports.push((failing.clone(), dated, of_failing));
    }
    if let Some(seed) = seed {
        Numbers(seed).shuffle(&mut reports);
    }
    for (device, dated, total_errors) in reports {
        month.report(at(26, "12:05"), &device, &dated, total_errors);
    }
    let incident = ("device", failing.as_str(), "failing");
    month.state(&at(26, "12:05"), std::slice::from_ref(&failing), "failing");
    month.opened(&at(26, "12:05"), incident, 1);
    month.state(&at(27, "00:05"), std::slice::from_ref(&failing), "ok");
    month.resolved(&at(27, "00:05"), incident, "recovered");
}

/// Something between the server and all devices is broken at noon. Whoever is asked for one report a day is not missed.
fn nobody_gets_through(month: &mut Month) {
    let incident = ("fleet", "fleet", "silent");
    let deleted = device(8, 40);
    let missed = (0..SCHOOLS).filter(|school| *school != 5).flat_map(all_of);
    let missed: Vec<_> = missed.filter(|name| *name != deleted).collect();
    month.state(&at(28, "13:05"), &missed, "silent");
    month.opened(&at(28, "13:05"), incident, missed.len());
    month.state(&at(29, "00:05"), &missed, "ok");
    month.resolved(&at(29, "00:05"), incident, "recovered");
}

async fn run(database: TestDatabase, seed: Option<u64>) {
    database.migrate().await;
    let store: Arc<_> = store::open(&database.target).await.unwrap();
    let scenario = month(seed);
    let came = backtest::run(&scenario, &store, |_| {}).await.unwrap();
    let differences = scenario.expect.differences(&came);
    let shown = differences[..differences.len().min(40)].join("\n");
    assert!(differences.is_empty(), "{}:\n{shown}", differences.len());
    store.close().await.unwrap();
    drop(store);
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_month_on_sqlite() {
    run(TestDatabase::sqlite(), None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_month_in_another_order_on_sqlite() {
    run(TestDatabase::sqlite(), Some(18)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_month_in_another_order_on_postgres() {
    run(TestDatabase::postgres().await, Some(81)).await;
}
