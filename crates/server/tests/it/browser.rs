//! What a person sees: pages in a real browser, under the policies that the server sends with them.

use std::process::Stdio;

use tokio::process::Command;

use crate::support::server::TestServer;

/// The page after its scripts have run, and what they complained of.
pub(crate) async fn visit(url: &str) -> (String, String) {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("/usr/bin/chromium")
        // Root, which CI is, cannot have the sandbox; the rest keeps it from calling home.
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-quic"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", url])
        .stdin(Stdio::null())
        .output()
        .await
        .expect("no Chromium here: run ./scripts/test");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swagger_ui_works_under_its_policy() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let (page, console) = visit(&server.url("/api-docs/")).await;
    for path in ["/api/sync-event", "/api/device/{device_id}", "/metrics"] {
        assert!(page.contains(&format!("data-path=\"{path}\"")), "{path} is missing:\n{console}");
    }
    let refused = console.lines().find(|line| line.contains("Content Security Policy"));
    assert_eq!(refused, None);
    server.stop().await;
}
