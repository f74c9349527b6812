//! The API held to its own document: schemathesis makes requests from it, right ones and wrong ones, and
//! checks that nothing is answered that the document does not say.

use std::{path::Path, process::Stdio};

use pisync::{config::http::AuthMode, store::Scope};
use serde_json::Value;
use tokio::process::Command;

use crate::support::{
    server::TestServer,
    store::{TestDatabase, wish},
};

both_stores!(schemathesis_finds_nothing);

/// Where `scripts/test` installs it.
const SCHEMATHESIS: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/schemathesis/bin/schemathesis");

/// Requests of each kind per operation. More find little more, and take their time.
const EXAMPLES: &str = "25";

async fn schemathesis_finds_nothing(database: &TestDatabase) {
    database.migrate().await;
    let (_, key) = database.make_key(wish(Scope::Admin)).await;
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
    let document: Value = serde_json::from_str(&pisync::api::openapi_json().unwrap()).unwrap();
    let paths = document["paths"].as_object().unwrap().values();
    paths.map(|path| path.as_object().unwrap().len()).sum()
}
