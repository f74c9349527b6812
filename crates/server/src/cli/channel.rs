//! `pisync channel`: the ways by which people are told of incidents, also beside a running server. It reads channels with the
//! API's own reader. Secrets come from a file or from standard input, never from what was typed: that would stand in the list
//! of processes and in the shell's history.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pisync_core::Violation;
use serde_json::{Value, json};

use super::{database, device::read, exit::Failure, output::JsonArgs, table};
use crate::{
    api::{
        fleet::channels::{ChannelData, ChannelTest},
        wire::{error::ApiError, fields::Fields},
    },
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs, NotifyArgs, SecretsArgs, number},
    notify::{
        manage::{self, ChannelError, ChannelView},
        secrets::Secrets,
        sender::Sender,
    },
    random::Randomness,
    store::{Actor, Store, Via},
};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync channel create on-call.json    by what the file says; - is standard input
  pisync channel list
  pisync channel test 3                 sends a message now, and says how that went
  pisync channel rotate 3               a new signing secret, shown this once
  pisync channel delete 3

on-call.json holds what POST /api/channels takes, for instance
  {\"name\": \"on call\", \"kind\": \"slack\", \"url\": \"https://hooks.slack.com/services/\u{2026}\"}

Secrets are stored encrypted, under SECRETS_KEY or, beside SQLite, the key in
the file secrets.key. They are never shown again.")]
pub(super) struct ChannelCommand {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    secrets: SecretsArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    migrations: MigrationArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List all channels
    #[command(after_help = "\
Examples:
  pisync channel list
  pisync channel list --json")]
    List,
    /// Make a channel; the signing secret of a webhook is shown this once
    #[command(after_help = "\
Examples:
  pisync channel create on-call.json
  cat on-call.json | pisync channel create -
  SECRET=$(pisync channel create webhook.json)    for a script

The file holds a JSON object with name, kind and, by the kind:
  webhook                 url, signing_secret (made if absent), headers
  slack, discord, teams   url
  ntfy                    server, topic, token
  telegram                bot_token, chat_id, thread_id
  email                   to
and, where they differ from the usual, enabled, default and template.")]
    Create {
        /// The file of the channel; - is standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        notify: NotifyArgs,
    },
    /// Send a test message by a channel, and say how that went
    #[command(after_help = "\
Example:
  pisync channel test 3

It is sent at once, from here, by the settings that are set here. What waits is
sent by the server alone. Exit status: 0 the receiver took it, 1 it did not.")]
    Test {
        /// Its number, as listed
        #[arg(value_name = "NUMBER", value_parser = number::<i64>(1..=i64::MAX.unsigned_abs()))]
        id: i64,
        #[command(flatten)]
        notify: NotifyArgs,
    },
    /// Give a webhook a new signing secret; it is shown this once
    #[command(after_help = "\
Examples:
  pisync channel rotate 3
  SECRET=$(pisync channel rotate 3)    for a script

For 24 hours, messages are signed with the secret before it, too.")]
    Rotate {
        /// Its number, as listed
        #[arg(value_name = "NUMBER", value_parser = number::<i64>(1..=i64::MAX.unsigned_abs()))]
        id: i64,
    },
    /// Delete channels, and what waits to be sent by them
    #[command(after_help = "\
Example:
  pisync channel delete 3 4  what `pisync channel list` calls 3 and 4

Routes lose the channel. A route that has no other channel is deleted with it.")]
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

pub(super) async fn run(command: &ChannelCommand) -> Result<(), Failure> {
    let (json, clock) = (command.json, Clock::system());
    let by = Actor { via: Via::CommandLine, address: None, at: clock.now() };
    let key = command.secrets.key()?;
    let open = async || {
        let target = database::existing(&command.database)?;
        let store = database::open(&target, &command.migrations, &clock).await?;
        let secrets = Secrets::of(&target, key.clone(), Randomness::system());
        Ok::<_, Failure>((target, store, secrets))
    };
    match &command.action {
        Action::List => {
            let (target, store, secrets) = open().await?;
            let channels = manage::channels(&*store, &secrets).await?;
            if !json.is_asked_for() {
                listing(&channels).iter().for_each(|line| println!("{line}"));
            }
            let channels: Vec<_> = channels.iter().map(ChannelData::from).collect();
            let channels = serde_json::to_value(channels)?;
            json.document(|| json!({"database": target.to_string(), "channels": channels}));
            Ok(())
        }
        Action::Create { file, notify } => {
            let sender = sender(notify)?;
            let text = read(file)?;
            let (target, store, secrets) = open().await?;
            let fields = Fields::of(&text).map_err(|error| why(file, error))?;
            let request =
                manage::read_new(fields, &secrets).map_err(|error| why(file, error.into()))?;
            request.check_target(&sender).await.map_err(|error| why(file, error.into()))?;
            let created = manage::create(&*store, &secrets, request, &by).await;
            let (id, secret) = created.map_err(failure)?;
            say_made(json, id, secret.as_deref());
            json.document(
                || json!({"database": target.to_string(), "id": id, "signing_secret": secret}),
            );
            Ok(())
        }
        Action::Test { id, notify } => {
            let (sender, base_url) = (sender(notify)?, notify.public_url()?);
            let (target, store, secrets) = open().await?;
            let view = manage::channel(&*store, &secrets, *id).await.map_err(failure)?;
            let sent = manage::send_test(&view, &sender, base_url.as_deref(), clock.now()).await;
            let (delivery, milliseconds) = sent.map_err(failure)?;
            let test = ChannelTest::new(delivery, milliseconds);
            json.document(|| {
                json!({
                    "database": target.to_string(),
                    "id": id,
                    "delivered": test.delivered,
                    "status": test.status,
                    "milliseconds": test.milliseconds,
                    "error": test.error,
                })
            });
            match test.error {
                None => {
                    say!(json, "channel {id} has taken a test message, in {milliseconds} ms");
                    Ok(())
                }
                Some(error) => {
                    Err(format!("channel {id} has not taken a test message: {error}").into())
                }
            }
        }
        Action::Rotate { id } => {
            let (target, store, secrets) = open().await?;
            let secret = manage::rotate(&*store, &secrets, *id, &by).await.map_err(failure)?;
            eprintln!(
                "channel {id} has a new signing secret; it is shown this once, and the one before is used beside it for 24 hours:"
            );
            if !json.is_asked_for() {
                println!("{secret}");
            }
            json.document(
                || json!({"database": target.to_string(), "id": id, "signing_secret": secret}),
            );
            Ok(())
        }
        Action::Delete { ids } => {
            let (target, store, _) = open().await?;
            delete(json, &target.to_string(), &*store, ids, &by).await
        }
    }
}

/// What sends messages, by the settings that are set here.
fn sender(notify: &NotifyArgs) -> Result<Sender, Failure> {
    Ok(Sender::new(notify.sender()?)?)
}

/// The signing secret stands alone on standard output, for scripts.
fn say_made(json: JsonArgs, id: i64, secret: Option<&str>) {
    match secret {
        Some(secret) => {
            eprintln!("made channel {id}; its signing secret is shown this once:");
            if !json.is_asked_for() {
                println!("{secret}");
            }
        }
        None => say!(json, "made channel {id}"),
    }
}

async fn delete(
    json: JsonArgs,
    target: &str,
    store: &dyn Store,
    ids: &[i64],
    by: &Actor,
) -> Result<(), Failure> {
    let (mut deleted, mut unknown, mut dropped) = (Vec::new(), Vec::new(), 0);
    for id in ids {
        match store.delete_channel(*id, by).await? {
            Some(waiting) => {
                say!(json, "deleted channel {id}; {waiting} notifications that waited are dropped");
                deleted.push(*id);
                dropped += waiting;
            }
            None => unknown.push(*id),
        }
    }
    json.document(|| {
        json!({
            "database": target,
            "deleted": deleted,
            "dropped_notifications": dropped,
            "unknown": unknown,
        })
    });
    if unknown.is_empty() {
        return Ok(());
    }
    let unknown: Vec<_> = unknown.iter().map(ToString::to_string).collect();
    let unknown = unknown.join(", ");
    Err(format!("no such channel: {unknown}; `pisync channel list` lists them").into())
}

/// Why a file is no channel. Nothing of what it holds is repeated.
fn why(file: &Path, error: ApiError) -> Failure {
    let name = file.display();
    match error {
        ApiError::Validation(violations) => {
            let messages: Vec<_> =
                violations.into_iter().map(|Violation { message, .. }| message).collect();
            format!("{name} is no channel:\n  {}", messages.join("\n  ")).into()
        }
        ApiError::Malformed(place) => format!("{name} is not JSON: {place}").into(),
        ApiError::Internal(why) => why.into(),
        other => format!("{name} is no channel: {other:?}").into(),
    }
}

fn failure(error: ChannelError) -> Failure {
    match error {
        ChannelError::Unknown => "no such channel; `pisync channel list` lists them".to_owned(),
        ChannelError::NoKey => {
            "secrets cannot be stored: set SECRETS_KEY, the same as that of the servers".to_owned()
        }
        ChannelError::NameTaken => "there is another channel with this name".to_owned(),
        ChannelError::Store(error) => return error.into(),
        other => other.to_string(),
    }
    .into()
}

/// The list as a table.
fn listing(channels: &[ChannelView]) -> Vec<String> {
    if channels.is_empty() {
        return vec!["there are no channels yet; make one with `pisync channel create`".to_owned()];
    }
    let heading = ["NUMBER", "NAME", "KIND", "STATE", "DEFAULT", "WAITING", "GOES TO"];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(channels.iter().map(|view| {
        let channel = &view.channel;
        [
            channel.id.to_string(),
            channel.name.clone(),
            channel.kind.clone(),
            view.state().as_str().to_owned(),
            if channel.is_default { "yes" } else { "no" }.to_owned(),
            channel.waiting.to_string(),
            place(view),
        ]
    }));
    table::lines(&rows)
}

/// Where a channel's messages go, as far as that may be shown.
fn place(view: &ChannelView) -> String {
    let fields = view.masked();
    let shown = ["server", "url", "topic", "chat_id", "to"].into_iter();
    let shown: Vec<_> =
        shown.filter_map(|field| fields.get(field).and_then(Value::as_str)).collect();
    shown.join(" ")
}
