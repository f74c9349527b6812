//! `pisync health`: asks the server of this configuration whether it can serve, for a container's or a supervisor's check.
//! `doctor` asks in the same way. It reads where the server listens, and never opens the database.

mod client;

use clap::Args;

use super::exit::Failure;
use crate::config::ListenArgs;

#[derive(Debug, Args)]
#[command(after_help = "\
Asks GET /health/ready at HOST and PORT, of a server on this machine where HOST
means every interface. With TLS_CERT it speaks HTTPS and trusts the certificate
in that file, which is the server's own, and no other.

Examples:
  pisync health --port 8080
  HEALTHCHECK CMD pisync health  in a Dockerfile

Exit status: 0 when the server can serve, 1 when it cannot or none answers, 2 on
wrong usage.")]
pub(super) struct HealthCommand {
    #[command(flatten)]
    listen: ListenArgs,
}

/// How a server is.
#[derive(Debug)]
pub(super) enum Health {
    /// It can serve.
    Ready,
    /// It answers that it cannot serve now.
    Unready,
    /// Nothing answers; why.
    Silent(String),
    /// What answers is no PiSync server; what it said.
    Foreign(String),
}

pub(super) async fn run(command: &HealthCommand) -> Result<(), Failure> {
    command.listen.check()?;
    let url = command.listen.url();
    let health = ask(&command.listen).await?;
    match health.problem(&url) {
        None => {
            println!("ready: {url}");
            Ok(())
        }
        Some(problem) => Err(problem.into()),
    }
}

/// Asks the server that this configuration is of.
///
/// # Errors
/// When its certificate cannot be read.
pub(super) async fn ask(listen: &ListenArgs) -> Result<Health, String> {
    client::ask(listen).await
}

impl Health {
    /// What is wrong with the server at `url`, and what to do; `None` when nothing is.
    pub(super) fn problem(&self, url: &str) -> Option<String> {
        Some(match self {
            Self::Ready => return None,
            Self::Unready => format!(
                "the server at {url} cannot serve: its database is away, its clock is not set, or it is stopping; look at its log"
            ),
            Self::Silent(why) => format!(
                "no server answers at {url}: {why}; start it with `pisync serve`, or set HOST and PORT to where it listens"
            ),
            Self::Foreign(what) => format!(
                "what answers at {url} is not PiSync: {what}; set HOST, PORT and TLS_CERT as the server has them"
            ),
        })
    }
}
