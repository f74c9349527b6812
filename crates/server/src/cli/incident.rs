//! `pisync incident`: lists, shows and acknowledges incidents, also beside a running server. It goes straight to the store.
//! Only a server makes and resolves incidents.

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use pisync_core::{
    DeviceId, Timestamp,
    health::{EndError, IncidentScope, ProblemKind, check_end},
    text::check_text,
};
use serde_json::{Value, json};

use super::{database, distance, exit::Failure, key::group_filter, output::JsonArgs, table};
use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs, number},
    incident_format::{IncidentData, IncidentDetailData, MAX_NOTE, shown_details},
    maintenance::present,
    store::{
        AcknowledgeOutcome, Acknowledgement, Actor, Count, INCIDENT_KINDS, Incident,
        IncidentDetail, IncidentQuery, NewAcknowledgement, Store, Via,
    },
};

/// How many members `show` lists.
const SHOWN_MEMBERS: u32 = 1_000;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync incident list                            what is wrong now
  pisync incident list --state resolved --group school-17
  pisync incident show 812                        one incident, its devices and what has happened
  pisync incident ack 812 --note power-cut --for 4h")]
pub(super) struct IncidentCommand {
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
    /// List incidents, newest first
    #[command(after_help = "\
Examples:
  pisync incident list
  pisync incident list --kind silent --scope group
  pisync incident list --state resolved --device pi-001 --since 2026-03-01
  pisync incident list --json")]
    List(ListArgs),
    /// Show an incident, the devices that it is about, and what has happened
    #[command(after_help = "\
Examples:
  pisync incident show 812
  pisync incident show 812 --json")]
    Show {
        /// Its number, as listed
        #[arg(value_name = "ID", value_parser = number::<i64>(1..=i64::MAX.unsigned_abs()))]
        id: i64,
    },
    /// Say that somebody looks after an incident, so that nobody is reminded of it
    #[command(after_help = "\
Examples:
  pisync incident ack 812
  pisync incident ack 812 --note power-cut --for 4h
  pisync incident ack 812 --until 2027-03-02T12:00:00Z
  pisync incident ack 812 --withdraw")]
    Ack {
        /// Its number, as listed
        #[arg(value_name = "ID", value_parser = number::<i64>(1..=i64::MAX.unsigned_abs()))]
        id: i64,
        /// What to say about it
        #[arg(long, value_name = "TEXT", conflicts_with = "withdraw")]
        note: Option<String>,
        /// How long it counts: so many minutes, hours, days or weeks (30m, 4h, 2d, 1w)
        #[arg(long = "for", value_name = "TIME", conflicts_with_all = ["until", "withdraw"])]
        duration: Option<String>,
        /// Until when it counts (2027-03-02T12:00:00Z)
        #[arg(long, value_name = "WHEN", conflicts_with = "withdraw")]
        until: Option<String>,
        /// Take back what was said
        #[arg(long)]
        withdraw: bool,
    },
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Open or resolved ones
    #[arg(long, value_name = "STATE", default_value = "open", value_parser = PossibleValuesParser::new(["open", "resolved"]))]
    state: String,
    /// Only this kind
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(INCIDENT_KINDS.map(ProblemKind::as_str)))]
    kind: Option<String>,
    /// Only those about devices, groups or the fleet
    #[arg(long, value_name = "SCOPE", value_parser = PossibleValuesParser::new(IncidentScope::ALL.map(IncidentScope::as_str)))]
    scope: Option<String>,
    /// Only those of this group and of its devices; '' for devices in no group
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Only those of this device, and those that it is a member of
    #[arg(long, value_name = "ID")]
    device: Option<String>,
    /// Only those opened at this time or later (2026-03-01)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// The most to list
    #[arg(long, value_name = "NUMBER", default_value = "50", value_parser = number::<u32>(1..=1000))]
    limit: u32,
}

impl ListArgs {
    fn query(&self) -> Result<IncidentQuery, Failure> {
        let device_id = self.device.as_deref().map(DeviceId::new).transpose();
        let named = |wanted: &Option<String>, word: &str| wanted.as_deref() == Some(word);
        Ok(IncidentQuery {
            is_resolved: self.state == "resolved",
            kind: INCIDENT_KINDS.into_iter().find(|kind| named(&self.kind, kind.as_str())),
            scope: IncidentScope::ALL.into_iter().find(|scope| named(&self.scope, scope.as_str())),
            group: self.group.as_deref().map(group_filter).transpose()?,
            device_id: device_id.map_err(|error| Failure::usage(format!("--device {error}")))?,
            since: self.since.as_deref().map(|when| time("--since", when)).transpose()?,
            limit: self.limit,
            after: None,
        })
    }
}

pub(super) async fn run(command: &IncidentCommand) -> Result<(), Failure> {
    let json = command.json;
    let clock = Clock::system();
    match &command.action {
        Action::List(arguments) => {
            let query = arguments.query()?;
            let target = database::existing(&command.database)?;
            let store = database::open(&target, &command.migrations, &clock).await?;
            let page = store.incidents(&query).await?;
            let now = clock.now();
            if !json.is_asked_for() {
                lines_of_page(&page.incidents, &query, now)
                    .iter()
                    .for_each(|line| println!("{line}"));
                if page.next.is_some() {
                    eprintln!(
                        "there are more; ask for up to 1000 with --limit, or for fewer with --since, --group or --kind"
                    );
                }
            }
            json.document(|| {
                let (total, at_least) = match page.total {
                    Count::Exactly(total) => (Some(total), None),
                    Count::AtLeast(total) => (None, Some(total)),
                };
                let incidents: Vec<_> = page
                    .incidents
                    .into_iter()
                    .map(|incident| IncidentData::new(incident, now))
                    .collect();
                json!({
                    "database": target.to_string(),
                    "incidents": incidents,
                    "total": total,
                    "total_is_at_least": at_least,
                })
            });
            Ok(())
        }
        Action::Show { id } => {
            let target = database::existing(&command.database)?;
            let store = database::open(&target, &command.migrations, &clock).await?;
            let detail = store.incident(*id, SHOWN_MEMBERS, 0).await?;
            let detail = detail.ok_or_else(|| unknown(*id))?;
            let now = clock.now();
            if !json.is_asked_for() {
                lines_of_incident(&detail, now).iter().for_each(|line| println!("{line}"));
            }
            json.document(|| {
                let total = match detail.total_members {
                    Count::Exactly(total) | Count::AtLeast(total) => total,
                };
                json!({
                    "database": target.to_string(),
                    "incident": IncidentDetailData::new(detail, now),
                    "members": total,
                })
            });
            Ok(())
        }
        Action::Ack { id, note, duration, until, withdraw } => {
            let now = clock.now();
            let acknowledgement = if *withdraw {
                None
            } else {
                Some(acknowledgement(note.as_deref(), duration.as_deref(), until.as_deref(), now)?)
            };
            let target = database::existing(&command.database)?;
            let store = database::open(&target, &command.migrations, &clock).await?;
            let incident = acknowledge(&*store, &clock, *id, acknowledgement.as_ref()).await?;
            if acknowledgement.is_some() {
                say!(json, "acknowledged {}", headline(&incident));
            } else {
                say!(json, "withdrew what was said about {}", headline(&incident));
            }
            json.document(|| {
                json!({
                    "database": target.to_string(),
                    "incident": IncidentData::new(incident, now),
                })
            });
            Ok(())
        }
    }
}

fn unknown(id: i64) -> Failure {
    Failure::from(format!("no such incident: {id}; `pisync incident list` lists them"))
}

/// A time that was typed.
fn time(option: &str, when: &str) -> Result<Timestamp, Failure> {
    Timestamp::parse_iso8601(when).ok_or_else(|| {
        Failure::usage(format!("{option} {when}: expected a time such as 2027-03-02T12:00:00Z"))
    })
}

/// A time that was typed as a distance from `now`.
fn after(now: Timestamp, typed: &str) -> Result<Timestamp, Failure> {
    let found = distance::milliseconds(typed, "mhdw")
        .map(|milliseconds| now.saturating_add_milliseconds(milliseconds));
    found.ok_or_else(|| {
        Failure::usage(format!(
            "--for {typed}: expected so many minutes, hours, days or weeks (30m, 4h, 2d, 1w)"
        ))
    })
}

fn acknowledgement(
    note: Option<&str>,
    duration: Option<&str>,
    until: Option<&str>,
    now: Timestamp,
) -> Result<NewAcknowledgement, Failure> {
    if let Some(note) = note {
        check_text(note, MAX_NOTE).map_err(|error| Failure::usage(format!("--note {error}")))?;
    }
    let end = match (duration, until) {
        (Some(duration), _) => Some(("--for", after(now, duration)?)),
        (None, Some(until)) => Some(("--until", time("--until", until)?)),
        (None, None) => None,
    };
    if let Some((option, end)) = end {
        check_end(end, now).map_err(|error| {
            let hint = match error {
                EndError::Past => "",
                EndError::TooFar => "; leave it out if it is to count until the incident ends",
            };
            Failure::usage(format!("{option} {error}{hint}"))
        })?;
    }
    Ok(NewAcknowledgement { note: note.map(str::to_owned), until: end.map(|(_, end)| end) })
}

async fn acknowledge(
    store: &dyn Store,
    clock: &Clock,
    id: i64,
    acknowledgement: Option<&NewAcknowledgement>,
) -> Result<Incident, Failure> {
    let by = Actor { via: Via::CommandLine, address: None, at: clock.now() };
    let present = present(store, clock).await?;
    if let Some(end) = acknowledgement.and_then(|given| given.until).filter(|end| *end <= present) {
        return Err(format!(
            "the acknowledgement would end at {end}, and the present is {present} or later; set this machine's clock, or name a later time"
        )
        .into());
    }
    match store.acknowledge_incident(id, acknowledgement, &by).await? {
        AcknowledgeOutcome::Done(incident) => Ok(*incident),
        AcknowledgeOutcome::Resolved => {
            Err(format!("incident {id} is already resolved; there is nothing to look after").into())
        }
        AcknowledgeOutcome::Unknown => Err(unknown(id)),
    }
}

/// A time to the second, for people.
pub(super) fn moment(time: Timestamp) -> String {
    format!("{}Z", &time.to_string()[..19])
}

/// What an incident is about.
pub(super) fn subject(incident: &Incident) -> String {
    subject_of(&incident.scope, &incident.subject)
}

/// What an incident with this scope and subject is about.
pub(super) fn subject_of(scope: &str, subject: &str) -> String {
    if scope == IncidentScope::Fleet.as_str() {
        return "the fleet".to_owned();
    }
    if scope == IncidentScope::Group.as_str() && subject.is_empty() {
        return "devices in no group".to_owned();
    }
    format!("{scope} {subject}")
}

fn headline(incident: &Incident) -> String {
    let Incident { id, kind, severity, .. } = incident;
    format!("incident {id}: {} is {kind} ({severity})", subject(incident))
}

/// How many devices an incident is about, in words.
pub(super) fn devices(incident: &Incident) -> String {
    let count = |name: &str| incident.summary[name].as_i64().unwrap_or(0);
    let (affected, judged, late) = (count(&incident.kind), count("judged"), count("presumed"));
    let mut words = format!("{affected} of {judged}");
    if late > 0 {
        words.push_str(&format!(", {late} late"));
    }
    words
}

fn acknowledged(given: &Acknowledgement) -> String {
    let mut words = format!("acknowledged by {} at {}", given.by, moment(given.at));
    if let Some(until) = given.until {
        words.push_str(&format!(" until {}", moment(until)));
    }
    if let Some(note) = &given.note {
        words.push_str(&format!(": {note}"));
    }
    words
}

/// A list as a table.
fn lines_of_page(incidents: &[Incident], query: &IncidentQuery, now: Timestamp) -> Vec<String> {
    if incidents.is_empty() {
        let state = if query.is_resolved { "resolved" } else { "open" };
        return vec![format!("there are no {state} incidents like this")];
    }
    let last = if query.is_resolved { "RESOLVED" } else { "LOOKED AFTER BY" };
    let heading = ["ID", "SEVERITY", "KIND", "ABOUT", "SINCE", "DEVICES", last];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(incidents.iter().map(|incident| {
        let last = match (incident.resolved_at, incident.acknowledged(now)) {
            (Some(at), _) => {
                format!("{} {}", moment(at), incident.resolution.as_deref().unwrap_or_default())
            }
            (None, Some(given)) => given.by.clone(),
            (None, None) if incident.is_flapping() => "nobody (flapping)".to_owned(),
            (None, None) => "nobody".to_owned(),
        };
        [
            incident.id.to_string(),
            incident.severity.clone(),
            incident.kind.clone(),
            subject(incident),
            moment(incident.since),
            devices(incident),
            last,
        ]
    }));
    table::lines(&rows)
}

/// One incident in sentences, its members and its timeline.
fn lines_of_incident(detail: &IncidentDetail, now: Timestamp) -> Vec<String> {
    let IncidentDetail { incident, members, total_members, timeline } = detail;
    let mut lines = vec![headline(incident)];
    lines.push(match incident.resolved_at {
        Some(at) => format!(
            "  since {}, resolved {} ({})",
            moment(incident.since),
            moment(at),
            incident.resolution.as_deref().unwrap_or("no reason is known")
        ),
        None => format!("  since {}, open", moment(incident.since)),
    });
    if incident.reopened > 0 {
        lines.push(format!(
            "  first opened {}, reopened {} times{}",
            moment(incident.opened_at),
            incident.reopened,
            if incident.is_flapping() { ", flapping" } else { "" }
        ));
    }
    lines.push(format!("  devices: {}", devices(incident)));
    if let Some(heard) =
        incident.summary["last_heard"].as_i64().and_then(Timestamp::from_millisecond)
    {
        lines.push(format!("  last heard {}", moment(heard)));
    }
    if let Some(given) = incident.acknowledged(now) {
        lines.push(format!("  {}", acknowledged(given)));
    } else if incident.resolved_at.is_none() {
        lines.push(format!("  nobody looks after it yet: `pisync incident ack {}`", incident.id));
    }
    if !members.is_empty() {
        lines.push(String::new());
        let heading = ["DEVICE", "JOBS", "JOINED", "LEFT", ""];
        let mut rows = vec![heading.map(str::to_owned)];
        rows.extend(members.iter().map(|member| {
            [
                member.device_id.clone(),
                jobs(&member.jobs),
                moment(member.joined_at),
                member.left_at.map_or_else(String::new, moment),
                if member.is_presumed { "only late" } else { "" }.to_owned(),
            ]
        }));
        lines.extend(table::lines(&rows));
        let shown = members.len() as u64;
        match *total_members {
            Count::Exactly(total) if total > shown => {
                lines.push(format!("and {} more", total - shown));
            }
            Count::AtLeast(total) => lines.push(format!("and at least {} more", total - shown)),
            Count::Exactly(_) => {}
        }
    }
    if !timeline.is_empty() {
        lines.push(String::new());
        lines.extend(timeline.iter().map(|entry| {
            let by = entry.by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
            let details = words_of(&shown_details(&entry.details));
            let details = if details.is_empty() { details } else { format!("  {details}") };
            format!("{}  {}{by}{details}", moment(entry.at), entry.what)
        }));
    }
    lines
}

/// The jobs that a member is listed for.
fn jobs(jobs: &Value) -> String {
    let names = jobs.as_array().into_iter().flatten();
    names.map(|job| job.as_str().unwrap_or("-")).collect::<Vec<_>>().join(", ")
}

/// Details for people: `name: value`, without the marks of JSON, and without what says nothing.
fn words_of(details: &serde_json::Map<String, Value>) -> String {
    fn words(value: &Value) -> String {
        match value {
            Value::String(text) => text.clone(),
            Value::Array(values) => values.iter().map(words).collect::<Vec<_>>().join(", "),
            other => other.to_string(),
        }
    }
    let says_nothing = |value: &Value| match value {
        Value::Array(values) => values.iter().all(Value::is_null),
        value => value.is_null(),
    };
    let words: Vec<_> = details
        .iter()
        .filter(|(_, value)| !says_nothing(value))
        .map(|(name, value)| format!("{}: {}", name.replace('_', " "), words(value)))
        .collect();
    words.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let now = Timestamp::parse_iso8601("2026-11-22T12:00:00Z").unwrap();
        for (typed, expected) in [
            ("30m", "2026-11-22T12:30:00.000Z"),
            ("4h", "2026-11-22T16:00:00.000Z"),
            ("2d", "2026-11-24T12:00:00.000Z"),
            ("1w", "2026-11-29T12:00:00.000Z"),
        ] {
            assert_eq!(after(now, typed).unwrap().to_string(), expected, "{typed}");
        }
        for typed in ["", "4", "h", "-1h", "1.5h", "4 h", "soon"] {
            assert!(after(now, typed).is_err(), "{typed}");
        }
    }
}
