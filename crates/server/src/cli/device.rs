//! `pisync device`: the roster and single devices, also beside a running server. It reads rosters with the API's own reader.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use pisync_core::{
    DeviceId, Timestamp,
    health::{EndError, Level, check_end},
};
use serde_json::json;

use super::{database, distance, exit::Failure, key::group_filter, output::JsonArgs, table};
use crate::{
    api::devices::roster_rows::{RosterError, RosterFormat, read_roster},
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    store::{
        Actor, Device, DeviceChange, DeviceQuery, DeviceSort, DeviceView, GroupFilter,
        MOST_ROSTER_ROWS, PauseChange, Pauses, RosterOutcome, Store, Via,
    },
};

/// How many devices are read at a time.
const PAGE: u32 = 1_000;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync device import roster.csv --dry-run  what a roster would change
  pisync device import roster.csv            and do it
  pisync device list --group school-17
  pisync device pause pi-001 --for 2h        nobody is told of it meanwhile
  pisync device resume pi-001
  pisync device delete pi-001                with all its events, for good")]
pub(super) struct DeviceCommand {
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
    /// Set the roster: which devices there are. None is removed
    #[command(after_help = "\
Examples:
  pisync device import roster.csv            with a line of names: device_id,name,group,tags,note
  pisync device import roster.json --dry-run
  cat roster.ndjson | pisync device import -
                                             one JSON object per line

Tags in CSV are separated by semicolons, and an empty cell leaves a field as it
is. If any row is wrong, nothing is stored.")]
    Import {
        /// The roster: CSV, a JSON array, or NDJSON; - is standard input
        file: PathBuf,
        /// Say what would change, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// List devices with their states
    #[command(after_help = "\
Examples:
  pisync device list
  pisync device list --group school-17 --json")]
    List {
        /// Only devices of this group; '' for devices in no group
        #[arg(long, value_name = "NAME")]
        group: Option<String>,
    },
    /// Do not expect a device to report for a while
    #[command(after_help = "\
Examples:
  pisync device pause pi-001                 until somebody resumes it
  pisync device pause pi-001 --for 2h        or 90m, 3d, 1w
  pisync device pause pi-001 --until 2027-01-07T08:00Z")]
    Pause {
        /// The device
        #[arg(value_name = "ID")]
        device: String,
        /// For how long: 90m, 2h, 3d, 1w
        #[arg(long = "for", value_name = "TIME", conflicts_with = "until")]
        length: Option<String>,
        /// Until when
        #[arg(long, value_name = "TIME")]
        until: Option<String>,
    },
    /// End the pause of a device
    #[command(after_help = "\
Example:
  pisync device resume pi-001

It ends the device's own pause. While its group or the whole fleet is paused,
the device stays so, and the command says it.")]
    Resume {
        /// The device
        #[arg(value_name = "ID")]
        device: String,
    },
    /// Delete a device with all its events, for good
    #[command(after_help = "\
Example:
  pisync device delete pi-001")]
    Delete {
        /// The device
        #[arg(value_name = "ID")]
        device: String,
    },
}

pub(super) async fn run(command: &DeviceCommand) -> Result<(), Failure> {
    let (json, clock) = (command.json, Clock::system());
    let now = clock.now();
    let by = Actor { via: Via::CommandLine, address: None, at: now };
    let open = async || {
        let target = database::existing(&command.database)?;
        let store = database::open(&target, &command.migrations, &clock).await?;
        Ok::<_, Failure>((target, store))
    };
    match &command.action {
        Action::Import { file, dry_run } => {
            let text = read(file)?;
            let rows =
                read_roster(&text, format_of(file, &text)).map_err(|error| why(file, error))?;
            let (target, store) = open().await?;
            let outcome = store.put_roster(&rows, *dry_run, &by).await?;
            let RosterOutcome { created, updated, unchanged, not_listed } = outcome;
            let would = if *dry_run { "would be " } else { "" };
            say!(
                json,
                "{created} {would}new, {updated} {would}changed, {unchanged} as before; {not_listed} other devices are not listed"
            );
            json.document(|| {
                json!({
                    "database": target.to_string(),
                    "dry_run": dry_run,
                    "created": created,
                    "updated": updated,
                    "unchanged": unchanged,
                    "not_listed": not_listed,
                })
            });
            Ok(())
        }
        Action::List { group } => {
            let group = group.as_deref().map(group_filter).transpose()?;
            let (target, store) = open().await?;
            let devices = devices(&*store, group).await?;
            if !json.is_asked_for() {
                listing(&devices).iter().for_each(|line| println!("{line}"));
            }
            json.document(|| {
                let devices: Vec<_> = devices.iter().map(document).collect();
                json!({"database": target.to_string(), "devices": devices})
            });
            Ok(())
        }
        Action::Pause { device, length, until } => {
            let device_id = device_id(device)?;
            let until = end(length.as_deref(), until.as_deref(), now)?;
            let (target, store) = open().await?;
            set_pause(&*store, &device_id, PauseChange::Until(until), &by).await?;
            let pauses = pauses(&*store, &device_id).await?;
            let others = others(pauses, now);
            let others = if others.is_empty() { others } else { format!(" ({others} besides)") };
            match until {
                Some(until) => say!(json, "paused {device_id} until {until}{others}"),
                None => say!(json, "paused {device_id}; `pisync device resume` ends it{others}"),
            }
            json.document(|| pause_document(&target.to_string(), &device_id, pauses, now));
            Ok(())
        }
        Action::Resume { device } => {
            let device_id = device_id(device)?;
            let (target, store) = open().await?;
            let before = pauses(&*store, &device_id).await?;
            set_pause(&*store, &device_id, PauseChange::End, &by).await?;
            let after = pauses(&*store, &device_id).await?;
            let had_own = before.device.is_some_and(|pause| pause.is_on(now));
            let others = others(after, now);
            match (had_own, others.is_empty()) {
                (true, true) => say!(json, "{device_id} is judged again"),
                (true, false) => say!(
                    json,
                    "ended the pause of {device_id} itself; it stays paused, because {others}"
                ),
                (false, true) => say!(json, "{device_id} was not paused"),
                (false, false) => say!(
                    json,
                    "{device_id} has no pause of its own; it stays paused, because {others}"
                ),
            }
            json.document(|| pause_document(&target.to_string(), &device_id, after, now));
            Ok(())
        }
        Action::Delete { device } => {
            let device_id = device_id(device)?;
            let (target, store) = open().await?;
            let deleted = store.delete_device(&device_id, &by).await?;
            let deleted = deleted.ok_or_else(|| unknown(&device_id))?;
            say!(json, "deleted {device_id} and its {deleted} events");
            json.document(|| {
                json!({"database": target.to_string(), "device_id": device_id, "deleted_events": deleted})
            });
            Ok(())
        }
    }
}

/// The contents of a file, or of standard input.
pub(super) fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let read = match file.to_str() {
        Some("-") => std::io::stdin().lock().read_to_end(&mut text).map(|_| ()),
        _ => std::fs::read(file).map(|read| text = read),
    };
    read.map_err(|error| Failure::from(format!("cannot read {}: {error}", file.display())))?;
    Ok(text)
}

/// By the first character, since standard input has no name.
fn format_of(file: &Path, text: &[u8]) -> RosterFormat {
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    let is_csv = file.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("csv"));
    match text.trim_ascii_start().first() {
        _ if is_csv => RosterFormat::Csv,
        Some(b'[') => RosterFormat::Array,
        Some(b'{') => RosterFormat::Lines,
        _ => RosterFormat::Csv,
    }
}

fn why(file: &Path, error: RosterError) -> Failure {
    let what = match error {
        RosterError::TooManyRows => {
            format!("it has more than {MOST_ROSTER_ROWS} rows; cut it in two")
        }
        RosterError::Malformed(how) => how,
        RosterError::Invalid(violations) => {
            let messages: Vec<_> =
                violations.into_iter().map(|violation| violation.message).collect();
            messages.join("\n  ")
        }
    };
    format!("{} was not imported:\n  {what}", file.display()).into()
}

fn device_id(text: &str) -> Result<DeviceId, Failure> {
    DeviceId::new(text).map_err(|error| Failure::usage(format!("the device {error}")))
}

fn unknown(device_id: &DeviceId) -> Failure {
    format!("no such device: {device_id}; `pisync device list` lists them").into()
}

async fn set_pause(
    store: &dyn Store,
    device_id: &DeviceId,
    pause: PauseChange,
    by: &Actor,
) -> Result<(), Failure> {
    let change = DeviceChange { pause: Some(pause), ..DeviceChange::default() };
    if store.update_device(device_id, &change, by).await? {
        Ok(())
    } else {
        Err(unknown(device_id))
    }
}

/// The pauses of a device, its group and the fleet.
async fn pauses(store: &dyn Store, device_id: &DeviceId) -> Result<Pauses, Failure> {
    let detail = store.device_detail(device_id).await?;
    detail.map(|detail| detail.pauses).ok_or_else(|| unknown(device_id))
}

/// Which other pauses hold a device: those of its group and of the fleet.
fn others(pauses: Pauses, now: Timestamp) -> String {
    let others = pauses.in_force(now).filter_map(|(level, pause)| {
        let whose = match level {
            Level::Group => "its group",
            Level::Fleet => "the fleet",
            Level::Device | Level::BuiltIn => return None,
        };
        let until = pause
            .until
            .map_or_else(|| "until somebody ends it".to_owned(), |until| format!("until {until}"));
        Some(format!("{whose} is paused {until}"))
    });
    others.collect::<Vec<_>>().join(", and ")
}

/// Whether a device is paused, by itself or by what it belongs to, with the names that the API gives the fields.
fn pause_document(
    target: &str,
    device_id: &DeviceId,
    pauses: Pauses,
    now: Timestamp,
) -> serde_json::Value {
    let longest = pauses.longest(now);
    let by: Vec<_> = pauses.in_force(now).map(|(level, _)| level.as_str()).collect();
    json!({
        "database": target,
        "device_id": device_id,
        "paused": longest.is_some(),
        "paused_until": longest.and_then(|pause| pause.until),
        "paused_by": by,
    })
}

/// The end of a pause; `None` when somebody must end it.
fn end(
    length: Option<&str>,
    until: Option<&str>,
    now: Timestamp,
) -> Result<Option<Timestamp>, Failure> {
    if let Some(length) = length {
        let milliseconds =
            distance::milliseconds(length, "mhdw").filter(|milliseconds| *milliseconds > 0);
        let rule = || {
            format!("--for {length}: expected so many minutes, hours, days or weeks, such as 2h")
        };
        let milliseconds = milliseconds.ok_or_else(|| Failure::usage(rule()))?;
        let until = now.saturating_add_milliseconds(milliseconds);
        return checked(until, now, &format!("--for {length}")).map(Some);
    }
    let Some(until) = until else { return Ok(None) };
    let option = format!("--until {until}");
    let until = Timestamp::from_iso8601(until)
        .map_err(|error| Failure::usage(format!("{option}: {error}")))?;
    checked(until, now, &option).map(Some)
}

fn checked(until: Timestamp, now: Timestamp, option: &str) -> Result<Timestamp, Failure> {
    check_end(until, now).map(|()| until).map_err(|error| {
        let hint = match error {
            EndError::Past => "",
            EndError::TooFar => "; leave it out to pause until somebody ends it",
        };
        Failure::usage(format!("{option}: {error}{hint}"))
    })
}

/// All devices, by id, with what is set for them.
async fn devices(
    store: &dyn Store,
    group: Option<GroupFilter>,
) -> Result<Vec<(Device, DeviceView)>, Failure> {
    let mut query = DeviceQuery {
        search: None,
        group,
        tag: None,
        states: Vec::new(),
        is_overdue: false,
        sort: DeviceSort::DeviceId,
        descending: false,
        limit: PAGE,
        offset: 0,
        after: None,
    };
    let mut found = Vec::new();
    loop {
        let page = store.devices(&query).await?;
        let ids: Vec<_> = page.items.iter().map(|device| device.device_id.clone()).collect();
        let mut views = store.device_views(&ids).await?;
        found.extend(page.items.into_iter().map(|device| {
            let view = views.remove(&device.device_id).unwrap_or_default();
            (device, view)
        }));
        query.after = page.next;
        if query.after.is_none() {
            return Ok(found);
        }
    }
}

fn status((_, view): &(Device, DeviceView)) -> Option<&'static str> {
    view.health.as_ref().map(|health| health.state.as_str())
}

fn document(found: &(Device, DeviceView)) -> serde_json::Value {
    let (device, view) = found;
    json!({
        "device_id": device.device_id,
        "name": device.name,
        "group": device.group,
        "tags": view.settings.tags,
        "status": status(found),
        "status_since": view.health.as_ref().map(|health| health.since),
        "last_seen": device.figures.last_seen,
    })
}

/// The list as a table.
fn listing(devices: &[(Device, DeviceView)]) -> Vec<String> {
    if devices.is_empty() {
        return vec![
            "there are no such devices; `pisync device import` makes some known".to_owned(),
        ];
    }
    let mut rows =
        vec![["DEVICE", "STATUS", "LAST SEEN", "GROUP", "NAME", "TAGS"].map(str::to_owned)];
    rows.extend(devices.iter().map(|found| {
        let (device, view) = found;
        [
            device.device_id.clone(),
            status(found).unwrap_or("-").to_owned(),
            device.figures.last_seen.map_or("never".to_owned(), |at| at.to_string()),
            device.group.clone().unwrap_or_default(),
            device.name.clone().unwrap_or_default(),
            view.settings.tags.join(";"),
        ]
    }));
    table::lines(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_pauses() {
        let now = Timestamp::parse_iso8601("2026-11-22T12:00:00Z").unwrap();
        let of = |length, until| end(length, until, now).map(|end| end.map(|end| end.to_string()));
        for (length, expected) in [
            ("90m", "2026-11-22T13:30:00.000Z"),
            ("2h", "2026-11-22T14:00:00.000Z"),
            ("1w", "2026-11-29T12:00:00.000Z"),
        ] {
            assert_eq!(of(Some(length), None).unwrap().as_deref(), Some(expected));
        }
        let until = of(None, Some("2026-11-23")).unwrap();
        assert_eq!(until.as_deref(), Some("2026-11-23T00:00:00.000Z"));
        assert_eq!(of(None, None).unwrap(), None);
        for (length, until) in [
            (Some("2"), None),
            (Some("0h"), None),
            (Some("-1h"), None),
            (None, Some("2026-11-22")),
            (None, Some("soon")),
            (None, Some("2206-11-23")),
            (Some("600w"), None),
        ] {
            assert!(of(length, until).is_err(), "{length:?} {until:?}");
        }
    }
}
