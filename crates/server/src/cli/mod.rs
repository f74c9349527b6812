//! The command line: it reads what was typed, and runs one command, each in a file of its own. `main` calls it. What a command
//! has to say goes through `output`, and how it ends through `exit`; nothing else writes to the console or ends the process.

/// As the standard library's, but without its panic: see `output`.
macro_rules! print {
    ($($argument:tt)*) => { $crate::cli::output::text(format_args!($($argument)*)) };
}

/// As the standard library's, but without its panic: see `output`.
macro_rules! println {
    ($($argument:tt)*) => { print!("{}\n", format_args!($($argument)*)) };
}

/// As the standard library's, but without its panic: see `output`.
macro_rules! eprintln {
    ($($argument:tt)*) => { $crate::cli::output::error_line(format_args!($($argument)*)) };
}

/// A line for people, as [`output::JsonArgs::say`] writes it.
macro_rules! say {
    ($json:expr, $($argument:tt)*) => { $json.say(format_args!($($argument)*)) };
}

mod backtest;
mod backup;
mod channel;
mod completions;
mod copy;
mod database;
mod db;
mod device;
mod distance;
mod doctor;
mod exit;
mod export;
mod fleet;
mod health;
mod import;
mod incident;
mod interrupt;
mod journal;
mod key;
mod listen;
mod man;
mod masked;
mod migrate;
mod openapi;
mod output;
mod policy;
mod progress;
pub mod reference;
mod secrets;
mod serve;
mod settings;
mod simulate;
mod table;
mod take_over;
mod verify;
mod window;

use std::{ffi::OsString, process::ExitCode};

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind};

use self::{
    exit::{EXIT_STATUS, ExitStatus, Failure},
    masked::Masks,
    settings::{SettingsFile, without_environment},
};
use crate::{
    build_info,
    config::{LogLevelArgs, ServeArgs},
    logs::{self, LogLevel},
};

/// Did every device sync? A server that Raspberry Pi fleets report their file-sync runs to.
///
/// Without a command it serves. Every option can also be set by the environment variable named with
/// it, or in a file .env in the working directory; the command line goes first, the file last.
#[derive(Debug, Parser)]
#[command(name = "pisync", version = build_info::VERSION, after_help = after_help(), arg_required_else_help = false)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    log: LogLevelArgs,
}

const EXAMPLES: &str = "\
Examples:
  pisync                                   serve on http://localhost:3000, data in data/pisync.db
  pisync serve --port 8080 --host 0.0.0.0  serve on every interface
  DATABASE_URL=postgres://pisync@localhost/pisync pisync db setup
                                           create the PostgreSQL database and its tables
  pisync doctor                            would a server work here, and if not, what to do
  pisync migrate status                    what is applied and what is pending
  pisync backup /mnt/usb/pisync.db         a copy of the SQLite database, also while it is in use
  pisync copy --from sqlite:data/pisync.db --to postgres://pisync@localhost/pisync
                                           move from SQLite to PostgreSQL
  pisync key create --scope admin          a key that opens everything, shown this once
  pisync device import roster.csv          which devices there are
  pisync import events.csv.gz              events from elsewhere
  pisync export --output events.ndjson.gz  and out again";

fn after_help() -> String {
    format!("{EXAMPLES}\n\n{EXIT_STATUS}")
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server (also without a command)
    #[command(after_help = "\
Examples:
  pisync serve                           on http://localhost:3000, data in data/pisync.db
  pisync serve --port 8080 --host 0.0.0.0
  pisync serve --database-url postgres://pisync@localhost/pisync
  pisync serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem")]
    Serve(Box<ServeArgs>),
    /// Apply and roll back changes of the database's schema
    Migrate(migrate::MigrateCommand),
    /// Prepare a database
    Db(db::DbCommand),
    /// Recount all figures from the raw events and report what differs
    Verify(verify::VerifyCommand),
    /// Store events from a file: NDJSON, a JSON array or CSV, also compressed
    Import(import::ImportCommand),
    /// Write events into a file or to standard output, as NDJSON or CSV
    Export(export::ExportCommand),
    /// Copy an SQLite database into one file, also while a server uses it
    Backup(backup::BackupCommand),
    /// Put a backup in the place of an SQLite database
    Restore(backup::RestoreCommand),
    /// Copy everything into another database, of the same store or the other
    Copy(copy::CopyCommand),
    /// Look into the ingest journal of an SQLite database, and go on with a damaged one
    Journal(journal::JournalCommand),
    /// Make, list and revoke API keys
    Key(key::KeyCommand),
    /// List, show and acknowledge incidents
    Incident(incident::IncidentCommand),
    /// Show how the fleet is, explain a device's state, and run scripted fleets
    Fleet(fleet::FleetCommand),
    /// Set the roster; list, pause and delete devices
    Device(device::DeviceCommand),
    /// Show and set what is expected of the fleet, a group or a device
    Policy(policy::PolicyCommand),
    /// Make, list and delete times at which nothing is expected, or nobody is told
    Window(window::WindowCommand),
    /// Make, list, test and delete the ways by which people are told of incidents
    Channel(channel::ChannelCommand),
    /// Change the key under which the secrets of channels are stored
    Secrets(secrets::SecretsCommand),
    /// Would a server of this configuration work? Check everything, change nothing
    Doctor(Box<doctor::DoctorCommand>),
    /// Ask the running server whether it can serve
    Health(health::HealthCommand),
    /// Send a simulated fleet to a running server, measure it, and check its answers
    Simulate(Box<simulate::SimulateCommand>),
    /// Print the API's OpenAPI document
    #[command(after_help = "\
Example:
  pisync openapi > openapi.json")]
    Openapi,
    /// Print a script with which a shell completes what is typed
    Completions(completions::CompletionsCommand),
    /// Write manual pages into a folder
    Man(man::ManCommand),
}

impl Command {
    /// What is left of a command that a signal ends; `None` of one that deals with signals by itself.
    fn remains(&self) -> Option<&'static str> {
        Some(match self {
            Self::Serve(_) => return None,
            Self::Import(_) => "what was stored stays, and the same command goes on after it",
            Self::Export(_) | Self::Backup(_) => "nothing was kept of the file",
            Self::Copy(_) => "nothing was kept of the copy",
            Self::Migrate(_) | Self::Db(_) => {
                "each migration is applied in full or not at all: see pisync migrate status"
            }
            Self::Restore(_) => {
                "the database is the one before or the backup, whole in either case"
            }
            Self::Verify(_) => "figures that were repaired stay repaired",
            Self::Device(_) => {
                "a deletion that has begun goes on when a server runs; of all else, run it again"
            }
            Self::Journal(_)
            | Self::Key(_)
            | Self::Incident(_)
            | Self::Fleet(_)
            | Self::Policy(_)
            | Self::Window(_)
            | Self::Channel(_) => "run it again",
            Self::Secrets(_) => "either key may be in use; run it again",
            Self::Doctor(_) | Self::Health(_) => "nothing was changed",
            Self::Simulate(_) => {
                "what was sent stays on the server; start again with another --seed"
            }
            Self::Openapi | Self::Completions(_) | Self::Man(_) => "run it again",
        })
    }
}

/// Runs the command that was typed.
#[must_use]
pub fn main() -> ExitCode {
    let Typed { cli, settings_file, masks, problem } = match typed() {
        Ok(typed) => typed,
        Err(code) => return code,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(http_threads())
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}").into()),
    };
    if let Some(remains) = cli.command.as_ref().and_then(Command::remains)
        && let Err(message) = interrupt::end_at_signals(runtime.handle(), remains)
    {
        return fail(&message.into());
    }
    if !matches!(cli.command, Some(Command::Serve(_))) {
        let level = cli.log.log_level.unwrap_or(LogLevel::WARN);
        if let Err(message) = logs::init_for_command(level, || progress::AboveBar) {
            return fail(&message.into());
        }
    }
    let result = runtime.block_on(async {
        match cli.command {
            Some(Command::Serve(arguments)) => {
                serve::run(&arguments, &cli.log, &settings_file).await
            }
            Some(Command::Migrate(command)) => migrate::run(&command).await,
            Some(Command::Db(command)) => db::run(&command).await,
            Some(Command::Verify(command)) => verify::run(&command).await,
            Some(Command::Import(command)) => import::run(&command).await,
            Some(Command::Export(command)) => export::run(&command).await,
            Some(Command::Backup(command)) => backup::backup(&command),
            Some(Command::Restore(command)) => backup::restore(&command).await,
            Some(Command::Copy(command)) => copy::run(&command).await,
            Some(Command::Journal(command)) => journal::run(&command),
            Some(Command::Key(command)) => key::run(&command).await,
            Some(Command::Incident(command)) => incident::run(&command).await,
            Some(Command::Fleet(command)) => fleet::run(&command).await,
            Some(Command::Device(command)) => device::run(&command).await,
            Some(Command::Policy(command)) => policy::run(&command).await,
            Some(Command::Window(command)) => window::run(&command).await,
            Some(Command::Channel(command)) => channel::run(&command).await,
            Some(Command::Secrets(command)) => secrets::run(&command).await,
            Some(Command::Doctor(command)) => {
                doctor::run(&command, &settings_file, problem.as_deref(), &masks).await
            }
            Some(Command::Health(command)) => health::run(&command).await,
            Some(Command::Simulate(command)) => simulate::run(&command).await,
            Some(Command::Openapi) => openapi::run(),
            Some(Command::Completions(command)) => completions::run(&command),
            Some(Command::Man(command)) => man::run(&command),
            // `with_command_first` has seen to it.
            None => Err(Failure::usage("no command")),
        }
    });
    match result {
        Ok(()) | Err(Failure { status: ExitStatus::Partly, .. }) if output::is_incomplete() => {
            fail(&"cannot write to standard output".to_owned().into())
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let message = masks.mask(&failure.message);
            let message =
                if failure.is_usage() { settings_file.with_origin(message) } else { message };
            fail(&Failure { message, ..failure })
        }
    }
}

/// One core is left to whatever writes: SQLite's writer thread, or PostgreSQL. Two threads for HTTP on two
/// cores keep it waiting for one; with a single one they store 12 % more events on SQLite and 20 % more on
/// PostgreSQL from 64 connections, and no fewer from 256 (docs/benchmarks.md).
fn http_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cores.saturating_sub(1).max(1)
}

fn fail(failure: &Failure) -> ExitCode {
    eprintln!("pisync: {}", failure.message);
    failure.status.into()
}

/// Puts the command's name first: options may also stand before it, `pisync --data-dir d key list`. Without a name,
/// `pisync` and `pisync --port 80`, it is `serve`.
fn with_command_first(mut words: Vec<OsString>, definition: &clap::Command) -> Vec<OsString> {
    let mut place = 1;
    while let Some(word) = words.get(place).map(|word| word.to_string_lossy()) {
        if place == 1 && ["-h", "--help", "-V", "--version"].contains(&&*word) {
            return words;
        }
        let Some(option) = word.strip_prefix('-') else { break };
        let name = option.strip_prefix('-').unwrap_or_default();
        place += if takes_next_word(definition, name) { 2 } else { 1 };
    }
    let is_command = words
        .get(place)
        .is_some_and(|word| definition.find_subcommand(word).is_some() || word == "help");
    if is_command || place == 1 && words.len() > 1 {
        words[1..=place].rotate_right(1);
    } else {
        words.insert(words.len().min(1), "serve".into());
    }
    words
}

/// Whether the word behind an option, given without its hyphens, is its value.
fn takes_next_word(command: &clap::Command, option: &str) -> bool {
    command
        .get_arguments()
        .any(|argument| argument.get_long() == Some(option) && argument.get_action().takes_values())
        || command.get_subcommands().any(|inner| takes_next_word(inner, option))
}

/// What was typed, with the settings of the environment and of `.env`.
struct Typed {
    cli: Cli,
    settings_file: SettingsFile,
    masks: Masks,
    /// Why the settings could not be read, for `doctor` alone: to others that is the end.
    problem: Option<String>,
}

/// Reads what was typed. When it makes no sense, or help was asked for, that has been said, and the process ends with
/// the code.
fn typed() -> Result<Typed, ExitCode> {
    let settings_file = SettingsFile::read(&known_variables());
    let typed = with_command_first(std::env::args_os().collect(), &definition());
    let completed = match settings_file.complete(definition(), typed.clone()) {
        Ok(completed) => completed,
        Err(failure) => {
            let message = Masks::of(&typed).mask(&failure.message);
            return match doctor_alone(&typed) {
                Some(cli) => {
                    let masks = Masks::of(&typed);
                    Ok(Typed { cli, settings_file, masks, problem: Some(message) })
                }
                None => Err(fail(&Failure { message, ..failure })),
            };
        }
    };
    let is_complete = completed.is_some();
    let (mut command, words) = match completed {
        Some(completed) => (without_environment(definition(), false), completed),
        // The command as it is written shows the help that was asked for, which names the variables, or says what is
        // wrong.
        None => (definition(), typed.clone()),
    };
    let masks = Masks::of(&words);
    let read = command.try_get_matches_from_mut(words).and_then(|matches| {
        refuse_misplaced_urls(&mut command, &matches)?;
        Cli::from_arg_matches(&matches)
    });
    let cli = match (read, doctor_alone(&typed)) {
        (Ok(cli), _) => cli,
        (Err(error), Some(cli)) if is_complete => {
            let text = error.to_string();
            let problem = text.lines().next().unwrap_or_default();
            let problem = problem.strip_prefix("error: ").unwrap_or(problem);
            let problem = settings_file.with_origin(problem.to_owned());
            return Ok(Typed { cli, settings_file, masks, problem: Some(problem) });
        }
        (Err(error), _) => {
            let code = say(&error, &masks);
            let text = error.to_string();
            let problem = text.lines().next().unwrap_or_default();
            if let Some(origin) = settings_file.origin(problem).filter(|_| error.use_stderr()) {
                eprintln!("\n{origin}");
            }
            return Err(code);
        }
    };
    if !matches!(cli.command, Some(Command::Serve(_) | Command::Doctor(_))) {
        // A server writes them into its log, and `doctor` into its report.
        for warning in &settings_file.warnings {
            eprintln!("pisync: {warning}");
        }
    }
    Ok(Typed { cli, settings_file, masks, problem: None })
}

/// What was typed, if that makes sense by itself and is `doctor`.
fn doctor_alone(typed: &[OsString]) -> Option<Cli> {
    let mut command = without_environment(definition(), false);
    let matches = command.try_get_matches_from_mut(typed).ok()?;
    refuse_misplaced_urls(&mut command, &matches).ok()?;
    let cli = Cli::from_arg_matches(&matches).ok()?;
    matches!(cli.command, Some(Command::Doctor(_))).then_some(cli)
}

/// Says what clap has to say, be it help or an error, and returns the exit code.
fn say(error: &clap::Error, masks: &Masks) -> ExitCode {
    let text = error.to_string();
    let masked = masks.mask(&text);
    if masked == text {
        // In colours, where there are any. The reader may be gone.
        let _ = error.print();
    } else {
        eprintln!("{}", masked.trim_end());
        eprintln!("\nA database's URL is typed behind --database-url, or set as DATABASE_URL.");
    }
    if error.use_stderr() { ExitStatus::Usage.into() } else { ExitCode::SUCCESS }
}

/// The commands and their settings. Help names variables and never shows what they are set to: a password may stand in
/// any of them by mistake.
fn definition() -> clap::Command {
    fn hide_values(command: clap::Command) -> clap::Command {
        command.mut_args(|argument| argument.hide_env_values(true)).mut_subcommands(hide_values)
    }
    hide_values(Cli::command())
}

/// A database's URL where a path or a name is meant would become a folder, or be sent to a server and logged, with the
/// password in it.
fn refuse_misplaced_urls(
    command: &mut clap::Command,
    matches: &ArgMatches,
) -> Result<(), clap::Error> {
    let (mut current, mut found) = (&*command, matches);
    let mut wrong = None;
    loop {
        for argument in current.get_arguments().filter(|argument| !settings::is_url(argument)) {
            let values = found.get_raw(argument.get_id().as_str()).into_iter().flatten();
            let is_url = |value: &std::ffi::OsStr| {
                let value = value.as_encoded_bytes();
                value.starts_with(b"postgres://") || value.starts_with(b"postgresql://")
            };
            if values.into_iter().any(is_url) {
                wrong = Some(argument.to_string());
            }
        }
        let Some((name, inner)) = found.subcommand() else { break };
        let Some(of_name) = current.find_subcommand(name) else { break };
        (current, found) = (of_name, inner);
    }
    let Some(argument) = wrong else { return Ok(()) };
    let message = format!(
        "{argument} is not for the URL of a database, which is typed behind --database-url or set as DATABASE_URL"
    );
    Err(command.error(ErrorKind::ValueValidation, message))
}

/// The environment variables that any command reads.
fn known_variables() -> Vec<String> {
    fn collect(command: &clap::Command, names: &mut Vec<String>) {
        let variables = command.get_arguments().filter_map(clap::Arg::get_env);
        names.extend(variables.map(|name| name.to_string_lossy().into_owned()));
        for inner in command.get_subcommands() {
            collect(inner, names);
        }
    }
    let mut names = Vec::new();
    collect(&Cli::command(), &mut names);
    names
}

#[cfg(test)]
mod tests {
    use super::{settings::LOG_LEVEL, *};

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serving_is_the_default() {
        for (typed, expected) in [
            ("pisync", "pisync serve"),
            ("pisync --port 1", "pisync serve --port 1"),
            ("pisync --port=1", "pisync serve --port=1"),
            ("pisync --port", "pisync serve --port"),
            ("pisync --port 1 key", "pisync key --port 1"),
            ("pisync --data-dir key", "pisync serve --data-dir key"),
            ("pisync --data-dir=d key list", "pisync key --data-dir=d list"),
            ("pisync --data-dir d nonsense", "pisync serve --data-dir d nonsense"),
            ("pisync --yes migrate down", "pisync migrate --yes down"),
            ("pisync --help", "pisync --help"),
            ("pisync help key", "pisync help key"),
            ("pisync nonsense", "pisync nonsense"),
            ("pisync migrate up", "pisync migrate up"),
        ] {
            let words = typed.split(' ').map(OsString::from).collect();
            let words = with_command_first(words, &definition());
            let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
            assert_eq!(words.join(" "), expected);
        }
    }

    /// Every command that can be run, by the names that lead to it.
    fn runnable<'a>(
        command: &'a clap::Command,
        path: &[&'a str],
        found: &mut Vec<(Vec<&'a str>, &'a clap::Command)>,
    ) {
        let mut inner = command.get_subcommands().filter(|inner| inner.get_name() != "help");
        if let Some(first) = inner.next() {
            for inner in std::iter::once(first).chain(inner) {
                runnable(inner, &[path, &[inner.get_name()]].concat(), found);
            }
        } else {
            found.push((path.to_vec(), command));
        }
    }

    #[test]
    fn shared_options_stand_before_and_after_every_commands_name() {
        let mut all = definition();
        all.build();
        let mut commands = Vec::new();
        runnable(&all, &[], &mut commands);
        let mut checked = 0;
        for (path, command) in &commands {
            let operands = command.get_positionals().filter(|operand| operand.is_required_set());
            let operands: Vec<_> = operands
                .map(|operand| match operand.get_possible_values().first() {
                    Some(value) => value.get_name().to_owned(),
                    None => "1".to_owned(),
                })
                .collect();
            let operands: Vec<_> = operands.iter().map(String::as_str).collect();
            for option in command.get_arguments() {
                if !matches!(option.get_help_heading(), Some("Database" | "Logs")) {
                    continue;
                }
                let value = match option.get_id().as_str() {
                    LOG_LEVEL => "warn",
                    "auto_migrate" => "true",
                    _ => "7",
                };
                let flag = format!("--{}", option.get_long().unwrap());
                for place in 0..=path.len() {
                    let (before, after) = path.split_at(place);
                    let words = [&["pisync"], before, &[&flag, value], after, &operands].concat();
                    let words = words.iter().map(OsString::from).collect();
                    let words = with_command_first(words, &definition());
                    let words = SettingsFile::default().complete(definition(), words).unwrap();
                    let words = words.unwrap_or_else(|| panic!("{path:?} {flag} at {place}"));
                    let mut lenient = without_environment(definition(), true);
                    let found = lenient.try_get_matches_from_mut(words).unwrap();
                    let found = path.iter().fold(&found, |found, name| {
                        found.subcommand_matches(name).unwrap_or_else(|| panic!("{path:?}"))
                    });
                    let mut given = found.get_raw(option.get_id().as_str()).unwrap();
                    assert_eq!(given.next().unwrap(), value, "{path:?} {flag} at {place}");
                    checked += 1;
                }
            }
        }
        assert!(checked > 200, "only {checked} were found");
    }
}
