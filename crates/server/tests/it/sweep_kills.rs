//! Servers that are killed, or stand still, in the middle of a sweep: each device goes from one state to another once, and no
//! incident is missing or double.

use std::time::Duration;

use pisync::clock::Clock;
use pisync_core::Timestamp;
use serde_json::{Value, json};

use crate::support::{
    http::{failure, success, with},
    program::{Installed, Serving},
    store::{TestDatabase, on_postgres},
};

both_stores!(servers_are_killed_in_the_middle_of_sweeps);

/// How often.
const ROUNDS: usize = 20;

/// Groups that come in each round, and the devices of each.
const GROUPS: usize = 12;
const DEVICES: usize = 10;

/// Of the groups of every other round, so many devices fail: too few for an incident of the group.
const FEW: usize = 4;

/// After this time every server has swept again: the interval between sweeps, and a margin for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn present() -> Timestamp {
    Clock::system().now()
}

/// How many devices of each group fail in a round.
fn failing(round: usize) -> usize {
    if round.is_multiple_of(2) { FEW } else { DEVICES }
}

fn group_of(round: usize, group: usize) -> String {
    format!("r{round}-g{group}")
}

/// The devices of a round appear, and some of them fail three times. Half of all devices are well, so that the fleet is.
async fn report(serving: &Serving, round: usize) {
    let (mut roster, mut events) = (Vec::new(), Vec::new());
    for group in 0..GROUPS {
        for number in 0..DEVICES {
            let name = group_of(round, group);
            let device = format!("{name}-{number}");
            roster.push(json!({"device_id": device, "group": name}));
            if number < failing(round) {
                events.extend((0..3).map(|run| {
                    let event = failure(&device, present());
                    with(event, &json!({"event_id": format!("{device}-{run}")}))
                }));
            } else {
                events.push(success(&device, present()));
            }
            let other = format!("fine-{name}-{number}");
            roster.push(json!({"device_id": other, "group": format!("fine-{round}")}));
            events.push(success(&other, present()));
        }
    }
    serving.client.put("/api/devices", &Value::Array(roster)).await.data(200);
    let stored = serving.client.post("/api/sync-events", &Value::Array(events)).await;
    stored.json(200);
}

/// The incidents that must be open after so many rounds.
fn expected_incidents(rounds: usize) -> Vec<String> {
    let mut expected = Vec::new();
    for round in 0..rounds {
        for group in 0..GROUPS {
            let name = group_of(round, group);
            if failing(round) == DEVICES {
                expected.push(format!("group {name} failing"));
            } else {
                let devices = (0..FEW).map(|number| format!("device {name}-{number} failing"));
                expected.extend(devices);
            }
        }
    }
    expected.sort();
    expected
}

/// What a sweep has left to do.
pub(crate) async fn left(database: &TestDatabase) -> i64 {
    let health_of = match database.file() {
        Some(_) => "h.device = d.id",
        None => "h.device_id = d.device_id",
    };
    let left = format!(
        "(select count(*) from unreconciled_devices)
         + (select count(*) from devices d where not exists (select 1 from device_health h where {health_of}
                                                                and h.state <> 'never'))"
    );
    database.number(&left).await
}

pub(crate) async fn wait_until_nothing_is_left(database: &TestDatabase) {
    let until = std::time::Instant::now() + PATIENCE;
    while left(database).await > 0 {
        assert!(std::time::Instant::now() < until, "{} are left", left(database).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Nothing is missing or double.
async fn assert_all_once(database: &TestDatabase, rounds: usize) {
    let incidents = "select scope || ' ' || subject || ' ' || kind from incidents";
    let mut found = database.texts(incidents).await;
    found.sort();
    assert_eq!(found, expected_incidents(rounds));
    let failing: usize = (0..rounds).map(|round| failing(round) * GROUPS).sum();
    let failing = i64::try_from(failing).unwrap();
    for (what, count, expected) in [
        ("resolved incidents", "(select count(*) from incidents where resolved_at is not null)", 0),
        (
            "devices that became failing",
            "(select count(*) from state_changes where \"to\" = 'failing')",
            failing,
        ),
        (
            "devices that became so once",
            "(select count(distinct device_id) from state_changes where \"to\" = 'failing')",
            failing,
        ),
        (
            "failing devices in the numbers of groups",
            "(select sum(devices) from group_states where state = 'failing')",
            failing,
        ),
        (
            "incidents opened in timelines",
            "(select count(*) from incident_entries where what = 'opened')",
            i64::try_from(found.len()).unwrap(),
        ),
        (
            "members of incidents of groups",
            "(select count(*) from incident_members where left_at is null)",
            i64::try_from(rounds / 2 * GROUPS * DEVICES).unwrap(),
        ),
    ] {
        assert_eq!(database.number(count).await, expected, "{what}");
    }
}

/// A server sweeps as soon as it starts, and is killed then. On PostgreSQL, another one sweeps beside it, every 15 s. The times
/// between start and end are such that most kills come in the middle of the sweep.
async fn servers_are_killed_in_the_middle_of_sweeps(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    let beside = installed.is_postgres().then(|| program.serve(&[]));
    let mut delay = Duration::from_millis(100);
    let mut middles = 0;
    for round in 0..ROUNDS {
        let other = if beside.is_none() { Some(program.serve(&[])) } else { None };
        let serving = beside.as_ref().or(other.as_ref()).unwrap();
        report(serving, round).await;
        if let Some(other) = other {
            other.signal("KILL");
            other.wait();
        }
        let before = left(database).await;
        let serving = program.serve(&[]);
        tokio::time::sleep(delay).await;
        serving.signal("KILL");
        serving.wait();
        let after = left(database).await;
        middles += usize::from((1..before).contains(&after));
        // What was too late for this round is earlier in the next.
        delay = if after == 0 { delay.mul_f64(0.7) } else { delay.mul_f64(1.2) };
    }
    let last = if beside.is_none() { Some(program.serve(&[])) } else { None };
    wait_until_nothing_is_left(database).await;
    assert_all_once(database, ROUNDS).await;
    assert!(middles >= 3, "{middles} of {ROUNDS} kills came in the middle of a sweep");
    for serving in beside.into_iter().chain(last) {
        serving.stop();
    }
}

/// A server stands still while it holds the lock of sweeps. The other one goes on without it, and nothing is different when it
/// wakes up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stood_still_in_a_sweep_harms_nothing() {
    const HELD: &str = "
        (select count(*)
           from pg_locks l
           join pg_database d on d.oid = l.database
          where l.locktype = 'advisory' and d.datname = current_database() and l.granted
            and (l.classid::bigint << 32) + l.objid::bigint = 8100132370182766597)
    ";
    on_postgres(async |installed: &Installed| {
        let Installed { program, database } = installed;
        program.run(&["db", "setup"]).success();
        let beside = program.serve(&[]);
        let mut delay = Duration::from_millis(50);
        let mut rounds = 0;
        let still = loop {
            report(&beside, rounds).await;
            rounds += 1;
            let still = program.serve(&[]);
            tokio::time::sleep(delay).await;
            still.signal("STOP");
            if left(database).await > 0 && database.number(HELD).await > 0 {
                break still;
            }
            assert!(rounds < 2 * ROUNDS, "no server stood still in a sweep");
            delay = if left(database).await == 0 { delay.mul_f64(0.8) } else { delay.mul_f64(1.1) };
            still.signal("CONT");
            still.stop();
        };
        // The database frees the lock of who does nothing.
        wait_until_nothing_is_left(database).await;
        assert_all_once(database, rounds).await;
        still.signal("CONT");
        report(&still, rounds).await;
        rounds += 1;
        wait_until_nothing_is_left(database).await;
        assert_all_once(database, rounds).await;
        still.stop();
        beside.stop();
    })
    .await;
}
