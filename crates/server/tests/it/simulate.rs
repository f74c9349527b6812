//! `pisync simulate`: the same seed sends the same fleet, a right server is found right with everything that can go wrong on,
//! also when it is killed, and a wrong one is found wrong.

use std::time::{Duration, Instant};

use pisync_core::Timestamp;
use serde_json::{Value, json};

use crate::{
    json_output::documented,
    support::{
        http::Client,
        program::{Ended, Installed, Program},
        server::unused_address,
        store::{TestDatabase, on_postgres, on_sqlite},
    },
    tls::certificate,
};

both_stores!(
    a_right_server_is_found_right,
    a_wrong_server_is_found_wrong,
    killed_servers_change_nothing,
);

/// Waits until an SQL expression comes to this much.
async fn wait_until(database: &TestDatabase, expression: &str, least: i64) {
    let until = Instant::now() + Duration::from_secs(60);
    while database.number(expression).await < least {
        assert!(Instant::now() < until, "{expression} does not become {least}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const EVENTS: &str = "(select count(*) from sync_events)";

/// What a server says that it has.
async fn events(client: &Client) -> i64 {
    let stats = client.get("/api/stats").await.data(200);
    stats["total_sync_events"].as_i64().unwrap()
}

fn words<'a>(url: &'a str, others: &[&'a str]) -> Vec<&'a str> {
    [&["simulate", "--url", url], others].concat()
}

/// The cost of a phase.
fn phase<'a>(document: &'a Value, name: &str) -> &'a Value {
    let phases = document["phases"].as_array().unwrap();
    phases.iter().find(|phase| phase["phase"] == name).unwrap()
}

#[test]
fn the_same_seed_prints_the_same_bytes() {
    let program = Program::new();
    let print = |others: &[&str]| {
        let fleet = [
            "simulate",
            "--print",
            "--devices",
            "12",
            "--days",
            "2",
            "--groups",
            "3",
            "--jobs",
            "2",
        ];
        program.run(&[&fleet[..], others].concat()).success().to_owned()
    };
    let fixed = ["--until", "2026-01-15T10:30:00Z", "--live", "10s", "--speed", "720"];
    let first = print(&fixed);
    assert_eq!(print(&fixed), first);
    // Without a fixed time a fleet ends at the present.
    assert_ne!(print(&[]), first);
    assert_ne!(print(&[&fixed[..], &["--seed", "2"]].concat()), first);
    let lines: Vec<Value> = first.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() > 1_000, "{}", lines.len());
    assert_eq!(lines[0]["device_id"], "sim-1-000000");
    assert_eq!(lines[0]["timestamp"], "2026-01-13T10:30:00.000Z");
    let last = |line: &Value| Timestamp::parse_iso8601(line["timestamp"].as_str().unwrap());
    let latest = lines.iter().filter_map(last).max().unwrap().to_string();
    assert!(latest.starts_with("2026-01-15T12:"), "{latest}");
    // Another program can read them.
    let program = program.with_file("events", &first);
    program.run(&["db", "setup"]).success();
    let imported = program.run(&["import", "events"]);
    assert!(
        imported.code() == 0
            && imported.stdout.contains(&format!("imported {} events", lines.len())),
        "{imported:?}"
    );
}

/// Every pattern and every clock, history and live, and then beside the devices of the first run.
async fn a_right_server_is_found_right(installed: &Installed) {
    let Installed { program, database } = installed;
    let serving = program.serve(&[]);
    let url = serving.client.url("");
    let fleet =
        ["--devices", "80", "--groups", "9", "--jobs", "2", "--days", "2", "--every", "30m"];
    let how = ["--live", "3s", "--speed", "7200", "--batch", "300", "--sample", "1000", "--json"];
    let ended = program.run(&words(&url, &[&fleet[..], &how].concat()));
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.stderr.contains(": no difference\n"), "{ended:?}");
    let document = documented("simulate", &ended);
    assert_eq!((&document["differing"], &document["differences"]), (&json!(0), &json!([])));
    let events = document["events"].as_i64().unwrap();
    assert_eq!(database.number(EVENTS).await, events);
    let compared = json!({"devices": 80, "histories": 80, "rows": events, "notes": []});
    assert_eq!(document["compared"], compared);
    let names: Vec<_> =
        document["phases"].as_array().unwrap().iter().map(|phase| phase["phase"].clone()).collect();
    assert_eq!(names, ["devices", "groups", "history", "live"]);
    for name in ["history", "live"] {
        let phase = phase(&document, name);
        assert!(phase["duplicates"].as_i64() > Some(0), "{phase}");
        assert_eq!(phase["duplicates"], phase["sent_twice"]);
        assert!(
            phase["latency_ms"]["p99"].as_f64() <= phase["latency_ms"]["max"].as_f64(),
            "{phase}"
        );
        // Devices that do not trust their clocks report one by one.
        assert!(phase["statuses"]["201"].as_i64() > Some(0), "{phase}");
    }
    assert_eq!(database.number("(select count(distinct \"group\") from devices)").await, 9);

    let again = program.run(&words(&url, &["--devices", "5", "--days", "1"]));
    assert!(again.code() == 1 && again.stderr.contains("take another --seed"), "{again:?}");
    let beside =
        words(&url, &["--seed", "2", "--devices", "20", "--groups", "0", "--days", "3", "--json"]);
    let ended = program.run(&beside);
    assert_eq!(ended.code(), 0, "{ended:?}");
    let notes = ended.document()["compared"]["notes"].take();
    assert!(notes[0].as_str().unwrap().starts_with("the server has other devices"), "{notes}");
    serving.stop();
    program.run(&["verify"]).success();
}

/// What somebody has changed behind the server's back is told, thing by thing.
async fn a_wrong_server_is_found_wrong(installed: &Installed) {
    let Installed { program, database } = installed;
    let serving = program.serve(&[]);
    let url = serving.client.url("");
    let fleet = [
        "--devices",
        "12",
        "--groups",
        "2",
        "--days",
        "1",
        "--patterns",
        "disk",
        "--clocks",
        "exact",
    ];
    let running = program.start(&words(&url, &[&fleet[..], &["--live", "4s", "--json"]].concat()));
    wait_until(database, EVENTS, 12 * 24).await;
    let (key, column) =
        if installed.is_postgres() { ("device_id", "device_id") } else { ("device", "id") };
    let place = |number: u32| {
        format!("(select {column} from devices where device_id = 'sim-1-00000{number}')")
    };
    database
        .execute(&format!(
            "update device_jobs set total_errors = total_errors + 5 where {key} = {};
             update device_jobs set consecutive_failures = 77 where {key} = {};
             update devices set \"group\" = 'Elsewhere' where device_id = 'sim-1-000002';
             update fleet_totals set total_files_synced = total_files_synced + 1000;
             delete from sync_events where id = (select max(id) from sync_events where {key} = {});",
            place(0),
            place(1),
            place(3)
        ))
        .await;
    let ended: Ended = running.wait();
    assert_eq!(ended.code(), 1, "{ended:?}");
    assert!(ended.stderr.contains("answers differ from what it acknowledged in "), "{ended:?}");
    let document = documented("simulate", &ended);
    let found: Vec<_> = document["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|found| {
            format!("{}: {}", found["place"].as_str().unwrap(), found["figure"].as_str().unwrap())
        })
        .collect();
    for expected in [
        "sim-1-000000: total_errors",
        "sim-1-000000, history: total_errors",
        "sim-1-000000, job without a name: total_errors",
        "sim-1-000001: consecutive_failures",
        "repeated failures (in a row): sim-1-000001",
        "sim-1-000002: group",
        "sim-1-000003, run-24: in the history",
        "statistics: total_files_synced",
    ] {
        assert!(found.iter().any(|one| one == expected), "{expected}: {found:#?}");
    }
    let group = document["differences"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["figure"] == "group")
        .unwrap();
    assert_eq!(group["told"], "Elsewhere");
    assert!(document["differing"].as_u64() >= Some(7), "{document}");
    serving.stop();
}

/// A killed server loses answers, and events that it never acknowledged. They are sent again, so the record stays exact. On
/// PostgreSQL two servers take turns.
async fn killed_servers_change_nothing(installed: &Installed) {
    const FLEET: &[&str] = &[
        "--devices",
        "60",
        "--groups",
        "6",
        "--jobs",
        "2",
        "--every",
        "20m",
        "--batch",
        "20",
        "--connections",
        "3",
    ];
    let runs = [
        (&["--days", "2"][..], &[1_000, 4_000, 7_000][..]),
        // Beside the devices of the first run, all of them live.
        (&["--days", "0", "--live", "8s", "--speed", "1800", "--seed", "2"], &[200, 500, 800]),
    ];
    survive_kills(installed, FLEET, &runs).await;
}

/// The same with a million events and every pattern.
async fn a_million_events(installed: &Installed) {
    let fleet = ["--devices", "1000", "--groups", "20", "--jobs", "2"];
    let runs = [(
        &["--days", "21", "--live", "60s", "--speed", "3600"][..],
        &[100_000, 300_000, 500_000, 700_000, 900_000][..],
    )];
    survive_kills(installed, &fleet, &runs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: cargo test --release --test it -- --ignored a_million_simulated_events"]
async fn a_million_simulated_events() {
    on_sqlite(a_million_events).await;
    on_postgres(a_million_events).await;
}

/// Runs a simulated fleet with each of `runs`: options, and after how many stored events the server is killed and started
/// again. In the end every answer is right, and so is every figure.
async fn survive_kills(installed: &Installed, fleet: &[&str], runs: &[(&[&str], &[i64])]) {
    let Installed { program, database } = installed;
    let port = unused_address().port().to_string();
    let serve = || program.serve(&["serve", "--port", &port]);
    let mut killed = serve();
    let url = killed.client.url("");
    let other = installed.is_postgres().then(|| program.serve(&[]));
    let other_url = other.as_ref().map(|other| other.client.url(""));
    let mut stored = 0;
    for (how, kills) in runs {
        let mut words = words(&url, &[fleet, how, &["--json"]].concat());
        words.extend(other_url.iter().flat_map(|url| ["--url", url.as_str()]));
        let running = program.start(&words);
        for least in *kills {
            // The tables of SQLite lag behind; the server does not.
            while events(&killed.client).await < stored + least {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            killed.signal("KILL");
            killed.wait();
            killed = serve();
        }
        let ended = running.wait();
        assert_eq!(ended.code(), 0, "{ended:?}");
        let document = ended.document();
        assert_eq!(document["differing"], 0);
        let phases = document["phases"].as_array().unwrap();
        let unanswered =
            phases.iter().filter_map(|phase| phase["unanswered"].as_i64()).sum::<i64>();
        assert!(unanswered > 0, "{document}");
        stored += document["events"].as_i64().unwrap();
        assert_eq!(database.number(EVENTS).await, stored);
    }
    killed.stop();
    if let Some(other) = other {
        other.stop();
    }
    program.run(&["verify"]).success();
}

/// Over HTTPS, with keys that open too little, and with a rate limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_certificates_and_rate_limits() {
    let certificate = certificate();
    let program = Program::new()
        .with("PORT", 0)
        .with("AUTH", "required")
        .with("RATE_LIMIT_KEY_PER_MINUTE", 1_200)
        .with("TLS_CERT", "cert.pem")
        .with("TLS_KEY", "key.pem")
        .with_file("cert.pem", certificate.certificate())
        .with_file("key.pem", certificate.key());
    program.run(&["db", "setup"]).success();
    let key = |scope: &str| program.run(&["key", "create", "--scope", scope]).made_key().to_owned();
    let (ingest, admin) = (key("ingest"), key("admin"));
    let serving = program.serve(&[]);
    let url = format!("https://localhost:{}", serving.address().port());
    let small = ["--devices", "3", "--groups", "1", "--days", "1", "--ca-cert", "cert.pem"];
    let run = |key: &str, others: &[&str]| {
        let keys = if key.is_empty() { vec![] } else { vec!["--key", key] };
        program.run(&words(&url, &[&small[..], &keys, others].concat()))
    };
    let failure = |ended: &Ended, parts: &[&str]| {
        assert_eq!(ended.code(), 1, "{ended:?}");
        for part in parts {
            assert!(ended.stderr.contains(part), "{part}: {ended:?}");
        }
    };
    failure(
        &run("", &[]),
        &["401 key_required", "set PISYNC_KEY", "pisync key create --scope admin"],
    );
    failure(&run(&ingest, &[]), &["403 scope_missing", "scope admin", "--send-only"]);
    let other = TestDatabase::sqlite();
    other.migrate().await;
    let (_, unknown) =
        other.make_key(crate::support::store::key_request(pisync::store::Scope::Admin)).await;
    failure(&run(&unknown, &[]), &["401 key_unknown", "no key of this server"]);
    let sent = run(&ingest, &["--send-only", "--seed", "2"]);
    assert!(sent.code() == 0 && !sent.stdout.contains("compared"), "{sent:?}");
    let untrusted = program.run(&["simulate", "--url", &url, "--patience", "100ms"]);
    assert_eq!(untrusted.code(), 4, "{untrusted:?}");
    assert!(untrusted.stderr.contains("--ca-cert"), "{untrusted:?}");
    let busy = ["--seed", "3", "--live", "1s", "--rate", "1500", "--connections", "12", "--json"];
    let ended = run(&admin, &busy);
    assert_eq!(ended.code(), 0, "{ended:?}");
    let document = ended.document();
    let live = phase(&document, "live");
    assert!(live["statuses"]["429"].as_i64() > Some(0), "{live}");
    assert_eq!((&document["differing"], &document["compared"]["devices"]), (&json!(0), &json!(3)));
    serving.stop();
    let away = run(&admin, &["--patience", "500ms"]);
    assert_eq!(away.code(), 4, "{away:?}");
    assert!(away.stderr.contains("look at the server, or wait longer with --patience"), "{away:?}");
}

/// All that makes no sense is named at once.
#[test]
fn options_that_make_no_sense_together() {
    let words = [
        "simulate",
        "--url",
        "http://localhost:1",
        "--devices",
        "5",
        "--groups",
        "9",
        "--rate",
        "3",
        "--until",
        "9999-01-01",
        "--patterns",
        "none,disk",
    ];
    let ended = Program::new().run(&words);
    let said = ended.wrong_usage();
    for option in ["--groups 9", "--rate needs --live", "--until must be", "--patterns none"] {
        assert!(said.contains(option), "{option}: {said}");
    }
    let neither = Program::new().run(&["simulate"]);
    assert!(neither.code() == 2 && neither.stderr.contains("--url"), "{neither:?}");
    let both = Program::new()
        .run(&["simulate", "--url", "http://x", "--live", "1s", "--rate", "1", "--speed", "2"]);
    assert!(both.code() == 2 && both.stderr.contains("--speed"), "{both:?}");
}
