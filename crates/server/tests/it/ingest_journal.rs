//! SQLite's ingest journal: whatever has been acknowledged is found by everybody, although it is not in the
//! tables yet, and nothing is there twice when it is.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use pisync::store::{self, EventWriter, HistoryQuery, Observations, Store, Window, Written};
use pisync_core::{EventId, SyncEvent};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{
    ingest::{assert_unavailable, until},
    support::{
        events::{at, device_id, failure, now, somebody, success, write},
        http::{Client, event, with},
        program::Program,
        server::TestServer,
        store::{TestStore, assert_right, differences, on_sqlite},
    },
};

const DATABASE: &str = "data/pisync.db";

fn program() -> Program {
    Program::new()
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0)
}

/// How many rows a query of the file finds, whatever is in the journal.
fn count(file: &Path, table: &str) -> i64 {
    let connection = rusqlite::Connection::open(file).unwrap();
    connection.query_row(&format!("select count(*) from {table}"), [], |row| row.get(0)).unwrap()
}

/// Reports `count` events in one batch, all of which are new.
async fn report(client: &Client, device: &str, count: usize) {
    assert_eq!(report_some(client, device, count).await, count);
}

/// Reports `count` events in one batch and tells how many of them are new.
async fn report_some(client: &Client, device: &str, count: usize) -> Value {
    let batch: Vec<_> = (0..count)
        .map(|number| with(event(device), &json!({"event_id": format!("run-{number}")})))
        .collect();
    client.post("/api/sync-events", &json!(batch)).await.data(200)["accepted"].take()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_server_has_acknowledged_is_found_by_every_command() {
    let program = program();
    let commands: [(&str, &[&str]); 5] = [
        ("verify", &["verify"]),
        ("export", &["export", "--format", "ndjson"]),
        ("backup", &["backup", "copy.db"]),
        ("copy", &["copy", "--from", "sqlite:data/pisync.db", "--to", "sqlite:other.db"]),
        ("down", &["migrate", "down", "--yes"]),
    ];
    // In how many rounds the kill came first; a second later it would have come too late.
    let (mut stored, mut left) = (0, 0);
    for (name, arguments) in commands {
        let serving = program.serve(&[]);
        report(&serving.client, name, 70).await;
        serving.signal("KILL");
        serving.wait();
        stored += 70;
        assert!(program.names_in("data").iter().any(|file| file.contains(".ingest-")), "{name}");
        left += usize::from(count(&program.path(DATABASE), "sync_events") < stored);
        let said = program.run(arguments);
        said.success();
        assert_eq!(count(&program.path(DATABASE), "sync_events"), stored, "{name}");
        assert!(!program.names_in("data").iter().any(|file| file.contains(".ingest-")), "{name}");
        match name {
            "export" => assert_eq!(said.success().lines().count(), 140),
            "backup" => assert_eq!(count(&program.path("copy.db"), "sync_events"), stored),
            "copy" => assert_eq!(count(&program.path("other.db"), "sync_events"), stored),
            _ => {}
        }
    }
    assert!(left > 0);
    let serving = program.serve(&[]);
    let stats = serving.client.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], stored);
    report(&serving.client, "stopped", 70).await;
    serving.stop();
    assert!(!program.names_in("data").iter().any(|file| file.contains(".ingest-")));
    assert_eq!(count(&program.path(DATABASE), "sync_events"), stored + 70);
    program.run(&["verify"]).success();
}

/// It has waited for the server, and does by itself what that would have done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_while_a_command_waits_for_it_is_not_waited_for() {
    let program = program().with_file("one.ndjson", &(event("imported").to_string() + "\n"));
    let commands: [&[&str]; 5] = [
        &["verify"],
        &["export", "--format", "ndjson"],
        &["backup", "copy.db"],
        &["key", "create", "--scope", "read"],
        &["import", "one.ndjson"],
    ];
    for (round, arguments) in (1..).zip(commands) {
        let serving = program.serve(&[]);
        serving.client.get("/api/stats").await.data(200);
        // So that the server cannot bring into the tables what it acknowledges.
        let lock = rusqlite::Connection::open(program.path(DATABASE)).unwrap();
        lock.execute_batch("begin immediate").unwrap();
        report(&serving.client, &format!("pi-{round}"), 7).await;
        let mut command = program.start(arguments);
        until(async || command.has_open("pisync.db-wal")).await;
        serving.signal("KILL");
        serving.wait();
        drop(lock);
        assert!(!command.has_ended(), "{arguments:?}");
        let ended = command.wait();
        assert_eq!(ended.code(), 0, "{ended:?}");
        let reported =
            "sync_events where device in (select id from devices where device_id like 'pi-%')";
        assert_eq!(count(&program.path(DATABASE), reported), round * 7, "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_beside_a_server_find_what_it_has_acknowledged() {
    let program = program();
    let serving = program.serve(&[]);
    let mut events = String::new();
    for round in 1..=3 {
        report(&serving.client, &format!("pi-{round}"), 20).await;
        let exported = program.run(&["export", "--format", "ndjson"]);
        assert_eq!(exported.success().lines().count(), round * 20);
        events = exported.success().to_owned();
    }
    // What the server has just taken in is not stored again by an import, nor the other way round.
    report(&serving.client, "pi-4", 20).await;
    let program = program.with_file("events.ndjson", &events);
    program.run(&["import", "events.ndjson"]).success();
    let lines: String = (0..10)
        .map(|number| {
            with(event("pi-5"), &json!({"event_id": format!("run-{number}")})).to_string() + "\n"
        })
        .collect();
    let program = program.with_file("more.ndjson", &lines);
    program.run(&["import", "more.ndjson"]).success();
    assert_eq!(report_some(&serving.client, "pi-5", 20).await, 10);
    let stats = serving.client.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], 5 * 20);
    serving.stop();
    program.run(&["verify"]).success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_database_does_not_go_on_with_anothers_journal() {
    let program = program();
    let serving = program.serve(&[]);
    report(&serving.client, "before", 5).await;
    program.run(&["backup", "copy.db"]).success();
    report(&serving.client, "after", 7).await;
    serving.signal("KILL");
    serving.wait();
    program.run(&["restore", "--force", "copy.db"]).success();
    let serving = program.serve(&[]);
    let stats = serving.client.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], 5);
    report(&serving.client, "then", 3).await;
    serving.signal("KILL");
    serving.wait();
    // What was replaced is whole.
    assert_eq!(count(&program.path("data/pisync.db.replaced"), "sync_events"), 12);
    // A copy by hand, without the journal: what is in that is not taken for the copy's.
    std::fs::copy(program.path("copy.db"), program.path(DATABASE)).unwrap();
    for log in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(program.path(&format!("{DATABASE}{log}")));
    }
    let serving = program.serve(&[]);
    let stats = serving.client.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], 5);
    serving.stop();
}

/// Another process may write for as long as it likes, within bounds: events are acknowledged meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_acknowledged_while_another_process_writes() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let other = rusqlite::Connection::open(server.database.file().unwrap()).unwrap();
    other.execute_batch("begin immediate").unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1_500) {
        let sent = Instant::now();
        server.store(&event("pi")).await;
        assert!(sent.elapsed() < Duration::from_millis(500), "{:?}", sent.elapsed());
    }
    other.execute_batch("rollback").unwrap();
    let stats = server.get("/api/stats").await.data(200);
    let history = server.get("/api/device/pi/sync-history?limit=1").await.data(200);
    assert!(stats["total_sync_events"].as_i64().unwrap() > 10);
    assert_eq!(stats["total_sync_events"], history["pagination"]["total_events"]);
}

/// What is in the journal alone is bounded: then it is 503, and goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_journal_does_not_grow_without_bounds() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let other = rusqlite::Connection::open(server.database.file().unwrap()).unwrap();
    other.execute_batch("begin immediate").unwrap();
    let batch: Vec<Value> = std::iter::repeat_n(event("pi"), 10_000).collect();
    let mut acknowledged = 0;
    let refused = loop {
        let answer = server.post("/api/sync-events", &json!(batch)).await;
        if answer.status == 503 {
            break answer;
        }
        acknowledged += answer.data(200)["accepted"].as_i64().unwrap();
    };
    assert_unavailable(&refused);
    assert!((65_536..=75_536).contains(&acknowledged), "{acknowledged}");
    // What is in the tables can be read.
    assert_eq!(server.get("/api/stats").await.data(200)["total_sync_events"], 0);
    other.execute_batch("rollback").unwrap();
    let began = Instant::now();
    while server.report(&event("pi")).await.status != 201 {
        assert!(began.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let stats = server.get("/api/stats").await.data(200);
    assert_eq!(stats["total_sync_events"], acknowledged + 1);
}

async fn ingest_writer(
    store: &dyn Store,
) -> (Box<dyn EventWriter>, UnboundedReceiver<Observations>) {
    let (tell, observations) = unbounded_channel();
    (store.ingest_writer(tell).await.unwrap(), observations)
}

fn named(event_id: &str, event: SyncEvent) -> SyncEvent {
    SyncEvent { event_id: Some(EventId::new(event_id).unwrap()), ..event }
}

/// An id is known whether its event is in the journal, in the tables, or in the same batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_id_is_known_wherever_the_event_is() {
    on_sqlite(async |fixture: &TestStore| {
        let (mut writer, mut observations) = ingest_writer(&*fixture.store).await;
        let batch = vec![
            named("1", failure("pi", at(0))),
            success("pi", at(1)),
            named("1", success("pi", at(2))),
            named("1", failure("other", at(3))),
        ];
        let first = write(&mut *writer, batch.clone()).await;
        assert_eq!(first.ids, [1, 2, 1, 3]);
        let duplicates = |written: &Written| -> Vec<_> {
            let of = |first: &Option<store::StoredEvent>| first.as_ref().unwrap().timestamp;
            written.duplicates.iter().map(|one| (one.position, of(&one.first))).collect()
        };
        assert_eq!(duplicates(&first), [(2, at(0))]);
        let known = [(0, at(0)), (2, at(0)), (3, at(3))];
        let again = write(&mut *writer, batch.clone()).await;
        assert_eq!((again.ids.as_slice(), duplicates(&again)), (&[1, 4, 1, 3][..], known.to_vec()));

        let query = HistoryQuery::newest(device_id("pi"), 10);
        let history = fixture.store.sync_history(&query).await.unwrap().unwrap();
        let ids: Vec<_> = history.events.iter().map(|event| event.id).collect();
        assert_eq!(ids, [4, 2, 1]);
        assert_eq!(history.figures.total_syncs, 3);
        let told = observations.recv().await.unwrap();
        assert_eq!(told.new_devices.len(), 2);

        let again = write(&mut *writer, batch.clone()).await;
        assert_eq!((again.ids.as_slice(), duplicates(&again)), (&[1, 5, 1, 3][..], known.to_vec()));
        // With its device, what it called its events is forgotten, wherever that was remembered.
        fixture.store.delete_device(&device_id("pi"), &somebody()).await.unwrap();
        let anew = write(&mut *writer, batch).await;
        assert_eq!(
            (anew.ids.as_slice(), duplicates(&anew)),
            (&[6, 7, 6, 3][..], vec![(2, at(0)), (3, at(3))])
        );
        writer.finish().await.unwrap();
        assert_right(&differences(&*fixture.store, false).await);
    })
    .await;
}

/// A server and another process give ids without meeting, and aggregation passes nothing that comes later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_another_process_come_in_between() {
    on_sqlite(async |fixture: &TestStore| {
        let server = &fixture.store;
        let _claim = store::claim(fixture.target()).unwrap();
        let (mut writer, _observations) = ingest_writer(&**server).await;
        let other = store::open(fixture.target()).await.unwrap();
        let mut others = other.event_writer();
        let mut ids = Vec::new();
        for round in 0..5 {
            for device in ["a", "b"] {
                let event = failure(device, at(-round * 4_000));
                ids.extend(write(&mut *writer, vec![event.clone()]).await.ids);
                ids.extend(write(&mut *others, vec![event]).await.ids);
                // The other's are there, and the server's own are not.
                while server.aggregate_events(now()).await.unwrap() {}
            }
        }
        let sums = server.window_figures(&Window::last_days(now(), 7)).await.unwrap();
        assert_eq!((sums.total_syncs, sums.failed_syncs), (20, 20));
        while server.aggregate_events(now()).await.unwrap() {}
        let sums = server.window_figures(&Window::last_days(now(), 7)).await.unwrap();
        assert_eq!(sums.total_syncs, 20);
        assert!(server.verify_hours().await.unwrap().is_empty());
        assert_right(&differences(&**server, false).await);
        let unfolded =
            "(select count(*) from sync_events, roll_up_state where sync_events.id > folded_id)";
        assert_eq!(fixture.database.number(unfolded).await, 0);
        let given = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), given);
        // Deleting and changing find what is in the journal alone.
        write(&mut *writer, vec![success("new", at(0))]).await;
        let change = store::DeviceChange {
            name: Some(Some("New".into())),
            ..store::DeviceChange::default()
        };
        assert!(server.update_device(&device_id("new"), &change, &somebody()).await.unwrap());
        write(&mut *writer, vec![success("newer", at(0))]).await;
        let deleted = server.delete_device(&device_id("newer"), &somebody()).await.unwrap();
        assert_eq!(deleted, Some(1));
    })
    .await;
}

/// Many at once, while somebody reads all the time: who has an answer finds the event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_an_answer_finds_the_event() {
    let server = Arc::new(TestServer::on_sqlite(|_| {}).await);
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..8 {
        let server = Arc::clone(&server);
        clients.spawn(async move {
            let device = format!("pi-{client}");
            for sent in 1..=40 {
                server.store(&event(&device)).await;
                let path = format!("/api/device/{device}");
                let found = server.get(&path).await.data(200);
                assert_eq!(found["total_syncs"], sent);
            }
        });
    }
    clients.join_all().await;
}
