//! `GET /api/devices/repeated-failures`: who is listed, in which order, and with which figures.

use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{column, failure, success, with},
    server::TestServer,
};

both_stores!(
    devices_with_enough_failures,
    most_failures_first_then_the_latest_then_by_name,
    current_streaks,
    streaks_are_per_job,
    all_of_them_unless_a_limit_is_given,
    wrong_parameters,
);

const PATH: &str = "/api/devices/repeated-failures";

async fn failures(server: &TestServer, query: &str) -> Value {
    server.get(&format!("{PATH}?{query}")).await.data(200)
}

async fn listed(server: &TestServer, query: &str) -> Vec<Value> {
    column(&failures(server, query).await["devices"], "device_id")
}

/// Stores so many failures, the last of them at `second` and each a second before the next.
async fn fail(server: &TestServer, device: &str, times: i64, second: i64) {
    for before in (0..times).rev() {
        server.store(&failure(device, at(second - before))).await;
    }
}

async fn devices_with_enough_failures(server: &TestServer) {
    fail(server, "twice", 2, -10).await;
    server.clock.set(at(5));
    fail(server, "thrice", 3, -10).await;
    server.clock.set(at(7));
    server.store(&success("thrice", at(-100))).await;
    server.store(&success("never", at(-10))).await;
    assert_eq!(
        failures(server, "").await,
        json!({
            "threshold": 3,
            "total_devices": 1,
            "devices": [{
                "device_id": "thrice",
                "total_failed_syncs": 3,
                "consecutive_failures": 3,
                "last_failed_sync": at(-10),
                "last_success": at(-100),
                "device_registered": at(5),
                "last_seen": at(7),
            }],
            "pagination": {"limit": null, "offset": 0, "total": 1, "next_cursor": null},
        })
    );
    assert_eq!(listed(server, "threshold=2").await, ["thrice", "twice"]);
    assert_eq!(listed(server, "threshold=1").await, ["thrice", "twice"]);
    assert_eq!(failures(server, "threshold=100").await["threshold"], 100);
    assert!(listed(server, "threshold=4").await.is_empty());
}

async fn most_failures_first_then_the_latest_then_by_name(server: &TestServer) {
    for (device, times, second) in [
        ("few", 1, -1),
        ("b", 2, -20),
        ("late", 2, -10),
        ("a", 2, -20),
        ("many", 3, -30),
        ("B", 2, -20),
    ] {
        fail(server, device, times, second).await;
    }
    let expected = ["many", "late", "B", "a", "b", "few"];
    assert_eq!(listed(server, "threshold=1").await, expected);
    // Pages cut the same list, also where devices tie; behind the last one there is nothing, of as many.
    for window in ["", "&window=24h", "&window=7d"] {
        for position in 0..=expected.len() {
            let query = format!("threshold=1&limit=1&offset={position}{window}");
            let page = failures(server, &query).await;
            let device: Vec<_> = expected.iter().copied().skip(position).take(1).collect();
            assert_eq!(column(&page["devices"], "device_id"), device, "{query}");
            assert_eq!(page["total_devices"], 6, "{query}");
        }
        let twice = listed(server, &format!("threshold=2{window}")).await;
        assert_eq!(twice, expected[..5], "{window}");
    }
}

async fn current_streaks(server: &TestServer) {
    fail(server, "recovered", 4, -50).await;
    server.store(&success("recovered", at(-40))).await;
    fail(server, "failing", 3, -10).await;
    fail(server, "relapsed", 3, -50).await;
    server.store(&success("relapsed", at(-40))).await;
    fail(server, "relapsed", 2, -30).await;
    assert_eq!(listed(server, "").await, ["relapsed", "recovered", "failing"]);
    assert_eq!(listed(server, "consecutive=false").await, ["relapsed", "recovered", "failing"]);
    assert_eq!(listed(server, "consecutive=true").await, ["failing"]);
    let twice = failures(server, "consecutive=true&threshold=2").await;
    assert_eq!(column(&twice["devices"], "device_id"), ["failing", "relapsed"]);
    assert_eq!(column(&twice["devices"], "consecutive_failures"), [3, 2]);
    assert_eq!(column(&twice["devices"], "total_failed_syncs"), [3, 5]);
    for window in ["24h", "30d"] {
        let same = failures(server, &format!("consecutive=true&threshold=2&window={window}")).await;
        assert_eq!((&same["devices"], &same["total_devices"]), (&twice["devices"], &json!(2)));
        let beyond = format!("consecutive=true&threshold=2&window={window}&offset=2");
        assert_eq!(failures(server, &beyond).await["total_devices"], 2);
    }
    // A success within the streak that is reported late.
    server.store(&success("failing", at(-11))).await;
    let once = failures(server, "consecutive=true&threshold=1").await;
    assert_eq!(column(&once["devices"], "device_id"), ["relapsed", "failing"]);
    assert_eq!(column(&once["devices"], "consecutive_failures"), [2, 1]);
}

async fn streaks_are_per_job(server: &TestServer) {
    let of = |job: &str, event: Value| with(event, &json!({"job": job}));
    for second in [-9, -7, -5] {
        server.store(&of("photos", failure("pi", at(second)))).await;
        server.store(&of("logs", success("pi", at(second + 1)))).await;
    }
    server.store(&of("logs", failure("pi", at(-1)))).await;
    let data = failures(server, "consecutive=true").await;
    assert_eq!(column(&data["devices"], "consecutive_failures"), [3]);
    assert_eq!(column(&data["devices"], "total_failed_syncs"), [4]);
    assert_eq!(column(&data["devices"], "last_success"), [json!(at(-4))]);
}

async fn all_of_them_unless_a_limit_is_given(server: &TestServer) {
    for device in 0..60 {
        server.store(&failure(&format!("pi-{device:02}"), at(-1))).await;
    }
    let data = failures(server, "threshold=1").await;
    let names: Vec<_> = (0..60).map(|device| format!("pi-{device:02}")).collect();
    assert_eq!(column(&data["devices"], "device_id"), names);
    assert_eq!(data["total_devices"], 60);
    assert_eq!(listed(server, "threshold=1&offset=58").await, names[58..]);
    assert_eq!(listed(server, "threshold=1&limit=2&offset=5").await, names[5..7]);
}

async fn wrong_parameters(server: &TestServer) {
    let get = async |query: &str| server.get(&format!("{PATH}?{query}")).await.complaints();
    assert_eq!(
        get("threshold=101&consecutive=yes&limit=0&offset=x").await,
        [
            "\"threshold\" must be less than or equal to 100",
            "\"consecutive\" must be a boolean",
            "\"limit\" must be greater than or equal to 1",
            "\"offset\" must be a number",
        ]
    );
    assert_eq!(get("threshold=2.5").await, ["\"threshold\" must be an integer"]);
    assert_eq!(get("threshold=").await, ["\"threshold\" must be a number"]);
}
