//! `GET /metrics`: what is measured, and that Prometheus can read it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use pisync::{metrics::Metrics, store::Freshness};
use pisync_core::ViolationCode;
use reqwest::{Method, header::HeaderValue};
use serde_json::{Value, json};

use crate::support::documents::text;
use crate::support::events::{at, success, write};
use crate::support::fleet::{Row, time};
use crate::support::http::{event, failure, send, with};
use crate::support::server::TestServer;
use crate::support::store::TestStore;

/// The value of a sample in Prometheus' text.
#[track_caller]
fn sample(metrics: &str, name: &str) -> f64 {
    let lines: Vec<_> =
        metrics.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).collect();
    assert_eq!(lines.len(), 1, "{name} in\n{metrics}");
    lines[0].parse().unwrap()
}

/// The sum of a metric over all its labels.
fn total(metrics: &str, name: &str) -> f64 {
    let samples = metrics.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'));
    samples.map(|sample| sample.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// A server that has seen a bit of everything, and what it measured.
async fn measured() -> (TestServer, String) {
    let server = TestServer::on_sqlite(|_| {}).await;
    for second in [-3, -2] {
        server.store(&with(event("ok"), &json!({"timestamp": at(second)}))).await;
    }
    server.store(&event("also-ok")).await;
    server.store(&failure("failing", at(-1))).await;
    server.report(&json!({})).await.details();
    for device in ["ok", "failing", "nobody", "%00"] {
        server.get(&format!("/api/device/{device}")).await;
    }
    for number in 0..20 {
        server.get(&format!("/{number}")).await.error(404);
        let method = format!("METHOD{number}").parse().unwrap();
        send(server.request(method, "/api/stats")).await.error(405);
    }
    let answer = server.get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    (server, answer.text().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn measurements_add_up() {
    let (server, metrics) = measured().await;
    let requests = |method: &str, route: &str, status: u16| {
        let name = "http_requests_total";
        sample(
            &metrics,
            &format!("{name}{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}}"),
        )
    };
    assert_eq!(requests("POST", "/api/sync-event", 201), 4.0);
    assert_eq!(requests("POST", "/api/sync-event", 400), 1.0);
    assert_eq!(requests("GET", "/api/device/{device_id}", 200), 2.0);
    assert_eq!(requests("GET", "/api/device/{device_id}", 404), 1.0);
    assert_eq!(requests("GET", "/api/device/{device_id}", 400), 1.0);
    assert_eq!(requests("GET", "unmatched", 404), 20.0);
    assert_eq!(requests("OTHER", "/api/stats", 405), 20.0);
    for (name, expected) in [
        ("http_request_duration_seconds_count{method=\"POST\",route=\"/api/sync-event\"}", 5.0),
        (
            "http_request_duration_seconds_bucket{method=\"POST\",route=\"/api/sync-event\",le=\"+Inf\"}",
            5.0,
        ),
        ("pisync_sync_events_total{result=\"ok\"}", 3.0),
        ("pisync_sync_events_total{result=\"failed\"}", 1.0),
        ("pisync_ingest_batch_events_count", 4.0),
        ("pisync_ingest_batch_events_sum", 4.0),
        ("pisync_ingest_batch_duration_seconds_count", 4.0),
        ("pisync_ingest_queue_events", 0.0),
        ("pisync_active_devices", 3.0),
        ("pisync_incidents_open{kind=\"silent\",scope=\"fleet\"}", 0.0),
        ("pisync_sync_success_ratio", 0.75),
        ("pisync_database_connections{state=\"waiting\"}", 0.0),
    ] {
        assert_eq!(sample(&metrics, name), expected, "{name}");
    }
    assert_eq!(total(&metrics, "pisync_devices"), 3.0);
    let built = metrics.lines().find(|line| line.starts_with("pisync_build_info{")).unwrap();
    let version = format!("version=\"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(built.contains(&version) && built.ends_with("} 1"), "{built}");
    for name in [
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_start_time_seconds",
        "pisync_database_connections{state=\"max\"}",
    ] {
        assert!(sample(&metrics, name) >= 1.0, "{name}");
    }
    // Whatever is asked for, there are only so many labels.
    for label in ["/0", "/19", "METHOD", "nobody"] {
        assert!(!metrics.contains(label), "{label}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_has_nothing_to_find_fault_with() {
    let program = Path::new("/usr/bin/promtool");
    assert!(
        program.exists(),
        "{} is missing: run ./scripts/test, which sees to it",
        program.display()
    );
    let (server, metrics) = measured().await;
    let mut promtool = Command::new(program)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.status.success() && said.is_empty(), "{said}");
    server.stop().await;
}

mod of_the_fleet {
    both_stores!(health_is_measured_without_a_look_at_devices);

    use super::*;

    /// Without a server, whose sweep would change the rows.
    async fn health_is_measured_without_a_look_at_devices(fixture: &TestStore) {
        let TestStore { database, store, .. } = fixture;
        let measured = Metrics::new().unwrap();
        let measure = async || {
            let stats = store.fleet_stats(at(-60), 0, Freshness::Everything).await.unwrap();
            measured.set_fleet(&stats, &store.health_counts().await.unwrap());
            measured.render().unwrap()
        };
        let before = measure().await;
        assert_eq!(sample(&before, "pisync_last_sweep_timestamp_seconds"), 0.0);
        let incident = |id, group: &str| Row::of_group(id, group);
        let sql = [
            incident(1, "a").sql(database),
            incident(2, "b").sql(database),
            incident(3, "c").resolved(at(-1)).sql(database),
            Row::of_device(4, "pi", "a").sql(database),
            // As a sweep leaves it; foreign words make no labels.
            format!("update fleet_state set swept_at = {};", time(database, at(-15))),
            r#"insert into group_states ("group", state, devices, expected)
               values ('x', 'ok', 3, 3), ('y', 'ok', 4, 4), ('y', 'silent', 2, 2), ('y', 'odd', 9, 9);"#
                .to_owned(),
        ];
        database.execute(&sql.concat()).await;
        let events = (0..10).map(|device| success(&format!("pi-{device}"), at(-1))).collect();
        write(&mut *fixture.writer(), events).await;
        let metrics = measure().await;
        for (name, expected) in [
            ("pisync_devices{status=\"ok\"}", 7.0),
            ("pisync_devices{status=\"silent\"}", 2.0),
            ("pisync_devices{status=\"paused\"}", 0.0),
            ("pisync_devices{status=\"unknown\"}", 1.0),
            ("pisync_incidents_open{kind=\"silent\",scope=\"group\"}", 2.0),
            ("pisync_incidents_open{kind=\"failing\",scope=\"device\"}", 1.0),
            ("pisync_incidents_open{kind=\"failing\",scope=\"fleet\"}", 0.0),
            (
                "pisync_last_sweep_timestamp_seconds",
                f64::from(u32::try_from(at(-15).as_millisecond() / 1000).unwrap()),
            ),
        ] {
            assert_eq!(sample(&metrics, name), expected, "{name}");
        }
        assert!(!metrics.contains("odd"), "{metrics}");
        database.execute("update incidents set resolved_at = opened_at where id = 2").await;
        let metrics = measure().await;
        let open = sample(&metrics, "pisync_incidents_open{kind=\"silent\",scope=\"group\"}");
        assert_eq!(open, 1.0);
    }
}

/// Statistics wait until the acknowledged events are in the tables. A scrape shows what is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrape_never_waits_for_the_ingest_journal() {
    let server = Arc::new(TestServer::on_sqlite(|_| {}).await);
    server.store(&event("known")).await;
    server.get("/api/stats").await.data(200);
    // The server cannot apply its journal now.
    let other = rusqlite::Connection::open(server.database.file().unwrap()).unwrap();
    other.execute_batch("begin immediate").unwrap();
    server.store(&failure("new", at(-1))).await;
    let asked = Arc::clone(&server);
    let mut stats = tokio::spawn(async move { asked.get("/api/stats").await.data(200) });
    // This is the first scrape: it does not show the figures of an earlier one.
    let metrics = server.get("/metrics").await;
    assert_eq!(total(metrics.text(), "pisync_devices"), 1.0);
    assert_eq!(sample(metrics.text(), "pisync_sync_success_ratio"), 1.0);
    let waited = tokio::time::timeout(Duration::from_millis(10), &mut stats).await;
    assert!(waited.is_err(), "statistics did not wait: {waited:?}");
    other.execute_batch("rollback").unwrap();
    let stats = stats.await.unwrap();
    assert_eq!((&stats["total_devices"], &stats["total_failures"]), (&json!(2), &json!(1)));
    let metrics = server.get("/metrics").await;
    assert_eq!(total(metrics.text(), "pisync_devices"), 2.0);
    assert_eq!(sample(metrics.text(), "pisync_sync_success_ratio"), 0.5);
}

/// Every event that is answered 400 is counted, and the page names the reasons that there are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_events_are_counted_by_their_reason() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let wrong = |field: &str, value: Value| with(event("pi"), &json!({field: value}));
    let mut expected = BTreeMap::new();
    for (code, body, keys) in [
        ("required", json!({}), vec![]),
        ("type", wrong("total_errors", json!([])), vec![]),
        ("range", wrong("total_errors", json!(-1)), vec![]),
        ("format", wrong("timestamp", json!("yesterday")), vec![]),
        ("format", event("pi"), vec!["\u{e9}"]),
        ("length", wrong("device_id", json!("")), vec![]),
        ("length", event("pi"), vec![""]),
        ("length", event("pi"), vec![&*"x".repeat(65)]),
        ("future", wrong("timestamp", json!(at(86_400))), vec![]),
        ("conflict", wrong("event_id", json!("a")), vec!["b"]),
        ("conflict", event("pi"), vec!["a", "a"]),
        ("malformed_json", json!(null), vec![]),
    ] {
        let text = if body.is_null() { "{".to_owned() } else { body.to_string() };
        let request = server.request(Method::POST, "/api/sync-event");
        let request = request.header("content-type", "application/json").body(text);
        let request = keys.into_iter().fold(request, |request, key| {
            let key = HeaderValue::from_bytes(key.as_bytes()).unwrap();
            request.header("idempotency-key", key)
        });
        let answer = send(request).await.json(400);
        let answered = if body.is_null() { &answer["code"] } else { &answer["details"][0]["code"] };
        assert_eq!(answered, code, "{answer}");
        *expected.entry(code).or_insert(0) += 1;
    }
    let metrics = server.get("/metrics").await.text().to_owned();
    const NAME: &str = "pisync_sync_events_rejected_total";
    let counted: BTreeMap<_, u32> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix(NAME)?.strip_prefix("{reason=\"")?.split_once("\"} "))
        .map(|(reason, count)| (reason, count.parse().unwrap()))
        .collect();
    assert_eq!(counted, expected);
    // Unknown fields of an event are ignored.
    let codes = ViolationCode::ALL.into_iter().map(ViolationCode::as_str);
    let possible: Vec<_> = codes.filter(|code| *code != "unknown_field").collect();
    assert_eq!(
        counted.keys().copied().collect::<BTreeSet<_>>(),
        possible.iter().copied().collect()
    );
    let page = text("docs/operations.md");
    let row = page.lines().find(|line| line.starts_with(&format!("| `{NAME}` |"))).unwrap();
    let named: Vec<_> = row.split('`').skip(3).step_by(2).collect();
    let named: Vec<_> =
        named.into_iter().filter(|name| !["Idempotency-Key", "event_id"].contains(name)).collect();
    assert_eq!(named, possible);
    server.stop().await;
}
