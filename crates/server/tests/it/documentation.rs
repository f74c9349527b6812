//! What README.md, `docs/` and `.env.example` say of the program, compared with it: settings, figures, names of commands
//! and metrics, links. Their commands are run by `documented_commands`.

use std::collections::BTreeSet;

use pisync::cli::reference;

use crate::support::documents::{path, text};

/// `UPDATE_DOCS=1` writes the table instead of comparing it.
#[test]
fn the_table_of_settings_is_current() {
    const PAGE: &str = "docs/configuration.md";
    let page = text(PAGE);
    let (before, rest) = page.split_once("<!-- settings -->\n").unwrap();
    let (table, after) = rest.split_once("<!-- /settings -->").unwrap();
    let made = format!("\n{}\n", reference::settings_table());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let page = format!("{before}<!-- settings -->\n{made}<!-- /settings -->{after}");
        std::fs::write(path(PAGE), page).unwrap();
        return;
    }
    assert!(
        table == made,
        "the table of {PAGE} is out of date: run `UPDATE_DOCS=1 cargo test --test it documentation::`\n{made}"
    );
}

/// It has every setting of a server, each with its default or an example.
#[test]
fn the_example_of_an_env_file_has_every_setting_of_a_server() {
    let example = text(".env.example");
    let settings = reference::settings();
    let of_server: Vec<_> = settings
        .iter()
        // An older name for APP_ENV.
        .filter(|setting| setting.variable != "NODE_ENV")
        .filter(|setting| setting.commands.iter().any(|command| command == "serve"))
        .collect();
    let lines: Vec<_> = example
        .lines()
        .filter_map(|line| line.strip_prefix('#')?.split_once('='))
        .filter(|(name, _)| !name.contains(' '))
        .map(|(name, value)| (name, value.split_once('#').map_or(value, |(value, _)| value).trim()))
        .collect();
    let expected: BTreeSet<_> = of_server.iter().map(|setting| setting.variable.as_str()).collect();
    assert_eq!(lines.iter().map(|(name, _)| *name).collect::<BTreeSet<_>>(), expected);
    assert_eq!(lines.len(), expected.len(), "a setting is there twice");
    for setting in of_server {
        let (_, value) = lines.iter().find(|(name, _)| *name == setting.variable).unwrap();
        match &setting.default {
            // In words, the value comes first.
            Some(default) => {
                let first = default.split([' ', ',']).next();
                assert_eq!(Some(*value), first, "{}", setting.variable);
            }
            None => {
                let is_example = value.is_empty() || setting.variable == "DATABASE_URL";
                assert!(is_example, "{}={value}: there is no default", setting.variable);
            }
        }
    }
}
