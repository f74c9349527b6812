//! What a killed server has acknowledged is stored once, whatever happens beside it or between two starts: other
//! writers, a damaged journal, another version.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use pisync::store::{self, Freshness, Target};
use rusqlite::Connection;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use crate::support::{
    events::now,
    http::{Client, column, event, with},
    program::{Program, Serving},
};

const DATABASE: &str = "data/pisync.db";

fn program() -> Program {
    Program::new()
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0)
}

fn open(program: &Program) -> Connection {
    Connection::open(program.path(DATABASE)).unwrap()
}

fn number(connection: &Connection, query: &str) -> i64 {
    connection.query_row(query, [], |row| row.get(0)).unwrap()
}

fn named(device: &str, event_id: &str) -> Value {
    with(event(device), &json!({"event_id": event_id}))
}

/// Reports one event after another, each in a record of its own, and answers their ids.
async fn report(client: &Client, device: &str, count: usize) -> Vec<i64> {
    let mut ids = Vec::new();
    for number in 0..count {
        let stored = client.store(&named(device, &format!("run-{number}"))).await;
        ids.push(stored["id"].as_i64().unwrap());
    }
    ids
}

/// The ids and event ids of a device's stored events, the oldest first.
async fn stored(client: &Client, device: &str) -> (Vec<i64>, Vec<String>) {
    let path = format!("/api/device/{device}/sync-history?limit=1000");
    let mut events = client.get(&path).await.data(200)["sync_history"].take();
    events.as_array_mut().unwrap().reverse();
    let ids = column(&events, "id").iter().map(|id| id.as_i64().unwrap()).collect();
    let names = column(&events, "event_id");
    (ids, names.iter().map(|name| name.as_str().unwrap_or_default().to_owned()).collect())
}

/// A server that has acknowledged `count` events of the device `pi` which are in its journal alone, and was
/// killed; with their ids.
async fn killed_with_a_journal(program: &Program, count: usize) -> Vec<i64> {
    let (serving, _other) = serve_beside_a_writer(program).await;
    let ids = report(&serving.client, "pi", count).await;
    kill(serving);
    ids
}

/// A server that has one event in its tables, and another program that keeps the next ones out of them: those stay in
/// the journal alone.
async fn serve_beside_a_writer(program: &Program) -> (Serving, Connection) {
    let serving = program.serve(&[]);
    report(&serving.client, "before", 1).await;
    serving.client.get("/api/stats").await.data(200);
    let other = open(program);
    other.execute_batch("begin immediate").unwrap();
    (serving, other)
}

fn kill(serving: Serving) {
    serving.signal("KILL");
    serving.wait();
}

fn journal_file(program: &Program) -> PathBuf {
    program.path("data/pisync.db.ingest-1")
}

/// What was acknowledged before the kill is not recent, so reads that may lag see it, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_before_a_kill_is_seen_by_the_first_read() {
    let program = program();
    killed_with_a_journal(&program, 5).await;
    let store = store::open(&Target::Sqlite(program.path(DATABASE))).await.unwrap();
    let events = async || {
        let stats = store.fleet_stats(now(), 10, Freshness::Lagging).await.unwrap();
        stats.figures.total_syncs
    };
    assert_eq!(events().await, 1);
    let (tell, _) = unbounded_channel();
    let _writer = store.ingest_writer(tell).await.unwrap();
    assert_eq!(events().await, 6);
}

/// The import beside the server goes on after the server was killed. Its events take no id that was given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_survive_a_kill_while_an_import_runs_beside() {
    let program = program();
    let serving = program.serve(&[]);
    report(&serving.client, "first", 1).await;
    let lines = |numbers: std::ops::Range<usize>| -> String {
        numbers.map(|number| named("imported", &format!("i{number}")).to_string() + "\n").collect()
    };
    let mut import = program.run_fed(&["import", "-", "--format", "ndjson"]);
    import.feed(&lines(0..1_500));
    // One step of it is stored.
    let began = Instant::now();
    while number(&open(&program), "select count(*) from sync_events") < 1_000 {
        assert!(began.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let other = open(&program);
    other.execute_batch("begin immediate").unwrap();
    let acknowledged = report(&serving.client, "live", 200).await;
    kill(serving);
    other.execute_batch("rollback").unwrap();
    import.feed(&lines(1_500..4_000));
    import.finish().success();
    let serving = program.serve(&[]);
    assert_eq!(stored(&serving.client, "live").await.0, acknowledged);
    let imported = serving.client.get("/api/device/imported").await.data(200);
    assert_eq!(imported["total_syncs"], 4_000);
    serving.stop();
    program.run(&["verify"]).success();
}

/// docs/postgresql.md allows it: a row without an id, or with one that its program has thought of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_other_programs_take_no_events_place() {
    let program = program();
    let mut serving = program.serve(&[]);
    let mut ids = report(&serving.client, "pi", 1).await;
    serving.client.get("/api/stats").await.data(200);
    let other = open(&program);
    other.execute_batch("begin immediate").unwrap();
    for run in 1..4 {
        let stored = serving.client.store(&named("pi", &format!("run-{run}"))).await;
        ids.push(stored["id"].as_i64().unwrap());
    }
    let insert = |id: &str| {
        other
            .execute_batch(&format!(
                "insert into sync_events (id, device, timestamp, total_files_synced, total_errors, created_at)
                 select {id}, max(id), 1750156200000, 99, 0, 1750156200000 from devices"
            ))
            .unwrap();
    };
    insert("null");
    // The id that is the next one in the tables: the server has given it.
    insert(&format!("{}", ids[1]));
    other.execute_batch("commit").unwrap();
    let (now, names) = stored(&serving.client, "pi").await;
    let names: Vec<_> = names.iter().filter(|name| !name.is_empty()).collect();
    assert_eq!((now.len(), names.len()), (6, 4), "{now:?}");
    let unique: std::collections::BTreeSet<_> = now.iter().collect();
    assert_eq!(unique.len(), 6);
    for id in [ids[0], ids[2], ids[3]] {
        assert!(now.contains(&id), "{id} of {now:?}");
    }
    assert!(serving.wait_for("another program has taken the id").contains("new_id"));
    // The event that has another id is still known by its name.
    let again = serving.client.report(&named("pi", "run-1")).await.json(200);
    assert_eq!(again["data"]["duplicate"], true);
    assert!(now.contains(&again["data"]["id"].as_i64().unwrap()));
    serving.stop();
    program.run(&["verify", "--repair"]);
    program.run(&["verify"]).success();
}

/// A proper stop leaves no gap, and a kill gives no id twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_go_on_after_a_stop_and_rise_after_a_kill() {
    let program = program();
    let serving = program.serve(&[]);
    assert_eq!(report(&serving.client, "a", 3).await, [1, 2, 3]);
    serving.stop();
    let serving = program.serve(&[]);
    assert_eq!(report(&serving.client, "b", 2).await, [4, 5]);
    kill(serving);
    let serving = program.serve(&[]);
    let ids = report(&serving.client, "c", 2).await;
    assert!(ids[0] > 5 && ids[1] == ids[0] + 1, "{ids:?}");
    serving.stop();
    let serving = program.serve(&[]);
    assert_eq!(report(&serving.client, "d", 1).await, [ids[1] + 1]);
    assert_eq!(serving.client.get("/api/stats").await.data(200)["total_sync_events"], 8);
    serving.stop();
}

/// Nothing opens the database before a person has looked, and then all that can be read is stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_journal_stops_everybody_until_it_is_salvaged() {
    let program = program();
    let ids = killed_with_a_journal(&program, 5).await;
    program.run(&["journal", "inspect"]).success();
    let mut journal = fs::read(journal_file(&program)).unwrap();
    let run_1 = journal.windows(5).position(|bytes| bytes == b"run-1").unwrap();
    journal[run_1 - 8] ^= 1;
    fs::write(journal_file(&program), &journal).unwrap();
    let events = "select count(*) from sync_events";
    for command in
        [&["serve"][..], &["verify"], &["export"], &["backup", "copy.db"], &["migrate", "down"]]
    {
        let said = program.run(command);
        let said = said.refusal();
        assert!(said.contains("are missing") && said.contains("journal salvage"), "{said}");
        assert_eq!(number(&open(&program), events), 1);
        assert_eq!(fs::read(journal_file(&program)).unwrap(), journal);
    }
    let inspected = program.run(&["journal", "inspect"]);
    assert!(inspected.failure().contains("are missing"), "{inspected:?}");
    assert!(inspected.stdout.contains("events in the journal alone: 4"), "{inspected:?}");
    let salvaged = program.run(&["journal", "salvage"]);
    assert!(salvaged.success().contains("kept: 4 events"), "{salvaged:?}");
    assert_eq!(fs::read(program.path("data/pisync.db.ingest-1.aside-1")).unwrap(), journal);
    assert!(program.run(&["journal", "salvage"]).success().contains("nothing is damaged"));

    let serving = program.serve(&[]);
    let (found, names) = stored(&serving.client, "pi").await;
    assert_eq!((found, names.len()), ([&ids[..1], &ids[2..]].concat(), 4));
    // What is lost may be legible.
    let doubtful = fs::read_to_string(program.path("data/pisync.db.doubtful.ndjson")).unwrap();
    assert_eq!(doubtful.lines().count(), 1);
    program.run(&["import", "data/pisync.db.doubtful.ndjson"]).success();
    assert_eq!(serving.client.get("/api/stats").await.data(200)["total_sync_events"], 6);
    serving.stop();
    program.run(&["verify"]).success();
}

/// Who copies or mounts the database's file alone leaves behind what was acknowledged last, and must be told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_is_gone_after_a_kill_is_missed() {
    for gone in [&["ingest-1"][..], &["ingest-2"], &["ingest-1", "ingest-2"]] {
        let program = program();
        let ids = killed_with_a_journal(&program, 5).await;
        for ending in gone {
            fs::remove_file(program.path(&format!("data/pisync.db.{ending}"))).unwrap();
        }
        for command in
            [&["serve"][..], &["verify"], &["journal", "inspect"], &["backup", "copy.db"]]
        {
            let said = program.run(command);
            let said = said.refusal();
            for ending in gone {
                assert!(said.contains(&format!("pisync.db.{ending} is gone")), "{said}");
            }
            assert!(said.contains("journal salvage"), "{said}");
        }
        program.run(&["journal", "salvage"]).success();
        let serving = program.serve(&[]);
        // A copy has no journal, and misses none.
        program.run(&["backup", "copy.db"]).success();
        let left = if gone.contains(&"ingest-1") { &[][..] } else { &ids[..] };
        if !left.is_empty() {
            assert_eq!(stored(&serving.client, "pi").await.0, left);
        }
        serving.stop();
        program.run(&["verify"]).success();
        program.run(&["restore", "--force", "copy.db"]).success();
        program.serve(&[]).stop();
    }
}

/// Also when its log is not there: some of what was acknowledged may be in that alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_databases_file_alone_is_no_copy_of_a_killed_servers_database() {
    let program = program();
    killed_with_a_journal(&program, 5).await;
    fs::create_dir(program.path("alone")).unwrap();
    fs::copy(program.path(DATABASE), program.path("alone/pisync.db")).unwrap();
    for command in [&["serve"][..], &["verify"], &["backup", "copy.db"]] {
        let said = program.run(&[command, &["--data-dir", "alone"]].concat());
        assert!(said.refusal().contains("pisync.db.ingest-1 is gone"), "{said:?}");
    }
}

/// Another program stores an event under an event_id that an acknowledged event has, which is not in the tables yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_event_whose_event_id_another_program_takes_is_kept() {
    let program = program();
    let (serving, other) = serve_beside_a_writer(&program).await;
    let failed = with(named("before", "taken"), &json!({"total_errors": 7}));
    serving.client.store(&failed).await;
    serving.client.store(&named("before", "mine")).await;
    other
        .execute_batch(
            "insert into sync_events (device, timestamp, total_files_synced, total_errors, created_at)
             select id, 1, 2, 0, unixepoch() * 1000 from devices where device_id = 'before';
             insert into event_keys (device, event_id, id, created_at)
             select device, 'taken', id, created_at from sync_events where rowid = last_insert_rowid();
             commit",
        )
        .unwrap();
    let (_, names) = stored(&serving.client, "before").await;
    assert_eq!(names.len(), 3, "{names:?}");
    serving.stop();
    let kept = fs::read_to_string(program.path("data/pisync.db.refused.ndjson")).unwrap();
    let kept: Vec<Value> = kept.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!((&kept[0]["event_id"], &kept[0]["total_errors"]), (&json!("taken"), &json!(7)));
    let log = program.log("error.log");
    let said = log[0]["error"].as_str().unwrap();
    assert!(said.contains("under the same event_id"), "{log:?}");
}

/// A file that is there and empty, or another database's, is as bad as none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_was_emptied_after_a_kill_is_missed() {
    let other = self::program();
    killed_with_a_journal(&other, 3).await;
    let foreign = fs::read(journal_file(&other)).unwrap();
    for contents in [vec![], vec![0; 5_000], vec![0; 1 << 20], foreign] {
        let program = self::program();
        let ids = killed_with_a_journal(&program, 5).await;
        let whole = fs::read(journal_file(&program)).unwrap();
        fs::write(journal_file(&program), &contents).unwrap();
        for command in [&["serve"][..], &["verify"], &["journal", "inspect"]] {
            let said = program.run(command);
            assert!(
                said.refusal().contains("pisync.db.ingest-1 was emptied or replaced"),
                "{said:?}"
            );
            assert_eq!(fs::read(journal_file(&program)).unwrap(), contents);
        }
        // Who finds it again is well.
        fs::write(journal_file(&program), &whole).unwrap();
        let serving = program.serve(&[]);
        assert_eq!(stored(&serving.client, "pi").await.0, ids);
        kill(serving);
        // Nothing was acknowledged since, and nothing is missed.
        program.serve(&[]).stop();
        program.run(&["verify"]).success();
    }
}

/// A file that is not complete by itself is no proper stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_leaves_a_journal_says_so() {
    let program = program();
    let (serving, other) = serve_beside_a_writer(&program).await;
    report(&serving.client, "pi", 4).await;
    serving.signal("TERM");
    let ended = serving.wait();
    assert!(ended.failure().contains("the next start goes on from them"), "{ended:?}");
    drop(other);
    let serving = program.serve(&[]);
    assert_eq!(stored(&serving.client, "pi").await.0.len(), 4);
    serving.stop();
}

/// A full disk keeps a file from growing by as much as it should, and is no damage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_of_odd_length_goes_on() {
    let program = program();
    let ids = killed_with_a_journal(&program, 5).await;
    let mut journal = fs::read(journal_file(&program)).unwrap();
    journal.resize((1 << 20) + 500_000, 0);
    fs::write(journal_file(&program), &journal).unwrap();
    let serving = program.serve(&[]);
    assert_eq!(stored(&serving.client, "pi").await.0, ids);
    let other = open(&program);
    other.execute_batch("begin immediate").unwrap();
    // Longer than the file was meant to be, and shorter than it is.
    let note = "x".repeat(3_900);
    let large: Vec<_> = (0..320)
        .map(|number| {
            with(named("large", &number.to_string()), &json!({"metadata": {"note": note}}))
        })
        .collect();
    serving.client.post("/api/sync-events", &json!(large)).await.data(200);
    kill(serving);
    drop(other);
    program.run(&["journal", "inspect"]).success();
    let serving = program.serve(&[]);
    assert_eq!(serving.client.get("/api/device/large").await.data(200)["total_syncs"], 320);
    serving.stop();
}

/// The journal of a database that is replaced is kept when it cannot be brought into its tables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restoring_keeps_a_journal_that_cannot_be_applied() {
    let program = program();
    let serving = program.serve(&[]);
    report(&serving.client, "a", 1).await;
    program.run(&["backup", "copy.db"]).success();
    serving.stop();
    killed_with_a_journal(&program, 3).await;
    let mut journal = fs::read(journal_file(&program)).unwrap();
    journal[20] ^= 1;
    fs::write(journal_file(&program), &journal).unwrap();
    let restored = program.run(&["restore", "--force", "copy.db"]);
    assert_eq!(restored.code(), 0, "{restored:?}");
    assert_eq!(fs::read(program.path("data/pisync.db.ingest-1.aside-1")).unwrap(), journal);
    let serving = program.serve(&[]);
    assert_eq!(serving.client.get("/api/stats").await.data(200)["total_sync_events"], 1);
    serving.stop();
}

/// Events of a record that are done already are not stored again, and the others are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_was_half_applied_is_finished() {
    let program = program();
    let (serving, other) = serve_beside_a_writer(&program).await;
    let batch: Vec<_> = (0..5).map(|run| named("pi", &format!("run-{run}"))).collect();
    serving.client.post("/api/sync-events", &json!(batch)).await.data(200);
    kill(serving);
    other.execute_batch("update ingest_state set settled_events = 2; commit").unwrap();
    let serving = program.serve(&[]);
    assert_eq!(stored(&serving.client, "pi").await.1, ["run-2", "run-3", "run-4"]);
    serving.stop();
}

/// A record as the version before wrote it.
fn record_of_version_1(identity: i64, record: u64, first_id: i64, device: &str) -> Vec<u8> {
    let line = json!([device, "run", 1_750_156_200_000_i64, 7, 0, null, null, null, null, null]);
    let mut bytes = vec![0; 32];
    bytes.extend(format!("{line}\n").bytes());
    let length = u32::try_from(bytes.len() - 32).unwrap();
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[8..16].copy_from_slice(&record.to_le_bytes());
    bytes[16..24].copy_from_slice(&first_id.to_le_bytes());
    bytes[24..32].copy_from_slice(&1_795_345_200_000_i64.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&identity.to_le_bytes());
    hasher.update(&bytes[8..]);
    bytes[4..8].copy_from_slice(&hasher.finalize().to_le_bytes());
    bytes
}

/// Killed, then upgraded: the schema changes only once it is known that what is in the journal can be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_takes_along_what_a_killed_server_has_acknowledged() {
    const LATER: &str =
        "select count(*) from pisync_migrations where name > '2026-11-23-06-failed-events'";
    for damaged in [false, true] {
        let program = program();
        program.run(&["migrate", "up"]).success();
        let later = number(&open(&program), LATER).to_string();
        program.run(&["migrate", "down", &later, "--yes"]).success();
        let identity = number(&open(&program), "select journal from ingest_state");
        open(&program).execute_batch("update ingest_state set settled = 40").unwrap();
        let mut journal = Vec::new();
        for (number, device) in (41..).zip(["a", "b", "c"]) {
            journal.extend(record_of_version_1(
                identity,
                number,
                70 + 3 * number.cast_signed(),
                device,
            ));
        }
        if damaged {
            journal[100] ^= 1;
        }
        journal.resize(1 << 20, 0);
        fs::write(journal_file(&program), &journal).unwrap();
        if damaged {
            for command in [&["serve"][..], &["migrate", "up"], &["import", "x.ndjson"]] {
                let program = &program;
                fs::write(program.path("x.ndjson"), event("x").to_string()).unwrap();
                let said = program.run(command);
                let missing = "is damaged: acknowledged events are missing (record 42)";
                assert!(said.failure().contains(missing), "{said:?}");
            }
            assert_eq!(number(&open(&program), LATER), 0);
            program.run(&["journal", "salvage"]).success();
        } else {
            let said = program.run(&["migrate", "down"]);
            assert!(said.failure().contains("run `pisync migrate up` first"), "{said:?}");
        }
        let serving = program.serve(&[]);
        let found = serving.client.get("/api/devices").await.data(200)["devices"].take();
        let expected = if damaged { &["a", "c"][..] } else { &["a", "b", "c"] };
        assert_eq!(column(&found, "device_id"), expected);
        assert_eq!(stored(&serving.client, "c").await.0, [70 + 3 * 43]);
        // No id that a killed server may have given is given again.
        assert!(report(&serving.client, "new", 1).await[0] > 70 + 3 * 43);
        serving.stop();
        program.run(&["verify"]).success();
    }
}
