//! `pisync window`: times at which devices are not expected to report, or at which nobody is told, also beside a running
//! server. It reads windows with the API's own reader.

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use pisync_core::health::Weekly;
use serde_json::{Map, Value, json};

use super::{database, exit::Failure, output::JsonArgs, table};
use crate::{
    api::{fleet::windows::read_window, wire::fields::Fields},
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs, number},
    store::{Actor, FleetWindow, MOST_WINDOWS, Via},
};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync window add nights --group school-17 --effect closed --timezone Europe/Berlin \\
      --days mon,tue,wed,thu,fri --start 16:00 --end 07:00
  pisync window add holidays --effect closed --timezone Europe/Berlin \\
      --from 2026-12-23 --until 2027-01-07
  pisync window list
  pisync window delete 3")]
pub(super) struct WindowCommand {
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
    /// List all windows
    #[command(after_help = "\
Examples:
  pisync window list
  pisync window list --json")]
    List,
    /// Make a window: the time from --from to --until, or a part of weekdays
    #[command(after_help = "\
Examples:
  pisync window add nights --group school-17 --effect closed --timezone Europe/Berlin \\
      --days mon,tue,wed,thu,fri --start 16:00 --end 07:00
  pisync window add holidays --effect closed --timezone Europe/Berlin \\
      --from 2026-12-23 --until 2027-01-07

Times without an offset are local times of the time zone. An end that is not
after the start is on the next day.")]
    Add(Box<AddArgs>),
    /// Delete windows
    #[command(after_help = "\
Example:
  pisync window delete 3 4  what `pisync window list` calls 3 and 4")]
    Delete {
        /// Their numbers, as listed
        #[arg(
            required = true,
            value_name = "NUMBER",
            value_parser = number::<i64>(1..=i64::MAX.unsigned_abs())
        )]
        ids: Vec<i64>,
    },
}

#[derive(Debug, Args)]
struct AddArgs {
    /// What to call it
    name: String,
    /// For the devices of a group, rather than the whole fleet
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// For a device
    #[arg(long, value_name = "ID", conflicts_with = "group")]
    device: Option<String>,
    /// For the devices with a tag
    #[arg(long, value_name = "TAG", conflicts_with_all = ["group", "device"])]
    tag: Option<String>,
    /// closed: devices are not expected to report; quiet: they are judged, but messages wait
    #[arg(
        long,
        value_name = "EFFECT",
        hide_possible_values = true,
        value_parser = PossibleValuesParser::new(["closed", "quiet"])
    )]
    effect: String,
    /// The IANA time zone, such as Europe/Berlin
    #[arg(long, value_name = "ZONE")]
    timezone: String,
    /// When it begins
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// When it ends
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// The weekdays on which it begins: mon,tue,wed,thu,fri,sat,sun
    #[arg(long, value_name = "DAYS", value_delimiter = ',', requires_all = ["start", "end"])]
    days: Option<Vec<String>>,
    /// The time of day at which it begins
    #[arg(long, value_name = "HH:MM", requires = "days")]
    start: Option<String>,
    /// The time of day at which it ends
    #[arg(long, value_name = "HH:MM", requires = "days")]
    end: Option<String>,
}

impl AddArgs {
    /// The object that the API takes for it.
    fn fields(&self) -> Map<String, Value> {
        let (scope, key) = match (&self.group, &self.device, &self.tag) {
            (Some(group), ..) => ("group", Some(group)),
            (_, Some(device), _) => ("device", Some(device)),
            (.., Some(tag)) => ("tag", Some(tag)),
            _ => ("fleet", None),
        };
        let mut fields = Map::new();
        let mut set = |name: &str, value: Value| {
            if !value.is_null() {
                fields.insert(name.to_owned(), value);
            }
        };
        set("name", json!(self.name));
        set("scope", json!(scope));
        set("key", json!(key));
        set("effect", json!(self.effect));
        set("timezone", json!(self.timezone));
        set("from", json!(self.from));
        set("until", json!(self.until));
        if let Some(days) = &self.days {
            set("weekly", json!({"days": days, "start": self.start, "end": self.end}));
        }
        fields
    }
}

pub(super) async fn run(command: &WindowCommand) -> Result<(), Failure> {
    let (json, clock) = (command.json, Clock::system());
    let by = Actor { via: Via::CommandLine, address: None, at: clock.now() };
    let open = async || {
        let target = database::existing(&command.database)?;
        let store = database::open(&target, &command.migrations, &clock).await?;
        Ok::<_, Failure>((target, store))
    };
    match &command.action {
        Action::List => {
            let (target, store) = open().await?;
            let windows = store.windows().await?;
            if !json.is_asked_for() {
                listing(&windows).iter().for_each(|line| println!("{line}"));
            }
            json.document(|| {
                let windows: Vec<_> = windows.iter().map(document).collect();
                json!({"database": target.to_string(), "windows": windows})
            });
            Ok(())
        }
        Action::Add(arguments) => {
            let window = read_window(Fields::new(arguments.fields())).map_err(|violations| {
                let messages = violations.iter().map(|violation| {
                    let field = violation.field.rsplit('.').next().unwrap_or_default();
                    let rule = violation.message.split_once("\" ").map_or("", |(_, rule)| rule);
                    format!("{} {rule}", option(field))
                });
                Failure::usage(messages.collect::<Vec<_>>().join("; "))
            })?;
            let (target, store) = open().await?;
            let id = store.create_window(&window, &by).await?.ok_or_else(|| {
                let message =
                    format!("there are {MOST_WINDOWS} windows already; delete some first");
                Failure::from(message)
            })?;
            say!(json, "made window {id}");
            json.document(|| json!({"database": target.to_string(), "id": id}));
            Ok(())
        }
        Action::Delete { ids } => {
            let (target, store) = open().await?;
            let (mut deleted, mut unknown) = (Vec::new(), Vec::new());
            for id in ids {
                if store.delete_window(*id, &by).await? {
                    say!(json, "deleted window {id}");
                    deleted.push(*id);
                } else {
                    unknown.push(*id);
                }
            }
            json.document(
                || json!({"database": target.to_string(), "deleted": deleted, "unknown": unknown}),
            );
            if unknown.is_empty() {
                return Ok(());
            }
            let unknown: Vec<_> = unknown.iter().map(ToString::to_string).collect();
            let unknown = unknown.join(", ");
            Err(format!("no such window: {unknown}; `pisync window list` lists them").into())
        }
    }
}

/// The option that sets a field of the API.
fn option(field: &str) -> String {
    match field {
        "name" => "the name".to_owned(),
        "key" => "--group, --device or --tag".to_owned(),
        other => format!("--{other}"),
    }
}

/// A window for programs, with the names that `GET /api/windows` gives its fields.
fn document(window: &FleetWindow) -> Value {
    json!({
        "id": window.id,
        "name": window.name,
        "scope": window.scope.word(),
        "key": Some(window.scope.key()).filter(|key| !key.is_empty()),
        "effect": window.effect.as_str(),
        "timezone": window.timezone,
        "from": window.times.from,
        "until": window.times.until,
        "weekly": window.times.weekly.as_ref().map(Weekly::to_json),
    })
}

/// The list as a table.
fn listing(windows: &[FleetWindow]) -> Vec<String> {
    if windows.is_empty() {
        return vec!["there are no windows yet; make one with `pisync window add`".to_owned()];
    }
    let mut rows =
        vec![["NUMBER", "NAME", "FOR", "EFFECT", "WHEN", "TIME ZONE"].map(str::to_owned)];
    rows.extend(windows.iter().map(|window| {
        [
            window.id.to_string(),
            window.name.clone(),
            format!("{} {}", window.scope.word(), window.scope.key()).trim_end().to_owned(),
            window.effect.as_str().to_owned(),
            when(window),
            window.timezone.clone(),
        ]
    }));
    table::lines(&rows)
}

fn when(window: &FleetWindow) -> String {
    let mut parts = Vec::new();
    if let Some(weekly) = &window.times.weekly {
        let weekly = weekly.to_json();
        let text = |name: &str| weekly[name].as_str().unwrap_or_default().to_owned();
        let days: Vec<_> =
            weekly["days"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        parts.push(format!("{} {}-{}", days.join(","), text("start"), text("end")));
    }
    parts.extend(window.times.from.map(|from| format!("from {from}")));
    parts.extend(window.times.until.map(|until| format!("until {until}")));
    parts.join(" ")
}
