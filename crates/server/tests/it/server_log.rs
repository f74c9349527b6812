//! A server's log: what is told of a usual day, at which level, and where it goes.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{failure, send, success, with},
    program::{Installed, Program, url},
};

both_stores!(
    the_log_tells_what_matters,
    debug_tells_of_every_event,
    an_inner_error_is_in_the_log_alone,
);

/// The lines of a log with this message.
pub(crate) fn lines<'a>(log: &'a [Value], message: &str) -> Vec<&'a Value> {
    log.iter().filter(|line| line["message"] == message).collect()
}

/// Has a server see the usual things, and gives its combined log.
async fn usual_day(program: &Program) -> Vec<Value> {
    let serving = program.serve(&[]);
    let client = &serving.client;
    client.store(&success("pi-1", at(-10_000_000))).await;
    for second in [5, 4, 3, 2] {
        client.store(&failure("pi-2", at(-10_000_000 - second))).await;
    }
    let request = client.request(Method::POST, "/api/sync-event").json(&json!({}));
    send(request.header("x-request-id", "refused-1")).await.details();
    let request = client.request(Method::GET, "/api/device/nobody");
    send(request.header("x-request-id", "refused-2")).await.error(404);
    serving.stop();
    assert_eq!(program.names_in("logs"), ["combined.log", "error.log"]);
    let log = program.log("combined.log");
    for line in &log {
        let timestamp = line["timestamp"].as_str().unwrap();
        assert!(timestamp.starts_with("20") && timestamp.ends_with('Z'), "{line}");
        let level = line["level"].as_str().unwrap();
        assert!(["ERROR", "WARN", "INFO", "DEBUG"].contains(&level), "{line}");
        assert!(line["message"].is_string(), "{line}");
    }
    log
}

async fn the_log_tells_what_matters(installed: &Installed) {
    let log = usual_day(&installed.program).await;
    let devices: Vec<_> = lines(&log, "new device").iter().map(|line| &line["device_id"]).collect();
    assert_eq!(devices, ["pi-1", "pi-2"]);
    // Once, when the third failure comes; not again with the fourth, with which it may be learnt.
    let failing = lines(&log, "a device keeps failing");
    assert_eq!(failing.len(), 1, "{log:?}");
    let expected = json!({"level": "WARN", "device_id": "pi-2"});
    assert_eq!(&with(failing[0].clone(), &expected), failing[0]);
    assert!([3, 4].contains(&failing[0]["consecutive_failures"].as_i64().unwrap()), "{failing:?}");
    let refused = lines(&log, "request refused");
    for (line, expected) in refused.iter().zip([
        json!({
            "level": "INFO", "method": "POST", "path": "/api/sync-event", "status": 400,
            "request_id": "refused-1", "client": "127.0.0.1",
        }),
        json!({
            "level": "INFO", "method": "GET", "path": "/api/device/nobody", "status": 404,
            "request_id": "refused-2",
        }),
    ]) {
        assert_eq!(&with((*line).clone(), &expected), *line);
    }
    assert_eq!(refused.len(), 2, "{log:?}");
    // A line for each event would be most of the log.
    assert!(lines(&log, "sync event stored").is_empty());
    assert!(lines(&log, "request answered").is_empty());
    assert!(installed.program.log("error.log").is_empty());
}

async fn debug_tells_of_every_event(installed: &Installed) {
    let program = Program::new()
        .with("DATABASE_URL", url(&installed.database.target))
        .with("PORT", 0)
        .with("LOG_LEVEL", "debug");
    let log = usual_day(&program).await;
    let stored: Vec<_> =
        lines(&log, "sync event stored").iter().map(|line| &line["device_id"]).collect();
    assert_eq!(stored, ["pi-1", "pi-2", "pi-2", "pi-2", "pi-2"]);
    let answered = lines(&log, "request answered");
    assert_eq!(answered.iter().filter(|line| line["status"] == 201).count(), 5);
}

async fn an_inner_error_is_in_the_log_alone(installed: &Installed) {
    let serving = installed.program.serve(&[]);
    installed.database.execute("alter table device_jobs rename to elsewhere").await;
    let request = serving.client.request(Method::GET, "/api/stats");
    let answer = send(request.header("x-request-id", "unlucky")).await;
    assert_eq!(answer.error(500), "Internal server error");
    assert!(!format!("{answer:?}").contains("device_jobs"));
    serving.stop();
    for name in ["combined.log", "error.log"] {
        let log = installed.program.log(name);
        let failed = lines(&log, "request failed");
        assert_eq!(failed.len(), 1, "{log:?}");
        let expected = json!({"level": "ERROR", "status": 500, "request_id": "unlucky"});
        assert_eq!(&with(failed[0].clone(), &expected), failed[0]);
        assert!(failed[0]["error"].as_str().unwrap().contains("device_jobs"), "{log:?}");
    }
    assert_eq!(installed.program.log("error.log").len(), 1);
}

#[test]
fn without_a_folder_for_logs() {
    let program = Program::new().with("PORT", 0).with("LOG_DIR", "none");
    let ended = program.serve(&[]).stop();
    assert!(ended.stdout.contains("stopped; everything that was accepted is stored"));
    assert_eq!(program.names_in("."), ["data"]);
}

#[test]
fn production_logs_json_to_the_console() {
    for name in ["NODE_ENV", "APP_ENV"] {
        let program = Program::new().with("PORT", 0).with(name, "production");
        let ended = program.serve(&[]).stop();
        let console: Vec<Value> =
            ended.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        // Each takes the time for itself.
        let timeless = |line: &Value| with(line.clone(), &json!({"timestamp": null}));
        let file: Vec<_> = program.log("combined.log").iter().map(timeless).collect();
        assert_eq!(console.iter().map(timeless).collect::<Vec<_>>(), file);
        assert!(console.len() >= 3);
    }
}
