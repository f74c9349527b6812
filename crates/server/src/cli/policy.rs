//! `pisync policy`: what is expected of the fleet, a group or a device, also beside a running server.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pisync_core::{DeviceId, GroupName, health::Policy};
use serde_json::{Value, json};

use super::{database, device::read, exit::Failure, key::group_name, output::JsonArgs};
use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs},
    store::{Actor, DeviceChange, LevelChange, PolicyUpdate, Store, Via},
};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync policy show                         what is set for the whole fleet
  pisync policy show --group school-17
  pisync policy set --group school-17 policy.json
  echo '{\"grace_seconds\": 3600}' | pisync policy set --device pi-001 -")]
pub(super) struct PolicyCommand {
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
    /// Print a policy as JSON; what is absent is inherited
    #[command(after_help = "\
Examples:
  pisync policy show
  pisync policy show --device pi-001 --json  also what it inherits")]
    Show {
        #[command(flatten)]
        level: LevelArgs,
    },
    /// Replace a policy
    #[command(after_help = "\
Examples:
  pisync policy set policy.json              for the whole fleet
  pisync policy set --group school-17 policy.json
  echo '{}' | pisync policy set --device pi-001 -")]
    Set {
        #[command(flatten)]
        level: LevelArgs,
        /// The policy, as JSON; - is standard input
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct LevelArgs {
    /// A group, rather than the whole fleet
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// A device
    #[arg(long, value_name = "ID", conflicts_with = "group")]
    device: Option<String>,
}

/// Whose policy it is.
enum Level {
    Fleet,
    Group(GroupName),
    Device(DeviceId),
}

impl Level {
    fn of(arguments: &LevelArgs) -> Result<Self, Failure> {
        if let Some(group) = &arguments.group {
            return group_name(group).map(Self::Group);
        }
        let Some(device) = &arguments.device else { return Ok(Self::Fleet) };
        let device = DeviceId::new(device);
        device.map(Self::Device).map_err(|error| Failure::usage(format!("--device {error}")))
    }

    fn name(&self) -> String {
        match self {
            Self::Fleet => "the fleet".to_owned(),
            Self::Group(name) => format!("the group {name}"),
            Self::Device(device_id) => format!("the device {device_id}"),
        }
    }

    /// The fields that name it in a document.
    fn document(&self, target: &str, mut fields: Value) -> Value {
        fields["database"] = json!(target);
        fields["group"] = json!(matches!(self, Self::Group(_)).then(|| self.key()));
        fields["device_id"] = json!(matches!(self, Self::Device(_)).then(|| self.key()));
        fields
    }

    fn key(&self) -> &str {
        match self {
            Self::Fleet => "",
            Self::Group(name) => name.as_str(),
            Self::Device(device_id) => device_id.as_str(),
        }
    }
}

pub(super) async fn run(command: &PolicyCommand) -> Result<(), Failure> {
    let (json, clock) = (command.json, Clock::system());
    let by = Actor { via: Via::CommandLine, address: None, at: clock.now() };
    let open = async || {
        let target = database::existing(&command.database)?;
        let store = database::open(&target, &command.migrations, &clock).await?;
        Ok::<_, Failure>((target, store))
    };
    match &command.action {
        Action::Show { level } => {
            let level = Level::of(level)?;
            let (target, store) = open().await?;
            let (policy, effective) = show(&*store, &level).await?;
            if !json.is_asked_for() {
                println!("{:#}", policy.to_json());
            }
            json.document(|| {
                let fields = json!({"policy": policy.to_json(), "effective_policy": effective});
                level.document(&target.to_string(), fields)
            });
            Ok(())
        }
        Action::Set { level, file } => {
            let level = Level::of(level)?;
            let policy = read_policy(file)?;
            let (target, store) = open().await?;
            set(&*store, &level, &policy, &by).await?;
            say!(json, "set the policy of {}", level.name());
            json.document(|| {
                level.document(&target.to_string(), json!({"policy": policy.to_json()}))
            });
            Ok(())
        }
    }
}

/// The policy that a file holds; - is standard input.
pub(super) fn read_policy(file: &Path) -> Result<Policy, Failure> {
    let text = read(file)?;
    let name = file.display();
    let value: Value = serde_json::from_slice(&text)
        .map_err(|error| Failure::from(format!("{name} is not JSON: {error}")))?;
    Policy::read(&value, "policy").map_err(|violations| {
        let messages: Vec<_> = violations.into_iter().map(|violation| violation.message).collect();
        Failure::from(format!("{name} is no policy:\n  {}", messages.join("\n  ")))
    })
}

/// The policy, and what applies to a device.
async fn show(store: &dyn Store, level: &Level) -> Result<(Policy, Value), Failure> {
    Ok(match level {
        Level::Fleet => (store.fleet().await?.level.policy, Value::Null),
        Level::Group(name) => {
            let group = store.group(name).await?;
            (group.map(|group| group.level.policy).unwrap_or_default(), Value::Null)
        }
        Level::Device(device_id) => {
            let found = store.device_detail(device_id).await?;
            let found = found.ok_or_else(|| unknown(device_id))?;
            (found.device.settings.level.policy, found.policy.to_json())
        }
    })
}

async fn set(store: &dyn Store, level: &Level, policy: &Policy, by: &Actor) -> Result<(), Failure> {
    let policy = Some(PolicyUpdate::Replace(policy.clone()));
    let of_level = LevelChange { policy: policy.clone(), ..LevelChange::default() };
    match level {
        Level::Fleet => store.update_fleet(&of_level, by).await?,
        Level::Group(name) => {
            store.update_group(name, &of_level, true, by).await?;
        }
        Level::Device(device_id) => {
            let change = DeviceChange { policy, ..DeviceChange::default() };
            if !store.update_device(device_id, &change, by).await? {
                return Err(unknown(device_id));
            }
        }
    }
    Ok(())
}

fn unknown(device_id: &DeviceId) -> Failure {
    format!("no such device: {device_id}; `pisync device list` lists them").into()
}
