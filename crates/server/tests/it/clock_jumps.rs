//! A server's clock that is set wrong while it serves, and what commands say of a clock that is wrong.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pisync::{
    maintenance::Maintenance,
    store::{self, Retention},
};
use pisync_core::Timestamp;
use serde_json::json;

use crate::support::locked_server::until;
use crate::{
    store_contract::streaks::figures_of,
    support::{
        events::{at, device_id, failure as failed, now, success as succeeded, write, write_at},
        http::{self, with},
        log,
        program::{Ended, Installed, Program},
        server::{TestClock, TestServer},
        store::TestStore,
    },
};

both_stores!(
    what_a_jump_has_spoiled_is_made_good_when_the_clock_is_back,
    a_clock_that_jumps_back_is_told,
    devices_correct_a_time_that_was_believed_wrongly,
    a_small_jump_that_was_believed_comes_back,
    a_clock_that_goes_on_is_believed_over_one_that_was_ahead,
    what_was_set_aside_counts_when_the_clock_comes_to_it,
    right_dates_replace_wrong_ones_at_once,
    commands_warn_of_a_clock_that_is_ahead,
    commands_warn_of_a_clock_that_is_behind,
    refusals_by_a_clock_that_is_behind_are_told,
    no_key_is_made_that_has_ended,
);

const DAY: i64 = 24 * 60 * 60;
const YEAR: i64 = 365 * DAY;

/// A time that no other test has a clock stand at, about so many seconds after [`now`].
fn unique(second: i64) -> Timestamp {
    static NUMBER: AtomicI64 = AtomicI64::new(1);
    at(second).saturating_add_milliseconds(NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Sets the clock of a server that runs, and waits until its log has it; gives all lines about a jump to that time. Another
/// test's clock may pass it.
async fn jump(server: &TestServer, time: Timestamp) -> Vec<String> {
    server.clock.set(time);
    let to = format!("to={time}");
    until(async || !log::lines_with(&to).is_empty()).await;
    log::lines_with(&to)
}

async fn streak(server: &TestServer, device: &str) -> serde_json::Value {
    let device = server.get(&format!("/api/device/{device}")).await.data(200);
    device["consecutive_failures"].clone()
}

async fn what_a_jump_has_spoiled_is_made_good_when_the_clock_is_back(server: &TestServer) {
    log::listen();
    for (device, by) in [("year", YEAR), ("days", 3 * DAY)] {
        let began = server.clock.now();
        server.store(&http::failure(device, began)).await;
        let said = jump(server, unique(by)).await;
        assert!(
            said.iter().any(|line| line.contains("jumped ahead while the server ran")),
            "{said:?}"
        );
        assert_eq!(said.len(), 1, "once: {said:?}");
        assert!(said[0].contains("from=2026-11-22T12:"), "{said:?}");
        // Its date is the server's.
        server.store(&with(http::success(device, began), &json!({"clock": "unsynced"}))).await;
        server.store(&http::failure(device, began)).await;
        assert_eq!(streak(server, device).await, 0, "nobody can know yet");

        let said = jump(server, unique(3)).await;
        assert!(said[0].contains("the clock is back where it was before"), "{said:?}");
        until(async || streak(server, device).await == 2).await;
        // It follows the clock for as often as that is set.
        jump(server, unique(by)).await;
        until(async || streak(server, device).await == 0).await;
        jump(server, unique(5)).await;
        until(async || streak(server, device).await == 2).await;
        // As `pisync verify` does it.
        let store = store::open(&server.database.target).await.unwrap();
        assert_eq!(store.verify(None, server.clock.now(), false).await.unwrap().differences, []);
    }
}

async fn a_clock_that_jumps_back_is_told(server: &TestServer) {
    log::listen();
    let began = server.clock.now();
    server.store(&http::failure("pi", began)).await;
    let said = jump(server, unique(-20 * DAY)).await;
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("jumped back while the server ran"), "{said:?}");
    assert!(said[0].contains("WARN") && said[0].contains("set it"), "{said:?}");
    // Right dates are not taken for wrong ones.
    assert_eq!(streak(server, "pi").await, 1);
    let said = jump(server, unique(1)).await;
    assert!(said[0].contains("the clock is back where it was before"), "{said:?}");
    assert_eq!(streak(server, "pi").await, 1);
}

async fn a_small_jump_that_was_believed_comes_back(server: &TestServer) {
    log::listen();
    let said = jump(server, unique(30 * 60)).await;
    assert!(said[0].contains("jumped ahead while the server ran; if it is wrong"), "{said:?}");
    let said = jump(server, unique(7)).await;
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("the clock is back where it was before"), "{said:?}");
}

/// A server starts with a clock that shows `time`, and does its work.
async fn maintain_at(fixture: &TestStore, time: Timestamp) {
    let clock = TestClock::at(time).clock();
    let store = Arc::clone(&fixture.store);
    Maintenance::new(store, clock, Retention::new(40, 300), 30).run().await.unwrap();
}

/// It has run for ten minutes since it was started at `time`.
async fn run_since(fixture: &TestStore, time: Timestamp) -> Timestamp {
    let ran = Duration::from_secs(10 * 60);
    let time = time.saturating_add_milliseconds(10 * 60 * 1000);
    fixture.store.trust_time(time, ran).await.unwrap();
    maintain_at(fixture, time).await;
    assert_eq!(fixture.store.trusted_time().await.unwrap().unwrap().until, time);
    assert_eq!(fixture.store.verify(None, time, false).await.unwrap().differences, []);
    time
}

async fn failures(fixture: &TestStore, device: &str) -> i64 {
    figures_of(&*fixture.store, &device_id(device)).await.1.consecutive_failures
}

/// There are no two devices that know the time, which would bear it out.
async fn a_clock_that_goes_on_is_believed_over_one_that_was_ahead(fixture: &TestStore) {
    let mut writer = fixture.writer();
    // The first start ever, and one after a pause that is not too long to be believed.
    for (device, began, by) in [("year", 0, YEAR), ("days", 2 * 60 * 60, 3 * DAY)] {
        let ahead = at(began + by);
        maintain_at(fixture, ahead).await;
        write_at(&mut *writer, ahead, vec![succeeded(device, ahead)]).await;
        maintain_at(fixture, at(began)).await;
        for second in began + 1..began + 4 {
            let event = failed(device, at(second));
            write_at(&mut *writer, at(second), vec![event]).await;
        }
        maintain_at(fixture, at(began + 4)).await;
        assert_eq!(failures(fixture, device).await, 0, "it may be about to be set");
        run_since(fixture, at(began + 4)).await;
        assert_eq!(failures(fixture, device).await, 3);
    }
}

async fn what_was_set_aside_counts_when_the_clock_comes_to_it(fixture: &TestStore) {
    let mut writer = fixture.writer();
    maintain_at(fixture, at(0)).await;
    for event in [failed("pi", at(-2)), succeeded("pi", at(-1)), failed("pi", at(0))] {
        write(&mut *writer, vec![event]).await;
    }
    // The machine starts without a network, and the server dates what is reported.
    let behind = at(-5 * DAY);
    maintain_at(fixture, behind).await;
    assert_eq!(failures(fixture, "pi").await, 1);
    for _ in 0..2 {
        write_at(&mut *writer, behind, vec![failed("pi", behind)]).await;
    }
    let believed = run_since(fixture, behind).await;
    assert_eq!(failures(fixture, "pi").await, 2);
    write_at(&mut *writer, believed, vec![failed("pi", believed)]).await;
    assert_eq!(failures(fixture, "pi").await, 3);

    // Then it is set. Whether to delete by it is still in doubt.
    maintain_at(fixture, at(60)).await;
    assert!(fixture.store.trusted_time().await.unwrap().unwrap().until < at(-4 * DAY));
    let (_, figures) = figures_of(&*fixture.store, &device_id("pi")).await;
    assert_eq!((figures.consecutive_failures, figures.total_syncs), (1, 6));
    assert_eq!((figures.last_success, figures.last_sync), (Some(at(-1)), Some(at(0))));
    assert_eq!(figures.last_seen, Some(now()));
    assert_eq!(fixture.store.verify(None, at(60), false).await.unwrap().differences, []);
}

async fn right_dates_replace_wrong_ones_at_once(server: &TestServer) {
    log::listen();
    let began = server.clock.now();
    server.store(&http::failure("other", began)).await;
    jump(server, unique(YEAR)).await;
    // The dates of one are all wrong, those of the other when it was received.
    let undated = |report| with(report, &json!({"clock": "unsynced"}));
    server.store(&undated(http::success("all-wrong", began))).await;
    server.store(&http::failure("dated", began)).await;
    let dates = async |device: &str| {
        let device = server.get(&format!("/api/device/{device}")).await.data(200);
        ["last_seen", "last_sync"].map(|date| device[date].as_str().unwrap()[..10].to_owned())
    };
    assert_eq!(dates("dated").await, ["2027-11-22", "2026-11-22"]);
    jump(server, unique(9)).await;
    // The last to be counted again.
    until(async || dates("dated").await == ["2026-11-22", "2026-11-22"]).await;
    assert_eq!(dates("all-wrong").await, ["2027-11-22", "2027-11-22"], "there is no other");
    let store = store::open(&server.database.target).await.unwrap();
    let assert_right = async || {
        assert_eq!(store.verify(None, server.clock.now(), false).await.unwrap().differences, []);
    };
    assert_right().await;
    for device in ["all-wrong", "dated"] {
        server.store(&http::failure(device, began)).await;
        assert_eq!(dates(device).await, ["2026-11-22", "2026-11-22"]);
    }
    assert_right().await;
    assert_eq!(streak(server, "all-wrong").await, 1);
    assert_eq!(streak(server, "dated").await, 2);
}

async fn devices_correct_a_time_that_was_believed_wrongly(fixture: &TestStore) {
    let maintain = async |clock: Timestamp| maintain_at(fixture, clock).await;
    let mut writer = fixture.writer();
    // The first start ever, by a clock that is ahead: nothing speaks against it.
    maintain(at(YEAR)).await;
    write_at(&mut *writer, at(YEAR), vec![succeeded("pi", at(YEAR))]).await;
    // Set right, it is behind what was believed, until devices are heard.
    write_at(&mut *writer, now(), vec![failed("pi", at(-2))]).await;
    maintain(now()).await;
    assert_eq!(figures_of(&*fixture.store, &device_id("pi")).await.1.consecutive_failures, 0);
    write_at(&mut *writer, now(), vec![failed("pi", at(-1)), failed("other", at(-1))]).await;
    maintain(now()).await;
    assert_eq!(figures_of(&*fixture.store, &device_id("pi")).await.1.consecutive_failures, 2);
    assert_eq!(fixture.store.verify(None, now(), false).await.unwrap().differences, []);
}

/// What the machine's clock shows, which the program goes by.
#[expect(clippy::disallowed_methods, reason = "to compare with the program's")]
fn real_time() -> Timestamp {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Timestamp::from_millisecond(i64::try_from(time.as_millis()).unwrap()).unwrap()
}

/// Has the database believe a time so many seconds after the machine's.
async fn believe(installed: &Installed, second: i64) -> Timestamp {
    let time = real_time().saturating_add_milliseconds(second * 1000);
    let value = if installed.is_postgres() {
        format!("'{time}'")
    } else {
        time.as_millisecond().to_string()
    };
    let sql = format!(
        "delete from trusted_time; insert into trusted_time (id, until, seen, doubted) values (1, {value}, {value}, 0)"
    );
    installed.database.execute(&sql).await;
    time
}

/// Every command that dates, or compares dates, by the clock.
fn run_all(installed: &Installed) -> Vec<Ended> {
    let program = &installed.program;
    let line = http::success("pi", real_time()).to_string() + "\n";
    std::fs::write(program.path("events.ndjson"), line).unwrap();
    let copy = format!("sqlite:{}", program.path("copy.db").display());
    let from = crate::support::program::url(&installed.database.target);
    let all = [
        &["import", "--again", "events.ndjson"][..],
        &["key", "create", "--scope", "read"],
        &["key", "list"],
        &["key", "revoke", "1"],
        &["verify"],
        &["migrate", "up"],
        &["copy", "--from", &from, "--to", &copy],
    ];
    let ended = all.map(|arguments| run(program, arguments));
    std::fs::remove_file(program.path("copy.db")).unwrap();
    ended.into_iter().collect()
}

/// Runs a command. What it says of a key that it has made is no warning.
fn run(program: &Program, arguments: &[&str]) -> Ended {
    let mut ended = program.run(arguments);
    let lines = ended.stderr.split_inclusive('\n');
    ended.stderr = lines.filter(|line| !line.starts_with("made key ")).collect();
    ended
}

#[track_caller]
fn assert_all_warn(ended: &[Ended], of: &str) {
    for ended in ended {
        assert_eq!((ended.code(), ended.stderr.lines().count()), (0, 1), "{ended:?}");
        assert!(ended.stderr.starts_with("pisync: this machine's clock says 20"), "{ended:?}");
        assert!(ended.stderr.contains(of), "{ended:?}");
    }
}

async fn commands_warn_of_a_clock_that_is_ahead(installed: &Installed) {
    installed.program.run(&["db", "setup"]).success();
    believe(installed, -DAY).await;
    for ended in run_all(installed) {
        ended.success();
    }
    let until = believe(installed, -YEAR).await;
    assert_all_warn(&run_all(installed), &format!("last used the database at {until}"));
}

async fn commands_warn_of_a_clock_that_is_behind(installed: &Installed) {
    installed.program.run(&["db", "setup"]).success();
    let until = believe(installed, 10 * DAY).await;
    // What was received then is no reason for verify to call right figures wrong.
    let received = until.saturating_add_milliseconds(-1000);
    let store = store::open(&installed.database.target).await.unwrap();
    let mut writer = store.event_writer();
    write_at(&mut *writer, received, vec![succeeded("pi", received), failed("pi", received)]).await;
    drop(writer);
    assert_all_warn(&run_all(installed), &format!("used the database at {until} already"));

    let create = |expires| {
        let words = ["key", "create", "--scope", "read", "--name", "late", "--expires", expires];
        run(&installed.program, &words)
    };
    let refused = create("9d");
    assert_eq!(refused.code(), 1, "{refused:?}");
    assert!(refused.stderr.contains("the key would end at "), "{refused:?}");
    assert!(
        refused.stderr.contains("set this machine's clock, or name a later time"),
        "{refused:?}"
    );
    assert!(!installed.program.run(&["key", "list"]).stdout.contains("late"));
    assert_all_warn(&[create("11d")], "already");
    assert!(installed.program.run(&["key", "list"]).stdout.contains("late"));
}

async fn refusals_by_a_clock_that_is_behind_are_told(installed: &Installed) {
    installed.program.run(&["db", "setup"]).success();
    let mut serving = installed.program.serve(&[]);
    let later = real_time().saturating_add_milliseconds(DAY * 1000);
    for device in ["a", "b", "c"] {
        let answer = serving.client.report(&http::success(device, later)).await;
        assert_eq!(answer.complaints(), ["Timestamp cannot be in the future"]);
    }
    let said = serving.wait_for("most reports are refused since they are dated in the future");
    assert!(said.contains("this server's clock is behind"), "{said}");
    // Once.
    for device in ["a", "b", "c"] {
        serving.client.report(&http::success(device, later)).await.complaints();
    }
    let metrics = serving.client.get("/metrics").await;
    let counted = "pisync_sync_events_rejected_total{reason=\"future\"} 6";
    assert!(metrics.text().contains(counted), "{}", metrics.text());
    let ended = serving.stop();
    assert_eq!(ended.stdout.matches("most reports are refused").count(), 1, "{ended:?}");
}

async fn no_key_is_made_that_has_ended(server: &TestServer) {
    let key_request = |expires_at: Timestamp| json!({"scope": "read", "expires_at": expires_at});
    for behind in [Timestamp::from_millisecond(0).unwrap(), at(-20 * DAY)] {
        server.clock.set(behind);
        let answer = server.post("/api/keys", &key_request(at(-1))).await;
        assert_eq!(answer.complaints(), ["\"expires_at\" must be in the future"]);
    }
    server.post("/api/keys", &key_request(at(60))).await.data(201);
}
