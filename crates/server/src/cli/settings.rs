//! Settings that were not typed: from environment variables, or else from the `.env` file. Each becomes the
//! argument that would have been typed, so that one definition reads them all. The process's environment stays as it
//! is. A message of this module never shows a value that may be a password.

use std::{
    any::TypeId,
    ffi::OsString,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use clap::{Arg, ArgMatches, Command, builder::Resettable, parser::ValueSource};

use super::exit::Failure;
use crate::config::{
    DatabaseArgs, Secret,
    env_file::{EnvFile, Setting},
};

/// The setting that all commands have.
pub(super) const LOG_LEVEL: &str = "log_level";

/// The file of settings in the working directory, and what is odd about it.
#[derive(Debug, Default)]
pub(super) struct SettingsFile {
    file: EnvFile,
    /// What whoever has written it should know; none of it keeps a command from running.
    pub(super) warnings: Vec<String>,
    /// Settings whose names no command knows: most likely typos.
    pub(super) unknown: Vec<String>,
    /// Why the file could not be read. Whoever asks for help gets it all the same.
    unreadable: Option<String>,
}

/// Reads a file. A pipe is refused: it ends when its writer wants it to.
fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    if std::fs::metadata(path)?.file_type().is_fifo() {
        return Err(std::io::Error::other("it is a pipe, not a file"));
    }
    std::fs::read(path)
}

impl SettingsFile {
    /// Reads `.env`, if there is one. `known` are the names that any command reads.
    pub(super) fn read(known: &[String]) -> Self {
        let mut settings = Self::default();
        let mut unreadable = |error: &dyn std::fmt::Display| {
            settings.unreadable = Some(format!("cannot read .env: {error}"));
        };
        match read_file(Path::new(".env")) {
            Ok(bytes) => match EnvFile::parse(&bytes) {
                Ok(file) => settings.file = file,
                Err(error) => unreadable(&error),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == std::io::ErrorKind::IsADirectory => {
                let warning = ".env is a folder, not a file of settings; it is ignored";
                settings.warnings.push(warning.to_owned());
            }
            Err(error) => unreadable(&error),
        }
        for line in &settings.file.odd_lines {
            settings
                .warnings
                .push(format!("line {line} of .env is no setting (NAME=value); it is ignored"));
        }
        for setting in settings.file.settings() {
            settings.warnings.extend(quotation_warning(setting, known));
            if !known.contains(&setting.name) {
                settings.unknown.push(setting.name.clone());
            }
        }
        settings
    }

    /// Whether everybody on this machine may read the file, and a password in it.
    pub(super) fn is_readable_by_others(&self) -> bool {
        const OTHERS_READ: u32 = 0o004;
        let is_secret = |setting: &Setting| {
            let is_password = ["DB_PASSWORD", "SECRETS_KEY"].contains(&&*setting.name)
                && !setting.value.is_empty();
            is_password || setting.value.contains("://") && setting.value.contains('@')
        };
        let is_open = std::fs::metadata(".env")
            .is_ok_and(|metadata| metadata.permissions().mode() & OTHERS_READ != 0);
        is_open && self.file.settings().any(is_secret)
    }

    /// What was typed, with the settings of the command that were not; `None` when what was typed is no command
    /// that could be run.
    ///
    /// A variable of the environment goes before the file's also when it is empty, as it did for the Node
    /// service; being empty, it is as good as none.
    pub(super) fn complete(
        &self,
        mut command: Command,
        mut typed: Vec<OsString>,
    ) -> Result<Option<Vec<OsString>>, Failure> {
        let mut lenient = without_environment(command.clone(), true);
        let Ok(found) = lenient.try_get_matches_from_mut(&typed) else {
            return Ok(None);
        };
        command.build();
        let (mut command, mut found) = (&command, &found);
        while let Some((name, inner)) = found.subcommand() {
            let Some(of_name) = command.find_subcommand(name) else { break };
            (command, found) = (of_name, inner);
        }
        if !reads_settings(command) {
            if let Some(error) = &self.unreadable {
                eprintln!("pisync: {error}; it is ignored");
            }
            return Ok(Some(typed));
        }
        if let Some(error) = &self.unreadable {
            return Err(error.clone().into());
        }
        let names_url = self.names_database_url(command, found);
        let mut settings = Vec::new();
        for argument in command.get_arguments() {
            let (Some(variable), Some(flag)) = (argument.get_env(), argument.get_long()) else {
                continue;
            };
            if found.value_source(argument.get_id().as_str()) == Some(ValueSource::CommandLine) {
                continue;
            }
            if names_url && DatabaseArgs::IGNORED_BESIDE_URL.contains(&argument.get_id().as_str()) {
                continue;
            }
            let Some(value) = self.value(argument, &variable.to_string_lossy())? else { continue };
            let mut setting = OsString::from(format!("--{flag}="));
            setting.push(value);
            settings.push(setting);
        }
        // Behind two hyphens nothing is a flag.
        let end = typed.iter().position(|word| word == "--").unwrap_or(typed.len());
        typed.splice(end..end, settings);
        Ok(Some(typed))
    }

    /// A message, and where the setting that it complains of was set, if that is known.
    pub(super) fn with_origin(&self, message: String) -> String {
        match self.origin(&message) {
            Some(origin) => format!("{message}; {origin}"),
            None => message,
        }
    }

    /// Where the setting that a message complains of was set, if it was not typed: the message may name a flag that nobody
    /// remembers to have used.
    pub(super) fn origin(&self, message: &str) -> Option<String> {
        if message.contains(".env") || message.contains("environment") {
            return None;
        }
        let mut definition = super::definition();
        definition.build();
        let mut settings = Vec::new();
        collect(&definition, &mut settings);
        let mut found = settings.into_iter().filter(|(name, flag)| {
            (is_named(message, name) || is_named(message, flag)) && !is_typed(flag)
        });
        let (name, _) = found
            .find(|(name, _)| std::env::var_os(name).is_some() || self.file.get(name).is_some())?;
        if std::env::var_os(&name).is_some() {
            return Some(format!("{name} is set in the environment"));
        }
        let line = self.file.get(&name)?.line;
        Some(format!("{name} is set in line {line} of .env"))
    }

    /// Whether the database is named by a URL, so that the settings of its parts are not read: what they say must not
    /// end the command.
    fn names_database_url(&self, command: &Command, found: &ArgMatches) -> bool {
        let is_url = |argument: &&Arg| argument.get_id() == DatabaseArgs::URL;
        let Some(argument) = command.get_arguments().find(is_url) else { return false };
        if found.value_source(DatabaseArgs::URL) == Some(ValueSource::CommandLine) {
            return found
                .get_raw(DatabaseArgs::URL)
                .is_some_and(|mut url| url.any(|url| !url.is_empty()));
        }
        let variable = argument.get_env().map(std::ffi::OsStr::to_string_lossy);
        variable.is_some_and(|name| !matches!(self.value(argument, &name), Ok(None)))
    }

    /// The value of an argument that was not typed; `None` when it is not set, or to nothing.
    fn value(&self, argument: &Arg, name: &str) -> Result<Option<OsString>, Failure> {
        if let Some(value) = std::env::var_os(name) {
            if value.to_str().is_none() && !is_path(argument) {
                let message = format!("the environment variable {name} is not valid UTF-8 text");
                return Err(Failure::usage(message));
            }
            return Ok(Some(value).filter(|value| !value.is_empty()));
        }
        let Some(setting) = self.file.get(name).filter(|setting| !setting.value.is_empty()) else {
            return Ok(None);
        };
        let is_secret = argument.get_value_parser().type_id() == TypeId::of::<Secret>();
        let value = &setting.value;
        let problem = if value.contains('\0') {
            "contains a NUL byte: the file may be damaged; write the line again"
        } else if !self.file.is_utf8 && value.contains('\u{fffd}') {
            "is not valid UTF-8 text; save the file as UTF-8"
        } else if value.contains(['\n', '\r']) && !is_secret {
            "has several lines; is a quotation mark not closed?"
        } else {
            return Ok(Some(value.into()));
        };
        let line = setting.line;
        Err(Failure::usage(format!("the value of {name} in line {line} of .env {problem}")))
    }
}

/// The variables and flags of all settings.
fn collect(command: &Command, settings: &mut Vec<(String, String)>) {
    for argument in command.get_arguments() {
        if let (Some(name), Some(flag)) = (argument.get_env(), argument.get_long()) {
            settings.push((name.to_string_lossy().into_owned(), format!("--{flag}")));
        }
    }
    command.get_subcommands().for_each(|inner| collect(inner, settings));
}

/// Whether a text names a variable or a flag: not as a part of a longer name.
fn is_named(text: &str, name: &str) -> bool {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-');
    text.match_indices(name).any(|(at, _)| {
        !text[..at].ends_with(is_part) && !text[at + name.len()..].starts_with(is_part)
    })
}

/// Whether a flag was typed.
fn is_typed(flag: &str) -> bool {
    std::env::args_os().any(|word| {
        let word = word.to_string_lossy();
        word.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

/// What is odd about the quotation marks of a setting. It is read as dotenv reads it all the same.
fn quotation_warning(setting: &Setting, known: &[String]) -> Option<String> {
    let Setting { name, line, last_line, .. } = setting;
    if let Some(swallowed) = swallowed(setting, known) {
        return Some(format!(
            "the value of {name} in line {line} of .env takes the setting {swallowed} in; is a quotation mark not closed?"
        ));
    }
    if setting.is_unclosed {
        return Some(format!(
            "the value of {name} in line {line} of .env begins with a quotation mark and does not end with it; is it not closed? It is taken as part of the value"
        ));
    }
    // Another program's setting may be meant so: a certificate, for instance.
    (last_line > line && known.contains(name)).then(|| {
        format!(
            "the value of {name} in line {line} of .env goes on to line {last_line}; is a quotation mark not closed?"
        )
    })
}

/// Whether a command reads a setting of its own. How much to log means nothing to the others, such as `openapi`.
fn reads_settings(command: &Command) -> bool {
    let mut settings = command.get_arguments().filter(|argument| argument.get_env().is_some());
    settings.any(|argument| argument.get_id() != LOG_LEVEL)
}

/// Whether an argument's value is the path of a file or a folder.
pub(super) fn is_path(argument: &Arg) -> bool {
    argument.get_value_parser().type_id() == TypeId::of::<PathBuf>()
}

/// Whether an argument's value is, or may look like, the URL of a database.
pub(super) fn is_url(argument: &Arg) -> bool {
    let names = argument.get_value_names().unwrap_or_default();
    names.iter().any(|name| name == "URL") || argument.get_id() == "db_password"
}

/// A known setting that stands, most likely by mistake, within the value of another.
fn swallowed<'a>(setting: &Setting, known: &'a [String]) -> Option<&'a String> {
    let mut names = setting.value.lines().skip(1).filter_map(|line| {
        let (name, _) = line.split_once('=')?;
        let name = name.trim();
        Some(name.strip_prefix("export ").unwrap_or(name).trim())
    });
    names.find_map(|name| known.iter().find(|known| *known == name))
}

/// The command as it takes settings that are typed alone, and, if `lenient`, without those that it cannot do
/// without.
pub(super) fn without_environment(command: Command, lenient: bool) -> Command {
    command
        .mut_args(|argument| {
            let argument = argument.env(Resettable::Reset);
            let is_setting = argument.get_long().is_some();
            if lenient && is_setting { argument.required(false) } else { argument }
        })
        .mut_subcommands(|command| without_environment(command, lenient))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    /// A setting is passed on as `--flag=value` of the command that is run.
    #[test]
    fn every_variable_is_a_flag_of_the_command_that_reads_it() {
        fn check(command: &Command) {
            for argument in command.get_arguments().filter(|argument| argument.get_env().is_some())
            {
                assert!(argument.get_long().is_some(), "{argument}");
                assert!(argument.get_action().takes_values(), "{argument}");
                assert!(
                    argument.is_global_set() || command.get_subcommands().next().is_none(),
                    "{argument} would not be known to the commands below {}",
                    command.get_name()
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn a_swallowed_setting_is_found() {
        let file = EnvFile::parse(b"A='x\nexport HOST = y\nB='\nC=z").unwrap();
        let known = ["PORT".to_owned(), "HOST".to_owned()];
        let found = swallowed(file.get("A").unwrap(), &known);
        assert_eq!(found.map(String::as_str), Some("HOST"));
        assert_eq!(swallowed(file.get("C").unwrap(), &known), None);
    }
}
