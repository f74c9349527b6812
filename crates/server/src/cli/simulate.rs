//! `pisync simulate`: sends a simulated fleet to a running server, measures it, and compares what it answers. `simulate`
//! does the work; here are its options, the progress and the result. It never opens a database.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use pisync_core::Timestamp;
use serde_json::{Value, json};

use super::{
    exit::{ExitStatus, Failure},
    output::JsonArgs,
    progress::Progress,
};
use crate::{
    clock::Clock,
    config::Secret,
    keys::WrongSecret,
    simulate::{
        Address, Clocks, Compared, Load, Outcome, Pace, PatternSet, Plan, Sending, Servers,
        SimulateError, Simulation, Stage,
    },
};

const DAY: i64 = 24 * 60 * 60 * 1000;

/// Differences that are shown; the document has more.
const SHOWN: usize = 40;

#[derive(Debug, Args)]
#[command(after_help = "\
The devices are called sim-SEED-000000 and so on. They stay on the server, so use
one with a database of its own. Give a key of scope admin (PISYNC_KEY), or start
the server with RATE_LIMIT_SYNC_PER_MINUTE=0 and RATE_LIMIT_API_PER_MINUTE=0.

Examples:
  pisync simulate --url http://localhost:3000
                                  500 devices, 30 days of history, then compare
  pisync simulate --url http://localhost:3000 --days 2 --live 60s --speed 3600
                                  and then 60 hours within a minute
  pisync simulate --url http://localhost:3000 --days 0 --groups 0 --live 30s \\
                  --rate 2000 --connections 64
                                  a load test: 2,000 events a second
  pisync simulate --print --devices 10 --days 1 | pisync import -
                                  the same events without a server

Exit status: 0 when the server answered everything as it must, 1 when it did not
or something failed, 2 on wrong usage, 4 when the server could not be asked.")]
pub(super) struct SimulateCommand {
    /// A running server, which must be named; several servers of one database take turns
    #[arg(long, value_name = "URL", value_parser = Address::parse)]
    url: Vec<Address>,
    /// An API key of scope admin
    #[arg(long, env = "PISYNC_KEY", value_name = "KEY")]
    key: Option<Secret>,
    /// Trust the certificates in this PEM file instead of the system's
    #[arg(long, value_name = "FILE")]
    ca_cert: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    fleet: FleetArgs,
    #[command(flatten)]
    pace: PaceArgs,
    /// Devices whose entire histories are compared, row by row
    #[arg(long, value_name = "DEVICES", default_value_t = 100, help_heading = "Comparing")]
    sample: u32,
    /// Send and measure alone: no groups, nothing compared; a key of scope ingest is enough
    #[arg(long, conflicts_with = "sample", help_heading = "Comparing")]
    send_only: bool,
    /// Write the fleet's events to standard output as NDJSON, and send nothing
    #[arg(long, conflicts_with_all = ["url", "json"], help_heading = "Comparing")]
    print: bool,
}

/// Which events there are.
#[derive(Debug, Args)]
#[command(next_help_heading = "Fleet")]
struct FleetArgs {
    /// How many devices
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    devices: u32,
    /// How many groups, named `Region / School`; 0 for none [default: 20, or fewer than devices]
    #[arg(long)]
    groups: Option<u32>,
    /// Jobs of each device
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// From one run of a job to the next
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = span)]
    every: i64,
    /// Days of history to send first, in batches
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(..=3_650))]
    days: u32,
    /// When the history ends and the live part begins [default: so that the live part ends at the present]
    #[arg(long, value_name = "TIME", value_parser = instant)]
    until: Option<Timestamp>,
    /// The same seed, options and --until send the same events, byte for byte
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What goes wrong
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "all")]
    patterns: Vec<Pattern>,
    /// Which clocks there are besides exact ones
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "all")]
    clocks: Vec<ClockChoice>,
}

/// How it is sent.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sending")]
struct PaceArgs {
    /// How long to send live, each event by itself
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = span_or_none)]
    live: i64,
    /// How many times as fast simulated time passes in the live part
    #[arg(long, value_name = "TIMES", default_value_t = 1.0, value_parser = positive)]
    speed: f64,
    /// Events a second in the live part, whether they are answered or not, instead of --speed
    #[arg(long, value_name = "EVENTS", conflicts_with = "speed", value_parser = positive)]
    rate: Option<f64>,
    /// Connections that send at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Events in a request of the history
    #[arg(long, value_name = "EVENTS", default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    batch: u16,
    /// How long to try again while the server does not answer, or answers 408, 429 or 5xx
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = span)]
    patience: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pattern {
    /// Everything that follows
    All,
    /// Nothing
    None,
    /// A device's disk fills
    Disk,
    /// A device's link slows
    Link,
    /// A school loses power
    Power,
    /// The certificate of a region expires
    Certificate,
    /// A device cannot report for hours or days, and delivers later
    Offline,
    /// A device sends a report once more, with the same `event_id`
    Repeats,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ClockChoice {
    /// Everything that follows
    All,
    /// Exact ones alone
    Exact,
    /// Off by minutes, and more so every day
    Drifting,
    /// Years back on some days
    YearsBack,
    /// Not trusted by their devices now and then
    Unsynced,
    /// Of scripts that send a date without a time
    ByDay,
}

/// A span of time in milliseconds.
fn span(text: &str) -> Result<i64, String> {
    span_or_none(text).and_then(|span| {
        if span > 0 { Ok(span) } else { Err("must be longer than nothing".into()) }
    })
}

fn span_or_none(text: &str) -> Result<i64, String> {
    let span: jiff::SignedDuration =
        text.parse().map_err(|_| "expected a duration such as 90s, 5m or 1h30m".to_owned())?;
    let milliseconds =
        i64::try_from(span.as_millis()).ok().filter(|span| (0..=10 * 365 * DAY).contains(span));
    milliseconds.ok_or_else(|| "must be from nothing to ten years".into())
}

fn instant(text: &str) -> Result<Timestamp, String> {
    Timestamp::parse_iso8601(text)
        .ok_or_else(|| "expected a time such as 2026-11-26T08:00:00Z".into())
}

fn positive(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.parse().ok();
    number
        .filter(|number| (0.001..=1e6).contains(number))
        .ok_or_else(|| "expected a number from 0.001 to 1000000".into())
}

pub(super) async fn run(command: &SimulateCommand) -> Result<(), Failure> {
    let clock = Clock::system();
    let now = clock.check()?;
    let plan = command.plan(now)?;
    let key = command.key()?;
    let simulation = Simulation::new(plan.clone());
    if command.print {
        simulation.print(|line| print!("{line}"));
        return Ok(());
    }
    let servers = Servers::new(command.url.clone(), key.as_deref(), command.ca_cert.as_deref());
    let sending = Sending {
        servers: Arc::new(servers.map_err(Failure::usage)?),
        connections: command.pace.connections.into(),
        batch: command.pace.batch.into(),
        pace: command.pace.rate.map_or(Pace::Speed(command.pace.speed), Pace::Rate),
        patience: Duration::from_millis(command.pace.patience.unsigned_abs()),
        sample: (!command.send_only).then_some(command.sample),
    };
    let json = command.json;
    say!(json, "{}", heading(&plan));
    let mut shown = Shown::default();
    let began = Instant::now();
    let outcome = {
        let mut report = |stage, done, total| shown.update(stage, done, total);
        simulation.run(&sending, &clock, &mut report).await
    };
    shown.finish();
    let outcome = outcome?;
    for (stage, load) in &outcome.phases {
        say!(json, "{}", line(*stage, load));
    }
    json.document(|| document(command, &plan, &outcome, began.elapsed()));
    let Some(compared) = &outcome.compared else { return Ok(()) };
    say_compared(json, compared);
    match compared.differences.count {
        0 => Ok(()),
        count => Err(format!(
            "the server's answers differ from what it acknowledged in {count} places; see what `pisync verify` says of its database"
        )
        .into()),
    }
}

impl From<SimulateError> for Failure {
    fn from(error: SimulateError) -> Self {
        let message = error.to_string();
        match error {
            SimulateError::Failed(_) => message.into(),
            SimulateError::Unanswered(_) => Self { status: ExitStatus::Unanswered, message },
        }
    }
}

impl SimulateCommand {
    /// The key, which must look like one.
    fn key(&self) -> Result<Option<String>, Failure> {
        let Some(key) = self.key.as_ref().map(Secret::reveal).filter(|key| !key.is_empty()) else {
            return Ok(None);
        };
        let problem = match WrongSecret::of(key.as_bytes()) {
            None => return Ok(Some(key.to_owned())),
            Some(WrongSecret::NotAKey) => "is no API key: one begins with psk_",
            Some(WrongSecret::Mistyped) => "is mistyped: its check digits do not fit",
        };
        Err(Failure::usage(format!("the value of --key (PISYNC_KEY) {problem}")))
    }

    /// What to simulate, at the present `now`. Names every option that makes no sense.
    fn plan(&self, now: Timestamp) -> Result<Plan, Failure> {
        let (fleet, pace) = (&self.fleet, &self.pace);
        let mut problems = Vec::new();
        if self.url.is_empty() && !self.print {
            problems
                .push("name a server with --url, such as --url http://localhost:3000".to_owned());
        }
        let groups = fleet.groups.unwrap_or(20.min(fleet.devices));
        if groups > fleet.devices {
            problems.push(format!("--groups {groups} is more than --devices {}", fleet.devices));
        }
        let live = match pace.rate {
            Some(_) if pace.live == 0 => {
                problems.push("--rate needs --live, the time to send for".to_owned());
                0.0
            }
            Some(rate) => {
                // So long a part of simulated time has so many events.
                let per_second = f64::from(fleet.devices) * f64::from(fleet.jobs)
                    / (milliseconds(fleet.every) / 1_000.0);
                milliseconds(pace.live) * rate / per_second
            }
            None => milliseconds(pace.live) * pace.speed,
        };
        let longest = milliseconds(10 * 365 * DAY);
        if live > longest {
            problems.push("the live part is longer than ten simulated years: make --live, --speed or --rate smaller".to_owned());
        }
        let live = rounded(live.min(longest));
        // Simulated time must not pass the server's. So the live part ends at the present, or earlier.
        let latest = now.as_millisecond() + pace.live - live;
        let until =
            fleet.until.map_or(latest - latest.rem_euclid(1_000), Timestamp::as_millisecond);
        if until > latest {
            let latest = Timestamp::from_millisecond(latest).unwrap_or(now);
            problems.push(format!(
                "--until must be {latest} or earlier, because the live part must not pass the present"
            ));
        }
        let is_on =
            |pattern| fleet.patterns.contains(&pattern) || fleet.patterns.contains(&Pattern::All);
        let has = |clock| fleet.clocks.contains(&clock) || fleet.clocks.contains(&ClockChoice::All);
        if fleet.patterns.len() > 1 && fleet.patterns.contains(&Pattern::None) {
            problems.push("--patterns none stands alone".to_owned());
        }
        if !problems.is_empty() {
            return Err(Failure::usage(problems.join("; ")));
        }
        Ok(Plan {
            seed: fleet.seed,
            devices: fleet.devices,
            groups,
            jobs: fleet.jobs,
            every: fleet.every,
            history: i64::from(fleet.days) * DAY,
            live,
            until,
            has_peaks: pace.rate.is_none(),
            patterns: PatternSet {
                disk: is_on(Pattern::Disk),
                link: is_on(Pattern::Link),
                power: is_on(Pattern::Power),
                certificate: is_on(Pattern::Certificate),
                offline: is_on(Pattern::Offline),
                repeats: is_on(Pattern::Repeats),
            },
            clocks: Clocks {
                drifting: has(ClockChoice::Drifting),
                years_back: has(ClockChoice::YearsBack),
                unsynced: has(ClockChoice::Unsynced),
                by_day: has(ClockChoice::ByDay),
            },
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "ten years have 39 bits")]
fn milliseconds(span: i64) -> f64 {
    span as f64
}

#[expect(clippy::cast_possible_truncation, reason = "bounded before")]
fn rounded(milliseconds: f64) -> i64 {
    milliseconds as i64
}

fn time(milliseconds: i64) -> String {
    Timestamp::from_millisecond(milliseconds).map(|time| time.to_string()).unwrap_or_default()
}

fn heading(plan: &Plan) -> String {
    let Plan { seed, devices, groups, jobs, .. } = plan;
    let (days, until) = (plan.history / DAY, time(plan.until));
    let groups = if *groups == 0 { String::new() } else { format!(" in {groups} groups") };
    let jobs = if *jobs == 1 { "one job".to_owned() } else { format!("{jobs} jobs") };
    format!(
        "seed {seed}: {devices} devices{groups} with {jobs} each, {days} days of history, --until {until}"
    )
}

/// The bar of the current stage.
#[derive(Default)]
struct Shown(Option<(Stage, Progress)>);

impl Shown {
    fn update(&mut self, stage: Stage, done: u64, total: u64) {
        if self.0.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            let unit = match stage {
                Stage::History => "events of the history",
                Stage::Live => "live events",
                Stage::Devices => "devices made known",
                Stage::Groups => "devices put into groups",
                Stage::Compare => "devices and histories compared",
            };
            self.finish();
            self.0 = Some((stage, Progress::new(Some(total)).counting(unit.to_owned())));
        }
        if let Some((_, progress)) = &mut self.0 {
            progress.update(done, done);
        }
    }

    fn finish(&mut self) {
        if let Some((_, progress)) = self.0.take() {
            progress.finish();
        }
    }
}

/// What a phase cost.
fn line(stage: Stage, load: &Load) -> String {
    let Load { events, requests, took, .. } = load;
    let seconds = took.as_secs_f64();
    let mut text = match stage {
        Stage::Groups => format!("{:<8} {requests} requests in {seconds:.1} s", stage.name()),
        _ => format!(
            "{:<8} {events} events in {requests} requests, {seconds:.1} s: {:.0} events/s",
            stage.name(),
            load.rate()
        ),
    };
    if let Some(percentiles) = load.percentiles() {
        let told: Vec<_> =
            percentiles.iter().map(|(name, value)| format!("{name} {value:.1}")).collect();
        text += &format!("; ms {}", told.join(", "));
    }
    let statuses: Vec<_> =
        load.statuses.iter().map(|(status, count)| format!("{status}: {count}")).collect();
    text += &format!("; answers {}", statuses.join(", "));
    for (count, what) in [
        (load.twice, "sent twice"),
        (load.duplicates, "duplicates"),
        (load.unanswered, "without an answer"),
        (load.repeated, "tried again"),
    ] {
        if count > 0 {
            text += &format!("; {what}: {count}");
        }
    }
    text
}

fn say_compared(json: JsonArgs, compared: &Compared) {
    let Compared { devices, histories, rows, notes, differences } = compared;
    for note in notes {
        say!(json, "note: {note}");
    }
    for found in differences.kept.iter().take(SHOWN) {
        say!(
            json,
            "{}: {} is {}, must be {}",
            found.place,
            found.figure,
            found.told,
            found.expected
        );
    }
    let more = differences.count.saturating_sub(SHOWN as u64);
    if more > 0 {
        say!(json, "and {more} more differences");
    }
    let result = match differences.count {
        0 => "no difference".to_owned(),
        count => format!("{count} differences"),
    };
    say!(
        json,
        "compared statistics and windows, repeated failures, {devices} devices, {histories} histories with {rows} rows: {result}"
    );
}

fn document(command: &SimulateCommand, plan: &Plan, outcome: &Outcome, took: Duration) -> Value {
    let urls: Vec<_> = command.url.iter().map(Address::as_str).collect();
    let phases = outcome.phases.iter().map(|(stage, load)| {
        let mut phase = load.document();
        phase["phase"] = json!(stage.name());
        phase
    });
    let compared = outcome.compared.as_ref();
    let listed = compared.into_iter().flat_map(|compared| &compared.differences.kept).map(|found| {
        json!({"place": found.place, "figure": found.figure, "told": found.told, "expected": found.expected})
    });
    json!({
        "urls": urls,
        "seed": plan.seed,
        "until": time(plan.until),
        "devices": plan.devices,
        "groups": plan.groups,
        "events": outcome.events,
        "seconds": took.as_secs_f64(),
        "phases": phases.collect::<Vec<_>>(),
        "compared": compared.map(|compared| json!({
            "devices": compared.devices,
            "histories": compared.histories,
            "rows": compared.rows,
            "notes": compared.notes,
        })),
        "differing": compared.map(|compared| compared.differences.count),
        "differences": listed.collect::<Vec<_>>(),
    })
}
