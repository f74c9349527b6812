//! Killed for as long as one likes, with everything beside it that may run beside a server: imports, which are killed
//! too, backups, verify, rows of other programs, keys, deleted devices, retention, and the version before. What was
//! acknowledged is stored exactly once.
//!
//! Every tenth round goes back to the schema of an earlier version, and this version brings it up to date again.
//!
//! `PISYNC_KILL_SECONDS` is how long (default: 45 for each store). `PISYNC_PREVIOUS` names a program of that earlier
//! version, which is then killed on its schema, too. See CONTRIBUTING.md.

use std::{
    collections::{BTreeMap, BTreeSet},
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

const DEFAULT_SECONDS: u64 = 45;

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
    done: Done,
}

/// What has been done beside the server so far.
#[derive(Default)]
struct Done {
    imports_begun: usize,
    foreign_rows: i64,
    /// Keys by their numbers, and whether they have been revoked.
    keys: BTreeMap<i64, bool>,
    backups: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Import(usize),
    Backup,
    Verify,
    CreateKey,
    RevokeKey(i64),
}

impl<'a> Beside<'a> {
    fn new(program: &'a Program, database: &'a TestDatabase, done: Done) -> Self {
        Self { program, database, running: Vec::new(), imports: BTreeSet::new(), done }
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
        let import = self.imports.first().copied().unwrap_or(self.done.imports_begun);
        self.start(Side::Import(import));
        match round % 4 {
            0 => self.start(Side::Verify),
            1 if self.database.file().is_some() => self.start(Side::Backup),
            2 => self.start(Side::CreateKey),
            // Of every two keys one stays.
            _ => {
                let mut unrevoked = self.done.keys.iter().filter(|(_, is_revoked)| !**is_revoked);
                if let (Some((&id, _)), Some(_)) = (unrevoked.next(), unrevoked.next()) {
                    self.start(Side::RevokeKey(id));
                }
            }
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
                if number == self.done.imports_begun {
                    self.done.imports_begun += 1;
                    self.imports.insert(number);
                    std::fs::write(self.program.path(&name), import_file(number)).unwrap();
                }
                self.program.start(&["import", &name])
            }
            Side::Backup => self.program.start(&["backup", "--force", "backup.db"]),
            Side::Verify => self.program.start(&["verify"]),
            Side::CreateKey => self.program.start(&["key", "create", "--scope", "read"]),
            Side::RevokeKey(id) => self.program.start(&["key", "revoke", &id.to_string()]),
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
            Side::CreateKey if ended.status.success() => {
                let mut words = ended.stderr.split("made key ").nth(1).unwrap().split_whitespace();
                let id = words.next().unwrap().parse().unwrap();
                self.done.keys.insert(id, false);
            }
            Side::RevokeKey(id) if ended.status.success() => {
                self.done.keys.insert(id, true);
            }
            Side::CreateKey | Side::RevokeKey(_) => {}
            Side::Backup => self.done.backups += usize::from(ended.status.success()),
        }
    }

    /// Lets everything end, imports what was interrupted, and tells what has been done.
    fn finish(mut self) -> Done {
        for (side, command) in std::mem::take(&mut self.running) {
            self.ended(side, command);
        }
        for number in std::mem::take(&mut self.imports) {
            let ended = self.program.run(&["import", &format!("import-{number}.ndjson")]);
            assert!(ended.status.success(), "{ended:?}");
        }
        self.done
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
        self.done.foreign_rows += 1;
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

/// Goes back to the schema of the version before this one.
async fn go_back(program: &Program, database: &TestDatabase) {
    let later =
        format!("(select count(*) from pisync_migrations where name > '{PREVIOUS_SCHEMA}')");
    let later = database.number(&later).await.to_string();
    program.run(&["migrate", "down", &later, "--yes"]).success();
}

/// Has the version before this one killed, on its own schema.
async fn with_the_version_before(
    program: &mut Program,
    previous: &str,
    reporters: Vec<Reporter>,
) -> Vec<Reporter> {
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
    let (mut round, mut done, mut deleted) = (0, Done::default(), Vec::new());
    while Instant::now() < until {
        let mut beside = Beside::new(program, database, done);
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
        done = beside.finish();
        go_back(program, database).await;
        if let Some(previous) = &previous {
            reporters = with_the_version_before(program, previous, reporters).await;
        }
    }

    let serving = program.serve_as_supervised();
    let client = &serving.client;
    let reporters = all_report(reporters, client, 40).await;
    let reporters = finish(reporters, client).await;
    let reported = assert_reported(client, &reporters).await;
    let Done { imports_begun, foreign_rows, keys, backups } = done;
    for number in 0..imports_begun {
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
    let listed = program.run(&["key", "list"]);
    let states: BTreeMap<i64, bool> = listed
        .success()
        .lines()
        .skip(1)
        .map(|line| {
            let id = line.split_whitespace().next().unwrap();
            (id.parse().unwrap(), line.contains(" revoked "))
        })
        .collect();
    for (id, is_revoked) in &keys {
        // One that was being revoked when its command was cut off may have been.
        assert!(states.get(id) >= Some(is_revoked), "key {id}: {listed:?}");
    }
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
    let revoked = keys.values().filter(|is_revoked| **is_revoked).count();
    assert!(round >= 10 && revoked > 0 && !deleted.is_empty() && reported > round * 5);
    eprintln!(
        "{round} kills: {reported} reports, {imports_begun} imports of {IMPORTED}, {foreign_rows} rows of others, {} keys, {revoked} of them revoked, {} deletions, {backups} backups",
        keys.len(),
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
