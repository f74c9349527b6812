//! `pisync verify`: compares all figures with what the raw events add up to, and repairs them if that is asked for. `store`
//! recounts, beside running servers; without `--repair` nothing is changed.

use clap::Args;
use serde_json::{Value, json};

use super::{database, exit::Failure, output::JsonArgs};
use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    maintenance::present,
    store::{FigureDifference, Store, SumDifference, Verified},
};

/// How often hours are recounted for repair while servers aggregate events into them.
const ATTEMPTS: usize = 5;

#[derive(Debug, Args)]
#[command(after_help = "\
Works beside running servers. Events that other programs wrote into the
database count after --repair.

Examples:
  pisync verify                         changes nothing
  pisync verify --repair
  pisync verify --json > findings.json

Exit status: 0 when all figures are right or were repaired, 1 when some are
not, 2 on wrong usage, 4 when that could not be found out.")]
pub(super) struct VerifyCommand {
    /// Write what the events add up to wherever figures differ
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

pub(super) async fn run(command: &VerifyCommand) -> Result<(), Failure> {
    let problem = recount(command).await.map_err(Failure::unanswered)?;
    problem.map_or(Ok(()), |problem| Err(problem.into()))
}

/// Recounts everything and says what differs; gives what is wrong and stays so, if anything does.
async fn recount(command: &VerifyCommand) -> Result<Option<String>, Failure> {
    let target = database::existing(&command.database)?;
    let store = database::open_current(&target, &command.migrations).await?;

    let clock = Clock::system();
    clock.check()?;
    database::warn_of_clock(&*store, &clock).await?;
    // By a clock that is behind, right dates would be taken for dates to come.
    let now = present(&*store, &clock).await?;
    let mut sum = Verified::default();
    let mut findings = Findings { json: command.json, listed: Vec::new() };
    let (mut jobs, mut days, mut unfilled, mut after) = (0, 0, 0, None);
    loop {
        let page = store.verify(after.as_deref(), now, command.repair).await;
        let page = page?;
        sum.devices += page.devices;
        sum.events += page.events;
        sum.nameless_devices += page.nameless_devices;
        sum.being_deleted += page.being_deleted;
        sum.raw_since = page.raw_since;
        unfilled += page.unfilled_days.len();
        jobs += page.differences.len();
        days += page.days.len();
        for difference in &page.differences {
            let job = difference.job.as_ref();
            let named = job.map_or(String::new(), |job| format!(", job {job}"));
            let place = json!({"device_id": difference.device_id, "job": job});
            let whose = format!("{}{named}", difference.device_id);
            findings.add(&whose, &place, &difference.figures());
        }
        page.days.iter().for_each(|day| findings.add_sums(day, "day"));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let repairs = command.repair && sum.raw_since.is_none();
    let hours = hours(&*store, repairs).await?;
    hours.iter().for_each(|hour| findings.add_sums(hour, "hour"));
    let hours = hours.len();
    let wrong = jobs + days + hours > 0;
    // They are made from figures that are kept, whatever events are.
    let derived = store.verify_summaries(now, command.repair).await?;
    let is_repaired = wrong && repairs || derived.number() > 0 && command.repair;
    let repaired = if is_repaired { " (repaired)" } else { "" };
    findings.json.document(|| {
        json!({
            "database": target.to_string(),
            "devices": sum.devices,
            "events": sum.events,
            "differing_jobs": jobs,
            "differing_days": days,
            "differing_hours": hours,
            "differing_summaries": derived.summaries,
            "differing_counts": derived.counts,
            "differing_totals": derived.totals,
            "differing_digests": derived.digests,
            "differing_group_days": derived.group_days,
            "differing_group_hours": derived.group_hours,
            "differing_group_states": derived.states.group_states,
            "differing_device_states": derived.states.device_states,
            "uncounted_days": unfilled,
            "uncounted_group_hours": derived.uncounted_group_hours,
            "is_repaired": is_repaired,
            "devices_being_deleted": sum.being_deleted,
            "unregistered_devices": sum.nameless_devices,
            "events_complete_since": sum.raw_since,
            "differences": findings.listed,
        })
    });
    say!(
        command.json,
        "devices: {}, events: {}; differing jobs: {jobs}, days: {days}, hours: {hours}, summaries: {}{repaired}",
        sum.devices,
        sum.events,
        derived.number()
    );
    say_uncounted(command, unfilled, derived.uncounted_group_hours);
    if sum.being_deleted > 0 {
        say!(
            command.json,
            "devices that are being deleted, and were not recounted: {}; a server goes on with their deletion",
            sum.being_deleted
        );
    }
    if sum.nameless_devices > 0 {
        return Ok(Some(format!(
            "there are events or figures of {} devices that are not registered; delete those rows, or insert the devices",
            sum.nameless_devices
        )));
    }
    if let (Some(raw_since), true) = (sum.raw_since, wrong) {
        return Ok(Some(format!(
            "some figures are too small, and cannot be counted again: events received before {raw_since} are no longer kept"
        )));
    }
    if (wrong || derived.number() > 0) && !command.repair {
        let problem = "some figures are wrong; repair them with `pisync verify --repair`";
        return Ok(Some(problem.to_owned()));
    }
    Ok(None)
}

/// Says what is not counted yet, if anything: an earlier version did not, or a clock was ahead. It is not wrong.
fn say_uncounted(command: &VerifyCommand, days: usize, hours: u64) {
    if days == 0 && hours == 0 {
        return;
    }
    let outcome =
        if command.repair { "counted now" } else { "counted by `pisync verify --repair`" };
    say!(
        command.json,
        "not counted so far: speeds, durations and bytes of {days} days of devices, and {hours} hours by group; {outcome}"
    );
}

/// Recounts the fleet's hours and gives those that differed.
async fn hours(store: &dyn Store, repair: bool) -> Result<Vec<SumDifference>, Failure> {
    let found = store.verify_hours().await?;
    let mut wrong = found.clone();
    for _ in 0..ATTEMPTS {
        if !repair || wrong.is_empty() {
            return Ok(found);
        }
        let mut changed = false;
        for hour in &wrong {
            changed |= !store.repair_hour(hour).await?;
        }
        if !changed {
            return Ok(found);
        }
        wrong = store.verify_hours().await?;
    }
    let problem = "some hours changed again and again while they were repaired; run it once more";
    Err(problem.to_owned().into())
}

/// The figures that differ: said at once, and kept for the document that may be asked for.
struct Findings {
    json: JsonArgs,
    listed: Vec<Value>,
}

impl Findings {
    /// The sums of a device's day, or of an hour of all devices.
    fn add_sums(&mut self, difference: &SumDifference, span: &str) {
        let begins = difference.begins.to_string();
        let whose = match &difference.device_id {
            Some(device_id) => format!("{device_id}, {}", begins.get(..10).unwrap_or(&begins)),
            None => format!("all devices, from {begins}"),
        };
        let place = json!({"device_id": difference.device_id, span: begins});
        self.add(&whose, &place, &difference.figures());
    }

    /// Some figures of one place.
    fn add(&mut self, whose: &str, place: &Value, figures: &[FigureDifference]) {
        for FigureDifference { figure, stored, recounted } in figures {
            say!(self.json, "{whose}: {figure} is {stored}, recounted {recounted}");
            self.json.keep(&mut self.listed, || {
                let mut found = place.clone();
                found["figure"] = json!(figure);
                found["stored"] = value(stored);
                found["recounted"] = value(recounted);
                found
            });
        }
    }
}

/// A figure as programs read it: a number, a time, or null for none.
fn value(figure: &str) -> Value {
    match figure.parse::<i64>() {
        Ok(number) => json!(number),
        Err(_) if figure == "none" => Value::Null,
        Err(_) => json!(figure),
    }
}
