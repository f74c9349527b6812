//! `pisync device`: the roster and single devices, also beside a running server. It reads rosters with the API's own reader.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use pisync_core::{DeviceId, GroupName, Timestamp};
use serde_json::json;

use super::{database, distance, exit::Failure, key::group_name, output::JsonArgs, table};
use crate::{
    api::devices::roster_rows::{RosterError, RosterFormat, read_roster},
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    store::{
        Actor, Device, DeviceChange, DeviceQuery, DeviceSort, DeviceView, MOST_ROSTER_ROWS,
        PauseChange, RosterOutcome, Store, Via,
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
        /// Only devices of this group
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
    /// Expect a paused device to report again
    #[command(after_help = "\
Example:
  pisync device resume pi-001")]
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
            let group = group.as_deref().map(group_name).transpose()?;
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
            match until {
                Some(until) => say!(json, "paused {device_id} until {until}"),
                None => say!(json, "paused {device_id}; `pisync device resume` ends it"),
            }
            json.document(|| {
                json!({"database": target.to_string(), "device_id": device_id, "paused": true, "paused_until": until})
            });
            Ok(())
        }
        Action::Resume { device } => {
            let device_id = device_id(device)?;
            let (target, store) = open().await?;
            set_pause(&*store, &device_id, PauseChange::End, &by).await?;
            say!(json, "{device_id} is expected to report again");
            json.document(|| {
                json!({"database": target.to_string(), "device_id": device_id, "paused": false, "paused_until": null})
            });
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
        return Ok(Some(now.saturating_add_milliseconds(milliseconds)));
    }
    let Some(until) = until else { return Ok(None) };
    match Timestamp::from_iso8601(until) {
        Ok(until) if until > now => Ok(Some(until)),
        Ok(_) => Err(Failure::usage(format!("--until {until}: must be in the future"))),
        Err(error) => Err(Failure::usage(format!("--until {until}: {error}"))),
    }
}

/// All devices, by id, with what is set for them.
async fn devices(
    store: &dyn Store,
    group: Option<GroupName>,
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
        ] {
            assert!(of(length, until).is_err(), "{length:?} {until:?}");
        }
    }
}
