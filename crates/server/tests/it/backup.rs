//! `pisync backup` and `pisync restore`: a copy is whole, whoever writes meanwhile, and nothing is put in its
//! place that is not.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use pisync::store::Target;
use serde_json::json;

use crate::{
    ingest::{Reporters, stored_ids},
    support::{
        http::{event, with},
        program::{Installed, Program, url},
        small_disk::SmallDisk,
        store::on_postgres,
    },
};

/// A program whose database is data/pisync.db in its own folder.
fn program() -> Program {
    Program::new()
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0)
}

const DATABASE: &str = "data/pisync.db";

/// Reports of so many devices, stored by a server that has ended.
async fn report(program: &Program, devices: std::ops::Range<u32>) {
    let serving = program.serve(&[]);
    for device in devices {
        serving.client.store(&event(&format!("pi-{device}"))).await;
    }
    serving.stop();
}

async fn devices(program: &Program) -> u64 {
    let serving = program.serve(&[]);
    let stats = serving.client.get("/api/stats").await.data(200);
    serving.stop();
    stats["total_devices"].as_u64().unwrap()
}

fn pragma(file: &Path, name: &str) -> String {
    let connection = rusqlite::Connection::open(file).unwrap();
    let value = |row: &rusqlite::Row<'_>| row.get::<_, rusqlite::types::Value>(0);
    format!("{:?}", connection.pragma_query_value(None, name, value).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_under_load_holds_what_was_acknowledged() {
    let program = program();
    let serving = program.serve(&[]);
    let reporters = Reporters::start(&serving.client);
    reporters.wait_for(200).await;
    let before = stored_ids(&serving.client, "pi").await;
    let said = program.run(&["backup", "pisync.backup"]);
    assert!(said.success().contains("pisync.backup: devices: "), "{said:?}");
    reporters.wait_for(20).await;
    let after = reporters.stop().await;
    serving.stop();

    let file = program.path("pisync.backup");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        pragma(&file, "integrity_check"),
        pragma(&program.path(DATABASE), "integrity_check")
    );
    for setting in ["page_size", "auto_vacuum"] {
        assert_eq!(pragma(&file, setting), pragma(&program.path(DATABASE), setting), "{setting}");
    }
    assert_eq!(program.names_in(".").iter().filter(|name| name.starts_with(".pisync")).count(), 0);

    let other = Program::new().with("PORT", 0).with("RATE_LIMIT_API_PER_MINUTE", 0);
    let restored = other.run(&["restore", file.to_str().unwrap()]);
    assert!(restored.success().starts_with("restored SQLite data/pisync.db from "), "{restored:?}");
    other.run(&["verify"]).success();
    let serving = other.serve(&[]);
    let held = stored_ids(&serving.client, "pi").await;
    assert!(before.is_subset(&held) && held.is_subset(&after), "{} {}", held.len(), after.len());
    assert!(held.len() < after.len());
    // What comes after goes on from there.
    let stored = serving.client.store(&event("pi")).await;
    assert!(stored["id"].as_i64() > held.iter().max().copied());
    serving.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_groups_and_keys_come_back() {
    let program = program();
    let serving = program.serve(&[]);
    serving.client.store(&with(event("pi"), &json!({"event_id": "one"}))).await;
    let change = json!({"name": "Library", "group": "school"});
    serving.client.patch("/api/device/pi", &change).await.data(200);
    program.run(&["key", "create", "--scope", "read", "--name", "prometheus"]).made_key();
    serving.stop();
    program.run(&["backup", "copy.db"]).success();
    fs::remove_dir_all(program.path("data")).unwrap();

    program.run(&["restore", "copy.db"]).success();
    let serving = program.serve(&["--auth", "off"]);
    let device = serving.client.get("/api/device/pi").await.data(200);
    assert_eq!((&device["name"], &device["group"]), (&json!("Library"), &json!("school")));
    let again = serving.client.report(&with(event("pi"), &json!({"event_id": "one"}))).await;
    assert_eq!(again.data(200)["duplicate"], true);
    serving.stop();
    assert!(program.run(&["key", "list"]).success().contains("prometheus"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_replaced_unless_asked() {
    let program = program();
    report(&program, 0..2).await;
    program.run(&["backup", "two.db"]).success();
    report(&program, 2..3).await;

    let refused = program.run(&["backup", "two.db"]);
    assert_eq!(refused.failure(), "two.db exists; --force replaces it");
    let refused = program.run(&["restore", "two.db"]);
    assert_eq!(refused.failure(), "data/pisync.db exists; --force replaces it");
    assert_eq!(devices(&program).await, 3);

    let restored = program.run(&["restore", "two.db", "--force"]);
    assert!(restored.success().ends_with("/data/pisync.db.replaced\n"), "{restored:?}");
    assert_eq!(devices(&program).await, 2);
    // And what was there before is whole.
    let restored = program.run(&["restore", "data/pisync.db.replaced", "--force"]);
    assert!(restored.success().ends_with("/data/pisync.db.replaced-2\n"), "{restored:?}");
    assert_eq!(devices(&program).await, 3);
    // A second restore leaves alone what the first has replaced.
    program.run(&["restore", "data/pisync.db.replaced", "--force"]).success();
    assert_eq!(devices(&program).await, 3);

    program.run(&["backup", "two.db", "--force"]).success();
    program.run(&["restore", "two.db", "--force"]).success();
    assert_eq!(devices(&program).await, 3);
}

/// What is written to a file that somebody names never takes the place of the database, or of what belongs to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_output_takes_the_place_of_the_database() {
    let program = program();
    report(&program, 0..2).await;
    std::os::unix::fs::symlink("data/pisync.db", program.path("link.db")).unwrap();
    // What a restore has replaced is kept for its owner.
    program.run(&["backup", "one.db"]).success();
    program.run(&["restore", "one.db", "--force"]).success();
    let endings = [
        "",
        "-wal",
        "-shm",
        "-journal",
        ".ingest-1",
        ".ingest-2",
        ".ingest-2.aside-1",
        ".refused.ndjson",
        ".doubtful.ndjson",
        ".replaced",
        ".replaced-2",
        ".replaced-wal",
    ];
    assert!(program.path(&format!("{DATABASE}.replaced")).exists());
    let files = endings.map(|ending| format!("{DATABASE}{ending}"));
    let names = files.iter().map(String::as_str).chain(["link.db"]);
    for name in names {
        for command in [&["export", "--output", name][..], &["backup", "--force", name]] {
            let refused = program.run(command);
            assert!(refused.failure().contains("the database itself"), "{command:?}: {refused:?}");
        }
    }
    assert_eq!(devices(&program).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn not_while_it_is_used() {
    let program = program();
    report(&program, 0..1).await;
    program.run(&["backup", "one.db"]).success();

    let serving = program.serve(&[]);
    let refused = program.run(&["restore", "one.db", "--force"]);
    assert!(refused.failure().contains("in use by a running PiSync server"), "{refused:?}");
    serving.client.store(&event("pi-1")).await;
    serving.stop();

    // Nor beside anything else that has it open, whose writing would be lost.
    let other = rusqlite::Connection::open(program.path(DATABASE)).unwrap();
    other.query_row("select count(*) from devices", [], |row| row.get::<_, i64>(0)).unwrap();
    let refused = program.run(&["restore", "one.db", "--force"]);
    assert!(refused.failure().contains("in use by another process"), "{refused:?}");
    drop(other);
    assert_eq!(devices(&program).await, 2);
}

/// A log that outlived its file, or belongs to a damaged one, is not taken for the new file's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_database_is_replaced() {
    let program = program();
    report(&program, 0..1).await;
    program.run(&["backup", "one.db"]).success();
    let serving = program.serve(&[]);
    serving.client.store(&event("pi-1")).await;
    serving.signal("KILL");
    serving.wait();
    assert!(program.path("data/pisync.db-wal").exists());

    let log = fs::read(program.path("data/pisync.db-wal")).unwrap();
    fs::write(program.path(DATABASE), "no database any more").unwrap();
    let restored = program.run(&["restore", "one.db", "--force"]);
    // It says what is lost with the damaged file.
    assert_eq!(restored.code(), 0, "{restored:?}");
    assert_eq!(devices(&program).await, 1);

    fs::remove_file(program.path(DATABASE)).unwrap();
    fs::write(program.path("data/pisync.db-wal"), log).unwrap();
    program.run(&["restore", "one.db"]).success();
    assert_eq!(devices(&program).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_backup_is_refused() {
    let program = program().with_file("notes.txt", &"These are notes. ".repeat(1000));
    report(&program, 0..2).await;
    program.run(&["backup", "whole.db"]).success();
    let whole = fs::read(program.path("whole.db")).unwrap();
    fs::write(program.path("half.db"), &whole[..whole.len() / 2]).unwrap();
    fs::write(program.path("empty.db"), "").unwrap();
    fs::create_dir(program.path("folder")).unwrap();
    let other = rusqlite::Connection::open(program.path("other.db")).unwrap();
    other.execute_batch("create table songs (title text)").unwrap();
    fs::copy(program.path("whole.db"), program.path("newer.db")).unwrap();
    let newer = rusqlite::Connection::open(program.path("newer.db")).unwrap();
    let migrated = "insert into pisync_migrations (name, source, checksum, batch, applied_at)
                    values ('2099-01-01-01-later', 'embedded', '', 9, 0)";
    newer.execute_batch(migrated).unwrap();
    let before = program.names_in("data");

    for (file, problem) in [
        ("notes.txt", "notes.txt is not a PiSync database"),
        ("half.db", "half.db is damaged: "),
        ("empty.db", "empty.db: not a PiSync database"),
        ("other.db", "other.db: not a PiSync database"),
        ("newer.db", "newer.db: the database is newer than this program"),
        ("missing.db", "there is no backup file missing.db"),
        ("folder", "there is no backup file folder"),
        (DATABASE, "data/pisync.db is the database itself"),
    ] {
        let refused = program.run(&["restore", file, "--force"]);
        assert!(refused.failure().starts_with(problem), "{file}: {refused:?}");
    }
    assert_eq!(program.names_in("data"), before);
    assert_eq!(devices(&program).await, 2);

    for (file, problem) in [
        ("folder", "folder is a folder; name a file"),
        ("nowhere/backup.db", "cannot create a file in nowhere: "),
    ] {
        let refused = program.run(&["backup", file]);
        assert!(refused.failure().starts_with(problem), "{file}: {refused:?}");
    }
    let refused = program.run(&["backup", DATABASE, "--force"]);
    assert!(refused.failure().starts_with("data/pisync.db is the database itself"), "{refused:?}");
    let nothing = Program::new().run(&["backup", "backup.db"]);
    let expected = "no database at data/pisync.db; name another with DATA_DIR or DATABASE_URL, or run `pisync serve` once";
    assert_eq!(nothing.failure(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_leaves_nothing_behind() {
    let disk = SmallDisk::new(1);
    let program = program().with_small_disk(&disk);
    let serving = program.serve(&[]);
    let much = with(event("pi"), &json!({"metadata": {"text": "x".repeat(4000)}}));
    for _ in 0..300 {
        serving.client.store(&much).await;
    }
    serving.stop();
    let file = disk.path().join("backup.db");
    let full = program.run(&["backup", file.to_str().unwrap()]);
    assert!(full.failure().contains("full"), "{full:?}");
    assert_eq!(fs::read_dir(disk.seen_from_here("")).unwrap().count(), 0);

    program.run(&["backup", "backup.db"]).success();
    let there = program.with("DATABASE_URL", url(&Target::Sqlite(disk.path().join("pisync.db"))));
    let full = there.run(&["restore", "backup.db"]);
    assert!(full.failure().contains("full"), "{full:?}");
    let left = fs::read_dir(disk.seen_from_here("")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_has_its_own_tools() {
    on_postgres(async |installed: &Installed| {
        let backup = installed.program.run(&["backup", "my copy.dump"]);
        let command =
            "pg_dump --format=custom --file='my copy.dump' --dbname=postgresql://pisync@127.0.0.1:";
        assert!(backup.failure().contains(command), "{backup:?}");
        let restore = installed.program.run(&["restore", "copy.dump"]);
        assert!(restore.failure().contains("pg_restore --list copy.dump"), "{restore:?}");
        assert_eq!(installed.program.names_in("."), Vec::<String>::new());
    })
    .await;
}
