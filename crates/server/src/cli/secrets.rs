//! `pisync secrets`: changes the key under which the secrets of channels are stored, also beside a running server. Keys come
//! from a file or from standard input, never from what was typed.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{database, device::read, exit::Failure, output::JsonArgs};
use crate::{
    clock::Clock,
    config::{DatabaseArgs, MigrationArgs, SecretsArgs},
    notify::secrets::{RekeyError, Secrets, SecretsKey},
    random::Randomness,
    store::{Actor, Via},
};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync secrets rekey                       a new key in secrets.key, beside SQLite
  pisync secrets rekey --new-key new.key     from SECRETS_KEY, or secrets.key, to the file's key")]
pub(super) struct SecretsCommand {
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
    /// Encrypt all secrets anew under a new key
    #[command(after_help = "\
Examples:
  pisync secrets rekey                        a new key in secrets.key, beside SQLite
  pisync secrets rekey --new-key new.key
  openssl rand -base64 32 | tee new.key | pisync secrets rekey --new-key -

The present key is SECRETS_KEY or, without it, the one in the file secrets.key
beside an SQLite database. With --new-key, set SECRETS_KEY to the new key
afterwards and start all servers again: their channels are locked until then.
Everything happens in one transaction. Backups keep the secrets that they have,
under the key of their time.")]
    Rekey {
        /// The file of the new key; - is standard input
        #[arg(long, value_name = "FILE")]
        new_key: Option<PathBuf>,
    },
}

pub(super) async fn run(command: &SecretsCommand) -> Result<(), Failure> {
    let Action::Rekey { new_key } = &command.action;
    let (json, clock) = (command.json, Clock::system());
    let by = Actor { via: Via::CommandLine, address: None, at: clock.now() };
    let present = command.secrets.key()?;
    let new_key = new_key.as_deref().map(|file| {
        let text = String::from_utf8(read(file)?).unwrap_or_default();
        SecretsKey::parse(&text)
            .map_err(|rule| Failure::usage(format!("--new-key {}: {rule}", file.display())))
    });
    let new_key = new_key.transpose()?;
    let target = database::existing(&command.database)?;
    let store = database::open(&target, &command.migrations, &clock).await?;
    let secrets = Secrets::of(&target, present, Randomness::system());
    let rekeyed = secrets.rekey(&*store, new_key, &by).await.map_err(|error| match error {
        RekeyError::NoNewKey(_) => Failure::usage(error.to_string()),
        error => error.to_string().into(),
    })?;
    let channels = rekeyed.channels;
    match &rekeyed.file {
        Some(file) => say!(
            json,
            "the secrets of {channels} channels are stored under a new key, which is in {}; back it up",
            file.display()
        ),
        None => say!(
            json,
            "the secrets of {channels} channels are stored under the new key; set SECRETS_KEY to it and start all servers again"
        ),
    }
    json.document(|| {
        json!({
            "database": target.to_string(),
            "channels": channels,
            "key_file": rekeyed.file.as_ref().map(|file| file.display().to_string()),
        })
    });
    Ok(())
}
