//! `GET /api/stats`: the fleet's figures add up over every device, and tell who is active.

use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{column, event, failure, success, with},
    server::TestServer,
};

both_stores!(
    an_empty_fleet,
    every_device_counts,
    active_devices_by_when_they_were_heard_from,
    the_ten_most_recent_devices,
    rates_are_rounded,
    a_rate_is_never_rounded_to_all_or_nothing,
    only_what_is_dated_within_a_window,
);

async fn stats(server: &TestServer) -> Value {
    server.get("/api/stats").await.data(200)
}

async fn an_empty_fleet(server: &TestServer) {
    assert_eq!(
        stats(server).await,
        json!({
            "total_devices": 0,
            "total_sync_events": 0,
            "total_failures": 0,
            "total_files_synced": 0,
            "total_errors": 0,
            "overall_success_rate": 0.0,
            "avg_internet_speed": null,
            "active_devices_24h": 0,
            "recent_devices": [],
        })
    );
}

/// The Node service summed at most 100 devices.
async fn every_device_counts(server: &TestServer) {
    for device in 0..120 {
        let fields = json!({
            "total_files_synced": 10 + device, "total_errors": i32::from(device % 4 == 0) * 3,
            "internet_speed": (device % 2 == 0).then_some(0.01),
        });
        server.store(&with(event(&format!("pi-{device}")), &fields)).await;
    }
    let found = stats(server).await;
    let expected = json!({
        "total_devices": 120,
        "total_sync_events": 120,
        "total_failures": 30,
        "total_files_synced": 120 * 10 + 119 * 120 / 2,
        "total_errors": 90,
        "overall_success_rate": 75.0,
        "avg_internet_speed": 0.01,
        "active_devices_24h": 120,
    });
    assert_eq!(with(found.clone(), &expected), found);
    assert_eq!(found["recent_devices"].as_array().unwrap().len(), 10);
}

async fn active_devices_by_when_they_were_heard_from(server: &TestServer) {
    const DAY: i64 = 24 * 60 * 60;
    let active = async || stats(server).await["active_devices_24h"].take();
    // What a device says of the time does not matter.
    server.store(&success("first", at(-30 * DAY))).await;
    server.clock.set(at(1));
    server.store(&success("second", at(0))).await;
    assert_eq!(active().await, 2);
    server.clock.set(at(DAY));
    assert_eq!(active().await, 2, "exactly 24 hours ago is within them");
    server.clock.set(at(DAY).saturating_add_milliseconds(1));
    assert_eq!(active().await, 1);
    server.clock.set(at(DAY + 2));
    assert_eq!(active().await, 0);
    assert_eq!(stats(server).await["total_devices"], 2);
    server.store(&failure("first", at(-DAY))).await;
    assert_eq!(active().await, 1);
}

async fn the_ten_most_recent_devices(server: &TestServer) {
    for device in 0..12 {
        server.store(&success(&format!("pi-{device:02}"), at(-100 + device))).await;
    }
    // By the syncs' own dates, not by when they were received: this one arrives last.
    server.store(&success("from-long-ago", at(-1000))).await;
    server.store(&failure("pi-05", at(-99))).await;
    let recent = stats(server).await["recent_devices"].take();
    let expected: Vec<_> = (2..12).rev().map(|device| format!("pi-{device:02}")).collect();
    assert_eq!(column(&recent, "device_id"), expected);
    assert_eq!(
        recent[6],
        json!({
            "device_id": "pi-05",
            "total_syncs": 2,
            "total_files_synced": 1,
            "total_errors": 1,
            "failed_syncs": 1,
            "last_sync": at(-95),
            "last_failed_sync": at(-99),
        })
    );
}

async fn rates_are_rounded(server: &TestServer) {
    for second in 0..3 {
        let event = if second == 0 { failure("pi", at(-9)) } else { success("pi", at(-second)) };
        server.store(&with(event, &json!({"internet_speed": second}))).await;
    }
    let found = stats(server).await;
    assert_eq!(found["overall_success_rate"], 66.67);
    assert_eq!(found["avg_internet_speed"], 1.0);
}

async fn a_rate_is_never_rounded_to_all_or_nothing(server: &TestServer) {
    // A perfect figure out of nothing would hide that nothing reports.
    let metrics = server.get("/metrics").await;
    let is_unknown = |line: &str| line == "pisync_sync_success_ratio NaN";
    assert!(metrics.text().lines().any(is_unknown), "{}", metrics.text());
    server.store(&with(success("pi", at(-2)), &json!({"internet_speed": 0.01}))).await;
    server.store(&with(failure("pi", at(-1)), &json!({"internet_speed": 0}))).await;
    assert_eq!(stats(server).await["overall_success_rate"], 50.0);
    for (failed, shown, ratio) in [
        (1, 99.99, 29_999.0 / 30_000.0),
        (29_999, 0.01, 1.0 / 30_000.0),
        (0, 100.0, 1.0),
        (30_000, 0.0, 0.0),
    ] {
        // The events are not aggregated yet: all but these two.
        let update = format!(
            "update device_jobs set total_syncs = 30000, failed_syncs = {failed}, speed_count = 30000;
             update fleet_totals set total_syncs = 29998, failed_syncs = {failed} - 1, speed_count = 29998;"
        );
        server.database.execute(&update).await;
        let found = stats(server).await;
        assert_eq!(found["overall_success_rate"], shown);
        assert_eq!(found["avg_internet_speed"], 0.01, "measured, if hardly anything");
        let device = server.get("/api/device/pi").await.data(200);
        let history = server.get("/api/device/pi/sync-history").await.data(200);
        let devices = server.get("/api/devices").await.data(200);
        for figures in [&device, &device["jobs"][0], &history["stats"], &devices["devices"][0]] {
            assert_eq!(figures["success_rate"], shown, "{figures}");
            assert_eq!(figures["avg_internet_speed"], 0.01, "{figures}");
        }
        let metrics = server.get("/metrics").await;
        let line = format!("pisync_sync_success_ratio {ratio}");
        assert!(metrics.text().lines().any(|found| found == line), "{line}");
    }
}

async fn only_what_is_dated_within_a_window(server: &TestServer) {
    const HOUR: i64 = 60 * 60;
    // It is noon: the window of 24 hours began at 13:00 yesterday, that of 7 days at midnight.
    for (device, second) in [
        ("now", 0),
        ("within-24h", -23 * HOUR),
        ("before-24h", -23 * HOUR - 1),
        ("within-7d", -(6 * 24 + 12) * HOUR),
        ("before-7d", -(6 * 24 + 12) * HOUR - 1),
        ("within-30d", -(29 * 24 + 12) * HOUR),
        ("before-30d", -(29 * 24 + 12) * HOUR - 1),
    ] {
        server.store(&with(failure(device, at(second)), &json!({"internet_speed": 2.5}))).await;
    }
    let everything = stats(server).await;
    assert_eq!(everything["total_sync_events"], 7);
    assert!(everything["window"].is_null());
    for (window, start, expected) in [
        ("24h", "2026-11-21T13:00:00.000Z", 2),
        ("7d", "2026-11-16T00:00:00.000Z", 4),
        ("30d", "2026-10-24T00:00:00.000Z", 6),
    ] {
        let found = server.get(&format!("/api/stats?window={window}")).await.data(200);
        let fields = json!({
            "window": window, "window_start": start, "total_sync_events": expected,
            "total_failures": expected, "total_errors": expected, "total_files_synced": 0,
            "overall_success_rate": 0.0, "avg_internet_speed": 2.5,
        });
        // The devices are the same.
        assert_eq!(found, with(everything.clone(), &fields));
        let path = format!("/api/devices/repeated-failures?threshold=1&window={window}");
        let failing = server.get(&path).await.data(200);
        assert_eq!(failing["total_devices"], expected);
        assert_eq!((&failing["window"], &failing["window_start"]), (&json!(window), &json!(start)));
    }
    let refused = server.get("/api/stats?window=1d").await.complaints();
    assert_eq!(refused, ["\"window\" must be one of [24h, 7d, 30d]"]);
    let refused = server.get("/api/devices/repeated-failures?window=").await.complaints();
    assert_eq!(refused, ["\"window\" must be one of [24h, 7d, 30d]"]);
}
