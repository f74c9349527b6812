//! Backtests over stored reports: what a fleet lived through comes out again, and another policy shows what it would have
//! changed, also of the messages by each channel. The database that the reports are read from stays as it is.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use pisync::{
    backtest::{self, Expected, History, HistoryRange, Scenario},
    clock::Clock,
    store::{
        self, ChannelCreation, Incident, IncidentQuery, NewChannel, NewConfig, Route, RouteDigest,
        RoutesOutcome, Store,
    },
};
use pisync_core::Timestamp;
use serde_json::{Value, json};

use crate::{
    json_output::documented,
    scenarios::scenarios,
    support::{
        events::{failure, somebody, success, write_at},
        program::{Ended, Installed, Program},
        store::{TestDatabase, TestStore},
    },
};

both_stores!(
    what_was_lived_through_comes_out_again,
    another_policy_is_compared,
    messages_are_those_of_the_stored_channels,
    a_replay_begins_where_the_store_does,
);

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
        let scenario = Scenario::read(&text).unwrap();
        let source = match fixture.is_postgres() {
            true => TestDatabase::postgres().await,
            false => TestDatabase::sqlite(),
        };
        source.migrate().await;
        let lived: Arc<_> = store::open(&source.target).await.unwrap();
        let told = backtest::run(&scenario, &lived, |_| {}).await.unwrap().messages;
        let range = HistoryRange { group: None, from: scenario.start.0, until: scenario.end.0 };
        let history = History::read(&*lived, range, |_| {}).await.unwrap();
        let copy = TestDatabase::sqlite();
        copy.migrate().await;
        let again: Arc<_> = store::open(&copy.target).await.unwrap();
        let came = backtest::replay(&history, None, &again, |_, _| {}).await.unwrap();
        assert_eq!(in_words(came.incidents), incidents(&*lived).await, "{}", scenario.id);
        let messages: Vec<_> = came.messages.into_iter().map(Into::into).collect();
        let told_again = Expected { messages, ..Expected::default() };
        let told = Expected { messages: told, ..Expected::default() };
        assert_eq!(told.differences(&told_again), [""; 0], "{}", scenario.id);
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

/// Three days of three devices: one is well, one was silent for five hours, and four runs of one have failed.
async fn write_reports(source: &Arc<dyn Store>) {
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
}

/// Asks for a backtest of most of these days.
fn command() -> [String; 6] {
    let (from, until) = (hours_ago(60).to_string(), hours_ago(1).to_string());
    ["fleet", "backtest", "--from", &from, "--until", &until].map(str::to_owned)
}

fn run(program: &Program, command: &[String], more: &[&str]) -> Ended {
    let words: Vec<_> = command.iter().map(String::as_str).chain(more.iter().copied()).collect();
    program.run(&words)
}

async fn another_policy_is_compared(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    let source: Arc<dyn Store> = store::open(&database.target).await.unwrap();
    write_reports(&source).await;
    source.close().await.unwrap();
    drop(source);

    let policy = json!({"grace_seconds": 6 * 3600, "failing": {"in_a_row": 2}});
    fs::write(program.path("lenient.json"), policy.to_string()).unwrap();
    let command = command();
    let compared = run(program, &command, &["--policy", "lenient.json", "--json"]);
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
    // Where there is no channel, one gets everything.
    let everything = json!([{"id": null, "name": "everything", "kind": "webhook", "enabled": true, "messages": 4}]);
    assert_eq!(compared["present"]["channels"], everything);
    assert_eq!(
        compared["difference"]["messages"],
        json!({
            "present": 4, "given": 2,
            "channels": [{"id": null, "name": "everything", "present": 4, "given": 2}],
        })
    );
    let messages = compared["given"]["messages"].as_array().unwrap();
    let told: Vec<_> = messages.iter().map(|message| &message["items"][0]["event"]).collect();
    assert_eq!(told, ["opened", "resolved"]);
    let incident = &compared["given"]["incidents"][0];
    let item = json!({
        "incident": incident["id"], "event": "opened", "scope": "device", "subject": "failing", "kind": "failing",
    });
    assert_eq!(messages[0]["items"], json!([item]));
    assert_eq!(
        (&messages[0]["channel"], &messages[0]["kind"], &messages[0]["group"]),
        (&json!("everything"), &json!("incidents"), &Value::Null)
    );

    let said = run(program, &command, &[]);
    let said = said.success();
    assert!(said.contains("2 incidents: 1 of a failing device, 1 of a silent device"), "{said}");
    assert!(said.contains("under what is set now, 4 messages\n"), "{said}");
    assert!(said.contains("everything  no channel yet  4\n"), "{said}");
    assert!(said.contains("  everything  device silent silent opened\n"), "{said}");
    let said = run(program, &command, &["--policy", "lenient.json"]);
    let said = said.success();
    assert!(said.contains("only under what is set now: 1 (1 under both)"), "{said}");
    assert!(said.contains("under lenient.json, 2 messages instead of 4\n"), "{said}");
    // What began before is told from what is new.
    let (from, until) = (hours_ago(42).to_string(), hours_ago(1).to_string());
    let later = program.run(&["fleet", "backtest", "--from", &from, "--until", &until]);
    assert!(later.success().contains("before "), "{later:?}");
    assert_eq!(database.number("(select count(*) from incidents)").await, 0);
    assert_eq!(database.number("(select count(*) from device_health)").await, 0);

    fs::write(program.path("wrong.json"), r#"{"grace": 1, "recover_after": 0}"#).unwrap();
    for (words, code, complaint) in [
        (&["--from", &until, "--until", &from][..], 2, "--from must be before --until"),
        (&["--from", "2999-01-01"], 2, "--from must be before --until"),
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

/// Each day at a full hour of UTC, which is hours away from the beginning and the end of what is replayed.
fn digest() -> RouteDigest {
    let hour = &hours_ago(-6).to_string()[11..13];
    let at = format!("{hour}:00").parse().unwrap();
    RouteDigest { at, days: Vec::new(), timezone: "UTC".to_owned() }
}

/// One channel of the defaults, one that a route asks for reminders and digests and whose secrets nobody can read, and one that
/// is switched off.
async fn create_channels(source: &Arc<dyn Store>, digest: &RouteDigest) {
    let mut ids = Vec::new();
    for (name, kind, is_enabled) in
        [("ops", "webhook", true), ("off", "ntfy", false), ("pager", "slack", true)]
    {
        let channel = NewChannel {
            name: name.to_owned(),
            kind: kind.to_owned(),
            config: NewConfig {
                public: json!({}),
                secrets: Some(Arc::new(|_| Ok(b"locked".to_vec()))),
            },
            is_enabled,
            is_default: Some(name != "pager"),
            template: None,
        };
        match source.create_channel(&channel, &somebody()).await.unwrap() {
            ChannelCreation::Created(id) => ids.push(id),
            other => panic!("{other:?}"),
        }
    }
    let route = json!({
        "match": {"groups": [], "tags": [], "kinds": ["failing"], "scopes": [], "severity_at_least": "info"},
        "channels": [ids[2]], "wait_seconds": 60, "interval_seconds": 300, "remind_seconds": 3600,
        "digest": {"at": digest.at.strftime("%H:%M").to_string(), "days": [], "timezone": "UTC"},
        "stop": true,
    });
    let route = Route::from_json(&route);
    let version = source.routes().await.unwrap().version;
    let replaced = source.replace_routes(version, &[route.unwrap()], &somebody()).await.unwrap();
    assert!(matches!(replaced, RoutesOutcome::Replaced(_)), "{replaced:?}");
}

async fn messages_are_those_of_the_stored_channels(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    let source: Arc<dyn Store> = store::open(&database.target).await.unwrap();
    write_reports(&source).await;
    let digest = digest();
    create_channels(&source, &digest).await;
    source.close().await.unwrap();
    drop(source);

    let policy = json!({"grace_seconds": 6 * 3600, "failing": {"in_a_row": 2}});
    fs::write(program.path("lenient.json"), policy.to_string()).unwrap();
    let command = command();
    let found = run(program, &command, &["--policy", "lenient.json", "--json"]).document();
    let time = |value: &Value| Timestamp::parse_iso8601(value.as_str().unwrap()).unwrap();
    let mut digests = Vec::new();
    let mut last = time(&found["from"]);
    while let Some(next) = digest.next_after(last).filter(|at| *at <= time(&found["until"])) {
        digests.push(json!(next));
        last = next;
    }
    assert!((2..=3).contains(&digests.len()), "{digests:?}");
    let of = |which: &str, channel: &str, kind: &str| -> Vec<Value> {
        let messages = found[which]["messages"].as_array().unwrap().iter();
        let of = |message: &&Value| message["channel"] == channel && message["kind"] == kind;
        messages.filter(of).cloned().collect()
    };
    let events = |messages: Vec<Value>| -> Vec<String> {
        let event = |message: &Value| message["items"][0]["event"].as_str().unwrap().to_owned();
        messages.iter().map(event).collect()
    };
    // Its third failure in a row opens the incident, and it is well again two hours later.
    assert_eq!(events(of("present", "pager", "incidents")), ["opened", "reminder", "resolved"]);
    let earlier = ["opened", "reminder", "reminder", "resolved"];
    assert_eq!(events(of("given", "pager", "incidents")), earlier);
    assert_eq!(events(of("present", "ops", "incidents")), ["opened", "resolved"]);
    assert_eq!(of("given", "ops", "incidents"), [Value::Null; 0]);
    for which in ["present", "given"] {
        let at: Vec<_> = of(which, "pager", "digest").iter().map(|one| one["at"].clone()).collect();
        assert_eq!(at, digests, "{which}");
        let all = found[which]["messages"].as_array().unwrap();
        assert!(all.is_sorted_by_key(|message| message["at"].to_string()), "{which}");
    }
    let daily = digests.len();
    let channel = |place: usize, name: &str, present: usize, given: usize| {
        let id = &found["present"]["channels"][place]["id"];
        json!({"id": id, "name": name, "present": present, "given": given})
    };
    assert_eq!(
        found["difference"]["messages"],
        json!({
            "present": 5 + daily,
            "given": 4 + daily,
            "channels": [
                channel(0, "ops", 2, 0), channel(1, "off", 0, 0), channel(2, "pager", 3 + daily, 4 + daily),
            ],
        })
    );
    assert_eq!(found["present"]["channels"][1]["enabled"], false);
    let said = run(program, &command, &[]);
    let said = said.success();
    assert!(said.contains("off      ntfy, disabled  0\n"), "{said}");
    assert!(said.contains("  pager    digest\n"), "{said}");
    // Nothing is sent, and nothing is kept.
    assert_eq!(database.number("(select count(*) from notifications)").await, 0);
}

/// Decades without any report cost nothing, and make nobody silent.
async fn a_replay_begins_where_the_store_does(installed: &Installed) {
    let Installed { program, database } = installed;
    program.run(&["db", "setup"]).success();
    let all = ["fleet", "backtest", "--from", "1970-01-01", "--until", "2999-01-01"];
    let started = Instant::now();
    let nothing = program.run(&all);
    assert!(nothing.success().contains("0 devices, 0 reports"), "{nothing:?}");
    let source: Arc<dyn Store> = store::open(&database.target).await.unwrap();
    write_reports(&source).await;
    source.close().await.unwrap();
    drop(source);
    let said = program.run(&all);
    let text = said.success();
    for expected in [
        "nothing is stored from before ",
        "--until is in the future: the replay ends now\n",
        "3 devices, 211 reports\n",
        "2 incidents: 1 of a failing device, 1 of a silent device\n",
    ] {
        assert!(text.contains(expected), "{expected}: {said:?}");
    }
    assert!(started.elapsed() < Duration::from_secs(50), "{:?}", started.elapsed());
    let told = program.run(&[&all[..], &["--json"]].concat());
    assert!(told.stderr.contains("the replay begins there"), "{told:?}");
    let told = told.document();
    assert_eq!(told["reports"], 211);
    let from = Timestamp::parse_iso8601(told["from"].as_str().unwrap()).unwrap();
    let apart = from.as_millisecond() - hours_ago(72).as_millisecond();
    assert!(apart.abs() < 120_000, "{told}");
}

fn scenario(id: &str) -> Value {
    json!({
        "id": id, "title": "Nobody reports for a month.", "start": "2026-03-01", "end": "2026-03-31",
        "steps": [{
            "at": "2026-03-01T01:00:00Z", "report": {"device_ids": ["d"]},
            "repeat": {"every_seconds": 3600, "until": "2026-03-08T00:00:00Z"},
        }],
        "expect": {"states": [{"at": "2026-03-08T01:30:00Z", "device_id": "d", "state": "silent"}]},
    })
}

#[test]
fn what_is_wrong_with_scenarios_is_told_with_file_and_place() {
    let mut wrong = scenario("wrong");
    wrong["expect"]["states"][0]["state"] = json!("dead");
    wrong["steps"][0]["repeat"] = json!({"until": "2026-03-08T00:00:00Z"});
    let mut misspelt = scenario("misspelt");
    misspelt["steps"][0]["reports"] = misspelt["steps"][0]["report"].take();
    let mut refused = scenario("refused");
    refused["steps"][0] =
        json!({"at": "2026-03-01T01:00:00Z", "request": {"method": "GET", "path": "/nothing"}});
    let program = Program::new()
        .with_file("right.json", &scenario("right").to_string())
        .with_file("wrong.json", &wrong.to_string())
        .with_file("misspelt.json", &misspelt.to_string())
        .with_file("refused.json", &refused.to_string())
        .with_file("text.json", "none");
    let backtest =
        |files: &[&str]| program.run(&[&["fleet", "backtest", "--scenario"], files].concat());
    let ended = backtest(&["right.json", "wrong.json", "misspelt.json", "text.json"]);
    assert_eq!((ended.code(), ended.stdout.as_str()), (2, ""), "{ended:?}");
    for expected in [
        "wrong.json is no scenario:\n  \"steps[0].repeat.every_seconds\" is required\n  \"expect.states[0].state\" must be one of ",
        "misspelt.json is no scenario:\n",
        "  \"steps[0].reports\" is not allowed\n",
        "text.json is no scenario:\n  it is not JSON: expected ",
    ] {
        assert!(ended.stderr.contains(expected), "{expected}: {ended:?}");
    }
    let ended = backtest(&["refused.json"]);
    assert_eq!(ended.code(), 1, "{ended:?}");
    let expected =
        "refused.json: steps[0] at 2026-03-01T01:00:00.000Z: GET /nothing is answered 404";
    assert!(ended.stderr.contains(expected), "{ended:?}");
    // The command was right, and its file is not there.
    assert_eq!(backtest(&["missing.json"]).code(), 1);
}

#[test]
fn a_scenario_shows_on_a_terminal_how_far_it_is() {
    let program = Program::new()
        .with("TERM", "xterm")
        .with("PROGRAM", env!("CARGO_BIN_EXE_pisync"))
        .with_file("slow.json", &scenario("slow").to_string());
    let line = "$PROGRAM fleet backtest --scenario slow.json";
    let on_terminal = program.shell(&format!("script -qec '{line}' /dev/null")).stdout;
    assert!(on_terminal.contains("hours of slow"), "{on_terminal:?}");
    assert!(on_terminal.contains("slow: "), "{on_terminal:?}");
    // Elsewhere only what takes long says so.
    let elsewhere = program.shell(line);
    assert!(!elsewhere.stdout.contains("hours of slow"), "{elsewhere:?}");
}
