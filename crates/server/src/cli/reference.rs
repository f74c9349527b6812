//! The settings that commands read, as their documentation lists them. The table of `docs/configuration.md` is made
//! here, from the definitions that also read what is typed. Nothing here runs in a server.

use std::collections::BTreeMap;

use clap::{Arg, Command};

/// What a help text says behind itself when the default is no value that could be typed.
const DEFAULT: &str = " [default: ";

/// A setting, whichever commands read it.
#[derive(Debug)]
pub struct Setting {
    /// The environment variable.
    pub variable: String,
    /// The flag, with its two hyphens.
    pub flag: String,
    /// What holds when it is not set; `None` when nothing does.
    pub default: Option<String>,
    /// What it does, for a person to read.
    pub help: String,
    /// The commands that read it, in the order of `pisync --help`.
    pub commands: Vec<String>,
}

impl Setting {
    fn of(argument: &Arg) -> Option<Self> {
        let variable = argument.get_env()?.to_string_lossy().into_owned();
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let (help, in_words) = match help.split_once(DEFAULT) {
            Some((help, default)) => (help.to_owned(), default.strip_suffix(']')),
            None => (help.clone(), None),
        };
        let values: Vec<_> =
            argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default =
            if values.is_empty() { in_words.map(str::to_owned) } else { Some(values.join(",")) };
        let flag = format!("--{}", argument.get_long()?);
        Some(Self { variable, flag, default, help, commands: Vec::new() })
    }
}

/// All settings, the server's first. A server's come in the order of its help.
#[must_use]
pub fn settings() -> Vec<Setting> {
    let mut definition = super::definition();
    // So that each command has the settings that all of them share.
    definition.build();
    let (mut settings, mut places) = (Vec::new(), BTreeMap::new());
    for command in commands(&definition) {
        visit(command, &mut |argument| {
            let Some(setting) = Setting::of(argument) else { return };
            let place = *places.entry(setting.variable.clone()).or_insert(settings.len());
            if place == settings.len() {
                settings.push(setting);
            }
            let of_setting: &mut Vec<String> = &mut settings[place].commands;
            if of_setting.last().is_none_or(|last| last != command.get_name()) {
                of_setting.push(command.get_name().to_owned());
            }
        });
    }
    settings
}

/// The options with a value that no variable sets, each as the words of its command and then itself.
#[must_use]
pub fn options() -> Vec<Vec<String>> {
    fn collect(command: &Command, path: &[String], found: &mut Vec<Vec<String>>) {
        let is_setting = |option: &&Arg| option.get_env().is_some();
        for option in command.get_arguments().filter(|option| !is_setting(option)) {
            let Some(long) = option.get_long() else { continue };
            if option.get_action().takes_values() {
                found.push([path, &[format!("--{long}")]].concat());
            }
        }
        for inner in command.get_subcommands() {
            collect(inner, &[path, &[inner.get_name().to_owned()]].concat(), found);
        }
    }
    let mut found = Vec::new();
    collect(&super::definition(), &[], &mut found);
    found
}

/// The commands that people type.
fn commands(definition: &Command) -> impl Iterator<Item = &Command> {
    definition.get_subcommands().filter(|command| command.get_name() != "help")
}

fn visit(command: &Command, each: &mut impl FnMut(&Arg)) {
    command.get_arguments().for_each(&mut *each);
    command.get_subcommands().for_each(|inner| visit(inner, each));
}

/// The settings as a table in Markdown.
#[must_use]
pub fn settings_table() -> String {
    let definition = super::definition();
    let all: Vec<_> = commands(&definition).map(Command::get_name).collect();
    let mut table = "| variable | flag | default | what it does | read by |\n".to_owned();
    table += "| --- | --- | --- | --- | --- |\n";
    for Setting { variable, flag, default, help, commands } in settings() {
        let default = match default {
            Some(default) if default.contains(' ') => cell(&default),
            Some(default) => format!("`{default}`"),
            None => "–".to_owned(),
        };
        let (help, commands) = (cell(&help), read_by(&commands, &all));
        table += &format!("| `{variable}` | `{flag}` | {default} | {help} | {commands} |\n");
    }
    table
}

/// Few commands are named; of many, those that are missing.
fn read_by(commands: &[String], all: &[&str]) -> String {
    let list = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
        names.join(", ")
    };
    let missing: Vec<_> =
        all.iter().copied().filter(|name| !commands.iter().any(|one| one == name)).collect();
    match missing.len() {
        0 => "all".to_owned(),
        few if few < commands.len() => format!("all but {}", list(&missing)),
        _ => list(&commands.iter().map(String::as_str).collect::<Vec<_>>()),
    }
}

/// Text without what would mean something to Markdown.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('*', "\\*")
}
