//! `pisync export`: what it writes, `import` reads back, on either store and from one to the other.

use std::sync::Arc;

use pisync::store::{self, Batch, DeviceChange, Freshness, Target, Window};
use pisync_core::{Arrival, EventId, Mbps, Metadata, SyncDuration, SyncEvent};

use crate::support::{
    events::{at, device_id, failure, group_name, now, of_job, somebody, success},
    program::{Installed, url, without_expected_warnings},
    store::{TestDatabase, assert_right, differences},
};

both_stores!(
    what_is_exported_can_be_imported,
    only_what_is_asked_for,
    a_reader_that_has_seen_enough,
    a_file_is_there_when_it_is_whole,
);

const DAY: i64 = 24 * 60 * 60;

/// Events with everything that may go wrong on the way.
fn odd_events() -> Vec<SyncEvent> {
    let metadata = [
        r#"{"tool":"rsync","note":"a \"quoted\" word, and a comma"}"#,
        "{\"lines\": \"one\\ntwo\",\r\n \"deep\": [[{}]], \"number\": 1.50}",
        "{}",
    ];
    let devices =
        ["pi", "pi, the \"second\"", "ünïcødé 🥧\u{2028}", "'=1+1", " spaced ", "a/b?c#d%20"];
    let mut events = Vec::new();
    for (number, device) in (0..).zip(devices) {
        for day in 0..9 {
            // Many at the same instant: their order is that of their arrival.
            let timestamp = at(-(day / 3) * 20 * DAY);
            let event =
                if day % 4 == 0 { success(device, timestamp) } else { failure(device, timestamp) };
            let event = match day % 3 {
                0 => event,
                1 => of_job("nightly, \"full\"", event),
                _ => of_job("störung", event),
            };
            events.push(SyncEvent {
                event_id: (day % 2 == 0)
                    .then(|| EventId::new(&format!("run {day}, \"x\"")).unwrap()),
                total_files_synced: if day == 5 { 2_147_483_647 } else { number },
                internet_speed: (day % 2 == 1).then(|| {
                    Mbps::from_hundredths([1, 100, 4_567, 9_999_999_999][day as usize % 4]).unwrap()
                }),
                duration: (day % 3 == 1).then(|| {
                    SyncDuration::from_milliseconds([0, 1_234, 31_536_000_000][number as usize % 3])
                        .unwrap()
                }),
                bytes_synced: (day % 4 == 2).then_some((1 << 53) - 1),
                metadata: (day % 3 == 2)
                    .then(|| Metadata::new(metadata[number as usize % 3]).unwrap()),
                ..event
            });
        }
    }
    events.push(unsynced());
    events
}

/// The event of a device that does not trust its clock, whose date has made its metadata longer than it may
/// be sent.
fn unsynced() -> SyncEvent {
    let received = at(-40 * DAY);
    let filler = "x".repeat(4_096 - r#"{"a":""}"#.len());
    let text = format!(
        r#"{{"device_id":"unsynced","timestamp":"1970-01-01","clock":"unsynced","total_files_synced":1,"total_errors":0,"metadata":{{"a":"{filler}"}}}}"#
    );
    SyncEvent::from_json(text.as_bytes(), Arrival { received, latest: received }).unwrap()
}

/// Fills a database with them, received at several times.
async fn fill(database: &TestDatabase) {
    database.migrate().await;
    let store = store::open(&database.target).await.unwrap();
    let events = odd_events();
    let received_at: Vec<_> = (0..)
        .zip(&events)
        .map(|(number, event)| event.timestamp.saturating_add_milliseconds(number * 1_001))
        .collect();
    let batch = Batch { received_at, ..Batch::new(at(DAY), events) };
    store.event_writer().write(&Arc::new(batch)).await.unwrap();
    store.close().await.unwrap();
}

/// Everything about a database that its events tell.
async fn told(target: &Target) -> String {
    let store = store::open(target).await.unwrap();
    assert_right(&differences(&*store, false).await);
    let mut text = String::new();
    for device_id in store.device_ids(None, None).await.unwrap() {
        let device = store.device(&device_id).await.unwrap().unwrap();
        text += &format!("{:?} {:?}\n{:#?}\n", device_id, device.device.created_at, device.jobs);
        let query = store::HistoryQuery::newest(device_id, 1_000);
        for event in store.sync_history(&query).await.unwrap().unwrap().events {
            // Ids are each database's own, and white space in metadata is nobody's.
            let metadata =
                event.metadata.map(|raw| raw.get().parse::<serde_json::Value>().unwrap());
            text += &format!("{:?}\n", store::StoredEvent { id: 0, metadata: None, ..event });
            text += &format!("{metadata:?}\n");
        }
    }
    let stats = store.fleet_stats(at(-DAY), 10, Freshness::Everything).await.unwrap();
    text += &format!("{} {} {:?}\n", stats.total_devices, stats.active_devices, stats.figures);
    for window in [Window::last_24_hours(now()), Window::last_days(now(), 30)] {
        text += &format!("{:?}\n", store.window_figures(&window).await.unwrap());
    }
    text
}

async fn what_is_exported_can_be_imported(installed: &Installed) {
    let Installed { program, database } = installed;
    fill(database).await;
    let expected = told(&database.target).await;
    for (name, to_postgres) in [
        ("a.ndjson", installed.is_postgres()),
        ("a.csv", installed.is_postgres()),
        ("b.csv.gz", !installed.is_postgres()),
        ("b.ndjson.zst", !installed.is_postgres()),
    ] {
        let ended = program.run(&["export", "--output", name]);
        assert_eq!(ended.success(), format!("exported 55 events to {name}\n"));
        let other =
            if to_postgres { TestDatabase::postgres().await } else { TestDatabase::sqlite() };
        other.migrate().await;
        program.run(&["import", name, "--database-url", &url(&other.target)]).success();
        assert_eq!(told(&other.target).await, expected, "{name}");
        other.remove().await;
    }
    // And what is on standard output is the same.
    let lines = std::fs::read_to_string(program.path("a.ndjson")).unwrap();
    assert_eq!(program.run(&["export"]).success(), lines);
    assert_eq!(lines.lines().count(), 55);
}

async fn only_what_is_asked_for(installed: &Installed) {
    let Installed { program, database } = installed;
    fill(database).await;
    let store = store::open(&database.target).await.unwrap();
    for device in ["pi", "a/b?c#d%20"] {
        let change =
            DeviceChange { group: Some(Some(group_name("school"))), ..DeviceChange::default() };
        store.update_device(&device_id(device), &change, &somebody()).await.unwrap();
    }
    store.close().await.unwrap();
    let count = |arguments: &[&str]| {
        let arguments = [&["export"], arguments].concat();
        program.run(&arguments).success().lines().count()
    };
    assert_eq!(count(&["--device", "pi"]), 9);
    assert_eq!(count(&["--group", "school"]), 18);
    let (day, second) = (at(-20 * DAY).to_string(), at(-20 * DAY + 1).to_string());
    assert_eq!(count(&["--from", &day]), 36);
    assert_eq!(count(&["--from", &second]), 18);
    assert_eq!(count(&["--until", &day]), 37);
    assert_eq!(count(&["--from", &day, "--until", &day, "--device", "pi"]), 3);
    assert_eq!(count(&["--from", "2030-01-01", "--format", "csv"]), 1, "the heading");
    for (arguments, expected) in [
        (["--device", "nobody"], "there is no device nobody"),
        (["--group", "nobody"], "no device is in the group nobody"),
    ] {
        let arguments = [&["export"][..], &arguments].concat();
        assert_eq!(program.run(&arguments).failure(), expected);
    }
    let nameless = program.run(&["export", "--device", ""]);
    assert_eq!(nameless.wrong_usage(), "--device is not allowed to be empty");
    let both = program.run(&["export", "--device", "pi", "--group", "school"]);
    assert_eq!(both.code(), 2, "{both:?}");
    assert_eq!(program.run(&["export", "--from", "soon"]).code(), 2);
}

async fn a_reader_that_has_seen_enough(installed: &Installed) {
    let Installed { program, database } = installed;
    database.migrate().await;
    let store = store::open(&database.target).await.unwrap();
    let mut writer = store.event_writer();
    // More than fits into a pipe.
    let events: Vec<_> = (0..5_000).map(|number| success("pi", at(-number))).collect();
    writer.write(&Arc::new(Batch::new(now(), events))).await.unwrap();
    store.close().await.unwrap();
    let command =
        format!("{} export | head -1; echo ${{PIPESTATUS[0]}}", env!("CARGO_BIN_EXE_pisync"));
    let output = std::process::Command::new("bash")
        .args(["-c", &command])
        .env("DATABASE_URL", url(&database.target))
        .current_dir(program.path(""))
        .output()
        .unwrap();
    assert_eq!(without_expected_warnings(&String::from_utf8(output.stderr).unwrap()), "");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.ends_with("}\n0\n"), "{said}");
}

async fn a_file_is_there_when_it_is_whole(installed: &Installed) {
    let Installed { program, database } = installed;
    // A database that is not there is not made.
    let ended = program.run(&["export", "--output", "x"]);
    let expected =
        if installed.is_postgres() { "has pending migrations" } else { "no database at" };
    assert!(ended.failure().contains(expected), "{ended:?}");
    fill(database).await;
    std::fs::write(program.path("x"), "before").unwrap();
    assert_eq!(program.run(&["export", "--device", "nobody", "--output", "x"]).code(), 1);
    assert_eq!(std::fs::read_to_string(program.path("x")).unwrap(), "before");
    program.run(&["export", "--output", "x"]).success();
    assert_ne!(std::fs::read_to_string(program.path("x")).unwrap(), "before");
    assert_eq!(program.names_in("."), ["x"]);
    for (path, expected) in [(".", "it is a directory"), ("none/x", "No such file or directory")] {
        let ended = program.run(&["export", "--output", path]);
        assert!(ended.failure().contains(expected), "{ended:?}");
    }
}
