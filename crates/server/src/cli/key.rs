//! `pisync key`: makes, lists and revokes API keys, also beside a running server. A key is shown once, alone on standard output,
//! and never logged.

use clap::{
    Args, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use pisync_core::{DeviceId, GroupName, Timestamp, text::check_text};
use serde_json::{Value, json};

use super::{
    database, distance,
    exit::Failure,
    output::{self, JsonArgs},
    table,
};
use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs, number},
    keys::{self, KeyRequest, MAX_NAME},
    maintenance::present,
    random::Randomness,
    store::{Actor, ApiKey, GroupFilter, Revocation, Scope, Via},
};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync key create --scope ingest --name fleet        one key for all devices
  pisync key create --scope ingest --device pi-001     one that reports for pi-001 alone
  pisync key create --scope ingest --group school-17   one for the devices of a group; new ones join it
  pisync key create --scope read --expires 90d --name prometheus
  pisync key create --scope operate --name anna        for somebody who looks after the fleet
  pisync key revoke 3
  KEY=$(pisync key create --scope ingest)              for a script

A key is sent as `Authorization: Bearer psk_\u{2026}`. The key alone goes to
standard output; what is said about it goes to standard error.")]
pub(super) struct KeyCommand {
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
    /// Make a key; it is shown this once and kept nowhere
    #[command(after_help = "\
Examples:
  pisync key create --scope ingest --name fleet      one key for all devices
  pisync key create --scope ingest --device pi-001   one that reports for pi-001 alone
  pisync key create --scope ingest --group school-17
  pisync key create --scope read --expires 90d --name prometheus
  KEY=$(pisync key create --scope admin)             for a script")]
    Create {
        /// What it opens: ingest (reporting), read (everything but keys and the audit log), operate (that, and
        /// changing devices, policies and windows) or admin
        #[arg(long, value_name = "SCOPE", hide_possible_values = true, value_parser = scopes())]
        scope: Scope,
        /// The only device that it may report for
        #[arg(long, value_name = "ID", conflicts_with = "group")]
        device: Option<String>,
        /// The only group whose devices it may report for; a device that was never seen is put in it
        #[arg(long, value_name = "NAME")]
        group: Option<String>,
        /// When it ends: after so long (90d, 12h, 4w) or at a time (2027-01-01)
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
        /// What to call it
        #[arg(long)]
        name: Option<String>,
    },
    /// List all keys
    #[command(after_help = "\
Examples:
  pisync key list
  pisync key list --json")]
    List,
    /// Make keys open nothing any more
    #[command(after_help = "\
Example:
  pisync key revoke 3 4  what `pisync key list` calls 3 and 4")]
    Revoke {
        /// Their numbers, as listed
        #[arg(
            required = true,
            value_name = "NUMBER",
            value_parser = number::<i64>(1..=i64::MAX.unsigned_abs())
        )]
        ids: Vec<i64>,
    },
}

pub(super) async fn run(command: &KeyCommand) -> Result<(), Failure> {
    let json = command.json;
    let clock = Clock::system();
    let now = clock.now();
    let by = Actor { via: Via::CommandLine, address: None, at: now };
    match &command.action {
        Action::Create { scope, device, group, expires, name } => {
            let key_request =
                key_request(*scope, device.as_deref(), group.as_deref(), name.as_deref())?;
            let expires_at = expires.as_deref().map(|when| end(when, now)).transpose()?;
            let key_request = KeyRequest { expires_at, ..key_request };
            let problems: Vec<_> = key_request
                .problems(now)
                .iter()
                .map(|found| format!("{} {}", option(found.field), found.rule))
                .collect();
            if !problems.is_empty() {
                return Err(Failure::usage(problems.join("; ")));
            }
            let target = database::existing(&command.database)?;
            let store = database::open(&target, &command.migrations, &clock).await?;
            let present = present(&*store, &clock).await?;
            if let Some(end) = expires_at.filter(|end| *end <= present) {
                let message = format!(
                    "the key would end at {end}, and the present is {present} or later; set this machine's clock, or name a later time with --expires"
                );
                return Err(message.into());
            }
            let (id, secret) =
                keys::create(&*store, &Randomness::system(), key_request, &by).await?;
            eprintln!("made key {id} in {target}; it is shown this once:");
            if json.is_asked_for() {
                json.document(|| {
                    json!({
                        "database": target.to_string(),
                        "id": id,
                        "key": secret.as_str(),
                        "scope": scope.as_str(),
                        "name": name,
                        "device_id": device,
                        "group": group,
                        "expires_at": expires_at,
                    })
                });
            } else {
                println!("{}", secret.as_str());
            }
            if output::is_incomplete() {
                // A key that nobody has seen must not open anything.
                store.revoke_key(id, &by).await?;
                return Err(format!(
                    "cannot write to standard output; key {id} was revoked, make another one"
                )
                .into());
            }
            Ok(())
        }
        Action::List => {
            let target = database::existing(&command.database)?;
            let store = database::open(&target, &command.migrations, &clock).await?;
            let keys = store.keys().await?.keys;
            // Whoever reads the document needs no table.
            if !json.is_asked_for() {
                list(&keys, now).iter().for_each(|line| println!("{line}"));
            }
            json.document(|| {
                let keys: Vec<_> = keys.iter().map(|key| document(key, now)).collect();
                json!({"database": target.to_string(), "keys": keys})
            });
            Ok(())
        }
        Action::Revoke { ids } => {
            let target = database::existing(&command.database)?;
            let store = database::open(&target, &command.migrations, &clock).await?;
            let (mut revoked, mut already, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
            for id in ids {
                match store.revoke_key(*id, &by).await? {
                    Revocation::Revoked => {
                        say!(json, "revoked key {id}");
                        revoked.push(id);
                    }
                    Revocation::Already => {
                        say!(json, "key {id} was revoked before");
                        already.push(id);
                    }
                    Revocation::Unknown => unknown.push(id),
                }
            }
            json.document(|| {
                json!({
                    "database": target.to_string(),
                    "revoked": revoked,
                    "revoked_before": already,
                    "unknown": unknown,
                })
            });
            if unknown.is_empty() {
                return Ok(());
            }
            let unknown: Vec<_> = unknown.iter().map(ToString::to_string).collect();
            let unknown = unknown.join(", ");
            Err(format!("no such key: {unknown}; `pisync key list` lists them").into())
        }
    }
}

/// The scopes, which a shell can complete.
fn scopes() -> impl TypedValueParser<Value = Scope> {
    PossibleValuesParser::new(Scope::ALL.map(Scope::as_str)).try_map(|scope| scope.parse())
}

/// The option that sets a field of the API.
fn option(field: &str) -> &str {
    match field {
        "name" => "--name",
        "scope" => "--scope",
        "device_id" => "--device",
        "group" => "--group",
        "expires_at" => "--expires",
        other => other,
    }
}

/// The name of a group that was typed.
pub(super) fn group_name(text: &str) -> Result<GroupName, Failure> {
    GroupName::new(text).map_err(|error| Failure::usage(format!("--group {error}")))
}

/// The group whose devices or incidents are asked for; empty for those in none.
pub(super) fn group_filter(text: &str) -> Result<GroupFilter, Failure> {
    GroupFilter::new(text).map_err(|error| Failure::usage(format!("--group {error}")))
}

fn key_request(
    scope: Scope,
    device: Option<&str>,
    group: Option<&str>,
    name: Option<&str>,
) -> Result<KeyRequest, Failure> {
    if let Some(name) = name {
        check_text(name, MAX_NAME).map_err(|error| Failure::usage(format!("--name {error}")))?;
    }
    let device_id = device.map(DeviceId::new).transpose();
    Ok(KeyRequest {
        name: name.map(str::to_owned),
        scope,
        device_id: device_id.map_err(|error| Failure::usage(format!("--device {error}")))?,
        group: group.map(group_name).transpose()?,
        expires_at: None,
    })
}

/// The end that was typed: so long from `now`, or a time.
fn end(when: &str, now: Timestamp) -> Result<Timestamp, Failure> {
    let so_long = distance::milliseconds(when, "hdw")
        .map(|milliseconds| now.saturating_add_milliseconds(milliseconds));
    so_long.or_else(|| Timestamp::parse_iso8601(when)).ok_or_else(|| {
        Failure::usage(format!(
            "--expires {when}: expected so many hours, days or weeks (12h, 90d, 4w), or a time such as 2027-01-01"
        ))
    })
}

/// A key for programs, with the names that `GET /api/keys` gives its fields.
fn document(key: &ApiKey, now: Timestamp) -> Value {
    let state = match (key.revoked_at, key.expires_at) {
        (Some(_), _) => "revoked",
        (None, Some(at)) if at <= now => "expired",
        (None, _) => "valid",
    };
    json!({
        "id": key.id,
        "hint": key.hint,
        "name": key.name,
        "scope": key.scope.as_str(),
        "device_id": key.device_id,
        "group": key.group,
        "state": state,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used": key.last_used,
    })
}

/// The list as a table.
fn list(keys: &[ApiKey], now: Timestamp) -> Vec<String> {
    if keys.is_empty() {
        return vec!["there are no keys yet; make one with `pisync key create`".to_owned()];
    }
    let heading = ["NUMBER", "KEY", "SCOPE", "FOR", "STATE", "MADE", "LAST USED", "NAME"];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(keys.iter().map(|key| row(key, now)));
    table::lines(&rows)
}

fn row(key: &ApiKey, now: Timestamp) -> [String; 8] {
    let date = |time: Timestamp| time.to_string()[..10].to_owned();
    let bound = match (&key.device_id, &key.group) {
        (Some(device_id), _) => format!("device {device_id}"),
        (None, Some(group)) => format!("group {group}"),
        (None, None) => "all".to_owned(),
    };
    let state = match (key.revoked_at, key.expires_at) {
        (Some(at), _) => format!("revoked {}", date(at)),
        (None, Some(at)) if at <= now => format!("expired {}", date(at)),
        (None, Some(at)) => format!("until {}", date(at)),
        (None, None) => "valid".to_owned(),
    };
    [
        key.id.to_string(),
        format!("{}\u{2026}", key.hint),
        key.scope.as_str().to_owned(),
        bound,
        state,
        date(key.created_at),
        key.last_used.map_or("never".to_owned(), date),
        key.name.clone().unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends() {
        let now = Timestamp::parse_iso8601("2026-11-22T12:00:00Z").unwrap();
        for (typed, expected) in [
            ("90d", "2027-02-20T12:00:00.000Z"),
            ("12h", "2026-11-23T00:00:00.000Z"),
            ("2w", "2026-12-06T12:00:00.000Z"),
            ("2027-01-01", "2027-01-01T00:00:00.000Z"),
        ] {
            assert_eq!(end(typed, now).unwrap().to_string(), expected, "{typed}");
        }
        for typed in ["", "90", "d", "-1d", "1.5d", "90 days", "soon"] {
            assert!(end(typed, now).is_err(), "{typed}");
        }
    }
}
