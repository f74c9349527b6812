//! `pisync man`: a manual page for each command, from the definition that also reads what is typed. It writes into one folder
//! and reads no setting. The pages are for everybody, so they have ordinary modes, unlike what holds a fleet's data.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, Command, builder::Resettable};
use clap_mangen::Man;

use super::exit::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo pisync man /usr/local/share/man/man1 && man pisync-key-create")]
pub(super) struct ManCommand {
    /// The folder to write them into; it is made when it is missing
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(super) fn run(command: &ManCommand) -> Result<(), Failure> {
    let folder = &command.folder;
    let failed = |error: io::Error| {
        let why = if folder.is_file() { "it is a file".to_owned() } else { error.to_string() };
        let folder = folder.display();
        format!("cannot write manual pages to {folder}: {why}; name a folder that you may write to")
    };
    fs::create_dir_all(folder).map_err(failed)?;
    let mut definition = super::definition().disable_help_subcommand(true);
    definition.build();
    write_pages(&definition, folder).map_err(failed)?;
    println!("wrote manual pages to {}", folder.display());
    Ok(())
}

/// Writes the pages of a command and of those below it.
fn write_pages(command: &Command, folder: &Path) -> io::Result<()> {
    let shown = command.get_subcommands().filter(|inner| !inner.is_hide_set());
    shown.into_iter().try_for_each(|inner| write_pages(inner, folder))?;
    let page = Man::new(command.clone().after_help(Resettable::Reset));
    let mut text = Vec::new();
    page.render(&mut text)?;
    let mut text = String::from_utf8_lossy(&text).into_owned();
    if let Some(help) = command.get_after_help() {
        let end = text.find("\n.SH VERSION").map_or(text.len(), |at| at + 1);
        text.insert_str(end, &sections(&help.to_string()));
    }
    fs::write(folder.join(page.get_filename()), text)
}

/// What stands behind the options in a command's help, as sections. clap's own page fills all of it into paragraphs, so
/// that nobody could copy an example.
fn sections(help: &str) -> String {
    let mut sections = String::new();
    let mut open = "";
    for paragraph in help.trim().split("\n\n") {
        let is_examples = paragraph.starts_with("Example");
        let heading = if is_examples {
            "EXAMPLES"
        } else if paragraph.starts_with("Exit status:") {
            "EXIT STATUS"
        } else {
            "NOTES"
        };
        if heading != open {
            let _ = writeln!(sections, ".SH \"{heading}\"");
            open = heading;
        }
        let _ = writeln!(sections, ".PP");
        let bare = paragraph.strip_prefix("Examples:\n").or(paragraph.strip_prefix("Example:\n"));
        if is_examples {
            let lines: Vec<_> = bare.unwrap_or(paragraph).lines().map(escaped).collect();
            let _ = writeln!(sections, ".nf\n{}\n.fi", lines.join("\n"));
        } else {
            let lines: Vec<_> = paragraph.lines().map(escaped).collect();
            let _ = writeln!(sections, "{}", lines.join("\n"));
        }
    }
    sections
}

/// A line that means to roff what it says.
fn escaped(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    if line.starts_with('.') { format!("\\&{line}") } else { line }
}
