//! Signals, and files that others have put in the way: a command that is ended leaves nothing half made, and no file
//! is written that was not meant.

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    process::{Command, Stdio},
};

use pisync::store::{self, Target};
use serde_json::Value;

use crate::{
    import::{events, lines},
    support::{
        http::event,
        program::{Program, Waiting},
    },
};

/// Whoever runs the tests may ignore signals, as `nohup` does, and processes would go on ignoring them.
const ALL_SIGNALS: [&str; 2] = ["env", "--default-signal"];

/// A program whose database holds events enough for a command to take a while.
fn with_events(count: i64) -> Program {
    let program = Program::new().run_by(&ALL_SIGNALS);
    fs::write(program.path("input"), lines(&events(count, false))).unwrap();
    program.run(&["db", "setup"]).success();
    program.run(&["import", "input"]).success();
    fs::create_dir(program.path("out")).unwrap();
    program
}

/// The names of files that are being made.
fn unfinished(program: &Program) -> Vec<String> {
    let is_unfinished = |name: &String| name.starts_with(".pisync-");
    program.names_in("out").into_iter().filter(is_unfinished).collect()
}

fn empty_out(program: &Program) {
    fs::remove_dir_all(program.path("out")).unwrap();
    fs::create_dir(program.path("out")).unwrap();
}

/// Starts a command and sends it a signal while it makes a file, and tells how it ended.
async fn ended_while_it_writes(program: &Program, arguments: &[&str], signal: &str) -> Waiting {
    // It may be faster than this.
    for _ in 0..50 {
        let writes = async || !unfinished(program).is_empty();
        let mut waiting = program.signal_at(arguments, Stdio::null(), signal, writes).await;
        // What it was for is there once it is done.
        let is_done = |name: &String| !name.starts_with('.') && !name.ends_with(".lock");
        if waiting.is_running() || !program.names_in("out").iter().any(is_done) {
            return waiting;
        }
        waiting.wait();
        empty_out(program);
    }
    panic!("{arguments:?} always ends too soon");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_is_ended_leaves_nothing_half_made() {
    let program = with_events(20_000);
    let export = ["export", "--output", "out/events.ndjson.gz"];
    let backup = ["backup", "out/pisync.db"];
    let copy = ["copy", "--from", "sqlite:data/pisync.db", "--to", "sqlite:out/pisync.db"];
    let all = [("HUP", 129), ("INT", 130), ("TERM", 143)];
    // Each is caught while it writes, which takes several runs: one signal is enough for those that are faster.
    for (arguments, says, signals) in [
        (&export[..], "nothing was kept of the file", &all[..]),
        (&backup, "nothing was kept of the file", &all[2..]),
        (&copy, "nothing was kept of the copy", &all[2..]),
    ] {
        for (signal, code) in signals.iter().copied() {
            let mut ended = ended_while_it_writes(&program, arguments, signal).await.wait();
            for _ in 0..10 {
                if ended.status.code() != Some(0) {
                    break;
                }
                // It was done at that very moment.
                empty_out(&program);
                ended = ended_while_it_writes(&program, arguments, signal).await.wait();
            }
            assert_eq!(ended.code(), code, "{arguments:?}: {ended:?}");
            let expected = format!("pisync: ended by SIG{signal}; {says}\n");
            assert!(ended.stderr.ends_with(&expected), "{arguments:?}: {ended:?}");
            // A lock stays what it is for whoever has it.
            let names = program.names_in("out");
            assert!(names.iter().all(|name| name.ends_with(".lock")), "{names:?}");
        }
    }
    assert!(program.run(&["verify"]).success().contains("events: 20000; differing jobs: 0"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_command_has_left_is_removed_by_the_next() {
    let program = with_events(20_000);
    let export = ["export", "--output", "out/events.ndjson"];
    ended_while_it_writes(&program, &export, "KILL").await.wait();
    let left = unfinished(&program);
    assert!(left.len() == 1 && left[0].starts_with(".pisync-partial-"), "{left:?}");
    // Of an earlier version.
    fs::write(program.path("out/.pisync-copy-abcdef"), "").unwrap();
    let ended = program.run(&["backup", "out/pisync.db"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(program.names_in("out"), ["pisync.db"]);
}

/// How many records the only import has taken.
async fn taken(target: &Target) -> u64 {
    let store = store::open(target).await.unwrap();
    store.imports().await.unwrap().first().map_or(0, |import| import.records)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_is_ended_goes_on_and_nohup_keeps_it_going() {
    let whole = lines(&events(2_500, false));
    for (entrance, signal, code) in [
        (&ALL_SIGNALS[..], "HUP", 129),
        (&ALL_SIGNALS, "TERM", 143),
        (&["nohup"], "TERM", 143),
        (&["nohup"], "HUP", 0),
    ] {
        let program = Program::new().run_by(entrance);
        program.run(&["migrate", "up"]);
        let target = Target::Sqlite(program.path("data").join("pisync.db"));
        let (reader, mut writer) = std::io::pipe().unwrap();
        let text = whole.clone();
        // More is to come, for all that the import knows.
        let (end, ended) = std::sync::mpsc::channel::<()>();
        #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
        let writing = std::thread::spawn(move || {
            // Nobody reads on when the import has ended.
            let _ = writer.write_all(text.as_bytes());
            let _ = ended.recv();
        });
        let store = store::open(&target).await.unwrap();
        let stored = async || {
            let imports = store.imports().await.unwrap();
            imports.first().is_some_and(|import| import.records >= 1_000)
        };
        let mut waiting = program.signal_at(&["import", "-"], reader, signal, stored).await;
        if code == 0 {
            assert!(waiting.is_running());
            drop(end);
            let ended = waiting.wait();
            assert_eq!(ended.code(), 0, "{ended:?}");
            assert_eq!(taken(&target).await, 2_500);
        } else {
            let ended = waiting.wait();
            assert_eq!(ended.code(), code, "{ended:?}");
            let expected = format!(
                "ended by SIG{signal}; what was stored stays, and the same command goes on"
            );
            assert!(ended.stderr.contains(&expected), "{ended:?}");
            drop(end);
            fs::write(program.path("whole"), &whole).unwrap();
            let ended = program.run(&["import", "whole"]);
            assert!(ended.stderr.contains("going on after the "), "{ended:?}");
            assert!(program.run(&["verify"]).stdout.contains("events: 2500; differing jobs: 0"));
        }
        writing.join().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_hung_up_on_opens_its_logs_anew() {
    let program = Program::new().with("PORT", 0);
    let mut serving = program.serve(&[]);
    // Lines are written by threads of their own.
    while !fs::read_to_string(program.path("logs/combined.log")).unwrap().contains("is ready") {
        std::thread::yield_now();
    }
    // As logrotate does it.
    for name in ["combined.log", "error.log"] {
        fs::rename(program.path("logs").join(name), program.path(name)).unwrap();
    }
    serving.signal("HUP");
    serving.wait_for("SIGHUP: the log files are opened anew");
    serving.client.store(&event("pi")).await;
    serving.stop();
    let messages: Vec<_> =
        program.log("combined.log").iter().map(|line| line["message"].clone()).collect();
    for message in [
        "SIGHUP: the log files are opened anew",
        "new device",
        "stopped; everything that was accepted is stored",
    ] {
        assert!(messages.iter().any(|found| found == message), "{message}: {messages:?}");
    }
    let before = fs::read_to_string(program.path("combined.log")).unwrap();
    assert!(before.contains("PiSync is ready") && !before.contains("SIGHUP"), "{before}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn localhost_is_every_address_of_it() {
    let program = Program::new().with("PORT", 0).with("HOST", "localhost");
    let serving = program.serve(&[]);
    let port = serving.address().port();
    let addresses = tokio::net::lookup_host(("localhost", port)).await.unwrap();
    let mut served = 0;
    for address in addresses {
        // This machine may have no IPv6, although the name stands for an address of it.
        if std::net::TcpListener::bind((address.ip(), 0)).is_ok() {
            crate::support::http::Client::new(address).get("/health/ready").await.json(200);
            served += 1;
        }
    }
    assert!(served > 0);
    serving.stop();
}

/// A file that somebody owns, and a link to it that somebody else has put where a command writes.
fn planted(program: &Program, link: &str) {
    fs::write(program.path("victim"), "precious\n").unwrap();
    symlink(program.path("victim"), program.path(link)).unwrap();
}

#[track_caller]
fn assert_untouched(program: &Program) {
    assert_eq!(fs::read_to_string(program.path("victim")).unwrap(), "precious\n");
}

#[test]
fn links_that_were_planted_are_not_followed() {
    let program = with_events(10);
    planted(&program, "out/events.ndjson.partial");
    program.run(&["export", "--output", "out/events.ndjson"]).success();
    assert_untouched(&program);
    // The link in the file's own place is replaced, and what it leads to is not.
    for (arguments, place) in [
        (&["export", "--output", "out/events.csv"][..], "out/events.csv"),
        (&["backup", "--force", "out/pisync.db"], "out/pisync.db"),
    ] {
        planted(&program, place);
        program.run(arguments).success();
        assert_untouched(&program);
        let metadata = fs::symlink_metadata(program.path(place)).unwrap();
        assert!(metadata.is_file());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{place}");
    }
    fs::write(program.path("wrong"), "{}\n").unwrap();
    planted(&program, "wrong.rejected");
    let ended = program.run(&["import", "wrong"]);
    assert!(
        ended.failure().starts_with("wrong.rejected is a symbolic link: remove it"),
        "{ended:?}"
    );
    assert_untouched(&program);
    fs::write(program.path("victim"), "").unwrap();
    assert!(program.run(&["import", "wrong"]).failure().contains("is a symbolic link"));
    assert_eq!(fs::read_to_string(program.path("victim")).unwrap(), "");
}

/// The terminal is gone, or the disk that output goes to is full: no panic, and nothing is left undone.
#[test]
fn output_that_cannot_be_written() {
    let program = with_events(10);
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let run = |arguments: &[&str], stdout: Stdio, stderr: Stdio| {
        Command::new(env!("CARGO_BIN_EXE_pisync"))
            .args(arguments)
            .current_dir(program.path(""))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .output()
            .unwrap()
    };
    for arguments in [&["migrate", "status"][..], &["openapi"], &["verify"]] {
        let ended = run(arguments, full().into(), Stdio::piped());
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(
            (ended.status.code(), said.as_str()),
            (Some(1), "pisync: cannot write to standard output\n")
        );
        // Whoever reads has seen enough.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = run(arguments, writer.into(), Stdio::piped());
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    }
    // A key that nobody has seen opens nothing.
    for arguments in
        [&["key", "create", "--scope", "read"][..], &["key", "create", "--scope", "read", "--json"]]
    {
        let ended = run(arguments, full().into(), Stdio::piped());
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(said.contains("was revoked, make another one"), "{said}");
    }
    let keys: Value =
        serde_json::from_str(program.run(&["key", "list", "--json"]).success()).unwrap();
    let keys = keys["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 2, "{keys:?}");
    assert!(keys.iter().all(|key| key["revoked_at"].is_string()), "{keys:?}");
    fs::write(program.path("half"), format!("{}nonsense\n", lines(&events(11, false)))).unwrap();
    let ended = run(&["import", "half", "--again"], full().into(), full().into());
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(program.run(&["verify"]).success().contains("events: 21;"));
}
