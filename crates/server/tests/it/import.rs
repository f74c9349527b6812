//! `pisync import`: whatever its form, each record is stored once or rejected with its reasons, also when the
//! import is interrupted again and again.

use std::{fmt::Write as _, io::Write as _};

use pisync::store::{self, Store, Target};
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{event, with},
    program::{Ended, Installed, Program, Running, url},
    small_disk::SmallDisk,
    store::TestDatabase,
};

both_stores!(
    every_form_is_read,
    what_is_wrong_is_rejected_with_its_reasons,
    an_unclosed_quotation_mark_costs_one_line,
    blanks_around_cells_and_capital_letters,
    what_comes_before_damage_is_imported,
    a_damaged_input_that_begins_like_another,
    what_was_imported_is_known_again,
    the_same_records_at_the_same_time,
    a_file_that_has_grown_is_imported_from_there,
    inputs_that_begin_alike_are_told_apart,
    killed_again_and_again,
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

/// What an import says of its records, of which none may be missing: how many were imported, and rejected.
fn counted(ended: &Ended) -> (u64, u64) {
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
    assert!(ended.stderr.starts_with("columns that are passed over: colour\n"), "{ended:?}");
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

async fn what_comes_before_damage_is_imported(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    // Each input is of other events, or it would be known again.
    let all = events(30_000, false);
    let mut cases = all.chunks(2_500);
    let mut next = || cases.next().unwrap();
    let mut expected = 0;
    let mut check = async |name: &str,
                           damaged: &[u8],
                           before: Option<u64>,
                           code: i32,
                           whole: &[u8],
                           count: u64| {
        file(program, name, damaged);
        let rejected = format!("{name}.rejected");
        let ended = program.run(&["import", name]);
        assert_eq!(ended.code(), code, "{name}: {ended:?}");
        let stored = u64::try_from(total(&database.target).await).unwrap() - expected;
        if let Some(before) = before {
            assert_eq!(stored, before, "{name}");
        }
        assert!(stored >= count / 4, "{name}: {stored} were stored");
        if code == 3 {
            assert_eq!(counted(&ended), (stored, 1), "{name}: {ended:?}");
            let expected = format!("pisync: {name} ends in the middle of a record");
            assert!(ended.stderr.contains(&expected), "{ended:?}");
            assert_eq!(
                std::fs::read_to_string(program.path(&rejected)).unwrap().lines().count(),
                1
            );
            // As long as it stays as it is, so does everything.
            let again = program.run(&["import", name]);
            assert_eq!((again.code(), counted(&again)), (3, (0, 1)), "{again:?}");
        } else {
            let dealt_with = format!(
                "; of the {stored} records before, {stored} are imported, 0 were there already, 0 were rejected"
            );
            assert!(ended.failure().ends_with(&dealt_with), "{ended:?}");
        }
        // Once it is whole, nothing is stored twice.
        file(program, name, whole);
        let ended = program.run(&["import", name]);
        assert_eq!(ended.code(), 0, "{name}: {ended:?}");
        let going_on = format!("going on after the {stored} records ");
        assert!(ended.stderr.starts_with(&going_on), "{name}: {ended:?}");
        expected += count;
        assert_eq!(u64::try_from(total(&database.target).await).unwrap(), expected, "{name}");
        if code == 3 {
            assert_eq!(std::fs::read_to_string(program.path(&rejected)).unwrap(), "");
        }
    };
    let ndjson = lines(next());
    let cut = &ndjson.as_bytes()[..ndjson.len() - 9];
    check("cut.ndjson", cut, Some(2_499), 3, ndjson.as_bytes(), 2_500).await;
    let cells = csv(next());
    let cut = &cells.as_bytes()[..cells.len() - 30];
    check("cut.csv", cut, Some(2_499), 3, cells.as_bytes(), 2_500).await;
    for (name, text) in [("nuls.ndjson", lines(next())), ("nuls.csv", csv(next()))] {
        let (end, _) = text.match_indices('\n').nth(2_000).unwrap();
        let records = if name == "nuls.csv" { 2_000 } else { 2_001 };
        // The end of the last line was not written either.
        let damaged = [&text.as_bytes()[..end], &vec![0; 100_000]].concat();
        check(name, &damaged, Some(records), 3, text.as_bytes(), 2_500).await;
    }
    let array = Value::from(next().to_vec()).to_string();
    let cut = &array.as_bytes()[..array.len() - 5];
    check("cut.json", cut, Some(2_499), 1, array.as_bytes(), 2_500).await;
    let array = Value::from(next().to_vec()).to_string();
    let (middle, _) = array.match_indices(",{").nth(1_200).unwrap();
    let broken = [&array.as_bytes()[..middle], b" ", &array.as_bytes()[middle + 1..]].concat();
    check("broken.json", &broken, Some(1_201), 1, array.as_bytes(), 2_500).await;
    let packed = gzip(lines(next()).as_bytes());
    check("cut.gz", &packed[..packed.len() / 2], None, 1, &packed, 2_500).await;
    let long = lines(&[next(), next()].concat());
    let packed = zstd::encode_all(long.as_bytes(), 1).unwrap();
    check("cut.zst", &packed[..packed.len() * 3 / 4], None, 1, &packed, 5_000).await;
}

async fn a_damaged_input_that_begins_like_another(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let first = events(3_000, false);
    program.run(&["import", file(program, "first", lines(&first))]).success();
    let mut second = first;
    second[150]["device_id"] = json!("other");
    let array = Value::from(second).to_string();
    let (middle, _) = array.match_indices(",{").nth(1_999).unwrap();
    file(program, "second", &array[..middle]);
    let ended = program.run(&["import", "second"]);
    assert!(ended.failure().contains("of the 2000 records before, 2000 are imported"), "{ended:?}");
    assert_eq!(total(&database.target).await, 5_000);
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

/// Two copies of an input, or an import that is gone on with twice.
async fn the_same_records_at_the_same_time(installed: &Installed) {
    const RECORDS: usize = 10_000;
    let Installed { program, database } = installed;
    database.migrate().await;
    let mut refused = 0;
    for round in 1..=3 {
        let line = |number: usize| {
            let fields = json!({"total_files_synced": number, "timestamp": at(-round)});
            with(event("twice"), &fields).to_string() + "\n"
        };
        let records: String = (0..RECORDS).map(line).collect();
        let names = ["one", "other"].map(|name| format!("{name}-{round}.ndjson"));
        for name in &names {
            std::fs::write(program.path(name), &records).unwrap();
        }
        let running = names.each_ref().map(|name| program.start(&["import", name]));
        for ended in running.map(Running::wait) {
            if ended.code() != 0 {
                refused += 1;
                let said = "another import of the same records";
                assert!(ended.stderr.contains(said), "{ended:?}");
            }
        }
        // Whoever comes after them goes on after what is stored.
        for name in &names {
            assert_eq!(program.run(&["import", name]).code(), 0);
        }
        assert_eq!(total(&database.target).await, round * RECORDS as i64);
    }
    assert!(refused > 0, "they never met");
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
    assert!(ended.failure().contains("save it to a file"), "{ended:?}");
    // Nothing of it is stored: not what it shares with the first one, nor what it does not.
    assert_eq!(total(&database.target).await, 3_000);
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
