//! A database of the Node service becomes ours and, rolled back, the Node service's again: nothing is lost,
//! every figure is what SQL made of the old tables, and whatever goes wrong leaves them as they were.

use std::time::Duration;

use pisync::store::{self, Target, migrations::EMBEDDED};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::{
    http::Client as HttpClient,
    node_service::{FEW_EVENTS, ODD_ROWS, SCHEMA, client_of, describe, describe_tables, history},
    postgres::{PostgresServer, connect},
    program::{Ended, Program, url},
    server::TestServer,
    small_disk::SmallDisk,
    store::{TestDatabase, assert_right, differences},
};

/// The old tables are kept beside, to be compared with.
const KEEP: &str = "
    create schema before;
    create table before.devices as table devices;
    create table before.sync_events as table sync_events;
    create table before.migrations as table migrations;
    create table before.last as select last_value from sync_events_id_seq;
";

/// What the old tables say, with times as our API writes them. $1 is the time zone. What is dated more than two
/// days ahead counts in sums alone.
const OLD: &str = "
    with events as (
        select id, device_id, timestamp at time zone $1 as dated, total_files_synced, total_errors,
               nullif(internet_speed, 'NaN') as speed, coalesce(created_at, timestamp) at time zone $1 as received,
               coalesce(updated_at, created_at, timestamp) at time zone $1 as updated
          from before.sync_events
    ),
    totals as (
        select device_id, count(*) as syncs, count(*) filter (where total_errors > 0) as failed,
               sum(total_files_synced) as files, sum(total_errors) as errors, round(avg(speed), 2)::float8 as speed,
               min(dated) as first, max(dated) filter (where believed) as last,
               max(dated) filter (where believed and total_errors <= 0) as success,
               max(dated) filter (where believed and total_errors > 0) as failure,
               max(received) filter (where believed) as seen
          from (select *, greatest(dated, received) < now() + interval '2 days' as believed from events) events
         group by device_id
    ),
    streaks as (
        select device_id, count(*) as streak
          from events join totals using (device_id)
         where total_errors > 0 and dated > coalesce(success, '-infinity')
           and greatest(dated, received) < now() + interval '2 days'
         group by device_id
    ),
    devices as (
        select totals.*, coalesce(streak, 0) as streak,
               (select coalesce(
                           created_at,
                           (select min(coalesce(created_at, timestamp)) from before.sync_events event
                             where event.device_id = totals.device_id)
                       ) at time zone $1
                  from before.devices where devices.device_id = totals.device_id) as registered
          from totals left join streaks using (device_id)
    )
";

/// How our API writes a time.
fn time(expression: &str) -> String {
    format!("to_char({expression} at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')")
}

/// What a query over [`OLD`] gives, as JSON.
async fn old(client: &Client, zone: &str, select: &str) -> Value {
    let row = client.query_one(&format!("{OLD} select ({select})::text"), &[&zone]).await.unwrap();
    row.get::<_, Option<String>>(0).map_or(Value::Null, |text| serde_json::from_str(&text).unwrap())
}

/// The fields of `value` that `like` has.
fn fields_of(value: &Value, like: &Value) -> Value {
    match (value, like) {
        (Value::Object(fields), Value::Object(wanted)) => wanted
            .iter()
            .map(|(name, like)| (name.clone(), fields_of(&fields[name], like)))
            .collect(),
        (Value::Array(items), Value::Array(wanted)) if items.len() == wanted.len() => {
            items.iter().zip(wanted).map(|(item, like)| fields_of(item, like)).collect()
        }
        // -3.0 or -3 is all the same.
        _ if value.is_number() && value.as_f64() == like.as_f64() => like.clone(),
        _ => value.clone(),
    }
}

#[track_caller]
fn assert_same(answered: &Value, expected: &Value, what: &str) {
    let answered = fields_of(answered, expected);
    if let (Value::Array(answered), Value::Array(expected)) = (&answered, expected) {
        // A whole history would be too much to read.
        for (answered, expected) in answered.iter().zip(expected) {
            assert_eq!(answered, expected, "{what}");
        }
    }
    assert_eq!(answered, *expected, "{what}");
}

/// Everything that the API answers must be what SQL makes of the old tables.
async fn assert_all_figures(http: &HttpClient, client: &Client, zone: &str) {
    let stats = format!(
        "select json_build_object(
             'total_devices', (select count(*) from before.devices), 'total_sync_events', sum(syncs),
             'total_failures', sum(failed), 'total_files_synced', sum(files), 'total_errors', sum(errors),
             'overall_success_rate', round((sum(syncs) - sum(failed)) * 100.0 / sum(syncs), 2)::float8,
             'avg_internet_speed', (select round(avg(speed), 2)::float8 from events),
             'recent_devices', (
                 select json_agg(json_build_object(
                            'device_id', device_id, 'total_syncs', syncs, 'total_files_synced', files,
                            'total_errors', errors, 'failed_syncs', failed, 'last_sync', {last}))
                   from (select * from devices order by last desc, device_id collate \"C\" limit 10) recent))
           from devices",
        last = time("last")
    );
    let expected = old(client, zone, &stats).await;
    assert_same(&http.get("/api/stats").await.data(200), &expected, "stats");

    for (query, measure) in [("threshold=3", "failed"), ("threshold=2&consecutive=true", "streak")]
    {
        let failures = format!(
            "select json_agg(json_build_object(
                        'device_id', device_id, 'total_failed_syncs', failed, 'consecutive_failures', streak,
                        'last_failed_sync', {}, 'last_success', {}, 'device_registered', {}, 'last_seen', {})
                        order by {measure} desc, failure desc nulls last, device_id collate \"C\")
               from devices
              where {measure} >= {}",
            time("failure"),
            time("success"),
            time("registered"),
            time("seen"),
            &query[10..11],
        );
        let expected = old(client, zone, &failures).await;
        assert!(expected.as_array().unwrap().len() > 3, "{expected}");
        let answered = http.get(&format!("/api/devices/repeated-failures?{query}")).await.data(200);
        assert_same(&answered["devices"], &expected, query);
    }
    assert_histories(http, client, zone).await;
}

/// Each device's figures and every one of its events.
async fn assert_histories(http: &HttpClient, client: &Client, zone: &str) {
    let figures = format!(
        "select json_object_agg(device_id, json_build_object(
                    'total_syncs', syncs, 'total_files_synced', files, 'total_errors', errors,
                    'avg_internet_speed', speed, 'first_sync', {}, 'last_sync', {}, 'last_success', {},
                    'failed_syncs', failed, 'successful_syncs', syncs - failed, 'consecutive_failures', streak))
           from devices",
        time("first"),
        time("last"),
        time("success"),
    );
    let events = format!(
        "select json_object_agg(device_id, rows) from (
             select device_id, json_agg(json_build_object(
                        'id', id, 'timestamp', {}, 'total_files_synced', total_files_synced,
                        'total_errors', total_errors, 'internet_speed', speed::float8, 'created_at', {},
                        'updated_at', {}) order by dated desc, id desc) as rows
               from events group by device_id) histories",
        time("dated"),
        time("received"),
        time("updated"),
    );
    let figures = old(client, zone, &figures).await;
    let events = old(client, zone, &events).await;
    for (device_id, expected) in events.as_object().unwrap() {
        // The API does not take such an id; the rows are compared elsewhere.
        if device_id.is_empty() || device_id.contains(char::is_control) {
            continue;
        }
        let device = device_id.replace('/', "%2F").replace("/%", "/%25").replace("F%", "F%25");
        let path = format!("/api/device/{device}/sync-history?limit=1000");
        let answered = http.get(&path).await.data(200);
        assert_same(&answered["stats"], &figures[device_id], device_id);
        assert_eq!(answered["pagination"]["total_events"], expected.as_array().unwrap().len());
        assert_same(&answered["sync_history"], expected, device_id);
    }
}

/// Every row, with every id, those included that the API does not show.
async fn assert_all_rows(client: &Client, zone: &str) {
    const DIFFERENCES: &str = "
        with old as (
            select id::bigint, device_id::text, timestamp at time zone $1, total_files_synced, total_errors,
                   nullif(internet_speed, 'NaN'), coalesce(created_at, timestamp) at time zone $1,
                   coalesce(updated_at, created_at, timestamp) at time zone $1
              from before.sync_events
        ),
        new as (
            select id, device_id::text, timestamp, total_files_synced, total_errors, internet_speed, created_at,
                   updated_at
              from sync_events
        ),
        old_devices as (
            select id::bigint, device_id::text, created_at at time zone $1 as created,
                   updated_at at time zone $1 as updated
              from before.devices
        ),
        new_devices as (
            select devices.id, devices.device_id::text,
                   case when old.created is not null then devices.created_at end,
                   case when old.updated is not null then devices.updated_at end
              from devices
              left join old_devices old using (id)
        )
        select (select count(*) from (table old except all table new) missing)
             + (select count(*) from (table new except all table old) added)
             + (select count(*) from (table old_devices except all table new_devices) missing)
             + (select count(*) from (table new_devices except all table old_devices) added)
    ";
    let differences: i64 = client.query_one(DIFFERENCES, &[&zone]).await.unwrap().get(0);
    assert_eq!(differences, 0);
}

/// A database of the Node service with everything in it, odd rows too, and the program beside it.
async fn node_service(devices: u32, events: u32, more: &str) -> (TestDatabase, Program) {
    let database = TestDatabase::postgres().await;
    database.execute(&[SCHEMA, &history(devices, events), more, KEEP].concat()).await;
    let program = Program::new().with("DATABASE_URL", url(&database.target)).with("PORT", 0);
    (database, program)
}

/// The same with a few rows.
async fn small_node_service(more: &str) -> (TestDatabase, Program) {
    let database = TestDatabase::postgres().await;
    database.execute(&[SCHEMA, FEW_EVENTS, more].concat()).await;
    let program = Program::new().with("DATABASE_URL", url(&database.target)).with("PORT", 0);
    (database, program)
}

fn up(program: &Program, zone: &str) -> Ended {
    program.run(&["migrate", "up", "--source-timezone", zone])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_figure_is_what_sql_makes_of_the_old_tables() {
    assert_taken_over(200, 20_000, "UTC", "").await;
    // Skipped, had twice, and the night in which one month ends there and not in UTC.
    let clock_changes = "
        insert into sync_events (device_id, timestamp, total_errors, created_at)
        values ('pi-1', '2026-03-29 02:30', 1, '2026-03-29 02:30'),
               ('pi-2', '2026-03-29 03:30', 1, '2026-03-29 03:30'),
               ('pi-1', '2025-10-26 02:30', 0, '2025-10-26 02:30'),
               ('pi-1', '2026-05-01 00:30', 0, '2026-05-01 01:59:59.999999');
    ";
    assert_taken_over(200, 20_000, "Europe/Berlin", clock_changes).await;
}

#[ignore = "takes minutes: cargo test --release --test it -- --ignored a_million_events"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_events_of_5000_devices() {
    assert_taken_over(5_000, 1_000_000, "UTC", "").await;
}

async fn assert_taken_over(devices: u32, events: u32, zone: &str, more: &str) {
    let (database, program) = node_service(devices, events, &[more, ODD_ROWS].concat()).await;
    let taken = up(&program, zone);
    let said = taken.success();
    assert!(said.contains("copied    2026-06: "), "{said}");
    assert!(said.contains("taken over in "), "{said}");

    let client = client_of(&database).await;
    assert_all_rows(&client, zone).await;
    let open = store::open(&database.target).await.unwrap();
    assert_right(&differences(&*open, false).await);
    drop(open);
    let server = TestServer::start(database).await;
    assert_all_figures(&server, &client, zone).await;
    assert_roll_ups(&client).await;
    // New events go on where the Node service ended, ids that were deleted included.
    let last = client.query_one("select last_value from before.last", &[]).await.unwrap();
    let last: i64 = last.get(0);
    let event = json!({
        "device_id": "new", "timestamp": "2026-11-01T00:00:00Z", "total_files_synced": 1,
        "total_errors": 0,
    });
    let stored = server.post("/api/sync-event", &event).await.data(201);
    assert!(stored["id"].as_i64().unwrap() > last, "{stored} after {last}");
    drop(client);
    server.stop().await.remove().await;
}

/// Sums by day and hour are there at once, without anything left for the background task.
async fn assert_roll_ups(client: &Client) {
    const WRONG: &str = "
        with days as (
            select device_id, (timestamp at time zone 'UTC')::date as day, count(*) as syncs,
                   count(*) filter (where total_errors > 0) as failed, sum(total_files_synced) as files,
                   sum(total_errors) as errors, coalesce(sum(internet_speed * 100), 0) as speed,
                   count(internet_speed) as speeds
              from sync_events
             where created_at < '2090-01-01'
             group by 1, 2
        ),
        stored as (
            select device_id, day, total_syncs, failed_syncs, total_files_synced::numeric, total_errors::numeric,
                   speed_sum::numeric, speed_count
              from device_days
        )
        select (select count(*) from (table stored except table days) wrong)
             + (select count(*) from (table days except table stored) missing)
             + (select count(*) from roll_up_state where folded_until is null)
             + abs((select sum(total_syncs) from fleet_hours) - (select sum(syncs) from days))::bigint
    ";
    let wrong: i64 = client.query_one(WRONG, &[]).await.unwrap().get(0);
    assert_eq!(wrong, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rehearsal_tells_everything_and_changes_nothing() {
    let (database, program) = node_service(20, 2_000, ODD_ROWS).await;
    let before = describe(&database).await;
    let rehearsed =
        program.run(&["migrate", "up", "--dry-run", "--source-timezone", "europe/berlin"]);
    let said = rehearsed.success();
    for expected in [
        "found     27 devices\n",
        "found     2,004 events, 2024-02-29T11:00:00.000Z to 2098-12-31T23:00:00.000Z\n",
        "received  in 10 months, 2024-02-29T11:00:00.000Z to 2098-12-31T22:59:00.000Z\n",
        "odd       3 events without created_at: their timestamp stands in\n",
        "odd       3 events without updated_at",
        "odd       4 events with a negative speed: kept as they are\n",
        "odd       1 events whose speed is no number: kept without one\n",
        "odd       1 events with a negative count",
        "odd       1 events dated in the future",
        "odd       2 events received in the future",
        "odd       3 devices without created_at",
        "odd       3 devices without updated_at",
        "odd       2 devices whose id is empty or has control characters",
        "will      read times as Europe/Berlin",
        "will      drop the old tables",
        // How long depends on what else the machine does.
        "s, as far as trying a part of it tells",
        "expected  less than 1 MB of disk",
        "run the command without --dry-run\n",
    ] {
        assert!(said.contains(expected), "{expected:?} is not in:\n{said}");
    }
    assert_eq!(describe(&database).await, before);

    // What a clock did, in a time zone whose clock did it.
    let client = client_of(&database).await;
    client
        .batch_execute(
            "insert into sync_events (device_id, timestamp, created_at)
             values ('pi-1', '2026-03-29 02:30', '2026-03-29 01:59'), ('pi-1', '2025-10-26 02:30', '2025-10-26 03:00')",
        )
        .await
        .unwrap();
    // Whoever is connected is named, and no reason not to rehearse.
    let said = program.run(&["migrate", "up", "--dry-run", "--source-timezone", "Europe/Berlin"]);
    for expected in [
        "events in an hour that a clock set forward left out: read as one hour later\n",
        "events in an hour that a clock set back had twice: read as the second one\n",
        "connected now, to be stopped before: process ",
    ] {
        assert!(said.success().contains(expected), "{said:?}");
    }
    for unknown in ["Mars/Olympus", "", "EST5EDT,M3", "UTC+2", "+02:00"] {
        let ended = up(&program, unknown);
        assert!(ended.wrong_usage().starts_with("unknown time zone "), "{ended:?}");
    }
    drop(client);
    database.remove().await;
}

/// Also on a database that was ours from the beginning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rehearsal_lists_pending_migrations() {
    for database in [TestDatabase::sqlite(), TestDatabase::postgres().await] {
        let program = Program::new().with("DATABASE_URL", url(&database.target));
        let said = program.run(&["migrate", "up", "--dry-run"]);
        assert!(said.success().starts_with(&format!("pending   {}\n", EMBEDDED[0])), "{said:?}");
        assert!(said.stdout.contains("nothing was changed"), "{said:?}");
        assert!(database.file().is_none_or(|file| !file.exists()));
        program.run(&["migrate", "up"]).success();
        let said = program.run(&["migrate", "up", "--dry-run"]);
        assert!(said.success().ends_with(": no migration to apply; nothing was changed\n"));
        database.remove().await;
    }
}

/// Killed at any moment, and run again: the same as if nothing had happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_on_the_way_and_run_again() {
    let (database, program) = node_service(200, 20_000, ODD_ROWS).await;
    let before = describe(&database).await;
    let mut untouched = 0;
    for moment in [
        "was made by the Node PiSync",
        "received  in",
        "copied    2024-02",
        "copied    2026-03",
        "counting",
        "summing",
    ] {
        program.kill_at(&["migrate", "up"], moment);
        // As long as it is the Node service's, it is so to the last row. On a busy machine it may have come
        // to its end first.
        if program.run(&["migrate", "status"]).code() == 0 {
            break;
        }
        assert_eq!(describe(&database).await, before, "killed at {moment:?}");
        untouched += 1;
    }
    // Else nothing was killed midway, and nothing tested.
    assert!(untouched >= 3, "{untouched}");
    let ended = program.run(&["migrate", "up"]);
    ended.success();
    // As a service manager does that runs it at every start.
    let again = program.run(&["migrate", "up"]);
    assert_eq!(again.success(), "nothing to do: every migration is applied\n");
    let again = up(&program, "UTC");
    assert!(again.success().starts_with("--source-timezone is for a database of the Node PiSync"));
    program.run(&["verify"]).success();

    let client = client_of(&database).await;
    assert_all_rows(&client, "UTC").await;
    let server = TestServer::start(database).await;
    assert_all_figures(&server, &client, "UTC").await;
    drop(client);
    server.stop().await.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn taken_back_it_is_the_node_services_again() {
    let (database, program) = node_service(30, 3_000, "").await;
    database.execute("create index of_my_own on sync_events (total_errors)").await;
    let said = program.run(&["migrate", "up", "--dry-run"]);
    assert!(said.success().contains("the index of_my_own is your own"), "{said:?}");
    database.execute("drop index of_my_own").await;
    grant_to_a_reader(&database).await;
    let before = describe_tables(&database).await;

    up(&program, "Asia/Kolkata").success();
    let client = client_of(&database).await;
    // The reader still reads.
    let may: bool = client
        .query_one("select has_table_privilege('take_over_reader', 'sync_events', 'select')", &[])
        .await
        .unwrap()
        .get(0);
    assert!(may);
    client.batch_execute("update devices set name = 'x' where id = 1").await.unwrap();
    drop(client);
    let serving = program.serve(&[]);
    let ours = json!({
        "device_id": "pi-ours", "timestamp": "2026-11-01T10:00:00.250Z", "total_files_synced": 7,
        "total_errors": 2, "internet_speed": 1.25, "job": "nightly",
    });
    serving.client.store(&ours).await;
    serving.stop();

    let refused = program.run(&["migrate", "down", "99"]);
    assert_eq!(refused.code(), 1);
    for expected in ["names and groups of devices", "every API key", "which of the two it was"] {
        assert!(refused.stderr.contains(expected), "{refused:?}");
    }
    assert!(!refused.stderr.contains("every device and every sync event"), "{refused:?}");
    program.run(&["migrate", "down", "99", "--yes"]).success();

    assert_eq!(describe_tables(&database).await, before);
    let client = client_of(&database).await;
    // What came since is there, on the clock of the Node service.
    let ours =
        "select format('%s %s %s %s %s', id > 3000, timestamp, total_files_synced, total_errors,
                              internet_speed)
                  from sync_events where device_id = 'pi-ours'";
    let ours: String = client.query_one(ours, &[]).await.unwrap().get(0);
    assert_eq!(ours, "t 2026-11-01 15:30:00.25 7 2 1.25");
    client.batch_execute("delete from devices where device_id = 'pi-ours'").await.unwrap();
    for table in ["devices", "sync_events", "migrations"] {
        let differences = format!(
            "select (select count(*) from (table {table} except all table before.{table}) added)
                  + (select count(*) from (table before.{table} except all table {table}) missing)"
        );
        let differences: i64 = client.query_one(&differences, &[]).await.unwrap().get(0);
        assert_eq!(differences, 0, "{table}");
    }
    // What the Node service does with each event.
    for _ in 0..2 {
        client
            .batch_execute(
                "insert into devices (device_id) values ('pi-new')
                     on conflict (device_id) do update set updated_at = current_timestamp;
                 insert into sync_events (device_id, timestamp, total_files_synced, total_errors, internet_speed)
                 values ('pi-new', '2026-11-22 12:00', 1, 0, 4.5)",
            )
            .await
            .unwrap();
    }
    let last = "select array_agg(id order by id desc) from (select id from sync_events order by id desc limit 2) last";
    let ids: Vec<i32> = client.query_one(last, &[]).await.unwrap().get(0);
    assert!(ids[1] > 3_001 && ids[0] == ids[1] + 1, "{ids:?}");
    client.batch_execute("delete from devices where device_id = 'pi-new'").await.unwrap();
    let left: i64 = client.query_one("select count(*) from sync_events", &[]).await.unwrap().get(0);
    assert_eq!(left, 3_000);
    drop(client);

    // And forth again.
    let refused = program.run(&[]);
    assert!(refused.failure().starts_with("this database was made by the Node PiSync"));
    up(&program, "Asia/Kolkata").success();
    let client = client_of(&database).await;
    assert_all_rows(&client, "Asia/Kolkata").await;
    drop(client);
    program.run(&["verify"]).success();
    database.remove().await;
}

async fn grant_to_a_reader(database: &TestDatabase) {
    make_role(database, "take_over_reader").await;
    database
        .execute(
            "grant select on devices, sync_events to take_over_reader;
             grant usage on sync_events_id_seq to take_over_reader",
        )
        .await;
}

/// Roles are for all databases of a server.
async fn make_role(database: &TestDatabase, name: &str) {
    let make = format!(
        "do $$ begin create role {name} login; exception when duplicate_object then null; end $$"
    );
    database.execute(&make).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_the_way_is_named_and_nothing_is_changed() {
    for (more, says) in [
        ("alter table devices add site text", "devices.site is not a column of the Node service's"),
        (
            "alter table sync_events alter id type bigint",
            "sync_events.id is bigint instead of integer",
        ),
        ("alter table sync_events drop internet_speed", "sync_events.internet_speed is missing"),
        ("create view failing as select * from sync_events", "failing depends on sync_events"),
        (
            "create table sites (device text references devices (device_id))",
            "sites_device_fkey of sites refers to devices",
        ),
        (
            "create trigger mine before insert on devices
                 for each row execute function update_updated_at_column()",
            "devices has a trigger mine",
        ),
        (
            "alter table sync_events add constraint sane check (total_errors < 1000)",
            "sync_events has a constraint sane",
        ),
        ("create policy own on devices using (true)", "devices has a policy own"),
        (
            "grant select (device_id) on devices to public",
            "somebody has a right to devices.device_id alone",
        ),
        ("create table more () inherits (sync_events)", "more inherits from sync_events"),
        ("create table api_keys (a text)", "the name api_keys is taken"),
        ("create table sync_events_2025_06 (a text)", "sync_events_2025_06"),
        (
            "update sync_events set timestamp = 'infinity' where id = 1",
            "1 rows of sync_events have times before the year 1 or after 9999",
        ),
        (
            "update sync_events set created_at = '0044-03-15 BC' where id = 1",
            "1 rows of sync_events have times before the year 1 or after 9999",
        ),
    ] {
        let fixed = "update sync_events set created_at = '2025-06-17 10:31';";
        let (database, program) = small_node_service(&format!("{fixed}{more}")).await;
        let before = (database.tables().await, describe(&database).await);
        let refused = program.run(&["migrate", "up"]);
        assert!(refused.failure().contains(says), "{more}: {refused:?}");
        if !more.contains("sync_events_2025_06") {
            let rehearsed = program.run(&["migrate", "up", "--dry-run"]);
            assert!(rehearsed.failure().contains(says), "{more}: {rehearsed:?}");
        }
        assert_eq!((database.tables().await, describe(&database).await), before, "{more}");
        database.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_right_to_do_it() {
    let (database, _) = small_node_service("").await;
    make_role(&database, "take_over_guest").await;
    database.execute("grant select on devices, sync_events, migrations to take_over_guest").await;
    let guest = url(&database.target).replace("pisync@", "take_over_guest@");
    let program = Program::new().with("DATABASE_URL", guest);
    for arguments in [&["migrate", "up"][..], &["migrate", "up", "--dry-run"]] {
        let refused = program.run(arguments);
        let says = "the table devices belongs to pisync, so connect as pisync";
        assert!(refused.failure().contains(says), "{refused:?}");
    }
    database
        .execute(
            "alter table devices owner to take_over_guest;
             alter table sync_events owner to take_over_guest;
             revoke create on schema public from public",
        )
        .await;
    let before = describe(&database).await;
    let refused = program.run(&["migrate", "up"]);
    let says = "grant create on schema public to take_over_guest";
    assert!(refused.failure().contains(says), "{refused:?}");
    assert_eq!(describe(&database).await, before);
    database
        .execute("alter table devices owner to pisync; alter table sync_events owner to pisync")
        .await;
    database.remove().await;
}

/// Somebody who could write at any moment, and somebody who reads just now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_a_running_node_service() {
    let (database, program) = small_node_service("").await;
    let node = client_of(&database).await;
    let refused = program.run(&["migrate", "up"]);
    let says = "the Node service seems to be running, for somebody else is connected to its database: process ";
    assert!(refused.failure().starts_with(says), "{refused:?}");
    drop(node);

    make_role(&database, "take_over_watcher").await;
    database.execute("grant select on sync_events to take_over_watcher").await;
    let before = describe(&database).await;
    let Target::Postgres(target) = &database.target else { unreachable!() };
    let mut config = target.config.clone();
    config.user("take_over_watcher").application_name("backup");
    let reading = connect(&config).await;
    reading.batch_execute("begin; select count(*) from sync_events").await.unwrap();
    // What it said last names no table of the Node service's.
    reading.batch_execute("select 1").await.unwrap();
    let refused = program.run(&["migrate", "up"]);
    let says = "the tables are in use by process ";
    assert!(refused.failure().starts_with(says), "{refused:?}");
    assert!(
        refused.failure().contains("(backup of take_over_watcher from 127.0.0.1"),
        "{refused:?}"
    );
    reading.batch_execute("rollback").await.unwrap();
    assert_eq!(describe(&database).await, before);
    drop(reading);

    // Of a service that was just stopped, the sessions end a little later.
    let node = client_of(&database).await;
    let ending = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        drop(node);
    });
    program.run(&["migrate", "up"]).success();
    ending.await.unwrap();
    database.remove().await;
}

/// A service that nobody has seen, for it had no session: what it writes waits, and is kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_service_that_comes_in_between() {
    const IS_LOCKED: &str = "
        select exists (
            select from pg_locks join pg_database on pg_database.oid = database
             where datname = $1 and mode = 'AccessExclusiveLock' and granted)
    ";
    let (database, program) = node_service(200, 20_000, "").await;
    let Target::Postgres(target) = &database.target else { unreachable!() };
    let mut elsewhere = target.config.clone();
    elsewhere.dbname("postgres");
    let elsewhere = connect(&elsewhere).await;
    let name = target.config.get_dbname().unwrap().to_owned();

    let taking_over = tokio::task::spawn_blocking(move || {
        let ended = program.run(&["migrate", "up"]);
        (program, ended)
    });
    while !elsewhere.query_one(IS_LOCKED, &[&name]).await.unwrap().get::<_, bool>(0) {}
    let node = client_of(&database).await;
    node.batch_execute(
        "insert into devices (device_id) values ('pi-new')
             on conflict (device_id) do update set updated_at = current_timestamp;
         insert into sync_events (device_id, timestamp, total_errors) values ('pi-new', '2026-08-30 10:00', 1)",
    )
    .await
    .unwrap();
    let (program, ended) = taking_over.await.unwrap();
    assert_eq!(ended.code(), 0, "{ended:?}");
    let says = "somebody else is connected meanwhile: process ";
    assert!(ended.stderr.contains(says), "{ended:?}");
    assert_eq!(program.run(&["verify"]).code(), 1);
    program.run(&["verify", "--repair"]).success();
    assert_eq!(database.number("(select sum(total_syncs) from device_jobs)").await, 20_001);
    drop((node, elsewhere));
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk() {
    let disk = SmallDisk::new(64);
    let server = PostgresServer::with_small_disk(&disk);
    let target = server.create_database_on(&disk, "node_service").await;
    let database = TestDatabase::elsewhere(Target::Postgres(Box::new(target)));
    database.execute(&[SCHEMA, &history(100, 20_000)].concat()).await;
    let program = Program::new().with("DATABASE_URL", url(&database.target)).with("PORT", 0);
    let before = describe(&database).await;
    disk.fill();
    let failed = program.run(&["migrate", "up"]);
    let says = "taking over failed and was undone, the database is as it was: ";
    assert!(failed.failure().starts_with(says), "{failed:?}");
    assert!(failed.failure().contains("No space left on device"), "{failed:?}");
    disk.make_room();
    assert_eq!(describe(&database).await, before);
    program.run(&["migrate", "up"]).success();
    program.run(&["verify"]).success();
}
