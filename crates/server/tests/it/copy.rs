//! `pisync copy`: in every direction everything is there, and goes on as if nothing had happened; else there
//! is nothing.

use std::{collections::BTreeSet, fs, sync::Arc};

use pisync::store::{
    self, Copied, CopyError, CopyProgress, DeviceChange, DeviceQuery, DeviceSort, EventWriter,
    FailureQuery, Freshness, HistoryQuery, LevelChange, NewWindow, PauseChange, Scope, Store,
    Target, Window, WindowEffect, WindowScope,
};
use pisync_core::{
    EventId, Mbps, Metadata, SyncDuration, SyncEvent, Timestamp,
    health::{WindowTimes, time_zone},
};
use serde_json::json;
use tokio::sync::Notify;

use crate::{
    ingest::{Reporters, stored_ids},
    support::{
        events::{
            at, batch_at, device_id, failure, group_name, now, of_job, somebody, success, write_at,
        },
        http::{event, with},
        postgres::connect,
        program::{Installed, Program, url},
        small_disk::SmallDisk,
        store::{TestDatabase, TestStore, assert_right, differences, key_request, on_sqlite},
    },
};

both_stores!(
    everything_is_there_and_goes_on,
    a_newer_schema_is_copied_whole,
    an_interrupted_copy_leaves_nothing,
    what_is_not_ours_is_named,
    a_served_source_is_copied_as_of_one_moment,
    a_destination_in_use_is_left_alone,
    a_destination_with_something_in_it_is_left_alone,
);

const HOUR: i64 = 60 * 60;
const DAY: i64 = 24 * HOUR;

/// A database of each store with nothing in it.
async fn destinations() -> [TestDatabase; 2] {
    [TestDatabase::sqlite(), TestDatabase::postgres().await]
}

async fn copy(from: &Target, to: &Target, now: Timestamp) -> Result<Copied, CopyError> {
    store::copy(from, to, now, &mut |_| {}).await
}

/// Everything that an event can have.
fn full_event(device: &str, second: i64) -> SyncEvent {
    SyncEvent {
        event_id: Some(EventId::new(&format!("event{second}")).unwrap()),
        total_errors: u32::try_from(second.rem_euclid(3)).unwrap(),
        internet_speed: Mbps::from_hundredths(second.rem_euclid(9_999_999_999)),
        duration: SyncDuration::from_milliseconds(second.rem_euclid(31_536_000_000)),
        bytes_synced: Some(9_007_199_254_740_991),
        metadata: Metadata::new(r#"{"text": "ä€😀", "list": [1.50]}"#).ok(),
        ..of_job("nightly", success(device, at(second)))
    }
}

/// Devices with names and groups, events of several months, some aggregated and some not, keys.
async fn fill(fixture: &TestStore) {
    let mut writer = fixture.writer();
    for days in [70, 40, 3, 0] {
        let mut events: Vec<_> = (0..60)
            .map(|number| failure(&format!("pi-{}", number % 7), at(-days * DAY - number * HOUR)))
            .collect();
        events.push(success("pi-3", at(-days * DAY - 30 * HOUR)));
        events.push(full_event("pi-full", -days * DAY - 1));
        write_at(&mut *writer, at(-days * DAY), events).await;
    }
    // As far as it is final an hour ago.
    while fixture.store.aggregate_events(at(-HOUR)).await.unwrap() {
        tokio::task::yield_now().await;
    }
    let late = (0..40).map(|number| failure("pi-late", at(-number * 5 * HOUR))).collect();
    write_at(&mut *writer, at(-90), late).await;
    // Received while the clock was ahead.
    write_at(&mut *writer, at(DAY), vec![failure("pi-ahead", at(-2)), success("pi-1", at(60))])
        .await;
    let change = DeviceChange {
        name: Some(Some("Library".to_owned())),
        group: Some(Some(group_name("school"))),
        ..DeviceChange::default()
    };
    fixture.store.update_device(&device_id("pi-1"), &change, &somebody()).await.unwrap();
    // One that has not reported.
    let registered = match fixture.is_postgres() {
        true => {
            "(device_id, \"group\", created_at, updated_at)
             values ('pi-new', 'school', '2026-11-22 11:59:55+00', '2026-11-22 11:59:55+00')"
        }
        false => "(device_id, \"group\", created_at) values ('pi-new', 'school', 1795348795000)",
    };
    fixture.database.execute(&format!("insert into devices {registered}")).await;
    fixture.store.delete_device(&device_id("pi-6"), &somebody()).await.unwrap();
    fill_health(fixture).await;
    let (number, _) = fixture.database.make_key(key_request(Scope::Read)).await;
    fixture.database.make_key(key_request(Scope::Admin)).await;
    fixture.store.keys_used(&[(number, at(5))]).await.unwrap();
    fixture.store.revoke_key(number, &somebody()).await.unwrap();
    let (bytes, finished) = match fixture.is_postgres() {
        true => (r"'\x0100ff'", "true"),
        false => ("x'0100ff'", "1"),
    };
    let received =
        if fixture.is_postgres() { "'2026-01-01 00:00:01.5+00'" } else { "1767225601500" };
    let import = format!(
        "insert into imports (id, name, head, records, digest, rejected, finished, updated_at)
         values ({bytes}, 'events.csv', {bytes}, 7, {bytes}, 2, {finished}, {received})"
    );
    fixture.database.execute(&import).await;
    let since = match fixture.is_postgres() {
        true => "raw_since = '2025-01-01 00:00+00', streaks_since = '2025-01-01 00:05+00'",
        false => "raw_since = 1735689600000, streaks_since = 1735689900000",
    };
    fixture.database.execute(&format!("update roll_up_state set {since}")).await;
}

/// What people have set, and what a sweep has made of it.
async fn fill_health(fixture: &TestStore) {
    let change = DeviceChange {
        tags: Some(vec!["indoor".to_owned(), "wall".to_owned()]),
        note: Some(Some("behind the door".to_owned())),
        pause: Some(PauseChange::Until(None)),
        expected: Some(Some(true)),
        ..DeviceChange::default()
    };
    fixture.store.put_device(&device_id("pi-1"), &change, &somebody()).await.unwrap();
    let change =
        LevelChange { pause: Some(PauseChange::Until(Some(at(DAY)))), ..LevelChange::default() };
    fixture.store.update_group(&group_name("school"), &change, true, &somebody()).await.unwrap();
    fixture.store.update_fleet(&change, &somebody()).await.unwrap();
    let holidays = NewWindow {
        name: "holidays".to_owned(),
        scope: WindowScope::Tag("indoor".to_owned()),
        effect: WindowEffect::Closed,
        timezone: "UTC".to_owned(),
        times: WindowTimes {
            zone: time_zone("UTC").unwrap(),
            from: Some(at(0)),
            until: Some(at(DAY)),
            weekly: None,
        },
    };
    assert!(fixture.store.create_window(&holidays, &somebody()).await.unwrap().is_some());
    let (device, time, yes, no, bytes) = match fixture.is_postgres() {
        true => ("'pi-1'", "timestamptz '2026-11-22 11:00+00'", "true", "false", r"'\x00ff'"),
        false => (
            "(select id from devices where device_id = 'pi-1')",
            "1795345200000",
            "1",
            "0",
            "x'00ff'",
        ),
    };
    let states = match fixture.is_postgres() {
        true => format!("{device}, 5, 1795345200000"),
        false => format!("{device}, 'pi-1', 5, {time}"),
    };
    let incident = "(select max(id) from incidents)";
    let rows = format!(
        r#"
        insert into outages values ({time}, {time}, 'stopped', 'node-1');
        insert into device_health values
            ({device}, 'school', 'paused', {time}, '[]', {no}, {yes}, {no}, 5400000, 1800000, {time}, {time}, {time}, 3,
             4, {time}, {time}, {time}, 1);
        insert into unreconciled_devices values ('school', {device}, 'paused');
        insert into device_states values ({states});
        insert into job_health values
            ({device}, 'nightly', {yes}, 'failing', 'failures', {time}, {time}, {time}, {time}, 3, 4);
        insert into group_states values ('school', 'paused', 1, 0);
        insert into state_changes (at, device_id, "from", "to", reason) values ({time}, 'pi-1', 'ok', 'paused', null);
        insert into run_starts values ({device}, 'nightly', 'run-6', {time}, {time}, {time});
        insert into incidents (scope, subject, "group", kind, severity, since, opened_at, resolved_at, resolution)
        values ('device', 'pi-1', 'school', 'failing', 'warning', {time}, {time}, {time}, 'paused');
        insert into incident_members values ({incident}, 'pi-1', '[]', {time}, {time}, {yes});
        insert into incident_entries values ({incident}, 7, {time}, 'opened', 'key 3', '{{}}');
        insert into channels (name, kind, config, secrets, is_enabled, is_default, template, created_at, failures,
                              failing_since, last_error, next_send_at, lease, leased_until)
        values ('ops', 'webhook', '{{}}', {bytes}, {yes}, {no}, 'hello', {time}, 2, {time}, 'away', {time}, 'a', {time});
        insert into routes values (1, '{{}}');
        update notify_state set version = 7;
        insert into notifications (channel, kind, "group", state, created_at, due_at, frozen_at, content_type, body, plain,
                                   attempts, refusals, last_attempt_at, last_error, ended_at)
        values ((select max(id) from channels), 'incidents', 'school', 'failed', {time}, {time}, {time}, 'text/plain',
                {bytes}, {bytes}, 3, 3, {time}, '400', {time});
        insert into notification_items values ((select max(id) from notifications), {incident}, 'opened', {time});
        "#
    );
    fixture.database.execute(&rows).await;
}

/// All that can be seen of a store, but for the order of the audit log's lines among themselves.
async fn seen(store: &dyn Store) -> Vec<String> {
    let query = DeviceQuery {
        search: None,
        group: None,
        tag: None,
        states: Vec::new(),
        is_overdue: false,
        sort: DeviceSort::DeviceId,
        descending: false,
        limit: 100,
        offset: 0,
        after: None,
    };
    let mut seen = Vec::new();
    let devices = store.devices(&query).await.unwrap();
    for device in &devices.items {
        let id = device_id(&device.device_id);
        seen.push(format!("{:?}", store.device(&id).await.unwrap()));
        let newest = HistoryQuery::newest(id, 1_000);
        seen.push(format!("{:?}", store.sync_history(&newest).await.unwrap()));
    }
    seen.push(format!(
        "{:?}",
        store.fleet_stats(at(-HOUR), 10, Freshness::Everything).await.unwrap()
    ));
    for window in windows() {
        seen.push(format!("{window:?} {:?}", store.window_figures(&window).await.unwrap()));
        let query = FailureQuery {
            threshold: 1,
            consecutive: false,
            window: Some(window),
            limit: None,
            offset: 0,
            after: None,
        };
        seen.push(format!("{:?}", store.repeated_failures(&query).await.unwrap()));
    }
    seen.push(format!("{:?}", store.keys().await.unwrap()));
    seen.push(format!("{:?}", store.audit(None, 100).await.unwrap()));
    seen
}

fn windows() -> [Window; 4] {
    [
        Window::last_24_hours(at(60)),
        Window::last_days(at(60), 7),
        Window::last_days(at(60), 30),
        Window::last_24_hours(at(-3 * DAY)),
    ]
}

/// Both must look the same, line by line.
#[track_caller]
fn assert_same(source: &[String], copy: &[String], what: &str) {
    for (source, copy) in source.iter().zip(copy) {
        assert_eq!(source, copy, "{what}");
    }
    assert_eq!(source.len(), copy.len(), "{what}");
}

/// Stores the same in both.
async fn write_both(writers: [&mut dyn EventWriter; 2], received: Timestamp, events: &[SyncEvent]) {
    let [source, copy] = writers;
    let source = source.write(&batch_at(received, events.to_vec())).await.unwrap();
    let copy = copy.write(&batch_at(received, events.to_vec())).await.unwrap();
    let positions = |written: &store::Written| -> Vec<usize> {
        written.duplicates.iter().map(|duplicate| duplicate.position).collect()
    };
    assert_eq!(positions(&source), positions(&copy));
    assert!(copy.ids.iter().max() > Some(&0));
}

async fn everything_is_there_and_goes_on(fixture: &TestStore) {
    fill(fixture).await;
    let mut received = at(0);
    // Copied while the clock is right, while it is behind what was aggregated, and after everything is final.
    for moment in [at(0), at(-3 * DAY), at(100 * DAY)] {
        for database in destinations().await {
            received = received.max(moment).saturating_add_milliseconds(2 * DAY * 1000);
            let watermark = received.saturating_add_milliseconds(HOUR * 1000);
            let what = format!("{} as of {moment}", database.target);
            let before = seen(&*fixture.store).await;
            let copied = copy(fixture.target(), &database.target, moment).await.unwrap();
            assert_eq!(copied.unknown, Vec::<String>::new(), "{what}");
            let copy = store::open(&database.target).await.unwrap();
            assert_same(&before, &seen(&*copy).await, &what);
            assert_right(&differences(&*copy, false).await);
            // Whatever of it the copy regards as aggregated.
            let page = copy.verify(None, received, false).await.unwrap();
            assert_eq!((page.days, page.unfilled_days), (Vec::new(), Vec::new()), "{what}");
            let derived = copy.verify_summaries(received, false).await.unwrap();
            assert_eq!(derived.number(), 0, "{what}: {derived:?}");

            // What comes next is told apart from what was there, and counts once.
            let last = last_id(&*copy).await;
            let events = [
                failure("pi-1", at(100)),
                success("pi-next", at(101)),
                full_event("pi-full", -1),
                full_event("pi-full", -70 * DAY - 1),
            ];
            let (mut source_writer, mut writer) = (fixture.writer(), copy.event_writer());
            write_both([&mut *source_writer, &mut *writer], received, &events).await;
            assert!(last_id(&*copy).await > last, "{what}");
            let lines = [without_ids(&*fixture.store).await, without_ids(&*copy).await];
            assert_same(&lines[0], &lines[1], &what);
            for store in [&fixture.store, &copy] {
                while store.aggregate_events(watermark).await.unwrap() {}
            }
            let lines = [without_ids(&*fixture.store).await, without_ids(&*copy).await];
            assert_same(&lines[0], &lines[1], &what);
            drop(writer);
            copy.close().await.unwrap();
            database.remove().await;
        }
    }
}

/// What can be seen of figures and windows.
async fn without_ids(store: &dyn Store) -> Vec<String> {
    let seen = seen(store).await;
    let has_ids =
        |line: &String| line.starts_with("Some(SyncHistory") || line.contains("AuditEntry");
    seen.into_iter().filter(|line| !has_ids(line)).collect()
}

/// Of the events of one device that is reported each time.
async fn last_id(store: &dyn Store) -> i64 {
    let newest = HistoryQuery::newest(device_id("pi-1"), 1_000);
    let history = store.events(&newest).await.unwrap().unwrap();
    history.events.iter().map(|event| event.id).max().unwrap()
}

/// A copy has been migrated by itself, has a journal of its own, and finds out anew which time to believe.
const OF_EACH_DATABASE: [&str; 9] = [
    "pisync_migrations",
    "ingest_state",
    "trusted_time",
    "device_summaries",
    "device_counts",
    "stale_summaries",
    "fleet_totals",
    "device_digest",
    "device_states",
];

/// Every table and column that migrations make is known to the copy: this fails when one is added that is
/// not. What a row holds is compared by its text, as another pair of eyes.
async fn a_newer_schema_is_copied_whole(fixture: &TestStore) {
    fill(fixture).await;
    // A deletion in progress.
    assert!(fixture.store.begin_deletion(&device_id("pi-1"), &somebody()).await.unwrap());
    while fixture.store.aggregate_events(at(3 * DAY)).await.unwrap() {}
    let database = match fixture.is_postgres() {
        true => TestDatabase::postgres().await,
        false => TestDatabase::sqlite(),
    };
    if fixture.is_postgres() {
        let odd = "
            update sync_events
               set updated_at = '2026-01-01 00:00:00.123456+00', duration_seconds = id * 0.001,
                   internet_speed = (id % 3 - 1) * 98765432.1 + id * 0.01
        ";
        fixture.database.execute(odd).await;
    }
    let copied = copy(fixture.target(), &database.target, at(2 * DAY)).await.unwrap();
    assert_eq!(copied.unknown, Vec::<String>::new());
    let tables = fixture.database.tables().await;
    let is_partition = |table: &&String| table.starts_with("sync_events_");
    for table in tables.iter().filter(|table| !is_partition(table)) {
        if OF_EACH_DATABASE.contains(&table.as_str()) {
            continue;
        }
        assert!(copied.rows.contains_key(table.as_str()), "{table} is not copied");
        let (source, copy) =
            (rows(fixture.target(), table).await, rows(&database.target, table).await);
        assert!(!source.is_empty(), "{table}");
        if table == "roll_up_state" {
            // How far events are aggregated is the copy's own.
            continue;
        }
        assert_eq!(source, copy, "{table}");
    }
    database.remove().await;
}

async fn rows(target: &Target, table: &str) -> Vec<String> {
    let mut rows: Vec<String> = match target {
        Target::Sqlite(path) => {
            let connection = rusqlite::Connection::open(path).unwrap();
            let mut select = connection.prepare(&format!("select * from {table}")).unwrap();
            let columns = select.column_count();
            let text = |row: &rusqlite::Row<'_>| {
                let values: Vec<rusqlite::types::Value> =
                    (0..columns).map(|column| row.get(column).unwrap()).collect();
                Ok(format!("{values:?}"))
            };
            select.query_map([], text).unwrap().map(Result::unwrap).collect()
        }
        Target::Postgres(target) => {
            let client = connect(&target.config).await;
            let select = format!("select t::text from {table} t");
            client.query(&select, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
        }
    };
    rows.sort();
    rows
}

/// Sequences and aggregation of a copy of a copy are still in order, and nothing is lost on the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_and_back_is_the_same() {
    on_sqlite(async |fixture: &TestStore| {
        fill(fixture).await;
        while fixture.store.aggregate_events(at(0)).await.unwrap() {}
        let [back, there] = destinations().await;
        copy(fixture.target(), &there.target, at(2 * DAY)).await.unwrap();
        copy(&there.target, &back.target, at(2 * DAY)).await.unwrap();
        // What is made anew is the same as what the background task makes.
        fixture.store.refresh_summaries().await.unwrap();
        for table in ["device_summaries", "device_counts", "fleet_totals", "device_states"] {
            let source = rows(fixture.target(), table).await;
            assert!(!source.is_empty(), "{table}");
            assert_eq!(source, rows(&back.target, table).await, "{table}");
        }
        for table in fixture.database.tables().await {
            if !OF_EACH_DATABASE.contains(&table.as_str()) {
                let source = rows(fixture.target(), &table).await;
                assert_eq!(source, rows(&back.target, &table).await, "{table}");
            }
        }
        let ids = "select * from sqlite_sequence where name not in ('pisync_migrations', 'stale_summaries')";
        let sequences = format!("({ids} order by name)");
        let source = rows(fixture.target(), &sequences).await;
        assert_eq!(source, rows(&back.target, &sequences).await);
        let page = |target: &Target| {
            let Target::Sqlite(path) = target else { panic!() };
            let connection = rusqlite::Connection::open(path).unwrap();
            ["page_size", "auto_vacuum"].map(|name| {
                connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).unwrap()
            })
        };
        assert_eq!(page(&back.target), page(fixture.target()));
        there.remove().await;
        back.remove().await;
    })
    .await;
}

async fn an_interrupted_copy_leaves_nothing(fixture: &TestStore) {
    fill(fixture).await;
    for database in destinations().await {
        let reached = Arc::new(Notify::new());
        let mut report = |progress| {
            if let CopyProgress::Table { name: "audit_log", comparing: false, .. } = progress {
                reached.notify_one();
            }
        };
        tokio::select! {
            biased;
            () = reached.notified() => {}
            copied = store::copy(fixture.target(), &database.target, now(), &mut report) => {
                panic!("it was not interrupted: {copied:?}")
            }
        }
        match &database.target {
            Target::Sqlite(path) => {
                let folder = path.parent().unwrap();
                let left: Vec<_> =
                    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
                assert!(left.is_empty(), "{left:?}");
            }
            Target::Postgres(_) => {
                for table in ["devices", "sync_events", "api_keys"] {
                    assert_eq!(rows(&database.target, table).await, Vec::<String>::new());
                }
            }
        }
        let before = seen(&*fixture.store).await;
        copy(fixture.target(), &database.target, now()).await.unwrap();
        let copy = store::open(&database.target).await.unwrap();
        assert_same(&before, &seen(&*copy).await, "after an interruption");
        copy.close().await.unwrap();
        database.remove().await;
    }
}

async fn what_is_not_ours_is_named(fixture: &TestStore) {
    fixture.database.execute("create table songs (title text, singer text)").await;
    fixture.database.execute("alter table devices add column site text").await;
    for database in destinations().await {
        let copied = copy(fixture.target(), &database.target, now()).await.unwrap();
        assert_eq!(copied.unknown, ["the column site of devices", "the table songs"]);
        database.remove().await;
    }
}

/// Whoever falsifies what is written is found out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_differs_is_refused() {
    on_sqlite(async |fixture: &TestStore| {
        fill(fixture).await;
        let database = TestDatabase::postgres().await;
        database.migrate().await;
        let falsify = "
            create function falsify() returns trigger language plpgsql as $$
            begin new.hint = 'psk_other'; return new; end $$;
            create trigger falsify before insert on api_keys
                for each row execute function falsify()
        ";
        database.execute(falsify).await;
        let error = copy(fixture.target(), &database.target, now()).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the copy of the table api_keys differs from it (2 rows were read, 2 are there); nothing was kept of the copy"
        );
        assert_eq!(rows(&database.target, "devices").await, Vec::<String>::new());
        database.remove().await;
    })
    .await;
}

async fn a_served_source_is_copied_as_of_one_moment(installed: &Installed) {
    let serving = installed.program.serve(&[]);
    let mut before = BTreeSet::new();
    for database in destinations().await {
        let reporters = Reporters::start(&serving.client);
        reporters.wait_for(50).await;
        before.append(&mut reporters.stop().await);
        let reporters = Reporters::start(&serving.client);
        reporters.wait_for(20).await;
        let arguments =
            ["copy", "--from", &url(&installed.database.target), "--to", &url(&database.target)];
        let said = installed.program.run(&arguments);
        assert!(said.success().contains("all tables have the same rows and checksums"), "{said:?}");
        reporters.wait_for(20).await;
        let after = &before | &reporters.stop().await;

        let other = Program::new()
            .with("DATABASE_URL", url(&database.target))
            .with("PORT", 0)
            .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
            .with("RATE_LIMIT_API_PER_MINUTE", 0);
        other.run(&["verify"]).success();
        let copied = other.serve(&[]);
        let held = stored_ids(&copied.client, "pi").await;
        assert!(before.is_subset(&held) && held.is_subset(&after));
        let next = copied.client.store(&event("pi")).await;
        assert!(next["id"].as_i64() > held.iter().max().copied());
        let total = copied.client.get("/api/stats").await.data(200);
        assert_eq!(total["total_sync_events"], held.len() + 1);
        copied.stop();
        database.remove().await;
        before = after;
    }
    serving.stop();
}

/// `installed` has the destination.
async fn a_destination_in_use_is_left_alone(installed: &Installed) {
    let source = TestDatabase::sqlite();
    source.migrate().await;
    let serving = installed.program.serve(&[]);
    let arguments =
        ["copy", "--from", &url(&source.target), "--to", &url(&installed.database.target)];
    let refused = installed.program.run(&arguments);
    assert!(refused.failure().contains("in use by a running PiSync server"), "{refused:?}");
    serving.client.store(&event("pi")).await;
    serving.stop();
    source.remove().await;
}

async fn a_destination_with_something_in_it_is_left_alone(fixture: &TestStore) {
    let source = TestDatabase::sqlite();
    source.migrate().await;
    // An empty one is taken, whether it has the schema or not.
    fixture.store.close().await.unwrap();
    let empty = match fixture.is_postgres() {
        true => TestDatabase::postgres().await,
        false => TestDatabase::sqlite(),
    };
    empty.migrate().await;
    copy(&source.target, &empty.target, now()).await.unwrap();
    copy(&source.target, &empty.target, now()).await.unwrap();

    empty.make_key(key_request(Scope::Read)).await;
    let before = rows(&empty.target, "api_keys").await;
    let refused = copy(&source.target, &empty.target, now()).await.unwrap_err();
    let expected = format!(
        "{} is not empty: api_keys has rows; name a database that has not been used yet",
        empty.target
    );
    assert_eq!(refused.to_string(), expected);
    assert_eq!(rows(&empty.target, "api_keys").await, before);

    // Nor is one that a newer version has made.
    let newer = "insert into pisync_migrations (name, source, checksum, batch, applied_at)
                 values ('2099-01-01-01-later', 'embedded', '', 9, ";
    let applied = if fixture.is_postgres() { "now())" } else { "0)" };
    empty.execute(&format!("{newer}{applied}")).await;
    for (from, to) in [(&source, &empty), (&empty, &source)] {
        let refused = copy(&from.target, &to.target, now()).await.unwrap_err();
        let expected = format!("{}: the database is newer than this program", empty.target);
        assert!(refused.to_string().starts_with(&expected), "{refused}");
    }
    source.remove().await;
    empty.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_copied_is_refused_in_one_line() {
    let program = Program::new()
        .with("PORT", 0)
        .with_file("notes.txt", &"These are notes. ".repeat(1000))
        .with_file("empty.db", "");
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.stop();
    program.run(&["migrate", "up", "--database-url", "sqlite:older.db"]).success();
    program.run(&["migrate", "down", "1", "--yes", "--database-url", "sqlite:older.db"]).success();
    fs::create_dir(program.path("folder")).unwrap();
    fs::write(program.path("file"), "").unwrap();
    let before = program.names_in(".");
    for (from, to, problem) in [
        (
            "sqlite:missing.db",
            "sqlite:new.db",
            "no database at missing.db; name the file of one behind --from",
        ),
        (
            "sqlite:folder",
            "sqlite:new.db",
            "no database at folder; name the file of one behind --from",
        ),
        ("sqlite:notes.txt", "sqlite:new.db", "SQLite notes.txt: cannot open notes.txt: "),
        ("sqlite:empty.db", "sqlite:new.db", "SQLite empty.db is not a PiSync database"),
        ("sqlite:older.db", "sqlite:new.db", "SQLite older.db has pending migrations: "),
        (
            "sqlite:data/pisync.db",
            "sqlite:data/../data/pisync.db",
            "SQLite data/pisync.db cannot be copied to itself",
        ),
        ("sqlite:data/pisync.db", "sqlite:folder", "SQLite folder: it is a folder; name a file"),
        ("sqlite:data/pisync.db", "sqlite:file/new.db", "SQLite file/new.db: cannot create file"),
        ("sqlite:data/pisync.db", "mysql://x", "--to must begin with postgres:// or sqlite:"),
        ("", "sqlite:new.db", "--from must begin with postgres:// or sqlite:"),
        (
            "sqlite:data/pisync.db",
            "postgres://pi:secret@127.0.0.1:1/pisync",
            "PostgreSQL 127.0.0.1:1/pisync: the database is unavailable: ",
        ),
        (
            "postgres://pi:secret@127.0.0.1:1/pisync",
            "sqlite:new.db",
            "PostgreSQL 127.0.0.1:1/pisync: the database is unavailable: ",
        ),
    ] {
        let refused = program.run(&["copy", "--from", from, "--to", to]);
        let is_wrong = problem.contains("must begin with");
        let said = if is_wrong { refused.wrong_usage() } else { refused.failure() };
        assert!(said.starts_with(problem), "{from} {to}: {refused:?}");
        assert!(!refused.stderr.contains("secret"), "{refused:?}");
    }
    assert_eq!(program.names_in("."), before);

    let missing = PostgresTargetWithout::database().await;
    let refused = program.run(&["copy", "--from", "sqlite:data/pisync.db", "--to", &missing.0]);
    assert!(refused.failure().contains("create it with `pisync db setup`"), "{refused:?}");
    // And what is there can be copied.
    let said = program.run(&["copy", "--from", "sqlite:data/pisync.db", "--to", "sqlite:new.db"]);
    assert!(said.success().contains("copied    sync_events: 1\n"), "{said:?}");
    let from_environment =
        program.with("COPY_FROM", "sqlite:new.db").with("COPY_TO", "sqlite:2.db");
    assert!(from_environment.run(&["copy"]).success().contains("devices: 1, events: 1"));
}

/// The URL of a database that does not exist, on a server that does.
struct PostgresTargetWithout(String);

impl PostgresTargetWithout {
    async fn database() -> Self {
        let database = TestDatabase::postgres().await;
        let url = url(&database.target);
        database.remove().await;
        Self(url)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_leaves_nothing_behind() {
    let disk = SmallDisk::new(1);
    let program =
        Program::new().with("PORT", 0).with("RATE_LIMIT_SYNC_PER_MINUTE", 0).with_small_disk(&disk);
    let serving = program.serve(&[]);
    let much = with(event("pi"), &json!({"metadata": {"text": "x".repeat(4000)}}));
    for _ in 0..300 {
        serving.client.store(&much).await;
    }
    serving.stop();
    let to = url(&Target::Sqlite(disk.path().join("copy.db")));
    let full = program.run(&["copy", "--from", "sqlite:data/pisync.db", "--to", &to]);
    assert!(full.failure().contains("full"), "{full:?}");
    let left = fs::read_dir(disk.seen_from_here("")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}
