//! `pisync fleet backtest`: which incidents and messages would have come of the stored reports, under the present policy and
//! another one, and what comes of scripted fleets. Each backtest runs on a temporary database. That of the fleet is only
//! read, and nobody is told anything.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use pisync_core::{Timestamp, health::Policy};
use serde_json::{Value, json};

use super::{
    database,
    exit::Failure,
    export::date,
    incident::{devices, moment, subject, subject_of},
    key::group_name,
    output::JsonArgs,
    policy::read_policy,
    progress::Progress,
    table,
};
use crate::{
    backtest::{
        self, BacktestError, Comparison, Expected, History, HistoryRange, Replayed,
        ReplayedChannel, Scenario, SentItem, SentMessage,
    },
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    incident_format::IncidentData,
    maintenance::present,
    store::{self, Incident, MessageKind, Store, Target, migrations::Migrator},
    temporary::TemporaryFile,
};

/// How much of the past is replayed, unless it is said, in milliseconds: 30 days.
const REPLAYED: i64 = 30 * 24 * 60 * 60 * 1000;

const HOUR: u64 = 60 * 60 * 1000;

/// How many messages are listed for people. `--json` has all of them.
const LISTED_MESSAGES: usize = 50;

/// How much of a message is listed for people.
const LISTED_ITEMS: usize = 3;

#[derive(Debug, Args)]
#[command(after_help = "\
Stored reports are replayed in simulated time, under the settings of now: which
incidents would have come, and which messages by which channel? With --policy,
another policy takes the place of the fleet's, and what differs is shown. Those of
groups and devices stay as they are. The database is only read, also beside a
running server. Nothing is sent, and no secret of a channel is needed.

A scenario is a JSON file: when devices report, what operators change, and which
states, incidents and messages must come of it. docs/fleet.md describes it. No
database is opened for it.

Examples:
  pisync fleet backtest                     the last 30 days
  pisync fleet backtest --from 2026-03-01 --until 2026-04-01 --group school-17
  pisync fleet backtest --policy stricter.json --json
  pisync fleet backtest --scenario power-cut.json
  pisync fleet backtest --scenario power-cut.json --print

Exit status: 0, 1 when a scenario does not end as expected or something failed,
2 on wrong usage.")]
pub(super) struct BacktestArgs {
    /// From when on, or from the first stored report on [default: 30 days before the end]; a bare date is its midnight in UTC
    #[arg(long, value_name = "DATE", value_parser = date)]
    from: Option<Timestamp>,
    /// Until when [default: now]
    #[arg(long, value_name = "DATE", value_parser = date)]
    until: Option<Timestamp>,
    /// Only the devices that are in this group now
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Compare with this policy, as JSON, in place of the fleet's; - is standard input
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Files with scenarios
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["from", "until", "group", "policy"])]
    scenario: Vec<PathBuf>,
    /// Write what came of them, in the form of `expect`
    #[arg(long, requires = "scenario")]
    print: bool,
}

pub(super) async fn run(
    arguments: &BacktestArgs,
    json: JsonArgs,
    database: &DatabaseArgs,
    migrations: &MigrationArgs,
) -> Result<(), Failure> {
    if !arguments.scenario.is_empty() {
        return run_scenarios(&arguments.scenario, arguments.print, json).await;
    }
    let policy = arguments.policy.as_deref().map(read_policy).transpose();
    let policy = policy.map_err(|failure| Failure::usage(failure.message))?;
    let group = arguments.group.as_deref().map(group_name).transpose()?;
    let target = database::existing(database)?;
    let store = database::open_current(&target, migrations).await?;
    let clock = Clock::system();
    let now = present(&*store, &clock).await?;
    let until = arguments.until.unwrap_or(now).min(now);
    let from = arguments.from.unwrap_or(until.saturating_add_milliseconds(-REPLAYED));
    if arguments.until.is_some_and(|asked| asked > now) {
        say!(json, "--until is in the future: the replay ends now");
    }
    if from >= until {
        return Err(Failure::usage("--from must be before --until"));
    }
    let range = HistoryRange { group, from, until };
    let history = read_history(&*store, range).await?;
    store.close().await?;
    if let Some(name) = arguments.group.as_ref().filter(|_| history.device_count() == 0) {
        return Err(format!("there were no devices in the group {name}").into());
    }
    if history.from > from {
        say!(
            json,
            "nothing is stored from before {}: the replay begins there",
            moment(history.from)
        );
    }
    let now_set = replay(&history, None, "what is set now").await?;
    let given = match (&policy, &arguments.policy) {
        (Some(policy), Some(file)) => {
            let file = file.display().to_string();
            Some((replay(&history, Some(policy), &file).await?, file))
        }
        _ => None,
    };
    let given = given.as_ref();
    if !json.is_asked_for() {
        let lines = match given {
            Some((given, file)) => compared(&history, &now_set, given, file),
            None => in_words(&history, &now_set),
        };
        lines.iter().for_each(|line| println!("{line}"));
    }
    json.document(|| document(&target, &history, &now_set, given.map(|(given, _)| given)));
    Ok(())
}

async fn read_history(store: &dyn Store, range: HistoryRange) -> Result<History, Failure> {
    let mut progress = Progress::new(None).counting("stored reports".to_owned());
    let history = History::read(store, range, |seen| progress.update(0, seen)).await;
    progress.finish();
    Ok(history?)
}

/// Replays a history under what is set now, or under another policy of the fleet.
async fn replay(
    history: &History,
    policy: Option<&Policy>,
    name: &str,
) -> Result<Replayed, Failure> {
    // Time passes also when nobody reports.
    let passed = passed_since(history.from);
    let mut progress =
        Progress::new(Some(passed(history.until))).counting(format!("reports under {name}"));
    let replayed = on_temporary_store(history.from, async |store| {
        backtest::replay(history, policy, store, |now, done| progress.update(passed(now), done))
            .await
    })
    .await;
    progress.finish();
    replayed
}

/// Milliseconds of simulated time.
fn passed_since(from: Timestamp) -> impl Fn(Timestamp) -> u64 {
    move |now| (now.as_millisecond() - from.as_millisecond()).max(0).unsigned_abs()
}

/// How many incidents there are of each scope and kind.
fn counts(incidents: &[Incident]) -> BTreeMap<String, BTreeMap<String, u64>> {
    let mut counts = BTreeMap::<_, BTreeMap<_, _>>::new();
    for Incident { scope, kind, .. } in incidents {
        *counts.entry(scope.clone()).or_default().entry(kind.clone()).or_default() += 1;
    }
    counts
}

/// The same in words.
fn counted(incidents: &[Incident]) -> String {
    let by_kind = counts(incidents).into_iter().flat_map(|(scope, kinds)| {
        kinds.into_iter().map(move |(kind, count)| format!("{count} of a {kind} {scope}"))
    });
    let by_kind: Vec<_> = by_kind.collect();
    match incidents.len() {
        0 => "no incidents".to_owned(),
        1 => format!("1 incident: {}", by_kind.join(", ")),
        count => format!("{count} incidents: {}", by_kind.join(", ")),
    }
}

/// How many messages a channel would have got.
fn sent_by(messages: &[SentMessage], channel: &str) -> usize {
    messages.iter().filter(|message| message.channel == channel).count()
}

/// A number of messages in words.
fn messages_of(count: usize) -> String {
    match count {
        0 => "no messages".to_owned(),
        1 => "1 message".to_owned(),
        _ => format!("{count} messages"),
    }
}

fn heading(history: &History) -> String {
    format!(
        "{} to {}: {} devices, {} reports",
        moment(history.from),
        moment(history.until),
        history.device_count(),
        history.report_count()
    )
}

/// What came under what is set now.
fn in_words(history: &History, now_set: &Replayed) -> Vec<String> {
    let Replayed { incidents, messages } = now_set;
    let mut lines = vec![heading(history)];
    lines.push(format!("under what is set now, {}", counted(incidents)));
    lines.extend(table_of(&incidents.iter().collect::<Vec<_>>(), history));
    lines.push(String::new());
    lines.push(format!("under what is set now, {}", messages_of(messages.len())));
    let mut rows = vec![["CHANNEL", "KIND", "MESSAGES"].map(str::to_owned)];
    rows.extend(history.channels.iter().map(|channel| {
        let sent = sent_by(messages, &channel.name).to_string();
        [channel.name.clone(), kind_of(channel), sent]
    }));
    lines.extend(table::lines(&rows));
    lines.extend(message_table(messages));
    lines
}

/// What came under what is set now and under another policy, and what differs.
fn compared(history: &History, now_set: &Replayed, given: &Replayed, file: &str) -> Vec<String> {
    let mut lines = vec![heading(history)];
    let Comparison { only_first, only_second, both } =
        Comparison::new(&now_set.incidents, &given.incidents);
    lines.push(format!("under what is set now, {}", counted(&now_set.incidents)));
    lines.push(format!("under {file}, {}", counted(&given.incidents)));
    lines.extend(table_of(&given.incidents.iter().collect::<Vec<_>>(), history));
    for (name, incidents) in [("what is set now", only_first), (file, only_second)] {
        lines.push(String::new());
        lines.push(format!("only under {name}: {} ({both} under both)", incidents.len()));
        lines.extend(table_of(&incidents, history));
    }
    lines.push(String::new());
    lines.push(format!(
        "under {file}, {} instead of {}",
        messages_of(given.messages.len()),
        now_set.messages.len()
    ));
    let mut rows = vec![["CHANNEL", "KIND", "MESSAGES", "INSTEAD OF"].map(str::to_owned)];
    rows.extend(history.channels.iter().map(|channel| {
        let sent = |replayed: &Replayed| sent_by(&replayed.messages, &channel.name).to_string();
        [channel.name.clone(), kind_of(channel), sent(given), sent(now_set)]
    }));
    lines.extend(table::lines(&rows));
    lines.extend(message_table(&given.messages));
    lines
}

/// The kind of a channel, and whether anything is sent by it.
fn kind_of(channel: &ReplayedChannel) -> String {
    match channel {
        ReplayedChannel { id: None, .. } => "no channel yet".to_owned(),
        ReplayedChannel { is_enabled: false, kind, .. } => format!("{kind}, disabled"),
        ReplayedChannel { kind, .. } => kind.clone(),
    }
}

/// The first messages.
fn message_table(messages: &[SentMessage]) -> Vec<String> {
    if messages.is_empty() {
        return Vec::new();
    }
    let mut rows = vec![["SENT", "CHANNEL", "WHAT"].map(str::to_owned)];
    rows.extend(
        messages
            .iter()
            .take(LISTED_MESSAGES)
            .map(|message| [moment(message.at), message.channel.clone(), told(message)]),
    );
    let mut lines = vec![String::new()];
    lines.extend(table::lines(&rows));
    if messages.len() > LISTED_MESSAGES {
        let more = messages.len() - LISTED_MESSAGES;
        lines.push(format!("and {more} more, which --json lists"));
    }
    lines
}

/// What a message tells.
fn told(message: &SentMessage) -> String {
    if message.kind == MessageKind::Digest {
        return "digest".to_owned();
    }
    let mut items: Vec<_> = message
        .items
        .iter()
        .take(LISTED_ITEMS)
        .map(|item| {
            let about = subject_of(&item.scope, &item.subject);
            format!("{about} {} {}", item.kind, item.event.as_str())
        })
        .collect();
    if message.items.len() > LISTED_ITEMS {
        items.push(format!("and {} more", message.items.len() - LISTED_ITEMS));
    }
    items.join(", ")
}

fn table_of(incidents: &[&Incident], history: &History) -> Vec<String> {
    if incidents.is_empty() {
        return Vec::new();
    }
    let heading = ["OPENED", "RESOLVED", "SEVERITY", "KIND", "ABOUT", "DEVICES"];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(incidents.iter().map(|incident| {
        [
            if is_older(incident, history) {
                "before".to_owned()
            } else {
                moment(incident.opened_at)
            },
            incident.resolved_at.map_or_else(
                || "still open".to_owned(),
                |at| format!("{} {}", moment(at), incident.resolution.as_deref().unwrap_or("-")),
            ),
            incident.severity.clone(),
            incident.kind.clone(),
            subject(incident),
            devices(incident),
        ]
    }));
    table::lines(&rows)
}

/// Whether an incident was found by the first sweep, so that its problem is older than the time that was replayed.
fn is_older(incident: &Incident, history: &History) -> bool {
    incident.opened_at <= history.first_sweep()
}

fn document(
    target: &Target,
    history: &History,
    now_set: &Replayed,
    given: Option<&Replayed>,
) -> Value {
    let listed = |incidents: &[&Incident]| -> Vec<Value> {
        incidents
            .iter()
            .map(|incident| {
                let data = IncidentData::new((*incident).clone(), history.until);
                let mut listed = json!(data);
                listed["opened_before"] = json!(is_older(incident, history));
                listed
            })
            .collect()
    };
    let of = |Replayed { incidents, messages }: &Replayed| {
        let all: Vec<_> = incidents.iter().collect();
        let channels = history.channels.iter().map(|channel| {
            json!({
                "id": channel.id,
                "name": channel.name,
                "kind": channel.kind,
                "enabled": channel.is_enabled,
                "messages": sent_by(messages, &channel.name),
            })
        });
        json!({
            "counts": counts(incidents),
            "incidents": listed(&all),
            "channels": channels.collect::<Vec<_>>(),
            "messages": messages.iter().map(message_document).collect::<Vec<_>>(),
        })
    };
    let difference = given.map(|given| {
        let Comparison { only_first, only_second, both } =
            Comparison::new(&now_set.incidents, &given.incidents);
        let sent = |present: usize, given: usize| json!({ "present": present, "given": given });
        let channels = history.channels.iter().map(|channel| {
            let of = |replayed: &Replayed| sent_by(&replayed.messages, &channel.name);
            let mut sent = sent(of(now_set), of(given));
            sent["id"] = json!(channel.id);
            sent["name"] = json!(channel.name);
            sent
        });
        let mut messages = sent(now_set.messages.len(), given.messages.len());
        messages["channels"] = channels.collect();
        json!({
            "only_present": listed(&only_first),
            "only_given": listed(&only_second),
            "both": both,
            "messages": messages,
        })
    });
    json!({
        "database": target.to_string(),
        "from": history.from,
        "until": history.until,
        "devices": history.device_count(),
        "reports": history.report_count(),
        "present": of(now_set),
        "given": given.map(of),
        "difference": difference,
    })
}

fn message_document(message: &SentMessage) -> Value {
    let SentMessage { at, channel, kind, group, items } = message;
    let items = items.iter().map(|item| {
        let SentItem { incident, event, scope, subject, kind } = item;
        json!({
            "incident": incident, "event": event.as_str(), "scope": scope, "subject": subject, "kind": kind,
        })
    });
    json!({
        "at": at,
        "channel": channel,
        "kind": kind.as_str(),
        "group": group,
        "items": items.collect::<Vec<_>>(),
    })
}

async fn run_scenarios(files: &[PathBuf], print: bool, json: JsonArgs) -> Result<(), Failure> {
    let scenarios = read_scenarios(files)?;
    let mut documents = Vec::new();
    let mut wrong = 0;
    for (file, scenario) in files.iter().zip(&scenarios) {
        let came = run_scenario(scenario).await.map_err(|failure| Failure {
            message: format!("{}: {}", file.display(), failure.message),
            ..failure
        })?;
        let differences = scenario.expect.differences(&came);
        wrong += usize::from(!differences.is_empty());
        for difference in &differences {
            say!(json, "{}: {difference}", scenario.id);
        }
        if differences.is_empty() {
            say!(json, "{}: as expected", scenario.id);
        }
        if print && !json.is_asked_for() {
            println!("{}", json!(came));
        }
        json.keep(
            &mut documents,
            || json!({ "id": scenario.id, "differences": differences, "came": came }),
        );
    }
    json.document(|| json!({ "scenarios": documents }));
    if wrong > 0 {
        return Err(format!("{wrong} of {} scenarios did not end as expected", files.len()).into());
    }
    Ok(())
}

/// Reads all scenarios, or tells what is wrong in any of them.
fn read_scenarios(files: &[PathBuf]) -> Result<Vec<Scenario>, Failure> {
    let (mut scenarios, mut wrong) = (Vec::new(), Vec::new());
    for file in files {
        let text = fs::read(file)
            .map_err(|error| Failure::from(format!("cannot read {}: {error}", file.display())))?;
        match Scenario::read(&text) {
            Ok(scenario) => scenarios.push(scenario),
            Err(error) => wrong.push(format!("{} is no scenario:\n  {error}", file.display())),
        }
    }
    if wrong.is_empty() { Ok(scenarios) } else { Err(Failure::usage(wrong.join("\n"))) }
}

/// Runs a scenario on a database that is removed afterwards.
async fn run_scenario(scenario: &Scenario) -> Result<Expected, Failure> {
    let start = scenario.start.0;
    let passed = passed_since(start);
    let total = passed(scenario.end.0);
    let unit = format!("hours of {}", scenario.id);
    let mut progress = Progress::new(Some(total)).counting(unit);
    let came = on_temporary_store(start, async |store| {
        let watch = |now| progress.update(passed(now), passed(now) / HOUR);
        backtest::run(scenario, store, watch).await
    })
    .await;
    progress.finish();
    came
}

/// Does something on an empty store that is removed afterwards.
async fn on_temporary_store<T>(
    now: Timestamp,
    what: impl AsyncFnOnce(&Arc<dyn Store>) -> Result<T, BacktestError>,
) -> Result<T, Failure> {
    let folder = std::env::temp_dir();
    // It is removed also when a signal ends the command.
    let file = TemporaryFile::beside(&folder.join("backtest.db")).map_err(|error| {
        let folder = folder.display();
        Failure::from(format!("cannot make a temporary file in {folder}: {error}; set TMPDIR"))
    })?;
    let target = Target::Sqlite(file.path().to_owned());
    let mut migrator = Migrator::new(&target, Path::new("")).await?;
    migrator.up(now).await?;
    let store: Arc<dyn Store> = store::open(&target).await?;
    let done = what(&store).await;
    store.close().await?;
    done.map_err(|error| Failure::from(error.to_string()))
}
