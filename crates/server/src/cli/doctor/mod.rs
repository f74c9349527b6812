//! `pisync doctor`: would a server of this configuration work, and if not, what is to be done? `checks` looks at one thing
//! after the other; this file runs them and says what they found. It changes no data and shows no password.

mod checks;
mod folders;

use clap::Args;
use serde_json::json;

use super::{exit::Failure, masked::Masks, output::JsonArgs, settings::SettingsFile};
use crate::config::ServeArgs;

#[derive(Debug, Args)]
#[command(after_help = "\
Run it in the server's folder, as the server's user, with the server's settings.
It looks at the configuration, the database and its schema, the folders and
their disks, the clock, and at a running server. Each line begins with ok,
warning or failed, and ends with what to do. It changes no data.

Examples:
  pisync doctor
  pisync doctor --host 0.0.0.0  before others may reach the server
  pisync doctor --json          for programs

Exit status: 0 when nothing failed, 1 when something did, 2 on wrong usage.")]
pub(super) struct DoctorCommand {
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    serve: ServeArgs,
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Ok,
    /// A server works; somebody should look at it.
    Warning,
    /// A server does not work.
    Failed,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// One line of the report.
#[derive(Debug)]
struct Finding {
    /// What was looked at.
    check: &'static str,
    state: State,
    /// What was found, and what to do.
    message: String,
}

/// What is found, as it is found.
struct Report<'a> {
    json: JsonArgs,
    masks: &'a Masks,
    findings: Vec<Finding>,
}

impl Report<'_> {
    fn add(&mut self, check: &'static str, state: State, message: impl AsRef<str>) {
        let message = self.masks.mask(message.as_ref());
        let mark = state.as_str();
        say!(self.json, "{mark:<8} {check:<14} {message}");
        self.findings.push(Finding { check, state, message });
    }

    fn ok(&mut self, check: &'static str, message: impl AsRef<str>) {
        self.add(check, State::Ok, message);
    }

    fn warn(&mut self, check: &'static str, message: impl AsRef<str>) {
        self.add(check, State::Warning, message);
    }

    fn fail(&mut self, check: &'static str, message: impl AsRef<str>) {
        self.add(check, State::Failed, message);
    }
}

/// Checks everything. `problem` is why the settings could not even be read.
pub(super) async fn run(
    command: &DoctorCommand,
    settings_file: &SettingsFile,
    problem: Option<&str>,
    masks: &Masks,
) -> Result<(), Failure> {
    let mut report = Report { json: command.json, masks, findings: Vec::new() };
    match problem {
        // Which database, and where the server listens, is anybody's guess.
        Some(problem) => report.fail("configuration", problem),
        None => checks::all(&mut report, &command.serve, settings_file).await,
    }
    let Report { findings, json, .. } = report;
    let worst = findings.iter().map(|finding| finding.state).max().unwrap_or(State::Ok);
    json.document(|| {
        let checks = findings.iter().map(|Finding { check, state, message }| {
            json!({"check": check, "state": state.as_str(), "message": message})
        });
        json!({"state": worst.as_str(), "checks": checks.collect::<Vec<_>>()})
    });
    if worst < State::Failed {
        return Ok(());
    }
    let failed = findings.iter().filter(|finding| finding.state == State::Failed).count();
    Err(format!("failed checks: {failed}; see above what to do").into())
}
