//! `pisync completions`: a script with which a shell completes commands and options. It comes from the definition that also
//! reads what is typed. It opens nothing and reads no setting.

use clap::Args;
use clap_complete::Shell;

use super::exit::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pisync completions bash > /etc/bash_completion.d/pisync
  pisync completions zsh > /usr/local/share/zsh/site-functions/_pisync
  pisync completions fish > ~/.config/fish/completions/pisync.fish")]
pub(super) struct CompletionsCommand {
    /// Whose language the script is in
    shell: Shell,
}

pub(super) fn run(command: &CompletionsCommand) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(command.shell, &mut super::definition(), "pisync", &mut script);
    print!("{}", String::from_utf8_lossy(&script));
    Ok(())
}
