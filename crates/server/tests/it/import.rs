//! `pisync import`: whatever its form, each record is stored once or rejected with its reasons, also when the
//! import is interrupted again and again.

use std::{fmt::Write as _, io::Write as _};

use pisync::store::{self, Store, Target};
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::event,
    program::{Installed, Program, url},
    small_disk::SmallDisk,
    store::TestDatabase,
};

both_stores!(
    every_form_is_read,
    what_is_wrong_is_rejected_with_its_reasons,
    what_was_imported_is_known_again,
    a_file_that_has_grown_is_imported_from_there,
    inputs_that_begin_alike_are_told_apart,
    killed_again_and_again,
    beside_a_server_that_stores_events,
);

const DAY: i64 = 24 * 60 * 60;

/// So many events of some devices, two minutes apart, received a minute later; each tenth failed.
fn events(count: i64, with_ids: bool) -> Vec<Value> {
    let event = |number: i64| {
        let mut event = json!({
            "device_id": format!("pi-{}", number % 7),
            "timestamp": at(-100 * DAY + number * 120),
            "total_files_synced": number % 50,
            "total_errors": i64::from(number % 10 == 0),
            "created_at": at(-100 * DAY + number * 120 + 60),
        });
        if with_ids {
            event["event_id"] = json!(format!("run-{number}"));
        }
        event
    };
    (0..count).map(event).collect()
}

fn lines(events: &[Value]) -> String {
    events.iter().fold(String::new(), |mut text, event| {
        writeln!(text, "{event}").unwrap();
        text
    })
}

fn csv(events: &[Value]) -> String {
    let mut text = "created_at,total_errors,device_id,timestamp,total_files_synced\n".to_owned();
    for event in events {
        let cell = |name: &str| event[name].to_string().replace('"', "");
        let names = ["created_at", "total_errors", "device_id", "timestamp", "total_files_synced"];
        text += &names.map(cell).join(",");
        text.push('\n');
    }
    text
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A file in the working directory; its name.
fn file<'a>(program: &Program, name: &'a str, bytes: impl AsRef<[u8]>) -> &'a str {
    std::fs::write(program.path(name), bytes).unwrap();
    name
}

/// How many events the figures know of, which must be right.
async fn total(target: &Target) -> i64 {
    let store = store::open(target).await.unwrap();
    crate::support::store::assert_right(&crate::support::store::differences(&*store, false).await);
    store.fleet_stats(at(0)).await.unwrap().figures.total_syncs
}

/// What a database exports, without the ids, which are its own.
fn exported(program: &Program, target: &Target) -> String {
    let ended = program.run(&["export", "--format", "csv", "--database-url", &url(target)]);
    let without_id = |line: &str| line.split_once(',').unwrap().1.to_owned() + "\n";
    ended.success().lines().map(without_id).collect()
}

async fn every_form_is_read(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let events = events(2_500, false);
    let ndjson = lines(&events);
    let array = Value::from(events.clone()).to_string();
    let mut expected = 0;
    for (name, bytes) in [
        ("lines", ndjson.clone().into_bytes()),
        ("array", format!("\u{feff} \n{array}\n").into_bytes()),
        ("cells", csv(&events).into_bytes()),
        ("lines.zip", gzip(format!("\n{ndjson}").as_bytes())),
        ("packed", zstd::encode_all(ndjson.as_bytes(), 3).unwrap()),
    ] {
        // The records of some are the same, and would be known again.
        let ended = program.run(&["import", "--again", file(program, name, bytes)]);
        let imported = "imported 2500 events into ";
        assert!(ended.success().starts_with(imported), "{name}: {ended:?}");
        assert!(ended.stdout.ends_with("; 0 were there already, 0 were rejected\n"), "{ended:?}");
        expected += 2_500;
        assert_eq!(total(&database.target).await, expected, "{name}");
    }
    let ended = program.run_reading(&["import", "-", "--again", "--format", "csv"], "cells");
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(total(&database.target).await, expected + 2_500);
    // Six times the same events.
    let all = exported(program, &database.target);
    let mut rows: Vec<_> = all.lines().skip(1).collect();
    assert_eq!(rows.len(), 15_000);
    rows.dedup();
    assert_eq!(rows.len(), 2_500);
    assert!(program.names_in(".").iter().all(|name| !name.contains("rejected")));
}

async fn what_is_wrong_is_rejected_with_its_reasons(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let good = lines(&events(3, false));
    let long = "x".repeat(70_000);
    let wrong = [
        "{\"device_id\":\"\",\"timestamp\":7}",
        "nonsense",
        &format!("{{\"device_id\":\"{long}\"}}"),
        "{\"device_id\":\"pi\",\"timestamp\":\"2025-06-02\",\"total_files_synced\":1,\"total_errors\":0,\"created_at\":\"2025-06-01\"}",
        "{\"device_id\":\"pi\",\"timestamp\":\"2025-06-02\",\"total_files_synced\":1,\"total_errors\":0,\"created_at\":\"2999-01-01\"}",
    ];
    let text = format!("{good}{}\n{good}", wrong.join("\n"));
    let ended = program.run(&["import", file(program, "events", &text)]);
    assert_eq!(ended.code(), 3, "{ended:?}");
    assert_eq!(ended.stderr, "pisync: 5 records were rejected; events.rejected says why\n");
    assert!(ended.stdout.starts_with("imported 6 events"), "{ended:?}");
    assert_eq!(total(&database.target).await, 6);
    let rejected = std::fs::read_to_string(program.path("events.rejected")).unwrap();
    let rejected: Vec<Value> =
        rejected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<_> = rejected.iter().map(|line| line["record"].as_i64().unwrap()).collect();
    assert_eq!(numbers, [4, 5, 6, 7, 8]);
    let messages: Vec<_> =
        rejected.iter().map(|line| line["details"][0]["message"].as_str().unwrap()).collect();
    assert_eq!(
        messages,
        [
            "\"device_id\" is not allowed to be empty",
            "Malformed JSON: expected ident at line 1 column 2",
            "\"value\" must be at most 65536 bytes",
            "Timestamp cannot be in the future",
            "\"created_at\" cannot be in the future",
        ]
    );
    assert_eq!(rejected[0]["details"].as_array().unwrap().len(), 4);
    assert_eq!(rejected[0]["text"], wrong[0]);

    // A file of rejected records that somebody may need is not written over.
    let ended = program.run(&["import", "--again", "events"]);
    assert!(ended.failure().contains("events.rejected is there already"), "{ended:?}");
    let elsewhere = ["import", "--again", "events", "--rejected", "elsewhere"];
    assert_eq!(program.run(&elsewhere).code(), 3);
    // None of them is an event.
    let ended = program.run(&["import", file(program, "none", wrong.join("\n") + "\n")]);
    assert_eq!(ended.code(), 1, "{ended:?}");
    assert!(ended.stderr.ends_with("no record is an event; none.rejected says why\n"));
    // CSV is told in the same words.
    let cells = "device_id,timestamp,total_files_synced,total_errors,colour,id,metadata\n\
                 pi,2025-06-01,1.5,0,red,1,\npi,2025-06-01,1,0,red,2,[1]\npi,2025-06-01,1,0,red,3,\n";
    let ended = program.run(&["import", file(program, "cells", cells)]);
    assert_eq!(ended.code(), 3, "{ended:?}");
    assert!(ended.stderr.starts_with("columns that are passed over: colour\n"), "{ended:?}");
    let rejected = std::fs::read_to_string(program.path("cells.rejected")).unwrap();
    assert!(rejected.contains(r#"\"total_files_synced\" must be an integer"#), "{rejected}");
    assert!(rejected.contains(r#"\"metadata\" must be of type object"#), "{rejected}");
}

async fn what_was_imported_is_known_again(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let events = events(1_500, false);
    file(program, "events", lines(&events));
    program.run(&["import", "events"]).success();
    // Under another name, compressed, and from standard input.
    file(program, "copy.gz", gzip(lines(&events).as_bytes()));
    for arguments in [&["import", "events"][..], &["import", "copy.gz"], &["import", "-"]] {
        let ended = program.run_reading(arguments, "events");
        assert!(ended.success().contains(" was imported already, at "), "{ended:?}");
        assert!(ended.stdout.ends_with("once more with --again\n"), "{ended:?}");
        assert_eq!(total(&database.target).await, 1_500);
    }
    program.run(&["import", "events", "--again"]).success();
    assert_eq!(total(&database.target).await, 3_000);
    // Events with ids are stored once, however often they are imported.
    let with_ids = self::events(1_500, true);
    file(program, "with-ids", lines(&with_ids));
    program.run(&["import", "with-ids"]).success();
    let again = program.run(&["import", "with-ids", "--again"]);
    assert!(again.success().contains("; 1500 were there already, 0 were rejected"), "{again:?}");
    assert_eq!(total(&database.target).await, 4_500);
    // An id that comes with another event is not passed over in silence.
    let mut others = with_ids;
    for event in &mut others[1_000..1_003] {
        event["total_files_synced"] = json!(77);
    }
    file(program, "others", lines(&others));
    let others = program.run(&["import", "others"]);
    assert_eq!(others.code(), 0, "{others:?}");
    assert!(others.stdout.contains("; 1500 were there already, 0 were rejected"), "{others:?}");
    let warning = "pisync: 3 of those that were there already differ from what is stored under their event_id;";
    assert!(others.stderr.starts_with(warning), "{others:?}");
    assert_eq!(total(&database.target).await, 4_500);
}

async fn a_file_that_has_grown_is_imported_from_there(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let events = events(2_500, false);
    // Short and long, within a step and over several.
    for count in [1, 60, 1_000, 1_001, 2_500] {
        // The line's end may come later.
        file(program, "log", lines(&events[..count]).trim_end());
        program.run(&["import", "log"]).success();
        assert_eq!(total(&database.target).await, i64::try_from(count).unwrap());
    }
}

async fn inputs_that_begin_alike_are_told_apart(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let events = events(3_000, false);
    let other = json!({
        "device_id": "other", "timestamp": at(0), "total_files_synced": 1, "total_errors": 0,
        "created_at": at(1),
    });
    let mut parted = events.clone();
    parted[150] = other.clone();
    parted.push(other);
    file(program, "first", lines(&events));
    file(program, "second", lines(&parted));
    program.run(&["import", "first"]).success();
    // What is read but once cannot be taken back.
    let ended = program.run_reading(&["import", "-"], "second");
    if ended.code() == 1 {
        assert!(ended.failure().contains("save it to a file"), "{ended:?}");
    }
    program.run(&["import", "second"]).success();
    assert_eq!(total(&database.target).await, 6_001);
}

/// How far the only import has come.
async fn records(store: &dyn Store) -> u64 {
    store.imports().await.unwrap().first().map_or(0, |import| import.records)
}

async fn killed_again_and_again(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    for with_ids in [false, true] {
        let mut text = lines(&events(30_000, with_ids));
        for position in [29_000, 17_000, 1_500, 1_400, 0] {
            let (start, _) = text.match_indices('\n').nth(position).unwrap();
            text.insert_str(start, "\nwrong");
        }
        let name = if with_ids { "with-ids" } else { "without" };
        file(program, name, &text);
        let whole = if installed.is_postgres() {
            TestDatabase::postgres().await
        } else {
            TestDatabase::sqlite()
        };
        let killed = if installed.is_postgres() {
            TestDatabase::postgres().await
        } else {
            TestDatabase::sqlite()
        };
        for database in [&whole, &killed] {
            database.migrate().await;
        }
        let address = url(&whole.target);
        let plain = ["import", name, "--database-url", &address, "--rejected", "plain"];
        assert_eq!(program.run(&plain).code(), 3);

        let address = url(&killed.target);
        let again = ["import", name, "--database-url", &address, "--rejected", "killed"];
        let store = store::open(&killed.target).await.unwrap();
        let mut kills = 0;
        loop {
            let before = records(&*store).await;
            let ended = program.run_until(&again, async || records(&*store).await > before).await;
            if ended.status.code().is_some() {
                assert_eq!(ended.code(), if ended.stderr.contains("rejected") { 3 } else { 0 });
                break;
            }
            kills += 1;
        }
        assert!(kills >= 2, "killed {kills} times");
        assert_eq!(total(&killed.target).await, 30_000);
        assert_eq!(exported(program, &killed.target), exported(program, &whole.target));
        let rejected = |name| std::fs::read_to_string(program.path(name)).unwrap();
        assert_eq!(rejected("killed"), rejected("plain"));
        for name in ["killed", "plain"] {
            std::fs::remove_file(program.path(name)).unwrap();
        }
        whole.remove().await;
        killed.remove().await;
    }
}

async fn beside_a_server_that_stores_events(installed: &Installed) {
    let Installed { program, database } = installed;
    let serving = program.serve(&[]);
    file(program, "events", lines(&events(8_000, false)));
    let mut posted = 0;
    let ended = program
        .run_until(&["import", "events"], async || {
            serving.client.report(&event("pi-3")).await.data(201);
            posted += 1;
            false
        })
        .await;
    assert_eq!(ended.code(), 0, "{ended:?}");
    let stats = serving.client.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], 8_000 + posted);
    assert_eq!(stats["total_devices"], 7);
    assert!(posted > 3, "only {posted} events were stored beside the import");
    serving.stop();
    assert_eq!(total(&database.target).await, 8_000 + posted);
}

#[test]
fn bad_inputs() {
    let program = Program::new();
    let whole = lines(&events(3, false));
    let packed = gzip(lines(&events(3_000, false)).as_bytes());
    let array = Value::from(events(3, false)).to_string();
    std::fs::create_dir(program.path("folder")).unwrap();
    for (name, bytes, expected) in [
        (
            "cut.gz",
            &packed[..packed.len() / 2],
            "cut.gz is cut off: its compressed data ends early",
        ),
        ("bad.gz", &[&packed[..20], &packed[40..]].concat(), "cannot read bad.gz: "),
        ("cut.json", &array.as_bytes()[..array.len() - 5], "the JSON array is broken: "),
        (
            "cut.ndjson",
            &whole.as_bytes()[..whole.len() - 5],
            "cut.ndjson ends in the middle of a record",
        ),
        (
            "cut.csv",
            b"device_id,timestamp,total_files_synced,total_errors\npi,2025-0",
            "cut.csv ends in the middle",
        ),
        ("empty", b"", "empty is empty"),
        ("blank", b" \n\n", "blank is empty"),
        (
            "columns.csv",
            b"device_id,timestamp,files\n",
            "does not name the columns total_files_synced, total_errors",
        ),
        ("utf16.csv", b"\xff\xfed\0e\0v\0i\0c\0e\0", "it holds no sync events"),
        ("program", b"\x7fELF\x02\x01\x01\0\0\0", "it holds no sync events"),
    ] {
        file(&program, name, bytes);
        let ended = program.run(&["import", name]);
        assert!(ended.failure().contains(expected), "{name}: {ended:?}");
    }
    for (name, expected) in [
        ("folder", "folder is a directory"),
        ("nowhere", "nowhere does not exist"),
        ("empty/x", "cannot read empty/x: "),
    ] {
        let ended = program.run(&["import", name]);
        assert!(ended.failure().contains(expected), "{name}: {ended:?}");
    }
    // What is whole later is imported from where it broke off.
    file(&program, "cut.gz", &packed);
    let ended = program.run(&["import", "cut.gz"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.stderr.starts_with("going on after the 1000 records"), "{ended:?}");
    assert!(ended.stdout.starts_with("imported 2000 events"), "{ended:?}");
    let stats = program.run(&["verify"]);
    assert!(stats.success().contains("events: 3000;"), "{stats:?}");
}

#[test]
fn no_permission_to_read() {
    if crate::support::postgres::is_root() {
        // Nothing is kept from root; the kernel's own files are what it may not read as it likes.
        let program = Program::new();
        let ended = program.run(&["import", "/proc/self/mem"]);
        assert!(ended.failure().starts_with("cannot read /proc/self/mem: "), "{ended:?}");
        return;
    }
    let program = Program::new();
    file(&program, "secret", "{}");
    let status =
        std::process::Command::new("chmod").arg("000").arg(program.path("secret")).status();
    assert!(status.unwrap().success());
    let ended = program.run(&["import", "secret"]);
    assert_eq!(ended.failure(), "cannot read secret: permission denied");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk() {
    let disk = SmallDisk::new(48);
    let target = Target::Sqlite(disk.path().join("pisync.db"));
    let program = Program::new().with("DATABASE_URL", url(&target)).with_small_disk(&disk);
    file(&program, "events", lines(&events(20_000, false)));
    program.run(&["migrate", "up"]).success();
    // Room for some of the events.
    std::fs::write(disk.seen_from_here("ballast"), vec![0; 47 << 20]).unwrap();
    let ended = program.run(&["import", "events"]);
    assert!(ended.failure().contains("cannot store the records up to "), "{ended:?}");
    disk.make_room();
    let ended = program.run(&["import", "events"]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(program.run(&["verify"]).success().contains("events: 20000; differing jobs: 0"));
}

#[test]
fn a_full_disk_for_what_comes_out() {
    let disk = SmallDisk::new(4);
    let program = Program::new().with_small_disk(&disk);
    file(&program, "events", lines(&events(3_000, false)));
    program.run(&["import", "events"]).success();
    disk.fill();
    let full = disk.path().join("events.ndjson");
    let ended = program.run(&["export", "--output", full.to_str().unwrap()]);
    assert!(ended.failure().contains("No space left on device"), "{ended:?}");
    for name in ["events.ndjson", "events.ndjson.partial"] {
        assert!(!disk.seen_from_here(name).exists(), "{name}");
    }
    // What is no file is written to as it is.
    let ended = program.run(&["export", "--output", "/dev/full"]);
    assert!(ended.failure().contains("cannot write /dev/full: No space left"), "{ended:?}");
    assert!(!std::path::Path::new("/dev/full.partial").exists());
}
