//! `pisync import`: whatever its form, each record is stored or rejected with its reasons. What happens when an input comes
//! again is in `import_again`.

use std::{fmt::Write as _, io::Write as _};

use pisync::store::{self, Freshness, Target};
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::event,
    program::{Ended, Installed, Program, url},
    small_disk::SmallDisk,
};

both_stores!(
    every_form_is_read,
    what_is_wrong_is_rejected_with_its_reasons,
    an_unclosed_quotation_mark_costs_one_line,
    blanks_around_cells_and_capital_letters,
    beside_a_server_that_stores_events,
);

const DAY: i64 = 24 * 60 * 60;

/// So many events of some devices, two minutes apart, received a minute later; each tenth failed.
pub(crate) fn events(count: i64, with_ids: bool) -> Vec<Value> {
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

pub(crate) fn lines(events: &[Value]) -> String {
    events.iter().fold(String::new(), |mut text, event| {
        writeln!(text, "{event}").unwrap();
        text
    })
}

pub(crate) fn csv(events: &[Value]) -> String {
    let mut text = "created_at,total_errors,device_id,timestamp,total_files_synced\n".to_owned();
    for event in events {
        let cell = |name: &str| event[name].to_string().replace('"', "");
        let names = ["created_at", "total_errors", "device_id", "timestamp", "total_files_synced"];
        text += &names.map(cell).join(",");
        text.push('\n');
    }
    text
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A file in the working directory; its name.
pub(crate) fn file<'a>(program: &Program, name: &'a str, bytes: impl AsRef<[u8]>) -> &'a str {
    std::fs::write(program.path(name), bytes).unwrap();
    name
}

/// What an import says of its records, of which none may be missing: how many were imported, and rejected.
pub(crate) fn counted(ended: &Ended) -> (u64, u64) {
    let numbers: Vec<u64> = ended
        .stdout
        .split(|character: char| !character.is_ascii_alphanumeric())
        .filter_map(|word| word.parse().ok())
        .collect();
    let said = ended.stdout.rsplit_once(", of ").unwrap().1;
    let [records, duplicates, rejected] =
        ["", " records; ", " were there already, "].map(|before| {
            let start = said.find(before).unwrap() + before.len();
            let mut digits = said[start..].split(|character: char| !character.is_ascii_digit());
            digits.next().unwrap().parse::<u64>().expect(said)
        });
    let imported = numbers[0];
    assert_eq!(records, imported + duplicates + rejected, "{ended:?}");
    (imported, rejected)
}

/// How many events the figures know of, which must be right.
pub(crate) async fn total(target: &Target) -> i64 {
    let store = store::open(target).await.unwrap();
    crate::support::store::assert_right(&crate::support::store::differences(&*store, false).await);
    store.fleet_stats(at(0), 10, Freshness::Everything).await.unwrap().figures.total_syncs
}

/// What a database exports, without the ids, which are its own.
pub(crate) fn exported(program: &Program, target: &Target) -> String {
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
        assert_eq!(counted(&ended), (2_500, 0));
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
    assert_eq!(counted(&ended), (6, 5));
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
            "the record is longer than 65536 bytes, the most that a record may have",
            "Timestamp cannot be in the future",
            "\"created_at\" cannot be in the future",
        ]
    );
    assert_eq!(rejected[0]["details"].as_array().unwrap().len(), 4);
    assert_eq!(rejected[0]["text"], wrong[0]);
    assert!(rejected[0].get("text_is_truncated").is_none(), "{}", rejected[0]);
    // Of what is too long the beginning is enough to find it.
    assert_eq!(
        (&rejected[2]["text_is_truncated"], &rejected[2]["details"][0]["field"]),
        (&json!(true), &json!(""))
    );
    assert_eq!(rejected[2]["text"], wrong[2][..1024]);

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
    assert!(ended.stderr.starts_with("columns that are ignored: colour\n"), "{ended:?}");
    let rejected = std::fs::read_to_string(program.path("cells.rejected")).unwrap();
    assert!(rejected.contains(r#"\"total_files_synced\" must be an integer"#), "{rejected}");
    assert!(rejected.contains(r#"\"metadata\" must be of type object"#), "{rejected}");
}

async fn an_unclosed_quotation_mark_costs_one_line(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let mut text = "device_id,timestamp,total_files_synced,total_errors,note,metadata\n".to_owned();
    for number in 0..3_000 {
        let rest = match number {
            1 => "\"disk 3.5,",
            1_500 => "fine,\"{\"\"a\"\":1}",
            2_000 => "\"two\nlines\",\"{\n\"\"a\"\":1}\"",
            2_999 => "\"fine",
            _ => "fine,",
        };
        writeln!(text, "pi-{},2025-06-17T10:30:00Z,{number},0,{rest}", number % 5).unwrap();
    }
    let ended = program.run(&["import", file(program, "events.csv", &text)]);
    assert_eq!(ended.code(), 3, "{ended:?}");
    assert_eq!(counted(&ended), (2_997, 3), "{ended:?}");
    assert!(
        ended.stderr.contains("pisync: 3 records were rejected; events.csv.rejected says why\n")
    );
    assert_eq!(total(&database.target).await, 2_997);
    let rejected = std::fs::read_to_string(program.path("events.csv.rejected")).unwrap();
    let rejected: Vec<Value> =
        rejected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<_> = rejected.iter().map(|line| line["record"].as_i64().unwrap()).collect();
    assert_eq!(numbers, [2, 1_501, 3_000]);
    assert_eq!(rejected[0]["text"], "pi-1,2025-06-17T10:30:00Z,1,0,\"disk 3.5,");
    for line in &rejected {
        let message = "the record has a quotation mark that is not closed";
        assert_eq!(line["details"][0]["message"], message);
    }
    // It is known again.
    let again = program.run(&["import", "events.csv"]);
    assert!(again.stdout.contains(" was imported already, at "), "{again:?}");
}

async fn blanks_around_cells_and_capital_letters(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let cells = "Timestamp, DEVICE_ID , total_files_synced, total_errors,  job\n\
                 2025-06-17T10:30:00Z, pi-0 , 1, 0,\t\"nightly, all\" \n";
    let ended = program.run(&["import", file(program, "cells", cells)]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(counted(&ended), (1, 0));
    let said =
        "columns whose names are taken as if they had no capital letters: Timestamp, DEVICE_ID\n";
    assert!(ended.stderr.contains(said), "{ended:?}");
    let csv = exported(program, &database.target);
    assert!(csv.contains("pi-0,,2025-06-17T10:30:00.000Z,1,0,,\"nightly, all\","), "{csv}");
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
    program.run(&["db", "setup"]).success();
    let packed = gzip(lines(&events(3_000, false)).as_bytes());
    std::fs::create_dir(program.path("folder")).unwrap();
    let header = "device_id,timestamp,total_files_synced,total_errors\n";
    let utf16 =
        |bytes: fn(u16) -> [u8; 2]| header.encode_utf16().flat_map(bytes).collect::<Vec<u8>>();
    let (little, big) = (utf16(u16::to_le_bytes), utf16(u16::to_be_bytes));
    for (name, bytes, expected) in [
        ("bad.gz", &[&packed[..20], &packed[40..]].concat()[..], "cannot read bad.gz: "),
        ("empty", b"", "empty is empty"),
        ("blank", b" \n\n", "blank is empty"),
        (
            "columns.csv",
            b"device_id,timestamp,files\n",
            "does not name the columns total_files_synced, total_errors",
        ),
        (
            "semicolons.csv",
            header.replace(',', ";").as_bytes(),
            "its cells are separated by semicolons",
        ),
        ("tabs.csv", header.replace(',', "\t").as_bytes(), "its cells are separated by tabs"),
        ("marked-le.csv", &[b"\xff\xfe", &little[..]].concat(), "marked-le.csv: it is UTF-16 text"),
        (
            "marked-be.csv",
            &[b"\xfe\xff", &big[..]].concat(),
            "it is UTF-16 text; convert it first: iconv",
        ),
        ("le.csv", &little, "it is UTF-16 text"),
        ("be.csv", &big, "it is UTF-16 text"),
        ("le.ndjson", b"{\0\"\0d\0", "it is UTF-16 text"),
        ("be.json", b"\0[\0{\0\"", "it is UTF-16 text"),
        ("events.zip", b"PK\x03\x04\x14\0", "it is packed with zip; unpack it first"),
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
    assert!(program.run(&["verify"]).success().contains("events: 0;"));
    // What says what it would hold, and holds nothing, is imported.
    for (name, text) in [("header.csv", header), ("array.json", "[]")] {
        let ended = program.run(&["import", file(&program, name, text)]);
        assert_eq!((ended.code(), counted(&ended)), (0, (0, 0)), "{ended:?}");
    }
}

#[test]
fn no_permission_to_read() {
    if crate::support::postgres::is_root() {
        // Nothing is kept from root; the kernel's own files are what it may not read as it likes.
        let program = Program::new();
        program.run(&["db", "setup"]).success();
        let ended = program.run(&["import", "/proc/self/mem"]);
        assert!(ended.failure().starts_with("cannot read /proc/self/mem: "), "{ended:?}");
        return;
    }
    let program = Program::new();
    program.run(&["db", "setup"]).success();
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
    program.run(&["db", "setup"]).success();
    program.run(&["import", "events"]).success();
    disk.fill();
    let full = disk.path().join("events.ndjson");
    let ended = program.run(&["export", "--output", full.to_str().unwrap()]);
    assert!(ended.failure().contains("No space left on device"), "{ended:?}");
    assert!(!disk.seen_from_here("events.ndjson").exists());
    assert!(names_of_partial_files(&disk.seen_from_here("")).is_empty());
    // What is no file is written to as it is.
    let ended = program.run(&["export", "--output", "/dev/full"]);
    assert!(ended.failure().contains("cannot write /dev/full: No space left"), "{ended:?}");
    assert!(names_of_partial_files(std::path::Path::new("/dev")).is_empty());
}

/// Names of files that were not made to their end.
fn names_of_partial_files(folder: &std::path::Path) -> Vec<std::ffi::OsString> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with(".pisync-")).collect()
}
