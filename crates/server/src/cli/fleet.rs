//! `pisync fleet`: how the fleet is, and why a device is in its state. Both go straight to the store, also beside a running
//! server, and only read. Its backtests are in [`super::backtest`].

use clap::{Args, Subcommand};
use pisync_core::{DeviceId, health::State};
use serde_json::{Value, json};

use super::{
    backtest::{self, BacktestArgs},
    database,
    exit::Failure,
    key::group_filter,
    output::JsonArgs,
    table,
};
use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    fleet::{LONGEST_SINCE_SWEEP, explain::Explanation},
    store::{FleetView, GroupFilter, GroupQuery, GroupView, StateCounts, Target},
};

/// How many groups are listed.
const SHOWN_GROUPS: u32 = 1_000;

/// How far the last sweep may lie ahead of this machine's clock, in milliseconds: a minute.
const LARGEST_LEAD: i64 = 60 * 1000;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync fleet status                       how many devices are in which state
  pisync fleet explain pi-001               why it is in its state, and until when it is waited for
  pisync fleet backtest --policy stricter.json
                                            which incidents a policy would have made of the last 30 days")]
pub(super) struct FleetCommand {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show how many devices are in which state, by group
    #[command(after_help = "\
Examples:
  pisync fleet status
  pisync fleet status --problems            only the groups in which something is wrong
  pisync fleet status --group school-17
  pisync fleet status --group ''            the devices in no group
  pisync fleet status --json

Exit status: 0 when all is well, 1 when a device is failing, silent or overdue,
2 on wrong usage, and when this cannot be told.")]
    Status {
        /// Only this group; '' for the devices in no group
        #[arg(long, value_name = "NAME")]
        group: Option<String>,
        /// Only the groups in which something is wrong
        #[arg(long)]
        problems: bool,
    },
    /// Say why a device is in its state, and until when it is waited for
    #[command(after_help = "\
Examples:
  pisync fleet explain pi-001
  pisync fleet explain pi-001 --json")]
    Explain {
        /// The device
        #[arg(value_name = "DEVICE")]
        device: String,
    },
    /// Find out which incidents would have come of stored reports, or of scripted fleets, in simulated time
    Backtest(BacktestArgs),
}

pub(super) async fn run(command: &FleetCommand) -> Result<(), Failure> {
    match &command.action {
        Action::Status { group, problems } => status(command, group.as_deref(), *problems).await,
        Action::Explain { device } => explain(command, device).await,
        Action::Backtest(arguments) => {
            backtest::run(arguments, command.json, &command.database, &command.migrations).await
        }
    }
}

/// When it cannot be told how the fleet is, the status is that of wrong usage, as FLEET-API.md has it.
fn untold(failure: Failure) -> Failure {
    Failure::usage(failure.message)
}

async fn status(
    command: &FleetCommand,
    group: Option<&str>,
    only_problems: bool,
) -> Result<(), Failure> {
    let clock = Clock::system();
    let group = group.map(group_filter).transpose()?;
    let found = read_status(command, &clock, group.as_ref()).await.map_err(untold)?;
    let Status { target, fleet, groups } = found;
    let swept_at = fleet
        .swept_at
        .ok_or_else(|| Failure::usage("no server has looked after this fleet yet; start one"))?;
    let age = clock.now().as_millisecond() - swept_at.as_millisecond();
    if age < -LARGEST_LEAD {
        return Err(Failure::usage(format!(
            "the last sweep was at {swept_at}, which is in the future: a server's clock was ahead, or this machine's is behind"
        )));
    }
    if age > LONGEST_SINCE_SWEEP {
        return Err(Failure::usage(format!(
            "no server has looked after this fleet since {swept_at}; is one running, without FLEET=off?"
        )));
    }
    let has_problem = |states: &StateCounts, overdue: u64| {
        overdue > 0 || [State::Failing, State::Silent].iter().any(|state| states.count(*state) > 0)
    };
    let of_group = |group: &GroupView| has_problem(&group.states, group.overdue);
    let shown: Vec<&GroupView> =
        groups.iter().filter(|group| !only_problems || of_group(group)).collect();
    // Of one group, the figures are those of that group.
    let (states, overdue, open_incidents) = match (&group, groups.first()) {
        (Some(_), Some(group)) => (&group.states, group.overdue, group.open_incidents),
        _ => (&fleet.states, fleet.overdue, fleet.open_incidents),
    };
    if !command.json.is_asked_for() {
        println!("{}", states.in_words());
        println!("overdue: {overdue}; open incidents: {open_incidents}; as of {swept_at}");
        if !shown.is_empty() {
            table_of(&shown).iter().for_each(|line| println!("{line}"));
        }
    }
    command.json.document(|| {
        let groups: Vec<_> = shown.iter().map(|group| group_json(group)).collect();
        json!({
            "database": target.to_string(),
            "by_status": states_json(states),
            "overdue": overdue,
            "open_incidents": open_incidents,
            "swept_at": swept_at,
            "groups": groups,
        })
    });
    if has_problem(states, overdue) {
        let whose = match &group {
            None => "in the fleet".to_owned(),
            Some(GroupFilter::Named(name)) => format!("in the group {name}"),
            Some(GroupFilter::Ungrouped) => "with devices in no group".to_owned(),
        };
        return Err(format!("something is wrong {whose}").into());
    }
    Ok(())
}

/// How the fleet is.
struct Status {
    target: Target,
    fleet: FleetView,
    groups: Vec<GroupView>,
}

async fn read_status(
    command: &FleetCommand,
    clock: &Clock,
    group: Option<&GroupFilter>,
) -> Result<Status, Failure> {
    let target = database::existing(&command.database)?;
    let store = database::open_current(&target, &command.migrations).await?;
    database::warn_of_clock(&*store, clock).await?;
    let fleet = store.fleet().await?;
    let groups = match group {
        Some(GroupFilter::Named(name)) => {
            let found = store.group(name).await?;
            vec![found.ok_or_else(|| Failure::usage(format!("no such group: {name}")))?]
        }
        Some(GroupFilter::Ungrouped) => vec![store.ungrouped().await?],
        None => {
            let query = GroupQuery { search: None, limit: SHOWN_GROUPS, offset: 0 };
            store.groups(&query).await?.items
        }
    };
    Ok(Status { target, fleet, groups })
}

fn table_of(groups: &[&GroupView]) -> Vec<String> {
    let heading =
        ["group", "devices", "ok", "degraded", "failing", "silent", "never", "paused", "incidents"];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(groups.iter().map(|group| {
        let of = |state| group.states.count(state).to_string();
        let name = if group.name.is_empty() { "(none)" } else { &group.name };
        [
            name.to_owned(),
            group.devices.to_string(),
            of(State::Ok),
            of(State::Degraded),
            of(State::Failing),
            of(State::Silent),
            of(State::Never),
            of(State::Paused),
            group.open_incidents.to_string(),
        ]
    }));
    table::lines(&rows)
}

fn states_json(states: &StateCounts) -> Value {
    states.each().map(|(state, devices)| (state.as_str().to_owned(), json!(devices))).collect()
}

fn group_json(group: &GroupView) -> Value {
    json!({
        "name": Some(&group.name).filter(|name| !name.is_empty()),
        "devices": group.devices,
        "by_status": states_json(&group.states),
        "overdue": group.overdue,
        "open_incidents": group.open_incidents,
    })
}

async fn explain(command: &FleetCommand, device: &str) -> Result<(), Failure> {
    let device_id =
        DeviceId::new(device).map_err(|error| Failure::usage(format!("DEVICE {error}")))?;
    let clock = Clock::system();
    let target = database::existing(&command.database)?;
    let store = database::open_current(&target, &command.migrations).await?;
    database::warn_of_clock(&*store, &clock).await?;
    let now = clock.now();
    let examination = store.examine_device(device_id.as_str(), now).await?;
    let examination =
        examination.ok_or_else(|| Failure::from(format!("no such device: {device}")))?;
    let explanation = Explanation::new(&examination, now);
    if !command.json.is_asked_for() {
        explanation.sentences().iter().for_each(|sentence| println!("{sentence}"));
    }
    command.json.document(|| json!({ "database": target.to_string(), "explanation": explanation }));
    Ok(())
}
