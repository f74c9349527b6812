//! Killed for as long as one likes, with everything beside it that may run beside a server: imports, which are killed
//! too, backups, verify, rows of other programs, keys, deleted devices, retention, and the version before. What was
//! acknowledged is stored exactly once.
//!
//! `PISYNC_KILL_SECONDS` is how long (default: 120 for each store). `PISYNC_PREVIOUS` names a program of an earlier
//! version: every tenth round then goes back to that version's schema, has that program killed, and goes on with
//! this one. See CONTRIBUTING.md.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    crash::{CLIENTS, Reporter, all_report, assert_reported, finish, moment},
    support::{
        events::at,
        http::{Client, event, try_send, with},
        program::{Installed, Program, Running, Serving},
        store::{Fixture, TestDatabase},
    },
};

both_stores!(everything_beside_a_server_that_is_killed);

const DEFAULT_SECONDS: u64 = 120;

/// The last migration of the version whose program `PISYNC_PREVIOUS` names.
const PREVIOUS_SCHEMA: &str = "2026-11-23-06-failed-events";

/// Records in each imported file.
const IMPORTED: usize = 1_500;

/// What runs beside the server, and what is known to be stored by it.
struct Beside<'a> {
    program: &'a Program,
    database: &'a TestDatabase,
    running: Vec<(Side, Running)>,
    /// Imports that have begun and not ended well.
    imports: BTreeSet<usize>,
    imports_begun: usize,
    foreign_rows: i64,
    keys: usize,
    backups: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Import(usize),
    Backup,
    Verify,
    Key,
}

impl<'a> Beside<'a> {
    fn new(program: &'a Program, database: &'a TestDatabase) -> Self {
        Self {
            program,
            database,
            running: Vec::new(),
            imports: BTreeSet::new(),
            imports_begun: 0,
            foreign_rows: 0,
            keys: 0,
            backups: 0,
        }
    }

    /// Sees what has ended, and starts the next of each kind.
    fn go_on(&mut self, round: usize) {
        for (side, mut command) in std::mem::take(&mut self.running) {
            if round.is_multiple_of(3) && matches!(side, Side::Import(_)) {
                command.kill();
            }
            if command.has_ended() {
                self.ended(side, command);
            } else {
                self.running.push((side, command));
            }
        }
        let import = self.imports.first().copied().unwrap_or(self.imports_begun);
        self.start(Side::Import(import));
        match round % 4 {
            0 => self.start(Side::Verify),
            1 if self.database.file().is_some() => self.start(Side::Backup),
            2 => self.start(Side::Key),
            _ => {}
        }
    }

    fn start(&mut self, side: Side) {
        let same = |other: &Side| std::mem::discriminant(other) == std::mem::discriminant(&side);
        if self.running.iter().any(|(other, _)| same(other)) {
            return;
        }
        let command = match side {
            Side::Import(number) => {
                let name = format!("import-{number}.ndjson");
                if number == self.imports_begun {
                    self.imports_begun += 1;
                    self.imports.insert(number);
                    std::fs::write(self.program.path(&name), import_file(number)).unwrap();
                }
                self.program.start(&["import", &name])
            }
            Side::Backup => self.program.start(&["backup", "--force", "backup.db"]),
            Side::Verify => self.program.start(&["verify"]),
            Side::Key => self.program.start(&["key", "create", "--scope", "read"]),
        };
        self.running.push((side, command));
    }

    fn ended(&mut self, side: Side, command: Running) {
        let ended = command.wait();
        match side {
            // It may have been killed, or the database was briefly another's.
            Side::Import(number) => {
                if ended.status.success() {
                    self.imports.remove(&number);
                }
            }
            // Rows of other programs count after a repair.
            Side::Verify => {}
            Side::Key => self.keys += usize::from(ended.status.success()),
            Side::Backup => self.backups += usize::from(ended.status.success()),
        }
    }

    /// Lets everything end, and imports what was interrupted.
    fn finish(&mut self) {
        for (side, command) in std::mem::take(&mut self.running) {
            self.ended(side, command);
        }
        for number in std::mem::take(&mut self.imports) {
            let ended = self.program.run(&["import", &format!("import-{number}.ndjson")]);
            assert!(ended.status.success(), "{ended:?}");
        }
    }

    /// A row that another program inserts.
    async fn insert_foreign_row(&mut self) {
        let insert = if self.database.file().is_some() {
            "insert into devices (device_id, created_at) values ('foreign', unixepoch() * 1000)
                 on conflict do nothing;
             insert into sync_events (device, timestamp, total_files_synced, total_errors, created_at)
             select id, unixepoch() * 1000, 1, 0, unixepoch() * 1000 from devices where device_id = 'foreign'"
        } else {
            "insert into devices (device_id) values ('foreign') on conflict do nothing;
             insert into sync_events (device_id, timestamp, total_files_synced) values ('foreign', now(), 1)"
        };
        self.database.execute(insert).await;
        self.foreign_rows += 1;
    }
}

/// Events of one device, most of them received now, some so long ago that retention drops them at once.
fn import_file(number: usize) -> String {
    let line = |record: usize| -> String {
        let device = if record.is_multiple_of(50) {
            "long-ago".to_owned()
        } else {
            format!("imported-{number}")
        };
        let mut event = with(
            event(&device),
            &json!({"event_id": format!("{number}-{record}"), "timestamp": at(-100 * 86_400)}),
        );
        if record.is_multiple_of(50) {
            event["created_at"] = json!(at(-100 * 86_400 + 60));
        }
        event.to_string() + "\n"
    };
    (0..IMPORTED).map(line).collect()
}

/// A device that reports and is then deleted: whether that was acknowledged.
async fn report_and_delete(client: &Client, device: &str) -> bool {
    for _ in 0..3 {
        let request = client.request(reqwest::Method::POST, "/api/sync-event");
        if try_send(request.json(&event(device))).await.is_err() {
            return false;
        }
    }
    let delete = client.request(reqwest::Method::DELETE, &format!("/api/device/{device}"));
    try_send(delete).await.is_ok_and(|answer| answer.status == 200)
}

/// Has the version before this one killed, on its own schema.
async fn with_the_version_before(
    program: &mut Program,
    previous: &str,
    database: &TestDatabase,
    reporters: Vec<Reporter>,
) -> Vec<Reporter> {
    let later =
        format!("(select count(*) from pisync_migrations where name > '{PREVIOUS_SCHEMA}')");
    let later = database.number(&later).await.to_string();
    program.run(&["migrate", "down", &later, "--yes"]).success();
    program.set_binary(Some(previous));
    let serving = program.serve(&[]);
    let reporters = report_until_killed(serving, reporters, Duration::from_millis(700)).await;
    program.set_binary(None);
    reporters
}

async fn report_until_killed(
    serving: Serving,
    reporters: Vec<Reporter>,
    after: Duration,
) -> Vec<Reporter> {
    let client = serving.client.clone();
    let reporting = tokio::spawn(async move { all_report(reporters, &client, usize::MAX).await });
    tokio::time::sleep(after).await;
    serving.signal("KILL");
    serving.wait();
    reporting.await.unwrap()
}

async fn everything_beside_a_server_that_is_killed(installed: &KilledProgram) {
    let KilledProgram(installed) = installed;
    let seconds = std::env::var("PISYNC_KILL_SECONDS")
        .map_or(DEFAULT_SECONDS, |seconds| seconds.parse().expect("PISYNC_KILL_SECONDS"));
    let previous = std::env::var("PISYNC_PREVIOUS").ok();
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut program = installed.lock().await;
    let Installed { program, database } = &mut *program;
    let mut reporters: Vec<_> = (0..CLIENTS).map(Reporter::new).collect();
    let (mut round, mut foreign_rows, mut imported, mut keys, mut backups) = (0, 0, 0, 0, 0);
    let mut deleted = Vec::new();
    while Instant::now() < until {
        let mut beside = Beside::new(program, database);
        beside.imports_begun = imported;
        for _ in 0..10 {
            round += 1;
            if round > 1 {
                beside.insert_foreign_row().await;
            }
            let serving = program.serve_as_supervised();
            beside.go_on(round);
            let client = serving.client.clone();
            let doomed = format!("doomed-{round}");
            let deleting = tokio::spawn({
                let (client, doomed) = (client.clone(), doomed.clone());
                async move { report_and_delete(&client, &doomed).await }
            });
            beside.insert_foreign_row().await;
            let after = moment(round) * if round.is_multiple_of(5) { 8 } else { 1 };
            reporters = report_until_killed(serving, reporters, after).await;
            if deleting.await.unwrap() {
                deleted.push(doomed);
            }
        }
        beside.finish();
        (imported, keys) = (beside.imports_begun, keys + beside.keys);
        (foreign_rows, backups) = (foreign_rows + beside.foreign_rows, backups + beside.backups);
        if let Some(previous) = &previous {
            reporters = with_the_version_before(program, previous, database, reporters).await;
        }
    }

    let serving = program.serve_as_supervised();
    let client = &serving.client;
    let reporters = all_report(reporters, client, 40).await;
    let reporters = finish(reporters, client).await;
    let reported = assert_reported(client, &reporters).await;
    for number in 0..imported {
        let device = client.get(&format!("/api/device/imported-{number}")).await.data(200);
        assert_eq!(device["total_syncs"], IMPORTED - IMPORTED.div_ceil(50), "import {number}");
    }
    for device in &deleted {
        client.get(&format!("/api/device/{device}")).await.error(404);
    }
    let key = if database.file().is_some() {
        "device = (select id from devices where device_id = 'foreign')"
    } else {
        "device_id = 'foreign'"
    };
    let foreign = format!("(select count(*) from sync_events where {key})");
    assert_eq!(database.number(&foreign).await, foreign_rows);
    serving.stop();
    let listed = program
        .run(&["key", "list"])
        .success()
        .lines()
        .filter(|line| line.contains("psk_"))
        .count();
    assert!(listed >= keys, "{listed} of {keys} keys");
    program.run(&["verify", "--repair"]);
    // Rows of other programs cannot be counted again once retention has dropped a month.
    let verified = program.run(&["verify"]);
    for line in verified.stdout.lines() {
        let is_right = line.starts_with("foreign: ") || line.contains("days: 0, hours: 0");
        assert!(is_right, "{verified:?}");
    }
    if let Some(file) = database.file() {
        assert!(backups > 0);
        for file in [file, program.path("backup.db")] {
            let connection = rusqlite::Connection::open(file).unwrap();
            let check = |pragma| connection.query_row(pragma, [], |row| row.get::<_, String>(0));
            assert_eq!(check("pragma integrity_check").unwrap(), "ok");
        }
    }
    assert!(round >= 10 && keys > 0 && !deleted.is_empty() && reported > round * 5);
    eprintln!(
        "{round} kills: {reported} reports, {imported} imports of {IMPORTED}, {foreign_rows} rows of others, {keys} keys, {} deletions, {backups} backups",
        deleted.len()
    );
}

/// A program with retention, which is changed as versions change.
struct KilledProgram(tokio::sync::Mutex<Installed>);

impl Fixture for KilledProgram {
    async fn prepare(database: TestDatabase) -> Self {
        let Installed { program, database } = Installed::prepare(database).await;
        let program = program.with("RETENTION_DAYS", 30);
        Self(tokio::sync::Mutex::new(Installed { program, database }))
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_inner().into_database()
    }
}
