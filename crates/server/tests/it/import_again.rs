//! `pisync import` of what was imported before, in part or in full: an input is known again, an interrupted one goes on, and
//! no event is stored twice.

use pisync::store::{self, Store};
use serde_json::{Value, json};

use crate::{
    import::{counted, csv, events, exported, file, gzip, lines, total},
    json_output::documented,
    support::{
        events::at,
        http::{event, with},
        program::{Installed, Running, url},
        store::TestDatabase,
    },
};

both_stores!(
    what_was_rejected_before_is_said_again,
    reasons_are_looked_for_where_they_are,
    what_comes_before_damage_is_imported,
    a_damaged_input_that_begins_like_another,
    what_was_imported_is_known_again,
    the_same_records_at_the_same_time,
    a_file_that_has_grown_is_imported_from_there,
    inputs_that_begin_alike_are_told_apart,
    killed_again_and_again,
);

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
    // What can be read only once cannot be read again.
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

/// A second run finds the same records rejected: a script that looks at the status alone must not take them for stored.
async fn what_was_rejected_before_is_said_again(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    const GOOD: &str =
        r#"{"device_id":"pi","timestamp":"2025-06-17","total_files_synced":1,"total_errors":0}"#;
    let write = |name: &str, text: &str| std::fs::write(program.path(name), text).unwrap();
    write("mixed", &format!("{GOOD}\n{{}}\n{{}}\n"));
    let said = "pisync: 2 records were rejected; mixed.rejected says why\n";
    for _ in 0..3 {
        let ended = program.run(&["import", "mixed"]);
        assert_eq!((ended.code(), ended.stderr.as_str()), (3, said), "{ended:?}");
    }
    // It grows, with nothing wrong in what is new.
    write("mixed", &format!("{GOOD}\n{{}}\n{{}}\n{GOOD}\n"));
    let ended = program.run(&["import", "mixed"]);
    assert!(ended.code() == 3 && ended.stdout.starts_with("imported 1 events"), "{ended:?}");
    write("bad", "{}\n{\"a\": 1}\n");
    for _ in 0..2 {
        let ended = program.run(&["import", "bad"]);
        assert_eq!(ended.failure(), "no record is an event; bad.rejected says why");
    }
    write("good", &format!("{GOOD}\n"));
    for _ in 0..2 {
        program.run(&["import", "good"]).success();
    }
    assert_eq!(total(&database.target).await, 3);
}

/// A message names the file of rejected records only when it is there, and the document for programs agrees with the status.
async fn reasons_are_looked_for_where_they_are(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    const GOOD: &str =
        r#"{"device_id":"pi","timestamp":"2025-06-17","total_files_synced":1,"total_errors":0}"#;
    let write = |name: &str, text: &str| std::fs::write(program.path(name), text).unwrap();
    let mixed = format!("{GOOD}\n{{}}\n{{}}\n");
    for name in ["first", "other"] {
        write(name, &mixed);
    }
    let check = |arguments: &[&str], said: &str, rejected: [u64; 2], file: Option<&str>| {
        let ended = program.run_reading(&[&["import", "--json"], arguments].concat(), "first");
        assert_eq!(ended.code(), 3, "{ended:?}");
        assert_eq!(ended.stderr.lines().last(), Some(said), "{ended:?}");
        let document = documented("import", &ended);
        let found = [&document["rejected"], &document["rejected_before"]];
        assert_eq!(found, [&json!(rejected[0]), &json!(rejected[1])], "{document}");
        assert_eq!(document["rejected_file"], json!(file), "{document}");
    };
    let all = "pisync: 2 records were rejected; first.rejected says why";
    check(&["first"], all, [2, 0], Some("first.rejected"));
    check(&["first"], all, [0, 2], Some("first.rejected"));
    // Under another name, from standard input, and with the file gone.
    let advice = "look for the file that was written when first was imported, or write it again with --again --rejected NEW-FILE, which stores events without an event_id twice";
    let missing = |file: &str| {
        format!(
            "pisync: 2 records were rejected; {file}, which would say why, is not there: {advice}"
        )
    };
    check(&["other"], &missing("other.rejected"), [0, 2], None);
    check(&["-"], &missing("stdin.rejected"), [0, 2], None);
    let elsewhere = ["other", "--rejected", "first.rejected"];
    check(&elsewhere, all, [0, 2], Some("first.rejected"));
    std::fs::remove_file(program.path("first.rejected")).unwrap();
    check(&["first"], &missing("first.rejected"), [0, 2], None);
    // It grows: the new file has only what is new.
    write("first", &format!("{mixed}[]\n"));
    let lacks =
        format!("pisync: 3 records were rejected; first.rejected lacks 2 of them: {advice}");
    check(&["first"], &lacks, [1, 2], Some("first.rejected"));
    // The advice works.
    let again = ["first", "--again", "--rejected", "new"];
    check(&again, "pisync: 3 records were rejected; new says why", [3, 0], Some("new"));
    assert_eq!(std::fs::read_to_string(program.path("new")).unwrap().lines().count(), 3);
    assert_eq!(total(&database.target).await, 2);
    // Where nothing is stored, nothing is stored twice.
    write("bad", "{}\n");
    program.run(&["import", "bad"]).failure();
    std::fs::remove_file(program.path("bad.rejected")).unwrap();
    let ended = program.run(&["import", "bad"]);
    assert!(ended.failure().ends_with("--again --rejected NEW-FILE"), "{ended:?}");
}
