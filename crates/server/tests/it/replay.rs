//! Backtests over stored reports: what a fleet lived through comes out again, and another policy shows what it would have
//! changed. The database that the reports are read from stays as it is.

use std::{fs, sync::Arc};

use pisync::{
    backtest::{self, History, HistoryRange, Scenario},
    clock::Clock,
    store::{self, Incident, IncidentQuery, Store},
};
use pisync_core::Timestamp;
use serde_json::{Value, json};

use crate::{
    json_output::documented,
    scenarios::scenarios,
    support::{
        events::{failure, success, write_at},
        program::Installed,
        store::{TestDatabase, TestStore},
    },
};

both_stores!(what_was_lived_through_comes_out_again, another_policy_is_compared);

/// The incidents of a store, as far as a replay has them.
async fn incidents(store: &dyn Store) -> Vec<String> {
    let mut all = Vec::new();
    for is_resolved in [false, true] {
        let query = IncidentQuery {
            is_resolved,
            kind: None,
            scope: None,
            group: None,
            device_id: None,
            since: None,
            limit: 1_000,
            after: None,
        };
        all.extend(store.incidents(&query).await.unwrap().incidents);
    }
    in_words(all)
}

fn in_words(incidents: Vec<Incident>) -> Vec<String> {
    let mut words: Vec<_> = incidents
        .into_iter()
        .map(|incident| {
            let Incident { scope, subject, kind, severity, since, opened_at, .. } = incident;
            let Incident { resolved_at, resolution, reopened, flapping_since, summary, .. } = incident;
            format!(
                "{scope} {subject} {kind} {severity} since {since}, opened {opened_at}, {resolved_at:?} \
                 {resolution:?}, reopened {reopened}, {flapping_since:?}, {summary}"
            )
        })
        .collect();
    words.sort();
    words
}

/// Whether only reports and outages happen in a scenario. What is set has been so from the beginning. Large fleets take long,
/// and show nothing else.
fn is_replayed(file: &Value) -> bool {
    const MOST_DEVICES: usize = 50;
    let groups = file["groups"].as_object().into_iter().flatten();
    let devices: usize = groups.map(|(_, devices)| devices.as_array().unwrap().len()).sum();
    if devices > MOST_DEVICES {
        return false;
    }
    let steps = file["steps"].as_array().unwrap();
    steps.iter().all(|step| step.get("request").is_none() && step.get("start").is_none())
}

async fn what_was_lived_through_comes_out_again(fixture: &TestStore) {
    let mut replayed = 0;
    for file in scenarios() {
        let text = fs::read(&file).unwrap();
        if !is_replayed(&serde_json::from_slice(&text).unwrap()) {
            continue;
        }
        let scenario: Scenario = serde_json::from_slice(&text).unwrap();
        let source = match fixture.is_postgres() {
            true => TestDatabase::postgres().await,
            false => TestDatabase::sqlite(),
        };
        source.migrate().await;
        let lived: Arc<_> = store::open(&source.target).await.unwrap();
        backtest::run(&scenario, &lived).await.unwrap();
        let range = HistoryRange { group: None, from: scenario.start.0, until: scenario.end.0 };
        let history = History::read(&*lived, range, |_| {}).await.unwrap();
        let copy = TestDatabase::sqlite();
        copy.migrate().await;
        let again: Arc<_> = store::open(&copy.target).await.unwrap();
        let came = backtest::replay(&history, None, &again, |_| {}).await.unwrap();
        assert_eq!(in_words(came), incidents(&*lived).await, "{}", scenario.id);
        for (store, database) in [(lived, source), (again, copy)] {
            store.close().await.unwrap();
            drop(store);
            database.remove().await;
        }
        replayed += 1;
    }
    assert!(replayed >= 8, "{replayed}");
}

/// Hours before the present; reports of a device come at the same minute of each.
fn hours_ago(hours: i64) -> Timestamp {
    let now = Clock::system().now();
    now.saturating_add_milliseconds(-hours * 3_600_000)
}

async fn another_policy_is_compared(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    let source = store::open(&database.target).await.unwrap();
    let mut writer = source.event_writer();
    for hours in (1..=72).rev() {
        let at = hours_ago(hours);
        let mut events = vec![success("well", at)];
        // It is silent for five hours.
        if !(40..45).contains(&hours) {
            events.push(success("silent", at));
        }
        let is_failing = (20..24).contains(&hours);
        events.push(if is_failing { failure("failing", at) } else { success("failing", at) });
        write_at(&mut *writer, at, events).await;
    }
    drop(writer);
    source.close().await.unwrap();
    drop(source);

    let policy = json!({"grace_seconds": 6 * 3600, "failing": {"in_a_row": 2}});
    fs::write(program.path("lenient.json"), policy.to_string()).unwrap();
    let (from, until) = (hours_ago(60).to_string(), hours_ago(1).to_string());
    let command = ["fleet", "backtest", "--from", &from, "--until", &until];
    let compared = program.run(&[&command[..], &["--policy", "lenient.json", "--json"]].concat());
    let compared = documented("fleet backtest", &compared);
    assert_eq!(
        (&compared["devices"], &compared["present"]["counts"]),
        (&json!(3), &json!({"device": {"failing": 1, "silent": 1}}))
    );
    let of = |list: &Value| -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let list = list.as_array().unwrap().iter();
        list.map(|incident| (text(&incident["subject"]), text(&incident["resolution"]))).collect()
    };
    let named = |subject: &str| vec![(subject.to_owned(), "recovered".to_owned())];
    assert_eq!(of(&compared["given"]["incidents"]), named("failing"));
    assert_eq!(of(&compared["difference"]["only_present"]), named("silent"));
    assert_eq!(compared["difference"]["only_given"], json!([]));
    assert_eq!(compared["difference"]["both"], 1);

    let said = program.run(&command);
    let said = said.success();
    assert!(said.contains("2 incidents: 1 of a failing device, 1 of a silent device"), "{said}");
    let said = program.run(&[&command[..], &["--policy", "lenient.json"]].concat());
    let said = said.success();
    assert!(said.contains("only under what is set now: 1 (1 under both)"), "{said}");
    // What began before is told from what is new.
    let from = hours_ago(42).to_string();
    let later = program.run(&["fleet", "backtest", "--from", &from, "--until", &until]);
    assert!(later.success().contains("before "), "{later:?}");
    assert_eq!(database.number("(select count(*) from incidents)").await, 0);
    assert_eq!(database.number("(select count(*) from device_health)").await, 0);

    fs::write(program.path("wrong.json"), r#"{"grace": 1, "recover_after": 0}"#).unwrap();
    let future = hours_ago(-2).to_string();
    for (words, code, complaint) in [
        (&["--from", &until, "--until", &from][..], 2, "--from must be before --until"),
        (&["--until", &future], 2, "--until must not be in the future"),
        (&["--from", "soon"], 2, "--from"),
        (&["--group", "nowhere"], 1, "no devices in the group nowhere"),
        (&["--policy", "wrong.json"], 2, "\"policy.recover_after\" must be greater"),
        (&["--policy", "wrong.json"], 2, "\"policy.grace\" is not allowed"),
        (&["--policy", "missing.json"], 2, "cannot read missing.json"),
        (&["--print"], 2, "--scenario"),
        (&["--scenario", "x.json", "--group", "y"], 2, "cannot be used with"),
    ] {
        let ended = program.run(&[&["fleet", "backtest"], words].concat());
        assert_eq!(ended.code(), code, "{ended:?}");
        assert!(ended.stderr.contains(complaint), "{ended:?}");
    }
}
