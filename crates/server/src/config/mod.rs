//! Settings as they are typed, and as the rest of the program uses them: flags, environment variables and a `.env`
//! file in the working directory mean the same. `cli` reads them. Nothing here opens a file or a database, apart from
//! what parses the text of a `.env` file.

pub mod database;
mod database_url;
pub(crate) mod env_file;
pub mod http;
mod notify;
pub mod serve;
mod settings;

use std::{ops::RangeInclusive, str::FromStr};

use clap::{Args, builder::TypedValueParser};

use crate::{logs::LogLevel, notify::secrets::SecretsKey};

pub use self::{
    database::{CopyArgs, DatabaseArgs, MigrationArgs},
    notify::NotifyArgs,
    serve::{AppEnv, ListenArgs, ServeArgs},
    settings::Settings,
};

/// How much every command says of what happens.
#[derive(Debug, Clone, Args)]
pub struct LogLevelArgs {
    /// How much to log: error, warn, info, debug or trace [default: info for a server, which has a log; warn
    /// for other commands, which write to standard error]
    #[arg(long, env = "LOG_LEVEL", global = true, help_heading = "Logs", value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
}

/// What is expected of devices' clocks.
#[derive(Debug, Clone, Args)]
pub struct ClockSkewArgs {
    /// How far ahead of the server's clock an event may be dated; at most a day, 86400
    #[arg(
        long,
        env = "MAX_CLOCK_SKEW_SECONDS",
        default_value_t = 300,
        value_name = "SECONDS",
        value_parser = number::<u32>(0..=86_400)
    )]
    pub max_clock_skew_seconds: u32,
}

/// The key under which secrets are stored.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Notifications")]
pub struct SecretsArgs {
    /// Key under which the secrets of channels are stored: 32 bytes as base64 or hexadecimal digits (openssl
    /// rand -base64 32). Without it, SQLite has a key in the file secrets.key beside the database
    #[arg(long, env = "SECRETS_KEY", global = true, value_name = "KEY")]
    secrets_key: Option<Secret>,
}

impl SecretsArgs {
    /// The key, if one is set.
    ///
    /// # Errors
    /// When it is no key. The message never shows it.
    pub fn key(&self) -> Result<Option<SecretsKey>, ConfigError> {
        let text = given(self.secrets_key.as_ref().map(|secret| &secret.0));
        let key = text.map(SecretsKey::parse).transpose();
        key.or_else(|rule| wrong(format!("SECRETS_KEY {rule}")))
    }
}

/// The numbers of a setting that has no bound of its own.
pub(crate) const ANY_NUMBER: RangeInclusive<u64> = 0..=u32::MAX as u64;

/// Reads a whole number within bounds. Of anything else it says what is expected.
pub(crate) fn number<T>(bounds: RangeInclusive<u64>) -> impl TypedValueParser<Value = T>
where
    T: TryFrom<u64> + Clone + Send + Sync + 'static,
{
    move |text: &str| {
        let number = text.parse().ok().filter(|number| bounds.contains(number));
        let (least, most) = (bounds.start(), bounds.end());
        number
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| format!("expected a whole number from {least} to {most}"))
    }
}

/// Text that is never shown.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The text, for whoever sends it.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("[hidden]")
    }
}

/// A setting that makes no sense, in words that say which and why.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct ConfigError(String);

fn wrong<T>(message: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(message.into()))
}

/// A value that was given and is not empty: `DB_PASSWORD=` in a `.env` file means none.
fn given(value: Option<&String>) -> Option<&str> {
    value.map(String::as_str).filter(|value| !value.is_empty())
}

/// The items of a list separated by commas.
fn items(list: Option<&String>) -> impl Iterator<Item = &str> {
    given(list)
        .into_iter()
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .filter(|item| !item.is_empty())
}
