//! The API held to its own document: schemathesis makes requests from it, right ones and wrong ones, and
//! checks that nothing is answered that the document does not say.

use std::{collections::BTreeSet, path::Path, process::Stdio};

use pisync::{config::http::AuthMode, store::Scope};
use pisync_core::event_fields::EVENT_FIELDS;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::{
    http::{event, keys, send},
    server::TestServer,
    store::{TestDatabase, key_request},
};

both_stores!(schemathesis_finds_nothing);

/// Where `scripts/test` installs it.
const SCHEMATHESIS: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/schemathesis/bin/schemathesis");

/// Requests of each kind per operation. More find little more, and take their time.
const EXAMPLES: &str = "15";

async fn schemathesis_finds_nothing(database: &TestDatabase) {
    database.migrate().await;
    let (_, key) = database.make_key(key_request(Scope::Admin)).await;
    // It also tries whether it gets in without the key.
    let server =
        TestServer::start_with(TestDatabase::elsewhere(database.target.clone()), |settings| {
            settings.http.auth = AuthMode::Required;
        })
        .await;
    assert!(Path::new(SCHEMATHESIS).exists(), "no schemathesis here: run ./scripts/test");
    // It leaves files where it runs.
    let folder = tempfile::tempdir().unwrap();
    let files = [
        ("hooks.py", include_str!("../schemathesis/hooks.py")),
        ("schemathesis.toml", include_str!("../schemathesis/schemathesis.toml")),
    ];
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let output = Command::new(SCHEMATHESIS)
        .args(["run", &server.url("/api-docs/openapi.json")])
        // The same requests in each run: what fails once fails again.
        .args(["--max-examples", EXAMPLES, "--generation-deterministic", "--no-color"])
        .args(["--header", &format!("Authorization: Bearer {key}")])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(report.contains(&format!("Tested: {}", operations())), "{report}");
    server.stop().await;
}

/// How many there are in the document.
fn operations() -> usize {
    let document = document();
    let paths = document["paths"].as_object().unwrap().values();
    paths.map(|path| path.as_object().unwrap().len()).sum()
}

fn document() -> Value {
    serde_json::from_str(&pisync::api::openapi_json().unwrap()).unwrap()
}

/// A misspelt parameter must not look obeyed, but for the Node service's endpoints, whose clients may send anything, and
/// health checks, to which load balancers add what they like.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_that_nobody_reads_are_refused() {
    const IGNORED: [&str; 9] = [
        "/",
        "/api",
        "/api/sync-event",
        "/api/device/{device_id}/sync-history",
        "/api/devices/repeated-failures",
        "/api/stats",
        "/health",
        "/health/live",
        "/health/ready",
    ];
    let server = TestServer::on_sqlite(|_| {}).await;
    server.store(&event("pi")).await;
    let mut refused = 0;
    for (path, item) in document()["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let target = path
                .replace("{device_id}", "pi")
                .replace("{key_id}", "1")
                .replace("{window_id}", "1")
                .replace("{channel_id}", "1")
                .replace("{incident_id}", "1")
                .replace("{name}", "school");
            let method: Method = method.to_uppercase().parse().unwrap();
            let body = if path == "/api/sync-event" { event("pi") } else { json!([]) };
            let request = server.request(method.clone(), &format!("{target}?limti=5&a=%00"));
            let request = if method == Method::GET { request } else { request.json(&body) };
            let answer = send(request).await;
            if IGNORED.contains(&path.as_str()) {
                assert!(answer.status < 300, "{method} {path}: {}", answer.text());
            } else {
                let expected = [("limti", "unknown_field"), ("a", "unknown_field")];
                let expected = expected.map(|(field, code)| (field.to_owned(), code.to_owned()));
                assert_eq!(answer.wrong_fields(), expected, "{method} {path}");
                refused += 1;
            }
        }
    }
    assert!(refused >= 9, "{refused}");
    // Nothing came of the changes among them.
    assert_eq!(server.get("/api/devices").await.data(200)["pagination"]["total"], 1);
    server.stop().await;
}

/// Answers have the headers that the document says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_are_declared() {
    let document = document();
    let declared = |path: &str, status: &str| -> BTreeSet<String> {
        let headers = &document["paths"][path]["get"]["responses"][status]["headers"];
        let headers = headers.as_object().unwrap_or_else(|| panic!("{path} {status}"));
        for reference in headers.values() {
            let name = reference["$ref"].as_str().unwrap().rsplit_once('/').unwrap().1;
            assert!(
                document["components"]["headers"][name]["schema"]["type"].is_string(),
                "{name}"
            );
        }
        headers.keys().map(|name| name.to_ascii_lowercase()).collect()
    };
    let server = TestServer::on_sqlite(|settings| {
        settings.api_per_minute = 3;
    })
    .await;
    let mut seen = BTreeSet::new();
    let told = [
        "x-request-id",
        "ratelimit-limit",
        "ratelimit-remaining",
        "ratelimit-reset",
        "ratelimit-policy",
        "retry-after",
        "www-authenticate",
    ];
    let foreign = |path| server.request(Method::GET, path).header("forwarded", "for=192.0.2.1");
    for (path, request) in [
        ("/health", server.request(Method::GET, "/health")),
        ("/api/stats", server.request(Method::GET, "/api/stats")),
        ("/api/stats", server.request(Method::GET, "/api/stats?window=x")),
        ("/api/stats", foreign("/api/stats")),
        ("/api/devices", server.request(Method::GET, "/api/devices")),
        ("/api/devices", server.request(Method::GET, "/api/devices")),
    ] {
        let answer = send(request).await;
        let sent: BTreeSet<_> = told
            .iter()
            .filter(|name| answer.headers.contains_key(**name))
            .map(|name| (*name).to_owned())
            .collect();
        let declared = declared(path, &answer.status.to_string());
        assert!(sent.is_subset(&declared), "{path} {}: {sent:?}, {declared:?}", answer.status);
        assert!(sent.contains("x-request-id"));
        seen.insert(answer.status);
    }
    assert_eq!(seen, BTreeSet::from([200, 400, 401, 429]));
    for status in ["429", "503"] {
        assert!(declared("/api/devices", status).contains("retry-after"), "{status}");
    }
    assert!(!declared("/health", "200").contains("ratelimit-limit"));
    server.stop().await;
}

/// The event's fields in the document are those that are read.
#[test]
fn the_fields_of_an_event_are_documented() {
    let document = document();
    let schema = &document["components"]["schemas"]["SyncEvent"];
    let documented: BTreeSet<_> = keys(&schema["properties"]).into_iter().collect();
    assert_eq!(documented, EVENT_FIELDS.map(|field| field.name).into());
    let required: BTreeSet<_> =
        schema["required"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let is_required = EVENT_FIELDS.iter().filter(|field| field.is_required);
    assert_eq!(required, is_required.map(|field| field.name).collect());
    // What is stored is given back: all of it but the clock, of which the dates tell.
    let kept = EVENT_FIELDS.map(|field| field.name).into_iter().filter(|name| *name != "clock");
    let kept: BTreeSet<_> = kept.chain(["id", "created_at"]).collect();
    let created = &document["components"]["schemas"]["CreatedSyncEvent"]["properties"];
    assert_eq!(keys(created).into_iter().collect::<BTreeSet<_>>(), kept);
    let history = &document["components"]["schemas"]["HistoryEvent"]["properties"];
    let kept: BTreeSet<_> = kept.into_iter().chain(["updated_at"]).collect();
    assert_eq!(keys(history).into_iter().collect::<BTreeSet<_>>(), kept);
    let heading = pisync::event_format::Format::Csv.heading();
    let answer = &document["paths"]["/api/device/{device_id}/sync-history"]["get"]["responses"];
    let example = &answer["200"]["content"]["text/csv"]["example"];
    assert!(example.as_str().unwrap().starts_with(heading), "{example}");
    let columns = heading.trim().split(',');
    assert_eq!(columns.collect::<BTreeSet<_>>(), kept);
    let page = include_str!("../../../../docs/reporting.md");
    let rows = page.lines().skip_while(|line| !line.starts_with("| field |")).skip(2);
    let rows = rows.take_while(|line| line.starts_with("| `"));
    let rows: Vec<_> = rows.map(|row| row.split('`').nth(1).unwrap()).collect();
    assert_eq!(rows.len(), EVENT_FIELDS.len(), "{rows:?}");
    assert_eq!(rows.into_iter().collect::<BTreeSet<_>>(), documented);
}
