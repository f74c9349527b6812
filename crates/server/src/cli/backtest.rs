//! `pisync fleet backtest`: which incidents would have come of the stored reports, under the present policy and another one,
//! and what comes of scripted fleets. Each backtest runs on a temporary database. That of the fleet is only read.

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
    incident::{devices, moment, subject},
    key::group_name,
    output::JsonArgs,
    policy::read_policy,
    progress::Progress,
    table,
};
use crate::{
    backtest::{self, BacktestError, Comparison, Expected, History, HistoryRange, Scenario},
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    incident_format::IncidentData,
    maintenance::present,
    store::{self, Incident, Store, Target, migrations::Migrator},
    temporary::TemporaryFile,
};

/// How much of the past is replayed, unless it is said, in milliseconds: 30 days.
const REPLAYED: i64 = 30 * 24 * 60 * 60 * 1000;

#[derive(Debug, Args)]
#[command(after_help = "\
Stored reports are replayed in simulated time, under the settings of now: which
incidents would have come? With --policy, another policy takes the place of the
fleet's, and what differs is shown. Those of groups and devices stay as they are.
The database is only read, also beside a running server; nobody is told anything.

A scenario is a JSON file: when devices report, what operators change, and which
states and incidents must come of it. docs/fleet.md describes it. No database is
opened for it.

Examples:
  pisync fleet backtest                     the last 30 days
  pisync fleet backtest --from 2026-03-01 --until 2026-04-01 --group school-17
  pisync fleet backtest --policy stricter.json --json
  pisync fleet backtest --scenario power-cut.json
  pisync fleet backtest --scenario power-cut.json --print

Exit status: 0, 1 when a scenario does not end as expected or something failed,
2 on wrong usage.")]
pub(super) struct BacktestArgs {
    /// From when on [default: 30 days before the end]; a bare date is its midnight in UTC
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
    let until = arguments.until.unwrap_or(now);
    let from = arguments.from.unwrap_or(until.saturating_add_milliseconds(-REPLAYED));
    if until > now {
        return Err(Failure::usage("--until must not be in the future"));
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
    let now_set = replay(&history, None, "what is set now").await?;
    let given = match (&policy, &arguments.policy) {
        (Some(policy), Some(file)) => {
            Some(replay(&history, Some(policy), &file.display().to_string()).await?)
        }
        _ => None,
    };
    if !json.is_asked_for() {
        let lines = in_words(&history, &now_set, given.as_deref(), arguments.policy.as_ref());
        lines.iter().for_each(|line| println!("{line}"));
    }
    json.document(|| document(&target, &history, &now_set, given.as_deref()));
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
) -> Result<Vec<Incident>, Failure> {
    let total = history.report_count() as u64;
    let mut progress = Progress::new(Some(total)).counting(format!("reports under {name}"));
    let incidents = on_temporary_store(history.from, async |store| {
        backtest::replay(history, policy, store, |done| progress.update(done, done)).await
    })
    .await;
    progress.finish();
    incidents
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

fn in_words(
    history: &History,
    now_set: &[Incident],
    given: Option<&[Incident]>,
    file: Option<&PathBuf>,
) -> Vec<String> {
    let mut lines = vec![format!(
        "{} to {}: {} devices, {} reports",
        moment(history.from),
        moment(history.until),
        history.device_count(),
        history.report_count()
    )];
    let all = |incidents: &[Incident]| table_of(&incidents.iter().collect::<Vec<_>>(), history);
    let (Some(given), Some(file)) = (given, file) else {
        lines.push(format!("under what is set now, {}", counted(now_set)));
        lines.extend(all(now_set));
        return lines;
    };
    let file = file.display();
    let Comparison { only_first, only_second, both } = Comparison::new(now_set, given);
    lines.push(format!("under what is set now, {}", counted(now_set)));
    lines.push(format!("under {file}, {}", counted(given)));
    lines.extend(all(given));
    for (name, incidents) in
        [("what is set now".to_owned(), only_first), (file.to_string(), only_second)]
    {
        lines.push(String::new());
        lines.push(format!("only under {name}: {} ({both} under both)", incidents.len()));
        lines.extend(table_of(&incidents, history));
    }
    lines
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
    now_set: &[Incident],
    given: Option<&[Incident]>,
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
    let of = |incidents: &[Incident]| {
        let all: Vec<_> = incidents.iter().collect();
        json!({ "counts": counts(incidents), "incidents": listed(&all) })
    };
    let difference = given.map(|given| {
        let Comparison { only_first, only_second, both } = Comparison::new(now_set, given);
        json!({ "only_present": listed(&only_first), "only_given": listed(&only_second), "both": both })
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

async fn run_scenarios(files: &[PathBuf], print: bool, json: JsonArgs) -> Result<(), Failure> {
    let scenarios = files.iter().map(read_scenario).collect::<Result<Vec<_>, _>>()?;
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

fn read_scenario(file: &PathBuf) -> Result<Scenario, Failure> {
    let text = fs::read(file)
        .map_err(|error| Failure::from(format!("cannot read {}: {error}", file.display())))?;
    serde_json::from_slice(&text)
        .map_err(|error| Failure::usage(format!("{} is no scenario: {error}", file.display())))
}

/// Runs a scenario on a database that is removed afterwards.
async fn run_scenario(scenario: &Scenario) -> Result<Expected, Failure> {
    on_temporary_store(scenario.start.0, async |store| backtest::run(scenario, store).await).await
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
