//! SQLite's write-ahead log of a killed server, damaged by the disk: what stands behind the damage must not be dropped
//! in silence.

use std::{fs, path::Path};

use serde_json::json;

use crate::support::{
    http::{event, with},
    program::Program,
};

const LOG: &str = "data/pisync.db-wal";
const RECORDS: u64 = 3_000;

fn program() -> Program {
    Program::new().with("PORT", 0)
}

/// A killed server beside which `RECORDS` events were imported, most of which are in the log alone.
fn killed_after_an_import() -> Program {
    let records: String = (0..RECORDS)
        .map(|record| {
            with(event("pi"), &json!({"event_id": record.to_string()})).to_string() + "\n"
        })
        .collect();
    let program = program().with_file("records.ndjson", &records);
    let serving = program.serve(&[]);
    program.run(&["import", "records.ndjson"]).success();
    serving.signal("KILL");
    serving.wait();
    program
}

fn flip_a_bit(path: &Path) -> Vec<u8> {
    let mut log = fs::read(path).unwrap();
    let middle = log.len() / 2;
    log[middle] ^= 4;
    fs::write(path, &log).unwrap();
    log
}

#[test]
fn a_damaged_log_stops_every_command_and_the_start() {
    let program = killed_after_an_import();
    let damaged = flip_a_bit(&program.path(LOG));
    let before = fs::read(program.path("data/pisync.db")).unwrap();
    for command in [
        &["serve"][..],
        &["verify"],
        &["migrate", "status"],
        &["key", "list"],
        &["export", "--output", "out.ndjson"],
        &["backup", "out.db"],
        &["import", "records.ndjson"],
        &["journal", "inspect"],
        &["copy", "--from", "sqlite:data/pisync.db", "--to", "sqlite:copy.db"],
    ] {
        let ended = program.run(command);
        let said = ended.refusal();
        assert!(said.contains("pisync.db-wal is damaged at byte"), "{command:?}: {ended:?}");
        assert!(said.contains("`pisync journal salvage`"), "{command:?}: {ended:?}");
    }
    assert_eq!(fs::read(program.path(LOG)).unwrap(), damaged);
    assert_eq!(fs::read(program.path("data/pisync.db")).unwrap(), before);

    let salvaged = program.run(&["journal", "salvage"]);
    assert!(salvaged.success().contains("pisync.db-wal.aside-1"), "{salvaged:?}");
    assert_eq!(fs::read(program.path("data/pisync.db-wal.aside-1")).unwrap(), damaged);
    // What is imported again is known as far as it is stored.
    let imported = program.run(&["import", "--again", "records.ndjson"]);
    assert_eq!(imported.code(), 0, "{imported:?}");
    program.run(&["verify"]).success();
    let exported = program.run(&["export", "--output", "-"]);
    assert_eq!(exported.success().lines().count() as u64, RECORDS);
}

/// A backup that is brought back takes the place of the damaged database with its log.
#[test]
fn a_backup_takes_the_place_of_a_damaged_log() {
    let program = program().with_file("record.ndjson", &(event("pi").to_string() + "\n"));
    program.run(&["db", "setup"]).success();
    program.run(&["import", "record.ndjson"]).success();
    program.run(&["backup", "backup.db"]).success();
    let killed = killed_after_an_import();
    let damaged = flip_a_bit(&killed.path(LOG));
    fs::copy(program.path("backup.db"), killed.path("backup.db")).unwrap();
    let restored = killed.run(&["restore", "backup.db", "--force"]);
    assert_eq!(restored.code(), 0, "{restored:?}");
    assert!(restored.stderr.contains("pisync.db-wal.aside-1"), "{restored:?}");
    assert_eq!(fs::read(killed.path("data/pisync.db-wal.aside-1")).unwrap(), damaged);
    let exported = killed.run(&["export", "--output", "-"]);
    assert_eq!(exported.success().lines().count(), 1);
}
