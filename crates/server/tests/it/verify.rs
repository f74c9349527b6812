//! `pisync verify`: figures are held against the raw events, also behind a server's back and beside one
//! that is writing.

use std::sync::Arc;

use pisync::{
    fleet::sweep::sweep,
    store::{
        self, DeviceChange, DeviceQuery, DeviceSort, Freshness, GroupQuery, JobDifference,
        PauseChange, StateDifferences, Store, Window,
    },
};
use serde_json::json;

use crate::{
    store_contract::{
        nodes::be_a_node,
        retention::{aggregate, expire, retention},
    },
    support::{
        events::{
            at, device_id, failure, group_name, later, now, of_job, somebody, success, write,
            write_at,
        },
        http::{event, with},
        program::Installed,
        store::{TestStore, assert_right, differences},
    },
};

both_stores!(
    what_ingest_keeps_is_right,
    what_foreign_sql_writes_is_found_and_repaired,
    wrong_figures_are_found_and_repaired,
    a_page_ends_between_devices,
    a_repair_beside_a_server_that_writes,
    wrong_sums_are_found_and_repaired,
    a_repair_of_sums_beside_aggregation,
    what_is_left_of_old_events_tells_which_sums_are_too_small,
    a_deletion_under_way_is_no_fault,
    states_are_counted_and_ordered_again,
    states_are_made_good_beside_sweeps,
    the_command,
);

async fn what_ingest_keeps_is_right(fixture: &TestStore) {
    assert_right(&differences(&*fixture.store, false).await);
    let sent = be_a_node(Arc::clone(&fixture.store), 5, 60).await;
    assert_right(&differences(&*fixture.store, false).await);
    let page = fixture.store.verify(None, later(), false).await.unwrap();
    assert_eq!((page.devices, page.events), (6, sent.len() as u64));
    assert_eq!((page.nameless_devices, page.next), (0, None));
    // Nor does a repair change what is right.
    assert_right(&differences(&*fixture.store, true).await);
    assert_right(&differences(&*fixture.store, false).await);
}

/// An insert of events as another program does it: rows are `(device, timestamp, total_errors, job)`.
fn foreign_insert(fixture: &TestStore, rows: &[(&str, i64, u32, Option<&str>)]) -> String {
    let values = rows.iter().map(|(device, second, errors, job)| {
        let job = job.map_or("null".to_owned(), |job| format!("'{job}'"));
        let (timestamp, received) = (at(*second), now());
        if fixture.is_postgres() {
            format!("('{device}', '{timestamp}', 2, {errors}, 1.25, {job}, '{received}')")
        } else {
            format!(
                "((select id from devices where device_id = '{device}'), {}, 2, {errors}, 125, {job}, {})",
                timestamp.as_millisecond(),
                received.as_millisecond()
            )
        }
    });
    let values: Vec<_> = values.collect();
    let device = if fixture.is_postgres() { "device_id" } else { "device" };
    format!(
        "insert into sync_events (
             {device}, timestamp, total_files_synced, total_errors, internet_speed, job, created_at
         ) values {}",
        values.join(", ")
    )
}

/// Each figure that differs, as a line.
fn lines(differences: &[JobDifference]) -> Vec<String> {
    let lines = differences.iter().flat_map(|job| {
        job.figures().into_iter().map(move |figure| {
            let name = job.job.as_deref().unwrap_or("-");
            let (stored, recounted) = (figure.stored, figure.recounted);
            format!("{} {name} {}: {stored} -> {recounted}", job.device_id, figure.figure)
        })
    });
    lines.collect()
}

async fn what_foreign_sql_writes_is_found_and_repaired(fixture: &TestStore) {
    write(&mut *fixture.writer(), vec![failure("known", at(-50)), success("other", at(0))]).await;
    let register = format!(
        "insert into devices (device_id, created_at) values ('new', {})",
        if fixture.is_postgres() { "now()".to_owned() } else { now().as_millisecond().to_string() }
    );
    fixture.database.execute(&register).await;
    // A device that never reported has no figures, and needs none.
    assert_right(&differences(&*fixture.store, false).await);
    let insert = foreign_insert(
        fixture,
        &[
            ("known", -40, 3, None),
            ("known", -60, 0, None),
            ("known", -30, 0, Some("nightly")),
            ("new", -20, 1, None),
        ],
    );
    fixture.database.execute(&insert).await;

    let found = differences(&*fixture.store, false).await;
    let expected = [
        "known - total_syncs: 1 -> 3".to_owned(),
        "known - failed_syncs: 1 -> 2".to_owned(),
        "known - total_files_synced: 0 -> 4".to_owned(),
        "known - total_errors: 1 -> 4".to_owned(),
        "known - speed_sum: 0 -> 250".to_owned(),
        "known - speed_count: 0 -> 2".to_owned(),
        format!("known - first_sync: {} -> {}", at(-50), at(-60)),
        format!("known - last_sync: {} -> {}", at(-50), at(-40)),
        format!("known - last_success: none -> {}", at(-60)),
        format!("known - last_failure: {} -> {}", at(-50), at(-40)),
        "known - consecutive_failures: 1 -> 2".to_owned(),
    ];
    assert_eq!(lines(&found)[..11], expected);
    let missing = |job: &JobDifference| job.stored.is_none() && job.recounted.is_some();
    assert!(missing(&found[1]) && missing(&found[2]), "{found:?}");
    assert_eq!(found[1].job.as_deref(), Some("nightly"));
    assert_eq!((found[2].device_id.as_str(), found.len()), ("new", 3));
    // Looking changes nothing; a repair tells what it found.
    assert_eq!(differences(&*fixture.store, false).await, found);
    assert_eq!(differences(&*fixture.store, true).await, found);
    assert_right(&differences(&*fixture.store, false).await);

    // From then on events add to it.
    let events = vec![failure("known", at(0)), of_job("nightly", failure("known", at(0)))];
    let written = write(&mut *fixture.writer(), events).await;
    let streaks: Vec<_> = written.streaks.iter().map(|streak| streak.after).collect();
    assert_eq!(streaks, [3, 1]);
    assert_right(&differences(&*fixture.store, false).await);
    let stats = fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap();
    assert_eq!((stats.total_devices, stats.figures.total_syncs), (3, 8));
}

async fn wrong_figures_are_found_and_repaired(fixture: &TestStore) {
    let sent = be_a_node(Arc::clone(&fixture.store), 6, 30).await;
    for corruption in [
        "update device_jobs set total_syncs = total_syncs + 1 where job = 'job-1'",
        "update device_jobs set consecutive_failures = 77, last_success = null",
        "update device_jobs set first_sync = last_sync, speed_sum = 5, total_errors = 0",
        "delete from device_jobs where job = ''",
        // A job that no event names.
        "update device_jobs set job = 'job-x' where job = 'job-2'",
        "delete from device_jobs",
    ] {
        fixture.database.execute(corruption).await;
        let found = differences(&*fixture.store, false).await;
        assert!(!found.is_empty(), "{corruption}");
        assert_eq!(differences(&*fixture.store, true).await, found);
        assert_right(&differences(&*fixture.store, false).await);
    }
    let stats = fixture.store.fleet_stats(now(), 10, Freshness::Everything).await.unwrap();
    assert_eq!(stats.figures.total_syncs.cast_unsigned(), sent.len() as u64);

    if !fixture.is_postgres() {
        // Foreign keys are off in many programs unless they are asked for.
        let delete = "pragma foreign_keys = off; delete from devices where device_id = 'pi-3'";
        fixture.database.execute(delete).await;
        for repair in [false, true] {
            let page = fixture.store.verify(None, later(), repair).await.unwrap();
            assert_eq!((page.nameless_devices, page.differences.len()), (1, 0));
        }
    }
}

async fn a_page_ends_between_devices(fixture: &TestStore) {
    let mut writer = fixture.writer();
    for start in (0..600).step_by(100) {
        let devices = start..start + 100;
        let events = devices.map(|number| failure(&format!("pi-{number:03}"), at(-number)));
        write(&mut *writer, events.collect()).await;
    }
    let (mut devices, mut events, mut after) = (0, 0, None);
    let mut pages = 0;
    loop {
        let page = fixture.store.verify(after.as_deref(), later(), false).await.unwrap();
        (devices, events, pages) = (devices + page.devices, events + page.events, pages + 1);
        assert_right(&page.differences);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!((devices, events, pages), (600, 600, 3));
    // Each wrong one is found on one page.
    fixture.database.execute("update device_jobs set total_syncs = 2").await;
    assert_eq!(differences(&*fixture.store, true).await.len(), 600);
    assert_right(&differences(&*fixture.store, false).await);

    // What is said to be much is looked at in smaller pages.
    let much = "update device_jobs set total_syncs = 150000";
    fixture.database.execute(much).await;
    let page = fixture.store.verify(None, later(), false).await.unwrap();
    assert_eq!((page.devices, page.next.as_deref()), (1, Some("pi-000")));
}

/// Neither makes the other's figures wrong, whatever meets whatever.
async fn a_repair_beside_a_server_that_writes(fixture: &TestStore) {
    // As another process: connections of its own.
    let other = store::open(fixture.target()).await.unwrap();
    let node = tokio::spawn(be_a_node(Arc::clone(&fixture.store), 7, 150));
    let mut rounds = 0_u32;
    while !node.is_finished() || rounds == 0 {
        // Looking never finds what is only half there.
        assert_right(&differences(&*other, false).await);
        let corruption = match rounds % 3 {
            0 => "update device_jobs set total_syncs = total_syncs + 1",
            1 => "update device_jobs set last_success = null, consecutive_failures = 99",
            _ => "delete from device_jobs",
        };
        let device = if fixture.is_postgres() {
            "device_id = 'pi-2'"
        } else {
            "device = (select id from devices where device_id = 'pi-2')"
        };
        // One row alone: the test itself must not meet the server in a deadlock.
        let corruption = format!("{corruption} where {device} and job = 'job-1'");
        fixture.database.execute(&corruption).await;
        differences(&*other, true).await;
        rounds += 1;
    }
    node.await.unwrap();
    assert_right(&differences(&*other, false).await);
}

/// Recounts the sums by day and hour, and gives how many days and hours were wrong.
async fn wrong_sums(store: &dyn Store, repair: bool) -> (usize, usize) {
    let days = store.verify(None, later(), repair).await.unwrap().days;
    assert!(days.iter().all(|day| !day.figures().is_empty() && day.device_id.is_some()));
    let hours = store.verify_hours().await.unwrap();
    assert!(hours.iter().all(|hour| !hour.figures().is_empty() && hour.device_id.is_none()));
    if repair {
        for hour in &hours {
            assert!(store.repair_hour(hour).await.unwrap(), "{hour:?}");
            // Once is enough.
            assert!(!store.repair_hour(hour).await.unwrap(), "{hour:?}");
        }
    }
    (days.len(), hours.len())
}

async fn wrong_sums_are_found_and_repaired(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let hours = 60 * 60;
    for hour in 0..50 {
        let events =
            vec![success("pi-0", at(-hour * hours)), failure("pi-1", at(-hour * hours - 1))];
        write_at(&mut *writer, at(-120), events).await;
    }
    // What is not aggregated yet is in no sum.
    assert_eq!(wrong_sums(&*fixture.store, false).await, (0, 0));
    while fixture.store.aggregate_events(now()).await.unwrap() {}
    write(&mut *writer, vec![success("pi-0", at(0))]).await;
    assert_eq!(wrong_sums(&*fixture.store, true).await, (0, 0));

    let window = Window::last_days(now(), 7);
    let right = fixture.store.window_figures(&window).await.unwrap();
    for (wrong, found) in [
        ("update device_days set failed_syncs = failed_syncs + 1", (6, 0)),
        ("update fleet_hours set speed_sum = 0, speed_count = 7", (0, 51)),
        ("delete from device_days", (6, 0)),
        ("delete from fleet_hours", (0, 51)),
    ] {
        fixture.database.execute(wrong).await;
        assert_eq!(wrong_sums(&*fixture.store, false).await, found, "{wrong}");
        assert_eq!(wrong_sums(&*fixture.store, true).await, found, "{wrong}");
        assert_eq!(wrong_sums(&*fixture.store, true).await, (0, 0), "{wrong}");
        assert_eq!(fixture.store.window_figures(&window).await.unwrap(), right, "{wrong}");
    }
    for wrong in ["update fleet_totals set speed_sum = 1", "delete from fleet_totals"] {
        fixture.database.execute(wrong).await;
        assert_eq!(fixture.store.verify_summaries(now(), true).await.unwrap().totals, 1, "{wrong}");
        assert_eq!(fixture.store.verify_summaries(now(), false).await.unwrap().number(), 0);
        let stats = fixture.store.fleet_stats(now(), 0, Freshness::Everything).await.unwrap();
        assert_eq!(stats.figures.total_syncs, 101, "{wrong}");
    }
    // Nor was anything counted that is not aggregated.
    aggregate(&*fixture.store).await;
    assert_eq!(fixture.store.window_figures(&window).await.unwrap(), right);
    assert_eq!(wrong_sums(&*fixture.store, false).await, (0, 0));
}

/// Neither makes the other's sums wrong.
async fn a_repair_of_sums_beside_aggregation(fixture: &TestStore) {
    let other = store::open(fixture.target()).await.unwrap();
    let mut writer = fixture.writer();
    for round in 0..20 {
        let device = format!("pi-{}", round % 3);
        write(&mut *writer, vec![failure(&device, at(-round)), success(&device, at(-round))]).await;
        let wrong = "update device_days set total_syncs = total_syncs + 1";
        fixture.database.execute(wrong).await;
        let repair = async {
            other.verify(None, later(), true).await.unwrap();
            for hour in other.verify_hours().await.unwrap() {
                other.repair_hour(&hour).await.unwrap();
            }
        };
        tokio::join!(aggregate(&*fixture.store), repair);
        // What was wrong and has grown since is found again.
        other.verify(None, later(), true).await.unwrap();
        assert_eq!(wrong_sums(&*other, false).await, (0, 0), "round {round}");
    }
}

async fn what_is_left_of_old_events_tells_which_sums_are_too_small(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let long_ago = at(-90 * 24 * 60 * 60);
    let old = vec![success("pi-0", long_ago), success("pi-1", long_ago)];
    write_at(&mut *writer, long_ago, old).await;
    for device in ["pi-0", "pi-1"] {
        write(&mut *writer, vec![failure(device, at(-60)), success(device, at(0))]).await;
    }
    aggregate(&*fixture.store).await;
    expire(&*fixture.store, &retention(30)).await;
    assert!(fixture.store.verify(None, later(), false).await.unwrap().raw_since.is_some());
    assert_eq!(wrong_sums(&*fixture.store, false).await, (0, 0));
    // The hours of its old events are not known any more.
    let by = somebody();
    fixture.store.delete_device(&device_id("pi-0"), &by).await.unwrap();
    assert_eq!(wrong_sums(&*fixture.store, false).await, (0, 0));
    fixture.database.execute("update device_days set total_syncs = 1").await;
    fixture.database.execute("update fleet_hours set total_syncs = 0").await;
    assert_eq!(wrong_sums(&*fixture.store, false).await, (1, 1));
    let page = fixture.store.verify(None, later(), true).await.unwrap();
    assert_eq!(page.days.len(), 1);
    assert_eq!(fixture.store.verify(None, later(), true).await.unwrap().days, page.days);
}

/// How many rows about states differ, as `verify` finds it.
async fn wrong_states(store: &dyn Store) -> (u64, u64) {
    let StateDifferences { group_states, device_states } =
        store.verify_summaries(now(), false).await.unwrap().states;
    (group_states, device_states)
}

/// Devices in two groups and in none: some are silent, one is paused, and some have just reported.
async fn swept(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let old = (0..6).map(|number| success(&format!("old-{number}"), at(-7_200))).collect();
    write_at(&mut *writer, at(-7_200), old).await;
    let new = (0..6).map(|number| success(&format!("new-{number}"), at(-60))).collect();
    write_at(&mut *writer, at(-60), new).await;
    // Who is silent stays so in another group.
    assert!(sweep(&*fixture.store, at(-30)).await.unwrap().is_complete);
    for (device, group) in [("old-0", "a"), ("old-1", "a"), ("new-0", "a"), ("new-1", "b")] {
        let change =
            DeviceChange { group: Some(Some(group_name(group))), ..DeviceChange::default() };
        fixture.store.update_device(&device_id(device), &change, &somebody()).await.unwrap();
    }
    let pause = DeviceChange { pause: Some(PauseChange::Until(None)), ..DeviceChange::default() };
    fixture.store.update_device(&device_id("new-2"), &pause, &somebody()).await.unwrap();
    assert!(sweep(&*fixture.store, at(0)).await.unwrap().is_complete);
}

/// What people see of `group_states` and `device_states`.
async fn seen(store: &dyn Store) -> String {
    let groups = store.groups(&GroupQuery { search: None, limit: 100, offset: 0 }).await.unwrap();
    let groups: Vec<_> = groups.items.iter().map(|group| (&group.name, group.states)).collect();
    let counts = store.fleet().await.unwrap().states;
    let query = DeviceQuery {
        search: None,
        group: None,
        tag: None,
        states: Vec::new(),
        is_overdue: false,
        sort: DeviceSort::Status,
        descending: false,
        limit: 100,
        offset: 0,
        after: None,
    };
    let devices = store.devices(&query).await.unwrap().items;
    let order: Vec<_> = devices.iter().map(|device| &device.device_id).collect();
    format!("{groups:?} {counts:?} {order:?}")
}

/// Whatever other programs make of them, the numbers and the order of devices by state are found wrong, and are right again.
async fn states_are_counted_and_ordered_again(fixture: &TestStore) {
    let store = &*fixture.store;
    swept(fixture).await;
    assert_eq!(wrong_states(store).await, (0, 0));
    assert_eq!(store.correct_states().await.unwrap(), StateDifferences::default());
    let right = seen(store).await;
    let lone = if fixture.is_postgres() {
        "device_id = 'new-3'"
    } else {
        "device = (select id from devices where device_id = 'new-3')"
    };
    // In `a` there are silent and well devices, in `b` well ones, and in no group silent, well and paused ones.
    for (wrong, expected) in [
        ("update group_states set devices = devices + 1".to_owned(), (6, 0)),
        ("update group_states set expected = 0 where state = 'silent'".to_owned(), (2, 0)),
        ("update group_states set devices = -5 where state = 'ok'".to_owned(), (3, 0)),
        ("delete from group_states".to_owned(), (6, 0)),
        ("insert into group_states values ('gone', 'silent', 7, 7)".to_owned(), (1, 0)),
        ("update device_states set urgency = 5 - urgency".to_owned(), (0, 12)),
        (format!("update device_states set since = since + 1 where {lone}"), (0, 1)),
        ("delete from device_states".to_owned(), (0, 12)),
        // A state that nobody counted, and a row of a device that has none.
        (format!("update device_health set state = 'failing' where {lone}"), (2, 1)),
        (format!("delete from device_health where {lone}"), (1, 1)),
    ] {
        for is_command in [true, false] {
            fixture.database.execute(&wrong).await;
            if is_command {
                assert_eq!(wrong_states(store).await, expected, "{wrong}");
                let found = store.verify_summaries(now(), true).await.unwrap();
                assert_eq!(found.number(), expected.0 + expected.1, "{wrong}");
            } else if !wrong.contains("device_health") {
                let found = store.correct_states().await.unwrap();
                assert_eq!((found.group_states, found.device_states), expected, "{wrong}");
            }
            assert_eq!(wrong_states(store).await, (0, 0), "{wrong}");
            if !wrong.contains("device_health") {
                assert_eq!(seen(store).await, right, "{wrong}");
            }
        }
    }
}

/// Sweeps and deletions go on while numbers are made good, and none of them makes the other's wrong.
async fn states_are_made_good_beside_sweeps(fixture: &TestStore) {
    swept(fixture).await;
    let other = store::open(fixture.target()).await.unwrap();
    for round in 0..12_i64 {
        let wrong = match round % 3 {
            0 => "update group_states set devices = devices + 3, expected = 1",
            1 => "delete from group_states",
            _ => "delete from device_states",
        };
        fixture.database.execute(wrong).await;
        let now = at(1_800 * (round + 1));
        let mut writer = fixture.writer();
        let device = format!("new-{}", round % 6);
        let meanwhile = async {
            write_at(&mut *writer, now, vec![failure(&device, now)]).await;
            sweep(&*fixture.store, now).await.unwrap();
            if round % 4 == 3 {
                let gone = device_id(&format!("old-{}", round / 4));
                fixture.store.delete_device(&gone, &somebody()).await.unwrap();
            }
            sweep(&*fixture.store, now.saturating_add_milliseconds(15_000)).await.unwrap();
        };
        let (_, corrected) = tokio::join!(meanwhile, other.correct_states());
        corrected.unwrap();
        assert_eq!(wrong_states(&*other).await, (0, 0), "round {round}");
    }
}

async fn a_deletion_under_way_is_no_fault(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["migrate", "up"]).success();
    let store = store::open(&database.target).await.unwrap();
    write(&mut *store.event_writer(), vec![success("going", at(0)), success("pi", at(0))]).await;
    assert!(store.begin_deletion(&device_id("going"), &somebody()).await.unwrap());
    database.execute("delete from sync_events where id = 1").await;
    for arguments in [&["verify"][..], &["verify", "--repair"]] {
        let ended = program.run(arguments);
        let said = ended.success();
        assert!(said.contains("devices: 1, events: 1; differing jobs: 0, days: 0"), "{said}");
        assert!(said.contains("being deleted, and were not recounted: 1;"), "{said}");
    }
    // Another's is one.
    database.execute("delete from sync_events").await;
    program.run(&["verify"]).failure();
}

async fn the_command(installed: &Installed) {
    let Installed { program, database } = installed;
    let ended = program.run(&["verify"]);
    let expected =
        if installed.is_postgres() { "has pending migrations" } else { "no database at" };
    assert!(ended.unanswered().contains(expected), "{ended:?}");
    assert!(database.file().is_none_or(|file| !file.exists()), "looking made a file");
    program.run(&["migrate", "up"]).success();
    let clean = "devices: 0, events: 0; differing jobs: 0, days: 0, hours: 0, summaries: 0\n";
    assert_eq!(program.run(&["verify"]).success(), clean);

    let serving = program.serve(&[]);
    for job in ["hourly", "nightly"] {
        serving.client.store(&with(event("pi"), &json!({"job": job}))).await;
    }
    let right = "devices: 1, events: 2; differing jobs: 0, days: 0, hours: 0, summaries: 0\n";
    assert_eq!(program.run(&["verify"]).success(), right);

    let corrupt = "update device_jobs set total_errors = 4, last_failure = last_success
                    where job = 'nightly'";
    database.execute(corrupt).await;
    let ended = program.run(&["verify"]);
    assert!(ended.failure().ends_with("repair them with `pisync verify --repair`"), "{ended:?}");
    let found = format!(
        "pi, job nightly: total_errors is 4, recounted 0\n\
         pi, job nightly: last_failure is {}, recounted none\n\
         devices: 1, events: 2; differing jobs: 1, days: 0, hours: 0, summaries: 0",
        at(-60)
    );
    assert_eq!(ended.stdout, format!("{found}\n"));
    let ended = program.run(&["verify", "--repair"]);
    assert_eq!(ended.success(), format!("{found} (repaired)\n"));
    assert_eq!(program.run(&["verify"]).success(), right);
    serving.stop();

    if !installed.is_postgres() {
        database.execute("pragma foreign_keys = off; delete from devices").await;
        let ended = program.run(&["verify", "--repair"]);
        assert!(ended.failure().contains("1 devices that are not registered"), "{ended:?}");
    }
}
